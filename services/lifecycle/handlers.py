"""Bus messages of lifecycle, to and from the executor.

Owns nothing durable. Must not know steps. Invariant: an answer to Submit means that the
operation is durable in the registry.
"""

from __future__ import annotations

from bulkhead import codec
from bulkhead.api import control_pb2, lifecycle_pb2, registry_pb2
from bulkhead.bus.client import CallContext
from bulkhead.bus.errors import BusError
from bulkhead.bus.server import Call
from bulkhead.model.records import Operation, OperationState
from bulkhead.model.specs import KillSpec
from services.lifecycle.executor import REGISTRY_TIMEOUT_S, Executor
from services.lifecycle.watcher import Watcher

# What may be submitted on the control lane: it must get through whatever is queued.
URGENT = (KillSpec,)

FINISH_MARGIN_S = 1.0
# How long an answer to Submit is held back for steps that may be done any moment.
CARRY_OUT_S = 1.0


class LifecycleHandlers:
    """The methods of lifecycle.proto."""

    def __init__(self, executor: Executor, watcher: Watcher) -> None:
        self.executor = executor
        self.watcher = watcher

    @property
    def ready(self) -> bool:
        """An epoch was taken: unfinished operations are adopted."""
        return self.executor.epoch > 0

    @property
    def not_ready_reason(self) -> str:
        return "" if self.ready else "the registry has not given an epoch yet"

    @property
    def revision(self) -> int:
        return self.executor.replica.revision

    @property
    def seq(self) -> int:
        return self.executor.replica.seq

    @property
    def lag_s(self) -> float:
        return self.executor.replica.lag_s

    async def submit(
        self, request: lifecycle_pb2.SubmitRequest, call: Call
    ) -> lifecycle_pb2.SubmitReply:
        """Begin the operation; answers when it is durable, a little later where that is
        enough for all that its caller waits for."""
        spec = codec.spec_from_proto(request.spec)
        operation, joined, revision = await self.executor.begin(spec, _context(call))
        call.revision = revision
        return lifecycle_pb2.SubmitReply(
            operation=codec.operation_to_proto(operation),
            joined=joined,
            revision=revision,
            carried_out=await self.executor.carried_out(operation, CARRY_OUT_S),
        )

    async def submit_urgent(
        self, request: lifecycle_pb2.SubmitRequest, call: Call
    ) -> lifecycle_pb2.SubmitReply:
        """As submit, for what must not queue."""
        if not isinstance(codec.spec_from_proto(request.spec), URGENT):
            raise BusError(
                "INVALID_ARGUMENT", "PROTOCOL", "only KILL is urgent; use Submit for the others"
            )
        return await self.submit(request, call)

    async def cancel_submitted(
        self, request: lifecycle_pb2.CancelSubmittedRequest, call: Call
    ) -> lifecycle_pb2.CancelSubmittedReply:
        """Ask for a cancel; honoured at the next cancel point before the pivot."""
        await self.executor.started()
        reply = await self.executor.participants.registry.cancel_operation(
            registry_pb2.CancelOperationRequest(operation_id=request.operation_id),
            timeout=REGISTRY_TIMEOUT_S,
            context=_context(call),
        )
        operation = codec.operation_from_proto(reply.operation)
        if operation.state is OperationState.WAITING_DATA:
            self.executor.abandon(operation)
        return lifecycle_pb2.CancelSubmittedReply(operation=reply.operation)

    async def finish_import(
        self, request: lifecycle_pb2.FinishImportRequest, call: Call
    ) -> lifecycle_pb2.FinishImportReply:
        """The import's data is complete, or its writer gave up."""
        await self.executor.started()
        known: Operation | None = self.executor.replica.view.operations.get(request.operation_id)
        operation = None
        if known is None or known.kind == "IMPORT":
            operation = await self.executor.resume_import(
                request.operation_id,
                success=request.success,
                reason=_printable(request.untrusted_reason),
                timeout=max(0.1, call.deadline.remaining()),
            )
        if operation is None:
            raise BusError(
                "NOT_FOUND",
                "OPERATION_NOT_FOUND",
                f"no import {request.operation_id} waits for data",
                operation=request.operation_id,
            )
        try:
            # A little before the caller stops listening.
            ended = await self.executor.finished(
                operation, max(0.1, call.deadline.remaining() - FINISH_MARGIN_S)
            )
        except TimeoutError:
            # Much data takes long to keep; the caller sees the end in the stream.
            ended = self.executor.replica.view.operations.get(operation.id, operation)
        return lifecycle_pb2.FinishImportReply(operation=codec.operation_to_proto(ended))

    async def sweep(
        self,
        request: control_pb2.SweepRequest,
        call: Call,
    ) -> control_pb2.SweepReply:
        """Findings of a comparison of all inventories with the records."""
        return control_pb2.SweepReply(findings=await self.watcher.sweep())


def _context(call: Call) -> CallContext:
    return CallContext(
        request_id=call.request_id, on_behalf_of=call.source, trace_id=call.trace_id, etag=call.etag
    )


def _printable(untrusted_reason: str) -> str:
    """At most 200 printable ASCII characters of what an import's writer said."""
    return "".join(c if " " <= c <= "~" else "_" for c in untrusted_reason[:200])
