"""Connections that the namespace tracks: list those of an address, forget one.

Owns one netlink socket of the connection tracker. Must not know rules. Invariant: only
this namespace's connections are seen, and deleting one that is gone is no error.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence

from services.firewall.core.flows import Flow

FLOWS_LIMIT = 65536

_NETLINK_NETFILTER = 12
_SUBSYSTEM = 1 << 8
_GET, _DELETE = _SUBSYSTEM | 1, _SUBSYSTEM | 2
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
_GENERIC = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF
_TUPLE_ORIGINAL, _TUPLE_REPLY = 1, 2
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTO_NUMBER, _PROTO_FROM_PORT, _PROTO_ICMP_TYPE, _PROTO_ICMP6_TYPE = 1, 2, 5, 8
_FROM_4, _TO_4, _FROM_6, _TO_6 = 1, 2, 3, 4
_TIMEOUT_S = 5.0


class TrackerError(OSError):
    """The connection tracker refused or did not answer."""


def _align(size: int) -> int:
    return (size + 3) & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, offset)
        if size < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[offset + _ATTRIBUTE.size : offset + size]
        offset += _align(size)


def _address(data: bytes) -> str:
    return str(ipaddress.ip_address(data))


def _tuple(data: bytes) -> tuple[str, str, dict[int, bytes]]:
    """(from, to, protocol attributes) of one direction."""
    ends = ["", ""]
    protocol: dict[int, bytes] = {}
    for kind, value in _attributes(data):
        if kind == _TUPLE_IP:
            for place, text in _attributes(value):
                if place in (_FROM_4, _FROM_6):
                    ends[0] = _address(text)
                elif place in (_TO_4, _TO_6):
                    ends[1] = _address(text)
        elif kind == _TUPLE_PROTO:
            protocol = dict(_attributes(value))
    return ends[0], ends[1], protocol


def parse_entry(payload: bytes) -> tuple[Flow, bytes] | None:
    """One connection as the kernel sends it (after its headers), with the bytes that name
    it; None when incomplete.

    The destination is where the packets really go, after redirection: the reply's from.
    """
    original = reply = b""
    for kind, value in _attributes(payload):
        if kind == _TUPLE_ORIGINAL:
            original = value
        elif kind == _TUPLE_REPLY:
            reply = value
    if not original or not reply:
        return None
    source, _, protocol = _tuple(original)
    destination, _, back = _tuple(reply)
    if not source or not destination or not protocol.get(_PROTO_NUMBER):
        return None
    number = protocol[_PROTO_NUMBER][0]
    port = icmptype = None
    if number in (6, 17) and len(back.get(_PROTO_FROM_PORT, b"")) >= 2:
        (port,) = struct.unpack_from(">H", back[_PROTO_FROM_PORT])
    for kind in (_PROTO_ICMP_TYPE, _PROTO_ICMP6_TYPE):
        if protocol.get(kind):
            icmptype = protocol[kind][0]
    return Flow(source, destination, number, port, icmptype), original


def _kind(payload: bytes) -> bytes:
    """What entries of TCP and UDP have in common when only the client's port differs; b""
    for any other. Saves parsing thousands of alike entries.

    Both directions come first, each as long as the other: the sizes of IPv4 and IPv6 with
    two ports. The client's port is at 12 before the end of the first and 4 of the second.
    """
    size = payload[0]
    if size not in (52, 76) or len(payload) < 2 * size or payload[size] != size:
        return b""
    return payload[: size - 12] + payload[size - 8 : 2 * size - 4]


class Tracker:
    """The connection tracker of this process's network namespace."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.settimeout(_TIMEOUT_S)
        self._sequence = int.from_bytes(os.urandom(2), "big")

    def _send(self, kind: int, flags: int, family: int, payload: bytes) -> None:
        self._sequence = (self._sequence + 1) & 0x7FFFFFFF
        body = _GENERIC.pack(family, 0, 0) + payload
        head = _HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0)
        self._socket.send(head + body)

    def _answers(self) -> Iterator[tuple[int, bytes]]:
        """(message type, payload) of the last request, up to its end. TrackerError."""
        while True:
            try:
                data = self._socket.recv(1 << 18)
            except TimeoutError as error:
                raise TrackerError(errno.ETIMEDOUT, "the connection tracker is silent") from error
            offset = 0
            while offset + _HEADER.size <= len(data):
                size, kind, _, sequence, _ = _HEADER.unpack_from(data, offset)
                payload = data[offset + _HEADER.size : offset + size]
                offset += _align(size)
                if sequence != self._sequence:
                    continue  # left over from a request that was given up
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    (code,) = struct.unpack_from("=i", payload)
                    if code:
                        raise TrackerError(-code, os.strerror(-code))
                    return
                yield kind, payload

    def _entries(self, addresses: Iterable[str]) -> Iterator[tuple[Flow, bytes]]:
        wanted = {str(ipaddress.ip_address(text)) for text in addresses}
        packed = [ipaddress.ip_address(text).packed for text in wanted]
        self._send(_GET, _REQUEST | _DUMP, socket.AF_UNSPEC, b"")
        known: dict[bytes, Flow] = {}
        for _, payload in self._answers():
            # Cheap first: a busy neighbour's connections cost next to nothing.
            if not any(part in payload for part in packed):
                continue
            payload = payload[_GENERIC.size :]
            kind = _kind(payload)
            flow = known.get(kind)
            if flow is not None:
                yield flow, payload[_ATTRIBUTE.size : payload[0]]
                continue
            entry = parse_entry(payload)
            if entry is not None and wanted & {entry[0].source, entry[0].destination}:
                if kind:
                    known[kind] = entry[0]
                yield entry

    def flows(self, addresses: Sequence[str]) -> list[Flow]:
        """Connections from or to one of the addresses, each kind once and FLOWS_LIMIT at
        most. TrackerError."""
        found: dict[Flow, None] = {}
        for flow, _ in self._entries(addresses):
            if len(found) < FLOWS_LIMIT:
                found[flow] = None
        return list(found)

    def cut(self, flows: Collection[Flow]) -> int:
        """Forget all connections of these kinds; how many there were. TrackerError."""
        keys = [
            (flow.source, original)
            for flow, original in self._entries({flow.source for flow in flows})
            if flow in flows
        ]
        for source, original in keys:
            self._delete(source, original)
        return len(keys)

    def _delete(self, source: str, original: bytes) -> None:
        nested = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(original), _TUPLE_ORIGINAL | 0x8000)
        padding = b"\0" * (_align(len(original)) - len(original))
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        self._send(_DELETE, _REQUEST | _ACK, family, nested + original + padding)
        try:
            for _ in self._answers():
                pass
        except TrackerError as error:
            if error.errno != errno.ENOENT:
                raise

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()
