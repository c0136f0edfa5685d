"""One call at a time for each qube.

Owns the locks by uuid and how many wait for each. Must not know what is done in a turn.
Invariants: turns of one qube come in the order of asking; a bounded number waits; no
qube waits for another, and nothing is kept of one that nobody waits for.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator

from .core.reasons import DomainsError

WAITERS = 8


class QubeQueue:
    """One call at a time per qube, a bounded number waiting, in order."""

    def __init__(self, waiters: int = WAITERS) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: collections.Counter[str] = collections.Counter()
        self._waiters = waiters

    @contextlib.asynccontextmanager
    async def turn(self, uuid: str) -> AsyncIterator[None]:
        """Wait for the qube's turn. DomainsError DOMAIN_BUSY when too many wait."""
        if self._users[uuid] > self._waiters:
            raise DomainsError(
                "DOMAIN_BUSY",
                f"{self._waiters} calls wait for the domain of {uuid} already; try again later.",
                uuid=uuid,
            )
        self._users[uuid] += 1
        lock = self._locks.setdefault(uuid, asyncio.Lock())
        try:
            async with lock:
                yield
        finally:
            self._users[uuid] -= 1
            if not self._users[uuid]:
                del self._users[uuid]
                self._locks.pop(uuid, None)
