"""Turns news from the hypervisor into STOPPED operations, and sweeps what is left over.

Owns the reaction to the stream. Must not execute operations. Invariant: every stop is
noticed, whether its event came, was lost, or happened while nobody was up; a sweep
reports and quarantines, it never deletes.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid

from bulkhead import codec
from bulkhead.api import domains_pb2, firewall_pb2, storage_pb2
from bulkhead.bus.client import CallContext
from bulkhead.bus.errors import BusError
from bulkhead.bus.events import Entry
from bulkhead.model.records import (
    DeviceFact,
    FactPut,
    FactRemoved,
    HostFact,
    OperationPut,
    OperationState,
    Phase,
    PoolPut,
    PoolRemoved,
    PowerFact,
    QubePut,
    fact_key,
)
from bulkhead.model.specs import APPLY_KEYS, ApplySpec, AttachSpec, StoppedSpec
from services.lifecycle.core import attaching, saga, stops
from services.lifecycle.core.guest_keys import shown_or_heard_by
from services.lifecycle.executor import Executor

log = logging.getLogger("bulkhead.lifecycle")

# How often qubes that nobody reported are asked for.
UNACCOUNTED_PERIOD_S = 2.0
RETRY_S = 0.2
IMPORT_LIMIT_S = 86400.0
IMPORT_CHECK_PERIOD_S = 60.0


class Watcher:
    """Subscribes to the stream of one executor."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._queue: asyncio.Queue[StoppedSpec | ApplySpec | AttachSpec] = asyncio.Queue()
        self._known: set[str] = set()
        self._devices: dict[str, str] = {}  # key of the fact: id of the device there
        self._pools_changed = asyncio.Event()
        self._look = asyncio.Event()

    def start(self) -> None:
        """Subscribe and look at everything once."""
        self.executor.replica.subscribe(self._entry)
        self._pools_changed.set()
        self._look.set()
        self._reconcile()

    # ---- stops

    def _entry(self, entry: Entry) -> None:
        if entry.resync:
            self._pools_changed.set()
            self._look.set()
            self._reconcile()
            return
        view = self.executor.replica.view
        # The first report of the hypervisor's service tells what is there, not what is new;
        # where it takes several messages, the last one brings the host.
        first = view.host is None or any(
            isinstance(change, FactPut) and isinstance(change.fact, HostFact)
            for change in entry.changes
        )
        for change in entry.changes:
            match change:
                case FactPut(PowerFact() as fact):
                    self._consider(stops.stopped(view.by_uuid_any(fact.uuid), fact))
                case FactPut(HostFact()):
                    self._look.set()
                case FactRemoved(key) if key.startswith("power/"):
                    self._look.set()
                case FactPut(DeviceFact() as device):
                    self._appeared(device, first)
                case FactRemoved(key):
                    self._devices.pop(key, None)
                case QubePut(qube):
                    self._consider(stops.stopped(qube, view.power(qube.uuid)))
                    if stops.silent(qube, view.power(qube.uuid)):
                        self._look.set()
                case PoolPut() | PoolRemoved():
                    self._pools_changed.set()
                case OperationPut(operation):
                    if operation.kind == "START" and operation.state is OperationState.SUCCEEDED:
                        self._reconnect(operation.subjects[0])
                        self._equip(operation.subjects[0])

    def _equip(self, uuid: str) -> None:
        """A qube that has started gets the devices that are to attach themselves."""
        view = self.executor.replica.view
        qube = view.by_uuid(uuid)
        if qube is not None and qube.run.phase is Phase.UP:
            for spec in attaching.at_start(view, qube):
                self._queue.put_nowait(spec)

    def _appeared(self, device: DeviceFact, first: bool) -> None:
        """A device that was not there before goes to the qube that is to have it."""
        key = fact_key(device)
        known, self._devices[key] = self._devices.get(key), device.device_id
        if first or known == device.device_id:
            return
        spec, claims = attaching.at_appearance(self.executor.replica.view, device)
        if spec is not None:
            self._queue.put_nowait(spec)
        elif claims:
            log.warning("%s is claimed by %s and goes to none", device.port, ", ".join(claims))

    def _reconcile(self) -> None:
        view = self.executor.replica.view
        # What is there already is not new: nobody gets back what its user detached.
        self._devices = {
            key: fact.device_id
            for key, fact in view.facts().items()
            if isinstance(fact, DeviceFact)
        }
        for qube in list(view.qubes_any()):
            self._consider(stops.stopped(qube, view.power(qube.uuid)))

    def _consider(self, spec: StoppedSpec | None) -> None:
        # Bounded by the number of qubes: one boot id is queued once.
        if spec is not None and spec.boot_id not in self._known:
            self._known.add(spec.boot_id)
            self._queue.put_nowait(spec)

    def _reconnect(self, provider_uuid: str) -> None:
        """Who is shown or heard by a guivm or audiovm that came back learns where it is now.

        Clients of a netvm are brought up to date by the end of its start itself.
        """
        view = self.executor.replica.view
        provider = view.by_uuid(provider_uuid)
        if provider is None:
            return
        for client in shown_or_heard_by(view, provider):
            spec = ApplySpec(client.uuid, client.run.boot_id, client.revision, (APPLY_KEYS,))
            self._queue.put_nowait(spec)

    async def run_stops(self) -> None:
        """Begin what was noticed: STOPPED, APPLY for who is shown or heard elsewhere, ATTACH."""
        while True:
            spec = await self._queue.get()
            # A new id each time: a stored refusal must not answer for a boot for ever. That a
            # boot has one STOPPED is the registry's work: a second joins it, or finds it over.
            context = CallContext(request_id=uuid.uuid4().bytes)
            while True:
                try:
                    await self.executor.begin(spec, context)
                    break
                except BusError as error:
                    if error.code not in saga.TRANSIENT:
                        subject = spec.qube if isinstance(spec, AttachSpec) else spec.uuid
                        log.info("nothing was begun for %s: %s", subject, error.message)
                        self._later(spec)
                        break
                    await asyncio.sleep(RETRY_S)
            if not isinstance(spec, AttachSpec):
                self._known.discard(spec.boot_id)

    def _later(self, spec: StoppedSpec | ApplySpec | AttachSpec) -> None:
        """A stop that was refused is looked at again: nobody else would report it."""
        if isinstance(spec, StoppedSpec):
            asyncio.get_running_loop().call_later(UNACCOUNTED_PERIOD_S, self._reconsider, spec.uuid)

    def _reconsider(self, subject: str) -> None:
        view = self.executor.replica.view
        self._consider(stops.stopped(view.by_uuid_any(subject), view.power(subject)))

    async def run_unaccounted(self) -> None:
        """Ask the hypervisor about qubes that should run and that nobody reported."""
        while True:
            await self._look.wait()
            self._look.clear()
            for qube in list(stops.unaccounted(self.executor.replica.view)):
                try:
                    reply = await self.executor.participants.domains.describe(
                        domains_pb2.DescribeDomainRequest(
                            boot=domains_pb2.BootRef(uuid=qube.uuid, boot_id=qube.run.boot_id)
                        ),
                        timeout=5.0,
                    )
                except BusError as error:
                    log.warning("%s cannot be looked up: %s", qube.name, error.message)
                    self._look.set()
                    continue
                if not reply.found:
                    self._consider(StoppedSpec(qube.uuid, qube.run.boot_id))
            await asyncio.sleep(UNACCOUNTED_PERIOD_S)

    # ---- pools

    async def run_pools(self) -> None:
        """Tell storage which pools there are, whenever that changes or storage restarts."""
        while True:
            await self._pools_changed.wait()
            self._pools_changed.clear()
            pools = [codec.pool_to_proto(p) for p in self.executor.replica.view.pools.values()]
            try:
                await self.executor.participants.storage.watch_pools(
                    storage_pb2.WatchPoolsRequest(pools=pools), timeout=10.0
                )
            except BusError as error:
                log.warning("storage was not told of the pools: %s", error.message)
                await asyncio.sleep(0.5)
                self._pools_changed.set()

    # ---- imports

    async def run_imports(self) -> None:
        """Discard imports whose writer has been silent for a day: they hold their volume."""
        while True:
            await asyncio.sleep(IMPORT_CHECK_PERIOD_S)
            for operation in list(self.executor.replica.view.operations.values()):
                if (
                    operation.state is OperationState.WAITING_DATA
                    and time.time() - operation.created > IMPORT_LIMIT_S
                ):
                    self.executor.abandon(operation)

    # ---- sweep

    async def sweep(self) -> list[str]:
        """Compare inventories with the records; findings as sentences."""
        view = self.executor.replica.view
        findings: list[str] = []
        pools = list(view.pools.values())
        inventory = await self.executor.participants.storage.inventory(
            storage_pb2.InventoryRequest(pools=[codec.pool_to_proto(p) for p in pools]),
            timeout=60.0,
        )
        strangers: dict[str, list[storage_pb2.InventoryItem]] = {}
        for item in inventory.items:
            owner = view.by_uuid_any(item.owner) if item.owner else None
            if owner is None and view.vid_owner(item.pool, item.vid) is None:
                strangers.setdefault(item.pool, []).append(item)
        for pool, items in strangers.items():
            reply = await self.executor.participants.storage.quarantine(
                storage_pb2.QuarantineRequest(
                    pool=codec.pool_to_proto(view.pools[pool]), items=items
                ),
                timeout=60.0,
            )
            findings.extend(reply.findings)
        domains = await self.executor.participants.domains.inventory(
            domains_pb2.InventoryDomainsRequest(), timeout=30.0
        )
        for state in domains.domains:
            qube = view.by_uuid_any(state.power.uuid)
            if qube is None or qube.run.boot_id != state.power.boot_id:
                findings.append(
                    f"domain {state.power.uuid} (boot {state.power.boot_id or 'unknown'}) runs and "
                    "is no boot that the registry knows; stop it with the hypervisor's own tool"
                )
        rules = await self.executor.participants.firewall.inventory(
            firewall_pb2.FirewallInventoryRequest(), timeout=30.0
        )
        for rule in rules.items:
            qube = view.by_uuid_any(rule.uuid)
            if qube is None:
                findings.append(f"firewall rules of {rule.uuid} belong to no qube")
            elif rule.chain and rule.boot_id != qube.run.boot_id:
                findings.append(f"rules of an ended boot of {qube.name} are still in force")
        self._look.set()
        return findings
