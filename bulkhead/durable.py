"""File changes that survive a power cut.

Owns the order write - fsync - rename - fsync(directory). Must not know what the files
mean. Invariant: at every instant the target name holds the whole old or the whole new
content, or nothing if there was none.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def fsync_directory(directory: Path) -> None:
    """Make renames and unlinks in the directory durable. OSError as from fsync."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes, mode: int = 0o600, *, forced: bool = True) -> None:
    """Replace path atomically and durably; the temporary is removed on failure.

    The temporary is "<name>~<random>" in the same directory. OSError as from the
    system; the old content is then untouched. forced False: for what means nothing after
    a power cut, which may leave the file torn; a kill leaves it whole.
    """
    with replacing(path, mode, forced=forced) as fd:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o600, *, forced: bool = True) -> Iterator[int]:
    """A descriptor to write the new content of path to; renamed into place on success.
    forced: as in write_file()."""
    temporary = path.with_name(f"{path.name}~{secrets.token_hex(6)}")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        try:
            os.fchmod(fd, mode)
            yield fd
            if forced:
                os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    if forced:
        fsync_directory(path.parent)


def rename(source: Path, target: Path) -> None:
    """Rename within one file system, durably on both directories."""
    source.rename(target)
    fsync_directory(target.parent)
    if source.parent != target.parent:
        fsync_directory(source.parent)


def unlink(path: Path) -> bool:
    """Remove the file durably; False when it was not there."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    fsync_directory(path.parent)
    return True
