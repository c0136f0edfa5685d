"""Operations of lifecycle, submitted and followed to their end in the stream.

Owns who waits for which operation and for which state of the view. Must not know what
disposables are. Invariant: every wait is bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bulkhead import codec
from bulkhead.api import lifecycle_pb2
from bulkhead.bus.client import CallContext
from bulkhead.bus.errors import BusError
from bulkhead.bus.events import Entry, ReplicaRunner
from bulkhead.model.records import Operation, OperationPut, OperationState, Problem
from bulkhead.model.specs import OperationSpec
from bulkhead.model.view import View
from clients.bus import LifecycleClient

SUBMIT_TIMEOUT_S = 15.0


class Operations:
    """Submits to lifecycle; follow() must see every entry of the stream."""

    def __init__(self, lifecycle: LifecycleClient, replica: ReplicaRunner) -> None:
        self._lifecycle = lifecycle
        self._replica = replica
        self._waiters: dict[str, list[asyncio.Future[Operation]]] = {}
        self._looking: list[asyncio.Future[None]] = []

    def follow(self, entry: Entry) -> None:
        """Wake who waits for what the entry tells."""
        for change in entry.changes:
            if isinstance(change, OperationPut):
                self._changed(change.operation)
        if entry.resync:
            for operation in list(self._replica.view.operations.values()):
                self._changed(operation)
        looking, self._looking = self._looking, []
        for waiter in looking:
            if not waiter.done():
                waiter.set_result(None)

    def _changed(self, operation: Operation) -> None:
        if operation.state.terminal:
            for waiter in self._waiters.pop(operation.id, ()):
                if not waiter.done():
                    waiter.set_result(operation)

    async def until(self, condition: Callable[[View], bool], timeout: float) -> bool:
        """Wait for the view to fulfil the condition; False when it did not within timeout s."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while not condition(self._replica.view):
            waiter: asyncio.Future[None] = loop.create_future()
            self._looking.append(waiter)
            try:
                await asyncio.wait_for(waiter, max(0.0, deadline - loop.time()))
            except TimeoutError:
                return condition(self._replica.view)
        return True

    async def finish(
        self, spec: OperationSpec, context: CallContext, timeout: float, *, urgent: bool = False
    ) -> Operation:
        """Submit and wait for the end. BusError with the operation's own error."""
        submit = self._lifecycle.submit_urgent if urgent else self._lifecycle.submit
        reply = await submit(
            lifecycle_pb2.SubmitRequest(spec=codec.spec_to_proto(spec)),
            timeout=min(SUBMIT_TIMEOUT_S, timeout),
            context=context,
        )
        operation = codec.operation_from_proto(reply.operation)
        known = self._replica.view.operations.get(operation.id)
        if known is not None and known.state.terminal:
            operation = known
        if not operation.state.terminal:
            operation = await self._end_of(operation, timeout)
        if operation.state is not OperationState.SUCCEEDED:
            problem = operation.error or Problem(
                "INTERNAL", "QUBE_ERROR", f"operation {operation.id} failed"
            )
            error = BusError(problem.code, problem.reason, problem.message)
            error.metadata.update(problem.metadata)
            raise error
        return operation

    async def _end_of(self, operation: Operation, timeout: float) -> Operation:
        waiter: asyncio.Future[Operation] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(operation.id, []).append(waiter)
        try:
            return await asyncio.wait_for(waiter, timeout)
        except TimeoutError as late:
            raise BusError(
                "DEADLINE_EXCEEDED",
                "QUBE_BUSY",
                f"operation {operation.id} is still under way; look at it with bulkhead.op.List",
                operation=operation.id,
            ) from late
        finally:
            waiters = self._waiters.get(operation.id)
            if waiters is not None and waiter in waiters:
                waiters.remove(waiter)
                if not waiters:
                    del self._waiters[operation.id]
