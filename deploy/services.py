"""The tree of /etc/qubes-rpc: what qrexec finds for each call.

Owns which calls are links to the Admin API's socket and which are programs. Must not
decide which calls exist: that table is adminapi's. Invariant: each name is one or the
other, and nothing that no socket answers is a link.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from services.adminapi.core.calls import CALLS

SOCKET = "../../var/run/qubesd.sock"
PROGRAMS = Path(__file__).with_name("qubes-rpc")
# Release 4.4 serves these to the administration qube only.
_LOCAL = frozenset({
    "admin.vm.Suspend", "admin.vm.Resume",
    "admin.vm.Create.RemoteVM", "admin.vm.CreateInPool.RemoteVM",
})  # fmt: skip


def programs() -> dict[str, str]:
    """Name -> text with @PYTHON@ for the interpreter."""
    return {path.name: path.read_text() for path in sorted(PROGRAMS.iterdir())}


def links() -> Iterator[str]:
    """Names that are links to SOCKET, sorted."""
    known = programs()
    for name, call in sorted(CALLS["admin"].items()):
        # Opening sockets of callers is this machine's own business.
        local = name in _LOCAL or name.startswith("bulkhead.caller.")
        if call.handler and not local and name not in known:
            yield name
