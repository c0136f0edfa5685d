"""Bulk data into volumes and out of them.

Owns tickets for the data socket, and what happens when data has arrived. Must not know
messages, nor how a pool keeps its data. Invariants: a ticket of a volume is worthless
once its import has ended or the volume is removed; data that has arrived is noted under
the volume's lock before its sender is told so.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

from bulkhead.bus.dispatch import Call
from services.storage.adapters.data_socket import DataSocket
from services.storage.drivers.interface import Cancel, Driver
from services.storage.drivers.load import open_pool
from services.storage.jobs import Jobs
from services.storage.messages import Spec

ARRIVED_S = 60.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where size bytes go or come from: a path, or a ticket for the socket. "" = not so."""

    size: int
    path: str = ""
    ticket: str = ""
    socket: str = ""


class Transfers:
    """Imports and exports of all volumes."""

    def __init__(self, jobs: Jobs, data: DataSocket) -> None:
        self._jobs = jobs
        self._data = data

    async def begin_import(
        self, call: Call, item: Spec, owner: str, key: str, size: int, want_ticket: bool
    ) -> Place:
        """A place for the volume's new data, beside what it has. StorageRefusal."""
        begun = await self._jobs.on_volume(
            call,
            item,
            "import",
            lambda driver, _: driver.import_begin(owner, item.volume, size, key, want_ticket),
        )
        if not want_ticket:
            return Place(begun.size, path=begun.path)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = await self._jobs.on_volume(
            call, item, "import", lambda _driver, _cancel: os.open(begun.path, flags)
        )
        loop = asyncio.get_running_loop()

        def arrived() -> None:
            asyncio.run_coroutine_threadsafe(self._arrived(item, owner, key), loop).result(
                ARRIVED_S
            )

        ticket = self._data.issue(item.key, fd, begun.size, True, arrived)
        return Place(begun.size, ticket=ticket, socket=str(self._data.path))

    async def _arrived(self, item: Spec, owner: str, key: str) -> None:
        driver = open_pool(item.pool)
        await self._jobs.unasked(item, lambda: driver.import_arrived(owner, item.volume, key))

    async def end_import(self, call: Call, item: Spec, owner: str, key: str, success: bool) -> None:
        """The imported data is current, or gone. StorageRefusal."""
        self._data.revoke(item.key)
        await self._jobs.on_volume(
            call,
            item,
            "import",
            lambda driver, _: driver.import_end(owner, item.volume, success, key),
        )

    async def begin_export(self, call: Call, item: Spec, revision: str, *, issue: bool) -> Place:
        """The last commit or a revision as it is now; issue: with a ticket. StorageRefusal."""

        def open_state(driver: Driver, _: Cancel) -> tuple[int, int]:
            with driver.committed(item.volume, revision) as state:
                return os.dup(state.fd), state.size

        fd, size = await self._jobs.on_volume(call, item, "export", open_state)
        if not issue:
            os.close(fd)
            return Place(size)
        ticket = self._data.issue(f"export {item.key}", fd, size, False)
        return Place(size, ticket=ticket, socket=str(self._data.path))

    def revoke(self, item: Spec) -> None:
        """No ticket of the volume's import is good any more."""
        self._data.revoke(item.key)

    def revoke_ticket(self, ticket: str) -> None:
        """An unused ticket is worthless from now on."""
        self._data.revoke_ticket(ticket)

    @property
    def counters(self) -> dict[str, int]:
        """For Health."""
        return self._data.counters

    async def stop(self) -> None:
        """Close the data socket; for the end of the process."""
        await asyncio.get_running_loop().run_in_executor(None, self._data.stop)
