"""Power words and stop reasons, from what hypervisors say in numbers.

Owns the mapping of libvirt's state and event numbers to the words of a PowerFact.
Must not know libvirt itself. Invariant: an unknown number of an active domain is
"running", which the wire shows as Running or Transient, never as Halted.
"""

from __future__ import annotations

HALTED = "halted"
RUNNING = "running"
PAUSED = "paused"
SHUTDOWN = "shutdown"
SHUTOFF = "shutoff"
CRASHED = "crashed"
PMSUSPENDED = "pmsuspended"

POWERS = (HALTED, RUNNING, PAUSED, SHUTDOWN, SHUTOFF, CRASHED, PMSUSPENDED)

# virDomainState of an active domain.
_STATES = {3: PAUSED, 4: SHUTDOWN, 5: SHUTOFF, 6: CRASHED, 7: PMSUSPENDED}
# virDomainEventStoppedDetailType.
_STOPPED = {
    0: "shutdown",
    1: "destroyed",
    2: "crashed",
    3: "migrated",
    4: "saved",
    5: "failed",
    6: "from-snapshot",
}


def power_of(active: bool, state: int) -> str:
    """The power word for a domain's activity and virDomainState number."""
    if not active:
        return HALTED
    return _STATES.get(state, RUNNING)


def stop_reason_of(detail: int) -> str:
    """The word for a STOPPED event's detail number."""
    return _STOPPED.get(detail, "unknown")
