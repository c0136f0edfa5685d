"""Real file systems for tests: made on sparse files, mounted through loop devices.

Owns mkfs, mount and the clean-up, also of what a killed test run left. Must not know
what is tested. Invariant: a mount made here lies below a directory that names the
process that made it, and is gone when that process is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "bulkhead-fs-"
_MKFS = {
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "ext4": ["mkfs.ext4", "-q", "-F"],
}
# What mkfs accepts at least, in MiB.
SMALLEST = {"xfs": 320, "btrfs": 128, "ext4": 16, "tmpfs": 4}


def _run(*command: str) -> None:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": "/usr/sbin:/sbin:/usr/bin:/bin"},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _mounts_below(directory: Path) -> list[str]:
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        place = line.split(" ")[1].encode().decode("unicode_escape")
        if place.startswith(f"{directory}/"):
            found.append(place)
    return sorted(found, reverse=True)


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def clear_leftovers() -> None:
    """Unmount and remove what dead test processes left."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = directory.name.removeprefix(_PREFIX).split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            _remove(directory)


def _remove(directory: Path) -> None:
    for place in _mounts_below(directory):
        subprocess.run(["umount", "-l", place], capture_output=True)
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def mounted(kind: str, size_mib: int = 1024) -> Iterator[Path]:
    """The mount point of a new, empty file system "xfs", "btrfs", "ext4" or "tmpfs"."""
    clear_leftovers()
    directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    # Services under users of their own reach the mount through it.
    directory.chmod(0o755)
    try:
        place = directory / "mnt"
        place.mkdir()
        size = max(size_mib, SMALLEST[kind])
        if kind == "tmpfs":
            _run("mount", "-t", "tmpfs", "-o", f"size={size}m", "none", str(place))
        else:
            image = directory / "image"
            with image.open("wb") as file:
                file.truncate(size << 20)
            _run(*_MKFS[kind], str(image))
            _run("mount", "-o", "loop", str(image), str(place))
        place.chmod(0o755)
        yield place
    finally:
        _remove(directory)
