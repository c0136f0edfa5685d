"""What the registry promises its callers, method by method, and its own tables."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bulkhead import codec
from bulkhead.api import records_pb2, registry_pb2
from bulkhead.bus.client import CallContext, Channel
from bulkhead.bus.errors import REASONS as BUS_REASONS
from bulkhead.bus.errors import BusError
from bulkhead.bus.methods import Effect, full_service_name, methods_of
from bulkhead.model.plan.operation_table import OPERATIONS
from bulkhead.model.records import (
    Fact,
    HostFact,
    Operation,
    OperationState,
    PoolFact,
    fact_key,
)
from bulkhead.model.refusal import REASONS as MODEL_REASONS
from bulkhead.model.specs import ImportSpec, StartSpec
from clients.bus import RegistryClient
from services.registry import failpoint_table
from services.registry.__main__ import build
from services.registry.core import announce
from services.registry.core.reasons import REASONS
from services.registry.handlers import RegistryHandlers
from tests.fakes.bus import Instance
from tests.fault.test_registry_store import qubes_xml

SOURCE = Path(__file__).parents[2] / "services/registry"
METHODS = methods_of(full_service_name("Registry"))


def texts() -> dict[str, str]:
    return {str(path): path.read_text() for path in SOURCE.rglob("*.py")}


# ---- tables


def test_every_failpoint_is_passed_and_declared() -> None:
    passed: set[str] = set()
    for path, text in texts().items():
        if not path.endswith("failpoint_table.py"):
            passed.update(re.findall(r'hit\("(registry\.[a-z_.]+)"\)', text))
    assert passed == set(failpoint_table.ROWS)


def test_every_raised_reason_is_in_a_table() -> None:
    known = {*REASONS, *MODEL_REASONS, *BUS_REASONS}
    raised: set[str] = set()
    for text in texts().values():
        raised.update(re.findall(r'(?:_error|Refusal|BusError)\(\s*"([A-Z_]+)"', text))
    assert raised and raised <= known
    unused = {
        name
        for name in REASONS
        if not any(f'"{name}"' in t for p, t in texts().items() if not p.endswith("reasons.py"))
    }
    assert unused == set()


def test_lifecycle_may_announce_all_that_its_steps_make() -> None:
    view_of = _sample_view()
    for kind, row in OPERATIONS.items():
        spec: object = ImportSpec("work", "private") if kind == "IMPORT" else StartSpec("work")
        operation = Operation("o", kind, spec, ("u",), OperationState.RUNNING)
        for step in row.steps:
            if step.events is None:
                continue
            made = step.events(view_of, operation)
            assert made, f"{kind}.{step.name} makes no event for the sample"
            for event in made:
                assert announce.may_announce("lifecycle", event.name), event.name


def _sample_view() -> Any:
    from bulkhead.model.records import Qube, QubePut
    from bulkhead.model.view import View

    view = View()
    view.apply(QubePut(Qube("u", "work", 1, "AppVM")))
    return view


# ---- calls


def run(work: Callable[[Instance], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60), Instance() as instance:
            instance.settings.state_dir.mkdir(parents=True)
            qubes_xml(instance.settings.state_dir)
            await instance.serve("registry", build, ["Registry"])
            await work(instance)

    asyncio.run(limited())


def client(instance: Instance, me: str) -> RegistryClient:
    return RegistryClient(instance.connections(me).channel("registry"))


def _create(name: str, operation_id: str) -> registry_pb2.BeginRequest:
    return registry_pb2.BeginRequest(
        operation_id=operation_id,
        spec=records_pb2.OperationSpec(
            create=records_pb2.CreateSpec(name=name, klass="AppVM", label="red", template="tmpl")
        ),
    )


OPERATION = "0b5c1a52-6f8b-4a58-9a52-3b5f3c8a1e11"
HOST = HostFact("sim", cpus=2)
# Method -> (caller, request); the order is that of one create.
WRITES: dict[str, tuple[str, Any]] = {
    "TakeEpoch": ("lifecycle", registry_pb2.TakeEpochRequest()),
    "Mutate": (
        "adminapi",
        registry_pb2.MutateRequest(
            set_tag=registry_pb2.SetTag(qube="work", tag="t"),
        ),
    ),
    "MutatePreload": (
        "dispvm",
        registry_pb2.PreloadRequest(
            qube="tmpl", features=[records_pb2.KeyValue(key="preload-dispvm", value="")]
        ),
    ),
    "Begin": ("lifecycle", _create("fresh", OPERATION)),
    "Advance": (
        "lifecycle",
        registry_pb2.AdvanceRequest(
            operation_id=OPERATION,
            epoch=1,
            cursor="ensure",
            state=records_pb2.OPERATION_STATE_RUNNING,
            data={"k": "v"},
        ),
    ),
    "CancelOperation": (
        "lifecycle",
        registry_pb2.CancelOperationRequest(operation_id=OPERATION),
    ),
    "End": (
        "lifecycle",
        registry_pb2.EndRequest(
            operation_id=OPERATION, epoch=1, outcome=records_pb2.OPERATION_STATE_SUCCEEDED
        ),
    ),
    "Facts": (
        "domains",
        registry_pb2.FactsRequest(put=[codec.fact_to_proto(HOST, fact_key(HOST))]),
    ),
    "Announce": (
        "lifecycle",
        registry_pb2.AnnounceRequest(
            events=[records_pb2.WireEvent(name="pool-add")],
        ),
    ),
    "ResolveForeignEdit": ("operator", registry_pb2.ResolveForeignEditRequest()),
}


def test_every_method_that_writes_is_in_the_table() -> None:
    assert set(WRITES) == {
        name.rpartition(".")[2] for name, m in METHODS.items() if m.effect is not Effect.READ
    }
    for method in METHODS.values():
        assert hasattr(RegistryHandlers, method.handler)


async def _call(channel: Channel, name: str, request: Any, request_id: bytes) -> Any:
    full = f"bulkhead.api.Registry.{name}"
    try:
        header, reply = await channel.call_with_header(
            full,
            request,
            METHODS[full].reply_type,
            timeout=20,
            context=CallContext(request_id=request_id),
        )
    except BusError as error:
        return error.reason, error.message
    return header.revision, header.seq, reply


def test_a_repeat_of_any_write_is_answered_the_same_without_a_second_effect() -> None:
    async def work(instance: Instance) -> None:
        operator = client(instance, "operator")
        for name, (caller, request) in WRITES.items():
            channel = instance.connections(caller).channel("registry")
            request_id = secrets.token_bytes(16)
            first = await _call(channel, name, request, request_id)
            if name == "ResolveForeignEdit":
                assert first[0] == "NO_FOREIGN_EDIT"
            else:
                assert isinstance(first[0], int), f"{name} was refused: {first}"
            after = await operator.store_status(registry_pb2.StoreStatusRequest())
            assert await _call(channel, name, request, request_id) == first
            again = await operator.store_status(registry_pb2.StoreStatusRequest())
            assert (again.revision, again.seq) == (after.revision, after.seq), name
        # Another id for what has been done: no second effect where its key says so.
        for name in ("Begin", "End"):
            caller, request = WRITES[name]
            channel = instance.connections(caller).channel("registry")
            before = await operator.store_status(registry_pb2.StoreStatusRequest())
            answer = await _call(channel, name, request, secrets.token_bytes(16))
            after = await operator.store_status(registry_pb2.StoreStatusRequest())
            assert after.revision == before.revision
            assert answer[2].operation.id == OPERATION

    run(work)


def test_one_id_for_two_methods_is_refused() -> None:
    async def work(instance: Instance) -> None:
        channel = instance.connections("lifecycle").channel("registry")
        request_id = secrets.token_bytes(16)
        await _call(channel, "TakeEpoch", WRITES["TakeEpoch"][1], request_id)
        answer = await _call(channel, "Begin", WRITES["Begin"][1], request_id)
        assert answer[0] == "REQUEST_ID_REUSED"

    run(work)


def test_who_may_not_announce_may_not_end_with_it_either() -> None:
    async def work(instance: Instance) -> None:
        lifecycle = client(instance, "lifecycle")
        await lifecycle.take_epoch(registry_pb2.TakeEpochRequest())
        await lifecycle.begin(_create("fresh", OPERATION))
        forged = records_pb2.WireEvent(name="domain-add", pairs=[])
        for call in (
            lifecycle.announce(registry_pb2.AnnounceRequest(events=[forged])),
            lifecycle.end(
                registry_pb2.EndRequest(
                    operation_id=OPERATION,
                    epoch=1,
                    outcome=records_pb2.OPERATION_STATE_FAILED,
                    events=[forged],
                )
            ),
        ):
            with pytest.raises(BusError) as refused:
                await call
            assert refused.value.reason == "NOT_YOURS"
        digest = registry_pb2.AnnounceRequest(rules_digest="ab")
        with pytest.raises(BusError) as refused:
            await lifecycle.announce(digest)
        assert refused.value.reason == "NOT_YOURS"

    run(work)


async def reported(instance: Instance) -> None:
    """What a start waits for: the host and a pool are told of."""
    facts: dict[str, Fact] = {"domains": HOST, "storage": PoolFact("varlibqubes")}
    for service, fact in facts.items():
        put = [codec.fact_to_proto(fact, fact_key(fact))]
        await client(instance, service).facts(registry_pb2.FactsRequest(put=put))


def test_nothing_that_reads_facts_begins_before_they_are_told() -> None:
    async def work(instance: Instance) -> None:
        lifecycle = client(instance, "lifecycle")
        start = registry_pb2.BeginRequest(
            spec=records_pb2.OperationSpec(start=records_pb2.StartSpec(qube="work"))
        )
        with pytest.raises(BusError) as refused:
            await lifecycle.begin(start, timeout=0.2)
        assert (refused.value.code, refused.value.reason) == ("UNAVAILABLE", "FACTS_MISSING")
        await reported(instance)
        assert (await lifecycle.begin(start)).operation.kind == "START"

    run(work)


def test_whose_turn_came_before_the_facts_runs_when_they_are_told() -> None:
    """A registry that starts again has the operations, and no facts at first."""

    async def work(instance: Instance) -> None:
        lifecycle = client(instance, "lifecycle")
        await lifecycle.take_epoch(registry_pb2.TakeEpochRequest())
        revert = records_pb2.RevertSpec(qube="work", volume="private", revision="1-2020")
        await reported(instance)
        await lifecycle.begin(
            registry_pb2.BeginRequest(
                spec=records_pb2.OperationSpec(revert=revert), operation_id=OPERATION
            )
        )
        start = records_pb2.OperationSpec(start=records_pb2.StartSpec(qube="work"))
        waits = (await lifecycle.begin(registry_pb2.BeginRequest(spec=start))).operation
        assert waits.state == records_pb2.OPERATION_STATE_QUEUED
        domains = client(instance, "domains")
        await domains.facts(registry_pb2.FactsRequest(removed=["host"]))
        await lifecycle.end(
            registry_pb2.EndRequest(
                operation_id=OPERATION,
                epoch=1,
                outcome=records_pb2.OPERATION_STATE_SUCCEEDED,
            )
        )

        async def state() -> Any:
            epoch = await lifecycle.take_epoch(registry_pb2.TakeEpochRequest())
            return [(o.id, o.state) for o in epoch.unfinished]

        assert await state() == [(waits.id, records_pb2.OPERATION_STATE_QUEUED)]
        await reported(instance)
        assert await state() == [(waits.id, records_pb2.OPERATION_STATE_RUNNING)]

    run(work)


def test_a_quarantined_qube_is_listed_and_repaired_by_a_set() -> None:
    async def work(instance: Instance) -> None:
        admin, operator = client(instance, "adminapi"), client(instance, "operator")
        status = await operator.store_status(registry_pb2.StoreStatusRequest())
        assert len(status.quarantined) == 1
        assert status.quarantined[0].startswith("work: property maxmem")
        await reported(instance)
        with pytest.raises(BusError) as refused:
            await client(instance, "lifecycle").begin(
                registry_pb2.BeginRequest(
                    spec=records_pb2.OperationSpec(start=records_pb2.StartSpec(qube="work"))
                )
            )
        assert refused.value.reason == "QUBE_QUARANTINED"
        repair = registry_pb2.SetProperty(qube="work", name="maxmem", untrusted_value="2000")
        await admin.mutate(registry_pb2.MutateRequest(set_property=repair))
        status = await operator.store_status(registry_pb2.StoreStatusRequest())
        assert not status.quarantined

    async def limited() -> None:
        async with asyncio.timeout(60), Instance() as instance:
            state = instance.settings.state_dir
            state.mkdir(parents=True)
            qubes_xml(state)
            path = state / "qubes.xml"
            data = path.read_bytes()
            bad = b'<property name="template">tmpl</property>'
            assert data.count(bad) == 1
            path.write_bytes(data.replace(bad, bad + b'<property name="maxmem">lots</property>'))
            await instance.serve("registry", build, ["Registry"])
            await work(instance)

    asyncio.run(limited())
