"""The way of facts to the registry: order, completeness, restarts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from bulkhead.bus.errors import bus_error
from bulkhead.model.records import Fact, HostFact, PowerFact, fact_key
from services.domains import reporter as module
from services.domains.reporter import Reporter

LOG = logging.getLogger("test")


class Registry:
    """A registry's memory of our facts; can be away, and can restart."""

    def __init__(self) -> None:
        self.held: dict[str, Fact] = {}
        self.messages: list[tuple[list[Fact], list[str], bool]] = []
        self.away = False
        self.runs = 1

    def restart(self) -> None:
        self.held.clear()
        self.runs += 1

    async def facts(self, put: list[Fact], removed: list[str], complete: bool) -> None:
        self._check()
        self.messages.append((put, removed, complete))
        if complete:
            self.held.clear()
        for key in removed:
            self.held.pop(key, None)
        self.held.update({fact_key(fact): fact for fact in put})

    async def instance(self) -> str:
        self._check()
        return str(self.runs)

    async def epoch(self) -> int:
        return 41 + self.runs

    def _check(self) -> None:
        if self.away:
            raise bus_error("NOT_CONNECTED", "away")


def power(uuid: str, number: int, word: str = "running", boot_id: str = "b") -> PowerFact:
    return PowerFact(uuid, boot_id, number, word)


def scenario(
    steps: Callable[[Reporter, Registry, list[int]], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)

    async def run() -> None:
        registry, epochs = Registry(), list[int]()
        reporter = Reporter(registry, epochs.append, LOG)
        task = asyncio.ensure_future(reporter.run())
        try:
            await steps(reporter, registry, epochs)
        finally:
            task.cancel()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_nothing_is_told_before_the_first_inventory(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(reporter: Reporter, registry: Registry, epochs: list[int]) -> None:
        reporter.put([HostFact("sim"), power("u", 1)])
        while not epochs:
            await asyncio.sleep(0)
        assert registry.messages == []
        reporter.release()
        await reporter.flushed(5)
        assert [complete for _, _, complete in registry.messages] == [True]
        assert registry.held == reporter.table()

    scenario(steps, monkeypatch)


def test_the_first_picture_ends_with_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations begin as soon as the host is known: then all the rest has to be."""

    async def steps(reporter: Reporter, registry: Registry, epochs: list[int]) -> None:
        reporter.put([HostFact("sim"), *(power(f"u{n}", 1) for n in range(600))])
        reporter.release()
        for _ in range(2):
            await reporter.flushed(5)
            told = [fact for put, _, _ in registry.messages for fact in put]
            assert len(registry.messages) == 3 and len(told) == 601
            assert told[-1] == HostFact("sim")
            registry.messages.clear()
            registry.restart()
            while not registry.messages:
                await asyncio.sleep(0.01)

    scenario(steps, monkeypatch)


def test_changes_arrive_in_order_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(reporter: Reporter, registry: Registry, epochs: list[int]) -> None:
        reporter.release()
        await reporter.flushed(5)
        told = [power("u", n, boot_id=f"b{n // 2}") for n in range(50)]
        for fact in told:
            reporter.put([fact, fact])
        reporter.remove(["power/none", "power/u"])
        reporter.put([power("v", 1)])
        await reporter.flushed(5)
        assert [fact for put, _, complete in registry.messages if not complete for fact in put] == [
            *told,
            power("v", 1),
        ]
        assert registry.held == {"power/v": power("v", 1)}

    scenario(steps, monkeypatch)


def test_a_restarted_registry_gets_everything_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(reporter: Reporter, registry: Registry, epochs: list[int]) -> None:
        reporter.put([HostFact("sim"), *(power(f"u{n}", 1) for n in range(600))])
        reporter.release()
        await reporter.flushed(5)
        assert len(registry.held) == 601
        registry.restart()
        while len(registry.held) < 601:
            await asyncio.sleep(0.01)
        assert registry.held == reporter.table()
        assert epochs == [42, 43]

    scenario(steps, monkeypatch)


def test_what_happens_while_the_registry_is_away_is_told_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def steps(reporter: Reporter, registry: Registry, epochs: list[int]) -> None:
        reporter.release()
        await reporter.flushed(5)
        registry.away = True
        reporter.put([power("u", 1), power("u", 2, "halted"), power("u", 3, boot_id="b2")])
        for _ in range(10):
            await asyncio.sleep(0.01)
        registry.away = False
        await reporter.flushed(5)
        told = [fact for put, _, _ in registry.messages for fact in put]
        assert told == [power("u", 1), power("u", 2, "halted"), power("u", 3, boot_id="b2")]

    scenario(steps, monkeypatch)


def test_an_overflowing_queue_turns_into_one_complete_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "QUEUE", 10)

    async def steps(reporter: Reporter, registry: Registry, epochs: list[int]) -> None:
        reporter.release()
        await reporter.flushed(5)
        for number in range(100):
            reporter.put([power("u", number)])
        await reporter.flushed(5)
        assert registry.held == {"power/u": power("u", 99)}
        assert registry.messages[-1][2]

    scenario(steps, monkeypatch)


def test_ends_are_kept_for_a_while_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HALTED_KEPT", 3)

    async def steps(reporter: Reporter, registry: Registry, epochs: list[int]) -> None:
        for number in range(10):
            reporter.put([power(f"u{number}", 1, "halted")])
        reporter.put([power("up", 1)])
        assert sorted(reporter.table()) == ["power/u7", "power/u8", "power/u9", "power/up"]

    scenario(steps, monkeypatch)
