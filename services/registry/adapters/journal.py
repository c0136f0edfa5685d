"""The journal: every change, the operations, the replies, the checkpoints, in SQLite.

Owns journal.sqlite (WAL, synchronous=FULL), its schema and the hash chain over its
change rows. Must not know what the stored bytes mean. Invariant: what commit() returned
from is durable as a whole, and of what it raised JournalFull for, nothing is.

One connection, used by one thread at a time; History is the only reader beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from bulkhead.durable import fsync_directory
from bulkhead.failpoints import FailpointError, hit
from services.registry import failpoint_table as _rows  # noqa: F401  (declares the names)
from services.registry.core.foreign import DONE, INTENDED, CheckpointRow

SCHEMA = 1
APPLICATION_ID = 0x42554C4B  # "BULK"
KEPT_CHECKPOINTS = 3
KEPT_CHANGES = 20_000
REPLY_SECONDS = 3600.0
REPLY_ROWS = 100_000
# Pages after which SQLite copies the log back by itself; flush_log() does it earlier,
# outside the writer.
_AUTOCHECKPOINT_PAGES = 1_000

_SCHEMA_SQL = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE change(
  revision INTEGER PRIMARY KEY,
  time REAL NOT NULL,
  caller TEXT NOT NULL,
  source TEXT NOT NULL,
  method TEXT NOT NULL,
  before TEXT NOT NULL,
  after TEXT NOT NULL,
  result TEXT NOT NULL,
  delta BLOB NOT NULL,
  previous_hash BLOB NOT NULL,
  hash BLOB NOT NULL
);
CREATE TABLE operation(
  id TEXT PRIMARY KEY, revision INTEGER NOT NULL, body BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE record_hidden(
  uuid TEXT PRIMARY KEY, revision INTEGER NOT NULL, body BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE reply(
  id INTEGER PRIMARY KEY,
  caller TEXT NOT NULL,
  request_id BLOB NOT NULL,
  time REAL NOT NULL,
  body BLOB NOT NULL
);
CREATE TABLE blob(
  kind TEXT NOT NULL, key TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY(kind, key)
) WITHOUT ROWID;
CREATE TABLE checkpoint(
  revision INTEGER NOT NULL,
  sha256 TEXT NOT NULL,
  xml_zlib BLOB NOT NULL,
  state TEXT NOT NULL,
  covers INTEGER NOT NULL,
  PRIMARY KEY(revision, sha256)
);
"""


class JournalError(Exception):
    """The journal cannot be used; the message says why and what to do."""


class JournalTooNew(JournalError):
    """A newer Bulkhead wrote it."""


class JournalCorrupt(JournalError):
    """Its content is damaged."""


class JournalFull(JournalError):
    """No space; the transaction was rolled back, nothing was changed."""


class JournalRefused(JournalError):
    """The transaction failed before its commit and was rolled back."""


class JournalBroken(JournalError):
    """The commit failed in a way that leaves its outcome unknown until a restart."""


@dataclass(frozen=True, slots=True)
class ChangeRow:
    """One mutation. time in epoch seconds; before, after: JSON for people; delta: the
    exact changes, for replay."""

    revision: int
    time: float
    caller: str
    source: str
    method: str
    before: str
    after: str
    result: str
    delta: bytes

    def hash(self, previous: bytes) -> bytes:
        """sha256 over the previous row's hash and every column, each with its length."""
        digest = hashlib.sha256(previous)
        for part in (
            str(self.revision),
            repr(self.time),
            self.caller,
            self.source,
            self.method,
            self.before,
            self.after,
            self.result,
        ):
            raw = part.encode()
            digest.update(len(raw).to_bytes(8, "big"))
            digest.update(raw)
        digest.update(len(self.delta).to_bytes(8, "big"))
        digest.update(self.delta)
        return digest.digest()


@dataclass(frozen=True, slots=True)
class HashedRow:
    """A stored row with its place in the chain."""

    row: ChangeRow
    previous_hash: bytes
    hash: bytes


@dataclass(frozen=True, slots=True)
class ReplyRow:
    """The reply to (caller, request_id). time in epoch seconds."""

    caller: str
    request_id: bytes
    time: float
    body: bytes


# (key, revision, body); body None = the row goes.
Entry = tuple[str, int, bytes | None]
# (kind, key, body); body None = the row goes.
Blob = tuple[str, str, bytes | None]


@dataclass(slots=True)
class Transaction:
    """All that one commit writes."""

    changes: list[ChangeRow] = field(default_factory=list)
    operations: list[Entry] = field(default_factory=list)
    hidden: list[Entry] = field(default_factory=list)
    blobs: list[Blob] = field(default_factory=list)
    replies: list[ReplyRow] = field(default_factory=list)
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class NewStore:
    """The first content of a journal: what `document` (the qubes.xml beside it) holds at
    `revision`, and what came after it (from another journal)."""

    store_id: str
    revision: int
    epoch: int
    document: bytes
    later: Transaction = field(default_factory=Transaction)


def sha256(data: bytes) -> str:
    """Hex digest, as in the checkpoint table."""
    return hashlib.sha256(data).hexdigest()


class Journal:
    """An open journal. Every method may raise JournalError."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._db = connection
        self._meta: dict[str, str] = dict(connection.execute("SELECT key, value FROM meta"))
        newest = connection.execute(
            "SELECT revision, hash FROM change ORDER BY revision DESC LIMIT 1"
        ).fetchone()
        if newest is None:
            self._revision = int(self._meta["base_revision"])
            self._hash = hashlib.sha256(self._meta["store_id"].encode()).digest()
        else:
            self._revision, self._hash = newest
        self._checkpoints = self._read_checkpoints()

    # ---- opening

    @classmethod
    def open(cls, path: Path) -> Journal | None:
        """The journal, or None when there is none (or only the shell of one whose
        creation was interrupted). JournalTooNew, JournalCorrupt."""
        if not path.exists() or path.stat().st_size == 0:
            return None
        db: sqlite3.Connection | None = None
        try:
            db = _connect(path)
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA:
                raise JournalTooNew(
                    f"{path} has schema {version}, this program knows up to {SCHEMA}; "
                    f"install the newer Bulkhead again, or restore an older store"
                )
            if version == 0:
                if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise JournalCorrupt(f"{path} is a database, but not a journal")
                db.close()
                return None
            problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise JournalCorrupt(f"{path} is damaged: {problem}")
            return cls(path, db)
        except sqlite3.DatabaseError as error:
            if db is not None:
                db.close()
            raise JournalCorrupt(f"{path} cannot be read: {error}") from error
        except (KeyError, ValueError) as error:
            if db is not None:
                db.close()
            raise JournalCorrupt(f"{path} lacks its own description: {error}") from error
        except JournalError:
            if db is not None:
                db.close()
            raise

    @classmethod
    def create(cls, path: Path, new: NewStore) -> Journal:
        """A new journal whose one checkpoint, done, is the document as it is now."""
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        db = _connect(path)
        try:
            with _guarded():
                hit("registry.load.before_new_journal")
                db.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA_SQL.split(";"):
                    if statement.strip():
                        db.execute(statement)
                db.executemany(
                    "INSERT INTO meta VALUES(?, ?)",
                    [
                        ("store_id", new.store_id),
                        ("epoch", str(new.epoch)),
                        ("base_revision", str(new.revision)),
                    ],
                )
                genesis = hashlib.sha256(new.store_id.encode()).digest()
                _write(db, new.later, genesis)
                db.execute(
                    "INSERT INTO checkpoint VALUES(?, ?, ?, ?, ?)",
                    (
                        new.revision,
                        sha256(new.document),
                        zlib.compress(new.document, 1),
                        DONE,
                        new.revision,
                    ),
                )
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {SCHEMA}")
                db.execute("COMMIT")
            fsync_directory(path.parent)
            hit("registry.load.after_new_journal")
        except BaseException:
            db.close()
            raise
        return cls(path, db)

    def close(self) -> None:
        """Close the connection; the log is copied back where possible."""
        self._db.close()

    # ---- what it holds

    @property
    def store_id(self) -> str:
        return self._meta["store_id"]

    @property
    def epoch(self) -> int:
        return int(self._meta["epoch"])

    @property
    def revision(self) -> int:
        """The newest durable revision."""
        return self._revision

    @property
    def checkpoints(self) -> tuple[CheckpointRow, ...]:
        """All checkpoint rows, oldest first."""
        return tuple(self._checkpoints)

    def _read_checkpoints(self) -> list[CheckpointRow]:
        return [
            CheckpointRow(*row)
            for row in self._db.execute(
                "SELECT revision, covers, sha256, state FROM checkpoint ORDER BY revision, rowid"
            )
        ]

    def document(self, row: CheckpointRow) -> bytes | None:
        """The document of a checkpoint, None when it does not verify."""
        with _reading(self.path):
            found = self._db.execute(
                "SELECT xml_zlib FROM checkpoint WHERE revision = ? AND sha256 = ?",
                (row.revision, row.sha256),
            ).fetchone()
        if found is None:
            return None
        try:
            document = zlib.decompress(found[0])
        except zlib.error:
            return None
        return document if sha256(document) == row.sha256 else None

    def changes_after(self, revision: int) -> Iterator[ChangeRow]:
        """Rows above the revision, oldest first, with the chain verified. JournalCorrupt
        when a row is missing or was altered."""
        previous: bytes | None = None
        expected = revision + 1
        for hashed in self.hashed_rows(revision):
            row = hashed.row
            if row.revision != expected:
                raise JournalCorrupt(
                    f"{self.path}: revision {expected} is missing, {row.revision} follows"
                )
            if previous is not None and hashed.previous_hash != previous:
                raise JournalCorrupt(f"{self.path}: the chain breaks at revision {row.revision}")
            if row.hash(hashed.previous_hash) != hashed.hash:
                raise JournalCorrupt(f"{self.path}: revision {row.revision} was altered")
            previous = hashed.hash
            expected += 1
            yield row

    def hashed_rows(self, after: int) -> Iterator[HashedRow]:
        """Rows above the revision, oldest first, not verified."""
        with _reading(self.path):
            for values in self._db.execute(
                "SELECT * FROM change WHERE revision > ? ORDER BY revision", (after,)
            ):
                yield HashedRow(ChangeRow(*values[:9]), values[9], values[10])

    def operations(self) -> list[bytes]:
        """Stored operations, oldest revision first."""
        with _reading(self.path):
            return [b for (b,) in self._db.execute("SELECT body FROM operation ORDER BY revision")]

    def hidden(self) -> list[bytes]:
        """Stored hidden records."""
        with _reading(self.path):
            return [b for (b,) in self._db.execute("SELECT body FROM record_hidden")]

    def blobs(self, kind: str) -> dict[str, bytes]:
        """All blobs of a kind by key."""
        with _reading(self.path):
            return dict(self._db.execute("SELECT key, body FROM blob WHERE kind = ?", (kind,)))

    def replies(self, since: float) -> list[ReplyRow]:
        """Stored replies not older than `since` (epoch seconds), oldest first."""
        with _reading(self.path):
            return [
                ReplyRow(*row)
                for row in self._db.execute(
                    "SELECT caller, request_id, time, body FROM "
                    "(SELECT * FROM reply WHERE time >= ? ORDER BY id DESC LIMIT ?) "
                    "ORDER BY id",
                    (since, REPLY_ROWS),
                )
            ]

    # ---- writing

    def commit(self, transaction: Transaction) -> None:
        """Make it durable. JournalFull and JournalRefused: nothing was changed;
        JournalBroken: unknown, the process must restart."""
        with self._transaction():
            revision, last = _write(self._db, transaction, self._hash)
            if transaction.epoch is not None:
                self._set_meta("epoch", str(transaction.epoch))
        if transaction.changes:
            self._revision, self._hash = revision, last
        if transaction.epoch is not None:
            self._meta["epoch"] = str(transaction.epoch)
        hit("registry.commit.after_commit")

    def intend(self, row: CheckpointRow, xml_zlib: bytes) -> None:
        """Announce a checkpoint: the file may have this hash from now on."""
        with self._transaction():
            self._db.execute(
                "REPLACE INTO checkpoint VALUES(?, ?, ?, ?, ?)",
                (row.revision, row.sha256, xml_zlib, INTENDED, row.covers),
            )
        self._checkpoints = self._read_checkpoints()

    def done(self, row: CheckpointRow, now: float) -> None:
        """The file is that document. Older ones beyond three go, and with them the
        changes and replies that nothing needs any more."""
        with self._transaction():
            self._db.execute(
                "UPDATE checkpoint SET state = ? WHERE revision = ? AND sha256 = ?",
                (DONE, row.revision, row.sha256),
            )
            # Whatever was only intended never became the file.
            self._db.execute("DELETE FROM checkpoint WHERE state = ?", (INTENDED,))
            self._db.execute(
                "DELETE FROM checkpoint WHERE rowid NOT IN "
                "(SELECT rowid FROM checkpoint ORDER BY revision DESC, rowid DESC LIMIT ?)",
                (KEPT_CHECKPOINTS,),
            )
            self._prune(now)
        self._checkpoints = self._read_checkpoints()

    def cover(self, row: CheckpointRow, covers: int) -> None:
        """No change up to `covers` alters the document of the row."""
        with self._transaction():
            self._db.execute(
                "UPDATE checkpoint SET covers = ? WHERE revision = ? AND sha256 = ?",
                (covers, row.revision, row.sha256),
            )
        self._checkpoints = self._read_checkpoints()

    def _prune(self, now: float) -> None:
        oldest = self._db.execute("SELECT min(covers) FROM checkpoint").fetchone()[0]
        if oldest is not None:
            self._db.execute(
                "DELETE FROM change WHERE revision <= ?",
                (min(oldest, self._revision - KEPT_CHANGES),),
            )
        # Rows are in the order of their times, so only what goes is looked at.
        kept = self._db.execute(
            "SELECT id FROM reply WHERE time >= ? ORDER BY id LIMIT 1", (now - REPLY_SECONDS,)
        ).fetchone()
        newest = self._db.execute("SELECT max(id) FROM reply").fetchone()[0] or 0
        first = max(kept[0] if kept is not None else newest + 1, newest - REPLY_ROWS + 1)
        self._db.execute("DELETE FROM reply WHERE id < ?", (first,))

    def _set_meta(self, key: str, value: str) -> None:
        self._db.execute("REPLACE INTO meta VALUES(?, ?)", (key, value))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """BEGIN ... COMMIT; every failure before COMMIT rolls back."""
        db = self._db
        with _guarded():
            try:
                hit("registry.commit.before_begin")
                db.execute("BEGIN IMMEDIATE")
                yield
                hit("registry.commit.before_commit")
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise


def _write(db: sqlite3.Connection, transaction: Transaction, last: bytes) -> tuple[int, bytes]:
    """The rows of a transaction, chained to the hash `last`; (revision, hash) of its
    last change."""
    rows = []
    revision = 0
    for row in transaction.changes:
        digest = row.hash(last)
        rows.append(
            (
                row.revision,
                row.time,
                row.caller,
                row.source,
                row.method,
                row.before,
                row.after,
                row.result,
                row.delta,
                last,
                digest,
            )
        )
        revision, last = row.revision, digest
    db.executemany("INSERT INTO change VALUES(?,?,?,?,?,?,?,?,?,?,?)", rows)
    for table, column, entries in (
        ("operation", "id", transaction.operations),
        ("record_hidden", "uuid", transaction.hidden),
    ):
        for key, at, body in entries:
            if body is None:
                db.execute(f"DELETE FROM {table} WHERE {column} = ?", (key,))
            else:
                db.execute(f"REPLACE INTO {table} VALUES(?, ?, ?)", (key, at, body))
    for kind, key, body in transaction.blobs:
        if body is None:
            db.execute("DELETE FROM blob WHERE kind = ? AND key = ?", (kind, key))
        else:
            db.execute("REPLACE INTO blob VALUES(?, ?, ?)", (kind, key, body))
    if transaction.replies:
        db.executemany(
            "INSERT INTO reply(caller, request_id, time, body) VALUES(?, ?, ?, ?)",
            [(r.caller, r.request_id, r.time, r.body) for r in transaction.replies],
        )
    return revision, last


@dataclass(frozen=True, slots=True)
class Salvage:
    """What a damaged journal still gives beside a document: the whole state; replies as
    far as they can be read."""

    store_id: str
    epoch: int
    later: Transaction


def salvage(path: Path, document_sha256: str) -> Salvage | None:
    """Read what followed the checkpoint of that document; None unless every row that the
    state is made of is readable and the chain over the changes holds."""
    try:
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1.0)
    except sqlite3.Error:
        return None
    with closing(db):
        try:
            meta = dict(db.execute("SELECT key, value FROM meta"))
            found = db.execute(
                "SELECT covers FROM checkpoint WHERE sha256 = ?", (document_sha256,)
            ).fetchone()
            if found is None:
                return None
            hashed = [
                HashedRow(ChangeRow(*values[:9]), values[9], values[10])
                for values in db.execute(
                    "SELECT * FROM change WHERE revision > ? ORDER BY revision", found
                )
            ]
            expected = found[0] + 1
            previous: bytes | None = None
            for one in hashed:
                held = previous in (None, one.previous_hash)
                if one.row.revision != expected or not held:
                    return None
                if one.row.hash(one.previous_hash) != one.hash:
                    return None
                expected, previous = expected + 1, one.hash
            later = Transaction(
                changes=[one.row for one in hashed],
                operations=list(db.execute("SELECT id, revision, body FROM operation")),
                hidden=list(db.execute("SELECT uuid, revision, body FROM record_hidden")),
                blobs=list(db.execute("SELECT kind, key, body FROM blob")),
            )
            # Something newer than the last row: rows are missing at the end.
            newest = max([expected - 1, *(at for _, at, _ in later.operations)])
            if newest >= expected:
                return None
            # Wanted, but not needed: whoever asks again runs again.
            with contextlib.suppress(sqlite3.Error):
                later.replies.extend(
                    ReplyRow(*row)
                    for row in db.execute(
                        "SELECT caller, request_id, time, body FROM reply ORDER BY id"
                    )
                )
            return Salvage(meta["store_id"], int(meta["epoch"]), later)
        except (sqlite3.Error, KeyError, ValueError, TypeError):
            return None


def _connect(path: Path) -> sqlite3.Connection:
    # Used by one thread at a time, but opened by whichever starts the store.
    db = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        # The registry may write only its own directory: a sort that spills into a temporary
        # file elsewhere would fail, and a full reply table would keep it from starting.
        db.execute("PRAGMA temp_store = MEMORY")
        db.execute(f"PRAGMA wal_autocheckpoint = {_AUTOCHECKPOINT_PAGES}")
        db.execute("PRAGMA journal_size_limit = 67108864")
    except BaseException:
        db.close()
        raise
    return db


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """Turn SQLite's errors of a transaction into ours."""
    try:
        yield
    except FailpointError as error:
        raise JournalRefused(f"the journal refused the change: {error}") from error
    except sqlite3.Error as error:
        if (getattr(error, "sqlite_errorcode", 0) & 0xFF) == sqlite3.SQLITE_FULL:
            raise JournalFull(
                "no space is left for the journal; free space below /var/lib/qubes"
            ) from error
        raise JournalBroken(f"the journal failed: {error}") from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise JournalCorrupt(f"{path} cannot be read: {error}") from error


def flush_log(path: Path) -> None:
    """Copy the write-ahead log back, beside the writer and without holding it up."""
    with closing(sqlite3.connect(path, timeout=1.0, isolation_level=None)) as db:
        # Busy is no error: the next one does it.
        with contextlib.suppress(sqlite3.OperationalError):
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")


def history(
    path: Path, after: int, limit: int, mention: str, newest_first: bool
) -> tuple[list[HashedRow], bool]:
    """Rows after (newest first: before, 0 = from the newest) a revision, at most limit,
    of which before or after holds `mention` ("" = all), and whether there are more.
    Opens the journal read-only of its own."""
    where = "revision < ?" if newest_first and after else "revision > ?"
    order = "DESC" if newest_first else "ASC"
    with (
        _reading(path),
        closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1.0)) as db,
    ):
        rows = [
            HashedRow(ChangeRow(*values[:9]), values[9], values[10])
            for values in db.execute(
                f"SELECT * FROM change WHERE {where} AND "
                f"(? = '' OR instr(after, ?) OR instr(before, ?)) ORDER BY revision {order} "
                f"LIMIT ?",
                (after, mention, mention, mention, limit + 1),
            )
        ]
    return rows[:limit], len(rows) > limit
