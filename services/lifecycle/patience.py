"""Ends operations whose turn has not come for too long, with who was in their way.

Owns one timer for each operation that waits. Must not know what operations do, nor who
may run (bulkhead.model.plan.queue). Invariant: an operation whose turn comes while it is
being ended runs: the registry alone decides which of the two came first.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Protocol

from bulkhead import codec
from bulkhead.api import registry_pb2
from bulkhead.bus.client import CallContext
from bulkhead.bus.errors import BusError
from bulkhead.bus.events import Entry
from bulkhead.failpoints import hit
from bulkhead.model.plan.base import Draft, problem_of
from bulkhead.model.plan.queue import QUEUE_WAIT_S, may_wait_for_ever, waited_too_long
from bulkhead.model.records import Operation, OperationPut, OperationState
from bulkhead.model.view import View
from clients.bus import RegistryClient
from services.lifecycle import failpoint_table  # noqa: F401 - declares what hit() names

log = logging.getLogger("bulkhead.lifecycle")

REGISTRY_TIMEOUT_S = 10.0
RETRY_S = 1.0


class Replica(Protocol):
    """What is needed of a ReplicaRunner."""

    @property
    def view(self) -> View:
        """The records now."""


class Patience:
    """Follows the stream of one lifecycle; seconds: how long a turn may be waited for.

    The time counts from when this process first saw the operation wait: clocks that are
    set and restarts make it longer, never shorter.
    """

    def __init__(
        self, registry: RegistryClient, replica: Replica, *, seconds: float = QUEUE_WAIT_S
    ) -> None:
        self._registry = registry
        self._replica = replica
        self._seconds = seconds
        # Bounded by the queues' own limit: one for each operation that waits.
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._due: asyncio.Queue[str] = asyncio.Queue()
        self.epoch = 0

    @property
    def waiting(self) -> int:
        """Operations whose time runs."""
        return len(self._timers)

    def start(self, epoch: int) -> None:
        """lifecycle has its epoch: look at everything once."""
        self.epoch = epoch
        self._look_at_all()

    def follow(self, entry: Entry) -> None:
        """An entry that the view holds already."""
        if entry.resync:
            self._look_at_all()
        for change in entry.changes:
            if isinstance(change, OperationPut):
                self._look(change.operation)

    def _look_at_all(self) -> None:
        known = self._replica.view.operations
        for operation_id in [op_id for op_id in self._timers if op_id not in known]:
            self._timers.pop(operation_id).cancel()
        for operation in list(known.values()):
            self._look(operation)

    def _look(self, operation: Operation) -> None:
        waits = operation.state is OperationState.QUEUED and not may_wait_for_ever(operation)
        if not waits:
            timer = self._timers.pop(operation.id, None)
            if timer is not None:
                timer.cancel()
        elif operation.id not in self._timers:
            self._set(operation.id, self._seconds)

    def _set(self, operation_id: str, seconds: float) -> None:
        self._timers[operation_id] = asyncio.get_running_loop().call_later(
            seconds, self._due.put_nowait, operation_id
        )

    async def run(self) -> None:
        """End what is due, one after the other, for ever."""
        while True:
            operation_id = await self._due.get()
            operation = self._replica.view.operations.get(operation_id)
            if operation is None or operation.state is not OperationState.QUEUED:
                self._timers.pop(operation_id, None)
                continue
            try:
                await self._end(operation)
            except BusError as error:
                if error.reason in ("WRONG_OPERATION_STATE", "OPERATION_NOT_FOUND"):
                    self._timers.pop(operation_id, None)  # its turn came, or it was cancelled
                    continue
                log.warning("%s %s is not ended: %s", operation.kind, operation_id, error.message)
                self._set(operation_id, RETRY_S)

    async def _end(self, operation: Operation) -> None:
        problem = problem_of(waited_too_long(Draft(self._replica.view), operation, self._seconds))
        log.info("%s %s: %s", operation.kind, operation.id, problem.message)
        request = registry_pb2.EndRequest(
            operation_id=operation.id,
            epoch=self.epoch,
            outcome=codec.operation_state_to_proto(OperationState.FAILED),
            only_queued=True,
        )
        request.error.CopyFrom(codec.problem_to_proto(problem))
        hit("lifecycle.end.before")
        await self._registry.end(
            request,
            timeout=REGISTRY_TIMEOUT_S,
            context=CallContext(request_id=uuid.uuid4().bytes),
        )
        hit("lifecycle.end.after")
