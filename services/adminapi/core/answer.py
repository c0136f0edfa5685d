"""From a frame to an answer, or to what has to be asked of others first.

Owns the order parse, check, read. Must not know the bus or sockets. Invariant: a
well-formed frame always ends in bytes that a client understands, never in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bulkhead.model.records import ADMINVM_NAME, Qube
from bulkhead.model.refusal import Refusal
from services.adminapi.core.checks import Checked, check
from services.adminapi.core.exceptions import WireRefusal, class_of, message_for
from services.adminapi.core.frame import Request, format_exception, format_ok, parse_request
from services.adminapi.core.policy_filter import Judge, gate
from services.adminapi.core.reads import READS, ReadContext


def refuse(reason: str, message: str, *, method: str = "", restricted: bool = False) -> bytes:
    """The exception reply for a reason."""
    text = message_for(reason, message, restricted=restricted)
    return format_exception(class_of(reason, method), text)


def begin(context: ReadContext, socket: str, untrusted_frame: bytes) -> bytes | Checked:
    """The finished reply of a read or of a refusal, or the checked call to carry out.

    Raises Drop where the connection is to be closed without a byte.
    """
    return _answer(
        context, parse_request(untrusted_frame), lambda r: check(context.view, socket, r)
    )


def begin_confined(
    context: ReadContext, judge: Judge, caller: Qube, untrusted_frame: bytes
) -> bytes | Checked:
    """As begin(), for a socket that belongs to one caller; Drop for what policy refuses."""
    request = replace(parse_request(untrusted_frame), untrusted_source=caller.name.encode())
    return _answer(context, request, lambda r: gate(context.view, judge, caller, r))


def _answer(
    context: ReadContext, request: Request, checks: Callable[[Request], Checked]
) -> bytes | Checked:
    method = ""
    try:
        checked = checks(request)
        method = checked.call.name
        read = READS.get(checked.call.handler)
        return format_ok(read(context, checked)) if read is not None else checked
    except (Refusal, WireRefusal) as error:
        restricted = request.untrusted_source != ADMINVM_NAME.encode()
        return refuse(error.reason, error.message, method=method, restricted=restricted)
