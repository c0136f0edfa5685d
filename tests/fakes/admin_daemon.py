"""A unix socket that answers Admin API calls from a table and remembers what was asked.

For tests of tools: answers are keyed by "METHOD", "METHOD DEST" or "METHOD+ARG DEST", the
most precise key first. An answer is bytes or text (OK), a Refused, a list of them used up
one per call, or a function of the Call. What the table lacks is refused as 4.4 refuses an
unknown method.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType


@dataclass(frozen=True)
class Call:
    """One request."""

    method: str
    dest: str
    arg: str
    payload: bytes
    source: str = "dom0"

    @property
    def brief(self) -> str:
        """METHOD[+ARG] DEST, without "admin." and "vm."."""
        arg = f"+{self.arg}" if self.arg else ""
        return f"{self.method.removeprefix('admin.').removeprefix('vm.')}{arg} {self.dest}"


@dataclass(frozen=True)
class Refused:
    """An exception reply."""

    name: str
    message: str = "no"


@dataclass(frozen=True)
class Raw:
    """Bytes as they are, such as a stream of events."""

    data: bytes


Single = bytes | str | Refused | Raw | Callable[[Call], bytes | str | Refused | Raw]
Answer = Single | list[Single]


class AdminDaemon:
    """Listens from the with statement's beginning to its end."""

    def __init__(self, path: Path, answers: Mapping[str, Answer]) -> None:
        self.path = path
        self.answers = answers
        self.calls: list[Call] = []
        # Methods that are answered without being remembered.
        self.aside: frozenset[str] = frozenset()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> AdminDaemon:
        self._listener.bind(str(self.path))
        self._listener.listen(16)
        self._thread.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        # A connection of our own wakes accept() up for the last time.
        self._stopping = True
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as last:
            last.connect(str(self.path))
        self._thread.join(10)
        self._listener.close()
        self.path.unlink()

    _stopping = False

    @property
    def briefs(self) -> list[str]:
        """What was asked, in order."""
        return [call.brief for call in self.calls]

    def payload(self, brief: str) -> bytes:
        """Payload of the only call of that brief."""
        found = [call.payload for call in self.calls if call.brief == brief]
        assert len(found) == 1, self.briefs
        return found[0]

    def _serve(self) -> None:
        while True:
            peer, _ = self._listener.accept()
            with peer:
                if self._stopping:
                    return
                self._one(peer)

    def _one(self, peer: socket.socket) -> None:
        parts = []
        while part := peer.recv(65536):
            parts.append(part)
        head, _, payload = b"".join(parts).partition(b"\0")
        words = head.decode().split(" ")
        if len(words) != 4:
            return
        method, _, arg = words[0].partition("+")
        call = Call(method, words[3], arg, payload, words[1])
        if call.method not in self.aside:
            self.calls.append(call)
        try:
            peer.sendall(self._reply(call))
        except (BrokenPipeError, ConnectionResetError):
            pass

    def _reply(self, call: Call) -> bytes:
        keys = (
            f"{call.method}+{call.arg} {call.dest}",
            f"{call.method} {call.dest}",
            f"{call.method}+{call.arg}",
            call.method,
        )
        found: Answer = Refused("ProtocolError", f"this socket has no method {call.method}")
        for key in keys:
            if key in self.answers:
                found = self.answers[key]
                break
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        if callable(found):
            found = found(call)
        if isinstance(found, Raw):
            return found.data
        if isinstance(found, Refused):
            return f"2\0{found.name}\0\0{found.message}\0".encode()
        return b"0\0" + (found.encode() if isinstance(found, str) else found)
