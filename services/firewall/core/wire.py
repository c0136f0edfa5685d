"""Messages between the firewall and its workers: length-prefixed JSON objects.

Owns the frame and its bound. Must not know sockets. Invariant: a frame above the limit
is refused before it is held in memory.
"""

from __future__ import annotations

import json
import struct
from typing import Any

LIMIT = 16 * 1024 * 1024
_HEAD = struct.Struct(">I")


class WireError(ValueError):
    """The peer does not speak this protocol; the connection is of no more use."""


def pack(message: dict[str, Any]) -> bytes:
    """One frame. WireError above the limit."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > LIMIT:
        raise WireError(f"a message of {len(body)} bytes; at most {LIMIT}")
    return _HEAD.pack(len(body)) + body


class Frames:
    """Bytes in, messages out."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, untrusted_data: bytes) -> list[dict[str, Any]]:
        """The messages that are complete now. WireError."""
        self._buffer += untrusted_data
        messages: list[dict[str, Any]] = []
        while len(self._buffer) >= _HEAD.size:
            (size,) = _HEAD.unpack_from(self._buffer)
            if size > LIMIT:
                raise WireError(f"a frame of {size} bytes; at most {LIMIT}")
            end = _HEAD.size + size
            if len(self._buffer) < end:
                break
            try:
                message = json.loads(bytes(self._buffer[_HEAD.size : end]))
            except ValueError as error:
                raise WireError("a frame that is not JSON") from error
            if not isinstance(message, dict):
                raise WireError("a frame that is no object")
            del self._buffer[:end]
            messages.append(message)
        return messages
