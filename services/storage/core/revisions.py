"""Revisions of a volume: their numbers, which of them live, which one is meant.

Owns the arithmetic of revisions. Must not know files or their names. Invariant: numbers
only grow, and what is surplus is always older than what stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Revision:
    """A revision: number (its id is the number in decimal) and unix time in seconds."""

    number: int
    time: int

    @property
    def id(self) -> str:
        """As in admin.vm.volume.ListSnapshots."""
        return str(self.number)


def next_revision(existing: Iterable[Revision], mtime: float) -> Revision:
    """The revision that a commit replaced at `mtime` becomes: newest number + 1, from 1."""
    return Revision(max((r.number for r in existing), default=0) + 1, int(mtime))


def surplus(existing: Iterable[Revision], keep: int) -> list[Revision]:
    """Revisions beyond the newest `keep`, oldest first; a negative `keep` keeps all."""
    ordered = sorted(existing)
    if keep < 0:
        return []
    return ordered[: max(0, len(ordered) - keep)]


def with_id(existing: Iterable[Revision], revision: str) -> Revision | None:
    """The revision of that id, None when there is none."""
    return next((r for r in existing if r.id == revision), None)


def to_revert_to(
    existing: Iterable[Revision], revision: str, is_current: Callable[[Revision], bool]
) -> Revision | None:
    """The revision of that id; "" = the newest that is another state than the current one
    (a crashed call may have left the current state a revision's name)."""
    if revision:
        return with_id(existing, revision)
    return next((r for r in sorted(existing, reverse=True) if not is_current(r)), None)
