"""Who holds a qube, who waits, and who is next.

Owns the locking rules of operations. Must not know what an operation does. Invariant: a
subject has at most one holder, apart from operations that pre-empt and from those that
only wait for a guest, which power calls pass; those that wait run in the order in which
they asked, each only once all its subjects are free and the facts that it reads are
reported; nobody waits behind an import whose
data may never come, and nobody whose caller waits does so without a limit of time.
"""

from __future__ import annotations

from collections.abc import Iterable

from bulkhead.model.plan.base import Draft, queue_place
from bulkhead.model.plan.operation_table import OPERATIONS, unreported
from bulkhead.model.records import Operation, OperationState
from bulkhead.model.refusal import Refusal

QUEUE_LIMIT = 8  # operations that may wait for one subject
QUEUE_WAIT_S = 60.0  # how long an operation may wait for its turn
# Mark of a follow-up: nobody would ask for it a second time, so it waits without a limit.
FOLLOWS = "follows"


def blockers(draft: Draft, operation: Operation, *, ahead: bool = False) -> list[Operation]:
    """Operations that must end, or run first, before this one may run.

    ahead: it goes before those that wait (a follow-up of what has just ended).
    """
    row = OPERATIONS[operation.kind]
    if row.pre_empts:
        return []
    found: list[Operation] = []
    for subject in operation.subjects:
        others = [
            other
            for other in draft.operations_on(subject)
            if other.id != operation.id and not (ahead and other.state is OperationState.QUEUED)
        ]
        if operation.kind == "START":
            others = [o for o in others if not _waits_elsewhere(draft, o, operation)]
        found.extend(_not_passed(others) if row.power else others)
    return found


def _waits_elsewhere(draft: Draft, other: Operation, start: Operation) -> bool:
    """It waits, and for a qube that the start does not concern.

    That qube may be the one that waits for this start, of its netvm: then neither would
    ever come to its turn.
    """
    return other.state is OperationState.QUEUED and any(
        holder.state is not OperationState.QUEUED
        for subject in other.subjects
        if subject not in start.subjects
        for holder in draft.operations_on(subject)
    )


def _not_passed(others: list[Operation]) -> list[Operation]:
    """Of those on a subject: whom a power call has to wait for.

    Where every holder only waits for the guest it passes them all, and those that wait
    behind them: these could not run now anyway.
    """
    in_the_way = [o for o in others if not only_waits(o)]
    if len(in_the_way) < len(others) and all(o.state is OperationState.QUEUED for o in in_the_way):
        return []
    return in_the_way


def only_waits(operation: Operation) -> bool:
    """Its present step does no more than wait for the guest."""
    if operation.state is not OperationState.RUNNING or not operation.cursor:
        return False
    return OPERATIONS[operation.kind].step(operation.cursor).only_waits


def may_wait_for_ever(operation: Operation) -> bool:
    """Its turn has no limit of time: nobody would ask for it again."""
    return OPERATIONS[operation.kind].patient or FOLLOWS in operation.data


def waited_too_long(draft: Draft, operation: Operation, seconds: float) -> Refusal:
    """The refusal of an operation that is still QUEUED after so long; names the holder."""
    waits_for = blockers(draft, operation)
    service = unreported(draft.view, operation.kind)
    if service and may_run(draft, operation):
        return _untold(draft, operation, service, seconds)
    holder = next((o for o in waits_for if o.state is not OperationState.QUEUED), None)
    if holder is None:
        holder = waits_for[0] if waits_for else operation
    subject = next((s for s in operation.subjects if s in holder.subjects), operation.subjects[0])
    qube = draft.find(subject)
    name = qube.name if qube is not None else subject
    return Refusal(
        "QUBE_BUSY",
        f"'{name}' is busy with {holder.kind} ({holder.id}); {operation.kind} waited"
        f" {seconds:.0f} s for its turn and was not begun; try again later",
        qube=name,
        operation=holder.id,
        kind=holder.kind,
    )


def _untold(draft: Draft, operation: Operation, service: str, seconds: float) -> Refusal:
    """Nobody is in its way, but what it reads is not known."""
    qube = draft.find(operation.subjects[0])
    name = qube.name if qube is not None else operation.subjects[0]
    return Refusal(
        "FACTS_MISSING",
        f"{operation.kind} of '{name}' waited {seconds:.0f} s for what {service} knows of the"
        f" host and was not begun; see 'bulkhead status' for {service}, then try again",
        qube=name,
        service=service,
        kind=operation.kind,
    )


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
