"""A pool whose volumes are files in a directory: all that the two drivers of such share.

Owns the pool itself: its options, that its directory is there, and which part answers
which call. Must not know a volume's files: that is the parts, each of which is told what
it needs when it is made. Invariants: every call about volumes goes to exactly one part;
"<name>.img" is the current state of a volume whenever it exists, and running data lies
beside it under a name of its own.
"""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

from bulkhead import failpoints
from bulkhead.model.records import Pool, Volume
from services.storage.core.reasons import StorageRefusal
from services.storage.core.states import Device, Found, Import, PoolUsage, VolumeState
from services.storage.core.volumes import (
    PREFIXES,
    QUARANTINE,
    parse_bool,
    parse_directory,
    parse_revisions,
)
from services.storage.drivers import files
from services.storage.drivers.directory.changes import Changes
from services.storage.drivers.directory.commits import Commits
from services.storage.drivers.directory.imports import Imports
from services.storage.drivers.directory.lifetime import Lifetime
from services.storage.drivers.directory.quarantine import Quarantine
from services.storage.drivers.directory.reading import Reading
from services.storage.drivers.directory.running_data import NextStart, RunningData
from services.storage.drivers.directory.runs import Runs
from services.storage.drivers.directory.tree import PROBE, Tree
from services.storage.drivers.directory.upkeep import Upkeep
from services.storage.drivers.files import fresh, set_tags
from services.storage.drivers.interface import Cancel, Committed, Driver


class DirectoryDriver(Driver):
    """Base of file-reflink and file: options dir_path, revisions_to_keep, ephemeral_volatile.

    A subclass says whether the backend will do, and hands over what makes it different:
    next_start and running_data (made from the pool's commits).
    """

    # Mode of a committed file: readable by guests where running data refers to it.
    clean_mode: ClassVar[int] = 0o600
    # Names of the options, as in info(), which looks at the host each time.
    parameters: ClassVar[tuple[str, ...]]

    def __init__(
        self, pool: Pool, next_start: NextStart, running_data: Callable[[Commits], RunningData]
    ) -> None:
        self.pool = pool
        self.root = Path(parse_directory(pool, self.name, self.parameters))
        self.revisions_to_keep = parse_revisions(pool)
        self.ephemeral_volatile = parse_bool(pool, "ephemeral_volatile", False)
        self._tree = Tree(pool.name, self.root)
        commits = Commits(self._tree, next_start, self.clean_mode)
        running = running_data(commits)
        quarantine = Quarantine(self._tree)
        self._reading = Reading(self._tree)
        self._lifetime = Lifetime(self._tree, commits, quarantine)
        self._runs = Runs(self._tree, self._reading, commits, next_start, running)
        self._changes = Changes(self._tree, commits, next_start, running)
        self._imports = Imports(self._tree, commits, next_start)
        self._upkeep = Upkeep(self._tree, quarantine)

    @abstractmethod
    def _check_backend(self) -> None:
        """POOL_UNUSABLE when the directory's file system cannot do what is needed."""

    # ---- the pool

    def setup(self) -> None:
        made = False
        if not self.root.is_dir():
            failpoints.hit("storage.pool_setup.before_mkdir")
            try:
                made = files.make_directory(self.root)
            except FileNotFoundError:
                raise StorageRefusal(
                    "POOL_UNUSABLE",
                    f"pool {self.pool.name}: {self.root.parent} does not exist, make it first",
                    pool=self.pool.name,
                    path=str(self.root.parent),
                ) from None
            failpoints.hit("storage.pool_setup.after_mkdir")
        inner: list[Path] = []
        for probe in (self.root / PREFIXES[0]).glob(f"{PROBE}~*"):
            probe.unlink(missing_ok=True)
        try:
            for prefix in PREFIXES:
                if files.make_directory(self.root / prefix):
                    inner.append(self.root / prefix)
            self._check_tags()
            self._check_backend()
        except BaseException:
            for path in reversed([self.root, *inner] if made else inner):
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise

    def _check_tags(self) -> None:
        with fresh(self.root / PREFIXES[0] / PROBE) as file:
            try:
                set_tags(file.fd, {"owner": "probe"})
            except OSError as error:
                raise StorageRefusal(
                    "POOL_UNUSABLE",
                    f"pool {self.pool.name}: the file system of {self.root} keeps no user "
                    f"extended attributes ({error.strerror}), use another",
                    pool=self.pool.name,
                    path=str(self.root),
                ) from None

    def teardown(self) -> None:
        for path in (
            *(self.root / prefix / QUARANTINE for prefix in PREFIXES),
            *(self.root / prefix for prefix in PREFIXES),
            self.root,
        ):
            with contextlib.suppress(OSError):
                path.rmdir()

    def config(self) -> dict[str, str]:
        return {
            "name": self.pool.name,
            "driver": self.name,
            "dir_path": str(self.root),
            "revisions_to_keep": str(self.revisions_to_keep),
            "ephemeral_volatile": str(self.ephemeral_volatile),
        }

    def usage(self) -> PoolUsage:
        """size: of the file system; usage: what cannot be written any more."""
        status = os.statvfs(self.root)
        size = status.f_blocks * status.f_frsize
        usage = size - status.f_bavail * status.f_frsize
        return PoolUsage(size, usage, {"data_size": size, "data_usage": usage})

    def location(self) -> Path | None:
        return self.root

    def check(self) -> None:
        self._tree.check()

    # ---- volumes: which part answers

    def ensure(self, owner: str, volume: Volume) -> None:
        self._lifetime.ensure(owner, volume)

    def clone(
        self, owner: str, volume: Volume, source: Committed, key: str, cancel: Cancel
    ) -> None:
        self._lifetime.clone(owner, volume, source, key, cancel)

    def remove(self, owner: str, volume: Volume) -> None:
        self._lifetime.remove(owner, volume)

    def verify(self, owner: str, volume: Volume, source: Volume | None) -> None:
        self._runs.verify(owner, volume, source)

    def start(
        self, owner: str, boot_id: str, volume: Volume, source: Volume | None, cancel: Cancel
    ) -> Device | None:
        return self._runs.start(owner, boot_id, volume, source, cancel)

    def stop(self, owner: str, boot_id: str, volume: Volume, cancel: Cancel) -> None:
        self._runs.stop(owner, boot_id, volume, cancel)

    def replace(
        self, owner: str, volume: Volume, source: Committed | None, key: str, cancel: Cancel
    ) -> None:
        self._changes.replace(owner, volume, source, key, cancel)

    def revert(self, owner: str, volume: Volume, revision: str, key: str) -> None:
        self._changes.revert(owner, volume, revision, key)

    def resize(self, owner: str, volume: Volume, size: int, cancel: Cancel) -> int:
        return self._changes.resize(owner, volume, size, cancel)

    def import_begin(self, owner: str, volume: Volume, size: int, key: str, ticket: bool) -> Import:
        return self._imports.begin(owner, volume, size, key, ticket)

    def import_arrived(self, owner: str, volume: Volume, key: str) -> None:
        self._imports.arrived(owner, volume, key)

    def import_end(self, owner: str, volume: Volume, success: bool, key: str) -> None:
        self._imports.end(owner, volume, success, key)

    def committed(self, volume: Volume, revision: str = "") -> AbstractContextManager[Committed]:
        return self._reading.committed(volume, revision)

    def describe(self, volume: Volume, source: Volume | None) -> VolumeState:
        return self._reading.describe(volume, source)

    def inventory(self) -> Sequence[Found]:
        return self._upkeep.inventory()

    def quarantine(self, found: Found) -> str:
        return self._upkeep.quarantine(found)

    def clear_temporaries(self, vid: str) -> list[str]:
        return self._upkeep.clear_temporaries(vid)
