"""The stream over real sockets: order, loss, slow followers, a registry that restarts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from bulkhead import codec
from bulkhead.api import records_pb2, registry_pb2
from bulkhead.bus import events
from bulkhead.bus.errors import BusError
from bulkhead.bus.events import Entry, Publisher, ReplicaRunner
from bulkhead.bus.runtime import ServiceContext
from bulkhead.bus.server import Call, Server
from bulkhead.model.records import (
    Change,
    Qube,
    QubePut,
    RecordState,
    SystemPut,
    WireEvent,
)
from bulkhead.model.view import View
from tests.fakes.bus import Answers, Instance

pytestmark = pytest.mark.integration


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await work()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(limited())


class Registry:
    """Just enough of one: a view, a sequence, snapshots of two changes a page."""

    def __init__(self, publisher: Publisher, boot: str) -> None:
        self.publisher = publisher
        self.boot = boot
        self.seq = 0
        self.view = View()
        self.snapshots: dict[str, list[registry_pb2.SnapshotReply]] = {}
        self.asked = 0
        self.pause_pages: asyncio.Event | None = None

    def put(self, change: Change, *public: Change, event: str = "") -> None:
        """Apply and publish; public: what readers without hidden records get."""
        self.seq += 1
        self.view.apply(change)

        def entry(changes: tuple[Change, ...]) -> records_pb2.StreamEntry:
            return records_pb2.StreamEntry(
                seq=self.seq,
                revision=self.seq,
                changes=[codec.change_to_proto(c) for c in changes],
                events=[codec.event_to_proto(WireEvent("", event))] if event else [],
            )

        self.publisher.publish(entry((change,)), entry(public) if public else None)

    async def snapshot(self, request: Any, call: Call) -> registry_pb2.SnapshotReply:
        self.asked += 1
        key = request.snapshot_id or f"{self.boot}/{self.seq}/{request.with_hidden}"
        if not request.snapshot_id:
            changes: list[Change] = [SystemPut(k, v) for k, v in self.view.properties.items()]
            changes += [
                QubePut(q) for q in self.view.qubes_any() if request.with_hidden or not q.hidden
            ]
            chunks = [changes[at : at + 2] for at in range(0, len(changes), 2)] or [[]]
            self.snapshots[key] = [
                registry_pb2.SnapshotReply(
                    snapshot_id=key,
                    store_id="store",
                    registry_boot=self.boot,
                    seq=self.seq,
                    revision=self.seq,
                    changes=[codec.change_to_proto(c) for c in chunk],
                    last=chunk is chunks[-1],
                )
                for chunk in chunks
            ]
        if self.pause_pages is not None:
            await self.pause_pages.wait()
        page: registry_pb2.SnapshotReply = self.snapshots[key][request.page]
        return page


async def start_registry(instance: Instance, boot: str = "b1") -> tuple[Registry, Server]:
    made: list[Registry] = []

    async def build(context: ServiceContext) -> object:
        publisher = context.publisher
        publisher.start(instance.settings.socket("registry", "stream"), "store", boot)
        made.append(Registry(publisher, boot))
        return Answers("Registry", own={"snapshot": made[0].snapshot})

    _, server = await instance.serve("registry", build, ["Registry"])
    return made[0], server


@asynccontextmanager
async def follower(
    instance: Instance, me: str = "lifecycle", with_hidden: bool = True
) -> AsyncIterator[ReplicaRunner]:
    tasks: set[asyncio.Task[None]] = set()

    def spawn(coroutine: Any, name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    runner = ReplicaRunner(
        instance.settings,
        instance.connections(me),
        with_hidden=with_hidden,
        log=logging.getLogger("bulkhead.test"),
        spawn=spawn,
    )
    try:
        yield runner
    finally:
        runner.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_snapshot_then_entries_in_order() -> None:
    async def work() -> None:
        async with Instance() as instance:
            registry, _ = await start_registry(instance)
            for number in range(5):
                registry.put(SystemPut(f"p{number}", "old"))
            async with follower(instance) as runner:
                seen: list[Entry] = []
                runner.subscribe(seen.append)
                registry.pause_pages = asyncio.Event()
                while not registry.asked:
                    await asyncio.sleep(0.001)
                registry.put(SystemPut("p0", "new"), event="during")
                registry.pause_pages.set()
                await runner.ready()
                await runner.wait_for(6, 6, 5)
                registry.put(SystemPut("p1", "newer"), event="after")
                await runner.wait_for(7, 7, 5)
                assert runner.view.properties == registry.view.properties
                assert [(e.seq, e.resync) for e in seen] == [(5, True), (6, False), (7, False)]
                assert seen[2].events == (WireEvent("", "after"),)
                assert seen[2].changes == (SystemPut("p1", "newer"),)
                assert runner.resyncs == 0 and runner.lag_s < 5 and runner.live
                with pytest.raises(BusError) as caught:
                    await runner.wait_for(8, 8, 0.05)
                assert caught.value.reason == "REPLICA_BEHIND"

    run(work)


def test_a_slow_follower_notices_what_it_lost() -> None:
    async def work() -> None:
        async with Instance() as instance:
            registry, _ = await start_registry(instance)
            async with follower(instance) as runner:
                await runner.ready()
                seen: list[Entry] = []
                runner.subscribe(seen.append)
                # No turn of the loop for the follower: its queues overflow.
                big = "x" * 2000
                for number in range(30_000):
                    registry.put(SystemPut(f"p{number % 50}", f"{number}{big}"))
                await runner.wait_for(30_000, 30_000, 30)
                assert runner.resyncs > 0
                assert any(e.resync for e in seen) and len(seen) < 30_000
                assert runner.view.properties == registry.view.properties
                numbers = [e.seq for e in seen]
                assert numbers == sorted(set(numbers))

    run(work)


def test_a_lost_last_entry_is_noticed_without_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        monkeypatch.setattr(events, "PROGRESS_S", 0.05)
        async with Instance() as instance:
            registry, _ = await start_registry(instance)
            async with follower(instance) as runner:
                await runner.ready()
                send = registry.publisher._send
                monkeypatch.setattr(registry.publisher, "_send", lambda *data: None)
                registry.put(SystemPut("a", "1"))
                monkeypatch.setattr(registry.publisher, "_send", send)
                await runner.wait_for(1, 1, 10)
                assert runner.resyncs == 1 and runner.view.properties == {"a": "1"}

    run(work)


def test_a_registry_that_starts_again() -> None:
    async def work() -> None:
        async with Instance() as instance:
            registry, server = await start_registry(instance)
            for number in range(9):
                registry.put(SystemPut("a", str(number)))
            async with follower(instance) as runner:
                await runner.wait_for(9, 9, 10)
                seen: list[Entry] = []
                runner.subscribe(seen.append)
                waits = asyncio.create_task(runner.wait_for(1, 99, 20))
                await instance.stop(server)
                assert runner.view.properties == {"a": "8"}  # reads go on
                registry, _ = await start_registry(instance, "b2")
                registry.put(SystemPut("b", "1"))
                await waits  # seq of another start: the revision decides
                while runner.view.properties != {"b": "1"}:
                    await asyncio.sleep(0.005)
                assert runner.registry_boot == "b2" and runner.live
                previous = next(e.previous for e in seen if e.resync)
                assert previous is not None and previous.properties == {"a": "8"}

    run(work)


def test_hidden_records_stay_hidden() -> None:
    async def work() -> None:
        async with Instance() as instance:
            registry, _ = await start_registry(instance)
            ghost = Qube("u1", "ghost", 1, "AppVM", RecordState.CREATING)
            plain = Qube("u2", "plain", 2, "AppVM")
            registry.put(QubePut(ghost))
            async with (
                follower(instance, "adminapi", with_hidden=False) as public,
                follower(instance, "lifecycle") as full,
            ):
                seen: list[Entry] = []
                await public.ready()
                await full.ready()
                public.subscribe(seen.append)
                registry.put(QubePut(plain))
                leaving = Qube("u2", "plain", 2, "AppVM", RecordState.DELETING)
                registry.put(QubePut(leaving))
                for runner in (public, full):
                    await runner.wait_for(3, 3, 5)
                assert full.view.qube_any("ghost") == ghost
                assert full.view.qube_any("plain") == leaving
                assert list(public.view.qubes_any()) == []
                assert len(seen) == 2 and len(seen[1].changes) == 1

    run(work)


def test_who_may_follow() -> None:
    async def work() -> None:
        async with Instance() as instance:
            registry, server = await start_registry(instance)
            async with (
                follower(instance, "storage") as stranger,
                follower(instance, "adminapi", with_hidden=True) as curious,
                follower(instance, "adminapi", with_hidden=False) as allowed,
            ):
                await allowed.ready()
                zap = instance.zap(server)
                while not zap.refused:
                    await asyncio.sleep(0.005)
                registry.put(SystemPut("a", "1"))
                await allowed.wait_for(1, 1, 5)
                assert not stranger.is_ready and not curious.is_ready
                assert registry.publisher.subscribers == 1

    run(work)


def test_the_publisher_keeps_the_sequence() -> None:
    async def work() -> None:
        async with Instance() as instance:
            registry, _ = await start_registry(instance)
            with pytest.raises(ValueError, match="after 0"):
                registry.publisher.publish(records_pb2.StreamEntry(seq=2))
            registry.put(SystemPut("a", "1"))
            with pytest.raises(ValueError, match="after 1"):
                registry.publisher.publish(records_pb2.StreamEntry(seq=1))

    run(work)
