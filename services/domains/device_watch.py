"""Which devices there are and who has them, and how the registry comes to know it.

Owns the book of devices, and looking for those that the hypervisor, guests and dom0
offer. Must not know calls. Invariants: the registry is told exactly what the book says; a
disk that its backend withdrew for more than a moment is unplugged from who had it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from bulkhead.model.records import (
    ADMINVM_NAME,
    ADMINVM_UUID,
    DeviceFact,
    fact_key,
)

from .adapters.guest_keys import Boot, GuestKeys
from .adapters.hypervisor import Domain, Hypervisor, HypervisorError
from .background import Background
from .core.devices import BLOCK_KEYS, DeviceBook, block_facts
from .core.power import RUNNING
from .core.reasons import DomainsError
from .core.spec import DiskSpec
from .domain_watch import DESCRIBE_S, DomainWatch
from .qube_queue import QubeQueue
from .reporter import Reporter

BLOCK_S = 5.0
# How long a device may be gone from its backend's list and still be the same.
FLAP_S = 1.0


class DeviceWatch:
    """A follower of DomainWatch, which also looks for itself."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        keys: GuestKeys,
        reporter: Reporter,
        domains: DomainWatch,
        queue: QubeQueue,
        background: Background,
        log: logging.Logger,
    ) -> None:
        self._hypervisor = hypervisor
        self._keys = keys
        self._reporter = reporter
        self._domains = domains
        self._queue = queue
        self._background = background
        self._log = log
        self._book = DeviceBook()

    # ---- news of domains

    def seen(self, domain: Domain) -> None:
        """The domain has these disks and functions now."""
        self._book.has(domain.uuid, domain.name, domain.disks, domain.pci)
        self._tell()

    def ended(self, uuid: str, boot_id: str, known: bool) -> None:  # noqa: ARG002
        """The domain offers nothing and has nothing any more."""
        if known:
            self._book.gone(uuid)
            self._tell()

    # ---- telling

    def _tell(self) -> None:
        facts = self._book.facts()
        told = self._reporter.table()
        for key, fact in told.items():
            if isinstance(fact, DeviceFact) and fact.attached_to and key not in facts:
                self._background.spawn(self._unplug(fact))
        self._reporter.remove(key for key in told if key.startswith("device/") and key not in facts)
        self._reporter.put(facts.values())

    async def _unplug(self, fact: DeviceFact) -> None:
        """A backend withdrew a device: who had it shall not get whatever comes there next."""
        target, uuid = fact.attach_options.get("frontend-dev", ""), fact.attached_to
        known = self._domains.current(uuid)
        if not target or known is None:
            return
        await asyncio.sleep(FLAP_S)
        if fact_key(fact) in self._book.facts():
            return  # its backend only described it anew
        disk = DiskSpec(target, "/dev/" + fact.port.replace("_", "/"))
        try:
            async with self._queue.turn(uuid):
                await self._hypervisor.detach_disk(uuid, disk, DESCRIBE_S)
        except (HypervisorError, DomainsError) as error:
            self._log.warning("%s of %s could not be unplugged: %s", target, uuid, error)
        await self._domains.refresh_quietly(uuid)

    # ---- looking

    async def look_at_host(self) -> None:
        """What the hypervisor knows of devices; a failure leaves the last picture."""
        try:
            self._book.offer("host", await self._hypervisor.devices(DESCRIBE_S))
        except (HypervisorError, TimeoutError) as error:
            self._log.warning("devices cannot be listed: %s", error)
            return
        self._tell()

    async def look_at_guest(self, boot: Boot) -> None:
        """What a guest says of its block devices. DomainsError."""
        untrusted_keys = await self._keys.read(boot, BLOCK_KEYS)
        known = self._domains.current(boot.uuid)
        if known is not None and known.boot_id == boot.boot_id:
            self._book.offer(boot.uuid, block_facts(boot.uuid, untrusted_keys))
            self._tell()

    async def _look_at_dom0(self) -> None:
        """What dom0's own database says of dom0's block devices; udev fills it."""
        try:
            untrusted_keys = await self._keys.read(Boot(ADMINVM_UUID, "", ADMINVM_NAME), BLOCK_KEYS)
        except DomainsError as error:
            self._log.debug("dom0's block devices cannot be read: %s", error)
            return
        self._book.offer("dom0", block_facts(ADMINVM_UUID, untrusted_keys))
        self._tell()

    async def run(self) -> None:
        """Where guests write keys themselves: look again every few seconds. Never ends."""
        while True:
            await self._look_at_dom0()
            await asyncio.sleep(BLOCK_S)
            try:
                domains = await self._hypervisor.inventory(DESCRIBE_S)
            except HypervisorError:
                continue
            for domain in domains:
                if domain.boot_id and domain.sighting.power == RUNNING:
                    with contextlib.suppress(DomainsError):
                        await self.look_at_guest(Boot(domain.uuid, domain.boot_id, domain.name))
