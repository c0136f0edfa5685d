"""Plugs devices into running guests and unplugs them.

Owns the order of effects of one change. Must not know calls. Invariant: an interface is
plugged anew where the one that is there hangs at an earlier boot of its backend; of two
boots of the backend, the one that is noted is never newer than the one plugged to.
"""

from __future__ import annotations

from bulkhead import failpoints

from .adapters.hypervisor import Domain, Hypervisor, Left
from .core.interfaces import InterfaceBook
from .core.spec import DiskSpec, InterfaceSpec


class LiveDevices:
    """Devices of all guests. The caller holds the qube's turn."""

    def __init__(self, hypervisor: Hypervisor, interfaces: InterfaceBook) -> None:
        self._hypervisor = hypervisor
        self._interfaces = interfaces

    async def attach_interface(self, domain: Domain, interface: InterfaceSpec, left: Left) -> None:
        """The guest has the interface, at its backend as that is now."""
        failpoints.hit("domains.attach.before")
        backend = self._interfaces.boot_behind(interface)
        await self._hypervisor.attach_interface(
            domain.uuid,
            interface,
            left(),
            anew=self._interfaces.is_dead(domain.sighting, interface),
        )
        self._interfaces.plugged(domain.uuid, domain.boot_id, backend)
        failpoints.hit("domains.attach.after")

    async def detach_interface(self, domain: Domain, backend: str, left: Left) -> None:
        """The guest has no interface, with a backend none at it."""
        failpoints.hit("domains.detach.before")
        await self._hypervisor.detach_interface(domain.uuid, backend, left())
        failpoints.hit("domains.detach.after")

    async def attach_disk(self, domain: Domain, disk: DiskSpec, left: Left) -> None:
        """The guest has the disk."""
        failpoints.hit("domains.attach.before")
        await self._hypervisor.attach_disk(domain.uuid, disk, left())
        failpoints.hit("domains.attach.after")

    async def detach_disk(self, domain: Domain, disk: DiskSpec, left: Left) -> None:
        """The guest has no such disk."""
        failpoints.hit("domains.detach.before")
        await self._hypervisor.detach_disk(domain.uuid, disk, left())
        failpoints.hit("domains.detach.after")

    async def resize_disk(self, domain: Domain, target: str, size: int, left: Left) -> None:
        """The guest sees that its disk has size bytes."""
        failpoints.hit("domains.resize.before")
        await self._hypervisor.resize_disk(domain.uuid, target, size, left())
        failpoints.hit("domains.resize.after")
