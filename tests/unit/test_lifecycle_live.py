"""What is brought to a running qube: its rules in a guest netvm, and a stop that overtakes it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from bulkhead.api import domains_pb2, firewall_pb2
from bulkhead.bus.errors import BusError
from bulkhead.model.records import (
    Change,
    FactPut,
    HostFact,
    OperationPut,
    OperationState,
    Phase,
    Run,
    WireEvent,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import ApplySpec, RemoveSpec, SetFeature, SetProperty
from services.lifecycle.steps.live import Apply
from services.registry.core import works
from services.registry.core.group import Numbers
from tests.unit.plan_world import World, world


@pytest.fixture
def w() -> World:
    made = world()
    made.start("sys-net")
    made.start("work")
    return made


# ---- which rules need bringing


def announced(w: World, qube: str, *names: str, digest: str | None = None) -> tuple[str, ...]:
    """What the firewall's announcement about the qube puts: kinds of records."""
    uuid = w.qube(qube).uuid
    ids = iter(f"new-{number}" for number in range(9))
    work = works.Announce(
        "firewall",
        uuid,
        "",
        tuple(WireEvent("", name, subject_uuid=uuid) for name in names),
        digest,
        w.time,
        works.Outside(lambda: next(ids), lambda limit: 0),
    )
    before = dict(w.view.operations)
    planned = work.plan(w.view, Numbers())
    assert w.view.operations == before
    assert [event.subject for event in planned.events] == [qube] * len(names)
    for change in planned.changes:
        if isinstance(change, OperationPut):  # and nothing but the rules
            assert isinstance(change.operation.spec, ApplySpec)
            assert change.operation.spec.parts == ("rules",)
    assert planned.durable is bool(planned.changes)
    return tuple(type(change).__name__ for change in planned.changes)


CHANGED = "firewall-changed"


def test_new_rules_of_a_running_client_begin_an_apply(w: World) -> None:
    assert announced(w, "work", CHANGED, digest="ab") == ("QubePut", "OperationPut")
    # The same rules, or Reload: the guest is to read them again all the same.
    assert announced(w, "work", CHANGED) == ("OperationPut",)
    assert announced(w, "work", CHANGED, digest=w.qube("work").rules_digest) == ("OperationPut",)
    # A digest that is only told anew changes nothing for the guest.
    assert announced(w, "work", digest="ab") == ("QubePut",)


def test_rules_that_no_guest_reads_begin_nothing(w: World) -> None:
    assert announced(w, "vault", CHANGED, digest="ab") == ("QubePut",)  # halted
    w.start("alone")
    assert announced(w, "alone", CHANGED) == ()  # no netvm
    w.view.apply(FactPut(HostFact("kvm", memory_kib=1 << 24, cpus=4)))
    assert announced(w, "work", CHANGED) == ()  # a namespace: the firewall's own work


def test_a_netvm_that_does_not_run_reads_nothing(w: World) -> None:
    w.patch("sys-net", run=Run())
    assert announced(w, "work", CHANGED) == ()


def test_a_change_during_a_start_waits_for_its_end(w: World) -> None:
    record = w.qube("work")
    w.patch("work", run=replace(record.run, phase=Phase.STARTING))
    assert announced(w, "work", CHANGED) == ("OperationPut",)


def test_a_full_queue_refuses_the_announcement_so_that_it_comes_again(w: World) -> None:
    begun = w.begin(ApplySpec(w.qube("work").uuid, w.qube("work").run.boot_id)).operation
    for number in range(8):
        waits = replace(begun, id=f"w{number}", kind="RESIZE", state=OperationState.QUEUED)
        w.view.apply(OperationPut(waits))
    with pytest.raises(Refusal) as refused:
        announced(w, "work", CHANGED, digest="ab")
    assert refused.value.reason == "QUBE_BUSY"
    assert w.qube("work").rules_digest == ""


def test_a_netvm_that_nobody_waits_for_refuses_no_change_of_a_client(w: World) -> None:
    record = w.qube("sys-net")
    w.set("vault", "netvm", "sys-net")
    for operation in list(w.view.operations_on(record.uuid)):
        w.end(operation)
    begun = w.begin(ApplySpec(record.uuid, record.run.boot_id)).operation
    outside = works.Outside(w.uuid, lambda limit: 0)

    def gone() -> list[str]:
        work = works.Begin(RemoveSpec("vault"), "dom0", "op-r", b"", w.time, False, outside)
        return _applied(work.plan(w.view, Numbers()).changes)

    def moved() -> tuple[list[str], int]:
        command = SetProperty("vault", "netvm", "")
        work = works.Mutation(command, "dom0", w.time, 0, False, outside)
        planned = work.plan(w.view, Numbers())
        assert isinstance(planned.answer, works.MutationAnswer)
        return _applied(planned.changes), len(planned.answer.applies)

    assert gone() == [record.uuid]
    assert moved() == ([record.uuid], 0)
    for number in range(8):
        waits = replace(begun, id=f"w{number}", kind="RESIZE", state=OperationState.QUEUED)
        w.view.apply(OperationPut(waits))
    # It is owed that: the next one, whatever it is about, will bring all.
    assert gone() == [f"{record.uuid} failed"]
    assert moved() == ([f"{record.uuid} failed"], 0)
    failed = replace(begun, id="failed", state=OperationState.FAILED)
    w.view.apply(OperationPut(failed))
    assert gone() == []
    assert moved() == ([], 0)
    # What its caller waits for is refused as before.
    with pytest.raises(Refusal) as refused:
        work = works.Mutation(SetFeature("sys-net", "service.x", "1"), "dom0", w.time, 0, False,
                              outside)  # fmt: skip
        work.plan(w.view, Numbers())
    assert refused.value.reason == "QUBE_BUSY"


def _applied(changes: tuple[Change, ...]) -> list[str]:
    """Whom the changes begin an APPLY of, or say that none could be begun."""
    applies = [
        change.operation
        for change in changes
        if isinstance(change, OperationPut) and change.operation.kind == "APPLY"
    ]
    return [f"{o.subjects[0]}{' failed' * o.state.terminal}" for o in applies]


# ---- the step


class Guests:
    """firewall and domains; on apply() the qube becomes what `then` says."""

    def __init__(self, w: World, then: Run | None = None, fails: bool = False) -> None:
        self.calls: list[str] = []
        self._w, self._then, self._fails = w, then, fails

    async def apply(self, request: Any, **_: object) -> firewall_pb2.ApplyReply:
        self.calls.append(f"apply {request.target.boot_id}")
        if self._then is not None:
            self._w.patch("work", run=self._then)
        return firewall_pb2.ApplyReply(guest_keys=["/qubes-firewall/10.137.0.4/policy=drop"])

    async def withdraw(self, request: Any, **_: object) -> None:
        self.calls.append(f"withdraw {request.boot_id}")

    async def write_guest_keys(self, request: Any, **_: object) -> None:
        if self._fails:
            raise BusError("NOT_FOUND", "DOMAIN_NOT_FOUND", "it is gone")
        self.calls += ["rules" for key in request.keys if key.path.endswith("/policy")]

    async def read_guest_keys(self, request: Any, **_: object) -> domains_pb2.ReadGuestKeysReply:
        return domains_pb2.ReadGuestKeysReply()

    async def detach_interface(self, request: Any, **_: object) -> None:
        self.calls.append("detach")

    async def attach_interface(self, request: Any, **_: object) -> None:
        self.calls.append("attach")


def apply(w: World, guests: Guests) -> list[str]:
    record = w.qube("work")
    spec = ApplySpec(record.uuid, record.run.boot_id)
    context: Any = SimpleNamespace(
        view=w.view,
        participants=SimpleNamespace(firewall=guests, domains=guests, hostd=None),
        operation=SimpleNamespace(
            spec=spec, subjects=(record.uuid,), data={"boot_id": record.run.boot_id}
        ),
        call=lambda name="": name or "step",
    )
    asyncio.run(Apply().forward(context))
    return guests.calls


def test_rules_are_there_also_while_the_client_sleeps(w: World) -> None:
    boot = w.qube("work").run.boot_id
    assert apply(w, Guests(w)) == [f"apply {boot}", "rules", "attach"]
    w.power("work", "paused")
    assert apply(w, Guests(w)) == [f"apply {boot}", "rules"]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("phase", [Phase.STOPPING, Phase.HALTED])
def test_a_stop_that_overtakes_it_leaves_no_rules_in_force(
    w: World, phase: Phase, fails: bool
) -> None:
    run = w.qube("work").run
    boot = run.boot_id
    guests = Guests(w, Run(phase, boot if phase is Phase.STOPPING else ""), fails)
    assert [call for call in apply(w, guests) if " " in call] == [
        f"apply {boot}",
        f"withdraw {boot}",
    ]


def test_a_failure_of_a_qube_that_still_runs_is_told(w: World) -> None:
    with pytest.raises(BusError):
        apply(w, Guests(w, fails=True))
