"""python -m services.firewall.resolve --fd N --parent PID [--server ADDRESS:PORT ...]

Answers questions on the inherited socket: {"id", "name"} in, {"id", "addresses", "ttl",
"error"} out, one JSON object per packet. Started by the supervisor beside it, again after
a death. Invariant: it has no capability, no file to write, and is the only part of the
firewall that may open INET sockets.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
from collections.abc import Sequence
from pathlib import Path

from bulkhead.bus import confine
from bulkhead.bus.confine import Confinement
from bulkhead.model.firewall_rules import parse_destination
from bulkhead.model.refusal import Refusal
from services.firewall.resolve.client import ResolveError, read_servers, resolve
from services.firewall.resolve.supervisor import die_with

RESOLV_CONF = Path("/etc/resolv.conf")
PACKET_LIMIT = 64 * 1024
QUESTIONS_LIMIT = 64


async def serve(connection: socket.socket, fixed: Sequence[tuple[str, int]]) -> None:
    """Answer until the firewall closes its end. fixed: name servers; empty: resolv.conf."""
    loop = asyncio.get_running_loop()
    connection.setblocking(False)
    running: set[asyncio.Task[None]] = set()
    gate = asyncio.Semaphore(QUESTIONS_LIMIT)

    async def answer(request: dict[str, object]) -> None:
        async with gate:
            reply: dict[str, object] = {"id": request.get("id")}
            try:
                destination = parse_destination(str(request.get("name", "")))
                problem = destination.problem()
                if destination.key != "dsthost" or problem:
                    raise ResolveError(problem or "not a host name")
                servers = fixed or read_servers(RESOLV_CONF)
                addresses, ttl = await resolve(servers, destination.text)
                reply.update(addresses=list(addresses[:256]), ttl=ttl, error="")
            except (ResolveError, Refusal) as error:
                reply.update(addresses=[], ttl=0, error=str(error)[:500])
            await loop.sock_sendall(connection, json.dumps(reply).encode())

    while True:
        packet = await loop.sock_recv(connection, PACKET_LIMIT)
        if not packet:
            return
        try:
            request = json.loads(packet)
        except ValueError:
            continue
        if isinstance(request, dict) and len(running) < 4 * QUESTIONS_LIMIT:
            task = loop.create_task(answer(request))
            running.add(task)
            task.add_done_callback(running.discard)


def _parse_server(text: str) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    return address, int(port)


def main() -> None:
    """Answer until the firewall is gone."""
    parser = argparse.ArgumentParser(prog="resolve")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True, help="pid of the supervisor")
    parser.add_argument("--server", type=_parse_server, action="append", default=[])
    arguments = parser.parse_args()
    die_with(arguments.parent)
    connection = socket.socket(fileno=arguments.fd)
    confine.apply(Confinement(inet=True, read=(Path("/etc"), Path("/run"))))
    asyncio.run(serve(connection, arguments.server))


if __name__ == "__main__":
    main()
