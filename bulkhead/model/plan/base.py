"""What a plan is, and the draft in which one is put together.

Owns the value that the registry commits and the overlay of records that a plan has
changed so far. Must not know any rule. Invariant: a draft never touches the view; its
records are the newest of this plan, and each is in the changes once, with its last value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from bulkhead.model.events import ABSENT, OldValue
from bulkhead.model.records import (
    ADMINVM_NAME,
    Change,
    LabelPut,
    LabelRemoved,
    Operation,
    OperationPut,
    Phase,
    PoolPut,
    PoolRemoved,
    Problem,
    Qube,
    QubePut,
    QubeRemoved,
    SystemPut,
    SystemRemoved,
    WireEvent,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import merged_parts
from bulkhead.model.view import View

_NOTHING: Mapping[str, str] = MappingProxyType({})
_NO_PARTS: Mapping[str, tuple[str, ...]] = MappingProxyType({})


def _nothing() -> Mapping[str, str]:
    return _NOTHING


def _no_parts() -> Mapping[str, tuple[str, ...]]:
    return _NO_PARTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A finished plan.

    changes in the order of application; events finished and in wire order; result for
    the caller; live: uuids of qubes that run and need an APPLY; parts: what of them, where
    it is not all; beside: those that the caller does not wait for; audit: what was asked
    and what it replaced, without secrets.
    """

    changes: tuple[Change, ...] = ()
    events: tuple[WireEvent, ...] = ()
    result: Mapping[str, str] = field(default_factory=_nothing)
    live: tuple[str, ...] = ()
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=_no_parts)
    beside: frozenset[str] = frozenset()
    audit: Mapping[str, str] = field(default_factory=_nothing)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginPlan(Plan):
    """The begin of an operation; joined: the one under way that answers the request too,
    then `operation` is the same one and nothing new is begun."""

    operation: Operation
    joined: Operation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndPlan(Plan):
    """The end of an operation; follow_up: the one begun in the same transaction;
    promoted: those that waited and run, or were refused, from now on."""

    operation: Operation
    follow_up: Operation | None = None
    promoted: tuple[Operation, ...] = ()


class PlanRefused(Refusal):
    """A refusal that was announced first: `events` are pre-events (and failure events) of
    the refused change, to be published although nothing is changed."""

    def __init__(self, refusal: Refusal, events: Iterable[WireEvent]) -> None:
        super().__init__(refusal.reason, refusal.message, **refusal.metadata)
        self.events: tuple[WireEvent, ...] = tuple(events)


def problem_of(refusal: Refusal) -> Problem:
    """A refusal as it is stored in an operation."""
    return Problem(refusal.code, refusal.reason, refusal.message, dict(refusal.metadata))


class Draft:
    """A plan being made. source: Admin API name of who asks; now: epoch seconds."""

    def __init__(self, view: View, *, source: str = ADMINVM_NAME, now: float = 0.0) -> None:
        self.view = view
        self.source = source
        self.now = now
        self.events: list[WireEvent] = []
        self.audit: dict[str, str] = {}
        self.result: dict[str, str] = {}
        # What was touched, in the order of first touch: key -> change.
        self._changes: dict[tuple[str, str], Change] = {}
        # uuid: the caller waits for it, the parts that changed
        self._live: dict[str, tuple[bool, tuple[str, ...]]] = {}

    # ---- records

    def qube(self, uuid: str) -> Qube:
        """The record as this plan has it now; KeyError where it is gone."""
        found = self.find(uuid)
        if found is None:
            raise KeyError(uuid)
        return found

    def find(self, uuid: str) -> Qube | None:
        """The record as this plan has it now, hidden ones included."""
        change = self._changes.get(("qube", uuid))
        if isinstance(change, QubePut):
            return change.qube
        if change is not None:
            return None
        return self.view.by_uuid_any(uuid)

    def put(self, qube: Qube) -> Qube:
        """Keep a record; returns it."""
        self._changes[("qube", qube.uuid)] = QubePut(qube)
        return qube

    def remove(self, uuid: str) -> None:
        """Drop a record."""
        self._changes[("qube", uuid)] = QubeRemoved(uuid)

    def set_stored(self, qube: Qube, name: str, text: str | None) -> Qube:
        """Keep a property's stored text; None = not set. Returns the record."""
        qube = self.qube(qube.uuid)
        properties = dict(qube.properties)
        if text is None:
            properties.pop(name, None)
        else:
            properties[name] = text
        return self.put(replace(qube, properties=properties))

    def set_system(self, name: str, text: str | None) -> None:
        """Keep a system property's stored text; None = not set."""
        change = SystemRemoved(name) if text is None else SystemPut(name, text)
        self._changes[("system", name)] = change

    def put_change(self, change: LabelPut | LabelRemoved | PoolPut | PoolRemoved) -> None:
        """Keep a change of labels or pools."""
        match change:
            case LabelPut(label):
                key = ("label", label.name)
            case LabelRemoved(name):
                key = ("label", name)
            case PoolPut(pool):
                key = ("pool", pool.name)
            case PoolRemoved(name):
                key = ("pool", name)
        self._changes[key] = change

    # ---- operations

    def operation(self, op_id: str) -> Operation | None:
        """The operation as this plan has it now."""
        change = self._changes.get(("operation", op_id))
        if isinstance(change, OperationPut):
            return change.operation
        return self.view.operations.get(op_id)

    def put_operation(self, operation: Operation) -> Operation:
        """Keep an operation; returns it."""
        self._changes[("operation", operation.id)] = OperationPut(operation)
        return operation

    def operations_on(self, subject: str) -> list[Operation]:
        """Unfinished operations that hold or wait for a subject, oldest first."""
        found = {o.id: o for o in self.view.operations_on(subject)}
        for change in self._changes.values():
            if isinstance(change, OperationPut):
                operation = change.operation
                if subject in operation.subjects and not operation.state.terminal:
                    found[operation.id] = operation
                else:
                    found.pop(operation.id, None)
        return sorted(found.values(), key=queue_place)

    # ---- events and effects

    def emit(self, *events: WireEvent) -> None:
        """Append finished events."""
        self.events.extend(events)

    def live(self, qube: Qube, *parts: str, awaited: bool = True) -> None:
        """The change matters to a running qube: it needs an APPLY unless it is HALTED.

        parts: of it, as in specs.ApplySpec; none = all. awaited: whoever asked for the
        change waits until it is there.
        """
        if qube.run.phase is not Phase.HALTED:
            waits, earlier = self._live.get(qube.uuid, (False, parts))
            self._live[qube.uuid] = awaited or waits, merged_parts(earlier, parts)

    # ---- result

    @property
    def changes(self) -> tuple[Change, ...]:
        """What was changed so far."""
        return tuple(self._changes.values())

    @property
    def live_uuids(self) -> tuple[str, ...]:
        """Running qubes touched so far."""
        return tuple(self._live)

    def plan(self) -> Plan:
        """The finished plan."""
        return Plan(
            changes=self.changes,
            events=tuple(self.events),
            result=dict(self.result),
            live=self.live_uuids,
            parts={uuid: parts for uuid, (_, parts) in self._live.items() if parts},
            beside=frozenset(uuid for uuid, (awaited, _) in self._live.items() if not awaited),
            audit=dict(self.audit),
        )


def queue_place(operation: Operation) -> tuple[float, int, str]:
    """Sort key: who asked first."""
    return operation.created, int(operation.data.get("place", "0")), operation.id


def by_name(qubes: Iterable[Qube]) -> Iterator[Qube]:
    """Qubes in the order of every listing: dom0 first, then by name."""
    return iter(sorted(qubes, key=lambda qube: (qube.name != ADMINVM_NAME, qube.name)))


def old_or_absent(value: object, missing: object) -> OldValue:
    """An oldvalue for an event: ABSENT where there was neither a value nor a default."""
    return ABSENT if value is missing else value  # type: ignore[return-value]


def need_qube(view: View, name: str) -> Qube:
    """The ACTIVE qube of that name; Refusal QUBE_NOT_FOUND."""
    qube = view.qube(name)
    if qube is None:
        raise Refusal("QUBE_NOT_FOUND", f"No such domain: '{name}'", qube=name)
    return qube
