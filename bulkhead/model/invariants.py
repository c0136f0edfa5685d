"""What must hold of a whole view, whatever happened before.

Owns the list of rules. Must not know how a violation came about or is repaired.
Invariant: an empty list for every view that plans have made; reading only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bulkhead.model import grammar
from bulkhead.model.evaluate import netvm_of, provides_network, template_for_dispvms
from bulkhead.model.properties import (
    ADMIN,
    CLASSES,
    QUBES_VM,
    REMOTE,
    PropertyRow,
    find_row,
    has_property,
    rows_for,
)
from bulkhead.model.records import (
    ADMINVM_NAME,
    ADMINVM_UUID,
    OperationState,
    Phase,
    Qube,
    RecordState,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.setters import parse_stored
from bulkhead.model.view import View


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule: its name, the object that breaks it, and how."""

    rule: str
    subject: str
    detail: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.subject}: {self.detail}"


def check(view: View) -> list[Violation]:
    """Every violation in the view; [] when all is well. Cost grows with the qubes."""
    return list(_violations(view))


def _violations(view: View) -> Iterator[Violation]:
    yield from _identity(view)
    yield from _system(view)
    for qube in view.qubes_any():
        yield from _state(view, qube)
        if not qube.quarantine:
            yield from _values(view, qube)
            yield from _volumes(view, qube)
    yield from _loops(view)


def _identity(view: View) -> Iterator[Violation]:
    admin = view.by_uuid_any(ADMINVM_UUID)
    if admin is None:
        yield Violation("dom0 exists", ADMINVM_NAME, "there is no such record")
    elif (admin.name, admin.qid, admin.klass) != (ADMINVM_NAME, 0, ADMIN) or admin.hidden:
        yield Violation("dom0 exists", ADMINVM_NAME, "its record is not dom0's")
    names: dict[str, str] = {}
    qids: dict[int, str] = {}
    dispids: dict[str, str] = {}
    vids: dict[tuple[str, str], str] = {}
    for qube in view.qubes_any():
        if qube.name in names:
            yield Violation("unique name", qube.name, f"also {names[qube.name]}")
        names[qube.name] = qube.uuid
        if qube.qid in qids:
            yield Violation("unique qid", qube.name, f"{qube.qid} is also {qids[qube.qid]}'s")
        qids[qube.qid] = qube.name
        dispid = qube.properties.get("dispid")
        if dispid is not None and not qube.quarantine:
            if dispid in dispids:
                yield Violation("unique dispid", qube.name, f"{dispid} is also {dispids[dispid]}'s")
            dispids[dispid] = qube.name
        for volume in qube.volumes:
            if volume.name == "kernel" or not volume.vid or qube.quarantine:
                continue
            owner = vids.setdefault((volume.pool, volume.vid), qube.name)
            if owner != qube.name:
                yield Violation(
                    "unique vid", qube.name, f"{volume.pool}:{volume.vid} is also {owner}'s"
                )
        if qube.klass != ADMIN and grammar.qube_name_problem(qube.name):
            yield Violation("well-formed name", qube.name, grammar.qube_name_problem(qube.name))
        if view.by_uuid_any(qube.uuid) is not qube or view.qube_any(qube.name) is not qube:
            yield Violation("indexed", qube.name, "a look-up does not find the record")


def _system(view: View) -> Iterator[Violation]:
    for index, label in view.labels.items():
        if index != label.index or view.label_by_name(label.name) != label:
            yield Violation("labels are indexed", label.name, f"number {index}")
    for name, text in view.properties.items():
        if has_property(None, name):
            yield from _stored(view, None, find_row(None, name), text)


def _stored(view: View, qube: Qube | None, row: PropertyRow, text: str) -> Iterator[Violation]:
    holder = qube.name if qube is not None else "the system"
    try:
        again = parse_stored(view, qube, row, text)
    except Refusal as refusal:
        target = view.qube_any(text) if row.type == "qube" else None
        if target is not None and target.hidden:
            return  # being made or removed together with what refers to it
        yield Violation(
            "stored values validate", holder, f"{row.name} = {text!r}: {refusal.message}"
        )
        return
    if again != text:
        yield Violation("stored form", holder, f"{row.name} = {text!r}, not {again!r}")


def _state(view: View, qube: Qube) -> Iterator[Violation]:
    if (qube.run.phase is Phase.HALTED) != (qube.run.boot_id == ""):
        yield Violation(
            "boot id while not halted", qube.name, f"{qube.run.phase.name} {qube.run.boot_id!r}"
        )
    if qube.klass in (ADMIN, REMOTE) and qube.run.phase is not Phase.HALTED:
        yield Violation("only booting classes run", qube.name, qube.run.phase.name)
    if qube.hidden and not any(True for _ in view.operations_on(qube.uuid)):
        yield Violation(
            "hidden records have an operation", qube.name, f"{qube.state.name} and nobody is at it"
        )
    if qube.state is RecordState.CREATING and qube.run.phase is not Phase.HALTED:
        yield Violation("what is being made does not run", qube.name, qube.run.phase.name)
    if qube.quarantine and not qube.raw:
        yield Violation("quarantine keeps the original", qube.name, "the bytes are missing")
    if not qube.quarantine and qube.klass not in CLASSES:
        yield Violation("known class", qube.name, qube.klass)
    moving = (Phase.STARTING, Phase.STOPPING)
    if qube.run.phase in moving and not any(
        operation.state is not OperationState.QUEUED for operation in view.operations_on(qube.uuid)
    ):
        yield Violation("starting and stopping have an operation", qube.name, qube.run.phase.name)


def _values(view: View, qube: Qube) -> Iterator[Violation]:
    for name, text in qube.properties.items():
        if not has_property(qube.klass, name):
            yield Violation("known property", qube.name, name)
            continue
        row = find_row(qube.klass, name)
        if name in ("name", "qid", "uuid"):
            yield Violation("identity is no property", qube.name, name)
            continue
        yield from _stored(view, qube, row, text)
    for row in rows_for(qube.klass):
        if row.type == "qube" and not row.none_allowed and row.name not in qube.properties:
            yield Violation("required property", qube.name, row.name)
    if "label" not in qube.properties:
        yield Violation("required property", qube.name, "label")
    if qube.klass == "DispVM" and "dispid" not in qube.properties:
        yield Violation("required property", qube.name, "dispid")
    # The system's default may be any qube; who names one itself was refused what gives none.
    netvm = view.qube(qube.properties.get("netvm") or "")
    if netvm is not None and not netvm.hidden and not provides_network(netvm):
        yield Violation("netvm provides a network", qube.name, netvm.name)
    template = qube.properties.get("template")
    if qube.klass == "DispVM" and template:
        base = view.qube(template)
        if base is not None and not template_for_dispvms(base):
            yield Violation("disposable template", qube.name, template)


def _volumes(view: View, qube: Qube) -> Iterator[Violation]:
    names = [volume.name for volume in qube.volumes]
    if len(names) != len(set(names)):
        yield Violation("one volume of a name", qube.name, " ".join(names))
    if qube.klass not in QUBES_VM:
        if names:
            yield Violation("class without volumes", qube.name, " ".join(names))
        return
    for volume in qube.volumes:
        if volume.pool not in view.pools:
            yield Violation("pool of a volume exists", qube.name, f"{volume.name}: {volume.pool}")
        if volume.snap_on_start != bool(volume.source):
            yield Violation(
                "snapshots have a source", qube.name, f"{volume.name}: {volume.source!r}"
            )


def _loops(view: View) -> Iterator[Violation]:
    done: set[str] = set()
    for qube in view.qubes():
        trail: dict[str, None] = {}
        current: Qube | None = qube
        while current is not None and current.uuid not in done:
            if current.uuid in trail:
                yield Violation("no network loops", current.name, "comes back to itself")
                break
            trail[current.uuid] = None
            current = netvm_of(view, current)
        done.update(trail)
