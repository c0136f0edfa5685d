"""Blocking libvirt calls in threads that own their connection.

Owns the event loop thread of libvirt, connections and the threads that use them. Must
not know domains or XML. Invariant: one connection is used by one thread; a call that
hangs is given up by cutting its connection's socket, and a new thread with a new
connection takes its place; the number of threads given up and not yet back is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import libvirt

from .hypervisor import Failure, HypervisorError

_R = TypeVar("_R")
_log = logging.getLogger("domains.libvirt")

LOST_THREADS = 32
KEEPALIVE_S = 5
KEEPALIVE_COUNT = 3
_CONNECTION_CODES = frozenset(
    {
        libvirt.VIR_ERR_NO_CONNECT,
        libvirt.VIR_ERR_INVALID_CONN,
        libvirt.VIR_ERR_SYSTEM_ERROR,
        libvirt.VIR_ERR_RPC,
        libvirt.VIR_ERR_INTERNAL_ERROR,
    }
)


_failures: dict[int, Failure] = {
    libvirt.VIR_ERR_NO_DOMAIN: Failure.NOT_FOUND,
    libvirt.VIR_ERR_DOM_EXIST: Failure.EXISTS,
    libvirt.VIR_ERR_OPERATION_INVALID: Failure.WRONG_STATE,
    libvirt.VIR_ERR_XML_ERROR: Failure.INVALID,
    libvirt.VIR_ERR_XML_DETAIL: Failure.INVALID,
    libvirt.VIR_ERR_XML_INVALID_SCHEMA: Failure.INVALID,
    libvirt.VIR_ERR_INVALID_ARG: Failure.INVALID,
    libvirt.VIR_ERR_OPERATION_UNSUPPORTED: Failure.UNSUPPORTED,
    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED: Failure.UNSUPPORTED,
    libvirt.VIR_ERR_CONFIG_UNSUPPORTED: Failure.UNSUPPORTED,
    libvirt.VIR_ERR_NO_SUPPORT: Failure.UNSUPPORTED,
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE: Failure.UNSUPPORTED,
    libvirt.VIR_ERR_OPERATION_TIMEOUT: Failure.BUSY,
    libvirt.VIR_ERR_NO_MEMORY: Failure.NO_MEMORY,
}


def translate(error: libvirt.libvirtError, alive: bool = True) -> HypervisorError:
    """libvirt's error as ours; alive False: its connection is gone."""
    code = error.get_error_code()
    message = (error.get_error_message() or str(error)).strip().rstrip(".")
    if not alive or code in (libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_INVALID_CONN):
        return HypervisorError(Failure.UNAVAILABLE, message)
    if "memory" in message.lower() and "free" in message.lower():
        return HypervisorError(Failure.NO_MEMORY, message)
    return HypervisorError(_failures.get(code, Failure.FAILED), message)


# ---- libvirt's own event loop, one per process

_loop_lock = threading.Lock()
_loop_thread: threading.Thread | None = None


def _turn_events() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as error:
            _log.error("libvirt's event loop: %s", error)


def ensure_event_loop() -> None:
    """Start libvirt's event loop in a thread; must come before the first connection."""
    global _loop_thread
    with _loop_lock:
        if _loop_thread is None:
            libvirt.registerErrorHandler(_ignore_error, None)
            libvirt.virEventRegisterDefaultImpl()
            # An event loop without any timer sleeps for ever: additions wake it, ends do not.
            libvirt.virEventAddTimeout(1000, _tick, None)
            _loop_thread = threading.Thread(target=_turn_events, name="libvirt-events", daemon=True)
            _loop_thread.start()


def _ignore_error(context: object, error: object) -> None:
    """Errors are raised; libvirt shall not print them as well."""


def _tick(timer: int, opaque: object) -> None:
    """Keeps the loop turning."""


# ---- connections

_open_lock = threading.Lock()


def _unix_sockets() -> dict[int, int]:
    """Connected unix sockets of this process: inode -> descriptor."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = entry.readlink()
        except OSError:
            continue
        name = str(target)
        if not name.startswith("socket:["):
            continue
        try:
            duplicate = os.dup(int(entry.name))
        except OSError:
            continue
        with socket.socket(fileno=duplicate) as sock:
            try:
                peer = sock.getpeername() if sock.family == socket.AF_UNIX else ""
            except OSError:
                continue
        if isinstance(peer, bytes):
            peer = os.fsdecode(peer)
        # Names of the daemons' sockets; nothing else in this process connects to such.
        if isinstance(peer, str) and "virt" in Path(peer).name:
            found[int(name[8:-1])] = int(entry.name)
    return found


class Connection:
    """One libvirt connection, whose socket can be cut from any thread."""

    def __init__(self, uri: str) -> None:
        """Open it; blocking. HypervisorError UNAVAILABLE when it cannot be opened."""
        ensure_event_loop()
        self._socket: socket.socket | None = None
        with _open_lock:
            before = set(_unix_sockets())
            try:
                self.handle = libvirt.open(uri)
            except libvirt.libvirtError as error:
                raise HypervisorError(Failure.UNAVAILABLE, str(error)) from error
            for inode, descriptor in _unix_sockets().items():
                if inode not in before:
                    # A duplicate: libvirt may close its own without ours meaning another.
                    with contextlib.suppress(OSError):
                        self._socket = socket.socket(fileno=os.dup(descriptor))
        try:
            self.handle.setKeepAlive(KEEPALIVE_S, KEEPALIVE_COUNT)
        except libvirt.libvirtError:
            pass  # drivers inside this process (test:) have no keep-alive

    def cut(self) -> None:
        """Shut the socket: whoever waits on it gets an error now. From any thread."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close; blocking, by the owning thread."""
        try:
            self.handle.close()
        except libvirt.libvirtError:
            pass  # a dead connection is closed as far as it can be
        if self._socket is not None:
            self._socket.close()

    def alive(self) -> bool:
        """The connection still stands."""
        try:
            return bool(self.handle.isAlive())
        except libvirt.libvirtError:
            return False


class _Job:
    """One call and whoever waits for it."""

    def __init__(
        self, call: Callable[[libvirt.virConnect], Any], loop: asyncio.AbstractEventLoop
    ) -> None:
        self.call = call
        self.loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()
        self.worker: _Worker | None = None

    def settle(self, result: Any, error: BaseException | None) -> None:
        def on_loop() -> None:
            if self.future.done():
                return
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result(result)

        try:
            self.loop.call_soon_threadsafe(on_loop)
        except RuntimeError:
            pass  # the loop has ended: nobody waits any more


class _Worker:
    """A thread with its own connection, opened at need."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.lost = False
        self.connection: Connection | None = None
        threading.Thread(target=self._work, name=f"libvirt-{lane.name}", daemon=True).start()

    def _work(self) -> None:
        try:
            while not self.lost:
                job = self.lane.jobs.get()
                if job is None:
                    break
                if job.future.cancelled():
                    continue
                job.worker = self
                self._run(job)
                job.worker = None
        finally:
            if self.connection is not None:
                self.connection.close()
            if self.lost:
                self.lane.back()

    def _run(self, job: _Job) -> None:
        try:
            if self.connection is None or not self.connection.alive():
                if self.connection is not None:
                    self.connection.close()
                    self.connection = None
                self.connection = Connection(self.lane.uri)
            result = job.call(self.connection.handle)
        except libvirt.libvirtError as error:
            alive = self.connection is not None and self.connection.alive()
            job.settle(None, translate(error, alive))
        except BaseException as error:  # handed to whoever waits, whatever it is
            job.settle(None, error)
        else:
            job.settle(result, None)


class Lane:
    """Workers that share a bounded queue; started at need, up to a fixed number."""

    def __init__(self, uri: str, name: str, workers: int, waiting: int) -> None:
        self.uri = uri
        self.name = name
        self.jobs: queue.Queue[_Job | None] = queue.Queue(waiting)
        self._limit = workers
        self._under_way = 0
        self._lost = 0
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []

    def back(self) -> None:
        """A thread that was given up has returned and ends."""
        with self._lock:
            self._lost -= 1

    @property
    def lost(self) -> int:
        """Threads given up that still hang."""
        return self._lost

    async def run(self, call: Callable[[libvirt.virConnect], _R], timeout: float) -> _R:
        """call(connection) in a worker. HypervisorError TIMEOUT when it was given up.

        Cancelling gives it up too. BUSY when the queue is full or too many hang.
        """
        job = _Job(call, asyncio.get_running_loop())
        with self._lock:
            if self._lost >= LOST_THREADS:
                raise HypervisorError(Failure.BUSY, f"{self._lost} calls hang in libvirt")
        try:
            self.jobs.put_nowait(job)
        except queue.Full:
            raise HypervisorError(
                Failure.BUSY, f"{self.jobs.maxsize} calls wait for libvirt already"
            ) from None
        self._under_way += 1
        if self._under_way > len(self._workers) < self._limit:
            self._workers.append(_Worker(self))
        try:
            async with asyncio.timeout(timeout):
                result: _R = await job.future
                return result
        except TimeoutError:
            self._give_up(job)
            raise HypervisorError(
                Failure.TIMEOUT, f"libvirt did not answer within {timeout:.1f} s"
            ) from None
        except asyncio.CancelledError:
            self._give_up(job)
            raise
        finally:
            self._under_way -= 1

    def _give_up(self, job: _Job) -> None:
        """The thread may hang for ever: leave it, cut its connection, start another."""
        job.future.cancel()
        worker = job.worker
        if worker is None or worker.lost:
            return
        with self._lock:
            self._lost += 1
        worker.lost = True
        connection = worker.connection
        if connection is not None:
            connection.cut()
        # Others may wait in the queue behind it.
        self._workers[self._workers.index(worker)] = _Worker(self)
        _log.warning("a call on the %s lane hangs and was given up", self.name)

    def close(self) -> None:
        """Let the workers end; those that hang stay behind."""
        for _ in self._workers:
            with contextlib.suppress(queue.Full):
                self.jobs.put_nowait(None)
