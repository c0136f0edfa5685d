"""One service's ROUTER sockets, driven by the event loop.

Owns the sockets of the work and control lanes, running handlers, and the ZAP handler.
Must not know what the service does, nor the order in which requests are judged
(dispatch). Invariant: after every wake-up and every send the socket is read until EAGAIN,
because its descriptor is edge-triggered.
"""

from __future__ import annotations

import asyncio
import logging
import types
from collections.abc import Callable, Coroutine, Generator, Mapping
from typing import Any

import zmq

from bulkhead.bus import sockets
from bulkhead.bus.dedup import ReplyStore
from bulkhead.bus.dispatch import Bounds, Call, Dispatcher, Work
from bulkhead.bus.errors import bus_error
from bulkhead.bus.frames import PREFIX
from bulkhead.bus.identity import Identities
from bulkhead.bus.methods import Lane, stream_readers

__all__ = ["Call", "Server", "ZapHandler"]

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
# Messages taken from one socket before other callbacks get their turn.
_BATCH = 64


class Server:
    """Serves handlers on the work and control endpoints.

    services: full proto service name -> handler object. Replies are kept by
    reply_store, in memory when it is None.
    """

    def __init__(
        self,
        service: str,
        services: Mapping[str, object],
        *,
        context: zmq.Context[zmq.Socket[bytes]],
        identities: Identities,
        reply_store: ReplyStore | None = None,
        work_bounds: Bounds | None = None,
        control_bounds: Bounds | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = context
        self._identities = identities
        self._log = log or logging.getLogger(f"bulkhead.{service}")
        self._lanes: list[_LaneSocket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        # True while a lane hands on what it received: no task is current then.
        self.taking = False
        self.dispatcher = Dispatcher(
            service,
            services,
            send=self._send,
            start=self._start,
            store=reply_store,
            work_bounds=work_bounds,
            control_bounds=control_bounds,
            log=self._log,
        )
        self.dispatcher.counters.update(replies_dropped=0)

    def bind(self, endpoints: Mapping[Lane, str]) -> None:
        """Bind the lanes and start to serve. zmq.ZMQError when an address is not usable."""
        for lane, endpoint in endpoints.items():
            self._lanes.append(
                _LaneSocket(self, lane, endpoint, self._context, self._identities, self._loop)
            )

    def close(self) -> None:
        """Close the lanes; replies already handed to ZeroMQ get 0.2 s to leave."""
        for lane in self._lanes:
            lane.close()
        self._lanes.clear()
        for task in self._tasks:
            self._loop.call_soon(task.cancel)

    async def drain(self, timeout: float) -> bool:
        """Refuse new work and wait until nothing runs; False when the time was too short."""
        self.dispatcher.draining = True
        idle = asyncio.Event()
        self.dispatcher.when_idle(idle.set)
        if self.dispatcher.in_flight:
            try:
                await asyncio.wait_for(idle.wait(), timeout)
            except TimeoutError:
                return False
        return True

    # ---- between the lanes and the dispatcher

    @staticmethod
    def _send(peer: tuple[_LaneSocket, bytes], header: bytes, body: bytes) -> None:
        lane, routing_id = peer
        lane.outbox.append((routing_id, header, body))
        if not lane.draining:
            lane.schedule()

    def _start(self, work: Work) -> None:
        if self.taking:
            self._run_eagerly(work)
        else:
            # Started by the end of another handler: not inside that one's task.
            self._loop.call_soon(self._run_eagerly, work)

    def _run_eagerly(self, work: Work) -> None:
        """Run the handler up to its first wait; only if it waits it becomes a task."""
        request, work.untrusted_request = work.untrusted_request, None
        coroutine = work.handler(request, work.call)
        stand_in = _EagerStandIn()
        try:
            _enter_task(self._loop, stand_in)
            try:
                waits_for = coroutine.send(None)
            finally:
                _leave_task(self._loop, stand_in)
        except StopIteration as finished:
            self.dispatcher.complete(work, finished.value)
            return
        except (Exception, asyncio.CancelledError) as error:
            self.dispatcher.fail(work, error)
            return
        task = self._loop.create_task(self._run(work, coroutine, waits_for))
        stand_in.become(task)
        self._tasks.add(task)
        # Not before the task's first step: that would lose the handler's own clean-up.
        work.cancel = lambda: self._loop.call_soon(task.cancel)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, work: Work, coroutine: Coroutine[Any, Any, Any], waits_for: Any) -> None:
        try:
            reply = await _resume(coroutine, waits_for)
        except asyncio.CancelledError:
            if work.call.cancelled:
                self.dispatcher.fail(work, bus_error("CANCELLED", "the caller cancelled the call"))
                return
            self.dispatcher.fail(
                work, bus_error("DRAINING", "the service stopped in the middle; ask again")
            )
            raise
        except Exception as error:
            self.dispatcher.fail(work, error)
        else:
            self.dispatcher.complete(work, reply)


@types.coroutine
def _resume(coroutine: Coroutine[Any, Any, Any], waits_for: Any) -> Generator[Any, Any, Any]:
    """Go on with a coroutine that has already been run up to its first wait."""
    while True:
        try:
            try:
                value = yield waits_for
            except BaseException as error:
                waits_for = coroutine.throw(error)
            else:
                waits_for = coroutine.send(value)
        except StopIteration as finished:
            return finished.value


class _EagerStandIn:
    """The "current task" of a handler's first stretch, which runs outside any task.

    asyncio.timeout() and TaskGroup take the current task at their start and cancel it
    later; by then this stands in for the task that the handler became.
    """

    __slots__ = ("_task", "_cancels")

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None
        self._cancels = 0

    def become(self, task: asyncio.Task[None]) -> None:
        self._task = task
        for _ in range(self._cancels):
            asyncio.get_running_loop().call_soon(task.cancel)

    def cancel(self, msg: object = None) -> bool:
        if self._task is None:
            self._cancels += 1
            return True
        return self._task.cancel(msg)

    def cancelling(self) -> int:
        return self._cancels if self._task is None else self._task.cancelling()

    def uncancel(self) -> int:
        if self._task is None:
            self._cancels = max(0, self._cancels - 1)
            return self._cancels
        return self._task.uncancel()

    def done(self) -> bool:
        return self._task is not None and self._task.done()

    def get_name(self) -> str:
        return "handler" if self._task is None else self._task.get_name()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()


_enter_task: Callable[[asyncio.AbstractEventLoop, Any], None] = asyncio.tasks._enter_task
_leave_task: Callable[[asyncio.AbstractEventLoop, Any], None] = asyncio.tasks._leave_task


class _LaneSocket:
    """One ROUTER socket."""

    def __init__(
        self,
        server: Server,
        lane: Lane,
        endpoint: str,
        context: zmq.Context[zmq.Socket[bytes]],
        identities: Identities,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._server = server
        self._lane = lane
        self._loop = loop
        self._property = "Peer-Address" if identities.isolated else "User-Id"
        self._caller = identities.of_peer if identities.isolated else _plain_name
        self._socket = sockets.router(context, plain=not identities.isolated)
        self._send = sockets.raw_send(self._socket)
        self._receive = sockets.raw_receive(self._socket)
        # Replies of this turn of the loop: they leave together, as waking ZeroMQ's thread
        # for each would cost more than the reply itself.
        self.outbox: list[tuple[bytes, bytes, bytes]] = []
        self.draining = False
        self._scheduled = False
        sockets.bind(self._socket, endpoint)
        self._fd = self._socket.FD
        loop.add_reader(self._fd, self._drain)
        self.schedule()

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self._flush()
        self._socket.close(linger=200)

    def schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def _flush(self) -> None:
        if self._socket.closed:
            return
        outbox, self.outbox = self.outbox, []
        send, more, last = self._send, sockets.MORE, sockets.NOBLOCK
        for routing_id, header, body in outbox:
            try:
                send(routing_id, more)
            except zmq.ZMQError as error:
                # The peer is gone, or does not read: its reply is dropped, and counted.
                if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                    raise
                self._server.dispatcher.counters["replies_dropped"] += 1
                continue
            send(PREFIX, more)
            send(header, more)
            send(body, last)

    def _drain(self) -> None:
        """Read until EAGAIN with nothing sent since; after a batch let others run first."""
        self._scheduled = False
        if self._socket.closed:
            return
        self.draining = self._server.taking = True
        try:
            for _ in range(4):
                if self.outbox:
                    self._flush()
                if self._take_batch() and not self.outbox:
                    return
            self._flush()
        finally:
            self.draining = self._server.taking = False
        self.schedule()

    def _take_batch(self) -> bool:
        """Hand on what has arrived; True when there is no more."""
        receive, dispatch = self._receive, self._server.dispatcher.receive
        for _ in range(_BATCH):
            try:
                frame = receive(sockets.NOBLOCK, False)
            except zmq.Again:
                return True
            routing_id = frame.bytes
            try:
                caller = self._caller(frame.get(self._property))
            except zmq.ZMQError:
                caller = None
            parts: list[bytes] = []
            while frame.more:
                frame = receive(sockets.NOBLOCK, False)
                if len(parts) < 4:
                    parts.append(frame.bytes)
            dispatch(self._lane, caller, (self, routing_id), parts)
            if len(self.outbox) >= sockets.TOGETHER:
                self._flush()
        return False


def _plain_name(user_id: str) -> str | None:
    return user_id or None


class ZapHandler:
    """Decides on new connections of all server sockets of this process's context.

    Refused peers never get as far as a message. The stream's subscribers must be ones
    that may also take the snapshot.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        identities: Identities,
        log: logging.Logger,
    ) -> None:
        self._identities = identities
        self._log = log
        self._readers = stream_readers()
        self._loop = asyncio.get_running_loop()
        self.refused = 0
        self._reported: set[tuple[str, bytes]] = set()
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(ZAP_ENDPOINT)
        self._fd = self._socket.FD
        self._loop.add_reader(self._fd, self._drain)
        self._loop.call_soon(self._drain)

    def close(self) -> None:
        """Stop deciding: from now on nobody can connect."""
        self._loop.remove_reader(self._fd)
        self._socket.close()

    def _drain(self) -> None:
        while not self._socket.closed:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._socket.send_multipart(self._decide(parts))

    def _decide(self, untrusted_parts: list[bytes]) -> list[bytes]:
        # [version, request id, domain, address, routing id, mechanism, credentials...]
        if len(untrusted_parts) < 6 or untrusted_parts[0] != b"1.0":
            return [b"1.0", b"", b"500", b"malformed", b"", b""]
        version, request, domain, address, _, mechanism, *untrusted_credentials = untrusted_parts
        name = self._identities.admit(
            address.decode("ascii", "replace"),
            mechanism.decode("ascii", "replace"),
            untrusted_credentials,
        )
        if name is not None and domain == sockets.STREAM_DOMAIN and name not in self._readers:
            name = None
        if name is None:
            self.refused += 1
            # A refused client tries again many times a second: say it once per uid.
            who = (address.decode("ascii", "replace").rpartition(":")[0], bytes(domain))
            if who not in self._reported and len(self._reported) < 1000:
                self._reported.add(who)
                self._log.warning("refused connections of %s to a %s", who[0], who[1].decode())
            return [version, request, b"400", b"refused", b"", b""]
        return [version, request, b"200", b"OK", name.encode(), b""]
