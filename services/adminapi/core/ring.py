"""The events of the recent past, and positions in their sequence.

Owns the form of a position and how far back a stream can be resumed. Must not know
streams or who may see what. Invariant: what after() gives is complete, without a hole;
where that cannot be said for certain it gives nothing and says so.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from bulkhead.model.records import WireEvent
from bulkhead.model.refusal import Refusal

# All of it fits the buffer of one stream (gateway.STREAM_BUFFER), with its positions.
RING_BYTES = 1024 * 1024
# Besides names and values: framing and the pair "position".
_OVERHEAD = 112
_POSITION = re.compile(r"([0-9A-Za-z-]{1,64})\.([0-9]{1,18})(?:\.([0-9]{1,6}))?")


@dataclass(frozen=True, slots=True)
class Position:
    """Behind an event: registry start, seq of its entry, and the number of the event in
    it, from 1; 0 = the whole entry."""

    boot: str
    seq: int
    index: int = 0

    def __str__(self) -> str:
        return f"{self.boot}.{self.seq}" + (f".{self.index}" if self.index else "")


def parse_position(untrusted_text: str) -> Position:
    """A position as a client gives it back; Refusal PROTOCOL."""
    match = _POSITION.fullmatch(untrusted_text)
    if match is None:
        raise Refusal("PROTOCOL", "that is no position in the events: give one as it was received")
    return Position(match[1], int(match[2]), int(match[3] or 0))


def numbered(
    boot: str, seq: int, events: Sequence[WireEvent]
) -> tuple[tuple[Position, WireEvent], ...]:
    """The events of an entry with the position behind each; behind the last one is the
    whole entry."""
    last = len(events)
    return tuple(
        (Position(boot, seq, i if i < last else 0), event) for i, event in enumerate(events, 1)
    )


def _size(event: WireEvent) -> int:
    pairs = sum(len(k) + len(v) + 2 for k, v in event.pairs)
    return len(event.subject) + len(event.name) + pairs + _OVERHEAD


class Ring:
    """Entries with events, oldest first, bounded by their size in bytes."""

    def __init__(self, limit: int = RING_BYTES) -> None:
        self._limit = limit
        self._entries: deque[tuple[int, tuple[WireEvent, ...], int]] = deque()
        self._size = 0
        self._boot = ""
        # Everything after this seq is here, up to the last one.
        self._base = 0
        self._last = 0

    @property
    def position(self) -> Position:
        """The present end."""
        return Position(self._boot, self._last)

    def restart(self, boot: str, seq: int) -> None:
        """What came before `seq` of registry start `boot` is not known."""
        self._entries.clear()
        self._size = 0
        self._boot, self._base, self._last = boot, seq, seq

    def add(self, seq: int, events: Sequence[WireEvent]) -> None:
        """An entry; one without events moves the end only."""
        self._last = seq
        if not events:
            return
        size = sum(map(_size, events))
        self._entries.append((seq, tuple(events), size))
        self._size += size
        while self._size > self._limit:
            self._base, _, size = self._entries.popleft()
            self._size -= size

    def after(self, position: Position) -> list[tuple[Position, WireEvent]] | None:
        """All events behind the position; None when some of them may be missing."""
        if position.boot != self._boot or not self._base <= position.seq <= self._last:
            return None
        found: list[tuple[Position, WireEvent]] = []
        whole = position.index == 0
        for seq, events, _ in self._entries:
            if seq < position.seq or (seq == position.seq and not position.index):
                continue
            behind = numbered(self._boot, seq, events)
            if seq == position.seq:
                if position.index >= len(events):
                    return None
                whole, behind = True, behind[position.index :]
            found.extend(behind)
        return found if whole else None
