"""Blocking work of a call: in its pool's threads, under its volumes' locks, in its time.

Owns the locks, and the work that nobody waits for any more. Must not know what is done.
Invariants: a call works only while it holds its volumes' locks, in a thread of its pool;
locks go when the work has really ended; the work of one request goes on to all its ends
before the first failure is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

from bulkhead.bus.dispatch import Call
from bulkhead.model.records import Pool, Volume
from services.storage.core.reasons import StorageRefusal, from_os_error
from services.storage.drivers.interface import Cancel, Driver
from services.storage.drivers.load import open_pool
from services.storage.messages import Spec
from services.storage.workers import VolumeLocks, Workers

_LOG = logging.getLogger("bulkhead.storage")

# How often a wait looks whether its caller is still there.
POLL_S = 0.2
# What a cancelled copy gets to end in order, before its answer is sent without it.
GRACE_S = 1.0
# Part of a deadline that is kept for the answer itself.
MARGIN_S = 0.1

_T = TypeVar("_T")


class Jobs:
    """Work of all calls; refusals and the errors of the work come to who waits for it."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._locks = VolumeLocks()
        self._abandoned: set[asyncio.Task[Any]] = set()

    @property
    def abandoned(self) -> int:
        """How much goes on although nobody waits for it."""
        return len(self._abandoned)

    def held(self, key: str) -> bool:
        """Somebody works on the volume, or is about to."""
        return self._locks.held(key)

    async def work(
        self,
        call: Call,
        group: str,
        keys: Iterable[str],
        what: str,
        function: Callable[[Cancel], _T],
    ) -> _T:
        """function(cancel) in a thread of the group, while the keys are held.

        When the caller gives up or its time is over, the copy is told to end; keys stay
        held until it has. what: for messages, "start of volume X".
        """
        cancel = Cancel()

        async def locked() -> _T:
            async with self._locks.hold(keys):
                cancel.check()
                return await self._workers.run(group, lambda: function(cancel))

        task = asyncio.get_running_loop().create_task(locked(), name=what)
        try:
            while True:
                left = call.deadline.remaining() - MARGIN_S
                await asyncio.wait({task}, timeout=max(0.0, min(POLL_S, left)))
                if task.done():
                    break
                if call.cancelled or left <= 0:
                    cancel.set()
                    await asyncio.wait({task}, timeout=GRACE_S if call.cancelled else 0)
                    if not task.done() or not call.cancelled:
                        break
        except asyncio.CancelledError:
            cancel.set()
            self._abandon(task)
            raise
        if not task.done():
            self._abandon(task)
            raise StorageRefusal(
                "POOL_TIMEOUT",
                f"{what} is not done in time: pool {group} is slow or hangs; ask again",
                pool=group,
                what=what,
            )
        try:
            return task.result()
        except OSError as error:
            _LOG.warning("%s failed: %s", what, error)
            raise from_os_error(error, what) from error

    def _abandon(self, task: asyncio.Task[Any]) -> None:
        """Nobody waits for it any more; its locks go when it ends."""
        self._abandoned.add(task)

        def ended(done: asyncio.Task[Any]) -> None:
            self._abandoned.discard(done)
            if not done.cancelled() and (error := done.exception()) is not None:
                _LOG.warning("%s, abandoned before, ended with: %s", done.get_name(), error)

        task.add_done_callback(ended)

    async def on_volume(
        self, call: Call, item: Spec, verb: str, function: Callable[[Driver, Cancel], _T]
    ) -> _T:
        """function(driver, cancel) in a thread of the volume's pool, its lock held."""
        driver = open_pool(item.pool)
        return await self.work(
            call,
            item.pool.name,
            [item.key],
            f"{verb} of volume {item.volume.vid or item.volume.name}",
            lambda cancel: function(driver, cancel),
        )

    async def on_pool(
        self, call: Call, pool: Pool, verb: str, function: Callable[[Driver, Cancel], _T]
    ) -> _T:
        """function(driver, cancel) in a thread of the pool, whose layout nobody else changes."""
        driver = open_pool(pool)
        return await self.work(
            call,
            pool.name,
            [f"{pool.name}:"],
            f"{verb} of pool {pool.name}",
            lambda cancel: function(driver, cancel),
        )

    async def each(
        self,
        call: Call,
        items: Sequence[Spec],
        verb: str,
        function: Callable[[Driver, Volume], _T],
    ) -> list[_T]:
        """function(driver, volume) of every item in order, those of one pool in one thread.

        For what takes no time worth a thread each. Every item's turn comes, then the first
        failure, if any.
        """
        pools: dict[str, list[int]] = {}
        for number, item in enumerate(items):
            pools.setdefault(item.pool.name, []).append(number)
        results: dict[int, _T] = {}

        async def of_pool(numbers: Sequence[int]) -> None:
            driver = open_pool(items[numbers[0]].pool)

            def work(_: Cancel) -> None:
                failed: Exception | None = None
                for number in numbers:
                    try:
                        results[number] = function(driver, items[number].volume)
                    except (OSError, StorageRefusal) as error:
                        failed = failed or error
                if failed is not None:
                    raise failed

            chosen = [items[number] for number in numbers]
            names = ", ".join(item.volume.vid or item.volume.name for item in chosen)
            await self.work(
                call,
                chosen[0].pool.name,
                [item.key for item in chosen],
                f"{verb} of volume{'s' * (len(chosen) > 1)} {names}",
                work,
            )

        await self.all([of_pool(numbers) for numbers in pools.values()])
        return [results[number] for number in range(len(items))]

    @staticmethod
    async def all(jobs: Sequence[Awaitable[_T]]) -> list[_T]:
        """Every job to its end, then the first failure, if any."""
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
        results: list[_T] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            results.append(outcome)
        return results

    async def unasked(self, item: Spec, function: Callable[[], None]) -> None:
        """function() under the volume's lock, for no call: it has no deadline."""
        async with self._locks.hold([item.key]):
            await self._workers.run(item.pool.name, function)

    async def stop(self) -> None:
        """For the end of the process: wait no more for what nobody waits for."""
        for task in tuple(self._abandoned):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._abandoned, return_exceptions=True)
