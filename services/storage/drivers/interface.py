"""What every storage driver offers, and what callers may rely on.

Owns the abstract Driver and the description of a driver. Must not know any backend,
the bus, or which qube is running. A driver works in the thread that calls it, may
block, and takes only pure values.

Invariants that every driver keeps, and the contract tests check:

* A call may be repeated, also after the process died at any point of it: the repeat
  ends in the same state. A call about what never happened succeeds (remove, stop,
  import_end with success False).
* At every instant exactly one committed state of an ORIGIN volume can be chosen, and
  running data is never replaced by start() nor dropped by a crash: stop() commits it.
* What was made bears its owner's uuid before it bears its final name; files of another
  owner are never changed (VOLUME_FOREIGN), and remove() leaves them alone.
* Two calls about one volume never overlap (the caller locks), calls about different
  volumes may.
* Refusals are StorageRefusal, trouble of the system is OSError; after either, what was
  committed before is unchanged.

`key` is the operation's id: the same key twice is a repeat, "" never is.
"""

# ruff: noqa: ARG002  (the interface's arguments, whether a driver needs them or not)

from __future__ import annotations

import abc
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bulkhead.model.records import Pool, Volume
from services.storage.core.reasons import StorageRefusal
from services.storage.core.states import (
    Device,
    Found,
    Import,
    Kernel,
    PoolUsage,
    VolumeState,
)


@dataclass(frozen=True, slots=True)
class DriverInfo:
    """A driver's capabilities.

    parameters: option names in the order that admin.pool.ListDrivers reports.
    required: those without a default. why_not: "" when the driver works on this host.
    reflink: clones share blocks. negative_revisions: revisions_to_keep -1 is possible.
    resize_running: a running volume can be resized by the driver. block_devices: hands
    out device nodes. disks: holds volumes that qubes own (not kernels).
    """

    name: str
    parameters: tuple[str, ...]
    required: tuple[str, ...]
    why_not: str = ""
    reflink: bool = False
    negative_revisions: bool = False
    resize_running: bool = True
    block_devices: bool = False
    disks: bool = True

    @property
    def available(self) -> bool:
        """True when pools of this driver can be set up on this host."""
        return not self.why_not


class Cancel:
    """Tells a long copy that nobody waits for it any more. Thread-safe."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Give up at the next check."""
        self._event.set()

    @property
    def is_set(self) -> bool:
        """True after set()."""
        return self._event.is_set()

    def check(self) -> None:
        """COPY_CANCELLED after set()."""
        if self._event.is_set():
            raise StorageRefusal("COPY_CANCELLED", "the copy was cancelled; nothing was changed")


@dataclass(frozen=True, slots=True)
class Committed:
    """An open committed state: descriptor of raw data (kept valid by the context), bytes,
    and an id that changes with every commit."""

    fd: int
    size: int
    identity: str


class Driver(abc.ABC):
    """One pool through one driver. Cheap to make; touches nothing until called."""

    @classmethod
    @abc.abstractmethod
    def info(cls) -> DriverInfo:
        """Capabilities, with why_not as on this host now."""

    # A class attribute so that a refusal can name the driver without asking the host.
    name: ClassVar[str]

    @abc.abstractmethod
    def __init__(self, pool: Pool) -> None:
        """Check the options. INVALID_POOL on an unknown, missing or bad one."""

    # ---- the pool

    @abc.abstractmethod
    def setup(self) -> None:
        """Make the pool usable or refuse with POOL_UNUSABLE; repeatable."""

    @abc.abstractmethod
    def teardown(self) -> None:
        """Undo setup where nothing is left in the pool; never removes data."""

    @abc.abstractmethod
    def config(self) -> dict[str, str]:
        """What qubes.xml and admin.pool.Info show, name and driver included."""

    @abc.abstractmethod
    def usage(self) -> PoolUsage:
        """Bytes of the whole pool. OSError when its backend is gone."""

    @abc.abstractmethod
    def location(self) -> Path | None:
        """The directory that the pool lies in; None when it is no directory."""

    @abc.abstractmethod
    def check(self) -> None:
        """Cheap probe: POOL_UNUSABLE or OSError when the pool cannot be used now."""

    # ---- volumes

    @abc.abstractmethod
    def ensure(self, owner: str, volume: Volume) -> None:
        """An ORIGIN volume has data: its own, or zeroes of volume.size. Else nothing."""

    @abc.abstractmethod
    def clone(
        self, owner: str, volume: Volume, source: Committed, key: str, cancel: Cancel
    ) -> None:
        """A new ORIGIN volume holds the source's data; nothing if it already has data."""

    @abc.abstractmethod
    def replace(
        self, owner: str, volume: Volume, source: Committed | None, key: str, cancel: Cancel
    ) -> None:
        """Commit the source's data (None: zeroes of the present size) as a new state.

        VOLUME_DIRTY, VOLUME_IMPORTING, NOT_ORIGIN, VOLUME_NOT_FOUND.
        """

    @abc.abstractmethod
    def remove(self, owner: str, volume: Volume) -> None:
        """Every trace of the volume is gone; another owner's files stay."""

    @abc.abstractmethod
    def verify(self, owner: str, volume: Volume, source: Volume | None) -> None:
        """VOLUME_NOT_FOUND, VOLUME_FOREIGN or POOL_UNUSABLE unless it can be started."""

    @abc.abstractmethod
    def start(
        self, owner: str, boot_id: str, volume: Volume, source: Volume | None, cancel: Cancel
    ) -> Device | None:
        """Ready for a guest. Same boot_id again: untouched. None: no disk."""

    @abc.abstractmethod
    def stop(self, owner: str, boot_id: str, volume: Volume, cancel: Cancel) -> None:
        """Commit or discard. Nothing if the running data is of another boot ("" = any)."""

    @abc.abstractmethod
    def describe(self, volume: Volume, source: Volume | None) -> VolumeState:
        """The present state; a missing volume has usage 0 and a problem."""

    @abc.abstractmethod
    def revert(self, owner: str, volume: Volume, revision: str, key: str) -> None:
        """The revision ("" = newest) becomes current, what was current a revision."""

    @abc.abstractmethod
    def resize(self, owner: str, volume: Volume, size: int, cancel: Cancel) -> int:
        """Grow or shrink to size bytes; returns the size in force (the configured one
        where nothing exists yet). VOLUME_REFUSED when not rw."""

    @abc.abstractmethod
    def import_begin(self, owner: str, volume: Volume, size: int, key: str, ticket: bool) -> Import:
        """A sparse target of size bytes (0 = the present size). With ticket, import_end
        waits for import_arrived()."""

    @abc.abstractmethod
    def import_arrived(self, owner: str, volume: Volume, key: str) -> None:
        """Every byte of the import is durable in its target."""

    @abc.abstractmethod
    def import_end(self, owner: str, volume: Volume, success: bool, key: str) -> None:
        """Commit or discard. Without a begin: success is refused, failure does nothing."""

    @abc.abstractmethod
    def committed(self, volume: Volume, revision: str = "") -> AbstractContextManager[Committed]:
        """The last commit ("" ) or a revision, open for reading even while it runs.

        NOT_ORIGIN, VOLUME_NOT_FOUND, REVISION_NOT_FOUND, SOURCE_RUNNING.
        """

    # ---- upkeep

    @abc.abstractmethod
    def inventory(self) -> Sequence[Found]:
        """Everything in the pool that is named like a volume, sorted by vid."""

    @abc.abstractmethod
    def quarantine(self, found: Found) -> str:
        """Move the volume's files aside if its owner is still found.owner; says what was done."""

    @abc.abstractmethod
    def clear_temporaries(self, vid: str) -> list[str]:
        """Remove unfinished files of a volume that no call works on; names of those removed."""

    # ---- kernels

    def kernels(self) -> Sequence[Kernel]:
        """Installed kernels; drivers of disks have none."""
        return ()

    def kernel_add(
        self, name: str, vmlinuz: Path, initramfs: Path | None, modules: Path | None, cancel: Cancel
    ) -> Kernel:
        """Install a kernel; the same files again are no change. KERNEL_EXISTS, INVALID_KERNEL."""
        raise StorageRefusal(
            "POOL_UNUSABLE", f"driver {self.name} holds no kernels", driver=self.name
        )

    def kernel_remove(self, name: str, key: str) -> None:
        """Remove a kernel. KERNEL_NOT_INSTALLED unless it is there or `key` removed it."""
        raise StorageRefusal(
            "POOL_UNUSABLE", f"driver {self.name} holds no kernels", driver=self.name
        )
