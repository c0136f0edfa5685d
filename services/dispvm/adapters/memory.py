"""How much memory the host has left, as the memory manager writes it.

Owns one small file that another process replaces atomically. Invariant: what cannot be
read is not known, which is not the same as nothing left.
"""

from __future__ import annotations

from pathlib import Path


class AvailableMemory:
    """The memory manager's file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> int | None:
        """Bytes available; None where the file is missing or holds no number."""
        try:
            untrusted_text = self.path.read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return int(untrusted_text[:20]) if untrusted_text.isdecimal() else None
