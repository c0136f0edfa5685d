"""Kernels are installed and removed, and the registry hears of it.

Owns the order of both. Must not know messages, nor how a pool keeps kernels. Invariant:
a removal is not done before the registry knows: it would let the kernel be chosen again.
"""

from __future__ import annotations

from pathlib import Path

from bulkhead.bus.dispatch import Call
from bulkhead.model.records import Pool
from services.storage.core.reasons import StorageRefusal
from services.storage.core.states import Kernel
from services.storage.facts import PoolWatch
from services.storage.jobs import Jobs

# How long an answer waits for the registry to know of the kernels it changed.
TOLD_S = 2.0


class Kernels:
    """Kernels of all pools; both raise StorageRefusal."""

    def __init__(self, jobs: Jobs, watch: PoolWatch) -> None:
        self._jobs = jobs
        self._watch = watch

    async def add(
        self,
        call: Call,
        pool: Pool,
        name: str,
        vmlinuz: Path,
        initramfs: Path | None,
        modules: Path | None,
    ) -> Kernel:
        """The kernel is installed as a whole."""
        kernel = await self._jobs.on_pool(
            call,
            pool,
            f"installation of kernel {name}",
            lambda driver, cancel: driver.kernel_add(name, vmlinuz, initramfs, modules, cancel),
        )
        await self._show(call)
        return kernel

    async def remove(self, call: Call, pool: Pool, name: str, key: str) -> None:
        """The kernel is gone as a whole, and the registry knows."""
        await self._jobs.on_pool(
            call,
            pool,
            f"removal of kernel {name}",
            lambda driver, _: driver.kernel_remove(name, key),
        )
        if not await self._show(call):
            raise StorageRefusal(
                "POOL_TIMEOUT",
                f"kernel {name} is removed, but the registry has not heard of it",
                kernel=name,
            )

    async def _show(self, call: Call) -> bool:
        """Let the registry know of a change of kernels before its caller does; whether it
        does in time."""
        try:
            await self._watch.told(min(TOLD_S, call.deadline.remaining()))
        except TimeoutError:
            return False
        return True
