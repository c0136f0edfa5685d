"""The policy directories of a host: which files there are, what is in them.

Owns reading of the directories below an instance's root. Must not know what rules mean.
Invariant: a file that cannot be read is an error, never a file that is not there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from bulkhead.config import Settings
from bulkhead.model.policy import Directory

_SIZE_LIMIT = 1024 * 1024
_FILE_LIMIT = 10_000

Stamp = tuple[tuple[str, int, int, int], ...]


class PolicyFiles:
    """Files below the directories, the first directory going before the second.

    legacy: where `!compat-4.0` finds the files of release 4.0.
    """

    def __init__(self, directories: Iterable[Path], legacy: Path | None = None) -> None:
        self._directories = tuple(directories)
        self._legacy = legacy

    @classmethod
    def of(cls, settings: Settings) -> PolicyFiles:
        """What is in run/ hides what has the same name in etc/."""
        return cls(
            (settings.run_dir / "qubes/policy.d", settings.etc_dir / "policy.d"),
            settings.etc_dir.parent / "qubes-rpc/policy",
        )

    @property
    def directories(self) -> tuple[Path, ...]:
        """The directories, there or not."""
        return self._directories

    def stamp(self) -> Stamp:
        """Names, sizes and times: another value after any change. OSError."""
        watched = (*self._directories, self._legacy) if self._legacy else self._directories
        return tuple(
            (str(path), status.st_mtime_ns, status.st_size, status.st_ino)
            for directory in watched
            for path in _paths(directory)
            if (status := path.stat())
        )

    def read(self) -> tuple[tuple[Directory, ...], Directory]:
        """The directories and the legacy one. OSError, ValueError for what is no text."""
        legacy = _directory(self._legacy) if self._legacy else Directory("", {})
        return tuple(_directory(path) for path in self._directories), legacy


def _directory(directory: Path) -> Directory:
    found = {}
    for path in _paths(directory):
        if path.stat().st_size > _SIZE_LIMIT:
            raise ValueError(f"{path} is larger than {_SIZE_LIMIT} bytes")
        try:
            found[str(path.relative_to(directory))] = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text: {error}") from error
    return Directory(str(directory), found)


def _paths(directory: Path) -> list[Path]:
    if not directory.exists():
        return []
    found = []
    for place, _, names in os.walk(directory, onerror=_raise):
        for path in (Path(place, name) for name in names):
            if path.is_file():
                found.append(path)
                if len(found) > _FILE_LIMIT:
                    raise ValueError(f"{directory} has more than {_FILE_LIMIT} files")
            elif path.is_symlink():
                raise ValueError(f"{path} is a link to nothing")
    return sorted(found)


def _raise(error: OSError) -> None:
    """A folder that cannot be listed is an error, not an empty one."""
    raise error
