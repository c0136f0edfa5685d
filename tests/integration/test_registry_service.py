"""The registry as a process of its own, asked and followed over the bus."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import zmq

from bulkhead import codec
from bulkhead.api import records_pb2, registry_pb2
from bulkhead.bus import sockets
from bulkhead.bus.client import CallContext
from bulkhead.bus.errors import BusError
from bulkhead.bus.events import Entry, ReplicaRunner
from bulkhead.bus.frames import TOPIC_HIDDEN, TOPIC_VISIBLE
from bulkhead.model.records import Fact, HostFact, Phase, PoolFact, PowerFact, QubePut, fact_key
from bulkhead.model.specs import ApplySpec
from clients.bus import RegistryClient
from tests.fakes.bus import Instance
from tests.fault.test_registry_store import qubes_xml

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
LIMIT_S = 60


class World:
    """An instance with a store and a running registry."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.settings = instance.settings
        self.settings.state_dir.mkdir(parents=True)
        qubes_xml(self.settings.state_dir)
        self.process: asyncio.subprocess.Process | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._replicas: list[ReplicaRunner] = []

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.registry",
            "--root",
            str(self.settings.root),
            cwd=ROOT,
            stderr=asyncio.subprocess.DEVNULL,
        )

    async def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return await self.process.wait()

    def client(self, me: str) -> RegistryClient:
        return RegistryClient(self.instance.connections(me).channel("registry"))

    async def replica(self, me: str, *, with_hidden: bool) -> ReplicaRunner:
        def spawn(work: Coroutine[Any, Any, None], name: str) -> object:
            task = asyncio.get_running_loop().create_task(work, name=name)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return task

        runner = ReplicaRunner(
            self.settings,
            self.instance.connections(me),
            with_hidden=with_hidden,
            log=logging.getLogger("bulkhead.test"),
            spawn=spawn,
        )
        self._replicas.append(runner)
        await runner.ready()
        return runner

    async def close(self) -> None:
        for runner in self._replicas:
            runner.close()
        if self.process is not None and self.process.returncode is None:
            await self.end(signal.SIGKILL)


def run(work: Callable[[World], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            async with Instance() as instance:
                world = World(instance)
                try:
                    await world.start()
                    await work(world)
                finally:
                    await world.close()

    asyncio.run(limited())


def feature(value: str, name: str = "f", qube: str = "work") -> registry_pb2.MutateRequest:
    return registry_pb2.MutateRequest(
        set_feature=registry_pb2.SetFeature(qube=qube, name=name, value=value)
    )


async def refused(call: Awaitable[object]) -> BusError:
    with pytest.raises(BusError) as caught:
        await call
    return caught.value


def create(name: str) -> registry_pb2.BeginRequest:
    spec = records_pb2.CreateSpec(name=name, klass="AppVM", label="red", template="tmpl")
    return registry_pb2.BeginRequest(spec=records_pb2.OperationSpec(create=spec))


def started(name: str) -> registry_pb2.BeginRequest:
    return registry_pb2.BeginRequest(
        spec=records_pb2.OperationSpec(start=records_pb2.StartSpec(qube=name))
    )


def succeeded(operation: records_pb2.Operation, epoch: int) -> registry_pb2.EndRequest:
    return registry_pb2.EndRequest(
        operation_id=operation.id, epoch=epoch, outcome=records_pb2.OPERATION_STATE_SUCCEEDED
    )


def test_a_change_reaches_the_replica_with_its_events() -> None:
    async def work(world: World) -> None:
        admin = world.client("adminapi")
        replica = await world.replica("adminapi", with_hidden=False)
        entries: list[Entry] = []
        replica.subscribe(entries.append)
        header, _ = await admin.channel.call_with_header(
            "bulkhead.api.Registry.Mutate", feature("1"), registry_pb2.MutateReply, timeout=10
        )
        await replica.wait_for(header.revision, header.seq, 10)
        qube = replica.view.qube("work")
        assert qube is not None and qube.features["f"] == "1"
        assert qube.revision == header.revision
        names = [event.name for entry in entries for event in entry.events]
        assert names == ["domain-feature-pre-set:f", "domain-feature-set:f"]
        error = await refused(admin.mutate(feature("1", qube="nobody")))
        assert error.reason == "QUBE_NOT_FOUND"

    run(work)


def test_dry_runs_and_etags() -> None:
    async def work(world: World) -> None:
        admin = world.client("adminapi")
        header, _ = await admin.channel.call_with_header(
            "bulkhead.api.Registry.Mutate", feature("1"), registry_pb2.MutateReply, timeout=10
        )
        dry = CallContext(validate_only=True)
        await admin.mutate(feature("2"), context=dry)
        assert (await refused(admin.mutate(feature("2", qube="nobody"), context=dry))).reason == (
            "QUBE_NOT_FOUND"
        )
        replica = await world.replica("adminapi", with_hidden=False)
        assert replica.revision == header.revision
        await admin.mutate(feature("3"), context=CallContext(etag=header.revision))
        error = await refused(admin.mutate(feature("4"), context=CallContext(etag=header.revision)))
        assert (error.code, error.reason) == ("ABORTED", "CHANGED_MEANWHILE")

    run(work)


def test_hidden_records_are_for_those_who_may_see_them() -> None:
    async def work(world: World) -> None:
        lifecycle = world.client("lifecycle")
        public = await world.replica("adminapi", with_hidden=False)
        full = await world.replica("lifecycle", with_hidden=True)
        told: list[Entry] = []
        public.subscribe(told.append)
        epoch = (await lifecycle.take_epoch(registry_pb2.TakeEpochRequest())).epoch
        header, begun = await lifecycle.channel.call_with_header(
            "bulkhead.api.Registry.Begin", create("fresh"), registry_pb2.BeginReply, timeout=10
        )
        for replica in (public, full):
            await replica.wait_for(header.revision, header.seq, 10)
        assert full.view.qube_any("fresh") is not None
        assert public.view.qube_any("fresh") is None
        assert public.view.operations[begun.operation.id].kind == "CREATE"
        # A snapshot taken now does not show it either.
        late = await world.replica("adminapi", with_hidden=False)
        assert late.view.qube_any("fresh") is None
        assert len(late.view) == len(public.view)

        header, _ = await lifecycle.channel.call_with_header(
            "bulkhead.api.Registry.End",
            succeeded(begun.operation, epoch),
            registry_pb2.EndReply,
            timeout=10,
        )
        for replica in (public, full, late):
            await replica.wait_for(header.revision, header.seq, 10)
            assert replica.view.qube("fresh") is not None
        names = [event.name for entry in told for event in entry.events]
        assert names[0] == "domain-add" and names[-1] == "domain-create-on-disk"
        assert not any(
            isinstance(change, QubePut) and change.qube.hidden
            for entry in told
            for change in entry.changes
        )
        stale = await refused(lifecycle.end(succeeded(begun.operation, epoch - 1)))
        assert stale.reason == "STALE_EPOCH"

    run(work)


def test_adminapi_cannot_have_hidden_records() -> None:
    async def work(world: World) -> None:
        admin = world.client("adminapi")
        error = await refused(admin.snapshot(registry_pb2.SnapshotRequest(with_hidden=True)))
        assert error.reason == "HIDDEN_REFUSED"
        # Nor by subscribing to the other topic.
        connections = world.instance.connections("adminapi")
        sub = sockets.sub(connections.context, plain=connections.plain)
        try:
            sub.subscribe(TOPIC_HIDDEN)
            sub.subscribe(TOPIC_VISIBLE)
            sub.connect(world.settings.socket("registry", "stream"))
            seen: set[bytes] = set()
            loop = asyncio.get_running_loop()
            for number in range(3):
                await admin.mutate(feature(str(number)))
                if await loop.run_in_executor(None, sub.poll, 5000):
                    with contextlib.suppress(zmq.Again):
                        while True:
                            seen.add(sub.recv_multipart(zmq.NOBLOCK)[0])
            assert seen == {TOPIC_VISIBLE}
        finally:
            sub.close()

    run(work)


def test_a_kill_loses_nothing_and_repeats_are_answered_again() -> None:
    async def work(world: World) -> None:
        admin = world.client("adminapi")
        replica = await world.replica("adminapi", with_hidden=False)
        resynced = asyncio.Event()
        replica.subscribe(lambda entry: resynced.set() if entry.resync else None)
        request_id = secrets.token_bytes(16)
        context = CallContext(request_id=request_id)
        header, first = await admin.channel.call_with_header(
            "bulkhead.api.Registry.Mutate",
            feature("kept"),
            registry_pb2.MutateReply,
            timeout=10,
            context=context,
        )
        await world.end(signal.SIGKILL)
        await world.start()
        again, second = await admin.channel.call_with_header(
            "bulkhead.api.Registry.Mutate",
            feature("kept"),
            registry_pb2.MutateReply,
            timeout=10,
            context=context,
        )
        assert (again.revision, second) == (header.revision, first)
        # It may not ask for a seq of the registry's earlier run.
        await replica.wait_for(again.revision, again.seq, 10)
        await resynced.wait()
        qube = replica.view.qube("work")
        assert qube is not None and qube.features["f"] == "kept"
        header, _ = await admin.channel.call_with_header(
            "bulkhead.api.Registry.Mutate", feature("more"), registry_pb2.MutateReply, timeout=10
        )
        assert header.revision == again.revision + 1

    run(work)


def test_facts_are_streamed_owned_and_not_stored() -> None:
    async def work(world: World) -> None:
        domains, storage = world.client("domains"), world.client("storage")
        replica = await world.replica("adminapi", with_hidden=False)
        before = replica.revision
        host = HostFact("sim", cpus=3)
        report = registry_pb2.FactsRequest(put=[codec.fact_to_proto(host, fact_key(host))])
        header, _ = await domains.channel.call_with_header(
            "bulkhead.api.Registry.Facts", report, registry_pb2.FactsReply, timeout=10
        )
        await replica.wait_for(header.revision, header.seq, 10)
        assert replica.view.host == host and replica.revision == before
        assert (await refused(storage.facts(report))).reason == "NOT_YOURS"
        assert (await refused(world.client("adminapi").facts(report))).reason == (
            "CALLER_NOT_ALLOWED"
        )
        late = await world.replica("dispvm", with_hidden=True)
        assert late.view.host == host
        await world.end(signal.SIGKILL)
        await world.start()
        fresh = await world.replica("adminapi", with_hidden=False)
        assert fresh.view.host is None

    run(work)


def test_a_live_change_of_a_running_qube_begins_an_apply() -> None:
    async def work(world: World) -> None:
        lifecycle, admin = world.client("lifecycle"), world.client("adminapi")
        replica = await world.replica("lifecycle", with_hidden=True)
        epoch = (await lifecycle.take_epoch(registry_pb2.TakeEpochRequest())).epoch
        facts: dict[str, Fact] = {"domains": HostFact("sim"), "storage": PoolFact("varlibqubes")}
        for service, fact in facts.items():
            put = [codec.fact_to_proto(fact, fact_key(fact))]
            await world.client(service).facts(registry_pb2.FactsRequest(put=put))
        begun = (await lifecycle.begin(started("work"))).operation
        work = begun.subjects[0]
        await lifecycle.advance(
            registry_pb2.AdvanceRequest(
                operation_id=begun.id,
                epoch=epoch,
                cursor="resume",
                state=records_pb2.OPERATION_STATE_RUNNING,
                pivoted=True,
            )
        )
        boot = begun.data["boot_id"]
        power = PowerFact(work, boot, 1, "running", xid=7)
        await world.client("domains").facts(
            registry_pb2.FactsRequest(put=[codec.fact_to_proto(power, fact_key(power))])
        )
        await lifecycle.end(succeeded(begun, epoch))
        header, reply = await admin.channel.call_with_header(
            "bulkhead.api.Registry.Mutate",
            feature("1", name="service.x"),
            registry_pb2.MutateReply,
            timeout=10,
        )
        await replica.wait_for(header.revision, header.seq, 10)
        qube = replica.view.by_uuid_any(work)
        assert qube is not None and qube.run.phase is Phase.UP and qube.run.boot_id == boot
        assert list(reply.apply_operations) == [reply.apply_operation]
        operation = replica.view.operations[reply.apply_operation]
        assert isinstance(operation.spec, ApplySpec)
        assert operation.kind == "APPLY" and operation.spec.revision == header.revision
        unfinished = (await lifecycle.take_epoch(registry_pb2.TakeEpochRequest())).unfinished
        assert [o.id for o in unfinished] == [reply.apply_operation]

    run(work)


def test_history_status_and_dump() -> None:
    async def work(world: World) -> None:
        admin, operator = world.client("adminapi"), world.client("operator")
        first = await operator.store_status(registry_pb2.StoreStatusRequest())
        for number in range(3):
            await admin.mutate(feature(str(number)), context=CallContext(on_behalf_of="work"))
        history = await operator.history(registry_pb2.HistoryRequest(after_revision=first.revision))
        assert [e.revision for e in history.entries] == [first.revision + n for n in (1, 2, 3)]
        assert not history.more
        assert {e.caller for e in history.entries} == {"adminapi"}
        assert {e.source for e in history.entries} == {"work"}
        for earlier, later in zip(history.entries, history.entries[1:]):
            assert later.previous_hash == earlier.hash
        (after,) = json.loads(history.entries[-1].after).values()
        assert after["features"] == {"f": "2"}
        newest = await operator.history(
            registry_pb2.HistoryRequest(limit=1, reverse=True, qube="work")
        )
        assert [e.revision for e in newest.entries] == [first.revision + 3] and newest.more
        none = await operator.history(registry_pb2.HistoryRequest(qube="tmpl"))
        assert not none.entries
        status = await operator.store_status(registry_pb2.StoreStatusRequest())
        assert status.revision == first.revision + 3 and not status.foreign_edit
        dump = await operator.dump(registry_pb2.DumpRequest())
        assert dump.last and '"f":"2"' in dump.canonical_json

    run(work)


def test_snapshots_come_in_pages_of_one_moment() -> None:
    async def work(world: World) -> None:
        admin = world.client("adminapi")
        for number in range(4):
            notes = registry_pb2.SetNotes(
                qube="work" if number % 2 else "tmpl", notes="x" * 200_000
            )
            await admin.mutate(registry_pb2.MutateRequest(set_notes=notes))
        first = await admin.snapshot(registry_pb2.SnapshotRequest())
        assert not first.last
        await admin.mutate(feature("later"))
        changes = list(first.changes)
        page = first
        number = 0
        while not page.last:
            number += 1
            page = await admin.snapshot(
                registry_pb2.SnapshotRequest(page=number, snapshot_id=first.snapshot_id)
            )
            assert (page.seq, page.revision) == (first.seq, first.revision)
            changes.extend(page.changes)
        qubes = {c.qube.name: c.qube for c in changes if c.WhichOneof("what") == "qube"}
        assert set(qubes) == {"dom0", "tmpl", "work"}
        assert not qubes["work"].features
        other = world.client("lifecycle")
        asked = registry_pb2.SnapshotRequest(page=1, snapshot_id=first.snapshot_id)
        assert (await refused(other.snapshot(asked))).reason == "SNAPSHOT_GONE"

    run(work)


def test_an_orderly_end_leaves_nothing_to_replay() -> None:
    async def work(world: World) -> None:
        await world.client("adminapi").mutate(feature("last"))
        assert await world.end() == 0
        assert b">last</feature>" in world.settings.store_file.read_bytes()
        assert world.settings.store_file.stat().st_mode & 0o777 == 0o660
        assert world.settings.journal_file.stat().st_mode & 0o777 == 0o600

    run(work)


def test_a_second_registry_does_not_start() -> None:
    async def work(world: World) -> None:
        await world.replica("adminapi", with_hidden=False)
        # Another instance's settings, the same state directory.
        other = Instance()
        try:
            state = other.settings.state_dir
            state.parent.mkdir(parents=True)
            state.symlink_to(world.settings.state_dir)
            second = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "services.registry",
                "--root",
                str(other.root),
                cwd=ROOT,
                stderr=asyncio.subprocess.PIPE,
            )
            _, said = await second.communicate()
            assert second.returncode == 78
            assert b"another registry" in said
        finally:
            await other.__aexit__()
        await world.client("adminapi").mutate(feature("still"))

    run(work)


def test_a_store_is_made_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.registry.initialise", "--root", str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0
    state = tmp_path / "var/lib/qubes"
    before = (state / "qubes.xml").read_bytes()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert again.returncode == 78 and b"exists" in again.stderr
    assert (state / "qubes.xml").read_bytes() == before
    assert {p.name for p in state.iterdir() if p.is_dir()} >= {
        "appvms",
        "vm-templates",
        "vm-kernels",
        "firewall",
    }
