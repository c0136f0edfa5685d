"""Notes that outlive this process but not the host: what is applied, up, unannounced.

Owns small JSON files below one volatile directory. Must not know what they mean.
Invariant: a note is whole or absent while the host runs; nothing is forced to the disk,
because after a start of the host no note means anything. All methods block shortly.
"""

from __future__ import annotations

import json
import secrets
import uuid as uuids
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KINDS: tuple[str, ...] = ("applied", "netvms", "pending")


class StateFiles:
    """Notes DIRECTORY/KIND/UUID.json."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        for kind in KINDS:
            (directory / kind).mkdir(parents=True, exist_ok=True)

    def _path(self, kind: str, uuid: str) -> Path:
        if kind not in KINDS:
            raise KeyError(kind)
        return self._directory / kind / f"{uuids.UUID(uuid)}.json"

    def save(self, kind: str, uuid: str, note: Mapping[str, Any]) -> None:
        """Replace the note. OSError."""
        _replace(self._path(kind, uuid), json.dumps(note).encode())

    def delete(self, kind: str, uuid: str) -> None:
        """Remove the note, if there is one."""
        self._path(kind, uuid).unlink(missing_ok=True)

    def load(self, kind: str) -> dict[str, dict[str, Any]]:
        """uuid -> note. Leftovers of a killed write are removed; a note that is not JSON
        is left out (it was never whole, so nothing was answered for it)."""
        notes: dict[str, dict[str, Any]] = {}
        for path in sorted((self._directory / kind).iterdir()):
            if "~" in path.name:
                path.unlink(missing_ok=True)
                continue
            try:
                notes[path.stem] = json.loads(path.read_bytes())
            except ValueError:
                continue
        return notes

    def started(self) -> bool:
        """True once mark_started() was called in the life of this directory (one boot)."""
        return (self._directory / "started").exists()

    def mark_started(self) -> None:
        """What has to be done once per boot is done."""
        _replace(self._directory / "started", b"")


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}~{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(data)
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
