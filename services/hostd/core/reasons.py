"""Why hostd refuses.

Owns the rows. Invariant: a reason is used only if it is a row here or in
bulkhead.model.refusal.
"""

from __future__ import annotations

from collections.abc import Mapping

from bulkhead.model.refusal import Reason, table

_ROWS: tuple[Reason, ...] = (
    Reason("NOT_ROOT", "FAILED_PRECONDITION", "hostd runs without root, so nothing is enforced"),
    Reason("NAMESPACE_MISSING", "FAILED_PRECONDITION", "the network namespace is not there"),
    Reason("TAP_MISSING", "FAILED_PRECONDITION", "the qube's tap is nowhere"),
    Reason("DEVICE_MISSING", "NOT_FOUND", "no such PCI device"),
    Reason("HOST_REFUSED", "INTERNAL", "a tool or the kernel refused; metadata says what"),
)

REASONS: Mapping[str, Reason] = table(_ROWS)
