"""Runs domains: python -m services.domains --root DIR.

Owns the choice of hypervisor by the instance's settings, and the wiring. Must not hold
any rule of its own. Invariants: whatever the hypervisor, the handlers are the same; libvirt
and all that it brings along are loaded only where they are used, and before files are out
of reach.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from bulkhead.bus.confine import Confinement
from bulkhead.bus.runtime import ServiceContext, serve
from bulkhead.config import Settings
from bulkhead.model.epoch import EpochGuard

from .adapters.guest_daemons import GuestDaemons, Programs
from .adapters.guest_keys import FileKeys, GuestKeys, QubesDbKeys
from .adapters.hypervisor import HostInfo, Hypervisor
from .adapters.namespaces import WithNamespaces
from .adapters.qmemman import MemoryManager
from .adapters.sim_adapter import SimHypervisor
from .core.reasons import DomainsError
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


FlavourOf = Callable[[HostInfo | None], Flavour]


def _is_simulated(settings: Settings) -> bool:
    return settings.hypervisor.startswith("sim:")


def _simulated_flavour(host: HostInfo | None) -> Flavour:
    if host is None or host.kind == "sim":
        return Flavour("xen", qubes=True)
    return Flavour(host.kind)


def _hypervisor(settings: Settings) -> tuple[Hypervisor, FlavourOf]:
    """The hypervisor, and how XML for it is written where the host is this one."""
    if _is_simulated(settings):
        return SimHypervisor(settings.service_dir("simhv") / SIM_SOCKET), _simulated_flavour
    from .adapters.libvirt_adapter import LibvirtHypervisor

    libvirt = LibvirtHypervisor(settings.connect_uri)

    def flavour(_: HostInfo | None) -> Flavour:
        return libvirt.flavour  # known better once it is connected

    if settings.hypervisor.startswith("qemu:") and settings.isolated:
        directory = settings.service_dir("domains") / NAMESPACES
        return WithNamespaces(libvirt, directory), flavour
    return libvirt, flavour


def _keys(settings: Settings) -> GuestKeys:
    if qubesdb is not None and settings.hypervisor.startswith("xen:"):
        return QubesDbKeys(qubesdb.QubesDB)
    return FileKeys(settings.service_dir("domains") / KEYS)


async def build(context: ServiceContext) -> object:
    """The handlers of Domains, listening to the hypervisor and telling the registry."""
    settings = context.settings
    guard = EpochGuard("domains", DomainsError)
    reporter = Reporter(BusRegistryLink(context.channel("registry")), guard.learn, context.log)
    context.counters.update(reporter.counters)
    reporter.counters = context.counters
    hypervisor, flavour = _hypervisor(settings)
    keys = _keys(settings)

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
    if _is_simulated(settings):
        return Confinement()
    importlib.import_module(".adapters.libvirt_adapter", __package__)
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
