"""The simulated host: its domains, what they do at a call, what a test makes of them.

Owns all simulated state, in memory. Must not know sockets, clocks or the service that
calls it: the clock and the news are callbacks. Invariant: a uuid has at most one
domain; memory of domains never exceeds the host's.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

CPUS = 4
MEMORY_MIB = 16384
DOM0_MAXMEM_MIB = 4096
SERVICES_KEPT = 256
# What a guest uses of its time: next to nothing, as an idle one.
CPU_SHARE = 0.01
HOST_UUID = "00000000-0000-0000-0000-000000000000"


class SimError(Exception):
    """A call is refused; kind is a word of adapters.hypervisor.Failure."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


@dataclass(slots=True)
class GuestNature:
    """How the guests of one qube (or all) behave.

    agent: "absent" (there is no agent), "connect" (as soon as it runs), "never" (is
    waited for in vain) or "wait" (until a test connects it). shutdown: "obey" or
    "ignore". pm_suspend: "obey" or "unsupported". service_exit and service_output are
    what a service run in the guest answers.
    """

    agent: str = "absent"
    shutdown: str = "obey"
    pm_suspend: str = "obey"
    service_exit: int = 0
    service_output: str = ""


@dataclass(slots=True)
class SimDomain:
    """One simulated domain. memory in MiB, power a word of core.power."""

    uuid: str
    name: str
    boot_id: str
    epoch: int
    xid: int
    memory: int
    maxmem: int
    vcpus: int
    start_time: float
    console: str
    power: str = "paused"
    agent: bool = False
    stubdom_xid: int = -1
    cpu_ns: int = 0
    ran_since: float | None = None
    disks: dict[str, dict[str, Any]] = field(default_factory=dict)
    interfaces: dict[str, dict[str, Any]] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    services: collections.deque[dict[str, str]] = field(
        default_factory=lambda: collections.deque(maxlen=SERVICES_KEPT)
    )


class Machine:
    """The host. Methods are calls by name; each returns a JSON value or raises SimError."""

    def __init__(self, notify: Callable[[dict[str, Any]], None], now: Callable[[], float]) -> None:
        self._notify = notify
        self._now = now
        self._domains: dict[str, SimDomain] = {}
        self._natures: dict[str, GuestNature] = {}
        self._devices: dict[str, list[dict[str, Any]]] = {}
        self._next_xid = 1

    # ---- the host

    def host(self) -> dict[str, Any]:
        used = sum(domain.memory for domain in self._domains.values())
        return {
            "memory_kib": MEMORY_MIB * 1024,
            "cpus": CPUS,
            "dom0_maxmem_mib": DOM0_MAXMEM_MIB,
            "free_kib": (MEMORY_MIB - used) * 1024,
        }

    def admin_usage(self) -> dict[str, Any]:
        """dom0 has all its memory, and does nothing."""
        memory = DOM0_MAXMEM_MIB * 1024
        return {"memory_kib": memory, "memory_max_kib": memory, "cpu_time_ns": 0, "vcpus": CPUS}

    def existing(self) -> list[str]:
        return sorted(self._domains)

    def inventory(self) -> list[dict[str, Any]]:
        return [self._shown(domain) for domain in self._domains.values()]

    def describe(self, uuid: str) -> dict[str, Any] | None:
        domain = self._domains.get(uuid)
        return None if domain is None else self._shown(domain)

    def devices(self) -> list[dict[str, Any]]:
        """What the host and running backends offer, as rows of set_devices."""
        return [
            {"backend_uuid": backend, **row}
            for backend, rows in self._devices.items()
            if backend == HOST_UUID or backend in self._domains
            for row in rows
        ]

    # ---- the life of a domain

    def create_paused(self, spec: dict[str, Any]) -> dict[str, Any]:
        uuid = str(spec["uuid"])
        present = self._domains.get(uuid)
        if present is not None:
            raise SimError("exists", f"domain {present.name} exists with boot {present.boot_id}")
        twin = next((d for d in self._domains.values() if d.name == spec["name"]), None)
        if twin is not None:
            raise SimError("exists", f"domain name {twin.name} is in use by {twin.uuid}")
        memory = int(spec["memory_mib"])
        free = MEMORY_MIB - sum(domain.memory for domain in self._domains.values())
        if memory > free:
            raise SimError("no-memory", f"{memory} MiB are needed and {free} MiB are free")
        xid = self._next_xid
        self._next_xid += 1
        stubdom_xid = -1
        if spec["virt_mode"] == "hvm":
            stubdom_xid = self._next_xid
            self._next_xid += 1
        domain = SimDomain(
            uuid=uuid,
            name=str(spec["name"]),
            boot_id=str(spec["boot_id"]),
            epoch=int(spec["epoch"]),
            xid=xid,
            stubdom_xid=stubdom_xid,
            memory=memory,
            maxmem=int(spec["maxmem_mib"]),
            vcpus=int(spec["vcpus"]),
            start_time=self._now(),
            console=str(spec["console_log"]),  # no log: a simulated guest has no tty
            disks={disk["target"]: dict(disk) for disk in spec["disks"]},
            interfaces=self._plugged(spec["interfaces"]),
            spec=spec,
        )
        self._domains[uuid] = domain
        self._changed(domain)
        return self._shown(domain)

    def resume(self, uuid: str) -> None:
        domain = self._need(uuid)
        if domain.power == "running":
            return
        if domain.power != "paused":
            raise SimError("wrong-state", f"domain {domain.name} is {domain.power}")
        domain.power = "running"
        domain.ran_since = self._now()
        if self.nature(domain).agent == "connect":
            domain.agent = True
        self._changed(domain)

    def pause(self, uuid: str) -> None:
        domain = self._need(uuid)
        if domain.power == "paused":
            return
        if domain.power != "running":
            raise SimError("wrong-state", f"domain {domain.name} is {domain.power}")
        self._stop_clock(domain)
        domain.power = "paused"
        self._changed(domain)

    def pm_suspend(self, uuid: str) -> None:
        domain = self._need(uuid)
        if self.nature(domain).pm_suspend != "obey":
            raise SimError("unsupported", f"domain {domain.name} cannot suspend by itself")
        if domain.power == "pmsuspended":
            return
        if domain.power != "running":
            raise SimError("wrong-state", f"domain {domain.name} is {domain.power}")
        self._stop_clock(domain)
        domain.power = "pmsuspended"
        self._changed(domain)

    def wake(self, uuid: str) -> None:
        domain = self._need(uuid)
        if domain.power == "running":
            return
        if domain.power != "pmsuspended":
            raise SimError("wrong-state", f"domain {domain.name} is {domain.power}")
        domain.power = "running"
        domain.ran_since = self._now()
        self._changed(domain)

    def shutdown(self, uuid: str) -> None:
        domain = self._need(uuid)
        awake = domain.power in ("running", "pmsuspended")  # who sleeps wakes up for it
        if awake and self.nature(domain).shutdown == "obey":
            self._end(domain, "shutdown")

    def destroy(self, uuid: str, boot_id: str) -> bool:
        domain = self._domains.get(uuid)
        if domain is None or (boot_id and domain.boot_id != boot_id):
            return False
        self._end(domain, "destroyed")
        return True

    def undefine(self, uuid: str) -> None:
        """Simulated domains are transient: there is nothing to forget."""

    # ---- devices and memory

    def attach_disk(self, uuid: str, disk: dict[str, Any]) -> None:
        domain = self._need(uuid)
        present = domain.disks.get(disk["target"])
        if present is not None:
            if present["path"] == disk["path"]:
                return
            raise SimError("exists", f"target {disk['target']} of {domain.name} is in use")
        domain.disks[disk["target"]] = dict(disk)

    def detach_disk(self, uuid: str, disk: dict[str, Any]) -> None:
        self._need(uuid).disks.pop(disk["target"], None)

    def resize_disk(self, uuid: str, target: str, size: int) -> None:
        domain = self._need(uuid)
        disk = domain.disks.get(target)
        if disk is None:
            raise SimError("invalid", f"domain {domain.name} has no disk {target}")
        disk["size"] = size

    def attach_interface(self, uuid: str, interface: dict[str, Any], anew: bool = False) -> None:
        domain = self._need(uuid)
        present = domain.interfaces.get(interface["mac"].lower())
        if (
            not anew
            and present is not None
            and len(domain.interfaces) == 1
            and all(present[key] == interface[key] for key in ("backend", "ip", "ip6"))
        ):
            return
        domain.interfaces = self._plugged([interface])

    def detach_interface(self, uuid: str, backend: str) -> None:
        domain = self._need(uuid)
        domain.interfaces = {
            mac: nic
            for mac, nic in domain.interfaces.items()
            if backend and nic["backend"] != backend
        }

    def _plugged(self, interfaces: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """By MAC; each with the boot of its backend that it is plugged into."""
        return {
            nic["mac"].lower(): {**nic, "backend_boot": self.boot_of(nic["backend_uuid"])}
            for nic in interfaces
        }

    def set_maxmem(self, uuid: str, maxmem_mib: int) -> None:
        self._need(uuid).maxmem = maxmem_mib

    def run_service(
        self,
        uuid: str,
        service: str,
        user: str,
        data: str,
    ) -> dict[str, Any] | None:
        domain = self._need(uuid)
        nature = self.nature(domain)
        if nature.agent == "absent" and not domain.agent:
            return None
        if not domain.agent or domain.power != "running":
            raise SimError("wrong-state", f"the agent of {domain.name} is not connected")
        domain.services.append({"service": service, "user": user, "data": data})
        return {"exit_code": nature.service_exit, "output": nature.service_output}

    def agent(self, uuid: str) -> bool | None:
        """True connected, False to be waited for, None when there never will be one."""
        domain = self._need(uuid)
        if domain.agent:
            return True
        return None if self.nature(domain).agent == "absent" else False

    # ---- what a test does to guests

    def set_nature(self, qube: str, nature: dict[str, Any]) -> None:
        """Behaviour of the qube with that uuid or name; "*" = every other."""
        self._natures[qube] = GuestNature(**nature)

    def guest_stop(self, uuid: str, reason: str) -> None:
        """The guest powers off ("shutdown"), crashes ("crashed") or its process dies ("failed")."""
        self._end(self._need(uuid), reason)

    def guest_agent(self, uuid: str, connected: bool) -> None:
        domain = self._need(uuid)
        domain.agent = connected
        self._changed(domain)

    def set_devices(self, backend: str, devices: list[dict[str, Any]]) -> None:
        """All that the backend (uuid) offers: rows {devclass, port, device_id, fields, ...}."""
        self._devices[backend] = devices
        self._notify({"news": "devices", "uuid": backend, "boot_id": ""})

    def guest(self, uuid: str) -> dict[str, Any]:
        """All that is known of the domain, its spec and devices too."""
        domain = self._need(uuid)
        return {
            **self._shown(domain),
            "spec": domain.spec,
            "interfaces": domain.interfaces,
            "services": list(domain.services),
        }

    def reset(self) -> None:
        """End every domain, as a reboot of the host does."""
        for domain in list(self._domains.values()):
            self._end(domain, "failed")
        self._natures.clear()
        self._devices.clear()
        self._notify({"news": "devices", "uuid": HOST_UUID, "boot_id": ""})

    # ---- inside

    def nature(self, domain: SimDomain) -> GuestNature:
        """By uuid, then by name, then "*"."""
        for key in (domain.uuid, domain.name, "*"):
            if key in self._natures:
                return self._natures[key]
        return GuestNature()

    def name_of(self, uuid: str) -> str:
        """The name of the qube with that uuid, "" when it has no domain."""
        domain = self._domains.get(uuid)
        return "" if domain is None else domain.name

    def boot_of(self, uuid: str) -> str:
        """The boot id of the uuid's domain, "" when it has none."""
        domain = self._domains.get(uuid)
        return "" if domain is None else domain.boot_id

    def _need(self, uuid: str) -> SimDomain:
        domain = self._domains.get(uuid)
        if domain is None:
            raise SimError("not-found", f"there is no domain of {uuid}")
        return domain

    def _stop_clock(self, domain: SimDomain) -> None:
        if domain.ran_since is not None:
            domain.cpu_ns += self._used_ns(domain)
            domain.ran_since = None

    def _used_ns(self, domain: SimDomain) -> int:
        """Processor time since it began to run."""
        if domain.ran_since is None:
            return 0
        return int(max(0.0, self._now() - domain.ran_since) * CPU_SHARE * 1e9)

    def _shown(self, domain: SimDomain) -> dict[str, Any]:
        return {
            "uuid": domain.uuid,
            "name": domain.name,
            "boot_id": domain.boot_id,
            "epoch": domain.epoch,
            "power": domain.power,
            "xid": domain.xid,
            "stubdom_xid": domain.stubdom_xid,
            "start_time": domain.start_time,
            "agent": domain.agent,
            "console": domain.console,
            "memory_kib": domain.memory * 1024,
            "memory_max_kib": max(domain.maxmem, domain.memory) * 1024,
            "cpu_time_ns": domain.cpu_ns + self._used_ns(domain),
            "vcpus": domain.vcpus,
            "disks": list(domain.disks.values()),
            "hostdevs": domain.spec["hostdevs"],
        }

    def _changed(self, domain: SimDomain) -> None:
        self._notify({"news": "changed", "uuid": domain.uuid, "boot_id": domain.boot_id})

    def _end(self, domain: SimDomain, reason: str) -> None:
        del self._domains[domain.uuid]
        self._notify(
            {
                "news": "stopped",
                "uuid": domain.uuid,
                "boot_id": domain.boot_id,
                "reason": reason,
            }
        )


# The calls that domains makes; a fault can be put on each.
CALLS: tuple[str, ...] = (
    "admin_usage",
    "existing",
    "host",
    "devices",
    "inventory",
    "describe",
    "create_paused",
    "resume",
    "pause",
    "pm_suspend",
    "wake",
    "shutdown",
    "destroy",
    "undefine",
    "attach_disk",
    "detach_disk",
    "resize_disk",
    "attach_interface",
    "detach_interface",
    "set_maxmem",
    "run_service",
    "agent",
)
# What only a test asks.
CONTROLS: tuple[str, ...] = (
    "set_nature",
    "set_devices",
    "guest_stop",
    "guest_agent",
    "guest",
    "reset",
)
