"""Commits: how a file becomes a volume's current state.

Owns the order of steps of a commit, the tags and rights of a committed file, and the
revisions that older states live on as. Must not know where the new state comes from.
Invariants: a commit is one rename; the state before it is a revision by then, where any
are kept; a state bears an id of its own.

How a repeat is recognised: an unfinished commit left a revision that is the same inode as
the current state; a finished one left its operation's id on the new state.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from bulkhead import durable, failpoints
from bulkhead.durable import fsync_directory
from bulkhead.model.records import Volume
from services.storage.core.names import Role, file_name
from services.storage.core.present import Present
from services.storage.core.revisions import next_revision, surplus
from services.storage.drivers import files
from services.storage.drivers.directory.running_data import NextStart
from services.storage.drivers.directory.tree import Tree
from services.storage.drivers.files import Fresh, get_tag, opened, set_tags


class Commits:
    """mode: of a committed file; readable by guests where running data refers to it."""

    def __init__(self, tree: Tree, next_start: NextStart, mode: int) -> None:
        self._tree = tree
        self._next_start = next_start
        self.mode = mode

    # ---- what becomes a commit

    def mark_new(self, file: Fresh, owner: str, key: str) -> None:
        """Tags and rights of a new file that becomes a commit (not yet durable)."""
        set_tags(file.fd, {"owner": owner, "commit": files.new_identity(), "operation": key})
        files.share_with_guests(file.fd, self.mode)

    def mark(self, step: str, path: Path, owner: str, key: str) -> None:
        """What becomes a commit is durable, the owner's, and bears an id of its own."""
        with opened(path, os.O_RDWR) as fd:
            failpoints.hit(f"{step}.before_tag")
            tags = {"owner": owner, "operation": key}
            if not get_tag(fd, "commit"):
                tags["commit"] = files.new_identity()
            set_tags(fd, tags)
            files.share_with_guests(fd, self.mode)
            os.fsync(fd)
            failpoints.hit(f"{step}.after_tag")

    def was_made_by(self, key: str, present: Present) -> bool:
        """Whether the operation made the current state; "" never did."""
        clean = present.roles.get(Role.CLEAN)
        return bool(key) and clean is not None and get_tag(clean, "operation") == key

    # ---- the commit

    def commit(
        self,
        step: str,
        owner: str,
        present: Present,
        volume: Volume,
        rename: Callable[[], object],
        keep: int | None = None,
    ) -> None:
        """Make what rename() puts at CLEAN the current state, the old one a revision.

        keep: revisions to leave, by default the volume's; a negative number leaves all.
        """
        keep = volume.revisions_to_keep if keep is None else keep
        if keep != 0 and Role.CLEAN in present.roles:
            failpoints.hit(f"{step}.before_revision")
            self._keep_revision(present)
            failpoints.hit(f"{step}.after_revision")
        self._prune(present, keep)
        failpoints.hit(f"{step}.after_prune")
        drop_ready_copy(present)
        failpoints.hit(f"{step}.before_rename")
        rename()
        fsync_directory(present.directory)
        failpoints.hit(f"{step}.after_rename")
        self._next_start.prepare(owner, self._tree.scan(present.vid), volume)
        failpoints.hit(f"{step}.after_precache")

    def commit_file(
        self,
        step: str,
        owner: str,
        present: Present,
        volume: Volume,
        path: Path,
        keep: int | None = None,
    ) -> None:
        """commit() of a file of the volume that has another name yet."""
        clean = present.path(Role.CLEAN)
        self.commit(step, owner, present, volume, lambda: path.rename(clean), keep)

    def _keep_revision(self, present: Present) -> None:
        """The current state gets a second name as the newest revision, once."""
        clean = present.roles[Role.CLEAN]
        status = clean.lstat()
        for path in present.revisions.values():
            if path.lstat().st_ino == status.st_ino:
                return
        revision = next_revision(present.revisions, status.st_mtime)
        target = present.directory / file_name(present.vid.name, Role.REVISION, revision)
        os.link(clean, target, follow_symlinks=False)
        fsync_directory(present.directory)
        present.revisions[revision] = target

    def _prune(self, present: Present, keep: int) -> None:
        doomed = surplus(present.revisions, keep)
        for revision in doomed:
            present.revisions.pop(revision).unlink(missing_ok=True)
        if doomed:
            fsync_directory(present.directory)

    def give_up_older(self, present: Present) -> None:
        """The current state is about to change in place: nothing else of it may be left."""
        self._prune(present, 0)
        drop_ready_copy(present)


def drop_ready_copy(present: Present) -> None:
    """The copy for the next start goes, durably."""
    path = present.roles.pop(Role.PRECACHE, None)
    if path is not None:
        durable.unlink(path)
