"""The registry's records as the bytes that its journal keeps.

Owns the form of deltas, asides and stored records: protobuf messages of records.proto,
so that what was written by an older version stays readable. Must not know SQLite.
Invariant: decoding gives exactly the values that were encoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from google.protobuf.message import DecodeError

from bulkhead import codec
from bulkhead.api import records_pb2
from bulkhead.model.records import (
    Change,
    Operation,
    OperationPut,
    OperationRemoved,
    Qube,
    QubePut,
    QubeRemoved,
    RecordState,
)
from bulkhead.model.refusal import Refusal
from services.registry.core.group import Accepted
from services.registry.core.replay import Aside

ASIDE = "aside"
NOTES = "notes"

Entry = tuple[str, int, bytes | None]
Blob = tuple[str, str, bytes | None]


class EncodingError(ValueError):
    """Stored bytes are no message of their kind."""


def encode_changes(changes: Iterable[Change]) -> list[records_pb2.Change]:
    """The changes as messages, in order; made once for the journal and the stream."""
    return [codec.change_to_proto(change) for change in changes]


_NO_DELTA = frozenset({"operation", "operation_removed", "fact", "fact_removed"})


def encode_delta(messages: Iterable[records_pb2.Change]) -> bytes:
    """The changes that replay needs; operations and facts are kept elsewhere or not at
    all."""
    return records_pb2.StreamEntry(
        changes=[m for m in messages if m.WhichOneof("what") not in _NO_DELTA]
    ).SerializeToString()


def decode_delta(body: bytes) -> list[Change]:
    """EncodingError when the bytes are damaged."""
    try:
        entry = records_pb2.StreamEntry.FromString(body)
        return [codec.change_from_proto(change) for change in entry.changes]
    except (DecodeError, Refusal) as error:
        raise EncodingError(f"a stored change cannot be decoded: {error}") from error


def encode_aside(aside: Aside) -> bytes:
    """Without the notes, which have a blob of their own."""
    qube = Qube(
        "", "", 0, "", run=aside.run, rules_digest=aside.rules_digest, revision=aside.revision
    )
    return _aside_bytes(codec.qube_to_proto(qube))


def decode_asides(asides: dict[str, bytes], notes: dict[str, bytes]) -> dict[str, Aside]:
    """By uuid. EncodingError when the bytes are damaged."""
    out: dict[str, Aside] = {}
    for uuid, body in asides.items():
        qube = _qube(body)
        text = notes.get(uuid, b"").decode(errors="replace")
        out[uuid] = Aside(qube.run, qube.rules_digest, qube.revision, text)
    return out


def _qube(body: bytes) -> Qube:
    try:
        return codec.qube_from_proto(records_pb2.Qube.FromString(body))
    except (DecodeError, Refusal) as error:
        raise EncodingError(f"a stored record cannot be decoded: {error}") from error


def decode_hidden(bodies: Iterable[bytes]) -> list[Qube]:
    """EncodingError when the bytes are damaged."""
    return [_qube(body) for body in bodies]


def decode_operations(bodies: Iterable[bytes]) -> list[Operation]:
    """EncodingError when the bytes are damaged."""
    try:
        return [
            codec.operation_from_proto(records_pb2.Operation.FromString(body)) for body in bodies
        ]
    except (DecodeError, Refusal) as error:
        raise EncodingError(f"a stored operation cannot be decoded: {error}") from error


def side_tables(
    accepted: Accepted, messages: Sequence[records_pb2.Change]
) -> tuple[list[Entry], list[Entry], list[Blob]]:
    """(operation rows, hidden rows, blobs) that an accepted mutation writes. messages:
    its changes, encoded."""
    operations: list[Entry] = []
    hidden: list[Entry] = []
    blobs: list[Blob] = []
    revision = accepted.revision
    for (change, inverse), message in zip(accepted.done, messages, strict=True):
        match change:
            case OperationPut(operation):
                operations.append((operation.id, revision, message.operation.SerializeToString()))
            case OperationRemoved(op_id):
                operations.append((op_id, revision, None))
            case QubePut(qube):
                before = inverse.qube if isinstance(inverse, QubePut) else None
                if qube.state is not RecordState.ACTIVE:
                    hidden.append((qube.uuid, revision, message.qube.SerializeToString()))
                elif before is not None and before.hidden:
                    hidden.append((qube.uuid, revision, None))
                blobs.append((ASIDE, qube.uuid, _aside_bytes(message.qube)))
                if before is None or before.notes != qube.notes:
                    blobs.append((NOTES, qube.uuid, qube.notes.encode() or None))
            case QubeRemoved(uuid):
                hidden.append((uuid, revision, None))
                blobs.append((ASIDE, uuid, None))
                blobs.append((NOTES, uuid, None))
            case _:
                continue
    return operations, hidden, blobs


def _aside_bytes(qube: records_pb2.Qube) -> bytes:
    return records_pb2.Qube(
        state=qube.state, run=qube.run, rules_digest=qube.rules_digest, revision=qube.revision
    ).SerializeToString()
