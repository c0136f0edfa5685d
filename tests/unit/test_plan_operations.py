"""Plans of operations: events, guards, locks, queue, follow-ups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bulkhead.model.invariants import check
from bulkhead.model.plan import (
    PlanRefused,
    plan_advance,
    plan_begin,
    plan_cancel,
    plan_end,
    plan_promote,
)
from bulkhead.model.plan.base import Draft, problem_of
from bulkhead.model.plan.operation_table import OPERATIONS
from bulkhead.model.plan.operations import _BEGINS, _ENDS
from bulkhead.model.plan.queue import QUEUE_LIMIT, may_wait_for_ever, waited_too_long
from bulkhead.model.records import (
    HALTED,
    Assignment,
    FactPut,
    FactRemoved,
    KernelFact,
    Operation,
    OperationPut,
    OperationState,
    Phase,
    Pool,
    Problem,
    RecordState,
)
from bulkhead.model.specs import (
    KINDS,
    ApplySpec,
    ClearSpec,
    CloneSpec,
    CloneVolumeSpec,
    CreateSpec,
    ImportSpec,
    KernelAddSpec,
    KernelRemoveSpec,
    KillSpec,
    OperationSpec,
    PauseSpec,
    PoolAddSpec,
    PoolRemoveSpec,
    RemoveSpec,
    ResizeSpec,
    ResumeSpec,
    RevertSpec,
    SetVolume,
    ShutdownSpec,
    StartSpec,
    StoppedSpec,
    SuspendSpec,
    UnpauseSpec,
)
from tests.unit.plan_world import (
    CANCELLED,
    FAILED,
    NOW,
    World,
    names,
    pairs,
    refused,
    snapshot,
    world,
)

BOOM = Problem("INTERNAL", "QUBE_ERROR", "it broke")
STOP = [
    "domain-stopped",
    "property-reset:xid",
    "property-reset:stubdom_xid",
    "property-reset:start_time",
]


@pytest.fixture
def w() -> World:
    return world()


def of(qube: str, events: list[str]) -> list[str]:
    return [f"{qube}:{name}" for name in events]


def no_change(w: World, spec: Any, reason: str, source: str = "dom0") -> Any:
    """The begin is refused for that reason and leaves the view as it was."""
    before = snapshot(w.view)
    refusal = refused(lambda: w.begin(spec, source))
    assert refusal.reason == reason, refusal
    assert snapshot(w.view) == before
    return refusal


def announced(refusal: Any) -> list[str]:
    assert isinstance(refusal, PlanRefused)
    return names(refusal.events)


# ---- the table


def test_every_kind_has_a_row_a_begin_and_an_end() -> None:
    assert set(OPERATIONS) == set(KINDS) == set(_BEGINS) == set(_ENDS)


def test_steps_are_named_once_and_have_one_pivot_at_most() -> None:
    for kind, row in OPERATIONS.items():
        assert kind == row.kind
        step_names = [step.name for step in row.steps]
        assert len(set(step_names)) == len(step_names) > 0
        assert sum(step.pivot for step in row.steps) <= (0 if row.pivots_at_begin else 1)
        assert row.step(step_names[-1]) is row.steps[-1]
    with pytest.raises(KeyError):
        OPERATIONS["START"].step("nosuch")


def test_start_steps_make_the_events_of_a_start(w: World) -> None:
    begun = w.begin(StartSpec("work"))
    events = list(begun.events)
    for step in OPERATIONS["START"].steps:
        if step.events is not None:
            events += step.events(w.view, begun.operation)
    events += w.end(begun.operation).events
    assert names(events) == of(
        "work",
        [
            "domain-pre-start",
            "domain-verify-files",
            "domain-pre-spawn",
            "property-reset:xid",
            "property-reset:stubdom_xid",
            "property-reset:start_time",
            "domain-spawn",
            "domain-qdb-create",
            "domain-pre-unpaused",
            "domain-unpaused",
            "domain-start",
        ],
    )
    assert pairs(events[0])["start_guid"] == "True"


# ---- CREATE


def test_create_is_hidden_until_its_end(w: World) -> None:
    begun = w.begin(CreateSpec(name="new", klass="AppVM", label="red"))
    assert begun.events == ()
    assert begun.operation.state is OperationState.RUNNING
    assert w.view.qube("new") is None
    hidden = w.view.qube_any("new")
    assert hidden is not None
    assert hidden.state is RecordState.CREATING
    assert check(w.view) == []
    no_change(w, CreateSpec(name="new", klass="AppVM", label="red"), "QUBE_EXISTS")
    no_change(w, RemoveSpec("tmpl"), "QUBE_IN_USE")
    ended = w.end(begun.operation)
    assert names(ended.events) == [
        "domain-add",
        "new:domain-tag-add:created-by-dom0",
        "new:domain-create-on-disk",
    ]
    assert (ended.events[0].pairs, ended.events[0].subject_uuid) == ((("vm", "new"),), hidden.uuid)
    assert ended.operation.result == {"name": "new", "uuid": hidden.uuid}
    assert w.qube("new").tags == {"created-by-dom0", "guivm-dom0", "audiovm-dom0"}


@pytest.mark.parametrize("outcome", [FAILED, CANCELLED])
def test_failed_create_leaves_nothing_and_says_nothing(w: World, outcome: OperationState) -> None:
    before = {q.uuid for q in w.view.qubes_any()}
    begun = w.begin(CreateSpec(name="new", klass="AppVM", label="red"))
    ended = w.end(begun.operation, outcome, error=BOOM)
    assert ended.events == ()
    assert ended.operation.error == BOOM
    assert {q.uuid for q in w.view.qubes_any()} == before


def test_volumes_of_a_new_qube(w: World) -> None:
    work = w.qube("work")
    assert [(v.name, v.pool, v.vid, v.source, v.revisions_to_keep) for v in work.volumes] == [
        ("root", "varlibqubes", "appvms/work/root", "vm-templates/tmpl/root", 1),
        ("private", "varlibqubes", "appvms/work/private", "", 1),
        ("volatile", "varlibqubes", "appvms/work/volatile", "", 1),
        ("kernel", "linux-kernel", "6.12.1-lab", "", 0),
    ]
    sizes = {v.name: v.size // 2**30 for v in w.qube("alone").volumes}
    assert sizes == {"root": 10, "private": 2, "volatile": 10, "kernel": 0}


def test_pool_choices(w: World) -> None:
    w.run(PoolAddSpec(Pool("fast", "file-reflink", {"dir_path": "/fast"})))
    w.create("all", pool="fast")
    assert [(v.name, v.pool) for v in w.qube("all").volumes] == [
        ("root", "varlibqubes"),
        ("private", "fast"),
        ("volatile", "fast"),
        ("kernel", "linux-kernel"),
    ]
    w.create("one", pools={"private": "fast"})
    assert [v.pool for v in w.qube("one").volumes][1:3] == ["fast", "varlibqubes"]
    # The plain file driver keeps revisions of what lasts only.
    w.run(PoolAddSpec(Pool("plain", "file", {"dir_path": "/plain"})))
    w.create("two", pool="plain", pools={})
    assert [(v.pool, v.revisions_to_keep) for v in w.qube("two").volumes][1:3] == [
        ("plain", 1),
        ("plain", 0),
    ]
    for more, reason in (
        ({"pool": "nosuch"}, "POOL_NOT_FOUND"),
        ({"pool": "linux-kernel"}, "VOLUME_CREATE_REFUSED"),
        ({"pools": {"root": "fast"}}, "VOLUME_CREATE_REFUSED"),
        ({"pools": {"nosuch": "fast"}}, "VOLUME_CREATE_REFUSED"),
        ({"pool": "fast", "pools": {"private": "fast"}}, "PROTOCOL"),
    ):
        spec = CreateSpec(name="x", klass="AppVM", label="red", **more)
        no_change(w, spec, reason)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"name": "1abc"}, "INVALID_NAME"),
        ({"name": ""}, "INVALID_NAME"),
        ({"name": "work"}, "QUBE_EXISTS"),
        ({"name": "dom0"}, "QUBE_EXISTS"),
        ({"template": "nosuch", "template_given": True}, "QUBE_NOT_FOUND"),
        ({"template": "work", "template_given": True}, "INVALID_PROPERTY_VALUE"),
        ({"template": "dom0", "template_given": True}, "INVALID_PROPERTY_VALUE"),
        ({"template": "", "template_given": True}, "NO_TEMPLATE"),
        ({"label": "nocolor"}, "LABEL_NOT_FOUND"),
        ({"label": "3"}, "INVALID_LABEL"),
        ({"label": ""}, "INVALID_LABEL"),
        ({"klass": "AdminVM"}, "INVALID_PROPERTY_VALUE"),
        ({"klass": "NoSuchVM"}, "PROTOCOL"),
        ({"klass": "TemplateVM", "template": "tmpl"}, "PROTOCOL"),
        ({"klass": "StandaloneVM", "template": "tmpl", "template_given": True}, "PROTOCOL"),
        ({"klass": "DispVM", "template": "work"}, "NOT_DISPOSABLE_TEMPLATE"),
        ({"klass": "DispVM"}, "NO_TEMPLATE"),
    ],
)
def test_create_refused(w: World, fields: dict[str, Any], reason: str) -> None:
    spec = replace(CreateSpec(name="x1", klass="AppVM", label="red"), **fields)
    assert not isinstance(no_change(w, spec, reason), PlanRefused)


def test_qid_is_the_lowest_free(w: World) -> None:
    qid = w.qube("work").qid
    w.run(RemoveSpec("work"))
    w.create("again")
    assert w.qube("again").qid == qid


def test_check_updates_is_switched_off(w: World) -> None:
    w.set("", "check_updates_vm", "False")
    w.create("quiet")
    assert w.qube("quiet").features == {"check-updates": ""}
    w.create("away", klass="RemoteVM")
    assert w.qube("away").features == {"check-updates": ""}


# ---- disposables


def disposable(w: World, source: str = "work") -> str:
    begun = w.begin(
        CreateSpec(klass="DispVM", disposable=True, template="dvm", template_given=True), source
    )
    w.end(begun.operation)
    return str(begun.operation.data["name"])


def test_disposable_inherits(w: World) -> None:
    w.set("dvm", "memory", "700")
    w.set("dvm", "default_dispvm", "dvm")
    w.set("dvm", "installed_by_rpm", "True")
    w.feature("dvm", "gui", "")
    w.patch("dvm", features={"gui": "", "preload-dispvm": "", "preload-dispvm-max": "0"})
    w.do(SetVolume("dvm", "volatile", ephemeral=True))
    events = w.run(
        CreateSpec(klass="DispVM", disposable=True, template="dvm", template_given=True), "work"
    )
    assert names(events) == [
        "domain-add",
        "disp100:domain-create-on-disk",
        "disp100:domain-tag-add:created-by-work",
        "disp100:domain-tag-add:disp-created-by-work",
    ]
    made = w.qube("disp100")
    assert made.properties == {
        "label": "gray",
        "template": "dvm",
        "dispid": "100",
        "auto_cleanup": "True",
        "memory": "700",
        "default_dispvm": "dvm",
    }
    assert made.features == {"gui": ""}
    assert made.tags >= {"created-by-dom0", "created-by-work"}
    assert [(v.name, v.source, v.ephemeral) for v in made.volumes] == [
        ("root", "vm-templates/tmpl/root", None),
        ("private", "appvms/dvm/private", None),
        ("volatile", "", True),
        ("kernel", "", None),
    ]
    volatile = made.volume("volatile")
    assert volatile is not None
    assert volatile.size == 12 * 2**30
    assert check(w.view) == []


def test_dispid_is_free_and_not_recent(w: World) -> None:
    disposable(w)
    numbers = iter([100, 7, 8])
    plan = plan_begin(
        w.view,
        CreateSpec(klass="DispVM", disposable=True, template="dvm", template_given=True),
        operation_id="x",
        source="work",
        now=NOW,
        new_uuid=w.uuid(),
        random=lambda limit: next(numbers),
        recent_dispids={7},
    )
    assert plan.operation.data["name"] == "disp8"


def test_no_free_dispid(w: World) -> None:
    refusal = refused(
        lambda: plan_begin(
            w.view,
            CreateSpec(klass="DispVM", disposable=True, template="dvm", template_given=True),
            operation_id="x",
            source="work",
            now=NOW,
            new_uuid=w.uuid(),
            random=lambda limit: 5,
            recent_dispids={5},
        )
    )
    assert refusal.reason == "LIMIT_REACHED"


def test_disposable_without_template_is_the_sources_default(w: World) -> None:
    no_change(w, CreateSpec(klass="DispVM", disposable=True), "NO_TEMPLATE", "work")
    w.set("work", "default_dispvm", "dvm")
    w.run(CreateSpec(klass="DispVM", disposable=True), "work")
    assert w.qube("disp100").properties["template"] == "dvm"


def test_preloaded_disposable_is_marked_with_its_creation(w: World) -> None:
    spec = CreateSpec(
        klass="DispVM", disposable=True, preload=True, template="dvm", template_given=True
    )
    no_change(w, spec, "LIMIT_REACHED")
    w.patch("dvm", features={"preload-dispvm-max": "1"})
    begun = w.begin(spec)
    no_change(w, spec, "LIMIT_REACHED")
    ended = w.end(begun.operation)
    assert names(ended.events) == [
        "domain-add",
        "disp100:domain-feature-pre-set:preload-dispvm-in-progress",
        "disp100:domain-feature-set:preload-dispvm-in-progress",
        "dvm:domain-feature-pre-set:preload-dispvm",
        "disp100:property-reset:is_preload",
        "dvm:domain-feature-set:preload-dispvm",
        "disp100:domain-feature-pre-set:internal",
        "disp100:domain-feature-set:internal",
        "disp100:domain-create-on-disk",
    ]
    assert w.qube("dvm").features["preload-dispvm"] == "disp100"
    no_change(w, spec, "LIMIT_REACHED")


def test_stopped_disposable_is_removed(w: World) -> None:
    name = disposable(w)
    boot = w.start(name)
    stopped = w.begin(StoppedSpec(w.qube(name).uuid, boot))
    ended = w.end(stopped.operation)
    assert names(ended.events) == [f"{name}:domain-shutdown", "domain-pre-delete", "domain-delete"]
    assert ended.follow_up is not None
    assert ended.follow_up.kind == "REMOVE"
    assert w.view.qube(name) is None
    assert check(w.view) == []
    w.end(ended.follow_up)
    assert w.view.qube_any(name) is None


def test_disposable_that_does_not_start_is_removed(w: World) -> None:
    name = disposable(w)
    ended = w.end(w.begin(StartSpec(name)).operation, FAILED, error=BOOM)
    assert names(ended.events) == [
        f"{name}:domain-start-failed",
        "domain-pre-delete",
        "domain-delete",
    ]
    w.run(CreateSpec(name="named", klass="DispVM", label="red", template="dvm"))
    ended = w.end(w.begin(StartSpec("named")).operation, FAILED, error=BOOM)
    assert ended.follow_up is None


# ---- CLONE


def test_clone_copies(w: World) -> None:
    w.set("work", "memory", "800")
    w.set("work", "installed_by_rpm", "True")
    w.feature("work", "gui")
    w.patch("work", notes="hello", devices=(Assignment("pci", "dom0", "00_1f.2"),))
    w.patch(
        "work", features={**w.qube("work").features, "preload-dispvm-delay": "1", "internal": "1"}
    )
    begun = w.begin(CloneSpec("work", "copy"), "vault")
    assert begun.events == ()
    assert w.view.qube("copy") is None
    ended = w.end(begun.operation)
    assert names(ended.events) == [
        "domain-add",
        "copy:domain-tag-add:created-by-vault",
        "copy:domain-clone-files",
    ]
    copy = w.qube("copy")
    assert copy.properties == {
        "label": "blue",
        "template": "tmpl",
        "netvm": "sys-net",
        "memory": "800",
    }
    assert copy.features == {"gui": "1", "internal": "1"}
    assert (copy.notes, len(copy.devices)) == ("hello", 1)
    assert copy.tags == {"created-by-vault", "guivm-dom0", "audiovm-dom0"}
    assert copy.volumes[1].vid == "appvms/copy/private"
    assert check(w.view) == []


def test_clone_holds_its_source(w: World) -> None:
    begun = w.begin(CloneSpec("work", "copy"))
    waiting = w.begin(RemoveSpec("work"))
    assert waiting.operation.state is OperationState.QUEUED
    assert w.view.qube("work") is not None
    ended = w.end(begun.operation)
    assert [(o.kind, o.state) for o in ended.promoted] == [("REMOVE", OperationState.RUNNING)]
    assert names(ended.events)[-2:] == ["domain-pre-delete", "domain-delete"]


def test_clone_refused(w: World) -> None:
    no_change(w, CloneSpec("work", "vault"), "QUBE_EXISTS")
    no_change(w, CloneSpec("nosuch", "copy"), "QUBE_NOT_FOUND")
    no_change(w, CloneSpec("dom0", "copy"), "QUBE_ERROR")
    no_change(w, CloneSpec("work", "copy", klass="TemplateVM"), "INVALID_VALUE")
    no_change(w, CloneSpec("work", "copy", pool="nosuch"), "VOLUME_CREATE_REFUSED")
    w.run(CloneSpec("tmpl", "alone2", klass="StandaloneVM"))
    assert w.qube("alone2").klass == "StandaloneVM"
    ended = w.end(w.begin(CloneSpec("work", "copy")).operation, FAILED, error=BOOM)
    assert ended.events == ()
    assert w.view.qube_any("copy") is None


def test_disposable_clone_gets_a_number(w: World) -> None:
    w.run(CreateSpec(name="named", klass="DispVM", label="red", template="dvm"))
    w.run(CloneSpec("named", "named2"))
    assert w.qube("named2").properties["dispid"] != w.qube("named").properties["dispid"]
    assert check(w.view) == []


# ---- REMOVE


def test_remove(w: World) -> None:
    begun = w.begin(RemoveSpec("vault"))
    assert names(begun.events) == ["domain-pre-delete", "domain-delete"]
    assert begun.operation.pivoted
    assert w.view.qube("vault") is None
    assert check(w.view) == []
    no_change(w, CreateSpec(name="vault", klass="AppVM", label="red"), "NAME_IN_REMOVAL")
    no_change(w, CloneSpec("work", "vault"), "NAME_IN_REMOVAL")
    # Nobody knows when a stuck one ends, so whoever wants the name is not kept waiting.
    w.view.apply(OperationPut(replace(begun.operation, state=OperationState.STUCK, error=BOOM)))
    for spec in (
        CreateSpec(name="vault", klass="AppVM", label="red"),
        CloneSpec("work", "vault"),
    ):
        refusal = no_change(w, spec, "QUBE_EXISTS")
        assert refusal.message == "The removal of a VM named vault is stuck: it broke"
    ended = w.end(begun.operation)
    assert names(ended.events) == ["vault:domain-remove-from-disk"]
    assert w.view.qube_any("vault") is None


@pytest.mark.parametrize(
    ("name", "prepare", "reason", "pre_event"),
    [
        ("dom0", None, "QUBE_IN_USE", False),
        ("nosuch", None, "QUBE_NOT_FOUND", False),
        ("sys-net", None, "QUBE_IN_USE", True),
        ("tmpl", None, "QUBE_IN_USE", True),
        ("vault", lambda w: w.start("vault"), "QUBE_NOT_HALTED", False),
        ("vault", lambda w: w.set("vault", "installed_by_rpm", "True"), "QUBE_IN_USE", False),
        ("vault", lambda w: w.set("", "clockvm", "vault"), "QUBE_IN_USE", True),
        ("vault", lambda w: w.set("work", "guivm", "vault"), "QUBE_IN_USE", True),
        (
            "vault",
            lambda w: w.patch("work", devices=(Assignment("block", "vault", "sda"),)),
            "QUBE_IN_USE",
            True,
        ),
    ],
)
def test_remove_refused(w: World, name: str, prepare: Any, reason: str, pre_event: bool) -> None:
    if prepare is not None:
        prepare(w)
    refusal = no_change(w, RemoveSpec(name), reason)
    assert isinstance(refusal, PlanRefused) == pre_event
    if pre_event:
        assert announced(refusal) == ["domain-pre-delete"]


def test_own_preloaded_disposables_do_not_hold_their_template(w: World) -> None:
    name = disposable(w)
    no_change(w, RemoveSpec("dvm"), "QUBE_IN_USE")
    w.patch("dvm", features={"preload-dispvm": name})
    assert w.begin(RemoveSpec("dvm")).operation.state is OperationState.RUNNING


def test_reference_to_itself_does_not_hold(w: World) -> None:
    w.set("dvm", "default_dispvm", "dvm")
    assert w.begin(RemoveSpec("dvm")).operation.state is OperationState.RUNNING


# ---- START


def test_start_makes_a_boot_and_ends_up(w: World) -> None:
    begun = w.begin(StartSpec("work"))
    run = w.qube("work").run
    assert (run.phase, run.boot_id) == (Phase.STARTING, begun.operation.data["boot_id"])
    ended = w.end(begun.operation)
    assert names(ended.events) == ["work:domain-start"]
    assert w.qube("work").run == replace(run, phase=Phase.UP)


def test_second_start_joins(w: World) -> None:
    first = w.begin(StartSpec("work"))
    before = snapshot(w.view)
    second = w.begin(StartSpec("work"))
    assert second.joined == second.operation == first.operation
    assert second.changes == ()
    assert snapshot(w.view) == before


@pytest.mark.parametrize("power", ["running", "paused", "crashed"])
def test_start_of_what_is_not_halted_succeeds_at_once(w: World, power: str) -> None:
    w.start("work", power)
    begun = w.begin(StartSpec("work"))
    assert begun.operation.state is OperationState.SUCCEEDED
    assert begun.events == ()


@pytest.mark.parametrize(
    ("prepare", "reason", "events"),
    [
        (
            lambda w: w.feature("work", "prohibit-start", "no"),
            "START_PROHIBITED",
            ["domain-start-failed"],
        ),
        (
            lambda w: w.patch("work", quarantine="property x: bad", raw=b"<domain/>"),
            "QUBE_QUARANTINED",
            ["domain-start-failed"],
        ),
        (
            lambda w: w.patch("work", tags=frozenset({"backup-restore-in-progress"})),
            "QUBE_ERROR",
            ["domain-pre-start", "domain-start-failed"],
        ),
    ],
)
def test_start_refused(w: World, prepare: Any, reason: str, events: list[str]) -> None:
    prepare(w)
    refusal = no_change(w, StartSpec("work"), reason)
    assert announced(refusal) == of("work", events)
    assert pairs(refusal.events[-1])["reason"] == refusal.message


def test_dom0_and_remote_qubes_cannot_be_started(w: World) -> None:
    no_change(w, StartSpec("dom0"), "QUBE_NOT_HALTED")
    no_change(w, StartSpec("far"), "QUBE_NOT_HALTED")


def test_template_without_snapshots_and_its_disposables_exclude_each_other(w: World) -> None:
    w.run(CreateSpec(name="named", klass="DispVM", label="red", template="dvm"))
    w.do(SetVolume("dvm", "private", revisions_to_keep=-1))
    boot = w.start("named")
    no_change(w, StartSpec("dvm"), "QUBE_NOT_HALTED")
    w.run(StoppedSpec(w.qube("named").uuid, boot))
    w.start("dvm")
    no_change(w, StartSpec("named"), "QUBE_ERROR")


def test_a_template_without_snapshots_starts_beside_its_app_qubes(w: World) -> None:
    w.do(SetVolume("tmpl", "root", revisions_to_keep=-1))
    boot = w.start("work")
    w.start("tmpl")
    w.run(StoppedSpec(w.qube("work").uuid, boot))
    # Now there is no committed state to start from.
    no_change(w, StartSpec("work"), "QUBE_ERROR")


def test_failed_start_before_its_pivot_is_halted_again(w: World) -> None:
    begun = w.begin(StartSpec("work"))
    ended = w.end(begun.operation, FAILED, error=BOOM)
    assert names(ended.events) == ["work:domain-start-failed"]
    assert pairs(ended.events[0]) == {"reason": "it broke"}
    assert w.qube("work").run == HALTED
    assert ended.follow_up is None


def test_failed_start_of_a_spawned_domain_tells_that_it_is_gone(w: World) -> None:
    begun = w.begin(StartSpec("work"))
    w.power("work", "halted")
    ended = w.end(begun.operation, FAILED, error=BOOM)
    assert names(ended.events) == of("work", ["domain-start-failed", *STOP, "domain-shutdown"])


def pivoted(w: World, operation: Operation) -> Operation:
    done = replace(operation, pivoted=True)
    w.view.apply(OperationPut(done))
    return done


def test_start_that_fails_after_its_pivot_is_killed(w: World) -> None:
    begun = w.begin(StartSpec("work"))
    ended = w.end(pivoted(w, begun.operation), FAILED, error=BOOM)
    assert names(ended.events) == ["work:domain-start-failed"]
    assert ended.follow_up is not None
    assert (ended.follow_up.kind, ended.follow_up.state) == ("KILL", OperationState.RUNNING)
    assert w.qube("work").run.phase is Phase.STOPPING
    assert check(w.view) == []


def test_follow_up_given_by_the_caller_is_begun_once(w: World) -> None:
    begun = w.begin(StartSpec("work"))
    boot = w.qube("work").run.boot_id
    ended = w.end(
        pivoted(w, begun.operation),
        FAILED,
        error=BOOM,
        follow_up=KillSpec("work", boot),
        follow_up_id="mine",
    )
    assert ended.follow_up is not None
    assert ended.follow_up.id == "mine"
    assert len(list(w.view.operations_on(w.qube("work").uuid))) == 1


def test_started_netvm_applies_its_running_clients(w: World) -> None:
    w.start("work")
    w.start("sys-net")
    applied(w, "work")


def applied(w: World, name: str) -> Operation:
    """The APPLY that is under way: what changed meanwhile reaches the qube."""
    (operation,) = w.view.operations_on(w.qube(name).uuid)
    assert operation.kind == "APPLY"
    return operation


def test_who_sleeps_while_its_netvm_starts_is_connected_when_it_goes_on(w: World) -> None:
    w.start("sys-net")
    w.start("work")
    w.end(w.begin(PauseSpec("work")).operation)
    w.power("work", "paused")
    w.run(KillSpec("sys-net"))
    w.run(StoppedSpec(w.qube("sys-net").uuid, w.qube("sys-net").run.boot_id))
    w.start("sys-net")
    # Its rules are there before it wakes; its interface has to wait until then.
    w.end(applied(w, "work"))
    w.run(UnpauseSpec("work"))
    applied(w, "work")


# ---- STOPPED


def test_stopped_is_made_once_per_boot(w: World) -> None:
    boot = w.start("work")
    uuid = w.qube("work").uuid
    begun = w.begin(StoppedSpec(uuid, boot))
    assert names(begun.events) == of("work", STOP)
    assert w.qube("work").run.phase is Phase.STOPPING
    again = w.begin(StoppedSpec(uuid, boot))
    assert again.joined == begun.operation
    ended = w.end(begun.operation)
    assert names(ended.events) == ["work:domain-shutdown"]
    assert w.qube("work").run == HALTED
    for spec in (StoppedSpec(uuid, boot), StoppedSpec(uuid, "other"), StoppedSpec("gone", boot)):
        late = w.begin(spec)
        assert (late.operation.state, late.events) == (OperationState.SUCCEEDED, ())


def test_stopped_of_a_start_under_way_is_the_starts_own(w: World) -> None:
    begun = w.begin(StartSpec("work"))
    boot = w.qube("work").run.boot_id
    stopped = w.begin(StoppedSpec(w.qube("work").uuid, boot))
    assert stopped.joined is not None
    assert stopped.joined.kind == "START"
    w.view.apply(OperationPut(replace(begun.operation, pivoted=True)))
    stopped = w.begin(StoppedSpec(w.qube("work").uuid, boot))
    assert (stopped.joined, stopped.operation.state) == (None, OperationState.RUNNING)
    w.end(stopped.operation)
    ended = w.end(begun.operation, FAILED, error=BOOM)
    assert names(ended.events) == ["work:domain-start-failed"]
    assert ended.follow_up is None
    assert w.qube("work").run == HALTED


def test_stopped_pre_empts(w: World) -> None:
    boot = w.start("work")
    w.begin(ShutdownSpec("work", wait=True))
    stopped = w.begin(StoppedSpec(w.qube("work").uuid, boot))
    assert stopped.operation.state is OperationState.RUNNING


def test_deferred_netvm_ends_with_the_boot(w: World) -> None:
    boot = w.start("work")
    w.patch("work", features={"deferred-netvm-original": "sys-net"})
    events = w.run(StoppedSpec(w.qube("work").uuid, boot))
    assert "work:domain-feature-delete:deferred-netvm-original" in names(events)


# ---- SHUTDOWN, KILL


def test_shutdown_and_stop(w: World) -> None:
    boot = w.start("work")
    begun = w.begin(ShutdownSpec("work", wait=True))
    assert names(begun.events) == ["work:domain-pre-shutdown"]
    assert pairs(begun.events[0]) == {"force": "False"}
    w.run(StoppedSpec(w.qube("work").uuid, boot))
    assert w.end(begun.operation).events == ()
    assert w.qube("work").run == HALTED


def test_shutdown_without_wait_leaves_the_guest_to_it(w: World) -> None:
    w.start("work")
    begun = w.begin(ShutdownSpec("work"))
    w.end(begun.operation)
    assert w.qube("work").run.phase is Phase.UP
    assert check(w.view) == []


def test_shutdown_that_times_out(w: World) -> None:
    w.start("work")
    begun = w.begin(ShutdownSpec("work", wait=True))
    problem = Problem("DEADLINE_EXCEEDED", "SHUTDOWN_TIMEOUT", "too slow")
    ended = w.end(begun.operation, FAILED, error=problem)
    assert names(ended.events) == ["work:domain-shutdown-failed"]
    assert pairs(ended.events[0]) == {"reason": "too slow"}
    assert w.qube("work").run.phase is Phase.UP
    applied(w, "work")


def test_shutdown_refused(w: World) -> None:
    no_change(w, ShutdownSpec("work"), "QUBE_NOT_STARTED")
    no_change(w, ShutdownSpec("dom0"), "QUBE_ERROR")
    w.start("sys-net")
    w.start("work")
    both = of("sys-net", ["domain-pre-shutdown", "domain-shutdown-failed"])
    assert announced(no_change(w, ShutdownSpec("sys-net"), "QUBE_IN_USE")) == both
    w.set("work", "netvm", "")
    w.end(_apply(w, "work"))
    w.set("work", "guivm", "sys-net")
    w.end(_apply(w, "work"))
    assert announced(no_change(w, ShutdownSpec("sys-net"), "QUBE_ERROR")) == both
    w.set("work", "guivm", "")
    w.set("work", "audiovm", "sys-net")
    assert announced(no_change(w, ShutdownSpec("sys-net"), "QUBE_IN_USE")) == both
    assert w.begin(ShutdownSpec("sys-net", force=True)).operation.state is OperationState.RUNNING


def _apply(w: World, name: str) -> Operation:
    """As the registry does for a live change: the APPLY of the running qube."""
    qube = w.qube(name)
    operation = w.begin(ApplySpec(qube.uuid, qube.run.boot_id)).operation
    assert isinstance(operation, Operation)
    return operation


def test_shutdown_of_a_paused_qube_needs_force(w: World) -> None:
    w.start("work", "paused")
    no_change(w, ShutdownSpec("work"), "QUBE_NOT_RUNNING")
    assert w.begin(ShutdownSpec("work", force=True)).operation.state is OperationState.RUNNING


def test_kill_asks_nobody(w: World) -> None:
    w.start("sys-net")
    w.start("work")
    begun = w.begin(KillSpec("sys-net"))
    assert (begun.events, begun.operation.state) == ((), OperationState.RUNNING)
    assert w.qube("sys-net").run.phase is Phase.STOPPING
    assert w.begin(KillSpec("sys-net")).joined == begun.operation
    no_change(w, KillSpec("vault"), "QUBE_NOT_STARTED")
    no_change(w, KillSpec("far"), "QUBE_ERROR")
    late = w.begin(KillSpec("vault", "an old boot"))
    assert late.operation.state is OperationState.SUCCEEDED


def test_kill_pre_empts_a_start(w: World) -> None:
    start = w.begin(StartSpec("work"))
    kill = w.begin(KillSpec("work"))
    assert kill.operation.state is OperationState.RUNNING
    assert w.view.operations[start.operation.id].cancel_requested
    ended = w.end(start.operation, CANCELLED, error=Problem("CANCELLED", "CANCELLED", "killed"))
    assert names(ended.events) == ["work:domain-start-failed"]
    assert w.qube("work").run == HALTED
    w.end(kill.operation)
    assert check(w.view) == []
    assert w.begin(StartSpec("work")).operation.state is OperationState.RUNNING


def test_failed_kill_leaves_the_qube_up(w: World) -> None:
    w.start("work")
    w.end(w.begin(KillSpec("work")).operation, FAILED, error=BOOM)
    assert w.qube("work").run.phase is Phase.UP


# ---- PAUSE and relatives


def test_pause_and_unpause(w: World) -> None:
    no_change(w, PauseSpec("work"), "QUBE_NOT_RUNNING")
    no_change(w, PauseSpec("dom0"), "QUBE_ERROR")
    w.start("work")
    no_change(w, UnpauseSpec("work"), "QUBE_NOT_PAUSED")
    assert names(w.run(PauseSpec("work"))) == of("work", ["domain-pre-paused", "domain-paused"])
    w.power("work", "paused")
    assert names(w.run(PauseSpec("work"))) == of("work", ["domain-pre-paused"])
    events = w.run(UnpauseSpec("work"))
    assert names(events) == of("work", ["domain-pre-unpaused", "domain-unpaused"])


def test_suspend_and_resume(w: World) -> None:
    no_change(w, SuspendSpec("work"), "QUBE_NOT_RUNNING")
    no_change(w, ResumeSpec("work"), "QUBE_NOT_PAUSED")
    w.start("work")
    assert w.run(SuspendSpec("work")) == []
    w.power("work", "pmsuspended")
    assert names(w.run(ResumeSpec("work"))) == ["work:domain-resumed"]
    w.power("work", "running")
    w.end(applied(w, "work"))
    begun = w.begin(SuspendSpec("work"))
    ended = w.end(begun.operation, result={"paused_instead": "1"})
    assert names(ended.events) == of("work", ["domain-pre-paused", "domain-paused"])
    w.power("work", "paused")
    events = w.run(ResumeSpec("work"))
    assert names(events) == of("work", ["domain-pre-unpaused", "domain-unpaused"])


# ---- data


def test_import(w: World) -> None:
    begun = w.begin(ImportSpec("work", "private", size=4096))
    assert begun.events == ()
    step = OPERATIONS["IMPORT"].step("import_begin")
    assert step.events is not None
    announced_event = step.events(w.view, begun.operation)[0]
    assert announced_event.name == "domain-volume-import-begin"
    assert pairs(announced_event) == {"volume": "private", "size": "4096"}
    ended = w.end(begun.operation)
    assert pairs(ended.events[0]) == {"volume": "private", "success": "True"}
    volume = w.qube("work").volume("private")
    assert volume is not None
    assert volume.size == 4096


def test_failed_import(w: World) -> None:
    begun = w.begin(ImportSpec("work", "private"))
    assert w.end(begun.operation, FAILED, error=BOOM).events == ()
    begun = w.begin(ImportSpec("work", "private"))
    ready = replace(begun.operation, data={**begun.operation.data, "path": "/x"})
    w.view.apply(OperationPut(ready))
    ended = w.end(ready, FAILED, error=BOOM)
    assert names(ended.events) == ["work:domain-volume-import-end"]
    assert pairs(ended.events[0])["success"] == "False"


def test_clear(w: World) -> None:
    assert names(w.run(ClearSpec("work", "private"))) == of(
        "work", ["domain-volume-import-begin", "domain-volume-import-end"]
    )


def test_resize(w: World) -> None:
    assert w.run(ResizeSpec("work", "private", 5 * 2**30)) == []
    volume = w.qube("work").volume("private")
    assert volume is not None
    assert volume.size == 5 * 2**30


def test_clone_volume(w: World) -> None:
    w.run(ResizeSpec("work", "private", 7 * 2**30))
    events = w.run(CloneVolumeSpec("work", "private", "vault", "private"))
    assert names(events) == ["vault:domain-import-volume"]
    assert pairs(events[0]) == {"name": "private", "source": "appvms/work/private"}
    volume = w.qube("vault").volume("private")
    assert volume is not None
    assert volume.size == 7 * 2**30
    w.feature("alone", "boot-mode.standalone-default", "default")
    events = w.run(CloneVolumeSpec("tmpl", "root", "alone", "root"))
    assert w.qube("alone").features["boot-mode.active"] == "default"
    assert names(events)[-1] == "alone:domain-import-volume"


def test_clone_of_a_volume_that_starts_anew_takes_its_templates(w: World) -> None:
    operation = w.begin(CloneVolumeSpec("work", "root", "alone", "root")).operation
    assert set(operation.subjects) == {w.qube("alone").uuid, w.qube("tmpl").uuid}
    assert operation.data["source_qube"] == "tmpl"
    assert operation.data["source_vid"] == "vm-templates/tmpl/root"


def test_clone_of_a_volume_onto_itself_is_a_commit_like_another(w: World) -> None:
    w.run(ResizeSpec("work", "private", 7 * 2**30))
    operation = w.begin(CloneVolumeSpec("work", "private", "work", "private")).operation
    assert operation.subjects == (w.qube("work").uuid,)
    assert names(w.end(operation).events) == ["work:domain-import-volume"]
    volume = w.qube("work").volume("private")
    assert volume is not None
    assert volume.size == 7 * 2**30


@pytest.mark.parametrize("target", ["private", "volatile", "root"])
def test_a_volume_that_changes_without_snapshots_is_not_copied(w: World, target: str) -> None:
    w.do(SetVolume("work", "private", revisions_to_keep=-1))
    w.start("work")
    # Also where the copy would take nothing: what it says it copied is not there.
    no_change(w, CloneVolumeSpec("work", "private", "vault", target), "VOLUME_REFUSED")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (RevertSpec("work", "root"), "VOLUME_REFUSED"),
        (RevertSpec("work", "nosuch"), "VOLUME_NOT_FOUND"),
        (RevertSpec("vault", "private"), "VOLUME_REFUSED"),
        (ResizeSpec("work", "kernel", 5), "VOLUME_REFUSED"),
        (ResizeSpec("work", "private", 2**63), "INVALID_VALUE"),
        (ClearSpec("work", "volatile"), "VOLUME_REFUSED"),
        (ClearSpec("vault", "private"), "QUBE_NOT_HALTED"),
        (ImportSpec("vault", "private"), "QUBE_NOT_HALTED"),
        (ImportSpec("work", "root"), "VOLUME_REFUSED"),
        (CloneVolumeSpec("work", "private", "vault", "private"), "QUBE_NOT_HALTED"),
        (CloneVolumeSpec("work", "volatile", "dvm", "private"), "VOLUME_REFUSED"),
        (CloneVolumeSpec("work", "kernel", "dvm", "private"), "VOLUME_REFUSED"),
        (CloneVolumeSpec("work", "private", "dvm", "kernel"), "VOLUME_REFUSED"),
        (CloneVolumeSpec("nosuch", "private", "work", "private"), "QUBE_NOT_FOUND"),
        (ResizeSpec("dom0", "root", 5), "VOLUME_NOT_FOUND"),
    ],
)
def test_data_refused(w: World, spec: Any, reason: str) -> None:
    w.start("vault")
    no_change(w, spec, reason)


# ---- pools and kernels


def test_pool_life(w: World) -> None:
    fast = Pool("fast", "file-reflink", {"dir_path": "/fast"})
    begun = w.begin(PoolAddSpec(fast))
    assert begun.events == ()
    assert "fast" not in w.view.pools
    assert names(w.end(begun.operation).events) == ["pool-add"]
    assert w.view.pools["fast"] == fast
    no_change(w, PoolAddSpec(fast), "POOL_IN_USE")
    begun = w.begin(PoolRemoveSpec("fast"))
    assert names(begun.events) == ["pool-pre-delete"]
    spec = CreateSpec(name="x", klass="AppVM", label="red", pool="fast")
    no_change(w, spec, "VOLUME_CREATE_REFUSED")
    assert names(w.end(begun.operation).events) == ["pool-delete"]
    assert "fast" not in w.view.pools


def test_pool_in_use_stays(w: World) -> None:
    no_change(w, PoolRemoveSpec("nosuch"), "POOL_NOT_FOUND")
    refusal = no_change(w, PoolRemoveSpec("varlibqubes"), "POOL_IN_USE")
    assert not isinstance(refusal, PlanRefused)  # nothing was announced
    no_change(w, PoolAddSpec(Pool("a b", "file")), "INVALID_POOL")
    for name in ("work", "vault", "dvm", "sys-net", "alone", "tmpl"):
        w.patch(name, volumes=())
    no_change(w, PoolRemoveSpec("varlibqubes"), "POOL_IN_USE")
    w.run(PoolAddSpec(Pool("fast", "file-reflink", {})))
    begun = w.begin(PoolRemoveSpec("fast"))
    w.set("", "default_pool_root", "fast")
    ended = w.end(begun.operation)
    assert ended.events == ()
    assert ended.operation.state is FAILED
    assert ended.operation.error is not None
    assert ended.operation.error.reason == "POOL_IN_USE"
    assert "fast" in w.view.pools


def test_kernels(w: World) -> None:
    no_change(w, KernelAddSpec("6.12.1-lab"), "INVALID_VALUE")
    no_change(w, KernelAddSpec("../x"), "INVALID_POOL")
    no_change(w, KernelRemoveSpec("nosuch"), "KERNEL_NOT_INSTALLED")
    no_change(w, KernelRemoveSpec("6.12.1-lab"), "QUBE_IN_USE")
    assert w.run(KernelAddSpec("7.0")) == []
    w.view.apply(FactPut(KernelFact("7.0")))
    assert w.run(KernelRemoveSpec("7.0")) == []


def test_a_kernel_whose_removal_has_begun_is_chosen_by_nobody(w: World) -> None:
    w.view.apply(FactPut(KernelFact("7.0")))
    removal = w.begin(KernelRemoveSpec("7.0")).operation
    late = w.begin(KernelRemoveSpec("7.0")).operation
    assert late.state is OperationState.QUEUED
    for holder, name in (("", "default_kernel"), ("work", "kernel")):
        refusal = refused(lambda: w.set(holder, name, "7.0"))  # noqa: B023
        assert refusal.reason == "INVALID_PROPERTY_VALUE"
        assert "removed" in refusal.message
    # It stays after all; one that only waits for its turn looks again when that comes.
    w.end(removal, FAILED, error=BOOM)
    running = w.view.operations[late.id]
    assert running.state is OperationState.RUNNING
    w.end(running, FAILED, error=BOOM)
    w.set("work", "kernel", "7.0")
    no_change(w, KernelRemoveSpec("7.0"), "QUBE_IN_USE")


# ---- locks and queue


def test_one_holder_then_in_order(w: World) -> None:
    first = w.begin(ResizeSpec("work", "private", 2**32)).operation
    second = w.begin(RevertSpec("work", "private")).operation
    third = w.begin(StartSpec("work")).operation
    assert [o.state for o in (first, second, third)] == [
        OperationState.RUNNING,
        OperationState.QUEUED,
        OperationState.QUEUED,
    ]
    assert w.qube("work").run == HALTED
    ended = w.end(first)
    assert [o.id for o in ended.promoted] == [second.id]
    ended = w.end(ended.promoted[0])
    assert [(o.id, o.state) for o in ended.promoted] == [(third.id, OperationState.RUNNING)]
    assert names(ended.events) == ["work:domain-pre-start"]
    assert w.qube("work").run.boot_id == third.data["boot_id"]


def test_a_turn_waits_for_the_facts_that_its_plan_reads(w: World) -> None:
    """As a registry that has just started has none: nothing looks paused then."""
    w.start("work", "paused")
    facts = [FactPut(fact) for fact in w.view.facts().values()]
    holder = w.begin(ResizeSpec("work", "private", 2**32)).operation
    unpause = w.begin(UnpauseSpec("work")).operation
    revert = w.begin(RevertSpec("work", "private")).operation
    w.view.apply_all([FactRemoved(key) for key in list(w.view.facts())])
    assert w.end(holder).promoted == ()
    assert w.view.operations[unpause.id].state is OperationState.QUEUED
    # Who asked later does not pass it, and the time is bounded: the reason says by what.
    assert w.view.operations[revert.id].state is OperationState.QUEUED
    refusal = waited_too_long(Draft(w.view), unpause, 60.0)
    assert refusal.reason == "FACTS_MISSING"
    assert "UNPAUSE of 'work' waited 60 s for what domains knows" in refusal.message
    assert plan_promote(w.view, now=w.time).changes == ()
    w.view.apply_all(facts)
    plan = plan_promote(w.view, now=w.time)
    assert names(plan.events) == ["work:domain-pre-unpaused"]
    w.view.apply_all(plan.changes)
    assert w.view.operations[unpause.id].state is OperationState.RUNNING
    assert w.view.operations[revert.id].state is OperationState.QUEUED
    assert plan_promote(w.view, now=w.time).changes == ()


def test_refused_at_its_turn_makes_place_for_the_next(w: World) -> None:
    first = w.begin(StartSpec("work")).operation
    second = w.begin(ClearSpec("work", "private")).operation
    third = w.begin(PauseSpec("work")).operation
    ended = w.end(first)
    assert [(o.id, o.state) for o in ended.promoted] == [
        (second.id, FAILED),
        (third.id, OperationState.RUNNING),
    ]
    failed = w.view.operations[second.id]
    assert failed.error is not None
    assert failed.error.reason == "QUBE_NOT_HALTED"


def test_the_first_step_is_at_the_cursor_from_the_begin_on(w: World) -> None:
    holder = w.begin(ResizeSpec("work", "private", 2**32)).operation
    assert holder.cursor == OPERATIONS["RESIZE"].steps[0].name
    waits = w.begin(RevertSpec("work", "private")).operation
    assert waits.cursor == ""
    w.end(holder)
    assert w.view.operations[waits.id].cursor == OPERATIONS["REVERT"].steps[0].name


def test_full_queue_names_the_holder(w: World) -> None:
    holder = w.begin(ResizeSpec("work", "private", 2**32)).operation
    for _ in range(QUEUE_LIMIT):
        w.begin(RevertSpec("work", "private"))
    refusal = no_change(w, RevertSpec("work", "private"), "QUBE_BUSY")
    assert refusal.metadata["operation"] == holder.id
    assert "RESIZE" in refusal.message


@pytest.mark.parametrize(
    ("state", "cursor"),
    [
        (OperationState.RUNNING, ""),
        # Its first step is at work: it will wait for its writer in a moment.
        (OperationState.RUNNING, "import_begin"),
        (OperationState.WAITING_DATA, "import_begin"),
    ],
)
def test_nobody_waits_behind_an_import_without_its_data(
    w: World, state: OperationState, cursor: str
) -> None:
    begun = w.begin(ImportSpec("work", "private", size=4096)).operation
    held = replace(begun, state=state, cursor=cursor)
    w.view.apply(OperationPut(held))
    specs: tuple[OperationSpec, ...] = (
        StartSpec("work"),
        RemoveSpec("work"),
        ResizeSpec("work", "private", 2**32),
        ImportSpec("work", "private"),
        CloneVolumeSpec("work", "private", "vault", "private"),
        CloneVolumeSpec("vault", "private", "work", "private"),
    )
    for spec in specs:
        refusal = no_change(w, spec, "QUBE_BUSY")
        assert refusal.metadata == {"qube": "work", "operation": held.id, "kind": "IMPORT"}
        assert held.id in refusal.message
    # Others are not concerned, a pre-empting operation neither, and the end makes way.
    assert w.begin(StartSpec("vault")).operation.state is OperationState.RUNNING
    no_change(w, KillSpec("work"), "QUBE_NOT_STARTED")
    w.end(held)
    assert w.begin(StartSpec("work")).operation.state is OperationState.RUNNING


def test_what_is_asked_while_an_import_ends_waits_as_ever(w: World) -> None:
    begun = w.begin(ImportSpec("work", "private", size=4096)).operation
    for state, cursor in (
        (OperationState.RUNNING, "import_end"),
        (OperationState.COMPENSATING, "import_begin"),
    ):
        w.view.apply(OperationPut(replace(begun, state=state, cursor=cursor)))
        assert w.begin(RevertSpec("work", "private")).operation.state is OperationState.QUEUED


def test_an_import_that_waits_for_its_turn_lets_nobody_behind_it(w: World) -> None:
    w.begin(ResizeSpec("work", "private", 2**32))
    late = w.begin(ImportSpec("work", "private")).operation
    assert late.state is OperationState.QUEUED
    assert no_change(w, StartSpec("work"), "QUBE_BUSY").metadata["operation"] == late.id


def test_several_qubes_are_all_locked_or_none(w: World) -> None:
    busy = w.begin(ResizeSpec("vault", "private", 2**32)).operation
    both = w.begin(CloneVolumeSpec("vault", "private", "work", "private")).operation
    assert both.state is OperationState.QUEUED
    behind = w.begin(RevertSpec("work", "private")).operation
    assert behind.state is OperationState.QUEUED
    ended = w.end(busy)
    assert [o.id for o in ended.promoted] == [both.id]
    ended = w.end(both)
    assert [o.id for o in ended.promoted] == [behind.id]


def test_waiting_for_a_qube_that_is_removed(w: World) -> None:
    first = w.begin(ResizeSpec("work", "private", 2**32)).operation
    remove = w.begin(RemoveSpec("work")).operation
    late = w.begin(StartSpec("work")).operation
    assert w.begin(RemoveSpec("work")).joined == remove
    ended = w.end(first)
    assert [o.id for o in ended.promoted] == [remove.id]
    ended = w.end(remove)
    assert [(o.id, o.state) for o in ended.promoted] == [(late.id, FAILED)]
    assert w.view.operations[late.id].error == Problem(
        "NOT_FOUND", "QUBE_NOT_FOUND", "No such domain: 'work'", {"qube": "work"}
    )


def test_applies_merge(w: World) -> None:
    boot = w.start("work")
    uuid = w.qube("work").uuid
    first = w.begin(ApplySpec(uuid, boot, 1)).operation
    second = w.begin(ApplySpec(uuid, boot, 2))
    third = w.begin(ApplySpec(uuid, boot, 3))
    assert first.state is OperationState.RUNNING
    assert second.operation.state is OperationState.QUEUED
    assert third.joined is not None
    assert third.joined.id == second.operation.id
    assert w.view.operations[second.operation.id].spec == ApplySpec(uuid, boot, 3)
    # What joins is brought with it.
    part = w.begin(ApplySpec(uuid, boot, 3, ("keys",)))
    assert part.operation.id == second.operation.id
    assert part.operation.spec == ApplySpec(uuid, boot, 3)
    stale = w.begin(ApplySpec(uuid, "old", 4))
    w.end(first)
    assert stale.operation.state is OperationState.QUEUED
    ended = w.end(w.view.operations[second.operation.id])
    assert [(o.id, o.state) for o in ended.promoted] == [
        (stale.operation.id, OperationState.SUCCEEDED)
    ]


def test_same_shutdown_joins(w: World) -> None:
    w.start("work")
    first = w.begin(ShutdownSpec("work", wait=True))
    assert w.begin(ShutdownSpec("work", wait=True)).joined == first.operation
    assert w.begin(ShutdownSpec("work", force=True)).operation.state is OperationState.QUEUED


def test_shutdown_that_waited_for_a_stopped_qube_succeeds(w: World) -> None:
    boot = w.start("work")
    first = w.begin(ShutdownSpec("work", wait=True)).operation
    second = w.begin(ShutdownSpec("work", force=True)).operation
    w.run(StoppedSpec(w.qube("work").uuid, boot))
    ended = w.end(first)
    assert [(o.id, o.state) for o in ended.promoted] == [(second.id, OperationState.SUCCEEDED)]


# ---- repeat and cancel


def test_same_id_begins_once(w: World) -> None:
    begun = w.begin(StartSpec("work"))
    again = plan_begin(
        w.view, StartSpec("work"), operation_id=begun.operation.id, source="dom0", now=NOW
    )
    assert (again.operation, again.changes, again.joined) == (begun.operation, (), None)


def test_ended_operation_ends_once(w: World) -> None:
    begun = w.begin(StartSpec("work"))
    ended = w.end(begun.operation)
    again = plan_end(w.view, begun.operation, FAILED, now=NOW)
    assert (again.operation, again.changes, again.events) == (ended.operation, (), ())


def test_end_refused(w: World) -> None:
    begun = w.begin(StartSpec("work"))
    refusal = refused(lambda: plan_end(w.view, begun.operation, OperationState.STUCK, now=NOW))
    assert refusal.reason == "WRONG_OPERATION_STATE"
    unknown = replace(begun.operation, id="nosuch")
    refusal = refused(lambda: plan_end(w.view, unknown, FAILED, now=NOW))
    assert refusal.reason == "OPERATION_NOT_FOUND"


def test_cancel(w: World) -> None:
    running = w.begin(StartSpec("work")).operation
    queued = w.begin(ClearSpec("work", "private")).operation
    plan = plan_cancel(w.view, queued.id, now=NOW)
    w.view.apply_all(plan.changes)
    assert plan.operation.state is CANCELLED
    plan = plan_cancel(w.view, running.id, now=NOW)
    w.view.apply_all(plan.changes)
    assert plan.operation.cancel_requested
    assert plan.operation.state is OperationState.RUNNING
    for op_id, reason in (("nosuch", "OPERATION_NOT_FOUND"), (queued.id, "WRONG_OPERATION_STATE")):
        assert refused(lambda o=op_id: plan_cancel(w.view, o, now=NOW)).reason == reason
    remove = w.begin(RemoveSpec("vault")).operation
    refusal = refused(lambda: plan_cancel(w.view, remove.id, now=NOW))
    assert refusal.reason == "WRONG_OPERATION_STATE"


def test_steps_events_of_the_end_come_last(w: World) -> None:
    from bulkhead.model import events

    begun = w.begin(StartSpec("work"))
    last = events.domain_unpaused(w.qube("work"))
    assert names(w.end(begun.operation, events=(last,)).events) == of(
        "work", ["domain-unpaused", "domain-start"]
    )


# ---- who passes whom


def at(w: World, operation: Operation, cursor: str) -> Any:
    """Advance an operation to that step, as lifecycle does."""
    operation = replace(w.view.operations[operation.id], cursor=cursor)
    plan = plan_advance(w.view, operation, now=w.time)
    w.view.apply_all(plan.changes)
    return plan


_POWER: tuple[OperationSpec, ...] = (
    PauseSpec("work"),
    SuspendSpec("work"),
    ShutdownSpec("work", force=True),
)


def test_power_calls_are_those_of_a_running_guest_and_none_pre_empts() -> None:
    power = {kind for kind, row in OPERATIONS.items() if row.power}
    assert power == {"PAUSE", "UNPAUSE", "SUSPEND", "RESUME", "SHUTDOWN"}
    assert not any(OPERATIONS[kind].pre_empts for kind in power)
    waits = {(k, s.name) for k, row in OPERATIONS.items() for s in row.steps if s.only_waits}
    assert waits == {("START", "daemons"), ("SHUTDOWN", "stopped")}


@pytest.mark.parametrize("spec", _POWER)
def test_power_calls_pass_a_shutdown_that_waits_for_its_guest(
    w: World, spec: OperationSpec
) -> None:
    w.start("work")
    shutdown = w.begin(ShutdownSpec("work", wait=True)).operation
    at(w, shutdown, "stopped")
    removal = w.begin(RemoveSpec("work")).operation
    assert removal.state is OperationState.QUEUED
    passed = w.begin(spec).operation
    assert passed.state is OperationState.RUNNING
    assert not check(w.view)
    # What needs the qube for itself goes on waiting, also once the passer has ended.
    assert w.end(passed).promoted == ()
    assert w.qube("work").run.phase is Phase.STOPPING
    assert w.view.operations[removal.id].state is OperationState.QUEUED


def test_unpause_and_resume_pass_it_too(w: World) -> None:
    w.start("work")
    at(w, w.begin(ShutdownSpec("work", wait=True)).operation, "stopped")
    w.end(w.begin(PauseSpec("work")).operation)
    w.power("work", "paused")
    unpause = w.begin(UnpauseSpec("work")).operation
    assert unpause.state is OperationState.RUNNING
    # They wait for each other, though.
    resume = w.begin(ResumeSpec("work")).operation
    assert resume.state is OperationState.QUEUED
    assert [(o.id, o.state) for o in w.end(unpause).promoted] == [
        (resume.id, OperationState.RUNNING)
    ]


def test_power_calls_that_came_earlier_begin_when_the_shutdown_only_waits(w: World) -> None:
    w.start("work")
    shutdown = w.begin(ShutdownSpec("work", wait=True)).operation
    at(w, shutdown, "shutdown")
    removal = w.begin(RemoveSpec("work")).operation
    pause = w.begin(PauseSpec("work")).operation
    assert pause.state is OperationState.QUEUED
    plan = at(w, shutdown, "stopped")
    assert w.view.operations[pause.id].state is OperationState.RUNNING
    assert w.view.operations[removal.id].state is OperationState.QUEUED
    assert names(plan.events) == ["work:domain-pre-paused"]


def test_a_guest_without_its_agent_can_be_shut_down_while_it_starts(w: World) -> None:
    start = w.begin(StartSpec("work")).operation
    shutdown = w.begin(ShutdownSpec("work")).operation
    assert shutdown.state is OperationState.QUEUED
    at(w, start, "resume")
    assert w.view.operations[shutdown.id].state is OperationState.QUEUED
    at(w, start, "daemons")
    assert w.view.operations[shutdown.id].state is OperationState.RUNNING
    assert w.qube("work").run.phase is Phase.STOPPING
    # The guest does not obey, and its agent comes after all.
    w.end(w.view.operations[shutdown.id])
    w.end(w.view.operations[start.id])
    assert w.qube("work").run.phase is Phase.UP
    assert not check(w.view)


@pytest.mark.parametrize(
    "spec", [ResizeSpec("work", "private", 2**32), RemoveSpec("work"), RevertSpec("work", "root")]
)
def test_all_else_waits_for_a_shutdown_that_waits(w: World, spec: OperationSpec) -> None:
    w.start("work")
    at(w, w.begin(ShutdownSpec("work", wait=True)).operation, "stopped")
    assert w.begin(spec).operation.state is OperationState.QUEUED


def test_who_waited_too_long_is_told_for_whom(w: World) -> None:
    holder = w.begin(ResizeSpec("work", "private", 2**32)).operation
    w.begin(RevertSpec("work", "private"))
    late = w.begin(CloneVolumeSpec("vault", "private", "work", "private")).operation
    refusal = waited_too_long(Draft(w.view), late, 60.0)
    assert refusal.reason == "QUBE_BUSY"
    assert refusal.metadata == {"qube": "work", "operation": holder.id, "kind": "RESIZE"}
    assert "RESIZE" in refusal.message and "60 s" in refusal.message
    ended = w.end(late, FAILED, error=problem_of(refusal))
    assert ended.operation.error == problem_of(refusal)
    assert ended.events == () and ended.promoted == ()
    assert w.view.operations[holder.id].state is OperationState.RUNNING


def test_what_nobody_would_ask_for_again_waits_as_long_as_it_takes(w: World) -> None:
    boot = w.start("work")
    w.begin(ResizeSpec("work", "private", 2**32))
    apply = w.begin(ApplySpec(w.qube("work").uuid, boot, 1)).operation
    pause = w.begin(PauseSpec("work")).operation
    assert (apply.state, pause.state) == (OperationState.QUEUED, OperationState.QUEUED)
    assert may_wait_for_ever(apply)
    assert not may_wait_for_ever(pause)
    # A follow-up, too: nobody else removes a disposable that has stopped.
    disp = w.create("disp7", "DispVM", template="dvm")
    w.set("disp7", "auto_cleanup", "True")
    boot = w.start("disp7")
    w.begin(ResizeSpec("disp7", "private", 2**33))
    stopped = w.begin(StoppedSpec(disp.uuid, boot)).operation
    removal = w.end(stopped).follow_up
    assert removal is not None and removal.state is OperationState.QUEUED
    assert may_wait_for_ever(removal)


def test_a_netvm_starts_for_its_client_past_what_waits_for_that_client(w: World) -> None:
    """Otherwise each of the three would wait for the next one."""
    w.run(ResizeSpec("sys-net", "private", 2**32))
    client = w.begin(StartSpec("work")).operation
    copy = w.begin(CloneVolumeSpec("sys-net", "private", "work", "private")).operation
    assert copy.state is OperationState.QUEUED
    assert w.begin(StartSpec("sys-net")).operation.state is OperationState.RUNNING
    # The same where the netvm was held when its start was asked for.
    w = world()
    holder = w.begin(ResizeSpec("sys-net", "private", 2**32)).operation
    client = w.begin(StartSpec("work")).operation
    copy = w.begin(CloneVolumeSpec("sys-net", "private", "work", "private")).operation
    netvm = w.begin(StartSpec("sys-net")).operation
    assert (copy.state, netvm.state) == (OperationState.QUEUED, OperationState.QUEUED)
    assert [o.id for o in w.end(holder).promoted] == [netvm.id]
    w.end(w.view.operations[netvm.id])
    assert w.view.operations[copy.id].state is OperationState.QUEUED
    w.end(client)
    # Its turn has come; a volume of a qube that runs is refused then.
    assert w.view.operations[copy.id].state is FAILED


def _queue_is_full(w: World) -> list[Operation]:
    """As many operations as may hold "work" and wait for it, in their order."""
    holder = w.begin(ResizeSpec("work", "private", 2**32)).operation
    return [holder, *(w.begin(RevertSpec("work", "private")).operation for _ in range(QUEUE_LIMIT))]


def test_an_apply_that_finds_no_place_is_owed(w: World) -> None:
    """The next one brings all, whatever it is about: lifecycle looks for one that failed."""
    boot = w.start("work")
    uuid = w.qube("work").uuid
    waiting = _queue_is_full(w)
    for _ in range(2):  # one is enough
        netvm = w.start("sys-net")
        owed = [
            o for o in w.view.operations.values() if o.kind == "APPLY" and o.subjects == (uuid,)
        ]
        assert [(o.state, o.spec) for o in owed] == [(FAILED, ApplySpec(uuid, boot))]
        assert owed[0].error is not None and owed[0].error.reason == "QUBE_BUSY"
        assert owed[0].finished
        w.begin(StoppedSpec(w.qube("sys-net").uuid, netvm))
        w.patch("sys-net", run=HALTED)
    for operation in waiting:
        w.end(w.view.operations[operation.id])
    assert w.begin(ApplySpec(uuid, boot, parts=("keys",))).operation.state is OperationState.RUNNING


def test_the_netvm_that_a_qube_left_as_it_stopped_is_told(w: World) -> None:
    w.start("sys-net")
    netvm = w.qube("sys-net")
    boot = w.start("work")
    uuid = w.qube("work").uuid
    holder = w.begin(PauseSpec("work")).operation
    w.set("work", "netvm", "")
    w.begin(ApplySpec(uuid, boot))
    w.begin(ApplySpec(uuid, boot, parts=("keys",)))
    stopped = w.begin(StoppedSpec(uuid, boot)).operation
    w.end(holder)
    # While it stops nothing of its own is brought any more.
    plan = w.set("work", "netvm", "sys-net")
    assert plan.parts == {netvm.uuid: ("clients",)} and plan.beside == {netvm.uuid}
    w.set("work", "netvm", "")
    w.end(stopped)
    told = [o.spec for o in w.view.operations_on(netvm.uuid)]
    assert told == [ApplySpec(netvm.uuid, netvm.run.boot_id, parts=("clients",))]
