"""The frames of the bus: [magic+version][header][body].

Owns their layout and limits. Must not know sockets, methods or callers. Invariant: any
bytes give either a message or a FrameError that names a counter, never another
exception.
"""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import DecodeError

from bulkhead.api import envelope_pb2, records_pb2

MAGIC = b"BKH"
VERSION = 1
# First frame of every message, on the lanes and on the stream.
PREFIX = MAGIC + bytes((VERSION,))
# Topics of the stream: without hidden records for everybody, with them for few.
TOPIC_VISIBLE = PREFIX + b"v"
TOPIC_HIDDEN = PREFIX + b"h"

REQUEST_ID_BYTES = 16
# Largest message on a lane; bulk data never crosses the bus.
MESSAGE_LIMIT = 1024 * 1024
# Room left for header and prefix below MESSAGE_LIMIT.
BODY_LIMIT = MESSAGE_LIMIT - 64 * 1024
HEADER_LIMIT = 16 * 1024
# Largest stream entry: a burst may carry many records.
ENTRY_LIMIT = 16 * 1024 * 1024

# The usual reply header is this and the request id; taken from protobuf's own output.
_PLAIN_REPLY = envelope_pb2.ReplyHeader(request_id=bytes(REQUEST_ID_BYTES)).SerializeToString()[
    :-REQUEST_ID_BYTES
]

_parse_request = envelope_pb2.RequestHeader.FromString
_parse_reply = envelope_pb2.ReplyHeader.FromString


class FrameError(ValueError):
    """Not a message of this protocol; counter is the name under which it is counted."""

    def __init__(self, counter: str) -> None:
        super().__init__(counter)
        self.counter = counter


# Every counter that a FrameError can name.
COUNTERS = (
    "dropped_frame_count",
    "dropped_magic",
    "dropped_version",
    "dropped_header",
    "dropped_request_id",
)


def _checked(untrusted_parts: Sequence[bytes]) -> Sequence[bytes]:
    if len(untrusted_parts) != 3:
        raise FrameError("dropped_frame_count")
    prefix = untrusted_parts[0]
    if prefix != PREFIX:
        known = len(prefix) == len(PREFIX) and prefix.startswith(MAGIC)
        raise FrameError("dropped_version" if known else "dropped_magic")
    if len(untrusted_parts[1]) > HEADER_LIMIT:
        raise FrameError("dropped_header")
    return untrusted_parts


def decode_request(
    untrusted_parts: Sequence[bytes],
) -> tuple[envelope_pb2.RequestHeader, bytes]:
    """Header and body bytes of a request without its routing id. FrameError otherwise."""
    _, untrusted_header, untrusted_body = _checked(untrusted_parts)
    try:
        header = _parse_request(untrusted_header)
    except DecodeError:
        raise FrameError("dropped_header") from None
    if len(header.request_id) != REQUEST_ID_BYTES:
        raise FrameError("dropped_request_id")
    return header, untrusted_body


def decode_reply(untrusted_parts: Sequence[bytes]) -> tuple[envelope_pb2.ReplyHeader, bytes]:
    """Header and body bytes of a reply. FrameError otherwise."""
    _, untrusted_header, untrusted_body = _checked(untrusted_parts)
    try:
        header = _parse_reply(untrusted_header)
    except DecodeError:
        raise FrameError("dropped_header") from None
    if len(header.request_id) != REQUEST_ID_BYTES:
        raise FrameError("dropped_request_id")
    return header, untrusted_body


def encode_reply_header(
    request_id: bytes,
    *,
    status: envelope_pb2.Status | None = None,
    revision: int = 0,
    seq: int = 0,
    partial: bool = False,
) -> bytes:
    """The header frame of a reply; status None = OK."""
    if status is None and not (revision or seq or partial):
        return _PLAIN_REPLY + request_id
    return envelope_pb2.ReplyHeader(
        request_id=request_id, status=status, revision=revision, seq=seq, partial=partial
    ).SerializeToString()


def decode_entry(untrusted_parts: Sequence[bytes]) -> records_pb2.StreamEntry:
    """A stream message [topic][StreamEntry]. FrameError otherwise."""
    if len(untrusted_parts) != 2:
        raise FrameError("dropped_frame_count")
    if untrusted_parts[0] not in (TOPIC_VISIBLE, TOPIC_HIDDEN):
        raise FrameError("dropped_magic")
    try:
        return records_pb2.StreamEntry.FromString(untrusted_parts[1])
    except DecodeError:
        raise FrameError("dropped_header") from None
