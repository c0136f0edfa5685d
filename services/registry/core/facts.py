"""Who may say what about the world, and which report is news.

Owns the namespaces of facts and the rule for late reports. Must not know messages or
connections. Invariant: only the owner of a namespace alters it, and news about an
older boot never replaces news about the present one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bulkhead.model.records import (
    Change,
    DeviceFact,
    Fact,
    FactPut,
    FactRemoved,
    PowerFact,
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
