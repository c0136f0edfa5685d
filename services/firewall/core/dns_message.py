"""Questions to and answers from a resolver, as bytes.

Owns just enough of RFC 1035: one question for A or AAAA, and the addresses of its
answer. Must not know sockets. Invariant: an answer is used only if it repeats the
question and its number; every offset in it is checked.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

A, AAAA, CNAME = 1, 28, 5
_HEADER = struct.Struct(">HHHHHH")
_FIXED = struct.Struct(">HHIH")
_RESPONSE, _TRUNCATED, _CODE_MASK = 0x8000, 0x0200, 0x000F
_RECURSE = 0x0100
_JUMPS_LIMIT = 32
_RECORDS_LIMIT = 200
_NO_SUCH_NAME = 3


class DnsError(ValueError):
    """The answer cannot be used."""


@dataclass(frozen=True, slots=True)
class Answer:
    """addresses as text; ttl in seconds, the least of the chain (0 without addresses)."""

    addresses: tuple[str, ...]
    ttl: int
    truncated: bool = False


def _encode_name(name: str) -> bytes:
    labels = name.removesuffix(".").split(".")
    if not all(0 < len(label) < 64 for label in labels):
        raise DnsError(f"{name} is no host name")
    encoded = b"".join(bytes([len(label)]) + label.encode("ascii") for label in labels) + b"\0"
    if len(encoded) > 255:
        raise DnsError(f"{name} is too long")
    return encoded


def question(number: int, name: str, kind: int) -> bytes:
    """A recursive query with one question. DnsError on a name that cannot be asked."""
    head = _HEADER.pack(number, _RECURSE, 1, 0, 0, 0)
    return head + _encode_name(name) + struct.pack(">HH", kind, 1)


def _decode_name(data: bytes, offset: int) -> tuple[str, int]:
    """(lower-case name without final dot, offset after it)."""
    labels: list[str] = []
    end = -1
    for _ in range(_JUMPS_LIMIT + 128):
        if offset >= len(data):
            raise DnsError("a name runs past the end")
        size = data[offset]
        if size & 0xC0 == 0xC0:
            if offset + 1 >= len(data):
                raise DnsError("a pointer runs past the end")
            target = (size & 0x3F) << 8 | data[offset + 1]
            if end < 0:
                end = offset + 2
            if target >= offset:
                raise DnsError("a pointer does not point back")
            offset = target
        elif size & 0xC0:
            raise DnsError("an unknown kind of label")
        elif size == 0:
            return ".".join(labels).lower(), end if end >= 0 else offset + 1
        else:
            label = data[offset + 1 : offset + 1 + size]
            if len(label) != size:
                raise DnsError("a label runs past the end")
            labels.append(label.decode("latin-1"))
            offset += 1 + size
    raise DnsError("a name has too many parts")


def parse(untrusted_data: bytes, number: int, name: str, kind: int) -> Answer:
    """The addresses that the answer gives for the name, through its aliases.

    A name that does not exist, or has no such address, is an answer without addresses.
    DnsError: not this question's answer, malformed, or the server failed.
    """
    if len(untrusted_data) < _HEADER.size:
        raise DnsError("shorter than a header")
    got, flags, questions, answers, _, _ = _HEADER.unpack_from(untrusted_data)
    if got != number or not flags & _RESPONSE or questions != 1:
        raise DnsError("not the answer to this question")
    asked, offset = _decode_name(untrusted_data, _HEADER.size)
    if untrusted_data[offset : offset + 4] != struct.pack(">HH", kind, 1):
        raise DnsError("the answer repeats another question")
    if asked != name.removesuffix(".").lower():
        raise DnsError("the answer repeats another name")
    offset += 4
    if flags & _TRUNCATED:
        return Answer((), 0, truncated=True)
    code = flags & _CODE_MASK
    if code not in (0, _NO_SUCH_NAME):
        raise DnsError(f"the server failed with code {code}")
    aliases = {asked}
    found: list[str] = []
    ttl = -1
    for _ in range(min(answers, _RECORDS_LIMIT)):
        owner, offset = _decode_name(untrusted_data, offset)
        if offset + _FIXED.size > len(untrusted_data):
            raise DnsError("a record runs past the end")
        record, _, record_ttl, size = _FIXED.unpack_from(untrusted_data, offset)
        offset += _FIXED.size
        body = untrusted_data[offset : offset + size]
        if len(body) != size:
            raise DnsError("a record's data runs past the end")
        if owner in aliases and record == CNAME:
            alias, _ = _decode_name(untrusted_data, offset)
            aliases.add(alias)
            ttl = record_ttl if ttl < 0 else min(ttl, record_ttl)
        elif owner in aliases and record == kind:
            if len(body) != (4 if kind == A else 16):
                raise DnsError("an address of the wrong length")
            found.append(str(ipaddress.ip_address(body)))
            ttl = record_ttl if ttl < 0 else min(ttl, record_ttl)
        offset += size
    return Answer(tuple(found), max(ttl, 0) if found else 0)
