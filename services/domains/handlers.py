"""Bus calls about domains, on whichever hypervisor there is.

Owns the order of effects around one call, the per-qube queue, and the way from
hypervisor news to facts. Must not know libvirt or the simulation. Invariants: every
method is idempotent by (uuid, boot id); no call of one qube waits for another's;
Destroy waits for nothing; a destroyed boot never comes back.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec, TypeVar

from bulkhead import failpoints
from bulkhead.api import control_pb2, domains_pb2
from bulkhead.bus.dispatch import Call
from bulkhead.bus.errors import from_refusal
from bulkhead.model.epoch import EpochGuard
from bulkhead.model.records import (
    ADMINVM_NAME,
    ADMINVM_UUID,
    DeviceFact,
    HostFact,
    PowerFact,
    fact_key,
)

from . import failpoint_table as _failpoint_table  # noqa: F401  (declares the failpoints)
from . import messages
from .adapters.guest_daemons import GuestDaemons
from .adapters.guest_keys import Boot, GuestKeys
from .adapters.hypervisor import (
    Domain,
    Event,
    Failure,
    HostInfo,
    Hypervisor,
    HypervisorError,
    News,
)
from .adapters.qmemman import MemoryManager
from .core import spec as specs
from .core.devices import BLOCK_KEYS, DeviceBook, block_facts
from .core.guest_keys import KeysOf, check_subtree
from .core.memory import MemoryLedger
from .core.power import HALTED, PAUSED, PMSUSPENDED, RUNNING
from .core.reasons import DomainsError
from .core.tracker import PowerTracker
from .core.xml import Flavour, flavour_named, render
from .reporter import Reporter

WAITERS = 8
# How long an answer waits for the registry to know of what it did.
TOLD_S = 0.5
DESCRIBE_S = 10.0
RETRY_S = 1.0
# How long after a domain was seen to be gone the event that says why may still come.
REASON_S = 1.0
BLOCK_S = 5.0
# How long a device may be gone from its backend's list and still be the same.
FLAP_S = 1.0
# Part of a deadline that is kept for the answer itself.
MARGIN_S = 0.2

_REASON_OF: dict[Failure, str] = {
    Failure.NOT_FOUND: "DOMAIN_NOT_FOUND",
    Failure.EXISTS: "DOMAIN_EXISTS",
    Failure.WRONG_STATE: "DOMAIN_WRONG_STATE",
    Failure.INVALID: "INVALID_DOMAIN_SPEC",
    Failure.UNSUPPORTED: "HYPERVISOR_UNSUPPORTED",
    Failure.UNAVAILABLE: "HYPERVISOR_UNAVAILABLE",
    Failure.TIMEOUT: "HYPERVISOR_TIMEOUT",
    Failure.ABANDONED: "BOOT_ABANDONED",
    Failure.BUSY: "DOMAIN_BUSY",
    Failure.NO_MEMORY: "NOT_ENOUGH_MEMORY",
    Failure.FAILED: "HYPERVISOR_REFUSED",
}

# What exists cannot be asked, or asking is pointless.
_UNDECIDED = frozenset({Failure.TIMEOUT, Failure.ABANDONED, Failure.UNAVAILABLE, Failure.INVALID})

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _answers(
    method: Callable[Concatenate[DomainsHandlers, _P], Awaitable[_R]],
) -> Callable[Concatenate[DomainsHandlers, _P], Coroutine[Any, Any, _R]]:
    """Turn refusals of core and failures of the hypervisor into bus errors."""

    async def answering(self: DomainsHandlers, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return await method(self, *args, **kwargs)
        except DomainsError as error:
            raise from_refusal(error) from error
        except HypervisorError as error:
            raise from_refusal(
                DomainsError(
                    _REASON_OF[error.failure],
                    f"The hypervisor: {error.message}.",
                    detail=error.message,
                )
            ) from error

    answering.__name__ = getattr(method, "__name__", "answering")
    answering.__doc__ = method.__doc__
    return answering


def _keys_of(request: domains_pb2.WriteGuestKeysRequest) -> KeysOf | None:
    if not request.HasField("removed_of"):
        return None
    asked = request.removed_of
    return KeysOf(asked.below, frozenset(asked.lines), (asked.news.path, asked.news.value))


class QubeQueue:
    """One call at a time per qube, a bounded number waiting, in order."""

    def __init__(self, waiters: int = WAITERS) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: collections.Counter[str] = collections.Counter()
        self._waiters = waiters

    @contextlib.asynccontextmanager
    async def turn(self, uuid: str) -> AsyncIterator[None]:
        """Wait for the qube's turn. DomainsError DOMAIN_BUSY when too many wait."""
        if self._users[uuid] > self._waiters:
            raise DomainsError(
                "DOMAIN_BUSY",
                f"{self._waiters} calls wait for the domain of {uuid} already; try again later.",
                uuid=uuid,
            )
        self._users[uuid] += 1
        lock = self._locks.setdefault(uuid, asyncio.Lock())
        try:
            async with lock:
                yield
        finally:
            self._users[uuid] -= 1
            if not self._users[uuid]:
                del self._users[uuid]
                self._locks.pop(uuid, None)


def report_base() -> int:
    """Numbers of reports start here: microseconds since the host booted, suspend included.

    Domains do not survive the host's boot, so numbers of a boot grow across our restarts.
    """
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


class DomainsHandlers:
    """The rpc methods of bulkhead.api.Domains, and the Sweep of Control."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        keys: GuestKeys,
        daemons: GuestDaemons,
        memory_manager: MemoryManager,
        reporter: Reporter,
        guard: EpochGuard,
        *,
        flavour: Callable[[HostInfo | None], Flavour],
        uri: str = "",
        network: bool = True,
        log: logging.Logger | None = None,
        base: Callable[[], int] = report_base,
    ) -> None:
        self._hypervisor = hypervisor
        self._keys = keys
        self._daemons = daemons
        self._memory_manager = memory_manager
        self._reporter = reporter
        self._guard = guard
        self._flavour = flavour
        self._uri = uri
        self._network = network
        self._log = log or logging.getLogger("domains")
        self._base = base
        self._tracker = PowerTracker()
        self._devices = DeviceBook()
        self._ledger = MemoryLedger()
        self._ledger_lock = asyncio.Lock()
        self._queue = QubeQueue()
        self._host: HostInfo | None = None
        self._generation: collections.Counter[str] = collections.Counter()
        self._reasons: dict[str, str] = {}
        self._awaited: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._watched: set[str] = set()
        self._agents: set[tuple[str, str]] = set()
        # (qube, boot) -> boot of its network backend when the interface was plugged.
        self._plugged: dict[tuple[str, str], str] = {}
        self._adopting: asyncio.Task[None] | None = None

    # ---- life of the service

    @property
    def ready(self) -> bool:
        """The epoch is known; a hypervisor that is away is said call by call."""
        return self._guard.current is not None

    @property
    def not_ready_reason(self) -> str:
        """Why ready is False."""
        return "" if self.ready else "waiting for the registry's epoch"

    async def start(self) -> None:
        """Begin to listen to the hypervisor."""
        await self._hypervisor.open(self.heard)

    async def stop(self) -> None:
        """Stop listening; domains go on."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._hypervisor.close()
        await self._memory_manager.close()

    # ---- news of the hypervisor

    def heard(self, event: Event) -> None:
        """One event; called on the loop, returns at once."""
        if event.news is News.CONNECTED:
            if self._adopting is not None:
                self._adopting.cancel()
            self._adopting = self._spawn(self._adopt())
        elif event.news is News.DEVICES:
            self._spawn(self._look_for_devices())
        elif event.news is News.DISCONNECTED:
            self._log.warning("the hypervisor is away")
        elif event.news is News.STOPPED and event.boot_id:
            self._ended(event.uuid, event.boot_id, event.reason)
        else:
            if event.reason and event.news is News.STOPPED:
                self._reasons[event.uuid] = event.reason
                if event.uuid in self._awaited:
                    self._awaited[event.uuid].set()
            self._watch(event.uuid)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._log.error("background work failed", exc_info=task.exception())

    def _watch(self, uuid: str) -> None:
        """Look at the domain soon; several events of one domain share a look."""
        if uuid not in self._watched:
            self._watched.add(uuid)
            self._spawn(self._look(uuid))

    async def _look(self, uuid: str) -> None:
        while True:
            # From here on a new event needs a look of its own.
            self._watched.discard(uuid)
            try:
                await self._refresh(uuid, DESCRIBE_S)
                return
            except HypervisorError as error:
                if error.failure is Failure.UNAVAILABLE:
                    return  # the inventory at reconnection finds it
                self._log.warning("domain %s could not be looked at: %s", uuid, error.message)
            await asyncio.sleep(RETRY_S)

    async def _refresh(
        self, uuid: str, timeout: float, patience: float = REASON_S
    ) -> Domain | None:
        """Ask for the domain and report what changed; what was learned meanwhile wins.

        A domain may be seen to be gone before the event that says why: the event gets
        *patience* seconds.
        """
        while True:
            generation = self._generation[uuid]
            domain = await self._hypervisor.describe(uuid, timeout)
            if domain is None and patience and self._tracker.current(uuid) is not None:
                await self._reason(uuid, min(patience, timeout))
            if self._generation[uuid] != generation:
                continue
            self._apply(uuid, domain)
            return domain

    async def _reason(self, uuid: str, patience: float) -> None:
        """Wait until the event that says why the domain stopped has come, or long enough."""
        if uuid in self._reasons:
            return
        told = self._awaited.setdefault(uuid, asyncio.Event())
        try:
            await asyncio.wait_for(told.wait(), patience)
        except TimeoutError:
            self._log.info("nothing says why domain %s stopped", uuid)
        finally:
            self._awaited.pop(uuid, None)

    def _apply(self, uuid: str, domain: Domain | None) -> None:
        reason = self._reasons.pop(uuid, "")
        if domain is None:
            known = self._tracker.current(uuid)
            if known is not None:
                self._ended(uuid, known.boot_id, reason)
            return
        if not domain.boot_id:
            return  # somebody else's domain: never touched, never reported
        if self._tracker.buried(uuid, domain.boot_id):
            self._log.warning("boot %s of %s came back and is ended", domain.boot_id, uuid)
            self._spawn(self._end_again(uuid, domain.boot_id))
            return
        known = self._tracker.current(uuid)
        if known is not None and known.boot_id != domain.boot_id:
            self._ended(uuid, known.boot_id, reason)
        sighting = domain.sighting
        if (uuid, domain.boot_id) in self._agents and not sighting.agent:
            sighting = replace(sighting, agent=True)
        self._generation[uuid] += 1
        self._reporter.put(self._tracker.seen(sighting, self._base()))
        self._devices.has(uuid, domain.name, domain.disks, domain.pci)
        self._tell_devices()

    async def _end_again(self, uuid: str, boot_id: str) -> None:
        try:
            await self._hypervisor.destroy(uuid, boot_id, DESCRIBE_S)
        except HypervisorError as error:
            self._log.error("boot %s of %s could not be ended: %s", boot_id, uuid, error.message)

    def _ended(self, uuid: str, boot_id: str, reason: str) -> None:
        self._generation[uuid] += 1
        reports = self._tracker.gone(uuid, boot_id, self._base(), reason)
        self._reporter.put(reports)
        self._agents.discard((uuid, boot_id))
        self._plugged.pop((uuid, boot_id), None)
        self._ledger.release(boot_id)
        if reports:
            self._devices.gone(uuid)
            self._tell_devices()
            self._spawn(self._forget(uuid, boot_id))

    async def _forget(self, uuid: str, boot_id: str) -> None:
        """What was made for the boot goes with it."""
        await self._memory_manager.release(boot_id)
        await self._daemons.stop(uuid, boot_id)
        await self._keys.drop(uuid, boot_id)

    async def _adopt(self) -> None:
        """After each connection: take everything as it is now, and tell it completely."""
        while True:
            try:
                host = await self._hypervisor.host(DESCRIBE_S)
                before = dict(self._generation)
                domains = await self._hypervisor.inventory(DESCRIBE_S)
                break
            except HypervisorError as error:
                self._log.warning("the hypervisor cannot be read: %s", error.message)
                if error.failure is Failure.UNAVAILABLE:
                    return  # the next connection takes over
                await asyncio.sleep(RETRY_S)
        self._host = host
        self._reporter.put([self._host_fact(host)])
        for domain in domains:
            if self._generation[domain.uuid] == before.get(domain.uuid, 0):
                self._apply(domain.uuid, domain)
            else:
                self._watch(domain.uuid)
        present = {domain.uuid: domain.boot_id for domain in domains if domain.boot_id}
        for fact in self._tracker.facts():
            if present.get(fact.uuid) != fact.boot_id:
                await self._refresh_quietly(fact.uuid)
        for uuid, boot_id in (await self._keys.kept()).items():
            known = self._tracker.current(uuid)
            if known is None or known.boot_id != boot_id:
                await self._keys.drop(uuid, boot_id)
        for domain in domains:
            if domain.boot_id:
                with contextlib.suppress(DomainsError):
                    await self._look_for_block(Boot(domain.uuid, domain.boot_id, domain.name))
        await self._look_for_devices()
        self._reporter.release()
        self._log.info("%d domains on %s %s", len(present), host.kind, self._uri)

    # ---- devices

    def _tell_devices(self) -> None:
        facts = self._devices.facts()
        told = self._reporter.table()
        for key, fact in told.items():
            if isinstance(fact, DeviceFact) and fact.attached_to and key not in facts:
                self._spawn(self._unplug(fact))
        self._reporter.remove(key for key in told if key.startswith("device/") and key not in facts)
        self._reporter.put(facts.values())

    async def _unplug(self, fact: DeviceFact) -> None:
        """A backend withdrew a device: who had it shall not get whatever comes there next."""
        target, uuid = fact.attach_options.get("frontend-dev", ""), fact.attached_to
        known = self._tracker.current(uuid)
        if not target or known is None:
            return
        await asyncio.sleep(FLAP_S)
        if fact_key(fact) in self._devices.facts():
            return  # its backend only described it anew
        disk = specs.DiskSpec(target, "/dev/" + fact.port.replace("_", "/"))
        try:
            async with self._queue.turn(uuid):
                await self._hypervisor.detach_disk(uuid, disk, DESCRIBE_S)
        except (HypervisorError, DomainsError) as error:
            self._log.warning("%s of %s could not be unplugged: %s", target, uuid, error)
        await self._refresh_quietly(uuid)

    async def _look_for_devices(self) -> None:
        """What the hypervisor knows of devices; a failure leaves the last picture."""
        try:
            self._devices.offer("host", await self._hypervisor.devices(DESCRIBE_S))
        except (HypervisorError, TimeoutError) as error:
            self._log.warning("devices cannot be listed: %s", error)
            return
        self._tell_devices()

    async def _look_for_block(self, boot: Boot) -> None:
        """What a guest says of its block devices."""
        untrusted_keys = await self._keys.read(boot, BLOCK_KEYS)
        known = self._tracker.current(boot.uuid)
        if known is not None and known.boot_id == boot.boot_id:
            self._devices.offer(boot.uuid, block_facts(boot.uuid, untrusted_keys))
            self._tell_devices()

    async def _look_for_host_block(self) -> None:
        """What dom0's own database says of dom0's block devices; udev fills it."""
        try:
            untrusted_keys = await self._keys.read(Boot(ADMINVM_UUID, "", ADMINVM_NAME), BLOCK_KEYS)
        except DomainsError as error:
            self._log.debug("dom0's block devices cannot be read: %s", error)
            return
        self._devices.offer("dom0", block_facts(ADMINVM_UUID, untrusted_keys))
        self._tell_devices()

    async def watch_block(self) -> None:
        """Where guests write keys themselves: look again every few seconds. Never ends."""
        while True:
            await self._look_for_host_block()
            await asyncio.sleep(BLOCK_S)
            try:
                domains = await self._hypervisor.inventory(DESCRIBE_S)
            except HypervisorError:
                continue
            for domain in domains:
                if domain.boot_id and domain.sighting.power == RUNNING:
                    with contextlib.suppress(DomainsError):
                        await self._look_for_block(Boot(domain.uuid, domain.boot_id, domain.name))

    async def _refresh_quietly(self, uuid: str) -> None:
        try:
            # It stopped while nobody listened: no event will say why.
            await self._refresh(uuid, DESCRIBE_S, patience=0)
        except HypervisorError as error:
            self._log.warning("domain %s could not be looked at: %s", uuid, error.message)
            self._watch(uuid)

    def _host_fact(self, host: HostInfo) -> HostFact:
        return HostFact(
            hypervisor=host.kind,
            uri=self._uri,
            memory_kib=host.memory_kib,
            cpus=host.cpus,
            dom0_maxmem_mib=host.dom0_maxmem_mib,
            has_iommu=host.has_iommu,
            cpu_family_model=host.cpu_family_model,
        )

    # ---- common parts of calls

    def _admit(self, call: Call) -> None:
        """Refuse a stale lifecycle. Others (dispvm, operator) carry no epoch."""
        if call.caller == "lifecycle" or call.epoch:
            self._guard.admit(call.epoch)

    @staticmethod
    def _left(call: Call) -> float:
        """Seconds that a hypervisor call may take, so that the answer still gets out."""
        call.check()
        return max(0.05, call.deadline.remaining() - MARGIN_S)

    async def _bound(self, boot: domains_pb2.BootRef, call: Call) -> Domain:
        """The domain of that boot. DomainsError DOMAIN_NOT_FOUND when it is not there."""
        specs.check_uuid(boot.uuid)
        if boot.boot_id:
            specs.check_boot_id(boot.boot_id)
        domain = await self._refresh(boot.uuid, min(DESCRIBE_S, self._left(call)))
        if domain is None or not domain.boot_id or boot.boot_id not in ("", domain.boot_id):
            raise DomainsError(
                "DOMAIN_NOT_FOUND",
                f"No domain of the qube {boot.uuid} with boot id {boot.boot_id or '(any)'} exists.",
                uuid=boot.uuid,
                boot_id=boot.boot_id,
            )
        return domain

    def _state(self, domain: Domain) -> domains_pb2.DomainState:
        known = self._tracker.current(domain.uuid)
        if known is None or known.boot_id != domain.boot_id:
            known = PowerFact(domain.uuid, domain.boot_id, 0, domain.sighting.power)
        return messages.state_to(known, domain)

    async def _after(self, uuid: str, boot_id: str, call: Call) -> domains_pb2.DomainState:
        """The state once a call has had its effect; halted when the boot just ended.

        The registry knows it first where it can be reached, so that whoever sees the
        operation end sees the state that it brought about.
        """
        domain = await self._refresh(uuid, min(DESCRIBE_S, self._left(call)))
        if self._reporter.reachable:
            with contextlib.suppress(TimeoutError):
                await self._reporter.flushed(min(TOLD_S, self._left(call)))
        if domain is None or domain.boot_id != boot_id:
            return messages.state_to(PowerFact(uuid, boot_id, self._base(), HALTED), None)
        return self._state(domain)

    # ---- power

    @_answers
    async def create_paused(
        self, request: domains_pb2.CreatePausedRequest, call: Call
    ) -> domains_pb2.CreatePausedReply:
        """Start a boot with its CPUs stopped; a boot that exists is answered as it is."""
        self._admit(call)
        spec = specs.check(messages.spec_from(request.spec))
        if spec.interfaces and not self._network:
            raise DomainsError(
                "NETWORK_UNAVAILABLE",
                f"{spec.name} has a netvm, but {self._uri} without root has no enforced network; "
                "clear its netvm, or run as root.",
                qube=spec.name,
            )
        self._refuse_buried(spec)
        async with self._queue.turn(spec.uuid):
            domain = await self._refresh(spec.uuid, min(DESCRIBE_S, self._left(call)))
            if domain is None and not call.validate_only:
                domain = await self._create(spec, call)
            if domain is None:
                return domains_pb2.CreatePausedReply()
            if domain.boot_id != spec.boot_id:
                raise DomainsError(
                    "DOMAIN_EXISTS",
                    f"The qube {spec.name} has a domain of boot {domain.boot_id or 'unknown'}; "
                    "it must end before another boot.",
                    qube=spec.name,
                    boot_id=domain.boot_id,
                )
            return domains_pb2.CreatePausedReply(state=self._state(domain))

    def _refuse_buried(self, spec: specs.DomainSpec) -> None:
        if self._tracker.buried(spec.uuid, spec.boot_id):
            raise DomainsError(
                "BOOT_ABANDONED",
                f"Boot {spec.boot_id} of {spec.name} was destroyed; start the qube anew.",
                qube=spec.name,
                boot_id=spec.boot_id,
            )

    async def _create(self, spec: specs.DomainSpec, call: Call) -> Domain:
        self._refuse_buried(spec)
        timeout = self._left(call)
        backend = self._boot_behind(*spec.interfaces)
        failpoints.hit("domains.create.before")
        try:
            domain = await self._hypervisor.create_paused(spec, timeout)
        except HypervisorError as error:
            if error.failure in _UNDECIDED:
                raise
            # It may have had its effect: what exists now decides.
            found = await self._refresh(spec.uuid, DESCRIBE_S)
            if found is None or found.boot_id != spec.boot_id:
                raise
            domain = found
        finally:
            # The memory is the domain's now, or nobody's: balancing may go on.
            await self._memory_manager.release(spec.boot_id)
        failpoints.hit("domains.create.after")
        self._apply(spec.uuid, domain)
        if self._tracker.buried(spec.uuid, spec.boot_id):
            self._refuse_buried(spec)
        self._note_plugged(domain, backend)
        return domain

    @_answers
    async def resume(
        self, request: domains_pb2.ResumeDomainRequest, call: Call
    ) -> domains_pb2.ResumeDomainReply:
        """Let the guest run; one that runs is left alone."""
        self._admit(call)
        async with self._queue.turn(request.boot.uuid):
            domain = await self._bound(request.boot, call)
            if domain.sighting.power != RUNNING and not call.validate_only:
                failpoints.hit("domains.resume.before")
                await self._hypervisor.resume(domain.uuid, self._left(call))
                failpoints.hit("domains.resume.after")
            return domains_pb2.ResumeDomainReply(
                state=await self._after(domain.uuid, domain.boot_id, call)
            )

    @_answers
    async def pause(
        self, request: domains_pb2.PauseDomainRequest, call: Call
    ) -> domains_pb2.PauseDomainReply:
        """Stop the guest's CPUs; one that is paused is left alone."""
        self._admit(call)
        async with self._queue.turn(request.boot.uuid):
            domain = await self._bound(request.boot, call)
            if domain.sighting.power != PAUSED and not call.validate_only:
                failpoints.hit("domains.pause.before")
                await self._hypervisor.pause(domain.uuid, self._left(call))
                failpoints.hit("domains.pause.after")
            return domains_pb2.PauseDomainReply(
                state=await self._after(domain.uuid, domain.boot_id, call)
            )

    @_answers
    async def suspend(
        self, request: domains_pb2.SuspendDomainRequest, call: Call
    ) -> domains_pb2.SuspendDomainReply:
        """Suspend to memory by the guest; where that is not possible, pause."""
        self._admit(call)
        async with self._queue.turn(request.boot.uuid):
            domain = await self._bound(request.boot, call)
            paused_instead = domain.sighting.power == PAUSED
            if domain.sighting.power not in (PAUSED, PMSUSPENDED) and not call.validate_only:
                failpoints.hit("domains.pause.before")
                try:
                    await self._hypervisor.pm_suspend(domain.uuid, self._left(call))
                except HypervisorError as error:
                    if error.failure is not Failure.UNSUPPORTED:
                        raise
                    await self._hypervisor.pause(domain.uuid, self._left(call))
                    paused_instead = True
                failpoints.hit("domains.pause.after")
            return domains_pb2.SuspendDomainReply(
                state=await self._after(domain.uuid, domain.boot_id, call),
                paused_instead=paused_instead,
            )

    @_answers
    async def wake(
        self, request: domains_pb2.WakeDomainRequest, call: Call
    ) -> domains_pb2.WakeDomainReply:
        """Wake a guest that suspended itself; one that runs is left alone."""
        self._admit(call)
        async with self._queue.turn(request.boot.uuid):
            domain = await self._bound(request.boot, call)
            if domain.sighting.power != RUNNING and not call.validate_only:
                failpoints.hit("domains.resume.before")
                await self._hypervisor.wake(domain.uuid, self._left(call))
                failpoints.hit("domains.resume.after")
            return domains_pb2.WakeDomainReply(
                state=await self._after(domain.uuid, domain.boot_id, call)
            )

    @_answers
    async def shutdown(
        self, request: domains_pb2.ShutdownDomainRequest, call: Call
    ) -> domains_pb2.ShutdownDomainReply:
        """Ask the guest to power off. A boot that is gone has done so already."""
        self._admit(call)
        async with self._queue.turn(request.boot.uuid):
            try:
                domain = await self._bound(request.boot, call)
            except DomainsError as error:
                if error.reason != "DOMAIN_NOT_FOUND":
                    raise
                return domains_pb2.ShutdownDomainReply()
            if domain.sighting.power == PAUSED and not request.force:
                raise DomainsError(
                    "DOMAIN_WRONG_STATE",
                    f"The domain of {domain.name} is paused and cannot shut down; unpause it, "
                    "or use force.",
                    qube=domain.name,
                )
            if call.validate_only:
                return domains_pb2.ShutdownDomainReply()
            failpoints.hit("domains.shutdown.before")
            try:
                if domain.sighting.power == PAUSED:
                    self._tracker.bury(domain.uuid, domain.boot_id)
                    await self._hypervisor.destroy(domain.uuid, domain.boot_id, self._left(call))
                else:
                    await self._hypervisor.shutdown(domain.uuid, self._left(call))
            except HypervisorError as error:
                if error.failure is not Failure.NOT_FOUND:
                    raise
            failpoints.hit("domains.shutdown.after")
            return domains_pb2.ShutdownDomainReply()

    @_answers
    async def destroy(
        self, request: domains_pb2.DestroyDomainRequest, call: Call
    ) -> domains_pb2.DestroyDomainReply:
        """End the boot now, on a lane of its own; a boot that is gone is success."""
        self._admit(call)
        boot = request.boot
        specs.check_uuid(boot.uuid)
        boot_id = boot.boot_id
        if boot_id:
            specs.check_boot_id(boot_id)
        else:
            known = self._tracker.current(boot.uuid)
            boot_id = "" if known is None else known.boot_id
        if call.validate_only:
            return domains_pb2.DestroyDomainReply(was_running=bool(boot_id))
        if boot_id:
            # A create still under way for this boot must not stand.
            self._tracker.bury(boot.uuid, boot_id)
        failpoints.hit("domains.destroy.before")
        ended = await self._hypervisor.destroy(boot.uuid, boot_id, self._left(call))
        failpoints.hit("domains.destroy.after")
        if boot_id:
            self._ended(boot.uuid, boot_id, "destroyed")
            await self._memory_manager.release(boot_id)
        else:
            self._watch(boot.uuid)
        return domains_pb2.DestroyDomainReply(was_running=ended)

    @_answers
    async def undefine(
        self, request: domains_pb2.UndefineDomainRequest, call: Call
    ) -> domains_pb2.UndefineDomainReply:
        """The qube is removed: nothing of it stays, here or in the registry's facts."""
        self._admit(call)
        specs.check_uuid(request.uuid)
        async with self._queue.turn(request.uuid):
            if not call.validate_only:
                await self._hypervisor.undefine(request.uuid, self._left(call))
                if self._tracker.current(request.uuid) is None:
                    self._reporter.remove([f"power/{request.uuid}"])
                    self._generation.pop(request.uuid, None)
        return domains_pb2.UndefineDomainReply()

    # ---- reading

    @_answers
    async def describe(
        self, request: domains_pb2.DescribeDomainRequest, call: Call
    ) -> domains_pb2.DescribeDomainReply:
        """The boot as it is now; found False when it is gone."""
        try:
            domain = await self._bound(request.boot, call)
        except DomainsError as error:
            if error.reason != "DOMAIN_NOT_FOUND":
                raise
            return domains_pb2.DescribeDomainReply(found=False)
        return domains_pb2.DescribeDomainReply(
            found=True,
            state=self._state(domain),
            memory_kib=domain.memory_kib,
            memory_max_kib=domain.memory_max_kib,
            cpu_time_ns=domain.cpu_time_ns,
        )

    @_answers
    async def inventory(
        self,
        request: domains_pb2.InventoryDomainsRequest,  # noqa: ARG002
        call: Call,
    ) -> domains_pb2.InventoryDomainsReply:
        """Every domain that carries a boot id of ours."""
        domains = await self._hypervisor.inventory(self._left(call))
        return domains_pb2.InventoryDomainsReply(
            domains=[self._state(domain) for domain in domains if domain.boot_id]
        )

    @_answers
    async def stats(self, request: domains_pb2.StatsRequest, call: Call) -> domains_pb2.StatsReply:
        """Memory and CPU of the named qubes, or of all; those without a domain are left out."""
        wanted = {specs.check_uuid(uuid) for uuid in request.uuids}
        reply = domains_pb2.StatsReply()
        for domain in await self._hypervisor.inventory(self._left(call)):
            if not domain.boot_id or (wanted and domain.uuid not in wanted):
                continue
            row = reply.domains.add(
                uuid=domain.uuid,
                memory_kib=domain.memory_kib,
                memory_assigned_kib=domain.memory_max_kib,
                cpu_time_ns=domain.cpu_time_ns,
                online_vcpus=domain.vcpus,
            )
            if domain.stubdom_cpu_time_ns is not None:
                row.stubdom_cpu_time_ns = domain.stubdom_cpu_time_ns
            if domain.stubdom_vcpus is not None:
                row.stubdom_vcpus = domain.stubdom_vcpus
        return reply

    @_answers
    async def render_xml(
        self, request: domains_pb2.RenderXmlRequest, call: Call
    ) -> domains_pb2.RenderXmlReply:
        """The XML that CreatePaused would use; hypervisor "" = this host's."""
        call.check()
        flavour = (
            flavour_named(request.hypervisor) if request.hypervisor else self._flavour(self._host)
        )
        return domains_pb2.RenderXmlReply(
            xml=render(specs.check(messages.spec_from(request.spec)), flavour)
        )

    # ---- devices and memory

    def _boot_behind(self, *interfaces: specs.InterfaceSpec) -> str | None:
        """The boot of the backend that the one interface is about to be plugged into. Asked
        before: a backend that starts anew meanwhile must not be taken for the one plugged to."""
        for interface in interfaces:
            known = self._tracker.current(interface.backend_uuid)
            if known is not None:
                return known.boot_id
        return None

    def _note_plugged(self, domain: Domain, backend: str | None) -> None:
        now = self._tracker.current(domain.uuid)
        if backend is not None and now is not None and now.boot_id == domain.boot_id:
            self._plugged[domain.uuid, domain.boot_id] = backend

    def _is_dead(self, domain: Domain, interface: specs.InterfaceSpec) -> bool:
        """An interface that is there hangs at an earlier boot of its backend.

        The hypervisor does not tell: both have the backend's name. What another run of this
        service plugged is as old as the guest.
        """
        backend = self._tracker.current(interface.backend_uuid)
        if backend is None:
            return False
        plugged = self._plugged.get((domain.uuid, domain.boot_id))
        if plugged is not None:
            return plugged != backend.boot_id
        began, since = domain.sighting.start_time, backend.start_time
        return began is not None and since is not None and since > began

    @_answers
    async def attach_interface(
        self, request: domains_pb2.AttachInterfaceRequest, call: Call
    ) -> domains_pb2.AttachInterfaceReply:
        """Plug an interface into the running guest."""
        self._admit(call)
        interface = specs.check_interface(messages.interface_from(request.interface))
        async with self._queue.turn(request.boot.uuid):
            domain = await self._bound(request.boot, call)
            if not call.validate_only:
                failpoints.hit("domains.attach.before")
                backend = self._boot_behind(interface)
                await self._hypervisor.attach_interface(
                    domain.uuid, interface, self._left(call), anew=self._is_dead(domain, interface)
                )
                self._note_plugged(domain, backend)
                failpoints.hit("domains.attach.after")
        return domains_pb2.AttachInterfaceReply()

    @_answers
    async def detach_interface(
        self, request: domains_pb2.DetachInterfaceRequest, call: Call
    ) -> domains_pb2.DetachInterfaceReply:
        """Unplug interfaces, with a backend only those at it; a boot that is gone has none."""
        self._admit(call)
        backend = specs.check_backend(request.interface.backend)
        async with self._queue.turn(request.boot.uuid):
            domain = await self._bound_or_gone(request.boot, call)
            if domain is not None and not call.validate_only:
                failpoints.hit("domains.detach.before")
                await self._hypervisor.detach_interface(domain.uuid, backend, self._left(call))
                failpoints.hit("domains.detach.after")
        return domains_pb2.DetachInterfaceReply()

    @_answers
    async def attach_disk(
        self, request: domains_pb2.AttachDiskRequest, call: Call
    ) -> domains_pb2.AttachDiskReply:
        """Plug a disk into the running guest."""
        self._admit(call)
        disk = specs.check_disk(messages.disk_from(request.disk))
        async with self._queue.turn(request.boot.uuid):
            domain = await self._bound(request.boot, call)
            if not call.validate_only:
                failpoints.hit("domains.attach.before")
                await self._hypervisor.attach_disk(domain.uuid, disk, self._left(call))
                failpoints.hit("domains.attach.after")
                await self._after(domain.uuid, domain.boot_id, call)
        return domains_pb2.AttachDiskReply()

    @_answers
    async def detach_disk(
        self, request: domains_pb2.DetachDiskRequest, call: Call
    ) -> domains_pb2.DetachDiskReply:
        """Unplug a disk; a boot that is gone has none."""
        self._admit(call)
        disk = messages.disk_from(request.disk)
        specs.check_target(disk.target)
        async with self._queue.turn(request.boot.uuid):
            domain = await self._bound_or_gone(request.boot, call)
            if domain is not None and not call.validate_only:
                failpoints.hit("domains.detach.before")
                await self._hypervisor.detach_disk(domain.uuid, disk, self._left(call))
                failpoints.hit("domains.detach.after")
                await self._after(domain.uuid, domain.boot_id, call)
        return domains_pb2.DetachDiskReply()

    async def _bound_or_gone(self, boot: domains_pb2.BootRef, call: Call) -> Domain | None:
        try:
            return await self._bound(boot, call)
        except DomainsError as error:
            if error.reason != "DOMAIN_NOT_FOUND":
                raise
            return None

    @_answers
    async def resize_disk(
        self, request: domains_pb2.ResizeDiskRequest, call: Call
    ) -> domains_pb2.ResizeDiskReply:
        """Tell the guest that a disk has size bytes now."""
        self._admit(call)
        target = specs.check_target(request.target)
        if not request.size:
            raise DomainsError("INVALID_DOMAIN_SPEC", f"The size of {target} may not be 0.")
        async with self._queue.turn(request.boot.uuid):
            domain = await self._bound(request.boot, call)
            if not call.validate_only:
                failpoints.hit("domains.resize.before")
                await self._hypervisor.resize_disk(
                    domain.uuid, target, request.size, self._left(call)
                )
                failpoints.hit("domains.resize.after")
        return domains_pb2.ResizeDiskReply()

    @_answers
    async def set_maxmem(
        self, request: domains_pb2.SetMaxmemRequest, call: Call
    ) -> domains_pb2.SetMaxmemReply:
        """How much memory the running guest may be given."""
        self._admit(call)
        if request.maxmem_mib > specs.MIB_LIMIT:
            raise DomainsError(
                "INVALID_DOMAIN_SPEC",
                f"{request.maxmem_mib} MiB is more than any guest can have ({specs.MIB_LIMIT}).",
            )
        async with self._queue.turn(request.boot.uuid):
            domain = await self._bound(request.boot, call)
            if not call.validate_only:
                await self._hypervisor.set_maxmem(domain.uuid, request.maxmem_mib, self._left(call))
        return domains_pb2.SetMaxmemReply()

    @_answers
    async def reserve_memory(
        self, request: domains_pb2.ReserveMemoryRequest, call: Call
    ) -> domains_pb2.ReserveMemoryReply:
        """Set bytes aside for a boot, or release them; both may be repeated."""
        self._admit(call)
        boot_id = specs.check_boot_id(request.boot_id)
        if request.release:
            self._ledger.release(boot_id)
            await self._memory_manager.release(boot_id)
            return domains_pb2.ReserveMemoryReply()
        if call.validate_only:
            return domains_pb2.ReserveMemoryReply()
        if self._memory_manager.present:
            await self._memory_manager.reserve(boot_id, request.bytes, self._left(call))
            return domains_pb2.ReserveMemoryReply()
        # One at a time: between the reading and the promise nobody else may promise.
        async with self._ledger_lock:
            host = await self._hypervisor.host(self._left(call))
            domains = await self._hypervisor.inventory(self._left(call))
            total = host.memory_kib * 1024
            available = total if host.free_kib is None else host.free_kib * 1024
            self._ledger.reserve(
                boot_id,
                request.bytes,
                total,
                {domain.boot_id or domain.uuid: domain.memory_kib * 1024 for domain in domains},
                available,
            )
        return domains_pb2.ReserveMemoryReply()

    # ---- the guest itself

    @_answers
    async def write_guest_keys(
        self, request: domains_pb2.WriteGuestKeysRequest, call: Call
    ) -> domains_pb2.WriteGuestKeysReply:
        """Change the guest's keys: removals first, then values."""
        self._admit(call)
        async with self._queue.turn(request.boot.uuid):
            domain = await self._bound(request.boot, call)
            if not call.validate_only:
                await self._daemons.start_keys(domain)
                await self._keys.write(
                    Boot(domain.uuid, domain.boot_id, domain.name),
                    [(key.path, key.value) for key in request.keys],
                    list(request.removed),
                    request.replace_all,
                    changed_only=request.changed_only,
                    removed_of=_keys_of(request),
                )
                if any(key.path.startswith(BLOCK_KEYS) for key in request.keys) or any(
                    BLOCK_KEYS.startswith(path) or path.startswith(BLOCK_KEYS)
                    for path in request.removed
                ):
                    await self._look_for_block(Boot(domain.uuid, domain.boot_id, domain.name))
        return domains_pb2.WriteGuestKeysReply()

    @_answers
    async def read_guest_keys(
        self, request: domains_pb2.ReadGuestKeysRequest, call: Call
    ) -> domains_pb2.ReadGuestKeysReply:
        """Keys at prefix, or below it when it ends with "/"; "" = all. Written by the guest."""
        prefix = check_subtree(request.prefix) if request.prefix else ""
        domain = await self._bound(request.boot, call)
        keys = await self._keys.read(Boot(domain.uuid, domain.boot_id, domain.name), prefix)
        return domains_pb2.ReadGuestKeysReply(
            untrusted_keys=[
                domains_pb2.GuestKey(path=path, value=value) for path, value in keys.items()
            ]
        )

    @_answers
    async def start_guest_daemons(
        self, request: domains_pb2.StartGuestDaemonsRequest, call: Call
    ) -> domains_pb2.StartGuestDaemonsReply:
        """Start what serves the running guest, and wait for its agent where it has one."""
        self._admit(call)
        domain = await self._bound(request.boot, call)
        if call.validate_only:
            return domains_pb2.StartGuestDaemonsReply()
        started = await self._daemons.start_agents(
            domain,
            qrexec=request.qrexec,
            timeout_s=request.qrexec_timeout_s,
            default_user=request.default_user,
            debug=request.debug,
            stubdom_qrexec=request.stubdom_qrexec,
        )
        agent: bool | None = started
        if agent is None and request.qrexec:
            patience = min(request.qrexec_timeout_s or 60, self._left(call))
            agent = await self._hypervisor.wait_agent(domain.uuid, patience)
            if agent is False:
                raise DomainsError(
                    "AGENT_TIMEOUT",
                    f"Cannot connect to qrexec agent for {request.qrexec_timeout_s} seconds, "
                    f"see {domain.console or 'the console log'} for details",
                    qube=domain.name,
                    seconds=str(request.qrexec_timeout_s),
                    console=domain.console,
                )
        if agent:
            self._agents.add((domain.uuid, domain.boot_id))
            await self._refresh(domain.uuid, DESCRIBE_S)
        return domains_pb2.StartGuestDaemonsReply(agent=bool(agent))

    @_answers
    async def run_service(
        self, request: domains_pb2.RunServiceRequest, call: Call
    ) -> domains_pb2.RunServiceReply:
        """Run a service in the guest. AGENT_NOT_CONNECTED where there is no agent."""
        self._admit(call)
        domain = await self._bound(request.boot, call)
        if call.validate_only:
            return domains_pb2.RunServiceReply()
        timeout = min(request.timeout_s or 60, self._left(call))
        answer = await self._hypervisor.run_service(
            domain.uuid, request.service, request.user, request.input, timeout
        )
        if answer is None:
            answer = await self._daemons.run_service(
                domain, request.service, request.user, request.input, timeout
            )
        if answer is None:
            raise DomainsError(
                "AGENT_NOT_CONNECTED",
                f"Domain '{domain.name}': qrexec not connected",
                qube=domain.name,
            )
        return domains_pb2.RunServiceReply(exit_code=answer[0], output=answer[1])

    # ---- control

    @_answers
    async def sweep(
        self,
        request: control_pb2.SweepRequest,  # noqa: ARG002
        call: Call,
    ) -> control_pb2.SweepReply:
        """Take inventory again and say what is strange; nothing is ended."""
        domains = await self._hypervisor.inventory(self._left(call))
        findings = [
            f"domain {domain.name} ({domain.uuid}) carries no boot id and is left alone"
            for domain in domains
            if not domain.boot_id
        ]
        for domain in domains:
            self._watch(domain.uuid)
        for fact in self._tracker.facts():
            if fact.uuid not in {domain.uuid for domain in domains}:
                findings.append(f"boot {fact.boot_id} of {fact.uuid} ended unnoticed")
                self._watch(fact.uuid)
        return control_pb2.SweepReply(findings=findings)
