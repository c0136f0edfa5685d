"""libvirt calls in threads: hanging ones are given up, bounded, and hold up no other."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import libvirt
import pytest

from services.domains.adapters import libvirt_calls
from services.domains.adapters.hypervisor import Failure, HypervisorError
from services.domains.adapters.libvirt_calls import Lane, translate
from services.domains.adapters.threads import AbandonableCalls, TooManyCalls

from .hypervisor_benches import until

URI = "test:///default"


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await body()

    asyncio.run(asyncio.wait_for(whole(), 60))


async def failure(call: Awaitable[object]) -> Failure:
    with pytest.raises(HypervisorError) as caught:
        await call
    return caught.value.failure


def test_a_call_gets_its_answer_and_libvirts_errors_are_ours() -> None:
    async def body() -> None:
        lane = Lane(URI, "t", 2, 8)
        assert await lane.run(lambda c: c.getURI(), 10) == URI
        lookup = lane.run(lambda c: c.lookupByName("none"), 10)
        assert await failure(lookup) is Failure.NOT_FOUND

        def wrong(_: libvirt.virConnect) -> None:
            raise ValueError("not libvirt's")

        with pytest.raises(ValueError, match="not libvirt's"):
            await lane.run(wrong, 10)
        lane.close()

    run(body)


def test_a_hanging_call_is_given_up_and_replaced() -> None:
    async def body() -> None:
        release = threading.Event()
        lane = Lane(URI, "t", 1, 8)
        began = time.monotonic()
        assert await failure(lane.run(lambda _: release.wait(60), 0.2)) is Failure.TIMEOUT
        assert time.monotonic() - began < 1.0
        assert lane.lost == 1
        # The only worker hangs, and still the next call is served.
        assert await lane.run(lambda c: c.getURI(), 10) == URI
        release.set()
        await until(lambda: lane.lost == 0, 5, "the return of the lost thread")
        lane.close()

    run(body)


def test_a_cancelled_call_is_given_up() -> None:
    async def body() -> None:
        release, reached = threading.Event(), threading.Event()

        def hang(_: libvirt.virConnect) -> None:
            reached.set()
            release.wait(60)

        lane = Lane(URI, "t", 1, 8)
        task = asyncio.ensure_future(lane.run(hang, 60))
        await asyncio.to_thread(reached.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert lane.lost == 1
        release.set()
        await until(lambda: lane.lost == 0, 5, "the return of the lost thread")
        lane.close()

    run(body)


def test_a_call_that_waited_too_long_in_the_queue_is_never_made() -> None:
    async def body() -> None:
        release, reached = threading.Event(), threading.Event()
        made: list[str] = []

        def hang(_: libvirt.virConnect) -> None:
            reached.set()
            release.wait(60)

        lane = Lane(URI, "t", 1, 8)
        first = asyncio.ensure_future(lane.run(hang, 60))
        await asyncio.to_thread(reached.wait, 10)
        assert await failure(lane.run(lambda _: made.append("x"), 0.1)) is Failure.TIMEOUT
        assert lane.lost == 0  # nobody hangs for its sake
        release.set()
        await first
        assert await lane.run(lambda c: c.getURI(), 10) == URI
        assert made == []
        lane.close()

    run(body)


def test_what_waits_and_what_hangs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libvirt_calls, "LOST_THREADS", 2)

    async def body() -> None:
        release = threading.Event()
        lane = Lane(URI, "t", 1, 2)
        calls = [asyncio.ensure_future(lane.run(lambda _: release.wait(60), 60)) for _ in range(3)]
        await until(lambda: lane.jobs.qsize() == 2, 5, "a full queue")
        assert await failure(lane.run(lambda c: c.getURI(), 5)) is Failure.BUSY
        for task in calls:
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert await failure(lane.run(lambda _: release.wait(60), 0.1)) is Failure.TIMEOUT
        assert lane.lost == 2
        assert await failure(lane.run(lambda c: c.getURI(), 5)) is Failure.BUSY
        release.set()
        await until(lambda: lane.lost == 0, 5, "the return of the lost threads")
        assert await lane.run(lambda c: c.getURI(), 5) == URI
        lane.close()

    run(body)


def test_a_connection_that_cannot_be_opened_is_unavailable() -> None:
    async def body() -> None:
        lane = Lane("qemu:///system?socket=/nonexistent/sock", "t", 1, 2)
        assert await failure(lane.run(lambda c: c.getURI(), 10)) is Failure.UNAVAILABLE
        lane.close()

    run(body)


def test_the_loop_goes_on_while_libvirt_blocks() -> None:
    async def body() -> None:
        lane = Lane(URI, "t", 4, 8)
        await lane.run(lambda c: c.getURI(), 10)
        gaps: list[float] = []

        async def tick() -> None:
            while True:
                began = time.monotonic()
                await asyncio.sleep(0.005)
                gaps.append(time.monotonic() - began)

        ticking = asyncio.ensure_future(tick())
        await asyncio.gather(*(lane.run(lambda _: time.sleep(0.3), 10) for _ in range(4)))
        ticking.cancel()
        # The machine is shared; a blocking call would make a gap of 0.3 s.
        assert max(gaps) < 0.25
        lane.close()

    run(body)


@pytest.mark.parametrize(
    ("code", "alive", "expected"),
    [
        (libvirt.VIR_ERR_NO_DOMAIN, True, Failure.NOT_FOUND),
        (libvirt.VIR_ERR_OPERATION_INVALID, True, Failure.WRONG_STATE),
        (libvirt.VIR_ERR_NO_SUPPORT, True, Failure.UNSUPPORTED),
        (libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, True, Failure.UNSUPPORTED),
        (libvirt.VIR_ERR_XML_ERROR, True, Failure.INVALID),
        (libvirt.VIR_ERR_INTERNAL_ERROR, True, Failure.FAILED),
        (libvirt.VIR_ERR_INTERNAL_ERROR, False, Failure.UNAVAILABLE),
        (libvirt.VIR_ERR_NO_CONNECT, True, Failure.UNAVAILABLE),
    ],
)
def test_error_codes(code: int, alive: bool, expected: Failure) -> None:
    error = libvirt.libvirtError("it went wrong.")
    error.err = (code, 0, "it went wrong.", 0, "", None, None, -1, -1)
    translated = translate(error, alive)
    assert translated.failure is expected
    assert translated.message == "it went wrong"


def test_blocking_calls_elsewhere_are_bounded_too() -> None:
    async def body() -> None:
        release = threading.Event()
        calls = AbandonableCalls(2, "t")
        assert await calls.run(lambda: 7, 5) == 7
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await calls.run(lambda: release.wait(60), 0.05)
        with pytest.raises(TooManyCalls):
            await calls.run(lambda: 7, 5)
        release.set()

        def free() -> bool:
            if not calls._slots.acquire(blocking=False):
                return False
            calls._slots.release()
            return True

        await until(free, 5, "a free slot")
        with pytest.raises(ZeroDivisionError):
            await calls.run(lambda: 1 // 0, 5)

    run(body)
