"""One registry per state directory.

Owns the lock file "registry.lock" in it. Must not know what the directory holds.
Invariant: the lock is taken before anything in the directory is read or changed, and
the kernel drops it when the process dies, however it dies.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

LOCK_NAME = "registry.lock"


class AlreadyLocked(RuntimeError):
    """Another process has the state directory; the message says which."""


class StateLock:
    """The held lock."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, state_dir: Path) -> StateLock:
        """Lock the directory. AlreadyLocked when another process holds it, OSError when
        the directory is missing or not ours."""
        path = state_dir / LOCK_NAME
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise AlreadyLocked(
                f"another registry (process {holder}) serves {state_dir}; "
                f"stop it before starting a second one"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return cls(fd)

    def release(self) -> None:
        """Give the directory free."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
