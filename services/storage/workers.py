"""Threads for blocking work, per pool, and the locks of volumes.

Owns which thread does what and who waits. Must not know drivers or messages. Invariants:
a pool that hangs keeps only its own threads; a volume's lock is held until the thread
that works on it is really done, also when nobody waits for the answer any more; nothing
waits without bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeVar

from services.storage.core.reasons import StorageRefusal

_T = TypeVar("_T")

THREADS = 4
WAITING = 64
GROUPS = 64


class _Group:
    """Up to `threads` daemon threads: one that hangs does not keep the process alive."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self.pending = 0
        self._most = threads
        self._threads = 0
        self._idle = 0
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def submit(self, job: Callable[[], None]) -> None:
        with self._lock:
            if self._idle == 0 and self._threads < self._most:
                self._threads += 1
                threading.Thread(
                    target=self._loop, name=f"pool-{self.name}-{self._threads}", daemon=True
                ).start()
            else:
                self._idle = max(0, self._idle - 1)
        self._jobs.put(job)

    def end(self) -> None:
        """Threads leave once they are idle."""
        for _ in range(self._most):
            self._jobs.put(None)

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            with self._lock:
                self._idle += 1


class Workers:
    """Groups of threads by name, made at first use; idle groups end beyond GROUPS."""

    def __init__(self, threads: int = THREADS, waiting: int = WAITING) -> None:
        self._threads = threads
        self._waiting = waiting
        self._groups: dict[str, _Group] = {}

    async def run(self, group: str, function: Callable[[], _T], threads: int = 0) -> _T:
        """function() in a thread of the group; raises what it raises. POOL_BUSY.

        A cancelled wait leaves the function running.
        """
        chosen = self._group(group, threads)
        if chosen.pending >= self._waiting:
            raise StorageRefusal(
                "POOL_BUSY",
                f"{self._waiting} calls wait for pool {group} already; try again later",
                pool=group,
            )
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()
        chosen.pending += 1

        def settle(error: BaseException | None, value: Any) -> None:
            chosen.pending -= 1
            if future.cancelled():
                return
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

        def job() -> None:
            error: BaseException | None = None
            value: Any = None
            try:
                value = function()
            except BaseException as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(settle, error, value)

        chosen.submit(job)
        return await future

    def _group(self, name: str, threads: int) -> _Group:
        group = self._groups.pop(name, None)
        if group is None:
            for old in list(self._groups)[: max(0, len(self._groups) + 1 - GROUPS)]:
                if self._groups[old].pending == 0:
                    self._groups.pop(old).end()
            group = _Group(name, threads or self._threads)
        self._groups[name] = group  # the most recently used one is last
        return group


class VolumeLocks:
    """One holder per volume; several at once are taken in one order."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @contextlib.asynccontextmanager
    async def hold(self, keys: Iterable[str]) -> AsyncIterator[None]:
        """Wait for all of keys, hold them."""
        async with contextlib.AsyncExitStack() as stack:
            for key in sorted(set(keys)):
                await stack.enter_async_context(self._one(key))
            yield

    @contextlib.asynccontextmanager
    async def _one(self, key: str) -> AsyncIterator[None]:
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[key]
            if users == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, users - 1)

    def held(self, key: str) -> bool:
        """True while anybody holds or waits for the key."""
        return key in self._locks
