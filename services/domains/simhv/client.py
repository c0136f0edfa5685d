"""Control of a simulated hypervisor, for tests and benchmarks: blocking and small.

Owns one connection. Must not know the service under test. Invariant: one call at a
time, each bounded by the connection's timeout.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any


class ControlError(RuntimeError):
    """The simulated hypervisor refused a control call; kind is its word for why."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class SimControl:
    """Makes qubes slow, hang, fail, stop, and reads what was called.

    Use as a context manager, or close(). Not for an event loop that itself serves the
    simulation: every call blocks.
    """

    def __init__(self, path: Path, timeout: float = 30.0) -> None:
        self._timeout = timeout
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._file = self._socket.makefile("rb")
        self._number = 0

    @classmethod
    def of(cls, root: Path, wait: float = 10.0) -> SimControl:
        """Connect to the one below root, waiting for it to come up."""
        path = root / "run/bulkhead/simhv/hv.sock"
        deadline = time.monotonic() + wait
        while True:
            try:
                return cls(path)
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def close(self) -> None:
        """Drop the connection; faults stay."""
        self._file.close()
        self._socket.close()

    def __enter__(self) -> SimControl:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def call(self, call: str, /, **args: Any) -> Any:
        """Any call of the protocol. ControlError when refused, OSError when it is gone."""
        self._number += 1
        line = json.dumps({"id": self._number, "call": call, "args": args})
        self._socket.sendall(line.encode() + b"\n")
        answer = self._file.readline()
        if not answer:
            raise ConnectionResetError("the simulated hypervisor closed the connection")
        reply = json.loads(answer)
        if "error" in reply:
            raise ControlError(reply["error"]["kind"], reply["error"]["message"])
        return reply["result"]

    # ---- faults

    def delay(
        self, qube: str, call: str, seconds: float, times: int = 0, when: str = "before"
    ) -> int:
        """Calls of the qube (uuid, name or "*") take seconds longer; the fault's id."""
        return int(
            self.call(
                "inject",
                qube=qube,
                call=call,
                action="delay",
                seconds=seconds,
                times=times,
                when=when,
            )
        )

    def hang(self, qube: str, call: str, times: int = 0, when: str = "before") -> int:
        """Calls of the qube hang until clear(); the fault's id."""
        return int(self.call("inject", qube=qube, call=call, action="hang", times=times, when=when))

    def fail(
        self,
        qube: str,
        call: str,
        kind: str = "failed",
        message: str = "injected",
        times: int = 0,
        when: str = "before",
    ) -> int:
        """Calls of the qube fail; when="after": although they took effect. The fault's id."""
        return int(
            self.call(
                "inject",
                qube=qube,
                call=call,
                action="error",
                kind=kind,
                message=message,
                times=times,
                when=when,
            )
        )

    def clear(self, fault: int = 0) -> None:
        """End one fault, or all; what hangs goes on."""
        self.call("clear", fault=fault)

    # ---- guests

    def nature(self, qube: str, **nature: Any) -> None:
        """How guests of the qube (uuid, name or "*") behave: see machine.GuestNature."""
        self.call("set_nature", qube=qube, nature=nature)

    def poweroff(self, uuid: str) -> None:
        """The guest powers itself off."""
        self.call("guest_stop", uuid=uuid, reason="shutdown")

    def crash(self, uuid: str) -> None:
        """The guest crashes."""
        self.call("guest_stop", uuid=uuid, reason="crashed")

    def agent(self, uuid: str, connected: bool = True) -> None:
        """The guest's agent connects or goes."""
        self.call("guest_agent", uuid=uuid, connected=connected)

    def devices(self, backend: str, *devices: dict[str, Any]) -> None:
        """All that the backend (uuid; dom0 is the null uuid) offers from now on.

        Rows have devclass and port, and may have device_id, fields, interfaces, data,
        parent_port, parent_devclass. A guest's devices end with it.
        """
        self.call("set_devices", backend=backend, devices=list(devices))

    def guest(self, uuid: str) -> dict[str, Any]:
        """Everything about one domain: power, spec, disks, interfaces."""
        return dict(self.call("guest", uuid=uuid))

    def domains(self) -> list[dict[str, Any]]:
        """Every domain; is itself recorded as a call of "inventory"."""
        return list(self.call("inventory"))

    def reset(self) -> None:
        """End every domain and forget every nature and fault."""
        self.call("clear")
        self.call("reset")

    # ---- the record

    def calls(
        self,
        call: str = "",
        uuid: str = "",
        since: int = 0,
        at_least: int = 0,
        timeout: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Recorded calls {index, time, call, uuid, name, boot_id, outcome, ended}.

        Waits up to timeout seconds until there are at_least so many.
        """
        return list(
            self.call(
                "calls", since=since, call=call, uuid=uuid, at_least=at_least, timeout=timeout
            )
        )
