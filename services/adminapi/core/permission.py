"""Who may see what beyond the call itself: the two filters of the Admin API.

Owns the interface to policy and its default. Must not know where policy is stored or
how it is written. Invariant: dom0 sees everything; any other source sees a qube or an
event only where policy *allows* it, and an error in the policy shows nothing.
"""

from __future__ import annotations

from typing import Protocol

from bulkhead.model.records import ADMINVM_NAME, Qube, WireEvent
from bulkhead.model.view import View

LIST_SERVICE = "admin.vm.List"
EVENTS_SERVICE = "admin.Events"
ADMINVM_TOKEN = "@adminvm"


class Policy(Protocol):
    """Answers whether policy allows (not: asks about) a service call.

    argument starts with "+". source and target are qube names; target may also be
    "@adminvm".
    """

    def allows(self, service: str, argument: str, source: str, target: str) -> bool: ...


class DenyAll:
    """No rules: dom0 may do everything, any other qube nothing."""

    def allows(self, service: str, argument: str, source: str, target: str) -> bool:
        """True for dom0."""
        del service, argument, target  # no rule tells them apart
        return source == ADMINVM_NAME


def may_list(policy: Policy, source: Qube, target: Qube) -> bool:
    """Whether `source` finds `target` in the reply of a listing call."""
    if source.name == ADMINVM_NAME:
        return True
    name = ADMINVM_TOKEN if target.name == ADMINVM_NAME else target.name
    return policy.allows(LIST_SERVICE, "+", source.name, name)


def event_target(view: View, event: WireEvent) -> str:
    """The qube that policy judges an event by: its subject, the one in "vm", or dom0.

    A qube that is gone is judged by the name that the event itself carries.
    """
    name = event.subject or next((v for k, v in event.pairs if k == "vm"), "")
    if not name and event.subject_uuid:
        known = view.by_uuid(event.subject_uuid)
        name = known.name if known is not None else ""
    return ADMINVM_TOKEN if name in ("", ADMINVM_NAME) else name


def may_see_event(policy: Policy, view: View, source: str, event: WireEvent) -> bool:
    """Whether a subscriber gets an event; connection-established is not asked about."""
    if source == ADMINVM_NAME:
        return True
    argument = "+" + event.name.replace(":", "_")
    return policy.allows(EVENTS_SERVICE, argument, source, event_target(view, event))
