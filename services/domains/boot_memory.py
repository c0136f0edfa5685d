"""Host memory that a boot is promised before its domain exists.

Owns the promises and who keeps them: qmemman where it runs, our ledger elsewhere. Must
not know calls. Invariant: between reading what is free and promising it nobody else
promises, so that no two boots are promised the same memory.
"""

from __future__ import annotations

import asyncio

from .adapters.hypervisor import Hypervisor, Left
from .adapters.qmemman import MemoryManager
from .core.memory import MemoryLedger


class BootMemory:
    """Promises by boot id."""

    def __init__(self, hypervisor: Hypervisor, manager: MemoryManager) -> None:
        self._hypervisor = hypervisor
        self._manager = manager
        self._ledger = MemoryLedger()
        self._lock = asyncio.Lock()

    async def reserve(self, boot_id: str, size: int, left: Left) -> None:
        """Set size bytes aside; a repeat replaces the promise. DomainsError NOT_ENOUGH_MEMORY."""
        if self._manager.present:
            await self._manager.reserve(boot_id, size, left())
            return
        # One at a time: between the reading and the promise nobody else may promise.
        async with self._lock:
            host = await self._hypervisor.host(left())
            domains = await self._hypervisor.inventory(left())
            total = host.memory_kib * 1024
            available = total if host.free_kib is None else host.free_kib * 1024
            self._ledger.reserve(
                boot_id,
                size,
                total,
                {domain.boot_id or domain.uuid: domain.memory_kib * 1024 for domain in domains},
                available,
            )

    async def release(self, boot_id: str) -> None:
        """The boot is promised nothing any more; repeatable."""
        self.forget(boot_id)
        await self.let_balance(boot_id)

    def forget(self, boot_id: str) -> None:
        """The ledger's half of release, which waits for nothing."""
        self._ledger.release(boot_id)

    async def let_balance(self, boot_id: str) -> None:
        """The memory is the domain's now, or nobody's: qmemman may balance again.

        The ledger goes on: a promise counts once with its domain, for as long as that lives.
        """
        await self._manager.release(boot_id)

    async def close(self) -> None:
        """Let go of qmemman."""
        await self._manager.close()
