"""The storage process on the bus: a real process, a real file system, a stand-in registry."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bulkhead.api import control_pb2, records_pb2, registry_pb2, storage_pb2
from bulkhead.bus.client import CallContext
from bulkhead.bus.errors import BusError
from bulkhead.bus.server import Call, Server
from clients.bus import ControlClient, StorageClient
from clients.bus.data import TransferError, export_file, export_volume, import_file
from tests.fakes import loopfs
from tests.fakes.bus import Answers, Instance

pytestmark = pytest.mark.integration

MIB = 1 << 20
OWNER = "6f5d4c3b-0000-4000-8000-000000000001"
OTHER = "6f5d4c3b-0000-4000-8000-000000000002"
EPOCH = 5
A = b"\xaa" * 4096


@pytest.fixture(scope="module")
def xfs() -> Iterator[Path]:
    with loopfs.mounted("xfs", 512) as place:
        yield place


class World:
    """One instance with the storage process and a registry that remembers facts."""

    def __init__(self, instance: Instance, root: Path) -> None:
        self.instance = instance
        self.root = root
        self.facts: dict[str, records_pb2.Fact] = {}
        self.complete = 0
        self.told = asyncio.Condition()
        self.registry: Server | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.failpoints = instance.root / "failpoints"
        channel = instance.connections("lifecycle").channel("storage")
        self.storage = StorageClient(channel)
        self.control = ControlClient(channel)

    # ---- the processes

    async def start_registry(self) -> None:
        async def get_epoch(request: Any, call: Call) -> registry_pb2.GetEpochReply:
            return registry_pb2.GetEpochReply(epoch=EPOCH)

        async def facts(request: registry_pb2.FactsRequest, call: Call) -> registry_pb2.FactsReply:
            assert call.caller == "storage"
            if request.complete:
                self.facts.clear()
                self.complete += 1
            self.facts.update({fact.key: fact for fact in request.put})
            for key in request.removed:
                self.facts.pop(key, None)
            async with self.told:
                self.told.notify_all()
            return registry_pb2.FactsReply()

        answers = Answers("Registry", own={"get_epoch": get_epoch, "facts": facts})
        _, self.registry = await self.instance.serve("registry", answers, ["Registry"])

    async def stop_registry(self) -> None:
        assert self.registry is not None
        await self.instance.stop(self.registry)
        self.facts.clear()

    def start_storage(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.storage", "--root", str(self.instance.root)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "BULKHEAD_FAILPOINTS_FILE": str(self.failpoints)},
            stderr=subprocess.DEVNULL,
        )

    async def end_storage(self, number: int) -> int:
        process = self.process
        assert process is not None
        process.send_signal(number)
        return await asyncio.to_thread(process.wait, 20)

    async def died(self) -> int:
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, 20)

    async def fact(self, condition: Callable[[dict[str, records_pb2.Fact]], bool]) -> None:
        async with asyncio.timeout(20), self.told:
            await self.told.wait_for(lambda: condition(self.facts))

    # ---- messages

    def pool(self, name: str = "p", **options: str) -> records_pb2.Pool:
        return records_pb2.Pool(
            name=name,
            driver="file-reflink",
            options={"dir_path": str(self.root / name), **options},
        )

    def volume(self, qube: str = "work", pool: str = "p", **changes: Any) -> storage_pb2.VolumeSpec:
        fields: dict[str, Any] = {
            "name": "private",
            "pool": pool,
            "vid": f"appvms/{qube}/private",
            "size": 4 * MIB,
            "revisions_to_keep": 1,
            "rw": True,
            "save_on_stop": True,
        }
        return storage_pb2.VolumeSpec(
            declared=records_pb2.Volume(**{**fields, **changes}), pool=self.pool(pool)
        )

    async def call(self, method: Callable[..., Awaitable[Any]], request: Any, **how: Any) -> Any:
        timeout = how.pop("timeout", 20.0)
        return await method(
            request,
            timeout=timeout,
            context=CallContext(**{"epoch": EPOCH, "operation": "op-1", **how}),
        )

    async def set_up(self, *pools: str) -> None:
        for name in pools or ("p",):
            await self.call(
                self.storage.pool_setup, storage_pb2.PoolSetupRequest(pool=self.pool(name))
            )

    async def start(self, boot: str = "boot-1", **which: Any) -> Path:
        reply = await self.call(
            self.storage.start,
            storage_pb2.StartVolumesRequest(
                owner=OWNER, boot_id=boot, volumes=[self.volume(**which)]
            ),
        )
        return Path(reply.devices[0].path)

    async def stop(self, boot: str = "boot-1", **how: Any) -> None:
        await self.call(
            self.storage.stop,
            storage_pb2.StopVolumesRequest(owner=OWNER, boot_id=boot, volumes=[self.volume()]),
            **how,
        )

    async def ensure(self, **which: Any) -> storage_pb2.VolumeState:
        reply = await self.call(
            self.storage.ensure,
            storage_pb2.EnsureRequest(owner=OWNER, volumes=[self.volume(**which)]),
        )
        state: storage_pb2.VolumeState = reply.volumes[0]
        return state

    async def describe(self, **which: Any) -> storage_pb2.VolumeState:
        reply = await self.call(
            self.storage.describe,
            storage_pb2.DescribeRequest(volumes=[self.volume(**which)]),
        )
        state: storage_pb2.VolumeState = reply.volumes[0]
        return state


@contextlib.asynccontextmanager
async def a_world(place: Path, registry: bool = True) -> AsyncIterator[World]:
    async with Instance() as instance:
        with tempfile.TemporaryDirectory(dir=place) as root:
            world = World(instance, Path(root))
            if registry:
                await world.start_registry()
            world.start_storage()
            try:
                yield world
            finally:
                if world.process is not None and world.process.poll() is None:
                    world.process.kill()
                    world.process.wait()


def write(path: Path, data: bytes, offset: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def refused(reason: str) -> contextlib.AbstractContextManager[Any]:
    return pytest.raises(BusError, check=lambda error: error.reason == reason)


def test_a_volumes_life_over_the_bus(xfs: Path) -> None:
    async def scenario() -> None:
        async with a_world(xfs) as world:
            await world.set_up()
            state = await world.ensure()
            assert (state.size, state.is_dirty, state.problem) == (4 * MIB, False, "")
            disk = await world.start()
            write(disk, A)
            assert (await world.describe()).is_dirty
            await world.stop()
            state = await world.describe()
            assert [r.id for r in state.revisions] == ["1"]
            copy = world.volume("copy")
            reply = await world.call(
                world.storage.ensure_cloned,
                storage_pb2.EnsureClonedRequest(
                    owner=OTHER,
                    items=[storage_pb2.CloneItem(source=world.volume(), target=copy)],
                ),
            )
            assert reply.volumes[0].usage == state.usage
            with refused("VOLUME_FOREIGN") as caught:
                await world.call(
                    world.storage.ensure,
                    storage_pb2.EnsureRequest(owner=OWNER, volumes=[copy]),
                )
            assert caught.value.metadata["owner"] == OTHER
            assert caught.value.code == "FAILED_PRECONDITION"
            reply = await world.call(
                world.storage.resize,
                storage_pb2.ResizeRequest(owner=OWNER, volume=world.volume(), size=8 * MIB),
            )
            assert reply.size == (await world.describe()).size == 8 * MIB
            await world.call(
                world.storage.revert,
                storage_pb2.RevertRequest(owner=OWNER, volume=world.volume(), revision="1"),
            )
            for volume, owner in ((copy, OTHER), (world.volume(), OWNER)):
                await world.call(
                    world.storage.remove,
                    storage_pb2.RemoveRequest(owner=owner, volumes=[volume]),
                )
            assert list((world.root / "p").rglob("*.img*")) == []
            assert await world.end_storage(signal.SIGTERM) == 0

    asyncio.run(scenario())


def test_import_and_export_by_ticket(xfs: Path) -> None:
    async def scenario() -> None:
        async with a_world(xfs) as world:
            await world.set_up()
            await world.ensure()
            begun = await world.call(
                world.storage.import_begin,
                storage_pb2.ImportBeginRequest(
                    owner=OWNER, volume=world.volume(), size=32 * MIB, want_ticket=True
                ),
            )
            assert (begun.size, begun.path) == (32 * MIB, "")
            end = storage_pb2.ImportEndRequest(owner=OWNER, volume=world.volume(), success=True)
            source = world.root / "source"
            with source.open("w+b") as file:
                file.truncate(32 * MIB)
                file.seek(20 * MIB)
                file.write(A * 512)
                file.flush()
                with pytest.raises(TransferError, match="bytes were sent"):
                    await asyncio.to_thread(
                        import_file, begun.socket, begun.ticket, file.fileno(), 31 * MIB
                    )
                with pytest.raises(TransferError, match="ticket"):  # it worked once only
                    await asyncio.to_thread(
                        import_file, begun.socket, begun.ticket, file.fileno(), 32 * MIB
                    )
                with refused("IMPORT_INCOMPLETE"):
                    await world.call(world.storage.import_end, end)
                again = await world.call(
                    world.storage.import_begin,
                    storage_pb2.ImportBeginRequest(
                        owner=OWNER, volume=world.volume(), size=32 * MIB, want_ticket=True
                    ),
                )
                await asyncio.to_thread(
                    import_file, again.socket, again.ticket, file.fileno(), 32 * MIB
                )
            for _ in range(2):
                await world.call(world.storage.import_end, end)
            state = await world.describe()
            assert state.size == 32 * MIB
            assert state.usage <= 4 * MIB  # holes stayed holes
            assert [r.id for r in state.revisions] == ["1"]
            export = await world.call(
                world.storage.export_begin,
                storage_pb2.ExportBeginRequest(owner=OWNER, volume=world.volume()),
            )
            await world.call(
                world.storage.remove,
                storage_pb2.RemoveRequest(owner=OWNER, volumes=[world.volume()]),
            )
            with (world.root / "out").open("w+b") as out:
                size = await asyncio.to_thread(
                    export_file, export.socket, export.ticket, out.fileno()
                )
                assert size == 32 * MIB
                assert out.read() == source.read_bytes()

            with pytest.raises(TransferError):
                await asyncio.to_thread(
                    export_volume, export.socket, "0" * 64, lambda data, at: None
                )

    asyncio.run(scenario())


def test_an_import_by_path(xfs: Path) -> None:
    async def scenario() -> None:
        async with a_world(xfs) as world:
            await world.set_up()
            await world.ensure()
            begun = await world.call(
                world.storage.import_begin,
                storage_pb2.ImportBeginRequest(owner=OWNER, volume=world.volume()),
            )
            assert begun.size == 4 * MIB
            write(Path(begun.path), A, MIB)
            await world.call(
                world.storage.import_end,
                storage_pb2.ImportEndRequest(owner=OWNER, volume=world.volume(), success=True),
            )
            clean = world.root / "p/appvms/work/private.img"
            assert clean.read_bytes()[MIB : MIB + 4096] == A
            await world.call(
                world.storage.clear,
                storage_pb2.ClearRequest(owner=OWNER, volume=world.volume()),
                operation="op-2",
            )
            assert clean.read_bytes() == bytes(4 * MIB)

    asyncio.run(scenario())


def test_a_lower_epoch_changes_nothing(xfs: Path) -> None:
    async def scenario() -> None:
        async with a_world(xfs) as world:
            await world.set_up()
            request = storage_pb2.EnsureRequest(owner=OWNER, volumes=[world.volume()])
            with refused("STALE_EPOCH") as caught:
                await world.call(world.storage.ensure, request, epoch=EPOCH - 1)
            assert caught.value.code == "ABORTED"
            await world.call(world.storage.ensure, request, epoch=EPOCH + 1)
            with refused("STALE_EPOCH"):
                await world.call(world.storage.ensure, request, epoch=EPOCH)
            assert (await world.describe()).problem == ""  # reading needs no epoch

    asyncio.run(scenario())


def test_nothing_is_done_before_the_epoch_is_known(xfs: Path) -> None:
    async def scenario() -> None:
        async with a_world(xfs, registry=False) as world:
            with refused("EPOCH_UNKNOWN"):
                await world.call(
                    world.storage.pool_setup,
                    storage_pb2.PoolSetupRequest(pool=world.pool()),
                    timeout=3.0,
                )
            assert list(world.root.iterdir()) == []
            health = await world.control.health(control_pb2.HealthRequest())
            assert not health.ready
            waiting = asyncio.create_task(world.set_up())  # UNAVAILABLE is tried again
            await world.start_registry()
            await waiting
            assert (world.root / "p/appvms").is_dir()

    asyncio.run(scenario())


def test_a_dry_run_has_no_effect(xfs: Path) -> None:
    async def scenario() -> None:
        async with a_world(xfs) as world:
            await world.set_up()
            request = storage_pb2.EnsureRequest(owner=OWNER, volumes=[world.volume()])
            await world.call(world.storage.ensure, request, validate_only=True)
            assert list((world.root / "p/appvms").iterdir()) == []
            await world.call(world.storage.ensure, request)
            with refused("REVISION_NOT_FOUND"):
                await world.call(
                    world.storage.revert,
                    storage_pb2.RevertRequest(owner=OWNER, volume=world.volume()),
                    validate_only=True,
                )
            before = sorted(p.name for p in (world.root / "p").rglob("*"))
            for method, message in (
                (world.storage.clear, storage_pb2.ClearRequest),
                (world.storage.import_begin, storage_pb2.ImportBeginRequest),
            ):
                await world.call(
                    method, message(owner=OWNER, volume=world.volume()), validate_only=True
                )
            assert sorted(p.name for p in (world.root / "p").rglob("*")) == before

    asyncio.run(scenario())


def test_pools_and_kernels_become_facts(xfs: Path) -> None:
    async def scenario() -> None:
        async with a_world(xfs) as world:
            await world.set_up()
            kernels = records_pb2.Pool(
                name="linux-kernel",
                driver="linux-kernel",
                options={"dir_path": str(world.root / "p/vm-kernels")},
            )
            await world.call(world.storage.pool_setup, storage_pb2.PoolSetupRequest(pool=kernels))
            missing = world.pool("missing")
            await world.call(
                world.storage.watch_pools,
                storage_pb2.WatchPoolsRequest(pools=[world.pool(), kernels, missing]),
            )
            await world.fact(lambda facts: len(facts) == 3)
            pool = world.facts["pool/p"].pool
            assert pool.usable
            assert pool.usage_details == {"data_size": pool.size, "data_usage": pool.usage}
            assert world.facts["pool/linux-kernel"].pool.included_in == "p"
            assert not world.facts["pool/linux-kernel"].pool.HasField("size")
            assert not world.facts["pool/missing"].pool.usable
            assert "does not exist" in world.facts["pool/missing"].pool.problem

            for part in ("vmlinuz", "initramfs", "modules"):
                (world.root / part).write_bytes(part.encode())
            add = storage_pb2.KernelAddRequest(
                pool=kernels,
                name="6.1.0-lab",
                vmlinuz=str(world.root / "vmlinuz"),
                modules=str(world.root / "modules"),
            )
            for _ in range(2):
                reply = await world.call(world.storage.kernel_add, add)
                assert reply.kernel.has_modules
                assert not reply.kernel.has_initramfs
            await world.fact(lambda facts: "kernel/6.1.0-lab" in facts)
            add.vmlinuz = str(world.root / "initramfs")
            with refused("KERNEL_EXISTS"):
                await world.call(world.storage.kernel_add, add)
            directory = Path(world.facts["kernel/6.1.0-lab"].kernel.directory)
            (directory / "default-kernelopts-common.txt").write_text("quiet\n")
            (directory / "memory-hotplug-supported").touch()
            await world.fact(lambda facts: facts["kernel/6.1.0-lab"].kernel.memory_hotplug)
            assert world.facts["kernel/6.1.0-lab"].kernel.kernelopts_common == "quiet\n"

            volume = storage_pb2.VolumeSpec(
                declared=records_pb2.Volume(name="kernel", pool="linux-kernel", vid="6.1.0-lab"),
                pool=kernels,
            )
            started = await world.call(
                world.storage.start,
                storage_pb2.StartVolumesRequest(owner=OWNER, boot_id="b", volumes=[volume]),
            )
            assert [(d.path, d.rw) for d in started.devices] == [
                (str(directory / "modules.img"), False)
            ]
            volume.declared.vid = "7.0"
            with refused("KERNEL_NOT_INSTALLED"):
                await world.call(
                    world.storage.verify,
                    storage_pb2.VerifyRequest(owner=OWNER, volumes=[volume]),
                )
            remove = storage_pb2.KernelRemoveRequest(pool=kernels, name="6.1.0-lab")
            for _ in range(2):
                await world.call(world.storage.kernel_remove, remove)
            with refused("KERNEL_NOT_INSTALLED"):
                await world.call(world.storage.kernel_remove, remove, operation="another")
            await world.fact(lambda facts: "kernel/6.1.0-lab" not in facts)

    asyncio.run(scenario())


def test_facts_are_complete_again_after_either_restarts(xfs: Path) -> None:
    async def scenario() -> None:
        async with a_world(xfs) as world:
            await world.set_up()
            await world.call(
                world.storage.watch_pools, storage_pb2.WatchPoolsRequest(pools=[world.pool()])
            )
            await world.fact(lambda facts: "pool/p" in facts)
            before = world.complete
            await world.stop_registry()
            await world.start_registry()
            await world.fact(lambda facts: "pool/p" in facts)
            assert world.complete > before
            assert await world.end_storage(signal.SIGKILL) == -signal.SIGKILL
            world.facts.clear()
            world.start_storage()  # lifecycle has not named the pools to this one
            await world.fact(lambda facts: "pool/p" in facts)

    asyncio.run(scenario())


def test_a_killed_stop_goes_on_after_the_restart(xfs: Path) -> None:
    async def scenario() -> None:
        async with a_world(xfs) as world:
            await world.set_up()
            await world.ensure()
            write(await world.start(), A)
            world.failpoints.write_text("storage.stop.before_rename=kill")
            stopping = asyncio.create_task(world.stop())
            assert await world.died() == -signal.SIGKILL
            world.start_storage()
            await asyncio.gather(stopping, return_exceptions=True)
            await world.stop()
            state = await world.describe()
            assert not state.is_dirty
            assert [r.id for r in state.revisions] == ["1"]
            clean = world.root / "p/appvms/work/private.img"
            assert clean.read_bytes()[:4096] == A

    asyncio.run(scenario())


def test_a_hanging_pool_is_given_up_and_delays_no_other(xfs: Path) -> None:
    async def scenario() -> None:
        async with a_world(xfs) as world:
            await world.set_up("p", "q")
            await world.ensure()
            await world.ensure(pool="q")
            await world.start()
            world.failpoints.write_text("storage.stop.before_rename=sleep:4")
            with refused("POOL_TIMEOUT") as caught:
                await world.stop(timeout=1.0)
            assert caught.value.code == "DEADLINE_EXCEEDED"
            async with asyncio.timeout(2):  # the same volume is locked, all else is not
                await world.start(pool="q")
                await world.ensure(qube="other")
                assert (await world.describe()).is_dirty
            await world.stop()  # waits for the one that was given up
            assert not (await world.describe()).is_dirty

    asyncio.run(scenario())


def test_a_cancelled_copy_ends_and_leaves_nothing(xfs: Path) -> None:
    async def scenario() -> None:
        with tempfile.TemporaryDirectory() as elsewhere:
            async with a_world(xfs) as world:
                await world.set_up()
                await world.ensure()
                other = records_pb2.Pool(
                    name="q",
                    driver="file-reflink",
                    options={"dir_path": f"{elsewhere}/q", "setup_check": "False"},
                )
                await world.call(world.storage.pool_setup, storage_pb2.PoolSetupRequest(pool=other))
                world.failpoints.write_text("storage.clone.before_rename=sleep:1.5")
                target = world.volume("copy", pool="q")
                target.pool.CopyFrom(other)
                request_id = os.urandom(16)
                copying = asyncio.create_task(
                    world.call(
                        world.storage.ensure_cloned,
                        storage_pb2.EnsureClonedRequest(
                            owner=OTHER,
                            items=[storage_pb2.CloneItem(source=world.volume(), target=target)],
                        ),
                        request_id=request_id,
                    )
                )
                found = False
                async with asyncio.timeout(5):
                    while not found:
                        reply = await world.control.cancel(
                            control_pb2.CancelRequest(request_id=request_id)
                        )
                        found = reply.found
                with pytest.raises(BusError) as caught:
                    await copying
                assert caught.value.code in ("CANCELLED", "DEADLINE_EXCEEDED")
                await world.call(
                    world.storage.remove, storage_pb2.RemoveRequest(owner=OTHER, volumes=[target])
                )
                assert list(Path(elsewhere, "q").rglob("*.img*")) == []

    asyncio.run(scenario())


def test_drivers_that_this_host_cannot_run(xfs: Path) -> None:
    async def scenario() -> None:
        async with a_world(xfs) as world:
            reply = await world.call(world.storage.list_drivers, storage_pb2.ListDriversRequest())
            assert {d.name: sorted(d.parameters) for d in reply.drivers} == {
                "callback": ["conf_id"],
                "file": ["dir_path", "ephemeral_volatile", "revisions_to_keep"],
                "file-reflink": [
                    "dir_path", "ephemeral_volatile", "revisions_to_keep", "setup_check",
                ],
                "linux-kernel": ["dir_path"],
                "lvm_thin": [
                    "ephemeral_volatile", "revisions_to_keep", "thin_pool", "volume_group",
                ],
                "zfs": [
                    "container", "ephemeral_volatile", "revisions_to_keep",
                    "snap_on_start_forensics",
                ],
            }  # fmt: skip
            absent = {d.name for d in reply.drivers if not d.available}
            assert absent == {"callback", "lvm_thin", "zfs"}
            options = {"volume_group": "vg", "thin_pool": "tp"}
            pool = records_pb2.Pool(name="l", driver="lvm_thin", options=options)
            with refused("POOL_UNUSABLE") as caught:
                await world.call(world.storage.pool_setup, storage_pb2.PoolSetupRequest(pool=pool))
            assert caught.value.message.startswith("driver lvm_thin is not available on this host:")
            reply = await world.call(
                world.storage.pool_describe, storage_pb2.PoolDescribeRequest(pool=pool)
            )
            assert not reply.fact.usable
            assert dict(reply.config) == {"name": "l", "driver": "lvm_thin", **options}
            for options in ({}, {"volume_group": "vg"}, {"dir_path": "/x"}):
                bad = records_pb2.Pool(name="l", driver="lvm_thin", options=options)
                with refused("INVALID_POOL"):
                    await world.call(
                        world.storage.pool_setup, storage_pb2.PoolSetupRequest(pool=bad)
                    )

    asyncio.run(scenario())


def test_pool_configuration_as_admin_pool_info_shows_it(xfs: Path) -> None:
    async def scenario() -> None:
        async with a_world(xfs) as world:
            await world.set_up()
            reply = await world.call(
                world.storage.pool_describe,
                storage_pb2.PoolDescribeRequest(pool=world.pool(), others=[world.pool("q")]),
            )
            assert dict(reply.config) == {
                "name": "p",
                "driver": "file-reflink",
                "dir_path": str(world.root / "p"),
                "revisions_to_keep": "1",
                "ephemeral_volatile": "False",
            }
            assert reply.fact.usable
            assert reply.fact.included_in == ""

    asyncio.run(scenario())


def test_sweep_and_quarantine(xfs: Path) -> None:
    async def scenario() -> None:
        async with a_world(xfs) as world:
            await world.set_up()
            await world.ensure()
            await world.call(
                world.storage.watch_pools, storage_pb2.WatchPoolsRequest(pools=[world.pool()])
            )
            leftover = world.root / "p/appvms/work/private-dirty.img~123"
            leftover.touch()
            stranger = world.root / "p/appvms/lost/root.img"
            stranger.parent.mkdir()
            stranger.write_bytes(A)
            swept = await world.control.sweep(control_pb2.SweepRequest())
            assert not leftover.exists()
            assert stranger.exists()
            assert any("appvms/lost/root bears no owner" in f for f in swept.findings)
            listed = await world.call(
                world.storage.inventory,
                storage_pb2.InventoryRequest(pools=[world.pool(), world.pool("missing")]),
            )
            lost = [item for item in listed.items if not item.owner]
            assert [item.vid for item in lost] == ["appvms/lost/root"]
            reply = await world.call(
                world.storage.quarantine,
                storage_pb2.QuarantineRequest(pool=world.pool(), items=lost),
            )
            assert "moved to" in reply.findings[0]
            assert not stranger.exists()
            kept = list((world.root / "p/appvms/.bulkhead-quarantine").rglob("root.img"))
            assert [p.read_bytes() for p in kept] == [A]

    asyncio.run(scenario())


def test_an_ephemeral_volume_is_not_started_in_the_clear(xfs: Path) -> None:
    async def scenario() -> None:
        async with a_world(xfs) as world:
            await world.set_up()
            volume = world.volume(save_on_stop=False)
            volume.pool.options["ephemeral_volatile"] = "True"
            request = storage_pb2.StartVolumesRequest(owner=OWNER, boot_id="b", volumes=[volume])
            with refused("EPHEMERAL_UNAVAILABLE"):
                await world.call(world.storage.start, request)
            assert list((world.root / "p").rglob("*.img")) == []
            request.volumes[0].declared.ephemeral = False
            await world.call(world.storage.start, request)

    asyncio.run(scenario())


def test_a_full_pool_says_so_and_keeps_what_was(xfs: Path) -> None:
    async def scenario() -> None:
        with loopfs.mounted("tmpfs", 8) as small:
            async with a_world(xfs) as world:
                await world.set_up()
                await world.ensure(size=64 * MIB)
                disk = await world.start(size=64 * MIB)
                write(disk, os.urandom(16 * MIB))
                await world.stop()
                pool = records_pb2.Pool(
                    name="q",
                    driver="file-reflink",
                    options={"dir_path": f"{small}/q", "setup_check": "False"},
                )
                await world.call(world.storage.pool_setup, storage_pb2.PoolSetupRequest(pool=pool))
                target = world.volume("work", pool="q")
                target.pool.CopyFrom(pool)
                await world.call(
                    world.storage.ensure,
                    storage_pb2.EnsureRequest(owner=OWNER, volumes=[target]),
                )
                begun = await world.call(
                    world.storage.start,
                    storage_pb2.StartVolumesRequest(owner=OWNER, boot_id="b", volumes=[target]),
                )
                write(Path(begun.devices[0].path), A)
                await world.call(
                    world.storage.stop,
                    storage_pb2.StopVolumesRequest(owner=OWNER, boot_id="b", volumes=[target]),
                )
                before = sorted(p.name for p in Path(small).rglob("*"))
                with refused("NO_SPACE") as caught:
                    await world.call(
                        world.storage.clone_volume,
                        storage_pb2.CloneVolumeRequest(
                            owner=OWNER, source=world.volume(), target=target
                        ),
                        operation="op-9",
                    )
                assert caught.value.code == "RESOURCE_EXHAUSTED"
                assert sorted(p.name for p in Path(small).rglob("*")) == before
                clean = Path(small, "q/appvms/work/private.img")
                assert clean.read_bytes()[:4096] == A

    asyncio.run(scenario())


def test_calls_about_one_volume_take_turns_and_many_qubes_work_at_once(xfs: Path) -> None:
    async def scenario() -> None:
        async with a_world(xfs) as world:
            await world.set_up()
            names = [f"qube{number}" for number in range(12)]
            await asyncio.gather(*(world.ensure(qube=name) for name in names))
            disks = await asyncio.gather(*(world.start(qube=name) for name in names))
            assert len(set(disks)) == len(names)
            await world.ensure()
            allowed = {"VOLUME_DIRTY", "VOLUME_IMPORTING", "VOLUME_NOT_IMPORTING"}
            for turn in range(4):
                outcomes = await asyncio.gather(
                    world.start(),
                    world.stop(),
                    world.call(
                        world.storage.resize,
                        storage_pb2.ResizeRequest(
                            owner=OWNER, volume=world.volume(), size=(5 + turn) * MIB
                        ),
                    ),
                    world.call(
                        world.storage.clear,
                        storage_pb2.ClearRequest(owner=OWNER, volume=world.volume()),
                        operation=f"clear-{turn}",
                    ),
                    world.call(
                        world.storage.import_begin,
                        storage_pb2.ImportBeginRequest(owner=OWNER, volume=world.volume()),
                        operation=f"import-{turn}",
                    ),
                    world.call(
                        world.storage.import_end,
                        storage_pb2.ImportEndRequest(
                            owner=OWNER, volume=world.volume(), success=True
                        ),
                        operation=f"import-{turn}",
                    ),
                    return_exceptions=True,
                )
                for outcome in outcomes:
                    if isinstance(outcome, BaseException):
                        assert isinstance(outcome, BusError), outcome
                        assert outcome.reason in allowed, outcome
                await world.call(
                    world.storage.import_end,
                    storage_pb2.ImportEndRequest(owner=OWNER, volume=world.volume()),
                    operation=f"import-{turn}",
                )
                await world.stop()
                state = await world.describe()
                assert (state.is_dirty, state.importing, state.problem) == (False, False, "")
                assert len(state.revisions) <= 1
            left = [p.name for p in (world.root / "p/appvms/work").iterdir()]
            assert [name for name in left if "~" in name or "-dirty" in name] == []

    asyncio.run(scenario())
