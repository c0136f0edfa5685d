"""The domains service on the simulated hypervisor: idempotency, hangs, news, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from bulkhead.api import control_pb2
from bulkhead.api import domains_pb2 as pb
from bulkhead.bus.dispatch import Call
from bulkhead.bus.errors import BusError
from bulkhead.model.records import ADMINVM_UUID, DeviceFact, HostFact, PowerFact
from services.domains.adapters.guest_keys import Boot, FileKeys
from services.domains.adapters.hypervisor import Domain, Failure, Hypervisor, HypervisorError
from services.domains.adapters.qmemman import MemoryManager
from services.domains.adapters.sim_adapter import SimHypervisor
from services.domains.core.reasons import REASONS
from services.domains.core.spec import DomainSpec, InterfaceSpec
from services.domains.qube_queue import WAITERS

from .hypervisor_benches import SimBench, replace, simulation, until
from .hypervisor_service import Service, boot, call, message, service


@pytest.fixture(scope="module")
def shared() -> Iterator[SimBench]:
    with simulation() as bench:
        yield bench


@pytest.fixture
def sim(shared: SimBench) -> SimBench:
    shared.control.reset()
    return shared


Body = Callable[[Service], Awaitable[None]]


def run(sim: SimBench, tmp_path: Path, body: Body, **options: object) -> None:
    async def whole() -> None:
        async with service(sim.connect, tmp_path, **options) as running:  # type: ignore[arg-type]
            await body(running)

    asyncio.run(asyncio.wait_for(whole(), 60))


@contextlib.asynccontextmanager
async def refused(*reasons: str) -> AsyncIterator[None]:
    with pytest.raises(BusError) as caught:
        yield
    assert caught.value.reason in reasons
    assert caught.value.code == REASONS[caught.value.reason].code
    assert len(caught.value.message.split()) > 3


async def started(running: Service, spec: DomainSpec) -> None:
    await running.handlers.create_paused(message(spec), call())
    await running.handlers.resume(pb.ResumeDomainRequest(boot=boot(spec), spawn=True), call())


async def ask(awaitable: Awaitable[object]) -> object:
    """A call as a task of its own, the way the bus runs it."""
    return await awaitable


# ---- the life of a boot


def test_a_whole_life_is_told_with_growing_numbers(sim: SimBench, tmp_path: Path) -> None:
    spec = sim.spec(1)

    async def body(running: Service) -> None:
        handlers, listener = running.handlers, running.listener
        host = listener.host()
        assert host == HostFact("sim", "sim:", 16384 * 1024, 4, 4096)
        made = await handlers.create_paused(message(spec), call())
        assert made.state.power.power == "paused"
        assert (made.state.power.boot_id, made.state.epoch) == ("b1", "7")
        ran = await handlers.resume(pb.ResumeDomainRequest(boot=boot(spec)), call())
        assert ran.state.power.power == "running"
        await handlers.pause(pb.PauseDomainRequest(boot=boot(spec)), call())
        await handlers.resume(pb.ResumeDomainRequest(boot=boot(spec)), call())
        slept = await handlers.suspend(pb.SuspendDomainRequest(boot=boot(spec)), call())
        assert (slept.state.power.power, slept.paused_instead) == ("pmsuspended", False)
        await handlers.wake(pb.WakeDomainRequest(boot=boot(spec)), call())
        await handlers.shutdown(pb.ShutdownDomainRequest(boot=boot(spec)), call())
        await running.said(spec.uuid, "halted")
        powers = listener.powers(spec.uuid)
        assert [p.power for p in powers] == [
            "paused", "running", "paused", "running", "pmsuspended", "running", "halted",
        ]  # fmt: skip
        numbers = [p.number for p in powers]
        assert numbers == sorted(set(numbers))
        assert {p.boot_id for p in powers} == {"b1"}
        assert powers[-1].stop_reason == "shutdown"
        assert powers[0].xid > 0 and powers[-1].xid == -1
        assert powers[0].start_time is not None

    run(sim, tmp_path, body)


def test_every_call_may_be_repeated(sim: SimBench, tmp_path: Path) -> None:
    spec = sim.spec(2)
    disk = pb.DiskSpec(target="xvdi", path="/pool/x.img")

    async def body(running: Service) -> None:
        handlers = running.handlers
        first = await handlers.create_paused(message(spec), call())
        second = await handlers.create_paused(message(spec), call())
        assert first == second
        for _ in range(2):
            await handlers.resume(pb.ResumeDomainRequest(boot=boot(spec)), call())
            await handlers.attach_disk(pb.AttachDiskRequest(boot=boot(spec), disk=disk), call())
            await handlers.resize_disk(
                pb.ResizeDiskRequest(boot=boot(spec), target="xvdi", size=1 << 20), call()
            )
        for _ in range(2):
            await handlers.detach_disk(pb.DetachDiskRequest(boot=boot(spec), disk=disk), call())
        for _ in range(2):
            await handlers.pause(pb.PauseDomainRequest(boot=boot(spec)), call())
        ends = [
            (await handlers.destroy(pb.DestroyDomainRequest(boot=boot(spec)), call())).was_running
            for _ in range(2)
        ]
        assert ends == [True, False]
        # Undo and the end of things are accepted where nothing is left.
        await handlers.shutdown(pb.ShutdownDomainRequest(boot=boot(spec)), call())
        await handlers.detach_disk(pb.DetachDiskRequest(boot=boot(spec), disk=disk), call())
        for _ in range(2):
            await handlers.undefine(pb.UndefineDomainRequest(uuid=spec.uuid), call())
        created = sim.control.calls("create_paused", spec.uuid)
        assert [c["outcome"] for c in created] == ["ok"]
        await until(lambda: f"power/{spec.uuid}" not in running.listener.held, 5, "its removal")

    run(sim, tmp_path, body)


def test_destroy_of_what_never_was_is_success(sim: SimBench, tmp_path: Path) -> None:
    spec = sim.spec(3)

    async def body(running: Service) -> None:
        reply = await running.handlers.destroy(pb.DestroyDomainRequest(boot=boot(spec)), call())
        assert not reply.was_running
        # A create of that boot that comes late must not stand.
        async with refused("BOOT_ABANDONED"):
            await running.handlers.create_paused(message(spec), call())
        await running.handlers.create_paused(message(replace(spec, boot_id="b2")), call())

    run(sim, tmp_path, body)


def test_another_boot_is_neither_answered_nor_destroyed(sim: SimBench, tmp_path: Path) -> None:
    spec = sim.spec(4)
    other = replace(spec, boot_id="b2")

    async def body(running: Service) -> None:
        handlers = running.handlers
        await started(running, spec)
        async with refused("DOMAIN_EXISTS"):
            await handlers.create_paused(message(other), call())
        async with refused("DOMAIN_NOT_FOUND"):
            await handlers.pause(pb.PauseDomainRequest(boot=boot(other)), call())
        gone = await handlers.destroy(pb.DestroyDomainRequest(boot=boot(other)), call())
        assert not gone.was_running
        found = await handlers.describe(pb.DescribeDomainRequest(boot=boot(spec)), call())
        assert found.found and found.state.power.power == "running"
        lost = await handlers.describe(pb.DescribeDomainRequest(boot=boot(other)), call())
        assert not lost.found
        whichever = pb.BootRef(uuid=spec.uuid)
        assert (await handlers.describe(pb.DescribeDomainRequest(boot=whichever), call())).found
        assert (await handlers.destroy(pb.DestroyDomainRequest(boot=whichever), call())).was_running
        await running.said(spec.uuid, "halted")

    run(sim, tmp_path, body)


def test_an_effect_behind_an_error_is_found(sim: SimBench, tmp_path: Path) -> None:
    spec = sim.spec(5)

    async def body(running: Service) -> None:
        sim.control.fail(spec.uuid, "create_paused", when="after", times=1)
        made = await running.handlers.create_paused(message(spec), call())
        assert made.state.power.boot_id == spec.boot_id
        sim.control.fail(spec.uuid, "create_paused", message="no luck", times=1)
        other = sim.spec(6)
        sim.control.fail(other.uuid, "create_paused", message="no luck", times=1)
        async with refused("HYPERVISOR_REFUSED"):
            await running.handlers.create_paused(message(other), call())
        await running.handlers.create_paused(message(other), call())

    run(sim, tmp_path, body)


def test_a_guest_that_cannot_suspend_is_paused(sim: SimBench, tmp_path: Path) -> None:
    spec = sim.spec(7)

    async def body(running: Service) -> None:
        sim.control.nature(spec.uuid, pm_suspend="unsupported")
        await started(running, spec)
        reply = await running.handlers.suspend(pb.SuspendDomainRequest(boot=boot(spec)), call())
        assert reply.paused_instead and reply.state.power.power == "paused"
        again = await running.handlers.suspend(pb.SuspendDomainRequest(boot=boot(spec)), call())
        assert again.paused_instead

    run(sim, tmp_path, body)


def test_a_paused_guest_shuts_down_only_by_force(sim: SimBench, tmp_path: Path) -> None:
    spec = sim.spec(8)

    async def body(running: Service) -> None:
        await started(running, spec)
        await running.handlers.pause(pb.PauseDomainRequest(boot=boot(spec)), call())
        async with refused("DOMAIN_WRONG_STATE"):
            await running.handlers.shutdown(pb.ShutdownDomainRequest(boot=boot(spec)), call())
        await running.handlers.shutdown(
            pb.ShutdownDomainRequest(boot=boot(spec), force=True), call()
        )
        await running.said(spec.uuid, "halted")

    run(sim, tmp_path, body)


def test_a_dry_run_changes_nothing(sim: SimBench, tmp_path: Path) -> None:
    spec, other = sim.spec(9), sim.spec(10)

    async def body(running: Service) -> None:
        await started(running, spec)
        before = sim.control.guest(spec.uuid)

        def dry() -> Call:
            made = call()
            made.validate_only = True
            return made

        handlers = running.handlers
        disk = pb.DiskSpec(target="xvdi", path="/pool/x.img")
        nic = pb.InterfaceSpec(mac="00:16:3e:5e:6c:01")
        ref = boot(spec)
        for work in (
            handlers.create_paused(message(other), dry()),
            handlers.pause(pb.PauseDomainRequest(boot=ref), dry()),
            handlers.suspend(pb.SuspendDomainRequest(boot=ref), dry()),
            handlers.shutdown(pb.ShutdownDomainRequest(boot=ref), dry()),
            handlers.destroy(pb.DestroyDomainRequest(boot=ref), dry()),
            handlers.attach_disk(pb.AttachDiskRequest(boot=ref, disk=disk), dry()),
            handlers.attach_interface(pb.AttachInterfaceRequest(boot=ref, interface=nic), dry()),
            handlers.set_maxmem(pb.SetMaxmemRequest(boot=ref, maxmem_mib=500), dry()),
            handlers.write_guest_keys(
                pb.WriteGuestKeysRequest(boot=ref, keys=[pb.GuestKey(path="/a", value="b")]), dry()
            ),
        ):
            await work
        after = sim.control.guest(spec.uuid)
        assert {**after, "cpu_time_ns": 0} == {**before, "cpu_time_ns": 0}
        assert not (running.keys / f"{spec.uuid}.json").exists()
        assert not sim.control.calls("create_paused", other.uuid)

    run(sim, tmp_path, body)


# ---- news


@pytest.mark.parametrize(("how", "reason"), [("poweroff", "shutdown"), ("crash", "crashed")])
def test_a_guest_that_ends_by_itself_is_told_within_a_second(
    sim: SimBench, tmp_path: Path, how: str, reason: str
) -> None:
    spec = sim.spec(11)

    async def body(running: Service) -> None:
        await started(running, spec)
        began = time.monotonic()
        await asyncio.to_thread(getattr(sim.control, how), spec.uuid)
        await running.said(spec.uuid, "halted")
        assert time.monotonic() - began < 1.0
        assert running.listener.powers(spec.uuid)[-1].stop_reason == reason

    run(sim, tmp_path, body)


def test_domains_restarts_and_adopts_every_boot(sim: SimBench, tmp_path: Path) -> None:
    stays, ends = sim.spec(12), sim.spec(13)

    async def before(running: Service) -> None:
        for spec in (stays, ends):
            await started(running, spec)
            await running.handlers.write_guest_keys(
                pb.WriteGuestKeysRequest(
                    boot=boot(spec), keys=[pb.GuestKey(path="/name", value=spec.name)]
                ),
                call(),
            )
        numbers.append(running.listener.powers(stays.uuid)[-1].number)

    async def after(running: Service) -> None:
        fact = running.listener.held[f"power/{stays.uuid}"]
        assert fact.boot_id == stays.boot_id and fact.power == "running"  # type: ignore[union-attr]
        assert fact.number > numbers[0]  # type: ignore[union-attr]
        assert f"power/{ends.uuid}" not in running.listener.held
        keys = await running.handlers.read_guest_keys(
            pb.ReadGuestKeysRequest(boot=boot(stays)), call()
        )
        assert [(k.path, k.value) for k in keys.untrusted_keys] == [("/name", stays.name)]
        await until(lambda: not (running.keys / f"{ends.uuid}.json").exists(), 5, "its keys' end")
        reply = await running.handlers.create_paused(message(stays), call())
        assert reply.state.power.power == "running"  # recovery does not disturb it

    numbers: list[int] = []
    run(sim, tmp_path, before)
    sim.control.poweroff(ends.uuid)
    run(sim, tmp_path, after)


class Slow(SimHypervisor):
    """A domain exists, and says nothing when it is first asked for."""

    silent = ""
    asked = 0

    async def inventory(self, timeout: float) -> tuple[Domain, ...]:
        return tuple(d for d in await super().inventory(timeout) if d.uuid != self.silent)

    async def describe(self, uuid: str, timeout: float) -> Domain | None:
        if uuid == self.silent:
            self.asked += 1
            if self.asked < 3:
                raise HypervisorError(Failure.TIMEOUT, "it did not answer in time")
        return await super().describe(uuid, timeout)


def test_a_domain_that_answers_late_is_adopted_before_the_picture_is_complete(
    sim: SimBench, tmp_path: Path
) -> None:
    spec = sim.spec(17)

    def connect() -> Hypervisor:
        made = Slow(sim.root / "run/bulkhead/simhv/hv.sock")
        made.silent = spec.uuid
        hypervisors.append(made)
        return made

    async def before(running: Service) -> None:
        await started(running, spec)
        await running.handlers.write_guest_keys(
            pb.WriteGuestKeysRequest(boot=boot(spec), keys=[pb.GuestKey(path="/a", value="b")]),
            call(),
        )

    async def after() -> None:
        async with service(connect, tmp_path) as running:
            assert hypervisors[0].asked == 3
            # What the first complete picture left out would be taken for the end of its boot.
            assert running.listener.complete == 1
            fact = running.listener.held[f"power/{spec.uuid}"]
            assert isinstance(fact, PowerFact) and fact.power == "running"
            assert (running.keys / f"{spec.uuid}.json").exists()

    hypervisors: list[Slow] = []
    run(sim, tmp_path, before)
    asyncio.run(asyncio.wait_for(after(), 60))


def test_the_hypervisor_ends_and_everything_is_told_as_gone(tmp_path: Path) -> None:
    async def body(bench: SimBench) -> None:
        spec = bench.spec(14)
        async with service(bench.connect, tmp_path) as running:
            await started(running, spec)
            bench.control.call("reset")
            await running.said(spec.uuid, "halted")

    with simulation() as bench:
        asyncio.run(asyncio.wait_for(body(bench), 30))


# ---- hangs

HANGING = ("describe", "create_paused", "resume", "pause", "shutdown", "attach_disk", "undefine")


@pytest.mark.parametrize("hanging", HANGING)
def test_a_hanging_call_of_one_qube_holds_up_no_other(
    sim: SimBench, tmp_path: Path, hanging: str
) -> None:
    stuck, free = sim.spec(15), sim.spec(16)
    disk = pb.DiskSpec(target="xvdi", path="/pool/x.img")

    def work(running: Service) -> Awaitable[object]:
        handlers = running.handlers
        ref = boot(stuck)
        table: dict[str, Callable[[], Awaitable[object]]] = {
            "describe": lambda: handlers.describe(pb.DescribeDomainRequest(boot=ref), call()),
            "create_paused": lambda: handlers.create_paused(message(stuck), call()),
            "resume": lambda: handlers.resume(pb.ResumeDomainRequest(boot=ref), call()),
            "pause": lambda: handlers.pause(pb.PauseDomainRequest(boot=ref), call()),
            "shutdown": lambda: handlers.shutdown(pb.ShutdownDomainRequest(boot=ref), call()),
            "attach_disk": lambda: handlers.attach_disk(
                pb.AttachDiskRequest(boot=ref, disk=disk), call()
            ),
            "undefine": lambda: handlers.undefine(
                pb.UndefineDomainRequest(uuid=stuck.uuid), call()
            ),
        }
        return table[hanging]()

    async def body(running: Service) -> None:
        handlers = running.handlers
        if hanging != "create_paused":
            await running.handlers.create_paused(message(stuck), call())
            if hanging != "resume":
                ref = pb.ResumeDomainRequest(boot=boot(stuck))
                await running.handlers.resume(ref, call())
        index = len(sim.control.calls())
        sim.control.hang(stuck.uuid, hanging)
        task = asyncio.ensure_future(ask(work(running)))
        await asyncio.to_thread(
            sim.control.calls, hanging, stuck.uuid, index, at_least=1, timeout=5
        )
        # Another qube lives its whole life meanwhile.
        await started(running, free)
        await handlers.attach_disk(pb.AttachDiskRequest(boot=boot(free), disk=disk), call())
        await handlers.pause(pb.PauseDomainRequest(boot=boot(free)), call())
        await handlers.destroy(pb.DestroyDomainRequest(boot=boot(free)), call())
        # Kill of the stuck one is not held up either, and frees what hangs.
        began = time.monotonic()
        await handlers.destroy(pb.DestroyDomainRequest(boot=boot(stuck)), call())
        assert time.monotonic() - began < 1.0
        with pytest.raises(BusError):
            await task
        assert time.monotonic() - began < 2.0
        sim.control.clear()
        await until(lambda: not sim.control.domains(), 5, "the end of both")
        if hanging != "create_paused":
            await running.said(stuck.uuid, "halted")

    run(sim, tmp_path, body)


def test_a_create_that_outlives_its_destroy_is_ended(sim: SimBench, tmp_path: Path) -> None:
    """The effect comes after the kill: found by its boot id, and ended again."""
    spec = sim.spec(17)

    async def body(running: Service) -> None:
        handlers = running.handlers
        await handlers.destroy(pb.DestroyDomainRequest(boot=boot(spec)), call())
        await asyncio.to_thread(_create_behind_its_back, sim, spec)
        await until(lambda: not sim.control.domains(), 5, "the end of the late domain")
        assert running.listener.power(spec.uuid) == ""

    run(sim, tmp_path, body)


def _create_behind_its_back(sim: SimBench, spec: DomainSpec) -> None:
    from dataclasses import asdict

    sim.control.call("create_paused", spec=asdict(spec))


def test_a_call_ends_with_its_deadline(sim: SimBench, tmp_path: Path) -> None:
    spec = sim.spec(18)

    async def body(running: Service) -> None:
        await started(running, spec)
        sim.control.hang(spec.uuid, "pause")
        began = time.monotonic()
        async with refused("HYPERVISOR_TIMEOUT"):
            await running.handlers.pause(pb.PauseDomainRequest(boot=boot(spec)), call(0.6))
        assert time.monotonic() - began < 2.0

    run(sim, tmp_path, body)


def test_waiting_calls_of_one_qube_are_bounded(sim: SimBench, tmp_path: Path) -> None:
    spec = sim.spec(19)

    async def body(running: Service) -> None:
        await started(running, spec)
        sim.control.hang(spec.uuid, "pause")
        request = pb.PauseDomainRequest(boot=boot(spec))
        tasks = [
            asyncio.ensure_future(ask(running.handlers.pause(request, call())))
            for _ in range(WAITERS + 1)
        ]
        await asyncio.to_thread(sim.control.calls, "pause", spec.uuid, at_least=1, timeout=5)
        async with refused("DOMAIN_BUSY"):
            await running.handlers.pause(request, call())
        sim.control.clear()
        await asyncio.gather(*tasks)

    run(sim, tmp_path, body)


# ---- epochs, memory, keys, agents


def test_a_stale_lifecycle_is_refused(sim: SimBench, tmp_path: Path) -> None:
    spec = sim.spec(20)

    async def body(running: Service) -> None:
        handlers = running.handlers
        assert handlers.ready
        async with refused("STALE_EPOCH"):
            await handlers.create_paused(message(spec), call(epoch=4))
        await handlers.create_paused(message(spec), call(epoch=6))
        async with refused("STALE_EPOCH"):
            await handlers.destroy(pb.DestroyDomainRequest(boot=boot(spec)), call(epoch=5))
        # Whoever only reads has no epoch.
        found = await handlers.describe(
            pb.DescribeDomainRequest(boot=boot(spec)), call(epoch=0, caller="adminapi")
        )
        assert found.found

    run(sim, tmp_path, body)


def test_memory_is_promised_once_and_given_back(sim: SimBench, tmp_path: Path) -> None:
    gib = 1 << 30
    spec = replace(sim.spec(21), memory_mib=8192)

    async def body(running: Service) -> None:
        handlers = running.handlers

        async def reserve(boot_id: str, size: int, release: bool = False) -> None:
            await handlers.reserve_memory(
                pb.ReserveMemoryRequest(boot_id=boot_id, bytes=size, release=release), call()
            )

        await reserve("b1", 8 * gib)
        await reserve("b1", 8 * gib)
        async with refused("NOT_ENOUGH_MEMORY"):
            await reserve("x", 9 * gib)
        await handlers.create_paused(message(spec), call())
        await reserve("x", 8 * gib)  # the domain took the place of its promise
        async with refused("NOT_ENOUGH_MEMORY"):
            await reserve("y", 1)
        for _ in range(2):
            await reserve("x", 0, release=True)
        await reserve("y", 8 * gib)

    run(sim, tmp_path, body)


def test_qmemman_is_asked_and_let_go_when_the_domain_exists(sim: SimBench, tmp_path: Path) -> None:
    spec = sim.spec(22)
    socket = tmp_path / "qmemman.sock"
    log: list[str] = []
    answers = [b"OK\n", b"FAIL\n"]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        log.append((await reader.readline()).decode().strip())
        writer.write(answers.pop(0))
        await reader.read()
        log.append("closed")
        writer.close()

    async def whole() -> None:
        server = await asyncio.start_unix_server(serve, str(socket))
        manager = MemoryManager(socket)
        async with server, service(sim.connect, tmp_path, manager=manager) as running:
            handlers = running.handlers
            reserve = pb.ReserveMemoryRequest(boot_id="b1", bytes=459538432)
            for _ in range(2):
                await handlers.reserve_memory(reserve, call())
            assert log == ["459538432"]
            await handlers.create_paused(message(spec), call())
            await until(lambda: log == ["459538432", "closed"], 5, "the end of the reservation")
            async with refused("NOT_ENOUGH_MEMORY"):
                await handlers.reserve_memory(
                    pb.ReserveMemoryRequest(boot_id="b2", bytes=1), call()
                )
        assert log[:3] == ["459538432", "closed", "1"]

    asyncio.run(asyncio.wait_for(whole(), 30))


def test_guest_keys_are_of_one_boot(sim: SimBench, tmp_path: Path) -> None:
    spec = sim.spec(23)

    async def body(running: Service) -> None:
        handlers = running.handlers

        async def write(
            keys: dict[str, str], removed: tuple[str, ...] = (), replace_all: bool = False
        ) -> None:
            await handlers.write_guest_keys(
                pb.WriteGuestKeysRequest(
                    boot=boot(spec),
                    keys=[pb.GuestKey(path=k, value=v) for k, v in keys.items()],
                    removed=removed,
                    replace_all=replace_all,
                ),
                call(),
            )

        async def read(prefix: str = "") -> dict[str, str]:
            reply = await handlers.read_guest_keys(
                pb.ReadGuestKeysRequest(boot=boot(spec), prefix=prefix), call()
            )
            return {key.path: key.value for key in reply.untrusted_keys}

        async with refused("DOMAIN_NOT_FOUND"):
            await write({"/a": "1"})
        await handlers.create_paused(message(spec), call())
        await write({"/a": "1", "/s/x": "2", "/s/y": "ü"})
        assert await read("/s/") == {"/s/x": "2", "/s/y": "ü"}
        assert await read("/a") == {"/a": "1"}
        await write({"/s/z": "3"}, removed=("/s/", "/none"))
        assert await read() == {"/a": "1", "/s/z": "3"}
        async with refused("INVALID_GUEST_KEY"):
            await write({"/ok": "1", "bad": "2"})
        assert await read() == {"/a": "1", "/s/z": "3"}
        await write({"/b": ""}, replace_all=True)
        assert await read() == {"/b": ""}
        file = running.keys / f"{spec.uuid}.json"
        assert json.loads(file.read_text()) == {"boot_id": "b1", "keys": {"/b": ""}}
        assert file.stat().st_mode & 0o777 == 0o600
        await handlers.destroy(pb.DestroyDomainRequest(boot=boot(spec)), call())
        await until(lambda: not file.exists(), 5, "the end of the keys")

    run(sim, tmp_path, body)


def test_agents_are_waited_for_where_there_are_any(sim: SimBench, tmp_path: Path) -> None:
    absent, prompt, late, never = (sim.spec(n) for n in range(24, 28))

    async def body(running: Service) -> None:
        handlers = running.handlers

        def daemons(spec: DomainSpec, seconds: int = 20) -> Awaitable[pb.StartGuestDaemonsReply]:
            return handlers.start_guest_daemons(
                pb.StartGuestDaemonsRequest(
                    boot=boot(spec), name=spec.name, qrexec=True, qrexec_timeout_s=seconds
                ),
                call(),
            )

        sim.control.nature(prompt.uuid, agent="connect")
        sim.control.nature(late.uuid, agent="wait")
        sim.control.nature(never.uuid, agent="never")
        for spec in (absent, prompt, late, never):
            await started(running, spec)
        assert not (await daemons(absent)).agent
        assert (await daemons(prompt)).agent
        waiting = asyncio.ensure_future(ask(daemons(late)))
        await asyncio.to_thread(sim.control.calls, "agent", late.uuid, at_least=1, timeout=5)
        assert not waiting.done()
        await asyncio.to_thread(sim.control.agent, late.uuid)
        assert (await waiting).agent  # type: ignore[attr-defined]
        async with refused("AGENT_TIMEOUT"):
            await daemons(never, 1)
        assert running.listener.powers(late.uuid)[-1].agent
        service_request = pb.RunServiceRequest(
            boot=boot(late), service="qubes.WaitForSession", user="user", input=b"x"
        )
        sim.control.nature(late.uuid, agent="wait", service_exit=3, service_output="done")
        answer = await handlers.run_service(service_request, call())
        assert (answer.exit_code, answer.output) == (3, b"done")
        (kept,) = sim.control.guest(late.uuid)["services"]
        assert (kept["service"], kept["user"]) == ("qubes.WaitForSession", "user")
        async with refused("AGENT_NOT_CONNECTED"):
            await handlers.run_service(
                pb.RunServiceRequest(boot=boot(absent), service="qubes.WaitForSession"), call()
            )

    run(sim, tmp_path, body)


def test_a_guest_that_ends_while_its_agent_is_waited_for(sim: SimBench, tmp_path: Path) -> None:
    spec = sim.spec(28)

    async def body(running: Service) -> None:
        sim.control.nature(spec.uuid, agent="wait")
        await started(running, spec)
        waiting = asyncio.ensure_future(
            ask(
                running.handlers.start_guest_daemons(
                    pb.StartGuestDaemonsRequest(boot=boot(spec), qrexec=True, qrexec_timeout_s=25),
                    call(),
                )
            )
        )
        await asyncio.to_thread(sim.control.calls, "agent", spec.uuid, at_least=1, timeout=5)
        began = time.monotonic()
        await running.handlers.destroy(pb.DestroyDomainRequest(boot=boot(spec)), call())
        async with refused("DOMAIN_NOT_FOUND", "BOOT_ABANDONED"):
            await waiting
        assert time.monotonic() - began < 2.0

    run(sim, tmp_path, body)


# ---- devices


def test_devices_are_told_with_who_has_them(sim: SimBench, tmp_path: Path) -> None:
    usb, work = sim.spec(34), sim.spec(35)
    pci = {
        "devclass": "pci", "port": "00_1f.2", "device_id": "8086:9d23::p0c0330",
        "interfaces": "p0c0330", "data": {"sbdf": "0000:00:1f.2"},
    }  # fmt: skip

    async def body(running: Service) -> None:
        handlers, held = running.handlers, running.listener.held

        def device(key: str) -> DeviceFact | None:
            fact = held.get(f"device/{key}")
            assert fact is None or isinstance(fact, DeviceFact)
            return fact

        await asyncio.to_thread(sim.control.devices, ADMINVM_UUID, pci)
        await until(lambda: device(f"{ADMINVM_UUID}/pci/00_1f.2") is not None, 5, "dom0's device")
        for spec in (usb, work):
            await started(running, spec)
        await handlers.write_guest_keys(
            pb.WriteGuestKeysRequest(
                boot=boot(usb),
                keys=[
                    pb.GuestKey(path=f"/qubes-block-devices/sda/{name}", value=value)
                    for name, value in {"desc": "A stick", "size": "4096", "mode": "w"}.items()
                ],
            ),
            call(),
        )
        sda = f"{usb.uuid}/block/sda"
        await until(lambda: device(sda) is not None, 5, "the stick")
        disk = pb.DiskSpec(
            target="xvdi", path="/dev/sda", block=True, backend=usb.name, backend_uuid=usb.uuid
        )
        await handlers.attach_disk(pb.AttachDiskRequest(boot=boot(work), disk=disk), call())
        await until(lambda: getattr(device(sda), "attached_to", "") == work.uuid, 5, "attachment")
        fact = device(sda)
        assert fact is not None
        assert fact.attach_options == {
            "frontend-dev": "xvdi", "read-only": "yes", "devtype": "disk",
        }  # fmt: skip
        await handlers.detach_disk(pb.DetachDiskRequest(boot=boot(work), disk=disk), call())
        await until(lambda: getattr(device(sda), "attached_to", "?") == "", 5, "detachment")
        await handlers.attach_disk(pb.AttachDiskRequest(boot=boot(work), disk=disk), call())
        await asyncio.to_thread(sim.control.poweroff, work.uuid)
        await until(lambda: getattr(device(sda), "attached_to", "?") == "", 5, "the frontend's end")
        await asyncio.to_thread(sim.control.poweroff, usb.uuid)
        await until(lambda: device(sda) is None, 5, "the backend's end")
        assert device(f"{ADMINVM_UUID}/pci/00_1f.2") is not None
        await asyncio.to_thread(sim.control.devices, ADMINVM_UUID)
        await until(lambda: device(f"{ADMINVM_UUID}/pci/00_1f.2") is None, 5, "its removal")

    run(sim, tmp_path, body)


def test_attachments_are_found_again_after_a_restart(sim: SimBench, tmp_path: Path) -> None:
    usb, work = sim.spec(36), sim.spec(37)
    key = f"device/{usb.uuid}/block/sda"

    async def before(running: Service) -> None:
        for spec in (usb, work):
            await started(running, spec)
        await running.handlers.write_guest_keys(
            pb.WriteGuestKeysRequest(
                boot=boot(usb),
                keys=[
                    pb.GuestKey(path="/qubes-block-devices/sda/size", value="4096"),
                    pb.GuestKey(path="/qubes-block-devices/sda/mode", value="r"),
                ],
            ),
            call(),
        )
        disk = pb.DiskSpec(target="xvdi", path="/dev/sda", backend=usb.name, block=True)
        await running.handlers.attach_disk(pb.AttachDiskRequest(boot=boot(work), disk=disk), call())
        await running.reporter.flushed(5)
        found.append(running.listener.held[key])

    async def after(running: Service) -> None:
        assert running.listener.held[key] == found[0]
        assert getattr(found[0], "attached_to", "") == work.uuid

    found: list[object] = []
    run(sim, tmp_path, before)
    run(sim, tmp_path, after)


def test_a_withdrawn_disk_is_taken_from_who_had_it(sim: SimBench, tmp_path: Path) -> None:
    """What the backend puts at that place next must not reach the former holder."""
    usb, work = sim.spec(38), sim.spec(39)
    key = f"device/{usb.uuid}/block/sda"
    said = [
        pb.GuestKey(path="/qubes-block-devices/sda/size", value="4096"),
        pb.GuestKey(path="/qubes-block-devices/sda/mode", value="w"),
    ]

    def targets() -> set[str]:
        return {str(row["target"]) for row in sim.control.guest(work.uuid)["disks"]}

    async def body(running: Service) -> None:
        handlers, held = running.handlers, running.listener.held
        for spec in (usb, work):
            await started(running, spec)
        await handlers.write_guest_keys(pb.WriteGuestKeysRequest(boot=boot(usb), keys=said), call())
        disk = pb.DiskSpec(
            target="xvdi", path="/dev/sda", block=True, backend=usb.name, backend_uuid=usb.uuid
        )
        await handlers.attach_disk(pb.AttachDiskRequest(boot=boot(work), disk=disk), call())
        await until(lambda: getattr(held.get(key), "attached_to", "") == work.uuid, 5, "attachment")
        await handlers.write_guest_keys(
            pb.WriteGuestKeysRequest(boot=boot(usb), removed=["/qubes-block-devices/"]), call()
        )
        await until(lambda: key not in held, 5, "the withdrawal")
        await until(lambda: "xvdi" not in targets(), 10, "the unplugging")
        await handlers.write_guest_keys(pb.WriteGuestKeysRequest(boot=boot(usb), keys=said), call())
        await until(
            lambda: getattr(held.get(key), "attached_to", "?") == "", 5, "it is back and free"
        )
        # Described anew at once: the same device, which stays where it is.
        await handlers.attach_disk(pb.AttachDiskRequest(boot=boot(work), disk=disk), call())
        await until(lambda: getattr(held.get(key), "attached_to", "") == work.uuid, 5, "again")
        for request in (
            pb.WriteGuestKeysRequest(boot=boot(usb), removed=["/qubes-block-devices/"]),
            pb.WriteGuestKeysRequest(boot=boot(usb), keys=said),
        ):
            await handlers.write_guest_keys(request, call())
        await asyncio.gather(*handlers._background.tasks)
        assert "xvdi" in targets()

    run(sim, tmp_path, body)


def test_block_devices_of_dom0_are_in_its_own_keys(sim: SimBench, tmp_path: Path) -> None:
    key = f"device/{ADMINVM_UUID}/block/sdz"

    async def body(running: Service) -> None:
        keys = FileKeys(running.keys)
        said = [
            ("/qubes-block-devices/sdz/size", "4096"),
            ("/qubes-block-devices/sdz/mode", "w"),
        ]
        await keys.write(Boot(ADMINVM_UUID, "", "dom0"), said, [], True)
        watching = asyncio.ensure_future(running.handlers.watch_block())
        try:
            await until(lambda: key in running.listener.held, 5, "dom0's disk")
        finally:
            watching.cancel()

    run(sim, tmp_path, body)


# ---- the rest


def test_stats_inventory_and_sweep(sim: SimBench, tmp_path: Path) -> None:
    one, two = sim.spec(29), sim.spec(30)

    async def body(running: Service) -> None:
        handlers = running.handlers
        for spec in (one, two):
            await started(running, spec)
        had = (
            (await handlers.stats(pb.StatsRequest(uuids=[one.uuid]), call())).domains[0].memory_kib
        )
        await handlers.set_maxmem(pb.SetMaxmemRequest(boot=boot(one), maxmem_mib=800), call())
        stats = await handlers.stats(pb.StatsRequest(uuids=[one.uuid]), call())
        (row,) = stats.domains
        assert (row.uuid, row.memory_kib, row.memory_assigned_kib, row.online_vcpus) == (
            one.uuid,
            had,
            800 * 1024,
            2,
        )
        everything = await handlers.stats(pb.StatsRequest(), call())
        assert {row.uuid for row in everything.domains} == {ADMINVM_UUID, one.uuid, two.uuid}
        (admin,) = (await handlers.stats(pb.StatsRequest(uuids=[ADMINVM_UUID]), call())).domains
        assert (admin.uuid, admin.memory_kib) == (ADMINVM_UUID, 4096 * 1024)
        sim.control.fail("*", "admin_usage", times=1)
        rest = await handlers.stats(pb.StatsRequest(), call())
        assert {row.uuid for row in rest.domains} == {one.uuid, two.uuid}
        listed = await handlers.inventory(pb.InventoryDomainsRequest(), call())
        assert {(d.power.uuid, d.power.boot_id) for d in listed.domains} == {
            (one.uuid, "b1"),
            (two.uuid, "b1"),
        }
        sweep = await handlers.sweep(control_pb2.SweepRequest(), call())
        assert list(sweep.findings) == []
        stranger = replace(sim.spec(31), boot_id="")
        await asyncio.to_thread(_create_behind_its_back, sim, stranger)
        sweep = await handlers.sweep(control_pb2.SweepRequest(), call())
        assert [stranger.name in finding for finding in sweep.findings] == [True]
        assert len((await handlers.inventory(pb.InventoryDomainsRequest(), call())).domains) == 2

    run(sim, tmp_path, body)


def test_xml_is_shown_for_any_hypervisor(sim: SimBench, tmp_path: Path) -> None:
    spec = sim.spec(32)

    async def body(running: Service) -> None:
        for name, kind in (("", "xen"), ("xen", "xen"), ("kvm", "kvm"), ("qemu", "qemu")):
            reply = await running.handlers.render_xml(
                pb.RenderXmlRequest(spec=message(spec).spec, hypervisor=name), call()
            )
            assert f'<domain type="{kind}">' in reply.xml
        async with refused("INVALID_DOMAIN_SPEC"):
            await running.handlers.render_xml(
                pb.RenderXmlRequest(spec=message(spec).spec, hypervisor="vmware"), call()
            )

    run(sim, tmp_path, body)


def test_without_an_enforced_network_a_networked_qube_is_refused(
    sim: SimBench, tmp_path: Path
) -> None:
    spec = replace(sim.spec(33), interfaces=(InterfaceSpec("00:16:3e:5e:6c:00", "10.137.0.5"),))

    async def body(running: Service) -> None:
        async with refused("NETWORK_UNAVAILABLE"):
            await running.handlers.create_paused(message(spec), call())
        assert not sim.control.calls("create_paused", spec.uuid)

    run(sim, tmp_path, body, network=False, uri="qemu:///session")


def test_an_unreachable_hypervisor_is_said_call_by_call(tmp_path: Path) -> None:
    from services.domains.adapters.sim_adapter import SimHypervisor

    async def whole() -> None:
        path = tmp_path / "none.sock"
        async with service(lambda: SimHypervisor(path), tmp_path, wait=False) as running:
            await until(lambda: running.handlers.ready, 5, "the epoch")
            with simulation() as bench:
                spec = bench.spec(34)
            async with refused("HYPERVISOR_UNAVAILABLE"):
                await running.handlers.create_paused(message(spec), call(0.5))
            assert running.listener.complete == 0

    asyncio.run(asyncio.wait_for(whole(), 30))


def test_thirty_starts_at_once(sim: SimBench, tmp_path: Path) -> None:
    specs = [replace(sim.spec(40 + n), memory_mib=100) for n in range(30)]

    async def body(running: Service) -> None:
        sim.control.delay("*", "create_paused", 0.3)
        began = time.monotonic()
        await asyncio.gather(*(started(running, spec) for spec in specs))
        assert time.monotonic() - began < 3.0  # 9 s one after the other
        await running.reporter.flushed(5)
        assert all(running.listener.power(spec.uuid) == "running" for spec in specs)

    run(sim, tmp_path, body)


@pytest.mark.parametrize("call_of", ["create", "attach"])
def test_a_backend_that_starts_anew_while_one_is_plugged_is_plugged_to_again(
    sim: SimBench, tmp_path: Path, call_of: str
) -> None:
    """What was plugged may hang at the former boot: the next call replaces it."""
    netvm, guest = sim.spec(1), sim.spec(2)
    nic = pb.InterfaceSpec(
        mac="00:16:3e:5e:6c:00", ip="10.137.0.5", backend=netvm.name, backend_uuid=netvm.uuid
    )
    created = message(guest)
    if call_of == "create":
        created.spec.interfaces.append(nic)

    def behind() -> str:
        (found,) = sim.control.guest(guest.uuid)["interfaces"].values()
        return str(found["backend_boot"])

    async def body(running: Service) -> None:
        handlers = running.handlers
        await handlers.create_paused(message(netvm), call())
        plug = pb.AttachInterfaceRequest(boot=boot(guest), interface=nic)
        method = "create_paused" if call_of == "create" else "attach_interface"
        if call_of == "attach":
            await handlers.create_paused(created, call())
        # It has taken effect, and its answer is late: the backend starts anew meanwhile.
        fault = sim.control.hang(guest.uuid, method, when="after")
        under_way = asyncio.ensure_future(
            handlers.create_paused(created, call())
            if call_of == "create"
            else handlers.attach_interface(plug, call())
        )
        await until(lambda: _plugged(sim, guest.uuid), 20, "it has taken effect")
        await handlers.destroy(pb.DestroyDomainRequest(boot=boot(netvm)), call())
        again = replace(netvm, boot_id="b2")
        await handlers.create_paused(message(again), call())
        sim.control.clear(fault)
        await under_way
        assert behind() == "b1"
        await handlers.attach_interface(plug, call())
        assert behind() == "b2"

    run(sim, tmp_path, body)


def _plugged(sim: SimBench, uuid: str) -> bool:
    found = [d for d in sim.control.domains() if d["uuid"] == uuid]
    return bool(found) and bool(sim.control.guest(uuid)["interfaces"])
