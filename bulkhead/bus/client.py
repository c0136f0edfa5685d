"""Calls to other services over DEALER sockets.

Owns connections, retries and deadlines on the caller's side. Must not know what any
method means beyond its options. Invariant: a method that is not idempotent leaves this
process at most once; anything else is sent again only with the same request id, only
after UNAVAILABLE or a lost connection, and only before its deadline.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import stat
import time
from dataclasses import dataclass, replace
from typing import TypeVar

import zmq
from google.protobuf.message import DecodeError, Message

from bulkhead.api import control_pb2, envelope_pb2
from bulkhead.bus import sockets
from bulkhead.bus.errors import BusError, bus_error, from_status
from bulkhead.bus.frames import BODY_LIMIT, PREFIX, FrameError, decode_reply
from bulkhead.bus.methods import METHODS, OPERATOR, Lane, Method
from bulkhead.bus.secret import read_secret
from bulkhead.config import Settings

R = TypeVar("R", bound=Message)

# Calls of one channel that may wait at once.
PENDING_LIMIT = 4096
_BATCH = 64
# Wait before a request is sent again after UNAVAILABLE, seconds: first, largest.
_RETRY_FIRST = 0.005
_RETRY_LARGEST = 0.25


@dataclass(frozen=True, slots=True)
class CallContext:
    """What a call carries besides its message; all of it optional.

    request_id: 16 bytes, made when empty; give one only to repeat a call. deadline_ns:
    absolute CLOCK_MONOTONIC, 0 = only the timeout counts. on_behalf_of: Admin API source
    qube. operation, step, epoch: set by lifecycle. etag: 0 = none.
    """

    request_id: bytes = b""
    on_behalf_of: str = ""
    operation: str = ""
    step: str = ""
    epoch: int = 0
    etag: int = 0
    min_seq: int = 0
    deadline_ns: int = 0
    validate_only: bool = False
    trace_id: bytes = b""

    def child(self, **changes: object) -> CallContext:
        """The context of a call made for this one: a new request id, no etag, what is left
        of the time; changes replace fields."""
        base = replace(self, request_id=b"", etag=0, min_seq=0)
        return replace(base, **changes) if changes else base  # type: ignore[arg-type]


_NO_CONTEXT = CallContext()


class _Ids:
    """Random request ids, drawn from the system many at a time."""

    def __init__(self) -> None:
        self._pool = b""
        self._at = 0

    def __call__(self) -> bytes:
        at = self._at
        if at >= len(self._pool):
            self._pool = os.urandom(16 * 256)
            at = 0
        self._at = at + 16
        return self._pool[at : at + 16]


_new_id = _Ids()


def check_server(settings: Settings, service: str) -> None:
    """With isolation: refuse a socket directory that is not the service's own.

    Raises BusError UNTRUSTED_SERVER, or NOT_CONNECTED when there is none.
    """
    if not settings.isolated:
        return
    directory = settings.service_dir(service)
    try:
        found = os.stat(directory, follow_symlinks=False)
    except OSError as error:
        raise bus_error(
            "NOT_CONNECTED", f"{service} has no socket directory {directory}", service=service
        ) from error
    owner = settings.users.get(service)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or found.st_mode & 0o027:
        raise bus_error(
            "UNTRUSTED_SERVER",
            f"{directory} must belong to uid {owner} and be closed to others, but it has uid "
            f"{found.st_uid} and mode {stat.S_IMODE(found.st_mode):o}",
            service=service,
        )


def request_header(
    method: Method, context: CallContext, request_id: bytes, deadline_ns: int
) -> bytes:
    """The header frame of a request."""
    if context is _NO_CONTEXT:
        return envelope_pb2.RequestHeader(
            request_id=request_id, method=method.full_name, deadline_ns=deadline_ns
        ).SerializeToString()
    return envelope_pb2.RequestHeader(
        request_id=request_id,
        method=method.full_name,
        deadline_ns=deadline_ns,
        operation=context.operation,
        step=context.step,
        epoch=context.epoch,
        on_behalf_of=context.on_behalf_of,
        etag=context.etag,
        min_seq=context.min_seq,
        validate_only=context.validate_only,
        trace_id=context.trace_id,
    ).SerializeToString()


class _Pending:
    """One call that waits for its reply."""

    __slots__ = (
        "method",
        "header",
        "body",
        "future",
        "deadline",
        "sent",
        "on_wire",
        "wait",
        "last",
    )

    def __init__(
        self,
        method: Method,
        header: bytes,
        body: bytes,
        future: asyncio.Future[tuple[envelope_pb2.ReplyHeader, bytes]],
        deadline: int,
    ) -> None:
        self.method = method
        self.header = header
        self.body = body
        self.future = future
        self.deadline = deadline  # ns
        self.sent = False  # it left this process at least once
        self.on_wire = False  # it is at the server now, as far as we know
        self.wait = _RETRY_FIRST
        self.last: BusError | None = None  # the last UNAVAILABLE


class _LaneConnection:
    """One DEALER with its monitor: sends, matches replies, sends again."""

    def __init__(self, channel: Channel, lane: Lane) -> None:
        self._channel = channel
        self._loop = channel.loop
        self._pending: dict[bytes, _Pending] = {}
        self._unsent: dict[bytes, _Pending] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        self._scheduled = False
        self._connect_timer: asyncio.TimerHandle | None = None
        self._up = False
        self._endpoint = channel.settings.socket(channel.service, lane.value)
        self._refusal: BusError | None = None
        self.dropped = 0
        self._socket = sockets.dealer(channel.context, plain=channel.plain)
        self._send = sockets.raw_send(self._socket)
        self._receive = sockets.raw_receive(self._socket)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
        )
        self._fd = self._socket.FD
        self._monitor_fd = self._monitor.FD
        self._loop.add_reader(self._fd, self._drain)
        self._loop.add_reader(self._monitor_fd, self._watch)
        # A descriptor signals only after a first read has found nothing.
        self._loop.call_soon(self._watch)
        # A pipe that was never read does not signal: without this the first event is not seen.
        self._watch()
        self._try_connect()

    def _try_connect(self) -> None:
        """Connect once the directory is the service's own; look again until it is."""
        self._connect_timer = None
        try:
            check_server(self._channel.settings, self._channel.service)
        except BusError as error:
            self._refusal = error
            if error.code == "PERMISSION_DENIED":
                for pending in list(self._unsent.values()):
                    self._fail(pending, error)
            self._connect_timer = self._loop.call_later(0.05, self._try_connect)
            return
        self._refusal = None
        self._socket.connect(self._endpoint)
        self._schedule()

    def close(self, error: BusError) -> None:
        """Fail what waits and close the sockets."""
        for timer in (self._timer, self._connect_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._connect_timer = None
        self._loop.remove_reader(self._fd)
        self._loop.remove_reader(self._monitor_fd)
        for pending in list(self._pending.values()):
            self._fail(pending, error)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    # ---- calls

    def start(self, request_id: bytes, pending: _Pending) -> None:
        """Send a new call; its future gets header and body, or a BusError."""
        if len(self._pending) >= PENDING_LIMIT:
            raise bus_error(
                "TOO_MANY_CALLS", f"{PENDING_LIMIT} calls to {self._channel.service} wait already"
            )
        if request_id in self._pending:
            raise bus_error("REQUEST_ID_REUSED", "a call with this request id waits already")
        if self._refusal is not None and self._refusal.code == "PERMISSION_DENIED":
            raise self._refusal
        self._pending[request_id] = pending
        if self._timer is None or pending.deadline < self._timer_ns:
            self._arm(pending.deadline)
        # Alone it leaves at once; with others under way, together with those of this turn
        # of the loop: waking ZeroMQ's thread costs more than the message.
        self._unsent[request_id] = pending
        if len(self._pending) == 1 or len(self._unsent) >= sockets.TOGETHER:
            self._flush()
        self._schedule()

    def forget(self, request_id: bytes) -> None:
        """Nobody waits for that reply any more."""
        self._pending.pop(request_id, None)
        self._unsent.pop(request_id, None)

    def _flush(self) -> None:
        """Send what waits, oldest first, as far as there is a connection."""
        if not self._up:
            return
        send, more, last = self._send, sockets.MORE, sockets.NOBLOCK
        unsent = self._unsent
        while unsent:
            request_id = next(iter(unsent))
            pending = unsent[request_id]
            if pending.future.done():  # its caller was cancelled: it must not run now
                self.forget(request_id)
                continue
            try:
                send(PREFIX, more)
            except zmq.Again:
                return
            send(pending.header, more)
            send(pending.body, last)
            del unsent[request_id]
            pending.sent = pending.on_wire = True

    def _fail(self, pending: _Pending, error: BusError) -> None:
        request_id = envelope_pb2.RequestHeader.FromString(pending.header).request_id
        self.forget(request_id)
        if not pending.future.done():
            pending.future.set_exception(error)

    # ---- socket events

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """Send what waits, read until EAGAIN with nothing sent since."""
        self._scheduled = False
        if self._socket.closed:
            return
        for _ in range(4):
            if self._unsent:
                self._flush()
            if self._take_batch():
                # Only a read takes in a new connection, so what is still unsent may go now.
                waiting = len(self._unsent)
                if waiting:
                    self._flush()
                if len(self._unsent) == waiting:
                    return
        self._schedule()

    def _take_batch(self) -> bool:
        """Match the replies that have arrived; True when there are no more."""
        receive = self._receive
        for _ in range(_BATCH):
            try:
                frame = receive(sockets.NOBLOCK, False)
            except zmq.Again:
                return True
            untrusted = [frame.bytes]
            while frame.more:
                frame = receive(sockets.NOBLOCK, False)
                if len(untrusted) < 4:
                    untrusted.append(frame.bytes)
            try:
                header, untrusted_body = decode_reply(untrusted)
            except FrameError:
                self.dropped += 1
                continue
            self._reply(header, untrusted_body)
        return False

    def _reply(self, header: envelope_pb2.ReplyHeader, untrusted_body: bytes) -> None:
        request_id = header.request_id
        pending = self._pending.get(request_id)
        if pending is None:
            return  # late, or the second answer of a call sent twice
        if pending.future.done():  # its caller was cancelled
            self.forget(request_id)
            return
        if not header.HasField("status") or not header.status.code:
            del self._pending[request_id]
            if not pending.on_wire:
                self._unsent.pop(request_id, None)
            pending.future.set_result((header, untrusted_body))
            return
        error = from_status(header.status)
        if error.code == "UNAVAILABLE" and pending.method.idempotent:
            pending.on_wire = False
            pending.last = error
            wait = max(error.retry_after_ms / 1000, pending.wait)
            pending.wait = min(pending.wait * 2, _RETRY_LARGEST)
            if time.monotonic_ns() + wait * 1e9 < pending.deadline:
                self._loop.call_later(wait, self._again, request_id, pending)
                return
        self.forget(request_id)
        pending.future.set_exception(error)

    def _again(self, request_id: bytes, pending: _Pending) -> None:
        if self._pending.get(request_id) is not pending or pending.on_wire:
            return
        if not self._socket.closed:
            self._unsent[request_id] = pending
            self._schedule()

    def _watch(self) -> None:
        """Connection events: what was under way at a lost connection got lost with it."""
        while not self._monitor.closed:
            try:
                event, _ = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if int.from_bytes(event[:2], "little") == zmq.EVENT_DISCONNECTED:
                self._drain()  # answers that arrived before the end still count
                self._up = False
                self._lost()
            else:
                # The dead connection's pipe is dropped only when its end is taken in, which
                # this does; a send before would go into that pipe and be lost.
                self._socket.getsockopt(zmq.EVENTS)
                self._up = True
        self._schedule()

    def _lost(self) -> None:
        for request_id, pending in list(self._pending.items()):
            if not pending.on_wire:
                continue
            pending.on_wire = False
            if pending.method.idempotent:
                self._unsent[request_id] = pending
                continue
            self.forget(request_id)
            if not pending.future.done():
                pending.future.set_exception(
                    bus_error(
                        "CONNECTION_LOST",
                        f"{self._channel.service} went away during {pending.method.full_name}; "
                        "whether it was done is unknown",
                        service=self._channel.service,
                        method=pending.method.full_name,
                    )
                )

    # ---- deadlines: one timer for all calls

    def _arm(self, deadline: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_ns = deadline
        delay = max(0, deadline - time.monotonic_ns()) / 1e9
        self._timer = self._loop.call_later(delay, self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = time.monotonic_ns()
        earliest = 0
        for request_id, pending in list(self._pending.items()):
            if pending.deadline > now and not pending.future.done():
                if not earliest or pending.deadline < earliest:
                    earliest = pending.deadline
                continue
            self.forget(request_id)
            if not pending.future.done():
                pending.future.set_exception(self._late(pending))
        if earliest:
            self._arm(earliest)

    def _late(self, pending: _Pending) -> BusError:
        service, method = self._channel.service, pending.method.full_name
        if pending.last is not None and not pending.on_wire:
            return pending.last
        if pending.sent:
            return bus_error(
                "NO_REPLY",
                f"{service} did not answer {method} in time; whether it was done is unknown",
                service=service,
                method=method,
            )
        if self._refusal is not None:
            return self._refusal
        return bus_error(
            "NOT_CONNECTED",
            f"{service} cannot be reached, so {method} was not sent and nothing was changed",
            service=service,
            method=method,
        )


class Channel:
    """The way to one service. Get it from Connections or ServiceContext, not directly."""

    def __init__(
        self,
        settings: Settings,
        service: str,
        *,
        context: sockets.Context,
        plain: tuple[str, bytes] | None,
    ) -> None:
        self.settings = settings
        self.service = service
        self.context = context
        self.plain = plain
        self.loop = asyncio.get_running_loop()
        self._lanes: dict[Lane, _LaneConnection] = {}
        self._closed = False

    async def call(
        self,
        method_full_name: str,
        request: Message,
        reply_type: type[R],
        *,
        timeout: float | None = None,
        context: CallContext | None = None,
        lane: Lane | None = None,
    ) -> R:
        """Call and return the reply message.

        timeout: seconds, None = the method's own limit; the context's deadline also
        holds. Raises BusError. When outcome_unknown is set on it, the work may have been
        done.
        """
        future = self._start(method_full_name, request, timeout, context, lane)
        return self._parse(method_full_name, reply_type, (await future)[1])

    async def call_with_header(
        self,
        method_full_name: str,
        request: Message,
        reply_type: type[R],
        *,
        timeout: float | None = None,
        context: CallContext | None = None,
        lane: Lane | None = None,
    ) -> tuple[envelope_pb2.ReplyHeader, R]:
        """As call(), with the reply's header: revision, seq, partial."""
        header, body = await self._start(method_full_name, request, timeout, context, lane)
        return header, self._parse(method_full_name, reply_type, body)

    def _start(
        self,
        method_full_name: str,
        request: Message,
        timeout: float | None,
        context: CallContext | None,
        lane: Lane | None,
    ) -> asyncio.Future[tuple[envelope_pb2.ReplyHeader, bytes]]:
        method = METHODS[method_full_name]
        given = context if context is not None else _NO_CONTEXT
        now = time.monotonic_ns()
        deadline = now + (method.time_limit_ns if timeout is None else int(timeout * 1_000_000_000))
        if given.deadline_ns and given.deadline_ns < deadline:
            deadline = given.deadline_ns
        if deadline <= now:
            raise bus_error(
                "DEADLINE_EXCEEDED", f"no time was left for {method_full_name}; it was not sent"
            )
        request_id = given.request_id or _new_id()
        body = request.SerializeToString()
        if len(body) > BODY_LIMIT:
            raise bus_error(
                "TOO_LARGE",
                f"the request has {len(body)} bytes and {BODY_LIMIT} are allowed",
                size=str(len(body)),
                limit=str(BODY_LIMIT),
            )
        header = request_header(method, given, request_id, deadline)
        future: asyncio.Future[tuple[envelope_pb2.ReplyHeader, bytes]] = self.loop.create_future()
        connection = self._lane(lane or method.lane)
        connection.start(request_id, _Pending(method, header, body, future, deadline))
        return future

    def _parse(self, method_full_name: str, reply_type: type[R], untrusted_body: bytes) -> R:
        try:
            return reply_type.FromString(untrusted_body)
        except DecodeError:
            raise bus_error(
                "MALFORMED_REPLY", f"{self.service} sent no readable answer to {method_full_name}"
            ) from None

    async def cancel(self, request_id: bytes, *, timeout: float = 2.0) -> bool:
        """Ask the service to cancel this process's own request; False when it has none."""
        reply = await self.call(
            "bulkhead.api.Control.Cancel",
            control_pb2.CancelRequest(request_id=request_id),
            control_pb2.CancelReply,
            timeout=timeout,
        )
        return reply.found

    def close(self) -> None:
        """Fail what waits with UNAVAILABLE and close the sockets."""
        self._closed = True
        for connection in self._lanes.values():
            connection.close(bus_error("NOT_CONNECTED", "this process closes its connections"))
        self._lanes.clear()

    def _lane(self, lane: Lane) -> _LaneConnection:
        connection = self._lanes.get(lane)
        if connection is None:
            if self._closed:
                raise bus_error("NOT_CONNECTED", "this process closes its connections")
            connection = self._lanes[lane] = _LaneConnection(self, lane)
        return connection


class Connections:
    """All channels of one process.

    me: the service's own name, "operator" for tools. With isolation the servers see the
    uid and me is not sent.
    """

    def __init__(
        self,
        settings: Settings,
        me: str,
        *,
        context: sockets.Context | None = None,
        secret: bytes | None = None,
    ) -> None:
        self._settings = settings
        self._own = context is None
        self.context = context if context is not None else sockets.new_context()
        if secret is None:
            secret = read_secret(settings)
        self.plain = None if settings.isolated else (me, secret)
        self._channels: dict[str, Channel] = {}

    def channel(self, service: str) -> Channel:
        """The channel to a service, made at its first use."""
        channel = self._channels.get(service)
        if channel is None:
            channel = self._channels[service] = Channel(
                self._settings, service, context=self.context, plain=self.plain
            )
        return channel

    def close(self) -> None:
        """Close every channel, and the context if it was made here."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        if self._own:
            self.context.destroy(linger=0)


def operator_call(
    settings: Settings,
    service: str,
    method_full_name: str,
    request: Message,
    reply_type: type[R],
    timeout: float,
) -> R:
    """A blocking call as the operator, for command line tools; timeout in seconds.

    Needs uid 0 where services have users of their own, else the user of the instance.
    Sends again with the same id as Channel.call does. Raises BusError, SettingsError.
    """
    method = METHODS[method_full_name]
    check_server(settings, service)
    secret = read_secret(settings)
    plain = None if settings.isolated else (OPERATOR, secret)
    deadline = time.monotonic_ns() + int(timeout * 1e9)
    request_id = secrets.token_bytes(16)
    frames = (
        PREFIX,
        request_header(method, _NO_CONTEXT, request_id, deadline),
        request.SerializeToString(),
    )
    context = sockets.new_context()
    try:
        socket = sockets.dealer(context, plain=plain)
        try:
            socket.connect(settings.socket(service, method.lane.value))
            header, body = _exchange(socket, service, method, frames, request_id, deadline)
        finally:
            socket.close(linger=0)
    finally:
        context.term()
    if header.status.code:
        raise from_status(header.status)
    try:
        return reply_type.FromString(body)
    except DecodeError:
        raise bus_error("MALFORMED_REPLY", f"{service} sent no readable answer") from None


def _exchange(
    socket: sockets.Socket,
    service: str,
    method: Method,
    frames: tuple[bytes, bytes, bytes],
    request_id: bytes,
    deadline: int,
) -> tuple[envelope_pb2.ReplyHeader, bytes]:
    wait = _RETRY_FIRST
    while True:
        left = _left_ms(deadline)
        if not left or not socket.poll(left, zmq.POLLOUT):
            raise bus_error(
                "NOT_CONNECTED",
                f"{service} cannot be reached, so nothing was changed; is the instance running?",
                service=service,
            )
        socket.send_multipart(frames, zmq.NOBLOCK)
        header = None
        while header is None or header.request_id != request_id:
            left = _left_ms(deadline)
            if not left or not socket.poll(left):
                raise bus_error(
                    "NO_REPLY",
                    f"{service} did not answer in time; whether it was done is unknown",
                    service=service,
                )
            try:
                header, untrusted_body = decode_reply(socket.recv_multipart())
            except FrameError:
                continue
        unavailable = header.status.code == envelope_pb2.CODE_UNAVAILABLE
        if unavailable and method.idempotent:
            pause = max(header.status.retry_after_ms / 1000, wait)
            wait = min(wait * 2, _RETRY_LARGEST)
            if time.monotonic_ns() + pause * 1e9 < deadline:
                time.sleep(pause)
                continue
        return header, untrusted_body


def _left_ms(deadline: int) -> int:
    return max(0, (deadline - time.monotonic_ns() + 999_999) // 1_000_000)
