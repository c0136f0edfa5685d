"""Whether the facts that an operation's steps read have been reported.

Owns which kinds read whose facts. Must not know what the steps make of them. Invariant:
that a fact is missing is never taken for an answer before its owner has reported: a
registry that has just started knows none, and a step that believed it would find no
kernel, start a network qube as a guest, or leave a tap behind.
"""

from __future__ import annotations

from bulkhead.model.view import View

# The hypervisor's kind, power and devices.
READ_HOST = frozenset(
    {"START", "STOPPED", "APPLY", "ATTACH", "DETACH", "PAUSE", "UNPAUSE", "SUSPEND", "RESUME"}
)
# Kernels.
READ_POOLS = frozenset({"START"})


def missing(view: View, kind: str) -> str:
    """The service whose report an operation of that kind has to wait for, "" = none."""
    if kind in READ_HOST and view.host is None:
        return "domains"
    return "storage" if kind in READ_POOLS and not view.storage_reported else ""
