"""Which qubes start with the machine: links to a unit template.

Owns the links in one directory below the instance's root. Must not know qubes. The
method blocks shortly. Invariant: only names of the form qubes-vm@NAME.service are
made or removed, and only if what is there is a link.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from bulkhead import durable, failpoints
from services.hostd import failpoint_table  # noqa: F401  (declares the rows)

TEMPLATE = Path("/usr/lib/systemd/system/qubes-vm@.service")


class Autostart:
    """Links ROOT/etc/systemd/system/multi-user.target.wants/qubes-vm@NAME.service."""

    def __init__(self, root: Path) -> None:
        self._directory = root / "etc/systemd/system/multi-user.target.wants"

    def set(self, qube: str, enabled: bool) -> None:
        """Repeatable. OSError, also where something that is no link has the name."""
        path = self._directory / f"qubes-vm@{qube}.service"
        failpoints.hit("hostd.autostart.before_link")
        if path.exists() and not path.is_symlink():
            raise FileExistsError(f"{path} is no link; remove it by hand")
        if not enabled:
            durable.unlink(path)
        elif not path.is_symlink() or path.readlink() != TEMPLATE:
            self._directory.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}~{secrets.token_hex(4)}")
            temporary.symlink_to(TEMPLATE)
            durable.rename(temporary, path)
        failpoints.hit("hostd.autostart.after_link")
