"""Threads per pool and locks per volume."""

from __future__ import annotations

import asyncio
import threading

import pytest

from services.storage.core.reasons import StorageRefusal
from services.storage.workers import VolumeLocks, Workers


def test_a_hung_pool_delays_no_other() -> None:
    async def scenario() -> None:
        workers = Workers(threads=2, waiting=4)
        release = threading.Event()
        hung = [asyncio.create_task(workers.run("hung", release.wait)) for _ in range(3)]
        assert await asyncio.wait_for(workers.run("other", lambda: 7), 5) == 7
        assert not any(task.done() for task in hung)
        release.set()
        assert await asyncio.wait_for(asyncio.gather(*hung), 5) == [True] * 3

    asyncio.run(scenario())


def test_a_pool_takes_a_bounded_number_of_calls() -> None:
    async def scenario() -> None:
        workers = Workers(threads=1, waiting=2)
        release = threading.Event()
        running = [asyncio.create_task(workers.run("p", release.wait)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(StorageRefusal) as caught:
            await workers.run("p", lambda: None)
        assert caught.value.reason == "POOL_BUSY"
        release.set()
        await asyncio.gather(*running)
        assert await workers.run("p", lambda: 1) == 1

    asyncio.run(scenario())


def test_as_many_threads_as_promised_and_errors_come_back() -> None:
    async def scenario() -> None:
        workers = Workers(threads=3)
        barrier = threading.Barrier(3)
        await asyncio.wait_for(
            asyncio.gather(*(workers.run("p", lambda: barrier.wait(5)) for _ in range(3))), 10
        )
        with pytest.raises(ZeroDivisionError):
            await workers.run("p", lambda: 1 // 0)

    asyncio.run(scenario())


def test_idle_groups_end() -> None:
    async def scenario() -> None:
        workers = Workers(threads=1)
        for number in range(70):
            await workers.run(f"pool-{number}", lambda: None)
        assert len(workers._groups) <= 64

    asyncio.run(scenario())


def test_locks_serialise_one_volume_and_let_others_pass() -> None:
    async def scenario() -> None:
        locks = VolumeLocks()
        order: list[str] = []
        inside = asyncio.Event()
        leave = asyncio.Event()

        async def first() -> None:
            async with locks.hold(["b", "a"]):
                order.append("first")
                inside.set()
                await leave.wait()

        async def second() -> None:
            async with locks.hold(["a"]):
                order.append("second")

        one = asyncio.create_task(first())
        await inside.wait()
        two = asyncio.create_task(second())
        async with locks.hold(["c"]):
            order.append("other")
        assert locks.held("a")
        leave.set()
        await asyncio.gather(one, two)
        assert order == ["first", "other", "second"]
        assert not locks.held("a")

    asyncio.run(scenario())


def test_two_orders_do_not_lock_each_other_out() -> None:
    async def scenario() -> None:
        locks = VolumeLocks()

        async def take(keys: list[str]) -> None:
            for _ in range(50):
                async with locks.hold(keys):
                    await asyncio.sleep(0)

        await asyncio.wait_for(asyncio.gather(take(["a", "b"]), take(["b", "a"])), 10)

    asyncio.run(scenario())
