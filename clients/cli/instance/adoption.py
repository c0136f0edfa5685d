"""A 4.4 system becomes ours: what stands beside its qubes.xml is put where services look.

Owns the copies of firewall.xml and notes.txt and the owners of pool folders. Must not
write qubes.xml: the registry loads it as it is and makes the journal. Invariant: every
step can be repeated; a kill anywhere leaves each file in its old place, or in the new one
with or without the link to it, never nowhere.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bulkhead import failpoints
from bulkhead.config import Settings
from bulkhead.durable import fsync_directory, replacing
from bulkhead.model import xmlstore
from bulkhead.model.records import PoolPut, QubePut
from clients.cli.instance.accounts import Account

failpoints.register(
    "adopt",
    {
        "adopt.copy.before": "a file of 4.4 is about to be copied to its new place",
        "adopt.copy.after": "the copy is durable, the old file is still in its place",
        "adopt.link.before_rename": "the link is made, the old file is still in its place",
        "adopt.link.after_rename": "the link has replaced the old file",
        "adopt.own.before": "a pool folder is about to change its owner",
        "adopt.own.after": "a pool folder belongs to storage",
    },
)

# Qube folders of 4.4 below the state directory.
_FOLDERS = {
    "TemplateVM": "vm-templates",
    "AppVM": "appvms",
    "StandaloneVM": "appvms",
    "DispVM": "appvms",
}
# Pools that keep their volumes as files in a folder of their own.
_FILE_DRIVERS = ("file", "file-reflink")
_LARGEST = 8 * 1024 * 1024
_QUBESD_SOCKETS = ("run/qubesd.sock", "var/run/qubesd.sock")


class AdoptionError(RuntimeError):
    """It cannot be done; the message says why, what is as before, and what to do."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of file: its name in a qube's folder, where it goes, its owner and mode."""

    old: str
    folder: Path
    suffix: str
    owner: Account | None
    mode: int


@dataclass(slots=True)
class Report:
    """What was done. copied: files; warnings: one sentence each."""

    copied: int = 0
    warnings: list[str] = field(default_factory=list)


def examine(settings: Settings) -> xmlstore.ParsedStore:
    """The store that is to be adopted; AdoptionError where that is not possible."""
    store = settings.store_file
    if settings.journal_file.exists() and settings.journal_file.stat().st_size:
        raise AdoptionError(
            f"{settings.journal_file} exists: this store is ours already; nothing was changed"
        )
    _refuse_served(settings)
    try:
        status = store.lstat()
    except FileNotFoundError:
        raise AdoptionError(
            f"{store} does not exist: there is nothing to adopt; leave --adopt out for a new store"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise AdoptionError(f"{store} is no regular file; nothing was changed")
    try:
        return xmlstore.parse(store.read_bytes())
    except xmlstore.StoreUnreadable as error:
        raise AdoptionError(f"{store} does not load: {error}; nothing was changed") from error


def _refuse_served(settings: Settings) -> None:
    import socket

    for name in _QUBESD_SOCKETS:
        path = settings.root / name
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                continue
        raise AdoptionError(
            f"a daemon still serves {path}: stop it first (systemctl stop qubesd); "
            "nothing was changed"
        )


def adopt(
    settings: Settings, parsed: xmlstore.ParsedStore, accounts: Mapping[str, Account]
) -> Report:
    """Copy the files of every qube, link them, give the pool folders to storage.

    The directories of the instance exist already. AdoptionError, OSError: what was done
    stays, and the call can be repeated.
    """
    report = Report(warnings=list(parsed.warnings))
    notes = settings.state_dir / "notes"
    _make(notes, 0o710, accounts.get("registry"))
    kinds = (
        _Kind("firewall.xml", settings.rules_dir, ".xml", accounts.get("firewall"), 0o600),
        _Kind("notes.txt", notes, ".txt", accounts.get("registry"), 0o660),
    )
    for change in parsed.changes:
        if not isinstance(change, QubePut) or change.qube.klass not in _FOLDERS:
            continue
        qube = change.qube
        place = settings.state_dir / _FOLDERS[qube.klass] / qube.name
        for kind in kinds:
            _one(place / kind.old, kind, qube.uuid, report)
    storage = accounts.get("storage")
    if storage is not None:
        for folder in _pool_folders(settings, parsed):
            failpoints.hit("adopt.own.before")
            _give(folder, storage)
            failpoints.hit("adopt.own.after")
    registry = accounts.get("registry")
    if registry is not None:
        os.chown(settings.store_file, registry.uid, -1, follow_symlinks=False)
    return report


def _one(old: Path, kind: _Kind, uuid: str, report: Report) -> None:
    target = kind.folder / f"{uuid}{kind.suffix}"
    try:
        handle = os.open(old, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        if old.is_symlink() and os.path.realpath(old) == os.path.realpath(target):
            return  # done by an earlier run
        raise AdoptionError(f"{old} is no file of its own: {error}; see what it is") from error
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
            raise AdoptionError(f"{old} is no regular file of a possible size; see what it is")
        data = file.read(_LARGEST + 1)
    failpoints.hit("adopt.copy.before")
    # The old file is the truth as long as it stands there, also after a broken run.
    with replacing(target, kind.mode) as out:
        if kind.owner is not None:
            os.fchown(out, kind.owner.uid, kind.owner.gid)
        view = memoryview(data)
        while view:
            view = view[os.write(out, view) :]
    failpoints.hit("adopt.copy.after")
    link = old.with_name(f"{old.name}~adopt")
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(target, old.parent))
    failpoints.hit("adopt.link.before_rename")
    link.rename(old)
    failpoints.hit("adopt.link.after_rename")
    fsync_directory(old.parent)
    report.copied += 1


def _pool_folders(settings: Settings, parsed: xmlstore.ParsedStore) -> Iterator[Path]:
    """Folders of every pool of files; not what else stands beside them."""
    places = {settings.state_dir}
    for change in parsed.changes:
        if isinstance(change, PoolPut) and change.pool.driver in _FILE_DRIVERS:
            places.add(Path(change.pool.options.get("dir_path", str(settings.state_dir))))
    for place in sorted(places):
        for name in ("appvms", "vm-templates", "vm-kernels"):
            folder = place / name
            if folder.is_dir() and not folder.is_symlink():
                yield folder


def _give(folder: Path, owner: Account) -> None:
    """The folder and all below it to the owner; no link is followed."""
    for directory, names, files in os.walk(folder):
        for name in (*names, *files):
            os.chown(Path(directory) / name, owner.uid, owner.gid, follow_symlinks=False)
    os.chown(folder, owner.uid, owner.gid, follow_symlinks=False)


def _make(folder: Path, mode: int, owner: Account | None) -> None:
    folder.mkdir(mode=mode, exist_ok=True)
    if owner is not None:
        os.chown(folder, owner.uid, owner.gid)
