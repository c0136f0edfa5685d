"""Plans of mutations: exact events, guards, consequences."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bulkhead.model.evaluate import evaluate
from bulkhead.model.invariants import check
from bulkhead.model.plan import PlanRefused, plan_preload
from bulkhead.model.plan.base import Draft
from bulkhead.model.plan.mutation import _PLANS
from bulkhead.model.records import (
    Assignment,
    Phase,
    QubePut,
    Run,
    SystemPut,
)
from bulkhead.model.specs import (
    COMMANDS,
    AllowDevices,
    AssignDevice,
    CreateLabel,
    CreateSpec,
    DenyDevices,
    KillSpec,
    PauseSpec,
    PreloadMarks,
    RemoveFeature,
    RemoveLabel,
    RemoveSpec,
    RemoveTag,
    ResetProperty,
    SetAssignment,
    SetFeature,
    SetNotes,
    SetPool,
    SetProperty,
    SetTag,
    SetVolume,
    StartSpec,
    StoppedSpec,
    UnassignDevice,
    UnpauseSpec,
)
from tests.unit.plan_world import World, names, pairs, refused, snapshot, world


@pytest.fixture
def w() -> World:
    return world()


def test_every_command_has_a_plan() -> None:
    assert set(_PLANS) == set(COMMANDS.values())


# ---- properties


def test_label_resets_icon_between(w: World) -> None:
    plan = w.set("work", "label", "green")
    assert names(plan.events) == [
        "work:property-pre-set:label",
        "work:property-reset:icon",
        "work:property-set:label",
    ]
    assert plan.events[0].pairs == (("name", "label"), ("newvalue", "green"), ("oldvalue", "blue"))
    assert plan.events[1].pairs == (("name", "icon"),)
    assert w.qube("work").properties["label"] == "green"


def test_same_value_again_fires(w: World) -> None:
    w.set("work", "debug", "True")
    assert names(w.set("work", "debug", "yes").events) == [
        "work:property-pre-set:debug",
        "work:property-set:debug",
    ]


def test_first_value_tells_the_default_as_old(w: World) -> None:
    event = w.set("work", "memory", "500").events[0]
    assert pairs(event) == {"name": "memory", "newvalue": "500", "oldvalue": "400"}


def test_old_value_is_left_out_where_there_was_none(w: World) -> None:
    event = w.set("", "updatevm", "vault").events[0]
    assert pairs(event) == {"name": "updatevm", "newvalue": "vault", "oldvalue": "None"}
    w.do(ResetProperty("", "default_template"))
    assert "oldvalue" not in pairs(w.set("", "default_template", "tmpl").events[0])


def test_reset_makes_four_events_even_when_default(w: World) -> None:
    plan = w.do(ResetProperty("work", "memory"))
    assert names(plan.events) == [
        "work:property-pre-reset:memory",
        "work:property-pre-del:memory",
        "work:property-reset:memory",
        "work:property-del:memory",
    ]
    assert "memory" not in w.qube("work").properties


def test_template_property_reaches_children_that_use_the_default(w: World) -> None:
    w.set("vault", "vcpus", "1")
    assert names(w.set("tmpl", "vcpus", "4").events) == [
        "tmpl:property-pre-set:vcpus",
        "dvm:property-reset:vcpus",
        "sys-net:property-reset:vcpus",
        "work:property-reset:vcpus",
        "tmpl:property-set:vcpus",
    ]
    assert names(w.set("tmpl", "vcpus", "4").events) == [
        "tmpl:property-pre-set:vcpus",
        "tmpl:property-set:vcpus",
    ]


def test_only_a_set_on_a_template_is_told_to_who_is_directly_based_on_it(w: World) -> None:
    w.create("d1", klass="DispVM", template="dvm")
    assert "d1:property-reset:vcpus" not in names(w.set("tmpl", "vcpus", "4").events)
    assert names(w.set("dvm", "vcpus", "3").events) == [
        "dvm:property-pre-set:vcpus",
        "dvm:property-set:vcpus",
    ]
    assert names(w.do(ResetProperty("tmpl", "vcpus")).events) == [
        "tmpl:property-pre-reset:vcpus",
        "tmpl:property-pre-del:vcpus",
        "tmpl:property-reset:vcpus",
        "tmpl:property-del:vcpus",
    ]


def test_a_refused_reset_was_announced(w: World) -> None:
    refusal = refused(lambda: w.do(ResetProperty("work", "template")))
    assert isinstance(refusal, PlanRefused)
    assert refusal.reason == "INVALID_VALUE"
    assert names(refusal.events) == ["work:property-pre-reset:template"]


def test_guivm_moves_its_tag_before_set(w: World) -> None:
    assert names(w.set("work", "guivm", "vault").events) == [
        "work:property-pre-set:guivm",
        "work:domain-tag-delete:guivm-dom0",
        "work:domain-tag-add:guivm-vault",
        "work:property-set:guivm",
    ]
    assert names(w.set("work", "guivm", "").events) == [
        "work:property-pre-set:guivm",
        "work:domain-tag-delete:guivm-vault",
        "work:property-set:guivm",
    ]
    assert names(w.do(ResetProperty("work", "guivm")).events) == [
        "work:property-pre-reset:guivm",
        "work:property-pre-del:guivm",
        "work:domain-tag-add:guivm-dom0",
        "work:property-reset:guivm",
        "work:property-del:guivm",
    ]


def test_relayvm_has_its_tag(w: World) -> None:
    assert names(w.set("far", "relayvm", "work").events)[1] == "far:domain-tag-add:relayvm-work"
    assert "relayvm-work" in w.qube("far").tags


def test_default_guivm_reaches_who_uses_it(w: World) -> None:
    w.set("work", "guivm", "dom0")
    events = w.set("", "default_guivm", "vault").events
    assert names(events)[0] == "property-pre-set:default_guivm"
    assert names(events)[-1] == "property-set:default_guivm"
    mine = [n for n in names(events) if n.startswith("dvm:")]
    assert mine == [
        "dvm:domain-tag-delete:guivm-dom0",
        "dvm:domain-tag-add:guivm-vault",
        "dvm:property-set:guivm",
    ]
    assert not [n for n in names(events) if n.startswith(("work:", "far:"))]


def test_provides_network_sets_servicevm(w: World) -> None:
    assert names(w.set("vault", "provides_network", "True").events) == [
        "vault:property-pre-set:provides_network",
        "vault:domain-feature-pre-set:servicevm",
        "vault:domain-feature-set:servicevm",
        "vault:property-reset:gateway",
        "vault:property-reset:gateway6",
        "vault:property-reset:icon",
        "vault:property-set:provides_network",
    ]
    assert w.qube("vault").features["servicevm"] == "1"
    assert names(w.set("vault", "provides_network", "False").events)[1:3] == [
        "vault:domain-feature-pre-delete:servicevm",
        "vault:domain-feature-delete:servicevm",
    ]


def test_provides_network_stays_while_used(w: World) -> None:
    refusal = refused(lambda: w.set("sys-net", "provides_network", "False"))
    assert (refusal.reason, refusal.metadata["user"]) == ("INVALID_VALUE", "work")
    assert not isinstance(refusal, PlanRefused)


def test_netvm_reset_sequence(w: World) -> None:
    assert names(w.do(ResetProperty("work", "netvm")).events) == [
        "work:property-pre-reset:netvm",
        "work:property-pre-set:netvm",
        "work:property-pre-del:netvm",
        "work:property-set:netvm",
        "work:property-reset:netvm",
        "work:property-del:netvm",
    ]
    assert names(w.do(ResetProperty("work", "netvm")).events) == [
        "work:property-pre-reset:netvm",
        "work:property-pre-del:netvm",
        "work:property-reset:netvm",
        "work:property-del:netvm",
    ]


def test_netvm_reset_of_a_running_qube(w: World) -> None:
    """Another netvm is told, checked and connected as by a Set; the same is not touched."""
    w.start("sys-net")
    w.start("vault")
    w.set("vault", "netvm", "sys-net")
    w.set("", "default_netvm", "sys-net")
    same = w.do(ResetProperty("vault", "netvm"))
    assert [name.partition(":")[2] for name in names(same.events)] == [
        f"property-{what}:netvm" for what in ("pre-reset", "pre-del", "reset", "del")
    ]
    w.set("vault", "netvm", "")
    assert names(w.do(ResetProperty("vault", "netvm")).events) == [
        "vault:property-pre-reset:netvm",
        "vault:property-pre-set:netvm",
        "vault:property-pre-del:netvm",
        "sys-net:net-domain-connect",
        "vault:property-set:netvm",
        "vault:property-reset:netvm",
        "vault:property-del:netvm",
    ]


def test_netvm_reset_to_one_that_is_off(w: World) -> None:
    w.set("", "default_netvm", "sys-net")
    w.set("vault", "netvm", "")
    w.start("vault")
    refusal = refused(lambda: w.do(ResetProperty("vault", "netvm")))
    assert isinstance(refusal, PlanRefused)
    assert refusal.reason == "QUBE_NOT_STARTED"
    assert names(refusal.events) == [
        "vault:property-pre-reset:netvm",
        "vault:property-pre-set:netvm",
    ]


def test_the_same_default_netvm_connects_nobody(w: World) -> None:
    w.start("sys-net")
    w.set("", "default_netvm", "sys-net")
    w.start("vault")
    got = names(w.set("", "default_netvm", "sys-net").events)
    assert "sys-net:net-domain-connect" not in got
    assert "vault:property-set:netvm" not in got
    assert "vault:property-reset:netvm" in got


def test_maxmem_of_a_running_qube_can_be_reset(w: World) -> None:
    w.set("work", "maxmem", "1000")
    w.start("sys-net")
    w.start("work")
    assert refused(lambda: w.set("work", "maxmem", "500")).reason == "QUBE_NOT_HALTED"
    assert len(w.do(ResetProperty("work", "maxmem")).events) == 4
    assert "maxmem" not in w.qube("work").properties


def test_default_netvm_cascade(w: World) -> None:
    events = w.set("", "default_netvm", "sys-net").events
    assert names(events) == [
        "property-pre-set:default_netvm",
        "alone:property-pre-set:netvm",
        "dvm:property-pre-set:netvm",
        "vault:property-pre-set:netvm",
        "alone:property-set:netvm",
        "alone:property-reset:netvm",
        "dvm:property-set:netvm",
        "dvm:property-reset:netvm",
        "vault:property-set:netvm",
        "vault:property-reset:netvm",
        "property-set:default_netvm",
    ]
    assert pairs(events[1]) == {"name": "netvm", "newvalue": "sys-net", "oldvalue": "None"}
    assert pairs(events[5]) == {"name": "netvm", "oldvalue": "None"}


def test_default_netvm_reset_is_not_told_and_takes_effect(w: World) -> None:
    w.set("", "default_netvm", "sys-net")
    w.start("sys-net")
    w.start("vault")
    plan = w.do(ResetProperty("", "default_netvm"))
    assert names(plan.events) == [
        "property-pre-reset:default_netvm",
        "property-pre-del:default_netvm",
        "property-reset:default_netvm",
        "property-del:default_netvm",
    ]
    # The netvm forgets those that do not run; the one that does is disconnected.
    assert set(plan.live) == {w.qube("sys-net").uuid, w.qube("vault").uuid}
    assert plan.beside == {w.qube("sys-net").uuid}
    assert evaluate(w.view, w.qube("vault"), "netvm") is None


def test_default_netvm_loop_is_refused(w: World) -> None:
    w.do(ResetProperty("sys-net", "netvm"))
    assert refused(lambda: w.set("", "default_netvm", "sys-net")).reason == "INVALID_PROPERTY_VALUE"


def test_running_qube_needs_a_running_netvm(w: World) -> None:
    w.start("vault")
    before = snapshot(w.view)
    refusal = refused(lambda: w.set("vault", "netvm", "sys-net"))
    assert isinstance(refusal, PlanRefused)
    assert refusal.reason == "QUBE_NOT_STARTED"
    assert names(refusal.events) == ["vault:property-pre-set:netvm"]
    assert snapshot(w.view) == before


def test_netvm_of_a_running_qube_connects_and_is_live(w: World) -> None:
    w.start("sys-net")
    w.start("vault")
    plan = w.set("vault", "netvm", "sys-net")
    assert names(plan.events) == [
        "vault:property-pre-set:netvm",
        "sys-net:net-domain-connect",
        "vault:property-set:netvm",
    ]
    assert plan.live == (w.qube("vault").uuid,)
    assert plan.beside == frozenset()


def test_netvms_know_of_clients_that_do_not_run(w: World) -> None:
    w.start("sys-net")
    netvm = w.qube("sys-net").uuid
    for plan in (
        w.set("work", "netvm", ""),
        w.set("work", "netvm", "sys-net"),
        w.do(ResetProperty("work", "netvm")),
        w.set("", "default_netvm", "sys-net"),
        w.set("", "default_netvm", ""),
    ):
        # Nobody waits for a netvm that may be busy because of a qube that is off.
        assert plan.live == (netvm,) and plan.beside == {netvm}
        # And it is told of that alone.
        assert plan.parts == {netvm: ("clients",)}
    w.set("work", "netvm", "sys-net")
    # Nothing has changed, and between qubes that are off there is nobody to tell.
    assert w.set("work", "netvm", "sys-net").live == ()
    removal = w.begin(RemoveSpec("work"))
    assert removal.live == (netvm,) and removal.parts == {netvm: ("clients",)}


def test_what_a_change_of_a_running_qube_is_about(w: World) -> None:
    w.start("sys-net")
    w.start("vault")
    vault = w.qube("vault").uuid
    keys = {vault: ("keys",)}
    assert w.feature("vault", "service.x").parts == keys
    assert w.do(RemoveFeature("vault", "service.x")).parts == keys
    assert w.set("vault", "keyboard_layout", "de++").parts == keys
    assert w.set("vault", "guivm", "").parts == keys
    assert w.set("", "default_audiovm", "").parts[vault] == ("keys",)
    # Its netvm is all that hangs on it; and so is what balances its memory.
    for plan in (w.set("vault", "netvm", "sys-net"), w.feature("vault", "service.meminfo-writer")):
        assert plan.live == (vault,) and plan.parts == {}
    # A netvm that is about two things is told of both; all of it is more than a part.
    draft = Draft(w.view)
    netvm = w.qube("sys-net")
    draft.live(netvm, "keys")
    draft.live(netvm, "clients", awaited=False)
    assert draft.plan().parts == {netvm.uuid: ("clients", "keys")}
    assert draft.plan().beside == frozenset()
    draft.live(netvm)
    draft.live(netvm, "keys")
    assert draft.plan().parts == {}


def test_a_relay_knows_its_remote_qubes_as_they_are_now(w: World) -> None:
    w.set("far", "relayvm", "work")
    w.start("work")
    relay = (w.qube("work").uuid,)
    assert w.set("far", "remote_name", "there").live == relay
    assert w.do(ResetProperty("far", "remote_name")).live == relay
    assert w.set("far", "relayvm", "").live == relay
    w.set("far", "relayvm", "work")
    assert w.begin(RemoveSpec("far")).live == relay


def test_paused_qube_gets_its_netvm_when_it_runs_again(w: World) -> None:
    w.start("sys-net")
    w.start("work")
    w.run(PauseSpec("work"))
    w.power("work", "paused")
    plan = w.set("work", "netvm", "")
    assert names(plan.events) == [
        "work:property-pre-set:netvm",
        "work:domain-feature-pre-set:deferred-netvm-original",
        "work:domain-feature-set:deferred-netvm-original",
        "work:property-set:netvm",
    ]
    assert plan.live == (w.qube("sys-net").uuid,) and plan.beside
    assert w.qube("work").features["deferred-netvm-original"] == "sys-net"
    again = w.set("work", "netvm", "sys-net")
    assert names(again.events) == [
        "work:property-pre-set:netvm",
        "sys-net:net-domain-connect",
        "work:property-set:netvm",
    ]
    assert w.qube("work").uuid not in again.live
    w.set("work", "netvm", "")
    assert w.qube("work").features["deferred-netvm-original"] == "sys-net"
    begun = w.begin(UnpauseSpec("work"))
    assert names(begun.events) == ["work:domain-pre-unpaused"]
    w.power("work", "running")
    ended = w.end(begun.operation)
    assert names(ended.events) == [
        "work:domain-unpaused",
        "work:property-pre-set:netvm",
        "work:property-set:netvm",
        "work:domain-feature-pre-delete:deferred-netvm-original",
        "work:domain-feature-delete:deferred-netvm-original",
    ]
    assert pairs(ended.events[1])["oldvalue"] == "sys-net"
    assert [o.kind for o in w.view.operations_on(w.qube("work").uuid)] == ["APPLY"]


def test_a_netvm_that_was_off_when_the_qube_went_on_gets_it_when_it_starts(w: World) -> None:
    w.start("sys-net")
    w.start("work")
    w.run(PauseSpec("work"))
    w.power("work", "paused")
    for netvm in ("", "sys-net"):
        w.set("work", "netvm", netvm)
    w.run(KillSpec("sys-net"))
    w.run(StoppedSpec(w.qube("sys-net").uuid, w.qube("sys-net").run.boot_id))
    w.run(UnpauseSpec("work"))
    w.power("work", "running")
    assert "deferred-netvm-original" in w.qube("work").features
    begun = w.begin(StartSpec("sys-net"))
    ended = w.end(begun.operation)
    assert names(ended.events) == [
        "sys-net:domain-start",
        "work:property-pre-set:netvm",
        "sys-net:net-domain-connect",
        "work:property-set:netvm",
        "work:domain-feature-pre-delete:deferred-netvm-original",
        "work:domain-feature-delete:deferred-netvm-original",
    ]
    assert "deferred-netvm-original" not in w.qube("work").features


def test_address_reaches_gateways_of_clients(w: World) -> None:
    assert names(w.set("sys-net", "ip", "10.1.2.3").events) == [
        "sys-net:property-pre-set:ip",
        "sys-net:property-reset:gateway",
        "sys-net:property-reset:visible_ip",
        "work:property-reset:visible_gateway",
        "sys-net:property-set:ip",
    ]
    assert names(w.set("work", "ip6", "fd00::1").events)[1] == "work:property-reset:visible_ip6"
    assert names(w.do(ResetProperty("work", "ip6")).events)[2] == "work:property-reset:ip6"


def test_clockvm_moves_its_feature(w: World) -> None:
    assert names(w.set("", "clockvm", "work").events) == [
        "property-pre-set:clockvm",
        "work:domain-feature-pre-set:service.clocksync",
        "work:domain-feature-set:service.clocksync",
        "property-set:clockvm",
    ]
    assert names(w.set("", "clockvm", "vault").events) == [
        "property-pre-set:clockvm",
        "vault:domain-feature-pre-set:service.clocksync",
        "vault:domain-feature-set:service.clocksync",
        "work:domain-feature-pre-delete:service.clocksync",
        "work:domain-feature-delete:service.clocksync",
        "property-set:clockvm",
    ]
    assert names(w.set("", "clockvm", "vault").events) == [
        "property-pre-set:clockvm",
        "property-set:clockvm",
    ]
    assert names(w.do(ResetProperty("", "clockvm")).events) == [
        "property-pre-reset:clockvm",
        "property-pre-del:clockvm",
        "property-reset:clockvm",
        "property-del:clockvm",
    ]
    assert "service.clocksync" in w.qube("vault").features


def test_default_dispvm_reaches_who_uses_it(w: World) -> None:
    w.set("work", "default_dispvm", "")
    got = names(w.set("", "default_dispvm", "dvm").events)
    assert got[0] == "property-pre-set:default_dispvm"
    assert "dom0:property-reset:default_dispvm" in got
    assert "work:property-reset:default_dispvm" not in got
    assert got[-1] == "property-set:default_dispvm"


def test_keyboard_layout_reaches_who_is_shown_there(w: World) -> None:
    w.set("work", "keyboard_layout", "de++")
    got = names(w.set("dom0", "keyboard_layout", "fr++").events)
    assert "vault:property-reset:keyboard_layout" in got
    assert "work:property-reset:keyboard_layout" not in got
    # Also through another qube that has it from dom0 itself; a circle ends.
    w.set("vault", "guivm", "sys-net")
    w.set("dvm", "guivm", "dvm")
    got = names(w.set("dom0", "keyboard_layout", "us++").events)
    reset = [name.partition(":")[0] for name in got if "property-reset" in name]
    assert "dvm" not in reset
    assert reset.index("vault") == reset.index("sys-net") - 1
    assert len(reset) == len(set(reset))


def test_template_change_needs_a_halted_qube_and_moves_snapshots(w: World) -> None:
    w.create("tmpl2", "TemplateVM", "black")
    w.run(CreateSpec(klass="DispVM", name="named", label="red", template="dvm"))
    plan = w.set("dvm", "template", "tmpl2")
    assert names(plan.events) == ["dvm:property-pre-set:template", "dvm:property-set:template"]
    for name in ("dvm", "named"):
        root = w.qube(name).volume("root")
        assert root is not None
        assert root.source == "vm-templates/tmpl2/root"
    private = w.qube("named").volume("private")
    assert private is not None
    assert private.source == "appvms/dvm/private"
    w.start("work")
    refusal = refused(lambda: w.set("work", "template", "tmpl2"))
    assert isinstance(refusal, PlanRefused)
    assert refusal.reason == "QUBE_NOT_HALTED"
    assert names(refusal.events) == ["work:property-pre-set:template"]
    assert refused(lambda: w.do(ResetProperty("work", "template"))).reason == "INVALID_VALUE"
    assert check(w.view) == []


def test_maxmem_waits_for_a_halted_qube(w: World) -> None:
    w.start("work")
    assert refused(lambda: w.set("work", "maxmem", "0")).reason == "QUBE_NOT_HALTED"


def test_template_for_dispvms_stays_while_used(w: World) -> None:
    w.set("work", "default_dispvm", "dvm")
    refusal = refused(lambda: w.set("dvm", "template_for_dispvms", "False"))
    assert refusal.reason == "QUBE_IN_USE"
    assert names(refusal.events) == ["dvm:property-pre-set:template_for_dispvms"]  # type: ignore[attr-defined]
    w.do(ResetProperty("work", "default_dispvm"))
    assert names(w.set("dvm", "template_for_dispvms", "False").events) == [
        "dvm:property-pre-set:template_for_dispvms",
        "dvm:property-reset:icon",
        "dvm:property-set:template_for_dispvms",
    ]


@pytest.mark.parametrize(
    ("qube", "name", "value", "reason"),
    [
        ("work", "nosuch", "1", "NO_SUCH_PROPERTY"),
        ("", "nosuch", "1", "NO_SUCH_PROPERTY"),
        ("nosuch", "memory", "1", "QUBE_NOT_FOUND"),
        ("work", "memory", "0", "INVALID_PROPERTY_VALUE"),
        ("work", "memory", "x", "INVALID_VALUE"),
        ("work", "name", "other", "PROPERTY_READ_ONLY"),
        ("work", "netvm", "vault", "INVALID_VALUE"),
        ("work", "netvm", "nosuch", "INVALID_PROPERTY_VALUE"),
        ("sys-net", "netvm", "sys-net", "INVALID_VALUE"),
        ("work", "kernel", "nosuch", "INVALID_PROPERTY_VALUE"),
        ("work", "label", "pink", "LABEL_NOT_FOUND"),
        ("", "default_pool", "nosuch", "INVALID_PROPERTY_VALUE"),
    ],
)
def test_bad_values(w: World, qube: str, name: str, value: str, reason: str) -> None:
    before = snapshot(w.view)
    assert refused(lambda: w.set(qube, name, value)).reason == reason
    assert snapshot(w.view) == before


def test_quarantined_qube_is_released_when_repaired(w: World) -> None:
    work = w.qube("work")
    w.view.apply(
        QubePut(
            replace(
                work,
                quarantine="property memory: no number",
                raw=b"<domain><properties><property name='memory'>x</property></properties>"
                b"</domain>",
            )
        )
    )
    w.set("work", "debug", "True")
    assert w.qube("work").quarantine
    w.do(ResetProperty("work", "memory"))
    assert (w.qube("work").quarantine, w.qube("work").raw) == ("", b"")


# ---- features


def test_feature_set_and_removed(w: World) -> None:
    assert w.feature("work", "gui", "1").events[0].pairs == (("feature", "gui"), ("value", "1"))
    event = w.feature("work", "gui", "").events[1]
    assert pairs(event) == {"feature": "gui", "value": "", "oldvalue": "1"}
    assert names(w.do(RemoveFeature("work", "gui")).events) == [
        "work:domain-feature-pre-delete:gui",
        "work:domain-feature-delete:gui",
    ]


def test_absent_feature_is_announced_then_refused(w: World) -> None:
    refusal = refused(lambda: w.do(RemoveFeature("work", "gui")))
    assert isinstance(refusal, PlanRefused)
    assert refusal.reason == "FEATURE_NOT_FOUND"
    assert names(refusal.events) == ["work:domain-feature-pre-delete:gui"]


def test_long_feature_is_removed(w: World) -> None:
    name = "service.app-dispvm." + "x" * 80
    w.feature("work", name)
    w.do(RemoveFeature("work", name))
    assert name not in w.qube("work").features
    refusal = refused(lambda: w.do(RemoveFeature("work", "a\n")))
    assert (refusal.reason, isinstance(refusal, PlanRefused)) == ("FEATURE_NOT_FOUND", False)


@pytest.mark.parametrize("name", ["preload-dispvm", "deferred-netvm-original"])
def test_system_features_are_protected(w: World, name: str) -> None:
    assert refused(lambda: w.feature("work", name)).reason == "FEATURE_PROTECTED"
    assert refused(lambda: w.do(RemoveFeature("work", name))).reason == "FEATURE_PROTECTED"


def test_bad_feature_is_vetoed_after_its_pre_event(w: World) -> None:
    refusal = refused(lambda: w.feature("work", "service." + "x" * 49))
    assert isinstance(refusal, PlanRefused)
    assert refusal.reason == "INVALID_VALUE"
    assert [e.name.split(":")[0] for e in refusal.events] == ["domain-feature-pre-set"]
    assert refused(lambda: w.feature("work", "a b")).reason == "INVALID_FEATURE"
    assert refused(lambda: w.feature("work", "a", "\n")).reason == "INVALID_FEATURE"


def test_meminfo_writer_becomes_maxmem(w: World) -> None:
    assert names(w.feature("work", "service.meminfo-writer", "").events) == [
        "work:domain-feature-pre-set:service.meminfo-writer",
        "work:property-pre-set:maxmem",
        "work:property-set:maxmem",
        "work:domain-feature-pre-delete:service.meminfo-writer",
        "work:domain-feature-delete:service.meminfo-writer",
        "work:domain-feature-set:service.meminfo-writer",
    ]
    assert w.qube("work").properties["maxmem"] == "0"
    assert "service.meminfo-writer" not in w.qube("work").features
    w.feature("work", "service.meminfo-writer", "1")
    assert "maxmem" not in w.qube("work").properties


def test_active_boot_mode_resets_bootmode(w: World) -> None:
    assert names(w.feature("work", "boot-mode.active", "default").events)[1] == (
        "work:property-reset:bootmode"
    )
    assert names(w.do(RemoveFeature("work", "boot-mode.active")).events)[1] == (
        "work:property-reset:bootmode"
    )


def test_exported_features_are_live(w: World) -> None:
    w.start("work")
    assert w.feature("work", "service.x").live == (w.qube("work").uuid,)
    assert w.feature("work", "plain").live == ()
    assert w.feature("vault", "service.x").live == ()


def test_preload_marks(w: World) -> None:
    w.run(CreateSpec(klass="DispVM", disposable=True, template="dvm", template_given=True))
    w.patch("dvm", features={"preload-dispvm-max": "1"})

    def mark(**more: tuple[object, ...]) -> list[str]:
        plan = plan_preload(w.view, PreloadMarks("dvm", **more), "dom0")  # type: ignore[arg-type]
        w.view.apply_all(plan.changes)
        return names(plan.events)

    assert mark(features=(("preload-dispvm", "disp100"),)) == [
        "dvm:domain-feature-pre-set:preload-dispvm",
        "disp100:property-reset:is_preload",
        "dvm:domain-feature-set:preload-dispvm",
    ]
    assert mark(features_removed=("preload-dispvm", "internal")) == [
        "dvm:domain-feature-pre-delete:preload-dispvm",
        "disp100:property-reset:is_preload",
        "dvm:domain-feature-delete:preload-dispvm",
    ]
    for value in ("work", "nosuch", "disp100 disp100", "disp100 work"):
        refusal = refused(lambda v=value: mark(features=(("preload-dispvm", v),)))
        assert refusal.reason == "INVALID_VALUE"
    assert refused(lambda: mark(features=(("gui", "1"),))).reason == "NOT_YOURS"


# ---- tags


def test_tag_events_only_on_change(w: World) -> None:
    assert names(w.do(SetTag("work", "x")).events) == ["work:domain-tag-add:x"]
    again = w.do(SetTag("work", "x"))
    assert (again.events, again.changes) == ((), ())
    assert names(w.do(RemoveTag("work", "x")).events) == ["work:domain-tag-delete:x"]
    assert refused(lambda: w.do(RemoveTag("work", "x"))).reason == "TAG_NOT_FOUND"
    assert refused(lambda: w.do(SetTag("work", "a.b"))).reason == "INVALID_TAG"


def test_created_by_hands_on_tags_and_guivm(w: World) -> None:
    w.feature("vault", "tag-created-vm-with", "one two created-by-dom0 b/d")
    w.feature("vault", "set-created-guivm", "sys-net")
    assert names(w.do(SetTag("work", "created-by-vault")).events) == [
        "work:domain-tag-add:one",
        "work:domain-tag-add:two",
        "work:property-pre-set:guivm",
        "work:domain-tag-delete:guivm-dom0",
        "work:domain-tag-add:guivm-sys-net",
        "work:property-set:guivm",
        "work:domain-tag-add:created-by-vault",
    ]


def test_a_remote_qube_gets_the_creators_tag_alone(w: World) -> None:
    w.feature("vault", "tag-created-vm-with", "one")
    for tag in ("created-by-vault", "created-by-x"):
        assert names(w.do(SetTag("far", tag)).events) == [f"far:domain-tag-add:{tag}"]


def test_created_by_is_dom0s(w: World) -> None:
    assert refused(lambda: w.do(SetTag("work", "created-by-x"))).reason == "QUBE_NOT_FOUND"
    for command in (SetTag("work", "created-by-vault"), RemoveTag("work", "created-by-dom0")):
        assert refused(lambda c=command: w.do(c, "vault")).reason == "TAG_PROTECTED"
    assert names(w.do(RemoveTag("work", "created-by-dom0")).events) == [
        "work:domain-tag-delete:created-by-dom0"
    ]


# ---- labels, notes


def test_labels(w: World) -> None:
    assert w.do(CreateLabel("pink", "0xff00ff")).events == ()
    label = w.view.label_by_name("pink")
    assert label is not None
    assert label.index == 9
    assert refused(lambda: w.do(CreateLabel("pink", "0xff00ff"))).reason == "LABEL_IN_USE"
    assert refused(lambda: w.do(CreateLabel("7", "0xff00ff"))).reason == "INVALID_LABEL"
    assert refused(lambda: w.do(CreateLabel("p", "ff00ff"))).reason == "INVALID_LABEL_COLOR"
    assert refused(lambda: w.do(RemoveLabel("red"))).reason == "LABEL_BUILTIN"
    assert refused(lambda: w.do(RemoveLabel("none"))).reason == "LABEL_NOT_FOUND"
    w.set("work", "label", "pink")
    assert refused(lambda: w.do(RemoveLabel("pink"))).reason == "LABEL_IN_USE"
    w.set("work", "label", "red")
    w.do(RemoveLabel("pink"))
    assert w.view.label_by_name("pink") is None


def test_notes(w: World) -> None:
    plan = w.do(SetNotes("work", "buy\nmilk\x00 \N{RIGHT-TO-LEFT OVERRIDE}"))
    assert plan.events == ()
    assert w.qube("work").notes.startswith("buy\nmilk_")
    assert "milk" not in str(plan.audit)
    assert refused(lambda: w.do(SetNotes("work", "x" * 256_001))).reason == "INVALID_NOTES"
    assert refused(lambda: w.do(SetNotes("far", "x"))).reason == "QUBE_ERROR"


# ---- volumes and pools


def test_revisions_to_keep(w: World) -> None:
    def keep(qube: str, number: int) -> None:
        plan = w.do(SetVolume(qube, "private", revisions_to_keep=number))
        assert plan.events == ()

    keep("work", 3)
    volume = w.qube("work").volume("private")
    assert volume is not None
    assert volume.revisions_to_keep == 3
    keep("work", -1)
    w.start("work")
    assert refused(lambda: keep("work", 1)).reason == "QUBE_NOT_HALTED"
    assert refused(lambda: keep("work", -2)).reason == "INVALID_VALUE"
    w.run(CreateSpec(klass="DispVM", name="named", label="red", template="dvm"))
    w.start("named")
    assert refused(lambda: keep("dvm", -1)).reason == "QUBE_NOT_HALTED"
    keep("dvm", 5)


def test_volume_flags(w: World) -> None:
    w.do(SetVolume("work", "private", rw=False))
    w.do(SetVolume("work", "volatile", ephemeral=True))
    volatile = w.qube("work").volume("volatile")
    assert volatile is not None
    assert volatile.ephemeral is True
    for volume in ("root", "private", "kernel"):
        command = SetVolume("work", volume, ephemeral=True)
        assert refused(lambda c=command: w.do(c)).reason == "INVALID_VALUE"
    assert refused(lambda: w.do(SetVolume("work", "kernel", rw=True))).reason == "INVALID_VALUE"
    assert refused(lambda: w.do(SetVolume("work", "nosuch", rw=True))).reason == "VOLUME_NOT_FOUND"
    assert refused(lambda: w.do(SetVolume("work", "private"))).reason == "PROTOCOL"
    w.start("work")
    assert refused(lambda: w.do(SetVolume("work", "private", rw=True))).reason == "QUBE_NOT_HALTED"
    w.do(SetVolume("work", "volatile", ephemeral=False))


def test_pool_settings(w: World) -> None:
    w.do(SetPool("varlibqubes", revisions_to_keep=4))
    w.do(SetPool("varlibqubes", ephemeral_volatile=True))
    options = w.view.pools["varlibqubes"].options
    assert (options["revisions_to_keep"], options["ephemeral_volatile"]) == ("4", "True")
    # Nothing in a pool of kernels is volatile, so either word is true of it already.
    kernels = w.view.pools["linux-kernel"]
    w.do(SetPool("linux-kernel", ephemeral_volatile=True))
    w.do(SetPool("linux-kernel", ephemeral_volatile=False))
    assert w.view.pools["linux-kernel"] == kernels
    for command, reason in (
        (SetPool("nosuch", revisions_to_keep=1), "POOL_NOT_FOUND"),
        (SetPool("linux-kernel", revisions_to_keep=1), "VOLUME_REFUSED"),
        (SetPool("varlibqubes", revisions_to_keep=-2), "INVALID_POOL"),
        (SetPool("varlibqubes"), "PROTOCOL"),
    ):
        assert refused(lambda c=command: w.do(c)).reason == reason


# ---- devices

STICK = Assignment("block", "sys-net", "sda", "*", "auto-attach", {"read-only": "yes"})


def test_assignment_life(w: World) -> None:
    events = w.do(AssignDevice("work", STICK)).events
    assert names(events) == ["work:device-pre-assign:block", "work:device-assign:block"]
    assert events[0].pairs == (("device", "sys-net:sda:*"), ("options", "{'read-only': 'yes'}"))
    assert refused(lambda: w.do(AssignDevice("work", STICK))).reason == "DEVICE_ALREADY_ASSIGNED"
    assert w.do(SetAssignment("work", STICK, "auto-attach")).changes == ()
    changed = w.do(SetAssignment("work", STICK, "required"))
    assert names(changed.events) == [
        "work:device-pre-assign:block",
        "work:device-assignment-changed:block",
    ]
    assert w.qube("work").devices[0].mode == "required"
    other = replace(STICK, port="sdb")
    assert refused(lambda: w.do(UnassignDevice("work", other))).reason == "DEVICE_NOT_ASSIGNED"
    assert refused(lambda: w.do(SetAssignment("work", other, "required"))).reason == "INVALID_VALUE"
    assert names(w.do(UnassignDevice("work", STICK)).events) == ["work:device-unassign:block"]
    assert w.qube("work").devices == ()


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (replace(STICK, mode="manual"), "INVALID_ASSIGNMENT_MODE"),
        (replace(STICK, backend="nosuch"), "QUBE_NOT_FOUND"),
        (replace(STICK, backend="far", identity="1:2"), "INVALID_DEVICE"),
        (replace(STICK, options={"identity": "y"}), "INVALID_DEVICE"),
    ],
)
def test_bad_assignment(w: World, device: Assignment, reason: str) -> None:
    assert refused(lambda: w.do(AssignDevice("work", device))).reason == reason
    assert refused(lambda: w.do(AssignDevice("far", STICK))).reason == "QUBE_ERROR"


@pytest.mark.parametrize("port", ["sda", "*"])
def test_a_remote_qube_as_backend_of_what_is_left_open(w: World, port: str) -> None:
    open_ = replace(STICK, backend="far", port=port)
    assert len(w.do(AssignDevice("work", open_)).events) == 2
    w.do(AssignDevice("work", replace(open_, port="*", identity="1:2")))
    assert len(w.qube("work").devices) == 2


def test_whether_the_frontend_was_told_makes_no_other_record(w: World) -> None:
    w.do(AssignDevice("work", replace(STICK, frontend_told=False)))
    (kept,) = w.qube("work").devices
    assert not kept.frontend_told and kept == STICK
    w.do(SetAssignment("work", STICK, "required"))
    assert not w.qube("work").devices[0].frontend_told


def test_options_are_looked_at_when_the_device_is_used(w: World) -> None:
    for number, options in enumerate(
        ({"x": "y"}, {"frontend-dev": "../x"}, {"": ""}, {"read-only": "maybe"})
    ):
        w.do(AssignDevice("work", replace(STICK, port=f"sd{number}", options=options)))
        assert w.qube("work").devices[-1].options == options


def test_dom0_holds_assignments_as_any_local_qube(w: World) -> None:
    events = w.do(AssignDevice("dom0", STICK)).events
    assert names(events) == ["dom0:device-pre-assign:block", "dom0:device-assign:block"]
    w.do(SetAssignment("dom0", STICK, "required"))
    assert w.qube("dom0").devices[0].mode == "required"
    w.do(UnassignDevice("dom0", STICK))
    assert w.qube("dom0").devices == ()


def test_denied_interfaces(w: World) -> None:
    assert names(w.do(DenyDevices("work", ("u03****", "b******"))).events) == [
        "work:property-pre-set:devices_denied",
        "work:property-set:devices_denied",
    ]
    assert w.qube("work").properties["devices_denied"] == "b******u03****"
    w.do(AllowDevices("work", ("u03****", "p******")))
    assert w.qube("work").properties["devices_denied"] == "b******"
    for nothing in (DenyDevices("work", ()), AllowDevices("work", ())):
        plan = w.do(nothing)
        assert names(plan.events)[1] == "work:property-set:devices_denied"
        assert w.qube("work").properties["devices_denied"] == "b******"
    w.do(AllowDevices("work", all=True))
    assert w.qube("work").properties["devices_denied"] == ""
    for patterns, reason in (
        (("u03",), "INVALID_VALUE"),
        (("x******",), "INVALID_PROPERTY_VALUE"),
        (("b******", "b******"), "PROTOCOL"),
    ):
        assert refused(lambda p=patterns: w.do(DenyDevices("work", p))).reason == reason


def test_audit_names_what_was_asked(w: World) -> None:
    assert w.plan(SetFeature("work", "a", "b")).audit == {
        "command": "set_feature",
        "qube": "work",
        "name": "a",
        "value": "b",
    }
    assert w.plan(SetProperty("work", "memory", "5")).audit["value"] == "5"


def test_system_property_is_one_change(w: World) -> None:
    assert w.plan(SetProperty("", "stats_interval", "7")).changes == (
        SystemPut("stats_interval", "7"),
    )


def test_starting_qube_is_live_too(w: World) -> None:
    w.patch("vault", run=Run(Phase.STARTING, "b"))
    assert w.plan(SetFeature("vault", "service.x", "1")).live == (w.qube("vault").uuid,)
