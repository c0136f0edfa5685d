"""Tells the registry what is: host, power and devices, in order and completely.

Owns the queue of facts not yet told and the table of all that hold. Must not know
hypervisors. Invariant: the registry's picture becomes ours again after any loss; a
report is never overtaken by an earlier one of the same boot.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from bulkhead import failpoints
from bulkhead.bus.errors import BusError
from bulkhead.model.records import Fact, HostFact, PowerFact, fact_key

from .core.power import HALTED

QUEUE = 10_000
BATCH = 256
HALTED_KEPT = 4096
RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0)
HEARTBEAT_S = 1.0


class RegistryLink(Protocol):
    """The registry, as far as facts go. All raise BusError."""

    async def facts(self, put: list[Fact], removed: list[str], complete: bool) -> None:
        """Put and remove facts; complete: whatever else is ours is dropped first."""

    async def instance(self) -> str:
        """Which run of the registry answers: another text after each restart."""

    async def epoch(self) -> int:
        """lifecycle's newest epoch."""


@dataclass(frozen=True, slots=True)
class _Removed:
    key: str


class Reporter:
    """Sends facts; run() is its one task."""

    def __init__(
        self, link: RegistryLink, learn_epoch: Callable[[int], None], log: logging.Logger
    ) -> None:
        self._link = link
        self._learn_epoch = learn_epoch
        self._log = log
        self._table: dict[str, Fact] = {}
        self._queue: collections.deque[Fact | _Removed] = collections.deque()
        self._complete = True
        self._first = True  # nothing was told to this run of the registry
        self._instance = ""
        self._news = asyncio.Event()
        self._told = asyncio.Condition()
        self._held = True
        self._sending = False
        # The last try to tell the registry succeeded.
        self.reachable = False
        self.counters: dict[str, int] = {"facts_sent": 0, "facts_complete": 0}

    # ---- what is

    def put(self, facts: Iterable[Fact]) -> None:
        """These hold now; told in the order of the calls."""
        for fact in facts:
            key = fact_key(fact)
            if self._table.get(key) == fact:
                continue
            self._table.pop(key, None)
            self._table[key] = fact
            self._enqueue(fact)
        self._forget_old_ends()

    def remove(self, keys: Iterable[str]) -> None:
        """These hold no more; unknown keys are ignored."""
        for key in keys:
            if self._table.pop(key, None) is not None:
                self._enqueue(_Removed(key))

    def table(self) -> dict[str, Fact]:
        """All facts that hold, by key."""
        return dict(self._table)

    def release(self) -> None:
        """The first inventory is in: from now on a complete picture may be told."""
        self._held = False
        self._news.set()

    def _enqueue(self, item: Fact | _Removed) -> None:
        if len(self._queue) >= QUEUE:
            self._complete = True
        if self._complete:
            self._queue.clear()
        else:
            self._queue.append(item)
        self._news.set()

    def _forget_old_ends(self) -> None:
        ends = [
            key
            for key, fact in self._table.items()
            if isinstance(fact, PowerFact) and fact.power == HALTED
        ]
        for key in ends[: max(0, len(ends) - HALTED_KEPT)]:
            del self._table[key]

    # ---- telling

    async def flushed(self, timeout: float) -> None:
        """Wait until the registry knows all. TimeoutError when it does not in time."""
        async with asyncio.timeout(timeout), self._told:
            await self._told.wait_for(
                lambda: not (self._queue or self._sending or self._complete or self._held)
            )

    async def run(self) -> None:
        """Tell until cancelled; survives every failure of the registry."""
        failures = 0
        while True:
            try:
                await self._beat()
                await self._tell()
                failures = 0
                self.reachable = True
            except BusError as error:
                self.reachable = False
                if failures == 0:
                    self._log.warning("the registry was not told: %s", error)
                await asyncio.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])
                failures += 1
                continue
            async with self._told:
                self._told.notify_all()
            self._news.clear()
            if self._queue or (self._complete and not self._held):
                continue
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._news.wait()
                self._beat_due = False
            except TimeoutError:
                self._beat_due = True

    _beat_due = True

    async def _beat(self) -> None:
        """Notice another run of the registry: then the epoch and everything is new to it."""
        if not self._beat_due and self._instance:
            return
        instance = await self._link.instance()
        if instance == self._instance:
            return
        self._learn_epoch(await self._link.epoch())
        self._complete = self._first = True
        self._queue.clear()
        self._instance = instance

    async def _tell(self) -> None:
        if self._held:
            return
        if self._complete:
            facts = list(self._table.values())
            if self._first:
                # Who sees the host takes it that all the rest is known too.
                facts.sort(key=lambda fact: isinstance(fact, HostFact))
            self._queue.clear()
            self._complete = False
            try:
                await self._send(facts[:BATCH], [], True)
                for start in range(BATCH, len(facts), BATCH):
                    await self._send(facts[start : start + BATCH], [], False)
            except BaseException:
                self._complete = True
                raise
            self._first = False
            self.counters["facts_complete"] += 1
            return
        while self._queue:
            # One message holds puts and removals without an order: stop at a change of kind.
            items: list[Fact | _Removed] = [self._queue.popleft()]
            removing = isinstance(items[0], _Removed)
            while (
                self._queue
                and len(items) < BATCH
                and isinstance(self._queue[0], _Removed) is removing
            ):
                items.append(self._queue.popleft())
            put = [item for item in items if not isinstance(item, _Removed)]
            removed = [item.key for item in items if isinstance(item, _Removed)]
            try:
                await self._send(put, removed, False)
            except BaseException:
                self._queue.extendleft(reversed(items))
                raise

    async def _send(self, put: list[Fact], removed: list[str], complete: bool) -> None:
        failpoints.hit("domains.facts.before")
        self._sending = True
        try:
            await self._link.facts(put, removed, complete)
        except BusError:
            self._beat_due = True
            raise
        finally:
            self._sending = False
        failpoints.hit("domains.facts.after")
        self.counters["facts_sent"] += len(put) + len(removed)
