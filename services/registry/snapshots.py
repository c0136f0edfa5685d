"""Snapshots handed out page by page.

Owns the handles: how many, how long. Must not know the stream. Invariant: all pages of
a handle show one moment, whatever happens meanwhile; records are shared, not copied.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from bulkhead import codec
from bulkhead.api import records_pb2
from bulkhead.bus.errors import BusError
from bulkhead.model.records import (
    Change,
    FactPut,
    LabelPut,
    OperationPut,
    PoolPut,
    QubePut,
    SystemPut,
)
from bulkhead.model.view import View
from services.registry.core.reasons import REASONS

PAGE_BYTES = 256 * 1024
HANDLES = 16
HANDLE_S = 60.0


def puts(view: View, with_hidden: bool) -> Iterator[Change]:
    """Changes that fill an empty view."""
    for label in view.labels.values():
        yield LabelPut(label)
    for pool in view.pools.values():
        yield PoolPut(pool)
    for name, value in view.properties.items():
        yield SystemPut(name, value)
    for qube in view.qubes_any():
        if with_hidden or not qube.hidden:
            yield QubePut(qube)
    for operation in view.operations.values():
        yield OperationPut(operation)
    for key, fact in view.facts().items():
        del key
        yield FactPut(fact)


@dataclass(slots=True)
class Snapshot:
    """One moment. starts: index of the first change of each page made so far."""

    id: str
    caller: str
    seq: int
    revision: int
    changes: tuple[Change, ...]
    used: float
    starts: list[int] = field(default_factory=lambda: [0])


@dataclass(frozen=True, slots=True)
class Page:
    """One page, encoded."""

    snapshot: Snapshot
    changes: list[records_pb2.Change]
    last: bool


class Snapshots:
    """The handles of all readers."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: dict[str, Snapshot] = {}

    def __len__(self) -> int:
        return len(self._held)

    def take(
        self, caller: str, view: View, seq: int, revision: int, *, with_hidden: bool
    ) -> Snapshot:
        """A new handle. The longest unused one goes where there are too many."""
        now = self._clock()
        self._expire(now)
        while len(self._held) >= HANDLES:
            del self._held[min(self._held.values(), key=lambda s: s.used).id]
        snapshot = Snapshot(
            str(uuid.uuid4()), caller, seq, revision, tuple(puts(view, with_hidden)), now
        )
        self._held[snapshot.id] = snapshot
        return snapshot

    def find(self, caller: str, snapshot_id: str, page: int) -> Snapshot:
        """The handle of an earlier call; BusError SNAPSHOT_GONE. Pages come in order,
        each may be asked for again."""
        now = self._clock()
        self._expire(now)
        snapshot = self._held.get(snapshot_id)
        if snapshot is None or snapshot.caller != caller or page >= len(snapshot.starts):
            raise BusError(
                REASONS["SNAPSHOT_GONE"].code,
                "SNAPSHOT_GONE",
                "the snapshot is not held any more; take a new one",
                snapshot_id=snapshot_id[:64],
            )
        snapshot.used = now
        return snapshot

    async def page(self, snapshot: Snapshot, number: int) -> Page:
        """Encode a page, giving way to other work in between."""
        at = snapshot.starts[number]
        out: list[records_pb2.Change] = []
        size = 0
        while at < len(snapshot.changes):
            change = codec.change_to_proto(snapshot.changes[at])
            length = change.ByteSize() + 4
            if out and size + length > PAGE_BYTES:
                break
            out.append(change)
            size += length
            at += 1
            if len(out) % 32 == 0:
                await asyncio.sleep(0)
        last = at >= len(snapshot.changes)
        if not last and number + 1 == len(snapshot.starts):
            snapshot.starts.append(at)
        return Page(snapshot, out, last)

    def _expire(self, now: float) -> None:
        for held in [s for s in self._held.values() if now - s.used > HANDLE_S]:
            del self._held[held.id]
