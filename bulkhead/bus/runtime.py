"""The main() of every service: from --root to a serving process and back.

Owns start order, lock, event loop, background tasks, the Control service and the orderly
end. Must not know what the service does. Invariants: the lock is held before anything is
bound; restrictions are in force before the first thread exists; a background task that
crashes ends the process.

Start order: settings, user check, lock, secret, confine (single-threaded still), event
loop, ZAP handler, build(), bind, serve. SIGTERM or SIGINT: refuse new work, finish what
runs (10 s), on_stop callbacks in reverse, close, exit 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from bulkhead.api import control_pb2
from bulkhead.bus import confine, memory, sockets
from bulkhead.bus.client import Channel, Connections
from bulkhead.bus.confine import Confinement
from bulkhead.bus.dispatch import Bounds, Dispatcher
from bulkhead.bus.errors import bus_error
from bulkhead.bus.events import Publisher, ReplicaRunner
from bulkhead.bus.identity import Identities
from bulkhead.bus.methods import CONTROL_SERVICE, Lane, full_service_name
from bulkhead.bus.secret import read_secret
from bulkhead.bus.server import Call, Server, ZapHandler
from bulkhead.config import Settings, SettingsError

DRAIN_S = 10.0
_EXIT_CRASH = 70
_EXIT_CONFIG = 78


class ServiceContext:
    """What a service's build() gets.

    settings, service: who we are. log: the service's logger. counters: shown by Health.
    zap_refused: connections refused. Everything else is below.
    """

    def __init__(self, settings: Settings, service: str, secret: bytes) -> None:
        self.settings = settings
        self.service = service
        self.log = logging.getLogger(f"bulkhead.{service}")
        self.counters: dict[str, int] = {}
        self.zmq = sockets.new_context()
        self.identities = Identities(
            isolated=settings.isolated, users=settings.users, secret=secret, own_uid=os.getuid()
        )
        self.connections = Connections(settings, service, context=self.zmq, secret=secret)
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stops: list[Callable[[], Awaitable[object]]] = []
        self._replicas: dict[bool, ReplicaRunner] = {}
        self._publisher: Publisher | None = None
        self._stopping = False

    def channel(self, service: str) -> Channel:
        """The connection to another service, made at its first use."""
        return self.connections.channel(service)

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run in the background. An exception in it ends the whole process, loudly."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def on_stop(self, callback: Callable[[], Awaitable[object]]) -> None:
        """Await callback() when the service stops; the last one added comes first."""
        self._stops.append(callback)

    def replica(self, with_hidden: bool) -> ReplicaRunner:
        """The replica of the registry's state; started at its first use."""
        runner = self._replicas.get(with_hidden)
        if runner is None:
            runner = self._replicas[with_hidden] = ReplicaRunner(
                self.settings,
                self.connections,
                with_hidden=with_hidden,
                log=self.log,
                spawn=self.spawn,
            )
        return runner

    @property
    def publisher(self) -> Publisher:
        """The stream's publishing end; call its start() before the first publish()."""
        if self.service != "registry":
            raise RuntimeError("only the registry publishes")
        if self._publisher is None:
            self._publisher = Publisher(self.zmq, plain=not self.settings.isolated)
        return self._publisher

    # ---- for serve()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return
        self.log.critical("background task %s crashed", task.get_name(), exc_info=error)
        if not self.failed.done():
            self.failed.set_result(None)

    async def close(self) -> None:
        """Run the on_stop callbacks, end background tasks, close every socket but the servers'."""
        for callback in reversed(self._stops):
            try:
                await callback()
            except Exception:
                self.log.exception("a clean-up at the stop failed")
        for task in tuple(self._tasks):
            task.remove_done_callback(self._ended)
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for runner in self._replicas.values():
            runner.close()
        if self._publisher is not None:
            self._publisher.close()
        self.connections.close()


class ControlService:
    """The Control service of every process: Health, Cancel, Drain, Sweep.

    The service's handler object may have: ready (bool), not_ready_reason (str), revision
    (int), seq (int), lag_s (float), counters (dict), and `async sweep(request, call)`.
    """

    def __init__(
        self,
        service: str,
        handlers: object,
        *,
        privileges: Callable[[], dict[str, str]],
        counters: Sequence[dict[str, int]] = (),
        on_drain: Callable[[], Awaitable[object]],
    ) -> None:
        self._service = service
        self._handlers = handlers
        self._privileges = privileges
        self._counters = list(counters)
        self._on_drain = on_drain
        self._started = time.monotonic()
        self.dispatcher: Dispatcher | None = None

    async def health(
        self,
        request: control_pb2.HealthRequest,  # noqa: ARG002
        call: Call,  # noqa: ARG002
    ) -> control_pb2.HealthReply:
        """How the process is, with the privileges that the kernel says it has."""
        handlers = self._handlers
        dispatcher = self.dispatcher
        assert dispatcher is not None
        counters = dict(dispatcher.counters)
        for more in (*self._counters, getattr(handlers, "counters", {})):
            counters.update(more)
        return control_pb2.HealthReply(
            service=self._service,
            pid=os.getpid(),
            uid=os.getuid(),
            uptime_s=time.monotonic() - self._started,
            privileges=self._privileges(),
            revision=int(getattr(handlers, "revision", 0)),
            seq=int(getattr(handlers, "seq", 0)),
            lag_s=float(getattr(handlers, "lag_s", 0.0)),
            in_flight=dispatcher.pending(Lane.WORK),
            counters=counters,
            ready=bool(getattr(handlers, "ready", True)) and not dispatcher.draining,
            not_ready_reason="draining"
            if dispatcher.draining
            else str(getattr(handlers, "not_ready_reason", "")),
        )

    async def cancel(
        self, request: control_pb2.CancelRequest, call: Call
    ) -> control_pb2.CancelReply:
        """Cancel a request of the same caller."""
        assert self.dispatcher is not None
        return control_pb2.CancelReply(
            found=self.dispatcher.cancel(call.caller, request.request_id)
        )

    async def drain(
        self,
        request: control_pb2.DrainRequest,  # noqa: ARG002
        call: Call,  # noqa: ARG002
    ) -> control_pb2.DrainReply:
        """Refuse new work and answer when nothing runs any more."""
        await self._on_drain()
        return control_pb2.DrainReply()

    async def sweep(self, request: control_pb2.SweepRequest, call: Call) -> control_pb2.SweepReply:
        """Hand on to the service's own sweep."""
        sweep = getattr(self._handlers, "sweep", None)
        if sweep is None:
            raise bus_error("NOT_OFFERED", f"{self._service} has nothing to sweep")
        reply = await sweep(request, call)
        assert isinstance(reply, control_pb2.SweepReply)
        return reply


def serve(
    service: str,
    build: Callable[[ServiceContext], Awaitable[object]],
    proto_services: Sequence[str],
    *,
    confinement: Callable[[Settings], Confinement] | None = None,
    work_bounds: Bounds | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run a service until SIGTERM; the process ends here with its exit status.

    build(context) -> the handler object for every name of proto_services ("Storage" or
    the full name); its optional reply_store keeps the replies. confinement(settings)
    says what the process needs; it is put in force before any thread exists. Exit: 0
    after SIGTERM, 70 when a background task crashed, 78 when it cannot start.
    """
    parser = argparse.ArgumentParser(prog=service)
    parser.add_argument("--root", type=Path, required=True, help="directory of the instance")
    root: Path = parser.parse_args(arguments).root
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format=f"%(asctime)s {service}[{os.getpid()}] %(levelname)s %(message)s",
    )
    log = logging.getLogger(f"bulkhead.{service}")
    try:
        settings = Settings.load(root.absolute())
        settings.check()
        _check_user(settings, service)
        lock = take_lock(settings, service)
        secret = read_secret(settings)
    except SettingsError as error:
        log.critical("%s", error)
        sys.exit(_EXIT_CONFIG)
    if not settings.isolated:
        log.warning("isolation is off: all services run as one user")
    needs = confinement(settings) if confinement is not None else None
    names = [full_service_name(name) for name in proto_services]
    new_loop = _import_everything()
    if needs is not None:
        report = confine.apply(needs.with_socket_directory(settings.service_dir(service)))
        log.info("in force: %s", ", ".join(f"{k}={v}" for k, v in sorted(report.items())))
    with lock, asyncio.Runner(loop_factory=new_loop) as runner:
        crashed = runner.run(_run(settings, service, build, names, secret, work_bounds, log))
    sys.exit(_EXIT_CRASH if crashed else 0)


def _import_everything() -> Callable[[], asyncio.AbstractEventLoop]:
    """Import what would otherwise be imported late, when files are out of reach."""
    import concurrent.futures.thread
    import encodings.idna
    import encodings.latin_1
    import traceback

    del concurrent, encodings, traceback
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def _check_user(settings: Settings, service: str) -> None:
    if not settings.isolated:
        return
    expected = settings.users.get(service)
    if expected is None:
        raise SettingsError(f"{settings.file} names no user for {service}")
    if os.getuid() != expected:
        raise SettingsError(f"{service} must run as uid {expected}, not {os.getuid()}")


@contextlib.contextmanager
def _held(fd: int) -> Any:
    try:
        yield
    finally:
        os.close(fd)


def take_lock(settings: Settings, service: str) -> contextlib.AbstractContextManager[None]:
    """The service's lock, held until the returned context ends or the process dies.

    SettingsError when another process has it. Makes the socket directory where services
    share one user; with isolation the launcher has made it.
    """
    directory = settings.service_dir(service)
    try:
        if not settings.isolated:
            directory.mkdir(mode=0o710, parents=True, exist_ok=True)
        fd = os.open(
            directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
    except OSError as error:
        raise SettingsError(f"the lock in {directory} cannot be opened: {error}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise SettingsError(f"{service} runs already: {directory / 'lock'} is locked") from None
    return _held(fd)


async def _run(
    settings: Settings,
    service: str,
    build: Callable[[ServiceContext], Awaitable[object]],
    names: Sequence[str],
    secret: bytes,
    work_bounds: Bounds | None,
    log: logging.Logger,
) -> bool:
    """Serve until a signal or a crash; True after a crash."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    context = ServiceContext(settings, service, secret)
    zap = ZapHandler(context.zmq, context.identities, context.log)
    running = await start_service(context, build, names, work_bounds)
    memory.settle()
    log.info("serving")
    stopped = loop.create_task(stop.wait())
    ends: list[asyncio.Future[Any]] = [stopped, context.failed]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    crashed = context.failed.done()
    stopped.cancel()
    if not crashed:
        log.info("stopping")
        if not await running.drain(DRAIN_S):
            log.warning("%d requests did not end in time", running.dispatcher.in_flight)
    await context.close()
    running.close()
    zap.close()
    # Not term(): a client that never reads must not keep the process.
    context.zmq.destroy(linger=200)
    log.info("stopped")
    return crashed


async def start_service(
    context: ServiceContext,
    build: Callable[[ServiceContext], Awaitable[object]],
    names: Sequence[str],
    work_bounds: Bounds | None = None,
) -> Server:
    """Build the handlers and bind; the way tests run a service inside their own process.

    Needs a ZapHandler on the context before. The caller closes the server and context.
    """
    settings, service = context.settings, context.service
    handlers = await build(context)

    def privileges() -> dict[str, str]:
        found = confine.in_force()
        found["isolation"] = "users" if settings.isolated else "off"
        return found

    async def drain() -> None:
        # Its own call is in flight too, on the control lane.
        server.dispatcher.draining = True
        while server.dispatcher.pending(Lane.WORK):
            await asyncio.sleep(0.01)

    control = ControlService(
        service,
        handlers,
        privileges=privileges,
        counters=[context.counters],
        on_drain=drain,
    )
    services: dict[str, object] = dict.fromkeys(names, handlers)
    services[CONTROL_SERVICE] = control
    server = Server(
        service,
        services,
        context=context.zmq,
        identities=context.identities,
        reply_store=getattr(handlers, "reply_store", None),
        work_bounds=work_bounds,
        log=context.log,
    )
    control.dispatcher = server.dispatcher
    server.bind(
        {
            Lane.WORK: settings.socket(service, "work"),
            Lane.CONTROL: settings.socket(service, "control"),
        }
    )
    return server
