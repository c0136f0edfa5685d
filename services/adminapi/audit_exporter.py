"""Carries the registry's change rows into the audit log, and the calls that have none.

Owns the order of what is written and where the export goes on after a restart. Must not
know the form of a line. Invariant: each change row is written once, in order of its
revision; what is missing is said in a record of its own, never passed over. The record of
a call is in the file before its answer is sent, so a kill does not lose it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

from bulkhead.api import registry_pb2
from bulkhead.bus.client import Channel
from bulkhead.bus.errors import BusError
from bulkhead.bus.events import Entry, ReplicaRunner
from services.adminapi.adapters.audit_file import AuditFile
from services.adminapi.core.audit import RECORDED, Bound

log = logging.getLogger("bulkhead.adminapi.audit")

# Change rows, and what is written already, wait this long for others: one fsync serves many.
BATCH_S = 0.2
RETRY_S = 1.0
_PAGE = 200
_QUEUE_LIMIT = 5000
_HISTORY_S = 10.0

# Bus methods that a call under way has had success with.
_done: ContextVar[set[str] | None] = ContextVar("audit_done", default=None)


def begin_call() -> set[str]:
    """Note what the present task does on the bus from now on; the set that gets filled."""
    found: set[str] = set()
    _done.set(found)
    return found


def note_done(method: str) -> None:
    """A bus method ("Registry.Mutate") succeeded for the present call."""
    found = _done.get()
    if found is not None:
        found.add(method)


def has_row(done: set[str]) -> bool:
    """True when a change row tells of the call already."""
    return not RECORDED.isdisjoint(done)


class AuditExporter:
    """Background export; note() adds what the registry does not know."""

    def __init__(
        self,
        directory: Path,
        registry: Callable[[], Channel],
        replica: ReplicaRunner,
        counters: dict[str, int] | None = None,
    ) -> None:
        self._directory = directory
        self._registry = registry
        self._replica = replica
        self._queue: deque[dict[str, Any]] = deque()
        self._bound = Bound()
        self._wake = asyncio.Event()
        self._file: AuditFile | None = None
        self._flushing = asyncio.Lock()
        # A thread writes, never the loop: a disk may take its time also for what is only
        # buffered. Nobody else may write then.
        self._busy: asyncio.Future[None] | None = None
        self._unsynced = False
        # Records of calls: queued so far, and written.
        self._noted = 0
        self._written = 0
        self.counters = counters if counters is not None else {}
        # audit_number: of the last record in the file, as of this service.
        self.counters.update({"audit_records": 0, "audit_failures": 0, "audit_number": 0})
        replica.subscribe(self._entry)

    def _entry(self, entry: Entry) -> None:
        if entry.revision or entry.resync:
            self._wake.set()

    def note(self, record: dict[str, Any]) -> None:
        """Have the record of a call written, at once where nobody else writes, else soon (see
        written()); what is refused is bounded by source, all as a whole."""
        if len(self._queue) >= _QUEUE_LIMIT:
            held = self._bound.held_back
            held["*"] = held.get("*", 0) + 1
        elif record["kind"] == "call" or self._bound.admit(str(record["source"]), time.monotonic()):
            self._queue.append({"time": time.time(), **record})
            self._noted += 1
            self._drain()
        self._wake.set()

    @property
    def waiting(self) -> bool:
        """True while records of calls wait for the thread that writes. Where there is no file
        nobody waits: audit_failures tells of that, and it is tried again."""
        return self._written < self._noted and self._busy is not None

    async def written(self) -> None:
        """Until what note() was given by now is in the file."""
        mine = self._noted
        while self._written < mine and self._busy is not None:
            await asyncio.wait({self._busy})

    async def run(self) -> None:
        """Export until cancelled."""
        await self._replica.ready()
        self._wake.set()
        while True:
            await self._wake.wait()
            await asyncio.sleep(BATCH_S)
            self._wake.clear()
            if not await self.flush():
                await asyncio.sleep(RETRY_S)
                self._wake.set()

    async def flush(self) -> bool:
        """Write what there is now and make it durable; False when that failed (it stays to
        be written)."""
        async with self._flushing:
            try:
                await self._write_notes()
                await self._sync()
                await self._catch_up()
            except (OSError, BusError) as error:
                self._failed(error)
                if isinstance(error, OSError):
                    await self._idle()
                    self._drop_file()
                return False
            return True

    async def _idle(self) -> None:
        while self._busy is not None:  # a write that was cancelled goes on nevertheless
            await asyncio.wait({self._busy})

    # ----

    def _failed(self, error: BaseException) -> None:
        self.counters["audit_failures"] += 1
        log.error("the audit log cannot be written, trying again: %s", error)

    def _drop_file(self) -> None:
        """It is opened anew, and looked at, before anything is written again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    async def _opened(self) -> AuditFile:
        if self._file is None:
            file = AuditFile(self._directory)
            try:
                await asyncio.to_thread(file.open)
            except OSError:
                file.close()
                raise
            self._file = file
            self.counters["audit_number"] = file.head.number
            if file.finding:
                await self._append([_gap(file.finding)])
        return self._file

    async def _append(self, records: list[dict[str, Any]]) -> None:
        """Write records of our own or of the registry's; durable on return."""
        await self._idle()
        if self._file is None:
            raise OSError("the record of a call could not be written just now")
        await asyncio.shield(self._start(self._file, records, 0))
        await self._sync()

    def _drain(self) -> None:
        """Write the records of calls that wait, unless the thread writes or there is no file."""
        if self._queue and self._busy is None and self._file is not None:
            taken = list(itertools.islice(self._queue, _PAGE))
            self._start(self._file, taken, len(taken))

    def _start(
        self, file: AuditFile, records: list[dict[str, Any]], waited: int
    ) -> asyncio.Future[None]:
        """Have the thread write; waited: how many of the records are the first of the queue."""
        loop = asyncio.get_running_loop()
        self._busy = loop.run_in_executor(None, file.write, records)
        self._busy.add_done_callback(partial(self._ended, len(records), waited))
        return self._busy

    def _ended(self, records: int, waited: int, done: asyncio.Future[None]) -> None:
        self._busy = None
        error = done.exception()
        if error is not None:
            self._drop_file()
            if waited:  # nobody else sees the error
                self._failed(error)
            return
        assert self._file is not None
        self._unsynced = True
        self._written += waited
        for _ in range(waited):
            self._queue.popleft()
        self.counters["audit_records"] += records
        self.counters["audit_number"] = self._file.head.number
        self._drain()

    async def _sync(self) -> None:
        if self._unsynced and self._file is not None:
            self._unsynced = False
            await asyncio.to_thread(self._file.syncer())

    async def _catch_up(self) -> None:
        """Write the change rows behind the last that was exported."""
        file = await self._opened()
        newest = self._replica.revision
        if newest < file.head.exported:
            await self._append(
                [_restart(f"the store went back from {file.head.exported} to {newest}")]
            )
        while file.head.exported < newest:
            reply = await self._registry().call(
                "bulkhead.api.Registry.History",
                registry_pb2.HistoryRequest(after_revision=file.head.exported, limit=_PAGE),
                registry_pb2.HistoryReply,
                timeout=_HISTORY_S,
            )
            if not reply.entries:
                return  # what the replica has is older than the oldest row that is kept
            records = _records(list(reply.entries), file.head.exported, file.head.registry_hash)
            await self._append(records)

    async def _write_notes(self) -> None:
        await self._opened()
        self._drain()
        await self.written()
        held = self._bound.take_held_back()
        if held:
            await self._append(
                [
                    {
                        "kind": "held-back",
                        "time": time.time(),
                        "caller": "adminapi",
                        "source": source,
                        "method": "",
                        "result": f"{count} more records of calls were not written, they were"
                        " too many",
                    }
                    for source, count in held.items()
                ]
            )

    async def close(self) -> None:
        """Write what waits and close."""
        await self.flush()
        await self._idle()
        self._drop_file()


def _gap(text: str) -> dict[str, Any]:
    return {
        "kind": "gap",
        "time": time.time(),
        "caller": "adminapi",
        "source": "",
        "method": "",
        "result": text,
    }


def _restart(text: str) -> dict[str, Any]:
    return {**_gap(f"{text}; its records follow from the oldest"), "exported": 0,
            "registry_hash": ""}  # fmt: skip


def _records(
    entries: list[registry_pb2.HistoryEntry], exported: int, registry_hash: str
) -> list[dict[str, Any]]:
    """Records of rows that follow `exported`, with a gap where rows are missing."""
    records: list[dict[str, Any]] = []
    for entry in entries:
        if entry.revision != exported + 1:
            if exported:
                missing = f"revisions {exported + 1} to {entry.revision - 1}"
                records.append(_gap(f"{missing} were pruned before they were exported"))
        elif registry_hash and entry.previous_hash.hex() != registry_hash:
            records.append(_restart("another store's records, or a journal made anew"))
            return records
        exported, registry_hash = entry.revision, entry.hash.hex()
        records.append(
            {
                "exported": exported,
                "registry_hash": registry_hash,
                "kind": "change",
                "time": entry.time,
                "revision": entry.revision,
                "caller": entry.caller,
                "source": entry.source,
                "method": entry.method,
                "before": _json(entry.before),
                "after": _json(entry.after),
                "result": entry.result,
            }
        )
    return records


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
