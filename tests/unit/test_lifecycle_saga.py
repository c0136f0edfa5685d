"""The saga's decisions: forward, retry, back, stuck; and that no step is left out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bulkhead.model.plan.operation_table import OPERATIONS
from bulkhead.model.records import Operation, OperationState, Problem
from bulkhead.model.specs import StartSpec
from services.lifecycle.core import saga
from services.lifecycle.core.saga import Failure, Move
from services.lifecycle.steps.table import STEPS

START = Operation(
    id="op", kind="START", spec=StartSpec("work"), subjects=("u",), state=OperationState.RUNNING
)
REFUSED = Problem("FAILED_PRECONDITION", "QUBE_ERROR", "no")
AWAY = Problem("UNAVAILABLE", "UNAVAILABLE", "restarting")


def test_every_step_of_the_table_has_an_object_and_no_other_exists() -> None:
    declared = {(row.kind, step.name) for row in OPERATIONS.values() for step in row.steps}
    assert set(STEPS) == declared


def test_a_new_operation_does_every_step() -> None:
    row = OPERATIONS["START"]
    assert [step for stage in saga.remaining(row, START) for step in stage] == list(row.steps)
    assert saga.to_undo(row, START) == ()


@pytest.mark.parametrize("step", [s.name for s in OPERATIONS["START"].steps])
def test_the_step_at_the_cursor_is_repeated_and_undone(step: str) -> None:
    row = OPERATIONS["START"]
    at = replace(START, cursor=step)
    assert [s.name for s in saga.remaining(row, at)[0]] == [step]
    undone = saga.to_undo(row, at)
    assert all(s.undo for s in undone)
    names = [s.name for s in row.steps]
    assert [s.name for s in undone] == [
        s.name for s in reversed(row.steps[: names.index(step) + 1]) if s.undo
    ]


@pytest.mark.parametrize("cursor", ["ensure_cloned", "copy_rules"])
def test_what_is_done_together_is_repeated_and_undone_together(cursor: str) -> None:
    row = OPERATIONS["CLONE"]
    at = replace(START, kind="CLONE", cursor=cursor)
    assert [[s.name for s in stage] for stage in saga.remaining(row, at)] == [
        ["ensure_cloned", "copy_rules"]
    ]
    assert [s.name for s in saga.to_undo(row, at)] == ["copy_rules", "ensure_cloned"]


def test_a_step_is_sent_without_an_advance_only_as_the_record_stands() -> None:
    row = OPERATIONS["START"]
    at = replace(START, cursor="devices")
    assert saga.stands_at(at, row.step("devices"), pivoted=False)
    assert not saga.stands_at(START, row.step("devices"), pivoted=False)
    assert not saga.stands_at(at, row.step("verify"), pivoted=False)
    assert not saga.stands_at(replace(at, cursor="resume"), row.step("resume"), pivoted=True)
    stuck = replace(at, state=OperationState.STUCK)
    assert not saga.stands_at(stuck, row.step("devices"), pivoted=False)


def test_what_is_done_together_has_no_events_and_no_pivot_in_between() -> None:
    for row in OPERATIONS.values():
        for stage in saga.stages(row):
            assert not any(step.events or step.pivot for step in stage) or len(stage) == 1
            assert len({step.cancellable for step in stage}) == 1


def test_an_unknown_cursor_is_an_error_of_ours() -> None:
    with pytest.raises(LookupError, match="which START does not have"):
        saga.remaining(OPERATIONS["START"], replace(START, cursor="dance"))


@pytest.mark.parametrize(
    ("pivoted", "kind", "problem", "seconds", "move"),
    [
        (False, "START", REFUSED, 0.0, Move.COMPENSATE),
        (False, "START", AWAY, 1.0, Move.RETRY),
        (False, "START", AWAY, 60.0, Move.COMPENSATE),
        (True, "START", REFUSED, 0.0, Move.FAIL_AFTER_PIVOT),
        (True, "START", AWAY, 1.0, Move.RETRY),
        (True, "START", AWAY, 60.0, Move.FAIL_AFTER_PIVOT),
        (True, "REMOVE", REFUSED, 0.0, Move.STUCK),
        (True, "REMOVE", AWAY, 1.0, Move.RETRY),
        (True, "REMOVE", AWAY, 60.0, Move.STUCK),
        (False, "CREATE", REFUSED, 0.0, Move.COMPENSATE),
    ],
)
def test_after_a_failure(
    pivoted: bool, kind: str, problem: Problem, seconds: float, move: Move
) -> None:
    operation = replace(START, kind=kind, pivoted=pivoted)
    assert saga.after_failure(operation, Failure(problem, 1, seconds)) is move


def test_cancel_is_honoured_before_the_pivot_only() -> None:
    step = OPERATIONS["START"].step("storage")
    assert not saga.may_cancel(START, step)
    asked = replace(START, cancel_requested=True)
    assert saga.may_cancel(asked, step)
    assert not saga.may_cancel(replace(asked, pivoted=True), step)
    assert not saga.may_cancel(asked, OPERATIONS["START"].step("agent"))


def test_retry_delays_grow_and_are_bounded() -> None:
    delays = [saga.retry_delay(n) for n in range(1, 50)]
    assert delays == sorted(delays)
    assert delays[-1] == saga.RETRY_DELAYS_S[-1]
