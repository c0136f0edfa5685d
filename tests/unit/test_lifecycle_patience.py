"""What waits too long for its turn is ended, with who was in its way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest

from bulkhead import codec
from bulkhead.api import registry_pb2
from bulkhead.bus.client import CallContext
from bulkhead.bus.errors import BusError
from bulkhead.bus.events import Entry
from bulkhead.model.records import Operation, OperationPut, OperationState
from bulkhead.model.specs import PauseSpec, ResizeSpec
from bulkhead.model.view import View
from clients.bus import RegistryClient
from services.lifecycle.patience import Patience
from tests.unit.plan_world import World, world

SHORT_S = 0.02
# More than an end takes, far less than a test may.
LIMIT_S = 20.0


class FakeRegistry:
    """Takes ends: refuses with the errors given, one after the other, then accepts."""

    def __init__(self, errors: Sequence[BusError] = ()) -> None:
        self.errors = list(errors)
        self.ends: asyncio.Queue[registry_pb2.EndRequest] = asyncio.Queue()

    async def end(
        self, request: registry_pb2.EndRequest, *, timeout: float, context: CallContext
    ) -> registry_pb2.EndReply:
        self.ends.put_nowait(request)
        if self.errors:
            raise self.errors.pop(0)
        return registry_pb2.EndReply()


class FakeReplica:
    def __init__(self, view: View) -> None:
        self.view = view


class Bench:
    """A qube held by RESIZE, PAUSE behind it, and a Patience that knows of both."""

    def __init__(self, registry: FakeRegistry, seconds: float = SHORT_S) -> None:
        self.world: World = world()
        self.world.start("work")
        self.registry = registry
        self.patience = Patience(
            cast(RegistryClient, registry), FakeReplica(self.world.view), seconds=seconds
        )
        self.holder = self.world.begin(ResizeSpec("work", "private", 2**32)).operation
        self.waits = self.world.begin(PauseSpec("work")).operation
        assert self.waits.state is OperationState.QUEUED

    def told(self, operation: Operation, seq: int = 1) -> None:
        self.world.view.apply(OperationPut(operation))
        self.patience.follow(Entry(seq, seq, changes=(OperationPut(operation),)))

    async def ended(self) -> registry_pb2.EndRequest:
        return await asyncio.wait_for(self.registry.ends.get(), LIMIT_S)


def run(bench: Bench, *, errors: int = 0) -> list[registry_pb2.EndRequest]:
    """Start, and take the first ends: one, and one more for each error."""

    async def play() -> list[registry_pb2.EndRequest]:
        bench.patience.start(7)
        task = asyncio.create_task(bench.patience.run())
        try:
            return [await bench.ended() for _ in range(1 + errors)]
        finally:
            task.cancel()

    return asyncio.run(play())


def test_the_end_names_the_holder_and_spares_whose_turn_came() -> None:
    bench = Bench(FakeRegistry())
    (request,) = run(bench)
    assert request.operation_id == bench.waits.id
    assert request.epoch == 7
    assert request.only_queued
    assert codec.operation_state_from_proto(request.outcome) is OperationState.FAILED
    problem = codec.problem_from_proto(request.error)
    assert problem.reason == "QUBE_BUSY"
    assert problem.metadata == {"qube": "work", "operation": bench.holder.id, "kind": "RESIZE"}


def test_a_registry_that_is_away_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.lifecycle.patience.RETRY_S", SHORT_S)
    away = BusError("UNAVAILABLE", "UNAVAILABLE", "restarting")
    first, second = run(Bench(FakeRegistry([away])), errors=1)
    assert first.operation_id == second.operation_id


def test_whose_turn_came_meanwhile_is_left_alone() -> None:
    late = BusError("FAILED_PRECONDITION", "WRONG_OPERATION_STATE", "it runs")
    bench = Bench(FakeRegistry([late]))

    async def play() -> None:
        bench.patience.start(7)
        task = asyncio.create_task(bench.patience.run())
        await bench.ended()
        async with asyncio.timeout(LIMIT_S):
            while bench.patience.waiting:
                await asyncio.sleep(0)
        task.cancel()
        assert bench.registry.ends.empty()

    asyncio.run(play())


def test_time_runs_for_those_that_wait_only() -> None:
    async def play() -> None:
        bench = Bench(FakeRegistry(), seconds=3600.0)
        bench.patience.start(1)
        assert bench.patience.waiting == 1
        bench.patience.start(1)
        assert bench.patience.waiting == 1
        bench.told(replace(bench.waits, state=OperationState.RUNNING))
        assert bench.patience.waiting == 0
        bench.told(bench.waits, 2)
        assert bench.patience.waiting == 1
        bench.told(replace(bench.waits, state=OperationState.CANCELLED), 3)
        assert bench.patience.waiting == 0
        # What is not known any more after a gap in the stream is forgotten.
        bench.told(bench.waits, 4)
        bench.world.view.operations.pop(bench.waits.id)
        bench.patience.follow(Entry(5, 5, resync=True))
        assert bench.patience.waiting == 0
        # A follow-up waits as long as it takes.
        bench.told(replace(bench.waits, data={**bench.waits.data, "follows": "1"}), 6)
        assert bench.patience.waiting == 0

    asyncio.run(play())
