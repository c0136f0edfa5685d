"""Which qubes have stopped, judged from records and power facts.

Owns the derivation of STOPPED. Must not begin anything. Invariant: a boot id gives at
most one STOPPED; a fact about another boot never ends this one; silence of the
hypervisor's service is no proof of a stop.
"""

from __future__ import annotations

from collections.abc import Iterable

from bulkhead.model.records import Phase, PowerFact, Qube
from bulkhead.model.specs import StoppedSpec
from bulkhead.model.view import View

GONE = frozenset({"halted", "crashed"})


def stopped(qube: Qube | None, power: PowerFact | None) -> StoppedSpec | None:
    """STOPPED of the qube's present boot when the hypervisor says that it is over.

    While STARTING the start operation itself notices and cleans up.
    """
    if qube is None or qube.run.phase not in (Phase.UP, Phase.STOPPING):
        return None
    if power is None or power.boot_id != qube.run.boot_id or power.power not in GONE:
        return None
    return StoppedSpec(qube.uuid, qube.run.boot_id)


def unaccounted(view: View) -> Iterable[Qube]:
    """Qubes that should run and of whose boot the hypervisor has said nothing.

    Only to be asked for when domains has reported (the host's fact is there); each needs
    a question to the hypervisor before it counts as stopped.
    """
    if view.host is None:
        return
    for qube in view.qubes_any():
        if silent(qube, view.power(qube.uuid)):
            yield qube


def silent(qube: Qube, power: PowerFact | None) -> bool:
    """The qube should run, and nothing was said of its boot."""
    if qube.run.phase not in (Phase.UP, Phase.STOPPING):
        return False
    return power is None or power.boot_id != qube.run.boot_id
