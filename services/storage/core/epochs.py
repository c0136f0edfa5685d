"""Which lifecycle may still give orders.

Owns the newest epoch seen. Must not know where it comes from. Invariant: it never goes
back, and before it is known nothing is admitted.
"""

from __future__ import annotations

from services.storage.core.reasons import StorageRefusal


class EpochGuard:
    """The newest epoch of lifecycle; None until the registry told it."""

    def __init__(self) -> None:
        self.current: int | None = None

    def learn(self, epoch: int) -> None:
        """The registry says so."""
        self.current = epoch if self.current is None else max(self.current, epoch)

    def admit(self, epoch: int) -> None:
        """Let a step pass, or EPOCH_UNKNOWN or STALE_EPOCH."""
        if self.current is None:
            raise StorageRefusal(
                "EPOCH_UNKNOWN", "storage has not yet learned the epoch from the registry"
            )
        if epoch < self.current:
            raise StorageRefusal(
                "STALE_EPOCH",
                f"the step is of epoch {epoch}, and epoch {self.current} has taken over",
                epoch=str(epoch),
                current=str(self.current),
            )
        self.current = epoch
