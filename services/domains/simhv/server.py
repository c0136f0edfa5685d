"""The simulated hypervisor's socket: requests in, replies and news out, faults between.

Owns the protocol, the table of faults and the record of calls. Must not know what a
call means. Invariant: a hanging or delayed call holds up no other; every bound
(connections, calls under way, line length, record) is kept.

Protocol: one JSON object per line, at most LINE bytes.
  request  {"id": N, "call": NAME, "args": {...}}
  reply    {"id": N, "result": VALUE} or {"id": N, "error": {"kind": K, "message": M}}
  news     {"event": {...}}, to connections that called "listen"
Calls of the server itself: listen, inject, clear, faults, calls.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .machine import CALLS, CONTROLS, Machine, SimError

LINE = 1 << 20
CONNECTIONS = 64
IN_FLIGHT = 512
RECORD = 100_000
OUTBOX = 8 << 20


@dataclass(slots=True)
class Fault:
    """What happens to calls of one qube: qube is a uuid, a name or "*"; call a name or "*".

    action: "delay" (seconds), "hang" (until cleared, then goes on) or "error" (kind,
    message). when: "before" or "after" the effect. times: 0 = until cleared.
    """

    id: int
    qube: str
    call: str
    action: str
    seconds: float = 0.0
    kind: str = "failed"
    message: str = "injected"
    when: str = "before"
    times: int = 0


class SimServer:
    """Serves one Machine on one unix socket."""

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now
        self._machine = Machine(self._publish, now)
        self._faults: dict[int, Fault] = {}
        self._cleared: dict[int, asyncio.Event] = {}
        self._fault_count = 0
        self._record: collections.deque[dict[str, Any]] = collections.deque(maxlen=RECORD)
        self._recorded = 0
        self._recorded_change = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._listeners: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Bind the socket, mode 0660. A stale socket file is replaced."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        old = os.umask(0o117)
        try:
            self._server = await asyncio.start_unix_server(
                self._serve, path=str(self._path), limit=LINE
            )
        finally:
            os.umask(old)

    async def stop(self) -> None:
        """Close the socket and every connection."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        for writer in list(self._writers):
            writer.close()
        if self._server is not None:
            await self._server.wait_closed()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    # ---- connections

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._writers) >= CONNECTIONS:
            writer.close()
            return
        self._writers.add(writer)
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                try:
                    line = await reader.readuntil(b"\n")
                except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
                    return
                try:
                    request = json.loads(line)
                    number, call = int(request["id"]), str(request["call"])
                    args = dict(request.get("args", {}))
                except (ValueError, KeyError, TypeError):
                    return
                if call == "listen":
                    self._listeners.add(writer)
                    self._send(writer, {"id": number, "result": None})
                    continue
                if len(tasks) >= IN_FLIGHT:
                    self._refuse(writer, number, SimError("busy", "too many calls under way"))
                    continue
                task = asyncio.ensure_future(self._answer(writer, number, call, args))
                for kept in (tasks, self._tasks):
                    kept.add(task)
                    task.add_done_callback(kept.discard)
        finally:
            # A hanging call of a vanished client never takes effect, unless it already has.
            for task in list(tasks):
                task.cancel()
            self._writers.discard(writer)
            self._listeners.discard(writer)
            writer.close()

    async def _answer(
        self, writer: asyncio.StreamWriter, number: int, call: str, args: dict[str, Any]
    ) -> None:
        try:
            result = await self._dispatch(call, args)
        except SimError as error:
            self._refuse(writer, number, error)
        except (KeyError, TypeError, ValueError) as error:
            self._refuse(writer, number, SimError("invalid", f"bad arguments of {call}: {error}"))
        else:
            self._send(writer, {"id": number, "result": result})

    def _refuse(self, writer: asyncio.StreamWriter, number: int, error: SimError) -> None:
        self._send(writer, {"id": number, "error": {"kind": error.kind, "message": error.message}})

    def _send(self, writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
        if writer.is_closing():
            return
        if writer.transport.get_write_buffer_size() > OUTBOX:
            writer.close()  # a reader that does not read loses the connection, not our memory
            return
        writer.write(json.dumps(message).encode() + b"\n")

    def _publish(self, event: dict[str, Any]) -> None:
        for writer in list(self._listeners):
            self._send(writer, {"event": event})

    # ---- calls

    async def _dispatch(self, call: str, args: dict[str, Any]) -> Any:
        if call in CALLS:
            return await self._simulated(call, args)
        if call in CONTROLS:
            return getattr(self._machine, call)(**args)
        if call == "inject":
            return self._inject(**args)
        if call == "clear":
            return self._clear(**args)
        if call == "faults":
            return [asdict(fault) for fault in self._faults.values()]
        if call == "calls":
            return await self._calls(**args)
        raise SimError("unsupported", f"there is no call {call}")

    async def _simulated(self, call: str, args: dict[str, Any]) -> Any:
        spec = args.get("spec")
        named: dict[str, Any] = spec if isinstance(spec, dict) else args
        uuid = str(named.get("uuid", ""))
        entry: dict[str, Any] = {
            "index": self._recorded,
            "time": self._now(),
            "call": call,
            "uuid": uuid,
            "name": str(named.get("name", "")) or self._machine.name_of(uuid),
            "boot_id": str(named.get("boot_id", "")) or self._machine.boot_of(uuid),
            "outcome": "under way",
        }
        self._recorded += 1
        self._record.append(entry)
        self._wake()
        try:
            await self._suffer(call, entry, "before")
            result = getattr(self._machine, call)(**args)
            await self._suffer(call, entry, "after")
        except SimError as error:
            entry["outcome"] = error.kind
            raise
        except asyncio.CancelledError:
            entry["outcome"] = "abandoned"
            raise
        else:
            entry["outcome"] = "ok"
            return result
        finally:
            entry["ended"] = self._now()
            self._wake()

    async def _suffer(self, call: str, entry: dict[str, Any], when: str) -> None:
        for fault in list(self._faults.values()):
            if (
                fault.when != when
                or fault.call not in ("*", call)
                or fault.qube not in ("*", entry["uuid"], entry["name"])
            ):
                continue
            cleared = self._cleared[fault.id]
            if fault.times:
                fault.times -= 1
                if not fault.times:
                    del self._faults[fault.id]
            if fault.action == "delay":
                await asyncio.sleep(fault.seconds)
            elif fault.action == "hang":
                await cleared.wait()
            else:
                raise SimError(fault.kind, fault.message)

    # ---- faults and the record

    def _inject(self, **row: Any) -> int:
        self._fault_count += 1
        fault = Fault(id=self._fault_count, **row)
        if fault.action not in ("delay", "hang", "error") or fault.when not in ("before", "after"):
            raise SimError("invalid", "action is delay, hang or error; when is before or after")
        if fault.call != "*" and fault.call not in CALLS:
            raise SimError("invalid", f"there is no call {fault.call}")
        self._faults[fault.id] = fault
        self._cleared[fault.id] = asyncio.Event()
        return fault.id

    def _clear(self, fault: int = 0) -> int:
        """End one fault (0 = all); what hangs on it goes on."""
        ids = [fault] if fault else list(self._cleared)
        for number in ids:
            self._faults.pop(number, None)
            event = self._cleared.pop(number, None)
            if event is not None:
                event.set()
        return len(ids)

    def _wake(self) -> None:
        self._recorded_change.set()
        self._recorded_change = asyncio.Event()

    async def _calls(
        self,
        since: int = 0,
        call: str = "",
        uuid: str = "",
        at_least: int = 0,
        timeout: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Recorded calls, filtered; waits up to timeout until there are at_least so many."""
        deadline = asyncio.get_running_loop().time() + min(timeout, 60.0)
        while True:
            change = self._recorded_change
            rows = [
                dict(entry)
                for entry in self._record
                if entry["index"] >= since
                and (not call or entry["call"] == call)
                and (not uuid or entry["uuid"] == uuid)
            ]
            left = deadline - asyncio.get_running_loop().time()
            if len(rows) >= at_least or left <= 0:
                return rows
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(change.wait(), left)
