"""One suite for both places of enforcement: the kernel's worker and the plan."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bulkhead.model.firewall_rules import parse_lines
from services.firewall.adapters.enforcer_client import EnforcerClient
from services.firewall.adapters.planned_enforcer import PlannedEnforcer
from services.firewall.core import ruleset
from services.firewall.core.enforcement import Enforcer, EnforcerGone, KernelRefusal
from services.firewall.core.flows import Flow
from services.firewall.core.ruleset import TABLE, Transaction
from services.hostd.adapters.plumbing import Plumbing
from services.hostd.adapters.workers import Workers
from services.hostd.core.verbs import Names

A = "11111111-1111-4111-8111-111111111111"
B = "22222222-2222-4222-8222-222222222222"
NET = "99999999-9999-4999-8999-999999999999"
LINES = [
    "action=accept dst4=1.2.3.4/8 proto=tcp dstports=80-90",
    "action=drop proto=icmp icmptype=8",
    "action=accept dsthost=example.org",
    "action=accept specialtarget=dns",
    "action=drop proto=icmp",
    "action=accept proto=udp",
]
ADDRESSES = {"example.org": ("192.0.2.7", "2001:db8::7")}


@pytest.fixture(scope="module")
def namespace() -> Iterator[tuple[str, Path]]:
    directory = Path(tempfile.mkdtemp(prefix="bhen", dir="/tmp"))
    plumbing = Plumbing(Names.of_root(str(directory)))
    name = plumbing.ensure_namespace(6)
    try:
        yield name, directory
    finally:
        plumbing.delete_namespace(6)
        directory.rmdir()


@asynccontextmanager
async def real(name: str, directory: Path) -> AsyncIterator[Enforcer]:
    workers = Workers(directory, os.getuid(), logging.getLogger("lab"))

    async def spawn() -> str:
        return str((await workers.ensure(6, name))[1])

    client = EnforcerClient(spawn)
    try:
        # Whatever an earlier test left.
        await client.change(ruleset.remove_table())
        yield client
    finally:
        await client.close()
        await workers.close()


@pytest.fixture(params=["planned", "kernel"])
def story(
    request: pytest.FixtureRequest,
) -> Callable[[Callable[[Enforcer], Awaitable[None]]], None]:
    def run(work: Callable[[Enforcer], Awaitable[None]]) -> None:
        async def main() -> None:
            if request.param == "planned":
                await work(PlannedEnforcer())
            else:
                async with real(*request.getfixturevalue("namespace")) as enforcer:
                    await work(enforcer)

        asyncio.run(main())

    return run


Story = Callable[[Callable[[Enforcer], Awaitable[None]]], None]


def target(uuid: str = A, number: int = 20) -> ruleset.Target:
    return ruleset.make_target(
        uuid, "q", "b", NET, "bh-net-6", f"bhx{number}", f"10.137.0.{number}", f"fd09::{number}"
    )


COMPILED = ruleset.compile_rules(parse_lines(LINES), ADDRESSES)


def test_nothing_is_there_before_the_table(story: Story) -> None:
    async def work(enforcer: Enforcer) -> None:
        status = await enforcer.status()
        assert (status.present, dict(status.marks)) == (False, {})
        assert await enforcer.listing(ruleset.tag(A)) == ""
        assert await enforcer.rule_counters(ruleset.tag(A)) == {}
        with pytest.raises(KernelRefusal):
            await enforcer.change(ruleset.apply(target(), COMPILED))

    story(work)


def test_whole_life_of_a_chain(story: Story) -> None:
    async def work(enforcer: Enforcer) -> None:
        await enforcer.change(ruleset.define("up0", ("9.9.9.9", "2001:db8::53"), ()))
        status = await enforcer.status()
        assert status.present and status.counters == dict.fromkeys(ruleset.BASE_COUNTERS, (0, 0))
        for _ in range(2):
            done = ruleset.apply(target(), COMPILED)
            await enforcer.change(done)
            assert (await enforcer.status()).marks == done.marks
        counters = await enforcer.rule_counters(ruleset.tag(A))
        assert counters == dict.fromkeys([*(f"r{n}" for n in range(len(LINES))), "policy"], (0, 0))
        text = await enforcer.listing(ruleset.tag(A))
        assert f"chain q_{ruleset.tag(A)}" in text and text.count("accept") >= 5
        for _ in range(2):
            await enforcer.change(ruleset.withdraw(target()))
            assert (await enforcer.status()).marks == {}
        assert await enforcer.listing(ruleset.tag(A)) == ""

    story(work)


def test_define_replaces_whatever_was_there(story: Story) -> None:
    async def work(enforcer: Enforcer) -> None:
        await enforcer.change(ruleset.define("up0", (), [(target(), COMPILED)]))
        done = ruleset.define("up1", (), [(target(B, 21), COMPILED), (target(A, 22), ())])
        await enforcer.change(done)
        assert (await enforcer.status()).marks == done.marks
        assert set(await enforcer.rule_counters(ruleset.tag(A))) == {"policy"}

    story(work)


def test_place_is_taken_over_in_one_transaction(story: Story) -> None:
    async def work(enforcer: Enforcer) -> None:
        other = target(B, 21)
        await enforcer.change(ruleset.define("", (), [(target(), COMPILED), (other, COMPILED)]))
        await enforcer.change(ruleset.apply(target(A, 21), COMPILED, (target(), other)))
        assert set((await enforcer.status()).marks) == {ruleset.tag(A)}
        await enforcer.change(ruleset.apply(other, COMPILED, (target(A, 21),)))
        assert set((await enforcer.status()).marks) == {ruleset.tag(B)}

    story(work)


@pytest.mark.parametrize(
    "bad",
    [
        f"delete chain {TABLE} q_missing",
        f"add rule {TABLE} q_missing accept",
        f"add rule {TABLE} forward ip saddr @missing accept",
        f"add rule {TABLE} forward counter name missing drop",
        f'add element {TABLE} by_interface {{ "bhx20" : drop }}',
        f'delete element {TABLE} clients {{ "nobody" }}',
        f"delete chain {TABLE} q_{ruleset.tag(A)}",
    ],
)
def test_refused_transaction_changes_nothing(story: Story, bad: str) -> None:
    async def work(enforcer: Enforcer) -> None:
        await enforcer.change(ruleset.define("", (), [(target(), COMPILED)]))
        before = await enforcer.listing(ruleset.tag(A))
        flush = f"flush chain {TABLE} q_{ruleset.tag(A)}"
        with pytest.raises(KernelRefusal):
            await enforcer.change(
                Transaction((flush, f"add chain {TABLE} q_{ruleset.tag(A)}x", bad, bad), {})
            )
        assert await enforcer.listing(ruleset.tag(A)) == before
        with pytest.raises(KernelRefusal):
            await enforcer.change(Transaction((bad,), {}))

    story(work)


def test_mark_that_is_not_there_is_no_success(story: Story) -> None:
    async def work(enforcer: Enforcer) -> None:
        await enforcer.change(ruleset.define("", (), ()))
        commands = ruleset.apply(target(), COMPILED).commands
        with pytest.raises(KernelRefusal):
            await enforcer.change(Transaction(commands, {ruleset.tag(A): "0" * 16}))

    story(work)


def test_no_flows_in_an_idle_namespace_and_cutting_none_is_fine(story: Story) -> None:
    async def work(enforcer: Enforcer) -> None:
        assert await enforcer.flows(("10.137.0.20", "fd09::20")) == ()
        await enforcer.cut(())
        await enforcer.cut((Flow("10.137.0.20", "192.0.2.1", 6, 443),))

    story(work)


def test_thousand_rules(story: Story) -> None:
    async def work(enforcer: Enforcer) -> None:
        lines = [f"action=accept dst4=10.{n // 250}.{n % 250}.0/24" for n in range(1500)]
        await enforcer.change(ruleset.define("", (), ()))
        done = ruleset.apply(target(), ruleset.compile_rules(parse_lines(lines), {}))
        await enforcer.change(done)
        assert (await enforcer.status()).marks == done.marks
        assert len(await enforcer.rule_counters(ruleset.tag(A))) == 1501

    story(work)


# ---- what only the worker can show


def test_worker_survives_hostile_peers(namespace: tuple[str, Path]) -> None:
    async def main() -> None:
        async with real(*namespace) as enforcer:
            await enforcer.change(ruleset.define("", (), [(target(), COMPILED)]))
            before = await enforcer.status()
            path = str(namespace[1] / "e6.sock")
            requests = [
                b"\xff\xff\xff\xff",
                b"\0\0\0\1x",
                b"\0\0\0\2[]",
                *(
                    len(body).to_bytes(4, "big") + body
                    for body in (
                        b"{}",
                        b'{"op":"no"}',
                        b'{"op":"change"}',
                        b'{"op":"change","commands":"flush ruleset","marks":{}}',
                        b'{"op":"change","commands":["flush ruleset"],"marks":{}}',
                        b'{"op":"change","commands":["add table inet bulkhead; flush ruleset"],'
                        b'"marks":{}}',
                        b'{"op":"change","commands":["delete table inet bulkhead\\n"],"marks":{}}',
                        b'{"op":"listing","tag":"x ; flush ruleset"}',
                        b'{"op":"flows","addresses":["nonsense"]}',
                        b'{"op":"cut","flows":[{"source":"x"}]}',
                        b'{"op":"cut","flows":7}',
                    )
                ),
            ]
            for data in requests:
                reader, writer = await asyncio.open_unix_connection(path)
                writer.write(data)
                writer.write_eof()
                answer = await reader.read()
                assert not answer or json.loads(answer[4:])["ok"] is False
                writer.close()
            # More connections than it keeps: the oldest are dropped, we come back.
            held = []
            for _ in range(20):
                one = socket.socket(socket.AF_UNIX)
                one.connect(path)
                held.append(one)
            assert await enforcer.status() == before
            for one in held:
                one.close()

    asyncio.run(main())


def test_worker_that_cannot_be_started_is_gone() -> None:
    async def main() -> None:
        async def spawn() -> str:
            return "/nonexistent/socket"

        with pytest.raises(EnforcerGone):
            await EnforcerClient(spawn).status()

    asyncio.run(main())
