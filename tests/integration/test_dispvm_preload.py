"""Preloaded disposables on real services with the simulated hypervisor."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.domains.simhv.client import SimControl
from tests.instance import Instance
from tests.integration.adminapi_world import started

pytestmark = pytest.mark.integration

RUNNING = "qubes.WaitForRunningSystem"
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    with started() as (found, _, _):
        for feature in ("qrexec", f"supported-rpc.{RUNNING}",
                        "supported-rpc.qubes.WaitForSession"):  # fmt: skip
            found.ok("admin.vm.feature.Set", "tmpl", feature, b"1")
        with SimControl.of(found.root) as sim:
            sim.nature("*", agent="connect")
        for name in ("dvm", "dvm2"):
            found.ok("admin.vm.Create.AppVM", "dom0", "tmpl", f"name={name} label=red".encode())
            found.ok("admin.vm.property.Set", name, "template_for_dispvms", b"True")
            found.ok("admin.vm.feature.Set", name, "preload-dispvm-delay", b"0")
        yield found


@pytest.fixture(autouse=True)
def empty(instance: Instance) -> Iterator[None]:
    yield
    instance.disarm()
    with SimControl.of(instance.root) as sim:
        sim.clear()
    (instance.root / "run/qubes/qmemman-avail-mem").unlink(missing_ok=True)
    instance.call("admin.vm.feature.Remove", "dom0", "preload-dispvm-max")
    instance.call("admin.property.Reset", "dom0", "default_dispvm")
    for name in ("dvm", "dvm2"):
        set_maximum(instance, name, 0)
        settled(instance, name, 0)
    for name in disposables(instance):
        if instance.call("admin.vm.Kill", name).kind == "exc":
            instance.call("admin.vm.Remove", name)
    instance.until(lambda: not disposables(instance), PATIENCE_S, "no disposable is left")


def set_maximum(instance: Instance, name: str, number: int) -> None:
    instance.ok("admin.vm.feature.Set", name, "preload-dispvm-max", str(number).encode())


def waiting(instance: Instance, name: str = "dvm") -> list[str]:
    reply = instance.call("admin.vm.feature.Get", name, "preload-dispvm")
    return reply.text.split() if reply.kind == "ok" else []


def disposables(instance: Instance) -> list[str]:
    lines = instance.ok("admin.vm.List").splitlines()
    return [line.split(" ")[0] for line in lines if "class=DispVM" in line]


def feature(instance: Instance, name: str, which: str) -> str | None:
    reply = instance.call("admin.vm.feature.Get", name, which)
    return reply.text if reply.kind == "ok" else None


def ready(instance: Instance, name: str = "dvm") -> list[str]:
    return [
        n
        for n in waiting(instance, name)
        if feature(instance, n, "preload-dispvm-in-progress") == ""
        and instance.state(n) == "Paused"
    ]


def settled(instance: Instance, name: str, number: int) -> list[str]:
    """Wait for exactly so many on the list, all of them ready."""
    instance.until(
        lambda: len(ready(instance, name)) == number == len(waiting(instance, name)),
        PATIENCE_S,
        f"{number} preloaded disposables of {name} are ready",
    )
    return waiting(instance, name)


def create(instance: Instance, name: str = "dvm") -> str:
    reply = instance.call("admin.vm.CreateDisposable", name)
    assert reply.kind == "ok", f"{reply.message}\n{instance.logs()}"
    return reply.text


def test_burst_gets_distinct_qubes_and_the_list_refills(instance: Instance) -> None:
    set_maximum(instance, "dvm", 3)
    before = settled(instance, "dvm", 3)
    assert feature(instance, before[0], "internal") == "1"
    assert "default=True type=bool True" in instance.ok(
        "admin.vm.property.Get", before[0], "is_preload"
    )
    with ThreadPoolExecutor(3) as many:
        got = list(many.map(lambda _: create(instance), range(3)))
    assert sorted(got) == sorted(before)
    for name in got:
        assert instance.state(name) == "Running"
        assert feature(instance, name, "internal") is None
        assert feature(instance, name, "preload-dispvm-in-progress") is None
        assert feature(instance, name, "preload-dispvm-completed")
        tags = instance.ok("admin.vm.tag.List", name).split()
        assert {"created-by-dom0", "disp-created-by-dom0"} <= set(tags)
    after = settled(instance, "dvm", 3)
    assert not set(after) & set(before)
    assert len(disposables(instance)) == 6


def test_request_that_races_with_maximum_zero_is_served(instance: Instance) -> None:
    set_maximum(instance, "dvm", 1)
    (only,) = settled(instance, "dvm", 1)
    with SimControl.of(instance.root) as sim, ThreadPoolExecutor(1) as aside:
        fault = sim.delay(only, "resume", 1.0)
        asked = aside.submit(create, instance)
        instance.until(lambda: only not in waiting(instance), 10.0, "it is taken")
        set_maximum(instance, "dvm", 0)
        assert asked.result(30) == only
        sim.clear(fault)
    assert instance.state(only) == "Running"
    settled(instance, "dvm", 0)
    assert disposables(instance) == [only]


def test_early_request_skips_the_pause(instance: Instance) -> None:
    with SimControl.of(instance.root) as sim:
        fault = sim.hang("*", "run_service")
        set_maximum(instance, "dvm", 1)
        instance.until(lambda: bool(waiting(instance)), PATIENCE_S, "one is listed")
        (only,) = waiting(instance)
        instance.until(lambda: instance.state(only) == "Running", PATIENCE_S, "it runs")
        set_maximum(instance, "dvm", 0)  # what is not ready goes too
        instance.until(lambda: not disposables(instance), PATIENCE_S, "it is removed")
        sim.clear(fault)
        fault = sim.hang("*", "run_service")
        set_maximum(instance, "dvm", 1)
        instance.until(lambda: bool(waiting(instance)), PATIENCE_S, "one is listed")
        (only,) = waiting(instance)
        uuid = instance.ok("admin.vm.property.Get", only, "uuid").split()[-1]
        assert create(instance) == only
        sim.clear(fault)
        assert sim.calls("pause", uuid) == []
    assert instance.state(only) == "Running"
    assert feature(instance, only, "preload-dispvm-completed")


def test_memory_for_one_only(instance: Instance) -> None:
    place = instance.root / "run/qubes"
    memory = int(instance.ok("admin.vm.property.Get", "dvm", "memory").split()[-1])
    place.mkdir(exist_ok=True)
    place.chmod(0o755)
    available = place / "qmemman-avail-mem"
    instance.ok("admin.vm.feature.Set", "dom0", "preload-dispvm-threshold", b"100")
    available.write_text(str((memory * 2 + 50) << 20))
    old = instance.kill("dispvm")  # it may read what is there when it starts
    instance.wait_restarted("dispvm", old)
    set_maximum(instance, "dvm", 3)
    settled(instance, "dvm", 1)
    available.write_text("0")
    instance.ok("admin.vm.CreateDisposable", "dvm", "preload")
    assert len(disposables(instance)) == 1
    instance.ok("admin.vm.feature.Remove", "dom0", "preload-dispvm-threshold")


def test_global_maximum_rules_the_default(instance: Instance) -> None:
    instance.ok("admin.property.Set", "dom0", "default_dispvm", b"dvm")
    set_maximum(instance, "dom0", 1)
    settled(instance, "dvm", 1)
    set_maximum(instance, "dvm", 3)
    instance.ok("admin.vm.CreateDisposable", "dvm", "preload")
    assert len(waiting(instance)) == 1
    instance.ok("admin.property.Set", "dom0", "default_dispvm", b"dvm2")
    settled(instance, "dvm2", 1)
    settled(instance, "dvm", 3)  # its own number counts now
    instance.ok("admin.vm.feature.Remove", "dom0", "preload-dispvm-max")
    settled(instance, "dvm2", 0)


def test_changed_property_replaces_what_waits(instance: Instance) -> None:
    set_maximum(instance, "dvm", 1)
    (old,) = settled(instance, "dvm", 1)
    instance.ok("admin.vm.property.Set", "dvm", "debug", b"True")
    instance.until(lambda: old not in disposables(instance), PATIENCE_S, "the old one is gone")
    instance.ok("admin.vm.CreateDisposable", "dvm", "preload")
    (new,) = settled(instance, "dvm", 1)
    assert instance.ok("admin.vm.property.Get", new, "debug").endswith(" True")
    instance.ok("admin.vm.property.Reset", "dvm", "debug")


def test_shutdown_of_the_template_replaces_what_waits(instance: Instance) -> None:
    set_maximum(instance, "dvm", 1)
    (old,) = settled(instance, "dvm", 1)
    instance.ok("admin.vm.Start", "dvm")
    instance.ok("admin.vm.Kill", "dvm")
    instance.until(lambda: old not in disposables(instance), PATIENCE_S, "the old one is gone")
    assert settled(instance, "dvm", 1) != [old]


def test_unpaused_by_hand_is_in_use(instance: Instance) -> None:
    set_maximum(instance, "dvm", 1)
    (only,) = settled(instance, "dvm", 1)
    instance.ok("admin.vm.Unpause", only)
    instance.until(lambda: only not in waiting(instance), PATIENCE_S, "it left the list")
    (other,) = settled(instance, "dvm", 1)
    assert feature(instance, only, "internal") is None
    assert create(instance) == other != only


def test_guest_that_never_gets_ready_leaves_nothing(instance: Instance) -> None:
    with SimControl.of(instance.root) as sim:
        sim.fail("*", "run_service")
        set_maximum(instance, "dvm", 2)
        reply = instance.call("admin.vm.CreateDisposable", "dvm", "preload")
        assert reply.kind == "exc"
        instance.until(lambda: not disposables(instance), PATIENCE_S, "nothing is left")
    assert waiting(instance) == []
    assert create(instance)  # a normal one


def test_permission_to_make_them_can_be_taken(instance: Instance) -> None:
    set_maximum(instance, "dvm", 1)
    settled(instance, "dvm", 1)
    instance.ok("admin.vm.property.Set", "dvm", "default_dispvm", b"dvm")
    try:
        instance.ok("admin.vm.property.Set", "dvm", "template_for_dispvms", b"False")
        instance.until(lambda: not disposables(instance), PATIENCE_S, "nothing is left")
        instance.ok("admin.vm.property.Reset", "dvm", "default_dispvm")
    finally:
        instance.ok("admin.vm.property.Set", "dvm", "template_for_dispvms", b"True")


STAGES = (
    "dispvm.make.before_create",
    "dispvm.make.after_create",
    "dispvm.make.after_start",
    "dispvm.make.after_pause",
    "dispvm.make.after_complete",
)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_while_filling(instance: Instance, stage: str) -> None:
    instance.arm(f"{stage}=kill:1")
    set_maximum(instance, "dvm", 2)
    instance.until(lambda: instance.fired() == [stage], PATIENCE_S, "it was killed")
    exact(instance, 2)


@pytest.mark.parametrize(
    "stage", ["dispvm.claim.before", "dispvm.claim.after", "dispvm.use.before", "dispvm.use.after"]
)
def test_killed_while_handing_out(instance: Instance, stage: str) -> None:
    set_maximum(instance, "dvm", 2)
    before = settled(instance, "dvm", 2)
    instance.arm(f"{stage}=kill:1")
    got = create(instance)
    assert instance.fired() == [stage]
    if stage == "dispvm.use.after":
        assert got in before  # the same request got what it had got already
    exact(instance, 2, got)
    assert create(instance) != got


@pytest.mark.parametrize("stage", ["dispvm.discard.before", "dispvm.discard.after"])
def test_killed_while_removing(instance: Instance, stage: str) -> None:
    set_maximum(instance, "dvm", 2)
    settled(instance, "dvm", 2)
    instance.arm(f"{stage}=kill:1")
    set_maximum(instance, "dvm", 1)
    instance.until(lambda: instance.fired() == [stage], PATIENCE_S, "it was killed")
    exact(instance, 1)


def exact(instance: Instance, number: int, *others: str) -> None:
    """So many are ready, and there is no disposable beside them and the others."""
    instance.until(
        lambda: (
            len(ready(instance)) == number
            and sorted(disposables(instance)) == sorted([*waiting(instance), *others])
        ),
        PATIENCE_S,
        f"exactly {number} are ready and no other disposable is left",
    )


def test_ready_ones_survive_a_restart(instance: Instance) -> None:
    set_maximum(instance, "dvm", 2)
    before = settled(instance, "dvm", 2)
    old = instance.kill("dispvm")
    instance.wait_restarted("dispvm", old)
    instance.ok("admin.vm.CreateDisposable", "dvm", "preload")
    assert waiting(instance) == before
    assert create(instance) == before[0]
