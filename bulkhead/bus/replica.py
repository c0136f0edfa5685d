"""How a replica stays equal to the registry, without any I/O.

Owns the states of following a stream: wait for the subscription, take a paged snapshot,
drop what it already holds, apply, notice every loss. Must not know sockets, nor what an
entry means. Invariant: while LIVE, everything up to `seq` of one registry start has been
applied exactly once and in order; whenever that cannot be shown, a new snapshot is taken.

The input is what arrives; the output is a list of actions for the caller to do in order.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from bulkhead.api import records_pb2, registry_pb2

# Entries and bytes kept while a snapshot is on its way; beyond it starts again.
BUFFER_ENTRIES = 20_000
BUFFER_BYTES = 64 * 1024 * 1024


class ReplicaState(enum.Enum):
    """WAITING for a sign that the subscription is in force, SYNCING, LIVE."""

    WAITING = "waiting"
    SYNCING = "syncing"
    LIVE = "live"


@dataclass(frozen=True, slots=True)
class AskPage:
    """Ask for a snapshot page; hand it to on_page() with the same attempt."""

    attempt: int
    page: int
    snapshot_id: str


@dataclass(frozen=True, slots=True)
class Load:
    """Replace the whole state by these changes (puts only)."""

    changes: Sequence[records_pb2.Change]
    seq: int
    revision: int
    registry_boot: str


@dataclass(frozen=True, slots=True)
class Apply:
    """Apply one entry to the state."""

    entry: records_pb2.StreamEntry


Action = AskPage | Load | Apply


@dataclass(slots=True)
class _Sync:
    store_id: str = ""
    registry_boot: str = ""
    snapshot_id: str = ""
    page: int = 0
    seq: int = 0
    revision: int = 0
    changes: list[records_pb2.Change] = field(default_factory=list)


class Replica:
    """The state machine. resyncs counts snapshots begun because something was lost."""

    def __init__(self) -> None:
        self.state = ReplicaState.WAITING
        self.store_id = ""
        self.registry_boot = ""
        self.seq = 0
        self.revision = 0
        self.resyncs = 0
        self.last_reason = ""
        self._attempt = 0
        self._sync = _Sync()
        self._buffer: list[records_pb2.StreamEntry] = []
        self._buffer_bytes = 0
        # Highest seq seen per (store, boot) while syncing, progress included.
        self._seen: dict[tuple[str, str], int] = {}

    @property
    def live(self) -> bool:
        """True when the state is complete up to `seq`."""
        return self.state is ReplicaState.LIVE

    def on_entry(self, entry: records_pb2.StreamEntry) -> list[Action]:
        """An entry or a progress message arrived from the stream."""
        if self.state is ReplicaState.LIVE:
            return self._on_live(entry)
        if self.state is ReplicaState.WAITING:
            # Anything that arrives shows that the subscription is in force.
            self.state = ReplicaState.SYNCING
            actions = self._begin()
            self._keep(entry)
            return actions
        return self._keep(entry)

    def on_page(self, attempt: int, page: registry_pb2.SnapshotReply) -> list[Action]:
        """The answer to AskPage; answers to earlier attempts are ignored."""
        if attempt != self._attempt or self.state is not ReplicaState.SYNCING:
            return []
        sync = self._sync
        if sync.page == 0:
            sync.store_id, sync.registry_boot = page.store_id, page.registry_boot
            sync.snapshot_id, sync.seq, sync.revision = page.snapshot_id, page.seq, page.revision
        elif (page.store_id, page.registry_boot, page.snapshot_id, page.seq) != (
            sync.store_id,
            sync.registry_boot,
            sync.snapshot_id,
            sync.seq,
        ):
            return self.restart("the snapshot changed between its pages")
        sync.changes.extend(page.changes)
        sync.page += 1
        if not page.last:
            return [AskPage(attempt, sync.page, sync.snapshot_id)]
        return self._loaded()

    def on_page_failed(self, attempt: int) -> list[Action]:
        """The page could not be had (registry restarting, snapshot expired): start again."""
        if attempt != self._attempt or self.state is not ReplicaState.SYNCING:
            return []
        return self.restart("the snapshot could not be read")

    def restart(self, reason: str) -> list[Action]:
        """Take a new snapshot; what was applied stays readable until it is there.

        What is buffered stays: an entry that arrived once does not arrive again.
        """
        self.resyncs += 1
        self.last_reason = reason
        self.state = ReplicaState.SYNCING
        return self._begin()

    # ----

    def _begin(self) -> list[Action]:
        self._attempt += 1
        self._sync = _Sync()
        return [AskPage(self._attempt, 0, "")]

    def _keep(self, entry: records_pb2.StreamEntry) -> list[Action]:
        origin = (entry.store_id, entry.registry_boot)
        if self._seen.get(origin, -1) < entry.seq:
            if origin not in self._seen and len(self._seen) >= 16:
                self._seen.clear()
            self._seen[origin] = entry.seq
        if entry.progress:
            return []
        self._buffer.append(entry)
        self._buffer_bytes += entry.ByteSize()
        if len(self._buffer) > BUFFER_ENTRIES or self._buffer_bytes > BUFFER_BYTES:
            self._forget_buffer()
            return self.restart("more arrived during the snapshot than is kept")
        return []

    def _forget_buffer(self) -> None:
        self._buffer = []
        self._buffer_bytes = 0

    def _loaded(self) -> list[Action]:
        sync = self._sync
        origin = (sync.store_id, sync.registry_boot)
        buffer = [e for e in self._buffer if (e.store_id, e.registry_boot) == origin]
        buffer.sort(key=lambda e: e.seq)
        seq, revision = sync.seq, sync.revision
        actions: list[Action] = [Load(sync.changes, seq, revision, sync.registry_boot)]
        for entry in buffer:
            if entry.seq <= seq:
                continue
            if entry.seq != seq + 1:
                return self.restart("an entry was lost during the snapshot")
            seq = entry.seq
            revision = max(revision, entry.revision)
            actions.append(Apply(entry))
        if self._seen.get(origin, 0) > seq:
            return self.restart("an entry was lost during the snapshot")
        if any(seen_origin != origin for seen_origin in list(self._seen)[-1:]):
            # The newest thing heard came from another start of the registry.
            self._seen.clear()
            return self.restart("the registry started again during the snapshot")
        self.store_id, self.registry_boot = origin
        self.seq, self.revision = seq, revision
        self.state = ReplicaState.LIVE
        self._forget_buffer()
        self._seen.clear()
        self._sync = _Sync()
        return actions

    def _on_live(self, entry: records_pb2.StreamEntry) -> list[Action]:
        if (entry.store_id, entry.registry_boot) != (self.store_id, self.registry_boot):
            return self._lost(entry, "the registry started again or has another store")
        if entry.progress:
            if entry.seq > self.seq:
                return self._lost(entry, "a progress message is ahead of us")
            return []
        if entry.seq <= self.seq:
            return []
        if entry.seq != self.seq + 1:
            return self._lost(entry, "an entry is missing")
        self.seq = entry.seq
        self.revision = max(self.revision, entry.revision)
        return [Apply(entry)]

    def _lost(self, entry: records_pb2.StreamEntry, reason: str) -> list[Action]:
        actions = self.restart(reason)
        return self._keep(entry) or actions
