"""Asks extensions before something is done.

Owns which pre-events of a plan are asked about, of whom, and for how long. Must not know
what a change does. Invariant: a declared veto that matches is asked each time, and only
an answer that allows lets the call go on: silence, an error or a malformed answer
refuse it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence

from bulkhead.api import extension_pb2, records_pb2
from bulkhead.bus.client import Channel
from bulkhead.bus.errors import BusError
from bulkhead.extensions import Extension
from bulkhead.model import specs
from bulkhead.model.plan import plan_begin, plan_mutation
from bulkhead.model.records import OperationState, Phase, Qube, WireEvent
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View
from services.adminapi.core.exceptions import WireRefusal

log = logging.getLogger("bulkhead.adminapi")

ASK_S = 2.0
REASON_LIMIT = 300
# What an operation announces that the registry may begin although it is queued here, or is
# refused or has nothing to do by what is known here: the registry may know more.
_LATER = {
    "START": "domain-pre-start",
    "SHUTDOWN": "domain-pre-shutdown",
    "REMOVE": "domain-pre-delete",
    "PAUSE": "domain-pre-paused",
    "UNPAUSE": "domain-pre-unpaused",
    "RESUME": "domain-pre-unpaused",
}


def planned(
    view: View, wanted: specs.Command | specs.OperationSpec, source: str
) -> list[WireEvent] | None:
    """The pre-events of what is wanted; of an operation also those that it makes if it
    begins after all. None where planning refuses a change: so will the registry, as long
    as nothing changes meanwhile."""
    try:
        if isinstance(wanted, specs.Command):
            events = plan_mutation(view, wanted, source, now=time.time()).events
        else:
            plan = plan_begin(
                view,
                wanted,
                operation_id=str(uuid.uuid4()),
                source=source,
                now=time.time(),
                boot_id=str(uuid.uuid4()),
                new_uuid=str(uuid.uuid4()),
                random=lambda limit: limit - 1,
            )
            events = plan.events
            if plan.operation.state is OperationState.QUEUED or _is_stopping(view, wanted):
                events += _later(view, wanted)
    except Refusal:
        if isinstance(wanted, specs.Command):
            return None
        events = _later(view, wanted)
    return [event for event in events if "-pre-" in event.name]


def _qube(view: View, wanted: specs.OperationSpec) -> Qube | None:
    return view.qube(str(getattr(wanted, "qube", "")))


def _is_stopping(view: View, wanted: specs.OperationSpec) -> bool:
    """A start finds nothing to do while a qube stops, and its stop may be over by now."""
    qube = _qube(view, wanted) if isinstance(wanted, specs.StartSpec) else None
    return qube is not None and qube.run.phase is Phase.STOPPING


def _later(view: View, wanted: specs.OperationSpec) -> tuple[WireEvent, ...]:
    qube, name = _qube(view, wanted), _LATER.get(specs.kind_of(wanted))
    return (WireEvent(qube.name, name, (), qube.uuid),) if qube is not None and name else ()


class Vetoes:
    """The extensions that may refuse."""

    def __init__(self, extensions: Sequence[Extension], channel: Callable[[str], Channel]) -> None:
        self._extensions = tuple(e for e in extensions if e.vetoes)
        self._channel = channel

    async def ask(
        self, view: View, wanted: specs.Command | specs.OperationSpec, source: str
    ) -> bool:
        """Return when nobody refuses. WireRefusal VETOED.

        True: that holds only as long as nothing changes, because somebody was asked, or
        because planning refuses here what may be in order a moment later.
        """
        if not self._extensions:
            return False
        events = planned(view, wanted, source)
        questions = [
            self._ask(extension, _request(view, event, source))
            for event in events or ()
            for extension in self._extensions
            if extension.vetoes_event(event.name)
        ]
        for refusal in await asyncio.gather(*questions):
            if refusal is not None:
                raise refusal
        return events is None or bool(questions)

    async def _ask(
        self, extension: Extension, request: extension_pb2.AskRequest
    ) -> WireRefusal | None:
        try:
            async with asyncio.timeout(ASK_S):
                reply = await self._channel(extension.service).call(
                    "bulkhead.api.Extension.Ask",
                    request,
                    extension_pb2.AskReply,
                    timeout=ASK_S,
                )
        except (BusError, TimeoutError) as error:
            log.warning("extension %s did not answer: %s", extension.name, error)
            text = f"did not answer within {ASK_S:.0f} s, and its answer is needed"
            if isinstance(error, BusError) and error.code == "INTERNAL":
                text = f"failed, and its answer is needed; see ext-{extension.name}.log"
            return _refusal(extension, request, text)
        if reply.allow:
            return None
        printable = "".join(c if c.isprintable() else " " for c in reply.reason[:REASON_LIMIT])
        return _refusal(extension, request, f"refuses: {printable or 'it gave no reason'}")


def _request(view: View, event: WireEvent, source: str) -> extension_pb2.AskRequest:
    qube = view.by_uuid(event.subject_uuid) if event.subject_uuid else view.qube(event.subject)
    return extension_pb2.AskRequest(
        event=event.name,
        subject=event.subject,
        subject_uuid=qube.uuid if qube is not None else event.subject_uuid,
        pairs=[records_pb2.KeyValue(key=k, value=v) for k, v in event.pairs],
        source=source,
        tags=sorted(qube.tags) if qube is not None else [],
    )


def _refusal(extension: Extension, request: extension_pb2.AskRequest, text: str) -> WireRefusal:
    about = f" of {request.subject}" if request.subject else ""
    return WireRefusal(
        "VETOED", f"{request.event}{about}: extension {extension.name} {text}",
        extension=extension.name,
    )  # fmt: skip
