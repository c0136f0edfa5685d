"""The order of all changes: waiting work, batches, commit, publication.

Owns the view, the queue of waiting work, the numbering (revision, seq) and the one
writer thread that has the journal. Must not know messages of particular methods, nor
how qubes.xml is written. Invariant: nothing is published or answered before it is
durable; between two batches the view is exactly the durable state plus the facts.

The view lives on the event loop's thread. While a batch is being committed the view
already shows it, so whoever reads the view for others does it through quiet().
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from bulkhead import codec
from bulkhead.api import records_pb2
from bulkhead.bus.errors import BusError
from bulkhead.failpoints import hit
from bulkhead.model.records import Change, QubePut, QubeRemoved
from bulkhead.model.view import View
from services.registry import failpoint_table as _rows  # noqa: F401  (declares the names)
from services.registry.adapters.journal import (
    ChangeRow,
    Journal,
    JournalFull,
    JournalRefused,
    ReplyRow,
    Transaction,
)
from services.registry.core.audit import before_after
from services.registry.core.group import (
    Accepted,
    Batch,
    Numbers,
    Planned,
    Refused,
    Work,
    plan_batch,
)
from services.registry.core.reasons import REASONS
from services.registry.core.visibility import public_changes
from services.registry.encoding import encode_changes, encode_delta, side_tables

_T = TypeVar("_T")

# Pieces of work in one transaction, and waiting for one.
BATCH_LIMIT = 256
QUEUE_LIMIT = 4096


class Stream(Protocol):
    """Where entries go (bulkhead.bus.events.Publisher)."""

    def publish(
        self, entry: records_pb2.StreamEntry, public: records_pb2.StreamEntry | None = None
    ) -> None:
        """Send an entry, and to readers without hidden records `public` instead."""

    def skip(self, seq: int, revision: int) -> None:
        """The entry of that seq cannot be sent: followers take a new snapshot."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Who asks, for the audit row: caller (service), source (qube), method (short)."""

    caller: str
    source: str
    method: str


# (accepted) -> (caller, request id, reply blob) to be stored with the change.
Freeze = Callable[[Accepted], tuple[str, bytes, bytes] | None]


@dataclass(slots=True, eq=False)
class _Item:
    """Waiting work with what its answer needs."""

    work: Work
    origin: Origin
    freeze: Freeze | None
    future: asyncio.Future[Accepted]
    number: Callable[[int, int], None] | None
    check: Callable[[], None] | None
    reply: tuple[str, bytes, bytes] | None = None
    messages: list[records_pb2.Change] | None = None  # its changes, encoded

    def plan(self, view: View, now: Numbers) -> Planned:
        if self.check is not None:
            self.check()
        return self.work.plan(view, now)


@dataclass(slots=True)
class Counters:
    """For status: commits and the largest batch so far."""

    commits: int = 0
    committed: int = 0
    largest_batch: int = 0
    refused: int = 0
    failed_commits: int = 0
    skipped_entries: int = 0
    extra: dict[str, int] = field(default_factory=dict)


class Engine:
    """One per process, on its event loop.

    committed(accepted, ...) is called on the loop after each batch, in order, when the
    pieces are durable and published. fatal(error): the outcome of a commit is unknown,
    the process must end.
    """

    def __init__(
        self,
        view: View,
        journal: Journal,
        stream: Stream,
        *,
        committed: Callable[[Sequence[Accepted]], None],
        fatal: Callable[[BaseException], None],
        log: logging.Logger,
        clock: Callable[[], float] = time.time,
        entry_limit: int = 4 * 1024 * 1024,
    ) -> None:
        self.view = view
        self.journal = journal
        self.numbers = Numbers(
            journal.revision, epoch=journal.epoch, small_revision=journal.revision
        )
        self.counters = Counters()
        self._stream = stream
        self._committed = committed
        self._fatal = fatal
        self._log = log
        self._clock = clock
        self._entry_limit = entry_limit
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Item] = deque()
        self._committing = False
        self._broken: BaseException | None = None
        self._quiet: list[Callable[[], None]] = []
        self._writer = ThreadPoolExecutor(1, "registry-writer")

    @property
    def revision(self) -> int:
        """Of the newest durable change."""
        return self.numbers.revision

    @property
    def seq(self) -> int:
        """Of the newest stream entry."""
        return self.numbers.seq

    # ---- for handlers

    async def submit(
        self,
        work: Work,
        origin: Origin,
        freeze: Freeze | None = None,
        number: Callable[[int, int], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> Accepted:
        """Plan, make durable, apply, publish. number(revision, seq) is called before
        freeze and before a refusal is raised; check() before planning, it may raise.
        Raises what planning raised, or BusError STORE_FULL, STORE_FAILED (nothing was
        changed), STORE_BROKEN (unknown), or REGISTRY_BUSY."""
        if self._broken is not None:
            raise _error("STORE_BROKEN", "the registry is about to restart; ask again")
        if len(self._waiting) >= QUEUE_LIMIT:
            raise _error("REGISTRY_BUSY", "too many changes wait for the registry; ask later")
        item = _Item(work, origin, freeze, self._loop.create_future(), number, check)
        self._waiting.append(item)
        if not self._committing:
            self._pump()
        # A caller that goes away does not take its change back.
        return await asyncio.shield(item.future)

    async def quiet(self, read: Callable[[], _T]) -> _T:
        """read(), called while the view shows durable state only."""
        if not self._committing:
            return read()
        future: asyncio.Future[_T] = self._loop.create_future()

        def run() -> None:
            if future.done():
                return
            try:
                future.set_result(read())
            except Exception as error:
                future.set_exception(error)

        self._quiet.append(run)
        return await future

    async def on_writer(self, work: Callable[[], _T]) -> _T:
        """Run on the writer thread, between two commits."""
        return await self._loop.run_in_executor(self._writer, work)

    async def close(self) -> None:
        """Wait for the running commit, refuse what waits, end the writer thread."""
        while self._committing:
            await self.quiet(lambda: None)
        self._broken = self._broken or RuntimeError("closed")
        while self._waiting:
            self._fail(self._waiting.popleft(), _error("STORE_BROKEN", "the registry stops"))
        await self._loop.run_in_executor(None, self._writer.shutdown)

    # ---- batches

    def _pump(self) -> None:
        """Plan what waits; start one commit, or settle at once what needs none."""
        while self._waiting and not self._committing and self._broken is None:
            items = [self._waiting.popleft() for _ in range(min(len(self._waiting), BATCH_LIMIT))]
            batch = plan_batch(self.view, items, self.numbers)
            durable = batch.durable
            if not durable:
                self._settle(batch)
                continue
            for accepted in durable:
                item = _item(accepted)
                if item.number is not None:
                    item.number(accepted.revision, accepted.seq)
                if item.freeze is not None:
                    item.reply = item.freeze(accepted)
            self._committing = True
            self.counters.largest_batch = max(self.counters.largest_batch, len(durable))
            job = self._writer.submit(self._write, durable, self._clock())
            job.add_done_callback(partial(self._wake, batch))

    def _write(self, durable: Sequence[Accepted], now: float) -> None:
        """On the writer thread."""
        self.journal.commit(transaction(durable, now))

    def _wake(self, batch: Batch, job: Future[None]) -> None:
        """On the writer thread."""
        self._loop.call_soon_threadsafe(self._written, batch, job)

    def _written(self, batch: Batch, job: Future[None]) -> None:
        self._committing = False
        error = job.exception()
        if error is None:
            self.counters.commits += 1
            self.counters.committed += len(batch.durable)
            self._settle(batch)
        elif isinstance(error, JournalFull | JournalRefused):
            self._refuse(batch, error)
        else:
            self._break(batch, error)
        quiet, self._quiet = self._quiet, []
        for run in quiet:
            run()
        self._pump()

    def _settle(self, batch: Batch) -> None:
        """The batch is durable: number, publish, tell, answer."""
        self.numbers = batch.numbers
        accepted: list[Accepted] = []
        for outcome in batch.outcomes:
            if isinstance(outcome, Refused):
                if outcome.events:
                    self._announce(outcome)
                continue
            accepted.append(outcome)
            if outcome.published:
                self._publish(outcome)
        self._committed(accepted)
        for outcome in batch.outcomes:
            item = _item(outcome)
            if item.number is not None:
                item.number(outcome.revision, outcome.seq)
            if isinstance(outcome, Refused):
                self.counters.refused += 1
                self._fail(item, outcome.error)
            elif not item.future.done():
                if outcome.planned.durable:
                    hit("registry.reply.before")
                item.future.set_result(outcome)

    def _refuse(self, batch: Batch, error: Exception) -> None:
        """The commit failed and nothing was changed; the others are planned anew."""
        self.counters.failed_commits += 1
        self._log.error("a commit failed, nothing was changed: %s", error)
        batch.take_back(self.view)
        reason = "STORE_FULL" if isinstance(error, JournalFull) else "STORE_FAILED"
        again: list[_Item] = []
        for outcome in batch.outcomes:
            item = _item(outcome)
            if isinstance(outcome, Accepted) and outcome.planned.durable:
                if item.number is not None:
                    item.number(self.revision, self.seq)
                self._fail(item, _error(reason, f"{error}; nothing was changed"))
            else:
                # Refused pieces too: what they were refused for may be undone now.
                again.append(item)
        self._waiting.extendleft(reversed(again))

    def _break(self, batch: Batch, error: BaseException) -> None:
        self._broken = error
        self._log.critical("the journal failed, the registry ends: %s", error)
        for outcome in batch.outcomes:
            self._fail(_item(outcome), _error("STORE_BROKEN", f"{error}; the outcome is unknown"))
        while self._waiting:
            self._fail(
                self._waiting.popleft(), _error("STORE_BROKEN", "the registry is about to restart")
            )
        self._fatal(error)

    @staticmethod
    def _fail(item: _Item, error: BaseException) -> None:
        if not item.future.done():
            item.future.set_exception(error)
            # Whoever asked may be gone; that is no lost exception.
            item.future.exception()

    def _announce(self, refused: Refused) -> None:
        self._stream.publish(
            records_pb2.StreamEntry(
                seq=refused.seq,
                revision=refused.revision,
                events=[codec.event_to_proto(event) for event in refused.events],
            )
        )

    def _publish(self, piece: Accepted) -> None:
        if piece.planned.durable:
            hit("registry.publish.before")
        item = _item(piece)
        messages = item.messages
        if messages is None:
            messages = encode_changes(change for change, _ in piece.done)
        entry = records_pb2.StreamEntry(
            seq=piece.seq,
            revision=piece.revision,
            changes=messages,
            events=[codec.event_to_proto(event) for event in piece.planned.events],
        )
        if entry.ByteSize() > self._entry_limit:
            self.counters.skipped_entries += 1
            self._stream.skip(piece.seq, piece.revision)
            return
        public = None
        if any(_may_hide(change, inverse) for change, inverse in piece.done):
            public = records_pb2.StreamEntry(
                seq=piece.seq,
                revision=piece.revision,
                changes=encode_changes(public_changes(piece.done)),
                events=entry.events,
            )
        self._stream.publish(entry, public)


def _may_hide(change: Change, inverse: Change | None) -> bool:
    """True when readers without hidden records may get something else."""
    return (isinstance(change, QubePut) and change.qube.hidden) or (
        isinstance(change, QubeRemoved)
        and (not isinstance(inverse, QubePut) or inverse.qube.hidden)
    )


def transaction(durable: Sequence[Accepted], now: float) -> Transaction:
    """What a batch writes. now: epoch seconds."""
    out = Transaction()
    for accepted in durable:
        item = _item(accepted)
        before, after = before_after(accepted.done)
        item.messages = encode_changes(change for change, _ in accepted.done)
        out.changes.append(
            ChangeRow(
                accepted.revision,
                now,
                item.origin.caller,
                item.origin.source,
                item.origin.method,
                before,
                after,
                accepted.planned.result,
                encode_delta(item.messages),
            )
        )
        operations, hidden, blobs = side_tables(accepted, item.messages)
        out.operations.extend(operations)
        out.hidden.extend(hidden)
        out.blobs.extend(blobs)
        if item.reply is not None:
            caller, request_id, body = item.reply
            out.replies.append(ReplyRow(caller, request_id, now, body))
        if accepted.planned.epoch is not None:
            out.epoch = accepted.planned.epoch
    return out


def _item(outcome: Accepted | Refused) -> _Item:
    item = outcome.work
    assert isinstance(item, _Item)
    return item


def _error(reason: str, message: str) -> BusError:
    return BusError(REASONS[reason].code, reason, message)
