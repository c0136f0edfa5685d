"""Answering a repeated request without doing its work again.

Owns the stored replies of one service in memory, and the interface by which a service
with a durable store (the registry) replaces it. Must not know how replies are made.
Invariant: for one (caller, request id) at most one handler runs and every repeat within
the bounds gets the same bytes.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.message import DecodeError

from bulkhead.api import envelope_pb2

Key = tuple[str, bytes]  # caller, request id


@dataclass(frozen=True, slots=True)
class StoredReply:
    """A finished reply: the method it answers, its header and body frames."""

    method: str
    header: bytes
    body: bytes

    def to_bytes(self) -> bytes:
        """One blob for a durable store."""
        method = self.method.encode()
        return b"".join(
            (
                len(method).to_bytes(4, "big"),
                len(self.header).to_bytes(4, "big"),
                method,
                self.header,
                self.body,
            )
        )

    @classmethod
    def from_bytes(cls, blob: bytes) -> StoredReply:
        """The inverse of to_bytes. ValueError when the blob is damaged."""
        if len(blob) < 8:
            raise ValueError("a stored reply is cut short")
        method_end = 8 + int.from_bytes(blob[:4], "big")
        header_end = method_end + int.from_bytes(blob[4:8], "big")
        if header_end > len(blob):
            raise ValueError("a stored reply is cut short")
        header = blob[method_end:header_end]
        try:
            envelope_pb2.ReplyHeader.FromString(header)
        except DecodeError as error:
            raise ValueError("a stored reply has no readable header") from error
        return cls(blob[8:method_end].decode(), header, blob[header_end:])


class ReplyStore(Protocol):
    """Where finished replies are kept; a handler object may offer one as `reply_store`."""

    def get(self, caller: str, request_id: bytes) -> StoredReply | None:
        """The reply given before, or None."""

    def put(self, caller: str, request_id: bytes, reply: StoredReply) -> None:
        """Keep a reply. Not called when the handler set call.reply_stored itself."""


class MemoryReplyStore:
    """Replies in memory, bounded by number, bytes and age (seconds)."""

    def __init__(
        self,
        *,
        count: int = 4096,
        size: int = 16 * 1024 * 1024,
        age: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count = count
        self._size = size
        self._age = age
        self._clock = clock
        self._replies: OrderedDict[Key, tuple[float, int, StoredReply]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._replies)

    @property
    def size(self) -> int:
        """Bytes held in headers and bodies."""
        return self._bytes

    def get(self, caller: str, request_id: bytes) -> StoredReply | None:
        """The reply stored for the key, if it is not too old."""
        row = self._replies.get((caller, request_id))
        if row is None or row[0] + self._age < self._clock():
            return None
        return row[2]

    def put(self, caller: str, request_id: bytes, reply: StoredReply) -> None:
        """Keep the reply; the oldest go first. A second put for a key is ignored."""
        key = (caller, request_id)
        now = self._clock()
        held = self._replies.get(key)
        if held is not None:
            if held[0] + self._age >= now:
                return
            self._drop(key)
        size = len(reply.header) + len(reply.body)
        if size > self._size:
            return
        self._replies[key] = (now, size, reply)
        self._bytes += size
        while self._replies:
            oldest, (stored, _, _) = next(iter(self._replies.items()))
            if (
                len(self._replies) <= self._count
                and self._bytes <= self._size
                and stored + self._age >= now
            ):
                break
            self._drop(oldest)

    def _drop(self, key: Key) -> None:
        self._bytes -= self._replies.pop(key)[1]
