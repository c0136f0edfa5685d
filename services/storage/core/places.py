"""Which pool lies inside which.

Owns the comparison of resolved directories. Must not resolve them. Invariant: a pool is
never inside itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath


def containing(pool: str, places: Mapping[str, PurePath | None]) -> str:
    """The first other pool whose resolved directory is above the pool's, "" = none.

    places: resolved directory by pool name, in the order of qubes.xml; None = no directory.
    """
    place = places.get(pool)
    if place is None:
        return ""
    for other, candidate in places.items():
        if other != pool and candidate is not None and candidate in place.parents:
            return other
    return ""
