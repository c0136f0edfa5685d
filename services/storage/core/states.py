"""Values that drivers and handlers exchange.

Owns shapes only. Must not know protobuf or files. Invariant: immutable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RevisionState:
    """One revision; time in unix seconds."""

    id: str
    time: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class VolumeState:
    """What a volume is now. Sizes in bytes; path: where running data lives;
    is_outdated None = the driver cannot tell; revisions oldest first; problem "" = sound."""

    size: int
    usage: int = 0
    path: str = ""
    is_outdated: bool | None = False
    is_dirty: bool = False
    revisions: tuple[RevisionState, ...] = ()
    problem: str = ""
    importing: bool = False


@dataclass(frozen=True, slots=True)
class Device:
    """What a started volume is to a guest; format "raw" or "qcow2"; block: a device node."""

    name: str
    path: str
    rw: bool
    format: str = "raw"
    block: bool = False
    devtype: str = "disk"


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """Bytes, or None where the driver has no such figure."""

    size: int | None = None
    usage: int | None = None
    details: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Found:
    """One volume that exists in a pool, whoever owns it.

    owner: uuid of its tag, "" = untagged. kind: "committed", "running" (no commit),
    "import" (only an import's target), "temporary" (only leftovers) or "revisions".
    """

    vid: str
    owner: str
    path: str
    kind: str
    running: bool


@dataclass(frozen=True, slots=True)
class Import:
    """An import under way: bytes expected and the file to write them to."""

    size: int
    path: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """One installed kernel; the kernelopts_* are file contents or None."""

    name: str
    directory: str
    has_vmlinuz: bool
    has_initramfs: bool
    has_modules: bool
    memory_hotplug: bool
    kernelopts_common: str | None
    kernelopts_pci: str | None
    kernelopts_nopci: str | None
