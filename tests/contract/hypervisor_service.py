"""The domains service in this process, on any hypervisor, with a registry that listens.

Owns the wiring for tests. Must not hold any expectation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from bulkhead.api import domains_pb2
from bulkhead.bus.deadline import Deadline
from bulkhead.bus.dispatch import Call
from bulkhead.model.epoch import EpochGuard
from bulkhead.model.records import Fact, HostFact, PowerFact, fact_key
from services.domains.adapters.guest_daemons import GuestDaemons, Programs
from services.domains.adapters.guest_keys import FileKeys
from services.domains.adapters.hypervisor import HostInfo, Hypervisor
from services.domains.adapters.qmemman import MemoryManager
from services.domains.core.reasons import DomainsError
from services.domains.core.spec import DomainSpec
from services.domains.core.xml import Flavour
from services.domains.handlers import DomainsHandlers
from services.domains.reporter import Reporter

from .hypervisor_benches import until

NOTHING = Programs(*(Path("/nonexistent") / name for name in "abcd"))


@dataclass
class Listener:
    """The registry: what it was told, and when."""

    held: dict[str, Fact] = field(default_factory=dict)
    told: list[tuple[float, Fact]] = field(default_factory=list)
    complete: int = 0

    async def facts(self, put: list[Fact], removed: list[str], complete: bool) -> None:
        if complete:
            self.complete += 1
            self.held.clear()
        for key in removed:
            self.held.pop(key, None)
        for fact in put:
            self.held[fact_key(fact)] = fact
            self.told.append((time.monotonic(), fact))

    async def instance(self) -> str:
        return "one"

    async def epoch(self) -> int:
        return 5

    def powers(self, uuid: str) -> list[PowerFact]:
        """All reports on the qube, in order."""
        return [f for _, f in self.told if isinstance(f, PowerFact) and f.uuid == uuid]

    def power(self, uuid: str) -> str:
        """The last power word, "" when nothing was said."""
        powers = self.powers(uuid)
        return powers[-1].power if powers else ""

    def host(self) -> HostFact | None:
        fact = self.held.get("host")
        return fact if isinstance(fact, HostFact) else None


@dataclass
class Service:
    """Handlers with what they talk to."""

    handlers: DomainsHandlers
    listener: Listener
    reporter: Reporter
    keys: Path

    async def said(self, uuid: str, power: str, seconds: float = 5.0) -> None:
        """Wait until the registry was told that power of the qube."""
        await until(lambda: self.listener.power(uuid) == power, seconds, f"{uuid} {power}")


def call(seconds: float = 30.0, epoch: int = 5, caller: str = "lifecycle") -> Call:
    """A call as lifecycle makes it."""
    return Call(caller, epoch=epoch, deadline=Deadline.after(seconds))


def boot(spec: DomainSpec) -> domains_pb2.BootRef:
    """The boot of a spec."""
    return domains_pb2.BootRef(uuid=spec.uuid, boot_id=spec.boot_id)


def message(spec: DomainSpec) -> domains_pb2.CreatePausedRequest:
    """The request that makes the spec's domain."""
    request = domains_pb2.CreatePausedRequest()
    target = request.spec
    for name in ("uuid", "name", "boot_id", "epoch", "virt_mode", "memory_mib", "maxmem_mib",
                 "vcpus", "kernel", "initramfs", "cmdline", "console_log"):  # fmt: skip
        setattr(target, name, getattr(spec, name))
    for disk in spec.disks:
        target.disks.add(
            target=disk.target, path=disk.path, rw=disk.rw, serial=disk.serial, block=disk.block
        )
    for nic in spec.interfaces:
        target.interfaces.add(mac=nic.mac, ip=nic.ip, tap=nic.tap)
    return request


@contextlib.asynccontextmanager
async def service(
    connect: Callable[[], Hypervisor],
    directory: Path,
    *,
    manager: MemoryManager | None = None,
    network: bool = True,
    uri: str = "sim:",
    wait: bool = True,
) -> AsyncIterator[Service]:
    """The service, told complete once; domains outlive it."""
    guard = EpochGuard("domains", DomainsError)
    listener = Listener()
    log = logging.getLogger("test")
    reporter = Reporter(listener, guard.learn, log)
    keys = directory / "guest-keys"

    def flavour(_: HostInfo | None) -> Flavour:
        return Flavour("xen", qubes=True)

    handlers = DomainsHandlers(
        connect(),
        FileKeys(keys),
        GuestDaemons(NOTHING),
        manager or MemoryManager(directory / "no.sock"),
        reporter,
        guard,
        flavour=flavour,
        uri=uri,
        network=network,
        log=log,
    )
    await handlers.start()
    telling = asyncio.ensure_future(reporter.run())
    try:
        if wait:
            await until(lambda: listener.complete > 0, 30, "the first complete picture")
        yield Service(handlers, listener, reporter, keys)
    finally:
        telling.cancel()
        await handlers.stop()
