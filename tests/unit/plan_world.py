"""A small system for tests of plans: a template, qubes of every class, a network."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from bulkhead.model.defaults import new_store
from bulkhead.model.invariants import check
from bulkhead.model.plan import EndPlan, Plan, plan_begin, plan_end, plan_mutation
from bulkhead.model.records import (
    DeviceFact,
    FactPut,
    HostFact,
    KernelFact,
    Operation,
    OperationState,
    PowerFact,
    Qube,
    WireEvent,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import (
    Command,
    CreateSpec,
    OperationSpec,
    SetFeature,
    SetProperty,
    StartSpec,
)
from bulkhead.model.view import View

NOW = 1_700_000_000.0
SUCCEEDED = OperationState.SUCCEEDED
FAILED = OperationState.FAILED
CANCELLED = OperationState.CANCELLED


class World:
    """A view with what drives it: ids that count, a number generator that counts."""

    def __init__(self) -> None:
        self.view = View()
        self.view.apply_all(new_store("/var/lib/qubes", True))
        self.view.apply_all(
            [
                FactPut(HostFact("sim", memory_kib=16 * 1024 * 1024, cpus=4)),
                FactPut(KernelFact("6.12.1-lab", has_modules=True)),
            ]
        )
        self._ids = itertools.count(1)
        self.dispid = itertools.count(100)
        self.time = NOW

    def uuid(self) -> str:
        return f"00000000-0000-4000-8000-{next(self._ids):012x}"

    def qube(self, name: str) -> Qube:
        found = self.view.qube(name)
        assert found is not None, name
        return found

    # ---- commands

    def plan(self, command: Command, source: str = "dom0") -> Plan:
        return plan_mutation(self.view, command, source, now=self.time)

    def do(self, command: Command, source: str = "dom0") -> Plan:
        plan = self.plan(command, source)
        self.view.apply_all(plan.changes)
        return plan

    def set(self, qube: str, name: str, value: str) -> Plan:
        return self.do(SetProperty(qube, name, value))

    def feature(self, qube: str, name: str, value: str = "1") -> Plan:
        return self.do(SetFeature(qube, name, value))

    # ---- operations

    def begin(self, spec: OperationSpec, source: str = "dom0") -> Any:
        self.time += 1
        plan = plan_begin(
            self.view,
            spec,
            operation_id=f"op-{next(self._ids)}",
            source=source,
            now=self.time,
            boot_id=f"boot-{next(self._ids)}",
            new_uuid=self.uuid(),
            random=lambda limit: next(self.dispid) % limit,
        )
        self.view.apply_all(plan.changes)
        return plan

    def end(
        self, operation: Operation, outcome: OperationState = SUCCEEDED, **more: Any
    ) -> EndPlan:
        self.time += 1
        plan = plan_end(self.view, operation, outcome, now=self.time, **more)
        self.view.apply_all(plan.changes)
        return plan

    def run(self, spec: OperationSpec, source: str = "dom0") -> list[WireEvent]:
        """Begin and end at once; the events of both."""
        begun = self.begin(spec, source)
        events = list(begun.events)
        if not begun.operation.state.terminal:
            events += self.end(begun.operation).events
        return events

    def create(self, name: str, klass: str = "AppVM", label: str = "red", **more: Any) -> Qube:
        self.run(CreateSpec(name=name, klass=klass, label=label, **more))
        return self.qube(name)

    def start(self, name: str, power: str = "running") -> str:
        """Start to the end; returns the boot id."""
        begun = self.begin(StartSpec(name))
        self.end(begun.operation)
        self.power(name, power)
        return self.qube(name).run.boot_id

    def power(self, name: str, power: str) -> None:
        qube = self.qube(name)
        self.view.apply(
            FactPut(PowerFact(qube.uuid, qube.run.boot_id, 1, power, xid=5, agent=True))
        )

    def device(self, backend: str, port: str, **more: Any) -> DeviceFact:
        fact = DeviceFact(self.qube(backend).uuid, "block", port, **more)
        self.view.apply(FactPut(fact))
        return fact

    def patch(self, name: str, **fields: Any) -> None:
        """Change a record past the plans."""
        from bulkhead.model.records import QubePut

        self.view.apply(QubePut(replace(self.qube(name), **fields)))


def world() -> World:
    """dom0; template tmpl; app qubes work and vault; netvm sys-net <- work; disposable
    template dvm; standalone alone; remote far."""
    made = World()
    made.set("", "default_kernel", "6.12.1-lab")
    made.create("tmpl", "TemplateVM", "black")
    made.set("", "default_template", "tmpl")
    made.create("sys-net", label="red")
    made.set("sys-net", "provides_network", "True")
    made.set("sys-net", "netvm", "")
    made.create("work", label="blue")
    made.set("work", "netvm", "sys-net")
    made.create("vault", label="black")
    made.create("dvm", label="gray")
    made.set("dvm", "template_for_dispvms", "True")
    made.create("alone", "StandaloneVM", "green")
    made.create("far", "RemoteVM", "orange")
    assert check(made.view) == []
    return made


def names(events: Iterable[WireEvent]) -> list[str]:
    """Events as SUBJECT:NAME, the subject left out for the system."""
    return [f"{e.subject}:{e.name}" if e.subject else e.name for e in events]


def pairs(event: WireEvent) -> dict[str, str]:
    """An event's keys and values."""
    return dict(event.pairs)


def snapshot(view: View) -> object:
    """Everything in a view, comparable."""
    return (
        dict(view.labels),
        dict(view.pools),
        dict(view.properties),
        dict(view.operations),
        {q.uuid: q for q in view.qubes_any()},
        [q.name for q in view.qubes()],
        dict(view.facts()),
    )


def refused(call: Any) -> Refusal:
    """The refusal that a call raises."""
    try:
        call()
    except Refusal as refusal:
        return refusal
    raise AssertionError("nothing was refused")
