"""Bytes of a volume over a unix stream socket: frames that know holes.

Owns the frame format and the two ends' loops on a connected, blocking socket with a
timeout. Must not know tickets, volumes or who is at the other end. Invariant: a receiver
reports success only after exactly the announced number of bytes and the end frame.

A frame is one letter and an unsigned 64-bit big-endian number:
  D n   n bytes of data follow (1 .. 1 MiB)
  H n   n zero bytes, not sent
  E n   end; n = size of the whole
  X n   failure; n bytes of UTF-8 text follow (at most 1 KiB)
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator

_HEADER = struct.Struct("!cQ")
DATA_LIMIT = 1 << 20
_TEXT_LIMIT = 1 << 10
_ZERO = bytes(64 << 10)


class TransferError(Exception):
    """The transfer broke; the message says how, the bytes so far are worthless."""


def _extents(fd: int, size: int) -> Iterator[tuple[int, int, bool]]:
    """(start, end, is data) over the first size bytes, without a gap."""
    at = 0
    while at < size:
        try:
            start = min(os.lseek(fd, at, os.SEEK_DATA), size)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            start = size
        if start > at:
            yield at, start, False
        if start == size:
            return
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, at, True


def send_file(
    connection: socket.socket, fd: int, size: int, check: Callable[[], None] = lambda: None
) -> None:
    """Send the first size bytes of a regular file. check() may raise to give up.

    TransferError when the file is shorter; OSError as from the system.
    """
    for start, end, is_data in _extents(fd, size):
        check()
        if not is_data:
            connection.sendall(_HEADER.pack(b"H", end - start))
            continue
        at = start
        while at < end:
            check()
            data = os.pread(fd, min(DATA_LIMIT, end - at), at)
            if not data:
                raise TransferError("the file became shorter while it was sent")
            connection.sendall(_HEADER.pack(b"D", len(data)))
            connection.sendall(data)
            at += len(data)
    connection.sendall(_HEADER.pack(b"E", size))


def send_end(connection: socket.socket, size: int) -> None:
    """Tell the other end that all is well."""
    connection.sendall(_HEADER.pack(b"E", size))


def send_failure(connection: socket.socket, text: str) -> None:
    """Tell the other end why it failed."""
    data = text.encode()[:_TEXT_LIMIT]
    connection.sendall(_HEADER.pack(b"X", len(data)) + data)


def receive_exactly(connection: socket.socket, count: int) -> bytes:
    """count bytes. TransferError when the other end closes before."""
    parts = bytearray()
    while len(parts) < count:
        data = connection.recv(min(count - len(parts), DATA_LIMIT))
        if not data:
            raise TransferError("the other end closed the connection too early")
        parts += data
    return bytes(parts)


def receive(
    connection: socket.socket,
    size: int | None,
    write: Callable[[bytes, int], None],
    hole: Callable[[int, int], None] = lambda _offset, _length: None,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Read frames up to the end; returns the size.

    write(data, offset) gets what was sent, hole(offset, length) what is zero. size: what
    must arrive, None = whatever comes. TransferError on anything malformed, too short or
    too long, and with the text of a failure frame.
    """
    at = 0
    while True:
        check()
        letter, number = _HEADER.unpack(receive_exactly(connection, _HEADER.size))
        if letter == b"D" and 0 < number <= DATA_LIMIT:
            if size is not None and at + number > size:
                raise TransferError(f"more than the announced {size} bytes were sent")
            write(receive_exactly(connection, number), at)
            at += number
        elif letter == b"H":
            if number > (1 << 62) - at or (size is not None and at + number > size):
                raise TransferError(f"more than the announced {size} bytes were sent")
            hole(at, number)
            at += number
        elif letter == b"E":
            if number != at or (size is not None and at != size):
                raise TransferError(f"{at} bytes were sent, {size or number} were announced")
            return at
        elif letter == b"X" and number <= _TEXT_LIMIT:
            text = receive_exactly(connection, number).decode("utf-8", "replace")
            raise TransferError(text)
        else:
            raise TransferError("a malformed frame was sent")


def sparse_writer(fd: int) -> Callable[[bytes, int], None]:
    """A write() for receive() into an empty file: runs of zeroes stay holes."""

    def write(data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            part = view[: len(_ZERO)]
            if part != _ZERO[: len(part)]:
                done = 0
                while done < len(part):
                    done += os.pwrite(fd, part[done:], offset + done)
            offset += len(part)
            view = view[len(part) :]

    return write
