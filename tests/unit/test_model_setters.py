"""Every setter: what it accepts, how it stores it, and with which reason it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.model.evaluate import evaluate, to_wire
from bulkhead.model.properties import ALL_ROWS, CLASSES, find_row, rows_for
from bulkhead.model.records import (
    Assignment,
    FactPut,
    FactRemoved,
    KernelFact,
    Label,
    LabelPut,
    Phase,
    PoolFact,
    Qube,
    QubePut,
    RecordState,
    Run,
    fact_key,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.setters import check_reset, parse_property, parse_stored
from tests.unit.model_world import KERNEL, World, networked_world


def world_of_everything() -> World:
    """networked_world plus a standalone, a disposable, a remote qube and a custom label."""
    world = networked_world()
    world.add("alone", "StandaloneVM")
    world.add("disp5", "DispVM", template="dvm", dispid="5")
    world.add("far", "RemoteVM")
    world.put(LabelPut(Label(9, "pink", "0xff00ff")))
    return world


HOLDERS = {
    "AdminVM": "dom0",
    "AppVM": "work",
    "DispVM": "disp5",
    "RemoteVM": "far",
    "StandaloneVM": "alone",
    "TemplateVM": "tmpl",
}


def parse(world: World, holder: str, name: str, value: str) -> str:
    qube = world.get(holder) if holder else None
    row = find_row(qube.klass if qube is not None else None, name)
    return parse_property(world.view, qube, row, value)


def refusal(world: World, holder: str, name: str, value: str) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse(world, holder, name, value)
    assert caught.value.message.isascii()
    return caught.value


def reset_refusal(world: World, holder: str, name: str) -> Refusal:
    qube = world.get(holder) if holder else None
    row = find_row(qube.klass if qube is not None else None, name)
    with pytest.raises(Refusal) as caught:
        check_reset(world.view, qube, row)
    return caught.value


# ---- accepted

# property -> (value on the wire, stored text); the holder is `work` or another that has it
ACCEPTED: dict[str, list[tuple[str, str]]] = {
    "label": [
        ("blue", "blue"), ("3", "yellow"), ("label-4", "green"), ("9", "pink"), (" +03 ", "yellow"),
    ],
    "virt_mode": [("HVM", "hvm"), ("pv", "pv"), ("PvH", "pvh")],
    "memory": [("400", "400"), (" +4_00 ", "400"), ("9" * 25, "9" * 25)],
    "maxmem": [("0", "0"), ("4000", "4000")],
    "stubdom_mem": [("1", "1")],
    "vcpus": [("2", "2")],
    "kernel": [(KERNEL, KERNEL), ("", "")],
    "kernelopts": [("", ""), ("a\tb", "a\tb"), ("x" * 512, "x" * 512)],
    "bootmode": [("anything", "anything"), ("", "")],
    "appvm_default_bootmode": [("sys", "sys")],
    "debug": [("yes", "True"), ("OFF", "False"), ("0", "False"), ("1", "True")],
    "default_user": [("", ""), ("a-Z_0+,.", "a-Z_0+,.")],
    "qrexec_timeout": [("1", "1")],
    "shutdown_timeout": [("1", "1")],
    "autostart": [("True", "True")],
    "installed_by_rpm": [("True", "True")],
    "include_in_backups": [("False", "False")],
    "backup_timestamp": [("-5", "-5"), ("1700000000", "1700000000")],
    "default_dispvm": [("dvm", "dvm"), ("", "")],
    "management_dispvm": [("dvm", "dvm"), ("", "")],
    "guivm": [("dom0", "dom0"), ("", ""), ("work", "work")],
    "audiovm": [("dom0", "dom0"), ("", "")],
    "netvm": [("sys-net", "sys-net"), ("", "")],
    "relayvm": [("work", "work"), ("", "")],
    "template": [("tmpl", "tmpl")],
    "template_for_dispvms": [("True", "True"), ("False", "False")],
    "auto_cleanup": [("on", "True")],
    "provides_network": [("True", "True"), ("False", "False")],
    "mac": [("00:16:3E:AA:bb:0F", "00:16:3e:aa:bb:0f")],
    "ip": [("10.1.2.3", "10.1.2.3")],
    "ip6": [("FD09:0:0::1", "fd09::1")],
    "devices_denied": [("", ""), ("u080650b******u080650", "b******u080650")],
    "keyboard_layout": [("us++", "us++"), ("de+no-dead+grp:a,b", "de+no-dead+grp:a,b")],
    "transport_rpc": [("qubesair.Ssh+x", "qubesair.Ssh+x"), ("", "")],
    "remote_name": [("box", "box")],
    # system
    "default_guivm": [("dom0", "dom0"), ("", "")],
    "default_audiovm": [("work", "work")],
    "default_netvm": [("sys-net", "sys-net"), ("", ""), ("dom0", "dom0"), ("tmpl", "tmpl")],
    "default_template": [("tmpl", "tmpl"), ("", "")],
    "updatevm": [("work", "work")],
    "clockvm": [("sys-net", "sys-net"), ("", "")],
    "default_kernel": [(KERNEL, KERNEL)],
    "default_pool": [("varlibqubes", "varlibqubes")],
    "default_pool_kernel": [("linux-kernel", "linux-kernel")],
    "default_pool_private": [("varlibqubes", "varlibqubes")],
    "default_pool_root": [("varlibqubes", "varlibqubes")],
    "default_pool_volatile": [("varlibqubes", "varlibqubes")],
    "default_qrexec_timeout": [("60", "60"), ("-1", "-1")],
    "default_shutdown_timeout": [("60", "60"), ("0", "0")],
    "stats_interval": [("1", "1"), ("0", "0"), ("9" * 25, "9" * 25)],
    "check_updates_vm": [("no", "False")],
}  # fmt: skip


@pytest.mark.parametrize("klass", [*CLASSES, None])
def test_accepted_values(klass: str | None) -> None:
    for row in rows_for(klass):
        if not row.settable or row.write_once:
            continue
        world = world_of_everything()
        holder = HOLDERS[klass] if klass is not None else ""
        cases = ACCEPTED[row.name]
        if row.name == "template" and klass == "DispVM":
            cases = [("dvm", "dvm")]
        for value, text in cases:
            assert parse(world, holder, row.name, value) == text, (klass, row.name, value)
            qube = world.get(holder) if holder else None
            # What was stored loads unchanged, and is what readers get.
            assert parse_stored(world.view, qube, row, text) == text
            if qube is None:
                world.system(row.name, text)
            else:
                qube = world.set(holder, **{row.name: text})
            assert to_wire(row, evaluate(world.view, qube, row.name)) == text


def test_every_settable_row_has_an_accepted_value() -> None:
    wanted = {row.name for row in ALL_ROWS if row.settable and not row.write_once}
    assert wanted == set(ACCEPTED)


# ---- refused: holder, property, value, reason

REFUSED: list[tuple[str, str, str, str]] = [
    ("work", "label", "nocolor", "LABEL_NOT_FOUND"),
    ("work", "label", "", "LABEL_NOT_FOUND"),
    ("work", "label", "99", "LABEL_NOT_FOUND"),
    ("work", "label", "label-x", "LABEL_NOT_FOUND"),
    ("work", "virt_mode", "kvm", "INVALID_PROPERTY_VALUE"),
    ("work", "virt_mode", "", "INVALID_PROPERTY_VALUE"),
    ("work", "virt_mode", "a\x0b", "INVALID_PROPERTY_VALUE"),
    ("work", "memory", "0", "INVALID_PROPERTY_VALUE"),
    ("work", "memory", "-1", "INVALID_PROPERTY_VALUE"),
    ("work", "memory", "", "INVALID_VALUE"),
    ("work", "memory", "4.5", "INVALID_VALUE"),
    ("work", "memory", "1" * 5000, "INVALID_VALUE"),
    ("work", "maxmem", "-1", "INVALID_PROPERTY_VALUE"),
    ("work", "stubdom_mem", "0", "INVALID_PROPERTY_VALUE"),
    ("work", "vcpus", "0", "INVALID_PROPERTY_VALUE"),
    ("work", "qrexec_timeout", "0", "INVALID_PROPERTY_VALUE"),
    ("work", "shutdown_timeout", "-3", "INVALID_PROPERTY_VALUE"),
    ("work", "backup_timestamp", "", "INVALID_VALUE"),
    ("work", "kernel", "../x", "INVALID_PROPERTY_VALUE"),
    ("work", "kernel", "..", "INVALID_PROPERTY_VALUE"),
    ("work", "kernel", "9.9", "INVALID_PROPERTY_VALUE"),
    ("work", "kernel", "broken", "INVALID_PROPERTY_VALUE"),
    ("", "default_kernel", "9.9", "INVALID_PROPERTY_VALUE"),
    ("work", "kernelopts", "x" * 513, "INVALID_PROPERTY_VALUE"),
    ("work", "kernelopts", "caf\u00e9", "INVALID_VALUE"),
    ("work", "kernelopts", "a\x00", "INVALID_VALUE"),
    ("work", "kernelopts", "a\x0b", "INVALID_VALUE"),
    ("work", "bootmode", "\x7f", "INVALID_VALUE"),
    ("work", "debug", "", "INVALID_VALUE"),
    ("work", "debug", "2", "INVALID_VALUE"),
    ("work", "default_user", "a b", "INVALID_PROPERTY_VALUE"),
    ("work", "default_user", "a\n", "INVALID_PROPERTY_VALUE"),
    ("work", "mac", "00:16:3e:5e:6c", "INVALID_PROPERTY_VALUE"),
    ("work", "mac", "00:16:3e:5e:6c:0g", "INVALID_PROPERTY_VALUE"),
    ("work", "mac", "00:16:3e:5e:6c:00\n", "INVALID_PROPERTY_VALUE"),
    ("work", "ip", "10.0.0", "INVALID_VALUE"),
    ("work", "ip", "", "INVALID_VALUE"),
    ("work", "ip6", "10.0.0.1", "INVALID_VALUE"),
    ("work", "ip6", "fe80::1%eth0", "INVALID_VALUE"),
    ("work", "keyboard_layout", "us", "INVALID_PROPERTY_VALUE"),
    ("work", "keyboard_layout", "us+++", "INVALID_PROPERTY_VALUE"),
    ("work", "keyboard_layout", "u1++", "INVALID_PROPERTY_VALUE"),
    ("work", "devices_denied", "u0806", "INVALID_VALUE"),
    ("work", "devices_denied", "x080650", "INVALID_PROPERTY_VALUE"),
    ("work", "netvm", "work", "INVALID_VALUE"),
    ("work", "netvm", "dvm", "INVALID_VALUE"),
    ("work", "netvm", "dom0", "INVALID_VALUE"),
    ("work", "netvm", "nosuch", "INVALID_PROPERTY_VALUE"),
    ("work", "netvm", "far", "INVALID_PROPERTY_VALUE"),
    ("work", "netvm", "-bad", "INVALID_NAME"),
    ("work", "netvm", "none", "INVALID_NAME"),
    ("work", "default_dispvm", "work", "INVALID_PROPERTY_VALUE"),
    ("work", "management_dispvm", "tmpl", "INVALID_PROPERTY_VALUE"),
    ("work", "guivm", "nosuch", "INVALID_PROPERTY_VALUE"),
    ("work", "guivm", "far", "INVALID_PROPERTY_VALUE"),
    ("work", "audiovm", "far", "INVALID_PROPERTY_VALUE"),
    ("work", "template", "", "INVALID_PROPERTY_VALUE"),
    ("work", "template", "dvm", "INVALID_PROPERTY_VALUE"),
    ("work", "template", "nosuch", "INVALID_PROPERTY_VALUE"),
    ("disp5", "template", "work", "INVALID_PROPERTY_VALUE"),
    ("disp5", "template", "tmpl", "INVALID_PROPERTY_VALUE"),
    ("disp5", "template", "", "INVALID_PROPERTY_VALUE"),
    ("far", "relayvm", "far", "INVALID_PROPERTY_VALUE"),
    ("sys-net", "provides_network", "False", "INVALID_VALUE"),
    ("dvm", "template_for_dispvms", "no", "QUBE_IN_USE"),
    ("", "default_template", "work", "INVALID_PROPERTY_VALUE"),
    ("", "default_dispvm", "work", "INVALID_PROPERTY_VALUE"),
    # It would be its own netvm.
    ("", "default_netvm", "dvm", "INVALID_PROPERTY_VALUE"),
    ("", "default_netvm", "far", "INVALID_PROPERTY_VALUE"),
    ("", "clockvm", "far", "INVALID_PROPERTY_VALUE"),
    ("", "default_pool", "nosuch", "INVALID_PROPERTY_VALUE"),
    ("", "default_pool", "", "INVALID_PROPERTY_VALUE"),
    ("", "default_shutdown_timeout", "x", "INVALID_VALUE"),
    ("", "check_updates_vm", "maybe", "INVALID_VALUE"),
]


@pytest.mark.parametrize(("holder", "name", "value", "reason"), REFUSED)
def test_refused_values(holder: str, name: str, value: str, reason: str) -> None:
    world = world_of_everything()
    world.fact(KernelFact("broken", has_vmlinuz=False))
    found = refusal(world, holder, name, value)
    assert found.reason == reason
    if reason in ("INVALID_PROPERTY_VALUE", "INVALID_VALUE"):
        assert found.metadata["property"] == name


@pytest.mark.parametrize("klass", [*CLASSES, None])
def test_computed_and_write_once_refuse_any_good_value(klass: str | None) -> None:
    good = {"int": "5", "bool": "True", "float": "1.5", "uuid": "0" * 32, "list": "a"}
    good |= {"ipv4": "1.2.3.4", "ipv6": "fd00::1", "str": "text"}
    world = world_of_everything()
    holder = HOLDERS[klass] if klass is not None else ""
    qube = world.get(holder) if holder else None
    checked = 0
    for row in rows_for(klass):
        if row.settable and not row.write_once:
            continue
        checked += 1
        # A tool that clones a disposable takes that refusal for "has none".
        wanted = "PROPERTY_FIXED" if row.name == "dispid" else "PROPERTY_READ_ONLY"
        assert refusal(world, holder, row.name, good[row.type]).reason == wanted
        # Text that is no value of the type is told first.
        assert refusal(world, holder, row.name, "\u00e9").reason == "INVALID_VALUE"
        if row.write_once:
            assert reset_refusal(world, holder, row.name).reason == wanted
        else:
            check_reset(world.view, qube, row)
    assert checked


def test_resets() -> None:
    world = world_of_everything()
    for holder in ("work", "disp5"):
        assert reset_refusal(world, holder, "template").reason == "INVALID_VALUE"
        assert reset_refusal(world, holder, "label").reason == "INVALID_VALUE"
    assert reset_refusal(world, "sys-net", "provides_network").reason == "INVALID_VALUE"
    assert reset_refusal(world, "dvm", "template_for_dispvms").reason == "QUBE_IN_USE"
    assert reset_refusal(world, "", "default_kernel").reason == "INVALID_VALUE"
    for row in rows_for(None):
        if row.name != "default_kernel":
            check_reset(world.view, None, row)
    check_reset(world.view, world.get("work"), find_row("AppVM", "memory"))


# ---- network


def test_loops_are_refused() -> None:
    world = networked_world()
    world.add("sys-fw", provides_network="True", netvm="sys-net")
    world.set("work", provides_network="True", netvm="sys-fw")
    assert refusal(world, "sys-net", "netvm", "work").reason == "INVALID_VALUE"
    assert refusal(world, "sys-fw", "netvm", "work").reason == "INVALID_VALUE"
    assert parse(world, "work", "netvm", "sys-net") == "sys-net"
    # sys-net would get the default, which leads back to it.
    world.change("sys-net", properties={
        k: v for k, v in world.get("sys-net").properties.items() if k != "netvm"
    })  # fmt: skip
    assert refusal(world, "", "default_netvm", "sys-fw").reason == "INVALID_PROPERTY_VALUE"
    assert refusal(world, "", "default_netvm", "sys-net").reason == "INVALID_PROPERTY_VALUE"
    world.set("sys-net", netvm="")
    assert parse(world, "", "default_netvm", "sys-fw") == "sys-fw"
    world.system("default_netvm", "sys-fw")
    assert reset_refusal(world, "sys-net", "netvm").reason == "INVALID_VALUE"
    check_reset(world.view, world.get("work"), find_row("AppVM", "netvm"))


def test_provides_network_is_held_by_users_of_the_default() -> None:
    world = networked_world()
    world.set("work", netvm="")
    assert parse(world, "sys-net", "provides_network", "False") == "False"
    world.system("default_netvm", "sys-net")
    assert refusal(world, "sys-net", "provides_network", "False").metadata["user"] == "dvm"
    world.set("dvm", netvm="")
    assert parse(world, "sys-net", "provides_network", "False") == "False"


def test_netvm_of_a_running_qube_must_run() -> None:
    world = networked_world()
    world.set("work", netvm="")
    world.run("work")
    found = refusal(world, "work", "netvm", "sys-net")
    assert (found.reason, found.metadata["qube"]) == ("QUBE_NOT_STARTED", "sys-net")
    assert parse(world, "work", "netvm", "") == ""
    world.change("sys-net", run=Run(Phase.UP, "b1"))
    assert parse(world, "work", "netvm", "sys-net") == "sys-net"
    # A guard can be left out: the value itself is good.
    world.change("sys-net", run=Run())
    row = find_row("AppVM", "netvm")
    assert parse_property(world.view, world.get("work"), row, "sys-net", guards=False) == "sys-net"


# ---- run state


def test_template_changes_only_while_halted() -> None:
    world = world_of_everything()
    world.add("tmpl2", "TemplateVM")
    world.run("work")
    assert refusal(world, "work", "template", "tmpl2").reason == "QUBE_NOT_HALTED"
    world.run("disp5")
    assert refusal(world, "dvm", "template", "tmpl2").reason == "QUBE_IN_USE"
    world.feature("dvm", preload_dispvm="disp5")
    assert parse(world, "dvm", "template", "tmpl2") == "tmpl2"


def test_maxmem_of_a_running_qube_needs_hotplug() -> None:
    world = networked_world()
    assert parse(world, "work", "maxmem", "600") == "600"
    world.run("work")
    assert refusal(world, "work", "maxmem", "600").reason == "QUBE_NOT_HALTED"
    # The default, as anything, is taken at the next start.
    check_reset(world.view, world.get("work"), find_row("AppVM", "maxmem"))
    world.fact(KernelFact(KERNEL, memory_hotplug=True))
    assert parse(world, "work", "maxmem", "600") == "600"
    world.feature("tmpl", memory_hotplug="")
    assert refusal(world, "work", "maxmem", "600").reason == "QUBE_NOT_HALTED"


def test_pvh_with_pci() -> None:
    world = networked_world()
    world.change("work", devices=(Assignment("pci", "dom0", "00_1f.2"),))
    assert refusal(world, "work", "virt_mode", "pvh").reason == "INVALID_PROPERTY_VALUE"
    assert parse(world, "work", "virt_mode", "hvm") == "hvm"


def test_a_qube_that_is_not_in_the_view_yet_can_be_checked() -> None:
    world = networked_world()
    fresh = Qube("0" * 8 + "-0000-4000-8000-000000000000", "fresh", 50, "AppVM")
    row = find_row("AppVM", "netvm")
    assert parse_property(world.view, fresh, row, "sys-net") == "sys-net"
    # One that is still being made cannot be referred to.
    world.put(QubePut(replace(world.get("sys-net"), state=RecordState.CREATING)))
    with pytest.raises(Refusal) as caught:
        parse_property(world.view, fresh, row, "sys-net")
    assert caught.value.reason == "INVALID_PROPERTY_VALUE"


# ---- any text


@given(st.text(max_size=40))
def test_any_text_is_stored_or_refused(text: str) -> None:
    world = _SHARED
    for klass in (*CLASSES, None):
        qube = world.get(HOLDERS[klass]) if klass is not None else None
        for row in rows_for(klass):
            try:
                stored = parse_property(world.view, qube, row, text)
            except Refusal as found:
                assert found.message.isascii() and found.message.isprintable()
                continue
            assert parse_stored(world.view, qube, row, stored) == stored


_SHARED = world_of_everything()


@pytest.mark.parametrize(("holder", "name"), [("work", "kernel"), ("", "default_kernel")])
def test_a_kernel_cannot_be_judged_before_storage_has_reported(holder: str, name: str) -> None:
    world = world_of_everything()
    for fact in list(world.view.facts().values()):
        if isinstance(fact, KernelFact | PoolFact):
            world.view.apply(FactRemoved(fact_key(fact)))
    assert refusal(world, holder, name, KERNEL).reason == "FACTS_MISSING"
    world.view.apply(FactPut(PoolFact("linux-kernel")))
    assert refusal(world, holder, name, KERNEL).reason == "INVALID_PROPERTY_VALUE"


def test_a_label_called_like_an_index() -> None:
    """A client's "label-3" is the third label; what a store names is the label of that name."""
    world = world_of_everything()
    world.put(LabelPut(Label(10, "label-3", "0x010203")))
    work = world.get("work")
    row = find_row(work.klass, "label")
    assert parse_property(world.view, work, row, "label-3") == "yellow"
    assert parse_property(world.view, work, row, "label-10") == "label-3"
    assert parse_stored(world.view, work, row, "label-3") == "label-3"
    assert parse_stored(world.view, work, row, "label-4") == "green"
