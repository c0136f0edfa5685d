"""The codec: every record survives the trip through bytes, and hostile messages are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead import codec
from bulkhead.api import records_pb2, registry_pb2
from bulkhead.model import records, specs
from bulkhead.model.refusal import Refusal

# Protobuf text cannot hold lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
KEYS = st.text("abcdef-.", min_size=1, max_size=5)
U64 = st.integers(0, 2**64 - 1)
I32 = st.integers(-(2**31), 2**31 - 1)
FLOAT = st.floats(allow_nan=False)


def maps(values: Any = TEXT) -> Any:
    return st.dictionaries(KEYS, values, max_size=4)


ASSIGNMENTS = st.builds(records.Assignment, TEXT, TEXT, TEXT, TEXT, TEXT, maps())
POOLS = st.builds(records.Pool, TEXT, TEXT, maps())
VOLUMES = st.builds(
    records.Volume,
    TEXT,
    TEXT,
    TEXT,
    U64,
    I32,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    TEXT,
    st.none() | st.booleans(),
)
QUBES = st.builds(
    records.Qube,
    uuid=TEXT,
    name=TEXT,
    qid=st.integers(0, 2**32 - 1),
    klass=TEXT,
    state=st.sampled_from(records.RecordState),
    properties=maps(),
    features=maps(),
    tags=st.frozensets(TEXT, max_size=4),
    devices=st.lists(ASSIGNMENTS, max_size=3).map(tuple),
    volumes=st.lists(VOLUMES, max_size=3).map(tuple),
    notes=TEXT,
    rules_digest=TEXT,
    quarantine=TEXT,
    raw=st.binary(max_size=20),
    run=st.builds(records.Run, st.sampled_from(records.Phase), TEXT),
    revision=U64,
)
FACTS = st.one_of(
    st.builds(
        records.HostFact,
        TEXT,
        TEXT,
        U64,
        st.integers(0, 2**32 - 1),
        U64,
        st.booleans(),
        TEXT,
    ),
    st.builds(
        records.KernelFact,
        TEXT,
        TEXT,
        TEXT,
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.none() | TEXT,
        st.none() | TEXT,
        st.none() | TEXT,
    ),
    st.builds(
        records.PoolFact,
        TEXT,
        st.booleans(),
        TEXT,
        st.none() | U64,
        st.none() | U64,
        maps(U64),
        TEXT,
    ),
    st.builds(
        records.PowerFact,
        TEXT,
        TEXT,
        U64,
        TEXT,
        I32,
        I32,
        TEXT,
        st.none() | FLOAT,
        st.booleans(),
        TEXT,
    ),
    st.builds(
        records.DeviceFact,
        TEXT,
        TEXT,
        TEXT,
        TEXT,
        maps(),
        TEXT,
        maps(),
        TEXT,
        TEXT,
        TEXT,
        maps(),
    ),
)
LABELS = st.builds(records.Label, st.integers(0, 2**32 - 1), TEXT, TEXT)
EVENTS = st.builds(
    records.WireEvent, TEXT, TEXT, st.lists(st.tuples(TEXT, TEXT), max_size=4).map(tuple), TEXT
)

_ARGUMENTS: dict[str, Any] = {
    "str": TEXT,
    "bool": st.booleans(),
    "int": U64,
    "int | None": st.none() | I32,
    "bool | None": st.none() | st.booleans(),
    "Mapping[str, str]": maps(),
    "tuple[str, ...]": st.lists(TEXT, max_size=3).map(tuple),
    "tuple[tuple[str, str], ...]": st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple),
    "Assignment": ASSIGNMENTS,
    "Pool": POOLS,
}


def instances(klass: Any) -> Any:
    """A strategy for a spec or command, from the annotations of its fields."""
    return st.builds(
        klass, **{row.name: _ARGUMENTS[str(row.type)] for row in dataclasses.fields(klass)}
    )


SPECS = st.one_of([instances(klass) for klass in specs.KINDS.values()])
COMMANDS = st.one_of([instances(klass) for klass in specs.COMMANDS.values()])
OPERATIONS = st.builds(
    lambda spec, **rest: records.Operation(kind=specs.kind_of(spec), spec=spec, **rest),
    SPECS,
    id=TEXT,
    subjects=st.lists(TEXT, max_size=3).map(tuple),
    state=st.sampled_from(records.OperationState),
    cursor=TEXT,
    epoch=U64,
    progress=FLOAT,
    progress_text=TEXT,
    error=st.none()
    | st.builds(
        records.Problem, st.sampled_from(["NOT_FOUND", "ABORTED", "INTERNAL"]), TEXT, TEXT, maps()
    ),
    source=TEXT,
    request_id=st.binary(max_size=16),
    result=maps(),
    data=maps(),
    cancel_requested=st.booleans(),
    created=FLOAT,
    finished=FLOAT,
    pivoted=st.booleans(),
    waits_for=TEXT,
)
CHANGES = st.one_of(
    st.builds(records.QubePut, QUBES),
    st.builds(records.QubeRemoved, TEXT),
    st.builds(records.SystemPut, TEXT, TEXT),
    st.builds(records.SystemRemoved, TEXT),
    st.builds(records.LabelPut, LABELS),
    st.builds(records.LabelRemoved, TEXT),
    st.builds(records.PoolPut, POOLS),
    st.builds(records.PoolRemoved, TEXT),
    st.builds(records.OperationPut, OPERATIONS),
    st.builds(records.OperationRemoved, TEXT),
    st.builds(records.FactPut, FACTS),
    st.builds(records.FactRemoved, TEXT),
)


@given(CHANGES)
def test_change_survives_bytes(change: records.Change) -> None:
    raw = codec.change_to_proto(change).SerializeToString()
    assert codec.change_from_proto(records_pb2.Change.FromString(raw)) == change


@given(EVENTS)
def test_event_survives_bytes(event: records.WireEvent) -> None:
    raw = codec.event_to_proto(event).SerializeToString()
    assert codec.event_from_proto(records_pb2.WireEvent.FromString(raw)) == event


@given(COMMANDS)
def test_command_survives_bytes(command: specs.Command) -> None:
    raw = codec.command_to_proto(command).SerializeToString()
    assert codec.command_from_proto(registry_pb2.MutateRequest.FromString(raw)) == command


@given(instances(specs.PreloadMarks))
def test_preload_marks_survive_bytes(marks: specs.PreloadMarks) -> None:
    raw = codec.preload_to_proto(marks).SerializeToString()
    assert codec.preload_from_proto(registry_pb2.PreloadRequest.FromString(raw)) == marks


def test_spec_of_defaults_keeps_its_kind() -> None:
    raw = codec.spec_to_proto(specs.CreateSpec()).SerializeToString()
    assert codec.spec_from_proto(records_pb2.OperationSpec.FromString(raw)) == specs.CreateSpec()


def test_every_oneof_field_has_a_class() -> None:
    kinds = {row.name for row in records_pb2.OperationSpec.DESCRIPTOR.oneofs[0].fields}
    assert kinds == {"import_data" if kind == "IMPORT" else kind.lower() for kind in specs.KINDS}
    commands = {row.name for row in registry_pb2.MutateRequest.DESCRIPTOR.oneofs[0].fields}
    assert commands == set(specs.COMMANDS)


@pytest.mark.parametrize("klass", [*specs.KINDS.values(), *specs.COMMANDS.values()])
def test_class_has_the_fields_of_its_message(klass: Any) -> None:
    messages = {**vars(records_pb2), **vars(registry_pb2)}
    assert [row.name for row in dataclasses.fields(klass)] == [
        row.name for row in messages[klass.__name__].DESCRIPTOR.fields
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (codec.change_from_proto, records_pb2.Change()),
        (codec.spec_from_proto, records_pb2.OperationSpec()),
        (codec.command_from_proto, registry_pb2.MutateRequest()),
        (codec.fact_from_proto, records_pb2.Fact()),
        (codec.qube_from_proto, records_pb2.Qube()),
        (codec.operation_state_from_proto, 0),
        (codec.operation_state_from_proto, 99),
    ],
)
def test_unset_or_unknown_is_refused(call: Any, message: Any) -> None:
    with pytest.raises(Refusal) as refused:
        call(message)
    assert refused.value.reason == "PROTOCOL"
