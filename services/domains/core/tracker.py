"""What was last said of each boot: turns observations into power facts.

Owns the growing report number of each boot and the boots that must not come back. Must
not know clocks: the caller gives the base of the numbers. Invariant: a report is made
only when something changed, and numbers of one boot only grow, also across restarts as
long as the given base does.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

from bulkhead.model.records import PowerFact

from .power import HALTED

TOMBSTONES = 4096


@dataclass(frozen=True, slots=True)
class Sighting:
    """What the hypervisor says of one domain now; start_time in epoch seconds."""

    uuid: str
    boot_id: str
    power: str
    xid: int = -1
    stubdom_xid: int = -1
    stubdom_uuid: str = ""
    start_time: float | None = None
    agent: bool = False


class PowerTracker:
    """Latest PowerFact of every boot that exists, keyed by the qube's uuid."""

    def __init__(self) -> None:
        self._facts: dict[str, PowerFact] = {}
        self._dead: OrderedDict[tuple[str, str], None] = OrderedDict()

    def current(self, uuid: str) -> PowerFact | None:
        """The last report on the qube, None when it has no domain."""
        return self._facts.get(uuid)

    def facts(self) -> tuple[PowerFact, ...]:
        """The last report on every qube that has a domain."""
        return tuple(self._facts.values())

    def seen(self, sighting: Sighting, base: int) -> tuple[PowerFact, ...]:
        """Reports that the sighting makes: first the end of another boot, then itself."""
        if sighting.power == HALTED:
            return self.gone(sighting.uuid, sighting.boot_id, base)
        reports: list[PowerFact] = []
        old = self._facts.get(sighting.uuid)
        if old is not None and old.boot_id != sighting.boot_id:
            reports.extend(self.gone(sighting.uuid, old.boot_id, base))
            old = None
        fact = PowerFact(
            uuid=sighting.uuid,
            boot_id=sighting.boot_id,
            number=old.number if old is not None else 0,
            power=sighting.power,
            xid=sighting.xid,
            stubdom_xid=sighting.stubdom_xid,
            stubdom_uuid=sighting.stubdom_uuid,
            start_time=sighting.start_time,
            agent=sighting.agent,
        )
        if fact != old:
            fact = replace(fact, number=max(fact.number + 1, base))
            self._facts[sighting.uuid] = fact
            reports.append(fact)
        return tuple(reports)

    def gone(self, uuid: str, boot_id: str, base: int, reason: str = "") -> tuple[PowerFact, ...]:
        """The report that the boot ended; none when it was not known (or is told twice)."""
        old = self._facts.get(uuid)
        if old is None or old.boot_id != boot_id:
            return ()
        del self._facts[uuid]
        return (
            PowerFact(
                uuid=uuid,
                boot_id=boot_id,
                number=max(old.number + 1, base),
                power=HALTED,
                stop_reason=reason or "unknown",
            ),
        )

    # ---- boots that must not come back

    def bury(self, uuid: str, boot_id: str) -> None:
        """The boot was destroyed: a create still under way for it must not stand."""
        self._dead[(uuid, boot_id)] = None
        self._dead.move_to_end((uuid, boot_id))
        while len(self._dead) > TOMBSTONES:
            self._dead.popitem(last=False)

    def buried(self, uuid: str, boot_id: str) -> bool:
        """The boot was destroyed in this run of the service."""
        return (uuid, boot_id) in self._dead
