"""Reasons of refusals that the Admin API gives by itself.

Owns the rows that no other service has. Must not know exception classes (see
exceptions.py). Invariant: a reason is in one table of the whole system only.
"""

from __future__ import annotations

from collections.abc import Mapping

from bulkhead.model.refusal import Reason, table

_ROWS = (
    Reason("UNKNOWN_CALL", "UNIMPLEMENTED", "no such method on this socket"),
    Reason("METHOD_NOT_SERVED", "UNIMPLEMENTED", "the method is known and nothing answers it"),
    Reason("NAME_NOT_KNOWN", "PERMISSION_DENIED", "a volume, pool or driver argument is unknown"),
    Reason("CALL_DENIED", "PERMISSION_DENIED", "the argument or the caller is not permitted"),
    Reason("BACKUP_PROFILE_NOT_FOUND", "NOT_FOUND", "no such backup profile"),
    Reason("BACKUP_NOT_RUNNING", "FAILED_PRECONDITION", "no backup of that profile runs"),
    Reason("COPY_TOKEN_NOT_FOUND", "NOT_FOUND", "the clone token is unknown or was used"),
    Reason("IMPORT_NOT_RUNNING", "FAILED_PRECONDITION", "no import of that volume is open"),
    Reason("POOL_OPTION_MISSING", "INVALID_ARGUMENT", "the driver needs another option"),
    Reason("CREATE_REFUSED", "INVALID_ARGUMENT", "the class cannot be created"),
    Reason("SUSPEND_FAILED", "FAILED_PRECONDITION", "some qubes did not suspend or resume"),
    Reason("NOTHING_CHANGED", "UNAVAILABLE", "a part is down; the call had no effect"),
    Reason("OUTCOME_UNKNOWN", "UNKNOWN", "a part went down while the call was under way"),
    Reason("OPERATION_STUCK", "UNKNOWN", "it can neither go on nor back; it is tried again"),
    Reason("READER_TOO_SLOW", "RESOURCE_EXHAUSTED", "a stream's reader fell too far behind"),
    Reason("TOO_MANY_STREAMS", "RESOURCE_EXHAUSTED", "no further stream can be served"),
    Reason("TOO_MANY_CONNECTIONS", "RESOURCE_EXHAUSTED", "no further connection can be served"),
    Reason("NOT_READY", "UNAVAILABLE", "the records are still being loaded"),
    Reason("STREAM_LOST", "UNAVAILABLE", "events were lost; read everything anew"),
    Reason("VETOED", "FAILED_PRECONDITION", "an extension refuses the call or is silent"),
    Reason("UNEXPECTED", "INTERNAL", "an error of this system's own; the log says more"),
)

REASONS: Mapping[str, Reason] = table(_ROWS)
