"""Random sequences of commands and operations: whatever is planned keeps the view sound,
plans are the same when made twice, and applying can be undone exactly."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from bulkhead.model.invariants import check
from bulkhead.model.plan import plan_begin, plan_end, plan_mutation
from bulkhead.model.properties import CLASSES, rows_for
from bulkhead.model.records import (
    Assignment,
    FactPut,
    OperationPut,
    OperationState,
    Phase,
    Pool,
    PowerFact,
    Problem,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import (
    AllowDevices,
    ApplySpec,
    AssignDevice,
    AttachSpec,
    ClearSpec,
    CloneSpec,
    CloneVolumeSpec,
    CreateLabel,
    CreateSpec,
    DenyDevices,
    DetachSpec,
    ImportSpec,
    KillSpec,
    PauseSpec,
    PoolAddSpec,
    PoolRemoveSpec,
    RemoveFeature,
    RemoveLabel,
    RemoveSpec,
    RemoveTag,
    ResetProperty,
    ResizeSpec,
    ResumeSpec,
    RevertSpec,
    SetAssignment,
    SetFeature,
    SetNotes,
    SetPool,
    SetProperty,
    SetTag,
    SetVolume,
    ShutdownSpec,
    StartSpec,
    StoppedSpec,
    SuspendSpec,
    UnassignDevice,
    UnpauseSpec,
)
from tests.unit.plan_world import NOW, World, snapshot, world

NAMES = [
    "work",
    "vault",
    "sys-net",
    "dvm",
    "tmpl",
    "alone",
    "far",
    "dom0",
    "new1",
    "new2",
    "disp100",
    "disp101",
]
PROPERTIES = sorted({row.name for klass in CLASSES for row in rows_for(klass)})
REFERENCES = ["netvm", "template", "guivm", "default_dispvm", "audiovm"]
SYSTEM = sorted(row.name for row in rows_for(None))
VALUES = ["", "True", "False", "red", "pink", "500", "0", "10.1.2.3", "varlibqubes", *NAMES]
FEATURES = [
    "gui",
    "servicevm",
    "service.x",
    "service.meminfo-writer",
    "boot-mode.active",
    "tag-created-vm-with",
    "set-created-guivm",
    "preload-dispvm-max",
    "prohibit-start",
]
TAGS = ["a", "b", "created-by-work", "created-by-dom0", "guivm-dom0"]
VOLUMES = ["root", "private", "volatile", "kernel"]
POOLS = ["varlibqubes", "linux-kernel", "fast"]
MODES = ["required", "auto-attach", "ask-to-attach", "manual"]
FAST = Pool("fast", "file-reflink", {"dir_path": "/fast"})


class Choice:
    """Draws commands and specs from a seeded generator."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def of(self, options: Any) -> Any:
        return self.rng.choice(list(options))

    def name(self) -> str:
        return str(self.of(NAMES))

    def flag(self) -> bool:
        return self.rng.random() < 0.5

    def device(self) -> Assignment:
        klass, port = self.of(["block", "pci"]), self.of(["sda", "*"])
        return Assignment(klass, self.name(), port, mode=self.of(MODES))

    def patterns(self) -> tuple[str, ...]:
        return tuple(self.of(["b******", "u03****", "bad"]) for _ in range(self.rng.randrange(3)))

    def command(self) -> Any:
        name = self.name
        return self.of(
            [
                lambda: SetProperty(name(), self.of(PROPERTIES), self.of(VALUES)),
                lambda: SetProperty(name(), self.of(REFERENCES), self.of(["", *NAMES])),
                lambda: SetProperty(name(), "provides_network", self.of(["True", "False"])),
                lambda: SetProperty("", self.of(SYSTEM), self.of(VALUES)),
                lambda: ResetProperty(name(), self.of(PROPERTIES)),
                lambda: ResetProperty("", self.of(SYSTEM)),
                lambda: SetFeature(name(), self.of(FEATURES), self.of(VALUES)),
                lambda: RemoveFeature(name(), self.of(FEATURES)),
                lambda: SetTag(name(), self.of(TAGS)),
                lambda: RemoveTag(name(), self.of(TAGS)),
                lambda: CreateLabel("pink", "0xff00ff"),
                lambda: RemoveLabel(self.of(["pink", "red"])),
                lambda: SetNotes(name(), "note"),
                lambda: SetVolume(
                    name(), self.of(VOLUMES), revisions_to_keep=self.rng.randint(-2, 3)
                ),
                lambda: SetVolume(name(), self.of(VOLUMES), rw=self.flag()),
                lambda: SetVolume(name(), self.of(VOLUMES), ephemeral=self.flag()),
                lambda: SetPool(self.of(POOLS), revisions_to_keep=self.rng.randint(-2, 3)),
                lambda: AssignDevice(name(), self.device()),
                lambda: UnassignDevice(name(), self.device()),
                lambda: SetAssignment(name(), self.device(), self.of(MODES)),
                lambda: DenyDevices(name(), self.patterns()),
                lambda: AllowDevices(name(), self.patterns(), self.flag()),
            ]
        )()

    def create(self) -> CreateSpec:
        klass = self.of(CLASSES)
        templates = {"AppVM": ["", "tmpl"], "DispVM": ["dvm", "work"]}.get(klass, [""])
        return CreateSpec(
            name=self.of(["new1", "new2", "work"]),
            klass=klass,
            label=self.of(["red", "blue", "pink"]),
            template=self.of(templates),
            pool=self.of(["", "", "", *POOLS]),
        )

    def spec(self) -> Any:
        name = self.name

        def volume() -> str:
            return str(self.of(VOLUMES))

        def size() -> int:
            return self.rng.randrange(2**40)

        return self.of(
            [
                self.create,
                self.create,
                lambda: CreateSpec(
                    klass="DispVM",
                    template="dvm",
                    template_given=True,
                    disposable=True,
                    preload=self.flag(),
                ),
                lambda: CloneSpec(name(), self.of(["new1", "new2"]), self.of(["", *CLASSES])),
                lambda: RemoveSpec(name()),
                lambda: StartSpec(name()),
                lambda: StartSpec(name()),
                lambda: StartSpec(name()),
                lambda: ShutdownSpec(name(), self.flag(), self.flag()),
                lambda: KillSpec(name()),
                lambda: PauseSpec(name()),
                lambda: UnpauseSpec(name()),
                lambda: SuspendSpec(name()),
                lambda: ResumeSpec(name()),
                lambda: RevertSpec(name(), volume()),
                lambda: ResizeSpec(name(), volume(), size()),
                lambda: ClearSpec(name(), volume()),
                lambda: CloneVolumeSpec(name(), "private", name(), "private"),
                lambda: ImportSpec(name(), volume(), size()),
                lambda: AttachSpec(name(), self.device()),
                lambda: DetachSpec(name(), self.device()),
                lambda: PoolAddSpec(FAST),
                lambda: PoolRemoveSpec(self.of(POOLS)),
            ]
        )()

    def step(self) -> tuple[str, Any]:
        kind = self.of(
            ["mutate", "mutate", "begin", "begin", "end", "end", "stopped", "apply", "pivot",
             "power"]
        )  # fmt: skip
        what: Any
        match kind:
            case "mutate":
                what = self.command()
            case "begin":
                what = self.spec()
            case "end":
                ends = [OperationState.SUCCEEDED] * 3 + [OperationState.FAILED]
                what = (self.rng.randrange(10), self.of(ends))
            case "pivot":
                what = self.rng.randrange(10)
            case "power":
                what = (self.name(), self.of(["running", "paused", "pmsuspended", "halted"]))
            case _:
                what = self.name()
        return kind, what


BOOM = Problem("INTERNAL", "QUBE_ERROR", "it broke")


class Driver:
    """Does random steps on a world; each is planned twice, applied, undone and applied."""

    def __init__(self) -> None:
        self.w: World = world()
        self.count = 0

    def step(self, kind: str, what: Any) -> None:
        view = self.w.view
        self.count += 1
        now = NOW + self.count
        match kind:
            case "mutate":
                self.do(lambda: plan_mutation(view, what, "dom0", now=now))
            case "begin":
                self.begin(what, now)
            case "stopped" | "apply":
                qube = view.qube(what)
                if qube is not None and qube.run.phase is not Phase.HALTED:
                    made: Any = StoppedSpec if kind == "stopped" else ApplySpec
                    self.begin(made(qube.uuid, qube.run.boot_id), now)
            case "power":
                name, power = what
                qube = view.qube(name)
                if qube is not None and qube.run.boot_id:
                    view.apply(FactPut(PowerFact(qube.uuid, qube.run.boot_id, now, power)))  # type: ignore[arg-type]
            case "pivot":
                self.pivot(what)
            case "end":
                self.end(what[0], what[1], now)

    def begin(self, spec: Any, now: float) -> None:
        number = self.count
        self.do(
            lambda: plan_begin(
                self.w.view,
                spec,
                operation_id=f"random-{number}",
                source="work",
                now=now,
                boot_id=f"boot-{number}",
                new_uuid=f"00000000-0000-4000-8001-{number:012x}",
                random=lambda limit: (100 + number) % limit,
            )
        )

    def _running(self) -> list[Any]:
        return [
            o
            for o in self.w.view.operations.values()
            if not o.state.terminal and o.state is not OperationState.QUEUED
        ]

    def pivot(self, index: int) -> None:
        starts = [o for o in self._running() if o.kind == "START"]
        if starts:
            picked = starts[index % len(starts)]
            self.w.view.apply(OperationPut(replace(picked, pivoted=True)))

    def end(self, index: int, outcome: OperationState, now: float) -> None:
        running = sorted(self._running(), key=lambda o: o.id)
        if not running:
            return
        operation = running[index % len(running)]
        if operation.kind in ("STOPPED", "REMOVE"):
            outcome = OperationState.SUCCEEDED  # retried for ever, never given up
        if operation.kind == "KILL" and outcome is OperationState.SUCCEEDED:
            qube = self.w.view.by_uuid_any(operation.subjects[0])
            if qube is not None and qube.run.boot_id == operation.data["boot_id"]:
                return  # it waits for STOPPED
        error = None if outcome is OperationState.SUCCEEDED else BOOM
        numbers = iter(range(5000, 9999))
        self.do(
            lambda: plan_end(
                self.w.view,
                operation,
                outcome,
                now=now,
                error=error,
                random=lambda limit: next(numbers) % limit,
            ),
            twice=operation.kind != "CLONE",
        )

    def do(self, make: Any, *, twice: bool = True) -> None:
        view = self.w.view
        before = snapshot(view)
        try:
            plan = make()
        except Refusal:
            assert snapshot(view) == before
            return
        assert snapshot(view) == before
        undo = view.apply_all(plan.changes)
        for change in undo:
            view.apply(change)
        assert snapshot(view) == before
        if twice:
            again = make()
            assert again.changes == plan.changes
            assert again.events == plan.events
        view.apply_all(plan.changes)
        violations = check(view)
        assert violations == [], [str(v) for v in violations]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_random_sequences_keep_the_view_sound(seed: int) -> None:
    choice, driver = Choice(seed), Driver()
    for _ in range(60):
        driver.step(*choice.step())
