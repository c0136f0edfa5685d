"""hostd's verbs on this machine's namespaces: repeatable, exact, and cleaned up."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from bulkhead.api import hostd_pb2
from bulkhead.bus.dispatch import Call
from bulkhead.bus.errors import BusError
from services.hostd.adapters.autostart import Autostart
from services.hostd.adapters.pci import PciBinding
from services.hostd.adapters.plumbing import NAMESPACES
from services.hostd.adapters.workers import Workers
from services.hostd.handlers import HostdHandlers
from tests.integration.network_lab import Lab, inside, ip, lab

pytestmark = pytest.mark.integration
CALL = Call("domains")
NOBODY = 65534


@pytest.fixture
def base() -> Iterator[Lab]:
    with lab() as made:
        yield made


def story(base: Lab, work: Callable[[HostdHandlers], Awaitable[None]], root: bool = True) -> None:
    async def main() -> None:
        sockets = base.root / "s"
        sockets.mkdir(exist_ok=True)
        workers = Workers(sockets, NOBODY, logging.getLogger("lab"))
        handlers = HostdHandlers(
            base.names,
            base.plumbing,
            workers,
            Autostart(base.root),
            PciBinding("vfio-pci", base.root / "sys"),
            is_root=lambda: root,
        )
        try:
            await work(handlers)
        finally:
            await workers.close()

    asyncio.run(main())


def links(namespace: str = "") -> list[str]:
    return [item["ifname"] for item in json.loads(ip("-j", "link", "show", namespace=namespace))]


def addresses(link: str, namespace: str) -> list[str]:
    shown = json.loads(ip("-j", "addr", "show", "dev", link, namespace=namespace))
    return [a["local"] for a in shown[0]["addr_info"] if a["scope"] == "global"]


PLUG = hostd_pb2.PlugRequest(
    qid=20, netvm_qid=6, ip="10.137.0.20", gateway="10.137.0.6", mac="00:16:3e:5e:6c:00"
)


def test_namespace_is_made_again_and_deleted_repeatably(base: Lab) -> None:
    async def work(hostd: HostdHandlers) -> None:
        request = hostd_pb2.EnsureNamespaceRequest(qid=7)
        names = {(await hostd.ensure_namespace(request, CALL)).namespace for _ in range(2)}
        assert names == {base.names.namespace(7)}
        # Nothing is forwarded until an enforce worker has loaded its rules.
        read = Path("/proc/sys/net/ipv4/ip_forward").read_text
        assert inside(base.names.namespace(7), read).strip() == "0"
        strict = Path("/proc/sys/net/ipv4/conf/all/rp_filter").read_text
        assert inside(base.names.namespace(7), strict).strip() == "1"
        for _ in range(2):
            await hostd.delete_namespace(hostd_pb2.DeleteNamespaceRequest(qid=7), CALL)
        assert not (NAMESPACES / base.names.namespace(7)).exists()

    story(base, work)


def test_rest_of_a_killed_creation_is_replaced(base: Lab) -> None:
    async def work(hostd: HostdHandlers) -> None:
        (NAMESPACES / base.names.namespace(7)).touch()
        await hostd.ensure_namespace(hostd_pb2.EnsureNamespaceRequest(qid=7), CALL)
        assert "lo" in links(base.names.namespace(7))
        await hostd.delete_namespace(hostd_pb2.DeleteNamespaceRequest(qid=7), CALL)

    story(base, work)


def test_tap_is_plugged_moved_and_unplugged(base: Lab) -> None:
    async def work(hostd: HostdHandlers) -> None:
        await hostd.ensure_namespace(hostd_pb2.EnsureNamespaceRequest(qid=7), CALL)
        tap = (await hostd.ensure_tap(hostd_pb2.EnsureTapRequest(qid=20), CALL)).tap
        assert tap == base.names.tap(20) and tap in links()
        for _ in range(2):
            reply = await hostd.plug(PLUG, CALL)
            assert (reply.tap, reply.namespace) == (tap, base.namespace)
        assert tap not in links() and addresses(tap, base.namespace) == ["10.137.0.6"]
        assert "10.137.0.20 dev" in ip("route", "show", namespace=base.namespace)
        neighbours = ip("neigh", "show", "dev", tap, namespace=base.namespace)
        assert "10.137.0.20 lladdr 00:16:3e:5e:6c:00 PERMANENT" in neighbours
        # A tap that is plugged counts as there.
        assert (await hostd.ensure_tap(hostd_pb2.EnsureTapRequest(qid=20), CALL)).tap == tap
        other = hostd_pb2.PlugRequest()
        other.CopyFrom(PLUG)
        other.netvm_qid, other.gateway, other.ip6, other.gateway6 = (
            7,
            "10.137.0.7",
            "fd09::14",
            "fd09::7",
        )
        await hostd.plug(other, CALL)
        namespace = base.names.namespace(7)
        assert tap not in links(base.namespace)
        assert sorted(addresses(tap, namespace)) == ["10.137.0.7", "fd09::7"]
        back = hostd_pb2.PlugRequest()
        back.CopyFrom(other)
        back.ip6 = back.gateway6 = ""
        await hostd.plug(back, CALL)
        assert addresses(tap, namespace) == ["10.137.0.7"]
        for _ in range(2):
            await hostd.unplug(hostd_pb2.UnplugRequest(qid=20), CALL)
            assert tap in links() and tap not in links(namespace)
        for _ in range(2):
            await hostd.unplug(hostd_pb2.UnplugRequest(qid=20, delete_tap=True), CALL)
            assert tap not in links()
        await hostd.delete_namespace(hostd_pb2.DeleteNamespaceRequest(qid=7), CALL)

    story(base, work)


def test_deleting_a_namespace_saves_the_taps_in_it(base: Lab) -> None:
    async def work(hostd: HostdHandlers) -> None:
        tap = (await hostd.ensure_tap(hostd_pb2.EnsureTapRequest(qid=20), CALL)).tap
        await hostd.plug(PLUG, CALL)
        await hostd.delete_namespace(hostd_pb2.DeleteNamespaceRequest(qid=6), CALL)
        assert tap in links()
        found = await hostd.inventory(hostd_pb2.HostInventoryRequest(), CALL)
        assert list(found.taps) == [tap] and not found.namespaces

    story(base, work)


def test_plugging_needs_tap_and_namespace(base: Lab) -> None:
    async def work(hostd: HostdHandlers) -> None:
        with pytest.raises(BusError) as failed:
            await hostd.plug(PLUG, CALL)
        assert failed.value.reason == "TAP_MISSING"
        await hostd.ensure_tap(hostd_pb2.EnsureTapRequest(qid=20), CALL)
        request = hostd_pb2.PlugRequest()
        request.CopyFrom(PLUG)
        request.netvm_qid = 8
        with pytest.raises(BusError) as failed:
            await hostd.plug(request, CALL)
        assert failed.value.reason == "NAMESPACE_MISSING"
        with pytest.raises(BusError) as failed:
            await hostd.spawn_enforcer(hostd_pb2.SpawnEnforcerRequest(qid=8), CALL)
        assert failed.value.reason == "NAMESPACE_MISSING"

    story(base, work)


def test_uplink_between_two_network_qubes(base: Lab) -> None:
    async def work(hostd: HostdHandlers) -> None:
        request = hostd_pb2.EnsureUplinkRequest(
            qid=7, uplink_qid=6, ip="10.137.0.7", gateway="10.137.0.6"
        )
        for _ in range(2):
            reply = await hostd.ensure_uplink(request, CALL)
            assert reply.interface == "up0" and reply.peer_namespace == base.namespace
            assert reply.peer in links(base.namespace)
        own = base.names.namespace(7)
        assert addresses("up0", own) == ["10.137.0.7"]
        assert addresses(reply.peer, base.namespace) == ["10.137.0.6"]
        assert "default via 10.137.0.6" in ip("route", "show", namespace=own)
        # Half of it lost, as after a kill between two moves: made anew.
        ip("link", "del", "up0", namespace=own)
        await hostd.ensure_uplink(request, CALL)
        assert addresses("up0", own) == ["10.137.0.7"]
        for _ in range(2):
            await hostd.delete_uplink(hostd_pb2.DeleteUplinkRequest(qid=7), CALL)
        assert reply.peer not in links(base.namespace)
        await hostd.delete_namespace(hostd_pb2.DeleteNamespaceRequest(qid=7), CALL)

    story(base, work)


def test_worker_has_one_capability_and_nothing_else(base: Lab) -> None:
    async def work(hostd: HostdHandlers) -> None:
        request = hostd_pb2.SpawnEnforcerRequest(qid=6)
        reply = await hostd.spawn_enforcer(request, CALL)
        assert (await hostd.spawn_enforcer(request, CALL)).pid == reply.pid
        path = Path(reply.socket)
        assert path.stat().st_uid == NOBODY and path.stat().st_mode & 0o777 == 0o600
        reader, writer = await asyncio.open_unix_connection(reply.socket)
        writer.write(b"\0\0\0\x0f" + b'{"op":"status"}')
        head = await reader.readexactly(4)
        answer = json.loads(await reader.readexactly(int.from_bytes(head, "big")))
        assert answer == {"ok": True, "present": False, "marks": {}, "counters": {}}
        writer.close()
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{reply.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        net_admin = f"{1 << 12:016x}"
        assert status["CapEff"] == status["CapPrm"] == status["CapBnd"] == net_admin
        assert status["CapAmb"] == status["CapInh"] == "0" * 16
        assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
        assert status["Uid"].split() == [str(NOBODY)] * 4 and status["Groups"].strip() == ""
        own = os.stat(f"/proc/{reply.pid}/ns/net").st_ino
        assert own == os.stat(NAMESPACES / base.namespace).st_ino
        found = await hostd.inventory(hostd_pb2.HostInventoryRequest(), CALL)
        assert list(found.enforcers) == [6]
        await hostd.delete_namespace(hostd_pb2.DeleteNamespaceRequest(qid=6), CALL)
        assert not path.exists() and not Path(f"/proc/{reply.pid}").exists()

    story(base, work)


def test_worker_that_dies_comes_back_on_the_same_socket(base: Lab) -> None:
    async def work(hostd: HostdHandlers) -> None:
        reply = await hostd.spawn_enforcer(hostd_pb2.SpawnEnforcerRequest(qid=6), CALL)
        os.kill(reply.pid, signal.SIGKILL)
        reader, writer = await asyncio.open_unix_connection(reply.socket)
        writer.write(b"\0\0\0\x0f" + b'{"op":"status"}')
        async with asyncio.timeout(10):
            assert len(await reader.readexactly(4)) == 4
        writer.close()
        again = await hostd.spawn_enforcer(hostd_pb2.SpawnEnforcerRequest(qid=6), CALL)
        assert again.pid != reply.pid and again.socket == reply.socket

    story(base, work)


def test_without_root_nothing_is_tried(base: Lab) -> None:
    async def work(hostd: HostdHandlers) -> None:
        with pytest.raises(BusError) as failed:
            await hostd.ensure_tap(hostd_pb2.EnsureTapRequest(qid=20), CALL)
        assert failed.value.reason == "NOT_ROOT"
        found = await hostd.inventory(hostd_pb2.HostInventoryRequest(), CALL)
        assert not found.taps and base.names.tap(20) not in links()

    story(base, work, root=False)


def test_autostart_through_the_message(base: Lab) -> None:
    async def work(hostd: HostdHandlers) -> None:
        await hostd.set_autostart(hostd_pb2.SetAutostartRequest(qube="work", enabled=True), CALL)
        wants = base.root / "etc/systemd/system/multi-user.target.wants"
        assert [path.name for path in wants.iterdir()] == ["qubes-vm@work.service"]

    story(base, work)


@pytest.mark.parametrize(
    "operation",
    [
        "hostd.namespace.after_add",
        "hostd.uplink.after_pair",
        "hostd.uplink.after_move",
        "hostd.tap.after_add",
        "hostd.plug.after_move",
        "hostd.unplug.after_move",
        "hostd.namespace.before_delete",
    ],
)
def test_verb_killed_in_the_middle_is_finished_by_its_repeat(base: Lab, operation: str) -> None:
    """A process that runs all verbs dies at the failpoint; another runs them again."""
    script = f"""
from services.hostd.adapters.plumbing import Plumbing
from services.hostd.core.verbs import Link, Names, uplink_link
p = Plumbing(Names({base.names.tag!r}))
p.ensure_uplink(9, {base.server!r}, uplink_link(9, "", ""))
p.ensure_tap(30, 0)
p.plug(30, 9, Link("10.137.0.30", "10.137.0.9"))
p.unplug(30, True)
p.delete_uplink(9)
p.delete_namespace(9)
"""
    import sys

    command = [sys.executable, "-c", script]
    killed = subprocess.run(
        command, env={**os.environ, "BULKHEAD_FAILPOINTS": f"{operation}=kill"}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    before = set(links(base.server))
    subprocess.run(command, check=True)
    assert base.names.tap(30) not in links()
    assert not (NAMESPACES / base.names.namespace(9)).exists()
    assert base.names.uplink(9) not in before & set(links(base.server))
