"""Which present devices an assignment means.

Owns matching, and which of several assignments has the better claim to a device. Must not
know whether a device may be attached (bulkhead.model.plan). Invariant: a device that is
not known for what it is never satisfies an assignment.
"""

from __future__ import annotations

from bulkhead.model.records import Assignment, DeviceFact, Qube
from bulkhead.model.view import View

ANY = "*"
PLUGGABLE = "block"  # the class of devices that a running qube can get and lose
UNKNOWN_INTERFACE = "?******"
UNKNOWN_DEVICE = f"0000:0000::{UNKNOWN_INTERFACE}"


def is_known(fact: DeviceFact) -> bool:
    """The backend told what the device is."""
    return fact.device_id != UNKNOWN_DEVICE


def matches(assignment: Assignment, fact: DeviceFact, backend: Qube) -> bool:
    """The assignment means this device of that backend."""
    return (
        fact.devclass == assignment.devclass
        and assignment.backend in (ANY, backend.name)
        and assignment.port in (ANY, fact.port)
        and assignment.identity in (ANY, fact.device_id)
    )


def matching(view: View, assignment: Assignment) -> list[tuple[DeviceFact, Qube]]:
    """Every present device that is meant, with its backend; sorted by backend and port."""
    if assignment.backend == ANY:
        backends = list(view.qubes())
    else:
        named = view.qube(assignment.backend)
        backends = [] if named is None else [named]
    found = [
        (fact, backend)
        for backend in backends
        for fact in view.devices_of(backend.uuid)
        if matches(assignment, fact, backend)
    ]
    return sorted(found, key=lambda pair: (pair[1].name, pair[0].port))


def specificity(assignment: Assignment) -> int:
    """Larger is the better claim: port and id, port, id, anything."""
    return 2 * (assignment.port != ANY) + (assignment.identity != ANY)
