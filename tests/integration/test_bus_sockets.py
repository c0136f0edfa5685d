"""The bus over real ipc sockets: identity, limits, bounds, cancel, drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
import zmq

from bulkhead.api import control_pb2, domains_pb2
from bulkhead.bus import sockets
from bulkhead.bus.client import CallContext, Channel, request_header
from bulkhead.bus.dispatch import Bounds
from bulkhead.bus.errors import BusError, bus_error
from bulkhead.bus.frames import BODY_LIMIT, MESSAGE_LIMIT, PREFIX, decode_reply
from bulkhead.bus.methods import METHODS
from bulkhead.bus.server import Call
from bulkhead.config import SettingsError
from bulkhead.model.refusal import Refusal
from tests.fakes.bus import Answers, Instance

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
PAUSE = "bulkhead.api.Domains.Pause"
KEYS = "bulkhead.api.Domains.ReadGuestKeys"


def run(work: Callable[[], Awaitable[None]]) -> None:
    """One test on each kind of loop."""
    for factory in (uvloop.new_event_loop, asyncio.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(_limited(work))


async def _limited(work: Callable[[], Awaitable[None]]) -> None:
    async with asyncio.timeout(30):
        await work()


async def pause(channel: Channel, **options: Any) -> domains_pb2.PauseDomainReply:
    return await channel.call(
        PAUSE,
        domains_pb2.PauseDomainRequest(),
        domains_pb2.PauseDomainReply,
        **{"timeout": 10.0, **options},
    )


async def refused(call: Awaitable[object]) -> BusError:
    with pytest.raises(BusError) as caught:
        await call
    return caught.value


def test_calls_headers_and_errors() -> None:
    async def work() -> None:
        async def keys(request: Any, call: Call) -> Any:
            if request.prefix == "eager":
                raise Refusal("QUBE_NOT_FOUND", "no such qube", qube="x")
            async with asyncio.timeout(5):  # needs a current task from its first line on
                async with asyncio.TaskGroup() as group:
                    group.create_task(asyncio.sleep(0))
            if request.prefix == "late":
                raise Refusal("QUBE_NOT_FOUND", "no such qube", qube="x")
            call.revision, call.seq = 4, 5
            key = domains_pb2.GuestKey(path=request.prefix, value=call.caller + call.source)
            return domains_pb2.ReadGuestKeysReply(untrusted_keys=[key])

        async with Instance() as instance:
            handlers = Answers("Domains", own={"read_guest_keys": keys})
            await instance.serve("domains", handlers, ["Domains"])
            channel = instance.connections("lifecycle").channel("domains")
            header, reply = await channel.call_with_header(
                KEYS,
                domains_pb2.ReadGuestKeysRequest(prefix="/p"),
                domains_pb2.ReadGuestKeysReply,
                timeout=10,
                context=CallContext(on_behalf_of="@work"),
            )
            assert (header.revision, header.seq) == (4, 5)
            assert reply.untrusted_keys[0].value == "lifecycle@work"
            for prefix in ("eager", "late"):
                error = await refused(
                    channel.call(
                        KEYS,
                        domains_pb2.ReadGuestKeysRequest(prefix=prefix),
                        domains_pb2.ReadGuestKeysReply,
                        timeout=10,
                    )
                )
                assert (error.code, error.reason, error.metadata) == (
                    "NOT_FOUND",
                    "QUBE_NOT_FOUND",
                    {"qube": "x"},
                )
            other = instance.connections("firewall").channel("domains")
            assert (await refused(pause(other))).reason == "CALLER_NOT_ALLOWED"

    run(work)


def test_many_calls_at_once_all_come_back() -> None:
    async def work() -> None:
        async def keys(request: Any, call: Call) -> Any:
            if int(request.prefix) % 3:
                await asyncio.sleep(0)
            key = domains_pb2.GuestKey(path=request.prefix)
            return domains_pb2.ReadGuestKeysReply(untrusted_keys=[key])

        async with Instance() as instance:
            handlers = Answers("Domains", own={"read_guest_keys": keys})
            await instance.serve("domains", handlers, ["Domains"])
            channel = instance.connections("lifecycle").channel("domains")

            async def one(number: int) -> None:
                reply = await channel.call(
                    KEYS,
                    domains_pb2.ReadGuestKeysRequest(prefix=str(number)),
                    domains_pb2.ReadGuestKeysReply,
                    timeout=20,
                )
                assert reply.untrusted_keys[0].path == str(number)

            await asyncio.gather(*(one(n) for n in range(1000)))

    run(work)


def test_a_full_server_is_asked_again_with_the_same_id() -> None:
    async def work() -> None:
        async def slow(request: Any, call: Call) -> Any:
            await asyncio.sleep(0.01)
            return domains_pb2.PauseDomainReply()

        async with Instance() as instance:
            handlers = Answers("Domains", own={"pause": slow})
            bounds = Bounds(in_flight=2, queued=2)
            _, server = await instance.serve("domains", handlers, ["Domains"], bounds)
            channel = instance.connections("lifecycle").channel("domains")
            await asyncio.gather(*(pause(channel) for _ in range(12)))
            assert server.dispatcher.counters["busy"] > 0
            ids = [call.request_id for _, call in handlers.calls]
            assert len(ids) == len(set(ids)) == 12

    run(work)


def test_a_non_idempotent_method_is_not_sent_again() -> None:
    async def work() -> None:
        async def not_now(request: Any, call: Call) -> Any:
            raise bus_error("STARTING", "not yet", retry_after_ms=1)

        async with Instance() as instance:
            handlers = Answers("Domains", own={"run_service": not_now, "pause": not_now})
            await instance.serve("domains", handlers, ["Domains"])
            channel = instance.connections("lifecycle").channel("domains")
            error = await refused(
                channel.call(
                    "bulkhead.api.Domains.RunService",
                    domains_pb2.RunServiceRequest(),
                    domains_pb2.RunServiceReply,
                    timeout=5,
                )
            )
            assert error.reason == "STARTING" and len(handlers.calls) == 1
            handlers.calls.clear()
            error = await refused(pause(channel, timeout=0.2))
            assert error.reason == "STARTING" and len(handlers.calls) > 2
            assert len({call.request_id for _, call in handlers.calls}) == 1

    run(work)


def test_cancel_reaches_a_waiting_handler() -> None:
    async def work() -> None:
        inside = asyncio.Event()
        ended: list[str] = []

        async def wait(request: Any, call: Call) -> Any:
            await asyncio.sleep(0)
            try:
                with call.cancel_point():
                    inside.set()
                    await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append("cleaned up")
                raise
            raise AssertionError("never")

        async with Instance() as instance:
            handlers = Answers("Domains", own={"pause": wait})
            _, server = await instance.serve("domains", handlers, ["Domains"])
            channel = instance.connections("lifecycle").channel("domains")
            request_id = bytes(range(16))
            call = asyncio.create_task(
                refused(pause(channel, context=CallContext(request_id=request_id)))
            )
            await inside.wait()
            stranger = instance.connections("storage").channel("domains")
            assert not await stranger.cancel(request_id)
            assert await channel.cancel(request_id)
            assert (await call).code == "CANCELLED" and ended == ["cleaned up"]
            assert server.dispatcher.in_flight == 0
            assert not await channel.cancel(request_id)

    run(work)


def test_the_control_lane_answers_while_work_is_stuck() -> None:
    async def work() -> None:
        release = asyncio.Event()

        async def stuck(request: Any, call: Call) -> Any:
            await release.wait()
            return domains_pb2.PauseDomainReply()

        async with Instance() as instance:
            handlers = Answers("Domains", own={"pause": stuck})
            bounds = Bounds(in_flight=1, queued=10)
            await instance.serve("domains", handlers, ["Domains"], bounds)
            channel = instance.connections("lifecycle").channel("domains")
            calls = [asyncio.create_task(pause(channel)) for _ in range(5)]

            async def ask() -> control_pb2.HealthReply:
                return await channel.call(
                    "bulkhead.api.Control.Health",
                    control_pb2.HealthRequest(),
                    control_pb2.HealthReply,
                    timeout=5,
                )

            health = await ask()
            while health.in_flight < 5:
                health = await ask()
            assert health.ready and health.service == "domains"
            assert health.privileges["isolation"] == "off"
            operator = instance.connections("operator").channel("domains")
            drain = asyncio.create_task(
                operator.call(
                    "bulkhead.api.Control.Drain",
                    control_pb2.DrainRequest(),
                    control_pb2.DrainReply,
                    timeout=10,
                )
            )
            late = await ask()
            while late.ready:
                late = await ask()
            assert late.not_ready_reason == "draining" and not drain.done()
            assert (await refused(pause(channel, timeout=0.1))).reason == "DRAINING"
            release.set()
            await asyncio.gather(*calls, drain)

    run(work)


def test_a_deadline_that_nobody_answers() -> None:
    async def work() -> None:
        async def forever(request: Any, call: Call) -> Any:
            await asyncio.Event().wait()

        async with Instance() as instance:
            handlers = Answers("Domains", own={"pause": forever})
            await instance.serve("domains", handlers, ["Domains"])
            connections = instance.connections("lifecycle")
            error = await refused(pause(connections.channel("domains"), timeout=0.1))
            assert error.reason == "NO_REPLY" and error.outcome_unknown
            error = await refused(pause(connections.channel("storage"), timeout=0.1))
            assert error.reason == "NOT_CONNECTED" and not error.outcome_unknown
            error = await refused(
                pause(connections.channel("domains"), context=CallContext(deadline_ns=1))
            )
            assert error.reason == "DEADLINE_EXCEEDED"

    run(work)


def test_an_oversized_message_is_dropped_and_the_next_one_arrives() -> None:
    async def work() -> None:
        async with Instance() as instance:
            handlers = Answers("Domains")
            await instance.serve("domains", handlers, ["Domains"])
            connections = instance.connections("lifecycle")
            channel = connections.channel("domains")
            error = await refused(
                channel.call(
                    KEYS,
                    domains_pb2.ReadGuestKeysRequest(prefix="x" * (BODY_LIMIT + 1)),
                    domains_pb2.ReadGuestKeysReply,
                    timeout=5,
                )
            )
            assert error.reason == "TOO_LARGE"
            raw = sockets.dealer(connections.context, plain=connections.plain)
            raw.connect(instance.settings.socket("domains", "work"))
            method = METHODS[PAUSE]

            def ask(number: int, body: bytes) -> None:
                header = request_header(method, CallContext(), bytes([number] * 16), 0)
                raw.send_multipart([PREFIX, header, body], zmq.NOBLOCK)

            try:
                await asyncio.to_thread(raw.poll, 5000, zmq.POLLOUT)
                ask(1, bytes(MESSAGE_LIMIT + 1))
                # The server hangs up; what comes after the new connection is served.
                for _ in range(200):
                    if await asyncio.to_thread(raw.poll, 5000, zmq.POLLOUT):
                        # It may hang up just now: a send that waited would stop the server,
                        # which runs in this loop.
                        with contextlib.suppress(zmq.Again):
                            ask(2, b"")
                    if await asyncio.to_thread(raw.poll, 50):
                        break
                header, _ = decode_reply(raw.recv_multipart(zmq.NOBLOCK))
                assert header.request_id == bytes([2] * 16)
                assert {c.request_id[0] for _, c in handlers.calls} == {2}
            finally:
                raw.close()

    run(work)


def test_garbage_is_counted_and_harms_nobody() -> None:
    async def work() -> None:
        async with Instance() as instance:
            _, server = await instance.serve("domains", Answers("Domains"), ["Domains"])
            connections = instance.connections("lifecycle")
            raw = sockets.dealer(connections.context, plain=connections.plain)
            raw.connect(instance.settings.socket("domains", "work"))
            try:
                await asyncio.to_thread(raw.poll, 5000, zmq.POLLOUT)
                for parts in ([b"x"], [b"a"] * 9, [PREFIX, b"\xff", b""], [b"", b"", b""]):
                    raw.send_multipart(parts)
                await pause(connections.channel("domains"))
                counters = server.dispatcher.counters
                while counters["dropped_frame_count"] < 2 or not counters["dropped_magic"]:
                    await asyncio.sleep(0.001)
                assert counters["dropped_header"] == 1
                assert not raw.poll(0)
            finally:
                raw.close()

    run(work)


def test_without_isolation_the_secret_is_needed() -> None:
    async def work() -> None:
        async with Instance() as instance:
            handlers = Answers("Domains")
            context, _ = await instance.serve("domains", handlers, ["Domains"])
            for me, secret in (("lifecycle", b"w" * 64), ("nobody", None)):
                connections = instance.connections(me, secret)
                error = await refused(pause(connections.channel("domains"), timeout=0.3))
                assert error.reason == "NOT_CONNECTED"
            assert not handlers.calls
            await pause(instance.connections("lifecycle").channel("domains"))

    run(work)


def test_one_service_per_directory() -> None:
    async def work() -> None:
        async with Instance() as instance:
            await instance.serve("domains", Answers("Domains"), ["Domains"])
            with pytest.raises(SettingsError, match="runs already"):
                await instance.serve("domains", Answers("Domains"), ["Domains"])
            mode = os.stat(instance.settings.service_dir("domains") / "work.sock").st_mode
            assert mode & 0o777 == 0o660

    run(work)


# ---- other users: the kernel says who is calling

_CLIENT = """
import asyncio, sys
from pathlib import Path
from bulkhead.api import domains_pb2
from bulkhead.bus.client import Connections
from bulkhead.bus.errors import BusError
from bulkhead.config import Settings

async def main():
    connections = Connections(Settings.load(Path(sys.argv[1])), sys.argv[2])
    try:
        await connections.channel("domains").call(
            "bulkhead.api.Domains.Pause", domains_pb2.PauseDomainRequest(),
            domains_pb2.PauseDomainReply, timeout=float(sys.argv[3]))
        print("OK")
    except BusError as error:
        print(error.reason)
    finally:
        connections.close()

asyncio.run(main())
"""

LIFECYCLE, STORAGE, NOBODY = 65011, 65012, 65534


async def as_user(root: Path, uid: int, me: str, timeout: float = 10.0) -> str:
    """What a client process of that user gets, claiming to be `me`."""

    def child() -> str:
        done = subprocess.run(
            [sys.executable, "-c", _CLIENT, str(root), me, str(timeout)],
            cwd=ROOT,
            user=uid,
            group=uid,
            extra_groups=[],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return await asyncio.to_thread(child)


@contextlib.asynccontextmanager
async def isolated() -> Any:
    users = {"domains": os.geteuid(), "lifecycle": LIFECYCLE, "storage": STORAGE}
    async with Instance(isolated=True, users=users) as instance:
        for directory in (instance.root, instance.root / "run", instance.settings.bus_dir):
            directory.chmod(0o755)
        instance.settings.service_dir("domains").mkdir()
        instance.settings.service_dir("domains").chmod(0o2710)
        yield instance


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users, which only root can")
def test_the_uid_decides_who_is_calling() -> None:
    async def work() -> None:
        async with isolated() as instance:
            handlers = Answers("Domains")
            context, _ = await instance.serve("domains", handlers, ["Domains"])
            directory = instance.settings.service_dir("domains")
            # The group of the directory is who may connect at all.
            assert await as_user(instance.root, LIFECYCLE, "lifecycle", 0.5) == "NOT_CONNECTED"
            os.chown(directory, -1, LIFECYCLE)
            for name in ("work.sock", "control.sock"):
                os.chown(directory / name, -1, LIFECYCLE)
            assert await as_user(instance.root, LIFECYCLE, "lifecycle") == "OK"
            # What the client says it is does not count.
            assert await as_user(instance.root, LIFECYCLE, "operator") == "OK"
            assert {c.caller for _, c in handlers.calls} == {"lifecycle"}
            assert await as_user(instance.root, NOBODY, "lifecycle", 0.5) == "NOT_CONNECTED"
            assert len(handlers.calls) == 2
            root = instance.connections("lifecycle").channel("domains")
            assert (await refused(pause(root))).reason == "CALLER_NOT_ALLOWED"

    run(work)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users, which only root can")
def test_a_stranger_is_refused_even_where_the_files_let_him_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        async with isolated() as instance:
            handlers = Answers("Domains")
            _, server = await instance.serve("domains", handlers, ["Domains"])
            zap = instance.zap(server)
            directory = instance.settings.service_dir("domains")
            (directory / "work.sock").chmod(0o666)
            directory.chmod(0o2711)
            # His own checks would keep him away: a hostile client has none.
            reply = await asyncio.to_thread(_raw_ask, instance.settings.socket("domains", "work"))
            assert reply == "no reply" and zap.refused > 0
            assert not handlers.calls and server.dispatcher.counters["requests"] == 0

    run(work)


_RAW = """
import sys, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.linger = 0
socket.connect(sys.argv[1])
socket.send_multipart([bytes.fromhex(a) for a in sys.argv[2:]])
print("reply" if socket.poll(1500) else "no reply")
"""


def _raw_ask(endpoint: str) -> str:
    header = request_header(METHODS[PAUSE], CallContext(), bytes(16), 0)
    done = subprocess.run(
        [sys.executable, "-c", _RAW, endpoint, PREFIX.hex(), header.hex(), ""],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=30,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users, which only root can")
def test_a_client_does_not_talk_to_a_directory_of_somebody_else() -> None:
    async def work() -> None:
        async with isolated() as instance:
            handlers = Answers("Domains")
            await instance.serve("domains", handlers, ["Domains"])
            channel = instance.connections("lifecycle").channel("domains")
            os.chown(instance.settings.service_dir("domains"), NOBODY, -1)
            assert (await refused(pause(channel, timeout=5))).reason == "UNTRUSTED_SERVER"
            os.chown(instance.settings.service_dir("domains"), 0, -1)
            instance.settings.service_dir("domains").chmod(0o2777)
            channel = instance.connections("lifecycle").channel("domains")
            assert (await refused(pause(channel, timeout=5))).reason == "UNTRUSTED_SERVER"
            assert not handlers.calls

    run(work)
