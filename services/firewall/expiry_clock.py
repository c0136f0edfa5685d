"""When rules end.

Owns the next end of each qube's rules, and the waiting for it. Must not know files or
kernels. Invariants: a qube is due from the first end on until its rules are watched anew
or it is put off; a wall clock that jumps is noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

from bulkhead.model.firewall_rules import Rule
from services.firewall.core.expiry import next_expiry

# Wall clocks jump: look at expiry at least this often.
CLOCK_CHECK_S = 30.0


class ExpiryClock:
    """Ends of rules by uuid, in seconds of the wall clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._ends: dict[str, float] = {}
        self._wake = asyncio.Event()

    def watch(self, uuid: str, rules: Sequence[Rule]) -> None:
        """These are the qube's rules now."""
        end = next_expiry(rules, self._now())
        if end is None:
            self._ends.pop(uuid, None)
        else:
            self._ends[uuid] = end
            self._wake.set()

    def due(self, now: float) -> list[str]:
        """Qubes of which a rule has ended."""
        return [uuid for uuid, end in self._ends.items() if end < now]

    def put_off(self, uuid: str, now: float) -> None:
        """It could not be done: at the next look at the clock."""
        self._ends[uuid] = now + CLOCK_CHECK_S

    async def run(self, expire_due: Callable[[], Awaitable[None]]) -> None:
        """Have expired what is due, whenever something may be. Never ends."""
        while True:
            await expire_due()
            wait = CLOCK_CHECK_S
            if self._ends:
                wait = min(wait, max(0.01, min(self._ends.values()) + 0.01 - self._now()))
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()
