"""Runs persisted operations: one task each, from the cursor to the end.

Owns the epoch, the tasks and the retries. Must not know what a step does (steps/) nor
what comes after a failure (core/saga.py). Invariant: the cursor is durable before its
step is sent; nothing but the registry's records survives a restart, and nothing else is
needed.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

from bulkhead import codec
from bulkhead.api import registry_pb2
from bulkhead.bus.client import CallContext
from bulkhead.bus.errors import BusError
from bulkhead.bus.events import Entry, ReplicaRunner
from bulkhead.failpoints import hit
from bulkhead.model.naming import with_names
from bulkhead.model.plan.operation_table import OPERATIONS, StepRow, unreported
from bulkhead.model.records import Operation, OperationPut, OperationState, Problem, WireEvent
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import KillSpec, OperationSpec
from bulkhead.model.view import View
from services.lifecycle import failpoint_table  # noqa: F401 - declares what hit() names
from services.lifecycle.core import saga
from services.lifecycle.core.saga import Failure, Move
from services.lifecycle.participants import Participants

log = logging.getLogger("bulkhead.lifecycle")
_R = TypeVar("_R")

REGISTRY_TIMEOUT_S = 10.0
START_PATIENCE_S = 5.0
# How long a step waits for facts that are lost when the registry starts anew.
FACTS_PATIENCE_S = 10.0


class StepFailed(Exception):
    """A step's own refusal: permanent, with a reason of a table."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


@dataclass(slots=True)
class Outcome:
    """What a step leaves: data for later steps, the operation's result, extra events."""

    data: Mapping[str, str] = field(default_factory=dict)
    result: Mapping[str, str] = field(default_factory=dict)
    events: Sequence[WireEvent] = ()
    # The operation now waits for its caller (an import's data): the task ends here.
    waits: bool = False


@dataclass(slots=True)
class StepContext:
    """Everything a step may use."""

    operation: Operation
    step: str
    participants: Participants
    epoch: int
    executor: Executor
    attempt: int = 0

    @property
    def view(self) -> View:
        """The records now. Never kept: a registry that restarts brings a new view, and a
        step that waits on the old one would wait for ever."""
        return self.executor.replica.view

    def call(self, part: str = "") -> CallContext:
        """Header of a call to a participant; part tells apart several calls of one step.

        An attempt has an id of its own: a repeat shall be tried, not answered with the
        stored failure; that it has no second effect is the participants' natural keys'
        work.
        """
        name = f"{self.operation.id}/{self.step}/{part}/{self.epoch}/{self.attempt}"
        return CallContext(
            request_id=uuid.uuid5(uuid.NAMESPACE_OID, name).bytes,
            on_behalf_of=self.operation.source,
            operation=self.operation.id,
            step=self.step,
            epoch=self.epoch,
        )


class Step(Protocol):
    """One step of one kind: forward() does or repeats it, undo() takes it back."""

    async def forward(self, context: StepContext) -> Outcome: ...

    async def undo(self, context: StepContext) -> None: ...


class Executor:
    """All operations of this instance."""

    def __init__(
        self,
        participants: Participants,
        replica: ReplicaRunner,
        steps: Mapping[tuple[str, str], Step],
        *,
        uplink_namespace: str = "",
        console_dir: Path | None = None,
    ) -> None:
        self.participants = participants
        self.replica = replica
        self.steps = steps
        # The namespace that the outermost network qubes reach the world through.
        self.uplink_namespace = uplink_namespace
        # Where serial consoles are logged, for hypervisors that write them to a file.
        self.console_dir = console_dir
        self.epoch = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._waiters: dict[str, list[asyncio.Future[Operation]]] = {}
        # Who asked for an operation and is told when its steps are done.
        self._carried_out: dict[str, list[asyncio.Future[bool]]] = {}
        self._changed = asyncio.Event()
        self._started = asyncio.Event()
        # From the first entry on: a task may wait for one before there is an epoch.
        replica.subscribe(self._entry)

    async def start(self) -> None:
        """Take a new epoch and adopt every unfinished operation."""
        reply = await self.participants.registry.take_epoch(
            registry_pb2.TakeEpochRequest(), timeout=REGISTRY_TIMEOUT_S
        )
        self.epoch = reply.epoch
        self._started.set()
        for message in reply.unfinished:
            operation = codec.operation_from_proto(message)
            if operation.state is not OperationState.QUEUED:
                log.info(
                    "adopting %s %s at step %r", operation.kind, operation.id, operation.cursor
                )
            self.adopt(operation)

    async def stop(self) -> None:
        """Cancel the tasks: the registry holds what the next epoch needs."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def running(self) -> int:
        """Operations with a task now."""
        return len(self._tasks)

    # ---- news

    def _entry(self, entry: Entry) -> None:
        if entry.resync:
            for operation in list(self.replica.view.operations.values()):
                self._operation_changed(operation)
        for change in entry.changes:
            if isinstance(change, OperationPut):
                self._operation_changed(change.operation)
        self._changed.set()
        self._changed = asyncio.Event()

    def _operation_changed(self, operation: Operation) -> None:
        if operation.state.terminal:
            for waiter in self._waiters.pop(operation.id, ()):
                if not waiter.done():
                    waiter.set_result(operation)
        else:
            self.adopt(operation)

    def adopt(self, operation: Operation) -> None:
        """Give a runnable operation its task, once."""
        if not self.epoch or operation.id in self._tasks or not saga.runnable(operation):
            return
        self._take(operation, self._guarded(operation, self._run(operation)))

    def _take(self, operation: Operation, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work, name=f"{operation.kind} {operation.id}")
        self._tasks[operation.id] = task
        task.add_done_callback(lambda done: self._ended(operation.id, done))

    def _ended(self, operation_id: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(operation_id, None)
        # Who began to wait when the others had been told, or for what came to nothing.
        self._tell(operation_id, False)
        if not task.cancelled() and task.exception() is not None:
            log.error(
                "operation %s ended by an error of ours", operation_id, exc_info=task.exception()
            )
        # It may have become runnable again while the old task was ending.
        current = self.replica.view.operations.get(operation_id)
        if current is not None and not task.cancelled() and task.exception() is None:
            self.adopt(current)

    async def resume_import(
        self, operation_id: str, *, success: bool, reason: str, timeout: float
    ) -> Operation | None:
        """The data of an import is there, or will never be; the operation as it is then.

        The caller may have seen WAITING_DATA before our replica did, and before the task
        that brought it about has ended: both are waited for, or nobody would go on.
        None for an unknown operation. TimeoutError.
        """
        async with asyncio.timeout(timeout):
            while True:
                operation = self.replica.view.operations.get(operation_id)
                if operation is None or operation.state.terminal:
                    return operation
                task = self._tasks.get(operation_id)
                if operation.state is OperationState.WAITING_DATA and task is None:
                    break
                if operation.state is OperationState.WAITING_DATA and task is not None:
                    await asyncio.wait({task})
                elif operation.state in (OperationState.QUEUED, OperationState.RUNNING):
                    await self._changed.wait()
                else:
                    return operation  # it is taken back already
        if success:
            work = self._guarded(operation, self._forward(operation, after_cursor=True))
        else:
            problem = Problem(
                "ABORTED", "IMPORT_FAILED", f"import failed: {reason}", {"reason": reason}
            )
            work = self._guarded(operation, self._compensate(operation, problem))
        self._take(operation, work)
        return operation

    def abandon(self, operation: Operation) -> None:
        """Discard a waiting import that was cancelled or forgotten."""
        if operation.id not in self._tasks:
            work = self._compensate(operation, _cancelled(operation))
            self._take(operation, self._guarded(operation, work))

    # ---- submitting

    async def started(self) -> None:
        """Wait for the epoch, hence for the records: before, what there is looks unknown.

        BusError UNAVAILABLE while there is none: the caller asks again.
        """
        try:
            await asyncio.wait_for(self._started.wait(), START_PATIENCE_S)
        except TimeoutError:
            raise BusError(
                "UNAVAILABLE", "STARTING", "lifecycle has no epoch from the registry yet"
            ) from None

    async def begin(self, spec: OperationSpec, context: CallContext) -> tuple[Operation, bool, int]:
        """Begin an operation durably: (operation, joined an existing one, revision).

        BusError UNAVAILABLE while there is no epoch yet: the caller asks again.
        """
        await self.started()
        request = registry_pb2.BeginRequest(
            spec=codec.spec_to_proto(spec),
            operation_id=str(uuid.uuid5(uuid.NAMESPACE_OID, f"op/{context.request_id.hex()}")),
        )
        hit("lifecycle.begin.before")
        header, reply = await self.participants.registry.channel.call_with_header(
            "bulkhead.api.Registry.Begin",
            request,
            registry_pb2.BeginReply,
            timeout=REGISTRY_TIMEOUT_S,
            context=context,
        )
        hit("lifecycle.begin.after")
        operation = codec.operation_from_proto(reply.operation)
        self.adopt(operation)
        return operation, reply.joined, header.revision

    async def carried_out(self, operation: Operation, timeout: float) -> bool:
        """Wait until its steps are done and its end is on the way to the registry.

        False at once where the table says that only its end counts, or where it does not
        run; False when its task has ended, and after timeout seconds. After True the operation
        can only succeed, and whatever is sent to the registry from here finds it ended.
        """
        runs = operation.state is OperationState.RUNNING and operation.id in self._tasks
        if not runs or not OPERATIONS[operation.kind].carried_out:
            return False
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        waiters = self._carried_out.setdefault(operation.id, [])
        waiters.append(waiter)
        try:
            return await asyncio.wait_for(waiter, timeout)
        except TimeoutError:
            return False
        finally:
            waiters.remove(waiter)
            if not waiters:
                self._carried_out.pop(operation.id, None)

    def _tell(self, operation_id: str, carried_out: bool) -> None:
        for waiter in self._carried_out.get(operation_id, ()):
            if not waiter.done():
                waiter.set_result(carried_out)

    async def finished(self, operation: Operation, timeout: float) -> Operation:
        """Wait for an operation's terminal state. TimeoutError when it takes longer."""
        current = self.replica.view.operations.get(operation.id)
        for candidate in (operation, current):
            if candidate is not None and candidate.state.terminal:
                return candidate
        waiter: asyncio.Future[Operation] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(operation.id, []).append(waiter)
        try:
            return await asyncio.wait_for(waiter, timeout)
        finally:
            waiting = self._waiters.get(operation.id)
            if waiting is not None and waiter in waiting:
                waiting.remove(waiter)

    async def view_has(self, operation: Operation) -> None:
        """Wait until our replica shows the operation, hence the records of its begin."""
        while operation.id not in self.replica.view.operations:
            await self._changed.wait()

    async def changed(self, timeout: float) -> None:
        """Wait for the next entry of the stream, at most timeout seconds."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout)
        except TimeoutError:
            return

    # ---- running

    async def _run(self, operation: Operation) -> None:
        await self.view_has(operation)
        if operation.state is OperationState.COMPENSATING:
            await self._compensate(operation, operation.error or _interrupted(operation))
        else:
            await self._forward(operation)

    async def _guarded(self, operation: Operation, work: Coroutine[None, None, None]) -> None:
        """Run the work; a registry that knows better ends it without a fuss."""
        try:
            await work
        except BusError as error:
            if error.reason in ("STALE_EPOCH", "OPERATION_NOT_FOUND", "WRONG_OPERATION_STATE"):
                log.info("operation %s is not ours any more: %s", operation.id, error.message)
                if error.reason == "STALE_EPOCH":
                    self.epoch = 0  # another one adopts from now on; here it would go in circles
                return
            raise

    async def _forward(self, operation: Operation, *, after_cursor: bool = False) -> None:
        row = OPERATIONS[operation.kind]
        pending: Sequence[WireEvent] = ()
        result: dict[str, str] = dict(operation.result)
        left = saga.remaining(row, operation)[1 if after_cursor else 0 :]
        for stage in left:
            first = stage[0]
            operation = self._asked(operation)
            if saga.may_cancel(operation, first):
                await self._compensate(operation, _cancelled(operation))
                return
            pivoted = operation.pivoted or first.pivot
            if pending or not saga.stands_at(operation, first, pivoted=pivoted):
                operation = await self._advance(
                    operation,
                    first.name,
                    OperationState.RUNNING,
                    progress=saga.progress_of(row, first),
                    events=pending,
                    pivoted=pivoted,
                )
            pending = ()
            outcomes = await self._stage(operation, stage)
            if outcomes is None:
                return
            operation = self._asked(operation)
            if len(stage) > 1 and saga.may_cancel(operation, stage[-1]):
                # Asked for while they were under way, as before the last of them.
                await self._compensate(operation, _cancelled(operation))
                return
            waits = False
            for step, outcome in zip(stage, outcomes, strict=True):
                result.update(outcome.result)
                if stage is left[-1]:
                    # Nothing advances after the last step: its data reaches the end plan so.
                    result.update(outcome.data)
                if outcome.data:
                    operation = replace(operation, data={**operation.data, **outcome.data})
                made = _events_of(step, self.replica.view, operation)
                pending = (*pending, *made, *outcome.events)
                waits = waits or outcome.waits
            if waits:
                await self._advance(
                    operation,
                    first.name,
                    OperationState.WAITING_DATA,
                    events=pending,
                    data=operation.data,
                )
                return
        end = self._end(operation, OperationState.SUCCEEDED, None, result, pending)
        if not row.carried_out:
            await end
            return
        ending = asyncio.create_task(end)
        try:
            await asyncio.sleep(0)  # it has left before anybody is told
            hit("lifecycle.carried_out")
            self._tell(operation.id, True)
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            ending.cancel()
            raise

    def _asked(self, operation: Operation) -> Operation:
        """The operation, with the mark of a cancel that was asked for meanwhile."""
        latest = self.replica.view.operations.get(operation.id)
        if latest is not None and latest.cancel_requested and not operation.cancel_requested:
            return replace(operation, cancel_requested=True)
        return operation

    async def _stage(
        self, operation: Operation, stage: Sequence[StepRow]
    ) -> Sequence[Outcome] | None:
        """Do the steps of a stage beside each other; None when the operation took another way.

        Whatever fails, all of them have ended before anything is undone: a call that is
        still under way could do its work after its undo.
        """
        failed: list[Failure] = []
        attempts = await asyncio.gather(
            *(self._attempt(operation, step, failed) for step in stage), return_exceptions=True
        )
        for attempt in attempts:
            if isinstance(attempt, BaseException):
                raise attempt
        if not failed:
            return [attempt for attempt in attempts if isinstance(attempt, Outcome)]
        problem = failed[0].problem
        if saga.after_failure(operation, failed[0]) is Move.FAIL_AFTER_PIVOT:
            follow_up = KillSpec(
                _name_of(self.replica.view, operation), _boot_of(self.replica.view, operation)
            )
            await self._end(operation, OperationState.FAILED, problem, {}, (), follow_up)
        else:
            await self._compensate(operation, problem)
        return None

    async def _attempt(
        self, operation: Operation, step: StepRow, failed: list[Failure]
    ) -> Outcome | None:
        """Do one step, with retries; None when it failed, or another of its stage has."""
        attempts = 0
        began = time.monotonic()
        while True:
            context = self._context(operation, step.name, attempts)
            try:
                await self._reported(operation)
                hit("lifecycle.step.before")
                outcome = await self.steps[operation.kind, step.name].forward(context)
                hit("lifecycle.step.after")
                return outcome
            except (BusError, Refusal, StepFailed) as error:
                attempts += 1
                problem = problem_of(self.replica.view, error)
                failure = Failure(problem, attempts, time.monotonic() - began)
            move = saga.after_failure(operation, failure)
            log.warning(
                "%s %s: step %s failed (%s), %s",
                operation.kind,
                operation.id,
                step.name,
                failure.problem.message,
                move.value,
            )
            if move is Move.STUCK and operation.state is not OperationState.STUCK:
                operation = await self._advance(
                    operation, operation.cursor, OperationState.STUCK, error=failure.problem
                )
            if move in (Move.RETRY, Move.STUCK) and not failed:
                await asyncio.sleep(saga.retry_delay(attempts))
                continue
            failed.append(failure)
            return None

    async def _reported(self, operation: Operation) -> None:
        """Wait for the facts that the operation reads; BusError UNAVAILABLE without them."""
        deadline = time.monotonic() + FACTS_PATIENCE_S
        while service := unreported(self.replica.view, operation.kind):
            left = deadline - time.monotonic()
            if left <= 0:
                raise BusError(
                    "UNAVAILABLE", "STARTING", f"{service} has not told yet what there is"
                )
            await self.changed(left)

    async def _compensate(self, operation: Operation, problem: Problem) -> None:
        """Undo the steps up to the cursor, last first, then end."""
        row = OPERATIONS[operation.kind]
        for step in saga.to_undo(row, operation):
            operation = await self._advance(
                operation, step.name, OperationState.COMPENSATING, error=problem
            )
            attempts = 0
            while True:
                context = self._context(operation, step.name, 1000 + attempts)
                try:
                    await self._reported(operation)
                    hit("lifecycle.undo.before")
                    await self.steps[operation.kind, step.name].undo(context)
                    hit("lifecycle.undo.after")
                    break
                except (BusError, Refusal, StepFailed) as error:
                    attempts += 1
                    log.warning(
                        "%s %s: undo of %s failed (%s), attempt %d",
                        operation.kind,
                        operation.id,
                        step.name,
                        error,
                        attempts,
                    )
                    await asyncio.sleep(saga.retry_delay(attempts))
        outcome = (
            OperationState.CANCELLED if problem.reason == "CANCELLED" else OperationState.FAILED
        )
        await self._end(operation, outcome, problem, {}, ())

    def _context(self, operation: Operation, step: str, attempt: int) -> StepContext:
        return StepContext(operation, step, self.participants, self.epoch, self, attempt)

    async def _advance(
        self,
        operation: Operation,
        cursor: str,
        state: OperationState,
        *,
        progress: float = 0.0,
        events: Sequence[WireEvent] = (),
        data: Mapping[str, str] | None = None,
        error: Problem | None = None,
        pivoted: bool | None = None,
    ) -> Operation:
        """Make the cursor durable, before its step is sent."""
        request = registry_pb2.AdvanceRequest(
            operation_id=operation.id,
            epoch=self.epoch,
            cursor=cursor,
            state=codec.operation_state_to_proto(state),
            progress=progress,
            data=dict(data if data is not None else operation.data),
            pivoted=operation.pivoted if pivoted is None else pivoted,
            events=[codec.event_to_proto(event) for event in events],
        )
        if error is not None:
            request.error.CopyFrom(codec.problem_to_proto(error))
        hit("lifecycle.advance.before")
        reply = await self._registry(
            lambda context: self.participants.registry.advance(
                request, timeout=REGISTRY_TIMEOUT_S, context=context
            )
        )
        hit("lifecycle.advance.after")
        advanced = codec.operation_from_proto(reply.operation)
        return replace(advanced, cancel_requested=advanced.cancel_requested)

    async def _end(
        self,
        operation: Operation,
        outcome: OperationState,
        problem: Problem | None,
        result: Mapping[str, str],
        events: Sequence[WireEvent],
        follow_up: OperationSpec | None = None,
    ) -> None:
        request = registry_pb2.EndRequest(
            operation_id=operation.id,
            epoch=self.epoch,
            outcome=codec.operation_state_to_proto(outcome),
            result=dict(result),
            events=[codec.event_to_proto(event) for event in events],
        )
        if problem is not None:
            request.error.CopyFrom(codec.problem_to_proto(problem))
        if follow_up is not None:
            request.follow_up.CopyFrom(codec.spec_to_proto(follow_up))
        hit("lifecycle.end.before")
        reply = await self._registry(
            lambda context: self.participants.registry.end(
                request, timeout=REGISTRY_TIMEOUT_S, context=context
            )
        )
        hit("lifecycle.end.after")
        ended = codec.operation_from_proto(reply.operation)
        log.info("%s %s ended %s", ended.kind, ended.id, ended.state.value)
        if reply.HasField("follow_up"):
            self.adopt(codec.operation_from_proto(reply.follow_up))

    async def _registry(self, send: Callable[[CallContext], Awaitable[_R]]) -> _R:
        """Send to the registry until it answers: it may be restarting."""
        context = CallContext(request_id=uuid.uuid4().bytes)
        attempts = 0
        while True:
            try:
                return await send(context)
            except BusError as error:
                if error.code not in saga.TRANSIENT:
                    raise
                attempts += 1
                await asyncio.sleep(saga.retry_delay(attempts))


def problem_of(view: View, error: BusError | Refusal | StepFailed) -> Problem:
    """A failure as the value that is stored with the operation, and told to its caller."""
    if isinstance(error, StepFailed):
        return error.problem
    message = with_names(view, error.message)
    return Problem(error.code, error.reason, message, dict(error.metadata))


def _events_of(step: StepRow, view: View, operation: Operation) -> Sequence[WireEvent]:
    return step.events(view, operation) if step.events is not None else ()


def _cancelled(operation: Operation) -> Problem:
    return Problem("CANCELLED", "CANCELLED", f"{operation.kind} was cancelled before its pivot")


def _interrupted(operation: Operation) -> Problem:
    return Problem("ABORTED", "QUBE_ERROR", f"{operation.kind} was interrupted and undone")


def _subject(operation: Operation) -> str:
    return operation.subjects[0] if operation.subjects else ""


def _name_of(view: View, operation: Operation) -> str:
    qube = view.by_uuid_any(_subject(operation))
    return qube.name if qube is not None else ""


def _boot_of(view: View, operation: Operation) -> str:
    qube = view.by_uuid_any(_subject(operation))
    return qube.run.boot_id if qube is not None else ""
