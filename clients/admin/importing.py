"""A volume's data, from a stream into the place that ImportBegin names.

Owns counting, holes and durability of the copy. Must not know who asked for the import,
nor how its end is told. Invariant: the copy succeeds only if the stream brought exactly
the announced bytes and all of them are durable.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

CHUNK = 1 << 20
BLOCK = 4096
_ZEROS = bytes(BLOCK)
_ZERO_PIECE = bytes(CHUNK)

# Called with (bytes done, bytes in all).
Progress = Callable[[int, int], object]


class DataError(ValueError):
    """The stream has fewer or more bytes than were announced; the message says which."""


def _silent(_done: int, _size: int) -> None:
    """No progress is shown."""


def copy_data(source: IO[bytes], path: Path, size: int, progress: Progress = _silent) -> None:
    """Write exactly size bytes of source to an existing file or device, blocks of zeros as
    holes, and make them durable. DataError, OSError.

    source is unbuffered; the target is neither made nor cut.
    """
    with path.open("r+b", buffering=0) as target:
        done = 0
        for piece in pieces(source, size):
            _write_sparse(target, done, piece)
            done += len(piece)
            progress(done, size)
        os.fsync(target.fileno())


def pieces(source: IO[bytes], size: int) -> Iterator[bytes]:
    """The stream in pieces of at most CHUNK bytes. DataError unless it has exactly size."""
    left = size
    while left:
        piece = source.read(min(CHUNK, left))
        if not piece:
            raise DataError(f"the data end after {size - left} of {size} bytes")
        left -= len(piece)
        yield piece
    if source.read(1):
        raise DataError(f"there are more than the announced {size} bytes")


def failure(error: BaseException) -> bytes:
    """The payload that ends an import as failed: "fail", and the reason in ASCII."""
    reason = f"{type(error).__name__}: {error}".encode("ascii", "replace")[:500]
    return b"fail\n" + reason


def _write_sparse(target: IO[bytes], offset: int, piece: bytes) -> None:
    """Write what is not zero; a fresh import target reads as zeros where nothing is written."""
    # Comparing and searching whole pieces is what keeps pace with the disk.
    if piece == _ZERO_PIECE[: len(piece)]:
        return
    if _ZEROS not in piece:
        _write_all(target, offset, piece)
        return
    start: int | None = None
    for at in range(0, len(piece), BLOCK):
        block = piece[at : at + BLOCK]
        if block == _ZEROS[: len(block)]:
            if start is not None:
                _write_all(target, offset + start, piece[start:at])
                start = None
        elif start is None:
            start = at
    if start is not None:
        _write_all(target, offset + start, piece[start:])


def _write_all(target: IO[bytes], offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(target.fileno(), view, offset)
        offset += written
        view = view[written:]
