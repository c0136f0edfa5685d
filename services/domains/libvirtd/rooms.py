"""The mount namespace in which a private libvirtd lives.

Owns what that libvirtd sees as /dev, /etc/libvirt, /etc/passwd, /run and its own state.
Must not know libvirt's settings. Invariant: nothing outside the namespace changes, and
the namespace of the next start sees the same files, so running guests are found again.
"""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS = 0x00020000
_MS_NOSUID, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4096, 16384, 1 << 18

# name, mode, major, minor; no kvm: what this libvirtd starts is emulated.
NODES: tuple[tuple[str, int, int, int], ...] = (
    ("null", 0o666, 1, 3),
    ("zero", 0o666, 1, 5),
    ("full", 0o666, 1, 7),
    ("random", 0o666, 1, 8),
    ("urandom", 0o666, 1, 9),
    ("tty", 0o666, 5, 0),
    ("console", 0o600, 5, 1),
    ("net/tun", 0o666, 10, 200),
)
LOOPS = 128


class RoomError(OSError):
    """The namespace could not be made; the message says which step and why."""


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise RoomError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2). RoomError when refused."""
    _check(
        _libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()),
        f"mount {kind or source} on {target}",
    )


def bind(source: Path, target: Path, recursive: bool = False) -> None:
    """Make target show source."""
    mount(str(source), str(target), "", _MS_BIND | (_MS_REC if recursive else 0))


def leave() -> None:
    """Enter a mount namespace of our own, of which nothing gets out."""
    _check(_libc.unshare(_CLONE_NEWNS), "a mount namespace of our own")
    mount("none", "/", "", _MS_REC | _MS_PRIVATE)


def with_child(directory: Path, name: str) -> Path:
    """directory/name, made inside the namespace only where the machine has none.

    The directory then becomes a small file system that shows everything it showed, and
    the new child. What appears in the machine's directory later is not seen.
    """
    child = directory / name
    if child.is_dir():
        return child
    before = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mode = stat.S_IMODE(os.fstat(before).st_mode)
        mount("tmpfs", str(directory), "tmpfs", _MS_NOSUID, f"mode={mode:o}")
        for entry in sorted(path.name for path in Path(f"/proc/self/fd/{before}").iterdir()):
            _show_again(before, entry, directory / entry)
    finally:
        os.close(before)
    child.mkdir(mode=0o755)
    return child


def _show_again(before: int, entry: str, target: Path) -> None:
    source = f"/proc/self/fd/{before}/{entry}"
    kind = os.stat(entry, dir_fd=before, follow_symlinks=False).st_mode
    if stat.S_ISLNK(kind):
        target.symlink_to(os.readlink(entry, dir_fd=before))
        return
    if stat.S_ISDIR(kind):
        target.mkdir()
    elif stat.S_ISREG(kind):
        target.touch()
    else:
        return  # sockets and pipes of others are nothing to us
    mount(source, str(target), "", _MS_BIND | _MS_REC)


def own_run(kept: Path, root: Path) -> None:
    """/run becomes kept; root stays where it is, also when it lies below /run."""
    outside = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        run = Path("/run").resolve()
        bind(kept, run)
        if run in root.resolve().parents:
            root.mkdir(parents=True, exist_ok=True)
            mount(f"/proc/self/fd/{outside}", str(root), "", _MS_BIND | _MS_REC)
    finally:
        os.close(outside)


def own_dev() -> None:
    """/dev with the few nodes that QEMU needs, without kvm."""
    before = os.open("/dev", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mount("tmpfs", "/dev", "tmpfs", _MS_NOSUID, "mode=755,size=1m")
        for name, mode, major, minor in NODES:
            path = Path("/dev") / name
            path.parent.mkdir(exist_ok=True)
            os.mknod(path, stat.S_IFCHR | mode, os.makedev(major, minor))
            path.chmod(mode)
        for number in range(LOOPS):
            path = Path(f"/dev/loop{number}")
            os.mknod(path, stat.S_IFBLK | 0o660, os.makedev(7, number))
            if (owner := _group_of(before, path.name)) is not None:
                os.chown(path, 0, owner)
        for name in ("pts", "shm", "mapper", "zvol"):
            if Path(f"/proc/self/fd/{before}/{name}").is_dir():
                _show_again(before, name, Path("/dev") / name)
        Path("/dev/ptmx").symlink_to("pts/ptmx")
        for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
            Path(f"/dev/{name}").symlink_to(f"/proc/self/fd/{number}")
        Path("/dev/fd").symlink_to("/proc/self/fd")
    finally:
        os.close(before)


def _group_of(directory: int, name: str) -> int | None:
    try:
        return os.stat(name, dir_fd=directory).st_gid
    except OSError:
        return None
