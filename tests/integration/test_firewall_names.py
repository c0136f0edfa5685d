"""The resolve worker as a process, against a name server that misbehaves on demand."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest

from services.firewall.adapters.resolver_client import ResolverClient, start_worker
from services.firewall.core import dns_message

pytestmark = pytest.mark.integration


def _record(kind: int, ttl: int, body: bytes) -> bytes:
    return b"\xc0\x0c" + struct.pack(">HHIH", kind, 1, ttl, len(body)) + body


class NameServer(asyncio.DatagramProtocol):
    """Answers on 127.0.0.1, over UDP and TCP."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}
        self.ttl = 77
        self.mode = "good"
        self.asked: list[str] = []
        self.transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def answer(self, packet: bytes, tcp: bool = False) -> bytes:
        labels, at = [], 12
        while packet[at]:
            labels.append(packet[at + 1 : at + 1 + packet[at]].decode())
            at += 1 + packet[at]
        name, (kind,) = ".".join(labels), struct.unpack_from(">H", packet, at + 1)
        self.asked.append(name)
        flags = b"\x81\x80"
        known = self.addresses.get(name, [])
        records = b""
        count = 0
        if self.mode == "truncated" and not tcp:
            flags = b"\x83\x80"
        elif self.mode == "failure":
            flags = b"\x81\x82"
        else:
            for text in known:
                six = ":" in text
                if (kind == dns_message.AAAA) == six:
                    body = socket.inet_pton(socket.AF_INET6 if six else socket.AF_INET, text)
                    records += _record(kind, self.ttl, body)
                    count += 1
            if name not in self.addresses:
                flags = b"\x81\x83"
        return packet[:2] + flags + struct.pack(">HHHH", 1, count, 0, 0) + packet[12:] + records

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        assert self.transport is not None
        if self.mode == "silent":
            return
        reply = self.answer(data)
        if self.mode == "guessed":
            # Wrong numbers first; the right one must still be heard.
            for guess in range(3):
                self.transport.sendto(bytes([guess, 0xAA]) + reply[2:], addr)
        if self.mode == "junk":
            reply = reply[:14]
        self.transport.sendto(reply, addr)


@contextlib.asynccontextmanager
async def worker() -> AsyncIterator[tuple[NameServer, ResolverClient, int]]:
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(NameServer, local_addr=("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]

    async def tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (size,) = struct.unpack(">H", await reader.readexactly(2))
        reply = server.answer(await reader.readexactly(size), tcp=True)
        writer.write(struct.pack(">H", len(reply)) + reply)
        await writer.drain()
        writer.close()

    stream = await asyncio.start_server(tcp, "127.0.0.1", port)
    ours, process = start_worker([f"127.0.0.1:{port}"])
    client = ResolverClient(ours)
    try:
        yield server, client, process.pid
    finally:
        client.close()
        transport.close()
        stream.close()
        assert await asyncio.to_thread(process.wait, 20) == 0


def run(work: Callable[[NameServer, ResolverClient, int], Awaitable[None]]) -> None:
    async def main() -> None:
        async with worker() as (server, client, pid):
            await work(server, client, pid)

    asyncio.run(main())


def test_both_families_and_the_time_to_live() -> None:
    async def work(server: NameServer, client: ResolverClient, pid: int) -> None:
        server.addresses["a.org"] = ["192.0.2.1", "192.0.2.2", "2001:db8::1"]
        assert await client.resolve("a.org") == (("192.0.2.1", "192.0.2.2", "2001:db8::1"), 77.0)
        server.addresses["four.org"] = ["192.0.2.4"]
        assert await client.resolve("four.org") == (("192.0.2.4",), 77.0)
        assert await client.resolve("none.org") == ((), 0.0)

    run(work)


def test_truncated_answer_is_asked_again_over_tcp() -> None:
    async def work(server: NameServer, client: ResolverClient, pid: int) -> None:
        server.mode = "truncated"
        server.addresses["a.org"] = [f"192.0.2.{n}" for n in range(60)]
        assert len((await client.resolve("a.org"))[0]) == 60

    run(work)


def test_guesses_are_not_taken_for_the_answer() -> None:
    async def work(server: NameServer, client: ResolverClient, pid: int) -> None:
        server.mode = "guessed"
        server.addresses["a.org"] = ["192.0.2.1"]
        assert (await client.resolve("a.org"))[0] == ("192.0.2.1",)

    run(work)


@pytest.mark.parametrize("mode", ["silent", "failure", "junk"])
def test_server_that_fails_is_an_error_and_not_an_empty_answer(mode: str) -> None:
    async def work(server: NameServer, client: ResolverClient, pid: int) -> None:
        server.mode = mode
        with pytest.raises(OSError):
            await client.resolve("a.org")

    run(work)


@pytest.mark.parametrize("name", ["1.2.3.4", "UPPER.org", "", "a b", "127.1", "x" * 70])
def test_only_host_names_are_asked_about(name: str) -> None:
    async def work(server: NameServer, client: ResolverClient, pid: int) -> None:
        with pytest.raises(OSError):
            await client.resolve(name)
        assert not server.asked

    run(work)


def test_worker_comes_with_the_first_question_confined_and_again_when_it_dies() -> None:
    async def work(server: NameServer, client: ResolverClient, pid: int) -> None:
        server.addresses["a.org"] = ["192.0.2.1"]
        children = Path(f"/proc/{pid}/task/{pid}/children")
        assert not children.read_text()
        await client.resolve("a.org")
        child = int(children.read_text())
        status = Path(f"/proc/{child}/status").read_text()
        assert "CapEff:\t0000000000000000" in status and "Seccomp:\t2" in status
        assert "NoNewPrivs:\t1" in status
        os.kill(child, signal.SIGKILL)
        assert (await client.resolve("a.org"))[0] == ("192.0.2.1",)
        assert int(children.read_text()) != child

    run(work)


def test_supervisor_ends_with_the_firewall_though_nothing_was_ever_asked() -> None:
    async def work(server: NameServer, client: ResolverClient, pid: int) -> None:
        assert not server.asked  # worker() sees it end with status 0

    run(work)


def test_many_questions_at_once() -> None:
    async def work(server: NameServer, client: ResolverClient, pid: int) -> None:
        names = [f"h{n}.org" for n in range(150)]
        server.addresses.update({name: ["192.0.2.9"] for name in names})
        answers = await asyncio.gather(*map(client.resolve, names))
        assert all(addresses == ("192.0.2.9",) for addresses, _ in answers)

    run(work)


def test_worker_that_is_gone_answers_every_question() -> None:
    async def work(server: NameServer, client: ResolverClient, pid: int) -> None:
        server.mode = "silent"
        question = asyncio.create_task(client.resolve("a.org"))
        await asyncio.sleep(0)
        client.close()
        with pytest.raises(OSError):
            await question

    run(work)
