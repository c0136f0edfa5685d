"""Points in time after which work is pointless.

Owns absolute CLOCK_MONOTONIC deadlines in nanoseconds. Must not know who waits.
Invariant: a deadline is one machine's and one boot's; it is never stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from bulkhead.bus.errors import bus_error

monotonic_ns: Callable[[], int] = time.monotonic_ns


class Deadline:
    """An absolute CLOCK_MONOTONIC time in nanoseconds."""

    __slots__ = ("ns",)

    def __init__(self, ns: int) -> None:
        self.ns = ns

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline that many seconds from now."""
        return cls(monotonic_ns() + int(seconds * 1e9))

    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0, self.ns - monotonic_ns()) / 1e9

    @property
    def passed(self) -> bool:
        """True from the deadline on."""
        return monotonic_ns() >= self.ns

    def check(self) -> None:
        """Raise BusError DEADLINE_EXCEEDED when passed; call before an irreversible effect."""
        if self.passed:
            raise bus_error(
                "DEADLINE_EXCEEDED", "the deadline passed before the work was done; ask again"
            )

    def __repr__(self) -> str:
        return f"Deadline(in {(self.ns - monotonic_ns()) / 1e9:.3f} s)"
