"""What an operation does next: forward, again, back, or stuck.

Owns the decisions of a persisted saga as pure functions of the operation, its table row
and the failure at hand. Must not call participants or the registry. Invariant: the step
at the cursor may or may not have happened; forward repeats it, backward undoes it too.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from bulkhead.model.plan.operation_table import OperationRow, StepRow
from bulkhead.model.records import Operation, OperationState, Problem

# Codes after which the same call may succeed: the participant restarts or was busy.
TRANSIENT = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED"})
# How long a step before the pivot is repeated on transient failures before it is undone.
FORWARD_PATIENCE_S = 30.0
RETRY_DELAYS_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Move(enum.Enum):
    """What follows a failed step."""

    RETRY = "retry"  # the same step again, after a delay
    COMPENSATE = "compensate"  # undo what was done, then FAILED or CANCELLED
    FAIL_AFTER_PIVOT = "fail"  # no way back: FAILED with a follow-up that cleans up
    STUCK = "stuck"  # neither way: visible, retried for ever


@dataclass(frozen=True, slots=True)
class Failure:
    """How a step failed: the problem, how often in a row, for how long."""

    problem: Problem
    attempts: int
    seconds: float

    @property
    def transient(self) -> bool:
        """Worth repeating as it is."""
        return self.problem.code in TRANSIENT


def stages(row: OperationRow) -> Sequence[Sequence[StepRow]]:
    """The steps in order, those that are done beside each other together."""
    found: list[list[StepRow]] = []
    for step in row.steps:
        if step.beside and found:
            found[-1].append(step)
        else:
            found.append([step])
    return found


def remaining(row: OperationRow, operation: Operation) -> Sequence[Sequence[StepRow]]:
    """Stages still to do, the one at the cursor included (it may not have happened)."""
    every = stages(row)
    if not operation.cursor:
        return every
    for at, stage in enumerate(every):
        if any(step.name == operation.cursor for step in stage):
            return every[at:]
    raise LookupError(
        f"operation {operation.id} stands at step {operation.cursor}, "
        f"which {operation.kind} does not have"
    )


def to_undo(row: OperationRow, operation: Operation) -> Sequence[StepRow]:
    """Steps to undo, last first, those of the stage at the cursor included.

    While they are being undone the cursor is at the one under way: what is behind it in
    the same stage may be undone twice, which undo accepts.
    """
    if not operation.cursor:
        return ()
    every = stages(row)
    left = len(every) - len(remaining(row, operation))
    done = [step for stage in every[: left + 1] for step in stage]
    return tuple(step for step in reversed(done) if step.undo)


def after_failure(operation: Operation, failure: Failure) -> Move:
    """The next move after a forward step failed."""
    if failure.transient:
        if operation.pivoted and operation.kind != "START":
            return Move.STUCK if failure.seconds > FORWARD_PATIENCE_S else Move.RETRY
        if failure.seconds <= FORWARD_PATIENCE_S:
            return Move.RETRY
    if not operation.pivoted:
        return Move.COMPENSATE
    return Move.FAIL_AFTER_PIVOT if operation.kind == "START" else Move.STUCK


def stands_at(operation: Operation, step: StepRow, *, pivoted: bool) -> bool:
    """The step may be sent as the operation is: its cursor is durable, and so is the pivot."""
    return (
        operation.state is OperationState.RUNNING
        and operation.cursor == step.name
        and operation.pivoted == pivoted
    )


def may_cancel(operation: Operation, step: StepRow) -> bool:
    """A cancel asked for may be honoured before this step."""
    return operation.cancel_requested and not operation.pivoted and step.cancellable


def retry_delay(attempts: int) -> float:
    """Seconds to wait before the attempt after `attempts` failed ones."""
    return RETRY_DELAYS_S[min(max(attempts - 1, 0), len(RETRY_DELAYS_S) - 1)]


def runnable(operation: Operation) -> bool:
    """lifecycle has something to do for it now."""
    return operation.state in (
        OperationState.RUNNING,
        OperationState.COMPENSATING,
        OperationState.STUCK,
    )


def progress_of(row: OperationRow, step: StepRow) -> float:
    """Share of the steps before this one; steps that report their own refine it."""
    return row.steps.index(step) / max(1, len(row.steps))
