"""Runs domains: python -m services.domains --root DIR.

Owns the choice of hypervisor by the instance's settings, and the wiring. Must not hold
any rule of its own. Invariant: whatever the hypervisor, the handlers are the same.
"""

from __future__ import annotations

from pathlib import Path

from bulkhead.bus.confine import Confinement
from bulkhead.bus.runtime import ServiceContext, serve
from bulkhead.config import Settings

from .adapters.guest_daemons import GuestDaemons, Programs
from .adapters.guest_keys import FileKeys, GuestKeys, QubesDbKeys
from .adapters.hypervisor import HostInfo, Hypervisor
from .adapters.libvirt_adapter import LibvirtHypervisor
from .adapters.namespaces import WithNamespaces
from .adapters.qmemman import MemoryManager
from .adapters.sim_adapter import SimHypervisor
from .core.tracker import EpochGuard
from .core.xml import Flavour
from .handlers import DomainsHandlers
from .registry_link import BusRegistryLink
from .reporter import Reporter

try:
    import qubesdb  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    qubesdb = None

SIM_SOCKET = "hv.sock"
KEYS = "guest-keys"
NAMESPACES = "namespaces"


def _hypervisor(settings: Settings) -> Hypervisor:
    if settings.hypervisor.startswith("sim:"):
        return SimHypervisor(settings.service_dir("simhv") / SIM_SOCKET)
    libvirt = LibvirtHypervisor(settings.connect_uri)
    if settings.hypervisor.startswith("qemu:") and settings.isolated:
        return WithNamespaces(libvirt, settings.service_dir("domains") / NAMESPACES)
    return libvirt


def _keys(settings: Settings) -> GuestKeys:
    if qubesdb is not None and settings.hypervisor.startswith("xen:"):
        return QubesDbKeys(qubesdb.QubesDB)
    return FileKeys(settings.service_dir("domains") / KEYS)


async def build(context: ServiceContext) -> object:
    """The handlers of Domains, listening to the hypervisor and telling the registry."""
    settings = context.settings
    guard = EpochGuard()
    reporter = Reporter(BusRegistryLink(context.channel("registry")), guard.learn, context.log)
    context.counters.update(reporter.counters)
    reporter.counters = context.counters
    hypervisor = _hypervisor(settings)
    keys = _keys(settings)

    engine = hypervisor.behind if isinstance(hypervisor, WithNamespaces) else hypervisor

    def flavour(host: HostInfo | None) -> Flavour:
        if isinstance(engine, LibvirtHypervisor):
            return engine.flavour
        return (
            Flavour("xen", qubes=True) if host is None or host.kind == "sim" else Flavour(host.kind)
        )

    handlers = DomainsHandlers(
        hypervisor,
        keys,
        GuestDaemons(),
        MemoryManager(),
        reporter,
        guard,
        flavour=flavour,
        uri=settings.hypervisor,
        network=not settings.hypervisor.startswith("qemu:///session"),
        log=context.log,
    )
    await handlers.start()
    context.on_stop(handlers.stop)
    context.spawn(reporter.run(), "facts")
    if isinstance(keys, QubesDbKeys):
        context.spawn(handlers.watch_block(), "block devices")
    return handlers


def confinement(settings: Settings) -> Confinement:
    """Nothing but the bus and our directory for the simulation; libvirt and daemons else."""
    if settings.hypervisor.startswith("sim:"):
        return Confinement()
    programs = Programs()
    return Confinement(
        read=(Path("/etc"), Path("/proc"), Path("/sys"), Path("/var/run")),
        write=tuple(path for path in (programs.sockets, Path("/dev/xen")) if path.exists()),
        execute=(Path("/usr/bin"), Path("/usr/sbin"))
        if programs.qrexec_daemon.exists() or settings.hypervisor == "qemu:///session"
        else (),
    )


def main() -> None:
    """Serve until SIGTERM."""
    serve("domains", build, ["Domains"], confinement=confinement)


if __name__ == "__main__":
    main()
