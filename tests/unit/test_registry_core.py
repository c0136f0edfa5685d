"""The registry's pure parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.model.records import (
    ADMINVM_UUID,
    Change,
    DeviceFact,
    Fact,
    FactPut,
    FactRemoved,
    HostFact,
    KernelFact,
    Operation,
    OperationPut,
    OperationState,
    Phase,
    Pool,
    PoolFact,
    PoolPut,
    PowerFact,
    Qube,
    QubePut,
    QubeRemoved,
    RecordState,
    Run,
    SystemPut,
    SystemRemoved,
    WireEvent,
)
from bulkhead.model.refusal import REASONS as MODEL_REASONS
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import ApplySpec
from bulkhead.model.view import View
from services.registry.core import announce, audit, canonical, facts, foreign, operations
from services.registry.core.foreign import CheckpointRow, Found, Start, decide
from services.registry.core.group import Accepted, Numbers, Planned, Refused, plan_batch
from services.registry.core.reasons import REASONS
from services.registry.core.replay import Aside, aside_of, assemble, with_aside
from services.registry.core.visibility import public_changes, touches_file

U1 = "11111111-1111-4111-8111-111111111111"
U2 = "22222222-2222-4222-8222-222222222222"


def qube(uuid: str = U1, name: str = "work", qid: int = 2, **more: Any) -> Qube:
    return replace(Qube(uuid, name, qid, "AppVM"), **more)


def view_of(*changes: Change) -> View:
    view = View()
    view.apply(QubePut(Qube(ADMINVM_UUID, "dom0", 0, "AdminVM")))
    view.apply_all(changes)
    return view


@dataclass
class Step:
    """Work whose plan is a function."""

    act: Callable[[View, Numbers], Planned]

    def plan(self, view: View, now: Numbers) -> Planned:
        return self.act(view, now)


def changing(*changes: Change, durable: bool = True) -> Step:
    return Step(lambda view, now: Planned(changes, durable=durable))


def refusing() -> Step:
    def act(view: View, now: Numbers) -> Planned:
        raise Refusal("QUBE_NOT_FOUND", "No such qube")

    return Step(act)


class TestBatches:
    def test_each_piece_sees_the_earlier_ones(self) -> None:
        view = view_of()
        seen: list[str | None] = []

        def look(view: View, now: Numbers) -> Planned:
            found = view.qube("work")
            seen.append(found.name if found else None)
            return Planned(durable=False)

        plan_batch(view, [Step(look), changing(QubePut(qube())), Step(look)], Numbers(5, 9))
        assert seen == [None, "work"]

    def test_a_refusal_affects_only_itself(self) -> None:
        view = view_of()
        batch = plan_batch(
            view,
            [changing(SystemPut("a", "1")), refusing(), changing(SystemPut("b", "2"))],
            Numbers(),
        )
        assert [type(o) for o in batch.outcomes] == [Accepted, Refused, Accepted]
        assert view.properties == {"a": "1", "b": "2"}
        assert (batch.numbers.revision, batch.numbers.seq) == (2, 2)

    def test_a_bug_in_one_plan_does_not_stop_the_others(self) -> None:
        def broken(view: View, now: Numbers) -> Planned:
            raise ZeroDivisionError

        view = view_of()
        batch = plan_batch(view, [Step(broken), changing(SystemPut("a", "1"))], Numbers(0, 0))
        assert isinstance(batch.outcomes[0], Refused)
        assert view.properties == {"a": "1"}

    def test_taken_back_as_a_whole(self) -> None:
        view = view_of(QubePut(qube()), SystemPut("a", "0"))
        before = canonical.pages(view, 1 << 20)
        works = [
            changing(QubePut(qube(tags=frozenset({"x"}))), SystemPut("a", "1")),
            changing(QubeRemoved(U1)),
            changing(QubePut(qube(U2, "work", 2)), SystemRemoved("a")),
            changing(FactPut(HostFact("sim")), durable=False),
        ]
        batch = plan_batch(view, works, Numbers(0, 0))
        assert canonical.pages(view, 1 << 20) != before
        batch.take_back(view)
        assert canonical.pages(view, 1 << 20) == before
        assert view.host is None

    def test_records_get_the_revision_of_their_change(self) -> None:
        view = view_of()
        plan_batch(view, [changing(SystemPut("a", "1")), changing(QubePut(qube()))], Numbers(41, 0))
        found = view.qube("work")
        assert found is not None and found.revision == 43

    def test_only_durable_pieces_get_a_revision(self) -> None:
        view = view_of()
        works = [
            changing(FactPut(HostFact("sim")), durable=False),
            changing(SystemPut("a", "1")),
            Step(lambda view, now: Planned(durable=False)),
        ]
        batch = plan_batch(view, works, Numbers(7, 100))
        first, second, third = (o for o in batch.outcomes if isinstance(o, Accepted))
        assert (first.revision, first.seq, first.published) == (7, 101, True)
        assert (second.revision, second.seq) == (8, 102)
        assert (third.revision, third.seq, third.published) == (8, 102, False)

    def test_a_dry_run_applies_nothing(self) -> None:
        view = view_of()
        dry = Step(lambda v, r: Planned((SystemPut("a", "1"),), (WireEvent("", "x"),), silent=True))
        batch = plan_batch(view, [dry], Numbers(3, 3))
        assert view.properties == {} and batch.durable == []
        assert (batch.numbers.revision, batch.numbers.seq) == (3, 3)

    def test_facts_end_with_their_qube(self) -> None:
        view = view_of(
            QubePut(qube()),
            FactPut(PowerFact(U1, "b", 1, "running")),
            FactPut(DeviceFact(U1, "pci", "p")),
        )
        batch = plan_batch(view, [changing(QubeRemoved(U1))], Numbers(0, 0))
        assert not view.facts()
        accepted = batch.outcomes[0]
        assert isinstance(accepted, Accepted)
        assert {c for c, _ in accepted.done} >= {
            FactRemoved(f"power/{U1}"),
            FactRemoved(f"device/{U1}/pci/p"),
        }
        batch.take_back(view)
        assert len(view.facts()) == 2


class TestVisibility:
    def test_hidden_records_are_removals_or_nothing(self) -> None:
        hidden = qube(state=RecordState.CREATING)
        assert public_changes([(QubePut(hidden), QubeRemoved(U1))]) == []
        assert public_changes([(QubePut(hidden), QubePut(qube()))]) == [QubeRemoved(U1)]
        assert public_changes([(QubeRemoved(U1), QubePut(hidden))]) == []
        assert public_changes([(QubeRemoved(U1), QubePut(qube()))]) == [QubeRemoved(U1)]
        assert public_changes([(QubePut(qube()), QubePut(hidden))]) == [QubePut(qube())]

    @pytest.mark.parametrize(
        ("change", "inverse", "touched"),
        [
            (QubePut(qube()), QubeRemoved(U1), True),
            (QubePut(qube(tags=frozenset("x"))), QubePut(qube()), True),
            (QubePut(qube(notes="n")), QubePut(qube()), True),
            (QubePut(qube(run=Run(Phase.UP, "b"), revision=9)), QubePut(qube()), False),
            (QubePut(qube(rules_digest="d")), QubePut(qube()), False),
            (QubePut(qube(state=RecordState.CREATING)), QubeRemoved(U1), False),
            (QubePut(qube(state=RecordState.DELETING)), QubePut(qube()), True),
            (QubeRemoved(U1), QubePut(qube(state=RecordState.DELETING)), False),
            (QubeRemoved(U1), QubePut(qube()), True),
            (OperationPut(Operation("o", "START", None)), None, False),
            (SystemPut("a", "1"), SystemPut("a", "1"), False),
            (SystemPut("a", "1"), SystemRemoved("a"), True),
            (PoolPut(Pool("p", "file")), PoolPut(Pool("p", "lvm_thin")), True),
        ],
    )
    def test_touches_file(self, change: Change, inverse: Change | None, touched: bool) -> None:
        assert touches_file([(change, inverse)]) is touched


class TestReplay:
    def test_parts_become_the_state(self) -> None:
        running = qube(run=Run(Phase.UP, "boot"), notes="n", rules_digest="d", revision=7)
        other = qube(U2, "old", 3)
        view = assemble(
            [QubePut(qube()), QubePut(other), SystemPut("a", "1")],
            {U1: aside_of(running)},
            [[SystemPut("a", "2")], [QubeRemoved(U2)], []],
            [qube("3" * 36, "fresh", 4, state=RecordState.CREATING)],
            [Operation("o", "CREATE", None, subjects=("3" * 36,))],
        )
        assert view.qube("work") == running
        assert view.qube_any("old") is None
        assert view.properties["a"] == "2"
        assert view.qube("fresh") is None and view.qube_any("fresh") is not None
        assert [o.id for o in view.operations_on("3" * 36)] == ["o"]

    def test_a_hidden_record_that_took_a_name_over(self) -> None:
        """The file still has the old bearer of the name and volume id."""
        from bulkhead.model.records import Volume

        volume = Volume("private", "pool", "appvms/work/private")
        old = qube(volumes=(volume,))
        new = qube(U2, "work", 2, state=RecordState.CREATING, volumes=(volume,))
        view = assemble([QubePut(old)], {}, [[QubeRemoved(U1)], [QubePut(new)]], [new], [])
        assert view.qube_any("work") == new
        assert [q.name for q in view.qubes()] == []

    def test_an_active_record_among_the_hidden_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="ACTIVE"):
            assemble([], {}, [], [qube()], [])

    def test_an_aside_completes_the_record(self) -> None:
        full = qube(run=Run(Phase.STOPPING, "b"), notes="x", rules_digest="y", revision=3)
        assert with_aside(qube(), aside_of(full)) == full
        assert aside_of(qube()) == Aside(Run(), "", 0)


class TestAudit:
    def test_only_differences_and_the_name(self) -> None:
        before, after = audit.before_after(
            [(QubePut(qube(tags=frozenset({"b", "a"}), revision=3)), QubePut(qube(revision=2)))]
        )
        assert json.loads(before) == {f"qube/{U1}": {"name": "work", "tags": []}}
        assert json.loads(after) == {f"qube/{U1}": {"name": "work", "tags": ["a", "b"]}}

    def test_secrets_and_notes_are_left_out(self) -> None:
        secret = qube(features={"vpn-password": "hunter2", "a": "b"}, notes="my PIN is 1234")
        pool = Pool("p", "callback", {"conf_secret": "hunter2", "dir_path": "/x"})
        text = "".join(
            audit.before_after(
                [
                    (QubePut(secret), QubeRemoved(U1)),
                    (PoolPut(pool), None),
                    (SystemPut("api_token", "hunter2"), None),
                ]
            )
        )
        assert "hunter2" not in text and "1234" not in text
        assert "dir_path" in text and audit.LEFT_OUT in text

    def test_an_object_twice_keeps_the_first_before(self) -> None:
        first, second = qube(tags=frozenset("a")), qube(tags=frozenset("b"))
        before, after = audit.before_after(
            [(QubePut(first), QubeRemoved(U1)), (QubePut(second), QubePut(first))]
        )
        assert json.loads(before) == {f"qube/{U1}": None}
        assert json.loads(after)[f"qube/{U1}"]["tags"] == ["b"]


class TestCanonical:
    def test_revisions_facts_and_finished_operations_are_no_records(self) -> None:
        one = view_of(QubePut(qube(revision=1)))
        two = view_of(
            QubePut(qube(revision=9)),
            FactPut(HostFact("sim")),
            OperationPut(Operation("o", "START", None, state=OperationState.FAILED)),
        )
        assert canonical.pages(one, 1000) == canonical.pages(two, 1000)

    def test_pages_join_to_the_same_lines(self) -> None:
        view = view_of(*(QubePut(qube(str(n).zfill(36), f"q{n}", n + 2)) for n in range(40)))
        pages = canonical.pages(view, 900)
        assert len(pages) > 5
        assert "".join(pages) == canonical.pages(view, 1 << 20)[0]
        assert all(json.loads(line) for line in "".join(pages).splitlines())

    def test_an_empty_view_has_one_page(self) -> None:
        assert canonical.pages(View(), 100) == [""]


class TestFacts:
    def test_other_devices_are_told_of_in_order(self) -> None:
        def device(port: str, device_id: str = "1:2", **more: str) -> DeviceFact:
            return DeviceFact(U1, "block", port, device_id, **more)  # type: ignore[arg-type]

        before = [FactPut(device("sda", attached_to=U2)), FactPut(device("sdb"))]
        view = view_of(
            QubePut(qube()), QubePut(qube(uuid=U2, name="front", qid=9)), FactPut(HostFact("sim"))
        )
        view.apply_all(before)
        changes: list[Change] = [
            FactPut(device("sdc")),
            FactRemoved(f"device/{U1}/block/sda"),
            FactPut(device("sdb", "3:4")),
        ]
        name = qube().name
        told = [(e.subject, e.name, e.pairs) for e in facts.device_events(view, changes)]
        assert told == [
            (name, "device-list-change:block", ()),
            ("front", "device-detach:block", (("port", f"{name}:sda"),)),
            (name, "device-removed:block", (("port", f"{name}:sda"),)),
            (name, "device-removed:block", (("port", f"{name}:sdb"),)),
            (name, "device-added:block", (("device", f"{name}:sdb:3:4"),)),
            (name, "device-added:block", (("device", f"{name}:sdc:1:2"),)),
        ]
        # Attached, or described otherwise: the same device.
        assert facts.device_events(view, [FactPut(device("sdb", attached_to=U2))]) == ()
        # What the first report tells was there before.
        first = view_of(QubePut(qube()))
        assert facts.device_events(first, [FactPut(HostFact("sim")), FactPut(device("x"))]) == ()
        assert facts.device_events(view, [FactPut(DeviceFact("gone", "block", "x"))]) == ()

    def test_only_the_owner_may_report(self) -> None:
        view = view_of()
        with pytest.raises(Refusal) as refused:
            facts.plan_facts(view, "storage", [HostFact("sim")], [], False)
        assert refused.value.reason == "NOT_YOURS"
        with pytest.raises(Refusal):
            facts.plan_facts(view, "firewall", [], ["pool/x"], False)
        with pytest.raises(Refusal):
            facts.plan_facts(view, "domains", [], ["nonsense"], False)

    def test_complete_drops_only_the_callers_others(self) -> None:
        view = view_of(FactPut(KernelFact("a")), FactPut(KernelFact("b")), FactPut(HostFact("sim")))
        changes = facts.plan_facts(view, "storage", [KernelFact("a")], [], True)
        assert changes == (FactRemoved("kernel/b"),)

    def test_the_same_again_is_no_change(self) -> None:
        view = view_of(FactPut(PoolFact("p")))
        assert facts.plan_facts(view, "storage", [PoolFact("p")], [], False) == ()

    def test_unknown_qubes_are_dropped(self) -> None:
        report: list[Fact] = [PowerFact(U2, "b", 1, "running"), DeviceFact(U2, "pci", "x")]
        assert facts.plan_facts(view_of(), "domains", report, [], False) == ()

    @pytest.mark.parametrize(
        ("known", "report", "complete", "news"),
        [
            (None, ("b2", 1), False, True),
            (("b2", 5), ("b2", 6), False, True),
            (("b2", 5), ("b2", 4), False, False),
            (("b2", 5), ("b2", 4), True, False),
            (("b2", 5), ("b2", 5), False, False),
            (("b2", 5), ("b2", 5), True, True),
            (("b2", 5), ("b1", 99), False, False),  # late news of an older boot
            (("b1", 5), ("b2", 1), False, True),  # first news of the present boot
            (("b0", 5), ("b1", 1), False, True),
        ],
    )
    def test_late_reports_are_dropped(
        self,
        known: tuple[str, int] | None,
        report: tuple[str, int],
        complete: bool,
        news: bool,
    ) -> None:
        view = view_of(QubePut(qube(run=Run(Phase.UP, "b2"))))
        if known:
            view.apply(FactPut(PowerFact(U1, *known, "running")))
        fact = PowerFact(U1, *report, "paused")
        changes = facts.plan_facts(view, "domains", [fact], [], complete)
        assert (FactPut(fact) in changes) is news
        assert FactRemoved(f"power/{U1}") not in changes


class TestAnnounce:
    def test_every_service_only_its_own_names(self) -> None:
        assert announce.may_announce("firewall", "firewall-changed")
        assert not announce.may_announce("firewall", "domain-start")
        assert announce.may_announce("domains", "device-list-change:pci")
        assert not announce.may_announce("domains", "device-list-change:")
        assert not announce.may_announce("backup", "domain-start")

    def test_nobody_announces_what_record_changes_make(self) -> None:
        made = ("domain-add", "domain-delete", "property-set:x", "domain-tag-add:t")
        for caller in announce.ALLOWED:
            for name in made:
                assert not announce.may_announce(caller, name), (caller, name)

    def test_subject_must_be_the_qube(self) -> None:
        view = view_of(QubePut(qube()))
        event = WireEvent("other", "firewall-changed")
        with pytest.raises(Refusal):
            announce.plan_announce(view, "firewall", U1, "", (event,))
        with pytest.raises(Refusal):
            announce.plan_announce(view, "firewall", "", "", (event,))
        with pytest.raises(Refusal) as refused:
            announce.plan_announce(view, "firewall", U2, "", ())
        assert refused.value.reason == "QUBE_NOT_FOUND"

    def test_event_of_the_qube_gets_its_name(self) -> None:
        view = view_of(QubePut(qube()))
        event = WireEvent("", "firewall-changed")
        named = WireEvent("work", "firewall-changed", (), U1)
        assert announce.plan_announce(view, "firewall", U1, "", (event,)) == (named,)

    def test_news_of_an_older_boot_are_dropped(self) -> None:
        view = view_of(QubePut(qube(run=Run(Phase.UP, "b2"))))
        event = WireEvent("work", "domain-paused", (), U1)
        assert announce.plan_announce(view, "domains", U1, "b2", (event,)) == (event,)
        assert announce.plan_announce(view, "domains", U1, "b1", (event,)) == ()

    def test_hidden_qubes_are_silent(self) -> None:
        view = view_of(QubePut(qube(state=RecordState.CREATING)))
        event = WireEvent("work", "firewall-changed", (), U1)
        assert announce.plan_announce(view, "firewall", U1, "", (event,)) == ()


def row(revision: int, sha: str, state: str = foreign.DONE) -> CheckpointRow:
    return CheckpointRow(revision, revision, sha, state)


class TestForeign:
    @pytest.mark.parametrize(
        ("found", "start", "revision", "beside"),
        [
            (Found("", False, False), Start.NO_STORE, None, False),
            (Found("x", False, False), Start.LOST, None, False),
            (Found("x", True, False), Start.ALONE, None, False),
            (Found("a", True, True, (row(1, "a"),)), Start.REPLAY, 1, False),
            (
                Found("b", True, True, (row(1, "a"), row(2, "b", foreign.INTENDED))),
                Start.REPLAY,
                2,
                False,
            ),
            (Found("a", True, True, (row(1, "a"), row(2, "b"))), Start.REPLAY, 1, False),
            (
                Found("", False, True, (row(1, "a"), row(2, "b")), frozenset("ab")),
                Start.FROM_BLOB,
                2,
                False,
            ),
            (
                Found("x", False, True, (row(1, "a"), row(2, "b")), frozenset("a")),
                Start.FROM_BLOB,
                1,
                True,
            ),
            (Found("x", False, True, (row(1, "a"),)), Start.LOST, None, False),
            (Found("x", True, True, (row(1, "a"),), frozenset("a")), Start.FOREIGN, 1, False),
            (Found("x", True, True, (row(1, "a"),)), Start.ALONE, None, False),
        ],
    )
    def test_decision(self, found: Found, start: Start, revision: int | None, beside: bool) -> None:
        decision = decide(found)
        assert decision.start is start
        assert (decision.row.revision if decision.row else None) == revision
        assert decision.keep_beside is beside

    def test_instruction(self) -> None:
        line = foreign.Instruction(U1, 42)
        assert foreign.read_instruction(line.render() + b"<qubes/>") == line
        assert foreign.read_instruction(b"<qubes/>") is None
        assert foreign.read_instruction(b"<qubes>" + line.render()) is None

    def test_difference_ignores_the_instruction(self) -> None:
        body = b"<qubes>\n  <a/>\n</qubes>\n"
        ours = foreign.Instruction(U1, 42).render() + body
        assert foreign.difference(ours, body) == ""
        shown = foreign.difference(ours, body.replace(b"<a/>", b"<b/>"))
        assert "-  <a/>" in shown and "+  <b/>" in shown

    def test_difference_is_bounded(self) -> None:
        ours = b"\n".join(b"%d" % n for n in range(50_000))
        theirs = b"\n".join(b"%d!" % n for n in range(50_000))
        assert len(foreign.difference(ours, theirs)) < 1000
        long = b"\n".join(b"x" * 1000 + b"%d" % n for n in range(1000))
        assert len(foreign.difference(b"", long)) < foreign.DIFFERENCE_LIMIT + 100


class TestOperations:
    def test_epoch(self) -> None:
        operations.check_epoch(3, 3)
        for other in (2, 4):
            with pytest.raises(Refusal) as refused:
                operations.check_epoch(other, 3)
            assert refused.value.reason == "STALE_EPOCH"

    def test_terminal_operations_never_move(self) -> None:
        view = view_of(OperationPut(Operation("o", "START", None, state=OperationState.FAILED)))
        with pytest.raises(Refusal) as refused:
            operations.unfinished(view, "o")
        assert refused.value.reason == "WRONG_OPERATION_STATE"
        with pytest.raises(Refusal):
            operations.unfinished(view, "p")

    @given(st.sampled_from(OperationState), st.sampled_from(OperationState))
    def test_transitions(self, old: OperationState, new: OperationState) -> None:
        operation = Operation("o", "START", None, state=old, pivoted=True, data={"a": "1"})

        def advance() -> Operation:
            return operations.advanced(
                operation,
                epoch=4,
                cursor="resume",
                state=new,
                progress=7.0,
                progress_text="t",
                data={"b": "2"},
                pivoted=False,
                error=None,
            )

        if new in operations.TRANSITIONS.get(old, ()):
            moved = advance()
            assert moved.state is new and moved.pivoted and moved.progress == 1.0
            assert moved.data == {"a": "1", "b": "2"}
        else:
            with pytest.raises((Refusal, KeyError)):
                advance()

    def test_retention(self) -> None:
        done = [
            Operation(str(n), "START", None, state=OperationState.SUCCEEDED, finished=float(n))
            for n in range(operations.KEEP_FINISHED + 100)
        ]
        view = view_of(
            OperationPut(Operation("live", "START", None)), *(OperationPut(o) for o in done)
        )
        gone = operations.expired(view, now=float(len(done)))
        assert sorted(gone, key=int) == [str(n) for n in range(100)]
        few = view_of(OperationPut(done[0]), OperationPut(done[-1]))
        assert operations.expired(few, now=7 * 24 * 3600.0 + 500) == ["0"]

    @pytest.mark.parametrize("many", [False, True])
    def test_what_a_running_qube_is_owed_is_known_as_long_as_it_runs(self, many: bool) -> None:
        def failed(name: str, boot_id: str, finished: float) -> OperationPut:
            spec = ApplySpec(U1, boot_id, parts=("keys",))
            state = OperationState.FAILED
            return OperationPut(Operation(name, "APPLY", spec, (U1,), state, finished=finished))

        old = [failed("a", "now", 1), failed("b", "now", 2), failed("c", "before", 3)]
        week = 7 * 24 * 3600.0
        more = [
            OperationPut(
                Operation(str(n), "START", None, state=OperationState.SUCCEEDED, finished=week)
            )
            for n in range(operations.KEEP_FINISHED + 100 if many else 1)
        ]
        up = qube(run=Run(Phase.UP, "now"))
        view = view_of(QubePut(up), *old, *more)
        assert {"a", "b", "c"} - set(operations.expired(view, week + 10)) == {"b"}
        view.apply(QubePut(replace(up, run=Run())))
        assert {"a", "b", "c"} <= set(operations.expired(view, week + 10))
        # A newer one does as well.
        view.apply_all([QubePut(up), failed("d", "now", week)])
        assert {"a", "b", "c"} <= set(operations.expired(view, week + 10))


def test_reasons_do_not_shadow_the_models() -> None:
    assert not set(REASONS) & set(MODEL_REASONS)
