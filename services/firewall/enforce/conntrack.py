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
from collections.abc import Iterator, Sequence

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
_PROTO_NUMBER, _PROTO_TO_PORT, _PROTO_ICMP_TYPE, _PROTO_ICMP6_TYPE = 1, 3, 5, 8
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


def parse_entry(payload: bytes) -> Flow | None:
    """One connection as the kernel sends it (after its headers); None when incomplete.

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
    if not source or not destination or _PROTO_NUMBER not in protocol:
        return None
    number = protocol[_PROTO_NUMBER][0]
    port = icmptype = None
    # The reply's source port is the one after redirection.
    if number in (6, 17) and 2 in back:
        (port,) = struct.unpack(">H", back[2][:2])
    for kind in (_PROTO_ICMP_TYPE, _PROTO_ICMP6_TYPE):
        if kind in protocol:
            icmptype = protocol[kind][0]
    return Flow(original.hex(), source, destination, number, port, icmptype)


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

    def flows(self, addresses: Sequence[str]) -> list[Flow]:
        """Connections from or to one of the addresses, FLOWS_LIMIT at most. TrackerError."""
        wanted = {str(ipaddress.ip_address(text)) for text in addresses}
        found: list[Flow] = []
        self._send(_GET, _REQUEST | _DUMP, socket.AF_UNSPEC, b"")
        for _, payload in self._answers():
            flow = parse_entry(payload[_GENERIC.size :])
            if flow is None or len(found) >= FLOWS_LIMIT:
                continue
            if flow.source in wanted or flow.destination in wanted:
                found.append(flow)
        return found

    def cut(self, untrusted_key: str, source: str) -> bool:
        """Forget the connection; False when it was gone. TrackerError, ValueError."""
        original = bytes.fromhex(untrusted_key)
        if len(original) > 512:
            raise ValueError("no connection has so long a key")
        nested = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(original), _TUPLE_ORIGINAL | 0x8000)
        padding = b"\0" * (_align(len(original)) - len(original))
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        self._send(_DELETE, _REQUEST | _ACK, family, nested + original + padding)
        try:
            for _ in self._answers():
                pass
        except TrackerError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()
