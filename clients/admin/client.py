"""The blocking client.

Owns sockets and child processes of one call at a time. Must not know what calls mean.
Invariant: each call is one connection, so a client may be used from many threads.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from clients.admin import calls, wire
from clients.admin.exceptions import QubesDaemonAccessError, QubesDaemonCommunicationError
from clients.admin.paths import QREXEC_CLIENT, socket_path

T = TypeVar("T")
_CHUNK = 65536


class AdminClient:
    """Admin API calls, answered or raised.

    Give the path of a unix socket, or none to go through qrexec from inside a qube.
    timeout: seconds that one call may take, None = as long as it takes.
    """

    def __init__(
        self, path: Path | str | None, *, source: str = "dom0", timeout: float | None = None
    ) -> None:
        self.path = str(path) if path is not None else None
        self.source = source
        self.timeout = timeout

    @classmethod
    def local(cls, root: Path | str | None = None, **more: float | None) -> AdminClient:
        """The client of the instance below root; see clients.admin.paths."""
        return cls(socket_path(root), timeout=more.get("timeout"))

    # ---- calls

    def call(
        self,
        method: str,
        dest: str = "dom0",
        arg: str = "",
        payload: bytes = b"",
        *,
        timeout: float | None = None,
    ) -> bytes:
        """Any call: the reply's content. Raises clients.admin.exceptions.

        timeout: seconds for this call alone, None = the client's.
        """
        limit = timeout if timeout is not None else self.timeout
        if self.path is None:
            return wire.parse_reply(self._through_qrexec(method, dest, arg, payload, limit))
        frame = wire.request(method, dest, arg, payload, self.source)
        with self._connect(frame, limit) as peer:
            chunks = []
            while chunk := _receive(peer):
                chunks.append(chunk)
        return wire.parse_reply(b"".join(chunks))

    def ask(self, question: calls.Question[T]) -> T:
        """A prepared call of clients.admin.calls."""
        return question.read(
            self.call(question.method, question.dest, question.arg, question.payload)
        )

    def events(
        self, dest: str = "dom0", method: str = "admin.Events", *, resume: str | None = None
    ) -> Iterator[wire.Event]:
        """Events as they come, connection-established first; ends when the stream does.

        resume: None = plain admin.Events. A position, or "" for now, asks for
        bulkhead.Events: every event has its position in values["position"]; giving back
        the last one goes on behind it, or says events-lost, after which everything has to
        be read anew.

        Also bulkhead.op.Watch and admin.vm.Stats. method may carry "+ARG".
        """
        name, arg = wire.events_call(method, resume)
        if self.path is None:
            yield from self._events_through_qrexec(name, dest, arg)
            return
        parser = wire.EventParser()
        with self._connect(wire.request(name, dest, arg, b"", self.source), self.timeout) as peer:
            peer.settimeout(None)
            while chunk := _receive(peer):
                yield from parser.feed(chunk)

    def _connect(self, frame: bytes, timeout: float | None) -> socket.socket:
        assert self.path is not None
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            peer.settimeout(timeout)
            peer.connect(self.path)
            try:
                peer.sendall(frame)
                peer.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass  # dropped: reading says so
        except OSError as error:
            peer.close()
            raise QubesDaemonCommunicationError(
                f"nobody answers at {self.path}: {error}; is the system running?"
            ) from error
        return peer

    # ---- qrexec

    def _through_qrexec(
        self, method: str, dest: str, arg: str, payload: bytes, timeout: float | None
    ) -> bytes:
        wire.request(method, dest, arg, payload)  # the same limits
        try:
            done = subprocess.run(
                [QREXEC_CLIENT, dest, f"{method}+{arg}" if arg else method],
                input=payload,
                capture_output=True,
                timeout=timeout,
                check=False,
            )
        except OSError as error:
            raise QubesDaemonCommunicationError(f"{QREXEC_CLIENT}: {error}") from error
        except subprocess.TimeoutExpired as error:
            raise QubesDaemonCommunicationError("no answer in time") from error
        if done.returncode:
            raise QubesDaemonAccessError(f"{method} on {dest} was refused by policy")
        return done.stdout

    def _events_through_qrexec(self, method: str, dest: str, arg: str) -> Iterator[wire.Event]:
        parser = wire.EventParser()
        command = [QREXEC_CLIENT, dest, f"{method}+{arg}" if arg else method]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                while chunk := process.stdout.read1(_CHUNK):  # type: ignore[attr-defined]
                    yield from parser.feed(chunk)
            finally:
                process.terminate()

    # ---- shorthands

    def text(self, method: str, dest: str = "dom0", arg: str = "", payload: bytes = b"") -> str:
        """A call's plain text."""
        return self.ask(calls.text(method, dest, arg, payload))

    def lines(self, method: str, dest: str = "dom0", arg: str = "") -> list[str]:
        """A call's lines."""
        return self.ask(calls.listing(method, dest, arg))

    def info(self, method: str, dest: str = "dom0", arg: str = "") -> dict[str, str]:
        """A call's key=value lines."""
        return self.ask(calls.info(method, dest, arg))

    def qubes(self, dest: str = "dom0") -> list[wire.QubeLine]:
        """Every qube, or one."""
        return self.ask(calls.qubes(dest))

    def get(self, dest: str, name: str) -> wire.PropertyValue:
        """A property; dest "" = the system's."""
        return self.ask(calls.get_property(dest, name))

    def get_default(self, dest: str, name: str) -> wire.PropertyValue | None:
        """A property's default."""
        return self.ask(calls.get_default(dest, name))

    def get_all(self, dest: str) -> dict[str, wire.PropertyValue]:
        """All properties of a qube, or of the system."""
        return self.ask(calls.get_all(dest))

    def set(self, dest: str, name: str, value: str) -> None:
        """Set a property."""
        self.ask(calls.set_property(dest, name, value))

    def reset(self, dest: str, name: str) -> None:
        """A property back to its default."""
        self.ask(calls.reset_property(dest, name))


def _receive(peer: socket.socket) -> bytes:
    try:
        return peer.recv(_CHUNK)
    except ConnectionResetError:
        return b""
    except TimeoutError as error:
        raise QubesDaemonCommunicationError("no answer in time") from error
