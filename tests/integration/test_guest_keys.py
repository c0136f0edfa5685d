"""What running guests are told and plugged into: every key, and what each change rewrites."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from services.domains.simhv.client import SimControl
from services.firewall.core.iptables import header
from services.lifecycle.steps.start import host_timezone
from services.lifecycle.steps.subject import CALL_TIMEOUT_S
from tests.instance import Instance, running
from tests.integration.adminapi_world import KERNEL, add_kernel

pytestmark = pytest.mark.integration

SOON_S = 20.0
# Addresses follow from numbers: qubes get theirs in the order of their creation.
QUBES = ("net", "net2", "fw", "work", "gui", "relay", "dvm", "idle")
IP = {name: f"10.137.0.{number}" for number, name in enumerate(QUBES, 2)}
IP6 = {name: f"fd09:24ef:4179::a89:{number:x}" for number, name in enumerate(QUBES, 2)}
APP = base64.urlsafe_b64encode(hashlib.sha256(b"firefox").digest()).decode().rstrip("=")
ACCEPT = "action=accept"


class World:
    """An instance with a chain of network qubes, a guivm, a relay and a client of all."""

    def __init__(self, instance: Instance, sim: SimControl) -> None:
        self.instance = instance
        self.sim = sim

    def ok(self, method: str, dest: str = "dom0", arg: str = "", payload: str = "") -> str:
        return self.instance.ok(method, dest, arg, payload.encode())

    def set(self, qube: str, name: str, value: str) -> None:
        self.ok("admin.vm.property.Set", qube, name, value)

    def feature(self, qube: str, name: str, value: str | None = "1") -> None:
        if value is None:
            self.ok("admin.vm.feature.Remove", qube, name)
        else:
            self.ok("admin.vm.feature.Set", qube, name, value)

    def uuid(self, qube: str) -> str:
        return self.ok("admin.vm.property.Get", qube, "uuid").rpartition(" ")[2]

    def xid(self, qube: str) -> str:
        return self.ok("admin.vm.property.Get", qube, "xid").rpartition(" ")[2]

    def keys(self, qube: str, *below: str) -> dict[str, str]:
        """All keys of a running guest, or those that begin so."""
        directory = self.instance.root / "run/bulkhead/domains/guest-keys"
        content = json.loads((directory / f"{self.uuid(qube)}.json").read_text())["keys"]
        if below:
            del content["/qubes-iptables-error"]  # begins like others
        return {k: v for k, v in content.items() if not below or k.startswith(below)}

    def until(self, qube: str, expected: Mapping[str, str | None]) -> None:
        """The keys become so; None = it goes."""

        def so() -> bool:
            keys = self.keys(qube)
            return all(keys.get(key) == value for key, value in expected.items())

        try:
            self.instance.until(so, SOON_S, "keys")
        except AssertionError:
            keys = self.keys(qube)
            assert {key: keys.get(key) for key in expected} == expected

    def applies(self, qube: str) -> int:
        """How often it was brought up to date, or is being."""
        rows = [json.loads(line) for line in self.ok("bulkhead.op.List").splitlines()]
        return sum(row["kind"] == "APPLY" and qube in row["qubes"] for row in rows)

    def plugs(self, qube: str = "work") -> list[tuple[str, str, bool]]:
        """(MAC, backend, plugged into the backend's present boot) of each interface."""
        found = []
        for mac, nic in self.sim.guest(self.uuid(qube))["interfaces"].items():
            boots = {d["uuid"]: d["boot_id"] for d in self.sim.domains()}
            now = boots.get(nic["backend_uuid"])
            found.append((mac, nic["backend"], nic["backend_boot"] == now is not None))
        return found


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with running() as instance, SimControl.of(instance.root) as sim:
        add_kernel(instance)
        w = World(instance, sim)
        w.ok("admin.property.Set", arg="default_kernel", payload=KERNEL)
        w.ok("admin.vm.Create.TemplateVM", payload="name=tmpl label=black")
        for name in QUBES:
            w.ok("admin.vm.Create.AppVM", arg="tmpl", payload=f"name={name} label=red")
        w.ok("admin.vm.Create.RemoteVM", payload="name=far label=red")
        for name in ("net", "net2", "fw"):
            w.set(name, "provides_network", "True")
        w.feature("net", "ipv6")
        w.feature("net", "qubes-firewall")
        w.set("fw", "netvm", "net")
        w.set("work", "netvm", "fw")
        w.set("idle", "netvm", "fw")
        w.set("far", "relayvm", "relay")
        w.set("far", "remote_name", "over-there")
        w.set("work", "guivm", "gui")
        w.set("work", "audiovm", "gui")
        w.set("dvm", "template_for_dispvms", "True")
        w.feature("tmpl", "gui-videoram-min", "1024")
        w.feature("dom0", "gui-videoram-overhead", "5")
        for name, value in {
            "service.foo": "1",
            "service.bar": "",
            "service.app-dispvm.firefox": "1",
            "service.guivm": "1",
            "service.ntpd": "1",
            "check-updates": "",
            "dvm": "1",
            "updates-proxy-setup": "1",
            "guivm-windows-prefix": "P",
            "vm-config.x": "y",
            "custom-persist.home": "dir:user:user:0755:/home/a",
        }.items():
            w.feature("work", name, value)
        for name in ("tmpl", "work", "relay", "net2"):
            w.ok("admin.vm.Start", name)
        yield w


def of_core(name: str, klass: str, template: str, persistence: str) -> dict[str, str]:
    """What a guest of the world is told without network, apart from its random seed."""
    found = {
        "/name": name,
        "/type": klass,
        "/default-user": "user",
        "/qubes-vm-updateable": str(persistence == "full"),
        "/qubes-vm-persistence": persistence,
        "/qubes-debug-mode": "0",
        "/qubes-base-template": template,
        "/qubes-block-devices": "",
        "/qubes-usb-devices": "",
        "/qubes-iptables-error": "",
        "/qubes-vm-type": klass if klass == "TemplateVM" else "AppVM",
        "/qubes-service/meminfo-writer": "1",
        "/qubes-gui-enabled": "True",
        "/qubes-gui-domain-xid": "0",
        "/qubes-audio-domain-xid": "0",
        "/qubes-gui-videoram-min": "1024",
        "/qubes-gui-videoram-overhead": "5",
        "/keyboard-layout": "us++",
    }
    if host_timezone():
        found["/qubes-timezone"] = host_timezone()
    return found


def provider(name: str, client: str) -> dict[str, str]:
    return {
        "/qubes-netvm-network": IP[name],
        "/qubes-netvm-gateway": IP[name],
        "/qubes-netvm-gateway6": IP6[name],
        "/qubes-netvm-netmask": "255.255.255.255",
        "/qubes-netvm-primary-dns": "10.139.1.1",
        "/qubes-netvm-secondary-dns": "10.139.1.2",
        f"/mapped-ip/{IP[client]}/visible-ip": IP[client],
        f"/mapped-ip/{IP[client]}/visible-gateway": IP[name],
        f"/qubes-firewall/{IP[client]}/policy": "drop",
        f"/qubes-firewall/{IP[client]}/0000": ACCEPT,
        f"/qubes-firewall/{IP[client]}": "",
        f"/qubes-firewall/{IP6[client]}/policy": "drop",
        f"/qubes-firewall/{IP6[client]}/0000": ACCEPT,
        f"/qubes-firewall/{IP6[client]}": "",
    }


OF_IPTABLES = ("/qubes-iptables-h", "/qubes-iptables-domainrules/", "/qubes-iptables")


def iptables(world: World, *clients: str, rules: str = "-j ACCEPT") -> dict[str, str]:
    """What a network qube without feature qubes-firewall is told of running clients."""
    found = {"/qubes-iptables-header": header(), "/qubes-iptables": "reload"}
    for name in clients:
        xid = world.xid(name)
        lines = [f"# {world.uuid(name)}", f"# {IP[name]}", "*filter", f":q{xid} - [0:0]"]
        lines.append(f"-A clients -s {IP[name]} -j q{xid}")
        lines += [f"-A q{xid} {rule}" for rule in (*filter(None, rules.split("|")), "-j refuse")]
        found[f"/qubes-iptables-domainrules/{xid}"] = "\n".join([*lines, "COMMIT", ""])
    return found


def client(name: str, netvm: str) -> dict[str, str]:
    return {
        "/qubes-mac": "00:16:3e:5e:6c:00",
        "/qubes-ip": IP[name],
        "/qubes-netmask": "255.255.255.255",
        "/qubes-gateway": IP[netvm],
        "/qubes-primary-dns": "10.139.1.1",
        "/qubes-secondary-dns": "10.139.1.2",
        "/qubes-ip6": IP6[name],
        "/qubes-gateway6": IP6[netvm],
    }


def test_all_that_is_told_at_a_start(world: World) -> None:
    made = world.ok("admin.vm.CreateDisposable", "dvm")
    world.ok("admin.vm.Start", made)
    work = {
        **of_core("work", "AppVM", "tmpl", "rw-only"),
        **client("work", "fw"),
        "/qubes-service/foo": "1",
        "/qubes-service/bar": "0",
        "/qubes-service/app-dispvm.firefox": "1",
        "/qubes-service/guivm": "1",
        "/qubes-service/ntpd": "1",
        "/qubes-service/qubes-update-check": "0",
        "/qubes-service/qubes-dvm": "1",
        "/qubes-service/yum-proxy-setup": "1",
        f"/hash-app-dispvm/{APP}": "firefox",
        "/guivm-windows-prefix": "P",
        "/vm-config/x": "y",
        "/persist/home": "dir:user:user:0755:/home/a",
    }
    # Its guivm and audiovm are off.
    del work["/qubes-gui-domain-xid"], work["/qubes-audio-domain-xid"]
    expected: dict[str, dict[str, str]] = {
        "work": work,
        "tmpl": of_core("tmpl", "TemplateVM", "", "full"),
        made: of_core(made, "DispVM", "dvm", "none"),
        "relay": {
            **of_core("relay", "AppVM", "tmpl", "rw-only"),
            "/remote/far": "over-there",
        },
        "net": {
            **of_core("net", "AppVM", "tmpl", "rw-only"),
            **provider("net", "fw"),
            "/qubes-vm-type": "NetVM",
            "/connected-ips": IP["fw"],
            "/connected-ips6": IP6["fw"],
        },
        "fw": {
            **of_core("fw", "AppVM", "tmpl", "rw-only"),
            **provider("fw", "work"),
            **client("fw", "net"),
            **iptables(world, "work"),
            "/qubes-vm-type": "ProxyVM",
            # Clients that do not run are named too.
            "/connected-ips": f"{IP['idle']} {IP['work']}",
            "/connected-ips6": f"{IP6['idle']} {IP6['work']}",
        },
    }
    seeds = set()
    for name, keys in expected.items():
        told = world.keys(name)
        seed = told.pop("/qubes-random-seed")
        assert len(base64.b64decode(seed, validate=True)) == 64
        seeds.add(seed)
        assert told == keys, name
    assert len(seeds) == len(expected)
    world.ok("admin.vm.Kill", made)


def test_gui_and_sound(world: World) -> None:
    world.ok("admin.vm.Start", "gui")
    xid = world.xid("gui")
    world.until("work", {"/qubes-gui-domain-xid": xid, "/qubes-audio-domain-xid": xid})
    world.set("gui", "keyboard_layout", "de+nodeadkeys+")
    world.until("work", {"/keyboard-layout": "de+nodeadkeys+"})
    world.set("work", "audiovm", "")
    assert "/qubes-audio-domain-xid" not in world.keys("work")
    world.set("work", "audiovm", "dom0")
    assert world.keys("work")["/qubes-audio-domain-xid"] == "0"
    world.set("work", "guivm", "")
    assert world.keys("work", "/qubes-gui-enabled", "/qubes-gui-domain", "/keyboard") == {
        "/qubes-gui-enabled": "False"
    }
    world.set("work", "guivm", "gui")
    assert world.keys("work", "/qubes-gui-domain", "/keyboard") == {
        "/qubes-gui-domain-xid": xid,
        "/keyboard-layout": "de+nodeadkeys+",
    }
    world.ok("admin.vm.Kill", "gui")
    world.ok("admin.vm.Start", "gui")
    assert world.xid("gui") != xid
    world.until("work", {"/qubes-gui-domain-xid": world.xid("gui")})


def test_features_that_are_exported_come_and_go_at_once(world: World) -> None:
    world.feature("work", "service.foo", "")
    assert world.keys("work")["/qubes-service/foo"] == "0"
    for name in ("service.bar", "service.app-dispvm.firefox", "custom-persist.home"):
        world.feature("work", name, None)
    world.feature("work", "vm-config.x", "z")
    world.feature("work", "vm-config.new", "")
    prefixes = ("/qubes-service/", "/hash-app", "/persist/", "/vm-config/")
    assert world.keys("work", *prefixes) == {
        "/qubes-service/foo": "0",
        "/qubes-service/guivm": "1",
        "/qubes-service/meminfo-writer": "1",
        "/qubes-service/ntpd": "1",
        "/qubes-service/qubes-dvm": "1",
        "/qubes-service/qubes-update-check": "0",
        "/qubes-service/yum-proxy-setup": "1",
        "/vm-config/new": "",
        "/vm-config/x": "z",
    }
    world.ok("admin.property.Set", arg="clockvm", payload="work")
    world.until("work", {"/qubes-service/clocksync": "1"})
    world.ok("admin.property.Set", arg="clockvm", payload="")
    world.until("work", {"/qubes-service/clocksync": None})


def test_remote_qubes_of_a_relay(world: World) -> None:
    world.set("far", "remote_name", "elsewhere")
    assert world.keys("relay", "/remote") == {"/remote/far": "elsewhere"}
    world.ok("admin.vm.property.Reset", "far", "remote_name")
    assert world.keys("relay", "/remote") == {"/remote/far": "far"}
    world.set("far", "relayvm", "")
    assert world.keys("relay", "/remote") == {}
    world.set("far", "relayvm", "relay")
    assert world.keys("relay", "/remote") == {"/remote/far": "far"}
    world.ok("admin.vm.Remove", "far")
    world.until("relay", {"/remote/far": None})


def test_rules_reach_the_network_qube(world: World) -> None:
    rules = (
        "action=accept dsthost=1.2.3.0/24 proto=tcp dstports=80-90 comment=web\n"
        "action=drop proto=icmp icmptype=8\n"
        "action=accept dst6=2001:db8::/32\n"
        "action=accept dsthost=example.com\n"
        "action=drop specialtarget=dns\n"
    )
    world.ok("admin.vm.firewall.Set", "work", "", rules)
    base, base6 = f"/qubes-firewall/{IP['work']}", f"/qubes-firewall/{IP6['work']}"
    both = {
        "0001": "action=drop proto=icmp icmptype=8",
        "0003": "action=accept dsthost=example.com",
        "0004": "action=drop specialtarget=dns",
        "policy": "drop",
    }
    four = {"0000": "action=accept dst4=1.2.3.0/24 proto=tcp dstports=80-90", **both}
    six = {"0002": "action=accept dst6=2001:db8::/32", **both}
    expected = {
        base: "",
        base6: "",
        **{f"{base}/{key}": value for key, value in four.items()},
        **{f"{base6}/{key}": value for key, value in six.items()},
    }
    world.until("fw", expected)
    assert world.keys("fw", "/qubes-firewall/") == expected
    world.ok("admin.vm.firewall.Set", "work", "", "action=accept\n")
    world.until("fw", {f"{base}/0001": None, f"{base}/0000": ACCEPT})


def test_rules_reach_a_network_qube_that_reads_iptables_text(world: World) -> None:
    def text(*clients: str, rules: str = "-j ACCEPT") -> None:
        wanted = iptables(world, *clients, rules=rules)
        world.instance.until(
            lambda: world.keys("fw", *OF_IPTABLES) == wanted, SOON_S, "the text is there"
        )

    text("work")
    world.ok(
        "admin.vm.firewall.Set",
        "work",
        "",
        "action=accept dst4=1.2.3.4 proto=tcp dstports=80 comment=COMMIT\naction=drop dst6=::1\n"
        "action=accept dsthost=example.com\n",
    )
    text("work", rules="-d 1.2.3.4/32 -p tcp --dport 80 -j ACCEPT|-d example.com -j ACCEPT")
    world.ok("admin.vm.firewall.Set", "work", "", "action=drop\n")
    text("work", rules="-j refuse")
    # More than one key holds: nothing passes.
    many = [f"action=accept dst4=10.0.{n}.0/24 proto=tcp dstports=80" for n in range(99)]
    world.ok("admin.vm.firewall.Set", "work", "", "".join(f"{line}\n" for line in many))
    text("work", rules="")
    world.ok("admin.vm.firewall.Set", "work", "", "action=accept\n")
    text("work")
    # A stop takes it away, a start brings that of the new boot.
    before = world.xid("work")
    world.ok("admin.vm.Kill", "work")
    text()
    world.ok("admin.vm.Start", "work")
    assert world.xid("work") != before
    text("work")
    # The netvm says that it knows /qubes-firewall: its own is enough.
    assert world.keys("net", *OF_IPTABLES) == {}
    world.feature("fw", "qubes-firewall")
    world.ok("admin.vm.firewall.Set", "work", "", "action=drop\n")
    world.until("fw", {f"/qubes-firewall/{IP['work']}/0000": "action=drop"})
    text("work")
    world.feature("fw", "qubes-firewall", None)
    world.ok("admin.vm.firewall.Set", "work", "", "action=accept\n")
    text("work")


def test_an_iptables_text_that_a_boot_left_goes_with_the_next_one(world: World) -> None:
    """A stop that never got to it, and another qube that had the address."""
    directory = world.instance.root / "run/bulkhead/domains/guest-keys"
    file = directory / f"{world.uuid('fw')}.json"
    content = json.loads(file.read_text())
    prefix = "/qubes-iptables-domainrules"
    content["keys"] |= {
        f"{prefix}/901": f"# {world.uuid('work')}\n# 10.137.9.9\n*filter\nCOMMIT\n",
        f"{prefix}/902": f"# of another\n# {IP['work']}\n*filter\nCOMMIT\n",
        f"{prefix}/903": "# of another\n# 10.137.9.9\n*filter\nCOMMIT\n",
    }
    file.write_text(json.dumps(content))
    world.ok("admin.vm.firewall.Reload", "work")
    left = f"{prefix}/903"
    world.until("fw", {f"{prefix}/901": None, f"{prefix}/902": None})
    found = world.keys("fw", *OF_IPTABLES)
    assert found.pop(left) == content["keys"][left]
    assert found == iptables(world, "work")
    content = json.loads(file.read_text())
    del content["keys"][left]
    file.write_text(json.dumps(content))


def closed(name: str, *, six: bool = True) -> dict[str, str]:
    """All that a former network qube still has of a client: it lets nothing through."""
    found: dict[str, str] = {}
    for address in (IP[name], IP6[name]) if six else (IP[name],):
        found |= {f"/qubes-firewall/{address}/policy": "drop", f"/qubes-firewall/{address}": ""}
    return found


def test_a_change_of_netvm_replugs_and_tells_all_three(world: World) -> None:
    world.set("work", "debug", "True")
    network = ("/qubes-ip", "/qubes-gateway", "/qubes-mac", "/qubes-netmask", "/qubes-debug")
    dns = ("/qubes-primary", "/qubes-secondary")
    there = ("/connected", "/mapped", "/qubes-firewall/", *OF_IPTABLES)
    assert world.plugs() == [("00:16:3e:5e:6c:00", "fw", True)]
    world.set("work", "netvm", "net2")
    assert world.plugs() == [("00:16:3e:5e:6c:00", "net2", True)]
    told = {**client("work", "net2"), "/qubes-debug-mode": "1"}
    del told["/qubes-ip6"], told["/qubes-gateway6"]  # net2 has no IPv6
    assert world.keys("work", *network, *dns) == told
    assert world.keys("fw", *there) == {
        **closed("work"),
        **iptables(world),
        "/connected-ips": IP["idle"],
        "/connected-ips6": IP6["idle"],
    }
    assert world.keys("net2", *there) == {
        "/connected-ips": IP["work"],
        "/connected-ips6": "",
        f"/mapped-ip/{IP['work']}/visible-ip": IP["work"],
        f"/mapped-ip/{IP['work']}/visible-gateway": IP["net2"],
        f"/qubes-firewall/{IP['work']}/policy": "drop",
        f"/qubes-firewall/{IP['work']}/0000": ACCEPT,
        f"/qubes-firewall/{IP['work']}": "",
        **iptables(world, "work"),
    }
    world.set("work", "netvm", "")
    assert world.plugs() == []
    assert world.keys("work", *network, *dns) == {"/qubes-debug-mode": "1"}
    assert world.keys("net2", *there) == {
        **closed("work", six=False),
        **iptables(world),
        "/connected-ips": "",
        "/connected-ips6": "",
    }
    world.feature("work", "net.fake-ip", "192.168.1.5")
    world.set("work", "mac", "00:16:3e:5e:6c:01")
    world.set("work", "netvm", "fw")
    assert world.plugs() == [("00:16:3e:5e:6c:01", "fw", True)]
    assert world.keys("work", "/qubes-ip", "/qubes-mac") == {
        "/qubes-ip": "192.168.1.5",
        "/qubes-ip6": IP6["work"],
        "/qubes-mac": "00:16:3e:5e:6c:01",
    }
    assert world.keys("fw", "/connected-ips", "/mapped-ip/") == {
        "/connected-ips": f"{IP['idle']} 192.168.1.5",
        "/connected-ips6": f"{IP6['idle']} {IP6['work']}",
        f"/mapped-ip/{IP['work']}/visible-ip": "192.168.1.5",
        f"/mapped-ip/{IP['work']}/visible-gateway": IP["fw"],
    }
    # A change of the MAC while it runs counts from the next plugging on; nothing is left.
    world.set("work", "mac", "00:16:3e:5e:6c:02")
    world.set("work", "netvm", "net2")
    assert world.plugs() == [("00:16:3e:5e:6c:02", "net2", True)]
    world.feature("work", "net.fake-ip", None)


def test_a_network_qube_is_told_of_its_own_netvm(world: World) -> None:
    own = ("/qubes-gateway",)
    assert world.keys("fw", *own) == {"/qubes-gateway": IP["net"], "/qubes-gateway6": IP6["net"]}
    world.set("fw", "netvm", "net2")
    assert world.keys("fw", *own) == {"/qubes-gateway": IP["net2"]}  # which has no IPv6
    world.set("fw", "netvm", "net")
    assert world.keys("fw", *own) == {"/qubes-gateway": IP["net"], "/qubes-gateway6": IP6["net"]}


def test_the_change_of_a_halted_qube_is_told_to_netvms(world: World) -> None:
    world.set("idle", "netvm", "net2")
    world.until("net2", {"/connected-ips": f"{IP['idle']} {IP['work']}"})
    world.until("fw", {"/connected-ips": "", "/connected-ips6": ""})
    world.ok("admin.vm.Remove", "idle")
    world.until("net2", {"/connected-ips": IP["work"]})


def test_clients_follow_a_netvm_that_is_started_anew(world: World) -> None:
    plug: list[Any] = [("00:16:3e:5e:6c:02", "net2", True)]
    world.set("work", "mac", "00:16:3e:5e:6c:02")
    for netvm in ("", "net2"):
        world.set("work", "netvm", netvm)
    assert world.plugs() == plug
    world.ok("admin.vm.Kill", "net2")
    assert world.plugs() == []
    before = world.applies("work")
    world.ok("admin.vm.Start", "net2")
    world.instance.until(lambda: world.plugs() == plug, SOON_S, "it is plugged again")
    world.until("net2", {f"/qubes-firewall/{IP['work']}/0000": ACCEPT})
    # By one operation, begun with the end of the start.
    assert world.applies("work") == before + 1
    # One that sleeps meanwhile cannot let go, and hangs at nothing when it goes on.
    world.ok("admin.vm.Pause", "work")
    world.ok("admin.vm.Kill", "net2")
    world.ok("admin.vm.Start", "net2")
    world.ok("admin.vm.Unpause", "work")
    world.instance.until(lambda: world.plugs() == plug, SOON_S, "it is plugged again")
    # Nor does a service that knows nothing of earlier plugs take the old one for good.
    world.ok("admin.vm.Pause", "work")
    world.ok("admin.vm.Kill", "net2")
    world.ok("admin.vm.Start", "net2")
    old = world.instance.kill("domains")
    world.instance.wait_restarted("domains", old)
    world.ok("admin.vm.Unpause", "work")
    world.instance.until(lambda: world.plugs() == plug, SOON_S, "it is plugged again")


def test_a_netvm_that_was_changed_while_paused_is_plugged_when_it_goes_on(world: World) -> None:
    world.ok("admin.vm.Pause", "work")
    world.set("work", "netvm", "fw")
    assert [backend for _, backend, _ in world.plugs()] == ["net2"]
    world.ok("admin.vm.Unpause", "work")
    world.instance.until(
        lambda: [p[1:] for p in world.plugs()] == [("fw", True)], SOON_S, "it is plugged anew"
    )
    world.until("work", {"/qubes-gateway": IP["fw"]})


def test_keys_end_with_the_boot(world: World) -> None:
    path = world.instance.root / "run/bulkhead/domains/guest-keys"
    file = path / f"{world.uuid('relay')}.json"
    assert file.exists()
    world.ok("admin.vm.Kill", "relay")
    world.instance.until(lambda: not file.exists(), SOON_S, "the file is gone")


def test_a_client_that_does_not_let_go_does_not_hold_up_the_stop_of_its_netvm(
    world: World,
) -> None:
    world.ok("admin.vm.property.Set", "work", "netvm", "net2")
    fault = world.sim.hang("work", "detach_interface")
    began = time.monotonic()
    world.ok("admin.vm.Kill", "net2")
    assert time.monotonic() - began < CALL_TIMEOUT_S  # which is what the call could take
    world.sim.clear(fault)
    world.ok("admin.vm.Start", "net2")
    world.instance.until(
        lambda: [p[1:] for p in world.plugs()] == [("net2", True)], SOON_S, "it is plugged anew"
    )
