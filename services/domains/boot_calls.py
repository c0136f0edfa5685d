"""What calls about a boot begin and end with.

Owns admission, the time that a call has left, finding the boot that it is about, and
the state that it answers. Must not know what a call does. Invariants: a stale lifecycle
gets no further than admit; an answer that tells a state never runs ahead of what the
registry was told, as long as the registry can be reached.
"""

from __future__ import annotations

import contextlib

from bulkhead.api import domains_pb2
from bulkhead.bus.dispatch import Call
from bulkhead.model.epoch import EpochGuard

from . import messages
from .adapters.hypervisor import Domain, Left
from .core import spec as specs
from .core.reasons import DomainsError
from .domain_watch import DESCRIBE_S, DomainWatch
from .reporter import Reporter

# How long an answer waits for the registry to know of what it did.
TOLD_S = 0.5
# Part of a deadline that is kept for the answer itself.
MARGIN_S = 0.2


class BootCalls:
    """The same for every call."""

    def __init__(self, guard: EpochGuard, domains: DomainWatch, reporter: Reporter) -> None:
        self._guard = guard
        self._domains = domains
        self._reporter = reporter

    def admit(self, call: Call) -> None:
        """Refuse a stale lifecycle. Others (dispvm, operator) carry no epoch."""
        if call.caller == "lifecycle" or call.epoch:
            self._guard.admit(call.epoch)

    @staticmethod
    def left(call: Call) -> float:
        """Seconds that a hypervisor call may take, so that the answer still gets out."""
        call.check()
        return max(0.05, call.deadline.remaining() - MARGIN_S)

    @classmethod
    def clock(cls, call: Call) -> Left:
        """left, for what asks the hypervisor later or more than once."""
        return lambda: cls.left(call)

    async def bound(self, boot: domains_pb2.BootRef, call: Call) -> Domain:
        """The domain of that boot. DomainsError DOMAIN_NOT_FOUND when it is not there."""
        specs.check_uuid(boot.uuid)
        if boot.boot_id:
            specs.check_boot_id(boot.boot_id)
        domain = await self._domains.refresh(boot.uuid, min(DESCRIBE_S, self.left(call)))
        if domain is None or not domain.boot_id or boot.boot_id not in ("", domain.boot_id):
            raise DomainsError(
                "DOMAIN_NOT_FOUND",
                f"No domain of the qube {boot.uuid} with boot id {boot.boot_id or '(any)'} exists.",
                uuid=boot.uuid,
                boot_id=boot.boot_id,
            )
        return domain

    async def bound_or_gone(self, boot: domains_pb2.BootRef, call: Call) -> Domain | None:
        """The domain of that boot; None when it is not there."""
        try:
            return await self.bound(boot, call)
        except DomainsError as error:
            if error.reason != "DOMAIN_NOT_FOUND":
                raise
            return None

    def state(self, domain: Domain) -> domains_pb2.DomainState:
        """The domain's state for an answer."""
        return messages.state_to(self._domains.fact_of(domain), domain)

    async def after(self, uuid: str, boot_id: str, call: Call) -> domains_pb2.DomainState:
        """The state once a call has had its effect; halted when the boot just ended.

        The registry knows it first where it can be reached, so that whoever sees the
        operation end sees the state that it brought about.
        """
        domain = await self._domains.refresh(uuid, min(DESCRIBE_S, self.left(call)))
        if self._reporter.reachable:
            with contextlib.suppress(TimeoutError):
                await self._reporter.flushed(min(TOLD_S, self.left(call)))
        if domain is None or domain.boot_id != boot_id:
            return messages.state_to(self._domains.halted(uuid, boot_id), None)
        return self.state(domain)
