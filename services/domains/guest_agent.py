"""Reaches into a guest by its agent, whoever serves it.

Owns who is asked first: the hypervisor where it has a channel of its own to the agent,
the per-guest daemons elsewhere. Must not know calls. Invariant: an agent is said to be
connected only after it answered, or its daemon said that it did.
"""

from __future__ import annotations

from .adapters.guest_daemons import GuestDaemons
from .adapters.hypervisor import Domain, Hypervisor, Left
from .core.reasons import DomainsError
from .domain_watch import DESCRIBE_S, DomainWatch

PATIENCE_S = 60


class GuestAgent:
    """Agents of all guests."""

    def __init__(self, hypervisor: Hypervisor, daemons: GuestDaemons, domains: DomainWatch) -> None:
        self._hypervisor = hypervisor
        self._daemons = daemons
        self._domains = domains

    async def start(
        self,
        domain: Domain,
        left: Left,
        *,
        qrexec: bool,
        timeout_s: int,
        default_user: str,
        debug: bool,
        stubdom_qrexec: bool,
    ) -> bool:
        """Start the guest's daemons and wait for its agent; True when that is connected.

        DomainsError AGENT_TIMEOUT.
        """
        agent = await self._daemons.start_agents(
            domain,
            qrexec=qrexec,
            timeout_s=timeout_s,
            default_user=default_user,
            debug=debug,
            stubdom_qrexec=stubdom_qrexec,
        )
        if agent is None and qrexec:
            patience = min(timeout_s or PATIENCE_S, left())
            agent = await self._hypervisor.wait_agent(domain.uuid, patience)
            if agent is False:
                raise DomainsError(
                    "AGENT_TIMEOUT",
                    f"Cannot connect to qrexec agent for {timeout_s} seconds, "
                    f"see {domain.console or 'the console log'} for details",
                    qube=domain.name,
                    seconds=str(timeout_s),
                    console=domain.console,
                )
        if agent:
            self._domains.agent_connected(domain.uuid, domain.boot_id)
            await self._domains.refresh(domain.uuid, DESCRIBE_S)
        return bool(agent)

    async def run(
        self, domain: Domain, service: str, user: str, data: bytes, timeout: float
    ) -> tuple[int, bytes]:
        """(exit code, output) of a service in the guest. DomainsError AGENT_NOT_CONNECTED."""
        answer = await self._hypervisor.run_service(domain.uuid, service, user, data, timeout)
        if answer is None:
            answer = await self._daemons.run_service(domain, service, user, data, timeout)
        if answer is None:
            raise DomainsError(
                "AGENT_NOT_CONNECTED",
                f"Domain '{domain.name}': qrexec not connected",
                qube=domain.name,
            )
        return answer
