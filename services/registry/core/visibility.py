"""Who may see a change, and whether qubes.xml has to be written for it.

Owns the rule for hidden records on the public stream and the rule for what the file
shows. Must not know topics, sockets or files. Invariant: no public change carries a
hidden record.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bulkhead.model.records import (
    HALTED,
    Change,
    FactPut,
    FactRemoved,
    OperationPut,
    OperationRemoved,
    Qube,
    QubePut,
    QubeRemoved,
)

# A change with its inverse (None: nothing was altered).
Done = tuple[Change, Change | None]


def public_changes(done: Iterable[Done]) -> list[Change]:
    """The changes as readers without hidden records get them.

    A record that turns hidden becomes a removal; one that was never visible is left
    out altogether.
    """
    out: list[Change] = []
    for change, inverse in done:
        if isinstance(change, QubePut) and change.qube.hidden:
            if isinstance(inverse, QubePut) and not inverse.qube.hidden:
                out.append(QubeRemoved(change.qube.uuid))
            continue
        if isinstance(change, QubeRemoved) and (
            not isinstance(inverse, QubePut) or inverse.qube.hidden
        ):
            continue
        out.append(change)
    return out


def _file_part(qube: Qube) -> Qube:
    return replace(qube, run=HALTED, rules_digest="", revision=0)


def touches_file(done: Iterable[Done]) -> bool:
    """True when qubes.xml or a notes file differs before and after these changes."""
    for change, inverse in done:
        match change:
            case QubePut(qube):
                before = inverse.qube if isinstance(inverse, QubePut) else None
                was = before is not None and not before.hidden
                if was != (not qube.hidden):
                    return True
                if was and before is not None and _file_part(before) != _file_part(qube):
                    return True
            case QubeRemoved():
                if isinstance(inverse, QubePut) and not inverse.qube.hidden:
                    return True
            case OperationPut() | OperationRemoved() | FactPut() | FactRemoved():
                continue
            case _:
                if inverse != change:
                    return True
    return False
