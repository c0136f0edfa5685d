"""dispvm: disposables. Wiring only."""

from __future__ import annotations

from pathlib import Path

from bulkhead.bus.confine import Confinement
from bulkhead.bus.runtime import ServiceContext, serve
from bulkhead.config import Settings
from clients.bus import DomainsClient, LifecycleClient, RegistryClient
from services.dispvm.adapters.boot_marker import KERNEL_BOOT_ID, BootMarker
from services.dispvm.adapters.memory import AvailableMemory
from services.dispvm.handlers import DispvmHandlers
from services.dispvm.operations import Operations
from services.dispvm.pool import Pool


def memory_directory(settings: Settings) -> Path:
    """Where the memory manager writes what is available."""
    return settings.run_dir / "qubes"


async def build(context: ServiceContext) -> DispvmHandlers:
    """Connect and clean up after a boot of the host."""
    replica = context.replica(with_hidden=True)
    operations = Operations(LifecycleClient(context.channel("lifecycle")), replica)
    pool = Pool(
        operations,
        RegistryClient(context.channel("registry")),
        DomainsClient(context.channel("domains")),
        replica,
        AvailableMemory(memory_directory(context.settings) / "qmemman-avail-mem"),
    )
    handlers = DispvmHandlers(
        operations, pool, replica, BootMarker(context.settings.service_dir("dispvm"))
    )
    context.on_stop(pool.close)
    context.spawn(handlers.start(), "start")
    return handlers


def confinement(settings: Settings) -> Confinement:
    """The kernel's boot id, available memory, and the marker beside its sockets."""
    return Confinement(
        read=(KERNEL_BOOT_ID, memory_directory(settings)),
        write=(settings.service_dir("dispvm"),),
    )


if __name__ == "__main__":
    serve("dispvm", build, ["bulkhead.api.Dispvm"], confinement=confinement)
