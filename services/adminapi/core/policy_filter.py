"""What a caller whose socket is subject to policy may ask, and what it is told.

Owns the gate before a call and the filters behind it. Must not know how rules are
written. Invariants: nothing about any qube is looked at for such a caller before policy
has allowed the call; a refusal says nothing at all; a qube that the caller may not list
cannot be told from one that does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from bulkhead.model.grammar import ANY, parse_device_argument
from bulkhead.model.policy import Decision
from bulkhead.model.properties import find_row
from bulkhead.model.records import ADMINVM_NAME, Operation, Qube, WireEvent
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View
from services.adminapi.core.checks import Checked, check
from services.adminapi.core.exceptions import message_for
from services.adminapi.core.frame import Drop, Request
from services.adminapi.core.permission import (
    ADMINVM_TOKEN,
    Policy,
    event_target,
    may_list,
    may_see_event,
)

STATS_SERVICE = "admin.vm.Stats"
_SERVICE = re.compile(r"[A-Za-z0-9._-]+")
# Keys whose value is another qube that refers to the event's subject, not the other way.
_OTHER_QUBE = frozenset({"vm", "dispvm", "src"})
# Keys whose value is a sentence that may name any qube.
_SENTENCES = frozenset({"reason"})
_DEVICE_CALLS = frozenset(
    {"device_assign", "device_unassign", "device_set_assignment", "device_attach", "device_detach"}
)
# Those that give the caller's qube a device, which it need not have had.
_DEVICE_GIVEN = frozenset({"device_assign", "device_attach"})
# Positions count everybody's events, and a past event may be of an earlier qube.
_COUNTING = frozenset({"events_resumable"})
_CREATES = frozenset({"create", "create_in_pool", "clone"})
# Reasons that say that a qube of that name is there, or was a moment ago.
_TAKEN = frozenset({"QUBE_EXISTS", "NAME_IN_REMOVAL"})


class Judge(Policy, Protocol):
    """Policy that also says where an allowed call goes."""

    def decide(self, service: str, argument: str, source: str, target: str) -> Decision: ...


# ---- before the call


def gate(view: View, judge: Judge, caller: Qube, request: Request) -> Checked:
    """The call of a confined caller, allowed by policy and formally right.

    The source that the frame states is ignored. Raises Drop for whatever policy does not
    allow to go to dom0 with a qube as its requested target; after that Refusal or
    WireRefusal as check() does, and QUBE_NOT_FOUND where argument or payload name a qube
    that the caller may not list and no rule names.
    """
    try:
        method = request.untrusted_method.decode("ascii")
        arg = request.untrusted_arg.decode("ascii")
        target = request.untrusted_dest.decode("ascii")
    except UnicodeDecodeError as error:
        raise Drop("the call is not ASCII") from error
    if not _SERVICE.fullmatch(method):
        raise Drop("the method's name has forbidden characters")
    decision = judge.decide(method, "+" + arg, caller.name, target)
    if not decision.allowed or decision.target != ADMINVM_NAME:
        raise Drop(f"policy refuses {method} of {caller.name}: {decision.why}")
    requested = ADMINVM_NAME if decision.requested == ADMINVM_TOKEN else decision.requested
    if requested.startswith("@"):
        raise Drop(f"{method} of {caller.name} has no qube as its target")
    stated = replace(
        request,
        untrusted_source=caller.name.encode(),
        untrusted_dest=requested.encode(),
    )
    checked = replace(check(view, "admin", stated), confined=True)
    if checked.call.handler in _COUNTING:
        raise Drop(f"{method} is not served to callers that see a part only")
    # A rule for this very argument is a grant of what the argument names.
    named = decision.rule is not None and decision.rule.argument != "*"
    for name in references(checked, argument=not named):
        if not _visible(view, judge, caller, name):
            raise Refusal("QUBE_NOT_FOUND", f"{caller.name} may not list such a qube")
    return checked


def _visible(view: View, policy: Policy, caller: Qube, name: str) -> bool:
    qube = view.qube(name)
    return qube is not None and may_list(policy, caller, qube)


def references(request: Checked, *, argument: bool = True) -> tuple[str, ...]:
    """Names of other qubes that the payload and, if asked for, the argument refer to."""
    handler = request.call.handler
    text = request.untrusted_payload.decode("ascii", "replace")
    if handler in ("property_set", "system_property_set"):
        klass = request.dest.klass if handler == "property_set" else None
        return (text,) if text and find_row(klass, request.arg).wire_type == "vm" else ()
    if not argument:
        return ()
    if handler in ("create", "create_in_pool"):
        return (request.arg,) if request.arg else ()
    if handler in _DEVICE_CALLS:
        backend = parse_device_argument(request.arg).backend
        # Any backend would be those too that the caller may not list: "*" is no qube's name.
        return () if backend == ANY and handler not in _DEVICE_GIVEN else (backend,)
    return ()


# ---- after the call


def confined_reason(view: View, policy: Policy, request: Checked, reason: str) -> str:
    """The reason that a confined caller is given: not that a hidden qube has a name."""
    if not request.confined or reason not in _TAKEN or request.call.handler not in _CREATES:
        return reason
    words = request.untrusted_payload.decode("ascii", "replace").split(" ")
    name = next((w[5:] for w in words if w.startswith("name=")), "")
    return reason if _visible(view, policy, request.source, name) else "CALL_DENIED"


def shown_operation(
    view: View, policy: Policy, request: Checked, operation: Operation, record: dict[str, object]
) -> dict[str, object]:
    """An operation's record without what a restricted source may not see."""
    if not request.restricted:
        return record
    names = []
    for uuid in operation.subjects:
        qube = view.by_uuid(uuid)
        if qube is not None and may_list(policy, request.source, qube):
            names.append(qube.name)
    shown = {**record, "qubes": names, "text": "", "waits_for": ""}
    if operation.error is not None:
        shown["error"] = message_for(operation.error.reason, "", restricted=True)
    if operation.subjects and not names:
        shown["result"] = {}
    return shown


def may_have_stats(policy: Policy, request: Checked, qube: Qube) -> bool:
    """Whether a reader of statistics gets those of a qube."""
    if not request.confined:
        return True
    return policy.allows(STATS_SERVICE, "+", request.source.name, qube.name)


def confined_event(
    policy: Policy, view: View, source: str, event: WireEvent, gone: Mapping[str, Qube]
) -> WireEvent | None:
    """The event as a confined subscriber gets it, None = not at all.

    Judged by its subject and by every other qube that it is about. Sentences are
    replaced, as they may name anything.
    """
    subject = event_target(view, event)
    others = {v for k, v in event.pairs if k in _OTHER_QUBE}
    for name in {subject, *others}:
        if name != ADMINVM_TOKEN and view.qube(name) is None and name not in gone:
            return None
    now = view.qube(subject) or gone.get(subject)
    if now is not None and event.subject_uuid not in ("", now.uuid):
        return None  # of an earlier qube of that name
    if not may_see_event(policy, view, source, event):
        return None
    for name in others - {subject}:
        about = WireEvent(name, event.name, event.pairs)
        if not may_see_event(policy, view, source, about):
            return None
    if not any(key in _SENTENCES for key, _ in event.pairs):
        return event
    pairs = tuple((k, "not shown" if k in _SENTENCES else v) for k, v in event.pairs)
    return replace(event, pairs=pairs)
