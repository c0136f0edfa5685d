"""Upkeep: what is in a pool, whoever it belongs to, and what is in the way.

Owns the list of everything and the two ways to clear a volume's files away. Must not know
which qubes exist. Invariant: nothing is set aside whose owner is not the one that was
found before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from services.storage.core.names import classify
from services.storage.core.reasons import StorageRefusal
from services.storage.core.states import Found
from services.storage.core.volumes import PREFIXES, parse_vid
from services.storage.drivers.directory.quarantine import Quarantine
from services.storage.drivers.directory.tree import Tree


class Upkeep:
    """inventory(), quarantine() and clear_temporaries() of interface.Driver."""

    def __init__(self, tree: Tree, quarantine: Quarantine) -> None:
        self._tree = tree
        self._quarantine = quarantine

    def inventory(self) -> Sequence[Found]:
        """As in interface.Driver."""
        found: list[Found] = []
        for prefix in PREFIXES:
            try:
                homes = sorted(e.name for e in os.scandir(self._tree.root / prefix) if e.is_dir())
            except FileNotFoundError:
                continue
            for home in homes:
                found.extend(self._inventory_of(prefix, home))
        return found

    def _inventory_of(self, prefix: str, home: str) -> Iterator[Found]:
        try:
            names = {
                name.volume
                for entry in os.scandir(self._tree.root / prefix / home)
                if not entry.is_symlink() and (name := classify(entry.name)) is not None
            }
        except FileNotFoundError:
            return  # removed meanwhile
        for volume in sorted(names):
            try:
                vid = parse_vid(f"{prefix}/{home}/{volume}")
            except StorageRefusal:
                continue
            present = self._tree.scan(vid)
            state = present.state
            if state is None:
                continue
            kind, path = state
            yield Found(
                vid=str(vid),
                owner=self._tree.owner_of(present),
                path=str(path),
                kind=kind,
                running=present.running is not None,
            )

    def quarantine(self, found: Found) -> str:
        """As in interface.Driver."""
        present = self._tree.scan(parse_vid(found.vid))
        if not present.everything:
            self._tree.remove_home(present.directory)
            return f"{found.vid}: nothing is there any more"
        owner = self._tree.owner_of(present)
        if owner != found.owner:
            return f"{found.vid}: left alone, its owner is now {owner or 'nobody'}"
        return self._quarantine.take(present, owner)

    def clear_temporaries(self, vid: str) -> list[str]:
        """As in interface.Driver."""
        present = self._tree.scan(parse_vid(vid))
        names = [path.name for path in present.temporaries]
        self._tree.drop_temporaries(present)
        if names:
            self._tree.remove_home(present.directory)
        return names
