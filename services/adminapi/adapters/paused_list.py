"""The file that remembers, over a suspend of the host, which qubes were paused before.

Owns one file. Must not know qubes. Invariant: written durably before the first qube is
suspended, so that a crash in between wakes no qube that somebody had paused.
"""

from __future__ import annotations

from pathlib import Path

from bulkhead.durable import write_file


class PausedList:
    """Names of qubes, one per line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, names: list[str]) -> None:
        """Replace the list. OSError where it cannot be written."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self._path, "".join(f"{name}\n" for name in names).encode(), 0o640)

    def load(self) -> set[str] | None:
        """The list; None where there is none."""
        try:
            return set(self._path.read_text().split())
        except FileNotFoundError:
            return None

    def forget(self) -> None:
        """Take the list away; nothing happens where there is none."""
        self._path.unlink(missing_ok=True)
