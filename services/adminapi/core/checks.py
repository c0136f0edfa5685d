"""From a split frame to a call that may be answered: who, where, which, in what shape.

Owns the order of the checks that every call passes. Must not know what a call does.
Invariant: what leaves here is ASCII, names an existing source and destination, and
satisfies the row of the call table; only the payload is still untrusted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bulkhead.model.grammar import check_qube_name
from bulkhead.model.records import ADMINVM_NAME, Qube
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View
from services.adminapi.core import calls
from services.adminapi.core.calls import Call
from services.adminapi.core.exceptions import WireRefusal
from services.adminapi.core.frame import Drop, Request

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_UUID_PREFIX = "uuid:"


@dataclass(frozen=True, slots=True)
class Checked:
    """A call with its row, source and destination; untrusted_payload as it came.

    confined: it came through a socket of its source's own and policy has allowed it.
    """

    call: Call
    source: Qube
    dest: Qube
    arg: str
    untrusted_payload: bytes = b""
    confined: bool = False

    @property
    def restricted(self) -> bool:
        """The source is not dom0: it may see only what policy lets it see."""
        return self.source.name != ADMINVM_NAME


def designate(view: View, untrusted_name: bytes) -> Qube:
    """The qube that a source or destination field names.

    Raises Drop for non-ASCII bytes, else Refusal INVALID_UUID, INVALID_NAME or
    QUBE_NOT_FOUND.
    """
    try:
        untrusted_text = untrusted_name.decode("ascii")
    except UnicodeDecodeError as error:
        raise Drop("a qube's name is not ASCII") from error
    qube = view.qube(untrusted_text)
    if qube is not None:
        return qube
    if untrusted_text.startswith(_UUID_PREFIX):
        uuid = untrusted_text[len(_UUID_PREFIX) :]
        if not _UUID.fullmatch(uuid):
            raise Refusal("INVALID_UUID", "that is not the uuid of a qube")
        found = view.by_uuid(uuid)
        if found is None:
            raise Refusal("QUBE_NOT_FOUND", f"no qube has the uuid {uuid}", uuid=uuid)
        return found
    check_qube_name(untrusted_text)
    raise Refusal("QUBE_NOT_FOUND", f"no qube is called {untrusted_text}", qube=untrusted_text)


def check(view: View, socket: str, request: Request) -> Checked:
    """All checks that come before a call's own, in the order of release 4.4.

    Source, destination, decoding of argument and method, the method itself, payload
    rule, argument rule, destination rule. Raises Drop, Refusal or WireRefusal.
    """
    source = designate(view, request.untrusted_source)
    dest = designate(view, request.untrusted_dest)
    try:
        arg = request.untrusted_arg.decode("ascii")
        method = request.untrusted_method.decode("ascii")
    except UnicodeDecodeError as error:
        raise Drop("the method or its argument is not ASCII") from error
    call = calls.find(socket, method)
    if call is None:
        raise WireRefusal("UNKNOWN_CALL", f"this socket has no method {method}", method=method)
    _presence(call, "payload", call.payload, bool(request.untrusted_payload))
    _presence(call, "argument", call.arg, bool(arg))
    if call.dest == "0" and dest.klass != "AdminVM":
        raise Refusal("PROTOCOL", f"{method} is called on {ADMINVM_NAME} only", method=method)
    if call.dest == "V" and dest.klass == "AdminVM":
        raise Refusal("PROTOCOL", f"{method} is not called on {ADMINVM_NAME}", method=method)
    return Checked(call, source, dest, arg, request.untrusted_payload)


def _presence(call: Call, what: str, rule: str, present: bool) -> None:
    if rule == "-" and present:
        raise Refusal("PROTOCOL", f"{call.name} takes no {what}", method=call.name)
    if rule == "!" and not present:
        raise Refusal("PROTOCOL", f"{call.name} needs the {what}", method=call.name)
