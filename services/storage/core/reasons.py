"""Why storage says no: one row per reason.

Owns the reason table of this service and the exception that carries a row. Must not
know the bus or what adminapi makes of a reason. Invariant: a StorageRefusal always
names a row, and whoever raised it left the volume as it was.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from bulkhead.model.refusal import Reason, TypedRefusal, table

_ROWS: tuple[Reason, ...] = (
    # name, code, when
    Reason("VOLUME_NOT_FOUND", "NOT_FOUND", "the volume has no data in its pool"),
    Reason("REVISION_NOT_FOUND", "NOT_FOUND", "the volume has no such revision, or none"),
    Reason("VOLUME_REFUSED", "FAILED_PRECONDITION", "the volume's kind or flags forbid it"),
    Reason("VOLUME_DIRTY", "FAILED_PRECONDITION", "runs, or was not cleanly stopped"),
    Reason("VOLUME_IMPORTING", "FAILED_PRECONDITION", "an import into it is under way"),
    Reason("VOLUME_NOT_IMPORTING", "FAILED_PRECONDITION", "no import was begun"),
    Reason("IMPORT_INCOMPLETE", "FAILED_PRECONDITION", "not every byte has arrived"),
    Reason("VOLUME_FOREIGN", "FAILED_PRECONDITION", "the files bear another qube's tag"),
    Reason("VOLUME_IN_USE", "FAILED_PRECONDITION", "another process holds the image open"),
    Reason("NOT_ORIGIN", "FAILED_PRECONDITION", "only a volume that saves on stop has data"),
    Reason("SOURCE_RUNNING", "FAILED_PRECONDITION", "its source runs with snapshots disabled"),
    Reason("EPHEMERAL_UNAVAILABLE", "FAILED_PRECONDITION", "dm-crypt is not available here"),
    Reason("INVALID_VOLUME", "INVALID_ARGUMENT", "a volume id or its flags break the rules"),
    Reason("INVALID_POOL", "INVALID_ARGUMENT", "an unknown driver, or a bad or missing option"),
    Reason("POOL_UNUSABLE", "FAILED_PRECONDITION", "the driver or its backend does not work"),
    Reason("POOL_BUSY", "RESOURCE_EXHAUSTED", "too many calls wait for the pool"),
    Reason("POOL_TIMEOUT", "DEADLINE_EXCEEDED", "the pool did not answer in time"),
    Reason("NO_SPACE", "RESOURCE_EXHAUSTED", "the pool is full"),
    Reason("STORAGE_FAILED", "INTERNAL", "the system refused a file operation"),
    Reason("COPY_CANCELLED", "CANCELLED", "the caller gave up; nothing was changed"),
    Reason("KERNEL_NOT_INSTALLED", "FAILED_PRECONDITION", "kernel or its vmlinuz is missing"),
    Reason("KERNEL_EXISTS", "ALREADY_EXISTS", "another kernel has that name"),
    Reason("INVALID_KERNEL", "INVALID_ARGUMENT", "a kernel's name or files break the rules"),
    Reason("TICKET_UNKNOWN", "NOT_FOUND", "no such ticket, used up or expired"),
    Reason("LIMIT_REACHED", "RESOURCE_EXHAUSTED", "too many transfers at once"),
    Reason("STALE_EPOCH", "ABORTED", "a newer lifecycle took over"),
    Reason("EPOCH_UNKNOWN", "UNAVAILABLE", "the registry has not told the epoch yet"),
)

REASONS: Mapping[str, Reason] = table(_ROWS)


class StorageRefusal(TypedRefusal):
    """Storage refuses; reason is a row of REASONS."""

    TABLE = REASONS


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_BROKEN = frozenset({errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO})


def from_os_error(error: OSError, what: str) -> StorageRefusal:
    """The refusal that an OSError during `what` ("start of volume X") amounts to."""
    number = error.errno
    text = error.strerror or str(error)
    if number in _FULL:
        return StorageRefusal(
            "NO_SPACE",
            f"no space left for {what}: free some in the pool or enlarge it",
            what=what,
        )
    if number in _BROKEN:
        return StorageRefusal(
            "POOL_UNUSABLE", f"{what} failed, the pool does not work: {text}", what=what, cause=text
        )
    return StorageRefusal("STORAGE_FAILED", f"{what} failed: {text}", what=what, cause=text)
