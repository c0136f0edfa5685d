"""Can this file system clone files by reference?

Owns the question alone; storage's drivers own cloning. Invariant: asking leaves nothing
behind, because the probe's files never have a name.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

FICLONE = 0x40049409


def can_share_blocks(directory: Path) -> bool:
    """True when FICLONE works between two files of the directory; False on any failure."""
    flags = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
    try:
        source = os.open(directory, flags, 0o600)
    except OSError:
        return False
    try:
        target = os.open(directory, flags, 0o600)
        try:
            os.write(source, b"\0" * 4096)
            fcntl.ioctl(target, FICLONE, source)
        except OSError:
            return False
        finally:
            os.close(target)
    finally:
        os.close(source)
    return True
