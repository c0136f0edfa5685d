"""How a stored picture and the changes after it become the present state.

Owns the order in which the parts of the store are put together. Must not know files,
SQLite or protobuf. Invariant: the result equals the view that the registry had when
the last of the changes was acknowledged.

The parts: the records of qubes.xml at some revision C; the asides (what the file has
no place for: run state, notes, digest, revision) as of now; the changes after C in
order; the hidden records and the operations as of now. An aside of a qube that was
changed after C is newer than its record, which does no harm: the change carries the
whole record and is applied later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from bulkhead.model.records import (
    Change,
    Operation,
    OperationPut,
    Qube,
    QubePut,
    RecordState,
    Run,
)
from bulkhead.model.view import View


@dataclass(frozen=True, slots=True)
class Aside:
    """What a record has and qubes.xml has no place for."""

    run: Run
    rules_digest: str
    revision: int
    notes: str = ""


def aside_of(qube: Qube) -> Aside:
    """The part of an ACTIVE record that the file cannot hold."""
    return Aside(qube.run, qube.rules_digest, qube.revision, qube.notes)


def with_aside(qube: Qube, aside: Aside) -> Qube:
    """The record as loaded from the file, completed by its aside."""
    return replace(
        qube,
        run=aside.run,
        rules_digest=aside.rules_digest,
        revision=aside.revision,
        notes=aside.notes,
    )


def assemble(
    base: Iterable[Change],
    asides: Mapping[str, Aside],
    later: Iterable[Iterable[Change]],
    hidden: Iterable[Qube],
    operations: Iterable[Operation],
) -> View:
    """The present state, from the parts named in the module's text.

    base: changes of the document. later: one group of changes per mutation, oldest
    first. ValueError when a record in `hidden` is not hidden.
    """
    view = View()
    for change in base:
        if isinstance(change, QubePut) and (aside := asides.get(change.qube.uuid)) is not None:
            change = QubePut(with_aside(change.qube, aside))
        view.apply(change)
    for group in later:
        for change in group:
            view.apply(change)
    for qube in hidden:
        if qube.state is RecordState.ACTIVE:
            raise ValueError(f"record {qube.uuid} is stored as hidden but is ACTIVE")
        view.apply(QubePut(qube))
    for operation in operations:
        view.apply(OperationPut(operation))
    return view
