"""Numbers of disposables that were given up not long ago.

Owns their ages, in memory: a new disposable must not be taken for an old one by its
address. Must not know how numbers are chosen. Invariant: holds at most one entry per
number, so it is bounded by their range.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from bulkhead.model.records import QubePut, QubeRemoved
from services.registry.core.group import Accepted

KEEP_S = 7 * 24 * 3600.0


class RecentNumbers:
    """A container of dispids."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._given_up: dict[int, float] = {}

    def __contains__(self, dispid: object) -> bool:
        at = self._given_up.get(dispid) if isinstance(dispid, int) else None
        return at is not None and self._clock() - at < KEEP_S

    def changed(self, pieces: Sequence[Accepted]) -> None:
        """Called after each batch."""
        for piece in pieces:
            for change, inverse in piece.done:
                if isinstance(change, QubeRemoved) and isinstance(inverse, QubePut):
                    dispid = inverse.qube.properties.get("dispid", "")
                    if dispid.isdigit():
                        self._given_up[int(dispid)] = self._clock()
