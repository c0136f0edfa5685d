"""Whatever is read of a qube can be written to a copy of it, as tools that clone do.

Owns the values that every property, feature, tag, rule and assignment is read with. Must
not use the clone of our own tools. Invariant: a property that is added without a value
here fails the test.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.domains.simhv.client import SimControl
from tests.fakes.public_tools import Tools
from tests.fakes.strict_client import StrictClient, device_argument
from tests.instance import Instance
from tests.integration.adminapi_world import KERNEL, started

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

DOM0 = "00000000-0000-0000-0000-000000000000"
TEMPLATE = {"AppVM": "tmpl", "DispVM": "dvm"}
CLASSES = ("AppVM", "StandaloneVM", "TemplateVM", "DispVM", "RemoteVM")

# Values that a source may have; as a client writes them, so not always as they are read.
VALUES = {
    "appvm_default_bootmode": ("single", "default", ""),
    "audiovm": ("gui", ""),
    "auto_cleanup": ("yes", "False"),
    "autostart": ("1", "False"),
    "backup_timestamp": ("0", "1700000000"),
    "bootmode": ("single", ""),
    "debug": ("on", "False"),
    "default_dispvm": ("dvm", ""),
    "default_user": ("me,you+a.b-c", ""),
    "devices_denied": ("u08****b******", ""),
    "guivm": ("gui", ""),
    "include_in_backups": ("off", "True"),
    "installed_by_rpm": ("True", "False"),
    "ip": ("10.137.200.1",),
    "ip6": ("FD09::200",),
    "kernel": ("", KERNEL),
    "kernelopts": ("", "a  b", "back\\nslash", "two\nlines", "tab\tq'\"%d %s"),
    "keyboard_layout": ("us++", "de+nodeadkeys+caps:none,x"),
    "label": ("blue", "1", "label-2"),
    "mac": ("00:16:3E:5E:6C:09",),
    "management_dispvm": ("dvm", ""),
    "maxmem": ("0", " 5_000 "),
    "memory": ("321",),
    "netvm": ("net", ""),
    "provides_network": ("True", "False"),
    "qrexec_timeout": ("77",),
    "relayvm": ("net", ""),
    "remote_name": ("100%", ""),
    "shutdown_timeout": ("78",),
    "stubdom_mem": ("140",),
    "template_for_dispvms": ("True", "False"),
    "transport_rpc": ("qubes.X", ""),
    "vcpus": ("3",),
    "virt_mode": ("HVM", "pv"),
}
# Read, but never written: computed, or fixed by the creation.
READ_ONLY = frozenset(
    {"dispid", "dns", "gateway", "gateway6", "icon", "is_preload", "klass", "name", "qid",
     "start_time", "stubdom_uuid", "stubdom_xid", "template", "updateable", "uuid",
     "visible_gateway", "visible_gateway6", "visible_ip", "visible_ip6", "visible_netmask", "xid"}
)  # fmt: skip


class World:
    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.api = StrictClient(instance.socket)
        self.tools = Tools(self.api, Path("/nonexistent"), {})
        for name in ("net", "dvm", "gui"):
            self.tools.create(name)
        self.api.set("net", "provides_network", "True")
        self.api.set("dvm", "template_for_dispvms", "True")

    def create(self, name: str, klass: str) -> str:
        self.tools.create(name, klass, template=TEMPLATE.get(klass, ""))
        return name


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with started() as (instance, _client, _pool):
        yield World(instance)


@pytest.mark.parametrize("klass", CLASSES)
def test_every_value_of_every_property(world: World, klass: str) -> None:
    api = world.api
    source, copy = world.create(f"v-{klass}", klass), world.create(f"w-{klass}", klass)
    names = api.property_list(source)
    assert not set(names) - set(VALUES) - READ_ONLY
    for name in names:
        for value in VALUES.get(name, ()):
            api.set(source, name, value)
            got = api.get_property(source, name)
            assert not got.is_default, (name, value)
            api.set(copy, name, got.text)
            assert api.get_property(copy, name) == got
            assert api.get_all(copy)[name] == got
    # What is no default is written to a copy, so nothing else may be read as set.
    for name, got in api.get_all(source).items():
        assert got.is_default or name in VALUES or name in READ_ONLY, name
    for name in ("qid", "dispid", "uuid", "name"):
        if name in names:
            # Tools leave three of these out; the fourth is to read as a missing attribute.
            wanted = "QubesNoSuchPropertyError" if name == "dispid" else "QubesPropertyValueError"
            with api.refused(wanted):
                api.set(copy, name, str(api.get(source, name)))
    for qube in (source, copy):
        if "installed_by_rpm" in names:
            api.set(qube, "installed_by_rpm", "False")
    assert world.tools.remove(source, copy) == []


@pytest.mark.parametrize("klass", CLASSES[:-1])
def test_a_whole_clone_of_every_class(world: World, klass: str) -> None:
    api, tools = world.api, world.tools
    source = world.create(f"s-{klass}", klass)
    names = api.property_list(source)
    for name, values in VALUES.items():
        # A pair of addresses belongs to one qube; what is true keeps a qube from going.
        if name in names and name not in ("installed_by_rpm", "label"):
            api.set(source, name, values[0])
    api.set(source, "label", "blue")
    for tag in ("mine", "guivm-gui", "audiovm-nobody"):
        tools.tag(source, "add", tag)
    features = {
        "os": "Linux", "service.a.b": "", "gui": "0", "net.fake-ip": "192.168.0.1",
        "menu-items": "a.desktop b.desktop", "boot-mode.active": "x", "servicevm": "1",
        "vm-config.x.y": "1", "template-name": " it's \"100%\" \\n ", "-.-": "~" * 5000,
    }  # fmt: skip
    for name, value in features.items():
        tools.feature(source, name, value)
    tools.notes(source, "50% \u00fc\n\tand more")
    tools.clone(source, "copy")
    for name in names:
        if name in VALUES:
            assert api.get_property("copy", name) == api.get_property(source, name), name
    kept = [tag for tag in api.tags(source) if not tag.startswith("created-by-")]
    assert [tag for tag in api.tags("copy") if not tag.startswith("created-by-")] == kept
    assert api.features("copy") == api.features(source)
    assert tools.notes("copy") == tools.notes(source)
    for name in ("copy", source):
        if "template_for_dispvms" in names:
            api.set(name, "template_for_dispvms", "False")
        if "provides_network" in names:
            api.set(name, "provides_network", "False")
    assert tools.remove("copy", source) == []


RULES = (
    "action=accept",
    "action=drop dst4=0.0.0.0/0 comment=a  b [c] /.,;:-_",
    "action=accept dst4=10.0.0.1/8 proto=tcp dstports=80",
    "action=drop dst6=::/0 proto=icmp icmptype=0",
    "action=accept dst6=2001:DB8::1/64 proto=udp dstports=1-65535",
    "action=accept dsthost=a_b.example.org expire=4000000000",
    "action=accept proto=tcp specialtarget=dns",
)


def test_every_rule_of_a_firewall(world: World) -> None:
    api = world.api
    source, copy = world.create("f-source", "AppVM"), world.create("f-copy", "AppVM")
    for rules in (*RULES, "\n".join(RULES)):
        api.do("admin.vm.firewall.Set", source, payload=rules.encode())
        text = api.call("admin.vm.firewall.Get", source)
        world.tools.write_rules(copy, api.rules(source))
        written = text.replace(" dst4=0.0.0.0/0", "").replace(" dst6=::/0", "")
        assert api.call("admin.vm.firewall.Get", copy) == written
        api.do("admin.vm.firewall.Set", copy, payload=text.encode())
        assert api.call("admin.vm.firewall.Get", copy) == text
    assert world.tools.remove(source, copy) == []


def _offer(world: World, *rows: dict[str, object]) -> None:
    with SimControl.of(world.instance.root) as control:
        control.devices(DOM0, *rows)
    for row in rows:
        where = str(row["devclass"]), "dom0"
        world.instance.until(
            lambda where=where: bool(world.api.available(*where)),  # type: ignore[misc]
            10,
            "offered",
        )


@pytest.mark.parametrize(
    ("devclass", "port", "device_id", "options"),
    [
        ("block", "sda", "0000:0000::?******:sda",
         {"read-only": "yes", "frontend-dev": "xvdk", "devtype": "cdrom"}),
        ("pci", "00_1f.2", "8086:0a0b::p020000", {"permissive": "True", "no-strict-reset": "True"}),
    ],
)  # fmt: skip
def test_every_assignment(
    world: World, devclass: str, port: str, device_id: str, options: dict[str, str]
) -> None:
    api, tools = world.api, world.tools
    row = {"devclass": devclass, "port": port, "device_id": device_id, "data": {}}
    _offer(world, {**row, "fields": {"name": "o'b \\ %d"}, "interfaces": "b******"})
    names = world.create(f"a-{devclass}", "AppVM"), world.create(f"b-{devclass}", "AppVM")
    source, copy = names
    call = f"admin.vm.device.{devclass}"
    for head in (
        f"dom0+{port}:{device_id}", f"dom0+{port}:*", f"dom0+*:{device_id}", "dom0+not-there:*",
        "dom0+not-there:1234:5678::u080650",
    ):  # fmt: skip
        for mode in ("required", "auto-attach", "ask-to-attach"):
            for more in ({}, options):
                tools._give("Assign", devclass, source, head, mode, more)
                text = api.call(f"{call}.Assigned", source)
                ((found, fields),) = api.held(devclass, "Assigned", source).items()
                given = {key[1:]: value for key, value in fields.items() if key[0] == "_"}
                tools._give("Assign", devclass, copy, found, fields["mode"], given)
                assert api.call(f"{call}.Assigned", copy).replace(copy, source) == text
                api.do(f"{call}.Unassign", copy, device_argument(found))
                # The line as it stands, and no more than what the argument does not say.
                line = text.partition(" ")[2].rstrip("\n").replace(source, copy)
                for payload in (line, f"mode='{mode}'"):
                    api.do(f"{call}.Assign", copy, device_argument(found), payload.encode())
                    assert list(api.held(devclass, "Assigned", copy)) == [found]
                    api.do(f"{call}.Unassign", copy, device_argument(found))
                api.do(f"{call}.Unassign", source, device_argument(found))
    assert tools.remove(*names) == []
    _offer(world)
