"""The quarantine: files that stay, out of everybody's way.

Owns where they go and what they are called there. Must not know why. Invariant: nothing
is ever removed or overwritten here.
"""

from __future__ import annotations

import os
import secrets

from bulkhead import durable, failpoints
from services.storage.core.present import Present
from services.storage.core.volumes import QUARANTINE
from services.storage.drivers import files
from services.storage.drivers.directory.tree import Tree


class Quarantine:
    """One directory in each prefix, with one for each volume that was moved there."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def take(self, present: Present, owner: str) -> str:
        """Rename every file of the volume into the quarantine of its prefix; says so."""
        self._tree.drop_temporaries(present)
        vid = present.vid
        shelf = self._tree.root / vid.prefix / QUARANTINE
        files.make_directory(shelf)
        place = shelf / f"{vid.qube}~{vid.name}~{owner or 'untagged'}"
        files.make_directory(place)
        for path in present.everything:
            target = place / path.name
            if os.path.lexists(target):
                target = place / f"{path.name}~{secrets.token_hex(4)}"
            failpoints.hit("storage.quarantine.before_move")
            durable.rename(path, target)
            failpoints.hit("storage.quarantine.after_move")
        self._tree.remove_home(present.directory)
        present.forget()
        return f"{vid}: moved to {place}"
