"""Domain XML for QEMU, with KVM or without: q35 with virtio devices.

Owns what Xen's elements become there: pv and pvh boot a given kernel directly, hvm
boots firmware unless a kernel is given; xvdX becomes vdX with the volume's name as
serial; an interface is a tap made before. Must not know libvirt. Invariant: nothing of
the host is opened that the spec does not name.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

from services.domains.core.reasons import DomainsError
from services.domains.core.spec import DiskSpec, DomainSpec, InterfaceSpec

from .common import Flavour, child, head, hostdev_address, lifecycle


def domain(spec: DomainSpec, flavour: Flavour, started: str) -> ET.Element:
    """The whole domain element. DomainsError when the spec needs what only Xen has."""
    if spec.virt_mode != "hvm" and not spec.kernel:
        raise DomainsError(
            "INVALID_DOMAIN_SPEC",
            f"{spec.name} has no kernel: without Xen a {spec.virt_mode} qube boots only a kernel "
            "of the host; set its kernel, or virt_mode to hvm.",
            qube=spec.name,
        )
    root = head(spec, flavour.hypervisor, started)
    _memory(root, spec)
    child(root, "vcpu", str(spec.vcpus), placement="static")
    if flavour.hypervisor == "kvm":
        _cpu(root, spec)
    _os(root, spec)
    features = child(root, "features")
    child(features, "acpi")
    child(features, "apic")
    _clock(root, spec)
    lifecycle(root)
    devices = child(root, "devices")
    for row in spec.disks:
        devices.append(disk(row, flavour))
    child(devices, "controller", type="usb", model="none")
    for nic in spec.interfaces:
        devices.append(interface(nic))
    for hostdev in spec.hostdevs:
        element = child(devices, "hostdev", mode="subsystem", type="pci", managed="yes")
        hostdev_address(child(element, "source"), hostdev)
    _console(devices, spec)
    if spec.virt_mode == "hvm":
        if spec.audio_model:
            child(devices, "sound", model=spec.audio_model)
        child(child(devices, "video"), "model", type=spec.video_model or "vga")
    rng = child(devices, "rng", model="virtio")
    child(rng, "backend", "/dev/urandom", model="random")
    _balloon(devices, spec)
    if flavour.no_dac:
        # Owners and groups of images are storage's; libvirt shall not change them.
        child(root, "seclabel", type="none", model="dac")
    return root


def _memory(root: ET.Element, spec: DomainSpec) -> None:
    balanced = spec.maxmem_mib > spec.memory_mib and not spec.has_pci
    limit = spec.maxmem_mib if balanced else spec.memory_mib
    child(root, "memory", str(limit), unit="MiB")
    child(root, "currentMemory", str(spec.memory_mib), unit="MiB")


def _balloon(devices: ET.Element, spec: DomainSpec) -> None:
    """A balloon only where memory is balanced: assigned devices pin it."""
    if spec.maxmem_mib and not spec.has_pci:
        balloon = child(devices, "memballoon", model="virtio", freePageReporting="on")
        child(balloon, "stats", period="5")
    else:
        child(devices, "memballoon", model="none")


def _cpu(root: ET.Element, spec: DomainSpec) -> None:
    cpu = child(root, "cpu", mode="host-passthrough")
    child(cpu, "feature", name="vmx", policy="disable")
    child(cpu, "feature", name="svm", policy="disable")
    if spec.rdrand_disable:
        child(cpu, "feature", name="rdrand", policy="disable")


def _os(root: ET.Element, spec: DomainSpec) -> None:
    system = child(root, "os")
    if spec.virt_mode == "hvm" and spec.uefi:
        system.set("firmware", "efi")
    child(system, "type", "hvm", arch="x86_64", machine="q35")
    if spec.kernel:
        child(system, "kernel", spec.kernel)
        if spec.initramfs:
            child(system, "initrd", spec.initramfs)
        child(system, "cmdline", spec.cmdline)
    else:
        child(system, "boot", dev="cdrom")
        child(system, "boot", dev="hd")


def _clock(root: ET.Element, spec: DomainSpec) -> None:
    if spec.virt_mode != "hvm" or not spec.timezone:
        child(root, "clock", offset="utc")
    elif spec.timezone == "localtime":
        child(root, "clock", offset="localtime")
    else:
        child(root, "clock", offset="variable", adjustment=spec.timezone, basis="utc")


def target(row: DiskSpec) -> tuple[str, str]:
    """(device, bus) in the guest: xvda -> vda on virtio, a CD-ROM -> sda on SATA."""
    letters = row.target.removeprefix("xvd")
    return (f"sd{letters}", "sata") if row.devtype == "cdrom" else (f"vd{letters}", "virtio")


def disk(row: DiskSpec, flavour: Flavour) -> ET.Element:  # noqa: ARG001
    """One disk. DomainsError for one that another qube offers: that needs Xen."""
    if row.backend:
        raise DomainsError(
            "HYPERVISOR_UNSUPPORTED",
            f"The disk {row.path} is offered by {row.backend}: only Xen attaches disks of "
            "another qube.",
            backend=row.backend,
        )
    element = ET.Element("disk", {"type": "block" if row.block else "file", "device": row.devtype})
    child(element, "driver", name="qemu", type=row.format, cache="none", discard="unmap")
    child(element, "source", **{"dev" if row.block else "file": row.path})
    device, bus = target(row)
    child(element, "target", dev=device, bus=bus)
    if not row.rw:
        child(element, "readonly")
    if row.serial:
        child(element, "serial", row.serial)
    return element


def interface(nic: InterfaceSpec) -> ET.Element:
    """One interface on a tap that exists already. DomainsError without a tap."""
    if not nic.tap:
        raise DomainsError(
            "NETWORK_UNAVAILABLE",
            f"The interface {nic.mac} has no tap: without Xen one is made before the guest.",
            mac=nic.mac,
        )
    element = ET.Element("interface", {"type": "ethernet"})
    child(element, "mac", address=nic.mac)
    child(element, "target", dev=nic.tap, managed="no")
    child(element, "model", type="virtio")
    child(element, "driver", name="qemu")
    child(element, "rom", enabled="no")
    return element


def _console(devices: ET.Element, spec: DomainSpec) -> None:
    if spec.console_log:
        serial = child(devices, "serial", type="file")
        child(serial, "source", path=spec.console_log, append="off")
    else:
        serial = child(devices, "serial", type="pty")
    child(serial, "target", type="isa-serial", port="0")
