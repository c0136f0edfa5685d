"""Decisions about preloaded disposables, on views."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bulkhead.model.records import HALTED, Operation, OperationPut, OperationState, WireEvent
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import StoppedSpec
from services.dispvm.adapters.memory import AvailableMemory
from services.dispvm.core import preload
from services.dispvm.core.preload import Fate, Share
from tests.unit.model_world import World

MIB = 1 << 20


@pytest.fixture
def world() -> World:
    world = World()
    world.add("tmpl", "TemplateVM", label="black")
    for name in ("dvm", "other"):
        world.add(name, template_for_dispvms="True", memory="400")
    for number in range(4):
        world.add(
            f"disp{number}", "DispVM", template="dvm", auto_cleanup="True", dispid=str(number),
            memory="400",
        )  # fmt: skip
    return world


def waiting(world: World, *names: str, **more: str) -> None:
    world.feature("dvm", preload_dispvm=" ".join(names))
    for name in names:
        world.feature(
            name, internal="1", preload_dispvm_in_progress="", preload_dispvm_completed="1", **more
        )
        world.run(name, "paused", start_time=100.0)


def test_maximum_of_dom0_counts_for_the_default(world: World) -> None:
    view = world.view
    assert preload.maximum(view, world.get("dvm")) == 0
    world.feature("dvm", preload_dispvm_max="3")
    world.feature("other", preload_dispvm_max="2")
    world.feature("dom0", preload_dispvm_max="1")
    assert preload.maximum(view, world.get("dvm")) == 3
    world.system("default_dispvm", "dvm")
    assert preload.maximum(view, world.get("dvm")) == 1
    assert preload.maximum(view, world.get("other")) == 2
    world.feature("dom0", preload_dispvm_max="")
    assert preload.maximum(view, world.get("dvm")) == 0
    world.set("other", template_for_dispvms="False")
    assert preload.maximum(view, world.get("other")) == 0
    assert [q.name for q in preload.templates(view)] == []
    world.feature("dom0", preload_dispvm_max="1")
    assert [q.name for q in preload.templates(view)] == ["dvm"]


def test_excess_is_what_came_last(world: World) -> None:
    waiting(world, "disp2", "disp0", "disp1")
    world.feature("dvm", preload_dispvm_max="1")
    assert [q.name for q in preload.excess(world.view, world.get("dvm"))] == ["disp0", "disp1"]
    assert not preload.vacancy(world.view, world.get("dvm"))
    world.feature("dvm", preload_dispvm_max="4")
    assert preload.excess(world.view, world.get("dvm")) == ()
    assert preload.vacancy(world.view, world.get("dvm"))


@pytest.mark.parametrize(
    ("available", "threshold", "can"),
    [
        (None, "9999", 3),
        (400 * MIB, "", 1),
        (400 * MIB - 1, "", 0),
        (800 * MIB + 50 * MIB, "51", 1),
        (800 * MIB + 50 * MIB, "50", 2),
        (10000 * MIB, "0", 3),
        (100 * MIB, "200", 0),
        (0, "", 0),
    ],
)
def test_share_of_memory(world: World, available: int | None, threshold: str, can: int) -> None:
    world.feature("dvm", preload_dispvm_max="3")
    world.feature("dom0", preload_dispvm_threshold=threshold)
    assert preload.share(world.view, world.get("dvm"), available) == Share(3, can)


@pytest.mark.parametrize(
    ("own", "of_dom0", "delay"),
    [(None, None, 3.0), (None, "7", 7.0), ("", "7", 0.0), ("-1.5", None, -1.5), ("0.5", "1", 0.5)],
)
def test_delay(world: World, own: str | None, of_dom0: str | None, delay: float) -> None:
    if own is not None:
        world.feature("dvm", preload_dispvm_delay=own)
    if of_dom0 is not None:
        world.feature("dom0", preload_dispvm_delay=of_dom0)
    assert preload.delay_of(world.view, world.get("dvm")) == delay
    waiting(world, "disp0")
    assert preload.refills(world.view, world.get("dvm")) is (delay >= 0)
    world.feature("dvm", preload_dispvm="")
    assert preload.refills(world.view, world.get("dvm"))


def test_support_is_needed(world: World) -> None:
    with pytest.raises(Refusal):
        preload.check_supported(world.view, world.get("dvm"))
    world.feature("tmpl", supported_rpc__qubes__WaitForRunningSystem="1")
    with pytest.raises(Refusal):
        preload.check_supported(world.view, world.get("dvm"))
    world.feature("tmpl", supported_rpc__qubes__WaitForSession="1")
    preload.check_supported(world.view, world.get("dvm"))


def test_services_of_a_guest_with_windows(world: World) -> None:
    disposable = world.get("disp0")
    assert preload.settle_services(world.view, disposable) == (preload.RUNNING_SERVICE,)
    world.feature("tmpl", supported_feature__late_gui_daemon="1", gui="1")
    world.set("disp0", guivm="dom0")
    both = (preload.RUNNING_SERVICE, preload.SESSION_SERVICE)
    assert preload.settle_services(world.view, world.get("disp0")) == both


# stage: on the list, in-progress, completed, power ("" = halted), what a restart does
STAGES = [
    ("marked", True, "1", None, "", Fate.LEFT_OVER),
    ("starting", True, "1", None, "running", Fate.LEFT_OVER),
    ("ready", True, "", "1", "paused", Fate.READY),
    ("paused, not complete", True, "", None, "paused", Fate.LEFT_OVER),
    ("ready, the host was off", True, "", "1", "", Fate.LEFT_OVER),
    ("requested early", False, "1", None, "running", Fate.LEFT_OVER),
    ("requested ready", False, "1", "1", "paused", Fate.LEFT_OVER),
    ("used", False, None, "1", "running", Fate.ORDINARY),
    ("used without request", False, "", "1", "running", Fate.ORDINARY),
    ("unpaused by somebody", True, "", "1", "running", Fate.TAKEN),
    ("never preloaded", False, None, None, "", Fate.ORDINARY),
]


@pytest.mark.parametrize(
    ("on_list", "progress", "completed", "power", "fate"),
    [row[1:] for row in STAGES],
    ids=[row[0] for row in STAGES],
)
def test_restart(
    world: World,
    on_list: bool,
    progress: str | None,
    completed: str | None,
    power: str,
    fate: Fate,
) -> None:
    if on_list:
        world.feature("dvm", preload_dispvm="disp0")
    if progress is not None:
        world.feature("disp0", preload_dispvm_in_progress=progress)
    if completed is not None:
        world.feature("disp0", preload_dispvm_completed=completed)
    if power:
        world.run("disp0", power)
    qube = world.get("disp0")
    assert preload.fate(world.view, qube) is fate
    kept = preload.fate(world.view, qube, {qube.uuid})
    assert kept is (Fate.ORDINARY if progress else fate)


def test_power_that_is_not_known_yet_decides_nothing(world: World) -> None:
    waiting(world, "disp0")
    world.change("disp0", run=HALTED)
    assert preload.fate(world.view, world.get("disp0")) is Fate.LEFT_OVER
    world.run("disp0", "paused")
    stale = world.view.power(world.get("disp0").uuid)
    assert stale is not None
    world.fact(type(stale)(stale.uuid, "another boot", 1, "running"))
    assert preload.fate(world.view, world.get("disp0")) is Fate.ORDINARY


def test_who_has_got_which(world: World) -> None:
    key = "a" * 32
    world.feature("disp1", preload_dispvm_completed=key, preload_dispvm_in_progress=key)
    assert preload.handed_out(world.view, world.get("dvm"), key) is None
    world.change("disp1", features={"preload-dispvm-completed": key})
    assert preload.handed_out(world.view, world.get("dvm"), key) == world.get("disp1")
    assert preload.handed_out(world.view, world.get("dvm"), "b" * 32) is None


def test_outdated(world: World) -> None:
    waiting(world, "disp0")

    def reason() -> str:
        return preload.outdated(world.view, world.get("dvm"), world.get("disp0"))

    assert reason() == ""
    world.set("dvm", autostart="True", default_dispvm="other")
    assert reason() == ""  # ignored
    world.set("dvm", debug="True")
    assert reason() == "debug"
    world.set("disp0", debug="True")
    assert reason() == ""
    operation = Operation("o1", "STOPPED", StoppedSpec("", ""), (world.get("tmpl").uuid,))

    def ended(state: OperationState, when: float) -> None:
        world.put(OperationPut(replace(operation, state=state, finished=when)))

    ended(OperationState.SUCCEEDED, 99.0)
    assert reason() == ""
    ended(OperationState.FAILED, 101.0)
    assert reason() == ""
    ended(OperationState.SUCCEEDED, 101.0)
    assert reason() == "volumes_outdated"


def event(name: str, subject: str = "", **pairs: str) -> WireEvent:
    return WireEvent(subject, name, tuple(pairs.items()))


def asked(world: World, *news: WireEvent) -> list[tuple[str, float]]:
    return [(t.template, t.delay) for t in preload.triggers(world.view, news)]


def test_maximum_asks_only_where_it_counts(world: World) -> None:
    changed = "domain-feature-set:preload-dispvm-max"
    assert asked(world, event(changed, "dvm", value="2", oldvalue="1")) == [("dvm", 0.0)]
    assert asked(world, event(changed, "dvm", value="2", oldvalue="2")) == []
    assert asked(world, event(changed, "dom0", value="2")) == []
    world.system("default_dispvm", "dvm")
    world.feature("dom0", preload_dispvm_max="1")
    assert asked(world, event(changed, "dvm", value="2", oldvalue="1")) == []
    assert asked(world, event(changed, "other", value="2")) == [("other", 0.0)]
    assert asked(world, event(changed, "dom0", value="2")) == [("dvm", 0.0)]


def test_default_dispvm_moves_the_pool(world: World) -> None:
    world.system("default_dispvm", "other")
    moved = event("property-set:default_dispvm", newvalue="other", oldvalue="dvm")
    assert asked(world, moved) == []  # no global number
    world.feature("dom0", preload_dispvm_max="2")
    world.feature("dvm", preload_dispvm_max="2")
    assert asked(world, moved) == [("other", 0.0)]
    world.feature("dvm", preload_dispvm_max="3")
    assert asked(world, moved) == [("dvm", 0.0), ("other", 0.0)]


def test_shutdowns_and_properties_refresh(world: World) -> None:
    assert asked(world, event("domain-shutdown", "tmpl")) == []
    waiting(world, "disp0")
    assert asked(world, event("domain-shutdown", "tmpl")) == [("dvm", 4.0)]
    assert asked(world, event("domain-shutdown", "dvm")) == [("dvm", 4.0)]
    assert asked(world, event("domain-shutdown", "disp1")) == []
    (trigger,) = preload.triggers(world.view, [event("property-set:debug", "dvm")])
    assert (trigger.delay, trigger.refresh, trigger.anew) == (30.0, True, False)
    assert asked(world, event("property-set:autostart", "dvm")) == []
    assert asked(world, event("property-set:debug", "other")) == []
    (trigger,) = preload.triggers(
        world.view, [event("property-set:template", "dvm", newvalue="a", oldvalue="b")]
    )
    assert (trigger.delay, trigger.anew) == (0.0, True)


def test_available_memory(tmp_path: Path) -> None:
    path = tmp_path / "qmemman-avail-mem"
    read = AvailableMemory(path)
    assert read() is None
    for text, value in (("123\n", 123), ("", None), ("-1", None), ("x", None), ("0", 0)):
        path.write_text(text)
        assert read() == value
