"""Looks at an instance for known troubles and says how to mend each.

Owns the checks. Reads only; the one thing that it asks for is lifecycle's sweep, which
quarantines stray volumes and reports. Invariant: every finding names an object, what is
wrong with it, and a command or step that mends it.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bulkhead.bus.errors import BusError
from bulkhead.config import SERVICES, Settings, SettingsError
from clients.cli.instance import operator, policy
from clients.cli.instance.accounts import DISK_GROUP, disk_gid

# The widest mode that each kind of path may have.
SOCKET_DIRECTORY_MODE = 0o2710


@dataclass(frozen=True, slots=True)
class Finding:
    """One trouble: what it is about, what is wrong, what to do."""

    object: str
    problem: str
    remedy: str


def examine(root: Path) -> list[Finding]:
    """Every finding for the instance below root, running or not."""
    findings = [*_files(Settings(root=root)), *_policy(Settings(root=root))]
    try:
        settings = Settings.load(root)
        launcher = json.loads((settings.bus_dir / "launcher.json").read_text())
    except (SettingsError, OSError, ValueError):
        findings.append(
            Finding(str(root), "no instance runs here", f"start it: bulkhead run --root {root}")
        )
        return findings
    findings.extend(_services(settings, launcher))
    findings.extend(_store(settings))
    findings.extend(_sockets(settings))
    findings.extend(_images(settings))
    findings.extend(_sweep(settings))
    return findings


def _files(settings: Settings) -> Iterator[Finding]:
    if not settings.journal_file.exists():
        yield Finding(
            str(settings.journal_file),
            "the journal is missing",
            f"bulkhead init --root {settings.root} makes a new store; where qubes.xml exists, "
            "bulkhead run takes it over and begins a new journal",
        )
    if not settings.store_file.exists():
        yield Finding(
            str(settings.store_file),
            "qubes.xml is missing",
            "bulkhead run writes it again from the journal's last checkpoint",
        )


def _policy(settings: Settings) -> Iterator[Finding]:
    for problem in policy.lint(settings):
        yield Finding("policy", problem, f"mend the file: {policy.REMEDY}")


def _services(settings: Settings, launcher: dict[str, object]) -> Iterator[Finding]:
    for row in operator.health_of_all(settings, launcher):
        log = settings.log_dir / f"{row['service']}.log"
        if not row["ready"]:
            yield Finding(
                f"service {row['service']}", row["reason"] or "is not ready", f"read {log}"
            )
        elif row["restarts"] > 2:
            yield Finding(
                f"service {row['service']}",
                f"was started {row['restarts']} times again",
                f"read {log}",
            )
        if row["lag_s"] > 5:
            yield Finding(
                f"service {row['service']}",
                f"its replica is {row['lag_s']} s old",
                f"read {log}; a stop and start of the instance resynchronises",
            )


def _store(settings: Settings) -> Iterator[Finding]:
    try:
        status = operator.store_status(settings)
    except (BusError, SettingsError) as error:
        yield Finding("store", f"the registry does not answer: {error}", "read registry.log")
        return
    if status.foreign_edit:
        yield Finding(
            str(settings.store_file),
            f"was edited by hand:\n{status.foreign_difference}",
            "bulkhead resolve --adopt takes the edit over, --discard writes over it",
        )
    for entry in status.quarantined:
        name, _, why = entry.partition(": ")
        yield Finding(
            f"qube {name}",
            f"is quarantined: {why}",
            "repair it with qvm-prefs, or remove it with qvm-remove",
        )
    for warning in status.warnings:
        yield Finding("store", warning, "see docs/operations.md")


def _sockets(settings: Settings) -> Iterator[Finding]:
    for service in SERVICES:
        path = settings.service_dir(service)
        if not path.exists():
            continue
        status = path.stat()
        mode = stat.S_IMODE(status.st_mode)
        if mode & ~SOCKET_DIRECTORY_MODE:
            yield Finding(
                str(path),
                f"has mode {mode:04o}: others can reach its sockets",
                f"chmod {SOCKET_DIRECTORY_MODE:04o} {path}",
            )
        expected = settings.users.get(service, os.getuid())
        if status.st_uid != expected:
            yield Finding(
                str(path),
                f"belongs to uid {status.st_uid}, not {expected}",
                "stop the instance and start it again, which mends it",
            )


def _images(settings: Settings) -> Iterator[Finding]:
    """Can QEMU's user open the images of running qubes?"""
    uid = settings.qemu_uid
    if uid is None or os.getuid() != 0 or settings.hypervisor.startswith(("sim:", "xen")):
        return
    disk = disk_gid()
    for image in settings.state_dir.glob("appvms/*/*-dirty.img"):
        done = subprocess.run(
            ["/usr/bin/test", "-r", str(image)],
            check=False,
            timeout=10,
            user=uid,
            group=disk,
            extra_groups=[disk],
        )
        if done.returncode != 0:
            yield Finding(
                str(image),
                f"{settings.qemu_user}, who runs QEMU, cannot read it",
                f"chgrp {DISK_GROUP} {image}; chmod g+rw {image}",
            )


def _sweep(settings: Settings) -> Iterator[Finding]:
    try:
        for sentence in operator.sweep(settings):
            yield Finding("sweep", sentence, "look at the named object; nothing was deleted")
    except (BusError, SettingsError) as error:
        yield Finding("sweep", f"was not possible: {error}", "mend what is named above first")
