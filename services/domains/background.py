"""Work that nobody waits for.

Owns the tasks that are under way. Must not know what they do. Invariant: a task that
fails is logged, and after stop() none runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any


class Background:
    """Tasks of this service, each on its own."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        # Under way.
        self.tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin the work; it runs once the caller awaits something."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._log.error("background work failed", exc_info=task.exception())

    async def stop(self) -> None:
        """Cancel what is under way and wait until it has ended."""
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
