"""Domain XML from a DomainSpec, one module per hypervisor.

Owns the choice of builder. Must not know libvirt or files. Invariant: every element is
made by the XML library from checked values; no text is put together by formatting.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

from services.domains.core.reasons import DomainsError
from services.domains.core.spec import DiskSpec, DomainSpec, InterfaceSpec

from . import qemu, xen
from .common import METADATA_NS, Flavour, read_metadata

__all__ = [
    "METADATA_NS",
    "Flavour",
    "disk_fragment",
    "flavour_named",
    "grows",
    "interface_fragment",
    "read_metadata",
    "render",
]

_FLAVOURS = {
    "xen": Flavour("xen"),
    "xen-qubes": Flavour("xen", qubes=True),
    "kvm": Flavour("kvm"),
    "qemu": Flavour("qemu"),
    "sim": Flavour("xen", qubes=True),
}


def flavour_named(name: str) -> Flavour:
    """The flavour "xen", "xen-qubes", "kvm", "qemu" or "sim" (as Xen with Qubes' libvirt)."""
    if name not in _FLAVOURS:
        raise DomainsError(
            "INVALID_DOMAIN_SPEC",
            f"There is no hypervisor {ascii(name)[:40]}; there are {', '.join(_FLAVOURS)}.",
        )
    return _FLAVOURS[name]


def _text(element: ET.Element) -> str:
    ET.indent(element)
    return ET.tostring(element, encoding="unicode") + "\n"


def render(spec: DomainSpec, flavour: Flavour, started: str = "") -> str:
    """The whole domain. started: epoch seconds as text for our metadata, "" = left out."""
    builder = xen if flavour.hypervisor == "xen" else qemu
    return _text(builder.domain(spec, flavour, started))


def grows(spec: DomainSpec, flavour: Flavour) -> bool:
    """The domain is made such that memory can be added to it."""
    return flavour.hypervisor == "xen" and xen.grows(spec, flavour)


def disk_fragment(disk: DiskSpec, flavour: Flavour) -> str:
    """One disk, for hot-plug."""
    builder = xen if flavour.hypervisor == "xen" else qemu
    return _text(builder.disk(disk, flavour))


def interface_fragment(interface: InterfaceSpec, flavour: Flavour) -> str:
    """One interface, for hot-plug."""
    builder = xen if flavour.hypervisor == "xen" else qemu
    return _text(builder.interface(interface))
