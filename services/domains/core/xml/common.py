"""What domain XML of every hypervisor shares: flavour, metadata, small elements.

Owns our metadata element, in which a domain carries its boot id and epoch. Must not
know which hypervisor. Invariant: read_metadata() of what metadata() made gives the same.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass

from services.domains.core.spec import DomainSpec, HostdevSpec

METADATA_NS = "urn:bulkhead:domain:1"


@dataclass(frozen=True, slots=True)
class Flavour:
    """For whom XML is made.

    hypervisor "xen", "kvm" or "qemu". qubes: the libvirt of Qubes with its extensions,
    otherwise only what stock libvirt's schema has. no_dac: a libvirtd that runs as root
    shall not change owners of images. emulator: Xen's device model path for stock HVM.
    """

    hypervisor: str
    qubes: bool = False
    no_dac: bool = False
    emulator: str = "/usr/libexec/xen-qemu-system-i386"


def child(parent: ET.Element, tag: str, text: str = "", **attributes: str) -> ET.Element:
    """A new last child; attribute names with a trailing "_" lose it."""
    element = ET.SubElement(
        parent, tag, {name.rstrip("_"): value for name, value in attributes.items()}
    )
    if text:
        element.text = text
    return element


def head(spec: DomainSpec, kind: str, started: str) -> ET.Element:
    """domain with name, uuid and our metadata."""
    domain = ET.Element("domain", {"type": kind})
    child(domain, "name", spec.name)
    child(domain, "uuid", spec.uuid)
    metadata = child(domain, "metadata")
    attributes = {"xmlns:bh": METADATA_NS, "boot": spec.boot_id, "epoch": str(spec.epoch)}
    if started:
        attributes["started"] = started
    ET.SubElement(metadata, "bh:qube", attributes)
    return domain


def read_metadata(untrusted_xml: str) -> tuple[str, int, float | None]:
    """(boot id, epoch, start time) of our element's text; ("", 0, None) when it is not ours.

    libvirt gives the element back with or without its prefix.
    """
    try:
        element = ET.fromstring(untrusted_xml)
        if element.tag.rpartition("}")[2] != "qube":
            return "", 0, None
        started = element.get("started", "")
        return (
            element.get("boot", ""),
            int(element.get("epoch", "0")),
            float(started) if started else None,
        )
    except (ET.ParseError, ValueError):
        return "", 0, None


def lifecycle(domain: ET.Element) -> None:
    """Whatever a guest does to itself, it ends."""
    for event in ("on_poweroff", "on_reboot", "on_crash"):
        child(domain, event, "destroy")


def hostdev_address(source: ET.Element, hostdev: HostdevSpec) -> None:
    """The PCI address in hex, as libvirt writes it."""
    child(
        source,
        "address",
        domain=f"0x{hostdev.domain:04x}",
        bus=f"0x{hostdev.bus:02x}",
        slot=f"0x{hostdev.slot:02x}",
        function=f"0x{hostdev.function:x}",
    )
