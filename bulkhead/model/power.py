"""The power state that clients see, from the durable phase and the hypervisor's word.

Owns the mapping. Must not know properties or the bus. Invariant: "Halted" is said only
when the phase is HALTED, so whoever sees it may do what a halted qube is needed for.
"""

from __future__ import annotations

from bulkhead.model.records import Phase, PowerFact, Qube
from bulkhead.model.view import View

STATES: tuple[str, ...] = (
    "Halted", "Transient", "Running", "Paused", "Suspended", "Halting", "Dying", "Crashed",
)  # fmt: skip

_BY_POWER = {
    "paused": "Paused",
    "shutdown": "Halting",
    "shutoff": "Dying",
    "crashed": "Crashed",
    "pmsuspended": "Suspended",
}


def current_power(view: View, qube: Qube) -> PowerFact | None:
    """What the hypervisor says of the qube's present boot; news of older boots is ignored."""
    run = qube.run
    if run.phase is Phase.HALTED or not run.boot_id:
        return None
    fact = view.power(qube.uuid)
    return fact if fact is not None and fact.boot_id == run.boot_id else None


def state_of(phase: Phase, power: PowerFact | None, *, waits_for_agent: bool) -> str:
    """The state's name; waits_for_agent when the qube has the feature qrexec."""
    if phase is Phase.HALTED:
        return "Halted"
    if power is None:
        # STARTING: no domain yet. UP: the hypervisor's service has not reported since it
        # came back. STOPPING: the domain is gone, its clean-up is not over.
        return {Phase.STARTING: "Transient", Phase.UP: "Running"}.get(phase, "Dying")
    if power.power == "halted":
        return "Transient" if phase is Phase.STARTING else "Dying"
    state = _BY_POWER.get(power.power)
    if state is not None:
        return state
    return "Transient" if waits_for_agent and not power.agent else "Running"
