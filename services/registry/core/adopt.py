"""A foreign qubes.xml, as changes of the present state.

Owns the comparison and its guards. Must not know files. Invariant: what the file cannot
say (run state, notes, rules digest, hidden records, operations) stays as it is, and no
qube that runs or is being worked on is altered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from bulkhead.model import events
from bulkhead.model.records import (
    ADMINVM_UUID,
    Change,
    LabelPut,
    LabelRemoved,
    Phase,
    PoolPut,
    PoolRemoved,
    Qube,
    QubePut,
    QubeRemoved,
    SystemPut,
    SystemRemoved,
    WireEvent,
)
from bulkhead.model.view import View
from services.registry.core.replay import aside_of, with_aside


class Blocked(Exception):
    """The edit alters qubes that are in use; names: which."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"the edited file alters qubes that are in use: {', '.join(names)}")
        self.names = tuple(names)


def plan_adopt(
    view: View, edited: Iterable[Change]
) -> tuple[tuple[Change, ...], tuple[WireEvent, ...]]:
    """(changes, events) that make the state what the edited file says. Blocked.

    edited: the changes that fill an empty view from that file.
    """
    theirs = View()
    theirs.apply_all(edited)
    changes: list[Change] = []
    _small_records(view, theirs, changes)
    blocked: list[str] = []
    added: list[Qube] = []
    removed: list[Qube] = []
    altered: list[WireEvent] = []
    for qube in theirs.qubes():
        ours = view.by_uuid_any(qube.uuid) or view.qube_any(qube.name)
        if ours is not None and ours.hidden:
            # Being created or removed right now.
            blocked.append(qube.name)
            continue
        if ours is None:
            added.append(qube)
            continue
        if ours.uuid != qube.uuid:
            # An edit without uuids: the name tells which one is meant.
            qube = replace(qube, uuid=ours.uuid)
        merged = with_aside(qube, aside_of(ours))
        if merged == ours:
            continue
        if _in_use(view, ours):
            blocked.append(ours.name)
        changes.append(QubePut(merged))
        altered.extend(_altered(ours, merged))
    kept = {c.qube.uuid for c in changes if isinstance(c, QubePut)}
    names = {q.name for q in theirs.qubes()}
    for ours in view.qubes():
        if theirs.by_uuid_any(ours.uuid) is None and ours.uuid not in kept:
            if ours.name in names and theirs.qube(ours.name) is not None:
                continue  # matched by name above, and equal
            if _in_use(view, ours) or ours.uuid == ADMINVM_UUID:
                blocked.append(ours.name)
            removed.append(ours)
    if blocked:
        raise Blocked(sorted(set(blocked)))
    # Removals first: what is added may take over their names and volumes.
    out: list[Change] = [QubeRemoved(q.uuid) for q in removed]
    out.extend(changes)
    out.extend(QubePut(q) for q in added)
    told = [
        *(events.make(None, "domain-delete", vm=q.name) for q in removed),
        *(events.make(None, "domain-add", vm=q.name) for q in added),
        *altered,
    ]
    return tuple(out), tuple(told)


def _in_use(view: View, qube: Qube) -> bool:
    return qube.run.phase is not Phase.HALTED or any(True for _ in view.operations_on(qube.uuid))


def _altered(ours: Qube, theirs: Qube) -> list[WireEvent]:
    """A reset event for each property whose stored value differs: readers ask again."""
    return [
        events.make(theirs, f"property-reset:{name}", name=name)
        for name in sorted({*ours.properties, *theirs.properties})
        if ours.properties.get(name) != theirs.properties.get(name)
    ]


def _small_records(view: View, theirs: View, changes: list[Change]) -> None:
    for index, label in view.labels.items():
        if theirs.labels.get(index) != label:
            changes.append(LabelRemoved(label.name))
    for index, label in theirs.labels.items():
        if view.labels.get(index) != label:
            changes.append(LabelPut(label))
    changes.extend(PoolRemoved(name) for name in view.pools if name not in theirs.pools)
    changes.extend(
        PoolPut(pool) for name, pool in theirs.pools.items() if view.pools.get(name) != pool
    )
    changes.extend(SystemRemoved(n) for n in view.properties if n not in theirs.properties)
    changes.extend(
        SystemPut(name, value)
        for name, value in theirs.properties.items()
        if view.properties.get(name) != value
    )
