"""Begins boots and ends them.

Owns what is certain after a create or a destroy, whatever the hypervisor said. Must not
know calls. Invariants: a boot that was destroyed is never made, nor stands when it was
destroyed meanwhile, because it is buried before the hypervisor is told to end it; a
create that failed but had its effect is a success.
"""

from __future__ import annotations

from bulkhead import failpoints

from .adapters.hypervisor import Domain, Failure, Hypervisor, HypervisorError, Left
from .boot_memory import BootMemory
from .core.interfaces import InterfaceBook
from .core.power import PAUSED
from .core.reasons import DomainsError
from .core.spec import DomainSpec
from .domain_watch import DESCRIBE_S, DomainWatch

# What exists cannot be asked, or asking is pointless.
_UNDECIDED = frozenset({Failure.TIMEOUT, Failure.ABANDONED, Failure.UNAVAILABLE, Failure.INVALID})


class Boots:
    """Boots of all qubes. The caller of make and shutdown holds the qube's turn."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        domains: DomainWatch,
        interfaces: InterfaceBook,
        memory: BootMemory,
    ) -> None:
        self._hypervisor = hypervisor
        self._domains = domains
        self._interfaces = interfaces
        self._memory = memory

    def refuse_buried(self, spec: DomainSpec) -> None:
        """DomainsError BOOT_ABANDONED when the boot was destroyed."""
        if self._domains.buried(spec.uuid, spec.boot_id):
            raise DomainsError(
                "BOOT_ABANDONED",
                f"Boot {spec.boot_id} of {spec.name} was destroyed; start the qube anew.",
                qube=spec.name,
                boot_id=spec.boot_id,
            )

    async def make(self, spec: DomainSpec, left: Left) -> Domain:
        """The domain, with its CPUs stopped. DomainsError, HypervisorError."""
        self.refuse_buried(spec)
        timeout = left()
        backend = self._interfaces.boot_behind(*spec.interfaces)
        failpoints.hit("domains.create.before")
        try:
            domain = await self._hypervisor.create_paused(spec, timeout)
        except HypervisorError as error:
            if error.failure in _UNDECIDED:
                raise
            # It may have had its effect: what exists now decides.
            found = await self._domains.refresh(spec.uuid, DESCRIBE_S)
            if found is None or found.boot_id != spec.boot_id:
                raise
            domain = found
        finally:
            # The memory is the domain's now, or nobody's: balancing may go on.
            await self._memory.let_balance(spec.boot_id)
        failpoints.hit("domains.create.after")
        self._domains.learn(spec.uuid, domain)
        self.refuse_buried(spec)
        self._interfaces.plugged(domain.uuid, domain.boot_id, backend)
        return domain

    async def shutdown(self, domain: Domain, left: Left) -> None:
        """Ask the guest to power off; one whose CPUs are stopped cannot, and is ended."""
        failpoints.hit("domains.shutdown.before")
        try:
            if domain.sighting.power == PAUSED:
                self._domains.bury(domain.uuid, domain.boot_id)
                await self._hypervisor.destroy(domain.uuid, domain.boot_id, left())
            else:
                await self._hypervisor.shutdown(domain.uuid, left())
        except HypervisorError as error:
            if error.failure is not Failure.NOT_FOUND:
                raise
        failpoints.hit("domains.shutdown.after")

    async def destroy(self, uuid: str, boot_id: str, left: Left) -> bool:
        """End the boot now ("" = whichever there is); True when there was one."""
        if boot_id:
            # A create still under way for this boot must not stand.
            self._domains.bury(uuid, boot_id)
        failpoints.hit("domains.destroy.before")
        ended = await self._hypervisor.destroy(uuid, boot_id, left())
        failpoints.hit("domains.destroy.after")
        if boot_id:
            self._domains.ended(uuid, boot_id, "destroyed")
            await self._memory.let_balance(boot_id)
        else:
            self._domains.look_soon(uuid)
        return ended
