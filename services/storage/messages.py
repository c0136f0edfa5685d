"""Bus messages to storage's values and back.

Owns the mapping and the checks that need no pool. Must not do any work. Invariant: what
passes is well formed: an owner is a uuid, a volume names its pool's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from bulkhead import codec
from bulkhead.api import records_pb2, storage_pb2
from bulkhead.model.records import KernelFact, Pool, PoolFact, Volume
from services.storage.core.reasons import StorageRefusal
from services.storage.core.states import Device, Found, Kernel, VolumeState
from services.storage.drivers.interface import DriverInfo

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_BOOT = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
LARGEST = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Spec:
    """A volume and its pool."""

    volume: Volume
    pool: Pool

    @property
    def key(self) -> str:
        """What its lock is called."""
        return f"{self.pool.name}:{self.volume.vid}"


def spec(message: storage_pb2.VolumeSpec) -> Spec:
    """INVALID_VOLUME unless volume and pool fit together."""
    volume = codec.volume_from_proto(message.declared)
    pool = codec.pool_from_proto(message.pool)
    if not pool.name or not pool.driver or volume.pool != pool.name:
        raise StorageRefusal(
            "INVALID_VOLUME",
            f"volume {volume.vid!r} is declared in pool {volume.pool!r}, but the request "
            f"describes pool {pool.name!r}",
            volume=volume.vid,
            pool=pool.name,
        )
    if volume.revisions_to_keep < -1:
        raise StorageRefusal(
            "INVALID_VOLUME",
            f"volume {volume.vid}: revisions_to_keep must be -1 or more",
            volume=volume.vid,
        )
    check_size(volume.size)
    return Spec(volume, pool)


def specs(messages: Iterable[storage_pb2.VolumeSpec]) -> list[Spec]:
    """spec() of each. INVALID_VOLUME also when one volume is named twice."""
    found = [spec(message) for message in messages]
    keys = [item.key for item in found if item.volume.vid]
    if len(set(keys)) != len(keys):
        raise StorageRefusal("INVALID_VOLUME", "the request names one volume twice")
    return found


def check_size(untrusted_size: int) -> int:
    """A size in bytes. INVALID_VOLUME when no file can have it."""
    if not 0 <= untrusted_size <= LARGEST:
        raise StorageRefusal("INVALID_VOLUME", f"{untrusted_size} is no possible size")
    return untrusted_size


def check_owner(untrusted_owner: str) -> str:
    """A qube's uuid. INVALID_VOLUME."""
    if _UUID.fullmatch(untrusted_owner) is None:
        raise StorageRefusal("INVALID_VOLUME", f"owner {untrusted_owner!r} is no uuid")
    return untrusted_owner


def check_boot(untrusted_boot: str, required: bool) -> str:
    """A boot id, "" only where not required. INVALID_VOLUME."""
    if (untrusted_boot or required) and _BOOT.fullmatch(untrusted_boot) is None:
        raise StorageRefusal("INVALID_VOLUME", f"boot id {untrusted_boot!r} is malformed")
    return untrusted_boot


def check_key(untrusted_operation: str) -> str:
    """An operation's id, short enough for a tag. INVALID_VOLUME."""
    if untrusted_operation and _BOOT.fullmatch(untrusted_operation) is None:
        raise StorageRefusal("INVALID_VOLUME", "the operation's id is malformed")
    return untrusted_operation


def state_message(item: Spec, state: VolumeState) -> storage_pb2.VolumeState:
    """A volume's present state; is_outdated is left out where the driver cannot tell."""
    message = storage_pb2.VolumeState(
        name=item.volume.name,
        pool=item.pool.name,
        vid=item.volume.vid,
        size=state.size,
        usage=state.usage,
        path=state.path,
        is_dirty=state.is_dirty,
        revisions=[
            storage_pb2.Revision(id=r.id, time=r.time, note=r.note) for r in state.revisions
        ],
        problem=state.problem,
        importing=state.importing,
    )
    if state.is_outdated is not None:
        message.is_outdated = state.is_outdated
    return message


def device_message(device: Device) -> storage_pb2.BlockDevice:
    """What a guest gets."""
    return storage_pb2.BlockDevice(
        name=device.name,
        path=device.path,
        rw=device.rw,
        devtype=device.devtype,
        format=device.format,
        block=device.block,
    )


def found_message(pool: str, found: Found) -> storage_pb2.InventoryItem:
    """One item of an inventory."""
    return storage_pb2.InventoryItem(
        pool=pool,
        vid=found.vid,
        owner=found.owner,
        path=found.path,
        kind=found.kind,
        running=found.running,
    )


def found(message: storage_pb2.InventoryItem) -> Found:
    """An item that came back to be quarantined."""
    return Found(message.vid, message.owner, message.path, message.kind, message.running)


def driver_message(info: DriverInfo) -> storage_pb2.DriverInfo:
    """A driver as admin.pool.ListDrivers and admin.pool.Add need it."""
    return storage_pb2.DriverInfo(
        name=info.name,
        parameters=info.parameters,
        required=info.required,
        available=info.available,
        why_not=info.why_not,
        negative_revisions=info.negative_revisions,
        reflink=info.reflink,
        resize_running=info.resize_running,
        block_devices=info.block_devices,
    )


def kernel_fact(pool: str, kernel: Kernel) -> KernelFact:
    """The registry's record of a kernel."""
    return KernelFact(
        name=kernel.name,
        pool=pool,
        directory=kernel.directory,
        has_vmlinuz=kernel.has_vmlinuz,
        has_initramfs=kernel.has_initramfs,
        has_modules=kernel.has_modules,
        memory_hotplug=kernel.memory_hotplug,
        kernelopts_common=kernel.kernelopts_common,
        kernelopts_pci=kernel.kernelopts_pci,
        kernelopts_nopci=kernel.kernelopts_nopci,
    )


def kernel_message(fact: KernelFact) -> records_pb2.KernelFact:
    """The message of a kernel's fact."""
    return codec.fact_to_proto(fact).kernel


def pool_message(fact: PoolFact) -> records_pb2.PoolFact:
    """The message of a pool's fact."""
    return codec.fact_to_proto(fact).pool
