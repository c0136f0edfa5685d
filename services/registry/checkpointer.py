"""When and how qubes.xml follows the state while the registry runs.

Owns the schedule of checkpoints, the notes that wait to be written, and the mark that
somebody else wrote the file. Must not know messages. Invariant: a checkpoint begins at
most one second after the first change that the file does not show, and never replaces a
file that is not the registry's own.

The document is made and written in a thread of its own; the rows that frame it go
through the writer thread like every other transaction.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from bulkhead.failpoints import hit
from bulkhead.model.records import Qube, QubePut, QubeRemoved
from services.registry.adapters.checkpoint import ForeignEdit
from services.registry.adapters.journal import JournalError, flush_log, sha256
from services.registry.core.document import Picture
from services.registry.core.foreign import DONE, INTENDED, CheckpointRow, difference
from services.registry.core.group import Accepted
from services.registry.core.visibility import Done, touches_file
from services.registry.engine import Engine
from services.registry.store import Store

DELAY_S = 0.8
RETRY_S = 5.0
# Changes that the file does not show (operations, run states) are skipped by replay
# once the checkpoint row covers them; that often is often enough.
COVER_CHANGES = 1_000


@dataclass(frozen=True, slots=True)
class _Notes:
    """Notes to write: klass and name of the qube for the link, "" = it is gone."""

    text: str
    klass: str = ""
    name: str = ""


class Checkpointer:
    """Keeps the file in step with the engine's view."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        *,
        log: logging.Logger,
        clock: Callable[[], float] = time.time,
        delay: float = DELAY_S,
    ) -> None:
        self._store = store
        self._engine = engine
        self._log = log
        self._clock = clock
        self._delay = delay
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "registry-checkpoint")
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        self._dirty = store.uncovered
        self._notes: dict[str, _Notes] = {}
        self._problem = ""
        self.written = 0
        if self._dirty:
            self._schedule(self._delay)

    # ---- what the engine and the handlers tell and ask

    def changed(self, pieces: Sequence[Accepted]) -> None:
        """Called after each batch."""
        for piece in pieces:
            if not piece.planned.durable:
                continue
            self._collect_notes(piece.done)
            if not self._dirty and touches_file(piece.done):
                self._dirty = True
                self._schedule(self._delay)
        if not self._dirty and self._engine.revision - self._store.current.covers > COVER_CHANGES:
            self._dirty = True  # only the row has to be written; see _round
            self._schedule(self._delay)

    @property
    def current(self) -> CheckpointRow:
        return self._store.current

    @property
    def foreign(self) -> bool:
        """Somebody else wrote the file, and nobody has decided yet."""
        return self._store.foreign

    @property
    def problem(self) -> str:
        """Why the last checkpoint failed, "" = it did not."""
        return self._problem

    async def foreign_difference(self) -> str:
        """What the edited file has otherwise, "" without a foreign edit."""
        await self.look()
        if not self.foreign:
            return ""
        picture = await self._engine.quiet(lambda: Picture.of(self._engine.view))

        def compare() -> str:
            edited = self._store.file.read()
            ours = self._store.documents.render(
                picture, self._store.instruction(self._engine.revision)
            )
            return difference(ours, edited if edited is not None else b"")

        async with self._lock:
            return await self._loop.run_in_executor(self._thread, compare)

    async def look(self) -> None:
        """Find out whether somebody else wrote the file since the last checkpoint."""
        async with self._lock:
            digest = await self._loop.run_in_executor(self._thread, self._store.file.sha256)
            if self.foreign:
                if digest in ("", self._store.current.sha256):
                    # Taken away again, or put back.
                    self._store.foreign_sha256 = ""
                    self._dirty = True
                    self._schedule(0)
                else:
                    self._store.foreign_sha256 = digest
            elif digest not in ("", self._store.current.sha256):
                self._became_foreign(digest)

    async def read_foreign(self) -> tuple[bytes, str]:
        """The edited file and its hash. OSError."""
        async with self._lock:
            data = await self._loop.run_in_executor(self._thread, self._store.file.read)
        return (b"", "") if data is None else (data, sha256(data))

    async def overwrite_foreign(self, edited: bytes, digest: str) -> None:
        """Keep the edited file beside and write our own state over it."""

        def keep() -> None:
            hit("registry.resolve.before_keep")
            label = time.strftime("foreign-%Y%m%d-%H%M%S", time.gmtime(self._clock()))
            self._store.file.copy_beside(label, edited)
            hit("registry.resolve.after_keep")

        async with self._lock:
            await self._loop.run_in_executor(self._thread, keep)
            self._store.foreign_sha256 = ""
            await self._write(expected=digest)

    async def close(self) -> None:
        """A last checkpoint, so that the next start replays nothing."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        try:
            if self._dirty or self._notes or self._engine.revision > self._store.current.covers:
                await self._round()
        except (OSError, JournalError) as error:
            self._log.warning("no checkpoint at the stop, the journal has it all: %s", error)
        await self._loop.run_in_executor(None, self._thread.shutdown)

    # ---- one checkpoint

    def _schedule(self, delay: float) -> None:
        if self._timer is None and not self._store.foreign:
            self._timer = self._loop.call_later(delay, self._start)

    def _start(self) -> None:
        self._timer = None
        if self._task is not None and not self._task.done():
            self._schedule(self._delay)
            return
        self._task = self._loop.create_task(self._run())

    async def _run(self) -> None:
        try:
            await self._round()
            self._problem = ""
        except (OSError, JournalError) as error:
            self._problem = f"qubes.xml is behind the journal: {error}"
            self._log.error("a checkpoint failed, the journal has it all: %s", error)
            self._dirty = True
            self._schedule(RETRY_S)

    async def _round(self) -> None:
        async with self._lock:
            await self._write_notes()
            if not self._store.foreign:
                await self._write(expected=self._store.current.sha256)

    async def _write(self, expected: str) -> None:
        """Under the lock. expected: hash of the file that may be replaced."""
        store = self._store

        def look() -> tuple[Picture, int]:
            self._dirty = False
            return Picture.of(self._engine.view), self._engine.revision

        picture, revision = await self._engine.quiet(look)

        def render() -> tuple[bytes, str, bytes]:
            # A change that the file does not show leaves it as it is, byte for byte.
            same = store.documents.render(picture, store.instruction(store.current.revision))
            if sha256(same) == expected:
                return b"", expected, b""
            document = store.documents.render(picture, store.instruction(revision))
            return document, sha256(document), zlib.compress(document, 1)

        try:
            document, digest, packed = await self._loop.run_in_executor(self._thread, render)
            if not document:
                await self._cover(replace(store.current, covers=revision))
                return
            row = CheckpointRow(revision, revision, digest, INTENDED)
            hit("registry.checkpoint.before_intend")
            await self._engine.on_writer(lambda: store.journal.intend(row, packed))
            hit("registry.checkpoint.after_intend")

            def put() -> None:
                store.file.replace(document, digest, expected)
                hit("registry.checkpoint.before_done")

            try:
                await self._loop.run_in_executor(self._thread, put)
            finally:
                # Also after a failure behind the rename: it is our file then.
                if store.file.sha256() == digest:
                    store.current = row
            await self._engine.on_writer(lambda: store.journal.done(row, self._clock()))
            store.current = replace(row, state=DONE)
            hit("registry.checkpoint.after_done")
            self.written += 1
            await self._loop.run_in_executor(self._thread, flush_log, store.journal.path)
        except ForeignEdit:
            self._dirty = True
            self._became_foreign(store.file.sha256() or "missing")
        except BaseException:
            self._dirty = True
            raise

    async def _cover(self, row: CheckpointRow) -> None:
        """The file is right as it is, up to row.covers."""
        journal = self._store.journal

        def cover() -> None:
            journal.cover(row, row.covers)
            if row.state == INTENDED:  # an earlier attempt ended behind its rename
                journal.done(row, self._clock())

        await self._engine.on_writer(cover)
        self._store.current = replace(row, state=DONE)

    def _became_foreign(self, digest: str) -> None:
        self._store.foreign_sha256 = digest
        self._log.error(
            "qubes.xml was changed by another program: it is left alone and the registry "
            "serves its own state; decide with 'bulkhead resolve --adopt' or '--discard'"
        )

    # ---- notes

    def _collect_notes(self, done: Sequence[Done]) -> None:
        for change, inverse in done:
            before = inverse.qube if isinstance(inverse, QubePut) else None
            match change:
                case QubePut(qube):
                    if _notes(qube) != _notes(before):
                        self._notes[qube.uuid] = _Notes(_notes(qube), qube.klass, qube.name)
                        self._schedule(self._delay)
                case QubeRemoved(uuid):
                    if before is not None and before.notes:
                        self._notes[uuid] = _Notes("")
                        self._schedule(self._delay)
                case _:
                    continue

    async def _write_notes(self) -> None:
        waiting, self._notes = self._notes, {}
        if not waiting:
            return
        left = dict(waiting)

        def write() -> None:
            for uuid, notes in waiting.items():
                self._store.notes.write(uuid, notes.text)
                if notes.text:
                    self._store.notes.link(uuid, notes.klass, notes.name)
                del left[uuid]

        try:
            await self._loop.run_in_executor(self._thread, write)
        except OSError:
            # What was noted meanwhile is newer.
            self._notes = {**left, **self._notes}
            raise


def _notes(qube: Qube | None) -> str:
    return qube.notes if qube is not None and not qube.hidden else ""
