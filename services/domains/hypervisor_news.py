"""Listens to the hypervisor, and takes up everything at each connection.

Owns the connection's news and the host fact. Must not know calls, nor what becomes of
news. Invariant: after each connection the registry's picture is complete again, and
before the first one nothing is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from bulkhead.model.records import HostFact

from .adapters.guest_keys import Boot, GuestKeys
from .adapters.hypervisor import Event, Failure, HostInfo, Hypervisor, HypervisorError, News
from .background import Background
from .core.reasons import DomainsError
from .device_watch import DeviceWatch
from .domain_watch import DESCRIBE_S, RETRY_S, DomainWatch
from .reporter import Reporter


class HypervisorNews:
    """One per process; listens from start() to stop()."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        keys: GuestKeys,
        reporter: Reporter,
        domains: DomainWatch,
        devices: DeviceWatch,
        background: Background,
        log: logging.Logger,
        uri: str,
    ) -> None:
        self._hypervisor = hypervisor
        self._keys = keys
        self._reporter = reporter
        self._domains = domains
        self._devices = devices
        self._background = background
        self._log = log
        self._uri = uri
        # The host as it was at the last connection; None before the first.
        self.host: HostInfo | None = None
        self._adopting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to listen."""
        await self._hypervisor.open(self.heard)

    async def stop(self) -> None:
        """Stop listening; domains go on."""
        await self._background.stop()
        await self._hypervisor.close()

    def heard(self, event: Event) -> None:
        """One event; called on the loop, returns at once."""
        if event.news is News.CONNECTED:
            if self._adopting is not None:
                self._adopting.cancel()
            self._adopting = self._background.spawn(self._adopt())
        elif event.news is News.DEVICES:
            self._background.spawn(self._devices.look_at_host())
        elif event.news is News.DISCONNECTED:
            self._log.warning("the hypervisor is away")
        elif event.news is News.STOPPED and event.boot_id:
            self._domains.ended(event.uuid, event.boot_id, event.reason)
        else:
            if event.reason and event.news is News.STOPPED:
                self._domains.stopped_because(event.uuid, event.reason)
            self._domains.look_soon(event.uuid)

    async def _adopt(self) -> None:
        """After each connection: take everything as it is now, and tell it completely."""
        while True:
            try:
                host = await self._hypervisor.host(DESCRIBE_S)
                existing = await self._hypervisor.existing(DESCRIBE_S)
                before = self._domains.generations()
                domains = await self._hypervisor.inventory(DESCRIBE_S)
                break
            except HypervisorError as error:
                self._log.warning("the hypervisor cannot be read: %s", error.message)
                if error.failure is Failure.UNAVAILABLE:
                    return  # the next connection takes over
                await asyncio.sleep(RETRY_S)
        self.host = host
        self._reporter.put([self._host_fact(host)])
        for domain in domains:
            self._domains.take(domain, before)
        # A complete picture without a domain that is only slow would say that its boot is
        # over, and its volumes would be put away under a guest that runs.
        silent = existing - {domain.uuid for domain in domains}
        try:
            late = await asyncio.gather(*map(self._domains.look, sorted(silent)))
        except HypervisorError:
            return  # the next connection takes over
        domains += tuple(domain for domain in late if domain is not None)
        present = {domain.uuid: domain.boot_id for domain in domains if domain.boot_id}
        for fact in self._domains.facts():
            if present.get(fact.uuid) != fact.boot_id:
                await self._domains.refresh_quietly(fact.uuid)
        for uuid, boot_id in (await self._keys.kept()).items():
            known = self._domains.current(uuid)
            if known is None or known.boot_id != boot_id:
                await self._keys.drop(uuid, boot_id)
        for domain in domains:
            if domain.boot_id:
                with contextlib.suppress(DomainsError):
                    await self._devices.look_at_guest(
                        Boot(domain.uuid, domain.boot_id, domain.name)
                    )
        await self._devices.look_at_host()
        self._reporter.release()
        self._log.info("%d domains on %s %s", len(present), host.kind, self._uri)

    def _host_fact(self, host: HostInfo) -> HostFact:
        return HostFact(
            hypervisor=host.kind,
            uri=self._uri,
            memory_kib=host.memory_kib,
            cpus=host.cpus,
            dom0_maxmem_mib=host.dom0_maxmem_mib,
            has_iommu=host.has_iommu,
            cpu_family_model=host.cpu_family_model,
        )
