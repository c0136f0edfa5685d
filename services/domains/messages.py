"""Domain messages to core values and back.

Owns the field-by-field conversion. Must not check anything: core.spec does. Invariant:
a spec's fields and the message's fields have the same names, so nothing is left out.
"""

from __future__ import annotations

from bulkhead import codec
from bulkhead.api import domains_pb2
from bulkhead.model.records import PowerFact
from services.domains.adapters.hypervisor import Domain
from services.domains.core.guest_keys import KeysOf
from services.domains.core.spec import (
    DiskSpec,
    DomainSpec,
    EmulatorSpec,
    HostdevSpec,
    InterfaceSpec,
)


def disk_from(message: domains_pb2.DiskSpec) -> DiskSpec:
    """An unchecked DiskSpec; devtype and format default to "disk" and "raw"."""
    return DiskSpec(
        target=message.target,
        path=message.path,
        rw=message.rw,
        devtype=message.devtype or "disk",
        format=message.format or "raw",
        block=message.block,
        backend=message.backend,
        backend_uuid=message.backend_uuid,
        script=message.script,
        serial=message.serial,
    )


def interface_from(message: domains_pb2.InterfaceSpec) -> InterfaceSpec:
    """An unchecked InterfaceSpec."""
    return InterfaceSpec(
        mac=message.mac,
        ip=message.ip,
        ip6=message.ip6,
        backend=message.backend,
        backend_uuid=message.backend_uuid,
        tap=message.tap,
        gateway=message.gateway,
        netmask=message.netmask,
        dns=tuple(message.dns),
    )


def hostdev_from(message: domains_pb2.HostdevSpec) -> HostdevSpec:
    """An unchecked HostdevSpec."""
    return HostdevSpec(
        domain=message.domain,
        bus=message.bus,
        slot=message.slot,
        function=message.function,
        permissive=message.permissive,
        no_strict_reset=message.no_strict_reset,
        power_management_filtering_off=message.power_management_filtering_off,
    )


def spec_from(message: domains_pb2.DomainSpec) -> DomainSpec:
    """An unchecked DomainSpec; a message without emulator gets the default one."""
    emulator = EmulatorSpec()
    if message.HasField("emulator"):
        emulator = EmulatorSpec(
            linux_stubdom=message.emulator.linux_stubdom,
            full_image=message.emulator.full_image,
            memory_mib=message.emulator.memory_mib,
            audiovm_xid=message.emulator.audiovm_xid,
            extra_args=message.emulator.extra_args,
            debug=message.emulator.debug,
        )
    return DomainSpec(
        uuid=message.uuid,
        name=message.name,
        boot_id=message.boot_id,
        epoch=message.epoch,
        virt_mode=message.virt_mode,
        memory_mib=message.memory_mib,
        maxmem_mib=message.maxmem_mib,
        hotplug=message.hotplug,
        vcpus=message.vcpus,
        kernel=message.kernel,
        initramfs=message.initramfs,
        cmdline=message.cmdline,
        has_pci=message.has_pci,
        e820_host=message.e820_host,
        rdrand_disable=message.rdrand_disable,
        uefi=message.uefi,
        timezone=message.timezone,
        audio_model=message.audio_model,
        video_model=message.video_model,
        gui_domain=message.gui_domain,
        debug=message.debug,
        disks=tuple(disk_from(disk) for disk in message.disks),
        interfaces=tuple(interface_from(nic) for nic in message.interfaces),
        hostdevs=tuple(hostdev_from(hostdev) for hostdev in message.hostdevs),
        emulator=emulator,
        console_log=message.console_log,
        qid=message.qid,
        network_namespace=message.network_namespace,
    )


def state_to(fact: PowerFact, domain: Domain | None) -> domains_pb2.DomainState:
    """The state of one boot, as last reported."""
    return domains_pb2.DomainState(
        power=codec.fact_to_proto(fact).power,
        epoch="" if domain is None else str(domain.epoch),
        console="" if domain is None else domain.console,
    )


def keys_of_from(message: domains_pb2.WriteGuestKeysRequest) -> KeysOf | None:
    """The unchecked keys to find by their lines and remove; None when none are to be."""
    if not message.HasField("removed_of"):
        return None
    asked = message.removed_of
    return KeysOf(asked.below, frozenset(asked.lines), (asked.news.path, asked.news.value))
