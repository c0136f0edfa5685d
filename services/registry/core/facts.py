"""Who may say what about the world, and which report is news.

Owns the namespaces of facts and the rule for late reports. Must not know messages or
connections. Invariant: only the owner of a namespace alters it, and news about an
older boot never replaces news about the present one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bulkhead.model import events
from bulkhead.model.records import (
    Change,
    DeviceFact,
    Fact,
    FactPut,
    FactRemoved,
    PowerFact,
    WireEvent,
    fact_key,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View

# Namespace (the part of the key before the first slash) -> the service that owns it.
OWNERS: dict[str, str] = {
    "host": "domains",
    "power": "domains",
    "device": "domains",
    "kernel": "storage",
    "pool": "storage",
}
# The first report ends with the host: what came before it was known, not new.
_LAST = "host"
# Facts are in memory only; a runaway owner must not fill it.
LIMIT = 200_000


def owner_of(key: str) -> str:
    """The service that owns the key's namespace, "" = none."""
    return OWNERS.get(key.partition("/")[0], "")


def check_owner(caller: str, key: str) -> None:
    """Refusal NOT_YOURS unless the caller owns the key's namespace."""
    if owner_of(key) != caller:
        raise Refusal(
            "NOT_YOURS",
            f"{caller} may not report {key}; report only facts of your own namespace",
            caller=caller,
            key=key,
        )


def plan_facts(
    view: View,
    caller: str,
    put: Sequence[Fact],
    removed: Iterable[str],
    complete: bool,
) -> tuple[Change, ...]:
    """The changes that a report makes; Refusal NOT_YOURS or LIMIT_REACHED.

    complete: the report is all that the caller knows, its other facts go. Reports
    about unknown qubes, and late ones, are dropped without a word: their sender could
    do nothing about them.
    """
    said: set[str] = set()
    changes: list[Change] = []
    for fact in put:
        key = fact_key(fact)
        check_owner(caller, key)
        said.add(key)
        if view.facts().get(key) == fact or not _news(view, fact, complete):
            continue
        changes.append(FactPut(fact))
    for key in removed:
        check_owner(caller, key)
        if key in view.facts() and key not in said:
            changes.append(FactRemoved(key))
            said.add(key)
    if complete:
        changes.extend(
            FactRemoved(key)
            for key in list(view.facts())
            if key not in said and owner_of(key) == caller
        )
    if len(view.facts()) + len(changes) > LIMIT:
        raise Refusal("LIMIT_REACHED", f"more than {LIMIT} facts; report fewer", limit=str(LIMIT))
    return tuple(changes)


def device_events(view: View, changes: Iterable[Change]) -> tuple[WireEvent, ...]:
    """What clients are told when backends offer other devices; view: before the changes.

    Per backend and class: the list has changed, who lost a device, which are gone, which
    are new. Nothing before the first report: then devices are known, not new.
    """
    if _LAST not in view.facts():
        return ()
    gone: dict[tuple[str, str], list[DeviceFact]] = {}
    new: dict[tuple[str, str], list[DeviceFact]] = {}
    for change in changes:
        after = change.fact if isinstance(change, FactPut) else None
        key = change.key if isinstance(change, FactRemoved) else fact_key(after) if after else ""
        before = view.facts().get(key)
        was = before if isinstance(before, DeviceFact) else None
        now = after if isinstance(after, DeviceFact) else None
        if was is not None and now is not None and was.device_id == now.device_id:
            continue  # the same device, attached or described otherwise
        if was is not None:
            gone.setdefault((was.backend_uuid, was.devclass), []).append(was)
        if now is not None:
            new.setdefault((now.backend_uuid, now.devclass), []).append(now)
    told: list[WireEvent] = []
    for place in sorted({*gone, *new}):
        backend = view.by_uuid(place[0])
        if backend is None:
            continue
        devclass = place[1]
        told.append(events.device_list_change(backend, devclass))
        lost = sorted(gone.get(place, ()), key=lambda fact: fact.port)
        for fact in lost:
            frontend = view.by_uuid(fact.attached_to) if fact.attached_to else None
            if frontend is not None:
                told.append(events.device_detach(frontend, devclass, backend.name, fact.port))
        told.extend(events.device_removed(backend, devclass, fact.port) for fact in lost)
        told.extend(
            events.device_added(backend, devclass, fact.port, fact.device_id)
            for fact in sorted(new.get(place, ()), key=lambda fact: fact.port)
        )
    return tuple(told)


def _news(view: View, fact: Fact, complete: bool) -> bool:
    if isinstance(fact, DeviceFact):
        return view.by_uuid_any(fact.backend_uuid) is not None
    if not isinstance(fact, PowerFact):
        return True
    qube = view.by_uuid_any(fact.uuid)
    if qube is None:
        return False
    known = view.power(fact.uuid)
    if known is None:
        return True
    if known.boot_id == fact.boot_id:
        # A full report repeats the number of the last single one.
        return fact.number > known.number or (complete and fact.number == known.number)
    # Another boot: late news if what is known is about the record's boot already.
    return not (known.boot_id == qube.run.boot_id and fact.boot_id != qube.run.boot_id)
