"""What domains relies on from any hypervisor: one suite for each that there is.

Where a hypervisor cannot do a thing, it must say so: that is tested, not skipped.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from services.domains.adapters.hypervisor import (
    Event,
    Failure,
    Hypervisor,
    HypervisorError,
    News,
)
from services.domains.core.spec import DomainSpec

from .hypervisor_benches import Bench, TestDriverBench, qemu, replace, simulation, until, xen

Scenario = Callable[[Hypervisor, list[Event]], Awaitable[None]]


# In a domain 0: the folder of the guest that is started there. Nothing else is tried then.
XEN_GUEST = os.environ.get("BULKHEAD_XEN_GUEST", "")
BENCHES = [
    "simulation",
    "libvirt-test",
    pytest.param("qemu-system", marks=pytest.mark.integration),
    pytest.param("qemu-session", marks=pytest.mark.integration),
]


@pytest.fixture(scope="module", params=["xen-pv", "xen-pvh"] if XEN_GUEST else BENCHES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    if request.param == "simulation":
        with simulation() as sim:
            yield sim
    elif request.param == "libvirt-test":
        yield TestDriverBench()
    elif request.param.startswith("xen-"):
        with xen(Path(XEN_GUEST), request.param.removeprefix("xen-")) as host:
            yield host
    else:
        with qemu(64002 if request.param == "qemu-session" else 0) as real:
            yield real


def run(bench: Bench, scenario: Scenario) -> None:
    """The scenario with a connected adapter; what it leaves is ended."""

    async def body() -> None:
        events: list[Event] = []
        hypervisor = bench.connect()
        await hypervisor.open(events.append)
        try:
            await until(lambda: Event(News.CONNECTED) in events, 30, "the connection")
            await scenario(hypervisor, events)
        finally:
            for domain in await hypervisor.inventory(bench.patience):
                if domain.boot_id:
                    await hypervisor.destroy(domain.uuid, domain.boot_id, bench.patience)
            await hypervisor.close()

    asyncio.run(asyncio.wait_for(body(), 110))


async def power(hypervisor: Hypervisor, spec: DomainSpec) -> str:
    domain = await hypervisor.describe(spec.uuid, 10)
    return "none" if domain is None else domain.sighting.power


async def refused(call: Awaitable[object]) -> Failure:
    with pytest.raises(HypervisorError) as caught:
        await call
    assert caught.value.message
    return caught.value.failure


def test_the_host_is_known(bench: Bench) -> None:
    async def scenario(hypervisor: Hypervisor, _: list[Event]) -> None:
        host = await hypervisor.host(bench.patience)
        assert host.kind in ("sim", "qemu", "kvm", "test", "xen")
        assert host.memory_kib > 512 * 1024
        assert host.cpus >= 1
        assert host.free_kib is None or 0 < host.free_kib <= host.memory_kib
        usage = await hypervisor.admin_usage(bench.patience)
        assert 0 < usage.memory_kib <= usage.memory_max_kib <= host.memory_kib
        assert usage.vcpus == host.cpus
        assert usage.cpu_time_ns <= (await hypervisor.admin_usage(bench.patience)).cpu_time_ns

    run(bench, scenario)


def test_a_domain_is_created_paused_and_carries_its_boot(bench: Bench) -> None:
    spec = bench.spec(1)

    async def scenario(hypervisor: Hypervisor, events: list[Event]) -> None:
        assert await hypervisor.describe(spec.uuid, 10) is None
        made = await hypervisor.create_paused(spec, bench.patience)
        assert made.sighting.power == "paused"
        assert (made.uuid, made.boot_id, made.epoch, made.name) == (
            spec.uuid,
            spec.boot_id,
            spec.epoch,
            spec.name,
        )
        assert made.sighting.xid > 0
        assert made.sighting.start_time is not None and made.sighting.start_time > 1e9
        assert made.memory_kib >= spec.memory_mib * 1024
        assert made.vcpus == spec.vcpus
        assert await power(hypervisor, spec) == "paused"
        assert spec.uuid in {d.uuid for d in await hypervisor.inventory(10)}
        assert spec.uuid in await hypervisor.existing(10)
        await until(lambda: any(e.uuid == spec.uuid for e in events), 5, "news of the start")

    run(bench, scenario)


def test_the_same_uuid_is_refused_while_it_exists(bench: Bench) -> None:
    spec = bench.spec(2)

    async def scenario(hypervisor: Hypervisor, _: list[Event]) -> None:
        await hypervisor.create_paused(spec, bench.patience)
        again = hypervisor.create_paused(replace(spec, boot_id="b2"), bench.patience)
        assert await refused(again) is Failure.EXISTS
        domain = await hypervisor.describe(spec.uuid, 10)
        assert domain is not None and domain.boot_id == "b1"

    run(bench, scenario)


def test_resume_and_pause_may_be_repeated(bench: Bench) -> None:
    spec = bench.spec(3)

    async def scenario(hypervisor: Hypervisor, _events: list[Event]) -> None:
        await hypervisor.create_paused(spec, bench.patience)
        for _ in range(2):
            await hypervisor.resume(spec.uuid, bench.patience)
            assert await power(hypervisor, spec) == "running"
        for _ in range(2):
            await hypervisor.pause(spec.uuid, bench.patience)
            assert await power(hypervisor, spec) == "paused"
        await hypervisor.resume(spec.uuid, bench.patience)
        assert await power(hypervisor, spec) == "running"

    run(bench, scenario)


def test_destroy_asks_for_the_boot_and_ends_it_once(bench: Bench) -> None:
    spec = bench.spec(4)

    async def scenario(hypervisor: Hypervisor, events: list[Event]) -> None:
        await hypervisor.create_paused(spec, bench.patience)
        assert await hypervisor.destroy(spec.uuid, "another", bench.patience) is False
        assert await power(hypervisor, spec) == "paused"
        assert await hypervisor.destroy(spec.uuid, spec.boot_id, bench.patience) is True
        assert await hypervisor.describe(spec.uuid, 10) is None
        assert await hypervisor.destroy(spec.uuid, spec.boot_id, bench.patience) is False
        await until(
            lambda: any(e.news is News.STOPPED and e.uuid == spec.uuid for e in events),
            5,
            "STOPPED",
        )
        stop = next(e for e in events if e.news is News.STOPPED and e.uuid == spec.uuid)
        assert stop.reason == "destroyed"
        await hypervisor.create_paused(replace(spec, boot_id="b2"), bench.patience)
        domain = await hypervisor.describe(spec.uuid, 10)
        assert domain is not None and domain.boot_id == "b2"

    run(bench, scenario)


def test_destroy_of_any_boot(bench: Bench) -> None:
    spec = bench.spec(5)

    async def scenario(hypervisor: Hypervisor, _: list[Event]) -> None:
        await hypervisor.create_paused(spec, bench.patience)
        assert await hypervisor.destroy(spec.uuid, "", bench.patience) is True
        assert await hypervisor.destroy(spec.uuid, "", bench.patience) is False

    run(bench, scenario)


def test_a_guest_that_is_asked_shuts_down(bench: Bench) -> None:
    spec = bench.spec(6)

    async def scenario(hypervisor: Hypervisor, events: list[Event]) -> None:
        await hypervisor.create_paused(spec, bench.patience)
        await hypervisor.resume(spec.uuid, bench.patience)
        await asyncio.to_thread(bench.running, spec.uuid)
        await hypervisor.shutdown(spec.uuid, bench.patience)
        await until(
            lambda: any(e.news is News.STOPPED and e.uuid == spec.uuid for e in events),
            30,
            "STOPPED",
        )
        stop = next(e for e in events if e.news is News.STOPPED and e.uuid == spec.uuid)
        assert stop.reason == "shutdown"
        assert await hypervisor.describe(spec.uuid, 10) is None

    run(bench, scenario)


def test_a_guest_that_dies_is_news(bench: Bench) -> None:
    spec = bench.spec(7)

    async def scenario(hypervisor: Hypervisor, events: list[Event]) -> None:
        await hypervisor.create_paused(spec, bench.patience)
        await hypervisor.resume(spec.uuid, bench.patience)
        await asyncio.to_thread(bench.crash, spec.uuid)
        await until(
            lambda: any(e.news is News.STOPPED and e.uuid == spec.uuid for e in events),
            10,
            "STOPPED",
        )
        assert await hypervisor.describe(spec.uuid, 10) is None

    run(bench, scenario)


def test_calls_on_no_domain_say_not_found(bench: Bench) -> None:
    uuid = bench.spec(8).uuid

    async def scenario(hypervisor: Hypervisor, _: list[Event]) -> None:
        disk = bench.disk()
        for call in (
            hypervisor.resume(uuid, 10),
            hypervisor.pause(uuid, 10),
            hypervisor.shutdown(uuid, 10),
            hypervisor.wake(uuid, 10),
            hypervisor.attach_disk(uuid, disk, 10),
            hypervisor.detach_disk(uuid, disk, 10),
            hypervisor.resize_disk(uuid, "xvda", 1 << 20, 10),
            hypervisor.set_maxmem(uuid, 128, 10),
        ):
            assert await refused(call) is Failure.NOT_FOUND
        await hypervisor.undefine(uuid, 10)

    run(bench, scenario)


def test_disks_come_and_go_while_the_guest_runs(bench: Bench) -> None:
    spec, disk = bench.spec(9), bench.disk()

    async def scenario(hypervisor: Hypervisor, _events: list[Event]) -> None:
        await hypervisor.create_paused(spec, bench.patience)
        await hypervisor.resume(spec.uuid, bench.patience)
        if "hotplug" not in bench.abilities:
            call = hypervisor.attach_disk(spec.uuid, disk, bench.patience)
            assert await refused(call) is Failure.UNSUPPORTED
            return
        await asyncio.to_thread(bench.running, spec.uuid)
        for _ in range(2):  # may be repeated
            await hypervisor.attach_disk(spec.uuid, disk, bench.patience)
        other = replace(disk, path=disk.path + "x")
        assert await refused(hypervisor.attach_disk(spec.uuid, other, 10)) is Failure.EXISTS
        await hypervisor.resize_disk(spec.uuid, disk.target, 16 << 20, bench.patience)
        for _ in range(2):
            await hypervisor.detach_disk(spec.uuid, disk, bench.patience)
        failure = await refused(hypervisor.resize_disk(spec.uuid, disk.target, 16 << 20, 10))
        assert failure is Failure.INVALID

    run(bench, scenario)


def test_an_interface_that_is_not_there_is_detached_already(bench: Bench) -> None:
    spec = bench.spec(10)

    async def scenario(hypervisor: Hypervisor, _: list[Event]) -> None:
        await hypervisor.create_paused(spec, bench.patience)
        await hypervisor.detach_interface(spec.uuid, "", bench.patience)

    run(bench, scenario)


def test_suspend_to_memory_works_or_is_unsupported(bench: Bench) -> None:
    spec = bench.spec(11)

    async def scenario(hypervisor: Hypervisor, _: list[Event]) -> None:
        await hypervisor.create_paused(spec, bench.patience)
        await hypervisor.resume(spec.uuid, bench.patience)
        suspend = hypervisor.pm_suspend(spec.uuid, bench.patience)
        if "pm_suspend" not in bench.abilities:
            assert await refused(suspend) is Failure.UNSUPPORTED
            return
        await asyncio.to_thread(bench.running, spec.uuid)
        await suspend
        assert await power(hypervisor, spec) == "pmsuspended"
        await hypervisor.wake(spec.uuid, bench.patience)
        assert await power(hypervisor, spec) == "running"

    run(bench, scenario)


def test_a_domain_of_others_is_seen_without_boot_and_not_destroyed(bench: Bench) -> None:
    """The test driver starts with a domain that is not ours; the others with none."""

    async def scenario(hypervisor: Hypervisor, _: list[Event]) -> None:
        foreign = [d for d in await hypervisor.inventory(10) if not d.boot_id]
        for domain in foreign:
            assert await hypervisor.destroy(domain.uuid, "", 10) is False
        assert [d.uuid for d in await hypervisor.inventory(10) if not d.boot_id] == [
            d.uuid for d in foreign
        ]
        assert len(foreign) == isinstance(bench, TestDriverBench)

    run(bench, scenario)


def test_a_second_adapter_finds_what_the_first_made(bench: Bench) -> None:
    """As after a restart of domains: nothing is kept but in the hypervisor."""
    spec = bench.spec(12)

    async def scenario(hypervisor: Hypervisor, events: list[Event]) -> None:
        first = await hypervisor.create_paused(spec, bench.patience)
        second = bench.connect()
        heard: list[Event] = []
        await second.open(heard.append)
        try:
            await until(lambda: Event(News.CONNECTED) in heard, 30, "the connection")
            found = await second.describe(spec.uuid, bench.patience)
            assert found is not None
            assert found.sighting == first.sighting
            assert found.epoch == first.epoch
            await second.resume(spec.uuid, bench.patience)
            await until(lambda: any(e.uuid == spec.uuid for e in heard), 5, "news of the resume")
            assert await power(hypervisor, spec) == "running"
        finally:
            await second.close()

    run(bench, scenario)


def test_calls_of_different_qubes_run_side_by_side(bench: Bench) -> None:
    specs = [bench.spec(number) for number in range(20, 23)]

    async def scenario(hypervisor: Hypervisor, _: list[Event]) -> None:
        made = await asyncio.gather(
            *(hypervisor.create_paused(spec, bench.patience) for spec in specs)
        )
        assert {d.uuid for d in made} == {spec.uuid for spec in specs}
        assert len({d.sighting.xid for d in made}) == len(specs)
        await asyncio.gather(*(hypervisor.resume(spec.uuid, 30) for spec in specs))
        assert {await power(hypervisor, spec) for spec in specs} == {"running"}

    run(bench, scenario)
