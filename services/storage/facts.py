"""Tells the registry which pools and kernels there are, and learns the epoch from it.

Owns the list of watched pools (kept in the run directory over a restart of ours), the
probes, and the last facts told. Must not know drivers' steps. Invariants: the registry's
picture is complete again after any restart of either side; a pool that does not answer
is reported unusable and delays no other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bulkhead import codec, durable
from bulkhead.api import control_pb2, registry_pb2
from bulkhead.bus.client import Channel
from bulkhead.bus.errors import BusError
from bulkhead.model.records import Fact, KernelFact, Pool, PoolFact, fact_key
from clients.bus import ControlClient, RegistryClient
from services.storage import messages
from services.storage.core.places import containing
from services.storage.core.reasons import StorageRefusal
from services.storage.core.states import PoolUsage
from services.storage.drivers.load import open_pool
from services.storage.workers import Workers

_LOG = logging.getLogger("bulkhead.storage")

TICK_S = 2.0
COMPLETE_S = 30.0
PROBE_S = 5.0
RETRY_S = 0.5
# A change of a pool's usage below this part of its size waits for the next full report.
USAGE_STEP = 0.01
CALL_S = 5.0
# Two readings of one process's start differ by less. A wrong guess only repeats a report.
_SAME_START_S = 0.05


class RegistryLink(Protocol):
    """The registry as far as facts go. All raise BusError."""

    async def facts(self, put: Sequence[Fact], removed: Sequence[str], complete: bool) -> None:
        """Put and remove; complete: the registry drops what is not in put."""

    async def instance(self) -> int:
        """Another number after each restart of the registry."""

    async def epoch(self) -> int:
        """lifecycle's newest epoch."""


class BusRegistryLink:
    """RegistryLink over a channel."""

    def __init__(self, channel: Channel) -> None:
        self._registry = RegistryClient(channel)
        self._control = ControlClient(channel)
        self._pid = 0
        self._started = 0.0
        self._runs = 0

    async def facts(self, put: Sequence[Fact], removed: Sequence[str], complete: bool) -> None:
        """Registry.Facts."""
        await self._registry.facts(
            registry_pb2.FactsRequest(
                put=[codec.fact_to_proto(fact, fact_key(fact)) for fact in put],
                removed=removed,
                complete=complete,
            ),
            timeout=CALL_S,
        )

    async def instance(self) -> int:
        """Told apart by process id and by when it started."""
        health = await self._control.health(control_pb2.HealthRequest(), timeout=2.0)
        started = asyncio.get_running_loop().time() - health.uptime_s
        if health.pid != self._pid or abs(started - self._started) > _SAME_START_S:
            self._runs += 1
        self._pid, self._started = health.pid, started
        return self._runs

    async def epoch(self) -> int:
        """Registry.GetEpoch."""
        reply = await self._registry.get_epoch(registry_pb2.GetEpochRequest(), timeout=CALL_S)
        return reply.epoch


@dataclass(frozen=True, slots=True)
class _Probe:
    place: Path | None
    usage: PoolUsage
    kernels: tuple[KernelFact, ...]


def _probe(pool: Pool) -> _Probe:
    driver = open_pool(pool)
    driver.check()
    place = driver.location()
    return _Probe(
        Path(os.path.realpath(place)) if place is not None else None,
        driver.usage(),
        tuple(messages.kernel_fact(pool.name, kernel) for kernel in driver.kernels()),
    )


class PoolWatch:
    """run() is its one task."""

    def __init__(
        self,
        link: RegistryLink,
        workers: Workers,
        store: Path,
        learn_epoch: Callable[[int], None],
    ) -> None:
        self._link = link
        self._workers = workers
        self._store = store
        self._learn_epoch = learn_epoch
        self._pools: dict[str, Pool] | None = self._load()
        self._places: dict[str, Path | None] = {}
        self._told: dict[str, Fact] = {}
        self._probes: dict[str, asyncio.Task[_Probe]] = {}
        self._instance: int | None = None
        self._complete_at = 0.0
        self._again = asyncio.Event()
        self._askers: list[asyncio.Future[None]] = []
        self.counters: dict[str, int] = {"facts_sent": 0, "facts_complete": 0}

    # ---- which pools

    def _load(self) -> dict[str, Pool] | None:
        try:
            found = json.loads(self._store.read_text())
            return {
                str(row["name"]): Pool(str(row["name"]), str(row["driver"]), dict(row["options"]))
                for row in found
            }
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _LOG.warning(
                "%s is unusable, lifecycle will send the pools again: %s", self._store, error
            )
            return None

    @property
    def pools(self) -> list[Pool]:
        """The pools that lifecycle named last."""
        return list((self._pools or {}).values())

    def places(self) -> dict[str, Path | None]:
        """Resolved directories of the watched pools that answered."""
        return dict(self._places)

    def save(self, pools: Sequence[Pool]) -> None:
        """Remember the pools over a restart of this process. Blocking; OSError."""
        rows = [{"name": p.name, "driver": p.driver, "options": dict(p.options)} for p in pools]
        durable.write_file(self._store, json.dumps(rows).encode())

    def watch(self, pools: Sequence[Pool]) -> None:
        """From now on these, told at once."""
        self._pools = {pool.name: pool for pool in pools}
        self._complete_at = 0.0
        self._again.set()

    def look_again(self) -> None:
        """Something in a pool has changed."""
        self._again.set()

    async def told(self, timeout: float) -> None:
        """Look again; return when the registry knows what was seen. TimeoutError."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._askers.append(future)
        self._again.set()
        async with asyncio.timeout(timeout):
            await future

    # ---- telling

    async def run(self) -> None:
        """Probe and tell until cancelled; survives every failure of the registry."""
        warned = False
        while True:
            self._again.clear()
            askers, self._askers = self._askers, []
            try:
                await self._round()
                warned = False
                pause = TICK_S
                for asker in askers:
                    if not asker.done():
                        asker.set_result(None)
            except BusError as error:
                if not warned:
                    _LOG.warning("the registry was not told of the pools: %s", error)
                warned = True
                self._complete_at = 0.0
                self._askers = [a for a in askers if not a.done()] + self._askers
                pause = RETRY_S
            try:
                async with asyncio.timeout(pause):
                    await self._again.wait()
            except TimeoutError:
                pass

    async def _round(self) -> None:
        instance = await self._link.instance()
        if instance != self._instance:
            self._learn_epoch(await self._link.epoch())
            self._instance = instance
            self._complete_at = 0.0
        if self._pools is None:
            return  # not told yet: an empty complete report would be a lie
        facts = await self._look()
        now = asyncio.get_running_loop().time()
        if now >= self._complete_at:
            await self._link.facts(list(facts.values()), [], True)
            self._told = facts
            self._complete_at = now + COMPLETE_S
            self.counters["facts_complete"] += 1
            self.counters["facts_sent"] += len(facts)
            return
        put = [fact for key, fact in facts.items() if _differs(self._told.get(key), fact)]
        removed = [key for key in self._told if key not in facts]
        if put or removed:
            await self._link.facts(put, removed, False)
            self._told = {key: fact for key, fact in self._told.items() if key in facts}
            self._told.update({fact_key(fact): fact for fact in put})
            self.counters["facts_sent"] += len(put) + len(removed)

    async def _look(self) -> dict[str, Fact]:
        pools = self.pools
        outcomes = await asyncio.gather(*(self._ask(pool) for pool in pools))
        self._places = {
            pool.name: outcome.place
            for pool, outcome in zip(pools, outcomes, strict=True)
            if isinstance(outcome, _Probe)
        }
        facts: dict[str, Fact] = {}
        for pool, outcome in zip(pools, outcomes, strict=True):
            found: list[Fact] = []
            if isinstance(outcome, str):
                found.append(PoolFact(pool.name, usable=False, problem=outcome))
            else:
                found.append(
                    PoolFact(
                        pool.name,
                        size=outcome.usage.size,
                        usage=outcome.usage.usage,
                        usage_details=dict(outcome.usage.details),
                        included_in=containing(pool.name, self._places),
                    )
                )
                found.extend(outcome.kernels)
            for fact in found:
                facts.setdefault(fact_key(fact), fact)
        return facts

    async def _ask(self, pool: Pool) -> _Probe | str:
        """What the pool is, or why it cannot be used. At most one probe per pool runs."""
        task = self._probes.get(pool.name)
        if task is None:
            task = asyncio.get_running_loop().create_task(
                self._workers.run(f"probe of {pool.name}", lambda: _probe(pool), threads=1)
            )
            self._probes[pool.name] = task
        done, _ = await asyncio.wait({task}, timeout=PROBE_S)
        if not done:
            return f"pool {pool.name} has not answered for {PROBE_S:.0f} s"
        del self._probes[pool.name]
        try:
            return task.result()
        except StorageRefusal as refusal:
            return refusal.message
        except OSError as error:
            return f"pool {pool.name} cannot be used: {error.strerror or error}"

    async def close(self) -> None:
        """Let go of probes that still run."""
        for task in self._probes.values():
            task.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)


def _differs(old: Fact | None, new: Fact) -> bool:
    """False also where only the usage moved a little."""
    if old == new:
        return False
    if (
        isinstance(old, PoolFact)
        and isinstance(new, PoolFact)
        and old.size == new.size
        and old.size
        and old.usage is not None
        and new.usage is not None
        and (old.usable, old.problem, old.included_in) == (new.usable, new.problem, new.included_in)
    ):
        return abs(old.usage - new.usage) >= USAGE_STEP * old.size
    return True
