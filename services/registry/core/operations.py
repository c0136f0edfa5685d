"""Steps of an operation between its begin and its end, and how long it is kept.

Owns the allowed state transitions of an Advance, the cancel mark, the epoch guard and
the retention of finished operations. Must not know what a step does. Invariant: only
the holder of the newest epoch moves an operation, and a finished one never moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bulkhead.model.plan.applies import boot_left_undone
from bulkhead.model.records import Operation, OperationState, Problem
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View

KEEP_FINISHED = 1_000
KEEP_SECONDS = 7 * 24 * 3600.0
# Finished operations are dropped in lots, so that an End rarely walks them.
_SLACK = 64

_S = OperationState
TRANSITIONS: Mapping[OperationState, frozenset[OperationState]] = {
    _S.QUEUED: frozenset({_S.RUNNING, _S.COMPENSATING}),
    _S.RUNNING: frozenset({_S.RUNNING, _S.WAITING_DATA, _S.COMPENSATING, _S.STUCK}),
    _S.WAITING_DATA: frozenset({_S.RUNNING, _S.WAITING_DATA, _S.COMPENSATING, _S.STUCK}),
    _S.COMPENSATING: frozenset({_S.COMPENSATING, _S.STUCK}),
    _S.STUCK: frozenset({_S.RUNNING, _S.COMPENSATING, _S.STUCK}),
}


def check_epoch(given: int, current: int) -> None:
    """Refusal STALE_EPOCH unless the caller holds the newest epoch."""
    if given != current:
        raise Refusal(
            "STALE_EPOCH",
            f"epoch {given} is not the newest one ({current}); a newer lifecycle took over",
            epoch=str(given),
            current=str(current),
        )


def find(view: View, operation_id: str) -> Operation:
    """The operation, or Refusal OPERATION_NOT_FOUND."""
    operation = view.operations.get(operation_id)
    if operation is None:
        raise Refusal("OPERATION_NOT_FOUND", f"No operation {operation_id}", operation=operation_id)
    return operation


def unfinished(view: View, operation_id: str) -> Operation:
    """The operation, or Refusal OPERATION_NOT_FOUND, WRONG_OPERATION_STATE."""
    operation = find(view, operation_id)
    if operation.state.terminal:
        raise Refusal(
            "WRONG_OPERATION_STATE",
            f"Operation {operation_id} is {operation.state.value} already",
            operation=operation_id,
            state=operation.state.value,
        )
    return operation


def advanced(
    operation: Operation,
    *,
    epoch: int,
    cursor: str,
    state: OperationState,
    progress: float,
    progress_text: str,
    data: Mapping[str, str],
    pivoted: bool,
    error: Problem | None,
) -> Operation:
    """The operation one step on; Refusal WRONG_OPERATION_STATE.

    data is merged; a pivot is never taken back; the first error stays until another
    one is given.
    """
    if state not in TRANSITIONS[operation.state]:
        raise Refusal(
            "WRONG_OPERATION_STATE",
            f"Operation {operation.id} cannot go from {operation.state.value} to {state.value}",
            operation=operation.id,
            state=operation.state.value,
            wanted=state.value,
        )
    return replace(
        operation,
        epoch=epoch,
        cursor=cursor,
        state=state,
        progress=min(1.0, max(0.0, progress)),
        progress_text=progress_text,
        data={**operation.data, **data} if data else operation.data,
        pivoted=operation.pivoted or pivoted,
        error=error if error is not None else operation.error,
    )


def expired(view: View, now: float) -> list[str]:
    """Ids of finished operations that need not be kept: all but the newest 1,000, and
    those older than 7 days. now: epoch seconds.

    Of each boot that lasts one that left something undone is kept longer.
    """
    if len(view.operations) <= KEEP_FINISHED + _SLACK:
        oldest = next(iter(view.operations.values()), None)
        # In the order of their begin, after a start in that of their last change: none can
        # have ended before the first one was begun.
        if oldest is None or now - oldest.created <= KEEP_SECONDS:
            return []
        old = [
            o
            for o in view.operations.values()
            if o.state.terminal and now - o.finished > KEEP_SECONDS
        ]
        return _without_owed(view, old)
    finished = sorted(
        (o for o in view.operations.values() if o.state.terminal),
        key=lambda o: o.finished,
        reverse=True,
    )
    old = [
        o for at, o in enumerate(finished) if at >= KEEP_FINISHED or now - o.finished > KEEP_SECONDS
    ]
    return _without_owed(view, old)


def _without_owed(view: View, old: Sequence[Operation]) -> list[str]:
    """Ids of those that nothing depends on: of each boot that lasts one is left of those
    that left something undone."""
    if not any(map(boot_left_undone, old)):
        return [o.id for o in old]
    dropped = {o.id for o in old}
    told = {boot_left_undone(o) for o in view.operations.values() if o.id not in dropped}
    gone = []
    for operation in sorted(old, key=lambda o: o.finished, reverse=True):
        boot_id = boot_left_undone(operation)
        qube = view.by_uuid_any(operation.subjects[0]) if boot_id else None
        if qube is not None and qube.run.boot_id == boot_id and boot_id not in told:
            told.add(boot_id)
        else:
            gone.append(operation.id)
    return gone
