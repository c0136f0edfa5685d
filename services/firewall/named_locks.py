"""The locks of qubes and of network qubes' tables.

Owns them by name. Must not know what they guard. Invariants: who waits longest is next;
nothing is kept of a name that nobody holds or waits for. A qube's lock is taken before a
table's, never after.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class NamedLocks:
    """One lock per name; kept only while somebody holds or waits for it."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @contextlib.asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        """Wait for the lock, and have it."""
        lock, users = self._locks.get(name, (asyncio.Lock(), 0))
        self._locks[name] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks.pop(name)
            if users > 1:
                self._locks[name] = (lock, users - 1)


def table_lock(netvm_uuid: str) -> str:
    """Name of the lock on a netvm's table; a netvm may be a client itself."""
    return f"table/{netvm_uuid}"
