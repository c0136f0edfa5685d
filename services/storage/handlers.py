"""The rpc methods of bulkhead.api.Storage, and Control's Sweep.

Owns order, locks, deadlines and tickets around the drivers' calls. Must not know how a
pool keeps its data. Invariants: a call works only while it holds its volumes' locks, in a
thread of its pool; the volumes of one request are worked on together, all to their end,
before the first failure is answered; a lower epoch than one seen changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from bulkhead import codec
from bulkhead.api import control_pb2, records_pb2, storage_pb2
from bulkhead.bus.dispatch import Call
from bulkhead.bus.errors import BusError, from_refusal
from bulkhead.model.epoch import EpochGuard
from bulkhead.model.records import Pool, PoolFact, Volume
from services.storage import messages
from services.storage.adapters.data_socket import DataSocket
from services.storage.core.places import containing
from services.storage.core.reasons import StorageRefusal, from_os_error
from services.storage.core.states import Device, VolumeState
from services.storage.core.volumes import ephemeral
from services.storage.drivers.interface import Cancel, Driver
from services.storage.drivers.load import list_drivers, open_pool
from services.storage.facts import PoolWatch
from services.storage.messages import Spec
from services.storage.workers import VolumeLocks, Workers

_LOG = logging.getLogger("bulkhead.storage")

# How often a wait looks whether its caller is still there.
POLL_S = 0.2
# What a cancelled copy gets to end in order, before its answer is sent without it.
GRACE_S = 1.0
# Part of a deadline that is kept for the answer itself.
MARGIN_S = 0.1
ARRIVED_S = 60.0
# How long an answer waits for the registry to know of the kernels it changed.
TOLD_S = 2.0

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _answers(
    method: Callable[Concatenate[StorageHandlers, _P], Awaitable[_T]],
) -> Callable[Concatenate[StorageHandlers, _P], Coroutine[Any, Any, _T]]:
    """Turn refusals and the system's errors into bus errors."""

    @functools.wraps(method)
    async def answering(self: StorageHandlers, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return await method(self, *args, **kwargs)
        except StorageRefusal as refusal:
            raise bus_error(refusal) from refusal
        except OSError as error:
            _LOG.exception("%s failed", getattr(method, "__name__", "a call"))
            raise bus_error(from_os_error(error, "a file operation")) from error

    return answering


def bus_error(refusal: StorageRefusal) -> BusError:
    """The wire form of a refusal."""
    error = from_refusal(refusal)
    if refusal.reason in ("POOL_BUSY", "EPOCH_UNKNOWN"):
        error.retry_after_ms = 200
    return error


class StorageHandlers:
    """One per process. ready: the epoch is known."""

    def __init__(
        self, guard: EpochGuard, workers: Workers, watch: PoolWatch, data: DataSocket
    ) -> None:
        self._guard = guard
        self._workers = workers
        self._watch = watch
        self._data = data
        self._locks = VolumeLocks()
        self._abandoned: set[asyncio.Task[Any]] = set()

    @property
    def ready(self) -> bool:
        """For Health."""
        return self._guard.current is not None

    @property
    def not_ready_reason(self) -> str:
        """For Health."""
        return "" if self.ready else "the registry has not told lifecycle's epoch yet"

    @property
    def counters(self) -> dict[str, int]:
        """For Health."""
        return {
            **self._data.counters,
            **self._watch.counters,
            "abandoned": len(self._abandoned),
        }

    # ---- work in threads

    async def _work(
        self,
        call: Call,
        group: str,
        keys: Iterable[str],
        what: str,
        function: Callable[[Cancel], _T],
    ) -> _T:
        """function(cancel) in a thread of the group, while the keys are held.

        When the caller gives up or its time is over, the copy is told to end; keys stay
        held until it has. what: for messages, "start of volume X".
        """
        cancel = Cancel()

        async def locked() -> _T:
            async with self._locks.hold(keys):
                cancel.check()
                return await self._workers.run(group, lambda: function(cancel))

        task = asyncio.get_running_loop().create_task(locked(), name=what)
        try:
            while True:
                left = call.deadline.remaining() - MARGIN_S
                await asyncio.wait({task}, timeout=max(0.0, min(POLL_S, left)))
                if task.done():
                    break
                if call.cancelled or left <= 0:
                    cancel.set()
                    await asyncio.wait({task}, timeout=GRACE_S if call.cancelled else 0)
                    if not task.done() or not call.cancelled:
                        break
        except asyncio.CancelledError:
            cancel.set()
            self._abandon(task)
            raise
        if not task.done():
            self._abandon(task)
            raise StorageRefusal(
                "POOL_TIMEOUT",
                f"{what} is not done in time: pool {group} is slow or hangs; ask again",
                pool=group,
                what=what,
            )
        try:
            return task.result()
        except OSError as error:
            _LOG.warning("%s failed: %s", what, error)
            raise from_os_error(error, what) from error

    def _abandon(self, task: asyncio.Task[Any]) -> None:
        """Nobody waits for it any more; its locks go when it ends."""
        self._abandoned.add(task)

        def ended(done: asyncio.Task[Any]) -> None:
            self._abandoned.discard(done)
            if not done.cancelled() and (error := done.exception()) is not None:
                _LOG.warning("%s, abandoned before, ended with: %s", done.get_name(), error)

        task.add_done_callback(ended)

    async def _on_volume(
        self, call: Call, item: Spec, verb: str, function: Callable[[Driver, Cancel], _T]
    ) -> _T:
        driver = open_pool(item.pool)
        return await self._work(
            call,
            item.pool.name,
            [item.key],
            f"{verb} of volume {item.volume.vid or item.volume.name}",
            lambda cancel: function(driver, cancel),
        )

    async def _on_pool(
        self, call: Call, pool: Pool, verb: str, function: Callable[[Driver, Cancel], _T]
    ) -> _T:
        driver = open_pool(pool)
        return await self._work(
            call,
            pool.name,
            [f"{pool.name}:"],
            f"{verb} of pool {pool.name}",
            lambda cancel: function(driver, cancel),
        )

    async def _each(
        self,
        call: Call,
        items: Sequence[Spec],
        verb: str,
        function: Callable[[Driver, Volume], _T],
    ) -> list[_T]:
        """function(driver, volume) of every item in order, those of one pool in one thread.

        For what takes no time worth a thread each. Every item's turn comes, then the first
        failure, if any.
        """
        pools: dict[str, list[int]] = {}
        for number, item in enumerate(items):
            pools.setdefault(item.pool.name, []).append(number)
        results: dict[int, _T] = {}

        async def of_pool(numbers: Sequence[int]) -> None:
            driver = open_pool(items[numbers[0]].pool)

            def work(_: Cancel) -> None:
                failed: Exception | None = None
                for number in numbers:
                    try:
                        results[number] = function(driver, items[number].volume)
                    except (OSError, StorageRefusal) as error:
                        failed = failed or error
                if failed is not None:
                    raise failed

            chosen = [items[number] for number in numbers]
            names = ", ".join(item.volume.vid or item.volume.name for item in chosen)
            await self._work(
                call,
                chosen[0].pool.name,
                [item.key for item in chosen],
                f"{verb} of volume{'s' * (len(chosen) > 1)} {names}",
                work,
            )

        await self._all([of_pool(numbers) for numbers in pools.values()])
        return [results[number] for number in range(len(items))]

    async def _all(self, jobs: Sequence[Awaitable[_T]]) -> list[_T]:
        """Every job to its end, then the first failure, if any."""
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
        results: list[_T] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            results.append(outcome)
        return results

    # ---- volumes

    @_answers
    async def ensure(
        self, request: storage_pb2.EnsureRequest, call: Call
    ) -> storage_pb2.EnsureReply:
        """Volumes exist, tagged."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        items = messages.specs(request.volumes)
        if call.validate_only:
            return storage_pb2.EnsureReply(volumes=await self._states(call, items, {}))

        def ensure(driver: Driver, volume: Volume) -> VolumeState:
            driver.ensure(owner, volume)
            return driver.describe(volume, None)

        states = await self._each(call, items, "creation", ensure)
        return storage_pb2.EnsureReply(
            volumes=[messages.state_message(i, s) for i, s in zip(items, states, strict=True)]
        )

    async def _ensure(self, call: Call, owner: str, item: Spec) -> None:
        await self._on_volume(
            call, item, "creation", lambda driver, _: driver.ensure(owner, item.volume)
        )

    @_answers
    async def ensure_cloned(
        self, request: storage_pb2.EnsureClonedRequest, call: Call
    ) -> storage_pb2.EnsureClonedReply:
        """Volumes exist with their sources' last commits, or fresh."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        key = messages.check_key(call.operation)
        fresh = messages.specs(request.fresh)
        targets = messages.specs(item.target for item in request.items)
        sources = [messages.spec(item.source) for item in request.items]
        revisions = [item.source_revision for item in request.items]
        if not call.validate_only:
            jobs: list[Awaitable[None]] = [self._ensure(call, owner, item) for item in fresh]
            for target, source, revision in zip(targets, sources, revisions, strict=True):
                jobs.append(self._clone(call, owner, key, source, revision, target, fill=True))
            await self._all(jobs)
        return storage_pb2.EnsureClonedReply(
            volumes=await self._states(call, [*targets, *fresh], {})
        )

    async def _clone(
        self,
        call: Call,
        owner: str,
        key: str,
        source: Spec,
        revision: str,
        target: Spec,
        fill: bool,
    ) -> None:
        """fill: the target is new; else its present state becomes a revision."""
        reader, writer = open_pool(source.pool), open_pool(target.pool)
        # A copy between pools has threads of its own: either pool may hang.
        group = target.pool.name
        if source.pool.name != target.pool.name:
            group = f"{source.pool.name} to {target.pool.name}"
        keys = [target.key]
        if source.volume.snapshots_disabled:
            keys.append(source.key)  # its start would write into what is being read

        def copy(cancel: Cancel) -> None:
            with reader.committed(source.volume, revision) as state:
                step = writer.clone if fill else writer.replace
                step(owner, target.volume, state, key, cancel)

        await self._work(
            call,
            group,
            keys,
            f"copy of volume {source.volume.vid} to {target.volume.vid}",
            copy,
        )

    @_answers
    async def clone_volume(
        self, request: storage_pb2.CloneVolumeRequest, call: Call
    ) -> storage_pb2.CloneVolumeReply:
        """The target's new state is the source's last commit."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        key = messages.check_key(call.operation)
        source, target = messages.spec(request.source), messages.spec(request.target)
        if not call.validate_only:
            await self._clone(call, owner, key, source, "", target, fill=False)
        return storage_pb2.CloneVolumeReply()

    @_answers
    async def remove(
        self, request: storage_pb2.RemoveRequest, call: Call
    ) -> storage_pb2.RemoveReply:
        """Every trace of the owner's volumes is gone."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        items = messages.specs(request.volumes)
        if not call.validate_only:
            for item in items:
                self._data.revoke(item.key)
            await self._each(
                call, items, "removal", lambda driver, volume: driver.remove(owner, volume)
            )
        return storage_pb2.RemoveReply()

    @_answers
    async def verify(
        self, request: storage_pb2.VerifyRequest, call: Call
    ) -> storage_pb2.VerifyReply:
        """Every volume could be started."""
        owner = messages.check_owner(request.owner)
        items = messages.specs(request.volumes)
        await self._all(
            [
                self._on_volume(call, item, "check", functools.partial(_verify, owner, item.volume))
                for item in items
            ]
        )
        return storage_pb2.VerifyReply()

    @_answers
    async def start(
        self, request: storage_pb2.StartVolumesRequest, call: Call
    ) -> storage_pb2.StartVolumesReply:
        """Every volume is ready for this boot."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        boot = messages.check_boot(request.boot_id, required=True)
        items = messages.specs(request.volumes)
        sources = _by_place(request.sources)
        for item in items:
            if ephemeral(item.volume, item.pool):
                raise StorageRefusal(
                    "EPHEMERAL_UNAVAILABLE",
                    f"volume {item.volume.vid} must lie on a throw-away key, and dm-crypt is "
                    "not available on this host: switch ephemeral off for it or its pool",
                    volume=item.volume.vid,
                    pool=item.pool.name,
                )
        if call.validate_only:
            return storage_pb2.StartVolumesReply()
        devices = await self._all(
            [
                self._on_volume(
                    call,
                    item,
                    "start",
                    functools.partial(_start, owner, boot, item.volume, _source(item, sources)),
                )
                for item in items
            ]
        )
        return storage_pb2.StartVolumesReply(
            devices=[messages.device_message(device) for device in devices if device is not None]
        )

    @_answers
    async def stop(
        self, request: storage_pb2.StopVolumesRequest, call: Call
    ) -> storage_pb2.StopVolumesReply:
        """Every volume of this boot is committed or discarded."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        boot = messages.check_boot(request.boot_id, required=False)
        items = messages.specs(request.volumes)
        if not call.validate_only:
            await self._all(
                [
                    self._on_volume(
                        call, item, "stop", functools.partial(_stop, owner, boot, item.volume)
                    )
                    for item in items
                ]
            )
            self._watch.look_again()
        return storage_pb2.StopVolumesReply()

    @_answers
    async def describe(
        self, request: storage_pb2.DescribeRequest, call: Call
    ) -> storage_pb2.DescribeReply:
        """What the volumes are now; waits for no other call about them."""
        items = messages.specs(request.volumes)
        return storage_pb2.DescribeReply(
            volumes=await self._states(call, items, _by_place(request.sources))
        )

    async def _states(
        self, call: Call, items: Sequence[Spec], sources: dict[str, Volume]
    ) -> list[storage_pb2.VolumeState]:
        async def one(item: Spec) -> storage_pb2.VolumeState:
            driver = open_pool(item.pool)
            source = _source(item, sources)
            state: VolumeState = await self._work(
                call,
                f"{item.pool.name} (reading)",
                [],
                f"description of volume {item.volume.vid}",
                lambda _: driver.describe(item.volume, source),
            )
            return messages.state_message(item, state)

        return await self._all([one(item) for item in items])

    @_answers
    async def revert(
        self, request: storage_pb2.RevertRequest, call: Call
    ) -> storage_pb2.RevertReply:
        """A revision is current again."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        key = messages.check_key(call.operation)
        item = messages.spec(request.volume)
        revision = request.revision
        if call.validate_only:
            await self._check_quiet(call, item, revision)
        else:
            await self._on_volume(
                call,
                item,
                "revert",
                lambda driver, _: driver.revert(owner, item.volume, revision, key),
            )
        return storage_pb2.RevertReply()

    async def _check_quiet(self, call: Call, item: Spec, revision: str | None = None) -> None:
        """What a dry run can say of a call that replaces data."""
        (state,) = await self._states(call, [item], {})
        if state.is_dirty:
            raise StorageRefusal(
                "VOLUME_DIRTY",
                f"volume {item.volume.vid} is running or was not cleanly stopped",
                volume=item.volume.vid,
            )
        if state.importing:
            raise StorageRefusal(
                "VOLUME_IMPORTING",
                f"an import into volume {item.volume.vid} is under way",
                volume=item.volume.vid,
            )
        known = [r.id for r in state.revisions]
        if revision is not None and (not known or (revision and revision not in known)):
            raise StorageRefusal(
                "REVISION_NOT_FOUND",
                f"volume {item.volume.vid} has no revision {revision}",
                volume=item.volume.vid,
                revision=revision,
            )

    @_answers
    async def resize(
        self, request: storage_pb2.ResizeRequest, call: Call
    ) -> storage_pb2.ResizeReply:
        """The volume has another size, running or not."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        item = messages.spec(request.volume)
        size = messages.check_size(request.size)
        if call.validate_only:
            return storage_pb2.ResizeReply(size=size)
        size = await self._on_volume(
            call,
            item,
            "resize",
            lambda driver, cancel: driver.resize(owner, item.volume, size, cancel),
        )
        return storage_pb2.ResizeReply(size=size)

    @_answers
    async def clear(self, request: storage_pb2.ClearRequest, call: Call) -> storage_pb2.ClearReply:
        """The volume's new state is zero, its size stays."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        key = messages.check_key(call.operation)
        item = messages.spec(request.volume)
        if call.validate_only:
            await self._check_quiet(call, item)
        else:
            await self._on_volume(
                call,
                item,
                "clearing",
                lambda driver, cancel: driver.replace(owner, item.volume, None, key, cancel),
            )
        return storage_pb2.ClearReply()

    # ---- import, export

    @_answers
    async def import_begin(
        self, request: storage_pb2.ImportBeginRequest, call: Call
    ) -> storage_pb2.ImportBeginReply:
        """A target for the data: a path, or a ticket."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        key = messages.check_key(call.operation)
        item = messages.spec(request.volume)
        size = messages.check_size(request.size)
        if call.validate_only:
            await self._check_quiet(call, item)
            return storage_pb2.ImportBeginReply(size=size)
        begun = await self._on_volume(
            call,
            item,
            "import",
            lambda driver, _: driver.import_begin(
                owner, item.volume, size, key, request.want_ticket
            ),
        )
        if not request.want_ticket:
            return storage_pb2.ImportBeginReply(size=begun.size, path=begun.path)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = await self._on_volume(
            call, item, "import", lambda _driver, _cancel: os.open(begun.path, flags)
        )
        loop = asyncio.get_running_loop()

        def arrived() -> None:
            asyncio.run_coroutine_threadsafe(self._arrived(item, owner, key), loop).result(
                ARRIVED_S
            )

        ticket = self._data.issue(item.key, fd, begun.size, True, arrived)
        return storage_pb2.ImportBeginReply(
            size=begun.size, ticket=ticket, socket=str(self._data.path)
        )

    async def _arrived(self, item: Spec, owner: str, key: str) -> None:
        driver = open_pool(item.pool)
        async with self._locks.hold([item.key]):
            await self._workers.run(
                item.pool.name, lambda: driver.import_arrived(owner, item.volume, key)
            )

    @_answers
    async def import_end(
        self, request: storage_pb2.ImportEndRequest, call: Call
    ) -> storage_pb2.ImportEndReply:
        """The imported data is current, or gone."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        key = messages.check_key(call.operation)
        item = messages.spec(request.volume)
        if not call.validate_only:
            self._data.revoke(item.key)
            await self._on_volume(
                call,
                item,
                "import",
                lambda driver, _: driver.import_end(owner, item.volume, request.success, key),
            )
        return storage_pb2.ImportEndReply()

    @_answers
    async def export_begin(
        self, request: storage_pb2.ExportBeginRequest, call: Call
    ) -> storage_pb2.ExportBeginReply:
        """A ticket for the last commit or a revision, as it is now."""
        item = messages.spec(request.volume)
        revision = request.revision

        def open_state(driver: Driver, _: Cancel) -> tuple[int, int]:
            with driver.committed(item.volume, revision) as state:
                return os.dup(state.fd), state.size

        fd, size = await self._on_volume(call, item, "export", open_state)
        if call.validate_only:
            os.close(fd)
            return storage_pb2.ExportBeginReply(size=size)
        ticket = self._data.issue(f"export {item.key}", fd, size, False)
        return storage_pb2.ExportBeginReply(size=size, ticket=ticket, socket=str(self._data.path))

    @_answers
    async def export_end(
        self, request: storage_pb2.ExportEndRequest, call: Call
    ) -> storage_pb2.ExportEndReply:
        """An unused ticket is worthless from now on."""
        self._data.revoke_ticket(request.ticket)
        return storage_pb2.ExportEndReply()

    # ---- pools

    @_answers
    async def pool_setup(
        self, request: storage_pb2.PoolSetupRequest, call: Call
    ) -> storage_pb2.PoolSetupReply:
        """The pool can be used."""
        self._guard.admit(call.epoch)
        pool = codec.pool_from_proto(request.pool)
        if call.validate_only:
            open_pool(pool)
        else:
            await self._on_pool(call, pool, "setup", lambda driver, _: driver.setup())
        return storage_pb2.PoolSetupReply()

    @_answers
    async def pool_teardown(
        self, request: storage_pb2.PoolTeardownRequest, call: Call
    ) -> storage_pb2.PoolTeardownReply:
        """Nothing of an empty pool is left; data stays."""
        self._guard.admit(call.epoch)
        pool = codec.pool_from_proto(request.pool)
        try:
            open_pool(pool)
        except StorageRefusal:
            # Setup refuses such a pool before it makes anything: it never happened.
            return storage_pb2.PoolTeardownReply()
        if not call.validate_only:
            await self._on_pool(call, pool, "teardown", lambda driver, _: driver.teardown())
        return storage_pb2.PoolTeardownReply()

    @_answers
    async def pool_describe(
        self, request: storage_pb2.PoolDescribeRequest, call: Call
    ) -> storage_pb2.PoolDescribeReply:
        """Usage and configuration; an unusable pool has a problem, not an error."""
        pool = codec.pool_from_proto(request.pool)
        driver = open_pool(pool)
        others = [codec.pool_from_proto(other) for other in request.others]

        def look(_: Cancel) -> PoolFact:
            places = {other.name: _place(other) for other in others}
            places[pool.name] = _place(pool)
            try:
                driver.check()
                usage = driver.usage()
            except StorageRefusal as refusal:
                return PoolFact(pool.name, usable=False, problem=refusal.message)
            except OSError as error:
                problem = from_os_error(error, f"use of pool {pool.name}").message
                return PoolFact(pool.name, usable=False, problem=problem)
            return PoolFact(
                pool.name,
                size=usage.size,
                usage=usage.usage,
                usage_details=dict(usage.details),
                included_in=containing(pool.name, places),
            )

        fact = await self._work(
            call, f"{pool.name} (reading)", [], f"description of pool {pool.name}", look
        )
        return storage_pb2.PoolDescribeReply(
            fact=messages.pool_message(fact), config=driver.config()
        )

    @_answers
    async def list_drivers(
        self, request: storage_pb2.ListDriversRequest, call: Call
    ) -> storage_pb2.ListDriversReply:
        """All drivers, also those that this host cannot run."""
        drivers = await self._work(call, "drivers", [], "list of drivers", lambda _: list_drivers())
        return storage_pb2.ListDriversReply(
            drivers=[messages.driver_message(info) for info in drivers]
        )

    @_answers
    async def watch_pools(
        self, request: storage_pb2.WatchPoolsRequest, call: Call
    ) -> storage_pb2.WatchPoolsReply:
        """The registry is told of these pools from now on."""
        pools = [codec.pool_from_proto(pool) for pool in request.pools]
        await self._work(
            call, "watch", ["watch"], "list of pools", lambda _: self._watch.save(pools)
        )
        self._watch.watch(pools)
        return storage_pb2.WatchPoolsReply()

    # ---- upkeep

    @_answers
    async def inventory(
        self, request: storage_pb2.InventoryRequest, call: Call
    ) -> storage_pb2.InventoryReply:
        """What lies in the pools, whoever owns it; pools that do not work are left out."""
        pools = [codec.pool_from_proto(pool) for pool in request.pools]

        async def one(pool: Pool) -> list[storage_pb2.InventoryItem]:
            try:
                driver = open_pool(pool)
                found = await self._work(
                    call,
                    f"{pool.name} (reading)",
                    [],
                    f"inventory of pool {pool.name}",
                    lambda _: driver.inventory(),
                )
            except StorageRefusal as refusal:
                _LOG.warning("no inventory of pool %s: %s", pool.name, refusal.message)
                return []
            return [messages.found_message(pool.name, item) for item in found]

        lists = await self._all([one(pool) for pool in pools])
        return storage_pb2.InventoryReply(items=[item for items in lists for item in items])

    @_answers
    async def quarantine(
        self, request: storage_pb2.QuarantineRequest, call: Call
    ) -> storage_pb2.QuarantineReply:
        """Move files that no record knows aside, where they can be looked at."""
        pool = codec.pool_from_proto(request.pool)
        driver = open_pool(pool)
        findings: list[str] = []
        for item in request.items:
            found = messages.found(item)
            if call.validate_only:
                findings.append(f"{found.vid}: would be moved aside")
                continue
            findings.append(
                await self._work(
                    call,
                    pool.name,
                    [f"{pool.name}:{found.vid}"],
                    f"quarantine of {found.vid}",
                    functools.partial(_quarantine, driver, found),
                )
            )
        return storage_pb2.QuarantineReply(findings=[f"{pool.name}: {f}" for f in findings])

    @_answers
    async def sweep(self, request: control_pb2.SweepRequest, call: Call) -> control_pb2.SweepReply:
        """Remove unfinished files of crashed calls in the watched pools, and say which."""
        findings: list[str] = []
        for pool in self._watch.pools:
            try:
                findings.extend(await self._sweep_pool(call, pool))
            except StorageRefusal as refusal:
                findings.append(f"{pool.name}: {refusal.message}")
        return control_pb2.SweepReply(findings=findings)

    async def _sweep_pool(self, call: Call, pool: Pool) -> list[str]:
        driver = open_pool(pool)
        items = await self._work(
            call,
            f"{pool.name} (reading)",
            [],
            f"inventory of pool {pool.name}",
            lambda _: driver.inventory(),
        )
        findings: list[str] = []
        for item in items:
            key = f"{pool.name}:{item.vid}"
            if self._locks.held(key):
                continue  # somebody works on it: its temporaries are no leftovers
            names = await self._work(
                call,
                pool.name,
                [key],
                f"sweep of {item.vid}",
                functools.partial(_clear_temporaries, driver, item.vid),
            )
            findings.extend(f"{pool.name}: removed unfinished {item.vid} ({n})" for n in names)
            if not item.owner and item.kind != "temporary":
                findings.append(f"{pool.name}: {item.vid} bears no owner's tag")
        return findings

    # ---- kernels

    @_answers
    async def kernel_add(
        self, request: storage_pb2.KernelAddRequest, call: Call
    ) -> storage_pb2.KernelAddReply:
        """A kernel is installed as a whole."""
        self._guard.admit(call.epoch)
        pool = codec.pool_from_proto(request.pool)
        if call.validate_only:
            open_pool(pool)
            return storage_pb2.KernelAddReply()
        kernel = await self._on_pool(
            call,
            pool,
            f"installation of kernel {request.name}",
            lambda driver, cancel: driver.kernel_add(
                request.name,
                Path(request.vmlinuz),
                _path(request.initramfs),
                _path(request.modules),
                cancel,
            ),
        )
        await self._show(call)
        fact = messages.kernel_fact(pool.name, kernel)
        message: records_pb2.KernelFact = messages.kernel_message(fact)
        return storage_pb2.KernelAddReply(kernel=message)

    @_answers
    async def kernel_remove(
        self, request: storage_pb2.KernelRemoveRequest, call: Call
    ) -> storage_pb2.KernelRemoveReply:
        """A kernel is gone as a whole."""
        self._guard.admit(call.epoch)
        pool = codec.pool_from_proto(request.pool)
        key = messages.check_key(call.operation)
        if not call.validate_only:
            await self._on_pool(
                call,
                pool,
                f"removal of kernel {request.name}",
                lambda driver, _: driver.kernel_remove(request.name, key),
            )
            if not await self._show(call):
                # Not done before the registry knows: it would let it be chosen again.
                raise StorageRefusal(
                    "POOL_TIMEOUT",
                    f"kernel {request.name} is removed, but the registry has not heard of it",
                    kernel=request.name,
                )
        return storage_pb2.KernelRemoveReply()

    async def _show(self, call: Call) -> bool:
        """Let the registry know of a change of kernels before its caller does; whether it
        does in time."""
        try:
            await self._watch.told(min(TOLD_S, call.deadline.remaining()))
        except TimeoutError:
            return False
        return True

    async def stop_transfers(self) -> None:
        """Close the data socket; for the end of the process."""
        await asyncio.get_running_loop().run_in_executor(None, self._data.stop)
        for task in tuple(self._abandoned):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._abandoned, return_exceptions=True)


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _place(pool: Pool) -> Path | None:
    try:
        place = open_pool(pool).location()
    except StorageRefusal:
        return None
    return Path(os.path.realpath(place)) if place is not None else None


def _by_place(sources: Iterable[storage_pb2.VolumeSpec]) -> dict[str, Volume]:
    found = (messages.spec(source) for source in sources)
    return {item.key: item.volume for item in found}


def _source(item: Spec, sources: dict[str, Volume]) -> Volume | None:
    return sources.get(f"{item.pool.name}:{item.volume.source}") if item.volume.source else None


def _verify(owner: str, volume: Volume, driver: Driver, _: Cancel) -> None:
    driver.verify(owner, volume, None)


def _start(
    owner: str, boot: str, volume: Volume, source: Volume | None, driver: Driver, cancel: Cancel
) -> Device | None:
    return driver.start(owner, boot, volume, source, cancel)


def _stop(owner: str, boot: str, volume: Volume, driver: Driver, cancel: Cancel) -> None:
    driver.stop(owner, boot, volume, cancel)


def _quarantine(driver: Driver, found: Any, _: Cancel) -> str:
    return driver.quarantine(found)


def _clear_temporaries(driver: Driver, vid: str, _: Cancel) -> list[str]:
    return driver.clear_temporaries(vid)
