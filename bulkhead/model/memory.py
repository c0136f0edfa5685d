"""Memory at start: how much a qube needs and whether it can grow by hotplug.

Owns the formulas. Must not know the host's free memory. Invariant: whole bytes, the
same for the same view.
"""

from __future__ import annotations

from bulkhead.model.evaluate import evaluate, feature, truthy
from bulkhead.model.properties import QUBES_VM
from bulkhead.model.records import Qube
from bulkhead.model.view import View

MIB = 1024 * 1024
# A number of MiB or of processors counts as this at most, however large the property is: all
# that is made of them fits 64 bits of bytes, and no host has so much.
MOST = 2**40
_FIXED = 4 * MIB
_PER_VCPU = 3 * MIB // 2
_HOTPLUG_PER_MIB = 8192
_LINUX_STUBDOM = 128  # MiB
_MINIOS_STUBDOM = 28
_VIDEO = 16
_OWN_KERNELS = {"pvh": "pvgrub2-pvh", "pv": "pvgrub2"}


def _integer(view: View, qube: Qube, name: str) -> int:
    value = evaluate(view, qube, name)
    return min(value, MOST) if isinstance(value, int) else 0


def _mode(view: View, qube: Qube) -> str:
    return str(evaluate(view, qube, "virt_mode"))


def boots_own_kernel(view: View, qube: Qube) -> bool:
    """True when the kernel comes from inside the qube."""
    kernel = evaluate(view, qube, "kernel") or ""
    return kernel == "" or kernel == _OWN_KERNELS.get(_mode(view, qube))


def hotplug_usable(view: View, qube: Qube) -> bool:
    """True when the qube's memory can grow while it runs."""
    host = view.host
    if qube.klass not in QUBES_VM or (host is not None and host.hypervisor not in ("xen", "sim")):
        return False
    decided = feature(view, qube, "memory-hotplug", "template")
    if decided is not None:
        return bool(decided)
    if _mode(view, qube) == "hvm":
        return False
    if boots_own_kernel(view, qube):
        return truthy(view, qube, "supported-feature.memory-hotplug", "template")
    kernel = view.kernel(str(evaluate(view, qube, "kernel")))
    return kernel is not None and kernel.memory_hotplug


def stubdom_bytes(view: View, qube: Qube) -> int:
    """Memory of the device-model stub domain; 0 without one."""
    if _mode(view, qube) != "hvm":
        return 0
    base = _integer(view, qube, "stubdom_mem")
    if not base:
        linux = truthy(view, qube, "linux-stubdom", "template", default=True)
        base = _LINUX_STUBDOM if linux else _MINIOS_STUBDOM
    return (base + _VIDEO) * MIB


def bytes_needed(view: View, qube: Qube) -> int:
    """Memory to reserve for a start, in bytes."""
    memory = _integer(view, qube, "memory")
    needed = memory * MIB + stubdom_bytes(view, qube)
    needed += _FIXED + _integer(view, qube, "vcpus") * _PER_VCPU
    if _mode(view, qube) != "pv":
        needed += (_integer(view, qube, "maxmem") or memory) * _HOTPLUG_PER_MIB
    return needed
