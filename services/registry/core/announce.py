"""Who may announce which events.

Owns the one table of event names per service for events that no record change makes.
Must not know messages. Invariant: what the planner makes out of a record change can
be announced by nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bulkhead.model.records import WireEvent
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View

# Names; a trailing "*" stands for any rest.
ALLOWED: dict[str, tuple[str, ...]] = {
    "lifecycle": (
        "domain-pre-start",
        "domain-verify-files",
        "domain-pre-spawn",
        "domain-spawn",
        "domain-qdb-create",
        "domain-pre-unpaused",
        "domain-unpaused",
        "domain-pre-paused",
        "domain-paused",
        "domain-resumed",
        "domain-start",
        "domain-start-failed",
        "domain-pre-shutdown",
        "domain-shutdown-failed",
        "domain-stopped",
        "domain-shutdown",
        "domain-create-on-disk",
        "domain-remove-from-disk",
        "domain-clone-files",
        "domain-import-volume",
        "domain-volume-import-begin",
        "domain-volume-import-end",
        "domain-cmd-pre-run",
        "property-reset:xid",
        "property-reset:stubdom_xid",
        "property-reset:stubdom_uuid",
        "property-reset:start_time",
        "property-reset:visible_ip",
        "property-reset:visible_ip6",
        "property-reset:visible_gateway",
        "property-reset:visible_gateway6",
        "net-domain-connect",
        "device-pre-attach:*",
        "device-attach:*",
        "device-pre-detach:*",
        "device-detach:*",
        "pool-add",
        "pool-pre-delete",
        "pool-delete",
    ),
    "domains": (
        "domain-qdb-change:*",
        "domain-pre-paused",
        "domain-paused",
        "domain-pre-unpaused",
        "domain-unpaused",
        "domain-resumed",
        "device-list-change:*",
        "device-added:*",
        "device-removed:*",
        "device-attach:*",
        "device-detach:*",
    ),
    "storage": ("domain-volume-import-begin", "domain-volume-import-end"),
    "firewall": ("firewall-changed",),
    "dispvm": ("domain-preload-dispvm-start", "domain-preload-dispvm-used"),
    "adminapi": (
        "property-pre-set:*",
        "property-pre-reset:*",
        "property-pre-del:*",
        "domain-feature-pre-set:*",
        "domain-pre-start",
        "domain-start-failed",
        "domain-pre-shutdown",
        "domain-shutdown-failed",
        "domain-pre-paused",
        "domain-pre-unpaused",
        "domain-pre-delete",
        "domain-cmd-pre-run",
        "device-pre-attach:*",
        "device-pre-detach:*",
        "device-pre-assign:*",
        "pool-pre-delete",
        "features-request",
        "template-postinstall",
        "backup-get-files",
        "backup-progress",
    ),
}
# Events whose subject is always the qube that the announcement is about.
RULES_CHANGED = "firewall-changed"
OF_THE_QUBE = frozenset({RULES_CHANGED})
# Only the owner of the rules may store their digest.
DIGEST_OWNER = "firewall"


def may_announce(caller: str, name: str) -> bool:
    """True when the table has the name for that service."""
    return any(
        name.startswith(row[:-1]) and len(name) > len(row) - 1 if row.endswith("*") else name == row
        for row in ALLOWED.get(caller, ())
    )


def check_events(caller: str, events: Iterable[WireEvent]) -> None:
    """Refusal NOT_YOURS at the first event that is not the caller's to announce."""
    for event in events:
        if not may_announce(caller, event.name):
            raise Refusal(
                "NOT_YOURS",
                f"{caller} may not announce {event.name}; its table has no such event",
                caller=caller,
                event=event.name,
            )


def plan_announce(
    view: View, caller: str, uuid: str, boot_id: str, events: tuple[WireEvent, ...]
) -> tuple[WireEvent, ...]:
    """The events to sequence. uuid "" = system-wide.

    Empty when they are about an older boot of the qube, or when the qube is hidden.
    Refusal NOT_YOURS, QUBE_NOT_FOUND, or PROTOCOL when an event's subject is another
    qube. An event of OF_THE_QUBE gets the qube's name here: its announcer knows uuids.
    """
    check_events(caller, events)
    if not uuid:
        if any(event.subject for event in events):
            raise Refusal("PROTOCOL", "an event with a subject needs the uuid of its qube")
        return events
    qube = view.by_uuid_any(uuid)
    if qube is None:
        raise Refusal("QUBE_NOT_FOUND", f"No qube with uuid {uuid}", uuid=uuid)
    for event in events:
        if event.subject not in ("", qube.name) or event.subject_uuid not in ("", uuid):
            raise Refusal(
                "PROTOCOL",
                f"event {event.name} is about {event.subject}, the announcement about {qube.name}",
                event=event.name,
                subject=event.subject,
            )
    if qube.hidden or (boot_id and boot_id != qube.run.boot_id):
        return ()
    return tuple(
        replace(event, subject=qube.name, subject_uuid=uuid) if event.name in OF_THE_QUBE else event
        for event in events
    )
