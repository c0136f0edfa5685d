"""Another current state for a volume at rest: other data, an older state, another size.

Owns the steps of replace, revert and resize. Must not know where the data come from.
Invariants: only a resize touches a running volume, and only its running data; a revert
can itself be reverted, whatever number of revisions is kept.
"""

from __future__ import annotations

import os

from bulkhead import failpoints
from bulkhead.model.records import Volume
from services.storage.core.names import Role
from services.storage.core.present import require_quiet
from services.storage.core.reasons import StorageRefusal
from services.storage.core.revisions import to_revert_to, with_id
from services.storage.core.volumes import Kind, kind_of, require_origin
from services.storage.drivers import files
from services.storage.drivers.directory.commits import Commits
from services.storage.drivers.directory.running_data import NextStart, RunningData
from services.storage.drivers.directory.tree import Tree
from services.storage.drivers.files import fresh, get_tag, opened, set_tags
from services.storage.drivers.interface import Cancel, Committed


class Changes:
    """replace(), revert() and resize() of interface.Driver."""

    def __init__(
        self, tree: Tree, commits: Commits, next_start: NextStart, running: RunningData
    ) -> None:
        self._tree = tree
        self._commits = commits
        self._next_start = next_start
        self._running = running

    def replace(
        self, owner: str, volume: Volume, source: Committed | None, key: str, cancel: Cancel
    ) -> None:
        """As in interface.Driver."""
        require_origin(volume, "replace the data of")
        present = self._tree.open(owner, volume)
        if self._commits.was_made_by(key, present):
            self._next_start.prepare(owner, present, volume)
            return
        require_quiet(present, volume, "replace the data of")
        clean = self._tree.committed(present, volume)
        with fresh(present.path(Role.CLEAN)) as file:
            if source is None:
                os.ftruncate(file.fd, clean.lstat().st_size)
            else:
                files.copy(source.fd, file.fd, source.size, cancel)
            self._commits.mark_new(file, owner, key)
            os.fsync(file.fd)
            self._commits.commit("storage.replace", owner, present, volume, file.rename)

    def revert(self, owner: str, volume: Volume, revision: str, key: str) -> None:
        """As in interface.Driver."""
        require_origin(volume, "revert")
        present = self._tree.open(owner, volume)
        require_quiet(present, volume, "revert")
        clean = self._tree.committed(present, volume)
        mark = key or f"revert-{revision}"
        done = self._commits.was_made_by(mark, present)
        if done and (key or (revision and with_id(present.revisions, revision) is None)):
            self._next_start.prepare(owner, present, volume)
            return
        current = clean.lstat().st_ino
        found = to_revert_to(
            present.revisions, revision, lambda r: present.revisions[r].lstat().st_ino == current
        )
        if found is None:
            which = f"no revision {revision}" if revision else "no revisions"
            raise StorageRefusal(
                "REVISION_NOT_FOUND",
                f"volume {volume.vid} has {which}",
                volume=volume.vid,
                revision=revision,
            )
        chosen = present.revisions[found]
        if chosen.lstat().st_ino == current:
            return  # it already is the current state
        failpoints.hit("storage.revert.before_tag")
        with opened(chosen, os.O_RDWR) as fd:
            set_tags(fd, {"owner": owner, "operation": mark})
            files.share_with_guests(fd, self._commits.mode)
            os.fsync(fd)
        failpoints.hit("storage.revert.after_tag")
        # What was current stays as a revision even where none are kept: a revert must
        # be revertible. The next commit prunes.
        self._commits.commit_file("storage.revert", owner, present, volume, chosen, keep=-1)

    def resize(self, owner: str, volume: Volume, size: int, cancel: Cancel) -> int:
        """As in interface.Driver."""
        if not volume.rw:
            raise StorageRefusal(
                "VOLUME_REFUSED",
                f"cannot resize volume {volume.vid}: it is read-only",
                volume=volume.vid,
            )
        kind = kind_of(volume)
        present = self._tree.open(owner, volume)
        running = present.running
        if running is not None:
            if files.image_size(running) != size:
                failpoints.hit("storage.resize.before_truncate")
                self._running.resize(running, size)
                failpoints.hit("storage.resize.after_truncate")
            return size
        if kind is not Kind.ORIGIN:
            return size
        require_quiet(present, volume, "resize")
        clean = self._tree.committed(present, volume)
        if clean.lstat().st_size != size:
            with opened(clean) as source, fresh(clean) as file:
                files.copy(source, file.fd, size, cancel)
                self._commits.mark_new(file, owner, get_tag(source, "operation"))
                file.publish("storage.resize")
        self._next_start.drop_stale(present)
        self._next_start.prepare(owner, self._tree.scan(present.vid), volume)
        failpoints.hit("storage.resize.after_precache")
        return size
