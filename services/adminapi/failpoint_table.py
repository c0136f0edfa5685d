"""The Admin API's failpoints: one row on each side of every durable step.

Owns the names. Must not know how they are armed. Invariant: a hit() in this service
names a row here.
"""

from __future__ import annotations

from bulkhead import failpoints

ROWS: dict[str, str] = {
    "adminapi.audit.before_append": "audit records are taken, none is written",
    "adminapi.audit.before_sync": "audit records are written, not yet durable",
    "adminapi.audit.after_append": "audit records are durable",
    "adminapi.audit.before_rotate": "the audit file is full, its successor does not exist",
    "adminapi.audit.after_rotate": "the next audit file exists, empty",
}

failpoints.register("adminapi", ROWS)
