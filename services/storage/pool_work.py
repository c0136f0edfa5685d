"""What calls about whole pools do with them.

Owns what is read of a pool, and clearing up in it. Must not know messages, nor how a pool
keeps its data. Invariants: reading waits for nobody who works in the pool; nothing that
somebody works on is cleared away, and nothing that a record may know is deleted.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bulkhead.bus.dispatch import Call
from bulkhead.model.records import Pool, PoolFact
from services.storage.core.places import containing
from services.storage.core.reasons import StorageRefusal, from_os_error
from services.storage.core.states import Found
from services.storage.drivers.interface import Cancel, Driver
from services.storage.drivers.load import open_pool
from services.storage.jobs import Jobs

_LOG = logging.getLogger("bulkhead.storage")


class PoolWork:
    """Steps on pools."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    async def describe(
        self, call: Call, pool: Pool, others: Iterable[Pool]
    ) -> tuple[PoolFact, Mapping[str, str]]:
        """(state, configuration); what cannot be used has a problem. StorageRefusal."""
        driver = open_pool(pool)

        def look(_: Cancel) -> PoolFact:
            places = {other.name: _place(other) for other in others}
            places[pool.name] = _place(pool)
            try:
                driver.check()
                usage = driver.usage()
            except StorageRefusal as refusal:
                return PoolFact(pool.name, usable=False, problem=refusal.message)
            except OSError as error:
                problem = from_os_error(error, f"use of pool {pool.name}").message
                return PoolFact(pool.name, usable=False, problem=problem)
            return PoolFact(
                pool.name,
                size=usage.size,
                usage=usage.usage,
                usage_details=dict(usage.details),
                included_in=containing(pool.name, places),
            )

        fact = await self._jobs.work(
            call, f"{pool.name} (reading)", [], f"description of pool {pool.name}", look
        )
        return fact, driver.config()

    async def inventory(self, call: Call, pool: Pool) -> Sequence[Found]:
        """What lies in the pool, whoever owns it; nothing where the pool does not work."""
        try:
            driver = open_pool(pool)
            return await self._jobs.work(
                call,
                f"{pool.name} (reading)",
                [],
                f"inventory of pool {pool.name}",
                lambda _: driver.inventory(),
            )
        except StorageRefusal as refusal:
            _LOG.warning("no inventory of pool %s: %s", pool.name, refusal.message)
            return []

    async def quarantine(
        self, call: Call, pool: Pool, items: Iterable[Found], *, dry: bool
    ) -> list[str]:
        """Move the files aside, and say where to; dry: only say so. StorageRefusal."""
        driver = open_pool(pool)
        findings: list[str] = []
        for found in items:
            if dry:
                findings.append(f"{found.vid}: would be moved aside")
                continue
            findings.append(
                await self._jobs.work(
                    call,
                    pool.name,
                    [f"{pool.name}:{found.vid}"],
                    f"quarantine of {found.vid}",
                    functools.partial(_quarantine, driver, found),
                )
            )
        return findings

    async def sweep(self, call: Call, pool: Pool) -> list[str]:
        """Remove unfinished files of crashed calls, and say which, and what nobody owns."""
        driver = open_pool(pool)
        items = await self._jobs.work(
            call,
            f"{pool.name} (reading)",
            [],
            f"inventory of pool {pool.name}",
            lambda _: driver.inventory(),
        )
        findings: list[str] = []
        for item in items:
            key = f"{pool.name}:{item.vid}"
            if self._jobs.held(key):
                continue  # somebody works on it: its temporaries are no leftovers
            names = await self._jobs.work(
                call,
                pool.name,
                [key],
                f"sweep of {item.vid}",
                functools.partial(_clear_temporaries, driver, item.vid),
            )
            findings.extend(f"{pool.name}: removed unfinished {item.vid} ({n})" for n in names)
            if not item.owner and item.kind != "temporary":
                findings.append(f"{pool.name}: {item.vid} bears no owner's tag")
        return findings


def _place(pool: Pool) -> Path | None:
    try:
        place = open_pool(pool).location()
    except StorageRefusal:
        return None
    return Path(os.path.realpath(place)) if place is not None else None


def _quarantine(driver: Driver, found: Found, _: Cancel) -> str:
    return driver.quarantine(found)


def _clear_temporaries(driver: Driver, vid: str, _: Cancel) -> list[str]:
    return driver.clear_temporaries(vid)
