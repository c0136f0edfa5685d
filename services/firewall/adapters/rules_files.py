"""The rules files: one per qube, named by its uuid.

Owns the directory. Must not know what the files say. Invariant: a file is whole, old
or new, at every instant, and no other name is ever read or written. All methods block:
call them in a thread.
"""

from __future__ import annotations

import contextlib
import os
import uuid as uuids
from pathlib import Path

from bulkhead import durable, failpoints
from services.firewall import failpoint_table  # noqa: F401  (declares the rows)

_SUFFIX = ".xml"
_READ_LIMIT = 8 * 1024 * 1024


class RulesFiles:
    """Files DIRECTORY/UUID.xml, mode 0600."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _path(self, uuid: str) -> Path:
        return self._directory / f"{uuids.UUID(uuid)}{_SUFFIX}"

    def read(self, uuid: str) -> bytes | None:
        """The file's bytes; None when the qube has the default rules. OSError."""
        try:
            fd = os.open(self._path(uuid), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as file:
            return file.read(_READ_LIMIT)

    def write(self, uuid: str, data: bytes) -> None:
        """Replace the file durably. OSError: the old one is untouched."""
        failpoints.hit("firewall.rules.before_write")
        durable.write_file(self._path(uuid), data)
        failpoints.hit("firewall.rules.after_write")

    def restore(self, uuid: str, data: bytes | None) -> None:
        """Bring back what was there before; None: there was no file."""
        failpoints.hit("firewall.restore.before_write")
        if data is None:
            durable.unlink(self._path(uuid))
        else:
            durable.write_file(self._path(uuid), data)
        failpoints.hit("firewall.restore.after_write")

    def delete(self, uuid: str) -> None:
        """Remove the file; one that is not there is no error."""
        failpoints.hit("firewall.rules.before_delete")
        durable.unlink(self._path(uuid))
        failpoints.hit("firewall.rules.after_delete")

    def uuids(self) -> tuple[str, ...]:
        """The qubes that have a file, sorted. Leftovers of a killed write are removed."""
        found: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(self._directory.iterdir()):
                if "~" in path.name:
                    path.unlink(missing_ok=True)
                elif path.suffix == _SUFFIX and _is_uuid(path.stem):
                    found.append(path.stem)
        return tuple(found)


def _is_uuid(text: str) -> bool:
    try:
        return str(uuids.UUID(text)) == text
    except ValueError:
        return False
