"""Network qubes without a hypervisor: each runs as a network namespace.

Owns one small file per such qube, which is its power state; everything else goes to the
hypervisor behind. Must not make namespaces: hostd does, before create_paused. Invariants:
a file names the kernel's boot, so nothing "runs" across a boot of the host; create is
seen only after its file is complete; destroy of what is gone succeeds.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bulkhead.durable import unlink, write_file
from bulkhead.model.records import DeviceFact
from services.domains.adapters.hypervisor import (
    AdminUsage,
    Domain,
    Event,
    Failure,
    HostInfo,
    Hypervisor,
    HypervisorError,
    News,
)
from services.domains.core.power import PAUSED, RUNNING
from services.domains.core.spec import DiskSpec, DomainSpec, InterfaceSpec
from services.domains.core.tracker import Sighting

KERNEL_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# xids of namespaces: out of the range that a hypervisor counts up from 1.
XID_BASE = 1_000_000

_log = logging.getLogger("domains.namespaces")


class WithNamespaces:
    """A Hypervisor that keeps network qubes itself and passes the others on.

    What the files say is read once, in open(), and kept in memory: a call for another
    qube costs one look into a dictionary.
    """

    def __init__(
        self, behind: Hypervisor, directory: Path, kernel_boot_id: Path = KERNEL_BOOT_ID
    ) -> None:
        self.behind = behind
        self.directory = directory
        self._boot = kernel_boot_id.read_text().strip()
        self._domains: dict[str, Domain] = {}
        # A file and its entry change together, one at a time.
        self._changing = asyncio.Lock()
        self._tell: Callable[[Event], None] | None = None

    # ---- the files

    def _path(self, uuid: str) -> Path:
        return self.directory / f"{uuid}.json"

    def _load_all(self) -> dict[str, Domain]:
        found = {}
        for path in sorted(self.directory.glob("*.json")):
            domain = self._load(path)
            if domain is None:
                path.unlink(missing_ok=True)  # of an earlier boot of the host, or torn
            else:
                found[domain.uuid] = domain
        return found

    def _load(self, path: Path) -> Domain | None:
        try:
            row = json.loads(path.read_text())
            if row["kernel"] != self._boot:
                return None
            sighting = Sighting(
                uuid=path.stem,
                boot_id=row["boot_id"],
                power=row["power"],
                xid=row["xid"],
                start_time=row["start_time"],
            )
            return Domain(sighting=sighting, name=row["name"], epoch=row["epoch"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.error("%s cannot be read: %s", path, error)
            return None

    def _store(self, domain: Domain) -> None:
        self.directory.mkdir(mode=0o700, exist_ok=True)
        row = {
            "kernel": self._boot,
            "boot_id": domain.boot_id,
            "name": domain.name,
            "epoch": domain.epoch,
            "power": domain.sighting.power,
            "xid": domain.sighting.xid,
            "start_time": domain.sighting.start_time,
        }
        write_file(self._path(domain.uuid), json.dumps(row).encode())

    async def _keep(self, domain: Domain) -> None:
        async with self._changing:
            await asyncio.to_thread(self._store, domain)
            self._domains[domain.uuid] = domain
        self._news(Event(News.CHANGED, domain.uuid, domain.boot_id))

    async def _set_power(self, uuid: str, power: str) -> bool:
        """Change the state of one of ours; False when it is none."""
        domain = self._domains.get(uuid)
        if domain is None:
            return False
        if domain.sighting.power != power:
            await self._keep(replace(domain, sighting=replace(domain.sighting, power=power)))
        return True

    def _news(self, event: Event) -> None:
        if self._tell is not None:
            self._tell(event)

    # ---- Hypervisor

    async def open(self, listener: Callable[[Event], None]) -> None:
        self._domains = await asyncio.to_thread(self._load_all)
        self._tell = listener
        await self.behind.open(listener)

    async def close(self) -> None:
        await self.behind.close()

    async def host(self, timeout: float) -> HostInfo:
        return await self.behind.host(timeout)

    async def admin_usage(self, timeout: float) -> AdminUsage:
        return await self.behind.admin_usage(timeout)

    async def existing(self, timeout: float) -> frozenset[str]:
        return await self.behind.existing(timeout) | self._domains.keys()

    async def inventory(self, timeout: float) -> tuple[Domain, ...]:
        return (*self._domains.values(), *await self.behind.inventory(timeout))

    async def describe(self, uuid: str, timeout: float) -> Domain | None:
        return self._domains.get(uuid) or await self.behind.describe(uuid, timeout)

    async def devices(self, timeout: float) -> tuple[DeviceFact, ...]:
        return await self.behind.devices(timeout)

    async def create_paused(self, spec: DomainSpec, timeout: float) -> Domain:
        if not spec.network_namespace:
            return await self.behind.create_paused(spec, timeout)
        if spec.uuid in self._domains:
            raise HypervisorError(Failure.EXISTS, f"{spec.name} has a namespace already")
        sighting = Sighting(
            uuid=spec.uuid,
            boot_id=spec.boot_id,
            power=PAUSED,
            xid=XID_BASE + spec.qid,
            start_time=time.time(),
        )
        domain = Domain(sighting=sighting, name=spec.name, epoch=spec.epoch)
        await self._keep(domain)
        return domain

    async def resume(self, uuid: str, timeout: float) -> None:
        if not await self._set_power(uuid, RUNNING):
            await self.behind.resume(uuid, timeout)

    async def pause(self, uuid: str, timeout: float) -> None:
        if not await self._set_power(uuid, PAUSED):
            await self.behind.pause(uuid, timeout)

    async def pm_suspend(self, uuid: str, timeout: float) -> None:
        if uuid in self._domains:
            raise HypervisorError(Failure.UNSUPPORTED, "a namespace cannot suspend")
        await self.behind.pm_suspend(uuid, timeout)

    async def wake(self, uuid: str, timeout: float) -> None:
        if not await self._set_power(uuid, RUNNING):
            await self.behind.wake(uuid, timeout)

    async def shutdown(self, uuid: str, timeout: float) -> None:
        if not await self._end(uuid, "", "shutdown"):
            await self.behind.shutdown(uuid, timeout)

    async def destroy(self, uuid: str, boot_id: str, timeout: float) -> bool:
        if await self._end(uuid, boot_id, "destroyed"):
            return True
        return await self.behind.destroy(uuid, boot_id, timeout)

    async def _end(self, uuid: str, boot_id: str, reason: str) -> bool:
        domain = self._domains.get(uuid)
        if domain is None or (boot_id and domain.boot_id != boot_id):
            return False
        async with self._changing:
            if self._domains.pop(uuid, None) is None:
                return False  # another call has ended it meanwhile
            await asyncio.to_thread(unlink, self._path(uuid))
        self._news(Event(News.STOPPED, uuid, domain.boot_id, reason))
        return True

    async def undefine(self, uuid: str, timeout: float) -> None:
        if uuid not in self._domains:
            await self.behind.undefine(uuid, timeout)

    async def attach_interface(
        self, uuid: str, interface: InterfaceSpec, timeout: float, *, anew: bool = False
    ) -> None:
        if uuid not in self._domains:
            await self.behind.attach_interface(uuid, interface, timeout, anew=anew)

    async def detach_interface(self, uuid: str, backend: str, timeout: float) -> None:
        if uuid not in self._domains:
            await self.behind.detach_interface(uuid, backend, timeout)

    def _no_disks(self, uuid: str) -> bool:
        if uuid not in self._domains:
            return False
        raise HypervisorError(
            Failure.UNSUPPORTED, "a network qube that runs as a namespace has no disks"
        )

    async def attach_disk(self, uuid: str, disk: DiskSpec, timeout: float) -> None:
        if not self._no_disks(uuid):
            await self.behind.attach_disk(uuid, disk, timeout)

    async def detach_disk(self, uuid: str, disk: DiskSpec, timeout: float) -> None:
        if not self._no_disks(uuid):
            await self.behind.detach_disk(uuid, disk, timeout)

    async def resize_disk(self, uuid: str, target: str, size: int, timeout: float) -> None:
        # Its volumes may grow; there is nobody inside to be told.
        if uuid not in self._domains:
            await self.behind.resize_disk(uuid, target, size, timeout)

    async def set_maxmem(self, uuid: str, maxmem_mib: int, timeout: float) -> None:
        if uuid not in self._domains:
            await self.behind.set_maxmem(uuid, maxmem_mib, timeout)

    async def run_service(
        self, uuid: str, service: str, user: str, data: bytes, timeout: float
    ) -> tuple[int, bytes] | None:
        if uuid in self._domains:
            return None
        return await self.behind.run_service(uuid, service, user, data, timeout)

    async def wait_agent(self, uuid: str, timeout: float) -> bool | None:
        if uuid in self._domains:
            return None
        return await self.behind.wait_agent(uuid, timeout)
