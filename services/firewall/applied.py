"""A qube whose rules are in a table, and the note of it.

Owns its form, in memory and on disk. Must not know kernels. Invariant: a note read back is
what was noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from services.firewall.core.ruleset import Target


@dataclass(frozen=True, slots=True)
class Applied:
    """A qube whose rules are in a table. strict: unresolved names block it whole.

    addresses: what its host names meant when the chain was made.
    """

    target: Target
    strict: bool
    addresses: Mapping[str, tuple[str, ...]]


def applied_note(applied: Applied) -> dict[str, Any]:
    """The note that a later run finds it by."""
    return {
        "target": asdict(applied.target),
        "strict": applied.strict,
        "addresses": {name: list(texts) for name, texts in applied.addresses.items()},
    }


def applied_from(note: Mapping[str, Any]) -> Applied:
    """What a note of an earlier run says."""
    return Applied(
        Target(**note["target"]),
        bool(note["strict"]),
        {name: tuple(texts) for name, texts in note["addresses"].items()},
    )
