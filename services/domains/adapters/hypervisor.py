"""What domains asks of a hypervisor, whichever it is.

Owns the interface and its value types. Must not know libvirt, the simulation or the
bus. Invariant: every method is a coroutine that never blocks the loop, ends within its
timeout, and leaves other qubes' calls alone when it hangs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from bulkhead.model.records import DeviceFact
from services.domains.core.spec import DiskSpec, DomainSpec, InterfaceSpec
from services.domains.core.tracker import Sighting


class Failure(enum.Enum):
    """Why a hypervisor call failed."""

    NOT_FOUND = "not-found"
    EXISTS = "exists"
    WRONG_STATE = "wrong-state"
    INVALID = "invalid"
    UNSUPPORTED = "unsupported"
    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"
    ABANDONED = "abandoned"  # a destroy of the same uuid came first
    BUSY = "busy"
    NO_MEMORY = "no-memory"
    FAILED = "failed"


class HypervisorError(Exception):
    """A hypervisor call failed; message is the hypervisor's own sentence."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure = failure
        self.message = message


@dataclass(frozen=True, slots=True)
class HostInfo:
    """The host: kind "xen", "kvm", "qemu" or "sim"; free_kib None = not known."""

    kind: str
    memory_kib: int
    cpus: int
    dom0_maxmem_mib: int = 4096
    has_iommu: bool = False
    cpu_family_model: str = ""
    free_kib: int | None = None


@dataclass(frozen=True, slots=True)
class AdminUsage:
    """What dom0 has and uses; where it is no domain, the whole host with its guests.

    cpu_time_ns: since it was started, over all its vcpus.
    """

    memory_kib: int
    memory_max_kib: int
    cpu_time_ns: int
    vcpus: int


@dataclass(frozen=True, slots=True)
class Domain:
    """One existing domain.

    console: path of its console, "" = none. disks: by Xen target names, in part only
    what the hypervisor tells. pci: addresses such as "0000:03:00.0".
    """

    sighting: Sighting
    name: str = ""
    epoch: int = 0
    console: str = ""
    memory_kib: int = 0
    memory_max_kib: int = 0
    cpu_time_ns: int = 0
    vcpus: int = 0
    stubdom_cpu_time_ns: int | None = None
    stubdom_vcpus: int | None = None
    disks: tuple[DiskSpec, ...] = ()
    pci: tuple[str, ...] = ()

    @property
    def uuid(self) -> str:
        """The qube's uuid."""
        return self.sighting.uuid

    @property
    def boot_id(self) -> str:
        """The boot id of its metadata; "" for a domain that is not ours."""
        return self.sighting.boot_id


class News(enum.Enum):
    """What an event of the hypervisor is about."""

    CHANGED = "changed"  # look at uuid again
    STOPPED = "stopped"  # uuid is gone; boot_id where the hypervisor says it
    DEVICES = "devices"  # what backends offer has changed
    CONNECTED = "connected"  # a connection is up (again): take inventory
    DISCONNECTED = "disconnected"  # nothing is known until CONNECTED


@dataclass(frozen=True, slots=True)
class Event:
    """One event; boot_id "" means that the hypervisor does not say which boot."""

    news: News
    uuid: str = ""
    boot_id: str = ""
    reason: str = ""


# Seconds that a call may take from now on; raises when there are none left.
Left = Callable[[], float]


class Hypervisor(Protocol):
    """One hypervisor. Timeouts are seconds; every method raises HypervisorError.

    NOT_FOUND where a method needs the domain and there is none. A call that exceeds its
    timeout raises TIMEOUT and is abandoned: its effect is unknown, found by boot id.
    """

    async def open(self, listener: Callable[[Event], None]) -> None:
        """Begin to connect, and tell listener (on the loop) each event from now on."""

    async def close(self) -> None:
        """Drop all connections; domains go on."""

    async def host(self, timeout: float) -> HostInfo:
        """The host's size and kind."""

    async def admin_usage(self, timeout: float) -> AdminUsage:
        """Memory and CPU of dom0 now."""

    async def inventory(self, timeout: float) -> tuple[Domain, ...]:
        """Every existing domain that answers in time, those without boot id too."""

    async def existing(self, timeout: float) -> frozenset[str]:
        """The uuid of every existing domain, whether it answers or not."""

    async def describe(self, uuid: str, timeout: float) -> Domain | None:
        """The domain now, None when there is none."""

    async def devices(self, timeout: float) -> tuple[DeviceFact, ...]:
        """Devices that the host and the guests offer, as far as the hypervisor knows."""

    async def create_paused(self, spec: DomainSpec, timeout: float) -> Domain:
        """Start the domain with its CPUs stopped. EXISTS when the uuid has a domain."""

    async def resume(self, uuid: str, timeout: float) -> None:
        """Let the CPUs run; nothing happens to one that runs."""

    async def pause(self, uuid: str, timeout: float) -> None:
        """Stop the CPUs; nothing happens to one that is paused."""

    async def pm_suspend(self, uuid: str, timeout: float) -> None:
        """Suspend to memory by the guest. UNSUPPORTED when the guest cannot."""

    async def wake(self, uuid: str, timeout: float) -> None:
        """Wake from pm_suspend."""

    async def shutdown(self, uuid: str, timeout: float) -> None:
        """Ask the guest to power off; returns at once."""

    async def destroy(self, uuid: str, boot_id: str, timeout: float) -> bool:
        """End the domain, on a lane that no other call holds; False when there was none.

        Abandons the calls under way for this uuid. boot_id "" = whichever boot.
        """

    async def undefine(self, uuid: str, timeout: float) -> None:
        """Forget a persistent definition, if there is one."""

    async def attach_interface(
        self, uuid: str, interface: InterfaceSpec, timeout: float, *, anew: bool = False
    ) -> None:
        """The guest's one interface is this. What hangs at another backend, or has other
        addresses, is unplugged first; with anew also the same one, whose other end is gone."""

    async def detach_interface(self, uuid: str, backend: str, timeout: float) -> None:
        """Unplug what hangs at the backend of that name, "" = at any; there may be none."""

    async def attach_disk(self, uuid: str, disk: DiskSpec, timeout: float) -> None:
        """Plug; nothing happens when target has that path. EXISTS when it has another."""

    async def detach_disk(self, uuid: str, disk: DiskSpec, timeout: float) -> None:
        """Unplug by target; nothing happens when it is not there."""

    async def resize_disk(self, uuid: str, target: str, size: int, timeout: float) -> None:
        """Tell the guest that target now has size bytes."""

    async def set_maxmem(self, uuid: str, maxmem_mib: int, timeout: float) -> None:
        """How much memory the running guest may be given; what it has now stays."""

    async def run_service(
        self, uuid: str, service: str, user: str, data: bytes, timeout: float
    ) -> tuple[int, bytes] | None:
        """Run a service in the guest where the hypervisor offers it; None where not."""

    async def wait_agent(self, uuid: str, timeout: float) -> bool | None:
        """Wait for the guest's agent; None where the hypervisor knows of none.

        False when it did not connect within timeout.
        """
