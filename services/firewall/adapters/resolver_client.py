"""The firewall's end of the resolve worker.

Owns the socket pair, the supervisor of the worker and the questions under way. Must not know
what names are for. Invariant: every question ends, with an answer or within QUESTION_S.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUESTION_S = 8.0
PENDING_LIMIT = 1024
_PACKET_LIMIT = 64 * 1024
_SUPERVISOR = Path(__file__).parent.parent / "resolve" / "supervisor.py"


def start_worker(servers: Sequence[str] = ()) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start the worker's supervisor and give our end; call it before giving up INET sockets.

    The worker itself comes with the first question. servers: "ADDRESS:PORT" instead of those
    in resolv.conf.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # -S: it needs no more than the interpreter, and keeps what it loads for ever.
    command = [sys.executable, "-S", str(_SUPERVISOR)]
    command += ["--fd", str(theirs.fileno()), "--parent", str(os.getpid())]
    for server in servers:
        command += ["--server", server]
    with theirs:
        supervisor = subprocess.Popen(
            command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, close_fds=True
        )
    return ours, supervisor


class ResolverClient:
    """Answers host names through the worker."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next = 0
        asyncio.get_running_loop().add_reader(connection.fileno(), self._read)

    def _read(self) -> None:
        while True:
            try:
                packet = self._connection.recv(_PACKET_LIMIT)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self.close()
                return
            try:
                untrusted_reply = json.loads(packet)
                waiting = self._pending.pop(untrusted_reply["id"], None)
            except (ValueError, KeyError, TypeError):
                continue
            if waiting is not None and not waiting.done():
                waiting.set_result(untrusted_reply)

    async def resolve(self, name: str) -> tuple[tuple[str, ...], float]:
        """(addresses of both families, time to live in seconds). OSError, TimeoutError."""
        if len(self._pending) >= PENDING_LIMIT:
            raise OSError("too many names are being resolved")
        self._next += 1
        number = self._next
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[number] = reply
        try:
            self._connection.send(json.dumps({"id": number, "name": name}).encode())
            async with asyncio.timeout(QUESTION_S):
                untrusted_reply = await reply
        finally:
            self._pending.pop(number, None)
        error = str(untrusted_reply.get("error", ""))
        if error:
            raise OSError(error)
        try:
            addresses = tuple(
                str(ipaddress.ip_address(text)) for text in untrusted_reply["addresses"]
            )
            return addresses, float(untrusted_reply["ttl"])
        except (ValueError, TypeError, KeyError) as malformed:
            raise OSError(f"the resolve worker's answer is malformed: {malformed}") from malformed

    def close(self) -> None:
        """No more answers; the worker ends by itself."""
        if self._connection.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._connection.close()
        for waiting in self._pending.values():
            if not waiting.done():
                waiting.set_exception(OSError("the resolve worker is gone"))
        self._pending.clear()
