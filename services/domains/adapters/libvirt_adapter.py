"""libvirt as a Hypervisor: Xen, QEMU with or without KVM, and libvirt's test driver.

Owns what each call means in libvirt. Must not know threads (libvirt_calls), XML
(core.xml) or the bus. Invariants: domains are transient and carry their boot id in our
metadata; a domain without it is never touched; no libvirt call runs on the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import libvirt

from bulkhead.model.records import DeviceFact
from services.domains.core.devices import pci_fact
from services.domains.core.plugging import Plugging
from services.domains.core.power import PMSUSPENDED, RUNNING, power_of, stop_reason_of
from services.domains.core.spec import DiskSpec, DomainSpec, InterfaceSpec
from services.domains.core.tracker import Sighting
from services.domains.core.xml import (
    METADATA_NS,
    Flavour,
    disk_fragment,
    grows,
    interface_fragment,
    read_metadata,
    render,
)
from services.domains.core.xml.qemu import target as qemu_target

from . import pci
from .abandonment import CallsUnderWay
from .hypervisor import AdminUsage, Domain, Event, Failure, HostInfo, HypervisorError, News
from .libvirt_calls import Connection, Lane
from .xenstore import Xenstore

_R = TypeVar("_R")
_log = logging.getLogger("domains.libvirt")

# Threads, each with a connection of its own, started at need. Only as many qubes as there
# are workers can hang at once before others wait for one to be given up.
WORKERS = 16
WAITING = 512
DESTROYERS = 8
READERS = 16
# One domain that does not answer shall not keep the list of all from being made.
LOOK_S = 3.0
RECONNECT_S = (0.05, 0.1, 0.2, 0.5, 1.0)
OPEN_S = 30.0
LIBXL_LOG = "/var/log/libvirt/libxl/libxl-driver.log"
QUBES_MARK = Path("/etc/qubes-release")


class LibvirtHypervisor:
    """Hypervisor at a libvirt URI, for example "qemu:///session?socket=/run/x.sock"."""

    def __init__(self, uri: str, xenstore: Xenstore | None = None) -> None:
        self.uri = uri
        self._work = Lane(uri, "work", WORKERS, WAITING)
        self._destroy = Lane(uri, "destroy", DESTROYERS, WAITING)
        self._read = Lane(uri, "read", READERS, WAITING)
        # Opened and used by the watch only; a hung one is replaced as any other.
        self._watch = Lane(uri, "events", 1, 4)
        self._under_way = CallsUnderWay()
        self._listener: Callable[[Event], None] = lambda _: None
        self._task: asyncio.Task[None] | None = None
        self._broken = asyncio.Event()
        self._kind = uri.partition(":")[0].partition("+")[0]
        self._flavour = Flavour("xen" if self._kind == "xen" else "qemu")
        self._xenstore = xenstore or (Xenstore() if self._kind == "xen" else None)

    @property
    def flavour(self) -> Flavour:
        """For which XML is made; complete once a connection was up."""
        return self._flavour

    @property
    def lost(self) -> int:
        """Threads that were given up and still hang in libvirt."""
        return sum(lane.lost for lane in (self._work, self._destroy, self._read, self._watch))

    # ---- connection and events

    async def open(self, listener: Callable[[Event], None]) -> None:
        self._listener = listener
        self._task = asyncio.ensure_future(self._keep())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for lane in (self._work, self._destroy, self._read, self._watch):
            lane.close()

    async def _keep(self) -> None:
        """Hold one connection for events; open it again whenever it breaks."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            self._broken = asyncio.Event()
            broken = self._broken

            def closed(
                _connection: object, _reason: int, _opaque: object, broken: asyncio.Event = broken
            ) -> None:
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(broken.set)

            def lifecycle(
                _connection: object, domain: Any, event: int, detail: int, _opaque: object
            ) -> None:
                news = _news(domain.UUIDString(), event, detail)
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._listener, news)

            def register(connection: libvirt.virConnect) -> str:
                connection.domainEventRegisterAny(
                    None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, None
                )
                try:
                    connection.registerCloseCallback(closed, None)
                except libvirt.libvirtError:
                    pass  # drivers inside this process have nothing that could close
                return str(connection.getCapabilities())

            try:
                capabilities = await self._watch.run(register, OPEN_S)
            except HypervisorError as error:
                if failures == 0:
                    _log.warning("%s cannot be reached: %s", self.uri, error.message)
                await asyncio.sleep(RECONNECT_S[min(failures, len(RECONNECT_S) - 1)])
                failures += 1
                continue
            failures = 0
            self._flavour = _flavour(self._kind, self.uri, capabilities)
            _log.info("connected to %s", self.uri)
            self._listener(Event(News.CONNECTED))
            await broken.wait()
            _log.warning("the connection to %s broke", self.uri)
            self._listener(Event(News.DISCONNECTED))

    # ---- common parts

    async def _call(
        self, uuid: str, call: Callable[[libvirt.virConnect], _R], timeout: float
    ) -> _R:
        """A call on the work lane that destroy() of the same uuid gives up."""
        return await self._under_way.run(uuid, self._work.run(call, timeout), "the call")

    async def _on_domain(
        self, uuid: str, call: Callable[[libvirt.virDomain], _R], timeout: float
    ) -> _R:
        return await self._call(
            uuid, lambda connection: call(connection.lookupByUUIDString(uuid)), timeout
        )

    # ---- reading

    async def host(self, timeout: float) -> HostInfo:
        return await self._read.run(self._host_info, timeout)

    def _host_info(self, connection: libvirt.virConnect) -> HostInfo:
        _, memory_mib, cpus, *_ = connection.getInfo()
        memory_kib = memory_mib * 1024
        if self._kind == "xen":
            free = connection.getFreeMemory() // 1024
            dom0 = 4096
            with contextlib.suppress(libvirt.libvirtError):
                limit = connection.lookupByID(0).maxMemory() // 1024
                dom0 = limit if 0 < limit < memory_mib else dom0
            kind = "xen"
        else:
            free, dom0, kind = None, 4096, self._flavour.hypervisor
            if self._kind == "qemu":
                # libvirt counts what was there at boot; memory may have been added since.
                memory_kib = max(memory_kib, _memory_kib("MemTotal") or 0)
                free = _memory_kib("MemAvailable")
        return HostInfo(
            kind=kind,
            memory_kib=memory_kib,
            cpus=cpus,
            dom0_maxmem_mib=dom0,
            has_iommu=_has_iommu(connection.getCapabilities()),
            cpu_family_model=_family_model(),
            free_kib=free,
        )

    async def admin_usage(self, timeout: float) -> AdminUsage:
        return await self._read.run(self._admin_usage, timeout)

    def _admin_usage(self, connection: libvirt.virConnect) -> AdminUsage:
        _, memory_mib, cpus, *_ = connection.getInfo()
        total_kib = memory_mib * 1024
        if self._kind == "xen":
            _, maximum, memory, vcpus, cpu_time = connection.lookupByID(0).info()
            # Without a limit Xen tells the largest number that there is.
            return AdminUsage(memory, min(maximum, total_kib), cpu_time, vcpus)
        if self._kind == "qemu":
            total_kib = _memory_kib("MemTotal") or total_kib
            spent = connection.getCPUStats(libvirt.VIR_NODE_CPU_STATS_ALL_CPUS, 0)
            used = total_kib - (_memory_kib("MemAvailable") or 0)
            return AdminUsage(used, total_kib, spent["kernel"] + spent["user"], cpus)
        return AdminUsage(total_kib, total_kib, 0, cpus)

    async def existing(self, timeout: float) -> frozenset[str]:
        def call(connection: libvirt.virConnect) -> frozenset[str]:
            handles = connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            return frozenset(handle.UUIDString() for handle in handles)

        return await self._read.run(call, timeout)

    async def inventory(self, timeout: float) -> tuple[Domain, ...]:
        uuids = sorted(await self.existing(timeout))
        turns = asyncio.Semaphore(READERS)  # a look's time counts from its own beginning

        async def look(uuid: str) -> Domain | None:
            async with turns:
                return await self.describe(uuid, min(timeout, LOOK_S))

        found = await asyncio.gather(*map(look, uuids), return_exceptions=True)
        domains = []
        for uuid, domain in zip(uuids, found, strict=True):
            if isinstance(domain, Domain):
                domains.append(domain)
            elif isinstance(domain, HypervisorError) and domain.failure is Failure.TIMEOUT:
                _log.warning("domain %s does not answer", uuid)
            elif isinstance(domain, BaseException):
                raise domain
        return tuple(domains)

    async def describe(self, uuid: str, timeout: float) -> Domain | None:
        def call(connection: libvirt.virConnect) -> Domain | None:
            try:
                return self._shown(connection.lookupByUUIDString(uuid))
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    return None
                raise

        return await self._read.run(call, timeout)

    def _shown(self, handle: libvirt.virDomain) -> Domain | None:
        """The domain, None when it is not active or vanishes meanwhile."""
        try:
            state, maximum, memory, vcpus, cpu_time = handle.info()
            xid = handle.ID()
            if xid < 0 or (self._kind == "xen" and xid == 0):
                return None
            boot_id, epoch, started = _metadata(handle)
            untrusted = ET.fromstring(handle.XMLDesc())
            stubdom_xid, stubdom_uuid, stubdom_time, stubdom_vcpus = self._stubdom(handle, xid)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise
        if started is None and self._xenstore is not None:
            started = self._xenstore.start_time(handle.UUIDString())
        return Domain(
            sighting=Sighting(
                uuid=handle.UUIDString(),
                boot_id=boot_id,
                power=power_of(True, state),
                xid=xid,
                stubdom_xid=stubdom_xid,
                stubdom_uuid=stubdom_uuid,
                start_time=started,
            ),
            name=handle.name(),
            epoch=epoch,
            console=_console(untrusted),
            memory_kib=memory,
            memory_max_kib=maximum,
            cpu_time_ns=cpu_time,
            vcpus=vcpus,
            stubdom_cpu_time_ns=stubdom_time,
            stubdom_vcpus=stubdom_vcpus,
            disks=self._disks(untrusted),
            pci=tuple(_addresses(untrusted)),
        )

    def _stubdom(
        self, handle: libvirt.virDomain, xid: int
    ) -> tuple[int, str, int | None, int | None]:
        """(xid, uuid, CPU time, vcpus) of the stubdomain; (-1, "", None, None) without one."""
        if self._xenstore is None:
            return -1, "", None, None
        stubdom_xid, uuid = self._xenstore.stubdom(xid)
        if stubdom_xid < 0:
            return -1, "", None, None
        try:
            _, _, _, vcpus, cpu_time = handle.connect().lookupByID(stubdom_xid).info()
        except libvirt.libvirtError:
            return stubdom_xid, uuid, None, None  # it is gone by now, or libvirt hides it
        return stubdom_xid, uuid, cpu_time, vcpus

    def _disks(self, description: ET.Element) -> tuple[DiskSpec, ...]:
        found = []
        for disk in description.iterfind("devices/disk"):
            target, source = disk.find("target"), disk.find("source")
            if target is None or source is None:
                continue
            device = target.get("dev") or ""
            if self._flavour.hypervisor != "xen":
                device = f"xvd{device[2:]}"
            backend = disk.find("backenddomain")
            found.append(
                DiskSpec(
                    target=device,
                    path=source.get("file") or source.get("dev") or "",
                    rw=disk.find("readonly") is None,
                    devtype=disk.get("device") or "disk",
                    block=source.get("dev") is not None,
                    backend="" if backend is None else backend.get("name") or "",
                )
            )
        return tuple(found)

    async def devices(self, timeout: float) -> tuple[DeviceFact, ...]:
        """PCI functions of this host; guests' block devices are in their keys."""
        if self._kind == "test":
            return ()
        found = await asyncio.wait_for(asyncio.to_thread(pci.functions), timeout)
        return tuple(pci_fact(function) for function in found)

    # ---- power

    async def create_paused(self, spec: DomainSpec, timeout: float) -> Domain:
        text = render(spec, self._flavour, started=f"{time.time():.3f}")

        def call(connection: libvirt.virConnect) -> Domain:
            if self._kind == "test":
                # That driver cannot start paused: its guests do nothing anyway.
                handle = connection.createXML(text, 0)
                handle.suspend()
            else:
                try:
                    handle = connection.createXML(text, libvirt.VIR_DOMAIN_START_PAUSED)
                except libvirt.libvirtError as error:
                    if self._kind == "xen":
                        _explain(connection, spec, error)
                    raise
            try:
                if self._xenstore is not None and spec.maxmem_mib:
                    limit = spec.maxmem_mib if grows(spec, self._flavour) else 0
                    self._xenstore.prepare_memory(handle.ID(), limit)
                domain = self._shown(handle)
            except OSError as error:
                # Without its nodes the guest would never be balanced: better no guest.
                handle.destroy()
                raise HypervisorError(Failure.FAILED, str(error)) from error
            if domain is None:
                raise HypervisorError(Failure.FAILED, f"{spec.name} ended while it was created")
            return domain

        try:
            return await self._call(spec.uuid, call, timeout)
        except HypervisorError as error:
            if error.failure in (Failure.WRONG_STATE, Failure.FAILED) and (
                "already" in error.message or "exists" in error.message
            ):
                raise HypervisorError(Failure.EXISTS, error.message) from error
            raise

    async def resume(self, uuid: str, timeout: float) -> None:
        def call(domain: libvirt.virDomain) -> None:
            if _power(domain) != RUNNING:
                domain.resume()

        await self._on_domain(uuid, call, timeout)

    async def pause(self, uuid: str, timeout: float) -> None:
        def call(domain: libvirt.virDomain) -> None:
            if _power(domain) == RUNNING:
                domain.suspend()

        await self._on_domain(uuid, call, timeout)

    async def pm_suspend(self, uuid: str, timeout: float) -> None:
        def call(domain: libvirt.virDomain) -> None:
            if _power(domain) != PMSUSPENDED:
                domain.pMSuspendForDuration(libvirt.VIR_NODE_SUSPEND_TARGET_MEM, 0)

        await self._on_domain(uuid, call, timeout)

    async def wake(self, uuid: str, timeout: float) -> None:
        def call(domain: libvirt.virDomain) -> None:
            if _power(domain) != RUNNING:
                domain.pMWakeup()

        await self._on_domain(uuid, call, timeout)

    async def shutdown(self, uuid: str, timeout: float) -> None:
        await self._on_domain(uuid, lambda domain: domain.shutdown(), timeout)

    async def destroy(self, uuid: str, boot_id: str, timeout: float) -> bool:
        self._under_way.abandon(uuid)

        def call(connection: libvirt.virConnect) -> bool:
            try:
                domain = connection.lookupByUUIDString(uuid)
                found = _metadata(domain)[0]
                if not found or (boot_id and found != boot_id):
                    return False
                domain.destroy()
            except libvirt.libvirtError as error:
                gone = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)
                if error.get_error_code() in gone:
                    return False
                raise
            return True

        return await self._destroy.run(call, timeout)

    async def undefine(self, uuid: str, timeout: float) -> None:
        def call(connection: libvirt.virConnect) -> None:
            try:
                domain = connection.lookupByUUIDString(uuid)
                if domain.isPersistent():
                    domain.undefine()
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                    raise

        await self._call(uuid, call, timeout)

    # ---- devices and memory

    async def attach_interface(
        self, uuid: str, interface: InterfaceSpec, timeout: float, *, anew: bool = False
    ) -> None:
        text = interface_fragment(interface, self._flavour)
        wanted = Plugging.of(ET.fromstring(text))

        def call(domain: libvirt.virDomain) -> None:
            present = _interfaces(domain)
            if not anew and [Plugging.of(nic).same(wanted) for nic in present] == [True]:
                return
            for nic in present:
                _detach(domain, nic)
            if _interfaces(domain):
                raise HypervisorError(
                    Failure.BUSY, f"{domain.name()} has not yet let go of its network interface"
                )
            domain.attachDeviceFlags(text, libvirt.VIR_DOMAIN_AFFECT_LIVE)

        await self._on_domain(uuid, call, timeout)

    async def detach_interface(self, uuid: str, backend: str, timeout: float) -> None:
        def call(domain: libvirt.virDomain) -> None:
            for present in _interfaces(domain):
                if not backend or Plugging.of(present).backend == backend:
                    _detach(domain, present)

        await self._on_domain(uuid, call, timeout)

    async def attach_disk(self, uuid: str, disk: DiskSpec, timeout: float) -> None:
        text = disk_fragment(disk, self._flavour)

        def call(domain: libvirt.virDomain) -> None:
            present = _disk(domain, self._target(disk))
            if present is None:
                domain.attachDeviceFlags(text, libvirt.VIR_DOMAIN_AFFECT_LIVE)
                return
            source = present.find("source")
            path = "" if source is None else source.get("file") or source.get("dev") or ""
            if path != disk.path:
                raise HypervisorError(
                    Failure.EXISTS, f"target {disk.target} of {domain.name()} is in use"
                )

        await self._on_domain(uuid, call, timeout)

    async def detach_disk(self, uuid: str, disk: DiskSpec, timeout: float) -> None:
        def call(domain: libvirt.virDomain) -> None:
            present = _disk(domain, self._target(disk))
            if present is None:
                return
            _detach(domain, present)
            if _disk(domain, self._target(disk)) is not None:
                raise HypervisorError(
                    Failure.BUSY, f"{domain.name()} has not yet let go of {disk.target}"
                )

        await self._on_domain(uuid, call, timeout)

    async def resize_disk(self, uuid: str, target: str, size: int, timeout: float) -> None:
        device = target if self._flavour.hypervisor == "xen" else f"vd{target.removeprefix('xvd')}"

        def call(domain: libvirt.virDomain) -> None:
            if self._kind == "xen":
                # libxl has no blockResize; blkback notices the new size of its device itself.
                if _disk(domain, device) is None:
                    raise HypervisorError(Failure.INVALID, f"there is no disk {target}")
                return
            domain.blockResize(device, size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)

        await self._on_domain(uuid, call, timeout)

    async def set_maxmem(self, uuid: str, maxmem_mib: int, timeout: float) -> None:
        store = self._xenstore

        def call(domain: libvirt.virDomain) -> None:
            if store is None or not store.present or not self._flavour.qubes:
                raise HypervisorError(
                    Failure.UNSUPPORTED, f"no memory can be added to {domain.name()} while it runs"
                )
            try:
                store.set_hotplug_max(domain.ID(), maxmem_mib)
            except OSError as error:
                raise HypervisorError(Failure.FAILED, str(error)) from error

        await self._on_domain(uuid, call, timeout)

    async def run_service(self, *_: object) -> tuple[int, bytes] | None:
        """libvirt reaches no service in a guest."""
        return None

    async def wait_agent(self, *_: object) -> bool | None:
        """libvirt knows of no agent."""
        return None

    def _target(self, disk: DiskSpec) -> str:
        return disk.target if self._flavour.hypervisor == "xen" else qemu_target(disk)[0]


# ---- what libvirt says, as values


def _news(uuid: str, event: int, detail: int) -> Event:
    if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
        # libvirt does not say which boot: the handlers look.
        return Event(News.STOPPED, uuid, "", stop_reason_of(detail))
    return Event(News.CHANGED, uuid)


def _metadata(domain: libvirt.virDomain) -> tuple[str, int, float | None]:
    try:
        text = domain.metadata(
            libvirt.VIR_DOMAIN_METADATA_ELEMENT, METADATA_NS, libvirt.VIR_DOMAIN_AFFECT_LIVE
        )
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
            return "", 0, None
        raise
    return read_metadata(text)


def _explain(connection: libvirt.virConnect, spec: DomainSpec, error: libvirt.libvirtError) -> None:
    """libxl tells libvirt only that it failed: look for what is known to be behind it."""
    if error.get_error_code() != libvirt.VIR_ERR_INTERNAL_ERROR:
        return
    free_mib = connection.getFreeMemory() >> 20
    if free_mib < spec.memory_mib:
        raise HypervisorError(
            Failure.NO_MEMORY,
            f"{spec.name} asks for {spec.memory_mib} MiB, {free_mib} MiB are free in Xen",
        ) from error
    message = (error.get_error_message() or str(error)).strip().rstrip(".")
    raise HypervisorError(Failure.FAILED, f"{message}; {LIBXL_LOG} says why") from error


def _power(domain: libvirt.virDomain) -> str:
    return power_of(True, domain.state()[0])


def _console(description: ET.Element) -> str:
    """Where the guest's console is: a file, or a terminal's path; "" = none."""
    for tag in ("serial", "console"):
        element = description.find(f"devices/{tag}")
        if element is None:
            continue
        source = element.find("source")
        path = element.get("tty") or ("" if source is None else source.get("path") or "")
        if path:
            return path
    return ""


def _addresses(description: ET.Element) -> Iterator[str]:
    for address in description.iterfind("devices/hostdev[@type='pci']/source/address"):
        with contextlib.suppress(ValueError):
            domain, bus, slot, function = (
                int(address.get(name) or "0", 16) for name in ("domain", "bus", "slot", "function")
            )
            yield f"{domain:04x}:{bus:02x}:{slot:02x}.{function}"


def _disk(domain: libvirt.virDomain, target: str) -> ET.Element | None:
    for disk in ET.fromstring(domain.XMLDesc()).findall("devices/disk"):
        element = disk.find("target")
        if element is not None and element.get("dev") == target:
            return disk
    return None


def _interfaces(domain: libvirt.virDomain) -> list[ET.Element]:
    return ET.fromstring(domain.XMLDesc()).findall("devices/interface")


def _detach(domain: libvirt.virDomain, element: ET.Element) -> None:
    """Ask the guest for the device; libvirt waits some seconds for its answer."""
    try:
        domain.detachDeviceFlags(
            ET.tostring(element, encoding="unicode"), libvirt.VIR_DOMAIN_AFFECT_LIVE
        )
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_DEVICE_MISSING:
            raise


def _flavour(kind: str, uri: str, untrusted_capabilities: str) -> Flavour:
    if kind == "xen":
        return Flavour("xen", qubes=QUBES_MARK.exists())
    types = {
        element.get("type")
        for element in ET.fromstring(untrusted_capabilities).iterfind("guest/arch/domain")
    }
    hypervisor = "kvm" if kind == "qemu" and "kvm" in types else "qemu"
    if kind == "test":
        hypervisor = "test"
    return Flavour(hypervisor, no_dac=uri.partition("?")[0].endswith("/system"))


def _has_iommu(untrusted_capabilities: str) -> bool:
    element = ET.fromstring(untrusted_capabilities).find("host/iommu")
    return element is not None and element.get("support") == "yes"


def _family_model() -> str:
    """ "6/58", as the kernel says; "" when it does not."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    except OSError:
        return ""
    if "cpu family" not in found or "model" not in found:
        return ""
    return f"{found['cpu family']}/{found['model']}"


def _memory_kib(name: str) -> int | None:
    """A line of this host's meminfo in KiB, None when it has none."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return None


__all__ = ["Connection", "LibvirtHypervisor"]
