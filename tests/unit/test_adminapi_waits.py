"""Waiting for the view: woken by the stream, bounded by time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from bulkhead.bus.events import Entry
from services.adminapi.backend import OperationWaits


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
