"""Who is told that an operation's steps are done: at once, or not at all, but never late."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from bulkhead import codec
from bulkhead.api import registry_pb2
from bulkhead.bus.errors import BusError
from bulkhead.model.records import Operation
from bulkhead.model.specs import RemoveSpec
from services.lifecycle.executor import Executor, Outcome
from tests.unit.plan_world import World, world

# More than anything here takes; a waiter that nobody wakes waits for all of it.
LONG_S = 600.0
LIMIT_S = 20.0


class Registry:
    """Takes advances at once and ends when it is let."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.asked = asyncio.Event()
        self.may_end = asyncio.Event()
        self.refuses: BusError | None = None

    async def advance(self, _request: Any, **_: object) -> registry_pb2.AdvanceReply:
        return registry_pb2.AdvanceReply(operation=codec.operation_to_proto(self.operation))

    async def end(self, _request: Any, **_: object) -> registry_pb2.EndReply:
        self.asked.set()
        await self.may_end.wait()
        if self.refuses is not None:
            raise self.refuses
        return registry_pb2.EndReply(operation=codec.operation_to_proto(self.operation))


class Step:
    def __init__(self) -> None:
        self.may_do = asyncio.Event()

    async def forward(self, _context: object) -> Outcome:
        await self.may_do.wait()
        return Outcome()

    async def undo(self, _context: object) -> None:
        raise AssertionError("nothing is undone")


class Bench:
    """A removal under way, one step after the other held back."""

    def __init__(self) -> None:
        self.world: World = world()
        self.operation = self.world.begin(RemoveSpec("vault")).operation
        self.registry = Registry(self.operation)
        self.step = Step()
        replica: Any = SimpleNamespace(view=self.world.view, subscribe=lambda _: None)
        participants: Any = SimpleNamespace(registry=self.registry)
        steps: Any = {
            ("REMOVE", name): self.step for name in ("withdraw_rules", "undefine", "remove_volumes")
        }
        self.executor = Executor(participants, replica, steps)
        self.executor.epoch = 1
        self.executor.adopt(self.operation)

    def waiter(self) -> asyncio.Task[bool]:
        return asyncio.ensure_future(self.executor.carried_out(self.operation, LONG_S))


async def _result(waiter: asyncio.Task[bool]) -> bool:
    return await asyncio.wait_for(waiter, LIMIT_S)


def test_it_is_told_before_the_end_is_durable() -> None:
    async def play() -> None:
        bench = Bench()
        waiter = bench.waiter()
        bench.step.may_do.set()
        assert await _result(waiter) is True
        assert bench.registry.asked.is_set() and not bench.registry.may_end.is_set()
        await bench.executor.stop()

    asyncio.run(play())


def test_who_joins_after_the_others_were_told_waits_for_the_end_and_no_longer() -> None:
    async def play() -> None:
        bench = Bench()
        first = bench.waiter()
        bench.step.may_do.set()
        assert await _result(first) is True
        late = bench.waiter()
        await asyncio.sleep(0)
        assert not late.done()
        bench.registry.may_end.set()
        assert await _result(late) is False

    asyncio.run(play())


def test_who_waits_for_what_another_epoch_took_over_is_told_at_once() -> None:
    async def play() -> None:
        bench = Bench()
        bench.registry.refuses = BusError("FAILED_PRECONDITION", "STALE_EPOCH", "taken over")
        first = bench.waiter()
        bench.step.may_do.set()
        assert await _result(first) is True
        late = bench.waiter()
        await asyncio.sleep(0)
        bench.registry.may_end.set()
        assert await _result(late) is False
        # The record says that it runs; whoever has the new epoch goes on with it.
        for _ in range(20):
            await asyncio.sleep(0)
        assert bench.executor.running == 0
        bench.executor.adopt(bench.operation)
        assert bench.executor.running == 0

    asyncio.run(play())
