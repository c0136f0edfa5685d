"""The server order, in one place.

frame -> version -> caller -> access rule -> deadline -> duplicate (join or stored reply)
-> parse -> handler -> store reply -> send.

Owns this order, the bounds on what is taken in, and what a handler is told about its
call. Must not know sockets, event loops or any service. Invariant: every request that is
a message of this protocol gets exactly one reply per time it was received, and one
(caller, request id) runs at most one handler at a time.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from google.protobuf.message import DecodeError, Message

from bulkhead.api import envelope_pb2
from bulkhead.bus import deadline as clock
from bulkhead.bus.deadline import Deadline
from bulkhead.bus.dedup import Key, MemoryReplyStore, ReplyStore, StoredReply
from bulkhead.bus.errors import BusError, bus_error, from_refusal, to_status
from bulkhead.bus.frames import (
    BODY_LIMIT,
    COUNTERS,
    FrameError,
    decode_request,
    encode_reply_header,
)
from bulkhead.bus.methods import CONTROL_SERVICE, Effect, Lane, Method, methods_of
from bulkhead.model.refusal import TypedRefusal

# Services that act for an Admin API source qube.
SOURCE_SENDERS = frozenset({"adminapi", "dispvm", "backup", "lifecycle"})
# How often one running request may be asked again before the oldest asker is forgotten.
JOIN_LIMIT = 16
Handler = Callable[[Any, "Call"], Coroutine[Any, Any, Message]]


_READ = Effect.READ
# Slots of Call -> fields of the request header.
_FROM_HEADER = {
    name: name
    for name in ("operation", "step", "epoch", "etag", "min_seq", "validate_only", "trace_id")
} | {"source": "on_behalf_of"}


class Call:
    """One request as its handler sees it.

    caller: service name or "operator". source: the Admin API qube it is made for, "" =
    none. request_id: 16 bytes. operation, step, epoch: set by lifecycle. etag: compare
    and set, 0 = none. min_seq: read not older than. deadline: check before each
    irreversible effect. cancelled: the caller gave up.

    A handler may set revision, seq and partial: they go into the reply header. A handler
    that stores its reply durably itself (see freeze_reply) sets reply_stored.
    """

    __slots__ = (
        "caller",
        "source",
        "request_id",
        "method",
        "operation",
        "step",
        "epoch",
        "etag",
        "min_seq",
        "validate_only",
        "trace_id",
        "deadline",
        "cancelled",
        "revision",
        "seq",
        "partial",
        "reply_stored",
        "_cancel_points",
        "_header",
    )

    def __init__(
        self,
        caller: str = "operator",
        *,
        source: str = "",
        request_id: bytes = b"",
        method: str = "",
        operation: str = "",
        step: str = "",
        epoch: int = 0,
        etag: int = 0,
        min_seq: int = 0,
        validate_only: bool = False,
        trace_id: bytes = b"",
        deadline: Deadline | None = None,
    ) -> None:
        self.caller = caller
        self.source = source
        self.request_id = request_id
        self.method = method
        self.operation = operation
        self.step = step
        self.epoch = epoch
        self.etag = etag
        self.min_seq = min_seq
        self.validate_only = validate_only
        self.trace_id = trace_id
        self.deadline = deadline if deadline is not None else Deadline.after(60)
        self.cancelled = False
        self.revision = 0
        self.seq = 0
        self.partial = False
        self.reply_stored = False
        self._cancel_points = 0
        self._header: envelope_pb2.RequestHeader | None = None

    @classmethod
    def received(
        cls,
        caller: str,
        request_id: bytes,
        method: str,
        deadline: Deadline,
        header: envelope_pb2.RequestHeader,
    ) -> Call:
        """The call of a received header; what few handlers look at is read when asked for."""
        call = cls.__new__(cls)
        call.caller = caller
        call.request_id = request_id
        call.method = method
        call.deadline = deadline
        call.cancelled = call.partial = call.reply_stored = False
        call.revision = call.seq = call._cancel_points = 0
        call._header = header
        return call

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            # Only for a slot that received() left empty.
            if name not in _FROM_HEADER:
                raise AttributeError(name)
            value = getattr(self._header, _FROM_HEADER[name])
            setattr(self, name, value)
            return value

    def check(self) -> None:
        """Raise BusError CANCELLED or DEADLINE_EXCEEDED when the work should stop."""
        if self.cancelled:
            raise bus_error("CANCELLED", "the caller cancelled the call")
        self.deadline.check()

    @contextlib.contextmanager
    def cancel_point(self) -> Iterator[None]:
        """`with call.cancel_point():` - within, a cancel interrupts what is awaited.

        Outside, a cancel only sets `cancelled`. Raises as check() on entry.
        """
        self.check()
        self._cancel_points += 1
        try:
            yield
        finally:
            self._cancel_points -= 1

    @property
    def at_cancel_point(self) -> bool:
        """True while the handler waits inside cancel_point()."""
        return self._cancel_points > 0

    def freeze_reply(self, reply: Message) -> bytes:
        """The successful reply as a blob for a durable store (StoredReply.from_bytes).

        Uses revision, seq and partial as they are now. Write it in the same transaction
        as the effect, then set reply_stored.
        """
        header = encode_reply_header(
            self.request_id, revision=self.revision, seq=self.seq, partial=self.partial
        )
        return StoredReply(self.method, header, reply.SerializeToString()).to_bytes()


class Sender(Protocol):
    """Where a reply goes: one lane's connection to one peer."""

    def __call__(self, peer: Any, header: bytes, body: bytes) -> None:
        """Send a reply; never raises."""


@dataclass(slots=True, eq=False)
class Work:
    """A request on its way through a handler."""

    key: Key
    method: Method
    call: Call
    handler: Handler
    untrusted_request: Message | None
    size: int
    peers: list[Any]
    cancel: Callable[[], object] | None = None
    running: bool = False


@dataclass(slots=True)
class Bounds:
    """What one lane takes in: handlers at once, waiting requests, their bytes."""

    in_flight: int = 256
    queued: int = 1024
    queued_bytes: int = 32 * 1024 * 1024


@dataclass(slots=True)
class _LaneState:
    bounds: Bounds
    in_flight: int = 0
    queue: deque[Work] = field(default_factory=deque)
    queue_bytes: int = 0


class Dispatcher:
    """Takes received frames in, starts handlers, sends replies.

    services: full proto service name -> object whose coroutine methods are the
    snake_case rpc names. send(peer, header, body): how a reply leaves; peer is opaque.
    start(work): runs work.handler and ends with complete() or fail(). Raises TypeError
    when a method of a served service has no handler.
    """

    def __init__(
        self,
        service: str,
        services: Mapping[str, object],
        *,
        send: Sender,
        start: Callable[[Work], None],
        store: ReplyStore | None = None,
        work_bounds: Bounds | None = None,
        control_bounds: Bounds | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        self.service = service
        self.draining = False
        self.counters: dict[str, int] = dict.fromkeys(
            (*COUNTERS, "requests", "refused", "joined", "from_store", "strangers", "busy"), 0
        )
        self._send = send
        self._start = start
        self._store: ReplyStore = store if store is not None else MemoryReplyStore()
        self._log = log or logging.getLogger(f"bulkhead.{service}")
        self._lanes = {
            Lane.WORK: _LaneState(work_bounds or Bounds()),
            Lane.CONTROL: _LaneState(control_bounds or Bounds(64, 256, 8 * 1024 * 1024)),
        }
        self._running: dict[Key, Work] = {}
        self._idle: Callable[[], None] | None = None
        self._methods: dict[str, tuple[Method, Handler]] = {}
        for name, handlers in services.items():
            for full_name, method in methods_of(name).items():
                handler = getattr(handlers, method.handler, None)
                if handler is None:
                    raise TypeError(
                        f"{type(handlers).__name__} has no method {method.handler} for {full_name}"
                    )
                self._methods[full_name] = (method, handler)

    # ---- the order

    def receive(
        self, lane: Lane, caller: str | None, peer: Any, untrusted: Sequence[bytes]
    ) -> None:
        """One received message: untrusted is [magic+version, header, body].

        caller is what the transport vouches for, None for a stranger. Never raises.
        """
        counters = self.counters
        # frame, version
        try:
            header, untrusted_body = decode_request(untrusted)
        except FrameError as error:
            counters[error.counter] += 1
            return
        # caller
        if caller is None:
            counters["strangers"] += 1
            return
        counters["requests"] += 1
        try:
            work = self._admit(lane, caller, peer, header, untrusted_body)
            if work is None:
                return
            state = self._lanes[lane]
            if state.in_flight < state.bounds.in_flight:
                self._running[work.key] = work
                state.in_flight += 1
                work.running = True
                self._start(work)
            else:
                self._queue(state, work)
        except BusError as error:
            counters["refused"] += 1
            self._answer(peer, header.request_id, error)
        except Exception as error:
            self._answer(peer, header.request_id, self._unexpected(header.method, error))

    def _admit(
        self,
        lane: Lane,
        caller: str,
        peer: Any,
        header: envelope_pb2.RequestHeader,
        untrusted_body: bytes,
    ) -> Work | None:
        name = header.method
        found = self._methods.get(name)
        if found is None:
            raise bus_error(
                "NO_SUCH_METHOD", f"{self.service} does not serve that method", method=name[:200]
            )
        method, handler = found
        # access rule
        if caller not in method.callers:
            raise bus_error(
                "CALLER_NOT_ALLOWED", f"{caller} may not call {name}", caller=caller, method=name
            )
        if method.lane is not lane:
            raise bus_error(
                "WRONG_LANE",
                f"{name} is served on the {method.lane.value} lane",
                method=name,
                lane=method.lane.value,
            )
        source = header.on_behalf_of
        if source and caller not in SOURCE_SENDERS:
            raise bus_error("SOURCE_NOT_ALLOWED", f"{caller} may not act for a qube", caller=caller)
        # deadline
        now = clock.monotonic_ns()
        limit = now + method.time_limit_ns
        ends = header.deadline_ns
        if not ends or ends > limit:
            ends = limit
        elif ends <= now:
            raise bus_error(
                "DEADLINE_EXCEEDED", "the request arrived after its deadline; nothing was done"
            )
        # duplicate
        request_id = header.request_id
        key = (caller, request_id)
        running = self._running.get(key)
        if running is not None:
            if running.method is not method:
                raise self._reused(name, running.method.full_name)
            self.counters["joined"] += 1
            running.peers.append(peer)
            if len(running.peers) > JOIN_LIMIT:
                del running.peers[0]
            return None
        if method.effect is not _READ:
            stored = self._store.get(caller, request_id)
            if stored is not None:
                if stored.method != name:
                    raise self._reused(name, stored.method)
                self.counters["from_store"] += 1
                self._send(peer, stored.header, stored.body)
                return None
        if self.draining and method.service != CONTROL_SERVICE:
            raise bus_error(
                "DRAINING", f"{self.service} is about to stop; ask again", retry_after_ms=50
            )
        # parse
        try:
            request = method.request_type.FromString(untrusted_body)
        except DecodeError:
            raise bus_error(
                "MALFORMED_BODY",
                f"the body is no {method.request_type.DESCRIPTOR.name}",
                method=name,
            ) from None
        call = Call.received(caller, request_id, name, Deadline(ends), header)
        return Work(key, method, call, handler, request, len(untrusted_body), [peer])

    def _queue(self, state: _LaneState, work: Work) -> None:
        bounds = state.bounds
        if len(state.queue) >= bounds.queued or state.queue_bytes + work.size > bounds.queued_bytes:
            self.counters["busy"] += 1
            raise bus_error(
                "BUSY", f"{self.service} has too much waiting; ask again", retry_after_ms=100
            )
        self._running[work.key] = work
        state.queue.append(work)
        state.queue_bytes += work.size

    # ---- ends of a handler

    def complete(self, work: Work, reply: Any) -> None:
        """The handler returned: store the reply, send it to everyone who asked."""
        method, call = work.method, work.call
        if type(reply) is not method.reply_type:
            self.fail(work, TypeError(f"{method.full_name} returned {type(reply).__name__}"))
            return
        body: bytes = reply.SerializeToString()
        if len(body) > BODY_LIMIT:
            self.fail(
                work,
                bus_error(
                    "TOO_LARGE",
                    f"the answer has {len(body)} bytes and {BODY_LIMIT} are allowed",
                    size=str(len(body)),
                    limit=str(BODY_LIMIT),
                ),
            )
            return
        header = encode_reply_header(
            call.request_id, revision=call.revision, seq=call.seq, partial=call.partial
        )
        self._finish(work, header, body, keep=not call.reply_stored)

    def fail(self, work: Work, exception: BaseException) -> None:
        """The handler raised: turn it into a status, store it unless it may be asked again."""
        if isinstance(exception, BusError):
            error = exception
        elif isinstance(exception, TypedRefusal):
            error = from_refusal(exception)
        else:
            error = self._unexpected(work.method.full_name, exception)
        header = self._error_header(work.call.request_id, error, work.call)
        # What may be asked again must run again; anything else has one answer for ever.
        keep = error.code not in ("UNAVAILABLE", "INTERNAL") and not work.call.reply_stored
        self._finish(work, header, b"", keep=keep)

    def _finish(self, work: Work, header: bytes, body: bytes, *, keep: bool) -> None:
        if keep and work.method.effect is not _READ and not work.call.validate_only:
            try:
                self._store.put(*work.key, StoredReply(work.method.full_name, header, body))
            except Exception as error:
                # Not kept: a repeat would run again, so the caller must not take it as done.
                failure = self._unexpected(work.method.full_name, error)
                header, body = self._error_header(work.call.request_id, failure, None), b""
        self._running.pop(work.key, None)
        for peer in work.peers:
            self._send(peer, header, body)
        if work.running:
            work.running = False
            state = self._lanes[work.method.lane]
            state.in_flight -= 1
            if state.queue:
                self._start_queued(state)
        if self._idle is not None and not self._running:
            self._idle()

    def _start_queued(self, state: _LaneState) -> None:
        while state.queue and state.in_flight < state.bounds.in_flight:
            work = state.queue.popleft()
            state.queue_bytes -= work.size
            if work.call.deadline.passed:
                self.fail(
                    work,
                    bus_error(
                        "DEADLINE_EXCEEDED", "the deadline passed in the queue; nothing was done"
                    ),
                )
                continue
            state.in_flight += 1
            work.running = True
            self._start(work)

    # ---- control

    def cancel(self, caller: str, request_id: bytes) -> bool:
        """Cancel the caller's own running or waiting request; False when there is none."""
        work = self._running.get((caller, request_id))
        if work is None:
            return False
        work.call.cancelled = True
        if not work.running:
            state = self._lanes[work.method.lane]
            state.queue.remove(work)
            state.queue_bytes -= work.size
            self.fail(work, bus_error("CANCELLED", "cancelled before it began; nothing was done"))
        elif work.cancel is not None and work.call.at_cancel_point:
            work.cancel()
        return True

    @property
    def in_flight(self) -> int:
        """Requests running or waiting, on both lanes."""
        return len(self._running)

    def pending(self, lane: Lane) -> int:
        """Requests running or waiting on one lane."""
        state = self._lanes[lane]
        return state.in_flight + len(state.queue)

    def when_idle(self, callback: Callable[[], None] | None) -> None:
        """Call back each time the last running request ends."""
        self._idle = callback

    # ---- errors

    def _answer(self, peer: Any, request_id: bytes, error: BusError) -> None:
        self._send(peer, self._error_header(request_id, error, None), b"")

    @staticmethod
    def _error_header(request_id: bytes, error: BusError, call: Call | None) -> bytes:
        return encode_reply_header(
            request_id,
            status=to_status(error),
            revision=call.revision if call is not None else 0,
            seq=call.seq if call is not None else 0,
        )

    def _unexpected(self, method: str, error: BaseException) -> BusError:
        reference = secrets.token_hex(6)
        self._log.error("unexpected error in %s [%s]", method, reference, exc_info=error)
        return BusError(
            "INTERNAL",
            "INTERNAL",
            f"an unexpected error in {self.service}; its log says more under {reference}",
            log_ref=reference,
        )

    @staticmethod
    def _reused(method: str, earlier: str) -> BusError:
        return bus_error(
            "REQUEST_ID_REUSED",
            f"this request id was used for {earlier}; make a new one",
            method=method,
            earlier=earlier,
        )
