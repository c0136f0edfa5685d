"""What calls about volumes do with them.

Owns which locks and threads each step takes, and what may not be begun. Must not know
messages, nor how a pool keeps its data. Invariants: what is copied is a committed state
that nobody writes into meanwhile; a pool that hangs keeps no copy between two others.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from bulkhead.bus.dispatch import Call
from bulkhead.model.records import Volume
from services.storage.core.reasons import StorageRefusal
from services.storage.core.states import Device, VolumeState
from services.storage.core.volumes import ephemeral
from services.storage.drivers.interface import Cancel, Driver
from services.storage.drivers.load import open_pool
from services.storage.jobs import Jobs
from services.storage.messages import Spec


class VolumeWork:
    """Steps on volumes; all raise StorageRefusal."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    async def ensure(self, call: Call, owner: str, item: Spec) -> None:
        """The volume exists, tagged."""
        await self._jobs.on_volume(
            call, item, "creation", lambda driver, _: driver.ensure(owner, item.volume)
        )

    async def clone(
        self,
        call: Call,
        owner: str,
        key: str,
        source: Spec,
        revision: str,
        target: Spec,
        fill: bool,
    ) -> None:
        """The target has a committed state of the source.

        fill: the target is new; else its present state becomes a revision.
        """
        reader, writer = open_pool(source.pool), open_pool(target.pool)
        # A copy between pools has threads of its own: either pool may hang.
        group = target.pool.name
        if source.pool.name != target.pool.name:
            group = f"{source.pool.name} to {target.pool.name}"
        keys = [target.key]
        if source.volume.snapshots_disabled:
            keys.append(source.key)  # its start would write into what is being read

        def copy(cancel: Cancel) -> None:
            with reader.committed(source.volume, revision) as state:
                step = writer.clone if fill else writer.replace
                step(owner, target.volume, state, key, cancel)

        await self._jobs.work(
            call,
            group,
            keys,
            f"copy of volume {source.volume.vid} to {target.volume.vid}",
            copy,
        )

    def refuse_ephemeral(self, items: Sequence[Spec]) -> None:
        """EPHEMERAL_UNAVAILABLE when one of the volumes must lie on a throw-away key."""
        for item in items:
            if ephemeral(item.volume, item.pool):
                raise StorageRefusal(
                    "EPHEMERAL_UNAVAILABLE",
                    f"volume {item.volume.vid} must lie on a throw-away key, and dm-crypt is "
                    "not available on this host: switch ephemeral off for it or its pool",
                    volume=item.volume.vid,
                    pool=item.pool.name,
                )

    async def verify(self, call: Call, owner: str, items: Sequence[Spec]) -> None:
        """Every volume could be started."""
        await self._jobs.all(
            [
                self._jobs.on_volume(
                    call, item, "check", functools.partial(_verify, owner, item.volume)
                )
                for item in items
            ]
        )

    async def start(
        self,
        call: Call,
        owner: str,
        boot: str,
        items: Sequence[Spec],
        sources: Mapping[str, Volume],
    ) -> list[Device | None]:
        """Every volume is ready for this boot; its device, where it has one."""
        return await self._jobs.all(
            [
                self._jobs.on_volume(
                    call,
                    item,
                    "start",
                    functools.partial(_start, owner, boot, item.volume, _source(item, sources)),
                )
                for item in items
            ]
        )

    async def stop(self, call: Call, owner: str, boot: str, items: Sequence[Spec]) -> None:
        """Every volume of this boot is committed or discarded."""
        await self._jobs.all(
            [
                self._jobs.on_volume(
                    call, item, "stop", functools.partial(_stop, owner, boot, item.volume)
                )
                for item in items
            ]
        )

    async def states(
        self, call: Call, items: Sequence[Spec], sources: Mapping[str, Volume]
    ) -> list[VolumeState]:
        """What the volumes are now; waits for nobody who works on them."""

        async def one(item: Spec) -> VolumeState:
            driver = open_pool(item.pool)
            source = _source(item, sources)
            return await self._jobs.work(
                call,
                f"{item.pool.name} (reading)",
                [],
                f"description of volume {item.volume.vid}",
                lambda _: driver.describe(item.volume, source),
            )

        return await self._jobs.all([one(item) for item in items])

    async def check_quiet(self, call: Call, item: Spec, revision: str | None = None) -> None:
        """What a dry run can say of a call that replaces data."""
        (state,) = await self.states(call, [item], {})
        if state.is_dirty:
            raise StorageRefusal(
                "VOLUME_DIRTY",
                f"volume {item.volume.vid} is running or was not cleanly stopped",
                volume=item.volume.vid,
            )
        if state.importing:
            raise StorageRefusal(
                "VOLUME_IMPORTING",
                f"an import into volume {item.volume.vid} is under way",
                volume=item.volume.vid,
            )
        known = [r.id for r in state.revisions]
        if revision is not None and (not known or (revision and revision not in known)):
            raise StorageRefusal(
                "REVISION_NOT_FOUND",
                f"volume {item.volume.vid} has no revision {revision}",
                volume=item.volume.vid,
                revision=revision,
            )


def _source(item: Spec, sources: Mapping[str, Volume]) -> Volume | None:
    return sources.get(f"{item.pool.name}:{item.volume.source}") if item.volume.source else None


def _verify(owner: str, volume: Volume, driver: Driver, _: Cancel) -> None:
    driver.verify(owner, volume, None)


def _start(
    owner: str, boot: str, volume: Volume, source: Volume | None, driver: Driver, cancel: Cancel
) -> Device | None:
    return driver.start(owner, boot, volume, source, cancel)


def _stop(owner: str, boot: str, volume: Volume, driver: Driver, cancel: Cancel) -> None:
    driver.stop(owner, boot, volume, cancel)
