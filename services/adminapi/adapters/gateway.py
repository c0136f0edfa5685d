"""The unix sockets of the Admin API: connections in, bytes out.

Owns listening sockets, one protocol object per connection, and every bound on memory
that a client could use up. Must not know what the bytes mean beyond their end.
Invariant: a connection is answered once with a whole reply, is a stream that ends when
its reader goes away or falls too far behind, or is dropped without a byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import select
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, cast

from services.adminapi.core.frame import REQUEST_LIMIT

LISTEN_FDS_VARIABLE = "BULKHEAD_LISTEN_FDS"
# Connections at once. Beyond it the oldest one that has not finished its request goes;
# when all have, the newcomer is told so.
CONNECTION_LIMIT = 4096
# Descriptors that are not for clients: the bus, files, the sockets themselves.
RESERVED_FDS = 256
# Bytes of requests that are not complete, all together; beyond it the oldest ones go.
INCOMPLETE_BYTES = 32 * 1024 * 1024
# Bytes that may wait for a stream's reader.
STREAM_BUFFER = 2 * 1024 * 1024
# Bytes that may wait for all readers together, looked at once so many have been written.
WAITING_BYTES = 64 * 1024 * 1024
SURVEY_BYTES = 4 * 1024 * 1024
# Seconds that a reader has to take a reply, or what is left of an ended stream.
FLUSH_S = 60.0
_BACKLOG = 1024


class Application(Protocol):
    """What answers requests."""

    def serve(self, socket_name: str, untrusted_frame: bytes, peer: Peer) -> None:
        """Answer a frame now or later through `peer`. Must not raise or block."""

    def too_many(self) -> bytes:
        """The reply for a connection that cannot be served."""

    def too_slow(self) -> bytes:
        """The last message of a stream whose reader fell behind."""


class Peer(asyncio.Protocol):
    """One connection."""

    __slots__ = (
        "gone",
        "on_gone",
        "_answered",
        "_buffer",
        "_fd",
        "_gateway",
        "_name",
        "_received",
        "_size",
        "_timer",
        "_transport",
        "_turned_away",
    )

    def __init__(self, gateway: Gateway, name: str) -> None:
        self._gateway = gateway
        self._name = name
        self._buffer: list[bytes] = []
        self._size = 0
        self._received = False
        self._answered = False
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._fd = -1
        self._turned_away = False
        self.gone = False
        self.on_gone: Callable[[], None] | None = None

    @property
    def size(self) -> int:
        """Bytes of the request so far."""
        return self._size

    @property
    def waiting(self) -> int:
        """Bytes that the reader has not taken."""
        transport = self._transport
        return transport.get_write_buffer_size() if transport is not None else 0

    @property
    def answered(self) -> bool:
        """Nothing more will be written."""
        return self._answered

    @property
    def socket_name(self) -> str:
        """Of the listening socket that the connection came through."""
        return self._name

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._gateway.arrived(self)

    def data_received(self, untrusted_data: bytes) -> None:
        if self._received:
            return
        self._size += len(untrusted_data)
        self._buffer.append(untrusted_data)
        if self._size > REQUEST_LIMIT:
            self.drop()
        self._gateway.received(len(untrusted_data))
        if self._answered:  # dropped, for its size or to make room
            self._buffer.clear()

    def eof_received(self) -> bool:
        if self._received or self._answered:
            return True
        self._received = True
        untrusted_frame = b"".join(self._buffer)
        self._buffer.clear()
        self._gateway.requested(self)
        if self._turned_away:
            self.reply(self._gateway.application.too_many())
            return True
        self._gateway.application.serve(self._name, untrusted_frame, self)
        return True  # the write side stays open for the reply

    def connection_lost(self, exc: Exception | None) -> None:
        del exc  # a broken connection and a closed one are the same to us
        self.gone = True
        if self._timer is not None:
            self._timer.cancel()
        self._gateway.left(self, self._fd)
        if self.on_gone is not None:
            self.on_gone()

    # ---- answers

    def turn_away(self) -> None:
        """Serve nothing; say so at the end of the request.

        Not before: what a closed connection has not read resets it, reply and all.
        """
        self._turned_away = True

    def reply(self, data: bytes) -> None:
        """Send the whole reply and close."""
        if self.gone or self._answered:
            return
        self._answered = True
        transport = self._transport
        assert transport is not None
        transport.write(data)
        transport.close()
        if transport.get_write_buffer_size():
            self._flush_within(FLUSH_S)
            self._gateway.written(len(data))

    def drop(self) -> None:
        """Close without a byte."""
        if self.gone:
            return
        self._answered = True
        if self._transport is not None:
            self._transport.abort()

    def begin_stream(self) -> None:
        """From now on the connection is a stream: watch for its reader going away."""
        transport = self._transport
        if transport is None or self.gone:
            return
        handle = transport.get_extra_info("socket")
        if handle is not None:
            self._fd = handle.fileno()
            self._gateway.watch(self._fd, self)

    def push(self, data: bytes) -> None:
        """Queue bytes of a stream; a reader that is too far behind loses the stream."""
        transport = self._transport
        if self.gone or self._answered or transport is None:
            return
        if transport.get_write_buffer_size() + len(data) > STREAM_BUFFER:
            self.too_slow()
            return
        transport.write(data)
        if transport.get_write_buffer_size():
            self._gateway.written(len(data))

    def too_slow(self) -> None:
        """End the stream with the reason: its reader is too far behind."""
        self._gateway.counters["slow_readers"] += 1
        self.end(self._gateway.application.too_slow())

    def end(self, data: bytes = b"") -> None:
        """The last bytes of a stream; then close."""
        if self.gone or self._answered:
            return
        self.reply(data)
        if self.on_gone is not None:
            on_gone, self.on_gone = self.on_gone, None
            on_gone()

    def hung_up(self) -> None:
        """The other side closed altogether."""
        if not self.gone and self._transport is not None:
            self._transport.abort()

    def _flush_within(self, seconds: float) -> None:
        transport = self._transport
        assert transport is not None
        self._timer = asyncio.get_running_loop().call_later(seconds, transport.abort)


class Gateway:
    """Listens on the Admin API sockets and hands frames to the application."""

    def __init__(
        self,
        application: Application,
        *,
        limit: int = 0,
        counters: dict[str, int] | None = None,
    ) -> None:
        """limit: connections at once, 0 = CONNECTION_LIMIT; counters: where to count."""
        self.application = application
        self.counters = counters if counters is not None else {}
        for name in ("connections", "slow_readers", "dropped_for_room", "reset_for_room"):
            self.counters.setdefault(name, 0)
        self._limit = limit or CONNECTION_LIMIT
        self._incoming = 0
        self._unread = 0
        self._loop = asyncio.get_running_loop()
        self._servers: dict[str, asyncio.AbstractServer] = {}
        self._peers: set[Peer] = set()
        # Insertion order: the oldest first.
        self._incomplete: dict[Peer, None] = {}
        self._epoll = select.epoll()
        self._watched: dict[int, Peer] = {}
        self._loop.add_reader(self._epoll.fileno(), self._hang_ups)

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._peers)

    async def listen(self, sockets: Mapping[str, socket.socket]) -> None:
        """Serve these listening sockets, by name ("admin", "internal", "misc" or a caller's)."""
        for name, listening in sockets.items():
            listening.setblocking(False)
            server = await self._loop.create_unix_server(
                lambda name=name: Peer(self, name),  # type: ignore[misc]
                sock=listening,
                backlog=_BACKLOG,
            )
            self._servers[name] = server

    def close_listeners(self) -> None:
        """Take no further connections; those that are open go on."""
        for server in self._servers.values():
            server.close()
        self._servers.clear()

    def stop_listening(self, name: str) -> None:
        """Take no further connections on one socket and end those that it has."""
        server = self._servers.pop(name, None)
        if server is not None:
            server.close()
        for peer in [p for p in self._peers if p.socket_name == name]:
            peer.hung_up()

    def close(self) -> None:
        """Close everything."""
        self.close_listeners()
        for peer in list(self._peers):
            peer.hung_up()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    # ---- for peers

    def arrived(self, peer: Peer) -> None:
        """A connection was made; make room where there is none."""
        self._peers.add(peer)
        self._incomplete[peer] = None
        self.counters["connections"] = len(self._peers)
        if len(self._peers) > self._limit:
            oldest = next(iter(self._incomplete))
            self.counters["dropped_for_room"] += 1
            if oldest is peer:
                peer.turn_away()
            else:
                oldest.drop()

    def received(self, size: int) -> None:
        """So many bytes of a request that is not complete; the oldest one goes where all
        of them together are too much."""
        self._incoming += size
        while self._incoming > INCOMPLETE_BYTES:
            oldest = next(peer for peer in self._incomplete if peer.size)
            self.counters["dropped_for_room"] += 1
            self._complete(oldest)
            oldest.drop()

    def written(self, size: int) -> None:
        """So many bytes were written to a reader that is behind."""
        self._unread += size
        if self._unread > SURVEY_BYTES:
            self._unread = 0
            self._survey()

    def _survey(self) -> None:
        """Make room where too much waits for readers: first of what is only being flushed,
        then of the streams that are furthest behind, which are told."""
        behind = sorted(
            ((peer.waiting, peer) for peer in self._peers if peer.waiting),
            key=lambda row: (not row[1].answered, -row[0]),
        )
        excess = sum(waiting for waiting, _ in behind) - WAITING_BYTES
        for waiting, peer in behind:
            if excess <= 0:
                break
            if peer.answered:
                self.counters["reset_for_room"] += 1
                peer.hung_up()
            else:
                peer.too_slow()
            excess -= waiting

    def requested(self, peer: Peer) -> None:
        """The peer's request is complete."""
        self._complete(peer)

    def _complete(self, peer: Peer) -> None:
        if self._incomplete.pop(peer, peer) is None:
            self._incoming -= peer.size

    def left(self, peer: Peer, fd: int) -> None:
        """The connection is closed; fd: what watch() was given, -1 = never watched."""
        self._peers.discard(peer)
        self._complete(peer)
        self.counters["connections"] = len(self._peers)
        if self._watched.get(fd) is peer:  # else the number is another connection's now
            del self._watched[fd]
            # The kernel forgets a closed descriptor by itself.
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(fd)

    def watch(self, fd: int, peer: Peer) -> None:
        """Tell the peer when the other side has closed altogether.

        The read side has ended already, so a reader would wake up all the time; EPOLLHUP
        alone, edge-triggered, comes once.
        """
        self._watched[fd] = peer
        self._epoll.register(fd, select.EPOLLET)

    def _hang_ups(self) -> None:
        for fd, events in self._epoll.poll(0):
            peer = self._watched.get(fd)
            if peer is not None and events & (select.EPOLLHUP | select.EPOLLERR):
                peer.hung_up()


def room_for_connections() -> int:
    """Connections that this process may hold: it is allowed as many descriptors as it can
    be, and what does not go to clients is set aside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTION_LIMIT + RESERVED_FDS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    if soft == resource.RLIM_INFINITY:
        return CONNECTION_LIMIT
    return max(1, min(CONNECTION_LIMIT, soft - RESERVED_FDS))


def inherited_sockets(text: str) -> dict[str, socket.socket]:
    """Listening sockets from "admin:3,internal:4,misc:5". ValueError where malformed."""
    found: dict[str, socket.socket] = {}
    for part in text.split(","):
        name, colon, number = part.partition(":")
        if not colon or not number.isdigit():
            raise ValueError(f"{LISTEN_FDS_VARIABLE}={text} is not NAME:FD,...")
        found[name] = socket.socket(fileno=int(number))
        os.set_inheritable(int(number), False)
    return found


def bind_socket(path: Path) -> socket.socket:
    """A listening socket at path, mode 0770. A stale file is replaced; OSError (address in
    use) when somebody answers there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                path.unlink()
            else:
                raise OSError(f"somebody serves {path} already")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o007)
        try:
            listening.bind(str(path))
        finally:
            os.umask(before)
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening
