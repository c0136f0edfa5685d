"""Blocking calls off the loop, each of which may be given up.

Owns the threads and their number. Must not know what is called. Invariant: a call that
never returns costs one thread of a bounded number, and holds up nothing else, not even
the end of the process.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

_R = TypeVar("_R")


class TooManyCalls(RuntimeError):
    """As many calls as there may be are under way, hanging ones included."""


class AbandonableCalls:
    """Runs each call in a daemon thread of its own, at most limit at a time."""

    def __init__(self, limit: int, name: str) -> None:
        self._slots = threading.BoundedSemaphore(limit)
        self._limit = limit
        self._name = name

    async def run(self, call: Callable[[], _R], timeout: float) -> _R:
        """The call's result. TimeoutError when given up, TooManyCalls at the limit.

        What a given up call returns later is dropped.
        """
        if not self._slots.acquire(blocking=False):
            raise TooManyCalls(f"{self._limit} calls of {self._name} are under way")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_R] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        def work() -> None:
            result: Any = None
            failure: BaseException | None = None
            try:
                result = call()
            except BaseException as error:  # handed to whoever waits, whatever it is
                failure = error
            finally:
                self._slots.release()
            try:
                loop.call_soon_threadsafe(settle, result, failure)
            except RuntimeError:
                pass  # the loop has ended: nobody waits any more

        threading.Thread(target=work, name=self._name, daemon=True).start()
        async with asyncio.timeout(timeout):
            return await future
