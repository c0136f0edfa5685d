"""File steps that the directory drivers share: tags, clones, sparse copies, new files.

Owns system calls on single files. Must not know volumes. Invariant: a file bears its
final name only when its tags and bytes are durable; an unfinished one is called
"<final name>~<random>" and is removed by whoever fails.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import platform
import secrets
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from bulkhead import failpoints
from bulkhead.durable import fsync_directory

# _IOW(0x94, 9, int): the write bit is elsewhere on these machines.
_FICLONE = 0x80049409 if platform.machine().startswith(("ppc", "mips", "sparc")) else 0x40049409
_LOOP_SET_CAPACITY = 0x4C07
_NO_REFLINK = frozenset(
    {errno.EBADF, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.ENOSYS}
)
_NO_TAG = frozenset({errno.ENODATA, errno.EOPNOTSUPP})
# More than any file system gives to the tags of one file.
_TAGS_TAKE = 64 << 10
_CHUNK = 1 << 20
_STEP = 32 << 20
_ZERO = bytes(_CHUNK)
_ZERO_RUN = 64 << 10

TAG = "user.bulkhead."
DISK_GROUP = "bulkhead-disk"


class Checked(Protocol):
    """Something that raises when a long copy shall end."""

    def check(self) -> None: ...


# ---- tags


def get_tag(file: int | Path, name: str) -> str:
    """The value of user.bulkhead.<name>, "" when absent."""
    try:
        return os.getxattr(file, TAG + name).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        if error.errno in _NO_TAG:
            return ""
        raise


def set_tags(file: int | Path, tags: Mapping[str, str]) -> None:
    """Set user.bulkhead.* tags (not yet durable); an empty value removes the tag."""
    for name, value in tags.items():
        if value:
            os.setxattr(file, TAG + name, value.encode())
        else:
            try:
                os.removexattr(file, TAG + name)
            except OSError as error:
                if error.errno not in _NO_TAG:
                    raise


def new_identity() -> str:
    """A random id for one committed state."""
    return secrets.token_hex(8)


def identity(fd: int) -> str:
    """The id of the committed state in an open file; one without a tag (made by 4.4) is
    known by inode and time of change."""
    tagged = get_tag(fd, "commit")
    if tagged:
        return tagged
    status = os.fstat(fd)
    return f"{status.st_dev:x}:{status.st_ino}:{status.st_mtime_ns}"


# ---- rights


def disk_gid() -> int | None:
    """gid of the group that QEMU's user belongs to, None where it does not exist."""
    try:
        return grp.getgrnam(DISK_GROUP).gr_gid
    except KeyError:
        return None


def share_with_guests(fd: int, mode: int) -> None:
    """Give an image or directory to the disk group with mode; private to us where there
    is no such group, or we are not in it."""
    gid = disk_gid()
    if gid is not None:
        with contextlib.suppress(PermissionError):
            os.fchown(fd, -1, gid)
            os.fchmod(fd, mode)
            return
    os.fchmod(fd, mode & ~0o077 if not stat.S_ISDIR(os.fstat(fd).st_mode) else mode)


def make_directory(path: Path, settle: bool = True) -> bool:
    """A durable directory of mode 0710 for the disk group; False when it was there.

    settle False: the caller fsyncs the directory itself, after it put something in it.

    FileNotFoundError when its parent is missing, NotADirectoryError on anything else
    of that name.
    """
    try:
        path.mkdir(mode=0o710)
    except FileExistsError:
        if path.is_symlink() or not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
        return False
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        share_with_guests(fd, 0o710)
        if settle:
            os.fsync(fd)
    finally:
        os.close(fd)
    fsync_directory(path.parent)
    return True


# ---- new files


class Fresh:
    """A file under a temporary name. fd is open for reading and writing."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.path = final.with_name(f"{final.name}~{secrets.token_hex(6)}")
        self.fd = os.open(
            self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        self.published = False

    def rename(self) -> None:
        """Give the file its final name; the caller made it durable and does so with the name."""
        self.path.rename(self.final)
        self.published = True

    def publish(self, step: str) -> None:
        """Give the file its final name, durably. Failpoints step.before_rename, .after_rename."""
        os.fsync(self.fd)
        failpoints.hit(f"{step}.before_rename")
        self.rename()
        fsync_directory(self.final.parent)
        failpoints.hit(f"{step}.after_rename")


@contextlib.contextmanager
def fresh(final: Path) -> Iterator[Fresh]:
    """A Fresh for final, removed at the end unless it was published."""
    file = Fresh(final)
    try:
        yield file
    finally:
        os.close(file.fd)
        if not file.published:
            with contextlib.suppress(FileNotFoundError):
                file.path.unlink()


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor of an existing regular file, never through a link."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield fd
    finally:
        os.close(fd)


def used(path: Path) -> int:
    """Bytes that the file's data take. Some file systems count its tags with them: a file
    that is nothing but a hole takes none."""
    taken = path.lstat().st_blocks * 512
    if 0 < taken <= _TAGS_TAKE:
        with opened(path) as fd:
            try:
                os.lseek(fd, 0, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return 0
    return taken


# ---- copies


def ficlone(source: int, target: int) -> bool:
    """Make target share all blocks of source; False where the file system cannot."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _NO_REFLINK:
            return False
        raise
    return True


def extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts of the first size bytes that are no holes."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if start >= size:
            return
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, end
        at = end


def write_sparse(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write data at offset into a file that is zero there; runs of zeroes stay holes."""
    view = memoryview(data)
    zero = memoryview(_ZERO)
    while view:
        part = view[:_ZERO_RUN]
        if part != zero[: len(part)]:
            written = 0
            while written < len(part):
                written += os.pwrite(fd, part[written:], offset + written)
        offset += len(part)
        view = view[len(part) :]


def copy(source: int, target: int, size: int, cancel: Checked) -> bool:
    """Fill an empty target with the first size bytes of source; True when blocks are shared.

    Cancelling leaves a part in target. OSError as from the system.
    """
    cancel.check()
    if ficlone(source, target):
        if os.fstat(target).st_size != size:
            os.ftruncate(target, size)
        return True
    os.ftruncate(target, size)
    in_kernel = True
    for start, end in extents(source, min(size, os.fstat(source).st_size)):
        at = start
        while at < end:
            cancel.check()
            if in_kernel:
                try:
                    done = os.copy_file_range(source, target, min(_STEP, end - at), at, at)
                    if done:
                        at += done
                        continue
                except OSError as error:
                    if error.errno not in _NO_REFLINK | {errno.EPERM}:
                        raise
                in_kernel = False
            data = os.pread(source, min(_CHUNK, end - at), at)
            if not data:
                return False  # the source shrank: the rest stays zero
            write_sparse(target, data, at)
            at += len(data)
    return False


# ---- images and loop devices


def resize_loops(path: Path) -> None:
    """Tell every loop device on this file that its size has changed."""
    target = os.path.realpath(path)
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if backing.read_text().rstrip("\n") != target:
                continue
            device = Path("/dev") / backing.parent.parent.name
            fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # detached meanwhile
        try:
            fcntl.ioctl(fd, _LOOP_SET_CAPACITY)
        finally:
            os.close(fd)


def resize_raw(path: Path, size: int) -> None:
    """Give an image that a guest may work on another size, durably."""
    with opened(path, os.O_RDWR) as fd:
        os.ftruncate(fd, size)
        os.fsync(fd)
    resize_loops(path)


def image_size(path: Path) -> int:
    """Bytes that a guest sees of an image, by its ending qcow2 or raw."""
    if path.suffix == ".qcow2":
        with opened(path) as fd:
            return qcow2_size(fd)
    return path.lstat().st_size


def qcow2_size(fd: int) -> int:
    """Virtual size in bytes of a qcow2 image that we made. OSError EINVAL on another file."""
    header = os.pread(fd, 32, 0)
    if len(header) < 32 or header[:4] != b"QFI\xfb":
        raise OSError(errno.EINVAL, "not a qcow2 image")
    size: int = struct.unpack_from(">Q", header, 24)[0]
    return size
