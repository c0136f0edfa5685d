"""The domains service with real guests: QEMU behind a private libvirtd, killed and restarted."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from bulkhead.api import domains_pb2 as pb
from bulkhead.bus.errors import BusError
from bulkhead.model.records import PowerFact
from services.domains.adapters.libvirt_adapter import LibvirtHypervisor
from services.domains.core.spec import DomainSpec
from tests.contract.hypervisor_benches import QemuBench, qemu, replace, until
from tests.contract.hypervisor_service import Service, boot, call, message, service

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def bench() -> Iterator[QemuBench]:
    with qemu() as real:
        yield real


def run(bench: QemuBench, tmp_path: Path, body: Callable[[Service], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with service(bench.connect, tmp_path, uri=bench.uri) as running:
            await body(running)

    asyncio.run(asyncio.wait_for(whole(), 110))


async def started(running: Service, spec: DomainSpec, bench: QemuBench) -> None:
    await running.handlers.create_paused(message(spec), call())
    await running.handlers.resume(pb.ResumeDomainRequest(boot=boot(spec), spawn=True), call())
    await asyncio.to_thread(bench.running, spec.uuid)


async def destroyed(running: Service, spec: DomainSpec) -> None:
    await running.handlers.destroy(pb.DestroyDomainRequest(boot=boot(spec)), call())


def test_a_real_guest_lives_a_whole_life(bench: QemuBench, tmp_path: Path) -> None:
    spec, disk = bench.spec(1), bench.disk()
    more = pb.DiskSpec(target=disk.target, path=disk.path, rw=True, serial=disk.serial)

    async def body(running: Service) -> None:
        handlers = running.handlers
        host = running.listener.host()
        assert host is not None and host.hypervisor in ("qemu", "kvm")
        await started(running, spec, bench)
        paused = await handlers.pause(pb.PauseDomainRequest(boot=boot(spec)), call())
        assert paused.state.power.power == "paused"
        assert paused.state.console == spec.console_log
        await handlers.resume(pb.ResumeDomainRequest(boot=boot(spec)), call())
        # The guest itself says which disks it sees, and how large.
        for _ in range(2):
            await handlers.attach_disk(pb.AttachDiskRequest(boot=boot(spec), disk=more), call())
        await until(lambda: f"disk vd{'a'} {16384};" in bench.console(spec.uuid), 10, "the disk")
        await handlers.resize_disk(
            pb.ResizeDiskRequest(boot=boot(spec), target=disk.target, size=16 << 20), call()
        )
        await until(lambda: f"disk vda {32768};" in bench.console(spec.uuid), 10, "its new size")
        await handlers.detach_disk(pb.DetachDiskRequest(boot=boot(spec), disk=more), call())
        slept = await handlers.suspend(pb.SuspendDomainRequest(boot=boot(spec)), call())
        assert slept.paused_instead  # no guest agent inside
        await handlers.resume(pb.ResumeDomainRequest(boot=boot(spec)), call())
        found = await handlers.describe(pb.DescribeDomainRequest(boot=boot(spec)), call())
        assert found.memory_kib == spec.memory_mib * 1024
        assert found.cpu_time_ns > 0
        await handlers.shutdown(pb.ShutdownDomainRequest(boot=boot(spec)), call())
        await running.said(spec.uuid, "halted", 20)
        facts = running.listener.powers(spec.uuid)
        assert facts[-1].stop_reason == "shutdown"
        numbers = [fact.number for fact in facts]
        assert numbers == sorted(set(numbers))

    run(bench, tmp_path, body)


def test_a_guest_process_that_is_killed_is_told(bench: QemuBench, tmp_path: Path) -> None:
    spec = bench.spec(2)

    async def body(running: Service) -> None:
        await running.handlers.create_paused(message(spec), call())
        await running.handlers.resume(pb.ResumeDomainRequest(boot=boot(spec)), call())
        began = time.monotonic()
        os.kill(bench.qemu_pid(spec.uuid), signal.SIGKILL)
        await running.said(spec.uuid, "halted", 10)
        print(f"kill -9 of QEMU told after {time.monotonic() - began:.2f} s")
        last = running.listener.powers(spec.uuid)[-1]
        assert (last.boot_id, last.stop_reason) == (spec.boot_id, "failed")
        await running.handlers.create_paused(message(replace(spec, boot_id="b2")), call())
        await destroyed(running, replace(spec, boot_id="b2"))

    run(bench, tmp_path, body)


def test_libvirtd_dies_and_every_boot_is_adopted(bench: QemuBench, tmp_path: Path) -> None:
    stays, dies = bench.spec(3), bench.spec(4)

    async def body(running: Service) -> None:
        handlers = running.handlers
        for spec in (stays, dies):
            await handlers.create_paused(message(spec), call())
            await handlers.resume(pb.ResumeDomainRequest(boot=boot(spec)), call())
        before = running.listener.powers(stays.uuid)[-1]
        pid = bench.qemu_pid(stays.uuid)
        await asyncio.to_thread(bench.kill_daemon)
        with pytest.raises(BusError) as caught:
            await handlers.pause(pb.PauseDomainRequest(boot=boot(stays)), call(2))
        assert caught.value.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
        # One guest ends while nobody watches.
        os.kill(bench.qemu_pid(dies.uuid), signal.SIGKILL)
        began = time.monotonic()
        await asyncio.to_thread(bench.start_daemon)
        await running.said(dies.uuid, "halted", 20)
        print(f"adopted {time.monotonic() - began:.2f} s after the start of libvirtd")
        found = await handlers.describe(pb.DescribeDomainRequest(boot=boot(stays)), call())
        assert found.found and found.state.power.boot_id == stays.boot_id
        assert found.state.power.start_time == before.start_time
        assert bench.qemu_pid(stays.uuid) == pid
        # Events arrive again, on the new connection.
        await handlers.pause(pb.PauseDomainRequest(boot=boot(stays)), call())
        os.kill(pid, signal.SIGKILL)
        await running.said(stays.uuid, "halted", 10)

    run(bench, tmp_path, body)


def test_domains_restarts_and_finds_its_guests(bench: QemuBench, tmp_path: Path) -> None:
    spec = bench.spec(5)
    first: list[PowerFact] = []

    async def before(running: Service) -> None:
        await running.handlers.create_paused(message(spec), call())
        await running.reporter.flushed(5)
        first.extend(running.listener.powers(spec.uuid))

    async def after(running: Service) -> None:
        (fact,) = running.listener.powers(spec.uuid)
        assert fact.number > first[-1].number
        assert replace(fact, number=0) == replace(first[-1], number=0)
        await destroyed(running, spec)

    run(bench, tmp_path, before)
    run(bench, tmp_path, after)


def test_a_guest_whose_monitor_hangs_holds_up_nobody(bench: QemuBench, tmp_path: Path) -> None:
    """A stopped QEMU answers nothing: calls on it end in time, and it can be killed."""
    stuck, free = bench.spec(6), bench.spec(7)

    async def body(running: Service) -> None:
        handlers = running.handlers
        for spec in (stuck, free):
            await handlers.create_paused(message(spec), call())
        os.kill(bench.qemu_pid(stuck.uuid), signal.SIGSTOP)
        with pytest.raises(BusError) as caught:
            await handlers.resume(pb.ResumeDomainRequest(boot=boot(stuck)), call(1.5))
        assert caught.value.reason == "HYPERVISOR_TIMEOUT"
        # Its connection was cut, so the thread came back although QEMU still hangs.
        hypervisor = handlers._hypervisor
        assert isinstance(hypervisor, LibvirtHypervisor)
        await until(lambda: hypervisor.lost == 0, 2, "the thread that was given up")
        began = time.monotonic()
        await handlers.resume(pb.ResumeDomainRequest(boot=boot(free)), call())
        await handlers.pause(pb.PauseDomainRequest(boot=boot(free)), call())
        assert time.monotonic() - began < 2.0
        began = time.monotonic()
        await destroyed(running, free)
        print(f"destroy of a healthy guest {time.monotonic() - began:.2f} s")
        began = time.monotonic()
        await destroyed(running, stuck)
        print(f"destroy of a hanging guest {time.monotonic() - began:.2f} s")
        await running.said(stuck.uuid, "halted", 5)
        with pytest.raises(LookupError):
            bench.qemu_pid(stuck.uuid)

    run(bench, tmp_path, body)


@pytest.mark.parametrize(
    "change", [{"virt_mode": "hvm", "kernel": "", "initramfs": "", "cmdline": ""}]
)
def test_firmware_starts_without_a_kernel(
    bench: QemuBench, tmp_path: Path, change: dict[str, str]
) -> None:
    spec = replace(bench.spec(8), **change)  # type: ignore[arg-type]

    async def body(running: Service) -> None:
        await running.handlers.create_paused(message(spec), call())
        ran = await running.handlers.resume(pb.ResumeDomainRequest(boot=boot(spec)), call())
        assert ran.state.power.power == "running"
        await destroyed(running, spec)

    run(bench, tmp_path, body)


def test_a_spec_that_qemu_refuses_leaves_nothing(bench: QemuBench, tmp_path: Path) -> None:
    spec = replace(bench.spec(9), kernel="/nonexistent/vmlinuz")

    async def body(running: Service) -> None:
        with pytest.raises(BusError) as caught:
            await running.handlers.create_paused(message(spec), call())
        assert caught.value.reason == "HYPERVISOR_REFUSED"
        assert "vmlinuz" in caught.value.message
        assert running.listener.power(spec.uuid) in ("", "halted")
        listed = await running.handlers.inventory(pb.InventoryDomainsRequest(), call())
        assert spec.uuid not in {state.power.uuid for state in listed.domains}

    run(bench, tmp_path, body)
