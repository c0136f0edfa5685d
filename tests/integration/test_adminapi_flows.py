"""What tools do over the Admin API, on real services with the simulated hypervisor."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clients.admin import AdminClient, exceptions, wire
from tests.instance import Instance
from tests.integration.adminapi_world import MIB, Listener, started

pytestmark = pytest.mark.integration

LVM_POOL = b"name=p\nvolume_group=vg\nthin_pool=tp\n"

World = tuple[Instance, AdminClient, Path]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with started() as found:
        yield found


@pytest.fixture
def client(world: World) -> AdminClient:
    return world[1]


@pytest.fixture
def events(client: AdminClient) -> Iterator[Listener]:
    listener = Listener(client)
    yield listener
    listener.close()


def create(client: AdminClient, name: str, klass: str = "AppVM", extra: str = "") -> None:
    payload = f"name={name} label=red{extra}".encode()
    client.call(f"admin.vm.Create.{klass}", payload=payload)


def names(events: list[wire.Event], subject: str) -> list[str]:
    return [e.name for e in events if e.subject == subject]


def test_create_start_shutdown_remove_tell_their_events(
    client: AdminClient, events: Listener
) -> None:
    create(client, "ev")
    seen = events.until("domain-create-on-disk", "ev")
    assert [(e.subject, e.name) for e in seen] == [
        ("", "domain-add"),
        ("ev", "domain-tag-add:created-by-dom0"),
        ("ev", "domain-create-on-disk"),
    ]
    assert seen[0].values == {"vm": "ev"}
    client.call("admin.vm.Start", "ev")
    assert client.qubes("ev")[0].state == "Running"
    seen = events.until("domain-start", "ev")
    assert names(seen, "ev") == [
        "domain-pre-start",
        "domain-verify-files",
        "domain-pre-spawn",
        "property-reset:xid",
        "property-reset:stubdom_xid",
        "property-reset:start_time",
        "domain-spawn",
        "domain-qdb-create",
        "domain-pre-unpaused",
        "domain-unpaused",
        "domain-start",
    ]
    client.call("admin.vm.Pause", "ev")
    assert client.qubes("ev")[0].state == "Paused"
    client.call("admin.vm.Unpause", "ev")
    assert names(events.until("domain-unpaused", "ev"), "ev") == [
        "domain-pre-paused",
        "domain-paused",
        "domain-pre-unpaused",
        "domain-unpaused",
    ]
    client.call("admin.vm.Shutdown", "ev", "wait")
    assert names(events.until("domain-shutdown", "ev"), "ev") == [
        "domain-pre-shutdown",
        "domain-stopped",
        "property-reset:xid",
        "property-reset:stubdom_xid",
        "property-reset:start_time",
        "domain-shutdown",
    ]
    client.call("admin.vm.Remove", "ev")
    seen = events.until("domain-delete")
    assert [(e.subject, e.name, e.values) for e in seen] == [
        ("", "domain-pre-delete", {"vm": "ev"}),
        ("", "domain-delete", {"vm": "ev"}),
    ]


def test_property_events_keep_their_order(client: AdminClient, events: Listener) -> None:
    create(client, "prop")
    events.until("domain-create-on-disk")
    client.set("prop", "vcpus", "3")
    seen = events.until("property-set:vcpus")
    assert [(e.name, list(e.values.items())) for e in seen] == [
        (name, [("name", "vcpus"), ("newvalue", "3"), ("oldvalue", "2")])
        for name in ("property-pre-set:vcpus", "property-set:vcpus")
    ]
    client.set("prop", "label", "green")
    assert names(events.until("property-set:label"), "prop") == [
        "property-pre-set:label",
        "property-reset:icon",
        "property-set:label",
    ]
    client.reset("prop", "vcpus")
    assert names(events.until("property-del:vcpus"), "prop") == [
        "property-pre-reset:vcpus",
        "property-pre-del:vcpus",
        "property-reset:vcpus",
        "property-del:vcpus",
    ]
    assert client.get("prop", "vcpus") == wire.PropertyValue("vcpus", True, "int", "2")


def test_a_change_that_changes_nothing_is_answered_at_once(client: AdminClient) -> None:
    create(client, "same")
    client.call("admin.vm.tag.Set", "same", "t")
    begin = time.monotonic()
    client.call("admin.vm.tag.Set", "same", "t")
    assert time.monotonic() - begin < 5


def test_every_change_is_read_back_at_once(client: AdminClient) -> None:
    create(client, "back")
    for number in range(30):
        client.set("back", "memory", str(400 + number))
        assert client.get("back", "memory").python == 400 + number
    with ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(
                lambda i: (
                    client.call("admin.vm.feature.Set", "back", f"f{i}", b"1"),
                    client.text("admin.vm.feature.Get", "back", f"f{i}"),
                )[1],
                range(40),
            )
        )
    assert results == ["1"] * 40
    assert set(client.lines("admin.vm.feature.List", "back")) >= {f"f{i}" for i in range(40)}


@pytest.mark.parametrize(
    ("call", "dest", "arg", "payload", "error"),
    [
        ("admin.vm.property.Set", "tmpl", "nosuch", b"1", "QubesNoSuchPropertyError"),
        ("admin.vm.property.Set", "tmpl", "klass", b"x", "QubesPropertyValueError"),
        ("admin.vm.property.Set", "tmpl", "name", b"x", "QubesPropertyValueError"),
        ("admin.vm.property.Set", "tmpl", "memory", b"many", "QubesValueError"),
        ("admin.vm.property.Set", "tmpl", "memory", "ż".encode(), "QubesValueError"),
        ("admin.vm.property.Set", "tmpl", "netvm", b"tmpl", "QubesValueError"),
        ("admin.vm.property.Set", "tmpl", "netvm", b"nosuch", "QubesPropertyValueError"),
        ("admin.vm.property.Set", "tmpl", "label", b"nosuch", "QubesLabelNotFoundError"),
        ("admin.vm.feature.Set", "tmpl", "preload-dispvm", b"1", "PermissionDenied"),
        ("admin.vm.feature.Set", "tmpl", "a b", b"1", "QubesDaemonAccessError"),
        ("admin.vm.feature.Set", "tmpl", "f", b"\n", "ProtocolError"),
        ("admin.vm.feature.Remove", "tmpl", "nosuch", b"", "QubesFeatureNotFoundError"),
        ("admin.vm.tag.Set", "tmpl", "a.b", b"", "QubesInvalidTagError"),
        ("admin.vm.tag.Remove", "tmpl", "nosuch", b"", "QubesTagNotFoundError"),
        ("admin.label.Create", "dom0", "red", b"0x000000", "QubesLabelInUseError"),
        ("admin.label.Create", "dom0", "99", b"0x000000", "QubesInvalidLabelError"),
        ("admin.label.Create", "dom0", "new", b"red", "QubesInvalidLabelValueError"),
        ("admin.label.Remove", "dom0", "red", b"", "ProtocolError"),
        ("admin.label.Remove", "dom0", "nosuch", b"", "QubesLabelNotFoundError"),
        ("admin.vm.Shutdown", "tmpl", "", b"", "QubesVMNotStartedError"),
        ("admin.vm.Shutdown", "tmpl", "now", b"", "ProtocolError"),
        ("admin.vm.Kill", "tmpl", "", b"", "QubesVMNotStartedError"),
        ("admin.vm.Pause", "tmpl", "", b"", "QubesVMNotRunningError"),
        ("admin.vm.Unpause", "tmpl", "", b"", "QubesVMNotPausedError"),
        ("admin.vm.Resume", "tmpl", "", b"", "QubesVMNotPausedError"),
        ("admin.vm.Suspend", "tmpl", "", b"", "QubesVMNotRunningError"),
        ("admin.vm.Start", "dom0", "", b"", "QubesVMNotHaltedError"),
        ("admin.vm.Remove", "dom0", "", b"", "QubesVMInUseError"),
        ("admin.vm.volume.Resize", "tmpl", "private", b"01", "ProtocolError"),
        ("admin.vm.volume.Revert", "tmpl", "private", b"nosuch", "StoragePoolException"),
        ("admin.vm.volume.CloneTo", "tmpl", "private", b"x", "QubesVolumeCopyTokenNotFoundError"),
        ("admin.vm.volume.Set.rw", "tmpl", "private", b"maybe", "ProtocolError"),
        ("admin.vm.volume.Set.revisions_to_keep", "tmpl", "private", b"-2", "QubesValueError"),
        ("admin.vm.volume.Set.ephemeral", "tmpl", "private", b"True", "QubesValueError"),
        ("admin.pool.Add", "dom0", "nosuch", b"name=p\n", "PermissionDenied"),
        ("admin.pool.Add", "dom0", "file", b"name=p\nbad=1\n", "ProtocolError"),
        ("admin.pool.Add", "dom0", "file", b"name=p\n", "QubesException"),
        ("admin.pool.Add", "dom0", "file", b"name=p\ndir_path=x\n", "ProtocolError"),
        ("admin.pool.Add", "dom0", "lvm_thin", LVM_POOL, "StoragePoolException"),
        ("admin.pool.Remove", "dom0", "nosuch", b"", "PermissionDenied"),
        ("admin.pool.Remove", "dom0", "varlibqubes", b"", "QubesPoolInUseError"),
        ("admin.vm.firewall.Set", "tmpl", "", b"nonsense\n", "QubesValueError"),
        ("admin.vm.notes.Set", "tmpl", "", b"\xff", "ProtocolError"),
        ("admin.vm.device.block.Assign", "tmpl", "nosuch+sda", b"x", "QubesVMNotFoundError"),
        ("admin.vm.device.block.Detach", "tmpl", "dom0+sda", b"", "DeviceNotAssigned"),
        ("admin.vm.device.block.Unassign", "tmpl", "dom0+sda", b"", "DeviceNotAssigned"),
        ("admin.vm.device.denied.Add", "tmpl", "", b"b", "QubesValueError"),
        ("admin.vm.CreateDisposable", "dom0", "", b"", "QubesException"),
        ("admin.vm.CreateDisposable", "tmpl", "x", b"", "PermissionDenied"),
        ("bulkhead.op.Cancel", "dom0", "nosuch", b"", "QubesException"),
    ],
)
def test_refusals(
    client: AdminClient, call: str, dest: str, arg: str, payload: bytes, error: str
) -> None:
    # Straight to the socket: the library would not send some of these.
    frame = f"{call}+{arg} dom0 name {dest}\0".encode() + payload
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(client.path))
        peer.sendall(frame)
        peer.shutdown(socket.SHUT_WR)
        reply = b""
        while chunk := peer.recv(65536):
            reply += chunk
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the name is the point
        wire.parse_reply(reply)
    assert type(caught.value).__name__ == error, caught.value
    assert str(caught.value)


def test_volumes(client: AdminClient, world: World) -> None:
    create(client, "vol")
    info = client.info("admin.vm.volume.Info", "vol", "private")
    assert info["size"] == str(2 << 30)
    client.call("admin.vm.volume.Resize", "vol", "private", str(3 << 30).encode())
    assert client.info("admin.vm.volume.Info", "vol", "private")["size"] == str(3 << 30)
    client.call("admin.vm.volume.Set.revisions_to_keep", "vol", "private", b"2")
    assert client.info("admin.vm.volume.Info", "vol", "private")["revisions_to_keep"] == "2"
    client.call("admin.vm.Start", "vol")
    with pytest.raises(exceptions.QubesVMNotHaltedError):
        client.call("admin.vm.volume.Set.rw", "vol", "private", b"False")
    client.call("admin.vm.Shutdown", "vol", "wait")
    revisions = client.lines("admin.vm.volume.ListSnapshots", "vol", "private")
    assert len(revisions) >= 1
    client.call("admin.vm.volume.Revert", "vol", "private", revisions[-1].encode())
    create(client, "vol2")
    token = client.call("admin.vm.volume.CloneFrom", "vol", "private")
    assert len(token) == 32
    client.call("admin.vm.volume.CloneTo", "vol2", "private", token)
    assert client.info("admin.vm.volume.Info", "vol2", "private")["size"] == str(3 << 30)
    with pytest.raises(exceptions.QubesVolumeCopyTokenNotFoundError):
        client.call("admin.vm.volume.CloneTo", "vol2", "private", token)
    client.call("admin.vm.volume.Clear", "vol2", "private")


def test_import_by_size_and_path(client: AdminClient, world: World) -> None:
    instance = world[0]
    internal = AdminClient(instance.root / "run/qubesd.internal.sock", timeout=30)
    create(client, "imp")
    reply = internal.text("internal.vm.volume.ImportBegin", "imp", "private", str(MIB).encode())
    size, path = reply.split(" ")
    assert int(size) == MIB
    data = b"qube" * (MIB // 4)
    with Path(path).open("r+b") as target:
        target.write(data)
    internal.call("internal.vm.volume.ImportEnd", "imp", "private", b"ok")
    info = client.info("admin.vm.volume.Info", "imp", "private")
    assert info["size"] == str(MIB)
    committed = Path(info["path"].replace("-dirty.img", ".img"))
    assert committed.read_bytes() == data
    internal.text("internal.vm.volume.ImportBegin", "imp", "private")
    with pytest.raises(exceptions.StoragePoolException, match="waits for its data"):
        internal.text("internal.vm.volume.ImportBegin", "imp", "private")
    with pytest.raises(exceptions.QubesException, match="short read"):
        internal.call("internal.vm.volume.ImportEnd", "imp", "private", b"fail\nshort read")
    assert committed.read_bytes() == data
    with pytest.raises(exceptions.QubesException):
        internal.call("internal.vm.volume.ImportEnd", "imp", "private", b"ok")


def test_a_qube_of_a_windows_template_begins_with_its_private_data(
    client: AdminClient, world: World
) -> None:
    internal = AdminClient(world[0].root / "run/qubesd.internal.sock", timeout=30)
    client.call("admin.vm.Create.TemplateVM", "dom0", "", b"name=wintmpl label=black")
    path = internal.text("internal.vm.volume.ImportBegin", "wintmpl", "private", b"1048576")
    data = b"NTFS" * (MIB // 4)
    with Path(path.split(" ")[1]).open("r+b") as target:
        target.write(data)
    internal.call("internal.vm.volume.ImportEnd", "wintmpl", "private", b"ok")

    def private(name: str) -> tuple[str, bytes]:
        client.call("admin.vm.Create.AppVM", "dom0", "wintmpl", f"name={name} label=red".encode())
        info = client.info("admin.vm.volume.Info", name, "private")
        return info["size"], Path(info["path"].replace("-dirty.img", ".img")).read_bytes()[:MIB]

    assert private("other")[1] == bytes(MIB)
    client.call("admin.vm.feature.Set", "wintmpl", "os", b"Windows")
    assert private("winapp") == (str(MIB), data)


def test_firewall_and_notes(client: AdminClient, events: Listener) -> None:
    create(client, "fw")
    assert client.text("admin.vm.firewall.Get", "fw") == "action=accept\n"
    rules = b"action=accept dst4=1.2.3.4 proto=tcp dstports=80 comment=hello world\naction=drop\n"
    client.call("admin.vm.firewall.Set", "fw", payload=rules)
    events.until("firewall-changed", "fw")
    assert client.text("admin.vm.firewall.Get", "fw") == (
        "action=accept dst4=1.2.3.4/32 proto=tcp dstports=80-80 comment=hello world\naction=drop\n"
    )
    client.call("admin.vm.firewall.Reload", "fw")
    events.until("firewall-changed", "fw")
    client.call("admin.vm.notes.Set", "fw", payload="zażółć\n".encode())
    assert client.text("admin.vm.notes.Get", "fw") == "zażółć\n"
    client.call("admin.vm.notes.Set", "fw")
    assert client.text("admin.vm.notes.Get", "fw") == ""


def test_devices(client: AdminClient, events: Listener) -> None:
    create(client, "dev")
    payload = b"mode='required' frontend_domain='dev' _read-only='yes'"
    client.call("admin.vm.device.block.Assign", "dev", "dom0+sdz", payload)
    assert client.text("admin.vm.device.block.Assigned", "dev") == (
        "dom0+sdz:* device_id='*' port_id='sdz' devclass='block' backend_domain='dom0' "
        "mode='required' frontend_domain='dev' _read-only='yes'\n"
    )
    with pytest.raises(exceptions.DeviceAlreadyAssigned):
        client.call("admin.vm.device.block.Assign", "dev", "dom0+sdz", payload)
    client.call("admin.vm.device.block.Set.assignment", "dev", "dom0+sdz", b"ask-to-attach")
    assert "mode='ask-to-attach'" in client.text("admin.vm.device.block.Assigned", "dev")
    client.call("admin.vm.device.block.Unassign", "dev", "dom0+sdz")
    assert client.text("admin.vm.device.block.Assigned", "dev") == ""
    seen = events.until("device-unassign:block")
    assert [e.name for e in seen if e.name.startswith("device-")] == [
        "device-pre-assign:block",
        "device-assign:block",
        "device-pre-assign:block",
        "device-assignment-changed:block",
        "device-unassign:block",
    ]
    client.call("admin.vm.device.denied.Add", "dev", payload=b"u08****b******")
    assert client.text("admin.vm.device.denied.List", "dev") == "b******\nu08****"
    client.call("admin.vm.device.denied.Remove", "dev", payload=b"all")
    assert client.text("admin.vm.device.denied.List", "dev") == ""


def test_pools_and_labels(client: AdminClient, world: World) -> None:
    place = world[2] / "second"
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    client.call(
        "admin.pool.Add", arg="file-reflink", payload=f"name=second\ndir_path={place}\n".encode()
    )
    info = client.info("admin.pool.Info", arg="second")
    assert info["driver"] == "file-reflink" and info["dir_path"] == str(place)
    with pytest.raises(exceptions.QubesPoolInUseError):
        client.call(
            "admin.pool.Add", arg="file", payload=f"name=second\ndir_path={place}\n".encode()
        )
    client.call("admin.pool.Set.revisions_to_keep", arg="second", payload=b"3")
    assert client.info("admin.pool.Info", arg="second")["revisions_to_keep"] == "3"
    client.call("admin.pool.Remove", arg="second")
    assert "second" not in client.lines("admin.pool.List")
    client.call("admin.label.Create", arg="pink", payload=b"0xff00ff")
    assert client.text("admin.label.Get", arg="pink") == "0xff00ff"
    assert client.text("admin.label.Index", arg="pink") == "9"
    client.call("admin.label.Remove", arg="pink")


def test_disposables(client: AdminClient) -> None:
    create(client, "dvm")
    with pytest.raises(exceptions.QubesException):
        client.call("admin.vm.CreateDisposable", "dvm")
    client.set("dvm", "template_for_dispvms", "True")
    name = client.text("admin.vm.CreateDisposable", "dvm")
    assert name.startswith("disp")
    tags = client.lines("admin.vm.tag.List", name)
    assert {"created-by-dom0", "disp-created-by-dom0"} <= set(tags)
    assert client.get(name, "auto_cleanup").python is True
    uuid = client.text("admin.vm.CreateDisposable", "dvm", payload=b"uuid")
    assert client.qubes(uuid)[0].klass == "DispVM"
    client.call("admin.vm.Start", name)
    client.call("admin.vm.Kill", name)
    deadline = time.monotonic() + 20
    while name in [q.name for q in client.qubes()]:
        assert time.monotonic() < deadline, "the disposable was not removed"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "end", [("Kill", ""), ("Shutdown", ""), ("Shutdown", "wait"), ("Start", "")]
)
def test_who_ends_a_disposable_may_change_its_template_at_once(
    client: AdminClient, end: tuple[str, str]
) -> None:
    template = f"dvm{''.join(end)}"
    create(client, template)
    for how in ("Set", "Reset"):
        client.set(template, "template_for_dispvms", "True")
        name = client.text("admin.vm.CreateDisposable", template)
        if end[0] == "Start":
            client.call("admin.vm.feature.Set", name, "prohibit-start", b"no")
            with pytest.raises(exceptions.QubesException):
                client.call("admin.vm.Start", name)
        else:
            client.call("admin.vm.Start", name)
            client.call(f"admin.vm.{end[0]}", name, end[1])
        payload = b"False" if how == "Set" else b""
        client.call(f"admin.vm.property.{how}", template, "template_for_dispvms", payload)
        volumes = client.lines("admin.pool.volume.List", arg="varlibqubes")
        assert f"appvms/{name}/root" not in volumes
    client.call("admin.vm.Remove", template)


def test_clone_and_operations(client: AdminClient, world: World) -> None:
    create(client, "orig")
    client.set("orig", "memory", "500")
    client.call("admin.vm.tag.Set", "orig", "mine")
    client.call("bulkhead.vm.Clone", "orig", payload=b"name=copy")
    assert client.get("copy", "memory").python == 500
    assert "mine" in client.lines("admin.vm.tag.List", "copy")
    operations = [json.loads(line) for line in client.lines("bulkhead.op.List")]
    done = [o for o in operations if o["kind"] == "CLONE"]
    assert done[-1]["state"] == "succeeded"
    watched = list(client.events(method=f"bulkhead.op.Watch+{done[-1]['id']}"))
    assert [e.name for e in watched] == ["connection-established", "bulkhead-operation"]
    assert watched[1].values["state"] == "succeeded"
    with pytest.raises(exceptions.QubesException):
        client.call("bulkhead.op.Cancel", arg=done[-1]["id"])
    rows = [json.loads(line) for line in client.lines("bulkhead.vm.GetAll")]
    assert [r["name"] for r in rows] == [q.name for q in client.qubes()]


def test_state_and_stats_of_a_running_qube(client: AdminClient) -> None:
    create(client, "run")
    client.set("", "stats_interval", "1")
    client.call("admin.vm.Start", "run")
    words = dict(w.split("=") for w in client.text("admin.vm.CurrentState", "run").split())
    assert words["power_state"] == "Running" and int(words["mem"]) > 0
    rounds = []
    for event in client.events("run", "admin.vm.Stats"):
        if event.name == "vm-stats":
            rounds.append(event)
            if len(rounds) == 2:
                break
    assert list(rounds[0].values)[:7] == [
        "memory_kb",
        "memory_assigned_total",
        "memory_assigned_usable",
        "memory_with_swap_used",
        "cpu_time",
        "cpu_usage",
        "online_vcpus",
    ]
    assert rounds[0].subject == "run" and rounds[0].values["cpu_usage"] == "0"
    client.call("admin.vm.Kill", "run")
    with pytest.raises(exceptions.QubesVMNotRunningError):
        list(client.events("run", "admin.vm.Stats"))


def test_statistics_of_a_remote_qube_are_silent_until_it_is_removed(
    client: AdminClient, world: World
) -> None:
    client.call("admin.vm.Create.RemoteVM", payload=b"name=far label=red")
    client.set("", "stats_interval", "1")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(world[0].socket))
        peer.sendall(b"admin.vm.Stats+ dom0 name far\0")
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(4096) == b"1\0\0connection-established\0\0"
        peer.settimeout(2.5)
        with pytest.raises(TimeoutError):
            peer.recv(4096)
        client.call("admin.vm.Remove", "far")
        assert peer.recv(4096).startswith(b"2\0QubesVMNotRunningError\0")


def test_internal_and_misc(client: AdminClient, world: World) -> None:
    instance = world[0]
    internal = AdminClient(instance.root / "run/qubesd.internal.sock", timeout=30)
    misc = AdminClient(instance.root / "run/qubesd.misc.sock", source="tmpl", timeout=30)
    info = json.loads(internal.text("internal.GetSystemInfo"))["domains"]
    assert info["tmpl"]["type"] == "TemplateVM"
    misc.call("qubes.NotifyUpdates", payload=b"3\n")
    assert client.text("admin.vm.feature.Get", "tmpl", "updates-available") == "1"
    misc.call("qubes.NotifyUpdates", payload=b"0")
    assert client.text("admin.vm.feature.Get", "tmpl", "updates-available") == ""
    assert client.text("admin.vm.feature.Get", "tmpl", "last-update")
    with pytest.raises(exceptions.QubesVMNotRunningError):
        misc.call("qubes.FeaturesRequest")
    create(client, "sus")
    client.call("admin.vm.Start", "sus")
    internal.call("internal.SuspendPre")
    assert client.qubes("sus")[0].state in ("Paused", "Suspended")
    internal.call("internal.SuspendPost")
    assert client.qubes("sus")[0].state == "Running"
    client.call("admin.vm.Kill", "sus")


def test_policy_decides_what_other_sources_see(client: AdminClient, world: World) -> None:
    instance = world[0]
    create(client, "mgmt")
    create(client, "seen")
    client.call("admin.vm.tag.Set", "seen", "managed")
    guest = AdminClient(client.path, source="mgmt", timeout=30)
    assert guest.qubes() == []
    directory = instance.root / "etc/qubes/policy.d"
    directory.mkdir(parents=True, exist_ok=True)
    rules = directory / "30-user.policy"
    rules.write_text(
        "admin.vm.List * mgmt @tag:managed allow target=dom0\n"
        "admin.Events +domain-tag-add_visible mgmt @tag:managed allow target=dom0\n"
        "admin.Events +domain-delete mgmt @tag:managed allow target=dom0\n"
    )
    try:
        instance.until(
            lambda: [q.name for q in guest.qubes()] == ["seen"], 10, "the policy is in force"
        )
        listener = Listener(guest)
        client.call("admin.vm.tag.Set", "seen", "hidden")
        client.call("admin.vm.tag.Set", "mgmt", "visible")
        client.call("admin.vm.tag.Set", "seen", "visible")
        client.call("admin.vm.Remove", "seen")
        assert [(e.subject, e.name) for e in listener.until("domain-delete")] == [
            ("seen", "domain-tag-add:visible"),
            ("", "domain-delete"),
        ]
        listener.close()
    finally:
        rules.unlink()
    instance.until(lambda: not guest.qubes(), 10, "no policy again")


def test_reads_stay_fast_while_qubes_start(client: AdminClient) -> None:
    count = 12
    for number in range(count):
        create(client, f"fast{number}")
    with ThreadPoolExecutor(count) as pool:
        starts = [pool.submit(client.call, "admin.vm.Start", f"fast{n}") for n in range(count)]
        times = []
        while not all(start.done() for start in starts):
            begin = time.perf_counter()
            client.call("admin.vm.List")
            times.append(time.perf_counter() - begin)
        for start in starts:
            start.result()
        assert {q.state for q in client.qubes() if q.name.startswith("fast")} == {"Running"}
        list(pool.map(lambda n: client.call("admin.vm.Kill", f"fast{n}"), range(count)))
    # Far below what anybody notices, though this machine does other things as well.
    assert sorted(times)[len(times) // 2] < 0.05


def test_changes_are_held_while_the_registry_restarts(client: AdminClient, world: World) -> None:
    instance = world[0]
    create(client, "hold")
    listener = Listener(client)
    old = instance.kill("registry")
    assert client.qubes("hold")  # reads go on
    client.set("hold", "memory", "777")
    assert client.get("hold", "memory").python == 777
    instance.wait_restarted("registry", old)
    with pytest.raises(exceptions.QubesException, match="subscribe anew"):
        listener.until("never")
    listener.close()
    fresh = Listener(client)
    client.set("hold", "memory", "778")
    fresh.until("property-set:memory", "hold")
    fresh.close()


def test_no_refusal_while_the_admin_api_restarts(client: AdminClient, world: World) -> None:
    instance = world[0]
    old = instance.kill("adminapi")
    refused: list[str] = []

    def ask() -> None:
        try:
            client.call("admin.label.List")
        except exceptions.QubesException as error:
            refused.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    instance.wait_restarted("adminapi", old)
    assert refused == []
