"""The firewall killed at each of its failpoints, and once more while it recovers.

Real processes of firewall and hostd, a real enforce worker in a real namespace, real
packets; only the registry is a stand-in that remembers what was announced.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bulkhead.api import firewall_pb2, registry_pb2
from bulkhead.bus.client import Channel
from bulkhead.bus.dispatch import Call
from bulkhead.bus.errors import BusError
from services.firewall.core import rules_file, ruleset
from services.firewall.failpoint_table import ROWS
from services.hostd.adapters.plumbing import in_namespace
from tests.fakes.bus import Answers, Instance
from tests.integration.network_lab import NETVM, PATIENCE_S, SERVER, Lab, ip, lab, uuid_of

pytestmark = pytest.mark.fault
_QIDS = iter(range(20, 250))
PACKAGE = "bulkhead.api.Firewall."


@dataclass
class World:
    """One instance with its processes."""

    runner: asyncio.Runner
    instance: Instance
    lab: Lab
    announced: dict[str, str] = field(default_factory=dict)
    events: list[tuple[str, str]] = field(default_factory=list)
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    keepers: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def armed(self) -> Path:
        return self.instance.root / "fp/armed"

    def fired(self) -> list[str]:
        path = self.armed.with_name("armed.fired")
        return path.read_text().split() if path.exists() else []

    async def announce(self, request: Any, call: Call) -> registry_pb2.AnnounceReply:
        if request.HasField("rules_digest"):
            self.announced[request.uuid] = request.rules_digest
        self.events += [(event.subject_uuid, event.name) for event in request.events]
        call.revision, call.seq = 1, len(self.events) + 1
        return registry_pb2.AnnounceReply()

    async def start(self, service: str) -> None:
        """Run the service, again whenever it dies by a failpoint."""
        environment = {**os.environ, "BULKHEAD_FAILPOINTS_FILE": str(self.armed)}
        command = (sys.executable, "-m", f"services.{service}", "--root", str(self.instance.root))
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stderr=subprocess.DEVNULL
        )
        self.processes[service] = process

        async def keep() -> None:
            nonlocal process
            while await process.wait() == -signal.SIGKILL:
                self.restarts[service] = self.restarts.get(service, 0) + 1
                process = await asyncio.create_subprocess_exec(
                    *command, env=environment, stderr=subprocess.DEVNULL
                )
                self.processes[service] = process

        self.keepers.append(asyncio.create_task(keep()))

    async def stop(self) -> None:
        for process in self.processes.values():
            if process.returncode is None:
                process.terminate()
        await asyncio.gather(*self.keepers)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with asyncio.Runner() as runner:
        instance = runner.run(Instance().__aenter__())
        (instance.root / "fp").mkdir()
        try:
            with lab(instance.root) as one:
                one.serve(8080)
                one.serve(9090)
                made = World(runner, instance, one)
                registry = Answers("Registry", own={"announce": made.announce})
                runner.run(_begin(made, registry))
                try:
                    yield made
                finally:
                    runner.run(made.stop())
        finally:
            runner.run(instance.__aexit__())


async def _begin(world: World, registry: Answers) -> None:
    await world.instance.serve("registry", registry, ["Registry"])
    await world.start("hostd")
    await world.start("firewall")


@dataclass
class Caller:
    """lifecycle and adminapi, which repeat what was not answered."""

    lifecycle: Channel
    adminapi: Channel

    async def __call__(self, method: str, request: Any, reply: Any, who: str = "lifecycle") -> Any:
        channel = self.lifecycle if who == "lifecycle" else self.adminapi
        async with asyncio.timeout(40):
            while True:
                try:
                    return await channel.call(PACKAGE + method, request, reply, timeout=8.0)
                except BusError as error:
                    if error.code not in ("UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED"):
                        raise
                await asyncio.sleep(0.05)


async def reach(one: Lab, qid: int, port: int) -> bool:
    return await asyncio.to_thread(one.reach, qid, port) == "yes"


async def must_reach(one: Lab, qid: int, port: int) -> bool:
    return await asyncio.to_thread(one.reach, qid, port, SERVER, PATIENCE_S) == "yes"


def stored(world: World, uuid: str) -> list[str]:
    """Actions and ports in the file; [] when there is none."""
    path = world.instance.root / f"var/lib/qubes/firewall/{uuid}.xml"
    if not path.exists():
        return []
    return [f"{rule.action}:{rule.dstports}" for rule in rules_file.parse(path.read_bytes())]


def kernel_commands(one: Lab, *commands: str) -> None:
    """Change the namespace's table from outside, as nobody should."""
    import nftables

    def work() -> None:
        nft = nftables.Nftables()
        code, _, error = nft.cmd("\n".join(commands) + "\n")
        assert code == 0, error

    in_namespace(one.namespace, work)


async def tell(world: World, caller: Caller, qid: int) -> None:
    """The whole life of a client's rules; every step is checked by its packets."""
    one, uuid, other = world.lab, uuid_of(qid), uuid_of(qid + 1000)
    name = f"q{qid}"

    async def set_rules(*lines: str) -> firewall_pb2.SetRulesReply:
        request = firewall_pb2.SetRulesRequest(uuid=uuid, qube=name, untrusted_rules=lines)
        found: firewall_pb2.SetRulesReply = await caller(
            "SetRules", request, firewall_pb2.SetRulesReply, "adminapi"
        )
        return found

    async def agree(port: int, closed: int) -> None:
        assert stored(world, uuid) == [f"accept:({port}, {port})"]
        async with asyncio.timeout(10):
            got = await caller(
                "GetRules",
                firewall_pb2.GetRulesRequest(uuid=uuid),
                firewall_pb2.GetRulesReply,
            )
            while world.announced.get(uuid) != got.digest:
                await asyncio.sleep(0.02)
        assert await must_reach(one, qid, port) and not await reach(one, qid, closed)

    await caller(
        "NetvmUp",
        firewall_pb2.NetvmUpRequest(uuid=NETVM, boot_id="n", namespace=one.namespace, uplink="up0"),
        firewall_pb2.NetvmUpReply,
    )
    await asyncio.to_thread(one.add_client, qid)
    assert not (await set_rules("action=accept proto=tcp dstports=8080")).applied
    target = firewall_pb2.FirewallTarget(
        uuid=uuid, qube=name, boot_id="b", netvm_uuid=NETVM, namespace=one.namespace
    )
    target.interface, target.ip = one.names.tap(qid), f"10.137.0.{qid}"
    await caller("Apply", firewall_pb2.ApplyRequest(target=target), firewall_pb2.ApplyReply)
    await asyncio.to_thread(one.plug, qid)
    await agree(8080, 9090)
    assert (await set_rules("action=accept proto=tcp dstports=9090")).applied
    await agree(9090, 8080)

    # Somebody else's verdict on the interface makes the kernel refuse the next change.
    tag = ruleset.tag(uuid)
    element = f'"{target.interface}" : goto q_{tag}'
    wrong = f'"{target.interface}" : drop'
    table = "inet bulkhead by_interface"
    kernel_commands(
        one, f"delete element {table} {{ {element} }}", f"add element {table} {{ {wrong} }}"
    )
    try:
        await set_rules("action=accept proto=tcp dstports=8080")
        refused = False
    except BusError as error:
        refused = error.reason == "KERNEL_REFUSED"
        assert refused, error
        assert not await reach(one, qid, 8080) and not await reach(one, qid, 9090)
    # A kill in the middle makes the firewall define the table anew: then it succeeds.
    assert refused or world.restarts.get("firewall", 0) or "enforce" in "".join(world.fired())
    await caller(
        "NetvmUp",
        firewall_pb2.NetvmUpRequest(uuid=NETVM, boot_id="n", namespace=one.namespace, uplink="up0"),
        firewall_pb2.NetvmUpReply,
    )
    await agree(*((9090, 8080) if refused else (8080, 9090)))

    for source, reply in ((uuid, "CopyRules"),):
        await caller(
            reply,
            firewall_pb2.CopyRulesRequest(source_uuid=source, target_uuid=other, target_qube="c"),
            firewall_pb2.CopyRulesReply,
        )
    assert stored(world, other) == stored(world, uuid)
    await caller(
        "Withdraw", firewall_pb2.WithdrawRequest(uuid=uuid, boot_id="b"), firewall_pb2.WithdrawReply
    )
    assert not await reach(one, qid, 9090) and not await reach(one, qid, 8080)
    for gone in (uuid, other):
        await caller(
            "DeleteRules",
            firewall_pb2.DeleteRulesRequest(uuid=gone),
            firewall_pb2.DeleteRulesReply,
        )
        assert stored(world, gone) == []
    left = await caller(
        "Inventory", firewall_pb2.FirewallInventoryRequest(), firewall_pb2.FirewallInventoryReply
    )
    assert not [item for item in left.items if item.uuid in (uuid, other)]
    assert (uuid, "firewall-changed") in world.events


async def _case(world: World, point: str) -> None:
    connections = [world.instance.connections(name) for name in ("lifecycle", "adminapi")]
    caller = Caller(*(connection.channel("firewall") for connection in connections))
    qid = next(_QIDS)
    world.armed.with_name("armed.fired").unlink(missing_ok=True)
    world.restarts.clear()
    if point:
        world.armed.write_text(f"{point}=kill|{point}=kill")
    try:
        await tell(world, caller, qid)
        if point:
            assert world.fired()[:1] == [point]
    finally:
        world.armed.unlink(missing_ok=True)
        for used in tuple(world.lab.clients):
            await asyncio.to_thread(world.lab.plumbing.unplug, used, True)
            await asyncio.to_thread(ip, "netns", "del", world.lab.clients.pop(used))


@pytest.mark.parametrize("point", ["", *sorted(ROWS)])
def test_story_ends_well_whatever_is_killed(world: World, point: str) -> None:
    world.runner.run(_case(world, point))
