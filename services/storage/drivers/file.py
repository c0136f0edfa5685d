"""Driver file: files on a file system that cannot share blocks (ext4, tmpfs).

Owns overlays: running data is a qcow2 difference to a second name of the commit, so a
start costs nothing whatever the size; stop writes the whole new state beside the old one
and then renames it. Must not know qubes. Invariant: the file below an overlay is never
written to, however often its other names are replaced.
"""

# ruff: noqa: ARG002  (the interface's arguments, whether a driver needs them or not)

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

from bulkhead import failpoints
from bulkhead.durable import fsync_directory
from bulkhead.model.records import Pool, Volume
from services.storage.core.names import Role
from services.storage.core.present import Present
from services.storage.core.reasons import StorageRefusal
from services.storage.drivers import files
from services.storage.drivers.directory.commits import Commits
from services.storage.drivers.directory.driver import DirectoryDriver
from services.storage.drivers.directory.running_data import NextStart, RunningData, mark_running
from services.storage.drivers.files import Fresh, fresh, get_tag, opened, set_tags
from services.storage.drivers.interface import Cancel, DriverInfo

_SEARCH = "/usr/local/bin:/usr/bin:/bin"
_POLL_S = 0.2


class FileDriver(DirectoryDriver):
    """Running volumes are qcow2 overlays; revisions are whole files."""

    name = "file"
    clean_mode = 0o640  # QEMU reads it below an overlay
    parameters = ("revisions_to_keep", "dir_path", "ephemeral_volatile")

    def __init__(self, pool: Pool) -> None:
        program = QemuImg(pool.name, self.name)
        super().__init__(pool, Bases(), lambda commits: Overlays(commits, program))

    @classmethod
    def info(cls) -> DriverInfo:
        missing = shutil.which("qemu-img", path=_SEARCH) is None
        return DriverInfo(
            name=cls.name,
            parameters=cls.parameters,
            required=("dir_path",),
            why_not="qemu-img is not installed (package qemu-utils or qemu-img)" if missing else "",
            negative_revisions=True,
            resize_running=False,
        )

    def _check_backend(self) -> None:
        why_not = self.info().why_not
        if why_not:
            raise StorageRefusal(
                "POOL_UNUSABLE",
                f"driver {self.name} is not available on this host: {why_not}",
                pool=self.pool.name,
                driver=self.name,
            )


class Bases(NextStart):
    """An overlay needs no preparation; a base without one is a crashed start's."""

    def prepare(self, owner: str, present: Present, volume: Volume) -> None:
        self.drop_stale(present)

    def drop_stale(self, present: Present) -> None:
        if present.running is None and Role.BASE in present.roles:
            present.path(Role.BASE).unlink(missing_ok=True)


class Overlays(RunningData):
    """Running data is a difference to BASE, a second name of the commit."""

    def __init__(self, commits: Commits, program: QemuImg) -> None:
        self._commits = commits
        self._program = program

    def start(
        self, owner: str, boot_id: str, present: Present, source: Path, cancel: Cancel
    ) -> Path:
        base = present.path(Role.BASE)
        overlay = present.path(Role.OVERLAY)
        failpoints.hit("storage.start.before_base")
        self._name_base(source, base, cancel)
        failpoints.hit("storage.start.after_base")
        with opened(base) as fd:
            size, commit = os.fstat(fd).st_size, files.identity(fd)
        with fresh(overlay) as file:
            self._program.run(
                cancel,
                ["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", base.name],
                [str(file.path), str(size)],
            )
            mark_running(file.fd, owner, boot_id, commit)
            file.publish("storage.start")
        return overlay

    def _name_base(self, source: Path, base: Path, cancel: Cancel) -> None:
        """The second name keeps the commit's inode, whatever becomes of the first."""
        base.unlink(missing_ok=True)
        try:
            os.link(source, base, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EMLINK):
                raise
            # Another file system, or more names than one inode can bear: a copy will do.
            with opened(source) as fd, fresh(base) as file:
                files.copy(fd, file.fd, os.fstat(fd).st_size, cancel)
                set_tags(file.fd, {"commit": files.identity(fd)})
                files.share_with_guests(file.fd, self._commits.mode)
                os.fsync(file.fd)
                file.rename()
        fsync_directory(base.parent)

    def commit(
        self, owner: str, present: Present, volume: Volume, running: Path, cancel: Cancel
    ) -> None:
        clean = present.path(Role.CLEAN)
        if present.roles.get(Role.OVERLAY) != running:
            # A start in place, or a pool that the other driver had: it is whole as it is.
            self._commits.mark("storage.stop", running, owner, "")
            self._commits.commit_file("storage.stop", owner, present, volume, running)
            return
        commit = get_tag(running, "commit")
        if Role.CLEAN not in present.roles or get_tag(clean, "commit") != commit:
            self._commit_overlay(owner, present, volume, running, commit, cancel)
        self._discard_overlay(present)

    def _commit_overlay(
        self,
        owner: str,
        present: Present,
        volume: Volume,
        overlay: Path,
        commit: str,
        cancel: Cancel,
    ) -> None:
        """Write overlay and base as one new file; its id says which overlay it came from."""
        if Role.BASE not in present.roles:
            raise StorageRefusal(
                "POOL_UNUSABLE",
                f"the file below the running data of volume {volume.vid} is missing: "
                f"restore {present.path(Role.BASE)}; nothing was changed",
                volume=volume.vid,
                path=str(present.path(Role.BASE)),
            )
        with fresh(present.path(Role.CLEAN)) as file:
            self._flatten(overlay, file, cancel)
            set_tags(
                file.fd,
                {"owner": owner, "commit": commit, "boot": get_tag(overlay, "boot")},
            )
            files.share_with_guests(file.fd, self._commits.mode)
            os.fsync(file.fd)
            self._commits.commit("storage.stop", owner, present, volume, file.rename)

    def _flatten(self, overlay: Path, file: Fresh, cancel: Cancel) -> None:
        with opened(overlay) as fd:
            os.ftruncate(file.fd, files.qcow2_size(fd))
        self._program.run(
            cancel,
            ["convert", "-q", "-n", "--target-is-zero", "-f", "qcow2", "-O", "raw"],
            [str(overlay), str(file.path)],
        )

    def _discard_overlay(self, present: Present) -> None:
        failpoints.hit("storage.stop.before_discard")
        for role in (Role.OVERLAY, Role.BASE):  # never an overlay without its base
            present.path(role).unlink(missing_ok=True)
            fsync_directory(present.directory)
        failpoints.hit("storage.stop.after_discard")

    def resize(self, running: Path, size: int) -> None:
        if running.suffix != ".qcow2":
            files.resize_raw(running, size)
            return
        shrink = ["--shrink"] if size < files.image_size(running) else []
        self._program.run(
            Cancel(), ["resize", "-q", "-f", "qcow2", *shrink], [str(running), str(size)]
        )
        with opened(running, os.O_RDWR) as fd:
            os.fsync(fd)


class QemuImg:
    """The program that makes and reads overlays, run for one pool."""

    def __init__(self, pool: str, driver: str) -> None:
        self._pool = pool
        self._driver = driver

    def run(self, cancel: Cancel, command: list[str], operands: list[str]) -> None:
        """Run qemu-img to its end. StorageRefusal or OSError with what it said."""
        program = shutil.which("qemu-img", path=_SEARCH)
        if program is None:
            raise StorageRefusal(
                "POOL_UNUSABLE",
                f"pool {self._pool}: qemu-img is not installed",
                pool=self._pool,
                driver=self._driver,
            )
        process = subprocess.Popen(
            [program, *command, "--", *operands],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={"LC_ALL": "C", "PATH": _SEARCH},
            cwd="/",
        )
        try:
            while True:
                try:
                    _, errors = process.communicate(timeout=_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    cancel.check()
        except BaseException:
            process.kill()
            process.communicate()
            raise
        if process.returncode == 0:
            return
        said = errors.decode("utf-8", "replace").strip().splitlines()
        text = said[-1][:200] if said else f"ended with {process.returncode}"
        if any("No space left" in line for line in said):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if any(" lock" in line for line in said):
            raise StorageRefusal(
                "VOLUME_IN_USE",
                f"pool {self._pool}: the image {operands[0]} is open in another process; "
                "stop its qube first",
                pool=self._pool,
                path=operands[0],
            )
        raise StorageRefusal(
            "STORAGE_FAILED", f"qemu-img {command[0]} failed: {text}", cause=text, path=operands[0]
        )
