"""From the files of the state directory to the registry's state, at start.

Owns the start procedure: journal, file, decision, replay, and the first checkpoint
where one is needed before anything is served. Must not know the bus or an event loop.
Invariant: a kill at any line leaves files from which the same state is loaded again,
and no file that holds information is removed, only renamed beside.

Called under the state lock, in one thread.
"""

from __future__ import annotations

import gc
import time
import uuid
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bulkhead.durable import rename, unlink
from bulkhead.failpoints import hit
from bulkhead.model.records import Change, QubePut
from bulkhead.model.view import View
from services.registry.adapters.checkpoint import (
    NotesFolder,
    StoreFile,
    set_aside,
    set_aside_orphans,
)
from services.registry.adapters.journal import (
    Journal,
    JournalCorrupt,
    JournalTooNew,
    NewStore,
    Transaction,
    salvage,
    sha256,
)
from services.registry.core.document import Documents, Picture, Unreadable
from services.registry.core.foreign import (
    DONE,
    INTENDED,
    CheckpointRow,
    Decision,
    Found,
    Instruction,
    Start,
    decide,
    difference,
    read_instruction,
)
from services.registry.core.replay import aside_of, assemble
from services.registry.encoding import (
    ASIDE,
    NOTES,
    EncodingError,
    decode_asides,
    decode_delta,
    decode_hidden,
    decode_operations,
    encode_aside,
)

# class -> folder of its qubes' own folders, for the notes.txt links.
_FOLDERS = {
    "TemplateVM": "vm-templates",
    "AppVM": "appvms",
    "StandaloneVM": "appvms",
    "DispVM": "appvms",
}


class StoreError(Exception):
    """The store cannot be served; the message says what to do."""


@dataclass(slots=True)
class Store:
    """An opened store.

    current: the checkpoint row that the file on disk is (or, during a foreign edit,
    the one that the file should be). foreign_sha256: of the edited file, "" = none.
    uncovered: changes after `current` alter the file.
    """

    state_dir: Path
    view: View
    journal: Journal
    file: StoreFile
    notes: NotesFolder
    documents: Documents
    current: CheckpointRow
    start: Start
    foreign_sha256: str = ""
    uncovered: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def foreign(self) -> bool:
        return bool(self.foreign_sha256)

    def instruction(self, revision: int) -> Instruction:
        return Instruction(self.journal.store_id, revision)


def open_store(state_dir: Path, now: float | None = None) -> Store:
    """Load the store below state_dir. StoreError; OSError where files cannot be read.

    now: epoch seconds, for names of files kept beside.
    """
    # Hundreds of thousands of objects come to stay: looking for garbage among them again
    # and again would take a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _Opening(state_dir, time.time() if now is None else now).run()
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


def qube_folders(state_dir: Path) -> dict[str, Path]:
    """Class -> the folder that holds its qubes' folders."""
    return {klass: state_dir / name for klass, name in _FOLDERS.items()}


class _Opening:
    """One run of the start procedure."""

    def __init__(self, state_dir: Path, now: float) -> None:
        self.state_dir = state_dir
        self.now = now
        self.label = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
        self.file = StoreFile(state_dir / "qubes.xml")
        self.journal_path = state_dir / "journal.sqlite"
        self.salvaged_path = state_dir / "journal.sqlite~salvaged"
        self.notes = NotesFolder(state_dir / "notes", qube_folders(state_dir))
        self.documents = Documents()
        self.warnings: list[str] = []

    def run(self) -> Store:
        self.file.drop_temporaries()
        journal = self._journal()
        try:
            return self._with(journal)
        except JournalCorrupt as error:
            # Found while reading what quick_check does not look into.
            if journal is None:
                raise
            journal.close()
            salvaged = self._lose_journal(error)
            try:
                return self._with(salvaged)
            except JournalCorrupt as again:
                if salvaged is None:
                    raise StoreError(str(again)) from again
                # What was salvaged does not decode: the file alone is left.
                salvaged.close()
                set_aside(self.journal_path, f"bad-{self.label}")
                return self._with(None)

    def _journal(self) -> Journal | None:
        set_aside_orphans(self.journal_path, f"orphan-{self.label}")
        if not self.journal_path.exists() and self.salvaged_path.exists():
            rename(self.salvaged_path, self.journal_path)
        try:
            return Journal.open(self.journal_path)
        except JournalTooNew as error:
            raise StoreError(str(error)) from error
        except JournalCorrupt as error:
            return self._lose_journal(error)

    def _lose_journal(self, error: JournalCorrupt) -> Journal | None:
        """Rename a damaged journal beside; the one made of what it still gives, or None."""
        salvaged = self._salvage()
        hit("registry.load.before_set_aside")
        kept = set_aside(self.journal_path, f"bad-{self.label}")
        hit("registry.load.after_set_aside")
        if salvaged:
            rename(self.salvaged_path, self.journal_path)
            self.warnings.append(
                f"{error}. It was renamed to {kept.name} and a new one was made of it; only "
                f"older history is in that file alone"
            )
            return Journal.open(self.journal_path)
        self.warnings.append(
            f"{error}. It was renamed to {kept.name} and the state is what qubes.xml says: "
            f"changes of the last second before, unfinished operations and the history are "
            f"in that file only"
        )
        return None

    def _salvage(self) -> bool:
        """Make a new journal of a damaged one, beside it; False where it is too damaged.

        Killed at any point: while the old one is in its place, this is done again; after
        that, the new one is taken.
        """
        unlink(self.salvaged_path)
        data = self.file.read()
        found = salvage(self.journal_path, sha256(data)) if data is not None else None
        if data is None or found is None:
            return False
        row = next(iter(found.later.changes), None)
        instruction = read_instruction(data)
        if row is not None:
            revision = row.revision - 1
        else:
            revision = instruction.revision if instruction is not None else 0
        new = NewStore(str(uuid.uuid4()), revision, found.epoch, data, found.later)
        Journal.create(self.salvaged_path, new).close()
        return True

    def _with(self, journal: Journal | None) -> Store:
        data = self.file.read()
        digest = sha256(data) if data is not None else ""
        decision, base = self._decide(journal, data, digest)
        match decision.start:
            case Start.NO_STORE:
                raise StoreError(
                    f"there is no store in {self.state_dir}: make one with 'bulkhead init'"
                )
            case Start.LOST:
                raise StoreError(
                    f"{self.file.path} is missing or damaged, and the journal has no copy of "
                    f"it; restore the file from a backup or from what is kept beside it"
                )
            case Start.ALONE:
                assert data is not None
                return self._alone(journal, data)
            case Start.REPLAY:
                assert journal is not None and decision.row is not None and data is not None
                row = decision.row
                if row.state == INTENDED:
                    journal.done(row, self.now)
                    row = replace(row, state=DONE)
                return self._loaded(journal, row, data, decision.start)
            case Start.FROM_BLOB:
                assert journal is not None and decision.row is not None and base is not None
                # First see that the journal can really replace the file.
                store = self._loaded(journal, decision.row, base, decision.start)
                if decision.keep_beside:
                    hit("registry.load.before_keep")
                    kept = self.file.keep_beside(f"bad-{self.label}")
                    hit("registry.load.after_keep")
                    self.warnings.append(
                        f"qubes.xml was damaged; it was renamed to {kept.name} and made anew "
                        f"from the journal, nothing is lost"
                    )
                else:
                    self.warnings.append(
                        "qubes.xml was missing; it was made anew from the journal, nothing is lost"
                    )
                checkpoint_now(store, "", self.now)
                return store
            case Start.FOREIGN:
                assert journal is not None and decision.row is not None and base is not None
                assert data is not None
                return self._foreign(journal, decision.row, base, data)

    def _decide(
        self, journal: Journal | None, data: bytes | None, digest: str
    ) -> tuple[Decision, bytes | None]:
        """The decision, and the document to build on where that is not the file."""
        rows = journal.checkpoints if journal is not None else ()
        if journal is not None and any(row.sha256 == digest for row in rows):
            # Ours by its hash: no need to look into it, nor into the copies.
            return decide(Found(digest, True, True, rows)), data
        parses = data is not None and self._readable(data)
        blobs: dict[str, bytes] = {}
        if journal is not None:
            for row in reversed(rows):
                document = journal.document(row)
                if document is not None:
                    blobs[row.sha256] = document
                    break
        decision = decide(Found(digest, parses, journal is not None, rows, frozenset(blobs)))
        return decision, blobs.get(decision.row.sha256) if decision.row else None

    def _readable(self, data: bytes) -> bool:
        try:
            self.documents.parse(data)
        except Unreadable:
            return False
        return True

    # ---- the ways to start

    def _loaded(self, journal: Journal, row: CheckpointRow, document: bytes, start: Start) -> Store:
        try:
            base, _ = self.documents.parse(document)
            asides = decode_asides(journal.blobs(ASIDE), journal.blobs(NOTES))
            later = [decode_delta(change.delta) for change in journal.changes_after(row.covers)]
            view = assemble(
                base,
                asides,
                later,
                decode_hidden(journal.hidden()),
                decode_operations(journal.operations()),
            )
        except (EncodingError, Unreadable) as error:
            raise JournalCorrupt(f"{self.journal_path}: {error}") from error
        store = Store(
            self.state_dir,
            view,
            journal,
            self.file,
            self.notes,
            self.documents,
            row,
            start,
            uncovered=any(later),
            warnings=self.warnings,
        )
        self._notes_in_step(store)
        return store

    def _foreign(
        self, journal: Journal, row: CheckpointRow, document: bytes, edited: bytes
    ) -> Store:
        store = self._loaded(journal, row, document, Start.FOREIGN)
        picture = Picture.of(store.view)
        ours = self.documents.render(picture, store.instruction(row.revision))
        if not difference(ours, edited):
            # Saved by somebody else without any change, or adopted just before a crash.
            checkpoint_now(store, sha256(edited), self.now)
            return store
        store.foreign_sha256 = sha256(edited)
        store.warnings.append(
            "qubes.xml was changed by another program; the registry serves its own state and "
            "leaves the file alone until 'bulkhead resolve --adopt' or '--discard'"
        )
        return store

    def _alone(self, journal: Journal | None, data: bytes) -> Store:
        if journal is not None:
            # It has no picture that anything could be replayed on.
            journal.close()
            set_aside(self.journal_path, f"bad-{self.label}")
            self.warnings.append(f"{self.journal_path} held no copy of qubes.xml that verifies")
        try:
            parsed, warnings = self.documents.parse(data)
        except Unreadable as error:
            raise StoreError(f"{self.file.path} does not load: {error}") from error
        self.warnings.extend(warnings)
        changes = self._with_notes(parsed)
        instruction = read_instruction(data)
        if instruction is not None:
            self.warnings.append(
                "the journal was missing: qubes.xml alone is the state now, under a new store "
                "id; let the services sweep before qubes are started"
            )
        journal = Journal.create(
            self.journal_path,
            NewStore(
                store_id=str(uuid.uuid4()),
                revision=instruction.revision if instruction is not None else 0,
                # Above what participants may remember from the lost store.
                epoch=int(self.now) if instruction is not None else 0,
                document=data,
                later=Transaction(blobs=list(_notes_blobs(changes))),
            ),
        )
        view = assemble(changes, {}, [], [], [])
        store = Store(
            self.state_dir,
            view,
            journal,
            self.file,
            self.notes,
            self.documents,
            journal.checkpoints[-1],
            Start.ALONE,
            warnings=self.warnings,
        )
        # Before anything is served: uuids made while loading must be in the file.
        checkpoint_now(store, sha256(data), self.now)
        self._notes_in_step(store)
        return store

    # ---- notes

    def _with_notes(self, changes: Sequence[Change]) -> list[Change]:
        """Records completed from notes/UUID.txt and from 4.4's notes.txt."""
        present = self.notes.present()
        out: list[Change] = []
        for change in changes:
            if isinstance(change, QubePut) and not change.qube.notes:
                qube = change.qube
                text = present.get(qube.uuid) or self.notes.older(qube.klass, qube.name)
                if text:
                    change = QubePut(replace(qube, notes=text))
            out.append(change)
        return out

    def _notes_in_step(self, store: Store) -> None:
        """Finish what a crash left between a commit and the notes files."""
        present = self.notes.present()
        for qube in store.view.qubes():
            known = present.pop(qube.uuid, "")
            if qube.notes != known:
                self._write_notes(store, qube.uuid, qube.notes)
                self.notes.link(qube.uuid, qube.klass, qube.name)
        for left in present:
            if store.view.by_uuid_any(left) is None:
                self._write_notes(store, left, "")

    @staticmethod
    def _write_notes(store: Store, owner: str, notes: str) -> None:
        try:
            store.notes.write(owner, notes)
        except OSError as error:
            store.warnings.append(f"the notes file of {owner} is not up to date: {error}")


def _notes_blobs(changes: Iterable[Change]) -> Iterable[tuple[str, str, bytes | None]]:
    for change in changes:
        if isinstance(change, QubePut) and change.qube.notes:
            qube = change.qube
            yield NOTES, qube.uuid, qube.notes.encode()
            # Without an aside the notes would not be looked up.
            yield ASIDE, qube.uuid, encode_aside(aside_of(qube))


def checkpoint_now(store: Store, expected: str, now: float) -> None:
    """Write qubes.xml for the present state, in this thread. expected: hash of the file
    that is there, "" = none."""
    revision = store.journal.revision
    document = store.documents.render(Picture.of(store.view), store.instruction(revision))
    row = CheckpointRow(revision, revision, sha256(document), INTENDED)
    if row.sha256 != expected:
        hit("registry.checkpoint.before_intend")
        store.journal.intend(row, zlib.compress(document, 1))
        hit("registry.checkpoint.after_intend")
        store.file.replace(document, row.sha256, expected)
        hit("registry.checkpoint.before_done")
    store.journal.done(row, now)
    store.current = replace(row, state=DONE)
    store.uncovered = False
