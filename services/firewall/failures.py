"""How the firewall refuses.

Owns making an error from a row of the reasons table. Invariant: an error's code is its
reason's.
"""

from __future__ import annotations

from bulkhead.bus.errors import BusError
from services.firewall.core.reasons import REASONS


def failure(reason: str, message: str, **metadata: str) -> BusError:
    """A BusError with a reason of this service."""
    error = BusError(REASONS[reason].code, reason, message)
    error.metadata.update(metadata)
    return error
