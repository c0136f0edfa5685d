"""The policy directories: which files there are, what is in them, when they changed.

Owns reading of two directories. Must not know what rules mean. Invariant: a file in the
first directory hides the one of the same name in the second, and a file that cannot be
read is an error, never a file that is not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_SIZE_LIMIT = 1024 * 1024
_FILE_LIMIT = 10_000

Stamp = tuple[tuple[str, int, int, int], ...]


class PolicyFiles:
    """Files below the directories, the first one going before the second."""

    def __init__(self, directories: Iterable[Path]) -> None:
        self._directories = tuple(directories)

    def stamp(self) -> Stamp:
        """Names, sizes and times: another value after any change. OSError."""
        return tuple(
            (str(path), status.st_mtime_ns, status.st_size, status.st_ino)
            for path in self._paths().values()
            if (status := path.stat())
        )

    def read(self) -> dict[str, str]:
        """Path below its directory -> text. OSError, ValueError for what is no text."""
        found = {}
        for name, path in self._paths().items():
            if path.stat().st_size > _SIZE_LIMIT:
                raise ValueError(f"{path} is larger than {_SIZE_LIMIT} bytes")
            found[name] = path.read_text("utf-8")
        return found

    def _paths(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for directory in self._directories:
            if not directory.is_dir():
                continue
            for path in sorted(directory.rglob("*")):
                if path.is_file():
                    found.setdefault(str(path.relative_to(directory)), path)
                    if len(found) > _FILE_LIMIT:
                        raise ValueError(f"{directory} has more than {_FILE_LIMIT} files")
        return found
