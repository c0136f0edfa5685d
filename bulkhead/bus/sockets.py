"""ZeroMQ sockets with the options of this bus.

Owns every socket option, in this one place, and binding with the right file mode. Must
not know messages or callers. Invariant: no socket of the bus is made anywhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import zmq

from bulkhead.bus.frames import ENTRY_LIMIT, MESSAGE_LIMIT

LANE_DOMAIN = b"lane"
STREAM_DOMAIN = b"stream"

# Flags as plain integers: combining the enum's members costs more than sending.
NOBLOCK = int(zmq.NOBLOCK)
MORE = int(zmq.NOBLOCK | zmq.SNDMORE)

# Messages that leave together: fewer wake-ups of ZeroMQ's thread, but not so many that
# the other side stands idle.
TOGETHER = 8

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]

_HIGH_WATER = 2000
_STREAM_HIGH_WATER = 4096
_HANDSHAKE_MS = 5000
_HEARTBEAT_MS = 1000
_HEARTBEAT_TIMEOUT_MS = 4000
# Sockets get mode 0660: owner and the group of permitted callers.
_BIND_UMASK = 0o117


def new_context() -> Context:
    """A ZeroMQ context; never fork after this."""
    context: Context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 256)
    return context


def _common(socket: Socket, limit: int, high_water: int) -> Socket:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, limit)
    socket.setsockopt(zmq.SNDHWM, high_water)
    socket.setsockopt(zmq.RCVHWM, high_water)
    socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    return socket


def _serving(socket: Socket, domain: bytes, plain: bool) -> Socket:
    # A domain makes libzmq ask the ZAP handler for the NULL mechanism too.
    socket.setsockopt(zmq.ZAP_DOMAIN, domain)
    if plain:
        socket.setsockopt(zmq.PLAIN_SERVER, 1)
    return socket


def _connecting(socket: Socket, plain: tuple[str, bytes] | None) -> Socket:
    socket.setsockopt(zmq.RECONNECT_IVL, 1)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 20)
    if plain is not None:
        name, secret = plain
        socket.setsockopt(zmq.PLAIN_USERNAME, name.encode())
        socket.setsockopt(zmq.PLAIN_PASSWORD, secret)
    return socket


def router(context: Context, *, plain: bool) -> Socket:
    """A lane's server socket."""
    socket = _common(context.socket(zmq.ROUTER), MESSAGE_LIMIT, _HIGH_WATER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return _serving(socket, LANE_DOMAIN, plain)


def dealer(context: Context, *, plain: tuple[str, bytes] | None) -> Socket:
    """A lane's client socket; plain is (own service name, secret) without isolation.

    IMMEDIATE: while the server is down a send is refused instead of being kept and
    delivered when it is stale.
    """
    socket = _common(context.socket(zmq.DEALER), MESSAGE_LIMIT, _HIGH_WATER)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    return _connecting(socket, plain)


def xpub(context: Context, *, plain: bool) -> Socket:
    """The registry's stream; every subscription is reported, repeated ones too, and is in
    force only when the publisher grants it."""
    socket = _common(context.socket(zmq.XPUB), MESSAGE_LIMIT, _STREAM_HIGH_WATER)
    socket.setsockopt(zmq.XPUB_VERBOSE, 1)
    socket.setsockopt(zmq.XPUB_MANUAL, 1)
    return _serving(socket, STREAM_DOMAIN, plain)


def sub(context: Context, *, plain: tuple[str, bytes] | None) -> Socket:
    """A replica's end of the stream."""
    socket = _common(context.socket(zmq.SUB), ENTRY_LIMIT, _STREAM_HIGH_WATER)
    return _connecting(socket, plain)


def raw_send(socket: Socket) -> Callable[[bytes, int], object]:
    """The socket's own send(data, flags), without pyzmq's checks of rarely used options.

    It costs half of Socket.send; data must be bytes.
    """
    send: Callable[[bytes, int], object] = super(zmq.Socket, socket).send
    return send


def raw_receive(socket: Socket) -> Callable[..., Any]:
    """The socket's own recv(flags, copy)."""
    receive: Callable[..., Any] = super(zmq.Socket, socket).recv
    return receive


def bind(socket: Socket, endpoint: str) -> None:
    """Bind with mode 0660 from the first instant (no chmod after the fact)."""
    # The file is made by this thread inside zmq_bind, so the umask holds for it.
    before = os.umask(_BIND_UMASK)
    try:
        socket.bind(endpoint)
    finally:
        os.umask(before)
