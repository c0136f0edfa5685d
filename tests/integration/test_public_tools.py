"""Release 4.4's tools, by the calls that they make, on a whole instance.

Owns what each documented sequence of calls has to bring about; every reply and event is
read by the strict client, so a tool that would stumble stops its test. Must not use our
own clients. Invariant: each test makes the qubes that it needs; one instance serves all.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from services.adminapi.core.calls import CALLS
from services.domains.simhv.client import SimControl
from tests.fakes.public_tools import ToolFailure, Tools
from tests.fakes.strict_client import (
    AccessError,
    Cache,
    Choke,
    Event,
    PropertyAccessError,
    Qube,
    QubesException,
    Stream,
    StreamBroken,
    StrictClient,
    current_state,
    lines,
    whole_number,
)
from tests.instance import PYTHON, Instance
from tests.integration.adminapi_world import KERNEL, MIB, started

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

RPC = Path(__file__).parents[2] / "deploy/qubes-rpc"
DOM0 = "00000000-0000-0000-0000-000000000000"
SMALL = 8 * MIB


class World:
    """The instance, one person's tools, and the looks behind the API that tests need."""

    def __init__(self, instance: Instance, pool: Path) -> None:
        self.instance = instance
        self.pool = pool
        self.api = StrictClient(instance.socket)
        rpc = instance.root / "etc/qubes-rpc"
        rpc.mkdir(parents=True, exist_ok=True)
        for script in RPC.iterdir():
            target = rpc / script.name
            target.write_text(script.read_text().replace("@PYTHON@", PYTHON))
            target.chmod(0o755)
        self.tools = Tools(self.api, rpc, {"BULKHEAD_ROOT": str(instance.root)})
        self._fences = 0

    def uuid(self, qube: str) -> str:
        return self.api.vm_list()[qube].uuid

    def guest(self, qube: str) -> dict[str, object]:
        """The running domain as the hypervisor has it."""
        with SimControl.of(self.instance.root) as control:
            return control.guest(self.uuid(qube))

    def write_as_guest(self, qube: str, volume: str, text: bytes) -> None:
        """What a running guest does to its disk."""
        path = Path(str(self.api.volume(qube, volume)["path"]))
        assert path.name.endswith("-dirty.img"), path
        with path.open("r+b") as file:
            file.write(text)

    def read(self, qube: str, volume: str, size: int) -> bytes:
        """The first bytes of a halted qube's volume."""
        path = Path(str(self.api.volume(qube, volume)["path"]))
        with path.with_name(f"{volume}.img").open("rb") as file:
            return file.read(size)

    def offer(self, *ports: str) -> None:
        """dom0 offers these block devices and no others."""
        rows = [
            {
                "devclass": "block",
                "port": port,
                "device_id": f"0000:0000::?******:{port}",
                "fields": {"name": f"disk '{port}'", "serial": "1"},
                "interfaces": "b******",
                "data": {"size": str(MIB), "mode": "w"},
            }
            for port in ports
        ]
        with SimControl.of(self.instance.root) as control:
            control.devices(DOM0, *rows)
        self.instance.until(
            lambda: sorted(self.api.available("block", "dom0")) == sorted(ports), 10, "offered"
        )

    def fence(self, stream: Stream) -> list[Event]:
        """Everything that the stream has up to now."""
        self._fences += 1
        name = f"fence-{self._fences}"
        self.api.do("admin.vm.tag.Set", "dom0", name)
        return stream.until(lambda event: event.name == f"domain-tag-add:{name}")[:-1]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with started() as (instance, _client, pool):
        yield World(instance, pool)


@pytest.fixture
def api(world: World) -> StrictClient:
    return world.api


@pytest.fixture
def tools(world: World) -> Tools:
    return world.tools


@pytest.fixture
def events(world: World) -> Iterator[Stream]:
    with Stream(world.instance.socket) as stream:
        assert stream.next().name == "connection-established"
        yield stream


def about(events: list[Event], subject: str) -> list[str]:
    return [event.name for event in events if event.subject == subject]


# ---- looking


def test_listing(world: World, api: StrictClient, tools: Tools) -> None:
    tools.create("seen")
    found = tools.ls()
    assert {name: line.klass for name, (line, _) in found.items() if name in ("dom0", "seen")} == {
        "dom0": "AdminVM",
        "seen": "AppVM",
    }
    for name, (line, values) in found.items():
        assert values["klass"].value == line.klass
        assert name == "dom0" or api.klass(name) == line.klass
        assert values["uuid"].value == line.uuid
        # What List says of a qube's state is what the state's own call says.
        assert line.state == api.state(name)
    state, _, volumes = tools.ls_disk("seen")
    assert (state.mem, state.cputime, state.power_state) == (0, 0, "Halted")
    assert list(volumes) == ["root", "private", "volatile", "kernel"]
    assert volumes["root"]["source"] == "vm-templates/tmpl/root"
    assert volumes["private"]["is_outdated"] in (False, None)
    assert tools.raw_list() == list(found)
    with pytest.raises(ToolFailure):
        tools.ls_disk("nosuch")
    assert tools.check("seen")
    assert not tools.check("nosuch")
    assert not tools.check("seen", "Running")
    assert not tools.check("seen", networked=True)
    assert api.volumes("dom0") == []
    assert "AppVM" in lines(api.call("admin.vmclass.List"), filled=True)
    with api.refused("QubesVMNotFoundError"):
        api.klass("nosuch")


def test_properties(api: StrictClient, tools: Tools, world: World, events: Stream) -> None:
    tools.create("props", properties={"vcpus": "3"})
    shown = tools.prefs("props")
    assert (shown["vcpus"], shown["netvm"], shown["backup_timestamp"]) == (3, None, "U")
    assert shown["provides_network"] is False
    for name in tools.prefs("dom0"):
        hasattr(Qube(api, "dom0"), name)
    system = tools.prefs("")
    assert system["default_template"] == "tmpl"
    assert tools.pref("", "stats_interval", "2") == 2
    api.reset("", "stats_interval")
    world.fence(events)
    # A text of two lines survives GetAll's escapes.
    assert tools.pref("props", "kernelopts", "a\\nb\n c") == "a\\nb\n c"
    assert api.get_all("props")["kernelopts"].value == "a\\nb\n c"
    assert tools.pref("props", "default_dispvm", "none") is None
    assert not api.get_property("props", "default_dispvm").is_default
    tools.pref_default("props", "default_dispvm")
    assert api.get_property("props", "default_dispvm").is_default
    assert api.get_default("props", "vcpus") == ("int", "2")
    assert api.get_default("props", "label") is None
    tools.pref_default("props", "vcpus")
    assert api.get("props", "vcpus") == 2
    assert about(world.fence(events), "props") == [
        "property-pre-set:kernelopts",
        "property-set:kernelopts",
        "property-pre-set:default_dispvm",
        "property-set:default_dispvm",
        *(
            f"property-{word}:{name}"
            for name in ("default_dispvm", "vcpus")
            for word in ("pre-reset", "pre-del", "reset", "del")
        ),
    ]
    # Renaming ends in an exception of a kind that the tool prints.
    with api.refused("QubesPropertyValueError"):
        tools.pref("props", "name", "other")
    with pytest.raises(ValueError, match="%"):
        tools.pref("props", "vcpus", "100%d")
    for name, text in tools.help_properties("props").items():
        assert text, name
    assert tools.prefs("") == system


def test_probes(api: StrictClient) -> None:
    # hasattr() tells classes apart by exactly one refusal.
    assert not hasattr(Qube(api, "tmpl"), "template")
    assert not hasattr(Qube(api, "dom0"), "netvm")
    assert not hasattr(Qube(api, "tmpl"), "nosuch")
    for call in ("Get", "GetDefault", "Help"):
        for holder, dest in (("admin.vm.property", "tmpl"), ("admin.property", "dom0")):
            with api.refused("QubesNoSuchPropertyError"):
                api.call(f"{holder}.{call}", dest, "nosuch")
    for method in ("Set", "Reset"):
        with api.refused("QubesNoSuchPropertyError"):
            api.do(f"admin.vm.property.{method}", "tmpl", "nosuch")
    with pytest.raises(KeyError):
        api.call("admin.label.Get", "dom0", "nosuch")
    with pytest.raises(KeyError):
        api.do("admin.vm.tag.Remove", "tmpl", "nosuch")
    for label in api.labels():
        colour = api.call("admin.label.Get", "dom0", label)
        assert colour.startswith("0x")
        assert len(colour) == 8
        assert whole_number(api.call("admin.label.Index", "dom0", label)) > 0


def test_no_answer_is_unreadable(world: World, api: StrictClient, tools: Tools) -> None:
    """Every call with words that a careless message would repeat: all are read, none formats
    into something else, and nothing is left without an answer."""
    tools.create("percent")
    asked = 0
    for row in CALLS["admin"].values():
        if row.stream or row.name == "admin.vm.Remove":
            continue
        for dest in ("percent", "dom0", "no%d"):
            for arg, payload in (("", b""), ("%d", b""), ("%s+%(x)s", b"%d=%s\n"), ("a%", b"%")):
                asked += 1
                try:
                    api.call(row.name, dest, arg, payload)
                except Choke:
                    raise
                except AccessError:
                    pytest.fail(f"{row.name}+{arg} on {dest} is not answered")
                except TimeoutError:
                    under_way = api.call("bulkhead.op.List")
                    pytest.fail(f"{api.calls[-2:]} waits: {under_way}\n{world.instance.logs()}")
                except Exception as error:
                    assert getattr(error, "wire_name", ""), (api.calls[-1], error)
    assert asked > 1000
    assert set(tools.ls()) >= {"dom0", "percent", "tmpl"}


def test_get_all_that_policy_refuses(world: World, api: StrictClient, tools: Tools) -> None:
    tools.create("mgmt")
    directory = world.instance.root / "etc/qubes/policy.d"
    directory.mkdir(parents=True, exist_ok=True)
    words = " * mgmt @anyvm allow target=dom0\n"
    (directory / "30-user.policy").write_text(
        "".join(f"admin.vm.{call}{words}" for call in ("List", "property.List", "property.Get"))
    )
    try:
        # The gateway opens a socket of the caller's own, on which policy decides.
        caller = StrictClient(Path(api.call("bulkhead.caller.Open", "mgmt").strip()))
        world.instance.until(lambda: bool(_answered(caller)), 20, "the policy is in force")
        with pytest.raises(AccessError):
            caller.call("admin.vm.property.GetAll", "mgmt")
        found = caller.get_all("mgmt")
        assert found == api.get_all("mgmt")
        with pytest.raises(PropertyAccessError):
            caller.get("", "default_netvm")
        with pytest.raises(AccessError):
            caller.set("mgmt", "vcpus", "7")
        assert api.get("mgmt", "vcpus") == 2
    finally:
        (directory / "30-user.policy").unlink()
        api.call("bulkhead.caller.Close", "mgmt")


def _answered(api: StrictClient) -> str:
    try:
        return api.call("admin.vm.List", "mgmt")
    except AccessError:
        return ""


def test_features_services_tags_notes(
    api: StrictClient, tools: Tools, world: World, events: Stream
) -> None:
    tools.create("bag")
    assert tools.features("bag") == {}
    assert tools.feature("bag", "os", "Linux 100%") == "Linux 100%"
    tools.service("bag", "clocksync", True)
    tools.service("bag", "cups", False)
    assert tools.features("bag") == {
        "os": "Linux 100%", "service.clocksync": "1", "service.cups": "",
    }  # fmt: skip
    assert tools.services("bag") == {"clocksync": True, "cups": False}
    tools.feature_unset("bag", "service.cups")
    assert api.feature("bag", "service.cups") is None
    with pytest.raises(KeyError):
        tools.feature_unset("bag", "service.cups")
    api.do("admin.vm.feature.Set", "tmpl", "gui", b"1")
    for how, wanted in (("Get", None), ("CheckWithTemplate", "1"), ("CheckWithNetvm", None)):
        assert api.feature("bag", "gui", how) == wanted
    api.do("admin.vm.feature.Remove", "tmpl", "gui")
    tools.tag("bag", "add", "mine")
    tools.tag("bag", "add", "mine")
    assert api.tags("bag") == ["audiovm-dom0", "created-by-dom0", "guivm-dom0", "mine"]
    assert (api.has_tag("bag", "mine"), api.has_tag("bag", "yours")) == (True, False)
    tools.tag("bag", "del", "mine")
    with api.refused("QubesTagNotFoundError"):
        tools.tag("bag", "del", "mine")
    assert about(world.fence(events), "bag").count("domain-tag-add:mine") == 1
    assert tools.notes("bag") == ""
    assert tools.notes("bag", "100% grün\n\tund rot") == "100% grün\n\tund rot"
    assert tools.notes("bag", "") == ""


# ---- power


def test_power_with_a_chain_of_netvms(
    world: World, api: StrictClient, tools: Tools, events: Stream
) -> None:
    tools.create("net1", properties={"provides_network": "True"})
    tools.create("net2", properties={"provides_network": "True", "netvm": "net1"})
    tools.create("user", properties={"netvm": "net2"})
    assert tools.check("user", networked=True)
    shown = tools.ls_network("user")
    assert shown["ip"] == api.get("user", "ip")
    assert shown["ipback"] == api.get("net2", "ip")
    world.fence(events)
    tools.start("user")
    assert [api.state(name) for name in ("net1", "net2", "user")] == ["Running"] * 3
    seen = world.fence(events)
    # The client's cache ends where the calls do.
    started = [event.subject for event in seen if event.name == "domain-start"]
    assert started == ["net1", "net2", "user"]
    assert about(seen, "user")[:2] == ["domain-pre-start", "domain-verify-files"]
    with pytest.raises(ToolFailure):
        tools.start("user")
    api.do("admin.vm.Start", "user")
    state = current_state(api.call("admin.vm.CurrentState", "user"))
    assert state.mem > 0
    assert whole_number(str(api.get("user", "xid"))) > 0
    assert float(str(api.get("user", "start_time"))) > 0
    for verb, after in (("Pause", "Paused"), ("Suspend", "Suspended")):
        tools.power(verb, "user")
        assert tools.check("user", after, "Paused")
        assert tools.check("user", networked=True)
        tools.unpause("user")
        assert api.state("user") == "Running"
    with api.refused("QubesVMNotPausedError"):
        api.do("admin.vm.Unpause", "user")
    with api.refused("QubesVMInUseError"):
        tools.shutdown("net1")
    # qvm-shutdown --wait --all: whoever is used by others comes after them.
    tools.shutdown("net1", "net2", "user", wait=True)
    assert [api.state(name) for name in ("net1", "net2", "user")] == ["Halted"] * 3
    tools.shutdown("user", wait=True)
    with api.refused("QubesVMNotStartedError"):
        tools.power("Kill", "user")
    with api.refused("QubesVMNotRunningError"):
        tools.power("Pause", "user")
    tools.start("user")
    tools.shutdown("net2", "net1", force=True, wait=True)
    assert api.state("user") == "Running"
    tools.power("Kill", "user")
    assert api.state("user") == "Halted"
    seen = world.fence(events)
    assert about(seen, "user")[-1] == "domain-shutdown"
    assert [e.values["force"] for e in seen if e.name == "domain-pre-shutdown"][-2:] == ["True"] * 2


def test_a_guest_that_does_not_stop_is_killed(
    world: World, api: StrictClient, tools: Tools, events: Stream
) -> None:
    tools.create("slow", properties={"shutdown_timeout": "1"})
    with SimControl.of(world.instance.root) as control:
        control.nature(world.uuid("slow"), shutdown="ignore")
    tools.start("slow")
    with api.refused("QubesVMShutdownTimeoutError"):
        api.do("admin.vm.Shutdown", "slow", "wait")
    assert api.state("slow") == "Running"
    tools.shutdown("slow", wait=True)
    assert api.state("slow") == "Halted"
    assert "domain-shutdown-failed" in about(world.fence(events), "slow")


def test_a_start_that_fails_says_so(
    world: World, api: StrictClient, tools: Tools, events: Stream
) -> None:
    tools.create("bad", properties={"memory": "4000000", "maxmem": "0"})
    with api.refused("QubesMemoryError"):
        tools.start("bad")
    tools.feature("bad", "prohibit-start", "because 100% sure")
    with pytest.raises(QubesException):
        tools.start("bad")
    assert api.state("bad") == "Halted"
    assert about(world.fence(events), "bad").count("domain-start-failed") == 2
    with api.refused("QubesVMNotHaltedError"):
        api.do("admin.vm.Start", "dom0")


# ---- making and removing


def test_create(world: World, api: StrictClient, tools: Tools) -> None:
    tools.create("c-app", template="tmpl", label="blue")
    assert api.get("c-app", "label") == "blue"
    tools.create("c-pool", pools=" pool=varlibqubes")
    tools.create("c-pools", pools=" pool:private=varlibqubes")
    assert api.volume("c-pools", "private")["pool"] == "varlibqubes"
    tools.create("c-dvm", properties={"template_for_dispvms": "True"})
    tools.create("c-disp", "DispVM", template="c-dvm")
    assert api.get("c-disp", "template") == "c-dvm"
    tools.create("c-remote", "RemoteVM")
    assert tools.ls()["c-remote"][0].state == "Running"
    with pytest.raises(QubesException):
        tools.create("c-app")
    for klass, arg, payload, name in (
        ("AppVM", "nosuch", b"name=c-x label=red", "QubesVMNotFoundError"),
        ("AppVM", "c-app", b"name=c-x label=red", "QubesPropertyValueError"),
        ("StandaloneVM", "tmpl", b"name=c-x label=red", "ProtocolError"),
        ("AppVM", "", b"name=c-x label=nosuch", "QubesLabelNotFoundError"),
        ("AppVM", "", b"name=c%x label=red", "QubesValueError"),
    ):
        with api.refused(name):
            api.do(f"admin.vm.Create.{klass}", "dom0", arg, payload)
    assert "c-x" not in api.vm_list()
    data = b"root of a file" + bytes(3 * MIB)
    tools.create_from_file("c-file", "StandaloneVM", data)
    assert api.volume("c-file", "root")["size"] == len(data)
    assert world.read("c-file", "root", 14) == b"root of a file"
    tools.create_standalone("c-alone", "tmpl")
    info = api.volume("c-alone", "root")
    assert (info["save_on_stop"], info["snap_on_start"]) == (True, False)
    assert tools.remove("c-disp", "c-dvm", "c-file", "c-alone", "c-pool", "c-remote") == []
    assert not list(world.pool.rglob("*c-file*"))


def test_clones(world: World, api: StrictClient, tools: Tools, events: Stream) -> None:
    world.offer("sdk")
    tools.create("src", properties={"vcpus": "4", "memory": "300", "kernelopts": "a b"})
    tools.tag("src", "add", "mine")
    tools.feature("src", "service.cups", "")
    tools.notes("src", "remember")
    tools.firewall_add("src", {"action": "accept", "dst4": "10.0.0.1/32", "comment": "a  b"}, 0)
    tools.assign("block", "src", "dom0", "sdk", "ask-to-attach")
    tools.import_stream("src", "private", b"private data" + bytes(MIB))
    world.fence(events)
    tools.clone("src", "copy")
    seen = world.fence(events)
    assert (seen[0].name, seen[0].values) == ("domain-add", {"vm": "copy"})
    for name in ("vcpus", "memory", "kernelopts", "template", "label"):
        assert api.get_property("copy", name) == api.get_property("src", name)
    assert api.tags("copy") == api.tags("src")
    assert api.features("copy") == api.features("src") == {"service.cups": ""}
    assert tools.notes("copy") == "remember"
    assert api.rules("copy") == api.rules("src")
    assert world.read("copy", "private", 12) == b"private data"
    assert (
        api.held("block", "Assigned", "copy").keys() == api.held("block", "Assigned", "src").keys()
    )
    tools.import_stream("tmpl", "root", b"template root" + bytes(MIB), resize=True)
    tools.clone("tmpl", "tmpl2", pools=" pool=varlibqubes")
    assert world.read("tmpl2", "root", 13) == b"template root"
    tools.clone("src", "alone", klass="StandaloneVM")
    assert world.read("alone", "root", 13) == b"template root"
    tools.clone("alone", "alone2")
    assert world.read("alone2", "private", 12) == b"private data"
    # The source has something that the copy may not have: the copy goes again.
    tools.feature("src", "service.ok", "1")
    api.do("admin.vm.volume.Set.revisions_to_keep", "src", "private", b"-1")
    tools.start("src")
    with api.refused("StoragePoolException"):
        tools.clone("src", "half")
    assert "half" not in api.vm_list()
    assert not list(world.pool.rglob("half"))
    tools.shutdown("src", wait=True)
    seen = world.fence(events)
    assert [e.name for e in seen if e.values.get("vm") == "half"] == [
        "domain-add",
        "domain-pre-delete",
        "domain-delete",
    ]
    assert tools.remove("copy", "tmpl2", "alone", "alone2", "src") == []
    world.offer()


def test_remove_tells_who_needs_it(world: World, api: StrictClient, tools: Tools) -> None:
    tools.create("gate", properties={"provides_network": "True", "netvm": ""})
    tools.create("guest", properties={"netvm": "gate"})
    tools.create("dvm", properties={"template_for_dispvms": "True"})
    api.set("", "default_dispvm", "dvm")
    api.set("", "default_netvm", "gate")
    assert tools.remove("gate") == [".default_netvm", "guest.netvm"]
    assert tools.remove("dvm") == [".default_dispvm"]
    api.reset("", "default_dispvm")
    api.reset("", "default_netvm")
    assert tools.remove("tmpl", "guest", "gate", "dvm")[0] == ".default_template"
    assert "tmpl" in api.vm_list()
    tools.create("busy")
    tools.start("busy")
    with api.refused("QubesVMNotHaltedError"):
        tools.remove("busy")
    tools.power("Kill", "busy")
    assert tools.remove("busy") == []
    with api.refused("QubesVMInUseError"):
        api.do("admin.vm.Remove", "dom0")


# ---- running commands


def test_run(world: World, api: StrictClient, tools: Tools, events: Stream) -> None:
    tools.create("cmd", properties={"default_user": "me"})
    assert tools.run("cmd") == "me"
    assert api.state("cmd") == "Running"
    # A service may be asked for in the instant in which somebody else has started it.
    api.do("admin.vm.Start", "cmd")
    tools.power("Kill", "cmd")
    tools.create("disp-base", properties={"template_for_dispvms": "True"})
    world.fence(events)
    name = tools.run_disposable("disp-base")
    assert api.klass(name) == "DispVM"
    assert api.state(name) == "Running"
    assert api.tags(name)[-2:] == ["disp-created-by-dom0", "guivm-dom0"]
    tools.power("Kill", name)
    world.instance.until(lambda: name not in api.vm_list(), 10, "the disposable is gone")
    seen = world.fence(events)
    # Its template's tags are its own from the start, created-by-dom0 with them.
    assert about(seen, name)[:2] == [
        "domain-create-on-disk",
        "domain-tag-add:disp-created-by-dom0",
    ]
    assert [e.name for e in seen if e.values.get("vm") == name] == [
        "domain-add",
        "domain-pre-delete",
        "domain-delete",
    ]
    assert seen[-1].values == {"vm": name}
    got = api.call("admin.vm.CreateDisposable", "disp-base", payload=b"uuid")
    assert got.startswith("uuid:")
    api.do("admin.vm.Remove", got)
    with pytest.raises(QubesException):
        api.call("admin.vm.CreateDisposable", "cmd")
    with api.refused("PermissionDenied"):
        api.call("admin.vm.CreateDisposable", "disp-base", "nosuch")


# ---- devices


def test_devices(world: World, api: StrictClient, tools: Tools, events: Stream) -> None:
    assert lines(api.call("admin.deviceclass.List"), filled=True) == ["block", "pci"]
    tools.create("far", "RemoteVM")  # a list of all asks it as well
    world.offer("sda", "sdb")
    tools.create("front")
    tools.start("front")
    shown = tools.devices("block")
    assert (shown["dom0:sda"], shown["dom0:sdb"]) == ([], [])
    world.fence(events)
    tools.attach("block", "front", "dom0", "sda", read_only="yes")
    attached = api.held("block", "Attached", "front")
    ((head, fields),) = attached.items()
    assert head.startswith("dom0+sda:")
    assert (fields["mode"], fields["frontend_domain"]) == ("manual", "front")
    assert fields["_read-only"] == "yes"
    assert api.available("block", "dom0")["sda"]["attachment"] == "front"
    assert tools.devices("block")["dom0:sda"] == ["front Attached"]
    with api.refused("DeviceAlreadyAttached"):
        tools.attach("block", "front", "dom0", "sda")
    tools.detach("block", "front", "dom0", "sda")
    with api.refused("DeviceNotAssigned"):
        tools.detach("block", "front", "dom0", "sda")
    assert about(world.fence(events), "front") == [
        f"device-{word}:block" for word in ("pre-attach", "attach", "pre-detach", "detach")
    ]
    ident = api.available("block", "dom0")["sdb"]["device_id"]
    for mode, which, head in (
        ("auto-attach", "", f"dom0+sdb:{ident}"),
        ("ask-to-attach", "port", "dom0+sdb:*"),
        ("required", "device", f"dom0+*:{ident}"),
    ):
        tools.assign("block", "front", "dom0", "sdb", mode, which)
        assert api.held("block", "Assigned", "front")[head]["mode"] == mode
        with api.refused("DeviceAlreadyAssigned"):
            tools.assign("block", "front", "dom0", "sdb", mode, which)
        tools.unassign("block", "front", head)
        assert api.held("block", "Assigned", "front") == {}
        with pytest.raises(KeyError):
            tools.unassign("block", "front", head)
    with pytest.raises(ToolFailure):
        tools.attach("block", "front", "dom0", "sdz")
    tools.power("Kill", "front")
    with api.refused("QubesVMNotRunningError"):
        tools.attach("block", "front", "dom0", "sda")
    tools.start_with("front", "dom0", "sda", "cdrom")
    assert api.held("block", "Assigned", "front") == {}
    ((head, fields),) = api.held("block", "Attached", "front").items()
    assert head.startswith("dom0+sda:")
    api.do("admin.vm.device.denied.Add", "front", payload=b"b******u08****")
    assert api.get("front", "devices_denied") == "b******u08****"
    with api.refused("PermissionDenied"):
        tools.attach("block", "front", "dom0", "sdb")
    api.do("admin.vm.device.denied.Remove", "front", payload=b"all")
    tools.power("Kill", "front")
    assert "attachment" not in api.available("block", "dom0")["sda"]
    assert not any(name.startswith("far:") for name in tools.volume_list())
    assert tools.remove("front", "far") == []
    world.offer()


def test_pci_devices(world: World, api: StrictClient, tools: Tools) -> None:
    ident = "8086:0a0b::p020000"
    row = {
        "devclass": "pci",
        "port": "00_1f.2",
        "device_id": ident,
        "fields": {"vendor": "A = 'b' =", "product": "100% new"},
        "interfaces": "p020000",
        "data": {"sbdf": "0000:00:1f.2"},
    }
    with SimControl.of(world.instance.root) as control:
        control.devices(DOM0, row)
    world.instance.until(lambda: bool(api.available("pci", "dom0")), 10, "offered")
    fields = api.available("pci", "dom0")["00_1f.2"]
    assert (fields["product"], fields["_sbdf"]) == ("100% new", "0000:00:1f.2")
    tools.create("card")
    tools.assign("pci", "card", "dom0", "00_1f.2", "required")
    assert (api.get("card", "virt_mode"), api.get("card", "maxmem")) == ("hvm", 0)
    tools.start("card")
    assert list(api.held("pci", "Attached", "card")) == [f"dom0+00_1f.2:{ident}"]
    assert tools.devices("pci") == {"dom0:00_1f.2": ["card Attached", "card Assigned"]}
    assert api.available("pci", "dom0")["00_1f.2"]["attachment"] == "card"
    tools.power("Kill", "card")
    tools.unassign("pci", "card", f"dom0+00_1f.2:{ident}")
    assert tools.devices("pci") == {"dom0:00_1f.2": []}
    assert api.get("card", "virt_mode") == "pvh"
    assert tools.remove("card") == []
    world.offer()


# ---- firewall


def test_firewall(world: World, api: StrictClient, tools: Tools, events: Stream) -> None:
    tools.create("fw")
    assert api.rules("fw") == [{"action": "accept"}]
    world.fence(events)
    soon = str(int(time.time()) + 3600)
    tools.firewall_add("fw", {"action": "drop", "comment": "last [of] all"})
    tools.firewall_add("fw", {"action": "accept", "proto": "tcp", "dst4": "10.0.0.1/8"}, 0)
    tools.firewall_add("fw", {"action": "accept", "dsthost": "example.org", "expire": soon}, 0)
    tools.firewall_add("fw", {"action": "accept", "dst6": "2001:db8::1", "proto": "icmp"}, 0)
    tools.firewall_add("fw", {"action": "accept", "specialtarget": "dns"}, 0)
    tools.firewall_add("fw", {"action": "accept", "proto": "udp", "dstports": "53"}, 0)
    rules = api.rules("fw")
    assert rules[:5] == [
        {"action": "accept", "proto": "udp", "dstports": "53-53"},
        {"action": "accept", "specialtarget": "dns"},
        {"action": "accept", "dst6": "2001:db8::1/128", "proto": "icmp"},
        {"action": "accept", "expire": soon, "dsthost": "example.org"},
        {"action": "accept", "dst4": rules[4]["dst4"], "proto": "tcp"},
    ]
    assert rules[-1] == {"action": "drop", "comment": "last [of] all"}
    # What was read can be written as it is, and nothing changes by that.
    tools.write_rules("fw", rules)
    assert api.rules("fw") == rules
    tools.firewall_del("fw", 0)
    assert api.rules("fw") == rules[1:]
    api.do("admin.vm.firewall.Reload", "fw")
    assert about(world.fence(events), "fw") == ["firewall-changed"] * 9
    for text in (b"action=accept  proto=tcp\n", b"action=maybe\n", b"proto=tcp\n", b"\n"):
        with pytest.raises(QubesException):
            api.do("admin.vm.firewall.Set", "fw", payload=text)
    assert api.rules("fw") == rules[1:]
    tools.firewall_reset("fw")
    assert api.rules("fw") == [{"action": "accept"}]
    with api.refused("ProtocolError"):
        api.call("admin.vm.firewall.Get", "dom0")


# ---- volumes and pools


def test_volumes(world: World, api: StrictClient, tools: Tools, events: Stream) -> None:
    tools.create("vol")
    tools.create("vol2")
    tools.volume_import("vol", "private", b"first" + bytes(SMALL))
    assert api.volume("vol", "private")["size"] == SMALL + 5
    first = tools.volume_list()["vol:private"]
    tools.start("vol")
    world.write_as_guest("vol", "private", b"second")
    with api.refused("QubesVMNotHaltedError"):
        tools.volume_import("vol", "private", b"x")
    tools.shutdown("vol", wait=True)
    assert world.read("vol", "private", 6) == b"second"
    revisions = api.revisions("vol", "private")
    assert len(revisions) == 1
    assert revisions != first[1]
    world.fence(events)
    tools.volume_revert("vol", "private")
    assert world.read("vol", "private", 5) == b"first"
    tools.volume_resize("vol", "private", 2 * SMALL)
    assert tools.volume_info("vol", "private")["size"] == 2 * SMALL
    with pytest.raises(ToolFailure):
        tools.volume_resize("vol", "private", SMALL)
    # How small it may become is the driver's to say; the client only asks to be sure.
    tools.volume_resize("vol", "private", SMALL, force=True)
    assert api.volume("vol", "private")["size"] == SMALL
    tools.volume_resize("vol", "private", 2 * SMALL)
    tools.volume_config("vol", "private", "revisions_to_keep", "3")
    tools.volume_config("vol", "private", "rw", "False")
    tools.volume_config("vol", "volatile", "ephemeral", "True")
    info = tools.volume_info("vol", "private")
    assert (info["revisions_to_keep"], info["rw"]) == (3, False)
    assert api.volume("vol", "volatile")["ephemeral"] is True
    tools.volume_config("vol", "private", "rw", "True")
    with pytest.raises(QubesException):
        tools.volume_config("vol", "private", "revisions_to_keep", "-2")
    tools.volume_clone("vol", "vol2", "private")
    assert world.read("vol2", "private", 5) == b"first"
    exact = b"third" + bytes(2 * SMALL - 5)
    tools.volume_import("vol", "private", exact, resize=False)
    assert world.read("vol", "private", 5) == b"third"
    # Fewer bytes than announced: nothing changes, and the reason is told.
    with pytest.raises(QubesException, match="bytes"):
        tools.import_stream("vol", "private", b"fourth", size=SMALL)
    assert world.read("vol", "private", 5) == b"third"
    with pytest.raises(QubesException):
        tools.import_stream("vol", "private", b"fourth", resize=False)
    assert world.read("vol", "private", 5) == b"third"
    assert api.volume("vol", "private")["size"] == 2 * SMALL
    api.do("admin.vm.volume.Clear", "vol", "private")
    assert world.read("vol", "private", 5) == bytes(5)
    seen = world.fence(events)
    assert [
        (e.name, e.values.get("success"))
        for e in seen
        if e.subject == "vol" and e.name.startswith("domain-volume-import")
    ] == [
        ("domain-volume-import-begin", None), ("domain-volume-import-end", "True"),
        ("domain-volume-import-begin", None), ("domain-volume-import-end", "False"),
        ("domain-volume-import-begin", None), ("domain-volume-import-end", "False"),
        ("domain-volume-import-begin", None), ("domain-volume-import-end", "True"),
    ]  # fmt: skip
    for method, arg, payload, name in (
        ("Info", "nosuch", b"", "PermissionDenied"),
        ("Resize", "private", b"-1", "ProtocolError"),
        ("Set.rw", "private", b"maybe", "ProtocolError"),
        ("CloneTo", "private", b"0" * 32, "QubesVolumeCopyTokenNotFoundError"),
    ):
        with api.refused(name):
            api.call(f"admin.vm.volume.{method}", "vol", arg, payload)
    with pytest.raises(QubesException):
        tools.volume_revert("vol", "private", "nosuch")
    assert tools.remove("vol", "vol2") == []


def test_an_import_whose_script_is_killed_is_over(
    world: World, api: StrictClient, tools: Tools, events: Stream
) -> None:
    tools.create("cut")
    tools.import_stream("cut", "private", b"before" + bytes(MIB))
    world.fence(events)
    with tools.open_import("cut", "private", b"4096\nabc") as first:
        with pytest.raises(QubesException, match="waits for its data"):
            tools.import_stream("cut", "private", b"second")
        first.kill()
    # Nobody has to know of it: the next one does as if nothing had been.
    begun = "domain-volume-import-begin", "domain-volume-import-end"
    seen = events.until(lambda event: event.name == begun[1])
    assert about(seen, "cut") == list(begun)
    assert seen[-1].values["success"] == "False"
    assert world.read("cut", "private", 6) == b"before"
    tools.import_stream("cut", "private", b"after!" + bytes(MIB))
    assert world.read("cut", "private", 6) == b"after!"
    assert tools.remove("cut") == []


def test_an_import_goes_on_while_services_start_again(
    world: World, api: StrictClient, tools: Tools
) -> None:
    tools.create("long")
    for service in ("adminapi", "lifecycle"):
        data = service.encode() + bytes(MIB)
        script = tools.open_import("long", "private", f"{len(data)}\n".encode() + data[:5])
        old = world.instance.kill(service)
        world.instance.wait_restarted(service, old)
        world.instance.until(lambda: _held(api, "long"), 30, "it still waits for its data")
        with script:
            said, _ = script.communicate(data[5:], timeout=60)
        assert api.read(said) == ""
        assert world.read("long", "private", len(service)) == service.encode()
    # The script is known to the new adminapi as well: it may be killed behind the restart.
    with tools.open_import("long", "private", b"4096\nabc") as script:
        old = world.instance.kill("adminapi")
        world.instance.wait_restarted("adminapi", old)
        world.instance.until(lambda: _held(api, "long"), 30, "it still waits for its data")
        tools.go_on(script, b"def")
        script.kill()
    world.instance.until(partial(_starts, api, "long"), 30, "nobody waits for data any more")
    tools.power("Kill", "long")
    assert world.read("long", "private", 9) == b"lifecycle"
    assert tools.remove("long") == []


def _starts(api: StrictClient, qube: str) -> bool:
    try:
        api.do("admin.vm.Start", qube)
    except (QubesException, AccessError):
        return False
    return True


def _held(api: StrictClient, qube: str) -> bool:
    try:
        api.do("admin.vm.Start", qube)
    except QubesException as error:
        return "waits for data" in str(error)
    except AccessError:
        pass
    return False


def test_pools(world: World, api: StrictClient, tools: Tools, events: Stream) -> None:
    drivers = api.drivers()
    assert set(drivers) >= {"file", "file-reflink", "linux-kernel", "lvm_thin"}
    before = tools.pool_list()
    assert before == {"varlibqubes": "file-reflink", "linux-kernel": "linux-kernel"}
    place = world.pool.parent / "second"
    place.mkdir(mode=0o755)
    os.chown(place, world.pool.stat().st_uid, world.pool.stat().st_gid)
    tools.pool_add("second", "file-reflink", dir_path=str(place), revisions_to_keep="2")
    assert list(tools.pool_list()) == [*before, "second"]
    info = tools.pool_info("second")
    assert (info["driver"], info["revisions_to_keep"]) == ("file-reflink", "2")
    assert whole_number(info["data_size"]) > whole_number(info["data_usage"]) >= 0
    for name in before:
        tools.pool_info(name)
    tools.pool_set("second", "revisions_to_keep", "3")
    tools.pool_set("second", "ephemeral_volatile", "True")
    info = tools.pool_info("second")
    assert (info["revisions_to_keep"], info["ephemeral_volatile"]) == ("3", "True")
    tools.create("p-qube", pools=" pool:private=second")
    assert api.volume("p-qube", "private")["pool"] == "second"
    assert lines(api.call("admin.pool.volume.List", "dom0", "second")) == ["appvms/p-qube/private"]
    with api.refused("QubesPoolInUseError"):
        tools.pool_remove("second")
    with api.refused("QubesPoolInUseError"):
        tools.pool_add("second", "file-reflink", dir_path=str(place))
    tools.remove("p-qube")
    tools.pool_remove("second")
    assert tools.pool_list() == before
    assert [e.name for e in world.fence(events) if e.name.startswith("pool-")] == [
        "pool-add",
        "pool-pre-delete",
        "pool-delete",
    ]
    with api.refused("PermissionDenied"):
        api.call("admin.pool.Info", "dom0", "second")
    with pytest.raises(QubesException):
        tools.pool_add("third", "file-reflink")


# ---- programs that do more than one thing


def test_backup_restore(world: World, api: StrictClient, tools: Tools) -> None:
    """qvm-backup and qvm-backup-restore: of a template and a qube with everything."""
    with pytest.raises(QubesException):
        api.call("admin.backup.Info", "dom0", "nosuch")
    world.offer("sdr")
    api.pools()
    assert "red" in api.labels()
    known = api.vm_list()
    for klass, name, template in (("TemplateVM", "r-tmpl", ""), ("AppVM", "r-app", "r-tmpl")):
        assert name not in known
        # An unknown label is known by its class; the tool tries again with red.
        with pytest.raises(KeyError) as refusal:
            api.do(f"admin.vm.Create.{klass}", "dom0", template, f"name={name} label=pink".encode())
        assert getattr(refusal.value, "wire_name", "") == "QubesLabelNotFoundError"
        payload = f"name={name} label=red pool=varlibqubes".encode()
        api.do(f"admin.vm.CreateInPool.{klass}", "dom0", template, payload)
        api.do("admin.vm.tag.Set", name, "backup-restore-in-progress")
        for prop, value in (("memory", "500"), ("include_in_backups", "False"), ("netvm", "")):
            api.set(name, prop, value)
        with pytest.raises(QubesException):
            api.set(name, "default_dispvm", "nosuch")
        for feature in ("backup-content", "os", "gui"):
            api.do("admin.vm.feature.Set", name, feature, b"1" if feature != "gui" else b"")
        api.do("admin.vm.tag.Set", name, "restored")
        for volume in ("root", "private"):
            assert volume in api.volumes(name)
            if api.volume(name, volume)["save_on_stop"] is not True:
                continue
            tools.import_stream(name, volume, f"{name} {volume}".encode() + bytes(MIB))
        tools.write_rules(name, [{"action": "accept", "dst4": "10.1.2.3/32"}, {"action": "drop"}])
        tools.notes(name, "from a backup")
        tools.assign("block", name, "dom0", "sdr", "required", "port")
        # Nothing may run before its data are whole.
        with api.refused("QubesVMError"):
            api.do("admin.vm.Start", name)
    for name in ("r-tmpl", "r-app"):
        api.do("admin.vm.tag.Remove", name, "backup-restore-in-progress")
    assert world.read("r-tmpl", "root", 11) == b"r-tmpl root"
    assert world.read("r-app", "private", 13) == b"r-app private"
    tools.start("r-app")
    assert list(api.held("block", "Attached", "r-app"))
    tools.power("Kill", "r-app")
    assert tools.remove("r-app", "r-tmpl") == []
    world.offer()


def test_template_install(world: World, api: StrictClient, tools: Tools) -> None:
    """qvm-template: what follows the download of a template."""
    tools.create("t-gate", properties={"provides_network": "True"})
    tools.create("t-new", "TemplateVM", label="black")
    tools.import_stream("t-new", "root", b"a root file system" + bytes(5 * MIB))
    api.do("admin.vm.volume.Clear", "t-new", "private")
    for name, value in (
        ("installed_by_rpm", "True"), ("netvm", "t-gate"), ("virt_mode", "hvm"), ("kernel", ""),
    ):  # fmt: skip
        api.set("t-new", name, value)
    features = {
        "template-name": "t-new", "template-epoch": "0", "template-version": "4.2.0",
        "template-release": "202401010000", "template-summary": "Qubes OS template, 100% new",
        "template-description": "Line one|line two", "template-buildtime": "2024-01-01 00:00:00",
    }  # fmt: skip
    for name, value in features.items():
        tools.feature("t-new", name, value)
    assert api.features("t-new") == features
    tools.start("t-new")
    tools.shutdown("t-new", wait=True)
    api.reset("t-new", "netvm")
    api.reset("t-new", "virt_mode")
    api.set("t-new", "kernel", KERNEL)
    assert world.read("t-new", "root", 18) == b"a root file system"
    assert api.get("t-new", "netvm") is None
    with api.refused("QubesVMInUseError"):
        api.do("admin.vm.Remove", "t-new")
    api.set("t-new", "installed_by_rpm", "False")
    tools.power("Kill", "t-gate")
    assert tools.remove("t-new", "t-gate") == []


def test_desktop_programs(world: World, api: StrictClient, tools: Tools, events: Stream) -> None:
    """qvm-start-daemon and the domains widget: reads of what has just started."""
    tools.create("desk")
    tools.start("desk")
    for event in world.fence(events):
        if event.name == "domain-spawn":
            assert whole_number(str(api.get(event.subject, "xid"))) > 0
    for name in ("dom0", "desk"):
        assert api.running(name)
        qube = Qube(api, name)
        for prop in ("guivm", "audiovm", "xid", "stubdom_xid", "virt_mode", "debug"):
            assert hasattr(qube, prop) == (name == "desk"), (name, prop)
        label = str(api.get(name, "label"))
        assert whole_number(api.call("admin.label.Index", "dom0", label)) <= 8
        for feature in ("gui", "audio"):
            assert api.feature(name, feature, "CheckWithTemplate") is None
    with Stream(world.instance.socket, "admin.vm.Stats") as stats:
        assert stats.next().name == "connection-established"
        api.set("", "stats_interval", "1")
        seen_all = stats.until(lambda event: event.subject == "desk")
        assert "dom0" in {event.subject for event in seen_all}
        seen = seen_all[-1]
        assert (seen.name, list(seen.values)) == (
            "vm-stats",
            ["memory_kb", "memory_assigned_total", "memory_assigned_usable",
             "memory_with_swap_used", "cpu_time", "cpu_usage", "online_vcpus"],
        )  # fmt: skip
        for value in seen.values.values():
            whole_number(value)
    with Stream(world.instance.socket, "admin.vm.Stats", "tmpl") as stats:
        assert stats.next().name == "connection-established"
        with pytest.raises(StreamBroken):
            stats.next()
    api.reset("", "stats_interval")
    tools.power("Kill", "desk")
    internal = StrictClient(world.instance.socket.with_name("qubesd.internal.sock"))
    told = json.loads(internal.call("internal.GetSystemInfo"))["domains"]
    assert set(told) == set(api.vm_list())
    assert told["desk"]["power_state"] == "Halted"


# ---- a manager that runs for long


RECONNECT_S = 0.1  # a second with the release's client


class Manager(threading.Thread):
    """A long-lived program: one stream, a cache, and a new stream where one breaks."""

    def __init__(self, socket: Path) -> None:
        super().__init__(daemon=True)
        self._socket = socket
        self.cache = Cache(StrictClient(socket))
        self.failure: BaseException | None = None
        self.breaks = 0
        self.subjects: set[str] = set()
        self._seen: set[str] = set()
        self._news = threading.Condition()
        self._stopped = False

    def run(self) -> None:
        try:
            while not self._stopped:
                try:
                    self._follow()
                except (StreamBroken, AccessError):
                    self.breaks += 1
                except (ConnectionRefusedError, FileNotFoundError):
                    # Nobody listens: the client asks again a little later.
                    with self._news:
                        self._news.wait(RECONNECT_S)
        except BaseException as error:
            self.failure = error
            with self._news:
                self._news.notify_all()

    def _follow(self) -> None:
        with Stream(self._socket, timeout=60) as stream:
            while not self._stopped:
                event = stream.next()
                self.cache.take(event)
                with self._news:
                    self._seen.add(event.name)
                    self.subjects.add(event.subject)
                    self._news.notify_all()

    def wait(self, name: str) -> None:
        """Until an event of that name was taken."""
        assert self.saw(name, 30.0), f"{name} has not come"

    def saw(self, name: str, timeout: float) -> bool:
        """Whether an event of that name was taken within seconds; raises what ended it."""
        with self._news:
            found = self._news.wait_for(lambda: name in self._seen or self.failure, timeout)
        if self.failure is not None:
            raise self.failure
        return bool(found)

    def stop(self, api: StrictClient, qube: str = "dom0") -> None:
        """No event is waited for behind the next one, which is the qube's."""
        self._stopped = True
        api.do("admin.vm.tag.Set", qube, f"stop-{time.monotonic_ns()}")
        self.join(30)
        assert not self.is_alive()


@pytest.fixture
def manager(world: World) -> Iterator[Manager]:
    made = Manager(world.instance.socket)
    made.start()
    made.wait("connection-established")
    yield made
    made.stop(world.api)
    if made.failure is not None:
        raise made.failure


# Changed by a netvm's change, of which no event of the release tells: programs ask anew.
FOLLOW_NETVM = frozenset(
    {"dns", "ip", "ip6", "visible_ip", "visible_ip6", "visible_gateway", "visible_gateway6",
     "visible_netmask"}
)  # fmt: skip


def differences(manager: Manager, api: StrictClient) -> list[str]:
    """What the manager believes and what is not so."""
    cache, wrong = manager.cache, []
    fresh = api.vm_list()
    if set(fresh) != set(cache.states):
        wrong.append(f"qubes: {set(fresh) ^ set(cache.states)}")
    for name, line in fresh.items():
        if cache.states.get(name) != line.state:
            wrong.append(f"{name} is {line.state}, not {cache.states.get(name)}")
        values = api.get_all(name)
        for prop, believed in cache.values.get(name, {}).items():
            if prop not in FOLLOW_NETVM and values.get(prop) != believed:
                wrong.append(f"{name}.{prop} is {values.get(prop)}, not {believed}")
    return wrong


def churn(tools: Tools, prefix: str, count: int) -> None:
    """Another person's work: qubes made, changed, started, stopped, removed."""
    api = tools.api
    tools.create(f"{prefix}-net", properties={"provides_network": "True", "netvm": ""})
    for number in range(count):
        name = f"{prefix}{number}"
        tools.create(name, label=("red", "green", "blue")[number % 3])
        what = number % 6
        if what == 0:
            api.set(name, "netvm", f"{prefix}-net")
            tools.start(name)
        elif what == 1:
            tools.start(name)
            tools.power("Pause", name)
        elif what == 2:
            tools.start(name)
            tools.shutdown(name, wait=True)
            api.set(name, "label", "black")
        elif what == 3:
            api.set(name, "memory", "350")
            api.reset(name, "memory")
            api.set(name, "template_for_dispvms", "True")
        elif what == 4:
            tools.start(name)
            tools.power("Kill", name)
            tools.remove(name)
        else:
            tools.feature(name, "prohibit-start", "no")
            with api.refused("QubesException"):
                tools.start(name)
            api.set(name, "vcpus", "1")
    api.set("tmpl", "vcpus", "3")
    api.set("", "default_netvm", f"{prefix}-net")


def test_a_manager_sees_what_another_does(
    world: World, api: StrictClient, tools: Tools, manager: Manager
) -> None:
    churn(tools, "m", 30)
    agree(manager, api, "churned")
    assert manager.breaks == 0
    assert manager.cache.reloads == 1
    api.reset("", "default_netvm")
    api.reset("tmpl", "vcpus")


def test_a_manager_sees_what_nobody_asked_for(
    world: World, api: StrictClient, tools: Tools, manager: Manager
) -> None:
    """Guests that end by themselves, disposables that come and go on their own."""
    tools.create("own-off")
    tools.create("own-crash")
    tools.create("own-dvm", properties={"template_for_dispvms": "True"})
    for name in ("own-off", "own-crash"):
        tools.start(name)
    gone = tools.run_disposable("own-dvm")
    with SimControl.of(world.instance.root) as control:
        control.poweroff(world.uuid("own-off"))
        control.crash(world.uuid("own-crash"))
        control.poweroff(world.uuid(gone))
        world.instance.until(lambda: gone not in api.vm_list(), 20, f"{gone} is gone")
    for name in ("own-off", "own-crash"):
        world.instance.until(partial(_is, api, name, "Halted"), 20, f"{name} is halted")
    with SimControl.of(world.instance.root) as control:
        control.nature("*", agent="connect")
    for name in ("RunningSystem", "Session"):
        tools.feature("own-dvm", f"supported-rpc.qubes.WaitFor{name}", "1")
    tools.feature("own-dvm", "qrexec", "1")
    tools.feature("own-dvm", "preload-dispvm-max", "1")
    world.instance.until(lambda: bool(_preloaded(api)), 30, "one is preloaded")
    ready = _preloaded(api)
    assert api.state(ready) == "Paused"
    assert api.get(ready, "is_preload") is True
    agree(manager, api, "preloaded")
    # Handed out it runs, is no preloaded one any more, and another takes its place.
    assert tools.run_disposable("own-dvm") == ready
    assert (api.state(ready), api.get(ready, "is_preload")) == ("Running", False)
    world.instance.until(lambda: _preloaded(api) not in ("", ready), 30, "the next one")
    agree(manager, api, "handed-out")
    tools.feature("own-dvm", "preload-dispvm-max", "0")
    tools.power("Kill", ready)
    world.instance.until(lambda: not _disposables(api), 30, "all disposables are gone")
    agree(manager, api, "all-gone")
    with SimControl.of(world.instance.root) as control:
        control.nature("*")
    assert manager.cache.reloads == 1


def _is(api: StrictClient, qube: str, state: str) -> bool:
    return api.state(qube) == state


def _disposables(api: StrictClient) -> list[str]:
    return [n for n, line in api.vm_list().items() if line.klass == "DispVM" and n != "c-disp"]


def _preloaded(api: StrictClient) -> str:
    """The preloaded disposable that is complete and waits, paused; "" for none."""
    for name in (api.feature("own-dvm", "preload-dispvm") or "").split():
        # Paused alone says nothing: so is every guest for a moment while it starts.
        if api.feature(name, "preload-dispvm-completed") and api.state(name) == "Paused":
            return name
    return ""


def agree(manager: Manager, api: StrictClient, mark: str) -> None:
    """What the manager believes is so, as of an event that comes after all others. Where it
    has just lost its stream the first of these passes unseen."""
    for number in range(60):
        api.do("admin.vm.tag.Set", "dom0", f"{mark}-{number}")
        if manager.saw(f"domain-tag-add:{mark}-{number}", 0.5):
            break
    else:
        pytest.fail("the manager takes no events")
    assert differences(manager, api) == []


# The documented recipe for a qube that manages those which it makes, and no others.
DELEGATED = """\
admin.vm.List * keeper @adminvm allow target=dom0
admin.vm.List * keeper @tag:created-by-keeper allow target=dom0
admin.Events * keeper @adminvm allow target=dom0
admin.Events * keeper @tag:created-by-keeper allow target=dom0
admin.vm.Create.AppVM +tmpl keeper @adminvm allow target=dom0
admin.vm.Remove * keeper @tag:created-by-keeper allow target=dom0
admin.vm.CurrentState * keeper @adminvm allow target=dom0
!include-service admin.label.List * include/admin-global-ro
"""


def test_a_manager_of_some_qubes(world: World, api: StrictClient, tools: Tools) -> None:
    """Tools and a manager in a qube that may do everything with its own qubes only."""
    tools.create("keeper")
    directory = world.instance.root / "etc/qubes/policy.d"
    done = subprocess.run(
        [PYTHON, "-m", "clients.cli.bulkhead", "policy", "includes", "--write", str(directory),
         "--root", str(world.instance.root)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done
    own = "keeper @tag:created-by-keeper allow target=dom0\n"
    (directory / "include/admin-local-rwx").write_text(own)
    (directory / "include/admin-global-ro").write_text("keeper @adminvm allow target=dom0\n")
    (directory / "30-keeper.policy").write_text(DELEGATED)
    path = Path(api.call("bulkhead.caller.Open", "keeper").strip())
    caller = StrictClient(path)
    world.instance.until(lambda: _may_list(caller), 20, "the policy is in force")
    manager = Manager(path)
    manager.start()
    manager.wait("connection-established")
    theirs = Tools(caller, world.instance.root, {})
    theirs.create("k-one", template="tmpl", properties={"vcpus": "1"})
    tools.create("k-secret")
    tools.start("k-secret")
    with pytest.raises(AccessError):
        theirs.create("k-other", "TemplateVM")
    theirs.create("k-two", template="tmpl")
    assert theirs.raw_list() == ["dom0", "k-one", "k-two"]
    for name in ("k-secret", "nosuch"):
        with pytest.raises(ToolFailure):
            theirs.start(name)
        with pytest.raises(AccessError):
            caller.do("admin.vm.Start", name)
    theirs.start("k-one")
    theirs.power("Pause", "k-one")
    assert theirs.prefs("k-one")["vcpus"] == 1
    theirs.feature("k-one", "os", "Linux")
    theirs.tag("k-one", "add", "mine")
    with api.refused("PermissionDenied"):
        theirs.tag("k-one", "add", "created-by-other")
    theirs.firewall_add("k-one", {"action": "drop", "dst4": "10.0.0.0/8"}, 0)
    theirs.notes("k-one", "by a keeper")
    for volume in caller.volumes("k-one"):
        assert theirs.volume_info("k-one", volume)["pool"]
    theirs.volume_clone("k-one", "k-two", "private")
    theirs.unpause("k-one")
    theirs.shutdown("k-one", wait=True)
    with pytest.raises(QubesException):
        caller.set("k-one", "netvm", "k-secret")
    theirs.remove("k-two")
    caller.do("admin.vm.tag.Set", "k-one", "looked")
    manager.wait("domain-tag-add:looked")
    assert set(manager.cache.states) == {"dom0", "k-one"}
    assert differences(manager, caller) == []
    assert manager.cache.reloads == 1
    assert not [s for s in manager.subjects if s not in ("", "dom0", "k-one", "k-two")]
    manager.stop(caller, "k-one")
    (directory / "30-keeper.policy").unlink()
    api.call("bulkhead.caller.Close", "keeper")
    tools.power("Kill", "k-secret")
    assert tools.remove("k-one", "k-secret", "keeper") == []


def _may_list(caller: StrictClient) -> bool:
    try:
        return bool(caller.vm_list())
    except AccessError:
        return False


@pytest.mark.parametrize("service", ["registry", "adminapi"])
def test_a_manager_survives_a_restart(
    world: World, api: StrictClient, tools: Tools, manager: Manager, service: str
) -> None:
    tools.create(f"r-{service}")
    tools.start(f"r-{service}")
    old = world.instance.kill(service)
    # What is asked for meanwhile is answered: the reply of a read or a change, never none.
    for number in range(5):
        tag = f"meanwhile-{service}-{number}"
        world.instance.until(partial(_tagged, api, tag), 30, "answered")
    world.instance.wait_restarted(service, old)
    tools.power("Kill", f"r-{service}")
    agree(manager, api, f"after-{service}")
    assert manager.breaks >= 1
    assert manager.cache.reloads >= 2


def test_a_manager_survives_a_new_start_of_everything(
    world: World, api: StrictClient, tools: Tools, manager: Manager
) -> None:
    tools.create("late")
    tools.start("late")
    assert world.instance.stop() == 0
    world.instance.start()
    # The simulated hypervisor has gone with it, and its guests with that.
    api.set("late", "vcpus", "1")
    world.instance.until(lambda: _all_halted(api), 30, "every stop is over")
    agree(manager, api, "anew")
    assert manager.cache.reloads >= 2
    assert api.state("late") == "Halted"


def _all_halted(api: StrictClient) -> bool:
    lines = api.vm_list().values()
    return all(
        line.state == "Halted" for line in lines if line.klass not in ("AdminVM", "RemoteVM")
    )


def _tagged(api: StrictClient, tag: str) -> bool:
    """Set and seen. A gateway that is killed takes the answers that it owes with it."""
    try:
        api.do("admin.vm.tag.Set", "dom0", tag)
        return api.has_tag("dom0", tag)
    except AccessError:
        return False
