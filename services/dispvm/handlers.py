"""Bus messages of dispvm, and the clean-up after a boot of the host.

Owns the wait for a disposable to exist. Must not touch volumes or domains: lifecycle
does. Invariant: one request makes at most one disposable, however often it is repeated.
"""

from __future__ import annotations

import asyncio
import logging
import uuid

from bulkhead import codec
from bulkhead.api import dispvm_pb2, lifecycle_pb2
from bulkhead.bus.client import CallContext
from bulkhead.bus.errors import BusError
from bulkhead.bus.events import Entry, ReplicaRunner
from bulkhead.bus.server import Call
from bulkhead.failpoints import hit
from bulkhead.model.records import Operation, OperationPut, OperationState, Problem
from bulkhead.model.specs import CreateSpec, RemoveSpec
from clients.bus import LifecycleClient
from services.dispvm import failpoint_table  # noqa: F401 - declares what hit() names
from services.dispvm.adapters.boot_marker import BootMarker
from services.dispvm.core.disposables import disposable_template, stale_after_boot

log = logging.getLogger("bulkhead.dispvm")

SUBMIT_TIMEOUT_S = 15.0


class DispvmHandlers:
    """The methods of dispvm.proto."""

    def __init__(
        self, lifecycle: LifecycleClient, replica: ReplicaRunner, marker: BootMarker
    ) -> None:
        self.lifecycle = lifecycle
        self.replica = replica
        self.marker = marker
        self.ready = False
        self.not_ready_reason = "the registry's state has not arrived yet"
        self._waiters: dict[str, list[asyncio.Future[Operation]]] = {}

    @property
    def revision(self) -> int:
        return self.replica.revision

    @property
    def seq(self) -> int:
        return self.replica.seq

    @property
    def lag_s(self) -> float:
        return self.replica.lag_s

    async def start(self) -> None:
        """Wait for the replica, then remove what a former boot of the host left."""
        await self.replica.ready()
        self.replica.subscribe(self._entry)
        self.ready, self.not_ready_reason = True, ""
        if not self.marker.fresh():
            return
        for qube in list(stale_after_boot(self.replica.view)):
            log.info("removing disposable %s of a former boot", qube.name)
            context = CallContext(
                request_id=uuid.uuid5(
                    uuid.NAMESPACE_OID, f"stale/{qube.uuid}/{self.marker.current}"
                ).bytes,
                on_behalf_of="dom0",
            )
            try:
                await self._finish(RemoveSpec(qube.name, auto_cleanup=True), context, 120.0)
            except BusError as error:
                log.warning("disposable %s stays: %s", qube.name, error.message)
        self.marker.done()

    def _entry(self, entry: Entry) -> None:
        for change in entry.changes:
            if isinstance(change, OperationPut):
                self._changed(change.operation)
        if entry.resync:
            for operation in list(self.replica.view.operations.values()):
                self._changed(operation)

    def _changed(self, operation: Operation) -> None:
        if operation.state.terminal:
            for waiter in self._waiters.pop(operation.id, ()):
                if not waiter.done():
                    waiter.set_result(operation)

    async def create_disposable(
        self, request: dispvm_pb2.CreateDisposableRequest, call: Call
    ) -> dispvm_pb2.CreateDisposableReply:
        """A new disposable of the template, not started."""
        template = disposable_template(self.replica.view, request.template)
        spec = CreateSpec(
            klass="DispVM", template=template.name, template_given=True, disposable=True
        )
        hit("dispvm.create.before")
        ended = await self._finish(
            spec,
            CallContext(
                request_id=call.request_id, on_behalf_of=call.source, trace_id=call.trace_id
            ),
            call.deadline.remaining(),
        )
        hit("dispvm.create.after")
        call.revision, call.seq = self.replica.revision, self.replica.seq
        return dispvm_pb2.CreateDisposableReply(
            name=ended.result.get("name", ""),
            uuid=ended.result.get("uuid", ""),
            operation_id=ended.id,
            revision=self.replica.revision,
        )

    async def request_preload(
        self,
        request: dispvm_pb2.RequestPreloadRequest,
        call: Call,
    ) -> dispvm_pb2.RequestPreloadReply:
        """Fill the template's preload queue up to its maximum."""
        disposable_template(self.replica.view, request.template)
        return dispvm_pb2.RequestPreloadReply()

    async def _finish(
        self, spec: CreateSpec | RemoveSpec, context: CallContext, timeout: float
    ) -> Operation:
        """Submit and wait for the end. BusError with the operation's own error."""
        reply = await self.lifecycle.submit(
            lifecycle_pb2.SubmitRequest(spec=codec.spec_to_proto(spec)),
            timeout=min(SUBMIT_TIMEOUT_S, timeout),
            context=context,
        )
        operation = codec.operation_from_proto(reply.operation)
        known = self.replica.view.operations.get(operation.id)
        if known is not None and known.state.terminal:
            operation = known
        if not operation.state.terminal:
            waiter: asyncio.Future[Operation] = asyncio.get_running_loop().create_future()
            self._waiters.setdefault(operation.id, []).append(waiter)
            try:
                operation = await asyncio.wait_for(waiter, timeout)
            except TimeoutError as late:
                raise BusError(
                    "DEADLINE_EXCEEDED",
                    "QUBE_BUSY",
                    f"operation {operation.id} is still under way; look at it with "
                    "bulkhead.op.List",
                    operation=operation.id,
                ) from late
        if operation.state is not OperationState.SUCCEEDED:
            problem = operation.error or Problem(
                "INTERNAL", "QUBE_ERROR", f"operation {operation.id} failed"
            )
            error = BusError(problem.code, problem.reason, problem.message)
            error.metadata.update(problem.metadata)
            raise error
        return operation
