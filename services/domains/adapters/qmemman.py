"""Host memory through qmemman, where it runs (Xen with balancing).

Owns one connection per reservation: the manager keeps its promise while that is open.
Must not know domains. Invariant: no connection outlives its release, and at most one
is open at a time, because the manager serves one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from services.domains.core.reasons import DomainsError

SOCKET = Path("/var/run/qubes/qmemman.sock")
REPLY_BYTES = 64


class MemoryManager:
    """Reservations by boot id at the socket, if it is there."""

    def __init__(self, socket: Path = SOCKET) -> None:
        self._socket = socket
        self._held: dict[str, asyncio.StreamWriter] = {}

    @property
    def present(self) -> bool:
        """The manager's socket exists on this host."""
        return self._socket.is_socket()

    async def reserve(self, boot_id: str, size: int, timeout: float) -> None:
        """Have size bytes freed; a repeat keeps what is held.

        DomainsError NOT_ENOUGH_MEMORY when refused, MEMORY_MANAGER_FAILED when it does
        not answer within timeout seconds.
        """
        if boot_id in self._held:
            return
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_unix_connection(str(self._socket))
                writer.write(f"{size}\n".encode())
                await writer.drain()
                untrusted_reply = (await reader.read(REPLY_BYTES)).strip()
            if untrusted_reply != b"OK":
                raise DomainsError(
                    "NOT_ENOUGH_MEMORY",
                    f"{size // 2**20} MiB are asked for and could not be freed; stop another "
                    "qube or lower its memory.",
                    needed=str(size),
                )
            self._held[boot_id], writer = writer, None
        except (OSError, TimeoutError) as error:
            raise DomainsError(
                "MEMORY_MANAGER_FAILED",
                f"Failed to connect to qmemman: {error or 'no answer in time'}.",
            ) from error
        finally:
            if writer is not None:
                writer.close()

    async def release(self, boot_id: str) -> None:
        """Close the reservation: balancing goes on. Nothing happens when there is none."""
        writer = self._held.pop(boot_id, None)
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def close(self) -> None:
        """Release everything."""
        for boot_id in list(self._held):
            await self.release(boot_id)
