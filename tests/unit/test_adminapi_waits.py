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


class Channel:
    """A service that does at once what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def call_with_header(self, method: str, *_: object, **__: object) -> tuple[Any, Any]:
        self.calls.append(method)
        return SimpleNamespace(revision=0, seq=0), None


async def _ask(backend: backend_module.Backend, method: str, timeout: float) -> None:
    await backend.call(method, cast(Any, None), cast(Any, None), timeout=timeout)


def test_what_was_told_as_done_has_ended_for_whoever_asks_next() -> None:
    async def run() -> None:
        replica, waits = _bench()
        replica.view.operations = {"op-1": _operation(OperationState.RUNNING)}
        channel = Channel()
        backend = backend_module.Backend.__new__(backend_module.Backend)
        backend.operations, backend._ending = waits, set()
        backend._context = cast(Any, SimpleNamespace(channel=lambda _: channel))
        backend._await_end("op-1")
        asked = asyncio.ensure_future(_ask(backend, "Registry.Mutate", 30.0))
        await asyncio.wait_for(_ask(backend, "Lifecycle.Submit", 30.0), 5.0)
        assert channel.calls == ["bulkhead.api.Lifecycle.Submit"] and not asked.done()
        ended = _operation(OperationState.SUCCEEDED)
        replica.view.operations = {"op-1": ended}
        waits.on_entry(Entry(1, 1, changes=(OperationPut(ended),)))
        await asyncio.wait_for(asked, 5.0)
        assert backend._ending == set()
        # An end that does not come holds up one call, and none after that.
        replica.view.operations = {"op-1": _operation(OperationState.RUNNING)}
        backend._await_end("op-1")
        await asyncio.wait_for(_ask(backend, "Registry.Mutate", 0.05), 5.0)
        await asyncio.wait_for(_ask(backend, "Registry.Mutate", 30.0), 5.0)
        assert len(channel.calls) == 4

    asyncio.run(run())
