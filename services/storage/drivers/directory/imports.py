"""Imports: a file beside the volume that is filled from outside and then committed.

Owns the import's target and when it is whole. Must not know how the bytes arrive.
Invariant: the target bears its operation's id, and "transfer" as long as bytes are
awaited; such a one is never committed.
"""

from __future__ import annotations

import os
from pathlib import Path

from bulkhead import durable, failpoints
from bulkhead.model.records import Volume
from services.storage.core.names import Role
from services.storage.core.present import Present, require_quiet
from services.storage.core.reasons import StorageRefusal
from services.storage.core.states import Import
from services.storage.core.volumes import require_origin
from services.storage.drivers import files
from services.storage.drivers.directory.commits import Commits
from services.storage.drivers.directory.running_data import NextStart
from services.storage.drivers.directory.tree import Tree
from services.storage.drivers.files import fresh, get_tag, opened, set_tags


class Imports:
    """import_begin(), import_arrived() and import_end() of interface.Driver."""

    def __init__(self, tree: Tree, commits: Commits, next_start: NextStart) -> None:
        self._tree = tree
        self._commits = commits
        self._next_start = next_start

    def begin(self, owner: str, volume: Volume, size: int, key: str, ticket: bool) -> Import:
        """As import_begin() in interface.Driver."""
        require_origin(volume, "import into")
        present = self._tree.open(owner, volume)
        under_way = present.roles.get(Role.IMPORT)
        if under_way is not None and key and get_tag(under_way, "operation") == key:
            return Import(under_way.lstat().st_size, str(under_way))
        require_quiet(present, volume, "import into")
        clean = self._tree.committed(present, volume)
        size = size or clean.lstat().st_size
        with fresh(present.path(Role.IMPORT)) as file:
            os.ftruncate(file.fd, size)
            set_tags(
                file.fd,
                {
                    "owner": owner,
                    "commit": files.new_identity(),
                    "operation": key,
                    "transfer": "pending" if ticket else "",
                },
            )
            file.publish("storage.import_begin")
            return Import(size, str(file.final))

    def arrived(self, owner: str, volume: Volume, key: str) -> None:
        """As import_arrived() in interface.Driver."""
        present = self._tree.open(owner, volume)
        path = self._target(present, volume, key)
        with opened(path, os.O_RDWR) as fd:
            os.fsync(fd)
            failpoints.hit("storage.import_arrived.before_tag")
            set_tags(fd, {"transfer": ""})
            os.fsync(fd)
            failpoints.hit("storage.import_arrived.after_tag")

    def end(self, owner: str, volume: Volume, success: bool, key: str) -> None:
        """As import_end() in interface.Driver."""
        require_origin(volume, "import into")
        present = self._tree.open(owner, volume)
        if not success:
            self._discard(present, key)
            return
        if Role.IMPORT not in present.roles and self._commits.was_made_by(key, present):
            self._next_start.prepare(owner, present, volume)
            return
        path = self._target(present, volume, key)
        if get_tag(path, "transfer"):
            raise StorageRefusal(
                "IMPORT_INCOMPLETE",
                f"the data for volume {volume.vid} has not arrived completely",
                volume=volume.vid,
            )
        if present.running is not None:
            raise StorageRefusal(
                "VOLUME_DIRTY",
                f"cannot import into volume {volume.vid}: it was started meanwhile",
                volume=volume.vid,
            )
        self._commits.mark("storage.import_end", path, owner, key)
        self._commits.commit_file("storage.import_end", owner, present, volume, path)

    def _discard(self, present: Present, key: str) -> None:
        """Another operation's import stays."""
        path = present.roles.get(Role.IMPORT)
        if path is not None and _is_of(path, key):
            failpoints.hit("storage.import_end.before_discard")
            durable.unlink(path)
            failpoints.hit("storage.import_end.after_discard")

    def _target(self, present: Present, volume: Volume, key: str) -> Path:
        path = present.roles.get(Role.IMPORT)
        if path is None or not _is_of(path, key):
            raise StorageRefusal(
                "VOLUME_NOT_IMPORTING",
                f"no import into volume {volume.vid} was begun by this operation",
                volume=volume.vid,
            )
        return path


def _is_of(path: Path, key: str) -> bool:
    """Whether the operation began it; who has no id, on either side, is not told apart."""
    return not key or get_tag(path, "operation") in ("", key)
