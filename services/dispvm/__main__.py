"""dispvm: disposables. Wiring only."""

from __future__ import annotations

from bulkhead.bus.confine import Confinement
from bulkhead.bus.runtime import ServiceContext, serve
from bulkhead.config import Settings
from clients.bus import LifecycleClient
from services.dispvm.adapters.boot_marker import KERNEL_BOOT_ID, BootMarker
from services.dispvm.handlers import DispvmHandlers


async def build(context: ServiceContext) -> DispvmHandlers:
    """Connect and clean up after a boot of the host."""
    handlers = DispvmHandlers(
        LifecycleClient(context.channel("lifecycle")),
        context.replica(with_hidden=True),
        BootMarker(context.settings.service_dir("dispvm")),
    )
    context.spawn(handlers.start(), "start")
    return handlers


def confinement(settings: Settings) -> Confinement:
    """The kernel's boot id, and the marker beside its sockets."""
    return Confinement(read=(KERNEL_BOOT_ID,), write=(settings.service_dir("dispvm"),))


if __name__ == "__main__":
    serve("dispvm", build, ["bulkhead.api.Dispvm"], confinement=confinement)
