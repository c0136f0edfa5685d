"""A volume's first file and its last: made empty, made as a copy, removed.

Owns when a volume is new, and what happens to files that are in its place. Must not know
runs, imports or revisions. Invariants: data that is there is never replaced, and what
nobody claims is set aside, not lost; a removal leaves another owner's files alone.
"""

from __future__ import annotations

import contextlib
import logging
import os

from bulkhead import failpoints
from bulkhead.durable import fsync_directory
from bulkhead.model.records import Volume
from services.storage.core.names import Role
from services.storage.core.present import Present
from services.storage.core.reasons import StorageRefusal
from services.storage.core.volumes import Kind, kind_of, parse_vid, require_origin
from services.storage.drivers import files
from services.storage.drivers.directory.commits import Commits
from services.storage.drivers.directory.quarantine import Quarantine
from services.storage.drivers.directory.tree import Tree
from services.storage.drivers.files import get_tag
from services.storage.drivers.interface import Cancel, Committed

_LOG = logging.getLogger("bulkhead.storage")


class Lifetime:
    """ensure(), clone() and remove() of interface.Driver."""

    def __init__(self, tree: Tree, commits: Commits, quarantine: Quarantine) -> None:
        self._tree = tree
        self._commits = commits
        self._quarantine = quarantine

    def ensure(self, owner: str, volume: Volume) -> None:
        """As in interface.Driver."""
        if kind_of(volume) is not Kind.ORIGIN:
            parse_vid(volume.vid)
            return
        present = self._tree.open(owner, volume)
        if self._make_way(present):
            with self._tree.first_file(present) as file:
                os.ftruncate(file.fd, volume.size)
                self._commits.mark_new(file, owner, "")
                file.publish("storage.ensure")

    def clone(
        self, owner: str, volume: Volume, source: Committed, key: str, cancel: Cancel
    ) -> None:
        """As in interface.Driver."""
        require_origin(volume, "clone into")
        present = self._tree.open(owner, volume)
        if self._make_way(present):
            with self._tree.first_file(present) as file:
                files.copy(source.fd, file.fd, source.size, cancel)
                self._commits.mark_new(file, owner, key)
                file.publish("storage.clone")

    def _make_way(self, present: Present) -> bool:
        """Files that nobody claims go out of the way of a new volume; False: it has data."""
        if present.running is not None:
            return False
        clean = present.roles.get(Role.CLEAN)
        if clean is not None and not get_tag(clean, "owner"):
            _LOG.warning("%s", self._quarantine.take(present, ""))
        return Role.CLEAN not in present.roles

    def remove(self, owner: str, volume: Volume) -> None:
        """As in interface.Driver."""
        present = self._tree.scan(parse_vid(volume.vid))
        try:
            kind = kind_of(volume)
        except StorageRefusal:
            kind = Kind.ORIGIN  # a broken record must still be removable
        if self._tree.stranger(owner, present, kind):
            return
        with contextlib.ExitStack() as stack:
            home: int | None = None
            if present.everything:
                try:
                    # Now: the removal of another volume may take an empty directory away.
                    home = os.open(present.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                except FileNotFoundError:
                    fsync_directory(present.directory.parent)
                    return
                stack.callback(os.close, home)
            for path in present.everything:
                failpoints.hit("storage.remove.before_unlink")
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                failpoints.hit("storage.remove.after_unlink")
            # What is gone with its directory, durably, needs no fsync of its own.
            if not self._tree.remove_home(present.directory) and home is not None:
                os.fsync(home)
