"""A volume's runs: ready for a guest, and committed or discarded afterwards.

Owns what a start and a stop do with each kind of volume. Must not know whether running
data is a copy or an overlay. Invariants: running data is never replaced by a start of a
volume that saves it, nor dropped by a crash; a committed file is written to only in place
(revisions_to_keep -1), after every other name of it is gone; running data bears its boot
id, by which a repeat is recognised.
"""

from __future__ import annotations

import os
from pathlib import Path

from bulkhead import durable, failpoints
from bulkhead.durable import fsync_directory
from bulkhead.model.records import Volume
from services.storage.core.names import Role
from services.storage.core.present import OF_A_RUN, Present
from services.storage.core.reasons import StorageRefusal
from services.storage.core.states import Device
from services.storage.core.volumes import Kind, kind_of, parse_vid, source_of
from services.storage.drivers import files
from services.storage.drivers.directory.commits import Commits
from services.storage.drivers.directory.reading import Reading
from services.storage.drivers.directory.running_data import NextStart, RunningData, mark_running
from services.storage.drivers.directory.tree import Tree
from services.storage.drivers.files import fresh, get_tag, opened, set_tags
from services.storage.drivers.interface import Cancel


class Runs:
    """verify(), start() and stop() of interface.Driver."""

    def __init__(
        self,
        tree: Tree,
        reading: Reading,
        commits: Commits,
        next_start: NextStart,
        running: RunningData,
    ) -> None:
        self._tree = tree
        self._reading = reading
        self._commits = commits
        self._next_start = next_start
        self._running = running

    def verify(self, owner: str, volume: Volume, source: Volume | None) -> None:
        """As in interface.Driver."""
        self._tree.check()
        present = self._tree.open(owner, volume)
        match kind_of(volume):
            case Kind.ORIGIN:
                if present.running is None:
                    self._tree.committed(present, volume)
            case Kind.SNAPSHOT:
                with self._reading.committed(source_of(volume, source)):
                    pass
            case Kind.VOLATILE:
                pass

    # ---- start

    def start(
        self, owner: str, boot_id: str, volume: Volume, source: Volume | None, cancel: Cancel
    ) -> Device:
        """As in interface.Driver."""
        kind = kind_of(volume)
        present = self._tree.open(owner, volume)
        running = present.running
        if kind is Kind.ORIGIN:
            running = self._start_origin(owner, boot_id, present, volume, cancel)
        elif running is None or not boot_id or get_tag(running, "boot") != boot_id:
            self._tree.make_home(present)
            self._remove(self._doomed(present), present)
            if kind is Kind.VOLATILE:
                running = self._start_empty(owner, boot_id, present, volume)
            else:
                origin = source_of(volume, source)
                base = self._tree.committed(self._tree.scan(parse_vid(origin.vid)), origin)
                running = self._running.start(owner, boot_id, present, base, cancel)
        return Device(
            name=volume.name,
            path=str(running),
            rw=volume.rw,
            format="qcow2" if running.suffix == ".qcow2" else "raw",
        )

    def _start_empty(self, owner: str, boot_id: str, present: Present, volume: Volume) -> Path:
        running = present.path(Role.DIRTY)
        with fresh(running) as file:
            os.ftruncate(file.fd, volume.size)
            mark_running(file.fd, owner, boot_id, "")
            file.publish("storage.start")
        return running

    def _start_origin(
        self, owner: str, boot_id: str, present: Present, volume: Volume, cancel: Cancel
    ) -> Path:
        if Role.IMPORT in present.roles:
            raise StorageRefusal(
                "VOLUME_IMPORTING",
                f"cannot start volume {volume.vid}: an import into it is under way",
                volume=volume.vid,
            )
        running = present.running
        if running is not None:
            with opened(running, os.O_RDWR) as fd:
                if get_tag(fd, "boot") != boot_id or not get_tag(fd, "owner"):
                    failpoints.hit("storage.start.before_tag")
                    set_tags(fd, {"owner": owner, "boot": boot_id})
                    os.fsync(fd)
                    failpoints.hit("storage.start.after_tag")
                files.share_with_guests(fd, 0o660)
            return running
        clean = self._tree.committed(present, volume)
        if volume.snapshots_disabled:
            return self._start_in_place(owner, boot_id, present, clean, cancel)
        return self._running.start(owner, boot_id, present, clean, cancel)

    def _start_in_place(
        self, owner: str, boot_id: str, present: Present, clean: Path, cancel: Cancel
    ) -> Path:
        """The guest works on the committed file itself; older states go first."""
        failpoints.hit("storage.start.before_prune")
        self._commits.give_up_older(present)
        failpoints.hit("storage.start.after_prune")
        if clean.lstat().st_nlink > 1:
            self._detach(owner, present, cancel)
        dirty = present.path(Role.DIRTY)
        with opened(clean, os.O_RDWR) as fd:
            mark_running(fd, owner, boot_id, "")
            os.fsync(fd)
        failpoints.hit("storage.start.before_rename")
        durable.rename(clean, dirty)
        failpoints.hit("storage.start.after_rename")
        return dirty

    def _detach(self, owner: str, present: Present, cancel: Cancel) -> None:
        """Make the committed file one that no overlay refers to."""
        clean = present.path(Role.CLEAN)
        with opened(clean) as source, fresh(clean) as file:
            files.copy(source, file.fd, os.fstat(source).st_size, cancel)
            self._commits.mark_new(file, owner, get_tag(source, "operation"))
            file.publish("storage.detach")

    # ---- stop

    def stop(self, owner: str, boot_id: str, volume: Volume, cancel: Cancel) -> None:
        """As in interface.Driver."""
        kind = kind_of(volume)
        present = self._tree.open(owner, volume)
        running = present.running
        if running is not None:
            boot = get_tag(running, "boot")
            if boot_id and boot and boot != boot_id:
                return  # it belongs to another boot of the qube
        if kind is not Kind.ORIGIN:
            doomed = self._doomed(present)
            if doomed:
                failpoints.hit("storage.stop.before_discard")
                self._remove(doomed, present)
                failpoints.hit("storage.stop.after_discard")
            self._tree.remove_home(present.directory)
            return
        if running is not None:
            self._running.commit(owner, present, volume, running, cancel)
        elif Role.CLEAN in present.roles:
            self._next_start.prepare(owner, present, volume)

    # ---- running data that is not kept

    def _doomed(self, present: Present) -> list[Path]:
        """What the runs of a volume without data of its own left."""
        doomed = [present.roles[role] for role in OF_A_RUN if role in present.roles]
        clean = present.roles.get(Role.CLEAN)
        if clean is not None and clean.lstat().st_nlink > 1:
            doomed.append(clean)  # 4.4's second name of the source's commit
        return doomed

    def _remove(self, doomed: list[Path], present: Present) -> None:
        if not doomed:
            return
        for path in doomed:
            path.unlink()
        fsync_directory(present.directory)
        for role in OF_A_RUN:
            present.roles.pop(role, None)
