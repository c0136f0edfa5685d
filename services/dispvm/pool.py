"""Preloaded disposables: making, handing out, removing them.

Owns the tasks that bring what is there to what core.preload wants. Must not touch volumes
or domains: lifecycle does. Invariants: a preloaded disposable is chosen without a pause
between look and claim, and its mark is off the list in the registry before anybody learns
its name, so it is handed out at most once, also across a restart; one fill a template at a
time; what this process did not begin and is not ready is removed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from bulkhead import codec
from bulkhead.api import domains_pb2, registry_pb2
from bulkhead.bus.client import CallContext
from bulkhead.bus.errors import BusError
from bulkhead.bus.events import Entry, ReplicaRunner
from bulkhead.failpoints import hit
from bulkhead.model import events
from bulkhead.model.evaluate import evaluate, power_state
from bulkhead.model.plan.properties import DEFERRED_NETVM
from bulkhead.model.records import (
    FactPut,
    Operation,
    OperationPut,
    Phase,
    PowerFact,
    Qube,
    QubePut,
    QubeRemoved,
    WireEvent,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import (
    CreateSpec,
    KillSpec,
    PauseSpec,
    PreloadMarks,
    RemoveSpec,
    StartSpec,
    UnpauseSpec,
)
from bulkhead.model.view import View
from clients.bus import DomainsClient, RegistryClient
from services.dispvm import failpoint_table  # noqa: F401 - declares what hit() names
from services.dispvm.core import preload
from services.dispvm.core.preload import Fate, Trigger
from services.dispvm.operations import Operations

log = logging.getLogger("bulkhead.dispvm")

MARK_TIMEOUT_S = 10.0
OPERATION_TIMEOUT_S = 300.0
SEEN_TIMEOUT_S = 10.0
# How long the waiting for services may take beyond the guest's own limit.
SERVICE_GRACE_S = 5.0
DISCARD_ATTEMPTS = 4
DISCARD_PAUSE_S = 2.0
RECOVERY_DELAY_S = 1.0
# How long the host may be awake between the two calls of a suspend; its clock stands
# still while it sleeps.
HOLD_S = 120.0
# What is left of a call's time when the removals are not waited for any more.
ANSWER_S = 5.0


@dataclass(slots=True)
class Item:
    """A preloaded disposable that this process makes, keeps or hands out.

    claimed: the key of the request that gets it; wanted: set with it. complete: it is
    ready or dead; dead: it will not be handed out any more.
    """

    uuid: str
    name: str
    template: str
    claimed: str = ""
    dead: bool = False
    used: bool = False
    wanted: asyncio.Event = field(default_factory=asyncio.Event)
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Pool:
    """The preloaded disposables of all templates."""

    def __init__(
        self,
        operations: Operations,
        registry: RegistryClient,
        domains: DomainsClient,
        replica: ReplicaRunner,
        available: Callable[[], int | None],
    ) -> None:
        self._operations = operations
        self._registry = registry
        self._domains = domains
        self._replica = replica
        self._available = available
        self._items: dict[str, Item] = {}
        self._mine: set[str] = set()
        self._nonce = os.urandom(8)
        self._count = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._discards: dict[str, asyncio.Task[None]] = {}
        self._fills: dict[str, asyncio.Task[None]] = {}
        self._queued: dict[str, asyncio.Task[None]] = {}
        self._due: dict[str, tuple[float, asyncio.Handle]] = {}
        self._closing = False
        # Set while the host is suspended: nothing is begun.
        self._held: asyncio.TimerHandle | None = None

    @property
    def _view(self) -> View:
        return self._replica.view

    def start(self, *, refill: bool) -> None:
        """Look at everything once. refill: fill what is short, as after a restart."""
        view = self._view
        for operation in list(view.operations.values()):
            self._follow_create(operation)
        for qube in list(view.qubes()):
            self._look(qube)
        if refill:
            for template in list(preload.templates(view)):
                self._schedule(template, RECOVERY_DELAY_S, "dispvm was started again")

    async def close(self) -> None:
        """Stop working; what is under way is found by the next start."""
        self._closing = True
        if self._held is not None:
            self._held.cancel()
        for _, handle in self._due.values():
            handle.cancel()
        tasks = (*self._tasks, *self._discards.values(), *self._fills.values())
        for task in (*tasks, *self._queued.values()):
            task.cancel()
        await asyncio.gather(*tasks, *self._queued.values(), return_exceptions=True)

    # ---- the stream

    def follow(self, entry: Entry) -> None:
        """React to one entry; called after the view holds it."""
        view = self._view
        if entry.resync:
            # What asked for more may be among the events that were lost.
            self.start(refill=True)
            return
        touched: dict[str, None] = {}
        for change in entry.changes:
            match change:
                case OperationPut(operation):
                    self._follow_create(operation)
                case QubePut(qube) if qube.klass == "DispVM":
                    touched[qube.uuid] = None
                case QubePut(qube) if preload.LIST in qube.features:
                    # One that was begun may come on the list after the maximum has changed.
                    self._trim(qube.uuid)
                case FactPut(PowerFact() as fact):
                    touched[fact.uuid] = None
                case QubeRemoved(gone):
                    self._mine.discard(gone)
                    self._items.pop(gone, None)
        for identity in touched:
            found = view.by_uuid(identity)
            if found is not None:
                self._look(found)
        for trigger in preload.triggers(view, entry.events):
            self._act(trigger)

    def _follow_create(self, operation: Operation) -> None:
        """Which disposables this process makes is known before they appear."""
        if operation.kind == "CREATE" and operation.request_id[:8] == self._nonce:
            self._mine.update(operation.subjects)

    def _look(self, qube: Qube) -> None:
        item = self._items.get(qube.uuid)
        match preload.fate(self._view, qube, self._mine):
            case Fate.LEFT_OVER:
                if item is None or item.complete.is_set():
                    self._discard(qube.uuid, refill=item is None)
            case Fate.TAKEN:
                if item is None:
                    item = self._keep(qube)
                if item.complete.is_set() and not (item.claimed or item.dead or item.used):
                    item.used = True
                    self._spawn(self._used_unasked(item), f"use {item.name}")
            case _:
                pass

    def _act(self, trigger: Trigger) -> None:
        template = self._view.qube(trigger.template)
        if template is None:
            return
        for qube in preload.listed(self._view, template):
            reason = trigger.reason if trigger.anew else ""
            if trigger.refresh:
                reason = preload.outdated(self._view, template, qube)
            if reason and not self._claimed(qube):
                log.info("removing preloaded disposable %s: %s", qube.name, reason)
                self._discard(qube.uuid)
        self._schedule(template, trigger.delay, trigger.reason)

    def _claimed(self, qube: Qube) -> bool:
        item = self._items.get(qube.uuid)
        return item is not None and bool(item.claimed)

    def _keep(self, qube: Qube) -> Item:
        """The item of a disposable that was ready before this process started."""
        item = Item(qube.uuid, qube.name, qube.properties.get("template", ""))
        item.complete.set()
        self._items[qube.uuid] = item
        return item

    # ---- the host sleeps

    async def suspend(self, timeout: float) -> None:
        """Remove all that wait, and what is being made; make no more until resume()."""
        if self._held is not None:
            self._held.cancel()
        self._held = asyncio.get_running_loop().call_later(HOLD_S, self.resume)
        view = self._view
        for template in list(preload.templates(view)):
            for qube in preload.listed(view, template):
                if not self._claimed(qube):
                    self._discard(qube.uuid)
        going = {*self._discards.values(), *self._fills.values()}
        if going:
            await asyncio.wait(going, timeout=max(0.0, timeout - ANSWER_S))

    def resume(self) -> None:
        """Fill what is short; nothing happens where nothing was held."""
        if self._held is None:
            return
        self._held.cancel()
        self._held = None
        for template in list(preload.templates(self._view)):
            self._schedule(template, 0, "the host woke up")

    # ---- filling

    def _schedule(
        self, template: Qube, delay: float, reason: str, *, announced: bool = False
    ) -> None:
        """Fill in delay seconds; an earlier appointment stands."""
        loop = asyncio.get_running_loop()
        due = self._due.get(template.uuid)
        when = loop.time() + abs(delay)
        if due is not None:
            if due[0] <= when:
                return
            due[1].cancel()
        elif not announced and (
            preload.vacancy(self._view, template) or preload.excess(self._view, template)
        ):
            event = events.preload_start(template, reason, delay or None)
            self._spawn(self._announce(template, event), f"announce {template.name}")
        handle = loop.call_at(when, self._fire, template.uuid, reason)
        self._due[template.uuid] = (when, handle)

    def _fire(self, identity: str, reason: str) -> None:
        self._due.pop(identity, None)
        self._spawn(self.fill(identity, reason), f"fill {identity}")

    async def request(self, template: Qube, reason: str) -> None:
        """Fill now and wait for the end; the first failure is raised."""
        await self._announce(template, events.preload_start(template, reason))
        preload.check_supported(self._view, template)
        await self.fill(template.uuid, reason)

    async def fill(self, identity: str, reason: str) -> None:
        """Fill the template's list. Joins a fill that is not begun, waits for one that is.

        What is too many goes at once, whatever a fill under way is waiting for.
        """
        self._trim(identity)
        queued = self._queued.get(identity)
        if queued is None:
            running = self._fills.get(identity)
            queued = asyncio.get_running_loop().create_task(
                self._fill_after(identity, running, reason), name=f"fill {identity}"
            )
            self._queued[identity] = queued
        await asyncio.shield(queued)

    def _trim(self, identity: str) -> None:
        template = self._view.by_uuid(identity)
        for qube in preload.excess(self._view, template) if template is not None else ():
            if not self._claimed(qube) and qube.uuid not in self._discards:
                log.info("removing preloaded disposable %s: more than are wanted", qube.name)
                self._discard(qube.uuid)

    async def _fill_after(
        self, identity: str, running: asyncio.Task[None] | None, reason: str
    ) -> None:
        me = asyncio.current_task()
        assert me is not None
        if running is not None:
            await asyncio.wait([running])
        self._fills[identity] = me
        self._queued.pop(identity, None)
        try:
            await self._fill(identity, reason)
        finally:
            if self._fills.get(identity) is me:
                del self._fills[identity]

    async def _fill(self, identity: str, reason: str) -> None:
        template = self._view.by_uuid(identity)
        if template is None or self._held is not None:
            return
        if not preload.vacancy(self._view, template):
            return
        preload.check_supported(self._view, template)
        part = preload.share(self._view, template, self._available())
        if part.can < part.want:
            log.warning(
                "memory for %d of %d preloaded disposables of %s", part.can, part.want,
                template.name,
            )  # fmt: skip
        log.info("preloading %d of %s: %s", part.can, template.name, reason)
        ends = await asyncio.gather(
            *(self._make(template) for _ in range(part.can)), return_exceptions=True
        )
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    async def _make(self, template: Qube) -> None:
        """One preloaded disposable, from nothing to ready; nothing stays when it fails."""
        hit("dispvm.make.before_create")
        spec = CreateSpec(
            klass="DispVM",
            template=template.name,
            template_given=True,
            disposable=True,
            preload=True,
        )
        self._count += 1
        request_id = self._nonce + self._count.to_bytes(8, "big")
        try:
            made = await self._operations.finish(
                spec, CallContext(request_id=request_id, on_behalf_of="dom0"), OPERATION_TIMEOUT_S
            )
        except BusError as error:
            if error.reason == "LIMIT_REACHED":
                log.info("no place for another preloaded disposable of %s", template.name)
                return
            late = self._view.operations.get(error.metadata.get("operation", ""))
            if late is not None:  # it may still appear, and is nobody's then
                self._mine.difference_update(late.subjects)
            raise
        item = Item(made.result["uuid"], made.result["name"], template.name)
        self._mine.add(item.uuid)
        self._items[item.uuid] = item
        try:
            hit("dispvm.make.after_create")
            if item.uuid in self._discards or self._held is not None:
                item.dead = True
                raise _gone(item)
            await self._operations.finish(StartSpec(item.name), _own(), OPERATION_TIMEOUT_S)
            hit("dispvm.make.after_start")
            await self._settle(item)
            hit("dispvm.make.after_complete")
        except BaseException as error:
            if item.dead and isinstance(error, BusError):
                await asyncio.wait([self._discard(item.uuid)])
                return
            if not isinstance(error, asyncio.CancelledError):
                log.warning("preloaded disposable %s failed: %s", item.name, error)
                await asyncio.wait([self._discard(item.uuid)])
            raise

    async def _settle(self, item: Item) -> None:
        """Started: wait for its services and pause it, unless it is wanted before."""
        services = asyncio.ensure_future(self._services(item))
        wanted = asyncio.ensure_future(item.wanted.wait())
        try:
            await asyncio.wait({services, wanted}, return_when=asyncio.FIRST_COMPLETED)
            if services.done():
                services.result()
        finally:
            for task in (services, wanted):
                task.cancel()
            await asyncio.gather(services, wanted, return_exceptions=True)
        if item.dead:
            raise _gone(item)
        if not item.claimed:
            await self._operations.finish(PauseSpec(item.name), _own(), OPERATION_TIMEOUT_S)
            await self._paused(item)
        hit("dispvm.make.after_pause")
        async with item.lock:
            if item.dead:
                raise _gone(item)
            features: tuple[tuple[str, str], ...] = ((preload.COMPLETED, "1"),)
            if not item.claimed:
                features += ((preload.IN_PROGRESS, ""),)
            await self._mark(item.name, features)
            item.complete.set()

    async def _services(self, item: Item) -> None:
        qube = self._view.by_uuid(item.uuid)
        if qube is None:
            raise _gone(item)
        timeout = _patience(self._view, qube)
        await asyncio.gather(
            *(
                self._service(qube, service, timeout)
                for service in preload.settle_services(self._view, qube)
            )
        )

    async def _service(self, qube: Qube, service: str, timeout: int) -> None:
        try:
            reply = await self._domains.run_service(
                domains_pb2.RunServiceRequest(
                    boot=domains_pb2.BootRef(uuid=qube.uuid, boot_id=qube.run.boot_id),
                    service=service,
                    user=str(evaluate(self._view, qube, "default_user") or ""),
                    timeout_s=timeout,
                ),
                timeout=timeout + SERVICE_GRACE_S,
            )
        except BusError as error:
            told = BusError(
                error.code, error.reason, f"{service} in '{qube.name}': {error.message}"
            )
            told.metadata.update(error.metadata)
            raise told from error
        if reply.exit_code:
            raise BusError(
                "FAILED_PRECONDITION",
                "QUBE_ERROR",
                f"{service} in '{qube.name}' ended with {reply.exit_code}",
                qube=qube.name,
            )

    async def _paused(self, item: Item) -> None:
        """The hypervisor has said so: who takes it now must unpause it."""

        def paused(view: View) -> bool:
            qube = view.by_uuid(item.uuid)
            return qube is None or power_state(view, qube) == "Paused"

        if not await self._operations.until(paused, SEEN_TIMEOUT_S):
            raise BusError("UNAVAILABLE", "QUBE_ERROR", f"'{item.name}' is not seen as paused")

    # ---- handing out

    def take(self, template: Qube, key: str) -> Item | None:
        """Choose the first usable one for the request of that key, and ask for another."""
        view = self._view
        if preload.vacancy(view, template) and preload.refills(view, template):
            delay = max(preload.GAP_DELAY_S, preload.delay_of(view, template))
            self._schedule(template, delay, "there is a gap")
        for qube in preload.listed(view, template):
            item = self._items.get(qube.uuid)
            if item is None and preload.fate(view, qube, self._mine) is Fate.READY:
                item = self._keep(qube)
            if item is None or item.claimed or item.dead or item.used:
                continue
            if item.complete.is_set() and preload.fate(view, qube) is not Fate.READY:
                continue
            reason = preload.outdated(view, template, qube)
            if reason:
                log.warning("preloaded disposable %s is outdated: %s", qube.name, reason)
                self._discard(qube.uuid)
                continue
            item.claimed = key
            self._mine.add(item.uuid)
            item.wanted.set()
            return item
        return None

    async def deliver(self, item: Item, source: str, timeout: float) -> bool:
        """Give what take() chose to the source. False: it failed and is removed."""
        try:
            return await asyncio.wait_for(self._deliver(item, source), timeout)
        except (BusError, TimeoutError) as error:
            log.warning("preloaded disposable %s cannot be used: %s", item.name, error)
            self._discard(item.uuid)
            return False
        except BaseException:
            if not self._closing:
                self._discard(item.uuid)
            raise

    async def _deliver(self, item: Item, source: str) -> bool:
        hit("dispvm.claim.before")
        async with item.lock:
            await self._mark(item.name, ((preload.IN_PROGRESS, item.claimed),), (preload.LIST,))
        hit("dispvm.claim.after")
        qube = self._view.by_uuid(item.uuid)
        patience = math.floor(1.2 * _patience(self._view, qube)) if qube is not None else 0
        await asyncio.wait_for(item.complete.wait(), patience)
        if item.dead or qube is None:
            raise _gone(item)
        if power_state(self._view, qube) == "Paused":
            await self._operations.finish(UnpauseSpec(item.name), _own(), OPERATION_TIMEOUT_S)
        hit("dispvm.use.before")
        template = self._view.qube(item.template)
        removed: tuple[str, ...] = (preload.IN_PROGRESS,)
        if template is None or not template.features.get(preload.INTERNAL):
            removed += (preload.INTERNAL,)
        await self._mark(item.name, ((preload.COMPLETED, item.claimed),), removed, source)
        hit("dispvm.use.after")

        def seen(view: View) -> bool:
            present = view.by_uuid(item.uuid)
            return present is None or preload.IN_PROGRESS not in present.features

        await self._operations.until(seen, SEEN_TIMEOUT_S)
        self._items.pop(item.uuid, None)
        await self._after_use(item)
        return True

    async def _used_unasked(self, item: Item) -> None:
        """Somebody unpaused it: it is theirs."""
        log.warning("preloaded disposable %s was unpaused and is now in use", item.name)
        template = self._view.qube(item.template)
        removed: tuple[str, ...] = (preload.LIST,)
        if template is None or not template.features.get(preload.INTERNAL):
            removed += (preload.INTERNAL,)
        await self._mark(item.name, ((preload.IN_PROGRESS, ""),), removed)

        def seen(view: View) -> bool:
            qube = view.by_uuid(item.uuid)
            return qube is None or preload.fate(view, qube) is Fate.ORDINARY

        await self._operations.until(seen, SEEN_TIMEOUT_S)
        qube = self._view.by_uuid(item.uuid)
        if qube is not None and DEFERRED_NETVM in qube.features:
            await self._mark(item.name, (), (DEFERRED_NETVM,))
        await self._after_use(item)

    async def _after_use(self, item: Item) -> None:
        template = self._view.qube(item.template)
        if template is None:
            return
        delay = preload.delay_of(self._view, template)
        if not preload.refills(self._view, template):
            return
        self._schedule(template, delay, f"{item.name} was used", announced=True)
        self._spawn(
            self._announce(template, events.preload_used(template, item.name, delay)),
            f"announce {item.name}",
        )

    # ---- removing

    def _discard(self, identity: str, *, refill: bool = False) -> asyncio.Task[None]:
        """Take it off the list and remove it, in the background."""
        item = self._items.get(identity)
        if item is not None:
            item.dead = True
            item.complete.set()
            item.wanted.set()
        task = self._discards.get(identity)
        if task is None:
            self._mine.add(identity)  # nobody else has to look at it
            task = asyncio.get_running_loop().create_task(
                self._discard_now(identity, refill), name=f"discard {identity}"
            )
            self._discards[identity] = task
            task.add_done_callback(lambda done: self._discarded(identity, done))
        return task

    def _discarded(self, identity: str, task: asyncio.Task[None]) -> None:
        self._discards.pop(identity, None)
        if not task.cancelled() and task.exception() is not None:
            log.error("preloaded disposable %s stays", identity, exc_info=task.exception())

    async def _discard_now(self, identity: str, refill: bool) -> None:
        qube = self._view.by_uuid(identity)
        template = self._view.qube(qube.properties.get("template", "")) if qube else None
        for attempt in range(DISCARD_ATTEMPTS):
            if attempt:
                await asyncio.sleep(DISCARD_PAUSE_S)
            try:
                await self._remove(identity)
            except BusError as error:
                log.warning("removing preloaded disposable %s: %s", identity, error.message)
            if self._view.by_uuid_any(identity) is None:
                break
        else:
            log.error("preloaded disposable %s could not be removed; use qvm-remove", identity)
        if refill and template is not None:
            self._schedule(template, RECOVERY_DELAY_S, "an unfinished one was removed")

    async def _remove(self, identity: str) -> None:
        qube = self._view.by_uuid(identity)
        if qube is not None:
            hit("dispvm.discard.before")
            await self._mark(qube.name, ((preload.IN_PROGRESS, "1"),), (preload.LIST,))
            hit("dispvm.discard.after")
            if qube.run.phase is Phase.HALTED:
                await self._operations.finish(
                    RemoveSpec(qube.name, auto_cleanup=True), _own(), OPERATION_TIMEOUT_S
                )
            else:
                await self._operations.finish(
                    KillSpec(qube.name, qube.run.boot_id), _own(), OPERATION_TIMEOUT_S, urgent=True
                )
        # What ends a disposable's boot removes it too.
        await self._operations.until(
            lambda view: view.by_uuid_any(identity) is None, SEEN_TIMEOUT_S
        )

    # ---- small things

    async def _mark(
        self,
        name: str,
        features: tuple[tuple[str, str], ...],
        removed: tuple[str, ...] = (),
        source: str = "dom0",
    ) -> None:
        await self._registry.mutate_preload(
            codec.preload_to_proto(PreloadMarks(name, features, removed)),
            timeout=MARK_TIMEOUT_S,
            context=CallContext(on_behalf_of=source),
        )

    async def _announce(self, qube: Qube, event: WireEvent) -> None:
        with suppress(BusError):  # nobody's work depends on it
            await self._registry.announce(
                registry_pb2.AnnounceRequest(uuid=qube.uuid, events=[codec.event_to_proto(event)]),
                timeout=MARK_TIMEOUT_S,
            )

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(self._guarded(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Coroutine[Any, Any, None], name: str) -> None:
        try:
            await work
        except (BusError, Refusal) as error:
            log.warning("%s: %s", name, error)
        except Exception:
            log.exception("%s failed", name)


def _own() -> CallContext:
    return CallContext(request_id=uuid.uuid4().bytes, on_behalf_of="dom0")


def _gone(item: Item) -> BusError:
    return BusError("FAILED_PRECONDITION", "QUBE_ERROR", f"'{item.name}' is gone", qube=item.name)


def _patience(view: View, qube: Qube) -> int:
    """qrexec_timeout in seconds, as far as a call of the bus may take."""
    value = evaluate(view, qube, "qrexec_timeout")
    return max(1, min(value, 110)) if isinstance(value, int) else 60
