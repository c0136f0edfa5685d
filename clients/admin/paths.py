"""Where the Admin API answers: a unix socket here, or qrexec from inside a qube.

Owns the choice. Must not know the protocol. Invariant: a root that is named is used;
only without one are the system's own paths tried.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT_VARIABLE = "BULKHEAD_ROOT"
SYSTEM = Path("/var")
QREXEC_CLIENT = "/usr/bin/qrexec-client-vm"
_SOCKETS = {
    "admin": "run/qubesd.sock",
    "internal": "run/qubesd.internal.sock",
    "misc": "run/qubesd.misc.sock",
}


def socket_path(root: Path | str | None = None, name: str = "admin") -> Path:
    """The socket below root, else below $BULKHEAD_ROOT, else the system's in /var/run.

    Where the system's Admin API socket is a link into an instance, the others are beside
    what it points to: one link is enough for tools that only know the system's paths.
    """
    chosen = str(root) if root is not None else os.environ.get(ROOT_VARIABLE, "")
    if chosen:
        return Path(chosen).absolute() / _SOCKETS[name]
    admin, place = SYSTEM / _SOCKETS["admin"], SYSTEM / _SOCKETS[name]
    if name == "admin" or not admin.is_symlink():
        return place
    return admin.resolve().with_name(place.name)
