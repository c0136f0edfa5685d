"""The Admin API on a real unix socket, with a view of our own and fakes behind it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop

from bulkhead.api import lifecycle_pb2, registry_pb2
from bulkhead.bus.errors import BusError, bus_error
from bulkhead.bus.events import Entry
from bulkhead.model import specs
from bulkhead.model.records import (
    FactPut,
    FactRemoved,
    HostFact,
    Operation,
    OperationPut,
    OperationState,
    Phase,
    Problem,
    QubePut,
    Run,
    WireEvent,
)
from bulkhead.model.view import View
from services.adminapi import backend as backend_module
from services.adminapi import handlers as handlers_module
from services.adminapi.actions import Actions
from services.adminapi.adapters import gateway as gateway_module
from services.adminapi.adapters.gateway import Gateway, bind_socket, inherited_sockets
from services.adminapi.adapters.paused_list import PausedList
from services.adminapi.backend import Backend
from services.adminapi.core import calls
from services.adminapi.core.frame import CONNECTION_ESTABLISHED, REQUEST_LIMIT
from services.adminapi.core.permission import DenyAll
from services.adminapi.core.reads import READS
from services.adminapi.core.writes import WRITES
from services.adminapi.handlers import AdminApi
from tests.fakes.adminapi import WORK_UUID, app, start_view

Reply = Callable[[Any, "FakeReplica"], Awaitable[tuple[Any, Any]]]


class FakeReplica:
    """The follower's end of the stream; entries are what a test says."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.seq = 5
        self.revision = 5
        self.registry_boot = "boot-1"
        self.lag_s = 0.0
        self.is_ready = True
        self._callbacks: list[Callable[[Entry], None]] = []
        self._moved = asyncio.Event()

    async def ready(self) -> None:
        while not self.is_ready:
            await self._moved.wait()

    def subscribe(self, callback: Callable[[Entry], None]) -> None:
        self._callbacks.append(callback)

    async def wait_for(self, revision: int, seq: int, timeout: float) -> None:
        async with asyncio.timeout(timeout):
            while self.revision < revision or self.seq < seq:
                await self._moved.wait()

    def tell(self, *events: WireEvent, changes: tuple[Any, ...] = (), resync: bool = False) -> None:
        for change in changes:
            self.view.apply(change)
        self.seq += 1
        self.revision += 1
        self._moved.set()
        self._moved = asyncio.Event()
        entry = Entry(
            self.seq, self.revision, changes, events, resync, self.view if resync else None
        )
        for callback in self._callbacks:
            callback(entry)


class FakeChannel:
    """Answers calls from a table of method -> coroutine function."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def call_with_header(
        self, method: str, request: Any, reply_type: Any, **more: Any
    ) -> tuple[Any, Any]:
        self._world.calls.append((method, request, more.get("context")))
        return await self._world.replies[method](request, self._world.replica)

    async def call(self, method: str, request: Any, reply_type: Any, **more: Any) -> Any:
        return (await self.call_with_header(method, request, reply_type, **more))[1]


class OwnOnly:
    """A policy that shows each qube itself."""

    def allows(self, service: str, argument: str, source: str, target: str) -> bool:
        del service, argument
        return source in ("dom0", target)


class World:
    """One Admin API on a socket below a directory."""

    def __init__(self, directory: Path) -> None:
        view = start_view()
        view.apply(QubePut(app()))
        self.replica = FakeReplica(view)
        self.calls: list[tuple[str, Any, Any]] = []
        self.replies: dict[str, Reply] = {}
        self.path = directory / "admin.sock"
        context = SimpleNamespace(
            replica=lambda with_hidden: self.replica,
            channel=lambda service: FakeChannel(self),
            log=__import__("logging").getLogger("test"),
        )
        self.backend = Backend(context)  # type: ignore[arg-type]
        self.api = AdminApi(
            self.backend,
            Actions(self.backend, OwnOnly(), PausedList(directory / "paused")),
            OwnOnly(),
        )
        self.gateway = Gateway(self.api)

    async def exchange(self, frame: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        try:
            writer.write(frame)
            writer.write_eof()
            return await asyncio.wait_for(reader.read(), 10)
        except ConnectionError:
            return b""
        finally:
            writer.close()

    async def ask(self, call: str, dest: str = "dom0", payload: bytes = b"") -> bytes:
        return await self.exchange(f"{call} dom0 name {dest}\0".encode() + payload)

    async def subscribe(
        self, dest: str = "dom0", source: str = "dom0", call: str = "admin.Events"
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        writer.write(f"{call} {source} name {dest}\0".encode())
        writer.write_eof()
        first = await asyncio.wait_for(reader.readexactly(len(CONNECTION_ESTABLISHED)), 10)
        assert first == CONNECTION_ESTABLISHED
        return reader, writer


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[World]:
    world = World(directory)
    await world.gateway.listen({"admin": bind_socket(world.path)})
    try:
        yield world
    finally:
        world.gateway.close_listeners()
        await world.api.stop()
        world.gateway.close()
        await asyncio.sleep(0)


def header(revision: int = 0, seq: int = 0) -> SimpleNamespace:
    return SimpleNamespace(revision=revision, seq=seq)


@pytest.fixture(params=["asyncio", "uvloop"])
def run(
    tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[[Callable[[World], Awaitable[None]]], None]]:
    def runner(test: Callable[[World], Awaitable[None]]) -> None:
        async def main() -> None:
            async with running(tmp_path) as world:
                await test(world)

        factory = uvloop.new_event_loop if request.param == "uvloop" else None
        with asyncio.Runner(loop_factory=factory) as loop_runner:
            loop_runner.run(main())

    yield runner


Runner = Callable[[Callable[[World], Awaitable[None]]], None]


# ---- the socket


def test_whole_frames_are_answered_and_others_dropped(run: Runner) -> None:
    async def test(world: World) -> None:
        assert (await world.ask("admin.label.List")).startswith(b"0\0red\n")
        assert await world.exchange(b"admin.label.List dom0 keyword dispvm\0") == b""
        assert await world.exchange(b"") == b""
        head = b"admin.label.Get+red dom0 name dom0\0"
        whole = head + b"x" * (REQUEST_LIMIT - len(head))
        assert (await world.exchange(whole)).startswith(b"2\0ProtocolError\0")
        assert await world.exchange(whole + b"x") == b""
        assert await world.exchange(head + b"x" * (1 << 20)) == b""

    run(test)


def test_nothing_is_answered_before_the_write_side_ends(run: Runner) -> None:
    async def test(world: World) -> None:
        reader, writer = await asyncio.open_unix_connection(str(world.path))
        writer.write(b"admin.label.List dom0 name dom0\0")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2)
        writer.write_eof()
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"0\0")
        writer.close()

    run(test)


class BusyAudit:
    """A log whose file a thread writes, until it is let."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.noted: list[dict[str, Any]] = []

    def note(self, record: dict[str, Any]) -> None:
        self.noted.append(record)

    @property
    def waiting(self) -> bool:
        return not self.done.is_set()

    async def written(self) -> None:
        await self.done.wait()


def test_what_leaves_a_record_waits_for_it_and_reads_do_not(run: Runner) -> None:
    async def test(world: World) -> None:
        audit = BusyAudit()
        world.api._audit = audit  # type: ignore[assignment]
        refused = asyncio.ensure_future(world.ask("admin.vm.tag.Set+a:b", "work"))
        while not audit.noted:
            await asyncio.sleep(0)
        assert (await world.ask("admin.label.List")).startswith(b"0\0")
        assert not refused.done()
        audit.done.set()
        assert (await refused).startswith(b"2\0")

    run(test)


def test_the_first_reads_after_a_start_wait_for_the_host(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers_module, "HOST_S", 60)

    async def test(world: World) -> None:
        world.replica.view.apply(FactRemoved("host"))
        asked = asyncio.ensure_future(world.ask("admin.property.Get+maxmem"))
        assert (await world.ask("admin.label.List")).startswith(b"0\0")
        await asyncio.sleep(0.05)
        assert not asked.done()
        world.replica.tell(changes=(FactPut(HostFact("sim", memory_kib=8 << 20, cpus=2)),))
        assert await asked == b"0\0default=True type=int 8192"
        # A registry that starts anew knows no host for a moment: nobody waits again.
        world.replica.view.apply(FactRemoved("host"))
        assert await world.ask("admin.property.Get+maxmem") == b"0\0default=True type=int "

    run(test)


def test_a_host_that_is_not_reported_is_waited_for_once(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers_module, "HOST_S", 0.1)

    async def test(world: World) -> None:
        world.replica.view.apply(FactRemoved("host"))
        began = asyncio.get_running_loop().time()
        assert (await world.ask("admin.vm.property.GetAll", "work")).startswith(b"0\0")
        assert asyncio.get_running_loop().time() - began >= 0.1
        monkeypatch.setattr(handlers_module, "HOST_S", 60)
        async with asyncio.timeout(5):
            assert (await world.ask("admin.property.Get+no_cpus")).startswith(b"0\0")

    run(test)


def test_the_oldest_unfinished_request_makes_room(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "CONNECTION_LIMIT", 2)

    async def test(world: World) -> None:
        idle = [await asyncio.open_unix_connection(str(world.path)) for _ in range(2)]
        assert (await world.ask("admin.label.List")).startswith(b"0\0")
        assert await asyncio.wait_for(idle[0][0].read(), 10) == b""
        assert world.gateway.counters["dropped_for_room"] == 1
        for _, writer in idle:
            writer.close()

    run(test)


def test_when_all_are_busy_the_newcomer_is_told(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "CONNECTION_LIMIT", 1)

    async def test(world: World) -> None:
        _, writer = await world.subscribe()
        reply = await world.ask("admin.label.List")
        assert reply.startswith(b"2\0QubesException\0")
        writer.close()

    run(test)


def test_binding_replaces_a_stale_socket_and_never_a_live_one(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    bind_socket(path).close()
    with bind_socket(path) as listening:
        assert path.stat().st_mode & 0o777 == 0o770
        with pytest.raises(OSError, match="already"):
            bind_socket(path)
        assert listening.fileno() >= 0


def test_sockets_are_inherited_by_name(tmp_path: Path) -> None:
    with bind_socket(tmp_path / "sock") as listening:
        found = inherited_sockets(f"admin:{os.dup(listening.fileno())}")
        assert found["admin"].family == socket.AF_UNIX
        found["admin"].close()
    with pytest.raises(ValueError, match="NAME:FD"):
        inherited_sockets("nonsense")


# ---- changes


def test_a_change_is_answered_after_its_events_are_out(run: Runner) -> None:
    async def test(world: World) -> None:
        reader, writer = await world.subscribe()
        event = WireEvent("work", "domain-tag-add:t", (("tag", "t"),), WORK_UUID)

        async def mutate(request: Any, replica: FakeReplica) -> tuple[Any, Any]:
            revision, seq = replica.revision + 1, replica.seq + 1
            # The stream is later than the reply.
            asyncio.get_running_loop().call_later(0.05, replica.tell, event)
            return header(revision, seq), registry_pb2.MutateReply()

        world.replies["bulkhead.api.Registry.Mutate"] = mutate
        assert await world.ask("admin.vm.tag.Set+t", "work") == b"0\0"
        wanted = b"1\0work\0domain-tag-add:t\0tag\0t\0\0"
        assert await asyncio.wait_for(reader.readexactly(len(wanted)), 1) == wanted
        method, request, context = world.calls[0]
        assert request.set_tag.qube == "work" and request.set_tag.tag == "t"
        assert context.on_behalf_of == "dom0" and len(context.request_id) == 16
        writer.close()

    run(test)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (bus_error("NOT_CONNECTED", "the registry is away"), b"nothing was changed"),
        (bus_error("NO_REPLY", "no answer"), b"outcome unknown"),
        (BusError("NOT_FOUND", "TAG_NOT_FOUND", "no such tag"), b"no such tag"),
    ],
)
def test_failed_changes_say_what_is_known(run: Runner, error: BusError, text: bytes) -> None:
    async def test(world: World) -> None:
        async def mutate(request: Any, replica: FakeReplica) -> tuple[Any, Any]:
            raise error

        world.replies["bulkhead.api.Registry.Mutate"] = mutate
        reply = await world.ask("admin.vm.tag.Remove+t", "work")
        assert reply.startswith(b"2\0Qubes") and text in reply

    run(test)


def operation(state: OperationState, **more: Any) -> Operation:
    return Operation("op-1", "START", specs.StartSpec("work"), (WORK_UUID,), state, **more)


def begin_start(world: World, outcome: Operation) -> None:
    """Answer Submit with a running operation that ends a little later."""

    async def submit(request: Any, replica: FakeReplica) -> tuple[Any, Any]:
        running = operation(OperationState.RUNNING)
        replica.tell(changes=(OperationPut(running),))
        asyncio.get_running_loop().call_later(
            0.05, lambda: replica.tell(changes=(OperationPut(outcome),))
        )
        reply = lifecycle_pb2.SubmitReply(revision=replica.revision)
        reply.operation.id = running.id
        return header(), reply

    world.replies["bulkhead.api.Lifecycle.Submit"] = submit


def test_an_operation_is_answered_at_its_end(run: Runner) -> None:
    async def test(world: World) -> None:
        begin_start(world, operation(OperationState.SUCCEEDED))
        assert await world.ask("admin.vm.Start", "work") == b"0\0"
        problem = Problem("RESOURCE_EXHAUSTED", "NOT_ENOUGH_MEMORY", "100% of memory is used")
        begin_start(world, operation(OperationState.FAILED, error=problem))
        reply = await world.ask("admin.vm.Start", "work")
        assert reply == b"2\0QubesMemoryError\0\x00100%% of memory is used\0"

    run(test)


@pytest.mark.parametrize("heals", [True, False])
def test_who_waits_for_a_stuck_operation_is_told(
    run: Runner, monkeypatch: pytest.MonkeyPatch, heals: bool
) -> None:
    patience = {**backend_module._PATIENCE, OperationState.STUCK: 10.0 if heals else 0.05}
    monkeypatch.setattr(backend_module, "_PATIENCE", patience)

    async def test(world: World) -> None:
        problem = Problem("INTERNAL", "STORAGE_FAILED", "the disk is gone")
        begin_start(world, operation(OperationState.STUCK, error=problem))
        if heals:
            ended = OperationPut(operation(OperationState.SUCCEEDED))
            asyncio.get_running_loop().call_later(0.2, lambda: world.replica.tell(changes=(ended,)))
        reply = await world.ask("admin.vm.Start", "work")
        if heals:
            assert reply == b"0\0"
        else:
            assert reply.startswith(b"2\0QubesException\0\0START is stuck: the disk is gone")

    run(test)


def test_a_change_that_does_not_reach_its_qube_in_time_says_so(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "APPLY_S", 0.05)

    async def test(world: World) -> None:
        async def mutate(request: Any, replica: FakeReplica) -> tuple[Any, Any]:
            replica.tell(changes=(OperationPut(operation(OperationState.QUEUED)),))
            return header(replica.revision, replica.seq), registry_pb2.MutateReply(
                apply_operation="op-1"
            )

        world.replies["bulkhead.api.Registry.Mutate"] = mutate
        reply = await world.ask("admin.vm.tag.Set+t", "work")
        assert reply.startswith(b"2\0QubesVMError\0\0the value is stored, but")
        assert b"op-1" in reply

    run(test)


def test_start_of_what_runs_asks_nobody(run: Runner) -> None:
    async def test(world: World) -> None:
        world.replica.view.apply(QubePut(replace(app(), run=Run(Phase.UP, "boot"))))
        assert await world.ask("admin.vm.Start", "work") == b"0\0"
        assert world.calls == []

    run(test)


def test_a_client_that_leaves_changes_nothing(run: Runner) -> None:
    async def test(world: World) -> None:
        asked = asyncio.Event()
        done = asyncio.Event()

        async def mutate(request: Any, replica: FakeReplica) -> tuple[Any, Any]:
            asked.set()
            await asyncio.sleep(0.05)
            done.set()
            return header(), registry_pb2.MutateReply()

        world.replies["bulkhead.api.Registry.Mutate"] = mutate
        _, writer = await asyncio.open_unix_connection(str(world.path))
        writer.write(b"admin.vm.tag.Set+t dom0 name work\0")
        writer.write_eof()
        await asyncio.wait_for(asked.wait(), 10)
        writer.close()
        await asyncio.wait_for(done.wait(), 10)

    run(test)


def test_an_error_of_ours_is_an_answer(run: Runner) -> None:
    async def test(world: World) -> None:
        async def mutate(request: Any, replica: FakeReplica) -> tuple[Any, Any]:
            raise ZeroDivisionError

        world.replies["bulkhead.api.Registry.Mutate"] = mutate
        reply = await world.ask("admin.vm.tag.Set+t", "work")
        assert reply.startswith(b"2\0QubesException\0") and b"ZeroDivision" not in reply

    run(test)


def test_calls_wait_for_the_first_view(run: Runner) -> None:
    async def test(world: World) -> None:
        world.replica.is_ready = False
        asking = asyncio.create_task(world.ask("admin.label.List"))
        await asyncio.sleep(0.05)
        assert not asking.done()
        world.replica.is_ready = True
        world.replica.tell()
        assert (await asking).startswith(b"0\0red")

    run(test)


def test_every_handler_of_the_table_is_there(run: Runner) -> None:
    async def test(world: World) -> None:
        actions = Actions(world.backend, DenyAll(), PausedList(world.path))
        for call in calls.all_calls():
            if call.socket == "exec" or call.stream:
                continue
            ways = (
                call.handler in READS,
                call.handler in WRITES,
                hasattr(actions, call.handler),
            )
            assert sum(ways) == 1, call

    run(test)


# ---- streams


def test_streams_get_what_concerns_them(run: Runner) -> None:
    async def test(world: World) -> None:
        every, w1 = await world.subscribe()
        only, w2 = await world.subscribe("work")
        guest, w3 = await world.subscribe("dom0", "work")
        world.replica.tell(
            WireEvent("tmpl", "domain-start", (), "x"),
            WireEvent("", "pool-add", (("pool", "p"),)),
            WireEvent("work", "domain-remove-from-disk", (), WORK_UUID),
            WireEvent("work", "domain-paused", (), WORK_UUID),
        )
        paused = b"1\0work\0domain-paused\0\0"
        wanted = {
            every: b"1\0tmpl\0domain-start\0\x001\0\0pool-add\0pool\0p\0\0" + paused,
            only: b"1\0work\0domain-remove-from-disk\0\0" + paused,
            guest: paused,
        }
        for reader, data in wanted.items():
            assert await asyncio.wait_for(reader.readexactly(len(data)), 5) == data
        for writer in (w1, w2, w3):
            writer.close()

    run(test)


def test_a_reader_that_goes_away_is_noticed(run: Runner) -> None:
    async def test(world: World) -> None:
        _, writer = await world.subscribe()
        assert world.gateway.connections == 1
        writer.close()
        async with asyncio.timeout(5):
            while world.gateway.connections:
                await asyncio.sleep(0.01)

    run(test)


def test_a_slow_reader_ends_with_a_reason(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "STREAM_BUFFER", 100_000)

    async def test(world: World) -> None:
        with socket.socket(socket.AF_UNIX) as slow:
            slow.setblocking(False)
            await asyncio.get_running_loop().sock_connect(slow, str(world.path))
            slow.sendall(b"admin.Events dom0 name dom0\0")
            slow.shutdown(socket.SHUT_WR)
            event = WireEvent("", "pool-add", (("pool", "x" * 1000),))
            async with asyncio.timeout(20):
                while not world.gateway.counters["slow_readers"]:
                    world.replica.tell(*[event] * 20)
                    await asyncio.sleep(0.001)
            received = b""
            async with asyncio.timeout(20):
                while chunk := await asyncio.get_running_loop().sock_recv(slow, 1 << 20):
                    received += chunk
            assert received.rsplit(b"\0\x002\0", 1)[1].startswith(b"QubesException\0")
        other, writer = await world.subscribe()
        world.replica.tell(event)
        assert await asyncio.wait_for(other.read(20), 5)
        writer.close()

    run(test)


def test_a_resync_ends_the_streams(run: Runner) -> None:
    async def test(world: World) -> None:
        world.replica.tell(resync=True)  # the first load, before anybody listens
        reader, writer = await world.subscribe()
        world.replica.tell(resync=True)
        assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"2\0QubesException\0")
        writer.close()

    run(test)


def test_stats_of_a_halted_qube_ends_with_a_refusal(run: Runner) -> None:
    async def test(world: World) -> None:
        reader, writer = await world.subscribe("work", call="admin.vm.Stats")
        reply = await asyncio.wait_for(reader.read(), 5)
        assert reply.startswith(b"2\0QubesVMNotRunningError\0")
        writer.close()

    run(test)


def test_watch_follows_an_operation_to_its_end(run: Runner) -> None:
    async def test(world: World) -> None:
        world.replica.tell(changes=(OperationPut(operation(OperationState.RUNNING)),))
        reader, writer = await world.subscribe(call="bulkhead.op.Watch+op-1")
        world.replica.tell(changes=(OperationPut(operation(OperationState.RUNNING, progress=0.5)),))
        world.replica.tell(changes=(OperationPut(operation(OperationState.SUCCEEDED)),))
        received = await asyncio.wait_for(reader.read(), 5)
        assert received.count(b"bulkhead-operation") == 3
        assert b"progress\x000.5\0" in received and b"state\0succeeded\0" in received
        writer.close()

    run(test)
