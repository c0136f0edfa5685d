"""How the pure model says no.

A Refusal carries a reason from REASONS, a sentence for a person, and every dynamic
part of that sentence as metadata; services have tables and refusals of their own, made
of the same parts. It never names an exception class: adminapi maps reasons to the
classes that existing clients expect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Reason:
    """One row of a reason table: UPPER_SNAKE name, canonical code, when it is used."""

    name: str
    code: str
    when: str


def table(rows: Iterable[Reason]) -> Mapping[str, Reason]:
    """The rows by name. ValueError when a name stands there twice."""
    found: dict[str, Reason] = {}
    for row in rows:
        if row.name in found:
            raise ValueError(f"reason {row.name} stands twice in its table")
        found[row.name] = row
    return found


class TypedRefusal(Exception):
    """A no with a reason: a row of TABLE, which each subclass names.

    message is one sentence for a person. metadata holds each dynamic part of it as text.
    """

    TABLE: ClassVar[Mapping[str, Reason]] = {}

    def __init__(self, reason: str, message: str, **metadata: str) -> None:
        if reason not in self.TABLE:
            raise KeyError(f"reason {reason} is in no table")
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata: dict[str, str] = metadata

    @property
    def code(self) -> str:
        """The canonical code's name, without CODE_."""
        return self.TABLE[self.reason].code


_ROWS: tuple[Reason, ...] = (
    # name, code, when
    Reason("QUBE_NOT_FOUND", "NOT_FOUND", "no qube has that name or uuid"),
    Reason("QUBE_EXISTS", "ALREADY_EXISTS", "the name is taken"),
    Reason("NAME_IN_REMOVAL", "UNAVAILABLE", "its qube is being removed; ask again"),
    Reason("QUBE_IN_USE", "FAILED_PRECONDITION", "other objects refer to the qube"),
    Reason("QUBE_QUARANTINED", "FAILED_PRECONDITION", "its stored state does not validate"),
    Reason("QUBE_BUSY", "ABORTED", "another operation holds the qube"),
    Reason("QUBE_ERROR", "FAILED_PRECONDITION", "the qube's state or kind forbids it"),
    Reason("QUBE_NOT_HALTED", "FAILED_PRECONDITION", "must be powered off"),
    Reason("QUBE_NOT_STARTED", "FAILED_PRECONDITION", "is powered off"),
    Reason("QUBE_NOT_RUNNING", "FAILED_PRECONDITION", "is powered off or paused"),
    Reason("QUBE_NOT_PAUSED", "FAILED_PRECONDITION", "is not paused"),
    Reason("START_PROHIBITED", "FAILED_PRECONDITION", "feature prohibit-start"),
    Reason("SHUTDOWN_TIMEOUT", "DEADLINE_EXCEEDED", "did not stop in time"),
    Reason("NOT_ENOUGH_MEMORY", "RESOURCE_EXHAUSTED", "host memory does not suffice"),
    Reason("INVALID_NAME", "INVALID_ARGUMENT", "a qube name breaks the name rules"),
    Reason("INVALID_UUID", "INVALID_ARGUMENT", "not a uuid"),
    Reason("INVALID_VALUE", "INVALID_ARGUMENT", "a value that is no property's breaks its rules"),
    Reason("INVALID_PROPERTY_VALUE", "INVALID_ARGUMENT", "a property refuses the value"),
    Reason("NO_SUCH_PROPERTY", "NOT_FOUND", "the holder has no such property"),
    Reason("PROPERTY_READ_ONLY", "INVALID_ARGUMENT", "computed or write-once"),
    Reason("PROPERTY_FIXED", "INVALID_ARGUMENT", "fixed when the qube is created"),
    Reason("FEATURE_NOT_FOUND", "NOT_FOUND", "the feature is not set"),
    Reason("TAG_NOT_FOUND", "NOT_FOUND", "the tag is not set"),
    Reason("INVALID_TAG", "INVALID_ARGUMENT", "a tag breaks the tag rules"),
    Reason("INVALID_FEATURE", "INVALID_ARGUMENT", "a feature's name or value breaks the rules"),
    Reason("FEATURE_PROTECTED", "PERMISSION_DENIED", "only the system manages this feature"),
    Reason("TAG_PROTECTED", "PERMISSION_DENIED", "only dom0 manages this tag"),
    Reason("LABEL_NOT_FOUND", "NOT_FOUND", "no such label"),
    Reason("LABEL_IN_USE", "FAILED_PRECONDITION", "label exists or a qube has it"),
    Reason("LABEL_BUILTIN", "INVALID_ARGUMENT", "only custom labels can be removed"),
    Reason("INVALID_LABEL", "INVALID_ARGUMENT", "a label name breaks the rules"),
    Reason("INVALID_LABEL_COLOR", "INVALID_ARGUMENT", "not 0xRRGGBB"),
    Reason("POOL_NOT_FOUND", "NOT_FOUND", "no such pool"),
    Reason("POOL_IN_USE", "FAILED_PRECONDITION", "pool exists, holds volumes or is a default"),
    Reason("INVALID_POOL", "INVALID_ARGUMENT", "a pool's name or option breaks the rules"),
    Reason("VOLUME_NOT_FOUND", "NOT_FOUND", "no such volume"),
    Reason("REVISION_NOT_FOUND", "NOT_FOUND", "no such revision"),
    Reason("VOLUME_REFUSED", "FAILED_PRECONDITION", "the volume's kind or state forbids it"),
    Reason("VOLUME_CREATE_REFUSED", "INVALID_ARGUMENT", "the pool choice does not fit the volume"),
    Reason("NO_TEMPLATE", "INVALID_ARGUMENT", "no template given and no default"),
    Reason("NOT_DISPOSABLE_TEMPLATE", "FAILED_PRECONDITION", "template_for_dispvms is not set"),
    Reason("DEVICE_ALREADY_ASSIGNED", "ALREADY_EXISTS", "the same assignment exists"),
    Reason("DEVICE_NOT_ASSIGNED", "NOT_FOUND", "no such assignment or attachment"),
    Reason("DEVICE_ALREADY_ATTACHED", "FAILED_PRECONDITION", "the device is attached"),
    Reason("DEVICE_UNKNOWN", "NOT_FOUND", "no such device is present"),
    Reason("DEVICE_DENIED", "PERMISSION_DENIED", "an interface is on the denied list"),
    Reason("INVALID_DEVICE", "INVALID_ARGUMENT", "a device argument breaks the rules"),
    Reason("DEVICE_NOT_PLUGGABLE", "FAILED_PRECONDITION", "not attachable to a running qube"),
    Reason("INVALID_ASSIGNMENT_MODE", "INVALID_ARGUMENT", "not required, ask- or auto-attach"),
    Reason("INVALID_NOTES", "INVALID_ARGUMENT", "notes are not UTF-8 or too long"),
    Reason("INVALID_RULE", "INVALID_ARGUMENT", "a firewall rule breaks the grammar"),
    Reason("KERNEL_NOT_INSTALLED", "FAILED_PRECONDITION", "kernel or its vmlinuz is missing"),
    Reason("FACTS_MISSING", "UNAVAILABLE", "their owner has not reported yet; ask again"),
    Reason("LIMIT_REACHED", "RESOURCE_EXHAUSTED", "no free qid, dispid or queue place"),
    Reason("OPERATION_NOT_FOUND", "NOT_FOUND", "no such operation"),
    Reason("STALE_EPOCH", "ABORTED", "a newer lifecycle took over"),
    Reason("WRONG_OPERATION_STATE", "FAILED_PRECONDITION", "the operation is past that"),
    Reason("CHANGED_MEANWHILE", "ABORTED", "the etag is not the record's revision"),
    Reason("NOT_YOURS", "PERMISSION_DENIED", "the caller does not own that namespace"),
    Reason("PROTOCOL", "INVALID_ARGUMENT", "a malformed request"),
)

REASONS: Mapping[str, Reason] = table(_ROWS)


class Refusal(TypedRefusal):
    """The model refuses; nothing was changed. reason is a row of REASONS."""

    TABLE = REASONS
