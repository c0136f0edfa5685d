"""Few writes to one guest's keys at a time.

Owns who waits here to write the keys of which qube. Must not know what is written.
Invariants: however many clients a network qube has, its queue in domains has room for
others, and no write is refused because there are many; a wait ends with the call's time;
nothing is kept of a qube whose keys nobody writes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from bulkhead.api import domains_pb2
from bulkhead.bus.client import CallContext, Channel
from bulkhead.bus.errors import bus_error
from clients.bus import DomainsClient

# Of one qube, on their way at once: domains does one after the other, and refuses where
# many wait.
WRITES = 3
# The time of a call that names none: the method's own limit.
LIMIT_S = 30.0


class DomainsInTurns(DomainsClient):
    """A DomainsClient whose writes of guest keys wait here for their turn."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._turns: dict[str, tuple[asyncio.Semaphore, int]] = {}

    async def write_guest_keys(
        self,
        request: domains_pb2.WriteGuestKeysRequest,
        *,
        timeout: float | None = None,
        context: CallContext | None = None,
    ) -> domains_pb2.WriteGuestKeysReply:
        """timeout: of the wait and the write together."""
        loop = asyncio.get_running_loop()
        end = loop.time() + (LIMIT_S if timeout is None else timeout)
        async with self._turn(request.boot.uuid, end):
            return await super().write_guest_keys(
                request, timeout=max(0.0, end - loop.time()), context=context
            )

    @contextlib.asynccontextmanager
    async def _turn(self, uuid: str, end: float) -> AsyncIterator[None]:
        turn, users = self._turns.get(uuid, (asyncio.Semaphore(WRITES), 0))
        self._turns[uuid] = (turn, users + 1)
        try:
            try:
                async with asyncio.timeout_at(end):
                    await turn.acquire()
            except TimeoutError:
                raise bus_error(
                    "DEADLINE_EXCEEDED",
                    f"other writes to the guest keys of {uuid} took all the time",
                    uuid=uuid,
                ) from None
            try:
                yield
            finally:
                turn.release()
        finally:
            turn, users = self._turns.pop(uuid)
            if users > 1:
                self._turns[uuid] = (turn, users - 1)
