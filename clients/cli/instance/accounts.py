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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from google.protobuf.descriptor import FileDescriptor

from bulkhead.api import (
    control_pb2,
    dispvm_pb2,
    domains_pb2,
    firewall_pb2,
    hostd_pb2,
    lifecycle_pb2,
    options_pb2,
    registry_pb2,
    storage_pb2,
)
from bulkhead.config import SERVICES

PREFIX = "bulkhead-"
DISK_GROUP = "bulkhead-disk"
CLIENT_GROUP = "qubes"
# hostd is the one service that stays root.
ROOT_SERVICES = frozenset({"hostd"})

_FILES: Mapping[str, FileDescriptor] = {
    "registry": registry_pb2.DESCRIPTOR,
    "hostd": hostd_pb2.DESCRIPTOR,
    "storage": storage_pb2.DESCRIPTOR,
    "domains": domains_pb2.DESCRIPTOR,
    "firewall": firewall_pb2.DESCRIPTOR,
    "lifecycle": lifecycle_pb2.DESCRIPTOR,
    "dispvm": dispvm_pb2.DESCRIPTOR,
}


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
    """service -> services whose methods list it as a caller (from the proto options)."""
    found: dict[str, set[str]] = {service: set() for service in SERVICES}
    for callee, file in _FILES.items():
        for descriptor in file.services_by_name.values():
            for method in descriptor.methods:
                access = method.GetOptions().Extensions[options_pb2.access]
                for caller in access.callers:
                    found.setdefault(caller, set()).add(callee)
    # Control is answered by every service; only edges that exist above use it.
    assert control_pb2.DESCRIPTOR.services_by_name
    return {caller: frozenset(callees) for caller, callees in found.items()}


def ensure_accounts() -> dict[str, Account]:
    """Make missing users and groups; returns every service's account. Needs root."""
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
    return accounts


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
            "useradd", "--system", "--no-create-home", "--home-dir", "/nonexistent",
            "--shell", "/usr/sbin/nologin", "--gid", str(gid), name,
        )  # fmt: skip
        return pwd.getpwnam(name).pw_uid


def _tool(program: str, *args: str) -> None:
    path = shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if path is None:
        raise AccountError(f"{program} is not installed: install the package passwd (shadow-utils)")
    done = subprocess.run([path, *args], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        raise AccountError(f"{program} {' '.join(args)} failed: {done.stderr.strip()}")
