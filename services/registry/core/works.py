"""What each call of the registry plans.

Owns one Work class per call, and the guards that are the registry's own (etag, epoch,
who may announce). The rules of the records are bulkhead.model.plan's. Must not know
messages, clocks or threads. Invariant: a plan reads the view and its own arguments only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace

from bulkhead.model.evaluate import guest_reads_rules
from bulkhead.model.plan.applies import left_undone, not_begun
from bulkhead.model.plan.base import Plan, PlanRefused
from bulkhead.model.plan.mutation import plan_mutation, plan_preload
from bulkhead.model.plan.operation_table import unreported
from bulkhead.model.plan.operations import (
    plan_advance,
    plan_begin,
    plan_cancel,
    plan_end,
    plan_promote,
)
from bulkhead.model.records import (
    ADMINVM_NAME,
    Change,
    Fact,
    Operation,
    OperationPut,
    OperationRemoved,
    OperationState,
    Problem,
    Qube,
    QubePut,
    WireEvent,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import (
    APPLY_RULES,
    ApplySpec,
    Command,
    OperationSpec,
    PreloadMarks,
    kind_of,
)
from bulkhead.model.view import View
from services.registry.core import adopt, operations
from services.registry.core.announce import (
    DIGEST_OWNER,
    RULES_CHANGED,
    check_events,
    plan_announce,
)
from services.registry.core.facts import device_events, plan_facts
from services.registry.core.group import Numbers, Planned


def told(plan: Plan) -> str:
    """The result column of a plan's audit row."""
    return json.dumps(
        {**plan.audit, **({"result": dict(plan.result)} if plan.result else {})},
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
    )


@dataclass(frozen=True, slots=True)
class Outside:
    """What plans need from outside. new_id(): a new uuid as text; random(limit): from 0
    below limit; recent_dispids: given up not long ago."""

    new_id: Callable[[], str]
    random: Callable[[int], int]
    recent_dispids: Container[int] = ()


def with_applies(
    view: View, plan: Plan, *, revision: int, source: str, now: float, outside: Outside
) -> tuple[tuple[Change, ...], tuple[Operation, ...]]:
    """The plan's changes and those that begin its APPLY operations; the operations.

    Refusals of an APPLY refuse the plan, unless nobody waits for it: too many operations wait
    for a netvm, say, and one of its clients goes. Its next APPLY tells it of that, too.
    """
    if not plan.live:
        return plan.changes, ()
    changes = list(plan.changes)
    applies: list[Operation] = []
    # Begun as if the change had been made already.
    undo = view.apply_all(plan.changes)
    try:
        for uuid in plan.live:
            qube = view.by_uuid_any(uuid)
            if qube is None:
                continue
            spec = ApplySpec(uuid, qube.run.boot_id, revision, plan.parts.get(uuid, ()))
            new_id = outside.new_id()
            try:
                begun = plan_begin(view, spec, operation_id=new_id, source=source, now=now)
            except Refusal as refusal:
                if uuid not in plan.beside:
                    raise
                if not left_undone(view.operations.values(), spec.boot_id):
                    owed = not_begun(spec, refusal, operation_id=new_id, source=source, now=now)
                    changes.append(OperationPut(owed))
                continue
            changes.extend(begun.changes)
            undo = [*view.apply_all(begun.changes), *undo]
            applies.append(begun.joined or begun.operation)
    finally:
        for change in undo:
            view.apply(change)
    return tuple(changes), tuple(applies)


@dataclass(frozen=True, slots=True)
class MutationAnswer:
    """result as the plan gives it; applies: the APPLY operations begun with it that are
    to be waited for."""

    result: Mapping[str, str]
    applies: tuple[Operation, ...] = ()


@dataclass(frozen=True, slots=True)
class Mutation:
    """One command of an Admin API source. etag: 0 = none."""

    command: Command
    source: str
    now: float
    etag: int
    dry: bool
    outside: Outside

    def plan(self, view: View, now: Numbers) -> Planned:
        try:
            self._check_etag(view, now)
            plan = plan_mutation(view, self.command, self.source, now=self.now)
        except PlanRefused as refusal:
            if self.dry:
                raise Refusal(refusal.reason, refusal.message, **refusal.metadata) from refusal
            raise
        if self.dry:
            return Planned(answer=MutationAnswer(plan.result), silent=True)
        changes, applies = with_applies(
            view,
            plan,
            revision=now.revision + 1,
            source=self.source,
            now=self.now,
            outside=self.outside,
        )
        return Planned(
            changes,
            plan.events,
            answer=MutationAnswer(
                plan.result, tuple(o for o in applies if o.subjects[0] not in plan.beside)
            ),
            result=told(plan),
        )

    def _check_etag(self, view: View, now: Numbers) -> None:
        if not self.etag:
            return
        name = getattr(self.command, "qube", "")
        qube = view.qube(name) if name else None
        present = qube.revision if qube is not None else now.small_revision
        if present > self.etag:
            raise Refusal(
                "CHANGED_MEANWHILE",
                f"{name or 'The system'} was changed at revision {present}, after {self.etag}",
                etag=str(self.etag),
                revision=str(present),
            )


@dataclass(frozen=True, slots=True)
class Preload:
    """dispvm's marks."""

    marks: PreloadMarks
    source: str
    now: float
    dry: bool

    def plan(self, view: View, _now: Numbers) -> Planned:
        plan = plan_preload(view, self.marks, self.source, now=self.now)
        return Planned(plan.changes, plan.events, result=told(plan), silent=self.dry)


@dataclass(frozen=True, slots=True)
class BeginAnswer:
    """joined: the operation was under way already."""

    operation: Operation
    joined: bool


@dataclass(frozen=True, slots=True)
class Begin:
    """Lock and begin."""

    spec: OperationSpec
    source: str
    operation_id: str
    request_id: bytes
    now: float
    dry: bool
    outside: Outside

    def plan(self, view: View, now: Numbers) -> Planned:
        known = view.operations.get(self.operation_id)
        if known is not None:
            # The same Begin under another request id, after a restart of the caller.
            return Planned(durable=False, answer=BeginAnswer(known, True))
        if service := unreported(view, kind_of(self.spec)):
            raise Refusal(
                "FACTS_MISSING", f"{service} has not told yet what there is", service=service
            )
        try:
            plan = plan_begin(
                view,
                self.spec,
                operation_id=self.operation_id,
                source=self.source,
                now=self.now,
                boot_id=self.outside.new_id(),
                new_uuid=self.outside.new_id(),
                random=self.outside.random,
                recent_dispids=self.outside.recent_dispids,
                request_id=self.request_id,
            )
        except PlanRefused as refusal:
            if self.dry:
                raise Refusal(refusal.reason, refusal.message, **refusal.metadata) from refusal
            raise
        changes, _ = with_applies(
            view,
            plan,
            revision=now.revision + 1,
            source=self.source,
            now=self.now,
            outside=self.outside,
        )
        return Planned(
            changes,
            plan.events,
            answer=BeginAnswer(plan.joined or plan.operation, plan.joined is not None),
            result=told(plan),
            silent=self.dry,
        )


@dataclass(frozen=True, slots=True)
class Advance:
    """One step on. Fields as in operations.advanced()."""

    operation_id: str
    epoch: int
    cursor: str
    state: OperationState
    progress: float
    progress_text: str
    data: Mapping[str, str]
    pivoted: bool
    error: Problem | None
    events: tuple[WireEvent, ...]
    now: float
    caller: str
    outside: Outside

    def plan(self, view: View, now: Numbers) -> Planned:
        operations.check_epoch(self.epoch, now.epoch)
        check_events(self.caller, self.events)
        operation = operations.advanced(
            operations.unfinished(view, self.operation_id),
            epoch=self.epoch,
            cursor=self.cursor,
            state=self.state,
            progress=self.progress,
            progress_text=self.progress_text,
            data=self.data,
            pivoted=self.pivoted,
            error=self.error,
        )
        plan = plan_advance(
            view,
            operation,
            now=self.now,
            events=self.events,
            random=self.outside.random,
            recent_dispids=self.outside.recent_dispids,
        )
        return Planned(plan.changes, plan.events, answer=operation)


@dataclass(frozen=True, slots=True)
class EndAnswer:
    """follow_up: begun in the same transaction."""

    operation: Operation
    follow_up: Operation | None = None


@dataclass(frozen=True, slots=True)
class End:
    """Finish and publish. only_queued: unless its turn has come meanwhile."""

    operation_id: str
    epoch: int
    outcome: OperationState
    only_queued: bool
    error: Problem | None
    result: Mapping[str, str]
    events: tuple[WireEvent, ...]
    follow_up: OperationSpec | None
    follow_up_id: str
    now: float
    caller: str
    outside: Outside

    def plan(self, view: View, now: Numbers) -> Planned:
        operations.check_epoch(self.epoch, now.epoch)
        check_events(self.caller, self.events)
        operation = operations.find(view, self.operation_id)
        if operation.state.terminal and operation.state is self.outcome:
            # Ended before, and the answer was lost with its asker.
            return Planned(durable=False, answer=EndAnswer(operation))
        operations.unfinished(view, self.operation_id)
        if self.only_queued and operation.state is not OperationState.QUEUED:
            raise Refusal(
                "WRONG_OPERATION_STATE",
                f"Operation {operation.id} does not wait any more: it is {operation.state.value}",
                operation=operation.id,
                state=operation.state.value,
            )
        if not self.outcome.terminal:
            raise Refusal(
                "PROTOCOL",
                f"{self.outcome.value} is no outcome of an operation",
                outcome=self.outcome.value,
            )
        plan = plan_end(
            view,
            replace(operation, epoch=self.epoch),
            self.outcome,
            now=self.now,
            error=self.error,
            result=self.result,
            events=self.events,
            follow_up=self.follow_up,
            follow_up_id=self.follow_up_id,
            random=self.outside.random,
            recent_dispids=self.outside.recent_dispids,
        )
        changes, _ = with_applies(
            view,
            plan,
            revision=now.revision + 1,
            source=operation.source,
            now=self.now,
            outside=self.outside,
        )
        drop = tuple(OperationRemoved(op_id) for op_id in operations.expired(view, self.now))
        return Planned(
            (*changes, *drop),
            plan.events,
            answer=EndAnswer(plan.operation, plan.follow_up),
            result=told(plan),
        )


@dataclass(frozen=True, slots=True)
class Cancel:
    """Ask an operation to stop at its next cancel point; one that waits ends at once."""

    operation_id: str
    now: float
    outside: Outside

    def plan(self, view: View, _now: Numbers) -> Planned:
        operation = operations.unfinished(view, self.operation_id)
        if operation.cancel_requested:
            return Planned(durable=False, answer=operation)
        plan = plan_cancel(
            view,
            self.operation_id,
            now=self.now,
            random=self.outside.random,
            recent_dispids=self.outside.recent_dispids,
        )
        return Planned(plan.changes, plan.events, answer=plan.operation, result=told(plan))


@dataclass(frozen=True, slots=True)
class EpochAnswer:
    """unfinished: what the new lifecycle adopts, oldest first."""

    epoch: int
    unfinished: tuple[Operation, ...]


@dataclass(frozen=True, slots=True)
class TakeEpoch:
    """A new lifecycle takes over."""

    def plan(self, view: View, now: Numbers) -> Planned:
        epoch = now.epoch + 1
        left = sorted(
            (o for o in view.operations.values() if not o.state.terminal),
            key=lambda o: (o.created, o.id),
        )
        return Planned(
            answer=EpochAnswer(epoch, tuple(left)), result=f'{{"epoch":{epoch}}}', epoch=epoch
        )


@dataclass(frozen=True, slots=True)
class Facts:
    """A report."""

    caller: str
    put: Sequence[Fact]
    removed: Sequence[str]
    complete: bool

    def plan(self, view: View, _now: Numbers) -> Planned:
        changes = plan_facts(view, self.caller, self.put, self.removed, self.complete)
        return Planned(changes, device_events(view, changes), durable=False)


@dataclass(frozen=True, slots=True)
class Promote:
    """After a report: the turn of whoever could not be planned without it."""

    now: float
    outside: Outside

    def plan(self, view: View, now: Numbers) -> Planned:
        plan = plan_promote(
            view,
            now=self.now,
            random=self.outside.random,
            recent_dispids=self.outside.recent_dispids,
        )
        if not plan.changes:
            return Planned(durable=False)
        changes, _ = with_applies(
            view,
            plan,
            revision=now.revision + 1,
            source=ADMINVM_NAME,
            now=self.now,
            outside=self.outside,
        )
        return Planned(changes, plan.events, result=told(plan))


@dataclass(frozen=True, slots=True)
class Announce:
    """Events without a record change; rules_digest None = none given.

    Rules that a guest is to enforce for a client that runs are brought there by an APPLY
    of the same transaction: whoever dies now, the change is not forgotten.
    """

    caller: str
    uuid: str
    boot_id: str
    events: tuple[WireEvent, ...]
    rules_digest: str | None
    now: float
    outside: Outside

    def plan(self, view: View, now: Numbers) -> Planned:
        events = plan_announce(view, self.caller, self.uuid, self.boot_id, self.events)
        changes = self._digest(view)
        qube = view.by_uuid_any(self.uuid) if self.uuid else None
        if (
            qube is not None
            and any(event.name == RULES_CHANGED for event in events)
            and guest_reads_rules(view, qube)
        ):
            changes = self._with_apply(view, qube, changes, now)
        return Planned(changes, events, durable=bool(changes))

    def _with_apply(
        self, view: View, qube: Qube, changes: tuple[Change, ...], now: Numbers
    ) -> tuple[Change, ...]:
        parts = {qube.uuid: (APPLY_RULES,)}
        plan = Plan(changes=changes, live=(qube.uuid,), parts=parts)
        try:
            return with_applies(
                view,
                plan,
                revision=now.revision + 1,
                source=view.adminvm.name,
                now=self.now,
                outside=self.outside,
            )[0]
        except Refusal as refusal:
            if refusal.reason == "QUBE_BUSY":
                raise  # too many wait for the qube: the announcer owes it, and comes again
            return changes  # nothing can be brought to such a qube

    def _digest(self, view: View) -> tuple[Change, ...]:
        if self.rules_digest is None:
            return ()
        if self.caller != DIGEST_OWNER:
            raise Refusal(
                "NOT_YOURS",
                f"{self.caller} does not own the firewall rules",
                caller=self.caller,
            )
        qube = view.by_uuid_any(self.uuid)
        if qube is None:
            raise Refusal("QUBE_NOT_FOUND", f"No qube with uuid {self.uuid}", uuid=self.uuid)
        if qube.rules_digest == self.rules_digest:
            return ()
        return (QubePut(replace(qube, rules_digest=self.rules_digest)),)


@dataclass(frozen=True, slots=True)
class Adopt:
    """Take a foreign qubes.xml in. adopt.Blocked when it alters what is in use."""

    edited: Sequence[Change]
    sha256: str

    def plan(self, view: View, _now: Numbers) -> Planned:
        changes, events = adopt.plan_adopt(view, self.edited)
        return Planned(changes, events, result=json.dumps({"adopted": self.sha256}))
