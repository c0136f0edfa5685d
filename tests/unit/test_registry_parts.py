"""The registry's journal, files, engine, replies and snapshots, one by one."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import stat
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bulkhead.api import envelope_pb2, records_pb2
from bulkhead.bus.dedup import StoredReply
from bulkhead.bus.errors import BusError
from bulkhead.model.plan.base import PlanRefused
from bulkhead.model.records import (
    ADMINVM_UUID,
    Change,
    FactPut,
    HostFact,
    Operation,
    OperationPut,
    OperationState,
    Phase,
    Qube,
    QubePut,
    QubeRemoved,
    RecordState,
    Run,
    SystemPut,
    WireEvent,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import StartSpec
from bulkhead.model.view import View
from services.registry import encoding
from services.registry.adapters import journal as journals
from services.registry.adapters.checkpoint import ForeignEdit, NotesFolder, StoreFile
from services.registry.adapters.journal import (
    ChangeRow,
    Journal,
    JournalCorrupt,
    JournalFull,
    NewStore,
    ReplyRow,
    Transaction,
    history,
    sha256,
)
from services.registry.core import adopt, canonical
from services.registry.core.document import Documents, Picture
from services.registry.core.foreign import DONE, INTENDED, CheckpointRow, Instruction
from services.registry.core.group import Accepted, Numbers, Planned
from services.registry.core.replay import Aside, aside_of
from services.registry.engine import Engine, Origin
from services.registry.numbers import KEEP_S, RecentNumbers
from services.registry.replies import DurableReplies
from services.registry.snapshots import HANDLE_S, HANDLES, PAGE_BYTES, Snapshots

U1 = "11111111-1111-4111-8111-111111111111"
STORE = "99999999-9999-4999-8999-999999999999"


def qube(name: str = "work", **more: Any) -> Qube:
    return replace(Qube(U1, name, 2, "AppVM", properties={"label": "red"}), **more)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal.create(tmp_path / "journal.sqlite", NewStore(STORE, 10, 0, b"<qubes/>"))
    yield opened
    opened.close()


def row(revision: int, delta: bytes = b"d") -> ChangeRow:
    return ChangeRow(revision, 1.5, "adminapi", "dom0", "Mutate", "{}", "{}", "{}", delta)


def reopened(journal: Journal) -> Journal:
    journal.close()
    again = Journal.open(journal.path)
    assert again is not None
    return again


# ---- the journal


def test_what_was_committed_is_there_again(journal: Journal) -> None:
    journal.commit(
        Transaction(
            changes=[row(11), row(12)],
            operations=[("o", 11, b"op")],
            hidden=[("u", 12, b"hid")],
            blobs=[("aside", "u", b"a"), ("notes", "u", b"n")],
            replies=[ReplyRow("adminapi", b"r" * 16, 5.0, b"body")],
            epoch=3,
        )
    )
    journal.commit(Transaction(changes=[row(13)], operations=[("o", 13, None)]))
    with closing(reopened(journal)) as again:
        assert (again.store_id, again.revision, again.epoch) == (STORE, 13, 3)
        assert [r.revision for r in again.changes_after(10)] == [11, 12, 13]
        assert [r.revision for r in again.changes_after(12)] == [13]
        assert again.operations() == [] and again.hidden() == [b"hid"]
        assert again.blobs("aside") == {"u": b"a"}
        assert again.replies(5.0) == [ReplyRow("adminapi", b"r" * 16, 5.0, b"body")]
        assert again.replies(5.1) == []


def test_the_chain_notices_alteration_and_loss(journal: Journal) -> None:
    for revision in range(11, 16):
        journal.commit(Transaction(changes=[row(revision)]))
    journal.close()
    with closing(sqlite3.connect(journal.path)) as db:
        db.execute("UPDATE change SET result = 'x' WHERE revision = 13")
        db.commit()
    with closing(reopened(journal)) as again:
        with pytest.raises(JournalCorrupt, match="13 was altered"):
            list(again.changes_after(10))
        assert [r.revision for r in again.changes_after(13)] == [14, 15]
    with closing(sqlite3.connect(journal.path)) as db:
        db.execute("DELETE FROM change WHERE revision = 13")
        db.commit()
    with closing(reopened(journal)) as again:
        with pytest.raises(JournalCorrupt, match="13 is missing"):
            list(again.changes_after(10))


def test_three_checkpoints_are_kept_and_the_changes_after_them(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "KEPT_CHANGES", 4)
    for number in range(1, 6):
        for revision in range(journal.revision + 1, journal.revision + 4):
            journal.commit(Transaction(changes=[row(revision)]))
        document = b"document %d" % number
        checkpoint = CheckpointRow(journal.revision, journal.revision, sha256(document), INTENDED)
        journal.intend(checkpoint, zlib.compress(document))
        assert journal.checkpoints[-1] == checkpoint
        journal.done(checkpoint, now=100.0)
    assert [c.revision for c in journal.checkpoints] == [19, 22, 25]
    assert all(c.state == DONE for c in journal.checkpoints)
    assert [journal.document(c) for c in journal.checkpoints] == [
        b"document 3",
        b"document 4",
        b"document 5",
    ]
    # Never beyond the oldest kept checkpoint, although only four were to be kept.
    assert [r.revision for r in journal.changes_after(19)] == list(range(20, 26))
    assert next(journal.hashed_rows(0)).row.revision == 20


def test_an_intended_row_that_never_became_the_file_goes(journal: Journal) -> None:
    lost = CheckpointRow(10, 10, "aa", INTENDED)
    journal.intend(lost, b"")
    kept = CheckpointRow(10, 10, "bb", INTENDED)
    journal.intend(kept, b"")
    journal.done(kept, now=0.0)
    assert "aa" not in {c.sha256 for c in journal.checkpoints}


def test_a_document_that_does_not_verify_is_none(journal: Journal) -> None:
    bad = CheckpointRow(11, 11, "00" * 32, INTENDED)
    journal.intend(bad, zlib.compress(b"other"))
    assert journal.document(bad) is None
    journal.intend(replace(bad, sha256="11"), b"no zlib")
    assert journal.document(replace(bad, sha256="11")) is None


def test_old_replies_go(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "REPLY_ROWS", 3)
    replies = [ReplyRow("a", bytes([n]) * 16, 1000.0 + n, b"") for n in range(8)]
    journal.commit(Transaction(changes=[row(11)], replies=replies))
    checkpoint = CheckpointRow(11, 11, "aa", INTENDED)
    journal.intend(checkpoint, b"")
    journal.done(checkpoint, now=1000.0 + journals.REPLY_SECONDS + 6)
    assert journal.replies(0.0) == replies[6:]
    journal.done(checkpoint, now=9e9)
    assert journal.replies(0.0) == []


def test_a_refused_transaction_leaves_nothing(journal: Journal) -> None:
    with pytest.raises(journals.JournalBroken):
        journal.commit(Transaction(changes=[row(11), row(11)]))
    assert journal.revision == 10
    journal.commit(Transaction(changes=[row(11)]))
    assert [r.revision for r in journal.changes_after(10)] == [11]


def test_no_space_is_told_apart(journal: Journal) -> None:
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(JournalFull, match="free space"):
        journal.commit(Transaction(changes=[row(11, b"x" * 100_000)]))
    assert journal.revision == 10
    journal.commit(Transaction(changes=[row(11)]))


def test_history_pages_both_ways(journal: Journal) -> None:
    for revision in range(11, 16):
        mention = '{"qube/X":{}}' if revision % 2 else "{}"
        journal.commit(Transaction(changes=[replace(row(revision), after=mention)]))

    def revisions(after: int, limit: int, mention: str, back: bool) -> tuple[list[int], bool]:
        rows, more = history(journal.path, after, limit, mention, back)
        return [r.row.revision for r in rows], more

    assert revisions(0, 2, "", False) == ([11, 12], True)
    assert revisions(12, 9, "", False) == ([13, 14, 15], False)
    assert revisions(0, 2, "", True) == ([15, 14], True)
    assert revisions(14, 9, "", True) == ([13, 12, 11], False)
    assert revisions(0, 9, "qube/X", False) == ([11, 13, 15], False)


def test_the_shell_of_a_journal_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    assert Journal.open(path) is None
    path.touch()
    assert Journal.open(path) is None
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
    assert Journal.open(path) is None


def test_another_database_is_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE t(x)")
        db.commit()
    with pytest.raises(JournalCorrupt, match="not a journal"):
        Journal.open(path)
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(JournalCorrupt):
        Journal.open(path)


# ---- encoding


def test_deltas_are_exact_and_without_operations_and_facts() -> None:
    full = qube(
        features={"b": "1", "a": ""},
        tags=frozenset({"x"}),
        notes="n",
        run=Run(Phase.UP, "boot"),
        rules_digest="d",
        revision=7,
    )
    changes: list[Change] = [
        QubePut(full),
        QubeRemoved("u"),
        SystemPut("a", "1"),
        FactPut(HostFact("sim")),
        OperationPut(Operation("o", "START", StartSpec("work"))),
    ]
    decoded = encoding.decode_delta(encoding.encode_delta(encoding.encode_changes(changes)))
    assert decoded == changes[:3]
    assert list(decoded[0].qube.features) == ["b", "a"]  # type: ignore[union-attr]
    with pytest.raises(encoding.EncodingError):
        encoding.decode_delta(b"\xff\xff\xff")


def test_asides_come_back() -> None:
    aside = Aside(Run(Phase.STOPPING, "b"), "digest", 9, "notes")
    stored = encoding.encode_aside(aside)
    assert encoding.decode_asides({"u": stored}, {"u": b"notes"}) == {"u": aside}
    assert encoding.decode_asides({"u": encoding.encode_aside(aside_of(qube()))}, {}) == {
        "u": aside_of(qube())
    }


# ---- files


def test_a_file_is_replaced_only_while_it_is_ours(tmp_path: Path) -> None:
    file = StoreFile(tmp_path / "qubes.xml")
    assert file.read() is None and file.sha256() == ""
    file.replace(b"one", sha256(b"one"), "")
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o660
    with pytest.raises(ForeignEdit):
        file.replace(b"two", sha256(b"two"), sha256(b"other"))
    assert file.path.read_bytes() == b"one"
    file.path.write_bytes(b"eno")  # the same size, by another hand
    with pytest.raises(ForeignEdit):
        file.replace(b"two", sha256(b"two"), sha256(b"one"))
    file.replace(b"two", sha256(b"two"), sha256(b"eno"))
    assert [p.name for p in tmp_path.iterdir()] == ["qubes.xml"]


def test_what_stands_beside_gets_a_free_name(tmp_path: Path) -> None:
    file = StoreFile(tmp_path / "qubes.xml")
    names = []
    for number in range(3):
        file.path.write_bytes(b"%d" % number)
        names.append(file.keep_beside("bad").name)
    assert names == ["qubes.xml.bad", "qubes.xml.bad-2", "qubes.xml.bad-3"]
    assert (tmp_path / "qubes.xml.bad-3").read_bytes() == b"2"


def test_notes_and_their_links(tmp_path: Path) -> None:
    (tmp_path / "appvms/work").mkdir(parents=True)
    notes = NotesFolder(tmp_path / "notes", {"AppVM": tmp_path / "appvms"})
    notes.write(U1, "ä\n")
    notes.link(U1, "AppVM", "work")
    notes.link(U1, "AppVM", "work")
    notes.link(U1, "AppVM", "nobody")  # no folder: no link
    place = tmp_path / "appvms/work/notes.txt"
    assert not place.readlink().is_absolute() and place.read_text() == "ä\n"
    assert notes.present() == {U1: "ä\n"}
    # The link is not followed when 4.4's own notes are looked for.
    assert notes.older("AppVM", "work") == ""
    notes.write(U1, "")
    assert notes.present() == {}
    place.unlink()
    place.write_text("from 4.4")
    assert notes.older("AppVM", "work") == "from 4.4"
    notes.link(U1, "AppVM", "work")
    assert place.read_text() == "from 4.4"


# ---- documents and adoption


def store_view() -> View:
    view = View()
    view.apply(QubePut(Qube(ADMINVM_UUID, "dom0", 0, "AdminVM", properties={"label": "black"})))
    return view


def test_only_changed_fragments_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from bulkhead.model import xmlstore

    made: list[str] = []
    fragment = xmlstore.fragment

    def counting(record: Qube) -> bytes:
        made.append(record.name)
        return fragment(record)

    monkeypatch.setattr(xmlstore, "fragment", counting)
    documents = Documents()
    view = store_view()
    view.apply(QubePut(qube()))
    first = documents.render(Picture.of(view), Instruction(STORE, 1))
    assert sorted(made) == ["dom0", "work"]
    made.clear()
    view.apply(QubePut(qube(run=Run(Phase.UP, "b"), revision=4, notes="n")))
    assert documents.render(Picture.of(view), Instruction(STORE, 1)) == first
    assert made == []
    view.apply(QubePut(qube(tags=frozenset({"t"}))))
    assert documents.render(Picture.of(view), Instruction(STORE, 2)) != first
    assert made == ["work"]


def test_adopt_changes_adds_and_removes() -> None:
    view = store_view()
    other = Qube("2" * 8 + "-2222-4222-8222-222222222222", "gone", 3, "AppVM")
    view.apply_all([QubePut(qube(notes="n", revision=5)), QubePut(other), SystemPut("a", "1")])
    fresh = replace(other, uuid=U1.replace("1", "3"), name="fresh")
    edited = [
        QubePut(view.adminvm),
        QubePut(qube(uuid="4" * 36, properties={"label": "blue"})),  # found by its name
        QubePut(fresh),
    ]
    changes, events = adopt.plan_adopt(view, edited)
    view.apply_all(changes)
    assert [q.name for q in view.qubes()] == ["dom0", "fresh", "work"]
    work = view.by_uuid(U1)
    assert work is not None and work.properties["label"] == "blue" and work.notes == "n"
    assert view.properties == {}
    assert [e.name for e in events] == ["domain-delete", "domain-add", "property-reset:label"]
    assert adopt.plan_adopt(view, [QubePut(q) for q in view.qubes()]) == ((), ())


@pytest.mark.parametrize("how", ["running", "locked", "hidden", "removed"])
def test_adopt_does_not_touch_what_is_in_use(how: str) -> None:
    view = store_view()
    view.apply(QubePut(qube()))
    edited: list[QubePut] = [QubePut(view.adminvm)]
    if how in ("running", "removed"):
        view.apply(QubePut(qube(run=Run(Phase.UP, "b"))))
    if how == "locked":
        operation = Operation("o", "RESIZE", None, (U1,), OperationState.RUNNING)
        view.apply(OperationPut(operation))
    if how == "hidden":
        view.apply(QubePut(qube(state=RecordState.DELETING)))
    if how != "removed":
        edited.append(QubePut(qube(tags=frozenset({"t"}))))
    before = canonical.pages(view, 1 << 20)
    with pytest.raises(adopt.Blocked) as blocked:
        adopt.plan_adopt(view, edited)
    assert blocked.value.names == ("work",)
    assert canonical.pages(view, 1 << 20) == before


# ---- the engine


class Recorder:
    """A stream that keeps what it is given."""

    def __init__(self) -> None:
        self.entries: list[tuple[records_pb2.StreamEntry, records_pb2.StreamEntry | None]] = []
        self.skipped: list[int] = []

    def publish(
        self, entry: records_pb2.StreamEntry, public: records_pb2.StreamEntry | None = None
    ) -> None:
        self.entries.append((entry, public))

    def skip(self, seq: int, revision: int) -> None:
        self.skipped.append(seq)


@dataclass
class Step:
    act: Callable[[View, Numbers], Planned]

    def plan(self, view: View, now: Numbers, /) -> Planned:
        return self.act(view, now)


def putting(*changes: object, **more: object) -> Step:
    return Step(lambda view, now: Planned(tuple(changes), **more))  # type: ignore[arg-type]


ORIGIN = Origin("adminapi", "dom0", "Test")


class Bench:
    def __init__(self, journal: Journal, **more: int) -> None:
        self.stream = Recorder()
        self.settled: list[Accepted] = []
        self.fatal: list[BaseException] = []
        self.engine = Engine(
            store_view(),
            journal,
            self.stream,
            committed=self.settled.extend,
            fatal=self.fatal.append,
            log=logging.getLogger("bulkhead.test"),
            clock=lambda: 7.0,
            **more,
        )


def run(journal: Journal, work: Callable[[Bench], Awaitable[None]], **more: int) -> None:
    async def main() -> None:
        bench = Bench(journal, **more)
        async with asyncio.timeout(20):
            await work(bench)
            await bench.engine.close()

    asyncio.run(main())


def test_one_commit_for_all_that_wait(journal: Journal) -> None:
    async def work(bench: Bench) -> None:
        steps = [putting(SystemPut(f"p{n}", str(n))) for n in range(50)]
        accepted = await asyncio.gather(*(bench.engine.submit(s, ORIGIN) for s in steps))
        assert [a.revision for a in accepted] == list(range(11, 61))
        assert [e.seq for e, _ in bench.stream.entries] == list(range(1, 51))
        # The first goes alone, the others wait for it together.
        assert bench.engine.counters.commits == 2
        assert bench.engine.counters.largest_batch == 49
        assert journal.revision == 60

    run(journal, work)


def test_readers_never_see_what_is_not_durable(journal: Journal) -> None:
    async def work(bench: Bench) -> None:
        pending = asyncio.ensure_future(bench.engine.submit(putting(SystemPut("a", "1")), ORIGIN))
        await asyncio.sleep(0)
        assert bench.engine.view.properties == {"a": "1"}
        assert bench.engine.revision == 10
        seen = await bench.engine.quiet(
            lambda: (dict(bench.engine.view.properties), bench.engine.revision)
        )
        assert seen == ({"a": "1"}, 11)
        await pending

    run(journal, work)


def test_a_failed_commit_takes_back_only_what_needed_it(journal: Journal) -> None:
    async def work(bench: Bench) -> None:
        first = asyncio.ensure_future(bench.engine.submit(putting(SystemPut("a", "1")), ORIGIN))
        await asyncio.sleep(0)

        def full(transaction: Transaction) -> None:
            raise JournalFull("no space")

        commit, journal.commit = journal.commit, full  # type: ignore[method-assign]
        others = asyncio.gather(
            bench.engine.submit(putting(SystemPut("b", "2")), ORIGIN),
            bench.engine.submit(putting(FactPut(HostFact("sim")), durable=False), ORIGIN),
            bench.engine.submit(Step(lambda v, n: _refuse_if("b" in v.properties)), ORIGIN),
            return_exceptions=True,
        )
        refused, fact, third = await others
        assert isinstance(refused, BusError) and refused.reason == "STORE_FULL"
        assert "nothing was changed" in refused.message
        assert isinstance(fact, Accepted) and bench.engine.view.host == HostFact("sim")
        # It was refused for a change that never came to be, so it was asked again.
        assert isinstance(third, Accepted)
        journal.commit = commit  # type: ignore[method-assign]
        await first
        assert bench.engine.view.properties == {"a": "1"}
        assert [e.seq for e, _ in bench.stream.entries] == [1, 2]
        assert (await bench.engine.submit(putting(SystemPut("c", "3")), ORIGIN)).revision == 12

    run(journal, work)


def _refuse_if(condition: bool) -> Planned:
    if condition:
        raise Refusal("QUBE_EXISTS", "there already")
    return Planned(durable=False)


def test_a_broken_journal_ends_it(journal: Journal) -> None:
    async def work(bench: Bench) -> None:
        def broken(transaction: Transaction) -> None:
            raise journals.JournalBroken("disk I/O error")

        journal.commit = broken  # type: ignore[method-assign]
        with pytest.raises(BusError) as unknown:
            await bench.engine.submit(putting(SystemPut("a", "1")), ORIGIN)
        assert unknown.value.reason == "STORE_BROKEN" and len(bench.fatal) == 1
        with pytest.raises(BusError):
            await bench.engine.submit(putting(SystemPut("a", "1")), ORIGIN)
        assert bench.stream.entries == []

    run(journal, work)


def test_events_of_a_refused_change_are_sequenced(journal: Journal) -> None:
    async def work(bench: Bench) -> None:
        def act(view: View, now: Numbers) -> Planned:
            raise PlanRefused(
                Refusal("QUBE_EXISTS", "there already"), [WireEvent("work", "domain-pre-start")]
            )

        numbers: list[tuple[int, int]] = []
        with pytest.raises(Refusal):
            await bench.engine.submit(
                Step(act), ORIGIN, number=lambda revision, seq: numbers.append((revision, seq))
            )
        assert numbers[-1] == (10, 1)
        ((entry, _),) = bench.stream.entries
        assert entry.seq == 1 and entry.events[0].name == "domain-pre-start"

    run(journal, work)


def test_the_public_entry_has_no_hidden_record(journal: Journal) -> None:
    async def work(bench: Bench) -> None:
        for change in (
            QubePut(qube(state=RecordState.CREATING)),
            QubePut(qube()),
            QubePut(qube(state=RecordState.DELETING)),
            QubeRemoved(U1),
        ):
            await bench.engine.submit(putting(change), ORIGIN)
        shown = [
            None if public is None else [c.WhichOneof("what") for c in public.changes]
            for _, public in bench.stream.entries
        ]
        assert shown == [[], None, ["qube_removed"], []]

    run(journal, work)


def test_an_entry_too_large_to_send_is_a_hole(journal: Journal) -> None:
    async def work(bench: Bench) -> None:
        await bench.engine.submit(putting(SystemPut("a", "x" * 5000)), ORIGIN)
        await bench.engine.submit(putting(SystemPut("a", "x")), ORIGIN)
        assert bench.stream.skipped == [1]
        assert [e.seq for e, _ in bench.stream.entries] == [2]

    run(journal, work, entry_limit=4000)


def test_the_queue_is_bounded(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.registry.engine.QUEUE_LIMIT", 5)

    async def work(bench: Bench) -> None:
        results = await asyncio.gather(
            *(bench.engine.submit(putting(SystemPut("a", str(n))), ORIGIN) for n in range(10)),
            return_exceptions=True,
        )
        busy = [r for r in results if isinstance(r, BusError)]
        assert len(busy) == 4 and {e.reason for e in busy} == {"REGISTRY_BUSY"}

    run(journal, work)


def test_a_caller_that_gives_up_does_not_take_its_change_back(journal: Journal) -> None:
    async def work(bench: Bench) -> None:
        task = asyncio.ensure_future(bench.engine.submit(putting(SystemPut("a", "1")), ORIGIN))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await bench.engine.quiet(lambda: None)
        assert journal.revision == 11 and bench.engine.view.properties == {"a": "1"}

    run(journal, work)


def test_a_late_request_is_not_begun(journal: Journal) -> None:
    async def work(bench: Bench) -> None:
        def late() -> None:
            raise BusError("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "too late")

        with pytest.raises(BusError):
            await bench.engine.submit(putting(SystemPut("a", "1")), ORIGIN, check=late)
        assert journal.revision == 10 and bench.engine.view.properties == {}

    run(journal, work)


# ---- replies, snapshots, numbers


def stored(seq: int) -> StoredReply:
    header = envelope_pb2.ReplyHeader(request_id=b"r" * 16, revision=3, seq=seq)
    return StoredReply("m", header.SerializeToString(), b"body")


def test_replies_of_an_earlier_start_get_the_present_seq() -> None:
    now = [1000.0]
    replies = DurableReplies(lambda: 42, clock=lambda: now[0])
    replies.load(
        [
            ReplyRow("a", b"1" * 16, 999.0, stored(7000).to_bytes()),
            ReplyRow("a", b"2" * 16, 999.0, b"damaged"),
        ]
    )
    old = replies.get("a", b"1" * 16)
    assert old is not None and envelope_pb2.ReplyHeader.FromString(old.header).seq == 42
    assert old.body == b"body" and replies.get("a", b"2" * 16) is None
    assert replies.get("b", b"1" * 16) is None
    replies.put("a", b"3" * 16, stored(41))
    replies.put("a", b"3" * 16, stored(43))
    fresh = replies.get("a", b"3" * 16)
    assert fresh is not None and envelope_pb2.ReplyHeader.FromString(fresh.header).seq == 41
    now[0] += journals.REPLY_SECONDS
    assert replies.get("a", b"1" * 16) is None
    replies.put("a", b"4" * 16, stored(44))
    assert len(replies) == 2


def test_replies_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.registry.replies.REPLY_ROWS", 3)
    replies = DurableReplies(lambda: 0)
    for number in range(6):
        replies.put("a", bytes([number]) * 16, stored(number))
    assert len(replies) == 3
    assert replies.get("a", bytes([2]) * 16) is None
    assert replies.get("a", bytes([5]) * 16) is not None


def test_snapshot_handles_are_bounded_and_expire() -> None:
    now = [0.0]
    snapshots = Snapshots(clock=lambda: now[0])
    view = store_view()
    first = snapshots.take("adminapi", view, 1, 1, with_hidden=False)
    for _ in range(HANDLES):
        now[0] += 0.1
        snapshots.take("adminapi", view, 1, 1, with_hidden=False)
    assert len(snapshots) == HANDLES
    with pytest.raises(BusError):
        snapshots.find("adminapi", first.id, 0)
    last = snapshots.take("adminapi", view, 1, 1, with_hidden=False)
    assert snapshots.find("adminapi", last.id, 0) is last
    with pytest.raises(BusError):
        snapshots.find("backup", last.id, 0)
    with pytest.raises(BusError):
        snapshots.find("adminapi", last.id, 1)
    now[0] += HANDLE_S + 1
    with pytest.raises(BusError):
        snapshots.find("adminapi", last.id, 0)
    assert len(snapshots) == 0


def test_pages_stay_below_their_size_and_can_be_repeated() -> None:
    view = store_view()
    for number in range(30):
        record = qube(f"q{number}", uuid=str(number).zfill(36), qid=number + 2, notes="x" * 40_000)
        view.apply(QubePut(record))
    view.apply(QubePut(qube("hid", uuid="h" * 36, qid=99, state=RecordState.CREATING)))

    async def read(with_hidden: bool) -> list[str]:
        snapshots = Snapshots()
        snapshot = snapshots.take("lifecycle", view, 1, 1, with_hidden=with_hidden)
        names: list[str] = []
        number = 0
        while True:
            page = await snapshots.page(snapshot, number)
            again = await snapshots.page(snapshot, number)
            assert again.changes == page.changes and again.last == page.last
            assert sum(c.ByteSize() for c in page.changes) <= PAGE_BYTES
            names.extend(c.qube.name for c in page.changes if c.WhichOneof("what") == "qube")
            if page.last:
                return names
            number += 1

    names = asyncio.run(read(False))
    assert len(names) == len(set(names)) == 31 and "hid" not in names
    assert "hid" in asyncio.run(read(True))


def test_numbers_of_disposables_rest_for_a_week() -> None:
    now = [0.0]
    numbers = RecentNumbers(clock=lambda: now[0])
    disposable = qube(properties={"dispid": "77"})
    accepted = Accepted(putting(), Planned(), 1, 1, ((QubeRemoved(U1), QubePut(disposable)),))
    assert 77 not in numbers
    numbers.changed([accepted])
    assert 77 in numbers and 78 not in numbers and "77" not in numbers
    now[0] = KEEP_S
    assert 77 not in numbers
