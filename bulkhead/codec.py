"""Records to protobuf messages and back.

Owns the mapping between bulkhead.model.{records,specs} and the messages of records.proto
and registry.proto; the only module that knows both. Must not know what any of it means.
Invariant: from_proto(to_proto(x)) == x for every record. Runs once per change and once
per qube of a snapshot, hence plain straight-line code for qubes and generic code for the
rarely sent specs.

What arrives with an unknown enum value or an unset oneof is refused with PROTOCOL.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from sys import intern
from typing import Any, TypeVar

from bulkhead.api import envelope_pb2, records_pb2, registry_pb2
from bulkhead.model import specs
from bulkhead.model.records import (
    HALTED,
    Assignment,
    Change,
    DeviceFact,
    Fact,
    FactPut,
    FactRemoved,
    HostFact,
    KernelFact,
    Label,
    LabelPut,
    LabelRemoved,
    Operation,
    OperationPut,
    OperationRemoved,
    OperationState,
    Phase,
    Pool,
    PoolFact,
    PoolPut,
    PoolRemoved,
    PowerFact,
    Problem,
    Qube,
    QubePut,
    QubeRemoved,
    RecordState,
    Run,
    SystemPut,
    SystemRemoved,
    Volume,
    WireEvent,
)
from bulkhead.model.refusal import Refusal

_T = TypeVar("_T")

_KeyValue = records_pb2.KeyValue

_STATE_TO = {
    RecordState.ACTIVE: records_pb2.RECORD_STATE_ACTIVE,
    RecordState.CREATING: records_pb2.RECORD_STATE_CREATING,
    RecordState.DELETING: records_pb2.RECORD_STATE_DELETING,
}
_STATE_FROM = {number: state for state, number in _STATE_TO.items()}
_PHASE_TO = {
    Phase.HALTED: records_pb2.PHASE_HALTED,
    Phase.STARTING: records_pb2.PHASE_STARTING,
    Phase.UP: records_pb2.PHASE_UP,
    Phase.STOPPING: records_pb2.PHASE_STOPPING,
}
_PHASE_FROM = {number: phase for phase, number in _PHASE_TO.items()}
_OPERATION_STATE_TO = {
    OperationState.QUEUED: records_pb2.OPERATION_STATE_QUEUED,
    OperationState.RUNNING: records_pb2.OPERATION_STATE_RUNNING,
    OperationState.WAITING_DATA: records_pb2.OPERATION_STATE_WAITING_DATA,
    OperationState.COMPENSATING: records_pb2.OPERATION_STATE_COMPENSATING,
    OperationState.STUCK: records_pb2.OPERATION_STATE_STUCK,
    OperationState.SUCCEEDED: records_pb2.OPERATION_STATE_SUCCEEDED,
    OperationState.FAILED: records_pb2.OPERATION_STATE_FAILED,
    OperationState.CANCELLED: records_pb2.OPERATION_STATE_CANCELLED,
}
_OPERATION_STATE_FROM = {number: state for state, number in _OPERATION_STATE_TO.items()}


def _known(table: Mapping[Any, _T], number: int, what: str) -> _T:
    found = table.get(number)
    if found is None:
        raise Refusal("PROTOCOL", f"{what} {number} is not known", value=str(number))
    return found


def _pairs_to(pairs: Iterable[tuple[str, str]]) -> list[records_pb2.KeyValue]:
    return [_KeyValue(key=key, value=value) for key, value in pairs]


def _pairs_from(pairs: Iterable[records_pb2.KeyValue]) -> dict[str, str]:
    # Every qube has the same few keys: one copy serves all of them.
    return {intern(pair.key): pair.value for pair in pairs}


# ---- events


def event_to_proto(event: WireEvent) -> records_pb2.WireEvent:
    """A finished wire event."""
    return records_pb2.WireEvent(
        subject=event.subject,
        name=event.name,
        pairs=_pairs_to(event.pairs),
        subject_uuid=event.subject_uuid,
    )


def event_from_proto(message: records_pb2.WireEvent) -> WireEvent:
    """A finished wire event."""
    return WireEvent(
        message.subject,
        message.name,
        tuple((pair.key, pair.value) for pair in message.pairs),
        message.subject_uuid,
    )


# ---- labels, pools, volumes, assignments, qubes


def label_to_proto(label: Label) -> records_pb2.Label:
    """A label."""
    return records_pb2.Label(index=label.index, name=label.name, color=label.color)


def label_from_proto(message: records_pb2.Label) -> Label:
    """A label."""
    return Label(message.index, message.name, message.color)


def pool_to_proto(pool: Pool) -> records_pb2.Pool:
    """A pool."""
    return records_pb2.Pool(name=pool.name, driver=pool.driver, options=dict(pool.options))


def pool_from_proto(message: records_pb2.Pool) -> Pool:
    """A pool; its options sorted by name, since a map has no order."""
    return Pool(message.name, message.driver, dict(sorted(message.options.items())))


def volume_to_proto(volume: Volume) -> records_pb2.Volume:
    """A declared volume."""
    message = records_pb2.Volume(
        name=volume.name,
        pool=volume.pool,
        vid=volume.vid,
        size=volume.size,
        revisions_to_keep=volume.revisions_to_keep,
        rw=volume.rw,
        save_on_stop=volume.save_on_stop,
        snap_on_start=volume.snap_on_start,
        source=volume.source,
    )
    if volume.ephemeral is not None:
        message.ephemeral = volume.ephemeral
    return message


def volume_from_proto(message: records_pb2.Volume) -> Volume:
    """A declared volume."""
    return Volume(
        intern(message.name),
        intern(message.pool),
        message.vid,
        message.size,
        message.revisions_to_keep,
        message.rw,
        message.save_on_stop,
        message.snap_on_start,
        intern(message.source),
        message.ephemeral if message.HasField("ephemeral") else None,
    )


def assignment_to_proto(device: Assignment) -> records_pb2.DeviceAssignment:
    """A device assignment."""
    return records_pb2.DeviceAssignment(
        devclass=device.devclass,
        backend=device.backend,
        port=device.port,
        identity=device.identity,
        mode=device.mode,
        options=_pairs_to(device.options.items()),
        frontend_untold=not device.frontend_told,
    )


def assignment_from_proto(message: records_pb2.DeviceAssignment) -> Assignment:
    """A device assignment; empty port and identity stay empty."""
    return Assignment(
        message.devclass,
        message.backend,
        message.port,
        message.identity,
        message.mode,
        _pairs_from(message.options),
        not message.frontend_untold,
    )


def qube_to_proto(qube: Qube) -> records_pb2.Qube:
    """A qube's whole record."""
    run = qube.run
    return records_pb2.Qube(
        uuid=qube.uuid,
        name=qube.name,
        qid=qube.qid,
        klass=qube.klass,
        state=_STATE_TO[qube.state],
        properties=_pairs_to(qube.properties.items()),
        features=_pairs_to(qube.features.items()),
        tags=sorted(qube.tags),
        devices=[assignment_to_proto(device) for device in qube.devices],
        volumes=[volume_to_proto(volume) for volume in qube.volumes],
        notes=qube.notes,
        rules_digest=qube.rules_digest,
        quarantine=qube.quarantine,
        raw=qube.raw,
        run=records_pb2.Run(phase=_PHASE_TO[run.phase], boot_id=run.boot_id),
        revision=qube.revision,
    )


def qube_from_proto(message: records_pb2.Qube) -> Qube:
    """A qube's whole record; an unset run means HALTED."""
    if message.HasField("run"):
        phase = _known(_PHASE_FROM, message.run.phase, "phase")
        boot_id = message.run.boot_id
        run = Run(phase, boot_id) if boot_id or phase is not Phase.HALTED else HALTED
    else:
        run = HALTED
    return Qube(
        uuid=message.uuid,
        name=message.name,
        qid=message.qid,
        klass=intern(message.klass),
        state=_known(_STATE_FROM, message.state, "record state"),
        properties=_pairs_from(message.properties),
        features=_pairs_from(message.features),
        tags=frozenset(map(intern, message.tags)),
        devices=tuple(map(assignment_from_proto, message.devices)),
        volumes=tuple(map(volume_from_proto, message.volumes)),
        notes=message.notes,
        rules_digest=message.rules_digest,
        quarantine=message.quarantine,
        raw=message.raw,
        run=run,
        revision=message.revision,
    )


# ---- facts


def fact_to_proto(fact: Fact, key: str = "") -> records_pb2.Fact:
    """A fact; key is its stream key, "" where the receiver derives it."""
    message = records_pb2.Fact(key=key)
    match fact:
        case HostFact():
            message.host.CopyFrom(
                records_pb2.HostFact(
                    hypervisor=fact.hypervisor,
                    uri=fact.uri,
                    memory_kib=fact.memory_kib,
                    cpus=fact.cpus,
                    dom0_maxmem_mib=fact.dom0_maxmem_mib,
                    has_iommu=fact.has_iommu,
                    cpu_family_model=fact.cpu_family_model,
                )
            )
        case KernelFact():
            message.kernel.CopyFrom(
                records_pb2.KernelFact(
                    name=fact.name,
                    pool=fact.pool,
                    directory=fact.directory,
                    has_vmlinuz=fact.has_vmlinuz,
                    has_initramfs=fact.has_initramfs,
                    has_modules=fact.has_modules,
                    memory_hotplug=fact.memory_hotplug,
                    kernelopts_common=fact.kernelopts_common,
                    kernelopts_pci=fact.kernelopts_pci,
                    kernelopts_nopci=fact.kernelopts_nopci,
                )
            )
        case PoolFact():
            message.pool.CopyFrom(
                records_pb2.PoolFact(
                    name=fact.name,
                    usable=fact.usable,
                    problem=fact.problem,
                    size=fact.size,
                    usage=fact.usage,
                    usage_details=dict(fact.usage_details),
                    included_in=fact.included_in,
                )
            )
        case PowerFact():
            message.power.CopyFrom(
                records_pb2.PowerFact(
                    uuid=fact.uuid,
                    boot_id=fact.boot_id,
                    number=fact.number,
                    power=fact.power,
                    xid=fact.xid,
                    stubdom_xid=fact.stubdom_xid,
                    stubdom_uuid=fact.stubdom_uuid,
                    start_time=fact.start_time,
                    agent=fact.agent,
                    stop_reason=fact.stop_reason,
                )
            )
        case DeviceFact():
            message.device.CopyFrom(
                records_pb2.DeviceFact(
                    backend_uuid=fact.backend_uuid,
                    devclass=fact.devclass,
                    port=fact.port,
                    device_id=fact.device_id,
                    fields=_pairs_to(fact.fields.items()),
                    interfaces=fact.interfaces,
                    data=_pairs_to(fact.data.items()),
                    parent_port=fact.parent_port,
                    parent_devclass=fact.parent_devclass,
                    attached_to=fact.attached_to,
                    attach_options=_pairs_to(fact.attach_options.items()),
                )
            )
    return message


def fact_from_proto(message: records_pb2.Fact) -> Fact:
    """A fact; its key is fact_key() of what is returned, whatever the message says."""
    which = message.WhichOneof("value")
    if which == "power":
        power = message.power
        return PowerFact(
            power.uuid,
            power.boot_id,
            power.number,
            power.power,
            power.xid,
            power.stubdom_xid,
            power.stubdom_uuid,
            power.start_time if power.HasField("start_time") else None,
            power.agent,
            power.stop_reason,
        )
    if which == "device":
        device = message.device
        return DeviceFact(
            device.backend_uuid,
            device.devclass,
            device.port,
            device.device_id,
            _pairs_from(device.fields),
            device.interfaces,
            _pairs_from(device.data),
            device.parent_port,
            device.parent_devclass,
            device.attached_to,
            _pairs_from(device.attach_options),
        )
    if which == "host":
        host = message.host
        return HostFact(
            host.hypervisor,
            host.uri,
            host.memory_kib,
            host.cpus,
            host.dom0_maxmem_mib,
            host.has_iommu,
            host.cpu_family_model,
        )
    if which == "kernel":
        kernel = message.kernel
        return KernelFact(
            kernel.name,
            kernel.pool,
            kernel.directory,
            kernel.has_vmlinuz,
            kernel.has_initramfs,
            kernel.has_modules,
            kernel.memory_hotplug,
            kernel.kernelopts_common if kernel.HasField("kernelopts_common") else None,
            kernel.kernelopts_pci if kernel.HasField("kernelopts_pci") else None,
            kernel.kernelopts_nopci if kernel.HasField("kernelopts_nopci") else None,
        )
    if which == "pool":
        pool = message.pool
        return PoolFact(
            pool.name,
            pool.usable,
            pool.problem,
            pool.size if pool.HasField("size") else None,
            pool.usage if pool.HasField("usage") else None,
            dict(sorted(pool.usage_details.items())),
            pool.included_in,
        )
    raise Refusal("PROTOCOL", "a fact carries no value")


# ---- specs and commands: same field names on both sides


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    """How one field of a spec travels: name and two converters; optional: None = unset."""

    name: str
    to: Callable[[Any], Any] | None
    back: Callable[[Any], Any] | None
    optional: bool


def _fields_of(klass: type[Any]) -> tuple[_Field, ...]:
    hints = typing.get_type_hints(klass)
    rows: list[_Field] = []
    for item in dataclasses.fields(klass):
        hint = hints[item.name]
        origin = typing.get_origin(hint)
        optional = origin in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint)
        to: Callable[[Any], Any] | None = None
        back: Callable[[Any], Any] | None = None
        if hint is Assignment:
            to, back = assignment_to_proto, assignment_from_proto
        elif hint is Pool:
            to, back = pool_to_proto, pool_from_proto
        elif origin is tuple and typing.get_args(hint)[0] is not str:
            to, back = _pairs_to, _pair_tuple
        elif origin is tuple:
            to, back = list, tuple
        elif origin is not None and not optional:
            to, back = dict, _sorted_dict
        rows.append(_Field(item.name, to, back, optional))
    return tuple(rows)


def _sorted_dict(mapping: Mapping[str, str]) -> dict[str, str]:
    return dict(sorted(mapping.items()))


def _pair_tuple(pairs: Iterable[records_pb2.KeyValue]) -> tuple[tuple[str, str], ...]:
    return tuple((pair.key, pair.value) for pair in pairs)


_SPEC_FIELDS: dict[type[Any], tuple[_Field, ...]] = {
    klass: _fields_of(klass)
    for klass in (*specs.KINDS.values(), *specs.COMMANDS.values(), specs.PreloadMarks)
}
# kind <-> field of the oneof
_KIND_FIELD = {kind: "import_data" if kind == "IMPORT" else kind.lower() for kind in specs.KINDS}
_FIELD_KIND = {name: kind for kind, name in _KIND_FIELD.items()}


def _arguments(value: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for row in _SPEC_FIELDS[type(value)]:
        given = getattr(value, row.name)
        if given is not None:
            arguments[row.name] = row.to(given) if row.to is not None else given
    return arguments


def _record(klass: type[_T], message: Any) -> _T:
    arguments: dict[str, Any] = {}
    for row in _SPEC_FIELDS[klass]:
        if row.optional and not message.HasField(row.name):
            continue
        given = getattr(message, row.name)
        arguments[row.name] = row.back(given) if row.back is not None else given
    return klass(**arguments)


def spec_to_proto(spec: specs.OperationSpec) -> records_pb2.OperationSpec:
    """An operation's arguments, in the oneof field of its kind."""
    name = _KIND_FIELD[specs.kind_of(spec)]
    message = records_pb2.OperationSpec()
    target = getattr(message, name)
    target.SetInParent()  # a spec whose fields are all defaults must still be seen
    target.MergeFrom(type(target)(**_arguments(spec)))
    return message


def spec_from_proto(message: records_pb2.OperationSpec) -> specs.OperationSpec:
    """An operation's arguments; refused with PROTOCOL where no kind is given."""
    which = message.WhichOneof("kind")
    if which is None:
        raise Refusal("PROTOCOL", "an operation without a kind")
    return _record(specs.KINDS[_FIELD_KIND[which]], getattr(message, which))


def command_to_proto(command: specs.Command) -> registry_pb2.MutateRequest:
    """A mutation command in the request's oneof."""
    name = specs.command_field(command)
    message = registry_pb2.MutateRequest()
    target = getattr(message, name)
    target.SetInParent()
    target.MergeFrom(type(target)(**_arguments(command)))
    return message


def command_from_proto(message: registry_pb2.MutateRequest) -> specs.Command:
    """A mutation command; refused with PROTOCOL where none is given."""
    which = message.WhichOneof("command")
    if which is None:
        raise Refusal("PROTOCOL", "a mutation without a command")
    return _record(specs.COMMANDS[which], getattr(message, which))


def preload_to_proto(marks: specs.PreloadMarks) -> registry_pb2.PreloadRequest:
    """dispvm's marks."""
    return registry_pb2.PreloadRequest(**_arguments(marks))


def preload_from_proto(message: registry_pb2.PreloadRequest) -> specs.PreloadMarks:
    """dispvm's marks."""
    return _record(specs.PreloadMarks, message)


# ---- operations


def problem_to_proto(problem: Problem) -> envelope_pb2.Status:
    """A stored error as the envelope's status."""
    return envelope_pb2.Status(
        code=f"CODE_{problem.code}",
        reason=problem.reason,
        message=problem.message,
        metadata=dict(problem.metadata),
    )


def problem_from_proto(message: envelope_pb2.Status) -> Problem:
    """A stored error; causes, retry hint and log reference are not stored."""
    try:
        code = envelope_pb2.Code.Name(message.code)
    except ValueError:
        raise Refusal(
            "PROTOCOL", f"status code {message.code} is not known", value=str(message.code)
        ) from None
    return Problem(
        code.removeprefix("CODE_"),
        message.reason,
        message.message,
        dict(sorted(message.metadata.items())),
    )


def operation_state_to_proto(state: OperationState) -> records_pb2.OperationState:
    """An operation's state as the enum's number."""
    return _OPERATION_STATE_TO[state]


def operation_state_from_proto(number: int) -> OperationState:
    """An operation's state; UNSPECIFIED and unknown numbers are refused with PROTOCOL."""
    return _known(_OPERATION_STATE_FROM, number, "operation state")


def operation_to_proto(operation: Operation) -> records_pb2.Operation:
    """A persisted operation."""
    return records_pb2.Operation(
        id=operation.id,
        kind=operation.kind,
        state=_OPERATION_STATE_TO[operation.state],
        spec=spec_to_proto(typing.cast(specs.OperationSpec, operation.spec)),
        subjects=operation.subjects,
        cursor=operation.cursor,
        epoch=operation.epoch,
        progress=operation.progress,
        progress_text=operation.progress_text,
        error=problem_to_proto(operation.error) if operation.error is not None else None,
        source=operation.source,
        request_id=operation.request_id,
        result=dict(operation.result),
        data=dict(operation.data),
        cancel_requested=operation.cancel_requested,
        created=operation.created,
        finished=operation.finished,
        pivoted=operation.pivoted,
        waits_for=operation.waits_for,
    )


def operation_from_proto(message: records_pb2.Operation) -> Operation:
    """A persisted operation."""
    return Operation(
        id=message.id,
        kind=message.kind,
        spec=spec_from_proto(message.spec),
        subjects=tuple(message.subjects),
        state=operation_state_from_proto(message.state),
        cursor=message.cursor,
        epoch=message.epoch,
        progress=message.progress,
        progress_text=message.progress_text,
        error=problem_from_proto(message.error) if message.HasField("error") else None,
        source=message.source,
        request_id=message.request_id,
        result=dict(sorted(message.result.items())),
        data=dict(sorted(message.data.items())),
        cancel_requested=message.cancel_requested,
        created=message.created,
        finished=message.finished,
        pivoted=message.pivoted,
        waits_for=message.waits_for,
    )


# ---- changes


def change_to_proto(change: Change) -> records_pb2.Change:
    """One change of the stream."""
    match change:
        case QubePut(qube):
            return records_pb2.Change(qube=qube_to_proto(qube))
        case QubeRemoved(uuid):
            return records_pb2.Change(qube_removed=uuid)
        case SystemPut(name, value):
            return records_pb2.Change(system_property=_KeyValue(key=name, value=value))
        case SystemRemoved(name):
            return records_pb2.Change(system_property_removed=name)
        case LabelPut(label):
            return records_pb2.Change(label=label_to_proto(label))
        case LabelRemoved(name):
            return records_pb2.Change(label_removed=name)
        case PoolPut(pool):
            return records_pb2.Change(pool=pool_to_proto(pool))
        case PoolRemoved(name):
            return records_pb2.Change(pool_removed=name)
        case OperationPut(operation):
            return records_pb2.Change(operation=operation_to_proto(operation))
        case OperationRemoved(id):
            return records_pb2.Change(operation_removed=id)
        case FactPut(fact):
            return records_pb2.Change(fact=fact_to_proto(fact))
        case FactRemoved(key):
            return records_pb2.Change(fact_removed=key)


def change_from_proto(message: records_pb2.Change) -> Change:
    """One change of the stream; refused with PROTOCOL where nothing is set."""
    which = message.WhichOneof("what")
    if which is None:
        raise Refusal("PROTOCOL", "a change that changes nothing")
    return _CHANGE_FROM[which](message)


_CHANGE_FROM: dict[str, Callable[[records_pb2.Change], Change]] = {
    "qube": lambda m: QubePut(qube_from_proto(m.qube)),
    "qube_removed": lambda m: QubeRemoved(m.qube_removed),
    "system_property": lambda m: SystemPut(m.system_property.key, m.system_property.value),
    "system_property_removed": lambda m: SystemRemoved(m.system_property_removed),
    "label": lambda m: LabelPut(label_from_proto(m.label)),
    "label_removed": lambda m: LabelRemoved(m.label_removed),
    "pool": lambda m: PoolPut(pool_from_proto(m.pool)),
    "pool_removed": lambda m: PoolRemoved(m.pool_removed),
    "operation": lambda m: OperationPut(operation_from_proto(m.operation)),
    "operation_removed": lambda m: OperationRemoved(m.operation_removed),
    "fact": lambda m: FactPut(fact_from_proto(m.fact)),
    "fact_removed": lambda m: FactRemoved(m.fact_removed),
}
