"""The directories of a pool, and whose the files in them are.

Owns the look at a qube's directory, its making and its removal. Must not know commits,
runs or imports. Invariants: who changes a volume got it from open(), so it is the owner's
and free of a crashed call's unfinished files; a qube's directory is removed only while
nothing but links is in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from bulkhead import failpoints
from bulkhead.durable import fsync_directory
from bulkhead.model.records import Volume
from services.storage import failpoint_table  # noqa: F401  (declares what is hit here and by the parts)
from services.storage.core.names import Role
from services.storage.core.present import OWNED, Present, gather, require_committed
from services.storage.core.reasons import StorageRefusal
from services.storage.core.volumes import PREFIXES, Kind, Vid, kind_of, parse_vid
from services.storage.drivers import files
from services.storage.drivers.files import Fresh, fresh, get_tag

# Name of files that only try what the file system can do.
PROBE = ".bulkhead-probe"
# How often a qube's directory is made again that was taken away before a file was in it.
HOME_ATTEMPTS = 5


class Tree:
    """The pool's directory: <prefix>/<qube>/<files of its volumes>."""

    def __init__(self, pool: str, root: Path) -> None:
        self.pool = pool
        self.root = root

    def check(self) -> None:
        """POOL_UNUSABLE unless it is there, as far as its prefixes show."""
        for prefix in PREFIXES:
            path = self.root / prefix
            if not path.is_dir():
                raise StorageRefusal(
                    "POOL_UNUSABLE",
                    f"pool {self.pool}: {path} does not exist; is it mounted?",
                    pool=self.pool,
                    path=str(path),
                )

    # ---- looking

    def scan(self, vid: Vid) -> Present:
        """What exists of a volume, whoever owns it."""
        directory = self.root / vid.prefix / vid.qube
        try:
            entries = list(os.scandir(directory))
        except FileNotFoundError:
            return Present(vid, directory)
        return gather(vid, directory, (e.name for e in entries if not e.is_symlink()))

    def open(self, owner: str, volume: Volume) -> Present:
        """What exists of the owner's volume, leftovers of crashed calls removed.

        VOLUME_FOREIGN when it is another owner's.
        """
        present = self.scan(parse_vid(volume.vid))
        stranger = self.stranger(owner, present, kind_of(volume))
        if stranger:
            raise StorageRefusal(
                "VOLUME_FOREIGN",
                f"the files of volume {volume.vid} in pool {self.pool} belong to the qube "
                f"with uuid {stranger}: nothing was touched",
                volume=volume.vid,
                pool=self.pool,
                owner=stranger,
            )
        self.drop_temporaries(present)
        return present

    def committed(self, present: Present, volume: Volume) -> Path:
        """The file of the current state. SOURCE_RUNNING, VOLUME_NOT_FOUND."""
        return require_committed(present, volume, self.pool)

    def stranger(self, owner: str, present: Present, kind: Kind) -> str:
        """The first tag that is neither absent nor the owner's."""
        for role in OWNED:
            path = present.roles.get(role)
            if path is None or (
                # 4.4 gives a snapshot a second name of its source's commit.
                role is Role.CLEAN and kind is not Kind.ORIGIN and path.lstat().st_nlink > 1
            ):
                continue
            tag = get_tag(path, "owner")
            if tag and tag != owner:
                return tag
        return ""

    def owner_of(self, present: Present) -> str:
        """Whose volume it is by its tags; "" = nobody's."""
        for path in present.telling:
            if tag := get_tag(path, "owner"):
                return tag
        return ""

    # ---- changing

    def drop_temporaries(self, present: Present) -> None:
        """Unfinished files go, durably."""
        if not present.temporaries:
            return
        for path in present.temporaries:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        present.temporaries.clear()
        fsync_directory(present.directory)

    def make_home(self, present: Present) -> None:
        """The qube's directory exists; durable with the first file in it."""
        if not present.directory.is_dir():
            files.make_directory(present.directory, settle=False)
            failpoints.hit("storage.ensure.after_directory")

    @contextlib.contextmanager
    def first_file(self, present: Present) -> Iterator[Fresh]:
        """A new committed file in the qube's directory, which is made at need.

        The directory is locked by nobody, a volume is: a repeated removal of another volume
        of that directory may take it away while it is still empty. Then it is made again.
        """
        with contextlib.ExitStack() as stack:
            for left in reversed(range(HOME_ATTEMPTS)):
                try:
                    self.make_home(present)
                    file = stack.enter_context(fresh(present.path(Role.CLEAN)))
                    break
                except FileNotFoundError:
                    if not left:
                        raise
            yield file

    def remove_home(self, directory: Path) -> bool:
        """Remove the qube's directory when only links are left in it: they hold no data.

        True when it was removed here, durably.
        """
        try:
            entries = list(os.scandir(directory))
        except FileNotFoundError:
            return False
        if not all(entry.is_symlink() for entry in entries):
            return False
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                (directory / entry.name).unlink()
        failpoints.hit("storage.remove.before_rmdir")
        try:
            directory.rmdir()
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                return False  # another volume of the qube was made meanwhile
            raise
        fsync_directory(directory.parent)
        failpoints.hit("storage.remove.after_rmdir")
        return True
