"""The files of the audit log: write, fsync, rotate, find the end again.

Owns audit-NNNNNN.jsonl in one directory. Must not know what the records mean. Invariant:
a file only grows, by whole lines; what a crash or a full disk left of a write is cut off
before the next one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bulkhead.durable import fsync_directory
from bulkhead.failpoints import hit
from bulkhead.model.auditlog import AuditBroken, Head, make_line, read_line
from services.adminapi import failpoint_table as _rows  # noqa: F401  (declares the names)

ROTATE_BYTES = 16 * 1024 * 1024
_PATTERN = "audit-[0-9][0-9][0-9][0-9][0-9][0-9].jsonl"
# The longest line: two columns of the registry, each bounded, and the rest.
_LINE_LIMIT = 4 * 1024 * 1024


class AuditFile:
    """The open end of the log. OSError as from the system; then use a new object."""

    def __init__(self, directory: Path, rotate_bytes: int = ROTATE_BYTES) -> None:
        self._directory = directory
        self._rotate_bytes = rotate_bytes
        self._number = 1
        self._fd = -1
        self._size = 0
        self.head = Head()
        # What a crash or somebody else left at the end, for the first new record.
        self.finding = ""

    def open(self) -> None:
        """Find the end; AuditBroken findings are kept in `finding`, never repaired."""
        numbers = sorted(int(p.name[6:12]) for p in self._directory.glob(_PATTERN))
        if numbers:
            self._number = numbers[-1]
        self._fd = self._open_file(self._number)
        self._cut_off_rest()
        for number in reversed(numbers):
            last = _last_line(self._path(number))
            if last:
                self._read_head(last)
                break

    def _read_head(self, last: bytes) -> None:
        try:
            _, self.head = read_line(last)
        except AuditBroken as error:
            # Verification names the line; the chain begins anew behind it.
            self.finding = f"the last record before this one was damaged: {error}"

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records as one piece; durable on return."""
        self.write(records)
        self.syncer()()

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records as one piece, which a kill leaves whole; a power failure may not."""
        hit("adminapi.audit.before_append")
        if self._size >= self._rotate_bytes:
            self._rotate()
        head = self.head
        lines = []
        for record in records:
            line, head = make_line(head, record)
            lines.append(line)
        data = memoryview(b"".join(lines))
        length = len(data)
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            # All or nothing: whoever tries again gives the same records.
            os.ftruncate(self._fd, self._size)
            raise
        self.head = head
        self._size += length

    def syncer(self) -> Callable[[], None]:
        """What makes durable all that is written by now, once; it may run in a thread while
        more is written. Release it by calling it."""
        handle = os.dup(self._fd)

        def sync() -> None:
            try:
                hit("adminapi.audit.before_sync")
                os.fdatasync(handle)
                hit("adminapi.audit.after_append")
            finally:
                os.close(handle)

        return sync

    # ----

    def _path(self, number: int) -> Path:
        return self._directory / f"audit-{number:06d}.jsonl"

    def _open_file(self, number: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self._path(number), flags, 0o640)
        fsync_directory(self._directory)
        return fd

    def _rotate(self) -> None:
        hit("adminapi.audit.before_rotate")
        os.fdatasync(self._fd)  # nobody comes back to it
        fd = self._open_file(self._number + 1)
        os.close(self._fd)
        self._fd, self._number, self._size = fd, self._number + 1, 0
        hit("adminapi.audit.after_rotate")

    def _cut_off_rest(self) -> None:
        size = os.fstat(self._fd).st_size
        start = max(0, size - _LINE_LIMIT)
        tail = os.pread(self._fd, size - start, start)
        end = tail.rfind(b"\n") + 1
        if end < len(tail):
            os.ftruncate(self._fd, start + end)
            os.fsync(self._fd)
        self._size = start + end


def _last_line(path: Path) -> bytes:
    """The last whole line of a file, b"" when there is none."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LINE_LIMIT))
        lines = file.read().splitlines(keepends=True)
    return lines[-1] if lines and lines[-1].endswith(b"\n") else b""
