"""What a client keeps from events alone is what a fresh read says, after every call.

Owns a long random session and the cache of a manager: everything is read once, then only
events change it, by the rules of the release's client. Must not know how events are made.
Invariant: a value that changes without an event is a failure, unless the release tells of
it by none either (SILENT says which call may do so to what).
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from services.domains.simhv.client import SimControl
from tests.fakes.public_tools import Tools
from tests.fakes.strict_client import (
    POWER_EVENTS,
    AccessError,
    Choke,
    Event,
    Property,
    Stream,
    StrictClient,
    device_argument,
)
from tests.instance import Instance
from tests.integration.adminapi_world import KERNEL, started

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

DOM0 = "00000000-0000-0000-0000-000000000000"
SYSTEM = ""
CALLS = 260

NETWORK = frozenset(
    {"dns", "gateway", "gateway6", "ip", "ip6", "visible_gateway", "visible_gateway6",
     "visible_ip", "visible_ip6", "visible_netmask"}
)  # fmt: skip
# What a call changes -> the computed values that follow it without an event in release 4.4.
SILENT: dict[str, frozenset[str]] = {
    "netvm": NETWORK,
    "default_netvm": NETWORK,
    "provides_network": NETWORK - {"gateway", "gateway6"},
    "ip6": frozenset({"gateway6", "visible_gateway6"}),
    "template": frozenset(
        {"bootmode", "default_dispvm", "default_user", "kernel", "kernelopts", "keyboard_layout",
         "management_dispvm", "maxmem", "memory", "netvm", "qrexec_timeout", "shutdown_timeout",
         "vcpus", "virt_mode"} | NETWORK
    ),
    "auto_cleanup": frozenset({"include_in_backups"}),
    "default_guivm": frozenset({"keyboard_layout"}),
    "default_kernel": frozenset({"kernel", "kernelopts"}),
    "default_pool": frozenset(
        f"default_pool_{volume}" for volume in ("kernel", "private", "root", "volatile")
    ),
    "default_qrexec_timeout": frozenset({"qrexec_timeout"}),
    "default_shutdown_timeout": frozenset({"shutdown_timeout"}),
    "guivm": frozenset({"keyboard_layout"}),
    "kernel": frozenset({"kernelopts"}),
    "management_dispvm": frozenset({"management_dispvm"}),
    "maxmem": frozenset({"maxmem"}),
    "memory": frozenset({"maxmem"}),
    # 4.4 looks for a stub domain by what is set, not by what runs.
    "virt_mode": frozenset({"virt_mode", "maxmem", "stubdom_uuid", "stubdom_xid"}),
    "boot-mode.appvm-default": frozenset({"appvm_default_bootmode", "bootmode"}),
    "boot-mode.kernelopts.foo": frozenset({"bootmode"}),
    "ipv6": NETWORK,
    "net.fake-gateway": NETWORK,
    "net.fake-ip": NETWORK,
    "net.fake-netmask": NETWORK,
    "os": frozenset({"maxmem"}),
    "qrexec": frozenset({"maxmem"}),
    "supported-service.meminfo-writer": frozenset({"maxmem"}),
    "servicevm": frozenset({"icon"}),
    "pci": frozenset({"virt_mode", "maxmem", "kernelopts"}),
    # A guest that sleeps deeply: no event that the client's cache knows says so.
    "Suspend": frozenset({"states"}),
    "Resume": frozenset({"states"}),
}  # fmt: skip
SILENT_RESETS = frozenset({("reset", "ip6", "visible_ip6")})
INHERITED = frozenset(
    {"appvm_default_bootmode", "default_user", "kernel", "kernelopts", "management_dispvm",
     "maxmem", "memory", "qrexec_timeout", "shutdown_timeout", "vcpus"}
)  # fmt: skip
# Devices attach themselves a moment after the call that lets them.
SETTLE_S = 15.0

VALUES: dict[str, tuple[str, ...]] = {
    "auto_cleanup": ("False",),
    "autostart": ("False",),
    "backup_timestamp": ("1700000000",),
    "debug": ("True", "False"),
    "default_user": ("me", "user"),
    "devices_denied": ("b******", ""),
    "include_in_backups": ("False", "True"),
    "ip": ("10.137.9.9",),
    "ip6": ("fd09::9",),
    "kernel": ("", KERNEL),
    "keyboard_layout": ("us++", "de++"),
    "mac": ("00:16:3E:5E:6C:09",),
    "maxmem": ("0", "2000"),
    "memory": ("321", "400"),
    "provides_network": ("True", "True", "False"),
    "qrexec_timeout": ("3", "4"),
    "shutdown_timeout": ("7",),
    "remote_name": ("foo",),
    "transport_rpc": ("qubes.X",),
    "stubdom_mem": ("140",),
    "template_for_dispvms": ("True", "True", "False"),
    "vcpus": ("3", "2"),
    "virt_mode": ("hvm", "pvh"),
    "appvm_default_bootmode": ("foo", "default"),
    "bootmode": ("foo", "default"),
    "kernelopts": ("a b", ""),
    "label": ("blue", "red"),
    "check_updates_vm": ("False", "True"),
    "default_kernel": (KERNEL,),
    "default_pool": ("varlibqubes",),
    "default_pool_private": ("varlibqubes",),
    "default_qrexec_timeout": ("3",),
    "default_shutdown_timeout": ("61", "60"),
    "stats_interval": ("3",),
}
REFERENCES = frozenset(
    {"audiovm", "guivm", "default_dispvm", "management_dispvm", "netvm", "relayvm", "template",
     "clockvm", "updatevm", "default_audiovm", "default_guivm", "default_netvm",
     "default_template"}
)  # fmt: skip
FEATURES: dict[str, tuple[str, ...]] = {
    "ipv6": ("1", ""),
    "net.fake-ip": ("192.168.9.9",),
    "net.fake-gateway": ("192.168.9.1",),
    "net.fake-netmask": ("255.255.0.0",),
    "os": ("Linux", "x"),
    "boot-mode.kernelopts.foo": ("a",),
    "boot-mode.active": ("foo", "default"),
    "boot-mode.appvm-default": ("foo",),
    "service.x": ("1", ""),
    "servicevm": ("1",),
    "internal": ("1", ""),
    "supported-service.meminfo-writer": ("1",),
    "tag-created-vm-with": ("extra", "one two"),
}


TABLES = ("states", "values", "features", "tags", "attached", "assigned")


class Kept:
    """A client's cache: states, properties, features, tags, and what is attached where."""

    def __init__(self, api: StrictClient) -> None:
        self._api = api
        self.states: dict[str, str] = {}
        self.values: dict[str, dict[str, Property]] = {SYSTEM: api.get_all(SYSTEM)}
        self.features: dict[str, dict[str, str]] = {}
        self.tags: dict[str, set[str]] = {}
        self.attached: dict[str, set[str]] = {}
        self.assigned: dict[str, set[str]] = {}
        for name in api.vm_list():
            self._add(name)

    def _add(self, name: str) -> None:
        """Read all of a qube; one that has gone meanwhile is left out."""
        try:
            self._read(name)
        except KeyError:
            self._remove(name)

    def _remove(self, name: str) -> None:
        for table in TABLES:
            getattr(self, table).pop(name, None)

    def _read(self, name: str) -> None:
        api = self._api
        self.states[name] = api.state(name)
        self.values[name] = api.get_all(name)
        self.features[name] = api.features(name)
        self.tags[name] = set(api.tags(name))
        self.attached[name] = self._held("Attached", name)
        self.assigned[name] = self._held("Assigned", name)

    def _held(self, how: str, name: str) -> set[str]:
        return {
            f"{devclass} {head.replace('+', ':', 1)}"
            for devclass in ("block", "pci")
            for head in self._api.held(devclass, how, name)
        }

    def take(self, event: Event) -> None:
        """One event, by the rules of the release's client."""
        kind, _, what = event.name.partition(":")
        name, values = event.subject, event.values
        if kind == "domain-add":
            # Read later than it happened: what follows may be known already.
            self._add(values["vm"])
        elif kind == "domain-delete":
            self._remove(values["vm"])
        elif name not in self.values:
            assert kind == "domain-remove-from-disk", event
        elif kind in POWER_EVENTS:
            self.states[name] = POWER_EVENTS[kind]
            if kind in ("domain-start", "domain-shutdown"):
                # Required devices come and go with the guest, of which nothing else tells.
                with contextlib.suppress(KeyError):
                    self.attached[name] = self._held("Attached", name)
        elif kind in ("property-set", "property-reset", "property-del"):
            # Read again when somebody wants it.
            self.values[name].pop(values["name"], None)
        elif kind == "domain-feature-set":
            self.features[name][values["feature"]] = values["value"]
        elif kind == "domain-feature-delete":
            self.features[name].pop(values["feature"], None)
        elif kind == "domain-tag-add":
            self.tags[name].add(values["tag"])
        elif kind == "domain-tag-delete":
            self.tags[name].discard(values["tag"])
        elif kind == "device-attach":
            self.attached[name].add(f"{what} {values['device']}")
        elif kind == "device-detach":
            self.attached[name] = {
                held for held in self.attached[name]
                if not held.startswith(f"{what} {values['port']}:")
            }  # fmt: skip
        elif kind == "device-assign":
            self.assigned[name].add(f"{what} {values['device']}")
        elif kind == "device-unassign":
            self.assigned[name].discard(f"{what} {values['device']}")

    def differences(self, fresh: Kept) -> Iterator[tuple[str, str, str]]:
        """(qube, property or table, how it differs)."""
        if fresh.states.keys() != self.states.keys():
            yield SYSTEM, "list", f"{fresh.states.keys() ^ self.states.keys()}"
        for name, values in fresh.values.items():
            for prop, believed in self.values.get(name, {}).items():
                if values.get(prop) != believed:
                    yield name, prop, f"is {values.get(prop)}, was {believed}"
        for table in TABLES:
            if table == "values":
                continue
            now, then = getattr(fresh, table), getattr(self, table)
            for name in now.keys() & then.keys():
                if now[name] != then[name]:
                    yield name, table, f"{now[name]}, was {then[name]}"


@dataclass(frozen=True)
class Change:
    """One call: what it changes on whom, and how a person would write it."""

    told: str
    call: Callable[[], object]
    what: str = ""
    holder: str = ""
    verb: str = ""

    def silent(self, api: StrictClient, qube: str, what: str) -> bool:
        """True where the release tells nobody that the call changed that, too."""
        if what in SILENT.get(self.what, ()) or (self.verb, self.what, what) in SILENT_RESETS:
            return True
        if self.what not in INHERITED or qube == self.holder:
            return False
        # Set on a template, it is told of those that are directly based on that.
        boot = self.what == "appvm_default_bootmode"
        if what != ("bootmode" if boot else self.what) or (self.verb != "set" and not boot):
            return what in (self.what, "kernelopts", "maxmem")
        try:
            based = api.get_all(qube)["template"].text == self.holder
        except KeyError:  # it has no template, or has gone
            return True
        return not (based and api.klass(self.holder) == "TemplateVM")


class Session:
    """One person's calls, drawn at random; most of them make sense."""

    def __init__(self, instance: Instance, seed: int) -> None:
        self.api = StrictClient(instance.socket)
        self.instance = instance
        self.draw = random.Random(seed)

    def next(self) -> Change:
        """The next call."""
        api, draw = self.api, self.draw
        names = list(api.vm_list())
        name = draw.choice(names)
        kind = draw.random()
        if kind < 0.45:
            return self._property(SYSTEM if draw.random() < 0.2 else name, names)
        if kind < 0.57:
            return self._feature(name)
        if kind < 0.63:
            tag, verb = draw.choice(("a", "b", "guivm-dom0")), draw.choice(("Set", "Remove"))
            call = partial(api.do, f"admin.vm.tag.{verb}", name, tag)
            return Change(f"tag {verb} {name} {tag}", call)
        if kind < 0.73:
            return self._device(name)
        if kind < 0.9:
            verb = draw.choice(
                ("Start", "Start", "Start", "Kill", "Pause", "Unpause", "Suspend", "Resume",
                 "Shutdown", "poweroff", "crash")
            )  # fmt: skip
            return Change(f"{verb} {name}", partial(self._power, verb, name), verb)
        if kind < 0.97:
            return self._create(names)
        return Change(f"Remove {name}", partial(api.do, "admin.vm.Remove", name))

    def _property(self, holder: str, names: list[str]) -> Change:
        api, draw = self.api, self.draw
        prop = draw.choice([p for p in api.property_list(holder) if p in VALUES or p in REFERENCES])
        if draw.random() < 0.3:
            call = partial(api.reset, holder, prop)
            return Change(f"reset {holder}.{prop}", call, prop, holder, "reset")
        value = draw.choice([*names, ""]) if prop in REFERENCES else draw.choice(VALUES[prop])
        call = partial(api.set, holder, prop, value)
        return Change(f"set {holder}.{prop} {value}", call, prop, holder, "set")

    def _feature(self, name: str) -> Change:
        api, feature = self.api, self.draw.choice(list(FEATURES))
        if self.draw.random() < 0.3:
            unset = partial(api.do, "admin.vm.feature.Remove", name, feature)
            return Change(f"unset {name} {feature}", unset, feature, name)
        value = self.draw.choice(FEATURES[feature])
        call = partial(api.do, "admin.vm.feature.Set", name, feature, value.encode())
        return Change(f"feature {name} {feature}={value}", call, feature, name)

    def _device(self, name: str) -> Change:
        api, draw = self.api, self.draw
        devclass, port = draw.choice((("block", "sda"), ("block", "sdb"), ("pci", "00_1f.2")))
        verb = draw.choice(("Attach", "Detach", "Assign", "Assign", "Unassign"))
        offered = api.available(devclass, "dom0")[port]["device_id"]
        argument = device_argument(f"dom0+{port}:{offered}")
        mode = draw.choice(("required", "auto-attach")) if verb == "Assign" else ""
        call = partial(
            api.do,
            f"admin.vm.device.{devclass}.{verb}",
            name,
            argument,
            f"mode='{mode}'".encode() if mode else b"",
        )
        return Change(f"{verb} {name} {argument} {mode}", call, devclass, name)

    def _power(self, verb: str, name: str) -> None:
        if verb not in ("poweroff", "crash"):
            self.api.do(f"admin.vm.{verb}", name, "force+wait" if verb == "Shutdown" else "")
        elif name != "dom0" and self.api.state(name) == "Running":
            # The guest ends by itself; a disposable goes then.
            with SimControl.of(self.instance.root) as control:
                getattr(control, verb)(self.api.vm_list()[name].uuid)
            self.instance.until(lambda: self._over(name), 30, f"{name} has ended")

    def _over(self, name: str) -> bool:
        try:
            return self.api.state(name) == "Halted"
        except KeyError:
            return True

    def _create(self, names: list[str]) -> Change:
        api, draw = self.api, self.draw
        klass = draw.choice(
            ("AppVM", "AppVM", "AppVM", "DispVM", "StandaloneVM", "TemplateVM", "RemoteVM", "disp")
        )
        bases = [n for n in names if n in ("tmpl", "dvm") or draw.random() < 0.3]
        template = draw.choice([*bases, ""]) if klass in ("AppVM", "DispVM", "disp") else ""
        if klass == "disp":
            call = partial(api.call, "admin.vm.CreateDisposable", template or "dom0")
            return Change(f"disposable of {template}", call)
        name = f"z{draw.randrange(12)}"
        payload = f"name={name} label=red".encode()
        make = partial(api.do, f"admin.vm.Create.{klass}", "dom0", template, payload)
        return Change(f"create {klass} {name} {template}", make)


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    with started() as (instance, _client, _pool):
        tools = Tools(StrictClient(instance.socket), Path("/nonexistent"), {})
        tools.create("net", properties={"provides_network": "True"})
        tools.create("dvm", properties={"template_for_dispvms": "True", "netvm": "net"})
        tools.create("work", properties={"netvm": "net"})
        tools.create("disp", "DispVM", template="dvm")
        row = {"fields": {}, "interfaces": "b******", "data": {}}
        block = [
            {**row, "devclass": "block", "port": port, "device_id": f"0000:0000::?******:{port}"}
            for port in ("sda", "sdb")
        ]
        card = {**row, "devclass": "pci", "port": "00_1f.2", "device_id": "8086:0a0b::p020000"}
        with SimControl.of(instance.root) as control:
            control.devices(DOM0, *block, {**card, "interfaces": "p020000"})
        instance.until(
            lambda: bool(tools.api.available("pci", "dom0")), 30, "the devices are offered"
        )
        yield instance


class Follower:
    """A cache and the stream that feeds it."""

    def __init__(self, api: StrictClient, stream: Stream) -> None:
        self._api = api
        self._stream = stream
        assert stream.next().name == "connection-established"
        self.kept = Kept(api)

    def catch_up(self) -> None:
        """Take every event that was sent before now."""
        fence = f"fence-{time.monotonic_ns()}"
        for verb, event in (("Set", "add"), ("Remove", "delete")):
            self._api.do(f"admin.vm.tag.{verb}", "dom0", fence)
            name = f"domain-tag-{event}:{fence}"
            for told in self._stream.until(lambda e, name=name: e.name == name):  # type: ignore[misc]
                self.kept.take(told)

    def differences(self, change: Change) -> list[str]:
        """What is otherwise than believed, once nothing is under way any more."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            self.catch_up()
            fresh = Kept(self._api)
            found = [
                f"{qube}.{what} {how}"
                for qube, what, how in self.kept.differences(fresh)
                if not change.silent(self._api, qube, what)
            ]
            if not found or time.monotonic() > deadline:
                self.kept = fresh
                return found
            time.sleep(0.1)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_cache_that_only_events_change_stays_true(instance: Instance, seed: int) -> None:
    session = Session(instance, seed)
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    with Stream(instance.socket) as stream:
        follower = Follower(session.api, stream)
        for number in range(CALLS):
            try:
                change = session.next()
            except KeyError:  # a disposable has gone while it was looked at
                continue
            try:
                change.call()
                outcome = "done"
            except (Choke, AccessError):
                raise
            except Exception as error:
                outcome = getattr(error, "wire_name", "") or repr(error)
            outcomes[outcome] += 1
            found = follower.differences(change)
            wrong += [f"{number} {change.told} ({outcome}): {line}" for line in found]
    assert not wrong, "\n".join(wrong)
    assert outcomes["done"] > CALLS / 4, outcomes
