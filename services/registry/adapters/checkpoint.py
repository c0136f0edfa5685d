"""The files of the state directory: qubes.xml and the notes.

Owns how they are replaced and what stands beside them. Must not know the journal or
what the bytes mean. Invariant: qubes.xml is replaced only while it is the file that the
registry wrote last; every other file in its place stays.
"""

from __future__ import annotations

import contextlib
import grp
import hashlib
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from bulkhead.durable import fsync_directory, unlink, write_file
from bulkhead.failpoints import hit
from services.registry import failpoint_table as _rows  # noqa: F401  (declares the names)

FILE_MODE = 0o660
FILE_GROUP = "qubes"
NOTES_MODE = 0o660
# What 4.4 would read at most is far below this; a larger file is no store.
LARGEST_FILE = 512 * 1024 * 1024
_LARGEST_NOTES = 256 * 1024

_Identity = tuple[int, int, int, int, int]


class ForeignEdit(Exception):
    """qubes.xml is not the file that the registry wrote last."""


class StoreFile:
    """qubes.xml. Not thread safe: one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: tuple[_Identity, str] | None = None  # identity, sha256 (hex)

    def read(self) -> bytes | None:
        """The whole file, None when it is missing. OSError when it is no readable
        regular file."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
                raise OSError(f"{self.path} is no regular file of a possible size")
            data = file.read()
            self._known = (_identity(status), hashlib.sha256(data).hexdigest())
        return data

    def sha256(self) -> str:
        """Hex hash of the file as it is now, "" = missing. Reads it only when something
        about it has changed since the last time."""
        try:
            status = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return ""
        if self._known is not None and self._known[0] == _identity(status):
            return self._known[1]
        data = self.read()
        return "" if data is None else hashlib.sha256(data).hexdigest()

    def replace(self, document: bytes, sha256: str, expected: str) -> None:
        """Put the document in place durably. sha256: its hash; expected: the hash that
        the present file must have ("" = missing). ForeignEdit, OSError: the present file
        is untouched and the temporary is gone."""
        temporary = self.path.with_name(f"{self.path.name}~{secrets.token_hex(6)}")
        fd = os.open(
            temporary,
            os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW,
            FILE_MODE,
        )
        try:
            try:
                os.fchmod(fd, FILE_MODE)
                _give_to_group(fd)
                view = memoryview(document)
                while view:
                    view = view[os.write(fd, view) :]
                hit("registry.checkpoint.before_fsync")
                os.fsync(fd)
                hit("registry.checkpoint.before_rename")
                if self.sha256() != expected:
                    raise ForeignEdit(f"{self.path} was changed by another program")
                temporary.rename(self.path)
                self._known = (_identity(os.fstat(fd)), sha256)
            finally:
                os.close(fd)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            raise
        hit("registry.checkpoint.after_rename")
        fsync_directory(self.path.parent)

    def keep_beside(self, label: str) -> Path:
        """Rename the file to "qubes.xml.LABEL" (with a number if that exists), durably."""
        target = _free_name(self.path, label)
        self.path.rename(target)
        fsync_directory(self.path.parent)
        self._known = None
        return target

    def copy_beside(self, label: str, content: bytes) -> Path:
        """Write the content to "qubes.xml.LABEL" (with a number if that exists)."""
        target = _free_name(self.path, label)
        write_file(target, content, FILE_MODE)
        return target

    def drop_temporaries(self) -> None:
        """Remove what an interrupted replace() left."""
        for left in self.path.parent.glob(f"{self.path.name}~*"):
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                left.unlink()


_DATABASE_FILES = ("", "-wal", "-shm")


def set_aside(path: Path, label: str) -> Path:
    """Rename a database and the files that belong to it ("-wal", "-shm"), durably;
    returns the database's new name.

    Killed in the middle, the database itself is away and set_aside_orphans() has to
    follow: a log left in its place would be taken for that of the next database.
    """
    target = _free_name(path, label)
    for suffix in _DATABASE_FILES:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(target.with_name(target.name + suffix))
        if not suffix:
            hit("registry.load.during_set_aside")
    fsync_directory(path.parent)
    return target


def set_aside_orphans(path: Path, label: str) -> None:
    """Rename the files that belonged to a database which is not there any more."""
    if path.exists():
        return
    target = _free_name(path, label)
    for suffix in _DATABASE_FILES[1:]:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(target.with_name(target.name + suffix))


def _free_name(path: Path, label: str) -> Path:
    target = path.with_name(f"{path.name}.{label}")
    number = 1
    while target.exists() or target.is_symlink():
        number += 1
        target = path.with_name(f"{path.name}.{label}-{number}")
    return target


def _identity(status: os.stat_result) -> _Identity:
    # ctime cannot be set back by an editor, mtime can.
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _give_to_group(fd: int) -> None:
    try:
        gid = grp.getgrnam(FILE_GROUP).gr_gid
    except KeyError:
        return
    # Not a member of the group: 4.4's tools then read the file as root.
    with contextlib.suppress(PermissionError):
        os.fchown(fd, -1, gid)


class NotesFolder:
    """notes/UUID.txt. The journal holds the notes; these files are their copies for
    backups and for 4.4."""

    def __init__(self, folder: Path, qube_folders: Mapping[str, Path]) -> None:
        """qube_folders: class -> the folder that holds the qubes' own folders."""
        self._folder = folder
        self._qube_folders = qube_folders

    def present(self) -> dict[str, str]:
        """uuid -> notes of every file in the folder; unreadable ones are left out."""
        out: dict[str, str] = {}
        if self._folder.is_dir():
            for path in self._folder.glob("*.txt"):
                with contextlib.suppress(OSError, UnicodeDecodeError):
                    if not path.is_symlink():
                        out[path.stem] = path.read_bytes().decode()
        return out

    def older(self, klass: str, name: str) -> str:
        """The notes in notes.txt of the qube's own folder, as 4.4 keeps them; "" where
        there is no such regular file or it is not ours to read."""
        parent = self._qube_folders.get(klass)
        if parent is None:
            return ""
        try:
            fd = os.open(parent / name / "notes.txt", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            with os.fdopen(fd, "rb") as file:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    return ""
                return file.read(_LARGEST_NOTES).decode()
        except (OSError, UnicodeDecodeError):
            return ""

    def write(self, uuid: str, notes: str) -> None:
        """Replace one qube's notes durably; "" removes the file. OSError."""
        path = self._folder / f"{uuid}.txt"
        if notes:
            self._folder.mkdir(mode=0o710, exist_ok=True)
            hit("registry.notes.before_write")
            write_file(path, notes.encode(), NOTES_MODE)
            hit("registry.notes.after_write")
        else:
            hit("registry.notes.before_remove")
            unlink(path)
            hit("registry.notes.after_remove")

    def link(self, uuid: str, klass: str, name: str) -> None:
        """notes.txt -> ../../notes/UUID.txt in the qube's own folder, where that exists
        and is ours to write; a file of that name that is no link of ours stays."""
        parent = self._qube_folders.get(klass)
        if parent is None:
            return
        place = parent / name / "notes.txt"
        target = os.path.relpath(self._folder / f"{uuid}.txt", place.parent)
        with contextlib.suppress(OSError):
            if place.is_symlink():
                if str(place.readlink()) == target:
                    return
                place.unlink()
            place.symlink_to(target)
