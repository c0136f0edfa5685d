"""Volumes as files in a directory: all that the reflink and the plain driver share.

Owns the order of steps of every operation on such a volume. Must not know whether a
running volume is a copy or an overlay: that is the subclass. Invariants: a committed
file is never written to (except in place, with revisions_to_keep -1, after every other
name of it is gone); a commit is one rename; "<name>.img" is the current state whenever
it exists, and running data lies beside it under a name of its own.

How a repeat is recognised: an unfinished commit has a revision that is the same inode as
the current state; a finished import, clear, clone or revert left its operation's id on
the new state; running data bears its boot id.
"""

# ruff: noqa: ARG002  (the interface's arguments, whether a driver needs them or not)

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

from bulkhead import durable, failpoints
from bulkhead.durable import fsync_directory
from bulkhead.model.records import Pool, Volume
from services.storage import failpoint_table  # noqa: F401  (declares what is hit below)
from services.storage.core.names import (
    Revision,
    Role,
    classify,
    file_name,
    next_revision,
    surplus,
)
from services.storage.core.reasons import StorageRefusal
from services.storage.core.states import (
    Device,
    Found,
    Import,
    PoolUsage,
    RevisionState,
    VolumeState,
)
from services.storage.core.volumes import (
    PREFIXES,
    QUARANTINE,
    Kind,
    Vid,
    kind_of,
    parse_bool,
    parse_directory,
    parse_revisions,
    parse_vid,
)
from services.storage.drivers import files
from services.storage.drivers.files import Fresh, fresh, get_tag, opened, set_tags
from services.storage.drivers.interface import Cancel, Committed, Driver

_LOG = logging.getLogger("bulkhead.storage")
_T = TypeVar("_T")

# Files whose tag says whose volume it is. BASE and the 4.4 files may be second names of
# another qube's commit, so their tags mean nothing.
_OWNED = (Role.CLEAN, Role.DIRTY, Role.OVERLAY, Role.IMPORT, Role.PRECACHE)
_RUNNING = (Role.OVERLAY, Role.DIRTY)
_PROBE = ".bulkhead-probe"
# How often a qube's directory is made again that was taken away before a file was in it.
HOME_ATTEMPTS = 5
# A reader takes no lock: a commit may rename what it just saw. It looks again, this often.
_LOOKS = 5


@dataclass(slots=True)
class Present:
    """What exists of one volume."""

    vid: Vid
    directory: Path
    roles: dict[Role, Path] = field(default_factory=dict)
    revisions: dict[Revision, Path] = field(default_factory=dict)
    temporaries: list[Path] = field(default_factory=list)
    legacy: list[Path] = field(default_factory=list)

    def path(self, role: Role) -> Path:
        """Where a file of that role is or would be."""
        return self.directory / file_name(self.vid.name, role)

    @property
    def running(self) -> Path | None:
        """The file with running data."""
        return next((self.roles[r] for r in _RUNNING if r in self.roles), None)

    @property
    def everything(self) -> list[Path]:
        """Every file; what holds data comes last, running and current data at the end."""
        last = (Role.PRECACHE, Role.IMPORT, Role.BASE, Role.OVERLAY, Role.DIRTY, Role.CLEAN)
        return [
            *self.temporaries,
            *self.legacy,
            *(self.revisions[r] for r in sorted(self.revisions)),
            *(self.roles[r] for r in last if r in self.roles),
        ]


class DirectoryDriver(Driver):
    """Base of file-reflink and file: options dir_path, revisions_to_keep, ephemeral_volatile."""

    # Mode of a committed file: readable by guests where running data refers to it.
    clean_mode: ClassVar[int] = 0o600
    # Names of the options, as in info(), which looks at the host each time.
    parameters: ClassVar[tuple[str, ...]]

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.root = Path(parse_directory(pool, self.name, self.parameters))
        self.revisions_to_keep = parse_revisions(pool)
        self.ephemeral_volatile = parse_bool(pool, "ephemeral_volatile", False)

    # ---- what differs

    @abstractmethod
    def _check_backend(self) -> None:
        """POOL_UNUSABLE when the directory's file system cannot do what is needed."""

    @abstractmethod
    def _start_copy(
        self, owner: str, boot_id: str, present: Present, source: Path, cancel: Cancel
    ) -> Path:
        """Make durable running data that begins as the committed file; its path."""

    @abstractmethod
    def _commit_running(
        self, owner: str, present: Present, volume: Volume, running: Path, cancel: Cancel
    ) -> None:
        """Running data becomes the current state; afterwards none of it is left."""

    @abstractmethod
    def _resize_running(self, running: Path, size: int) -> None:
        """Give running data another size."""

    @abstractmethod
    def _prepare_next_start(self, owner: str, present: Present, volume: Volume) -> None:
        """After a change of the current state: whatever makes the next start fast.

        Not for a new volume: it may never be started, and its first start is one clone.
        """

    # ---- the pool

    def setup(self) -> None:
        made = False
        if not self.root.is_dir():
            failpoints.hit("storage.pool_setup.before_mkdir")
            try:
                made = files.make_directory(self.root)
            except FileNotFoundError:
                raise StorageRefusal(
                    "POOL_UNUSABLE",
                    f"pool {self.pool.name}: {self.root.parent} does not exist, make it first",
                    pool=self.pool.name,
                    path=str(self.root.parent),
                ) from None
            failpoints.hit("storage.pool_setup.after_mkdir")
        inner: list[Path] = []
        for probe in (self.root / PREFIXES[0]).glob(f"{_PROBE}~*"):
            probe.unlink(missing_ok=True)
        try:
            for prefix in PREFIXES:
                if files.make_directory(self.root / prefix):
                    inner.append(self.root / prefix)
            self._check_tags()
            self._check_backend()
        except BaseException:
            for path in reversed([self.root, *inner] if made else inner):
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise

    def _check_tags(self) -> None:
        with fresh(self.root / PREFIXES[0] / _PROBE) as file:
            try:
                set_tags(file.fd, {"owner": "probe"})
            except OSError as error:
                raise StorageRefusal(
                    "POOL_UNUSABLE",
                    f"pool {self.pool.name}: the file system of {self.root} keeps no user "
                    f"extended attributes ({error.strerror}), use another",
                    pool=self.pool.name,
                    path=str(self.root),
                ) from None

    def teardown(self) -> None:
        for path in (
            *(self.root / prefix / QUARANTINE for prefix in PREFIXES),
            *(self.root / prefix for prefix in PREFIXES),
            self.root,
        ):
            with contextlib.suppress(OSError):
                path.rmdir()

    def config(self) -> dict[str, str]:
        return {
            "name": self.pool.name,
            "driver": self.name,
            "dir_path": str(self.root),
            "revisions_to_keep": str(self.revisions_to_keep),
            "ephemeral_volatile": str(self.ephemeral_volatile),
        }

    def usage(self) -> PoolUsage:
        """size: of the file system; usage: what cannot be written any more."""
        status = os.statvfs(self.root)
        size = status.f_blocks * status.f_frsize
        usage = size - status.f_bavail * status.f_frsize
        return PoolUsage(size, usage, {"data_size": size, "data_usage": usage})

    def location(self) -> Path | None:
        return self.root

    def check(self) -> None:
        for prefix in PREFIXES:
            path = self.root / prefix
            if not path.is_dir():
                raise StorageRefusal(
                    "POOL_UNUSABLE",
                    f"pool {self.pool.name}: {path} does not exist; is it mounted?",
                    pool=self.pool.name,
                    path=str(path),
                )

    # ---- looking

    def _scan(self, vid: Vid) -> Present:
        present = Present(vid, self.root / vid.prefix / vid.qube)
        try:
            entries = list(os.scandir(present.directory))
        except FileNotFoundError:
            return present
        for entry in entries:
            name = classify(entry.name)
            if name is None or name.volume != vid.name or entry.is_symlink():
                continue
            path = present.directory / entry.name
            if name.temporary:
                present.temporaries.append(path)
            elif name.role is Role.LEGACY:
                present.legacy.append(path)
            elif name.revision is not None:
                present.revisions[name.revision] = path
            else:
                present.roles[name.role] = path
        return present

    def _open(self, owner: str, volume: Volume) -> Present:
        """What exists of the owner's volume, leftovers of crashed calls removed.

        VOLUME_FOREIGN when it is another owner's.
        """
        present = self._scan(parse_vid(volume.vid))
        stranger = self._stranger(owner, present, kind_of(volume))
        if stranger:
            raise StorageRefusal(
                "VOLUME_FOREIGN",
                f"the files of volume {volume.vid} in pool {self.pool.name} belong to the qube "
                f"with uuid {stranger}: nothing was touched",
                volume=volume.vid,
                pool=self.pool.name,
                owner=stranger,
            )
        self._drop_temporaries(present)
        return present

    def _stranger(self, owner: str, present: Present, kind: Kind) -> str:
        """The first tag that is neither absent nor the owner's."""
        for role in _OWNED:
            path = present.roles.get(role)
            if path is None or (
                # 4.4 gives a snapshot a second name of its source's commit.
                role is Role.CLEAN and kind is not Kind.ORIGIN and path.lstat().st_nlink > 1
            ):
                continue
            tag = get_tag(path, "owner")
            if tag and tag != owner:
                return tag
        return ""

    def _drop_temporaries(self, present: Present) -> None:
        if not present.temporaries:
            return
        for path in present.temporaries:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        present.temporaries.clear()
        fsync_directory(present.directory)

    @contextlib.contextmanager
    def _at_home(self, present: Present) -> Iterator[Fresh]:
        """A new committed file in the qube's directory, which is made at need.

        The directory is locked by nobody, a volume is: a repeated removal of another volume
        of that directory may take it away while it is still empty. Then it is made again.
        """
        with contextlib.ExitStack() as stack:
            for left in reversed(range(HOME_ATTEMPTS)):
                try:
                    self._make_home(present)
                    file = stack.enter_context(fresh(present.path(Role.CLEAN)))
                    break
                except FileNotFoundError:
                    if not left:
                        raise
            yield file

    def _make_home(self, present: Present) -> None:
        if not present.directory.is_dir():
            files.make_directory(present.directory, settle=False)
            failpoints.hit("storage.ensure.after_directory")

    def _origin(self, volume: Volume, what: str) -> None:
        if kind_of(volume) is not Kind.ORIGIN:
            raise StorageRefusal(
                "NOT_ORIGIN",
                f"cannot {what} volume {volume.vid}: it keeps no data of its own between starts",
                volume=volume.vid,
            )

    def _quiet(self, present: Present, volume: Volume, what: str) -> None:
        """Refuse while it runs, was not cleanly stopped, or is imported into."""
        if present.running is not None:
            raise StorageRefusal(
                "VOLUME_DIRTY",
                f"cannot {what} volume {volume.vid}: it is running or was not cleanly stopped; "
                "stop its qube first",
                volume=volume.vid,
            )
        if Role.IMPORT in present.roles:
            raise StorageRefusal(
                "VOLUME_IMPORTING",
                f"cannot {what} volume {volume.vid}: an import into it is under way",
                volume=volume.vid,
            )

    def _clean(self, present: Present, volume: Volume) -> Path:
        path = present.roles.get(Role.CLEAN)
        if path is not None:
            return path
        if present.running is not None:
            raise StorageRefusal(
                "SOURCE_RUNNING",
                f"volume {volume.vid} runs with snapshots disabled: it has no committed state; "
                "stop its qube first",
                volume=volume.vid,
            )
        raise StorageRefusal(
            "VOLUME_NOT_FOUND",
            f"volume {volume.vid} has no data in pool {self.pool.name}",
            volume=volume.vid,
            pool=self.pool.name,
        )

    # ---- create, remove

    def ensure(self, owner: str, volume: Volume) -> None:
        if kind_of(volume) is not Kind.ORIGIN:
            parse_vid(volume.vid)
            return
        present = self._open(owner, volume)
        if present.running is None:
            self._set_untagged_aside(present)
            if Role.CLEAN not in present.roles:
                with self._at_home(present) as file:
                    os.ftruncate(file.fd, volume.size)
                    self._finish_clean(file, owner, "")
                    file.publish("storage.ensure")

    def clone(
        self, owner: str, volume: Volume, source: Committed, key: str, cancel: Cancel
    ) -> None:
        self._origin(volume, "clone into")
        present = self._open(owner, volume)
        if present.running is None:
            self._set_untagged_aside(present)
            if Role.CLEAN not in present.roles:
                with self._at_home(present) as file:
                    files.copy(source.fd, file.fd, source.size, cancel)
                    self._finish_clean(file, owner, key)
                    file.publish("storage.clone")

    def _set_untagged_aside(self, present: Present) -> None:
        """A new volume finds files that nobody claims: keep them, out of the way."""
        clean = present.roles.get(Role.CLEAN)
        if clean is None or get_tag(clean, "owner"):
            return
        _LOG.warning("%s", self._move_aside(present, ""))
        present.roles.clear()
        present.revisions.clear()
        present.legacy.clear()

    def _finish_clean(self, file: Fresh, owner: str, key: str) -> None:
        set_tags(file.fd, {"owner": owner, "commit": files.new_identity(), "operation": key})
        files.share_with_guests(file.fd, self.clean_mode)

    def remove(self, owner: str, volume: Volume) -> None:
        present = self._scan(parse_vid(volume.vid))
        try:
            kind = kind_of(volume)
        except StorageRefusal:
            kind = Kind.ORIGIN  # a broken record must still be removable
        if self._stranger(owner, present, kind):
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
            if not self._remove_home(present.directory) and home is not None:
                os.fsync(home)

    def _remove_home(self, directory: Path) -> bool:
        """Remove the qube's directory when only links are left in it: they hold no data.

        True when it was removed here, durably.
        """
        try:
            entries = list(os.scandir(directory))
        except FileNotFoundError:
            return False
        if not all(entry.is_symlink() for entry in entries):
            return False
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                (directory / entry.name).unlink()
        failpoints.hit("storage.remove.before_rmdir")
        try:
            directory.rmdir()
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                return False  # another volume of the qube was made meanwhile
            raise
        fsync_directory(directory.parent)
        failpoints.hit("storage.remove.after_rmdir")
        return True

    # ---- start, stop

    def verify(self, owner: str, volume: Volume, source: Volume | None) -> None:
        self.check()
        present = self._open(owner, volume)
        match kind_of(volume):
            case Kind.ORIGIN:
                if present.running is None:
                    self._clean(present, volume)
            case Kind.SNAPSHOT:
                with self.committed(self._source(volume, source)):
                    pass
            case Kind.VOLATILE:
                pass

    def _source(self, volume: Volume, source: Volume | None) -> Volume:
        if source is not None:
            return source
        return Volume(
            name=volume.name, pool=volume.pool, vid=volume.source, rw=True, save_on_stop=True
        )

    def start(
        self, owner: str, boot_id: str, volume: Volume, source: Volume | None, cancel: Cancel
    ) -> Device | None:
        kind = kind_of(volume)
        present = self._open(owner, volume)
        running = present.running
        if kind is Kind.ORIGIN:
            running = self._start_origin(owner, boot_id, present, volume, cancel)
        elif running is None or not boot_id or get_tag(running, "boot") != boot_id:
            self._make_home(present)
            self._discard(present, "start")
            if kind is Kind.VOLATILE:
                running = present.path(Role.DIRTY)
                with fresh(running) as file:
                    os.ftruncate(file.fd, volume.size)
                    self._finish_running(file.fd, owner, boot_id, "")
                    file.publish("storage.start")
            else:
                origin = self._source(volume, source)
                base = self._clean(self._scan(parse_vid(origin.vid)), origin)
                running = self._start_copy(owner, boot_id, present, base, cancel)
        return Device(
            name=volume.name,
            path=str(running),
            rw=volume.rw,
            format="qcow2" if running.suffix == ".qcow2" else "raw",
        )

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
        clean = self._clean(present, volume)
        if volume.snapshots_disabled:
            return self._start_in_place(owner, boot_id, present, clean, cancel)
        return self._start_copy(owner, boot_id, present, clean, cancel)

    def _start_in_place(
        self, owner: str, boot_id: str, present: Present, clean: Path, cancel: Cancel
    ) -> Path:
        """The guest works on the committed file itself; older states go first."""
        failpoints.hit("storage.start.before_prune")
        self._prune(present, 0)
        self._drop_precache(present)
        failpoints.hit("storage.start.after_prune")
        if clean.lstat().st_nlink > 1:
            self._detach(owner, present, cancel)
        dirty = present.path(Role.DIRTY)
        with opened(clean, os.O_RDWR) as fd:
            self._finish_running(fd, owner, boot_id, "")
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
            self._finish_clean(file, owner, get_tag(source, "operation"))
            file.publish("storage.detach")

    def _finish_running(self, fd: int, owner: str, boot_id: str, base: str) -> None:
        """Tags and rights of running data; its commit id is that of the state it may become."""
        set_tags(
            fd,
            {
                "owner": owner,
                "boot": boot_id,
                "base": base,
                "commit": files.new_identity(),
                "operation": "",
            },
        )
        files.share_with_guests(fd, 0o660)

    def _discard(self, present: Present, step: str) -> None:
        """Running data that shall not be kept is gone; step "stop" passes its failpoints."""
        doomed = [
            present.roles[role]
            for role in (Role.OVERLAY, Role.DIRTY, Role.BASE, Role.PRECACHE)
            if role in present.roles
        ]
        clean = present.roles.get(Role.CLEAN)
        if clean is not None and clean.lstat().st_nlink > 1:
            doomed.append(clean)  # 4.4's second name of the source's commit
        if not doomed:
            return
        if step == "stop":
            failpoints.hit("storage.stop.before_discard")
        for path in doomed:
            path.unlink()
        fsync_directory(present.directory)
        for role in (Role.OVERLAY, Role.DIRTY, Role.BASE, Role.PRECACHE):
            present.roles.pop(role, None)
        if step == "stop":
            failpoints.hit("storage.stop.after_discard")

    def stop(self, owner: str, boot_id: str, volume: Volume, cancel: Cancel) -> None:
        kind = kind_of(volume)
        present = self._open(owner, volume)
        running = present.running
        if running is not None:
            boot = get_tag(running, "boot")
            if boot_id and boot and boot != boot_id:
                return  # it belongs to another boot of the qube
        if kind is not Kind.ORIGIN:
            self._discard(present, "stop")
            self._remove_home(present.directory)
            return
        if running is not None:
            self._commit_running(owner, present, volume, running, cancel)
        elif Role.CLEAN in present.roles:
            self._prepare_next_start(owner, present, volume)

    # ---- commits

    def _tag_for_commit(self, step: str, path: Path, owner: str, key: str) -> None:
        """What becomes a commit is durable, ours, and bears an id of its own."""
        with opened(path, os.O_RDWR) as fd:
            failpoints.hit(f"{step}.before_tag")
            tags = {"owner": owner, "operation": key}
            if not get_tag(fd, "commit"):
                tags["commit"] = files.new_identity()
            set_tags(fd, tags)
            files.share_with_guests(fd, self.clean_mode)
            os.fsync(fd)
            failpoints.hit(f"{step}.after_tag")

    def _commit(
        self,
        step: str,
        owner: str,
        present: Present,
        volume: Volume,
        rename: Callable[[], None],
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
        self._drop_precache(present)
        failpoints.hit(f"{step}.before_rename")
        rename()
        fsync_directory(present.directory)
        failpoints.hit(f"{step}.after_rename")
        self._prepare_next_start(owner, self._scan(present.vid), volume)
        failpoints.hit(f"{step}.after_precache")

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

    def _drop_precache(self, present: Present) -> None:
        path = present.roles.pop(Role.PRECACHE, None)
        if path is not None:
            durable.unlink(path)

    def replace(
        self, owner: str, volume: Volume, source: Committed | None, key: str, cancel: Cancel
    ) -> None:
        self._origin(volume, "replace the data of")
        present = self._open(owner, volume)
        clean = present.roles.get(Role.CLEAN)
        if self._was_done_by(key, present):
            self._prepare_next_start(owner, present, volume)
            return
        self._quiet(present, volume, "replace the data of")
        if clean is None:
            self._clean(present, volume)
        with fresh(present.path(Role.CLEAN)) as file:
            if source is None:
                assert clean is not None
                os.ftruncate(file.fd, clean.lstat().st_size)
            else:
                files.copy(source.fd, file.fd, source.size, cancel)
            self._finish_clean(file, owner, key)
            os.fsync(file.fd)

            def rename() -> None:
                file.path.rename(file.final)
                file.published = True

            self._commit("storage.replace", owner, present, volume, rename)

    def _was_done_by(self, key: str, present: Present) -> bool:
        clean = present.roles.get(Role.CLEAN)
        return bool(key) and clean is not None and get_tag(clean, "operation") == key

    def revert(self, owner: str, volume: Volume, revision: str, key: str) -> None:
        self._origin(volume, "revert")
        present = self._open(owner, volume)
        self._quiet(present, volume, "revert")
        clean = self._clean(present, volume)
        mark = key or f"revert-{revision}"
        done = self._was_done_by(mark, present)
        if done and (key or (revision and self._find(present, revision) is None)):
            self._prepare_next_start(owner, present, volume)
            return
        current = clean.lstat().st_ino
        if revision:
            found = self._find(present, revision)
        else:
            # The newest one that is not merely a crashed call's name for the current state.
            older = (r for r in sorted(present.revisions, reverse=True))
            found = next((r for r in older if present.revisions[r].lstat().st_ino != current), None)
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
            files.share_with_guests(fd, self.clean_mode)
            os.fsync(fd)
        failpoints.hit("storage.revert.after_tag")
        # What was current stays as a revision even where none are kept: a revert must
        # be revertible. The next commit prunes.
        self._commit(
            "storage.revert", owner, present, volume, lambda: self._take(chosen, clean), keep=-1
        )

    def _take(self, source: Path, target: Path) -> None:
        source.rename(target)

    def _find(self, present: Present, revision: str) -> Revision | None:
        return next((r for r in present.revisions if r.id == revision), None)

    # ---- size

    def resize(self, owner: str, volume: Volume, size: int, cancel: Cancel) -> int:
        if not volume.rw:
            raise StorageRefusal(
                "VOLUME_REFUSED",
                f"cannot resize volume {volume.vid}: it is read-only",
                volume=volume.vid,
            )
        kind = kind_of(volume)
        present = self._open(owner, volume)
        running = present.running
        if running is not None:
            if self._size_of(running) != size:
                failpoints.hit("storage.resize.before_truncate")
                self._resize_running(running, size)
                failpoints.hit("storage.resize.after_truncate")
            return size
        if kind is not Kind.ORIGIN:
            return size
        self._quiet(present, volume, "resize")
        clean = self._clean(present, volume)
        if clean.lstat().st_size != size:
            with opened(clean) as source, fresh(clean) as file:
                files.copy(source, file.fd, size, cancel)
                self._finish_clean(file, owner, get_tag(source, "operation"))
                file.publish("storage.resize")
        self._drop_stale(present)
        self._prepare_next_start(owner, self._scan(present.vid), volume)
        failpoints.hit("storage.resize.after_precache")
        return size

    def _drop_stale(self, present: Present) -> None:
        """Hook for what the old current state left behind."""

    def _size_of(self, path: Path) -> int:
        if path.suffix == ".qcow2":
            with opened(path) as fd:
                return files.qcow2_size(fd)
        return path.lstat().st_size

    # ---- import, export

    def import_begin(self, owner: str, volume: Volume, size: int, key: str, ticket: bool) -> Import:
        self._origin(volume, "import into")
        present = self._open(owner, volume)
        under_way = present.roles.get(Role.IMPORT)
        if under_way is not None and key and get_tag(under_way, "operation") == key:
            return Import(under_way.lstat().st_size, str(under_way))
        self._quiet(present, volume, "import into")
        size = size or self._clean(present, volume).lstat().st_size
        self._clean(present, volume)
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

    def import_arrived(self, owner: str, volume: Volume, key: str) -> None:
        present = self._open(owner, volume)
        path = self._import(present, volume, key)
        with opened(path, os.O_RDWR) as fd:
            os.fsync(fd)
            failpoints.hit("storage.import_arrived.before_tag")
            set_tags(fd, {"transfer": ""})
            os.fsync(fd)
            failpoints.hit("storage.import_arrived.after_tag")

    def _import(self, present: Present, volume: Volume, key: str) -> Path:
        path = present.roles.get(Role.IMPORT)
        if path is None or (key and get_tag(path, "operation") not in ("", key)):
            raise StorageRefusal(
                "VOLUME_NOT_IMPORTING",
                f"no import into volume {volume.vid} was begun by this operation",
                volume=volume.vid,
            )
        return path

    def import_end(self, owner: str, volume: Volume, success: bool, key: str) -> None:
        self._origin(volume, "import into")
        present = self._open(owner, volume)
        if not success:
            path = present.roles.get(Role.IMPORT)
            if path is not None and (not key or get_tag(path, "operation") in ("", key)):
                failpoints.hit("storage.import_end.before_discard")
                durable.unlink(path)
                failpoints.hit("storage.import_end.after_discard")
            return
        if Role.IMPORT not in present.roles and self._was_done_by(key, present):
            self._prepare_next_start(owner, present, volume)
            return
        path = self._import(present, volume, key)
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
        self._tag_for_commit("storage.import_end", path, owner, key)
        clean = present.path(Role.CLEAN)
        self._commit("storage.import_end", owner, present, volume, lambda: self._take(path, clean))

    @contextlib.contextmanager
    def committed(self, volume: Volume, revision: str = "") -> Iterator[Committed]:
        self._origin(volume, "read")
        fd = self._again(lambda: self._open_committed(volume, revision))
        try:
            yield Committed(fd, os.fstat(fd).st_size, files.identity(fd))
        finally:
            os.close(fd)

    def _again(self, look: Callable[[], _T]) -> _T:
        for _ in range(_LOOKS - 1):
            with contextlib.suppress(FileNotFoundError):
                return look()
        return look()

    def _open_committed(self, volume: Volume, revision: str) -> int:
        present = self._scan(parse_vid(volume.vid))
        if revision:
            found = self._find(present, revision)
            path = present.revisions[found] if found is not None else None
        else:
            path = self._clean(present, volume)
        if path is None:
            raise StorageRefusal(
                "REVISION_NOT_FOUND",
                f"volume {volume.vid} has no revision {revision}",
                volume=volume.vid,
                revision=revision,
            )
        with opened(path) as fd:
            return os.dup(fd)

    # ---- description

    def describe(self, volume: Volume, source: Volume | None) -> VolumeState:
        return self._again(lambda: self._describe(volume, source))

    def _describe(self, volume: Volume, source: Volume | None) -> VolumeState:
        kind = kind_of(volume)
        present = self._scan(parse_vid(volume.vid))
        running = present.running
        shown = running or (present.roles.get(Role.CLEAN) if kind is Kind.ORIGIN else None)
        size, usage = volume.size, 0
        if shown is not None:
            size = self._size_of(shown)
            usage = files.used(shown)
        return VolumeState(
            size=size,
            usage=usage,
            path=str(running or present.path(Role.DIRTY)),
            is_outdated=self._is_outdated(volume, source, running, kind),
            is_dirty=kind is Kind.ORIGIN and running is not None,
            revisions=tuple(RevisionState(r.id, float(r.time)) for r in sorted(present.revisions)),
            problem=self._problem(volume, source, present, kind),
            importing=Role.IMPORT in present.roles,
        )

    def _problem(self, volume: Volume, source: Volume | None, present: Present, kind: Kind) -> str:
        try:
            self.check()
            if kind is Kind.ORIGIN and present.running is None:
                self._clean(present, volume)
            elif kind is Kind.SNAPSHOT:
                origin = self._source(volume, source)
                self._clean(self._scan(parse_vid(origin.vid)), origin)
        except StorageRefusal as refusal:
            return refusal.message
        return ""

    def _is_outdated(
        self, volume: Volume, source: Volume | None, running: Path | None, kind: Kind
    ) -> bool:
        if kind is not Kind.SNAPSHOT or running is None:
            return False
        base = get_tag(running, "base")
        try:
            with self.committed(self._source(volume, source)) as current:
                return bool(base) and base != current.identity
        except (StorageRefusal, FileNotFoundError):
            return False

    # ---- upkeep

    def inventory(self) -> Sequence[Found]:
        found: list[Found] = []
        for prefix in PREFIXES:
            try:
                homes = sorted(e.name for e in os.scandir(self.root / prefix) if e.is_dir())
            except FileNotFoundError:
                continue
            for home in homes:
                found.extend(self._inventory_of(prefix, home))
        return found

    def _inventory_of(self, prefix: str, home: str) -> Iterator[Found]:
        try:
            names = {
                name.volume
                for entry in os.scandir(self.root / prefix / home)
                if not entry.is_symlink() and (name := classify(entry.name)) is not None
            }
        except FileNotFoundError:
            return  # removed meanwhile
        for volume in sorted(names):
            try:
                vid = parse_vid(f"{prefix}/{home}/{volume}")
            except StorageRefusal:
                continue
            present = self._scan(vid)
            if not present.everything:
                continue
            if Role.CLEAN in present.roles:
                kind, path = "committed", present.roles[Role.CLEAN]
            elif present.running is not None:
                kind, path = "running", present.running
            elif Role.IMPORT in present.roles:
                kind, path = "import", present.roles[Role.IMPORT]
            elif present.revisions:
                kind, path = "revisions", present.revisions[max(present.revisions)]
            else:
                kind, path = "temporary", present.everything[0]
            yield Found(
                vid=str(vid),
                owner=self._owner_of(present),
                path=str(path),
                kind=kind,
                running=present.running is not None,
            )

    def _owner_of(self, present: Present) -> str:
        """Running data first: beside it, CLEAN may be a second name of the source's."""
        for role in (*_RUNNING, Role.CLEAN, Role.IMPORT, Role.PRECACHE):
            if role in present.roles and (tag := get_tag(present.roles[role], "owner")):
                return tag
        for revision in sorted(present.revisions, reverse=True):
            if tag := get_tag(present.revisions[revision], "owner"):
                return tag
        return ""

    def quarantine(self, found: Found) -> str:
        present = self._scan(parse_vid(found.vid))
        if not present.everything:
            self._remove_home(present.directory)
            return f"{found.vid}: nothing is there any more"
        owner = self._owner_of(present)
        if owner != found.owner:
            return f"{found.vid}: left alone, its owner is now {owner or 'nobody'}"
        return self._move_aside(present, owner)

    def _move_aside(self, present: Present, owner: str) -> str:
        """Rename every file of the volume into the quarantine of its prefix."""
        self._drop_temporaries(present)
        vid = present.vid
        shelf = self.root / vid.prefix / QUARANTINE
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
        self._remove_home(present.directory)
        return f"{vid}: moved to {place}"

    def clear_temporaries(self, vid: str) -> list[str]:
        present = self._scan(parse_vid(vid))
        names = [path.name for path in present.temporaries]
        self._drop_temporaries(present)
        if names:
            self._remove_home(present.directory)
        return names
