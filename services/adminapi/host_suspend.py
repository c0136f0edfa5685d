"""The host goes to sleep and wakes up: what becomes of its qubes.

Owns the order of both. Must not know how a qube is suspended, nor how disposables are
preloaded. Invariants: what somebody had paused before stays paused, also when the way
down was cut off and is begun again; a guest that does not answer stops nothing; every
qube is tried, and what failed is told at the end.
"""

from __future__ import annotations

import asyncio
import logging

from google.protobuf.message import Message

from bulkhead.api import dispvm_pb2, domains_pb2
from bulkhead.bus.errors import BusError
from bulkhead.model import specs
from bulkhead.model.evaluate import power_state, truthy
from bulkhead.model.records import Qube
from bulkhead.model.refusal import Refusal
from services.adminapi.adapters.paused_list import PausedList
from services.adminapi.backend import Backend, OperationFailed
from services.adminapi.core.exceptions import WireRefusal

log = logging.getLogger("bulkhead.adminapi")

BEFORE_SERVICE = "qubes.SuspendPreAll"
AFTER_SERVICE = "qubes.SuspendPostAll"
# How long a guest may take for its service.
SERVICE_S = 60
# How long the bus waits beyond that.
GRACE_S = 5.0
PRELOADS_S = 20.0
_ASLEEP = ("Paused", "Suspended")
_AWAKE = ("Running", "Transient")


class HostSuspend:
    """What internal.SuspendPre and internal.SuspendPost do."""

    def __init__(self, backend: Backend, paused: PausedList) -> None:
        self._backend = backend
        self._paused = paused

    async def before(self, source: str) -> None:
        """Everything that runs sleeps. WireRefusal SUSPEND_FAILED names what does not."""
        await self._preloads(
            "Dispvm.SuspendPreloads",
            dispvm_pb2.SuspendPreloadsRequest(),
            dispvm_pb2.SuspendPreloadsReply,
            source,
        )
        earlier = await asyncio.to_thread(self._paused.load)
        asleep = self._in(_ASLEEP)
        # A list that is still there is that of a way down that nobody came back from:
        # what is asleep and not on it sleeps because of us.
        before = asleep if earlier is None else [name for name in asleep if name in earlier]
        await asyncio.to_thread(self._paused.save, before)
        await self._tell_guests(BEFORE_SERVICE)
        failed = await self._each(specs.SuspendSpec, self._in(_AWAKE), source)
        if failed:
            raise WireRefusal("SUSPEND_FAILED", f"could not be suspended: {', '.join(failed)}")

    async def after(self, source: str) -> None:
        """Everything wakes up that before() put to sleep. WireRefusal SUSPEND_FAILED."""
        kept = await asyncio.to_thread(self._paused.load) or set()
        asleep = [name for name in self._in(_ASLEEP) if name not in kept]
        failed = await self._each(specs.ResumeSpec, asleep, source)
        await self._tell_guests(AFTER_SERVICE)
        await self._preloads(
            "Dispvm.ResumePreloads",
            dispvm_pb2.ResumePreloadsRequest(),
            dispvm_pb2.ResumePreloadsReply,
            source,
        )
        if failed:
            raise WireRefusal("SUSPEND_FAILED", f"could not be resumed: {', '.join(failed)}")
        await asyncio.to_thread(self._paused.forget)

    def _in(self, states: tuple[str, ...]) -> list[str]:
        """Names of the qubes here that are in one of these states."""
        view = self._backend.view
        return [
            qube.name
            for qube in view.qubes()
            if qube.klass not in ("AdminVM", "RemoteVM") and power_state(view, qube) in states
        ]

    async def _preloads(
        self, method: str, request: Message, reply_type: type[Message], source: str
    ) -> None:
        """Preloaded disposables are a convenience: without them the host sleeps all the same."""
        try:
            await self._backend.call(method, request, reply_type, source=source, timeout=PRELOADS_S)
        except (BusError, WireRefusal) as error:
            log.warning("%s: %s", method, error.message)

    async def _tell_guests(self, service: str) -> None:
        view = self._backend.view
        running = [view.qube(name) for name in self._in(("Running",))]
        await asyncio.gather(
            *(
                self._tell(qube, service)
                for qube in running
                if qube is not None and truthy(view, qube, "qrexec", "template")
            )
        )

    async def _tell(self, qube: Qube, service: str) -> None:
        try:
            reply = await self._backend.call(
                "Domains.RunService",
                domains_pb2.RunServiceRequest(
                    boot=domains_pb2.BootRef(uuid=qube.uuid, boot_id=qube.run.boot_id),
                    service=service,
                    user="root",
                    timeout_s=SERVICE_S,
                ),
                domains_pb2.RunServiceReply,
                timeout=SERVICE_S + GRACE_S,
            )
        except (BusError, WireRefusal) as error:
            log.warning("%s in %s: %s", service, qube.name, error.message)
            return
        if reply.exit_code:
            log.warning("%s in %s ended with %d", service, qube.name, reply.exit_code)

    async def _each(
        self,
        kind: type[specs.SuspendSpec] | type[specs.ResumeSpec],
        names: list[str],
        source: str,
    ) -> list[str]:
        """The names of those for which it failed."""
        results = await asyncio.gather(
            *(self._backend.operate(kind(name), source) for name in names), return_exceptions=True
        )
        failed = []
        for name, result in zip(names, results, strict=True):
            if isinstance(result, OperationFailed | Refusal | WireRefusal | BusError):
                log.warning("%s: %s", name, result.message)
                failed.append(name)
            elif isinstance(result, BaseException):
                raise result
        return failed
