"""Begin, end and cancel of operations, each as one plan.

Owns the table kind -> begin and end, joining, and what follows an end (a follow-up, then
those that waited). Must not know steps. Invariant: an operation is RUNNING only after
its begin was planned, and whoever waits is planned when its turn comes, against the
records of that moment.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from bulkhead.model.plan import creation, running, storage
from bulkhead.model.plan.applies import left_undone, not_begun
from bulkhead.model.plan.base import (
    BeginPlan,
    Draft,
    EndPlan,
    Plan,
    PlanRefused,
    need_qube,
    problem_of,
)
from bulkhead.model.plan.creation import Fresh
from bulkhead.model.plan.operation_table import OPERATIONS, unreported
from bulkhead.model.plan.queue import (
    FOLLOWS,
    blockers,
    may_run,
    next_place,
    only_waits,
    refuse_behind_import,
    waiting,
)
from bulkhead.model.properties import DISP
from bulkhead.model.records import Operation, OperationState, Phase, Problem, Qube, WireEvent
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import (
    ApplySpec,
    CloneSpec,
    CloneVolumeSpec,
    CreateSpec,
    KernelAddSpec,
    KernelRemoveSpec,
    KillSpec,
    OperationSpec,
    PoolAddSpec,
    PoolRemoveSpec,
    RemoveSpec,
    ShutdownSpec,
    StartSpec,
    StoppedSpec,
    kind_of,
    merged_parts,
)
from bulkhead.model.view import View

_NOTHING: Mapping[str, str] = {}


class BeginKind(Protocol):
    """Guards, records and events of a begin; returns the operation with what it keeps."""

    def __call__(
        self, draft: Draft, operation: Operation, spec: Any, fresh: Fresh
    ) -> Operation: ...


@dataclass(frozen=True, slots=True)
class Ending:
    """How an operation ended."""

    operation: Operation
    outcome: OperationState
    reason: str
    result: Mapping[str, str]


EndKind = Callable[[Draft, Ending], dict[str, str]]


# ---- begin


def plan_begin(
    view: View,
    spec: OperationSpec,
    *,
    operation_id: str,
    source: str,
    now: float,
    boot_id: str = "",
    new_uuid: str = "",
    random: Callable[[int], int] = creation._no_random,
    recent_dispids: Container[int] = (),
    request_id: bytes = b"",
) -> BeginPlan:
    """The begin of an operation.

    boot_id: for START; new_uuid: for CREATE and CLONE; random(limit): a random number
    from 0 below limit. Raises Refusal, or PlanRefused where events were announced. The
    operation is RUNNING, QUEUED, or SUCCEEDED where there is nothing to do; an id that is
    known already gives that operation again, with no change.
    """
    known = view.operations.get(operation_id)
    if known is not None:
        return BeginPlan(operation=known)
    draft = Draft(view, source=source, now=now)
    fresh = Fresh(operation_id, boot_id, new_uuid, random, recent_dispids)
    try:
        operation, joined = _begin(draft, spec, fresh, request_id=request_id)
    except Refusal as refusal:
        if draft.events:
            raise PlanRefused(refusal, draft.events) from refusal
        raise
    draft.audit.update(_told(operation))
    plan = draft.plan()
    return BeginPlan(
        operation=operation,
        joined=operation if joined else None,
        changes=plan.changes,
        events=plan.events,
        result=dict(operation.result),
        live=plan.live,
        parts=plan.parts,
        beside=plan.beside,
        audit=plan.audit,
    )


def _begin(
    draft: Draft,
    spec: OperationSpec,
    fresh: Fresh,
    *,
    request_id: bytes = b"",
    ahead: bool = False,
) -> tuple[Operation, bool]:
    """Begin, queue or join: (operation, joined)."""
    subjects = _subjects(draft, spec, fresh)
    joined = _joined(draft, spec, subjects)
    if joined is not None:
        return joined, True
    data: dict[str, str] = {}
    if isinstance(spec, StartSpec):
        data["boot_id"] = fresh.boot_id
    operation = Operation(
        id=fresh.operation_id,
        kind=kind_of(spec),
        spec=spec,
        subjects=subjects,
        state=OperationState.RUNNING,
        source=draft.source,
        request_id=request_id,
        data=data,
        created=draft.now,
    )
    held_by = blockers(draft, operation, ahead=ahead)
    if held_by and not _needless(draft, operation):
        if not ahead:  # a follow-up that was refused would be lost
            refuse_behind_import(draft, operation, held_by)
        place = next_place(draft, operation, held_by)
        data = {**operation.data, "place": place, **({FOLLOWS: "1"} if ahead else {})}
        operation = replace(operation, state=OperationState.QUEUED, data=data)
        return draft.put_operation(operation), False
    return _activate(draft, operation, fresh), False


def _activate(draft: Draft, operation: Operation, fresh: Fresh) -> Operation:
    """The turn of an operation has come. Refusals of its begin."""
    row = OPERATIONS[operation.kind]
    _check_subjects(draft, operation)
    # The cursor is durable with the begin: the first step needs no commit of its own.
    operation = replace(
        operation,
        state=OperationState.RUNNING,
        pivoted=row.pivots_at_begin,
        cursor=row.steps[0].name,
    )
    operation = _BEGINS[operation.kind](draft, operation, operation.spec, fresh)
    if operation.state is OperationState.SUCCEEDED:
        operation = replace(operation, finished=draft.now, progress=1.0, pivoted=False, cursor="")
    return draft.put_operation(operation)


# Kinds that must find their qube, whatever happened while they waited; the others look
# for it themselves, or make it.
_NEEDS_QUBE = frozenset(
    {
        "REMOVE", "START", "SHUTDOWN", "KILL", "PAUSE", "UNPAUSE", "SUSPEND", "RESUME",
        "REVERT", "RESIZE", "CLEAR", "CLONE_VOLUME", "IMPORT", "ATTACH", "DETACH",
    }
)  # fmt: skip


def _check_subjects(draft: Draft, operation: Operation) -> None:
    if operation.kind in _NEEDS_QUBE:
        for subject in operation.subjects:
            qube = draft.find(subject)
            if qube is None or qube.hidden:
                name = qube.name if qube is not None else getattr(operation.spec, "qube", "")
                raise Refusal("QUBE_NOT_FOUND", f"No such domain: '{name}'", qube=name)


def _needless(draft: Draft, operation: Operation) -> bool:
    """It has nothing to do now, so it need not wait for whoever holds the qube."""
    if operation.kind != "START":
        return False
    qube = draft.find(operation.subjects[0])
    return qube is not None and qube.run.phase is not Phase.HALTED


def _subjects(draft: Draft, spec: OperationSpec, fresh: Fresh) -> tuple[str, ...]:
    """What the operation locks; Refusal QUBE_NOT_FOUND."""
    match spec:
        case CreateSpec():
            return (fresh.new_uuid,)
        case CloneSpec():
            return fresh.new_uuid, _named(draft, spec.source).uuid
        case StoppedSpec() | ApplySpec():
            return (spec.uuid,)
        case CloneVolumeSpec():
            mine = _named(draft, spec.qube).uuid
            source = _named(draft, spec.source_qube)
            volume = source.volume(spec.source_volume)
            if volume is not None:
                source, _ = storage.kept_by(draft.view, source, volume)
            theirs = source.uuid
            return (mine, theirs) if theirs != mine else (mine,)
        case PoolAddSpec():
            return (f"pool/{spec.pool.name}",)
        case PoolRemoveSpec():
            return (f"pool/{spec.pool}",)
        case KernelAddSpec() | KernelRemoveSpec():
            return (f"kernel/{spec.name}",)
        case _:
            return (_named(draft, spec.qube).uuid,)


def _named(draft: Draft, name: str) -> Qube:
    qube = need_qube(draft.view, name)
    latest = draft.find(qube.uuid)
    if latest is None or latest.hidden:
        raise Refusal("QUBE_NOT_FOUND", f"No such domain: '{name}'", qube=name)
    return latest


def _joined(draft: Draft, spec: OperationSpec, subjects: tuple[str, ...]) -> Operation | None:
    """The operation under way that answers this request too."""
    for other in draft.operations_on(subjects[0]):
        match spec:
            case StartSpec() if other.kind == "START":
                qube = draft.find(subjects[0])
                # One that is being given up answers nobody else; nor one before a stop.
                starting = other.state is OperationState.QUEUED or (
                    qube is not None and qube.run.phase is Phase.STARTING
                )
                if starting and not other.cancel_requested:
                    return other
            case StoppedSpec() if other.kind == "STOPPED":
                if running.boot_of(other) == spec.boot_id:
                    return other
            case StoppedSpec() if other.kind == "START" and not other.pivoted:
                # Its undo and its end do all that a stop does.
                if (
                    other.state is not OperationState.QUEUED
                    and running.boot_of(other) == spec.boot_id
                ):
                    return other
            case KillSpec() if other.kind in ("KILL", "STOPPED"):
                qube = draft.find(subjects[0])
                if (
                    other.state is not OperationState.QUEUED
                    and qube is not None
                    and running.booted(qube, running.boot_of(other))
                    and spec.boot_id in ("", qube.run.boot_id)
                ):
                    return other
            case RemoveSpec() if other.kind == "REMOVE":
                return other
            case ShutdownSpec() if other.spec == spec and not other.cancel_requested:
                return other
            case ApplySpec() if other.kind == "APPLY" and other.state is OperationState.QUEUED:
                kept = other.spec
                if isinstance(kept, ApplySpec) and kept.boot_id == spec.boot_id:
                    newest = replace(
                        kept,
                        revision=max(kept.revision, spec.revision),
                        parts=merged_parts(kept.parts, spec.parts),
                    )
                    return draft.put_operation(replace(other, spec=newest))
            case _:
                pass
    return None


# ---- advance


def plan_advance(
    view: View,
    operation: Operation,
    *,
    now: float,
    events: Iterable[WireEvent] = (),
    random: Callable[[int], int] = creation._no_random,
    recent_dispids: Container[int] = (),
) -> Plan:
    """The operation as its step leaves it; events: those of the step before.

    Where it does no more than wait for the guest from now on, power calls that waited
    for it begin.
    """
    draft = Draft(view, source=operation.source, now=now)
    draft.emit(*events)
    draft.put_operation(operation)
    if only_waits(operation):
        _promote(draft, operation.subjects, random, recent_dispids)
    return draft.plan()


# ---- end


def plan_end(
    view: View,
    operation: Operation,
    outcome: OperationState,
    *,
    now: float,
    error: Problem | None = None,
    result: Mapping[str, str] = _NOTHING,
    events: Iterable[WireEvent] = (),
    follow_up: OperationSpec | None = None,
    follow_up_id: str = "",
    random: Callable[[int], int] = creation._no_random,
    recent_dispids: Container[int] = (),
) -> EndPlan:
    """The end of an operation: outcome is SUCCEEDED, FAILED or CANCELLED.

    events: those of the last step, sent before what the end makes. follow_up: begun in
    the same transaction, where its guards allow it; some ends have one of their own
    (a disposable that stopped is removed, a start that failed after its pivot is killed).
    Running qubes that the end has changed get an APPLY each. An operation that has ended
    already gives that end again, with no change.
    """
    current = view.operations.get(operation.id)
    if current is None:
        raise Refusal("OPERATION_NOT_FOUND", f"No operation {operation.id}", operation=operation.id)
    if current.state.terminal:
        return EndPlan(operation=current)
    if not outcome.terminal:
        raise Refusal(
            "WRONG_OPERATION_STATE",
            f"An operation cannot end {outcome.value}",
            operation=operation.id,
            state=outcome.value,
        )
    current = replace(current, epoch=max(current.epoch, operation.epoch))
    draft = Draft(view, source=current.source, now=now)
    draft.emit(*events)
    ended, spec = _end(draft, current, outcome, error, result)
    begun: Operation | None = None
    spec = follow_up if follow_up is not None else spec
    if spec is not None:
        fresh = Fresh(
            follow_up_id or _follow_up_id(current), random=random, recent_dispids=recent_dispids
        )
        begun = _begin_follow_up(draft, spec, fresh)
    promoted = _promote(draft, ended.subjects, random, recent_dispids)
    _begin_applies(draft, ended)
    draft.audit.update(_told(ended))
    plan = draft.plan()
    return EndPlan(
        operation=ended,
        follow_up=draft.operation(begun.id) if begun is not None else None,
        promoted=promoted,
        changes=plan.changes,
        events=plan.events,
        result=dict(ended.result),
        audit=plan.audit,
    )


def _end(
    draft: Draft,
    operation: Operation,
    outcome: OperationState,
    error: Problem | None,
    result: Mapping[str, str],
) -> tuple[Operation, OperationSpec | None]:
    if error is None and outcome is not OperationState.SUCCEEDED:
        error = operation.error
    reason = error.message if error is not None else outcome.value
    mark = len(draft.events)
    made: dict[str, str] = {}
    try:
        if operation.state is not OperationState.QUEUED:
            made = _ENDS[operation.kind](draft, Ending(operation, outcome, reason, result))
    except Refusal as refusal:
        # The end itself was refused (a pool that came into use): nothing of it holds.
        del draft.events[mark:]
        outcome, error, made = OperationState.FAILED, problem_of(refusal), {}
    succeeded = outcome is OperationState.SUCCEEDED
    ended = replace(
        operation,
        state=outcome,
        error=error if not succeeded else None,
        result={**operation.result, **result, **made},
        finished=draft.now,
        progress=1.0 if succeeded else operation.progress,
    )
    draft.put_operation(ended)
    return ended, _own_follow_up(draft, operation, outcome)


def _follow_up_id(operation: Operation) -> str:
    """Always the same for the same operation: an end that is planned again begins no second."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"bulkhead/follow-up/{operation.id}"))


def _own_follow_up(
    draft: Draft, operation: Operation, outcome: OperationState
) -> OperationSpec | None:
    if operation.kind not in ("START", "STOPPED") or operation.state is OperationState.QUEUED:
        return None
    qube = draft.find(operation.subjects[0])
    if qube is None or qube.hidden:
        return None
    if operation.kind == "START" and outcome is not OperationState.SUCCEEDED:
        if running.booted(qube, running.boot_of(operation)):
            return KillSpec(qube.name, qube.run.boot_id)
    elif operation.kind == "START" or outcome is not OperationState.SUCCEEDED:
        return None
    if (
        qube.klass == DISP
        and qube.run.phase is Phase.HALTED
        and qube.properties.get("auto_cleanup") == "True"
    ):
        return RemoveSpec(qube.name, auto_cleanup=True)
    return None


def _begin_follow_up(draft: Draft, spec: OperationSpec, fresh: Fresh) -> Operation | None:
    mark = len(draft.events)
    try:
        return _begin(draft, spec, fresh, ahead=True)[0]
    except Refusal:
        # The end stands: what could not follow is left as it is and can be asked for.
        if not any(event.name.endswith("-failed") for event in draft.events[mark:]):
            del draft.events[mark:]
        return None


def _begin_applies(draft: Draft, ended: Operation) -> None:
    """Bring running qubes up to what the end has changed: clients of a new netvm, say."""
    plan = draft.plan()
    for subject in plan.live:
        qube = draft.find(subject)
        if qube is not None and qube.run.phase is not Phase.HALTED:
            name = f"bulkhead/apply/{ended.id}/{subject}"
            fresh = Fresh(str(uuid.uuid5(uuid.NAMESPACE_OID, name)))
            spec = ApplySpec(subject, qube.run.boot_id, parts=plan.parts.get(subject, ()))
            try:
                _begin(draft, spec, fresh)
            except Refusal as refusal:
                # So many operations wait for it that its next one will do, which brings all.
                if not left_undone(draft.view.operations.values(), spec.boot_id):
                    draft.put_operation(
                        not_begun(
                            spec,
                            refusal,
                            operation_id=fresh.operation_id,
                            source=draft.source,
                            now=draft.now,
                        )
                    )


def _promote(
    draft: Draft,
    subjects: Iterable[str],
    random: Callable[[int], int],
    recent_dispids: Container[int],
) -> tuple[Operation, ...]:
    """Begin whoever waited and may run now; one that is refused makes place for the next.

    One whose facts are not reported keeps its place: plan_promote() comes with the report.
    """
    touched: dict[str, None] = dict.fromkeys(subjects)
    promoted: dict[str, Operation] = {}
    progress = True
    while progress:
        progress = False
        for operation in waiting(draft, list(touched)):
            if unreported(draft.view, operation.kind) or not may_run(draft, operation):
                continue
            fresh = Fresh(
                operation.id,
                boot_id=running.boot_of(operation),
                new_uuid=operation.subjects[0],
                random=random,
                recent_dispids=recent_dispids,
            )
            source, draft.source = draft.source, operation.source
            try:
                now_running = _activate(draft, operation, fresh)
            except Refusal as refusal:
                now_running = draft.put_operation(
                    replace(
                        operation,
                        state=OperationState.FAILED,
                        error=problem_of(refusal),
                        finished=draft.now,
                    )
                )
            finally:
                draft.source = source
            promoted[operation.id] = now_running
            if now_running.state.terminal:
                # It holds nothing: those that waited for its other subjects may run too.
                touched.update(dict.fromkeys(operation.subjects))
            progress = True
            break
    return tuple(promoted.values())


def plan_promote(
    view: View,
    *,
    now: float,
    random: Callable[[int], int] = creation._no_random,
    recent_dispids: Container[int] = (),
) -> Plan:
    """Begin whoever could not when his turn came, since what he reads was not reported then."""
    draft = Draft(view, now=now)
    waits = [o for o in view.operations.values() if o.state is OperationState.QUEUED]
    promoted = _promote(draft, [s for o in waits for s in o.subjects], random, recent_dispids)
    draft.audit["promoted"] = " ".join(operation.id for operation in promoted)
    return draft.plan()


# ---- cancel


def plan_cancel(
    view: View,
    operation_id: str,
    *,
    now: float,
    random: Callable[[int], int] = creation._no_random,
    recent_dispids: Container[int] = (),
) -> EndPlan:
    """Cancel: one that waits ends CANCELLED at once, one that runs is asked to give up.

    Refusals OPERATION_NOT_FOUND, WRONG_OPERATION_STATE (ended, or past its pivot).
    """
    operation = view.operations.get(operation_id)
    if operation is None:
        raise Refusal("OPERATION_NOT_FOUND", f"No operation {operation_id}", operation=operation_id)
    if operation.state.terminal or operation.pivoted:
        state = operation.state.value if operation.state.terminal else "past its point of no return"
        raise Refusal(
            "WRONG_OPERATION_STATE",
            f"Operation {operation_id} is {state} and cannot be cancelled",
            operation=operation_id,
            state=operation.state.value,
        )
    if operation.state is OperationState.QUEUED:
        problem = Problem("CANCELLED", "CANCELLED", f"{operation.kind} was cancelled")
        return plan_end(
            view,
            operation,
            OperationState.CANCELLED,
            now=now,
            error=problem,
            random=random,
            recent_dispids=recent_dispids,
        )
    draft = Draft(view, source=operation.source, now=now)
    asked = draft.put_operation(replace(operation, cancel_requested=True))
    return EndPlan(operation=asked, changes=draft.changes, audit=_told(asked))


def _told(operation: Operation) -> dict[str, str]:
    return {
        "operation": operation.id,
        "kind": operation.kind,
        "state": operation.state.value,
        "subjects": " ".join(operation.subjects),
    }


# ---- the kinds


def _nothing(draft: Draft, ending: Ending) -> dict[str, str]:
    del draft, ending
    return {}


def _end_create(draft: Draft, ending: Ending) -> dict[str, str]:
    return creation.end_create(draft, ending.operation, ending.outcome, ending.result)


def _end_clone(draft: Draft, ending: Ending) -> dict[str, str]:
    return creation.end_clone(draft, ending.operation, ending.outcome, ending.result)


def _end_remove(draft: Draft, ending: Ending) -> dict[str, str]:
    return creation.end_remove(draft, ending.operation, ending.outcome, ending.result)


def _end_start(draft: Draft, ending: Ending) -> dict[str, str]:
    running.end_start(draft, ending.operation, ending.outcome, ending.reason)
    return {}


def _end_stopped(draft: Draft, ending: Ending) -> dict[str, str]:
    running.end_stopped(draft, ending.operation, ending.outcome)
    return {}


def _end_shutdown(draft: Draft, ending: Ending) -> dict[str, str]:
    running.end_shutdown(draft, ending.operation, ending.outcome, ending.reason)
    return {}


def _end_kill(draft: Draft, ending: Ending) -> dict[str, str]:
    running.end_kill(draft, ending.operation)
    return {}


def _end_pause(draft: Draft, ending: Ending) -> dict[str, str]:
    running.end_pause(draft, ending.operation, ending.outcome)
    return {}


def _end_unpause(draft: Draft, ending: Ending) -> dict[str, str]:
    running.end_unpause(draft, ending.operation, ending.outcome)
    return {}


def _end_suspend(draft: Draft, ending: Ending) -> dict[str, str]:
    running.end_suspend(draft, ending.operation, ending.outcome, ending.result)
    return {}


def _end_resume(draft: Draft, ending: Ending) -> dict[str, str]:
    running.end_resume(draft, ending.operation, ending.outcome)
    return {}


def _end_resize(draft: Draft, ending: Ending) -> dict[str, str]:
    storage.end_resize(draft, ending.operation, ending.outcome, ending.result)
    return {}


def _end_import(draft: Draft, ending: Ending) -> dict[str, str]:
    storage.end_import(draft, ending.operation, ending.outcome)
    return {}


def _end_clone_volume(draft: Draft, ending: Ending) -> dict[str, str]:
    storage.end_clone_volume(draft, ending.operation, ending.outcome, ending.result)
    return {}


def _end_attach(draft: Draft, ending: Ending) -> dict[str, str]:
    storage.end_attach(draft, ending.operation, ending.outcome)
    return {}


def _end_detach(draft: Draft, ending: Ending) -> dict[str, str]:
    storage.end_detach(draft, ending.operation, ending.outcome)
    return {}


def _end_pool_add(draft: Draft, ending: Ending) -> dict[str, str]:
    storage.end_pool_add(draft, ending.operation, ending.outcome, ending.result)
    return {}


def _end_pool_remove(draft: Draft, ending: Ending) -> dict[str, str]:
    storage.end_pool_remove(draft, ending.operation, ending.outcome)
    return {}


_BEGINS: Mapping[str, BeginKind] = {
    "CREATE": creation.begin_create,
    "CLONE": creation.begin_clone,
    "REMOVE": creation.begin_remove,
    "START": running.begin_start,
    "STOPPED": running.begin_stopped,
    "SHUTDOWN": running.begin_shutdown,
    "KILL": running.begin_kill,
    "PAUSE": running.begin_pause,
    "UNPAUSE": running.begin_unpause,
    "SUSPEND": running.begin_suspend,
    "RESUME": running.begin_resume,
    "REVERT": storage.begin_revert,
    "RESIZE": storage.begin_resize,
    "CLEAR": storage.begin_clear,
    "CLONE_VOLUME": storage.begin_clone_volume,
    "IMPORT": storage.begin_import,
    "APPLY": running.begin_apply,
    "ATTACH": storage.begin_attach,
    "DETACH": storage.begin_detach,
    "POOL_ADD": storage.begin_pool_add,
    "POOL_REMOVE": storage.begin_pool_remove,
    "KERNEL_ADD": storage.begin_kernel_add,
    "KERNEL_REMOVE": storage.begin_kernel_remove,
}

_ENDS: Mapping[str, EndKind] = {
    "CREATE": _end_create,
    "CLONE": _end_clone,
    "REMOVE": _end_remove,
    "START": _end_start,
    "STOPPED": _end_stopped,
    "SHUTDOWN": _end_shutdown,
    "KILL": _end_kill,
    "PAUSE": _end_pause,
    "UNPAUSE": _end_unpause,
    "SUSPEND": _end_suspend,
    "RESUME": _end_resume,
    "REVERT": _nothing,
    "RESIZE": _end_resize,
    "CLEAR": _end_import,
    "CLONE_VOLUME": _end_clone_volume,
    "IMPORT": _end_import,
    "APPLY": _nothing,
    "ATTACH": _end_attach,
    "DETACH": _end_detach,
    "POOL_ADD": _end_pool_add,
    "POOL_REMOVE": _end_pool_remove,
    "KERNEL_ADD": _nothing,
    "KERNEL_REMOVE": _nothing,
}
