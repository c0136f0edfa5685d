"""A replica and its registry, with a stream between them that loses, repeats and reorders."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkhead.api import records_pb2, registry_pb2
from bulkhead.bus import replica as replica_module
from bulkhead.bus.replica import Action, Apply, AskPage, Load, Replica, ReplicaState

STORE = "store"


def change(name: str, value: str) -> records_pb2.Change:
    return records_pb2.Change(system_property=records_pb2.KeyValue(key=name, value=value))


def entry(seq: int, boot: str = "b1", **fields: object) -> records_pb2.StreamEntry:
    values = {"store_id": STORE, "registry_boot": boot, "seq": seq, "revision": seq, **fields}
    return records_pb2.StreamEntry(**values)  # type: ignore[arg-type]


def page(
    seq: int, boot: str = "b1", *, last: bool = True, snapshot: str = "s", store: str = STORE
) -> registry_pb2.SnapshotReply:
    return registry_pb2.SnapshotReply(
        snapshot_id=snapshot, store_id=store, registry_boot=boot, seq=seq, revision=seq, last=last
    )


def live(seq: int = 5) -> Replica:
    replica = Replica()
    (ask,) = replica.on_entry(entry(0, progress=True))
    assert isinstance(ask, AskPage)
    replica.on_page(ask.attempt, page(seq))
    assert replica.live and replica.seq == seq
    return replica


def asks(actions: list[Action]) -> bool:
    return any(isinstance(a, AskPage) and a.page == 0 for a in actions)


def test_nothing_is_asked_before_the_subscription_is_in_force() -> None:
    replica = Replica()
    assert replica.state is ReplicaState.WAITING
    assert replica.on_page(0, page(3)) == [] and not replica.live
    assert asks(replica.on_entry(entry(3, progress=True)))


def test_pages_then_what_came_meanwhile() -> None:
    replica = Replica()
    (ask,) = replica.on_entry(entry(4))
    assert replica.on_entry(entry(5)) == []
    assert isinstance(ask, AskPage)
    (more,) = replica.on_page(ask.attempt, page(4, last=False))
    assert more == AskPage(ask.attempt, 1, "s")
    assert replica.on_entry(entry(6)) == []
    actions = replica.on_page(ask.attempt, page(4))
    assert isinstance(actions[0], Load) and actions[0].seq == 4
    assert [a.entry.seq for a in actions[1:] if isinstance(a, Apply)] == [5, 6]
    assert replica.live and replica.seq == 6 and replica.resyncs == 0


@pytest.mark.parametrize(
    ("arrives", "resync"),
    [
        (entry(6), False),
        (entry(5), False),
        (entry(1), False),
        (entry(7), True),
        (entry(5, progress=True), False),
        (entry(4, progress=True), False),
        (entry(6, progress=True), True),
        (entry(6, boot="b2"), True),
        (entry(0, boot="b2", progress=True), True),
        (entry(6, store_id="other"), True),
    ],
)
def test_what_needs_a_new_snapshot(arrives: records_pb2.StreamEntry, resync: bool) -> None:
    replica = live()
    assert asks(replica.on_entry(arrives)) is resync
    assert replica.live is not resync


def test_a_hole_during_the_snapshot() -> None:
    replica = Replica()
    (ask,) = replica.on_entry(entry(4))
    replica.on_entry(entry(7))
    assert isinstance(ask, AskPage)
    assert asks(replica.on_page(ask.attempt, page(4)))
    assert not replica.live


def test_progress_ahead_of_the_snapshot_means_a_loss() -> None:
    replica = Replica()
    (ask,) = replica.on_entry(entry(9, progress=True))
    assert isinstance(ask, AskPage)
    assert asks(replica.on_page(ask.attempt, page(8)))


def test_answers_to_an_earlier_attempt_are_ignored() -> None:
    replica = Replica()
    (first,) = replica.on_entry(entry(1))
    (second,) = replica.restart("test")
    assert isinstance(first, AskPage) and isinstance(second, AskPage)
    assert replica.on_page(first.attempt, page(1)) == []
    assert replica.on_page_failed(first.attempt) == []
    assert not replica.live
    replica.on_page(second.attempt, page(1))
    assert replica.live


def test_a_snapshot_that_changes_between_pages_is_taken_again() -> None:
    replica = Replica()
    (ask,) = replica.on_entry(entry(1))
    assert isinstance(ask, AskPage)
    replica.on_page(ask.attempt, page(1, last=False))
    assert asks(replica.on_page(ask.attempt, page(1, boot="b2")))


def test_the_buffer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "BUFFER_ENTRIES", 10)
    replica = Replica()
    replica.on_entry(entry(1))
    assert any(asks(replica.on_entry(entry(seq))) for seq in range(2, 13))
    assert len(replica._buffer) <= 10


# ---- the pair


@dataclass
class World:
    """A registry (some of whose starts lose the sequence), a bad stream, a replica."""

    boot: int = 1
    seq: int = 0
    state: dict[str, str] = field(default_factory=dict)
    history: dict[tuple[str, int], dict[str, str]] = field(default_factory=dict)
    stream: deque[records_pb2.StreamEntry] = field(default_factory=deque)
    pages: deque[tuple[int, registry_pb2.SnapshotReply | None]] = field(default_factory=deque)
    snapshots: dict[str, list[registry_pb2.SnapshotReply]] = field(default_factory=dict)
    replica: Replica = field(default_factory=Replica)
    copy: dict[str, str] = field(default_factory=dict)
    copy_at: tuple[str, int] = ("", 0)

    def __post_init__(self) -> None:
        self.note()

    @property
    def name(self) -> str:
        return f"b{self.boot}"

    def note(self) -> None:
        self.history[(self.name, self.seq)] = dict(self.state)

    def mutate(self, key: str, value: str) -> None:
        self.seq += 1
        self.state[key] = value
        self.note()
        self.stream.append(entry(self.seq, self.name, changes=[change(key, value)]))

    def progress(self) -> None:
        self.stream.append(entry(self.seq, self.name, progress=True))

    def restart(self) -> None:
        self.boot += 1
        self.seq = 0
        self.stream.clear()
        self.snapshots.clear()
        self.note()

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case AskPage(attempt, number, snapshot_id):
                    self.pages.append((attempt, self.answer(number, snapshot_id)))
                case Load(changes, seq, _, boot):
                    self.copy = {c.system_property.key: c.system_property.value for c in changes}
                    self.copy_at = (boot, seq)
                    self.check()
                case Apply(one):
                    for c in one.changes:
                        self.copy[c.system_property.key] = c.system_property.value
                    self.copy_at = (one.registry_boot, one.seq)
                    self.check()

    def check(self) -> None:
        """What the copy holds is exactly what the registry had at that point."""
        assert self.copy == self.history[self.copy_at]

    def answer(self, number: int, snapshot_id: str) -> registry_pb2.SnapshotReply | None:
        if number == 0:
            snapshot_id = f"{self.name}/{self.seq}"
            items = [change(k, v) for k, v in sorted(self.state.items())]
            chunks = [items[at : at + 2] for at in range(0, len(items), 2)] or [[]]
            self.snapshots[snapshot_id] = [
                registry_pb2.SnapshotReply(
                    snapshot_id=snapshot_id,
                    store_id=STORE,
                    registry_boot=self.name,
                    seq=self.seq,
                    revision=self.seq,
                    changes=chunk,
                    last=chunk is chunks[-1],
                )
                for chunk in chunks
            ]
        found = self.snapshots.get(snapshot_id)
        return found[number] if found is not None else None

    def deliver(self) -> None:
        if self.stream:
            self.do(self.replica.on_entry(self.stream.popleft()))

    def deliver_page(self) -> None:
        if self.pages:
            attempt, answer = self.pages.popleft()
            if answer is None:
                self.do(self.replica.on_page_failed(attempt))
            else:
                self.do(self.replica.on_page(attempt, answer))


STEPS = st.one_of(
    st.tuples(st.just("mutate"), st.sampled_from("abcde"), st.sampled_from("123")),
    st.sampled_from(
        [(name, "", "") for name in ("deliver", "deliver", "page", "page", "progress")]
        + [(name, "", "") for name in ("lose", "repeat", "swap", "restart", "lose page")]
    ),
)


@settings(max_examples=400)
@given(st.lists(STEPS, max_size=80))
def test_the_copy_is_always_a_true_state_and_catches_up(steps: list[tuple[str, str, str]]) -> None:
    world = World()
    for step, key, value in steps:
        match step:
            case "mutate":
                world.mutate(key, value)
            case "deliver":
                world.deliver()
            case "page":
                world.deliver_page()
            case "progress":
                world.progress()
            case "lose":
                if world.stream:
                    world.stream.popleft()
            case "repeat":
                if world.stream:
                    world.stream.appendleft(world.stream[0])
            case "swap":
                if len(world.stream) > 1:
                    world.stream[0], world.stream[1] = world.stream[1], world.stream[0]
            case "restart":
                world.restart()
            case "lose page":
                if world.pages:
                    attempt, _ = world.pages.popleft()
                    world.pages.append((attempt, None))
    # Then nothing more is lost: a few progress messages and answers must be enough.
    for _ in range(6):
        world.progress()
        while world.stream or world.pages:
            world.deliver()
            world.deliver_page()
    assert world.replica.live
    assert world.copy_at == (world.name, world.seq)
    assert world.copy == world.state


@given(st.integers(1, 30), st.sets(st.integers(1, 30)))
def test_a_loss_is_noticed_at_the_next_thing_heard(count: int, lost: set[int]) -> None:
    replica = live(0)
    applied = []
    for seq in range(1, count + 1):
        if seq in lost:
            continue
        actions = replica.on_entry(entry(seq))
        applied += [a.entry.seq for a in actions if isinstance(a, Apply)]
        if not replica.live:
            break
    if replica.live:
        replica.on_entry(entry(count, progress=True))
    first_lost = min((n for n in lost if n <= count), default=None)
    assert replica.live is (first_lost is None)
    assert applied == list(range(1, first_lost if first_lost is not None else count + 1))
