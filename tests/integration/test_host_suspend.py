"""The host sleeps and wakes, on real services with the simulated hypervisor."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from bulkhead.config import Settings
from services.domains.simhv.client import SimControl
from tests.instance import Instance, Reply
from tests.integration.adminapi_world import started

pytestmark = pytest.mark.integration

PATIENCE_S = 20.0
QUBES = ("run", "bare", "held", "off", "dvm")


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    with started() as (found, _, _):
        services = ("WaitForRunningSystem", "WaitForSession")
        for feature in ("qrexec", *(f"supported-rpc.qubes.{name}" for name in services)):
            found.ok("admin.vm.feature.Set", "tmpl", feature, b"1")
        with SimControl.of(found.root) as sim:
            sim.nature("*", agent="connect")
            sim.nature("bare", agent="absent")
        for name in QUBES:
            found.ok("admin.vm.Create.AppVM", "dom0", "tmpl", f"name={name} label=red".encode())
        found.ok("admin.vm.feature.Set", "bare", "qrexec", b"")
        found.ok("admin.vm.property.Set", "dvm", "template_for_dispvms", b"True")
        found.ok("admin.vm.Create.RemoteVM", "dom0", "", b"name=rem label=orange")
        yield found


@pytest.fixture(autouse=True)
def running(instance: Instance) -> Iterator[None]:
    for name in ("run", "bare", "held"):
        instance.ok("admin.vm.Start", name)
    instance.ok("admin.vm.Pause", "held")
    yield
    with SimControl.of(instance.root) as sim:
        sim.clear()
    assert internal(instance, "SuspendPost").kind == "ok"
    for name in ("run", "bare", "held"):
        instance.ok("admin.vm.Kill", name)


def internal(instance: Instance, call: str) -> Reply:
    return instance.call(
        f"internal.{call}", socket_path=instance.socket.with_name("qubesd.internal.sock")
    )


def states(instance: Instance) -> dict[str, str]:
    return {name: instance.state(name) for name in QUBES}


def told(instance: Instance, name: str) -> list[tuple[str, str]]:
    """Services that the guest was asked for, with their user."""
    uuid = instance.ok("admin.vm.property.Get", name, "uuid").split()[-1]
    with SimControl.of(instance.root) as sim:
        return [(s["service"], s["user"]) for s in sim.guest(uuid)["services"]]


def feature(instance: Instance, name: str, which: str) -> str | None:
    reply = instance.call("admin.vm.feature.Get", name, which)
    return reply.text if reply.kind == "ok" else None


def preloaded(instance: Instance) -> list[str]:
    """Those that are ready."""
    names = (feature(instance, "dvm", "preload-dispvm") or "").split()
    return [n for n in names if feature(instance, n, "preload-dispvm-in-progress") == ""]


def disposables(instance: Instance) -> list[str]:
    lines = instance.ok("admin.vm.List").splitlines()
    return [line.split(" ")[0] for line in lines if "class=DispVM" in line]


AWAKE = {"run": "Running", "bare": "Running", "held": "Paused", "off": "Halted", "dvm": "Halted"}
ASLEEP = {**AWAKE, "run": "Suspended", "bare": "Suspended"}


def test_all_sleep_and_wake_but_what_was_paused(instance: Instance) -> None:
    assert states(instance) == AWAKE
    assert internal(instance, "SuspendPre").kind == "ok"
    assert states(instance) == ASLEEP
    assert told(instance, "run") == [("qubes.SuspendPreAll", "root"), ("qubes.SuspendPre", "root")]
    assert told(instance, "bare") == []
    assert internal(instance, "SuspendPost").kind == "ok"
    assert states(instance) == AWAKE
    assert told(instance, "run")[2:] == [
        ("qubes.SuspendPost", "root"),
        ("qubes.SuspendPostAll", "root"),
    ]
    assert told(instance, "bare") == told(instance, "held") == []


def test_a_way_down_that_is_begun_again_forgets_nothing(instance: Instance) -> None:
    with SimControl.of(instance.root) as sim:
        sim.fail("bare", "pm_suspend")
        reply = internal(instance, "SuspendPre")
        assert reply.exception == "QubesException" and "bare" in reply.message
        assert states(instance) == {**ASLEEP, "bare": "Running"}
        sim.clear()
    old = instance.kill("adminapi")
    instance.wait_restarted("adminapi", old)
    assert internal(instance, "SuspendPre").kind == "ok"
    assert states(instance) == ASLEEP
    assert internal(instance, "SuspendPost").kind == "ok"
    assert states(instance) == AWAKE
    # What is paused now is remembered the next time, and not what was asleep then.
    instance.ok("admin.vm.Unpause", "held")
    instance.ok("admin.vm.Pause", "run")
    assert internal(instance, "SuspendPre").kind == "ok"
    kept = Settings.load(instance.root).service_dir("adminapi") / "previously-paused.list"
    assert kept.read_text() == "run\n"
    assert internal(instance, "SuspendPost").kind == "ok"
    assert states(instance) == {**AWAKE, "run": "Paused", "held": "Running"}
    assert not kept.exists()


def test_a_guest_that_fails_its_service_sleeps_all_the_same(instance: Instance) -> None:
    with SimControl.of(instance.root) as sim:
        sim.fail("run", "run_service")
    assert internal(instance, "SuspendPre").kind == "ok"
    assert states(instance) == ASLEEP
    assert internal(instance, "SuspendPost").kind == "ok"
    assert states(instance) == AWAKE


def test_what_does_not_wake_is_named_and_woken_by_the_next_call(instance: Instance) -> None:
    assert internal(instance, "SuspendPre").kind == "ok"
    with SimControl.of(instance.root) as sim:
        sim.fail("run", "wake")
        reply = internal(instance, "SuspendPost")
        assert reply.exception == "QubesException" and "run" in reply.message
        assert states(instance) == {**AWAKE, "run": "Suspended"}
        sim.clear()
    assert internal(instance, "SuspendPost").kind == "ok"
    assert states(instance) == AWAKE


def test_preloaded_disposables_go_and_come_back(instance: Instance) -> None:
    instance.ok("admin.vm.feature.Set", "dvm", "preload-dispvm-max", b"2")
    try:
        instance.until(lambda: len(preloaded(instance)) == 2, PATIENCE_S, "two wait")
        before = preloaded(instance)
        assert internal(instance, "SuspendPre").kind == "ok"
        assert disposables(instance) == []
        # Nothing is begun meanwhile, also not where somebody asks for it.
        instance.ok("admin.vm.CreateDisposable", "dvm", "preload")
        assert disposables(instance) == []
        assert internal(instance, "SuspendPost").kind == "ok"
        instance.until(lambda: len(preloaded(instance)) == 2, PATIENCE_S, "two wait again")
        assert not set(before) & set(preloaded(instance))
        # One that is being made goes as well.
        with SimControl.of(instance.root) as sim:
            sim.hang("*", "run_service")
            instance.ok("admin.vm.feature.Set", "dvm", "preload-dispvm-max", b"3")
            instance.until(lambda: len(disposables(instance)) == 3, PATIENCE_S, "one is made")
            with ThreadPoolExecutor(1) as aside:
                sleeping = aside.submit(internal, instance, "SuspendPre")
                instance.until(lambda: not disposables(instance), PATIENCE_S, "all are gone")
                sim.clear()
                assert sleeping.result().kind == "ok"
        assert disposables(instance) == []
    finally:
        with SimControl.of(instance.root) as sim:
            sim.clear()
        instance.ok("admin.vm.feature.Set", "dvm", "preload-dispvm-max", b"0")
        internal(instance, "SuspendPost")
        instance.until(lambda: not disposables(instance), PATIENCE_S, "no disposable is left")


def test_without_the_service_of_disposables_the_host_sleeps(instance: Instance) -> None:
    instance.freeze("dispvm")
    try:
        assert internal(instance, "SuspendPre").kind == "ok"
        assert states(instance) == ASLEEP
    finally:
        old = instance.kill("dispvm")
        instance.wait_restarted("dispvm", old)
    assert internal(instance, "SuspendPost").kind == "ok"
    assert states(instance) == AWAKE
