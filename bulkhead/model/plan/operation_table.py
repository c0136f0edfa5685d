"""The one table of operations: what each locks, its steps in order, its pivot.

Owns step names, which of them are undone, where an operation may be cancelled and the
events of each step. Must not know what a step does (lifecycle) nor what begin and end
change (plan.operations). Invariant: every kind of specs.KINDS has one row; a begin is
durable with its first step at the cursor; the events of a step are those that become
true by it, and go out when the next step begins or the operation ends.

The events of begin and end are in the columns `begin` and `end` as text for the reader;
the plans make them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bulkhead.model import events
from bulkhead.model.records import Operation, WireEvent
from bulkhead.model.specs import ImportSpec
from bulkhead.model.view import View

StepEvents = Callable[[View, Operation], tuple[WireEvent, ...]]

# Every start that the core makes itself asks for the graphical session too.
START_GUID = True


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step.

    undo: it has an undo, sent also where it is unknown whether the step happened.
    only_waits: it does no more than wait for the guest, so power calls go on meanwhile.
    events: what to announce once the step is done. pivot: from this step on there is no
    way back. cancellable: a cancel that was asked for is honoured before this step.
    beside: done at the same time as the step before it, under that one's cursor: neither
    needs what the other leaves, and after a crash both are repeated, or both undone.
    """

    name: str
    undo: bool = False
    only_waits: bool = False
    events: StepEvents | None = None
    pivot: bool = False
    cancellable: bool = True
    beside: bool = False


@dataclass(frozen=True, slots=True)
class OperationRow:
    """One kind of operation.

    locks: what it holds while it is not finished. pivots_at_begin: its begin is the
    pivot, it can only go forward. pre_empts: begins although others hold the qube.
    power: a power call of a running guest: begins although others hold the qube that only
    wait for the guest. patient: waits for its turn without a limit of time, since somebody
    relies on its being done. carried_out: when its steps are done, it can only succeed and
    its end changes nothing that a caller may see: the caller is told then.
    reads: services whose facts its plans and steps read: it waits for their reports, which
    are lost when the registry starts anew. Not KILL: it must get through.
    begin, end: events of the plans, in order, "|" between alternatives.
    """

    kind: str
    locks: str
    steps: tuple[StepRow, ...]
    pivots_at_begin: bool = False
    pre_empts: bool = False
    power: bool = False
    patient: bool = False
    carried_out: bool = False
    reads: tuple[str, ...] = ()
    begin: str = ""
    end: str = ""

    def step(self, name: str) -> StepRow:
        """The step of that name; KeyError where the operation has none."""
        for row in self.steps:
            if row.name == name:
                return row
        raise KeyError(f"operation {self.kind} has no step {name}")


def _verify_files(view: View, operation: Operation) -> tuple[WireEvent, ...]:
    qube = view.by_uuid_any(operation.subjects[0])
    return (events.domain_verify_files(qube),) if qube is not None else ()


def _pre_spawn(view: View, operation: Operation) -> tuple[WireEvent, ...]:
    qube = view.by_uuid_any(operation.subjects[0])
    return (events.domain_pre_spawn(qube, START_GUID),) if qube is not None else ()


def _spawned(view: View, operation: Operation) -> tuple[WireEvent, ...]:
    qube = view.by_uuid_any(operation.subjects[0])
    return events.domain_spawned(qube, START_GUID) if qube is not None else ()


def _qdb_create(view: View, operation: Operation) -> tuple[WireEvent, ...]:
    qube = view.by_uuid_any(operation.subjects[0])
    return (events.domain_qdb_create(qube),) if qube is not None else ()


def _pre_unpaused(view: View, operation: Operation) -> tuple[WireEvent, ...]:
    qube = view.by_uuid_any(operation.subjects[0])
    return (events.domain_pre_unpaused(qube),) if qube is not None else ()


def _unpaused(view: View, operation: Operation) -> tuple[WireEvent, ...]:
    qube = view.by_uuid_any(operation.subjects[0])
    return (events.domain_unpaused(qube),) if qube is not None else ()


def _import_begun(view: View, operation: Operation) -> tuple[WireEvent, ...]:
    qube = view.by_uuid_any(operation.subjects[0])
    spec = operation.spec
    if qube is None or not isinstance(spec, ImportSpec):
        return ()
    size = int(operation.data.get("size", "0") or "0") or spec.size
    return (events.volume_import_begin(qube, spec.volume, size),)


_ROWS: tuple[OperationRow, ...] = (
    OperationRow(
        "CREATE",
        locks="the new qube",
        steps=(StepRow("ensure", undo=True), StepRow("copy_rules", undo=True, beside=True)),
        end="domain-add, domain-tag-add:created-by-S, domain-create-on-disk"
        " | disposable: domain-add, domain-create-on-disk, domain-tag-add:created-by-S,"
        " domain-tag-add:disp-created-by-S | failed: nothing",
    ),
    OperationRow(
        "CLONE",
        locks="the new qube, the source",
        steps=(StepRow("ensure_cloned", undo=True), StepRow("copy_rules", undo=True, beside=True)),
        end="domain-add, domain-tag-add:created-by-S, domain-clone-files | failed: nothing",
    ),
    OperationRow(
        "REMOVE",
        locks="the qube",
        # What takes longest is sent first.
        steps=(
            StepRow("remove_volumes", cancellable=False),
            StepRow("withdraw_rules", cancellable=False, beside=True),
            StepRow("undefine", cancellable=False, beside=True),
        ),
        pivots_at_begin=True,
        # Nobody sees the record any more; its end gives back what was reserved for it.
        carried_out=True,
        begin="domain-pre-delete, domain-delete",
        end="domain-remove-from-disk",
    ),
    OperationRow(
        "START",
        locks="the qube",
        reads=("domains", "storage"),
        steps=(
            StepRow("devices"),
            StepRow("verify", events=_verify_files),
            StepRow("netvm"),
            StepRow("memory", undo=True),
            StepRow("storage", undo=True),
            StepRow("plug", undo=True),
            StepRow("pre_spawn", events=_pre_spawn),
            StepRow("create_paused", undo=True, events=_spawned),
            StepRow("guest_keys", events=_qdb_create),
            # The guest is about to run: announced when the step before it is done.
            StepRow("firewall", undo=True, events=_pre_unpaused),
            StepRow("resume", events=_unpaused, pivot=True),
            # Until the guest's agent has connected, or does not in time.
            StepRow("daemons", cancellable=False, only_waits=True),
            StepRow("agent", cancellable=False),
        ),
        begin="domain-pre-start | refused: [domain-pre-start,] domain-start-failed",
        end="domain-start | failed: domain-start-failed [, domain-stopped,"
        " property-reset:xid, property-reset:stubdom_xid, property-reset:start_time,"
        " domain-shutdown]",
    ),
    OperationRow(
        "STOPPED",
        locks="the qube",
        reads=("domains",),
        steps=(
            StepRow("withdraw_rules", cancellable=False),
            StepRow("unplug", cancellable=False),
            StepRow("stop_volumes", cancellable=False),
        ),
        pivots_at_begin=True,
        pre_empts=True,
        begin="domain-stopped, property-reset:xid, property-reset:stubdom_xid,"
        " property-reset:start_time",
        end="domain-shutdown",
    ),
    OperationRow(
        "SHUTDOWN",
        locks="the qube",
        reads=("domains",),
        # stopped: with wait, until the STOPPED operation of this boot has ended; without
        # wait nothing.
        steps=(StepRow("shutdown"), StepRow("stopped", only_waits=True)),
        power=True,
        begin="domain-pre-shutdown | refused: domain-pre-shutdown, domain-shutdown-failed",
        end="failed: domain-shutdown-failed",
    ),
    OperationRow(
        "KILL",
        locks="the qube",
        # stopped: until the STOPPED operation of this boot has ended.
        steps=(StepRow("destroy", cancellable=False), StepRow("stopped", cancellable=False)),
        pivots_at_begin=True,
        pre_empts=True,
    ),
    OperationRow(
        "PAUSE",
        locks="the qube",
        reads=("domains",),
        steps=(StepRow("pause"),),
        power=True,
        begin="domain-pre-paused",
        end="domain-paused",
    ),
    OperationRow(
        "UNPAUSE",
        locks="the qube",
        reads=("domains",),
        steps=(StepRow("unpause"),),
        power=True,
        begin="domain-pre-unpaused",
        end="domain-unpaused",
    ),
    OperationRow(
        "SUSPEND",
        locks="the qube",
        reads=("domains",),
        steps=(StepRow("suspend"),),
        power=True,
        end="paused instead: domain-pre-paused, domain-paused",
    ),
    OperationRow(
        "RESUME",
        locks="the qube",
        reads=("domains",),
        steps=(StepRow("wake"),),
        power=True,
        begin="paused: domain-pre-unpaused",
        end="suspended: domain-resumed | paused: domain-unpaused",
    ),
    OperationRow("REVERT", locks="the qube", steps=(StepRow("revert"),)),
    OperationRow("RESIZE", locks="the qube", steps=(StepRow("resize"), StepRow("tell_guest"))),
    OperationRow(
        "CLEAR",
        locks="the qube",
        steps=(StepRow("clear"),),
        begin="domain-volume-import-begin",
        end="domain-volume-import-end",
    ),
    OperationRow(
        "CLONE_VOLUME",
        locks="the qube, the source",
        steps=(StepRow("clone_volume"),),
        end="domain-import-volume",
    ),
    OperationRow(
        "IMPORT",
        locks="the qube",
        # The operation waits for the data (WAITING_DATA) between the two.
        steps=(
            StepRow("import_begin", undo=True, events=_import_begun),
            StepRow("import_end", pivot=True),
        ),
        end="domain-volume-import-end",
    ),
    OperationRow(
        "APPLY", locks="the qube", reads=("domains",), steps=(StepRow("apply"),), patient=True
    ),
    OperationRow(
        "ATTACH",
        locks="the qube",
        reads=("domains",),
        steps=(StepRow("attach", undo=True),),
        begin="device-pre-attach:C",
        end="device-attach:C",
    ),
    OperationRow(
        "DETACH",
        locks="the qube",
        reads=("domains",),
        steps=(StepRow("detach"),),
        begin="device-pre-detach:C",
        end="device-detach:C",
    ),
    OperationRow(
        "POOL_ADD",
        locks="pool/NAME",
        steps=(StepRow("pool_setup", undo=True),),
        end="pool-add",
    ),
    OperationRow(
        "POOL_REMOVE",
        locks="pool/NAME",
        steps=(StepRow("pool_teardown"),),
        begin="pool-pre-delete",
        end="pool-delete",
    ),
    OperationRow(
        "KERNEL_ADD",
        locks="kernel/NAME",
        reads=("storage",),
        steps=(StepRow("kernel_add", undo=True),),
    ),
    OperationRow(
        "KERNEL_REMOVE",
        locks="kernel/NAME",
        reads=("storage",),
        steps=(StepRow("kernel_remove"),),
    ),
)

OPERATIONS: Mapping[str, OperationRow] = MappingProxyType({row.kind: row for row in _ROWS})


def unreported(view: View, kind: str) -> str:
    """The service that an operation of that kind has to wait for, "" = none.

    That a fact is missing says nothing before its owner has reported since the registry
    started: a start would find no kernel or make a guest of a network qube, a stop would
    leave a tap, a device would not be attached.
    """
    told = {"domains": view.host is not None, "storage": view.storage_reported}
    return next((service for service in OPERATIONS[kind].reads if not told[service]), "")
