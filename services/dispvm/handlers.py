"""Bus messages of dispvm, and the clean-up after a boot of the host.

Owns the wait for a disposable to exist. Must not touch volumes or domains: lifecycle
does. Invariant: one request makes at most one disposable, however often it is repeated.
"""

from __future__ import annotations

import asyncio
import logging
import uuid

from bulkhead.api import dispvm_pb2
from bulkhead.bus.client import CallContext
from bulkhead.bus.errors import BusError
from bulkhead.bus.events import Entry, ReplicaRunner
from bulkhead.bus.server import Call
from bulkhead.failpoints import hit
from bulkhead.model.records import Qube
from bulkhead.model.specs import CreateSpec, RemoveSpec
from services.dispvm import failpoint_table  # noqa: F401 - declares what hit() names
from services.dispvm.adapters.boot_marker import BootMarker
from services.dispvm.core import preload
from services.dispvm.core.disposables import (
    disposable_template,
    refused_to_start,
    stale_after_boot,
)
from services.dispvm.operations import Operations
from services.dispvm.pool import Pool

log = logging.getLogger("bulkhead.dispvm")

START_PATIENCE_S = 10.0
REMOVAL_TIMEOUT_S = 120.0


class DispvmHandlers:
    """The methods of dispvm.proto."""

    def __init__(
        self, operations: Operations, pool: Pool, replica: ReplicaRunner, marker: BootMarker
    ) -> None:
        self.operations = operations
        self.pool = pool
        self.replica = replica
        self.marker = marker
        self.ready = False
        self.not_ready_reason = "the registry's state has not arrived yet"
        self._started = asyncio.Event()
        self._removals: set[asyncio.Task[None]] = set()

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
        fresh = self.marker.fresh()
        # At a boot of the host, preloading waits until it is asked for: qubes that start
        # by themselves come first.
        self.pool.start(refill=not fresh)
        self.ready, self.not_ready_reason = True, ""
        self._started.set()
        if not fresh:
            return
        for qube in list(stale_after_boot(self.replica.view)):
            log.info("removing disposable %s of a former boot", qube.name)
            await self._remove(qube, f"stale/{qube.uuid}/{self.marker.current}")
        self.marker.done()

    def _entry(self, entry: Entry) -> None:
        self.pool.follow(entry)
        self.operations.follow(entry)
        for qube in refused_to_start(self.replica.view, entry.events):
            task = asyncio.get_running_loop().create_task(
                self._remove(qube, f"refused/{qube.uuid}/{entry.seq}")
            )
            self._removals.add(task)
            task.add_done_callback(self._removals.discard)

    async def _remove(self, qube: Qube, key: str) -> None:
        """Remove an unnamed disposable that nothing else removes."""
        context = CallContext(
            request_id=uuid.uuid5(uuid.NAMESPACE_OID, key).bytes, on_behalf_of="dom0"
        )
        try:
            spec = RemoveSpec(qube.name, auto_cleanup=True)
            await self.operations.finish(spec, context, REMOVAL_TIMEOUT_S)
        except BusError as error:
            log.warning("disposable %s stays: %s", qube.name, error.message)

    async def _begun(self, call: Call) -> None:
        """The registry's state is here; who asks while it is not would be told of no qube."""
        try:
            await asyncio.wait_for(
                self._started.wait(), min(START_PATIENCE_S, call.deadline.remaining())
            )
        except TimeoutError:
            raise BusError("UNAVAILABLE", "STARTING", self.not_ready_reason) from None

    async def create_disposable(
        self, request: dispvm_pb2.CreateDisposableRequest, call: Call
    ) -> dispvm_pb2.CreateDisposableReply:
        """A disposable of the template: a preloaded one that runs, or a new one, not started."""
        await self._begun(call)
        template = disposable_template(self.replica.view, request.template)
        if not any(o.request_id == call.request_id for o in self.replica.view.operations.values()):
            qube = await self._preloaded(template, call)
            if qube is not None:
                call.revision, call.seq = self.replica.revision, self.replica.seq
                return dispvm_pb2.CreateDisposableReply(
                    name=qube.name,
                    uuid=qube.uuid,
                    from_preload=True,
                    revision=self.replica.revision,
                )
        spec = CreateSpec(
            klass="DispVM", template=template.name, template_given=True, disposable=True
        )
        hit("dispvm.create.before")
        ended = await self.operations.finish(
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

    async def _preloaded(self, template: Qube, call: Call) -> Qube | None:
        """A preloaded one for this request, the same for each repetition of it."""
        key = uuid.uuid5(uuid.NAMESPACE_OID, f"{call.source}/{call.request_id.hex()}").hex
        qube = preload.handed_out(self.replica.view, template, key)
        while qube is None:
            item = self.pool.take(template, key)
            if item is None:
                return None
            if await self.pool.deliver(item, call.source or "dom0", call.deadline.remaining()):
                qube = self.replica.view.by_uuid(item.uuid)
                if qube is None:
                    return None
            call.deadline.check()
        return qube

    async def request_preload(
        self,
        request: dispvm_pb2.RequestPreloadRequest,
        call: Call,
    ) -> dispvm_pb2.RequestPreloadReply:
        """Fill the template's list up to its maximum; answers when that is done."""
        await self._begun(call)
        template = disposable_template(self.replica.view, request.template)
        await self.pool.request(template, request.reason or "it was requested")
        return dispvm_pb2.RequestPreloadReply()

    async def suspend_preloads(
        self,
        request: dispvm_pb2.SuspendPreloadsRequest,  # noqa: ARG002 - it says nothing
        call: Call,
    ) -> dispvm_pb2.SuspendPreloadsReply:
        """Remove what waits and begin no more; answers when they are gone, or time is up."""
        await self._begun(call)
        await self.pool.suspend(call.deadline.remaining())
        call.revision, call.seq = self.replica.revision, self.replica.seq
        return dispvm_pb2.SuspendPreloadsReply()

    async def resume_preloads(
        self,
        request: dispvm_pb2.ResumePreloadsRequest,  # noqa: ARG002 - it says nothing
        call: Call,
    ) -> dispvm_pb2.ResumePreloadsReply:
        """Preload again."""
        await self._begun(call)
        self.pool.resume()
        return dispvm_pb2.ResumePreloadsReply()
