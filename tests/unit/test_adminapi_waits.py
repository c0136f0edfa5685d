"""Waiting for the view and for operations: woken by the stream, bounded by time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bulkhead.bus.events import Entry
from bulkhead.model.records import Operation, OperationPut, OperationState, Problem
from bulkhead.model.specs import CreateSpec
from services.adminapi import backend as backend_module
from services.adminapi.backend import OperationFailed, OperationWaits
from services.adminapi.core.exceptions import WireRefusal


def _bench() -> tuple[SimpleNamespace, OperationWaits]:
    replica = SimpleNamespace(view=SimpleNamespace(number=0))
    return replica, OperationWaits(cast(Any, replica))


def test_a_wait_ends_with_the_entry_that_fulfils_it() -> None:
    async def run() -> None:
        replica, waits = _bench()

        def reached(number: int) -> asyncio.Task[bool]:
            return asyncio.ensure_future(
                waits.until(lambda view: cast(Any, view).number >= number, 30.0)
            )

        first, second = reached(1), reached(2)
        await asyncio.sleep(0)
        replica.view.number = 1
        waits.on_entry(Entry(1, 1))
        assert await asyncio.wait_for(first, 5.0) is True
        assert not second.done()
        replica.view.number = 2
        waits.on_entry(Entry(2, 2))
        assert await asyncio.wait_for(second, 5.0) is True

    asyncio.run(run())


def test_a_wait_for_what_does_not_come_ends_in_time() -> None:
    async def run() -> bool:
        _, waits = _bench()
        return await asyncio.wait_for(waits.until(lambda _: False, 0.01), 5.0)

    assert asyncio.run(run()) is False


def test_what_holds_already_is_not_waited_for() -> None:
    async def run() -> bool:
        _, waits = _bench()
        return await waits.until(lambda _: True, 0.0)

    assert asyncio.run(run()) is True


def _operation(state: OperationState) -> Operation:
    return Operation(
        id="op-1",
        kind="CREATE",
        spec=CreateSpec(name="x", klass="AppVM", label="red"),
        subjects=("x",),
        state=state,
        source="dom0",
        error=Problem("INTERNAL", "BOOM", "the disk is on fire"),
    )


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (OperationState.STUCK, "CREATE is stuck: the disk is on fire;"),
        (OperationState.COMPENSATING, "CREATE failed: the disk is on fire; taking back"),
    ],
)
def test_who_waits_for_what_does_not_end_is_told_why(
    state: OperationState, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "_PATIENCE", dict.fromkeys(backend_module._PATIENCE, 0.01))

    async def run() -> None:
        replica, waits = _bench()
        replica.view.operations = {"op-1": _operation(state)}
        backend = backend_module.Backend.__new__(backend_module.Backend)
        backend.operations = waits
        with pytest.raises(WireRefusal, match=words) as caught:
            await asyncio.wait_for(backend.succeeded("op-1"), 5.0)
        assert caught.value.reason == "OPERATION_STUCK"

    asyncio.run(run())


def test_the_end_of_taking_back_is_waited_for() -> None:
    async def run() -> None:
        replica, waits = _bench()
        replica.view.operations = {"op-1": _operation(OperationState.COMPENSATING)}
        backend = backend_module.Backend.__new__(backend_module.Backend)
        backend.operations = waits
        task = asyncio.ensure_future(backend.succeeded("op-1"))
        await asyncio.sleep(0)
        failed = _operation(OperationState.FAILED)
        replica.view.operations = {"op-1": failed}
        waits.on_entry(Entry(1, 1, changes=(OperationPut(failed),)))
        with pytest.raises(OperationFailed, match="the disk is on fire"):
            await asyncio.wait_for(task, 5.0)

    asyncio.run(run())
