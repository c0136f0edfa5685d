"""One socket per calling qube, and the notes that let them outlive this process.

Owns the directory of those sockets. Must not know policy nor qubes. Invariant: a socket
is served only under a note of the uuid that it was made for, so a new qube of an old
name never inherits it; the note is durable before the socket is there and gone before
the socket is.
"""

from __future__ import annotations

import socket
from pathlib import Path

from bulkhead.durable import write_file
from services.adminapi.adapters.gateway import bind_socket

# Longest path that fits sockaddr_un with its NUL.
_PATH_LIMIT = 107


class CallerSockets:
    """QUBE.sock and QUBE.uuid below one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, name: str) -> Path:
        """Where the socket of a qube of that (checked) name is."""
        return self._directory / f"{name}.sock"

    def _note(self, name: str) -> Path:
        return self._directory / f"{name}.uuid"

    def noted(self) -> dict[str, str]:
        """name -> uuid of every socket that was asked for; sockets without note are removed."""
        if not self._directory.is_dir():
            return {}
        notes = {p.stem: p.read_text("ascii").strip() for p in self._directory.glob("*.uuid")}
        for path in self._directory.glob("*.sock"):
            if path.stem not in notes:
                path.unlink(missing_ok=True)
        return notes

    def open(self, name: str, uuid: str) -> socket.socket:
        """A listening socket, mode 0770, for the qube. OSError where it cannot be made."""
        path = self.path(name)
        length = len(str(path).encode())
        if length > _PATH_LIMIT:
            raise OSError(f"{path} has {length} bytes, a socket's path at most {_PATH_LIMIT}")
        write_file(self._note(name), uuid.encode() + b"\n", 0o600)
        return bind_socket(path)

    def forget(self, name: str) -> None:
        """Remove note and socket; nothing where there is none."""
        self._note(name).unlink(missing_ok=True)
        self.path(name).unlink(missing_ok=True)
