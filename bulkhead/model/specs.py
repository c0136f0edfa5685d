"""What an operation is asked to do, and what one mutation is asked to change.

Owns the argument records of operations (one class per kind) and of mutations (one class
per command), with the same field names as the messages in records.proto and
registry.proto, so that the codec needs no table of its own. Must not know what any of
them does. Invariant: every class in KINDS and COMMANDS is frozen, and the table's key is
what the wire calls it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from bulkhead.model.records import Assignment, Pool

_NOTHING: Mapping[str, str] = MappingProxyType({})


def _nothing() -> Mapping[str, str]:
    return _NOTHING


# ---- operations


@dataclass(frozen=True, slots=True)
class CreateSpec:
    """A new qube. name "" = a disposable that gets disp<dispid>; label "" = the
    template's (disposables); template "" with template_given False = the class default;
    pools: volume name -> pool."""

    name: str = ""
    klass: str = ""
    label: str = ""
    template: str = ""
    template_given: bool = False
    pool: str = ""
    pools: Mapping[str, str] = field(default_factory=_nothing)
    disposable: bool = False
    preload: bool = False


@dataclass(frozen=True, slots=True)
class CloneSpec:
    """A copy of a qube under a new name; klass "" = the same class."""

    source: str
    name: str
    klass: str = ""
    pool: str = ""
    pools: Mapping[str, str] = field(default_factory=_nothing)


@dataclass(frozen=True, slots=True)
class RemoveSpec:
    """Remove a qube; auto_cleanup: begun by the system because a disposable stopped."""

    qube: str
    auto_cleanup: bool = False


@dataclass(frozen=True, slots=True)
class StartSpec:
    qube: str


@dataclass(frozen=True, slots=True)
class StoppedSpec:
    """The domain of that boot is gone."""

    uuid: str
    boot_id: str


@dataclass(frozen=True, slots=True)
class ShutdownSpec:
    qube: str
    force: bool = False
    wait: bool = False


@dataclass(frozen=True, slots=True)
class KillSpec:
    """boot_id "" = whichever boot it is now."""

    qube: str
    boot_id: str = ""


@dataclass(frozen=True, slots=True)
class PauseSpec:
    qube: str


@dataclass(frozen=True, slots=True)
class UnpauseSpec:
    qube: str


@dataclass(frozen=True, slots=True)
class SuspendSpec:
    qube: str


@dataclass(frozen=True, slots=True)
class ResumeSpec:
    qube: str


@dataclass(frozen=True, slots=True)
class RevertSpec:
    """revision "" = the newest one."""

    qube: str
    volume: str
    revision: str = ""


@dataclass(frozen=True, slots=True)
class ResizeSpec:
    """size in bytes."""

    qube: str
    volume: str
    size: int


@dataclass(frozen=True, slots=True)
class ClearSpec:
    qube: str
    volume: str


@dataclass(frozen=True, slots=True)
class CloneVolumeSpec:
    source_qube: str
    source_volume: str
    qube: str
    volume: str


@dataclass(frozen=True, slots=True)
class ImportSpec:
    """Replace a volume's data. size in bytes, 0 = the present one; resize: the volume
    takes that size."""

    qube: str
    volume: str
    size: int = 0
    resize: bool = False


# What an APPLY can be about: what a netvm is told of its clients, the qube's rules where
# its netvm is a guest, the qube's own guest keys.
APPLY_CLIENTS, APPLY_RULES, APPLY_KEYS = "clients", "rules", "keys"


@dataclass(frozen=True, slots=True)
class ApplySpec:
    """Bring a running qube up to the records; revision: the change that asked for it.

    parts: what has to be brought, () = all that there is.
    """

    uuid: str
    boot_id: str
    revision: int = 0
    parts: tuple[str, ...] = ()


def merged_parts(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    """What two APPLY bring together."""
    return tuple(sorted({*one, *other})) if one and other else ()


@dataclass(frozen=True, slots=True)
class AttachSpec:
    qube: str
    device: Assignment


@dataclass(frozen=True, slots=True)
class DetachSpec:
    qube: str
    device: Assignment


@dataclass(frozen=True, slots=True)
class PoolAddSpec:
    pool: Pool


@dataclass(frozen=True, slots=True)
class PoolRemoveSpec:
    pool: str


@dataclass(frozen=True, slots=True)
class KernelAddSpec:
    """Paths of a kernel's files, read by storage; "" = it has none."""

    name: str
    vmlinuz: str = ""
    initramfs: str = ""
    modules: str = ""
    pool: str = ""


@dataclass(frozen=True, slots=True)
class KernelRemoveSpec:
    name: str
    pool: str = ""


OperationSpec = (
    CreateSpec
    | CloneSpec
    | RemoveSpec
    | StartSpec
    | StoppedSpec
    | ShutdownSpec
    | KillSpec
    | PauseSpec
    | UnpauseSpec
    | SuspendSpec
    | ResumeSpec
    | RevertSpec
    | ResizeSpec
    | ClearSpec
    | CloneVolumeSpec
    | ImportSpec
    | ApplySpec
    | AttachSpec
    | DetachSpec
    | PoolAddSpec
    | PoolRemoveSpec
    | KernelAddSpec
    | KernelRemoveSpec
)

# Operation.kind -> class. The kind is the message's oneof field in upper case, except
# that import_data (import is a Python keyword) is IMPORT.
KINDS: Mapping[str, type[OperationSpec]] = MappingProxyType(
    {
        "CREATE": CreateSpec,
        "CLONE": CloneSpec,
        "REMOVE": RemoveSpec,
        "START": StartSpec,
        "STOPPED": StoppedSpec,
        "SHUTDOWN": ShutdownSpec,
        "KILL": KillSpec,
        "PAUSE": PauseSpec,
        "UNPAUSE": UnpauseSpec,
        "SUSPEND": SuspendSpec,
        "RESUME": ResumeSpec,
        "REVERT": RevertSpec,
        "RESIZE": ResizeSpec,
        "CLEAR": ClearSpec,
        "CLONE_VOLUME": CloneVolumeSpec,
        "IMPORT": ImportSpec,
        "APPLY": ApplySpec,
        "ATTACH": AttachSpec,
        "DETACH": DetachSpec,
        "POOL_ADD": PoolAddSpec,
        "POOL_REMOVE": PoolRemoveSpec,
        "KERNEL_ADD": KernelAddSpec,
        "KERNEL_REMOVE": KernelRemoveSpec,
    }
)
_KIND_OF: Mapping[type[OperationSpec], str] = {spec: kind for kind, spec in KINDS.items()}


def kind_of(spec: OperationSpec) -> str:
    """The kind's name of a spec, e.g. "START"."""
    return _KIND_OF[type(spec)]


# ---- mutations


@dataclass(frozen=True, slots=True)
class SetProperty:
    """qube "" = a system property; the value is as the caller sent it."""

    qube: str
    name: str
    untrusted_value: str


@dataclass(frozen=True, slots=True)
class ResetProperty:
    """Back to the default; qube "" = a system property."""

    qube: str
    name: str


@dataclass(frozen=True, slots=True)
class SetFeature:
    qube: str
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class RemoveFeature:
    qube: str
    name: str


@dataclass(frozen=True, slots=True)
class SetTag:
    qube: str
    tag: str


@dataclass(frozen=True, slots=True)
class RemoveTag:
    qube: str
    tag: str


@dataclass(frozen=True, slots=True)
class CreateLabel:
    """color "0xrrggbb"."""

    name: str
    color: str


@dataclass(frozen=True, slots=True)
class RemoveLabel:
    name: str


@dataclass(frozen=True, slots=True)
class SetNotes:
    qube: str
    notes: str


@dataclass(frozen=True, slots=True)
class SetVolume:
    """Exactly one of the optional fields is given."""

    qube: str
    volume: str
    revisions_to_keep: int | None = None
    rw: bool | None = None
    ephemeral: bool | None = None


@dataclass(frozen=True, slots=True)
class SetPool:
    """Exactly one of the optional fields is given."""

    pool: str
    revisions_to_keep: int | None = None
    ephemeral_volatile: bool | None = None


@dataclass(frozen=True, slots=True)
class AssignDevice:
    qube: str
    device: Assignment


@dataclass(frozen=True, slots=True)
class UnassignDevice:
    qube: str
    device: Assignment


@dataclass(frozen=True, slots=True)
class SetAssignment:
    """Change the mode of an existing assignment."""

    qube: str
    device: Assignment
    mode: str


@dataclass(frozen=True, slots=True)
class DenyDevices:
    """Add interface patterns to the denied list."""

    qube: str
    patterns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AllowDevices:
    """Take interface patterns off the denied list; all: every one."""

    qube: str
    patterns: tuple[str, ...] = ()
    all: bool = False


Command = (
    SetProperty
    | ResetProperty
    | SetFeature
    | RemoveFeature
    | SetTag
    | RemoveTag
    | CreateLabel
    | RemoveLabel
    | SetNotes
    | SetVolume
    | SetPool
    | AssignDevice
    | UnassignDevice
    | SetAssignment
    | DenyDevices
    | AllowDevices
)

# MutateRequest's oneof field -> class.
COMMANDS: Mapping[str, type[Command]] = MappingProxyType(
    {
        "set_property": SetProperty,
        "reset_property": ResetProperty,
        "set_feature": SetFeature,
        "remove_feature": RemoveFeature,
        "set_tag": SetTag,
        "remove_tag": RemoveTag,
        "create_label": CreateLabel,
        "remove_label": RemoveLabel,
        "set_notes": SetNotes,
        "set_volume": SetVolume,
        "set_pool": SetPool,
        "assign_device": AssignDevice,
        "unassign_device": UnassignDevice,
        "set_assignment": SetAssignment,
        "deny_devices": DenyDevices,
        "allow_devices": AllowDevices,
    }
)
_FIELD_OF: Mapping[type[Command], str] = {klass: name for name, klass in COMMANDS.items()}


def command_field(command: Command) -> str:
    """MutateRequest's oneof field of a command, e.g. "set_tag"."""
    return _FIELD_OF[type(command)]


@dataclass(frozen=True, slots=True)
class PreloadMarks:
    """dispvm's marks on a disposable or on its template: features to set and to remove."""

    qube: str
    features: tuple[tuple[str, str], ...] = ()
    features_removed: tuple[str, ...] = ()
