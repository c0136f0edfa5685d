"""What the Admin API may answer instead of a result, as Python exceptions.

Owns the classes and their parents. Must not know how they arrive. Invariant: a class
has the parents that tools written for release 4.4 catch (KeyError, ValueError,
AttributeError ...), and every name from the wire becomes some exception of this module
or the builtin of that name.
"""

from __future__ import annotations

import builtins


class QubesException(Exception):
    """The call was refused; the text says why."""


class ProtocolError(AssertionError):
    """The request was malformed."""


class PermissionDenied(Exception):
    """The caller, or the argument, is not permitted."""


class QubesVMNotFoundError(QubesException, KeyError):
    """No such qube."""

    __str__ = Exception.__str__  # KeyError would quote the sentence


class QubesVMInvalidUUIDError(QubesException):
    """Not the uuid of a qube."""


class QubesVMAlreadyExistsError(QubesException):
    """The name is taken."""


class QubesVMError(QubesException):
    """A qube's state or configuration forbids it."""


class QubesVMInUseError(QubesVMError):
    """Others depend on the qube."""


class QubesVMNotStartedError(QubesVMError):
    """The qube is powered off."""


class QubesVMNotRunningError(QubesVMNotStartedError):
    """The qube is not running."""


class QubesVMNotPausedError(QubesVMNotStartedError):
    """The qube is not paused."""


class QubesVMNotSuspendedError(QubesVMError):
    """The qube is not suspended."""


class QubesVMCancelledPauseError(QubesVMError):
    """A pause was called off."""


class QubesVMNotHaltedError(QubesVMError):
    """The qube must be powered off."""


class QubesVMShutdownTimeoutError(QubesVMError):
    """The qube did not stop in time."""


class QubesNoTemplateError(QubesVMError):
    """The qube has no template."""


class QubesMemoryError(QubesVMError, MemoryError):
    """The host's memory does not suffice."""


class QubesPoolInUseError(QubesException):
    """The pool exists already or is used."""


class QubesValueError(QubesException, ValueError):
    """A bad value."""


class QubesPropertyValueError(QubesValueError):
    """A property refuses the value."""


class QubesNoSuchPropertyError(QubesException, AttributeError):
    """No such property."""


class QubesNotImplementedError(QubesException, NotImplementedError):
    """Nothing answers that."""


class QubesBackupProfileNotFoundError(QubesException):
    """No such backup profile."""


class BackupCancelledError(QubesException):
    """The backup was cancelled."""


class BackupAlreadyRunningError(QubesException):
    """A backup of that profile runs already."""


class QubesFeatureNotFoundError(QubesException, KeyError):
    """The feature is not set."""

    __str__ = Exception.__str__


class QubesTagNotFoundError(QubesException, KeyError):
    """The tag is not set."""

    __str__ = Exception.__str__


class QubesLabelNotFoundError(QubesException, KeyError):
    """No such label."""

    __str__ = Exception.__str__


class QubesLabelInUseError(QubesException):
    """The label exists already or a qube has it."""


class QubesInvalidTagError(QubesException):
    """A tag breaks the rules."""


class QubesInvalidLabelError(QubesException):
    """A label's name breaks the rules."""


class QubesInvalidLabelValueError(QubesException):
    """A label's colour breaks the rules."""


class DeviceNotAssigned(QubesException, KeyError):
    """No such assignment or attachment."""

    __str__ = Exception.__str__


class DeviceAlreadyAttached(QubesException, KeyError):
    """The device is attached already."""

    __str__ = Exception.__str__


class DeviceAlreadyAssigned(QubesException, KeyError):
    """The same assignment exists."""

    __str__ = Exception.__str__


class DeviceNotFound(QubesException, KeyError):
    """No such device."""

    __str__ = Exception.__str__


class QubesUnrecognizedDeviceAssignmentMode(QubesException):
    """Not a mode of an assignment."""


class UnrecognizedDevice(QubesException, ValueError):
    """Not that device."""


class UnexpectedDeviceProperty(QubesException, ValueError):
    """The device has another property than expected."""


class StoragePoolException(QubesException):
    """The pool or a volume refused."""


class QubesVolumeCopyTokenNotFoundError(QubesException, KeyError):
    """The clone token is unknown or was used."""

    __str__ = Exception.__str__


class QubesVolumeCopyInUseError(QubesException):
    """The clone token exists already."""


# ---- made by the client, never sent


class QubesDaemonCommunicationError(QubesException):
    """The answer is not what the protocol says, or there is nobody to ask."""


class QubesDaemonAccessError(QubesDaemonCommunicationError):
    """No answer at all: the policy forbids the call, or its frame is unusable."""


QubesDaemonNoResponseError = QubesDaemonAccessError


class QubesPropertyAccessError(QubesDaemonAccessError, AttributeError):
    """No answer to a question about a property."""


# Whatever a call may be refused with, for `except AdminError`.
AdminError = (QubesException, ProtocolError, PermissionDenied)


def from_wire(class_name: str, message: str) -> Exception:
    """The exception that a reply stands for; message is formatted already.

    An unknown name is the builtin exception of that name where it ends in "Error", else
    QubesException.
    """
    known = globals().get(class_name)
    if isinstance(known, type) and issubclass(known, Exception):
        return known(message)
    if class_name.endswith("Error"):
        builtin = getattr(builtins, class_name, None)
        if isinstance(builtin, type) and issubclass(builtin, Exception):
            return builtin(message)
    return QubesException(message)


def is_formatted(class_name: str) -> bool:
    """Whether the sender doubles "%" in messages of that class."""
    error = from_wire(class_name, "")
    return isinstance(error, QubesException)
