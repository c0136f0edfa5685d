"""Which hypervisor this machine has, when nobody said.

Owns the choice and the sentence that explains it. Must not start anything.
Invariant: an explicit choice is never overridden.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

URIS = ("xen:///system", "qemu:///system", "qemu:///session", "sim:")
SYSTEM_SOCKETS = (Path("/run/libvirt/libvirt-sock"), Path("/var/run/libvirt/libvirt-sock"))


@dataclass(frozen=True, slots=True)
class Choice:
    """A libvirt URI (or "sim:"), why it was taken, and whether libvirtd must be ours."""

    uri: str
    why: str
    own_libvirtd: bool = False


class HypervisorError(ValueError):
    """The URI is not one that Bulkhead drives."""


def choose(given: str | None, *, uid: int) -> Choice:
    """The hypervisor to use: the given URI, or the best that this machine shows.

    Raises HypervisorError for a URI of an unknown kind.
    """
    if given is not None:
        base = given.split("?", 1)[0]
        if base not in URIS and not base.startswith(("qemu+unix://", "xen+unix://", "test://")):
            raise HypervisorError(f"--hypervisor {given} is not one of {', '.join(URIS)}")
        own = base in ("qemu:///system", "qemu:///session") and "?" not in given
        return Choice(given, "given on the command line", own and not _libvirtd_answers(base))
    capabilities = Path("/proc/xen/capabilities")
    if capabilities.exists() and "control_d" in capabilities.read_text(errors="replace"):
        return Choice("xen:///system", "this machine is the control domain of a Xen host")
    has_qemu = shutil.which("qemu-system-x86_64") is not None
    has_libvirtd = shutil.which("libvirtd", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if uid == 0 and _libvirtd_answers("qemu:///system"):
        return Choice("qemu:///system", "libvirtd runs on this machine")
    if has_qemu and has_libvirtd:
        uri = "qemu:///system" if uid == 0 else "qemu:///session"
        return Choice(uri, "QEMU and libvirtd are installed; a private libvirtd is started", True)
    return Choice("sim:", "neither Xen nor QEMU with libvirtd is here: qubes are simulated")


def _libvirtd_answers(uri: str) -> bool:
    if uri != "qemu:///system":
        return False
    return any(path.exists() for path in SYSTEM_SOCKETS)
