"""Driver file-reflink: files on a file system that shares blocks (XFS, btrfs).

Owns what is special with reflinks: running data is a clone of the commit, kept ready
beside it so that a start is a rename. Must not know qubes. Invariant: a ready copy is
used only while it provably equals the present commit.
"""

# ruff: noqa: ARG002  (the interface's arguments, whether a driver needs them or not)

from __future__ import annotations

import logging
import os
from pathlib import Path

from bulkhead import failpoints
from bulkhead.durable import fsync_directory
from bulkhead.model.records import Pool, Volume
from services.storage.core.names import Role
from services.storage.core.present import Present
from services.storage.core.reasons import StorageRefusal
from services.storage.core.volumes import PREFIXES, Kind, kind_of, parse_bool
from services.storage.drivers import files
from services.storage.drivers.directory.commits import Commits, drop_ready_copy
from services.storage.drivers.directory.driver import DirectoryDriver
from services.storage.drivers.directory.running_data import NextStart, RunningData, mark_running
from services.storage.drivers.directory.tree import PROBE
from services.storage.drivers.files import fresh, get_tag, opened, set_tags
from services.storage.drivers.interface import Cancel, DriverInfo

_LOG = logging.getLogger("bulkhead.storage")


class FileReflinkDriver(DirectoryDriver):
    """Option setup_check (default True): refuse a directory whose file system cannot share."""

    name = "file-reflink"
    parameters = ("revisions_to_keep", "dir_path", "ephemeral_volatile", "setup_check")

    def __init__(self, pool: Pool) -> None:
        ready = ReadyCopies()
        super().__init__(pool, ready, lambda commits: Clones(commits, ready))
        self.setup_check = parse_bool(pool, "setup_check", True)

    @classmethod
    def info(cls) -> DriverInfo:
        return DriverInfo(
            name=cls.name,
            parameters=cls.parameters,
            required=("dir_path",),
            reflink=True,
            negative_revisions=True,
        )

    def _check_backend(self) -> None:
        if not self.setup_check:
            return
        place = self.root / PREFIXES[0]
        with fresh(place / PROBE) as one, fresh(place / PROBE) as two:
            os.write(one.fd, b"abc")
            os.fsync(one.fd)
            if not files.ficlone(one.fd, two.fd):
                raise StorageRefusal(
                    "POOL_UNUSABLE",
                    f"pool {self.pool.name}: the file system of {self.root} cannot share blocks; "
                    "use XFS or btrfs, the driver file, or setup_check=False",
                    pool=self.pool.name,
                    path=str(self.root),
                )


class ReadyCopies(NextStart):
    """A clone of the current state beside it, so that a start is a rename."""

    def prepare(self, owner: str, present: Present, volume: Volume) -> None:
        """Make the ready copy; only a wish, so trouble is logged and no more."""
        clean = present.roles.get(Role.CLEAN)
        if clean is None or volume.snapshots_disabled or kind_of(volume) is not Kind.ORIGIN:
            return
        old = present.roles.get(Role.PRECACHE)
        if old is not None and self.is_fresh(old, clean):
            return
        try:
            with opened(clean) as source, fresh(present.path(Role.PRECACHE)) as file:
                if not files.ficlone(source, file.fd):
                    return  # a full copy would cost twice the space
                set_tags(file.fd, {"owner": owner, "base": files.identity(source)})
                changed = os.fstat(source).st_mtime_ns
                os.utime(file.fd, ns=(changed, changed))
                file.publish("storage.precache")
        except OSError as error:
            _LOG.warning("no ready copy of %s: %s", present.vid, error)

    def drop_stale(self, present: Present) -> None:
        precache = present.roles.get(Role.PRECACHE)
        if precache is not None and not self.is_fresh(precache, present.path(Role.CLEAN)):
            drop_ready_copy(present)

    def is_fresh(self, precache: Path, clean: Path) -> bool:
        """Same size and time of change as the commit, and, where it says so, made from it."""
        with opened(clean) as fd:
            current, commit = os.fstat(fd), files.identity(fd)
        ready = precache.lstat()
        base = get_tag(precache, "base")
        return (
            ready.st_size == current.st_size
            and ready.st_mtime_ns == current.st_mtime_ns
            and base in ("", commit)
        )


class Clones(RunningData):
    """Running data is a clone of the commit, and becomes the next one as it is."""

    def __init__(self, commits: Commits, ready: ReadyCopies) -> None:
        self._commits = commits
        self._ready = ready

    def start(
        self, owner: str, boot_id: str, present: Present, source: Path, cancel: Cancel
    ) -> Path:
        dirty = present.path(Role.DIRTY)
        precache = present.roles.get(Role.PRECACHE)
        if precache is not None:
            if self._ready.is_fresh(precache, source):
                with opened(precache, os.O_RDWR) as fd:
                    base = get_tag(fd, "base")
                    mark_running(fd, owner, boot_id, base)
                    os.fsync(fd)
                failpoints.hit("storage.start.before_rename")
                precache.rename(dirty)
                fsync_directory(present.directory)
                failpoints.hit("storage.start.after_rename")
                return dirty
            drop_ready_copy(present)
        with opened(source) as fd, fresh(dirty) as file:
            files.copy(fd, file.fd, os.fstat(fd).st_size, cancel)
            mark_running(file.fd, owner, boot_id, files.identity(fd))
            file.publish("storage.start")
        return dirty

    def commit(
        self, owner: str, present: Present, volume: Volume, running: Path, cancel: Cancel
    ) -> None:
        self._commits.mark("storage.stop", running, owner, "")
        self._commits.commit_file("storage.stop", owner, present, volume, running)

    def resize(self, running: Path, size: int) -> None:
        files.resize_raw(running, size)
