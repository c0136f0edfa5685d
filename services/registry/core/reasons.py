"""Reasons of the registry that the pure model does not have.

Owns the service's reason table. Must not know exception classes of any client.
Invariant: every BusError that the registry raises carries a row of this table or of
bulkhead.model.refusal.
"""

from __future__ import annotations

from collections.abc import Mapping

from bulkhead.model.refusal import Reason, table

_ROWS: tuple[Reason, ...] = (
    Reason("STORE_FULL", "RESOURCE_EXHAUSTED", "no space for the journal; nothing was changed"),
    Reason("STORE_FAILED", "INTERNAL", "the change could not be made durable; nothing was changed"),
    Reason("STORE_BROKEN", "UNAVAILABLE", "the journal failed; the outcome is unknown"),
    Reason("REGISTRY_BUSY", "RESOURCE_EXHAUSTED", "too many mutations wait"),
    Reason("SNAPSHOT_GONE", "NOT_FOUND", "the snapshot handle expired or was never given"),
    Reason("NO_FOREIGN_EDIT", "FAILED_PRECONDITION", "qubes.xml is the registry's own"),
    Reason("FOREIGN_EDIT_UNREADABLE", "FAILED_PRECONDITION", "the edited qubes.xml does not load"),
    Reason("FOREIGN_EDIT_BLOCKED", "FAILED_PRECONDITION", "the edit touches qubes that are in use"),
    Reason("HIDDEN_REFUSED", "PERMISSION_DENIED", "the caller may not see hidden records"),
)

REASONS: Mapping[str, Reason] = table(_ROWS)
