"""python -m services.hostd --root DIR: wires hostd.

Owns what is built from what. Invariant: it listens on the bus only, and what it starts
is `ip`, `setpriv` and the enforce worker.
"""

from __future__ import annotations

import os
from pathlib import Path

from bulkhead.bus.confine import Confinement
from bulkhead.bus.runtime import ServiceContext, serve
from bulkhead.config import Settings
from services.hostd import failpoint_table  # noqa: F401  (declares the rows)
from services.hostd.adapters.autostart import Autostart
from services.hostd.adapters.pci import KVM_STUB, XEN_STUB, PciBinding
from services.hostd.adapters.plumbing import Plumbing
from services.hostd.adapters.workers import Workers
from services.hostd.core.verbs import Names
from services.hostd.handlers import HostdHandlers

# Capabilities of its verbs: links and namespaces, users of workers and sockets.
_CAPABILITIES = (
    "net_admin",
    "sys_admin",
    "setuid",
    "setgid",
    "setpcap",
    "chown",
    "fowner",
    "dac_override",
    "kill",
)
_CALLS = ("setns", "unshare", "mount", "umount2")


def _owner(settings: Settings) -> int:
    """QEMU's user, who opens the taps; root where none is named."""
    return settings.qemu_uid or 0


async def build(context: ServiceContext) -> HostdHandlers:
    """hostd's handlers."""
    settings = context.settings
    names = Names.of_root(str(settings.root))
    firewall_uid = settings.users.get("firewall", os.geteuid())
    workers = Workers(settings.service_dir("hostd"), firewall_uid, context.log)
    stub = XEN_STUB if settings.hypervisor.startswith("xen:") else KVM_STUB
    context.on_stop(workers.close)
    return HostdHandlers(
        names,
        Plumbing(names),
        workers,
        Autostart(settings.root),
        PciBinding(stub),
        default_owner=_owner(settings),
    )


def confinement(settings: Settings) -> Confinement:
    """Root with the capabilities of its verbs; files are left to permissions because
    `ip netns` mounts, which Landlock forbids altogether."""
    del settings
    return Confinement(
        keep_caps=_CAPABILITIES,
        netlink=True,
        execute=(Path("/usr"), Path("/bin"), Path("/sbin")),
        keep_calls=_CALLS,
        landlock=False,
    )


def main() -> None:
    """Run until SIGTERM."""
    serve("hostd", build, ["Hostd"], confinement=confinement)


if __name__ == "__main__":
    main()
