"""What the executables of /etc/qubes-rpc have in common.

Owns the environment that qrexec gives them and one raw exchange with a socket. Must not
know what calls mean. Invariant: a reply is handed on byte for byte.

Which instance: --root DIR before the argument, else $BULKHEAD_ROOT, else this machine.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from clients.admin.paths import socket_path

CHUNK = 65536
# Seconds until a service that does not answer a hold() is done without.
HOLD_S = 5.0
_UNUSABLE = 1


class ServiceError(Exception):
    """The service cannot be had; the message says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """Who asks for what. source: the calling qube; target: the qube that was asked for, as
    normalised by the policy; keyword: the target is a word such as "adminvm" instead."""

    root: str | None
    source: str
    target: str
    keyword: bool
    argument: str

    def socket(self, name: str) -> Path:
        """The instance's socket "admin", "internal" or "misc"."""
        return socket_path(self.root, name)

    def head(self, method: str) -> bytes:
        """The frame of a call on the target, up to its payload."""
        kind = "keyword" if self.keyword else "name"
        return frame_head(method, self.argument, self.source, self.target, kind)


def frame_head(method: str, arg: str, source: str, dest: str, kind: str = "name") -> bytes:
    """A frame up to its payload. ServiceError for a word that would shift the fields."""
    for word in (method, arg, source, dest):
        if "\0" in word or " " in word or not word.isascii():
            raise ServiceError(f"{word!r} cannot stand in a request")
    return f"{method}+{arg} {source} {kind} {dest}\0".encode()


def request(argv: Sequence[str], environment: Mapping[str, str]) -> Request:
    """The request that qrexec, or a tool in its place, describes. ServiceError."""
    words = list(argv)
    root: str | None = None
    if words[:1] == ["--root"]:
        if len(words) < 2:
            raise ServiceError("--root: say a directory")
        root = words[1]
        del words[:2]
    source = environment.get("QREXEC_REMOTE_DOMAIN", "")
    if not source:
        raise ServiceError("QREXEC_REMOTE_DOMAIN is not set: nobody asks")
    target = environment.get("QREXEC_REQUESTED_TARGET", "")
    word = environment.get("QREXEC_REQUESTED_TARGET_KEYWORD", "")
    # The type is missing where a tool of the administration qube runs the service itself.
    keyword = environment.get("QREXEC_REQUESTED_TARGET_TYPE", "") == "keyword" or (
        not target and bool(word)
    )
    return Request(
        root,
        source,
        word if keyword else target,
        keyword,
        words[0] if words else environment.get("QREXEC_SERVICE_ARGUMENT", ""),
    )


def exchange(path: Path, frame: bytes) -> Iterator[bytes]:
    """Send one frame; the reply as it comes, nothing where it was dropped. ServiceError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        try:
            peer.connect(str(path))
            try:
                peer.sendall(frame)
                peer.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass  # dropped: reading says so
            while True:
                try:
                    chunk = peer.recv(CHUNK)
                except ConnectionResetError:
                    return
                if not chunk:
                    return
                yield chunk
        except OSError as error:
            raise ServiceError(f"nobody answers at {path}: {error}") from error


def whole(path: Path, frame: bytes) -> bytes:
    """As exchange(), in one piece."""
    return b"".join(exchange(path, frame))


class Hold:
    """A connection that tells a service when this process has gone; a context manager.

    A service that serves no such call does without. One that starts again has forgotten it:
    call keep() now and then.
    """

    def __init__(self, path: Path, frame: bytes) -> None:
        self._path = path
        self._frame = frame
        self._peer: socket.socket | None = None

    def __enter__(self) -> Hold:
        self._take()
        return self

    def __exit__(self, *_error: object) -> None:
        self._drop()

    def _take(self) -> None:
        self._peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._peer.settimeout(HOLD_S)
        with contextlib.suppress(OSError):
            self._peer.connect(str(self._path))
            self._peer.sendall(self._frame)
            self._peer.shutdown(socket.SHUT_WR)
            if self._peer.recv(CHUNK)[:1] == b"1":
                return  # from here on it knows
        self._drop()

    def _drop(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    def keep(self) -> None:
        """Take hold again where the service has let go."""
        if self._peer is not None and select.select([self._peer], [], [], 0)[0]:
            self._drop()
            self._take()


def write(data: bytes) -> None:
    """All of it to standard output. OSError when nobody reads it."""
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


def exception(name: str, message: str) -> bytes:
    """An exception reply of our own. name: a class that clients do not format."""
    text = message.encode("ascii", "replace").replace(b"\0", b"?")
    return b"2\0" + name.encode() + b"\0\0" + text + b"\0"


def fail(name: str, message: object) -> NoReturn:
    """One sentence on stderr, exit status 1."""
    print(f"{name}: {message}", file=sys.stderr)
    raise SystemExit(_UNUSABLE)


_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):
    """SIGTERM, SIGINT or SIGHUP came."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Signals that end the program raise Stopped inside, so that work can be taken back."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(f"stopped by {signal.Signals(number).name}")

    before = [signal.signal(number, stop) for number in _STOPPING]
    try:
        yield
    finally:
        for number, handler in zip(_STOPPING, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals that end the program wait inside; Stopped comes when the block is left."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
