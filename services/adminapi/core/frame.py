"""Bytes of one Admin API connection: request in, reply or events out, no I/O.

Owns the layout of requests, replies, exceptions and events. Must not know methods,
qubes or sockets. Invariant: any byte string is either a Request or a Drop, and every
reply that is made here ends where a client expects it to end.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from dataclasses import dataclass

# Header, NUL and payload together.
REQUEST_LIMIT = 65536
# Keywords of dest_type "keyword" that name a qube; every other keyword is a drop.
_KEYWORDS = {b"adminvm": b"dom0"}
# Not formatted by clients, so a "%" in their message stays single.
_UNFORMATTED = frozenset({"ProtocolError", "PermissionDenied"})


class Drop(Exception):
    """The frame is unusable: the connection is closed without a byte. The text says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """A split frame. Every field is what the peer wrote, not checked in any way."""

    untrusted_method: bytes
    untrusted_arg: bytes
    untrusted_source: bytes
    untrusted_dest: bytes
    untrusted_payload: bytes


def parse_request(untrusted_frame: bytes) -> Request:
    """Split what came before the end of the peer's write side.

    Raises Drop for more than REQUEST_LIMIT bytes, no NUL, fewer than four fields or
    a dest_type that names no qube.
    """
    if len(untrusted_frame) > REQUEST_LIMIT:
        raise Drop(f"a request has at most {REQUEST_LIMIT} bytes")
    untrusted_header, nul, untrusted_payload = untrusted_frame.partition(b"\0")
    if not nul:
        raise Drop("no NUL after the header")
    fields = untrusted_header.split(b" ", 3)
    if len(fields) < 4:
        raise Drop("fewer than four header fields")
    untrusted_call, untrusted_source, untrusted_dest_type, untrusted_dest = fields
    if untrusted_dest_type == b"keyword":
        if untrusted_dest not in _KEYWORDS:
            raise Drop("an unusable destination keyword")
        untrusted_dest = _KEYWORDS[untrusted_dest]
    elif untrusted_dest_type != b"name":
        raise Drop("an unknown destination type")
    untrusted_method, _, untrusted_arg = untrusted_call.partition(b"+")
    return Request(
        untrusted_method, untrusted_arg, untrusted_source, untrusted_dest, untrusted_payload
    )


def format_ok(text: str | bytes = b"") -> bytes:
    """A successful reply; the content runs to the end of the connection."""
    return b"0\0" + (text.encode("utf-8", "replace") if isinstance(text, str) else text)


def is_formatted(class_name: str) -> bool:
    """Whether clients apply %-formatting to messages of this exception class."""
    if class_name in _UNFORMATTED:
        return False
    known = getattr(builtins, class_name, None)
    return not (isinstance(known, type) and issubclass(known, BaseException))


def format_exception(class_name: str, message: str, traceback: str = "") -> bytes:
    """An exception reply: class, traceback (normally empty), message, no arguments.

    message is a finished sentence; "%" is doubled where clients would format it.
    """
    if is_formatted(class_name):
        message = message.replace("%", "%%")
    parts = (class_name, traceback, message)
    return b"2\0" + b"".join(
        part.replace("\0", " ").encode("utf-8", "replace") + b"\0" for part in parts
    )


def _ascii(text: str) -> bytes:
    return text.replace("\0", "").encode("ascii", "replace")


def format_event(subject: str, name: str, pairs: Iterable[tuple[str, str]] = ()) -> bytes:
    """One event message; subject "" = system-wide, pairs in wire order.

    A pair with an empty key would end the message early and is left out.
    """
    parts = [b"1", _ascii(subject), _ascii(name)]
    for key, value in pairs:
        raw_key = _ascii(key)
        if raw_key:
            parts += (raw_key, _ascii(value))
    return b"\0".join(parts) + b"\0\0"


CONNECTION_ESTABLISHED = format_event("", "connection-established")
