"""Directories of an instance: who owns them, with which mode.

Owns the tree below --root. Must not write into the store. Invariant: nobody but its
owner can write a directory, and only a service's group can reach its sockets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bulkhead import extensions
from bulkhead.config import SERVICES, Settings
from clients.cli.instance.accounts import Account, client_gid, disk_gid


def ensure(settings: Settings, accounts: Mapping[str, Account], pool_dir: Path | None) -> None:
    """Make or mend every directory; with no accounts all belong to the present user.

    pool_dir is where the pool varlibqubes keeps its files (default: the state dir).
    """
    _directory(settings.root, 0o755)
    for path in ("var", "var/lib", "var/log", "etc"):
        _directory(settings.root / path, 0o755)
    if not (settings.root / "run").exists():
        _directory(settings.root / "run", 0o755)
    _directory(settings.log_dir, 0o755)
    _directory(settings.log_dir / "console", 0o2770, _with_disk_group(accounts.get("domains")))
    _directory(settings.log_dir / "audit", 0o750, accounts.get("adminapi"))
    _directory(settings.etc_dir, 0o755)
    if not (settings.run_dir / "qubes").exists():  # policy made at run time
        _directory(settings.run_dir / "qubes", 0o755)
    _directory(settings.bus_dir, 0o755)
    _directory(
        settings.callers_dir,
        0o2710 if accounts else 0o700,
        _with_client_group(accounts.get("adminapi")),
    )
    # 0711: storage and firewall reach their own folders below but cannot list or write here.
    _directory(settings.state_dir, 0o711, accounts.get("registry"))
    pool = pool_dir or settings.state_dir
    if pool != settings.state_dir:
        _directory(pool, 0o711)
    for name in ("appvms", "vm-templates"):
        _directory(pool / name, 0o711, accounts.get("storage"))
    kernels = settings.kernels_dir if pool == settings.state_dir else pool / "vm-kernels"
    _directory(kernels, 0o711, accounts.get("storage"))
    if pool != settings.state_dir:
        # Quarantine and new prefixes are made by storage itself.
        _own(pool, 0o711, accounts.get("storage"))
    _directory(settings.rules_dir, 0o700, accounts.get("firewall"))
    etc = settings.root / "etc/bulkhead"
    _directory(etc, 0o755)
    _directory(etc / "extensions", 0o755)
    for extension in extensions.load(settings.root):
        _directory(
            settings.service_dir(extension.service),
            0o2710 if accounts else 0o700,
            accounts.get(extension.service),
        )
    for service in (*SERVICES, "simhv", "libvirt"):
        owner = accounts.get("domains" if service in ("simhv", "libvirt") else service)
        _directory(settings.service_dir(service), 0o2710 if accounts else 0o700, owner)


def _with_client_group(account: Account | None) -> Account | None:
    """The account with the group that may use the Admin API, where there is one."""
    gid = client_gid()
    return replace(account, gid=gid) if account is not None and gid is not None else account


def _with_disk_group(account: Account | None) -> Account | None:
    """The account with the group of running images, to which QEMU's user belongs."""
    return replace(account, gid=disk_gid()) if account is not None else None


def _directory(path: Path, mode: int, owner: Account | None = None) -> None:
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    if owner is not None or path.stat().st_uid == os.getuid():
        _own(path, mode, owner)


def _own(path: Path, mode: int, owner: Account | None) -> None:
    if owner is not None:
        os.chown(path, owner.uid, owner.gid)
    path.chmod(mode)
