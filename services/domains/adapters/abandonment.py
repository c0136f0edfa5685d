"""Calls to a hypervisor that a destroy of the same qube gives up.

Owns which calls of which qube are under way in this process. Must not know what they do
or how a destroy is made. Invariant: an abandoned call ends at once with
HypervisorError ABANDONED; a cancel of the caller still is a cancel.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from .hypervisor import Failure, HypervisorError

_R = TypeVar("_R")


class CallsUnderWay:
    """The calls of each qube, by its uuid."""

    def __init__(self) -> None:
        self._tasks: dict[str, set[asyncio.Task[Any]]] = {}

    async def run(self, uuid: str, call: Coroutine[Any, Any, _R], what: str) -> _R:
        """The call's result; ABANDONED when abandon() came first. what names it."""
        task = asyncio.ensure_future(call)
        tasks = self._tasks.setdefault(uuid, set())
        tasks.add(task)
        try:
            # Waiting, not awaiting: so a cancel of the inner task is told from one of ours.
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            tasks.discard(task)
            if not tasks:
                self._tasks.pop(uuid, None)
        if task.cancelled():
            raise HypervisorError(Failure.ABANDONED, f"{what} was cut short by a destroy")
        return task.result()

    def abandon(self, uuid: str) -> None:
        """Give up every call of the qube that is under way."""
        for task in list(self._tasks.get(uuid, ())):
            task.cancel()
