"""Who holds a qube, who waits, and who is next.

Owns the locking rules of operations. Must not know what an operation does. Invariant: a
subject has at most one holder, apart from operations that pre-empt; those that wait run
in the order in which they asked, each only once all its subjects are free; nobody waits
behind an import whose data may never come.
"""

from __future__ import annotations

from collections.abc import Iterable

from bulkhead.model.plan.base import Draft, queue_place
from bulkhead.model.plan.operation_table import OPERATIONS
from bulkhead.model.records import Operation, OperationState
from bulkhead.model.refusal import Refusal

QUEUE_LIMIT = 8  # operations that may wait for one subject


def blockers(draft: Draft, operation: Operation, *, ahead: bool = False) -> list[Operation]:
    """Operations that must end, or run first, before this one may run.

    ahead: it goes before those that wait (a follow-up of what has just ended).
    """
    if OPERATIONS[operation.kind].pre_empts:
        return []
    return [
        other
        for subject in operation.subjects
        for other in draft.operations_on(subject)
        if other.id != operation.id and not (ahead and other.state is OperationState.QUEUED)
    ]


def refuse_behind_import(draft: Draft, operation: Operation, waits_for: list[Operation]) -> None:
    """Refusal QUBE_BUSY where one of those ahead is an import that still needs its data.

    How long that takes is its writer's choice, so waiting for it has no limit of time.
    """
    for other in waits_for:
        if not _needs_data(other):
            continue
        subject = next(s for s in operation.subjects if s in other.subjects)
        qube = draft.find(subject)
        name = qube.name if qube is not None else subject
        volume = str(getattr(other.spec, "volume", ""))
        raise Refusal(
            "QUBE_BUSY",
            f"'{name}' is busy: the import into its volume '{volume}' ({other.id}) waits for"
            " data; let it end or cancel it, then try again",
            qube=name,
            operation=other.id,
            kind=other.kind,
        )


def _needs_data(operation: Operation) -> bool:
    if operation.kind != "IMPORT":
        return False
    if operation.state is OperationState.WAITING_DATA:
        return True
    # Until its first step has ended, and while that is at work, it is on its way there.
    return operation.cursor in ("", OPERATIONS["IMPORT"].steps[0].name) and operation.state in (
        OperationState.QUEUED,
        OperationState.RUNNING,
    )


def next_place(draft: Draft, operation: Operation, waits_for: list[Operation]) -> str:
    """The place in the queue behind those that wait; Refusal QUBE_BUSY where it is full."""
    place = 0
    for subject in operation.subjects:
        waiting = [
            o
            for o in draft.operations_on(subject)
            if o.state is OperationState.QUEUED and o.id != operation.id
        ]
        if len(waiting) >= QUEUE_LIMIT:
            holder = next((o for o in waits_for if o.state is not OperationState.QUEUED), None)
            raise busy(draft, subject, holder or waiting[0])
        place = max([place, *(int(o.data.get("place", "0")) for o in waiting)])
    return str(place + 1)


def busy(draft: Draft, subject: str, holder: Operation) -> Refusal:
    """The refusal that names who holds the subject."""
    qube = draft.find(subject)
    name = qube.name if qube is not None else subject
    return Refusal(
        "QUBE_BUSY",
        f"'{name}' is busy with {holder.kind} ({holder.id}), and {QUEUE_LIMIT} more wait; try"
        " again later",
        qube=name,
        operation=holder.id,
        kind=holder.kind,
    )


def waiting(draft: Draft, subjects: Iterable[str]) -> list[Operation]:
    """Operations that wait for any of the subjects, in the order in which they may run."""
    found = {
        o.id: o
        for subject in subjects
        for o in draft.operations_on(subject)
        if o.state is OperationState.QUEUED
    }
    return sorted(found.values(), key=queue_place)


def may_run(draft: Draft, operation: Operation) -> bool:
    """Nobody holds any of its subjects, and nobody asked for one of them before it."""
    mine = queue_place(operation)
    return all(
        other.state is OperationState.QUEUED and queue_place(other) > mine
        for other in blockers(draft, operation)
    )
