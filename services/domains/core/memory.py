"""Host memory promised to boots that do not exist yet.

Owns reservations by boot id. Must not know clocks or hypervisors; the caller says what
the host has and which boots exist. Invariant: the sum of running domains and of
reservations without a domain never exceeds the host's memory.
"""

from __future__ import annotations

from collections.abc import Mapping

from .reasons import DomainsError

RESERVATIONS = 1024


class MemoryLedger:
    """Reservations held in memory; lost on restart, when the sweep resolves their boots."""

    def __init__(self) -> None:
        self._reserved: dict[str, int] = {}

    def free(self, total: int, domains: Mapping[str, int], other_than: str = "") -> int:
        """Bytes of total neither used by domains (boot id -> bytes) nor reserved.

        A reservation whose boot exists counts once, as that domain.
        """
        reserved = sum(
            size
            for boot_id, size in self._reserved.items()
            if boot_id not in domains and boot_id != other_than
        )
        return total - sum(domains.values()) - reserved

    def reserve(
        self, boot_id: str, size: int, total: int, domains: Mapping[str, int], available: int
    ) -> None:
        """Promise size bytes to boot_id; a repeat replaces the promise.

        available is what the host itself says is free now, before reservations of ours.
        DomainsError NOT_ENOUGH_MEMORY when it does not fit; nothing is then changed.
        """
        others = sum(
            kept
            for other, kept in self._reserved.items()
            if other != boot_id and other not in domains
        )
        free = min(self.free(total, domains, other_than=boot_id), available - others)
        if size > free:
            raise DomainsError(
                "NOT_ENOUGH_MEMORY",
                f"{size // 2**20} MiB are asked for and {max(free, 0) // 2**20} MiB are free; "
                "stop another qube or lower its memory.",
                needed=str(size),
                free=str(max(free, 0)),
            )
        if boot_id not in self._reserved and len(self._reserved) >= RESERVATIONS:
            raise DomainsError(
                "NOT_ENOUGH_MEMORY",
                f"{RESERVATIONS} starts hold memory already; wait for one to end.",
            )
        self._reserved[boot_id] = size

    def release(self, boot_id: str) -> bool:
        """Forget the promise; False when there was none."""
        return self._reserved.pop(boot_id, None) is not None

    def __contains__(self, boot_id: object) -> bool:
        return boot_id in self._reserved
