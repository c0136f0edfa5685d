"""What one qube's domain is to be, as frozen values, and the check in front of it.

Owns the DomainSpec that XML is built from. Must not know the bus or any hypervisor
library. Invariant: after check() every text can stand in XML, every path is absolute,
every number is in range, so builders need no further tests.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field, fields, is_dataclass

from .reasons import DomainsError

NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_.-]{0,62}")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
BOOT_ID = re.compile(r"[0-9a-zA-Z-]{1,64}")
TARGET = re.compile(r"xvd[a-z]{1,2}")
MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
TAP = re.compile(r"[a-zA-Z][a-zA-Z0-9_.-]{0,14}")
SERIAL = re.compile(r"[a-zA-Z0-9_.+-]{0,20}")
MODEL = re.compile(r"[a-z0-9-]{1,32}")
TIMEZONE = re.compile(r"localtime|-?[0-9]{1,9}")

VIRT_MODES = ("pv", "pvh", "hvm")
MIB_LIMIT = 16 * 1024 * 1024
DISK_LIMIT = 64
DEVICE_LIMIT = 32


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """One disk; target is the Xen name (xvda), path is absolute."""

    target: str
    path: str
    rw: bool = False
    devtype: str = "disk"
    format: str = "raw"
    block: bool = False
    backend: str = ""
    backend_uuid: str = ""
    script: bool = False
    serial: str = ""


@dataclass(frozen=True, slots=True)
class InterfaceSpec:
    """One network interface; ip is the real address. tap: KVM's premade tap."""

    mac: str
    ip: str = ""
    ip6: str = ""
    backend: str = ""
    backend_uuid: str = ""
    tap: str = ""
    gateway: str = ""
    netmask: str = ""
    dns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HostdevSpec:
    """One PCI function of the host."""

    domain: int = 0
    bus: int = 0
    slot: int = 0
    function: int = 0
    permissive: bool = False
    no_strict_reset: bool = False
    power_management_filtering_off: bool = False


@dataclass(frozen=True, slots=True)
class EmulatorSpec:
    """The HVM device model; memory_mib 0 = the toolstack's default."""

    linux_stubdom: bool = True
    full_image: bool = False
    memory_mib: int = 0
    audiovm_xid: int = -1
    extra_args: str = ""
    debug: bool = False


@dataclass(frozen=True, slots=True)
class DomainSpec:
    """One boot of one qube. Sizes in MiB; maxmem_mib 0 = no balancing."""

    uuid: str
    name: str
    boot_id: str
    epoch: int = 0
    virt_mode: str = "pvh"
    memory_mib: int = 0
    maxmem_mib: int = 0
    hotplug: bool = False
    vcpus: int = 1
    kernel: str = ""
    initramfs: str = ""
    cmdline: str = ""
    has_pci: bool = False
    e820_host: bool = False
    rdrand_disable: bool = False
    uefi: bool = False
    timezone: str = ""
    audio_model: str = ""
    video_model: str = ""
    gui_domain: str = ""
    debug: bool = False
    disks: tuple[DiskSpec, ...] = ()
    interfaces: tuple[InterfaceSpec, ...] = ()
    hostdevs: tuple[HostdevSpec, ...] = ()
    emulator: EmulatorSpec = field(default_factory=EmulatorSpec)
    console_log: str = ""
    qid: int = 0
    network_namespace: bool = False


def _refuse(what: str, untrusted_value: object, why: str) -> DomainsError:
    shown = ascii(untrusted_value)[:200]
    return DomainsError(
        "INVALID_DOMAIN_SPEC",
        f"The domain's {what} {shown} is not usable: {why}.",
        field=what,
        value=shown,
    )


def _match(what: str, untrusted_value: str, pattern: re.Pattern[str], why: str) -> None:
    if pattern.fullmatch(untrusted_value) is None:
        raise _refuse(what, untrusted_value, why)


def _path(what: str, untrusted_value: str) -> None:
    if not untrusted_value.startswith("/") or "/../" in f"{untrusted_value}/":
        raise _refuse(what, untrusted_value, "it must be an absolute path without '..'")


def _address(what: str, untrusted_value: str, version: int) -> None:
    try:
        address = ipaddress.ip_address(untrusted_value)
    except ValueError:
        raise _refuse(what, untrusted_value, f"it is no IPv{version} address") from None
    if address.version != version or "%" in untrusted_value:
        raise _refuse(what, untrusted_value, f"it is no IPv{version} address")


def _number(what: str, untrusted_value: int, low: int, high: int) -> None:
    if not low <= untrusted_value <= high:
        raise _refuse(what, untrusted_value, f"it must be between {low} and {high}")


def _printable(what: str, untrusted_value: object) -> None:
    """Every text below the value can stand in XML 1.0 and holds no control character."""
    if isinstance(untrusted_value, str):
        if not untrusted_value.isprintable():
            raise _refuse(what, untrusted_value, "it holds control characters")
        if len(untrusted_value) > 4096:
            raise _refuse(what, untrusted_value, "it is longer than 4096 characters")
    elif isinstance(untrusted_value, tuple):
        for part in untrusted_value:
            _printable(what, part)
    elif is_dataclass(untrusted_value):
        for row in fields(untrusted_value):
            _printable(
                f"{what}.{row.name}" if what else row.name, getattr(untrusted_value, row.name)
            )


def check_uuid(untrusted_uuid: str) -> str:
    """The uuid itself. DomainsError INVALID_DOMAIN_SPEC when it is none."""
    _match("uuid", untrusted_uuid, UUID, "it is no lower-case uuid")
    return untrusted_uuid


def check_boot_id(untrusted_boot_id: str) -> str:
    """The boot id itself. DomainsError INVALID_DOMAIN_SPEC when it is none."""
    _match("boot_id", untrusted_boot_id, BOOT_ID, "it must be letters, digits and '-'")
    return untrusted_boot_id


def check_target(untrusted_target: str) -> str:
    """A disk's target name itself. DomainsError INVALID_DOMAIN_SPEC when it is none."""
    _match("disk.target", untrusted_target, TARGET, "it must be xvda to xvdzz")
    return untrusted_target


def check_disk(untrusted_disk: DiskSpec) -> DiskSpec:
    """The disk itself, checked. DomainsError INVALID_DOMAIN_SPEC otherwise."""
    disk = untrusted_disk
    _printable("disk", disk)
    check_target(disk.target)
    _path("disk.path", disk.path)
    if disk.devtype not in ("disk", "cdrom"):
        raise _refuse("disk.devtype", disk.devtype, "it must be disk or cdrom")
    if disk.format not in ("raw", "qcow2"):
        raise _refuse("disk.format", disk.format, "it must be raw or qcow2")
    _match("disk.serial", disk.serial, SERIAL, "at most 20 letters, digits, '_', '.', '+', '-'")
    if disk.backend:
        _match("disk.backend", disk.backend, NAME, "it is no qube name")
    if disk.backend_uuid:
        _match("disk.backend_uuid", disk.backend_uuid, UUID, "it is no uuid")
    return disk


def check_backend(untrusted_backend: str) -> str:
    """A backend's name itself, "" = any. DomainsError INVALID_DOMAIN_SPEC when it is none."""
    if untrusted_backend:
        _match("interface.backend", untrusted_backend, NAME, "it is no qube name")
    return untrusted_backend


def check_interface(untrusted_interface: InterfaceSpec) -> InterfaceSpec:
    """The interface itself, checked. DomainsError INVALID_DOMAIN_SPEC otherwise."""
    interface = untrusted_interface
    _printable("interface", interface)
    _match("interface.mac", interface.mac, MAC, "it is no MAC address")
    if interface.ip:
        _address("interface.ip", interface.ip, 4)
    if interface.ip6:
        _address("interface.ip6", interface.ip6, 6)
    if interface.backend:
        _match("interface.backend", interface.backend, NAME, "it is no qube name")
    if interface.backend_uuid:
        _match("interface.backend_uuid", interface.backend_uuid, UUID, "it is no uuid")
    if interface.tap:
        _match("interface.tap", interface.tap, TAP, "it is no interface name")
    for what, value in (("gateway", interface.gateway), ("netmask", interface.netmask)):
        if value:
            _address(f"interface.{what}", value, 4)
    if len(interface.dns) > 8:
        raise _refuse("interface.dns", interface.dns, "there are more than 8 servers")
    for server in interface.dns:
        _address("interface.dns", server, 4)
    return interface


def check_hostdev(untrusted_hostdev: HostdevSpec) -> HostdevSpec:
    """The PCI function itself, checked. DomainsError INVALID_DOMAIN_SPEC otherwise."""
    _number("hostdev.domain", untrusted_hostdev.domain, 0, 0xFFFF)
    _number("hostdev.bus", untrusted_hostdev.bus, 0, 0xFF)
    _number("hostdev.slot", untrusted_hostdev.slot, 0, 0x1F)
    _number("hostdev.function", untrusted_hostdev.function, 0, 7)
    return untrusted_hostdev


def check(untrusted_spec: DomainSpec) -> DomainSpec:
    """The spec itself, checked whole. DomainsError INVALID_DOMAIN_SPEC otherwise."""
    spec = untrusted_spec
    _printable("", spec)
    check_uuid(spec.uuid)
    check_boot_id(spec.boot_id)
    _match("name", spec.name, NAME, "it is no qube name")
    if spec.virt_mode not in VIRT_MODES:
        raise _refuse("virt_mode", spec.virt_mode, "it must be pv, pvh or hvm")
    _number("memory_mib", spec.memory_mib, 1, MIB_LIMIT)
    _number("maxmem_mib", spec.maxmem_mib, 0, MIB_LIMIT)
    _number("vcpus", spec.vcpus, 1, 4096)
    _number("epoch", spec.epoch, 0, 2**64 - 1)
    for what, path in (
        ("kernel", spec.kernel),
        ("initramfs", spec.initramfs),
        ("console_log", spec.console_log),
    ):
        if path:
            _path(what, path)
    if spec.timezone:
        _match("timezone", spec.timezone, TIMEZONE, "it must be 'localtime' or an integer")
    for what, model in (("audio_model", spec.audio_model), ("video_model", spec.video_model)):
        if model:
            _match(what, model, MODEL, "it is no device model")
    if spec.gui_domain:
        _match("gui_domain", spec.gui_domain, NAME, "it is no qube name")
    _number("emulator.memory_mib", spec.emulator.memory_mib, 0, MIB_LIMIT)
    _number("emulator.audiovm_xid", spec.emulator.audiovm_xid, -1, 2**31)
    if len(spec.disks) > DISK_LIMIT:
        raise _refuse("disks", len(spec.disks), f"there may be at most {DISK_LIMIT}")
    for what, count in (("interfaces", len(spec.interfaces)), ("hostdevs", len(spec.hostdevs))):
        if count > DEVICE_LIMIT:
            raise _refuse(what, count, f"there may be at most {DEVICE_LIMIT}")
    for disk in spec.disks:
        check_disk(disk)
    targets = [disk.target for disk in spec.disks]
    if len(set(targets)) != len(targets):
        raise _refuse("disks", targets, "a target is used twice")
    for interface in spec.interfaces:
        check_interface(interface)
    for hostdev in spec.hostdevs:
        check_hostdev(hostdev)
    return spec
