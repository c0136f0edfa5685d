"""Property values, defaults and the wire state, against recordings and the formulas."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bulkhead.model.evaluate import (
    COMPUTED,
    NO_DEFAULT,
    default_of,
    effective_default_user,
    evaluate,
    get_all_lines,
    get_reply,
    is_default,
    is_halted,
    is_running,
    kernel_command_line,
    power_state,
    to_wire,
)
from bulkhead.model.properties import (
    ALL_ROWS,
    CLASSES,
    Computed,
    Constant,
    FromSystem,
    FromTemplate,
    Nothing,
    find_row,
    has_property,
    rows_for,
)
from bulkhead.model.records import (
    Assignment,
    FactRemoved,
    HostFact,
    KernelFact,
    Phase,
    Pool,
    PoolPut,
    Run,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import REFERENCE_PROPERTIES
from tests.unit.model_world import KERNEL, World, networked_world, recorded_world

GOLDEN = json.loads(
    (Path(__file__).parent.parent / "golden" / "property_replies.json").read_text()
)["calls"]
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def _shown(text: str) -> str:
    return _UUID.sub(lambda m: m.group() if set(m.group()) <= {"0", "-"} else "<UUID>", text)


@pytest.mark.parametrize(
    "call",
    GOLDEN,
    ids=[f"{c['method'].removeprefix('admin.')}-{c['dest']}-{c['arg']}" for c in GOLDEN],
)
def test_recorded_reply(call: dict[str, str]) -> None:
    world = recorded_world()
    holder = None if not call["method"].startswith("admin.vm.") else world.get(call["dest"])
    klass = holder.klass if holder is not None else None
    verb = call["method"].rsplit(".", 1)[1]
    if call["reply"] == "exc":
        assert call["class"] == "QubesNoSuchPropertyError"
        with pytest.raises(Refusal) as caught:
            find_row(klass, call["arg"])
        assert caught.value.reason == "NO_SUCH_PROPERTY"
        return
    if verb == "List":
        reply = "".join(f"{row.name}\n" for row in rows_for(klass))
    elif verb == "GetAll":
        reply = get_all_lines(world.view, holder)
    elif verb == "Get":
        reply = get_reply(world.view, holder, find_row(klass, call["arg"]))
    else:
        assert verb == "GetDefault"
        row = find_row(klass, call["arg"])
        value = default_of(world.view, holder, row.name)
        reply = "" if value is NO_DEFAULT else f"type={row.wire_type} {to_wire(row, value)}"
    if verb in ("List", "GetAll"):  # recorded with their lines sorted
        assert sorted(_shown(reply).splitlines()) == call["body"].splitlines()
    else:
        assert _shown(reply) == call["body"]


@pytest.mark.parametrize(
    ("klass", "count"),
    [
        ("AdminVM", 12),
        ("TemplateVM", 47),
        ("AppVM", 48),
        ("StandaloneVM", 47),
        ("DispVM", 50),
        ("RemoteVM", 10),
        (None, 20),
    ],
)
def test_row_counts_and_order(klass: str | None, count: int) -> None:
    rows = rows_for(klass)
    assert len(rows) == count
    assert [row.name for row in rows] == [
        row.name for row in sorted(rows, key=lambda row: (row.stage, row.name))
    ]


def test_table_is_complete() -> None:
    # Each class and name at most once, each with help, a rule that is implemented, and a
    # wire type; references agree with the view's index.
    seen: set[tuple[str, str]] = set()
    used: set[str] = set()
    for row in ALL_ROWS:
        assert row.help.endswith("."), row.name
        assert row.help.isascii() and "\n" not in row.help
        assert row.wire_type in ("str", "int", "bool", "vm", "label")
        assert row.when_running in ("live", "next", "deny", "fixed")
        assert (row.type == "qube") == bool(row.reference), row.name
        assert row.clone == (row.name not in ("name", "qid", "uuid", "dispid"))
        for klass in row.classes or {""}:
            assert (klass, row.name) not in seen
            seen.add((klass, row.name))
        match row.default:
            case Computed(name):
                used.add(name)
            case Nothing() | Constant() | FromSystem() | FromTemplate():
                pass
    assert set(COMPUTED) <= used
    assert used - set(COMPUTED) == {"default_pool", "host_memory", "host_cpus"}
    qube_references = {row.name for row in ALL_ROWS if row.type == "qube" and row.classes}
    assert qube_references == set(REFERENCE_PROPERTIES)


@pytest.mark.parametrize("klass", [*CLASSES, None])
def test_every_row_evaluates_while_unset(klass: str | None) -> None:
    world = networked_world()
    if klass is None:
        holder = None
    elif klass == "AdminVM":
        holder = world.get("dom0")
    elif klass == "DispVM":
        holder = world.add("disp7", "DispVM", template="dvm", dispid="7")
    else:
        holder = world.add("fresh", klass)
    for row in rows_for(klass):
        value = evaluate(world.view, holder, row.name)
        text = to_wire(row, value)
        if row.wire_type == "int" and text:
            assert str(int(text)) == text
        if row.wire_type == "bool":
            assert text in ("True", "False")
        default = default_of(world.view, holder, row.name)
        if is_default(world.view, holder, row.name):
            assert value == (None if default is NO_DEFAULT else default)
        if isinstance(row.default, Nothing):
            assert default is NO_DEFAULT


@pytest.mark.parametrize("klass", [*CLASSES, None])
def test_a_stored_value_is_read_and_is_not_default(klass: str | None) -> None:
    samples = {
        "int": ("17", 17), "bool": ("True", True), "str": ("text", "text"),
        "label": ("blue", "blue"), "pool": ("varlibqubes", "varlibqubes"),
        "ipv4": ("10.0.0.1", "10.0.0.1"), "ipv6": ("fd00::1", "fd00::1"),
    }  # fmt: skip
    for row in rows_for(klass):
        if not row.stored or row.name in ("name", "qid", "uuid"):
            continue
        world = networked_world()
        if klass == "AdminVM":
            name = "dom0"
        elif klass is not None:
            disp: dict[str, Any] = {"template": "dvm", "dispid": "7"} if klass == "DispVM" else {}
            name = world.add("fresh", klass, **disp).name
        text, value = ("sys-net", "sys-net") if row.type == "qube" else samples[row.type]
        if klass is None:
            world.system(row.name, text)
            holder = None
        else:
            holder = world.set(name, **{row.name: text})
        assert evaluate(world.view, holder, row.name) == value
        assert not is_default(world.view, holder, row.name)
        if row.type == "qube":
            if klass is None:
                world.system(row.name, "")
            else:
                holder = world.set(name, **{row.name: ""})
            assert evaluate(world.view, holder, row.name) is None
            assert not is_default(world.view, holder, row.name)


def test_is_default_is_about_storage_not_equality() -> None:
    world = recorded_world()
    work = world.set("work", memory="400")
    assert evaluate(world.view, work, "memory") == default_of(world.view, work, "memory") == 400
    assert not is_default(world.view, work, "memory")


def test_unknown_names_and_classes() -> None:
    world = recorded_world()
    with pytest.raises(Refusal):
        evaluate(world.view, world.get("work"), "nosuch")
    with pytest.raises(Refusal):
        evaluate(world.view, None, "memory")
    odd = world.add("odd", "GhostVM")
    assert [row.name for row in rows_for("GhostVM")] == [
        "icon", "klass", "label", "name", "qid", "uuid"
    ]  # fmt: skip
    assert evaluate(world.view, odd, "klass") == "GhostVM"
    assert power_state(world.view, odd) == "Halted"
    assert not has_property("GhostVM", "memory")


def test_getall_escapes() -> None:
    world = recorded_world()
    work = world.set("work", bootmode="a\\b\nc")
    line = next(
        line for line in get_all_lines(world.view, work).split("\n") if line.startswith("bootmode ")
    )
    assert line == "bootmode default=False type=str a\\\\b\\nc"


# ---- inheritance


def test_template_then_system_then_constant() -> None:
    world = recorded_world()
    view = world.view
    assert evaluate(view, world.get("work"), "qrexec_timeout") == 60
    world.system("default_qrexec_timeout", "90")
    assert evaluate(view, world.get("work"), "qrexec_timeout") == 90
    world.set("tmpl", qrexec_timeout="120", memory="700", vcpus="3", default_user="me")
    for name, value in (("qrexec_timeout", 120), ("memory", 700), ("vcpus", 3)):
        assert evaluate(view, world.get("work"), name) == value
    assert evaluate(view, world.get("work"), "default_user") == "me"
    world.set("work", memory="900")
    assert evaluate(view, world.get("work"), "memory") == 900
    assert default_of(view, world.get("work"), "memory") == 700


def test_disposables_inherit_along_the_chain() -> None:
    world = networked_world()
    world.set("tmpl", vcpus="6", kernel="")
    disp = world.add("disp1", "DispVM", template="dvm", dispid="1")
    assert evaluate(world.view, disp, "vcpus") == 6
    assert evaluate(world.view, disp, "kernel") == ""
    assert evaluate(world.view, disp, "default_dispvm") == "dvm"
    assert evaluate(world.view, disp, "include_in_backups") is True
    disp = world.set("disp1", auto_cleanup="True")
    assert evaluate(world.view, disp, "include_in_backups") is False
    assert evaluate(world.view, disp, "is_preload") is False
    world.feature("dvm", preload_dispvm="disp9 disp1")
    assert evaluate(world.view, disp, "is_preload") is True


def test_kernel_without_any_default() -> None:
    world = World()
    world.view.properties.pop("default_kernel")
    qube = world.add("alone", "StandaloneVM")
    assert default_of(world.view, qube, "kernel") is NO_DEFAULT
    assert get_reply(world.view, qube, find_row("StandaloneVM", "kernel")) == (
        "default=True type=str "
    )
    assert evaluate(world.view, qube, "kernelopts") == ""


def test_missing_template_counts_as_none() -> None:
    world = World()
    qube = world.add("orphan", template="gone")
    assert evaluate(world.view, qube, "template") == "gone"
    assert evaluate(world.view, qube, "memory") == 400


# ---- memory and virtualisation


def test_maxmem_rules() -> None:
    world = recorded_world()
    view = world.view
    assert evaluate(view, world.get("work"), "maxmem") == 4000
    world.feature("tmpl", os="Linux")
    assert evaluate(view, world.get("tmpl"), "maxmem") == 4000  # ten times 400
    world.set("tmpl", memory="300")
    assert evaluate(view, world.get("tmpl"), "maxmem") == 3000
    assert evaluate(view, world.get("work"), "maxmem") == 3000
    # Half of the host's memory is the cap, but a template's value is used as it is.
    world.fact(HostFact("sim", memory_kib=4 * 1024 * 1024, cpus=1))
    assert evaluate(view, world.get("tmpl"), "maxmem") == 2048
    world.set("tmpl", maxmem="5000")
    assert evaluate(view, world.get("work"), "maxmem") == 5000
    world.change("work", devices=(Assignment("pci", "dom0", "00_1f.2"),))
    assert evaluate(view, world.get("work"), "maxmem") == 0
    world.fact(HostFact("kvm", memory_kib=4 * 1024 * 1024, cpus=1))
    assert evaluate(view, world.get("tmpl"), "virt_mode") == "pvh"
    world.change("tmpl", properties={"label": "black"})
    assert evaluate(view, world.get("tmpl"), "maxmem") == 0


def test_maxmem_of_hvm_needs_the_agent() -> None:
    world = recorded_world()
    view = world.view
    world.set("work", virt_mode="hvm")
    assert evaluate(view, world.get("work"), "maxmem") == 0
    world.feature("tmpl", qrexec="1")
    assert evaluate(view, world.get("work"), "maxmem") == 4000
    world.feature("tmpl", supported_service__x="1")
    assert evaluate(view, world.get("work"), "maxmem") == 0
    world.feature("tmpl", supported_service__meminfo_writer="1")
    assert evaluate(view, world.get("work"), "maxmem") == 4000


def test_values_of_the_host() -> None:
    world = recorded_world()
    assert evaluate(world.view, None, "maxmem") == 16384
    assert evaluate(world.view, None, "no_cpus") == 4
    assert evaluate(world.view, world.get("dom0"), "maxmem") == 4096
    world.put(FactRemoved("host"))
    assert evaluate(world.view, None, "maxmem") is None
    assert evaluate(world.view, world.get("dom0"), "maxmem") == 4096
    assert evaluate(world.view, world.get("work"), "maxmem") == 4000


def test_virt_mode() -> None:
    world = recorded_world()
    assert evaluate(world.view, world.get("work"), "virt_mode") == "pvh"
    world.set("tmpl", virt_mode="pv")
    assert evaluate(world.view, world.get("work"), "virt_mode") == "pv"
    world.change("work", devices=(Assignment("pci", "dom0", "00_1f.2", mode="auto-attach"),))
    assert evaluate(world.view, world.get("work"), "virt_mode") == "hvm"


# ---- kernel command line and boot modes


def test_kernelopts_default() -> None:
    world = recorded_world()
    view = world.view
    work = world.get("work")
    assert evaluate(view, work, "kernelopts") == "swiotlb=2048"
    world.fact(KernelFact(KERNEL, kernelopts_nopci="  a b\n", kernelopts_pci="p\n"))
    assert evaluate(view, work, "kernelopts") == "a b"
    world.set("tmpl", kernelopts="from template")
    assert evaluate(view, work, "kernelopts") == "from template"
    work = world.change("work", devices=(Assignment("pci", "dom0", "00_1f.2"),))
    assert evaluate(view, work, "kernelopts") == "p"
    world.feature("dom0", suspend_s0ix="1")
    assert evaluate(view, work, "kernelopts") == "p qubes_exp_pm_use_suspend=1"
    work = world.set("work", kernel="")
    assert evaluate(view, work, "kernelopts") == ""


COMMON = (
    "root=/dev/mapper/dmroot ro nomodeset console=hvc0 rd_NO_PLYMOUTH rd.plymouth.enable=0"
    " plymouth.enable=0 xen_privcmd.unrestricted "
)


def test_command_line() -> None:
    world = recorded_world()
    view = world.view
    assert kernel_command_line(view, world.get("work")) == COMMON + "swiotlb=2048"
    world.feature("tmpl", os="Linux")
    hexed = world.get("work").uuid.replace("-", "")
    assert kernel_command_line(view, world.get("work")) == (
        f"systemd.machine_id={hexed} {COMMON}swiotlb=2048"
    )
    world.feature("tmpl", os="")
    world.feature("tmpl", selinux="1")
    assert kernel_command_line(view, world.get("work")) == (
        COMMON + "swiotlb=2048 selinux=1 security=selinux"
    )
    world.feature("tmpl", apparmor="1")
    assert kernel_command_line(view, world.get("work")).endswith(" apparmor=1 security=apparmor")
    world.feature("work", apparmor="yes", selinux="")
    assert kernel_command_line(view, world.get("work")) == COMMON + "swiotlb=2048"
    world.feature("work", no_default_kernelopts="1")
    assert kernel_command_line(view, world.get("work")) == "swiotlb=2048"
    world.set("work", kernel="")
    world.feature("work", no_default_kernelopts="")
    assert kernel_command_line(view, world.get("work")) == ""


def test_common_options_from_the_kernel_keep_inner_text() -> None:
    world = recorded_world()
    world.fact(KernelFact(KERNEL, kernelopts_common="x nomodeset y \r\n"))
    assert kernel_command_line(world.view, world.get("work")) == "x nomodeset y swiotlb=2048"
    world.feature("work", no_nomodeset="1")
    assert kernel_command_line(world.view, world.get("work")) == "x y swiotlb=2048"


@pytest.mark.parametrize(
    ("interface", "dropped"), [("p030000", True), ("p038000", True), ("p020000", False)]
)
def test_nomodeset_goes_with_a_graphics_card(interface: str, dropped: bool) -> None:
    world = recorded_world()
    world.change("work", devices=(Assignment("pci", "dom0", "01_00.0"),))
    world.device("dom0", "01_00.0", interfaces=interface)
    line = kernel_command_line(world.view, world.get("work"))
    assert ("nomodeset" not in line) is dropped
    world.feature("work", no_nomodeset="")
    assert "nomodeset" in kernel_command_line(world.view, world.get("work"))


def test_boot_modes() -> None:
    world = recorded_world()
    view = world.view
    work = world.get("work")
    assert evaluate(view, work, "bootmode") == "default"
    world.change(
        "tmpl", features={"boot-mode.kernelopts.sys": "user=root", "boot-mode.appvm-default": "sys"}
    )
    assert evaluate(view, world.get("tmpl"), "appvm_default_bootmode") == "sys"
    assert evaluate(view, work, "bootmode") == "sys"
    assert kernel_command_line(view, work) == COMMON + "swiotlb=2048 user=root"
    work = world.change("work", features={"boot-mode.active": "nosuch"})
    assert evaluate(view, work, "bootmode") == "sys"
    work = world.change("work", features={"boot-mode.active": "default"})
    assert evaluate(view, work, "bootmode") == "default"
    # A mode without options falls back to the default mode's.
    work = world.change("work", features={})
    work = world.set("work", bootmode="gone")
    assert kernel_command_line(view, work).endswith(" user=root")
    assert effective_default_user(view, work) == "user"
    world.change("tmpl", features={"boot-mode.default-user.gone": "admin"})
    assert effective_default_user(view, work) == "admin"
    assert kernel_command_line(view, work) == COMMON + "swiotlb=2048"


# ---- network


def test_network_values() -> None:
    world = networked_world()
    view = world.view
    net, work = world.get("sys-net"), world.get("work")
    assert evaluate(view, work, "ip") == "10.137.0.3"
    assert evaluate(view, work, "visible_ip") == "10.137.0.3"
    assert evaluate(view, net, "ip") == "10.137.0.2"
    assert evaluate(view, net, "gateway") == "10.137.0.2"
    assert evaluate(view, work, "gateway") is None
    assert evaluate(view, work, "visible_gateway") == "10.137.0.2"
    assert evaluate(view, net, "visible_gateway") is None
    assert evaluate(view, work, "visible_netmask") == "255.255.255.255"
    assert evaluate(view, net, "visible_netmask") is None
    assert evaluate(view, work, "dns") == ("10.139.1.1", "10.139.1.2")
    assert get_reply(view, work, find_row("AppVM", "dns")) == (
        "default=True type=str 10.139.1.1 10.139.1.2"
    )
    work = world.set("work", ip="192.168.1.2")
    assert evaluate(view, work, "visible_ip") == "192.168.1.2"
    world.change(
        "tmpl",
        features={
            "net.fake-ip": "1.2.3.4",
            "net.fake-gateway": "1.2.3.1",
            "net.fake-netmask": "255.0.0.0",
        },
    )
    assert evaluate(view, work, "ip") == "192.168.1.2"
    assert evaluate(view, work, "visible_ip") == "1.2.3.4"
    assert evaluate(view, work, "visible_gateway") == "1.2.3.1"
    assert evaluate(view, work, "visible_netmask") == "255.0.0.0"


def test_ipv6_needs_the_feature_along_the_chain() -> None:
    world = networked_world()
    view = world.view
    assert evaluate(view, world.get("work"), "ip6") is None
    world.feature("sys-net", ipv6="1")
    assert evaluate(view, world.get("work"), "ip6") == "fd09:24ef:4179::a89:3"
    assert evaluate(view, world.get("work"), "visible_gateway6") == "fd09:24ef:4179::a89:2"
    assert evaluate(view, world.get("sys-net"), "gateway6") == "fd09:24ef:4179::a89:2"
    world.feature("work", ipv6="")
    assert evaluate(view, world.get("work"), "ip6") is None
    assert evaluate(view, world.get("work"), "visible_gateway6") is None
    alone = world.add("alone", netvm="", features={"ipv6": "1"})
    assert evaluate(view, alone, "ip6") is None
    disp = world.add("disp4711", "DispVM", template="dvm", dispid="4711", netvm="sys-net")
    assert evaluate(view, disp, "ip") == "10.138.18.139"
    assert evaluate(view, disp, "ip6") == "fd09:24ef:4179::a8a:1267"


def test_default_netvm_is_not_for_templates() -> None:
    world = networked_world()
    world.system("default_netvm", "sys-net")
    assert evaluate(world.view, world.get("dvm"), "netvm") == "sys-net"
    assert evaluate(world.view, world.get("tmpl"), "netvm") is None
    assert evaluate(world.view, world.get("tmpl"), "ip") is None


def test_keyboard_layout_follows_guivm_and_survives_circles() -> None:
    world = networked_world()
    view = world.view
    assert evaluate(view, world.get("work"), "keyboard_layout") == "us++"
    world.set("dom0", keyboard_layout="de++")
    assert evaluate(view, world.get("work"), "keyboard_layout") == "de++"
    world.set("work", guivm="dvm")
    world.set("dvm", guivm="work")
    assert evaluate(view, world.get("work"), "keyboard_layout") == "us++"
    world.set("dvm", keyboard_layout="fr++")
    assert evaluate(view, world.get("work"), "keyboard_layout") == "fr++"


# ---- icon, state


@pytest.mark.parametrize(
    ("klass", "extra", "features", "icon"),
    [
        ("AppVM", {}, {}, "appvm-red"),
        ("AppVM", {"template_for_dispvms": "True"}, {}, "templatevm-red"),
        ("AppVM", {}, {"servicevm": "1"}, "servicevm-red"),
        ("AppVM", {}, {"servicevm": ""}, "appvm-red"),
        ("TemplateVM", {}, {"servicevm": "1"}, "templatevm-red"),
        ("StandaloneVM", {}, {}, "standalonevm-red"),
        ("StandaloneVM", {"template_for_dispvms": "True"}, {}, "standalonevm-red"),
        ("DispVM", {"template": "dvm", "dispid": "3"}, {}, "dispvm-red"),
        ("RemoteVM", {}, {}, "remotevm-red"),
    ],
)
def test_icon(klass: str, extra: dict[str, Any], features: dict[str, str], icon: str) -> None:
    world = networked_world()
    assert evaluate(world.view, world.add("x", klass, features=features, **extra), "icon") == icon


@pytest.mark.parametrize(
    ("power", "phase", "state"),
    [
        ("running", Phase.UP, "Running"),
        ("paused", Phase.UP, "Paused"),
        ("shutdown", Phase.UP, "Halting"),
        ("shutoff", Phase.STOPPING, "Dying"),
        ("crashed", Phase.UP, "Crashed"),
        ("pmsuspended", Phase.UP, "Suspended"),
        ("halted", Phase.STOPPING, "Dying"),
        ("halted", Phase.STARTING, "Transient"),
        ("running", Phase.STARTING, "Running"),
    ],
)
def test_power_states(power: str, phase: Phase, state: str) -> None:
    world = networked_world()
    work = world.run("work", power, phase)
    assert power_state(world.view, work) == state
    assert not is_halted(world.view, work)


def test_power_state_and_the_agent() -> None:
    world = networked_world()
    view = world.view
    world.feature("tmpl", qrexec="1")
    assert power_state(view, world.run("work")) == "Transient"
    assert power_state(view, world.run("work", agent=True)) == "Running"


def test_news_of_an_older_boot_does_not_count() -> None:
    world = networked_world()
    view = world.view
    work = world.run("work", xid=7, stubdom_xid=8, stubdom_uuid="u", start_time=5.5)
    assert evaluate(view, work, "xid") == 7
    assert evaluate(view, work, "stubdom_xid") == -1  # no stub domain without hvm
    assert evaluate(view, work, "stubdom_uuid") == ""
    assert evaluate(view, work, "start_time") == 5.5
    assert get_reply(view, work, find_row("AppVM", "start_time")) == "default=True type=str 5.5"
    work = world.set("work", virt_mode="hvm")
    assert evaluate(view, work, "stubdom_xid") == 8
    assert evaluate(view, work, "stubdom_uuid") == "u"
    work = world.change("work", run=Run(Phase.STARTING, "b2"))
    assert evaluate(view, work, "xid") == -1
    assert power_state(view, work) == "Transient"
    work = world.change("work", run=Run())
    assert power_state(view, work) == "Halted"
    assert is_halted(view, work)
    assert evaluate(view, work, "start_time") is None


def test_who_always_runs() -> None:
    world = recorded_world()
    for name in ("dom0", "remote1"):
        qube = world.get(name)
        assert power_state(world.view, qube) == "Running"
        assert is_running(world.view, qube) and not is_halted(world.view, qube)
    up = world.change("work", run=Run(Phase.UP, "b9"))
    assert power_state(world.view, up) == "Running"  # not reported since domains came back


# ---- pools


def test_default_pool() -> None:
    world = World()
    view = world.view
    assert evaluate(view, None, "default_pool") == "varlibqubes"
    assert evaluate(view, None, "default_pool_root") == "varlibqubes"
    assert evaluate(view, None, "default_pool_kernel") == "linux-kernel"
    world.put(PoolPut(Pool("default", "lvm_thin", {"volume_group": "vg", "thin_pool": "tp"})))
    assert evaluate(view, None, "default_pool_root") == "default"
    world.system("default_pool", "varlibqubes")
    assert evaluate(view, None, "default_pool_root") == "varlibqubes"
    view.pools.clear()
    view.properties.clear()
    assert default_of(view, None, "default_pool") is NO_DEFAULT


def test_default_pool_of_an_installation_elsewhere() -> None:
    world = World()
    world.view.pools.clear()
    world.put(PoolPut(Pool("first", "file", {"dir_path": "/elsewhere"})))
    world.put(PoolPut(Pool("here", "file", {"dir_path": "/srv/q"})))
    world.put(PoolPut(Pool("k", "linux-kernel", {"dir_path": "/srv/q/vm-kernels"})))
    assert evaluate(world.view, None, "default_pool") == "here"
