"""Real packets through real rules: what passes, what is refused, what is silent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from bulkhead.bus.errors import BusError
from services.firewall.core import ruleset
from services.hostd.adapters.plumbing import in_namespace
from tests.integration.network_lab import (
    NETVM_QID,
    PATIENCE_S,
    SERVER,
    SERVER2,
    SERVER6,
    Lab,
    Place,
    inside,
    ip,
    lab,
    place,
    uuid_of,
)

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def base() -> Iterator[Lab]:
    with lab() as made:
        made.serve(8080)
        made.serve(9090)
        made.serve(53)
        made.serve(53, socket.SOCK_DGRAM)
        made.serve(9091, socket.SOCK_DGRAM)
        yield made


_QIDS = iter(range(20, 250))


def story(base: Lab, work: Callable[[Place, int], Awaitable[None]]) -> None:
    """Run with a keeper and the qid of a client that is gone afterwards."""

    async def main() -> None:
        qid = next(_QIDS)
        async with place(base) as made:
            try:
                await work(made, qid)
            finally:
                for used in tuple(base.clients):
                    await made.keeper.withdraw(uuid_of(used), "")
                    await asyncio.to_thread(base.plumbing.unplug, used, True)
                    name = base.clients.pop(used)
                    await asyncio.to_thread(ip, "netns", "del", name)

    asyncio.run(main())


async def reach(made: Place, qid: int, port: int, host: str = SERVER) -> str:
    return await asyncio.to_thread(made.lab.reach, qid, port, host)


async def opens(made: Place, qid: int, port: int, host: str = SERVER) -> bool:
    """A connection that must succeed, however busy the machine is."""
    return await asyncio.to_thread(made.lab.reach, qid, port, host, PATIENCE_S) == "yes"


async def udp(made: Place, qid: int, port: int, host: str = SERVER, source: str = "") -> str:
    return await asyncio.to_thread(made.lab.ask_udp, qid, port, host, source)


def test_allowed_works_and_the_rest_is_rejected(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        await made.start_client(qid, f"action=accept dst4={SERVER} proto=tcp dstports=8080")
        assert await opens(made, qid, 8080)
        assert await reach(made, qid, 9090) == "rejected"
        # Refusals by ICMP are limited per second by the kernel: later ones may be silent.
        assert await reach(made, qid, 8080, SERVER2) != "yes"
        assert await udp(made, qid, 9091) != "yes"
        assert not await asyncio.to_thread(base.ping, qid)
        rules, enforced, text = await made.keeper.effective(uuid_of(qid))
        assert enforced and rules[0].packets == 1 and "tcp dport 8080" in text

    story(base, work)


def test_default_rules_let_everything_out_and_nothing_in(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        await made.start_client(qid)
        assert await opens(made, qid, 8080)
        assert await udp(made, qid, 9091) == "yes"
        assert await asyncio.to_thread(base.ping, qid)
        # The server sees the netvm, not the client.
        assert base.heard[-1][0] == "10.137.0.6"
        ip(
            "route",
            "replace",
            f"10.137.0.{qid}/32",
            "via",
            "10.137.0.6",
            "dev",
            base.names.uplink(NETVM_QID),
            namespace=base.server,
        )
        before = (await made.counters())["between"]

        def send() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
                out.sendto(b"in", (f"10.137.0.{qid}", 7))

        in_namespace(base.server, send)
        assert (await made.counters())["between"] == before + 1

    story(base, work)


def test_first_matching_rule_wins(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        await made.start_client(qid, f"action=drop dst4={SERVER2}", "action=accept proto=tcp")
        assert await opens(made, qid, 8080)
        assert await reach(made, qid, 8080, SERVER2) != "yes"
        await made.set(qid, "action=accept proto=tcp", f"action=drop dst4={SERVER2}")
        assert await opens(made, qid, 8080, SERVER2)

    story(base, work)


def test_icmp_by_type(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        await made.start_client(qid, "action=accept proto=icmp icmptype=8")
        assert await asyncio.to_thread(base.ping, qid)
        await made.set(qid, "action=accept proto=icmp icmptype=13")
        assert not await asyncio.to_thread(base.ping, qid)

    story(base, work)


def test_ipv6_is_filtered_by_the_same_rules(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        await made.start_client(
            qid, f"action=accept dst6={SERVER6} proto=tcp dstports=8080", ip6=f"fd09::{qid}"
        )
        assert await opens(made, qid, 8080, SERVER6)
        assert await reach(made, qid, 9090, SERVER6) != "yes"
        await made.set(qid, "action=accept dst4=0.0.0.0/0")
        assert await reach(made, qid, 8080, SERVER6) != "yes"

    story(base, work)


def test_client_without_ipv6_cannot_use_it(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        await made.start_client(qid)
        name = base.clients[qid]
        ip("-6", "addr", "add", "fd09::99/128", "dev", "eth0", "nodad", namespace=name)
        ip("-6", "route", "add", "default", "dev", "eth0", namespace=name)
        gateway = ip("-br", "link", "show", base.names.tap(qid), namespace=base.namespace).split()[
            2
        ]
        ip("neigh", "add", SERVER6, "lladdr", gateway, "dev", "eth0", namespace=name)
        before = (await made.counters())["spoofed"]
        assert await reach(made, qid, 8080, SERVER6) == "silent"
        assert (await made.counters())["spoofed"] > before

    story(base, work)


def test_spoofed_source_is_dropped_and_counted(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        await made.start_client(qid)
        ip("addr", "add", "10.137.0.251/32", "dev", "lo", namespace=base.clients[qid])
        heard = len(base.heard)
        before = (await made.counters())["spoofed"]
        assert await udp(made, qid, 9091, source="10.137.0.251") == "silent"
        assert (await made.counters())["spoofed"] > before
        assert len(base.heard) == heard

    story(base, work)


def test_uplink_cannot_claim_a_clients_address(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        await made.start_client(qid)
        ip("addr", "add", f"10.137.0.{qid}/32", "dev", "lo", namespace=base.server)
        before = (await made.counters())["spoofed"]

        def send() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
                out.bind((f"10.137.0.{qid}", 0))
                out.sendto(b"x", ("10.137.0.6", 7))

        in_namespace(base.server, send)
        assert (await made.counters())["spoofed"] > before
        ip("addr", "del", f"10.137.0.{qid}/32", "dev", "lo", namespace=base.server)

    story(base, work)


def test_unknown_interface_is_dropped_before_and_after_its_rules(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        await asyncio.to_thread(base.add_client, qid)
        await asyncio.to_thread(base.plug, qid)
        before = (await made.counters())["unknown"]
        assert await reach(made, qid, 8080) == "silent"
        assert not await asyncio.to_thread(base.ping, qid, "10.137.0.6")
        assert (await made.counters())["unknown"] > before
        await made.keeper.apply(made.target(qid), False)
        assert await opens(made, qid, 8080)
        await made.keeper.withdraw(uuid_of(qid), "boot")
        assert await reach(made, qid, 8080) == "silent"

    story(base, work)


def test_two_clients_do_not_reach_each_other(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        other = next(_QIDS)
        await made.start_client(qid)
        await made.start_client(other)

        def listen() -> socket.socket:
            return socket.create_server(("0.0.0.0", 7000))

        with inside(base.clients[other], listen):
            before = (await made.counters())["between"]
            assert await reach(made, qid, 7000, f"10.137.0.{other}") == "silent"
            assert (await made.counters())["between"] > before

    story(base, work)


def test_dns_special_target_reaches_resolvers_only(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        await made.keeper.close()
        made.keeper = made.new_keeper((SERVER,))
        await made.up()
        await made.start_client(qid, "action=accept specialtarget=dns")
        # The virtual resolver leads to the real one.
        assert await udp(made, qid, 53, "10.139.1.1") == "yes"
        assert await opens(made, qid, 53, "10.139.1.2")
        assert await udp(made, qid, 53, SERVER) == "yes"
        assert await udp(made, qid, 53, SERVER2) != "yes"
        assert await udp(made, qid, 9091, SERVER) != "yes"
        await made.set(qid, "action=drop specialtarget=dns", "action=accept")
        assert await udp(made, qid, 53, "10.139.1.1") != "yes"
        assert await udp(made, qid, 9091, SERVER) == "yes"

    story(base, work)


def test_host_name_follows_its_answers(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        await made.start_client(
            qid, "action=accept dsthost=web.org proto=tcp", "action=accept proto=icmp"
        )
        assert await reach(made, qid, 8080) != "yes"
        assert await asyncio.to_thread(base.ping, qid)
        made.names["web.org"] = (SERVER,)
        await made.keeper.reload(uuid_of(qid), f"q{qid}")
        assert await opens(made, qid, 8080)
        assert await reach(made, qid, 8080, SERVER2) != "yes"

    story(base, work)


def test_tightened_rules_end_the_flow_and_leave_others(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        await made.start_client(qid)
        kept = await asyncio.to_thread(base.connect, qid, 8080)
        ended = await asyncio.to_thread(base.connect, qid, 9090)
        with kept, ended:
            started = time.monotonic()
            await made.set(qid, "action=accept proto=tcp dstports=8080")
            assert time.monotonic() - started < 1.0
            enforcer = await made.open_enforcer(base.namespace)
            ports = [flow.port for flow in await enforcer.flows((f"10.137.0.{qid}",))]
            await enforcer.close()
            assert ports == [8080]
            before = (await made.keeper.effective(uuid_of(qid)))[0][0].packets
            ended.send(b"more")
            kept.send(b"more")
            # What is sent on the ended flow is judged anew, and refused.
            with pytest.raises(OSError):
                ended.settimeout(2.0)
                ended.recv(10)
                ended.send(b"again")
            assert (await made.keeper.effective(uuid_of(qid)))[0][0].packets == before

    story(base, work)


def test_expiry_closes_without_any_call(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        await made.start_client(qid)
        task = asyncio.create_task(made.keeper.run_expiry())
        await made.set(qid, f"action=accept proto=tcp dstports=8080 expire={int(time.time()) + 2}")
        # set_rules drops nothing: the key order puts expire anywhere.
        assert await opens(made, qid, 8080)
        async with asyncio.timeout(10):
            while b"<rule>" in (base.root / f"rules/{uuid_of(qid)}.xml").read_bytes():
                await asyncio.sleep(0.05)
        assert await reach(made, qid, 8080) != "yes"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    story(base, work)


def test_full_disk_leaves_the_old_rules_in_file_and_kernel(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        rules = base.root / "rules"
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(rules)], check=True)
        try:
            await made.start_client(qid, "action=accept proto=tcp dstports=8080")
            path = rules / f"{uuid_of(qid)}.xml"
            old = path.read_bytes()
            with (rules / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
                while True:
                    filler.write(b"x" * 4096)
            with pytest.raises(BusError) as failed:
                await made.set(qid, "action=accept proto=tcp dstports=9090")
            assert failed.value.reason == "RULES_NOT_SAVED"
            assert path.read_bytes() == old
            assert sorted(found.name for found in rules.iterdir()) == [path.name, "filler"]
            lines = (await made.keeper.lines(uuid_of(qid)))[0]
            assert lines == ("action=accept proto=tcp dstports=8080-8080",)
            assert await opens(made, qid, 8080)
            assert await reach(made, qid, 9090) != "yes"
            (rules / "filler").unlink()
            await made.set(qid, "action=accept proto=tcp dstports=9090")
            assert await opens(made, qid, 9090)
        finally:
            subprocess.run(["umount", str(rules)], check=True)

    story(base, work)


# ---- atomic replacement, death of the worker


class Knocking:
    """Connects all the time from a client and counts what failed."""

    def __init__(self, one: Lab, qid: int, port: int, timeout: float = 3.0) -> None:
        self.ok = 0
        self.failed: list[str] = []
        self._stop = threading.Event()
        name = one.clients[qid]

        def run() -> None:
            while not self._stop.is_set():
                with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as made:
                    made.settimeout(timeout)
                    try:
                        made.connect((SERVER, port))
                        self.ok += 1
                    except OSError as error:
                        self.failed.append(repr(error))
                # Enough to meet every gap; more would only fill the connection tracker.
                self._stop.wait(0.0005)

        self._thread = threading.Thread(target=lambda: in_namespace(name, run))
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def test_replacing_rules_under_traffic_has_no_window_either_way(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        await made.start_client(qid, "action=accept proto=tcp dstports=8080")
        open_, shut = Knocking(base, qid, 8080), Knocking(base, qid, 9090, 0.2)
        try:
            for number in range(150):
                await made.set(
                    qid,
                    f"action=drop dst4=10.99.{number}.0/24",
                    "action=accept proto=tcp dstports=8080",
                )
        finally:
            await asyncio.to_thread(open_.stop)
            await asyncio.to_thread(shut.stop)
        assert open_.ok > 50 and not open_.failed
        assert len(shut.failed) > 3 and shut.ok == 0

    story(base, work)


def test_killed_worker_leaves_the_rules_and_comes_back(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        await made.start_client(qid, "action=accept proto=tcp dstports=8080")
        open_, shut = Knocking(base, qid, 8080), Knocking(base, qid, 9090, 0.2)
        try:
            for _ in range(3):
                pid, _ = await made.workers.ensure(NETVM_QID, base.namespace)
                os.kill(pid, signal.SIGKILL)
                await made.set(
                    qid, "action=accept proto=tcp dstports=8080", "action=drop proto=tcp"
                )
        finally:
            await asyncio.to_thread(open_.stop)
            await asyncio.to_thread(shut.stop)
        assert open_.ok and not open_.failed and shut.failed and not shut.ok
        assert await made.keeper.check_netvms() == ()

    story(base, work)


@pytest.mark.parametrize("point", ["before_commit", "after_commit"])
def test_worker_killed_inside_an_apply_ends_in_the_new_policy(
    base: Lab, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = base.root / f"fp-{point}"
    directory.mkdir()
    armed = directory / "armed"
    monkeypatch.setenv("BULKHEAD_FAILPOINTS_FILE", str(armed))

    async def work(made: Place, qid: int) -> None:
        await made.start_client(qid, "action=accept proto=tcp dstports=8080")
        shut = Knocking(base, qid, 53, 0.2)
        try:
            armed.write_text(f"firewall.enforce.{point}=kill")
            await made.set(qid, "action=accept proto=tcp dstports=9090")
        finally:
            await asyncio.to_thread(shut.stop)
        assert (directory / "armed.fired").read_text() == f"firewall.enforce.{point}\n"
        assert shut.failed and not shut.ok
        assert await opens(made, qid, 9090)
        assert await reach(made, qid, 8080) != "yes"
        assert await made.keeper.check_netvms() == ()

    story(base, work)


def test_restarted_firewall_adopts_what_the_kernel_holds(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        await made.start_client(qid, "action=accept proto=tcp dstports=8080")
        assert await opens(made, qid, 8080)
        packets = (await made.keeper.effective(uuid_of(qid)))[0][0].packets
        await made.keeper.close()
        made.keeper = made.new_keeper()
        await made.keeper.adopt()
        # Not made anew: the counters went on.
        assert (await made.keeper.effective(uuid_of(qid)))[0][0].packets == packets
        await made.set(qid, "action=drop")
        assert await reach(made, qid, 8080) != "yes"

    story(base, work)


def test_kernel_that_refuses_closes_that_qube_only(base: Lab) -> None:
    async def work(made: Place, qid: int) -> None:
        other = next(_QIDS)
        await made.start_client(qid, "action=accept")
        await made.start_client(other, "action=accept")
        old = (base.root / f"rules/{uuid_of(qid)}.xml").read_bytes()
        enforcer = await made.open_enforcer(base.namespace)
        # Somebody else's object of the same name but another kind: the kernel must refuse.
        tag = ruleset.tag(uuid_of(qid))
        done = ruleset.Transaction((f"flush chain inet bulkhead g_{tag}",), {})
        await enforcer.change(done)
        await enforcer.close()
        original = ruleset.apply

        def broken(*arguments: object, **named: object) -> ruleset.Transaction:
            made_one = original(*arguments, **named)  # type: ignore[arg-type]
            bad = 'add rule inet bulkhead forward iifname "x" goto q_nowhere'
            monkey["left"] -= 1
            return (
                made_one
                if monkey["left"] < 0
                else ruleset.Transaction((*made_one.commands, bad), made_one.marks)
            )

        monkey = {"left": 1}
        ruleset.apply = broken
        try:
            with pytest.raises(Exception, match="kernel refused"):
                await made.set(qid, "action=accept proto=tcp")
        finally:
            ruleset.apply = original
        assert (base.root / f"rules/{uuid_of(qid)}.xml").read_bytes() == old
        assert await reach(made, qid, 8080) != "yes"
        assert await opens(made, other, 8080)

    story(base, work)
