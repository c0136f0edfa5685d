"""What differs between directory pools: how running data is made, and what it becomes.

Owns the two interfaces that a driver of files implements, and the tags of running data.
Must not know when a volume is started or stopped. Invariant: running data bears its owner
and boot, and the id of the commit that it began as, before it bears its final name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from bulkhead.model.records import Volume
from services.storage.core.present import Present
from services.storage.drivers import files
from services.storage.drivers.files import set_tags
from services.storage.drivers.interface import Cancel


class NextStart(ABC):
    """What lies ready beside the current state so that the next start is fast."""

    @abstractmethod
    def prepare(self, owner: str, present: Present, volume: Volume) -> None:
        """After a change of the current state: whatever makes the next start fast.

        Not for a new volume: it may never be started, and its first start is one clone.
        """

    @abstractmethod
    def drop_stale(self, present: Present) -> None:
        """Remove what the old current state left behind."""


class RunningData(ABC):
    """The file that a guest works on while its committed state is kept."""

    @abstractmethod
    def start(
        self, owner: str, boot_id: str, present: Present, source: Path, cancel: Cancel
    ) -> Path:
        """Make durable running data that begins as the committed file; its path."""

    @abstractmethod
    def commit(
        self, owner: str, present: Present, volume: Volume, running: Path, cancel: Cancel
    ) -> None:
        """Running data becomes the current state; afterwards none of it is left."""

    @abstractmethod
    def resize(self, running: Path, size: int) -> None:
        """Give running data another size."""


def mark_running(fd: int, owner: str, boot_id: str, base: str) -> None:
    """Tags and rights of running data; its commit id is that of the state it may become.

    base: the id of the commit that it began as, "" where it is nobody's copy.
    """
    set_tags(
        fd,
        {
            "owner": owner,
            "boot": boot_id,
            "base": base,
            "commit": files.new_identity(),
            "operation": "",
        },
    )
    files.share_with_guests(fd, 0o660)
