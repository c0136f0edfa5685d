"""Kernels for qubes: hands files to storage through a spool, by the Admin API.

Owns the spool directory's content while an add runs. Must not know where kernels live.
Invariant: storage, which has no right to the operator's files, reads copies that are
its own; they are removed whatever happens.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from bulkhead.config import Settings
from clients.admin import AdminClient


def _client(settings: Settings) -> AdminClient:
    return AdminClient(settings.admin_sockets()["admin"])


def add(
    settings: Settings, name: str, *, vmlinuz: Path, initramfs: Path | None, modules: Path | None
) -> None:
    """Install a kernel; raises the client's AdminError with the daemon's sentence."""
    spool = settings.service_dir("storage") / f"incoming-{secrets.token_hex(6)}"
    spool.mkdir(mode=0o700)
    uid = settings.users.get("storage", os.getuid())
    try:
        lines = []
        for key, source in (("vmlinuz", vmlinuz), ("initramfs", initramfs), ("modules", modules)):
            if source is None:
                continue
            copy = spool / key
            shutil.copyfile(source, copy)
            os.chown(copy, uid, -1)
            lines.append(f"{key}={copy}\n")
        os.chown(spool, uid, -1)
        _client(settings).call(
            "bulkhead.kernel.Add", arg=name, payload="".join(lines).encode(), timeout=300.0
        )
    finally:
        shutil.rmtree(spool, ignore_errors=True)


def remove(settings: Settings, name: str) -> None:
    """Remove a kernel that no qube needs."""
    _client(settings).call("bulkhead.kernel.Remove", arg=name, timeout=60.0)


def listing(settings: Settings) -> list[str]:
    """One line a kernel."""
    return _client(settings).call("bulkhead.kernel.List", timeout=30.0).decode().splitlines()
