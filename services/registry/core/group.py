"""Many waiting pieces of work, one transaction.

Owns how a batch is planned against the view, and how it is taken back. Must not know
threads, SQLite or messages. Invariant: each piece is planned against the view with
the accepted pieces before it applied; a refusal affects only its own piece; after
undo() the view is what it was before the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from bulkhead.model.plan.base import PlanRefused
from bulkhead.model.records import (
    Change,
    FactRemoved,
    LabelPut,
    LabelRemoved,
    PoolPut,
    PoolRemoved,
    QubePut,
    QubeRemoved,
    SystemPut,
    SystemRemoved,
    WireEvent,
    fact_key,
)
from bulkhead.model.view import View
from services.registry.core.visibility import Done


@dataclass(frozen=True, slots=True)
class Planned:
    """What one piece of work wants.

    durable: it gets a journal row and a revision (facts and plain announcements do
    not). answer: for whoever makes the reply. result: short text for the audit row.
    silent: nothing may be applied or published (dry run).
    """

    changes: tuple[Change, ...] = ()
    events: tuple[WireEvent, ...] = ()
    durable: bool = True
    answer: object = None
    result: str = ""
    epoch: int | None = None
    silent: bool = False


@dataclass(frozen=True, slots=True)
class Numbers:
    """Where the store is. revision: of the newest durable change; seq: of the newest
    stream entry; epoch: of the newest lifecycle; small_revision: of the newest change of
    labels, pools or system properties."""

    revision: int = 0
    seq: int = 0
    epoch: int = 0
    small_revision: int = 0


class Work(Protocol):
    """One waiting piece of work."""

    def plan(self, view: View, now: Numbers, /) -> Planned:
        """Pure. now: before the piece; its changes get now.revision + 1. Raises Refusal."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A planned and applied piece. revision and seq: of the store after it."""

    work: Work
    planned: Planned
    revision: int
    seq: int
    done: tuple[Done, ...] = ()

    @property
    def published(self) -> bool:
        """True when it makes a stream entry of its own (with that seq).

        A durable piece that changes nothing does too: whoever made it waits until the
        replicas have its revision.
        """
        return bool(self.done or self.planned.events or self.planned.durable)


@dataclass(frozen=True, slots=True)
class Refused:
    """A piece that planning refused; nothing of it was applied.

    events: announced before the refusal (PlanRefused); they make a stream entry.
    """

    work: Work
    error: Exception
    events: tuple[WireEvent, ...] = ()
    revision: int = 0
    seq: int = 0


@dataclass(slots=True)
class Batch:
    """Outcomes in order; numbers after it; undo: inverses in the order of application."""

    numbers: Numbers
    outcomes: list[Accepted | Refused] = field(default_factory=list)
    undo: list[Change] = field(default_factory=list)

    @property
    def durable(self) -> list[Accepted]:
        """The pieces that must be committed before anything is answered."""
        return [o for o in self.outcomes if isinstance(o, Accepted) and o.planned.durable]

    def take_back(self, view: View) -> None:
        """Undo the whole batch on the view."""
        for change in reversed(self.undo):
            view.apply(change)
        self.undo.clear()


def plan_batch(view: View, works: Sequence[Work], now: Numbers) -> Batch:
    """Plan and apply in order. now: of the store before the batch."""
    batch = Batch(now)
    for work in works:
        mark = len(batch.undo)
        now = batch.numbers
        try:
            planned = work.plan(view, now)
            if planned.silent:
                planned = Planned(durable=False, answer=planned.answer)
            stamp = now.revision + 1 if planned.durable else 0
            done = _apply(view, planned.changes, stamp, batch.undo)
        except Exception as error:  # a planner's bug must not take the batch with it
            for change in reversed(batch.undo[mark:]):
                view.apply(change)
            del batch.undo[mark:]
            events = error.events if isinstance(error, PlanRefused) else ()
            if events:
                batch.numbers = now = replace(now, seq=now.seq + 1)
            batch.outcomes.append(Refused(work, error, events, now.revision, now.seq))
            continue
        revision, seq, epoch, small = now.revision, now.seq, now.epoch, now.small_revision
        if planned.durable:
            revision = stamp
            if any(isinstance(change, _SMALL) for change in planned.changes):
                small = stamp
            if planned.epoch is not None:
                epoch = planned.epoch
        if done or planned.events or planned.durable:
            seq += 1
        batch.numbers = Numbers(revision, seq, epoch, small)
        batch.outcomes.append(Accepted(work, planned, revision, seq, done))
    return batch


_SMALL = (LabelPut, LabelRemoved, PoolPut, PoolRemoved, SystemPut, SystemRemoved)


def _apply(
    view: View, changes: Sequence[Change], revision: int, undo: list[Change]
) -> tuple[Done, ...]:
    done: list[Done] = []

    def one(change: Change) -> None:
        inverse = view.apply(change)
        if inverse is not None:
            undo.append(inverse)
        done.append((change, inverse))

    for change in changes:
        if isinstance(change, QubePut) and revision:
            change = QubePut(replace(change.qube, revision=revision))
        if isinstance(change, QubeRemoved):
            for key in facts_about(view, change.uuid):
                one(FactRemoved(key))
        one(change)
    return tuple(done)


def facts_about(view: View, uuid: str) -> list[str]:
    """Keys of the facts that end with the qube."""
    keys = [fact_key(f) for f in view.devices_of(uuid)]
    if view.power(uuid) is not None:
        keys.append(f"power/{uuid}")
    return keys
