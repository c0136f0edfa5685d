"""From reasons to the exception classes that Admin API clients expect.

Owns the one table reason -> class name, and what a restricted caller is told. Must not
know how a call came to be refused. Invariant: every reason of every service has a row
(a test fails otherwise), and a caller other than dom0 reads no dynamic part of a message.
"""

from __future__ import annotations

from collections.abc import Mapping

from bulkhead.model.refusal import REASONS as MODEL_REASONS
from services.adminapi.core.reasons import REASONS


class WireRefusal(Exception):
    """A call is refused for a reason of this service's own table.

    reason must be a row of reasons.REASONS; message is one finished sentence.
    """

    def __init__(self, reason: str, message: str, **metadata: str) -> None:
        if reason not in REASONS:
            raise KeyError(f"reason {reason} is in no table of the Admin API")
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata: dict[str, str] = metadata


_PROTOCOL = "ProtocolError"
_DENIED = "PermissionDenied"
_GENERIC = "QubesException"
_VALUE = "QubesValueError"
_PROPERTY = "QubesPropertyValueError"
_QUBE = "QubesVMError"
_STORAGE = "StoragePoolException"

# Reasons of bulkhead.model.refusal.
_MODEL: Mapping[str, str] = {
    "QUBE_NOT_FOUND": "QubesVMNotFoundError",
    "QUBE_EXISTS": "QubesVMAlreadyExistsError",
    "NAME_IN_REMOVAL": "QubesVMAlreadyExistsError",
    "QUBE_IN_USE": "QubesVMInUseError",
    "QUBE_QUARANTINED": _QUBE,
    "QUBE_BUSY": _QUBE,
    "QUBE_ERROR": _QUBE,
    "QUBE_NOT_HALTED": "QubesVMNotHaltedError",
    "QUBE_NOT_STARTED": "QubesVMNotStartedError",
    "QUBE_NOT_RUNNING": "QubesVMNotRunningError",
    "QUBE_NOT_PAUSED": "QubesVMNotPausedError",
    "START_PROHIBITED": _GENERIC,
    "SHUTDOWN_TIMEOUT": "QubesVMShutdownTimeoutError",
    "NOT_ENOUGH_MEMORY": "QubesMemoryError",
    "INVALID_NAME": _VALUE,
    "INVALID_UUID": "QubesVMInvalidUUIDError",
    "INVALID_VALUE": _VALUE,
    "INVALID_PROPERTY_VALUE": _PROPERTY,
    "NO_SUCH_PROPERTY": "QubesNoSuchPropertyError",
    "PROPERTY_READ_ONLY": _PROPERTY,
    # An AttributeError to clients, as no answer is for any property: qvm-clone passes over it.
    "PROPERTY_FIXED": "QubesNoSuchPropertyError",
    "FEATURE_NOT_FOUND": "QubesFeatureNotFoundError",
    "TAG_NOT_FOUND": "QubesTagNotFoundError",
    "INVALID_TAG": "QubesInvalidTagError",
    "INVALID_FEATURE": _PROTOCOL,
    "FEATURE_PROTECTED": _DENIED,
    "TAG_PROTECTED": _DENIED,
    "LABEL_NOT_FOUND": "QubesLabelNotFoundError",
    "LABEL_IN_USE": "QubesLabelInUseError",
    "LABEL_BUILTIN": _PROTOCOL,
    "INVALID_LABEL": "QubesInvalidLabelError",
    "INVALID_LABEL_COLOR": "QubesInvalidLabelValueError",
    "POOL_NOT_FOUND": _GENERIC,
    "POOL_IN_USE": "QubesPoolInUseError",
    "INVALID_POOL": _PROTOCOL,
    "VOLUME_NOT_FOUND": _GENERIC,
    "REVISION_NOT_FOUND": _STORAGE,
    "VOLUME_REFUSED": _STORAGE,
    "VOLUME_CREATE_REFUSED": _GENERIC,
    "NO_TEMPLATE": _VALUE,
    "NOT_DISPOSABLE_TEMPLATE": _VALUE,
    "DEVICE_ALREADY_ASSIGNED": "DeviceAlreadyAssigned",
    "DEVICE_NOT_ASSIGNED": "DeviceNotAssigned",
    "DEVICE_ALREADY_ATTACHED": "DeviceAlreadyAttached",
    "DEVICE_UNKNOWN": _PROTOCOL,
    "DEVICE_DENIED": _DENIED,
    "DEVICE_NOT_PLUGGABLE": _GENERIC,
    "INVALID_DEVICE": _PROTOCOL,
    "INVALID_ASSIGNMENT_MODE": "QubesUnrecognizedDeviceAssignmentMode",
    "INVALID_NOTES": _PROTOCOL,
    "KERNEL_NOT_INSTALLED": _GENERIC,
    "FACTS_MISSING": _GENERIC,
    "LIMIT_REACHED": _GENERIC,
    "OPERATION_NOT_FOUND": _GENERIC,
    "STALE_EPOCH": _GENERIC,
    "WRONG_OPERATION_STATE": _GENERIC,
    "CHANGED_MEANWHILE": _GENERIC,
    "NOT_YOURS": _DENIED,
    "PROTOCOL": _PROTOCOL,
    "INVALID_RULE": _VALUE,
}

# Reasons of this service.
_OWN: Mapping[str, str] = {
    "UNKNOWN_CALL": _PROTOCOL,
    "METHOD_NOT_SERVED": "QubesNotImplementedError",
    "NAME_NOT_KNOWN": _DENIED,
    "CALL_DENIED": _DENIED,
    "BACKUP_PROFILE_NOT_FOUND": "QubesBackupProfileNotFoundError",
    "BACKUP_NOT_RUNNING": _GENERIC,
    "COPY_TOKEN_NOT_FOUND": "QubesVolumeCopyTokenNotFoundError",
    "IMPORT_NOT_RUNNING": _GENERIC,
    "POOL_OPTION_MISSING": _GENERIC,
    "CREATE_REFUSED": _PROPERTY,
    "SUSPEND_FAILED": _GENERIC,
    "NOTHING_CHANGED": _GENERIC,
    "VETOED": _GENERIC,
    "OUTCOME_UNKNOWN": _GENERIC,
    "OPERATION_STUCK": _GENERIC,
    "READER_TOO_SLOW": _GENERIC,
    "TOO_MANY_STREAMS": _GENERIC,
    "TOO_MANY_CONNECTIONS": _GENERIC,
    "NOT_READY": _GENERIC,
    "STREAM_LOST": _GENERIC,
    "UNEXPECTED": _GENERIC,
}

# Reasons of the bus and of the services behind it.
_OTHERS: Mapping[str, str] = {
    # the bus
    "NO_SUCH_METHOD": _GENERIC,
    "NOT_OFFERED": "QubesNotImplementedError",
    "CALLER_NOT_ALLOWED": _GENERIC,
    "SOURCE_NOT_ALLOWED": _GENERIC,
    "WRONG_LANE": _GENERIC,
    "DEADLINE_EXCEEDED": _GENERIC,
    "NO_REPLY": _GENERIC,
    "NOT_CONNECTED": _GENERIC,
    "CONNECTION_LOST": _GENERIC,
    "REQUEST_ID_REUSED": _GENERIC,
    "MALFORMED_BODY": _GENERIC,
    "MALFORMED_REPLY": _GENERIC,
    "BUSY": _GENERIC,
    "DRAINING": _GENERIC,
    "STARTING": _GENERIC,
    "TOO_MANY_CALLS": _GENERIC,
    "TOO_LARGE": _GENERIC,
    "CANCELLED": _GENERIC,
    "UNTRUSTED_SERVER": _GENERIC,
    "INTERNAL": _GENERIC,
    "REPLICA_BEHIND": _GENERIC,
    # lifecycle
    "IMPORT_FAILED": _GENERIC,
    # domains
    "DOMAIN_EXISTS": _QUBE,
    "BOOT_ABANDONED": _QUBE,
    "DOMAIN_WRONG_STATE": _QUBE,
    "INVALID_DOMAIN_SPEC": _QUBE,
    "GUEST_KEYS_FULL": _QUBE,
    "HYPERVISOR_UNAVAILABLE": _QUBE,
    "HYPERVISOR_REFUSED": _QUBE,
    "HYPERVISOR_TIMEOUT": _QUBE,
    "HYPERVISOR_UNSUPPORTED": _QUBE,
    "NETWORK_UNAVAILABLE": _QUBE,
    "DOMAIN_BUSY": _QUBE,
    "AGENT_TIMEOUT": _QUBE,
    "GUEST_DAEMON_FAILED": _QUBE,
    "DOMAIN_NOT_FOUND": "QubesVMNotStartedError",
    "INVALID_GUEST_KEY": _VALUE,
    "MEMORY_MANAGER_FAILED": "QubesMemoryError",
    "AGENT_NOT_CONNECTED": _QUBE,
    "EPOCH_UNKNOWN": _GENERIC,
    # firewall
    "RULES_UNREADABLE": _GENERIC,
    "RULES_NOT_SAVED": _GENERIC,
    "KERNEL_REFUSED": _GENERIC,
    "ENFORCER_UNAVAILABLE": _GENERIC,
    "NETVM_NOT_UP": _GENERIC,
    # hostd
    "NOT_ROOT": _QUBE,
    "NAMESPACE_MISSING": _QUBE,
    "TAP_MISSING": _QUBE,
    "DEVICE_MISSING": _QUBE,
    "HOST_REFUSED": _QUBE,
    # registry
    "STORE_FULL": _GENERIC,
    "STORE_FAILED": _GENERIC,
    "STORE_BROKEN": _GENERIC,
    "REGISTRY_BUSY": _GENERIC,
    "SNAPSHOT_GONE": _GENERIC,
    "NO_FOREIGN_EDIT": _GENERIC,
    "FOREIGN_EDIT_UNREADABLE": _GENERIC,
    "FOREIGN_EDIT_BLOCKED": _GENERIC,
    "HIDDEN_REFUSED": _DENIED,
    # storage
    "VOLUME_DIRTY": _STORAGE,
    "VOLUME_IMPORTING": _STORAGE,
    "VOLUME_NOT_IMPORTING": _STORAGE,
    "IMPORT_INCOMPLETE": _STORAGE,
    "VOLUME_FOREIGN": _STORAGE,
    "VOLUME_IN_USE": _STORAGE,
    "NOT_ORIGIN": _STORAGE,
    "SOURCE_RUNNING": _STORAGE,
    "EPHEMERAL_UNAVAILABLE": _STORAGE,
    "INVALID_VOLUME": _STORAGE,
    "POOL_UNUSABLE": _STORAGE,
    "POOL_BUSY": _STORAGE,
    "POOL_TIMEOUT": _STORAGE,
    "NO_SPACE": _STORAGE,
    "STORAGE_FAILED": _STORAGE,
    "COPY_CANCELLED": _STORAGE,
    "KERNEL_EXISTS": _GENERIC,
    "INVALID_KERNEL": _GENERIC,
    "TICKET_UNKNOWN": _GENERIC,
}

CLASSES: Mapping[str, str] = {**_MODEL, **_OWN, **_OTHERS}

# A class that one call alone answers for a reason.
_BY_CALL: Mapping[tuple[str, str], str] = {
    ("NOT_DISPOSABLE_TEMPLATE", "admin.vm.CreateDisposable"): _GENERIC,
    ("NO_TEMPLATE", "admin.vm.CreateDisposable"): _GENERIC,
    ("DEVICE_UNKNOWN", "admin.vm.Start"): _GENERIC,
    ("DEVICE_DENIED", "admin.vm.Start"): _GENERIC,
}


def class_of(reason: str, method: str = "") -> str:
    """The exception class that a client gets for a reason; unmapped ones are generic."""
    special = _BY_CALL.get((reason, method))
    return special if special is not None else CLASSES.get(reason, _GENERIC)


def message_for(reason: str, message: str, *, restricted: bool) -> str:
    """The text for the caller: restricted ones get the reason's own sentence only."""
    if not restricted:
        return message
    row = MODEL_REASONS.get(reason) or REASONS.get(reason)
    return row.when if row is not None else "the call was refused"
