"""Asks name servers.

Owns UDP and TCP questions with time limits. Must not know rules or workers. Invariant:
an answer counts only from the address that was asked, with the number and question
that were sent; the number is random and each question has a socket of its own.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
from collections.abc import Sequence
from pathlib import Path

from services.firewall.core.dns_message import AAAA, A, Answer, DnsError, parse, question
from services.firewall.core.resolv_conf import name_servers

QUESTION_S = 1.5
TCP_S = 3.0
ANSWER_LIMIT = 65535


class ResolveError(OSError):
    """No name server gave a usable answer; the message says which and why."""


def read_servers(path: Path) -> tuple[tuple[str, int], ...]:
    """(address, 53) of the file's name servers; none when it cannot be read."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ()
    return tuple((address, 53) for address in name_servers(text))


class _Datagram(asyncio.DatagramProtocol):
    def __init__(self, number: int, name: str, kind: int) -> None:
        self._number, self._name, self._kind = number, name, kind
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:
        del addr  # the socket is connected: nobody else gets through
        try:
            answer = parse(data, self._number, self._name, self._kind)
        except DnsError as error:
            if "not the answer" in str(error) or "another" in str(error):
                return  # somebody guesses: keep waiting for the real one
            if not self.answer.done():
                self.answer.set_exception(ResolveError(str(error)))
            return
        if not self.answer.done():
            self.answer.set_result(answer)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(ResolveError(str(exc)))


async def _ask_udp(server: tuple[str, int], name: str, kind: int) -> Answer:
    number = secrets.randbelow(1 << 16)
    packet = question(number, name, kind)
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(
        lambda: _Datagram(number, name, kind), remote_addr=server
    )
    try:
        transport.sendto(packet)
        async with asyncio.timeout(QUESTION_S):
            return await protocol.answer
    finally:
        transport.close()
        if protocol.answer.done() and not protocol.answer.cancelled():
            protocol.answer.exception()


async def _ask_tcp(server: tuple[str, int], name: str, kind: int) -> Answer:
    number = secrets.randbelow(1 << 16)
    packet = question(number, name, kind)
    async with asyncio.timeout(TCP_S):
        reader, writer = await asyncio.open_connection(*server)
        try:
            writer.write(struct.pack(">H", len(packet)) + packet)
            await writer.drain()
            (size,) = struct.unpack(">H", await reader.readexactly(2))
            return parse(await reader.readexactly(size), number, name, kind)
        finally:
            writer.close()


async def _ask(servers: Sequence[tuple[str, int]], name: str, kind: int) -> Answer:
    why: list[str] = []
    for server in servers:
        try:
            answer = await _ask_udp(server, name, kind)
            if answer.truncated:
                answer = await _ask_tcp(server, name, kind)
            return answer
        except (OSError, DnsError, TimeoutError, asyncio.IncompleteReadError) as error:
            why.append(f"{server[0]}: {error or 'no answer'}")
    raise ResolveError("; ".join(why) or "no name server is configured")


async def resolve(servers: Sequence[tuple[str, int]], name: str) -> tuple[tuple[str, ...], int]:
    """(addresses of both families, least time to live in seconds). ResolveError.

    One family without an answer is no error when the other has addresses.
    """
    answers = await asyncio.gather(
        _ask(servers, name, A), _ask(servers, name, AAAA), return_exceptions=True
    )
    good = [answer for answer in answers if isinstance(answer, Answer)]
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, (OSError, DnsError)):
            raise answer
    addresses = tuple(address for answer in good for address in answer.addresses)
    if len(good) < 2 and not addresses:
        raise ResolveError(str(next(a for a in answers if isinstance(a, BaseException))))
    ttls = [answer.ttl for answer in good if answer.addresses]
    return addresses, min(ttls, default=0)
