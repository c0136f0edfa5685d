"""The rpc methods of bulkhead.api.Storage, and Control's Sweep.

Owns what is checked of each request, and dry runs. Must not know locks, threads or how a
pool keeps its data. Invariants: a lower epoch than one seen changes nothing; nothing of
a request is done before all of it was checked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from pathlib import Path

from bulkhead import codec
from bulkhead.api import control_pb2, records_pb2, storage_pb2
from bulkhead.bus.dispatch import Call
from bulkhead.model.epoch import EpochGuard
from bulkhead.model.records import Volume
from services.storage import messages
from services.storage.adapters.data_socket import DataSocket
from services.storage.answers import answers
from services.storage.core.reasons import StorageRefusal
from services.storage.core.states import VolumeState
from services.storage.drivers.interface import Driver
from services.storage.drivers.load import list_drivers, open_pool
from services.storage.facts import PoolWatch
from services.storage.jobs import Jobs
from services.storage.kernels import Kernels
from services.storage.messages import Spec
from services.storage.pool_work import PoolWork
from services.storage.transfers import Transfers
from services.storage.volume_work import VolumeWork
from services.storage.workers import Workers


class StorageHandlers:
    """One per process. ready: the epoch is known."""

    def __init__(
        self, guard: EpochGuard, workers: Workers, watch: PoolWatch, data: DataSocket
    ) -> None:
        self._guard = guard
        self._watch = watch
        self._jobs = Jobs(workers)
        self._volumes = VolumeWork(self._jobs)
        self._pools = PoolWork(self._jobs)
        self._transfers = Transfers(self._jobs, data)
        self._kernels = Kernels(self._jobs, watch)

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
            **self._transfers.counters,
            **self._watch.counters,
            "abandoned": self._jobs.abandoned,
        }

    # ---- volumes

    @answers
    async def ensure(
        self, request: storage_pb2.EnsureRequest, call: Call
    ) -> storage_pb2.EnsureReply:
        """Volumes exist, tagged."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        items = messages.specs(request.volumes)
        if call.validate_only:
            return storage_pb2.EnsureReply(
                volumes=_states(items, await self._volumes.states(call, items, {}))
            )

        def ensure(driver: Driver, volume: Volume) -> VolumeState:
            driver.ensure(owner, volume)
            return driver.describe(volume, None)

        states = await self._jobs.each(call, items, "creation", ensure)
        return storage_pb2.EnsureReply(volumes=_states(items, states))

    @answers
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
            volumes = self._volumes
            jobs: list[Awaitable[None]] = [volumes.ensure(call, owner, item) for item in fresh]
            for target, source, revision in zip(targets, sources, revisions, strict=True):
                jobs.append(volumes.clone(call, owner, key, source, revision, target, fill=True))
            await self._jobs.all(jobs)
        items = [*targets, *fresh]
        states = await self._volumes.states(call, items, {})
        return storage_pb2.EnsureClonedReply(volumes=_states(items, states))

    @answers
    async def clone_volume(
        self, request: storage_pb2.CloneVolumeRequest, call: Call
    ) -> storage_pb2.CloneVolumeReply:
        """The target's new state is the source's last commit."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        key = messages.check_key(call.operation)
        source, target = messages.spec(request.source), messages.spec(request.target)
        if not call.validate_only:
            await self._volumes.clone(call, owner, key, source, "", target, fill=False)
        return storage_pb2.CloneVolumeReply()

    @answers
    async def remove(
        self, request: storage_pb2.RemoveRequest, call: Call
    ) -> storage_pb2.RemoveReply:
        """Every trace of the owner's volumes is gone."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        items = messages.specs(request.volumes)
        if not call.validate_only:
            for item in items:
                self._transfers.revoke(item)
            await self._jobs.each(
                call, items, "removal", lambda driver, volume: driver.remove(owner, volume)
            )
        return storage_pb2.RemoveReply()

    @answers
    async def verify(
        self, request: storage_pb2.VerifyRequest, call: Call
    ) -> storage_pb2.VerifyReply:
        """Every volume could be started."""
        owner = messages.check_owner(request.owner)
        items = messages.specs(request.volumes)
        await self._volumes.verify(call, owner, items)
        return storage_pb2.VerifyReply()

    @answers
    async def start(
        self, request: storage_pb2.StartVolumesRequest, call: Call
    ) -> storage_pb2.StartVolumesReply:
        """Every volume is ready for this boot."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        boot = messages.check_boot(request.boot_id, required=True)
        items = messages.specs(request.volumes)
        sources = _by_place(request.sources)
        self._volumes.refuse_ephemeral(items)
        if call.validate_only:
            return storage_pb2.StartVolumesReply()
        devices = await self._volumes.start(call, owner, boot, items, sources)
        return storage_pb2.StartVolumesReply(
            devices=[messages.device_message(device) for device in devices if device is not None]
        )

    @answers
    async def stop(
        self, request: storage_pb2.StopVolumesRequest, call: Call
    ) -> storage_pb2.StopVolumesReply:
        """Every volume of this boot is committed or discarded."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        boot = messages.check_boot(request.boot_id, required=False)
        items = messages.specs(request.volumes)
        if not call.validate_only:
            await self._volumes.stop(call, owner, boot, items)
            self._watch.look_again()
        return storage_pb2.StopVolumesReply()

    @answers
    async def describe(
        self, request: storage_pb2.DescribeRequest, call: Call
    ) -> storage_pb2.DescribeReply:
        """What the volumes are now; waits for no other call about them."""
        items = messages.specs(request.volumes)
        states = await self._volumes.states(call, items, _by_place(request.sources))
        return storage_pb2.DescribeReply(volumes=_states(items, states))

    @answers
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
            await self._volumes.check_quiet(call, item, revision)
        else:
            await self._jobs.on_volume(
                call,
                item,
                "revert",
                lambda driver, _: driver.revert(owner, item.volume, revision, key),
            )
        return storage_pb2.RevertReply()

    @answers
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
        size = await self._jobs.on_volume(
            call,
            item,
            "resize",
            lambda driver, cancel: driver.resize(owner, item.volume, size, cancel),
        )
        return storage_pb2.ResizeReply(size=size)

    @answers
    async def clear(self, request: storage_pb2.ClearRequest, call: Call) -> storage_pb2.ClearReply:
        """The volume's new state is zero, its size stays."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        key = messages.check_key(call.operation)
        item = messages.spec(request.volume)
        if call.validate_only:
            await self._volumes.check_quiet(call, item)
        else:
            await self._jobs.on_volume(
                call,
                item,
                "clearing",
                lambda driver, cancel: driver.replace(owner, item.volume, None, key, cancel),
            )
        return storage_pb2.ClearReply()

    # ---- import, export

    @answers
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
            await self._volumes.check_quiet(call, item)
            return storage_pb2.ImportBeginReply(size=size)
        target = await self._transfers.begin_import(
            call, item, owner, key, size, request.want_ticket
        )
        return storage_pb2.ImportBeginReply(
            size=target.size, path=target.path, ticket=target.ticket, socket=target.socket
        )

    @answers
    async def import_end(
        self, request: storage_pb2.ImportEndRequest, call: Call
    ) -> storage_pb2.ImportEndReply:
        """The imported data is current, or gone."""
        self._guard.admit(call.epoch)
        owner = messages.check_owner(request.owner)
        key = messages.check_key(call.operation)
        item = messages.spec(request.volume)
        if not call.validate_only:
            await self._transfers.end_import(call, item, owner, key, request.success)
        return storage_pb2.ImportEndReply()

    @answers
    async def export_begin(
        self, request: storage_pb2.ExportBeginRequest, call: Call
    ) -> storage_pb2.ExportBeginReply:
        """A ticket for the last commit or a revision, as it is now."""
        item = messages.spec(request.volume)
        source = await self._transfers.begin_export(
            call, item, request.revision, issue=not call.validate_only
        )
        return storage_pb2.ExportBeginReply(
            size=source.size, ticket=source.ticket, socket=source.socket
        )

    @answers
    async def export_end(
        self, request: storage_pb2.ExportEndRequest, call: Call
    ) -> storage_pb2.ExportEndReply:
        """An unused ticket is worthless from now on."""
        self._transfers.revoke_ticket(request.ticket)
        return storage_pb2.ExportEndReply()

    # ---- pools

    @answers
    async def pool_setup(
        self, request: storage_pb2.PoolSetupRequest, call: Call
    ) -> storage_pb2.PoolSetupReply:
        """The pool can be used."""
        self._guard.admit(call.epoch)
        pool = codec.pool_from_proto(request.pool)
        if call.validate_only:
            open_pool(pool)
        else:
            await self._jobs.on_pool(call, pool, "setup", lambda driver, _: driver.setup())
        return storage_pb2.PoolSetupReply()

    @answers
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
            await self._jobs.on_pool(call, pool, "teardown", lambda driver, _: driver.teardown())
        return storage_pb2.PoolTeardownReply()

    @answers
    async def pool_describe(
        self, request: storage_pb2.PoolDescribeRequest, call: Call
    ) -> storage_pb2.PoolDescribeReply:
        """Usage and configuration; an unusable pool has a problem, not an error."""
        pool = codec.pool_from_proto(request.pool)
        others = [codec.pool_from_proto(other) for other in request.others]
        fact, config = await self._pools.describe(call, pool, others)
        return storage_pb2.PoolDescribeReply(fact=messages.pool_message(fact), config=config)

    @answers
    async def list_drivers(
        self, request: storage_pb2.ListDriversRequest, call: Call
    ) -> storage_pb2.ListDriversReply:
        """All drivers, also those that this host cannot run."""
        drivers = await self._jobs.work(
            call, "drivers", [], "list of drivers", lambda _: list_drivers()
        )
        return storage_pb2.ListDriversReply(
            drivers=[messages.driver_message(info) for info in drivers]
        )

    @answers
    async def watch_pools(
        self, request: storage_pb2.WatchPoolsRequest, call: Call
    ) -> storage_pb2.WatchPoolsReply:
        """The registry is told of these pools from now on."""
        pools = [codec.pool_from_proto(pool) for pool in request.pools]
        await self._jobs.work(
            call, "watch", ["watch"], "list of pools", lambda _: self._watch.save(pools)
        )
        self._watch.watch(pools)
        return storage_pb2.WatchPoolsReply()

    # ---- upkeep

    @answers
    async def inventory(
        self, request: storage_pb2.InventoryRequest, call: Call
    ) -> storage_pb2.InventoryReply:
        """What lies in the pools, whoever owns it; pools that do not work are left out."""
        pools = [codec.pool_from_proto(pool) for pool in request.pools]
        lists = await self._jobs.all([self._pools.inventory(call, pool) for pool in pools])
        return storage_pb2.InventoryReply(
            items=[
                messages.found_message(pool.name, item)
                for pool, found in zip(pools, lists, strict=True)
                for item in found
            ]
        )

    @answers
    async def quarantine(
        self, request: storage_pb2.QuarantineRequest, call: Call
    ) -> storage_pb2.QuarantineReply:
        """Move files that no record knows aside, where they can be looked at."""
        pool = codec.pool_from_proto(request.pool)
        items = [messages.found(item) for item in request.items]
        findings = await self._pools.quarantine(call, pool, items, dry=call.validate_only)
        return storage_pb2.QuarantineReply(findings=[f"{pool.name}: {f}" for f in findings])

    @answers
    async def sweep(self, request: control_pb2.SweepRequest, call: Call) -> control_pb2.SweepReply:
        """Remove unfinished files of crashed calls in the watched pools, and say which."""
        findings: list[str] = []
        for pool in self._watch.pools:
            try:
                findings.extend(await self._pools.sweep(call, pool))
            except StorageRefusal as refusal:
                findings.append(f"{pool.name}: {refusal.message}")
        return control_pb2.SweepReply(findings=findings)

    # ---- kernels

    @answers
    async def kernel_add(
        self, request: storage_pb2.KernelAddRequest, call: Call
    ) -> storage_pb2.KernelAddReply:
        """A kernel is installed as a whole."""
        self._guard.admit(call.epoch)
        pool = codec.pool_from_proto(request.pool)
        if call.validate_only:
            open_pool(pool)
            return storage_pb2.KernelAddReply()
        kernel = await self._kernels.add(
            call,
            pool,
            request.name,
            Path(request.vmlinuz),
            _path(request.initramfs),
            _path(request.modules),
        )
        fact = messages.kernel_fact(pool.name, kernel)
        message: records_pb2.KernelFact = messages.kernel_message(fact)
        return storage_pb2.KernelAddReply(kernel=message)

    @answers
    async def kernel_remove(
        self, request: storage_pb2.KernelRemoveRequest, call: Call
    ) -> storage_pb2.KernelRemoveReply:
        """A kernel is gone as a whole."""
        self._guard.admit(call.epoch)
        pool = codec.pool_from_proto(request.pool)
        key = messages.check_key(call.operation)
        if not call.validate_only:
            await self._kernels.remove(call, pool, request.name, key)
        return storage_pb2.KernelRemoveReply()

    async def stop_transfers(self) -> None:
        """Close the data socket; for the end of the process."""
        await self._transfers.stop()
        await self._jobs.stop()


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _by_place(sources: Iterable[storage_pb2.VolumeSpec]) -> dict[str, Volume]:
    found = (messages.spec(source) for source in sources)
    return {item.key: item.volume for item in found}


def _states(items: Iterable[Spec], states: Iterable[VolumeState]) -> list[storage_pb2.VolumeState]:
    return [messages.state_message(i, s) for i, s in zip(items, states, strict=True)]
