"""The client's end of storage's data socket.

Owns connecting with a one-use ticket. Must not know who issued it. Invariant: a return
without an exception means that every byte is durable (import) or has arrived (export).
Blocking: call from a thread.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from bulkhead import transfer
from bulkhead.transfer import TransferError

__all__ = ["TransferError", "export_file", "export_volume", "import_file"]

_TIMEOUT_S = 60.0


@contextlib.contextmanager
def _connected(path: str | Path, ticket: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_TIMEOUT_S)
        connection.connect(str(path))
        connection.sendall(ticket.encode("ascii") + b"\n")
        yield connection


def _nothing(data: bytes, offset: int) -> None:
    raise TransferError(f"{len(data)} bytes came back at {offset}, none were expected")


def import_file(path: str | Path, ticket: str, fd: int, size: int) -> None:
    """Send the first size bytes of a regular file into an import.

    TransferError with the server's reason; OSError from the socket or the file.
    """
    with _connected(path, ticket) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            transfer.send_file(connection, fd, size)
        transfer.receive(connection, 0, _nothing)


def export_volume(
    path: str | Path,
    ticket: str,
    write: Callable[[bytes, int], None],
    hole: Callable[[int, int], None] = lambda _offset, _length: None,
) -> int:
    """Receive a volume: write(data, offset) for data, hole(offset, length) for zeroes.

    Returns the size in bytes. TransferError, OSError.
    """
    with _connected(path, ticket) as connection:
        return transfer.receive(connection, None, write, hole)


def export_file(path: str | Path, ticket: str, fd: int) -> int:
    """Receive a volume into an empty regular file, durably; returns its size in bytes."""
    size = export_volume(path, ticket, transfer.sparse_writer(fd))
    os.ftruncate(fd, size)
    os.fsync(fd)
    return size
