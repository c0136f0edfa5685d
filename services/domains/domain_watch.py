"""What is known of each domain, and how the registry comes to know it.

Owns the way from a look at the hypervisor to power facts: the last report of every boot,
the boots that were destroyed, and which news is newer than which answer. Must not know
calls, devices or what else goes with a boot: who keeps something of domains follows.
Invariants: an answer of the hypervisor never undoes what was learned while it was under
way; the end of a boot is reported once, before anything of the qube's next boot; a
destroyed boot never comes back; domains of others are never touched nor reported.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from bulkhead.model.records import PowerFact

from .adapters.hypervisor import Domain, Failure, Hypervisor, HypervisorError
from .background import Background
from .core.power import HALTED
from .core.tracker import PowerTracker
from .reporter import Reporter

DESCRIBE_S = 10.0
RETRY_S = 1.0
# How long after a domain was seen to be gone the event that says why may still come.
REASON_S = 1.0


def report_base() -> int:
    """Numbers of reports start here: microseconds since the host booted, suspend included.

    Domains do not survive the host's boot, so numbers of a boot grow across our restarts.
    """
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


class Follower(Protocol):
    """Keeps something of domains. Told after the registry's queue was, in the order of
    following, in the same turn of the loop: both return at once."""

    def seen(self, domain: Domain) -> None:
        """A domain of ours is there, like this."""

    def ended(self, uuid: str, boot_id: str, known: bool) -> None:
        """The boot is over; known: it had a domain until now. May be told again."""


class DomainWatch:
    """Every domain, as it was last seen. Followers are named before the first look."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        reporter: Reporter,
        background: Background,
        log: logging.Logger,
        base: Callable[[], int] = report_base,
    ) -> None:
        self._hypervisor = hypervisor
        self._reporter = reporter
        self._background = background
        self._log = log
        self._base = base
        self._followers: tuple[Follower, ...] = ()
        self._tracker = PowerTracker()
        # Grows with everything that is learned of a qube.
        self._generation: collections.Counter[str] = collections.Counter()
        self._reasons: dict[str, str] = {}
        self._awaited: dict[str, asyncio.Event] = {}
        self._watched: set[str] = set()
        self._agents: set[tuple[str, str]] = set()

    def follow(self, *followers: Follower) -> None:
        """Tell these too from now on."""
        self._followers += followers

    # ---- what is known

    def current(self, uuid: str) -> PowerFact | None:
        """The last report on the qube, None when it has no domain."""
        return self._tracker.current(uuid)

    def facts(self) -> tuple[PowerFact, ...]:
        """The last report on every qube that has a domain."""
        return self._tracker.facts()

    def fact_of(self, domain: Domain) -> PowerFact:
        """The report on the domain; without a number when another boot is known."""
        known = self._tracker.current(domain.uuid)
        if known is None or known.boot_id != domain.boot_id:
            known = PowerFact(domain.uuid, domain.boot_id, 0, domain.sighting.power)
        return known

    def halted(self, uuid: str, boot_id: str) -> PowerFact:
        """The report on a boot that is over."""
        return PowerFact(uuid, boot_id, self._base(), HALTED)

    def bury(self, uuid: str, boot_id: str) -> None:
        """The boot is destroyed: a create still under way for it must not stand."""
        self._tracker.bury(uuid, boot_id)

    def buried(self, uuid: str, boot_id: str) -> bool:
        """The boot was destroyed in this run of the service."""
        return self._tracker.buried(uuid, boot_id)

    # ---- what is told

    def agent_connected(self, uuid: str, boot_id: str) -> None:
        """The boot's agent answers; hypervisors do not see those that daemons serve."""
        self._agents.add((uuid, boot_id))

    def stopped_because(self, uuid: str, reason: str) -> None:
        """Why the qube's domain stopped; which boot it was, the next look finds out."""
        self._reasons[uuid] = reason
        if uuid in self._awaited:
            self._awaited[uuid].set()

    def learn(self, uuid: str, domain: Domain | None) -> None:
        """The qube has this domain now, or none; the registry hears what changed."""
        reason = self._reasons.pop(uuid, "")
        if domain is None:
            known = self._tracker.current(uuid)
            if known is not None:
                self.ended(uuid, known.boot_id, reason)
            return
        if not domain.boot_id:
            return  # somebody else's domain: never touched, never reported
        if self._tracker.buried(uuid, domain.boot_id):
            self._log.warning("boot %s of %s came back and is ended", domain.boot_id, uuid)
            self._background.spawn(self._end_again(uuid, domain.boot_id))
            return
        known = self._tracker.current(uuid)
        if known is not None and known.boot_id != domain.boot_id:
            self.ended(uuid, known.boot_id, reason)
        sighting = domain.sighting
        if (uuid, domain.boot_id) in self._agents and not sighting.agent:
            sighting = replace(sighting, agent=True)
        self._generation[uuid] += 1
        self._reporter.put(self._tracker.seen(sighting, self._base()))
        for follower in self._followers:
            follower.seen(domain)

    async def _end_again(self, uuid: str, boot_id: str) -> None:
        try:
            await self._hypervisor.destroy(uuid, boot_id, DESCRIBE_S)
        except HypervisorError as error:
            self._log.error("boot %s of %s could not be ended: %s", boot_id, uuid, error.message)

    def ended(self, uuid: str, boot_id: str, reason: str) -> None:
        """The boot is over; repeatable."""
        self._generation[uuid] += 1
        reports = self._tracker.gone(uuid, boot_id, self._base(), reason)
        self._reporter.put(reports)
        self._agents.discard((uuid, boot_id))
        for follower in self._followers:
            follower.ended(uuid, boot_id, bool(reports))

    def removed(self, uuid: str) -> None:
        """The qube is gone: nothing of it stays, unless it has a domain all the same."""
        if self._tracker.current(uuid) is None:
            self._reporter.remove([f"power/{uuid}"])
            self._generation.pop(uuid, None)

    # ---- looking

    def generations(self) -> Mapping[str, int]:
        """Taken before an inventory is asked for, and given back with its rows."""
        return dict(self._generation)

    def take(self, domain: Domain, before: Mapping[str, int]) -> None:
        """A row of an inventory; a qube of which more was learned meanwhile is looked at."""
        if self._generation[domain.uuid] == before.get(domain.uuid, 0):
            self.learn(domain.uuid, domain)
        else:
            self.look_soon(domain.uuid)

    def look_soon(self, uuid: str) -> None:
        """Look at the domain soon; several events of one domain share a look."""
        if uuid not in self._watched:
            self._watched.add(uuid)
            self._background.spawn(self._look(uuid))

    async def _look(self, uuid: str) -> None:
        with contextlib.suppress(HypervisorError):  # the inventory at reconnection finds it
            await self.look(uuid)

    async def look(self, uuid: str) -> Domain | None:
        """As refresh, until the domain answers, however long that takes.

        HypervisorError UNAVAILABLE when the hypervisor itself went away.
        """
        while True:
            # From here on a new event needs a look of its own.
            self._watched.discard(uuid)
            try:
                return await self.refresh(uuid, DESCRIBE_S)
            except HypervisorError as error:
                if error.failure is Failure.UNAVAILABLE:
                    raise
                self._log.warning("domain %s could not be looked at: %s", uuid, error.message)
            await asyncio.sleep(RETRY_S)

    async def refresh(self, uuid: str, timeout: float, patience: float = REASON_S) -> Domain | None:
        """Ask for the domain and report what changed; what was learned meanwhile wins.

        A domain may be seen to be gone before the event that says why: the event gets
        *patience* seconds. HypervisorError.
        """
        while True:
            generation = self._generation[uuid]
            domain = await self._hypervisor.describe(uuid, timeout)
            if domain is None and patience and self._tracker.current(uuid) is not None:
                await self._reason(uuid, min(patience, timeout))
            if self._generation[uuid] != generation:
                continue
            self.learn(uuid, domain)
            return domain

    async def refresh_quietly(self, uuid: str) -> None:
        """As refresh, for what nobody waits for; a failure is tried again."""
        try:
            # It stopped while nobody listened: no event will say why.
            await self.refresh(uuid, DESCRIBE_S, patience=0)
        except HypervisorError as error:
            self._log.warning("domain %s could not be looked at: %s", uuid, error.message)
            self.look_soon(uuid)

    async def _reason(self, uuid: str, patience: float) -> None:
        """Wait until the event that says why the domain stopped has come, or long enough."""
        if uuid in self._reasons:
            return
        told = self._awaited.setdefault(uuid, asyncio.Event())
        try:
            await asyncio.wait_for(told.wait(), patience)
        except TimeoutError:
            self._log.info("nothing says why domain %s stopped", uuid)
        finally:
            self._awaited.pop(uuid, None)
