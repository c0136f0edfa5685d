"""What one boot of a qube needs, decided from the view: volumes, domain, network.

Owns the translation of a qube's evaluated properties into the specs of storage,
domains, firewall and hostd. Must not talk to any of them. Invariant: a spec carries
one qube's view only, plus what its own netvm shows to its clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bulkhead.model.devices import ANY, is_known, matching
from bulkhead.model.evaluate import (
    evaluate,
    is_running,
    kernel_command_line,
    provides_network,
)
from bulkhead.model.evaluate import is_namespace_netvm as is_namespace_netvm  # steps ask it here
from bulkhead.model.features import feature, netvm_of, truthy
from bulkhead.model.memory import MOST, bytes_needed, hotplug_usable
from bulkhead.model.plan.devices import checked_options
from bulkhead.model.records import Assignment, DeviceFact, KernelFact, Pool, Qube, Run, Volume
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View

# Targets by volume name; further volumes follow from xvde (domain-model 6.4).
FIXED_TARGETS: Mapping[str, str] = {
    "root": "xvda",
    "private": "xvdb",
    "volatile": "xvdc",
    "kernel": "xvdd",
}
_YEAR_S = 365 * 24 * 3600
_VCPUS_MOST = 2**32 - 1  # what the message to the hypervisor's service can carry
EXTRA_TARGETS = tuple(f"xvd{chr(c)}" for c in range(ord("e"), ord("y") + 1))


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """A declared volume with its pool's configuration."""

    declared: Volume
    pool: Pool


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """What storage handed out for one volume."""

    name: str
    path: str
    rw: bool
    devtype: str = "disk"
    format: str = "raw"
    block: bool = False


@dataclass(frozen=True, slots=True)
class Disk:
    """Fields as in domains.proto DiskSpec."""

    target: str
    path: str
    rw: bool
    devtype: str = "disk"
    format: str = "raw"
    block: bool = False
    backend: str = ""
    backend_uuid: str = ""
    script: bool = False
    serial: str = ""


@dataclass(frozen=True, slots=True)
class Interface:
    """Fields as in domains.proto InterfaceSpec."""

    mac: str
    ip: str
    ip6: str
    backend: str
    backend_uuid: str
    tap: str
    gateway: str
    netmask: str
    dns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hostdev:
    """Fields as in domains.proto HostdevSpec."""

    domain: int
    bus: int
    slot: int
    function: int
    permissive: bool
    no_strict_reset: bool
    power_management_filtering_off: bool


@dataclass(frozen=True, slots=True)
class Emulator:
    """Fields as in domains.proto EmulatorSpec."""

    linux_stubdom: bool
    full_image: bool
    memory_mib: int
    audiovm_xid: int
    extra_args: str
    debug: bool


@dataclass(frozen=True, slots=True)
class Domain:
    """Fields as in domains.proto DomainSpec."""

    uuid: str
    name: str
    boot_id: str
    epoch: int
    virt_mode: str
    memory_mib: int
    maxmem_mib: int
    hotplug: bool
    vcpus: int
    kernel: str
    initramfs: str
    cmdline: str
    has_pci: bool
    e820_host: bool
    rdrand_disable: bool
    uefi: bool
    timezone: str
    audio_model: str
    video_model: str
    gui_domain: str
    debug: bool
    disks: tuple[Disk, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    hostdevs: tuple[Hostdev, ...] = ()
    emulator: Emulator | None = None
    console_log: str = ""
    qid: int = 0
    network_namespace: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """A running qube's network: which netvm, through which interface."""

    netvm: Qube
    ip: str
    ip6: str
    mac: str
    gateway: str
    gateway6: str


def pool_of(view: View, volume: Volume) -> Pool:
    """The pool of a declared volume. Refusal POOL_NOT_FOUND when it is gone."""
    pool = view.pools.get(volume.pool)
    if pool is None:
        raise Refusal(
            "POOL_NOT_FOUND",
            f"volume {volume.vid or volume.name} is in pool {volume.pool}, which does not exist",
            volume=volume.name,
            pool=volume.pool,
        )
    return pool


def volume_specs(view: View, qube: Qube) -> tuple[VolumeSpec, ...]:
    """The qube's volumes in order; the kernel volume's vid follows the kernel property."""
    specs = []
    for volume in qube.volumes:
        specs.append(VolumeSpec(live_volume(view, qube, volume), pool_of(view, volume)))
    return tuple(specs)


def live_volume(view: View, qube: Qube, volume: Volume) -> Volume:
    """The volume as storage shall see it now: a kernel volume's vid is the kernel's name."""
    pool = view.pools.get(volume.pool)
    if volume.name != "kernel" or (pool is not None and pool.driver != "linux-kernel"):
        return volume
    return replace(volume, vid=text(evaluate(view, qube, "kernel")))


def source_specs(view: View, qube: Qube) -> tuple[VolumeSpec, ...]:
    """Declared state of the volumes that the qube's snapshot volumes start from."""
    found: dict[tuple[str, str], VolumeSpec] = {}
    for volume in qube.volumes:
        if not volume.snap_on_start or not volume.source:
            continue
        owner = view.vid_owner(volume.pool, volume.source)
        declared = None
        if owner is not None:
            declared = next(
                (v for v in owner.volumes if v.pool == volume.pool and v.vid == volume.source), None
            )
        if declared is None:
            raise Refusal(
                "VOLUME_NOT_FOUND",
                f"volume {volume.name} of {qube.name} starts from {volume.source} in pool "
                f"{volume.pool}, which no qube owns; set the template again",
                qube=qube.name,
                volume=volume.name,
                source=volume.source,
            )
        found[volume.pool, volume.source] = VolumeSpec(declared, pool_of(view, declared))
    return tuple(found.values())


def source_owners(view: View, qube: Qube) -> tuple[str, ...]:
    """uuids of the qubes whose volumes this qube's snapshots come from."""
    owners: dict[str, None] = {}
    for volume in qube.volumes:
        if volume.snap_on_start and volume.source:
            owner = view.vid_owner(volume.pool, volume.source)
            if owner is not None:
                owners[owner.uuid] = None
    return tuple(owners)


def netvm(view: View, qube: Qube) -> Qube | None:
    """The qube's netvm, None without one (also for classes that have no such property).

    A default netvm need not provide a network: there is nothing to be plugged into then.
    """
    if qube.klass in ("AdminVM", "RemoteVM"):
        return None
    found = netvm_of(view, qube)
    return found if found is not None and provides_network(found) else None


def link(view: View, qube: Qube) -> Link | None:
    """Addresses of the qube behind its netvm, None without a netvm."""
    backend = netvm(view, qube)
    if backend is None:
        return None
    return Link(
        netvm=backend,
        ip=text(evaluate(view, qube, "ip")),
        ip6=text(evaluate(view, qube, "ip6")),
        mac=text(evaluate(view, qube, "mac")),
        gateway=text(evaluate(view, backend, "gateway")),
        gateway6=text(evaluate(view, backend, "gateway6")),
    )


def namespaces_in_use(view: View) -> bool:
    """True where qubes are plugged with taps into namespaces: QEMU or KVM."""
    host = view.host
    return host is not None and host.hypervisor in ("kvm", "qemu")


def hotplug(view: View, qube: Qube) -> bool:
    """The qube's memory can grow while it runs, on this hypervisor."""
    host = view.host
    return host is not None and host.hypervisor == "xen" and hotplug_usable(view, qube)


def memory_bytes(view: View, qube: Qube) -> int:
    """Bytes of host memory to reserve for a start (domain-model 5.3)."""
    return bytes_needed(view, qube)


def text(value: object) -> str:
    """Evaluated value as text; None is ""."""
    if value is None:
        return ""
    if isinstance(value, tuple | list):
        return " ".join(str(v) for v in value)
    return str(value)


def number(value: object, default: int = 0, *, most: int = MOST) -> int:
    """Evaluated value as int, never above most; None is the default."""
    return min(value, most) if isinstance(value, int) else default


def seconds(value: object) -> int:
    """A timeout property as seconds to wait: at least 1, at most a year; None is 60."""
    return max(1, number(value, 60, most=_YEAR_S))


def pci_assignments(qube: Qube) -> tuple[Assignment, ...]:
    """Assigned PCI devices, any mode."""
    return tuple(a for a in qube.devices if a.devclass == "pci")


def required(qube: Qube, devclass: str) -> tuple[Assignment, ...]:
    """Required assignments of one class: they are part of the start configuration."""
    return tuple(a for a in qube.devices if a.devclass == devclass and a.mode == "required")


def stub_addresses(view: View, qube: Qube) -> tuple[tuple[str, bool], ...]:
    """Addresses of assigned PCI functions that are kept for guests, each with whether the
    start needs it.

    Whatever the mode, dom0 lets go of what is assigned; what "any port" may mean is only
    taken where it is required, and then just the one that is used.
    """
    found: dict[str, bool] = {}
    for assignment in pci_assignments(qube):
        needed = assignment.mode == "required"
        if not needed and assignment.port == ANY:
            continue
        for fact, _backend in available(view, qube, assignment)[:1]:
            address = fact.data.get("sbdf", "")
            if address:
                found[address] = found.get(address, False) or needed
    return tuple(found.items())


def missing_devices(view: View, qube: Qube) -> tuple[Assignment, ...]:
    """Required assignments that no present device satisfies (start step "devices")."""
    return tuple(
        assignment
        for assignment in qube.devices
        if assignment.mode == "required" and not available(view, qube, assignment)
    )


def available(view: View, qube: Qube, assignment: Assignment) -> list[tuple[DeviceFact, Qube]]:
    """Devices that the qube can start with: known for what they are, and in nobody's hands."""
    return [
        (fact, backend)
        for fact, backend in matching(view, assignment)
        if is_known(fact) and fact.attached_to in ("", qube.uuid)
    ]


def domain(
    view: View,
    qube: Qube,
    *,
    epoch: int,
    devices: Sequence[BlockDevice],
    tap: str = "",
    console_log: str = "",
) -> Domain:
    """The domain of one boot. devices come from storage.Start, in volume order.

    Refusal KERNEL_NOT_INSTALLED when the kernel vanished since it was set.
    """
    kernel_name = text(evaluate(view, qube, "kernel"))
    virt_mode = text(evaluate(view, qube, "virt_mode"))
    kernel = view.kernel(kernel_name) if kernel_name else None
    if kernel_name and (kernel is None or not kernel.has_vmlinuz):
        raise Refusal(
            "KERNEL_NOT_INSTALLED",
            f"kernel {kernel_name} of {qube.name} is not installed; install it or set another one",
            qube=qube.name,
            kernel=kernel_name,
        )
    pci = pci_assignments(qube)
    # Only a whole machine has firmware, a clock of its own, a screen and a sound card.
    template_feature = _template_feature(view, qube) if virt_mode == "hvm" else _no_feature
    maxmem = number(evaluate(view, qube, "maxmem"))
    host = view.host
    return Domain(
        uuid=qube.uuid,
        name=qube.name,
        boot_id=qube.run.boot_id,
        epoch=epoch,
        virt_mode=virt_mode,
        memory_mib=number(evaluate(view, qube, "memory")),
        maxmem_mib=maxmem,
        hotplug=hotplug(view, qube),
        vcpus=number(evaluate(view, qube, "vcpus"), 1, most=_VCPUS_MOST),
        kernel=_vmlinuz(view, virt_mode, kernel),
        initramfs=f"{kernel.directory}/initramfs" if kernel and kernel.has_initramfs else "",
        cmdline=kernel_command_line(view, qube) if kernel_name else "",
        has_pci=bool(pci),
        e820_host=bool(pci) and truthy(view, qube, "pci-e820-host", default=True),
        rdrand_disable=host is not None and host.cpu_family_model in ("6/58", "6/62"),
        uefi=bool(template_feature("uefi", "")),
        timezone=_timezone(template_feature("timezone", "")),
        audio_model=template_feature("audio-model", ""),
        video_model=template_feature("video-model", "vga"),
        gui_domain=_gui_domain(view, qube),
        debug=bool(evaluate(view, qube, "debug")),
        disks=(*_disks(view, qube, devices), *_block_disks(view, qube, kernel_name)),
        interfaces=interfaces(view, qube, tap),
        hostdevs=_hostdevs(view, qube),
        emulator=_emulator(view, qube) if virt_mode == "hvm" else None,
        console_log=console_log,
        qid=qube.qid,
        network_namespace=is_namespace_netvm(view, qube),
    )


class _TemplateFeature:
    """feature-with-template look-up bound to one qube."""

    def __init__(self, view: View, qube: Qube) -> None:
        self._view = view
        self._qube = qube

    def __call__(self, name: str, default: str) -> str:
        value = feature(self._view, self._qube, name, "template")
        return default if value is None else value


def _template_feature(view: View, qube: Qube) -> _TemplateFeature:
    return _TemplateFeature(view, qube)


def _no_feature(_name: str, _default: str) -> str:
    return ""


def _timezone(value: str) -> str:
    """What the clock of a machine can be set to; anything else is UTC, as without it."""
    number = value.removeprefix("-")
    usable = value == "localtime" or (number.isascii() and number.isdigit() and len(number) < 10)
    return value if usable else ""


def _vmlinuz(view: View, virt_mode: str, kernel: KernelFact | None) -> str:
    if kernel is not None:
        return f"{kernel.directory}/vmlinuz"
    # In-VM kernels of pv and pvh start through a grub that is installed like a kernel.
    grub = {"pvh": "pvgrub2-pvh", "pv": "pvgrub2"}.get(virt_mode, "")
    loader = view.kernel(grub) if grub else None
    return f"{loader.directory}/vmlinuz" if loader is not None else ""


def _gui_domain(view: View, qube: Qube) -> str:
    name = text(evaluate(view, qube, "guivm"))
    gui = view.qube(name) if name else None
    if gui is None or gui.klass == "AdminVM":
        return ""
    power = view.power(gui.uuid)
    present = power is not None and power.boot_id == gui.run.boot_id and power.xid >= 0
    return gui.name if present and is_running(view, gui) else ""


def _disks(view: View, qube: Qube, devices: Sequence[BlockDevice]) -> tuple[Disk, ...]:
    extra = iter(EXTRA_TARGETS)
    disks = []
    for device in devices:
        target = FIXED_TARGETS.get(device.name) or next(extra, "")
        if not target:
            raise Refusal(
                "QUBE_ERROR", f"{qube.name} has more volumes than device names", qube=qube.name
            )
        disks.append(
            Disk(
                target=target,
                path=device.path,
                rw=device.rw,
                devtype=device.devtype,
                format=device.format,
                block=device.block,
                script=view.host is not None and view.host.hypervisor == "xen",
                serial=device.name,
            )
        )
    return tuple(disks)


def _block_disks(view: View, qube: Qube, kernel_name: str) -> tuple[Disk, ...]:
    taken = {checked_options(a).get("frontend-dev", "") for a in required(qube, "block")}
    names = (f"xvd{chr(c)}" for c in range(ord("i"), ord("z") + 1))
    free = iter([name for name in names if name not in taken])
    disks: list[Disk] = []
    for assignment in required(qube, "block"):
        options = checked_options(assignment)
        target = options.get("frontend-dev", "")
        if not target:
            is_cdrom = options.get("devtype") == "cdrom"
            drive = is_cdrom and not kernel_name and "xvdd" not in taken
            target = "xvdd" if drive else next(free, "")
            taken.add(target)
        paths = {(disk.backend, disk.path) for disk in disks}
        for fact, backend in available(view, qube, assignment):
            device = replace(assignment, backend=backend.name, port=fact.port, options=options)
            if fact.data.get("mode") == "r":
                device = replace(device, options={**options, "read-only": "yes"})
            disk = block_disk(view, device, target)
            if (disk.backend, disk.path) not in paths:
                disks.append(disk)
                break
        else:
            raise Refusal(
                "DEVICE_UNKNOWN",
                f"block device {assignment.port} of {qube.name} is not there now",
                qube=qube.name,
                device=assignment.port,
            )
    return tuple(disks)


def block_disk(view: View, assignment: Assignment, target: str) -> Disk:
    """The disk that an assigned or attached block device becomes."""
    backend = view.qube(assignment.backend)
    is_host = backend is None or backend.klass == "AdminVM"
    return Disk(
        target=target,
        path="/dev/" + assignment.port.replace("_", "/"),
        rw=assignment.options.get("read-only") != "yes",
        devtype=assignment.options.get("devtype", "disk"),
        block=True,
        backend="" if is_host or backend is None else backend.name,
        backend_uuid="" if is_host or backend is None else backend.uuid,
        script=is_host or _agent_at_least(view, backend, "4.2"),
    )


def _agent_at_least(view: View, backend: Qube | None, version: str) -> bool:
    if backend is None:
        return True
    said = feature(view, backend, "qubes-agent-version", "template") or "4.1"
    try:
        return tuple(map(int, said.split("."))) >= tuple(map(int, version.split(".")))
    except ValueError:
        return False


def interfaces(view: View, qube: Qube, tap: str) -> tuple[Interface, ...]:
    """The qube's interface, none without a netvm; tap only where taps are used."""
    where = link(view, qube)
    if where is None:
        return ()
    return (
        Interface(
            mac=where.mac,
            ip=where.ip,
            ip6=where.ip6,
            backend=where.netvm.name,
            backend_uuid=where.netvm.uuid,
            tap=tap,
            gateway=where.gateway,
            netmask="255.255.255.255",
            dns=tuple(text(evaluate(view, qube, "dns")).split()),
        ),
    )


def _hostdevs(view: View, qube: Qube) -> tuple[Hostdev, ...]:
    filtering_off = truthy(view, view.adminvm, "suspend-s0ix")
    found = []
    for assignment in required(qube, "pci"):
        addresses = (f.data.get("sbdf", "") for f, _backend in available(view, qube, assignment))
        address = next(addresses, "")
        try:
            segment, bus, rest = address.split(":")
            slot, function = rest.split(".")
            found.append(
                Hostdev(
                    domain=int(segment, 16),
                    bus=int(bus, 16),
                    slot=int(slot, 16),
                    function=int(function, 16),
                    permissive=_truthy(assignment.options.get("permissive", "")),
                    no_strict_reset=_truthy(assignment.options.get("no-strict-reset", "")),
                    power_management_filtering_off=filtering_off,
                )
            )
        except ValueError as error:
            raise Refusal(
                "DEVICE_UNKNOWN",
                f"PCI device {assignment.port} of {qube.name} has no address now",
                qube=qube.name,
                device=assignment.port,
            ) from error
    return tuple(found)


def _truthy(option: str) -> bool:
    # 4.4 takes any non-empty text, "False" included, for true; only true words count here.
    return option.strip().lower() in ("1", "yes", "true", "on")


def _emulator(view: View, qube: Qube) -> Emulator:
    look = _template_feature(view, qube)
    audiovm = view.qube(text(evaluate(view, qube, "audiovm")))
    xid = -1
    if audiovm is not None:
        if audiovm.klass == "AdminVM":
            xid = 0
        else:
            power = view.power(audiovm.uuid)
            if power is not None and power.boot_id == audiovm.run.boot_id:
                xid = power.xid
    return Emulator(
        linux_stubdom=look("linux-stubdom", "1") != "",
        full_image=bool(look("audio-model", "") or look("stubdom-qrexec", "")),
        memory_mib=number(evaluate(view, qube, "stubdom_mem")),
        audiovm_xid=xid,
        extra_args=look("qemu-extra-args", "").strip(),
        debug=bool(evaluate(view, qube, "debug")),
    )


def same_boot(qube: Qube | None, run: Run) -> bool:
    """The record still is in the boot that an operation works for."""
    return qube is not None and qube.run.boot_id == run.boot_id
