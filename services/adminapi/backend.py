"""The services behind the Admin API: changes, operations, and waiting for both to show.

Owns request ids, deadlines and the wait for our own replica. Must not know the wire of
clients. Invariant: a change is reported as done only after this process's replica holds
it and its events are queued, apart from the end of an operation whose steps are done: what
is asked for after that answer finds it ended. When the outcome is not known, that is what
is said.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Mapping
from typing import TypeVar

from google.protobuf.message import Message

from bulkhead import codec
from bulkhead.api import lifecycle_pb2, registry_pb2
from bulkhead.bus.client import CallContext
from bulkhead.bus.errors import BusError
from bulkhead.bus.events import Entry, ReplicaRunner
from bulkhead.bus.runtime import ServiceContext
from bulkhead.model import specs
from bulkhead.model.records import (
    ADMINVM_NAME,
    Operation,
    OperationPut,
    OperationRemoved,
    OperationState,
    Phase,
    WireEvent,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View
from services.adminapi.audit_exporter import note_done
from services.adminapi.core.exceptions import WireRefusal
from services.adminapi.vetoes import Vetoes

R = TypeVar("R", bound=Message)

# How long a change is held and repeated while a service restarts.
HOLD_S = 10.0
# How long the part of a change that has to reach a running qube is waited for.
APPLY_S = 90.0
# How long an operation may be stuck before its caller is told.
STUCK_S = 10.0
# How long taking back what a failed operation had done may go on before its caller is told.
UNDO_S = 60.0
# How long our own replica may take to follow.
FOLLOW_S = 10.0
# Times that a change is planned and asked about again because something came between.
REPLANS = 3
# The largest live reads may take; beyond it what is declared is shown.
LIVE_S = 5.0


class OperationFailed(Exception):
    """An operation ended without success; reason and message are the operation's own."""

    def __init__(self, operation: Operation) -> None:
        problem = operation.error
        self.reason = problem.reason if problem is not None else "CANCELLED"
        self.message = problem.message if problem is not None else "the operation was cancelled"
        super().__init__(self.message)
        self.operation = operation


def _terminal(operation: Operation) -> bool:
    return operation.state.terminal


# What an operation may be in for as long as the cause of it lasts, and how long that is
# waited for.
_PATIENCE: Mapping[OperationState, float] = {
    OperationState.STUCK: STUCK_S,
    OperationState.COMPENSATING: UNDO_S,
}


class OperationWaits:
    """Who waits for which operation, or for the view to be such; fed by the stream."""

    def __init__(self, replica: ReplicaRunner) -> None:
        self._replica = replica
        self._waits: dict[
            str, list[tuple[Callable[[Operation], bool], asyncio.Future[Operation]]]
        ] = {}
        self._looking: list[asyncio.Future[None]] = []

    def on_entry(self, entry: Entry) -> None:
        """Look at an entry that the view holds already."""
        looking, self._looking = self._looking, []
        for looker in looking:
            if not looker.done():
                looker.set_result(None)
        if not self._waits:
            return
        if entry.resync:
            for operation_id in list(self._waits):
                self._moved(operation_id, self._replica.view.operations.get(operation_id))
            return
        for change in entry.changes:
            if isinstance(change, OperationPut):
                self._moved(change.operation.id, change.operation)
            elif isinstance(change, OperationRemoved):
                self._moved(change.id, None)

    def _moved(self, operation_id: str, operation: Operation | None) -> None:
        waits = self._waits.get(operation_id)
        if waits is None:
            return
        for wait in list(waits):
            done, future = wait
            if operation is None:
                if not future.done():
                    future.set_exception(_lost(operation_id))
                waits.remove(wait)
            elif done(operation):
                if not future.done():
                    future.set_result(operation)
                waits.remove(wait)
        if not waits:
            del self._waits[operation_id]

    async def wait(
        self, operation_id: str, done: Callable[[Operation], bool] = _terminal
    ) -> Operation:
        """The operation once done(operation) is true; without a time limit.

        WireRefusal OUTCOME_UNKNOWN when the registry does not know it any more.
        """
        operation = self._replica.view.operations.get(operation_id)
        if operation is None:
            raise _lost(operation_id)
        if done(operation):
            return operation
        future: asyncio.Future[Operation] = asyncio.get_running_loop().create_future()
        wait = (done, future)
        self._waits.setdefault(operation_id, []).append(wait)
        try:
            return await future
        finally:
            self._forget(operation_id, wait)

    async def until(self, condition: Callable[[View], bool], timeout: float) -> bool:
        """Wait until the view fulfils the condition; False where it has not after timeout s."""
        try:
            async with asyncio.timeout(timeout):
                while not condition(self._replica.view):
                    looker: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._looking.append(looker)
                    await looker
        except TimeoutError:
            return condition(self._replica.view)
        return True

    def _forget(
        self,
        operation_id: str,
        wait: tuple[Callable[[Operation], bool], asyncio.Future[Operation]],
    ) -> None:
        """A wait that was given up leaves nothing behind."""
        waits = self._waits.get(operation_id, [])
        if wait in waits:
            waits.remove(wait)
            if not waits:
                del self._waits[operation_id]


def _lost(operation_id: str) -> WireRefusal:
    return WireRefusal(
        "OUTCOME_UNKNOWN",
        f"what became of operation {operation_id} is not known; look at the objects it changes",
        operation=operation_id,
    )


class Backend:
    """Typed access to the other services on behalf of Admin API sources."""

    def __init__(self, context: ServiceContext) -> None:
        self.replica = context.replica(with_hidden=False)
        self.operations = OperationWaits(self.replica)
        self._context = context
        self.vetoes = Vetoes((), context.channel)
        # Operations whose callers were told already: their ends show in a moment.
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def view(self) -> View:
        """The present view; a new object after each resync, so do not keep it."""
        return self.replica.view

    # ---- calls

    async def call(
        self,
        method: str,
        request: Message,
        reply_type: type[R],
        *,
        source: str = "",
        timeout: float = HOLD_S,
        request_id: bytes = b"",
        etag: int = 0,
    ) -> R:
        """One bus call, method as "Service.Method"; waits for the change to show here.

        BusError as the service refused; WireRefusal NOTHING_CHANGED or OUTCOME_UNKNOWN
        where it could not be asked or did not answer.
        """
        request_id = request_id or secrets.token_bytes(16)
        service = method.split(".")[0].lower()
        if self._ending and service != "lifecycle":
            # What was reported as done has ended for whoever asks now. Lifecycle itself has
            # sent those ends, so that nothing that it begins comes before them.
            _, late = await asyncio.wait(self._ending, timeout=timeout)
            self._ending -= late  # a store that is full, say: the next one need not wait as well
        try:
            header, reply = await self._context.channel(service).call_with_header(
                f"bulkhead.api.{method}",
                request,
                reply_type,
                timeout=timeout,
                context=CallContext(request_id=request_id, on_behalf_of=source, etag=etag),
            )
        except BusError as error:
            raise unavailable(error, request_id) from error
        note_done(method)
        if header.revision or header.seq:
            await self.follow(header.revision, header.seq)
        return reply

    async def read(self, method: str, request: Message, reply_type: type[R]) -> R | None:
        """A live read that may fail: None when the service is not there in time."""
        service = method.split(".")[0].lower()
        try:
            return await self._context.channel(service).call(
                f"bulkhead.api.{method}", request, reply_type, timeout=LIVE_S
            )
        except BusError as error:
            self._context.log.warning("%s: %s", method, error)
            return None

    async def follow(self, revision: int, seq: int) -> None:
        """Return when our replica holds that point. WireRefusal OUTCOME_UNKNOWN."""
        try:
            await self.replica.wait_for(revision, seq, FOLLOW_S)
        except BusError as error:
            raise WireRefusal(
                "OUTCOME_UNKNOWN",
                f"revision {revision} was made, but does not show here yet; ask again",
                revision=str(revision),
            ) from error

    # ---- changes

    async def mutate(self, command: specs.Command, source: str) -> Mapping[str, str]:
        """Change records; where the change has to reach a running qube, wait for that too.

        Raises BusError, WireRefusal or, for the part that reaches the qube,
        OperationFailed; the value stays changed then.
        """
        for attempt in range(1 + REPLANS):
            planned_at = self.replica.revision
            asked = await self.vetoes.ask(self.view, command, source)
            try:
                reply = await self.call(
                    "Registry.Mutate",
                    codec.command_to_proto(command),
                    registry_pb2.MutateReply,
                    source=source,
                    etag=planned_at if asked else 0,
                )
                break
            except BusError as error:
                if error.reason != "CHANGED_MEANWHILE" or attempt == REPLANS:
                    raise
        if reply.apply_operation:
            await self._applied(reply.apply_operation)
        return dict(reply.result)

    async def operate(
        self,
        spec: specs.OperationSpec,
        source: str,
        done: Callable[[Operation], bool] = _terminal,
    ) -> Operation:
        """Submit an operation and wait until it is done; OperationFailed without success.

        Where the table of operations says so, that is when its steps are: it is returned as
        it began then, and its result is empty.
        """
        await self.vetoes.ask(self.view, spec, source)
        request_id = secrets.token_bytes(16)
        urgent = isinstance(spec, specs.KillSpec)
        try:
            reply = await self.call(
                "Lifecycle.SubmitUrgent" if urgent else "Lifecycle.Submit",
                lifecycle_pb2.SubmitRequest(spec=codec.spec_to_proto(spec)),
                lifecycle_pb2.SubmitReply,
                source=source,
                request_id=request_id,
            )
            operation_id = reply.operation.id
            await self.follow(reply.revision, 0)
            if reply.carried_out and done is _terminal:
                self._await_end(operation_id)
                return codec.operation_from_proto(reply.operation)
        except WireRefusal as refusal:
            if refusal.reason != "OUTCOME_UNKNOWN":
                raise
            # It may have begun all the same: the stream says so.
            begun = next(
                (o for o in self.view.operations.values() if o.request_id == request_id), None
            )
            if begun is None:
                raise
            operation_id = begun.id
        return await self.succeeded(operation_id, done)

    def _await_end(self, operation_id: str) -> None:
        async def ended() -> None:
            with contextlib.suppress(WireRefusal):  # so long ago that it is forgotten
                await self.operations.wait(operation_id)

        task = asyncio.create_task(ended(), name=f"end of {operation_id}")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def reached(self, uuid: str) -> None:
        """Wait until what is on its way to a running qube has reached it, as mutate() does;
        not for what has to wait for the end of its start."""
        qube = self.view.by_uuid(uuid)
        if qube is None or qube.run.phase is not Phase.UP:
            return
        for operation in list(self.view.operations_on(uuid)):
            if operation.kind == "APPLY":
                await self._applied(operation.id)

    async def _applied(self, operation_id: str) -> None:
        """Wait until the change has reached the qube; Refusal QUBE_BUSY where that has to
        wait for long: it is durable, and goes on by itself."""
        try:
            await asyncio.wait_for(self.succeeded(operation_id), APPLY_S)
        except TimeoutError:
            raise Refusal(
                "QUBE_BUSY",
                f"the value is stored, but has not reached the running qube within {APPLY_S:.0f} s;"
                f" operation {operation_id} brings it there",
                operation=operation_id,
            ) from None

    async def succeeded(
        self, operation_id: str, done: Callable[[Operation], bool] = _terminal
    ) -> Operation:
        """The operation once it is done. OperationFailed where it ended without success,
        WireRefusal OPERATION_STUCK where it can neither go on nor back for a while."""
        while True:
            operation = await self.operations.wait(
                operation_id, lambda o: done(o) or o.state in _PATIENCE
            )
            if done(operation):
                break
            try:
                await asyncio.wait_for(self._moved_on(operation, done), _PATIENCE[operation.state])
            except TimeoutError:
                raise self._told_stuck(operation) from None
        if operation.state.terminal and operation.state is not OperationState.SUCCEEDED:
            raise OperationFailed(operation)
        return operation

    async def _moved_on(self, operation: Operation, done: Callable[[Operation], bool]) -> None:
        state = operation.state
        await self.operations.wait(operation.id, lambda o: done(o) or o.state is not state)

    @staticmethod
    def _told_stuck(operation: Operation) -> WireRefusal:
        reason = operation.error.message if operation.error is not None else "no reason is known"
        what = f"{operation.kind} is stuck: {reason}; it is tried again"
        if operation.state is OperationState.COMPENSATING:
            what = f"{operation.kind} failed: {reason}; taking back what it had done is tried again"
        return WireRefusal(
            "OPERATION_STUCK",
            f"{what} until the cause is gone, look at operation {operation.id}",
            operation=operation.id,
        )

    async def announce(self, uuid: str, boot_id: str, events: tuple[WireEvent, ...]) -> None:
        """Put events into the sequence that change no record."""
        await self.call(
            "Registry.Announce",
            registry_pb2.AnnounceRequest(
                uuid=uuid, boot_id=boot_id, events=[codec.event_to_proto(e) for e in events]
            ),
            registry_pb2.AnnounceReply,
            source=ADMINVM_NAME,
        )


def unavailable(error: BusError, request_id: bytes) -> BusError | WireRefusal:
    """The refusal that a failed call becomes: the service's own, or what is known of it."""
    if error.outcome_unknown:
        return WireRefusal(
            "OUTCOME_UNKNOWN",
            f"{error.message}; outcome unknown, request {request_id.hex()}",
            request=request_id.hex(),
        )
    if error.code == "UNAVAILABLE" and error.reason != "NAME_IN_REMOVAL":
        return WireRefusal("NOTHING_CHANGED", f"{error.message}; nothing was changed, try again")
    return error
