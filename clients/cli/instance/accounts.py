"""The UNIX users and groups of the services.

Owns account names and their creation. Must not know what services do. Invariant:
a service's user is in the groups of exactly those services that the proto options let
it call, because a service's socket directory admits its group only.
"""

from __future__ import annotations

import grp
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from bulkhead.bus.methods import METHODS
from bulkhead.config import SERVICES

PREFIX = "bulkhead-"
DISK_GROUP = "bulkhead-disk"
CLIENT_GROUP = "qubes"
# hostd is the one service that stays root.
ROOT_SERVICES = frozenset({"hostd"})


class AccountError(RuntimeError):
    """A user or group could not be made; the message carries the tool's words."""


@dataclass(frozen=True, slots=True)
class Account:
    """User of one service; groups are the supplementary gids it needs."""

    service: str
    uid: int
    gid: int
    groups: tuple[int, ...]


@cache
def callees() -> dict[str, frozenset[str]]:
    """service -> services whose methods list it as a caller (from the proto options).

    Control is answered by every service; it needs no edge that is not there anyway.
    """
    found: dict[str, set[str]] = {service: set() for service in SERVICES}
    for method in METHODS.values():
        callee = method.service.rpartition(".")[2].lower()
        if callee in SERVICES:
            for caller in method.callers:
                found.setdefault(caller, set()).add(callee)
    return {caller: frozenset(callees) for caller, callees in found.items()}


def ensure_accounts(extensions: Sequence[str] = ()) -> dict[str, Account]:
    """Make missing users and groups; returns every service's account. Needs root.

    extensions: their names on the bus. Each has a user without any other group; adminapi
    alone is in its group.
    """
    gids = {service: _ensure_group(PREFIX + service) for service in SERVICES}
    disk = _ensure_group(DISK_GROUP)
    accounts: dict[str, Account] = {}
    for service in SERVICES:
        groups = [gids[callee] for callee in sorted(callees().get(service, ()))]
        if service == "storage":
            groups.append(disk)
        if service in ROOT_SERVICES:
            accounts[service] = Account(service, 0, gids[service], (*groups, gids[service]))
            continue
        uid = _ensure_user(PREFIX + service, gids[service])
        accounts[service] = Account(service, uid, gids[service], tuple(groups))
    for name in extensions:
        gid = _ensure_group(PREFIX + name)
        accounts[name] = Account(name, _ensure_user(PREFIX + name, gid), gid, ())
        asker = accounts["adminapi"]
        accounts["adminapi"] = replace(asker, groups=(*asker.groups, gid))
    return accounts


def disk_gid() -> int:
    """gid of the group that may open running images."""
    return grp.getgrnam(DISK_GROUP).gr_gid


def client_gid() -> int | None:
    """gid of the group whose members may use the Admin API socket, None without it."""
    try:
        return grp.getgrnam(CLIENT_GROUP).gr_gid
    except KeyError:
        return None


def _ensure_group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        _tool("groupadd", "--system", name)
        return grp.getgrnam(name).gr_gid


def _ensure_user(name: str, gid: int) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        _tool(
            "useradd",
            "--system",
            "--no-create-home",
            "--home-dir",
            "/nonexistent",
            "--shell",
            "/usr/sbin/nologin",
            "--gid",
            str(gid),
            name,
        )
        return pwd.getpwnam(name).pw_uid


def _tool(program: str, *args: str) -> None:
    path = shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if path is None:
        raise AccountError(f"{program} is not installed: install the package passwd (shadow-utils)")
    done = subprocess.run([path, *args], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        raise AccountError(f"{program} {' '.join(args)} failed: {done.stderr.strip()}")
