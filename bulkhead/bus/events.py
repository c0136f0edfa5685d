"""The registry's stream: one sequence of entries, published and followed.

Owns the XPUB end, the SUB end and the replica that keeps a View. Must not know what an
entry means. Invariant: subscribers are called after the view holds the entry, in seq
order, each entry once; a resync entry tells them that entries were missed.

libzmq sends its own welcome message when a subscriber connects, before the subscription
is in force; here the publisher answers each subscription with a progress message, which
can only arrive when it is.

Each entry goes out once per topic, with the same seq: with hidden records for
HIDDEN_READERS, without them for everybody. The publisher grants each subscription
itself, by the name that the ZAP handler gave to the connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import zmq

from bulkhead import codec
from bulkhead.api import records_pb2, registry_pb2
from bulkhead.bus import memory, sockets
from bulkhead.bus.client import CallContext, Connections
from bulkhead.bus.errors import BusError, bus_error
from bulkhead.bus.frames import (
    ENTRY_LIMIT,
    TOPIC_HIDDEN,
    TOPIC_VISIBLE,
    FrameError,
    decode_entry,
)
from bulkhead.bus.replica import Apply, AskPage, Load, Replica
from bulkhead.config import Settings
from bulkhead.model.records import Change, QubePut, QubeRemoved, WireEvent
from bulkhead.model.view import View

# Who may have records that are being created or removed.
HIDDEN_READERS = frozenset({"lifecycle", "dispvm"})
PROGRESS_S = 1.0
_BATCH = 256
_RETRY_S = 0.1
# After a snapshot: long enough for those who waited for it to be answered first.
_KEEP_S = 1.0


class Publisher:
    """The registry's end of the stream."""

    def __init__(self, context: sockets.Context, *, plain: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = sockets.xpub(context, plain=plain)
        self._fd = self._socket.FD
        self._progress = records_pb2.StreamEntry(progress=True)
        self._timer: asyncio.TimerHandle | None = None
        self._scheduled = False
        self._granted = 0

    def start(self, endpoint: str, store_id: str, registry_boot: str, revision: int = 0) -> None:
        """Bind and begin with seq 0; call before the first publish()."""
        self._progress.store_id = store_id
        self._progress.registry_boot = registry_boot
        self._progress.revision = revision
        sockets.bind(self._socket, endpoint)
        self._loop.add_reader(self._fd, self._drain)
        self._tick()

    def publish(
        self, entry: records_pb2.StreamEntry, public: records_pb2.StreamEntry | None = None
    ) -> None:
        """Send an entry; its seq must be the last one + 1. store_id and registry_boot are
        filled in. public: what readers without hidden records get instead, None = the
        same. ValueError when the sequence breaks or the entry is too large."""
        if entry.seq != self._progress.seq + 1 or (public and public.seq != entry.seq):
            raise ValueError(f"entry {entry.seq} after {self._progress.seq}")
        full = self._encode(entry)
        visible = full if public is None else self._encode(public)
        self._progress.seq = entry.seq
        self._progress.revision = max(self._progress.revision, entry.revision)
        self._send(full, visible)

    def skip(self, seq: int, revision: int) -> None:
        """Entry `seq` is not sent, for its size: followers see the hole at once and take
        a new snapshot. ValueError when the sequence breaks."""
        if seq != self._progress.seq + 1:
            raise ValueError(f"entry {seq} after {self._progress.seq}")
        self._progress.seq = seq
        self._progress.revision = max(self._progress.revision, revision)
        self._say_progress()

    def _encode(self, entry: records_pb2.StreamEntry) -> bytes:
        entry.store_id = self._progress.store_id
        entry.registry_boot = self._progress.registry_boot
        data = entry.SerializeToString()
        if len(data) > ENTRY_LIMIT:
            raise ValueError(f"entry {entry.seq} has {len(data)} bytes")
        return data

    def close(self) -> None:
        """Stop publishing."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._fd)
        self._socket.close(linger=200)

    def _send(self, full: bytes, visible: bytes) -> None:
        # XPUB never blocks: above the high water mark it drops for that subscriber,
        # which then sees the hole.
        self._socket.send_multipart((TOPIC_HIDDEN, full), zmq.NOBLOCK)
        self._socket.send_multipart((TOPIC_VISIBLE, visible), zmq.NOBLOCK)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def _say_progress(self) -> None:
        data = self._progress.SerializeToString()
        self._send(data, data)

    def _tick(self) -> None:
        self._timer = self._loop.call_later(PROGRESS_S, self._tick)
        self._say_progress()

    def _drain(self) -> None:
        """Grant or refuse subscriptions; answer each granted one with a progress message."""
        self._scheduled = False
        joined = False
        while not self._socket.closed:
            try:
                frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            untrusted = frame.bytes
            topic = untrusted[1:]
            if untrusted[:1] == b"\x01" and self._may_read(frame, topic):
                self._socket.setsockopt(zmq.SUBSCRIBE, topic)
                self._granted += 1
                joined = True
            elif untrusted[:1] == b"\x00" and topic in (TOPIC_VISIBLE, TOPIC_HIDDEN):
                self._granted -= 1
        if joined:
            self._say_progress()

    @staticmethod
    def _may_read(frame: zmq.Frame, untrusted_topic: bytes) -> bool:
        if untrusted_topic == TOPIC_VISIBLE:
            return True
        return untrusted_topic == TOPIC_HIDDEN and _reader(frame) in HIDDEN_READERS

    @property
    def subscribers(self) -> int:
        """Subscriptions in force."""
        return max(0, self._granted)


def _reader(frame: zmq.Frame) -> str:
    """The subscriber's name as the ZAP handler gave it, "" without one."""
    try:
        name = frame.get("User-Id")
    except zmq.ZMQError:
        return ""
    return name if isinstance(name, str) else ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One step of the stream as its followers see it.

    resync True: entries were missed and the view was loaded anew; changes and events are
    empty and previous is the view before.
    """

    seq: int
    revision: int
    changes: tuple[Change, ...] = ()
    events: tuple[WireEvent, ...] = ()
    resync: bool = False
    previous: View | None = field(default=None, compare=False)


@dataclass(slots=True, eq=False)
class _Waiter:
    registry_boot: str
    revision: int
    seq: int
    future: asyncio.Future[None]


class ReplicaRunner:
    """Keeps a View equal to the registry's state.

    with_hidden False leaves out records that are not ACTIVE (only HIDDEN_READERS may have
    them). `view` is replaced by a new object at each resync: do not keep it.
    """

    def __init__(
        self,
        settings: Settings,
        connections: Connections,
        *,
        with_hidden: bool,
        log: logging.Logger,
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
    ) -> None:
        self._log = log
        self._spawn = spawn
        self._with_hidden = with_hidden
        self._registry = connections.channel("registry")
        self._loop = asyncio.get_running_loop()
        self._replica = Replica()
        self._ready = asyncio.Event()
        self._waiters: list[_Waiter] = []
        self._subscribers: list[Callable[[Entry], None]] = []
        self._heard = time.monotonic()
        self._boot = ""
        self._scheduled = False
        self._closed = False
        self._keeping: asyncio.TimerHandle | None = None
        self.view = View()
        self.seq = 0
        self.revision = 0
        self.dropped = 0
        self._socket = sockets.sub(connections.context, plain=connections.plain)
        self._fd = self._socket.FD
        self._loop.add_reader(self._fd, self._drain)
        self._socket.subscribe(TOPIC_HIDDEN if with_hidden else TOPIC_VISIBLE)
        self._socket.connect(settings.socket("registry", "stream"))
        self._schedule()

    # ---- for its users

    async def ready(self) -> None:
        """Return when the view is complete for the first time."""
        await self._ready.wait()

    @property
    def is_ready(self) -> bool:
        """The view has been complete at least once."""
        return self._ready.is_set()

    @property
    def live(self) -> bool:
        """The view is complete and follows the stream now."""
        return self._replica.live

    @property
    def resyncs(self) -> int:
        """Times that something was missed and the view was loaded anew."""
        return self._replica.resyncs

    @property
    def registry_boot(self) -> str:
        """The registry start that seq counts from."""
        return self._boot

    @property
    def lag_s(self) -> float:
        """Seconds since the stream was last heard; about one at most while all is well."""
        return time.monotonic() - self._heard

    async def wait_for(self, revision: int, seq: int, timeout: float) -> None:
        """Return when revision and seq are applied. BusError REPLICA_BEHIND after timeout.

        seq counts per registry start: once another start is followed, only revision is
        waited for.
        """
        waiter = _Waiter(self._boot, revision, seq, self._loop.create_future())
        if self._reached(waiter):
            return
        self._waiters.append(waiter)
        try:
            await asyncio.wait_for(waiter.future, timeout)
        except TimeoutError:
            raise bus_error(
                "REPLICA_BEHIND",
                f"the replica is at {self.revision}/{self.seq} and not yet at {revision}/{seq}",
                revision=str(revision),
                seq=str(seq),
            ) from None
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def subscribe(self, callback: Callable[[Entry], None]) -> Callable[[], None]:
        """Call back for each entry, after it is in the view; returns the way to stop.

        The callback must not block and must not raise.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def close(self) -> None:
        """Stop following."""
        self._closed = True
        if self._keeping is not None:
            self._keeping.cancel()
        self._loop.remove_reader(self._fd)
        self._socket.close(linger=0)

    # ---- the stream

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._scheduled = False
        for _ in range(_BATCH):
            if self._socket.closed:
                return
            try:
                untrusted = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                entry = decode_entry(untrusted)
            except FrameError:
                self.dropped += 1
                continue
            self._heard = time.monotonic()
            self._do(self._replica.on_entry(entry))
        self._schedule()

    def _do(self, actions: list[AskPage | Load | Apply]) -> None:
        try:
            for action in actions:
                self._do_one(action)
        except Exception:
            # The view may lack what failed: a new snapshot, after a pause.
            self._log.exception("an entry could not be applied")
            self._spawn(self._recover(), "replica recovery")

    async def _recover(self) -> None:
        await asyncio.sleep(_RETRY_S)
        if not self._closed:
            self._do(self._replica.restart("an entry could not be applied"))

    def _do_one(self, action: AskPage | Load | Apply) -> None:
        match action:
            case AskPage():
                self._spawn(self._page(action), "replica snapshot")
            case Load():
                self._load(action)
            case Apply():
                self._apply(action.entry)

    async def _page(self, ask: AskPage) -> None:
        request = registry_pb2.SnapshotRequest(
            page=ask.page, snapshot_id=ask.snapshot_id, with_hidden=self._with_hidden
        )
        try:
            page = await self._registry.call(
                "bulkhead.api.Registry.Snapshot",
                request,
                registry_pb2.SnapshotReply,
                context=CallContext(),
            )
        except BusError as error:
            if self._closed:
                return
            self._log.info("no snapshot from the registry yet: %s", error)
            await asyncio.sleep(_RETRY_S)
            if not self._closed:
                self._do(self._replica.on_page_failed(ask.attempt))
            return
        if not self._closed:
            self._do(self._replica.on_page(ask.attempt, page))

    def _load(self, load: Load) -> None:
        previous, view = self.view, View()
        for untrusted_change in load.changes:
            change = self._visible(codec.change_from_proto(untrusted_change), view)
            if change is not None:
                view.apply(change)
        self.view = view
        self._boot = load.registry_boot
        self._moved(load.seq, load.revision)
        if self._ready.is_set():
            self._log.warning("the view was loaded anew: %s", self._replica.last_reason)
        self._ready.set()
        self._tell(Entry(load.seq, load.revision, resync=True, previous=previous))
        if self._keeping is not None:
            self._keeping.cancel()
        self._keeping = self._loop.call_later(_KEEP_S, memory.keep)

    def _apply(self, entry: records_pb2.StreamEntry) -> None:
        changes = []
        for untrusted_change in entry.changes:
            change = self._visible(codec.change_from_proto(untrusted_change), self.view)
            if change is not None:
                self.view.apply(change)
                changes.append(change)
        events = tuple(codec.event_from_proto(event) for event in entry.events)
        self._moved(entry.seq, max(entry.revision, self.revision))
        self._tell(Entry(entry.seq, entry.revision, tuple(changes), events))

    def _visible(self, change: Change, view: View) -> Change | None:
        """The change as this replica may see it; None = nothing to see."""
        if self._with_hidden:
            return change
        if isinstance(change, QubePut) and change.qube.hidden:
            change = QubeRemoved(change.qube.uuid)
        if isinstance(change, QubeRemoved) and view.by_uuid_any(change.uuid) is None:
            return None
        return change

    def _moved(self, seq: int, revision: int) -> None:
        self.seq, self.revision = seq, revision
        for waiter in [w for w in self._waiters if self._reached(w)]:
            self._waiters.remove(waiter)
            if not waiter.future.done():
                waiter.future.set_result(None)

    def _reached(self, waiter: _Waiter) -> bool:
        if not self._ready.is_set() and not self._boot:
            return False
        same_start = waiter.registry_boot == self._boot or not waiter.registry_boot
        return self.revision >= waiter.revision and (not same_start or self.seq >= waiter.seq)

    def _tell(self, entry: Entry) -> None:
        for callback in tuple(self._subscribers):
            callback(entry)
