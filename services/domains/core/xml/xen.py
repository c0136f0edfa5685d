"""Domain XML for Xen: PV, PVH and HVM, for stock libvirt and for that of Qubes.

Owns the element table for Xen. Must not know libvirt. Invariant: with flavour.qubes
False only elements of stock libvirt's schema are made.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace

from services.domains.core.spec import DiskSpec, DomainSpec, HostdevSpec, InterfaceSpec

from .common import Flavour, child, head, hostdev_address, lifecycle

KERNELS = "/var/lib/qubes/vm-kernels"
# What boots a guest's own kernel where none of dom0's is given.
PVGRUB = {"pvh": f"{KERNELS}/pvgrub2-pvh/vmlinuz", "pv": f"{KERNELS}/pvgrub2/vmlinuz"}
OVMF = "/usr/share/edk2/xen/OVMF.fd"
BLOCK_SCRIPT = "/etc/xen/scripts/qubes-block"
VIF_SCRIPT = "vif-route-qubes"
STUBDOM_FULL = "/usr/libexec/xen/boot/qemu-stubdom-linux-full-"
NETMASK = "255.255.255.255"


def domain(spec: DomainSpec, flavour: Flavour, started: str) -> ET.Element:
    """The whole domain element."""
    root = head(spec, "xen", started)
    _memory(root, spec, flavour)
    child(root, "vcpu", str(spec.vcpus), placement="static")
    if spec.virt_mode != "pv":
        _cpu(root, spec)
    _os(root, spec, flavour)
    _features(root, spec)
    _clock(root, spec)
    lifecycle(root)
    devices = child(root, "devices")
    if spec.virt_mode == "hvm":
        _emulator(devices, spec, flavour)
    for row in spec.disks:
        devices.append(disk(_from_file(row, spec, flavour), flavour))
    for nic in spec.interfaces:
        devices.append(interface(nic))
    for hostdev in spec.hostdevs:
        _hostdev(devices, hostdev, flavour)
    if spec.virt_mode == "hvm":
        _hvm_devices(devices, spec, flavour)
    console = child(devices, "console", type="pty")
    child(console, "target", type="xen", port="0")
    return root


def grows(spec: DomainSpec, flavour: Flavour) -> bool:
    """Memory is added by hotplug: stock libvirt refuses that for Xen, the balloon has to do."""
    return spec.hotplug and flavour.qubes


def _memory(root: ET.Element, spec: DomainSpec, flavour: Flavour) -> None:
    fixed = spec.maxmem_mib == 0 or (spec.virt_mode == "hvm" and spec.has_pci)
    hotplug = grows(spec, flavour)
    limit = spec.memory_mib if fixed or hotplug else spec.maxmem_mib
    if hotplug and not fixed:
        child(root, "maxMemory", str(spec.maxmem_mib), slots="1", unit="MiB")
    child(root, "memory", str(limit), unit="MiB")
    child(root, "currentMemory", str(spec.memory_mib), unit="MiB")


def _cpu(root: ET.Element, spec: DomainSpec) -> None:
    cpu = child(root, "cpu", mode="host-passthrough")
    # No nested virtualisation; a steady counter; where the host's RDRAND lies, none.
    child(cpu, "feature", name="vmx", policy="disable")
    child(cpu, "feature", name="svm", policy="disable")
    child(cpu, "feature", name="invtsc", policy="require")
    if spec.rdrand_disable:
        child(cpu, "feature", name="rdrand", policy="disable")


def _os(root: ET.Element, spec: DomainSpec, flavour: Flavour) -> None:
    system = child(root, "os")
    if spec.virt_mode == "hvm":
        child(system, "type", "hvm", arch="x86_64", machine="xenfv")
        if spec.uefi:
            child(
                system,
                "loader",
                OVMF,
                type="pflash",
                **({} if flavour.qubes else {"readonly": "yes"}),
            )
        elif flavour.qubes:
            child(system, "loader", "hvmloader", type="rom")
        if spec.kernel and not flavour.qubes:
            # Without the stubdomain nobody takes the kernel from the xvdd disk.
            child(system, "kernel", spec.kernel)
            if spec.initramfs:
                child(system, "initrd", spec.initramfs)
        else:
            child(system, "boot", dev="cdrom")
            child(system, "boot", dev="hd")
        _cmdline(system, spec)
        return
    if spec.virt_mode == "pvh":
        child(system, "type", "xenpvh", arch="x86_64", machine="xenpvh")
    else:
        child(system, "type", "linux", arch="x86_64", machine="xenpv")
    child(system, "kernel", spec.kernel or PVGRUB[spec.virt_mode])
    if spec.kernel and spec.initramfs:
        child(system, "initrd", spec.initramfs)
    _cmdline(system, spec)


def _cmdline(system: ET.Element, spec: DomainSpec) -> None:
    # A loader of the guest's own kernel is a kernel without options.
    if spec.kernel and spec.cmdline:
        child(system, "cmdline", spec.cmdline)


def _features(root: ET.Element, spec: DomainSpec) -> None:
    if spec.virt_mode == "pv" and not spec.e820_host:
        return
    features = child(root, "features")
    if spec.virt_mode != "pv":
        for name in ("pae", "acpi", "apic", "viridian"):
            child(features, name)
    if spec.e820_host:
        child(child(features, "xen"), "e820_host", state="on")


def _clock(root: ET.Element, spec: DomainSpec) -> None:
    if spec.virt_mode != "hvm":
        clock = child(root, "clock", offset="utc", adjustment="reset")
        child(clock, "timer", name="tsc", mode="native")
        return
    basis = "localtime" if spec.timezone == "localtime" else "utc"
    adjustment = spec.timezone if spec.timezone not in ("", "localtime") else "0"
    child(root, "clock", offset="variable", adjustment=adjustment, basis=basis)


def _from_file(row: DiskSpec, spec: DomainSpec, flavour: Flavour) -> DiskSpec:
    """Without Qubes' script a file comes from a device model in dom0.

    That of QEMU 7.2 opens a file that is read-only for a CD-ROM alone: anything else is
    missing in the guest, and nobody is told. A PV guest sees the same disk either way; Linux
    in PVH leaves CD-ROMs to an emulation that it does not have.
    """
    if flavour.qubes or spec.virt_mode != "pv" or row.block or row.rw or row.backend:
        return row
    return replace(row, devtype="cdrom")


def disk(row: DiskSpec, flavour: Flavour) -> ET.Element:
    """One disk: a block device by phy, a file by its format."""
    element = ET.Element("disk", {"type": "block" if row.block else "file", "device": row.devtype})
    if row.block:
        child(element, "driver", name="phy")
        child(element, "source", dev=row.path)
    else:
        child(element, "driver", name="qemu", type=row.format)
        child(element, "source", file=row.path)
    child(element, "target", dev=row.target, bus="xen")
    if not row.rw:
        child(element, "readonly")
    if row.backend:
        child(element, "backenddomain", name=row.backend)
    if row.script and flavour.qubes:
        child(element, "script", path=BLOCK_SCRIPT)
    return element


def interface(nic: InterfaceSpec) -> ET.Element:
    """One interface, routed by the script in its backend."""
    element = ET.Element("interface", {"type": "ethernet"})
    child(element, "mac", address=nic.mac)
    if nic.ip:
        child(element, "ip", address=nic.ip)
    if nic.ip6:
        child(element, "ip", family="ipv6", address=nic.ip6)
    if nic.backend:
        child(element, "backenddomain", name=nic.backend)
    child(element, "script", path=VIF_SCRIPT)
    return element


def _hostdev(devices: ET.Element, hostdev: HostdevSpec, flavour: Flavour) -> None:
    element = child(devices, "hostdev", type="pci", managed="yes", mode="subsystem")
    if hostdev.no_strict_reset and flavour.qubes:
        element.set("nostrictreset", "yes")
    source = child(element, "source")
    if hostdev.permissive:
        source.set("writeFiltering", "no")
    if hostdev.power_management_filtering_off and flavour.qubes:
        source.set("powerManagementFiltering", "no")
    hostdev_address(source, hostdev)


def _emulator(devices: ET.Element, spec: DomainSpec, flavour: Flavour) -> None:
    if not flavour.qubes:
        child(devices, "emulator", flavour.emulator)
        return
    emulator = spec.emulator
    element = child(devices, "emulator")
    element.set("type", "stubdom-linux" if emulator.linux_stubdom else "stubdom")
    element.set("cmdline", _emulator_arguments(spec))
    if emulator.memory_mib:
        element.set("memory", str(emulator.memory_mib * 1024))
    if emulator.linux_stubdom and emulator.full_image:
        element.set("kernel", f"{STUBDOM_FULL}kernel")
        element.set("ramdisk", f"{STUBDOM_FULL}rootfs")


def _emulator_arguments(spec: DomainSpec) -> str:
    """The device model's arguments; parts are joined as they are."""
    emulator = spec.emulator
    parts = [f"-qubes-audio:audiovm_xid={emulator.audiovm_xid}"]
    if emulator.extra_args:
        parts.append(emulator.extra_args)
    if emulator.debug:
        parts.append("-trace xen_platform_log")
    if spec.interfaces:
        nic = spec.interfaces[0]
        if emulator.linux_stubdom:
            settings = [f"client_ip={nic.ip}"]
            settings += [f"dns_{index}={server}" for index, server in enumerate(nic.dns[:2])]
            settings += [f"gw={nic.gateway}", f"netmask={nic.netmask or NETMASK}"]
            parts.append("-qubes-net:" + ",".join(settings))
        else:
            first = nic.dns[0] if nic.dns else ""
            second = nic.dns[1] if len(nic.dns) > 1 else ""
            parts.append(
                f"-net lwip,client_ip={nic.ip},server_ip={second},dns={first},"
                f"gw={nic.gateway},netmask={nic.netmask or NETMASK}"
            )
    return " ".join(parts)


def _hvm_devices(devices: ET.Element, spec: DomainSpec, flavour: Flavour) -> None:
    child(devices, "input", type="tablet", bus="usb")
    if spec.audio_model:
        child(devices, "sound", model=spec.audio_model)
    model = spec.video_model or "vga"
    if model == "none":
        return
    if flavour.qubes and spec.emulator.linux_stubdom:
        graphics = child(devices, "graphics", type="qubes")
        if spec.gui_domain:
            graphics.set("domain", spec.gui_domain)
        if spec.debug:
            graphics.set("log_level", "2")
    child(child(devices, "video"), "model", type=model)
