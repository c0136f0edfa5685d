"""Answers the firewall: takes whole transactions, one at a time.

Owns the listening socket that it inherited. Must not know what rules mean. Invariants:
a command that is not on this table is refused before the kernel sees anything; the
namespace forwards packets only after a whole table was defined; when this process dies
the kernel keeps its tables.
"""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bulkhead import failpoints
from bulkhead.model.refusal import Refusal
from services.firewall import failpoint_table  # noqa: F401  (declares the rows)
from services.firewall.core.flows import Flow
from services.firewall.core.ruleset import TABLE, check_command
from services.firewall.core.wire import Frames, WireError, pack
from services.firewall.enforce.conntrack import Tracker
from services.firewall.enforce.kernel import KernelTable, Refused

CONNECTIONS_LIMIT = 8
COMMANDS_LIMIT = 200_000
_SEND_TIMEOUT_S = 5.0
FORWARDING = (
    Path("/proc/sys/net/ipv4/ip_forward"),
    Path("/proc/sys/net/ipv6/conf/all/forwarding"),
)


class Forwarding:
    """The switches by which the namespace passes packets on, held open."""

    def __init__(self, paths: tuple[Path, ...] = FORWARDING) -> None:
        self._fds = [os.open(path, os.O_WRONLY | os.O_CLOEXEC) for path in paths if path.exists()]

    def turn_on(self) -> None:
        """Repeatable. OSError."""
        for fd in self._fds:
            os.pwrite(fd, b"1\n", 0)


class EnforceServer:
    """Serves connections on a listening socket until it is closed."""

    def __init__(
        self,
        listener: socket.socket,
        kernel: KernelTable,
        tracker: Tracker,
        forwarding: Forwarding,
    ) -> None:
        self._listener = listener
        self._kernel = kernel
        self._tracker = tracker
        self._forwarding = forwarding
        self._selector = selectors.DefaultSelector()
        self._frames: dict[socket.socket, Frames] = {}
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "change": self._change,
            "status": self._status,
            "rule_counters": self._rule_counters,
            "listing": self._listing,
            "flows": self._flows,
            "cut": self._cut,
        }

    def run(self) -> None:
        """Serve for ever."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # the peer went before we looked
        if len(self._frames) >= CONNECTIONS_LIMIT:
            # The oldest is from a firewall that is no more.
            self._drop(next(iter(self._frames)))
        connection.settimeout(_SEND_TIMEOUT_S)
        self._frames[connection] = Frames()
        self._selector.register(connection, selectors.EVENT_READ)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._frames[connection]
        connection.close()

    def _read(self, connection: socket.socket) -> None:
        if connection not in self._frames:
            return  # dropped in this round
        try:
            data = connection.recv(1 << 18)
            if not data:
                raise WireError("closed")
            for request in self._frames[connection].feed(data):
                connection.sendall(pack(self.answer(request)))
        except (OSError, WireError):
            self._drop(connection)

    def answer(self, untrusted_request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request: {"ok": true, ...} or {"ok": false, "error": text}."""
        operation = self._operations.get(str(untrusted_request.get("op")))
        if operation is None:
            return {"ok": False, "error": "no such operation"}
        try:
            return {"ok": True, **operation(untrusted_request)}
        except Refusal as refusal:
            return {"ok": False, "error": refusal.message}
        except (Refused, OSError, ValueError, TypeError, KeyError) as error:
            return {"ok": False, "error": f"{error}"}

    def _change(self, untrusted_request: dict[str, Any]) -> dict[str, Any]:
        untrusted_commands = untrusted_request["commands"]
        if not isinstance(untrusted_commands, list) or len(untrusted_commands) > COMMANDS_LIMIT:
            raise ValueError("commands is no list, or too long")
        commands = [check_command(str(untrusted)) for untrusted in untrusted_commands]
        marks = {str(tag): str(mark) for tag, mark in dict(untrusted_request["marks"]).items()}
        if not all(tag.isalnum() for tag in marks):
            raise ValueError("a mark's tag is malformed")
        failpoints.hit("firewall.enforce.before_commit")
        self._kernel.run(commands, marks)
        failpoints.hit("firewall.enforce.after_commit")
        if f"delete table {TABLE}" in commands[:2] and len(commands) > 2:
            self._forwarding.turn_on()
        return {}

    def _status(self, untrusted_request: dict[str, Any]) -> dict[str, Any]:
        del untrusted_request
        if not self._kernel.present():
            return {"present": False, "marks": {}, "counters": {}}
        return {
            "present": True,
            "marks": self._kernel.marks(),
            "counters": self._kernel.counters(),
        }

    def _tag(self, untrusted_request: dict[str, Any]) -> str:
        untrusted_tag = str(untrusted_request["tag"])
        if not untrusted_tag.isascii() or not untrusted_tag.isalnum():
            raise ValueError("the tag is malformed")
        return untrusted_tag

    def _rule_counters(self, untrusted_request: dict[str, Any]) -> dict[str, Any]:
        return {"counters": self._kernel.rule_counters(self._tag(untrusted_request))}

    def _listing(self, untrusted_request: dict[str, Any]) -> dict[str, Any]:
        return {"text": self._kernel.listing(self._tag(untrusted_request))}

    def _flows(self, untrusted_request: dict[str, Any]) -> dict[str, Any]:
        addresses = [str(text) for text in list(untrusted_request["addresses"])[:4096]]
        return {"flows": [asdict(flow) for flow in self._tracker.flows(addresses)]}

    def _cut(self, untrusted_request: dict[str, Any]) -> dict[str, Any]:
        flows = {Flow(**dict(untrusted_flow)) for untrusted_flow in untrusted_request["flows"]}
        return {"cut": self._tracker.cut(flows)}
