"""What the bus costs on top of ZeroMQ itself.

A round trip through Channel and Server (whole server order: frame, caller, access rule,
deadline, duplicates, protobuf both ways, handler, reply) against a plain blocking
ROUTER/DEALER echo of the same frames between two processes. Nine rounds, each of
interleaved slices of both; the median of the rounds' ratios counts. Exit status 1 when a
ratio is above its limit.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path

import uvloop
import zmq

from bulkhead.api import domains_pb2, envelope_pb2
from bulkhead.bus.client import Connections
from bulkhead.bus.frames import PREFIX
from bulkhead.bus.methods import methods_of
from bulkhead.bus.runtime import ServiceContext, serve
from bulkhead.bus.secret import make_secret
from bulkhead.bus.server import Call
from bulkhead.config import Settings

ROUNDS = 9
# A round alternates short slices of both, so that other work on the machine meets both.
SLICES = 4
WINDOW = 16
LIMIT_ONE = 3.0
LIMIT_MANY = 1.5
METHOD = "bulkhead.api.Domains.ReadGuestKeys"
REQUEST = domains_pb2.ReadGuestKeysRequest(prefix="/" + "k" * 195)


class _Handlers:
    """Domains with one method that answers about as much as it was sent."""

    async def read_guest_keys(
        self,
        request: domains_pb2.ReadGuestKeysRequest,
        call: Call,  # noqa: ARG002
    ) -> domains_pb2.ReadGuestKeysReply:
        key = domains_pb2.GuestKey(path=request.prefix)
        return domains_pb2.ReadGuestKeysReply(untrusted_keys=[key])


async def _refuse(request: object, call: Call) -> None:  # noqa: ARG001
    raise AssertionError("the bench calls one method only")


for _method in methods_of("bulkhead.api.Domains").values():
    if not hasattr(_Handlers, _method.handler):
        setattr(_Handlers, _method.handler, staticmethod(_refuse))


async def _build(context: ServiceContext) -> object:  # noqa: ARG001
    return _Handlers()


def _echo(endpoint: str) -> None:
    """The floor's server: everything back to where it came from."""
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.bind(endpoint)
    while True:
        socket.send_multipart(socket.recv_multipart())


def _floor_frames() -> list[bytes]:
    header = envelope_pb2.RequestHeader(
        request_id=bytes(16), method=METHOD, deadline_ns=time.monotonic_ns()
    )
    return [PREFIX, header.SerializeToString(), REQUEST.SerializeToString()]


def _floor(socket: zmq.Socket[bytes], frames: list[bytes], count: int, window: int) -> float:
    """Seconds per message of the blocking echo."""
    started = time.perf_counter()
    for _ in range(window):
        socket.send_multipart(frames)
    for _ in range(count - window):
        socket.recv_multipart()
        socket.send_multipart(frames)
    for _ in range(window):
        socket.recv_multipart()
    return (time.perf_counter() - started) / count


async def _bus(connections: Connections, count: int, window: int) -> float:
    """Seconds per message over the bus."""
    channel = connections.channel("domains")

    async def calls(number: int) -> None:
        for _ in range(number):
            await channel.call(METHOD, REQUEST, domains_pb2.ReadGuestKeysReply, timeout=10)

    started = time.perf_counter()
    if window == 1:
        await calls(count)
    else:
        await asyncio.gather(*(calls(count // window) for _ in range(window)))
    return (time.perf_counter() - started) / count


async def _measure(
    settings: Settings, socket: zmq.Socket[bytes], scale: float
) -> dict[int, list[tuple[float, float]]]:
    frames = _floor_frames()
    connections = Connections(settings, "lifecycle")
    counts = {1: int(400 * scale), WINDOW: int(1600 * scale) // WINDOW * WINDOW}
    samples: dict[int, list[tuple[float, float]]] = {1: [], WINDOW: []}
    try:
        for window, count in counts.items():  # warm both up
            _floor(socket, frames, count, window)
            await _bus(connections, count, window)
        for _ in range(ROUNDS):
            for window, count in counts.items():
                floor = bus = 0.0
                for _ in range(SLICES):
                    floor += _floor(socket, frames, count, window) / SLICES
                    bus += await _bus(connections, count, window) / SLICES
                samples[window].append((floor, bus))
    finally:
        connections.close()
    return samples


def _run(
    work: Awaitable[dict[int, list[tuple[float, float]]]],
) -> dict[int, list[tuple[float, float]]]:
    async def main() -> dict[int, list[tuple[float, float]]]:
        return await work

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def main() -> int:
    """Run and print; 1 when the bus costs too much."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="messages per round, relative")
    scale: float = parser.parse_args().scale
    with tempfile.TemporaryDirectory(prefix="bh-") as directory:
        root = Path(directory)
        settings = Settings(root)
        settings.bus_dir.mkdir(parents=True)
        settings.save()
        make_secret(settings)
        endpoint = f"ipc://{root}/echo.sock"
        command = [sys.executable, "-m", "bench.bus_round_trip"]
        servers = [
            subprocess.Popen([*command, "echo", endpoint]),
            subprocess.Popen([*command, "bus", str(root)], stderr=subprocess.DEVNULL),
        ]
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.connect(endpoint)
        try:
            gc.freeze()  # as serve() does
            samples = _run(_measure(settings, socket, scale))
        finally:
            for server in servers:
                server.kill()
                server.wait()
            context.destroy(linger=0)
    failed = False
    for window, limit in ((1, LIMIT_ONE), (WINDOW, LIMIT_MANY)):
        pairs = samples[window]
        ratio = statistics.median(bus / floor for floor, bus in pairs)
        floor_us, bus_us = (statistics.median(column) * 1e6 for column in zip(*pairs, strict=True))
        verdict = "ok" if ratio <= limit else "TOO SLOW"
        failed = failed or ratio > limit
        print(
            f"bus round trip, {window:2} in flight: {bus_us:6.1f} us per message, floor "
            f"{floor_us:6.1f} us, ratio {ratio:.2f} (limit {limit}) {verdict}"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["echo"]:
        _echo(sys.argv[2])
    elif sys.argv[1:2] == ["bus"]:
        serve("domains", _build, ["Domains"], arguments=["--root", sys.argv[2]])
    else:
        sys.exit(main())
