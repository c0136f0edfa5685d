"""Which lifecycle may still give orders.

Owns the newest epoch that a participant has seen. Must not know where it comes from, nor
the participant. Invariant: it never goes back, and before it is known nothing is admitted.
"""

from __future__ import annotations

from bulkhead.model.refusal import TypedRefusal


class EpochGuard:
    """The newest epoch of lifecycle; None until the registry told it.

    refusal: the service's own, whose table has EPOCH_UNKNOWN and STALE_EPOCH.
    """

    def __init__(self, service: str, refusal: type[TypedRefusal]) -> None:
        self.service = service
        self.current: int | None = None
        self._refusal = refusal

    def learn(self, epoch: int) -> None:
        """The registry says so."""
        self.current = epoch if self.current is None else max(self.current, epoch)

    def admit(self, epoch: int) -> None:
        """Let a step pass, or EPOCH_UNKNOWN or STALE_EPOCH."""
        if self.current is None:
            raise self._refusal(
                "EPOCH_UNKNOWN",
                f"{self.service} has not yet learned the epoch from the registry; try again",
            )
        if epoch < self.current:
            raise self._refusal(
                "STALE_EPOCH",
                f"the step is of epoch {epoch}, and epoch {self.current} has taken over",
                epoch=str(epoch),
                current=str(self.current),
            )
        self.current = epoch
