"""docs/admin-api.md, made from the call table and the handlers' own descriptions.

Owns the page's text. Must not know how calls work. Invariant: the page says nothing of
a call that the table does not say; a test fails while the two differ.

    python -m services.adminapi.reference > docs/admin-api.md
"""

from __future__ import annotations

import inspect
import sys

from services.adminapi.actions import Actions
from services.adminapi.core.calls import DEVICE_CLASSES, QUBE_CLASSES, Call, all_calls
from services.adminapi.core.reads import READS
from services.adminapi.core.writes import WRITES

_STREAMS = {
    "events": "Every event that concerns the destination, connection-established first.",
    "events_resumable": "As admin.Events, with the position behind each event; from a position on.",
    "stats": "A vm-stats event per running qube and stats_interval.",
    "import_hold": "A stream without events; closed before ImportEnd it ends the import as failed.",
    "op_watch": "bulkhead-operation at each move of an operation; with its id, up to its end.",
}
_HEAD = """# The Admin API

Made by `python -m services.adminapi.reference`; do not edit. The wire protocol is that of
Qubes OS release 4.4; what differs on purpose is in `deviations.md`. Names that start with
`bulkhead.` are additions with the same framing and policy.

Columns: **D** destination (`0` dom0 only, `V` any other, `*` any), **A** argument and **P**
payload (`-` none, `!` required, `?` optional), **Effect** (`ro` reads, `rwx` changes),
**Scope** (which policy include file a rule belongs to).
"""


def _describe(call: Call) -> str:
    name = call.handler
    function: object = READS.get(name) or WRITES.get(name) or getattr(Actions, name or "-", None)
    if name in _STREAMS:
        return _STREAMS[name]
    if function is None:
        return "Answered by an executable in `/etc/qubes-rpc`, which uses `internal.vm.volume.*`."
    text = inspect.getdoc(function) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def _rows(prefix: str) -> list[str]:
    """One line per call of the prefix; parametrised ones once, with their parameter."""
    lines: dict[str, str] = {}
    for call in all_calls():
        if not call.name.startswith(prefix):
            continue
        name = call.name
        if call.param in QUBE_CLASSES:
            name = name.removesuffix(call.param) + "CLASS"
        elif call.param in DEVICE_CLASSES:
            name = name.replace(f".{call.param}.", ".DEVCLASS.")
        lines[name] = (
            f"| `{name}` | {call.dest} | {call.arg} | {call.payload} | {call.effect} "
            f"| {call.scope or 'none'} | {_describe(call)} |"
        )
    return [lines[name] for name in sorted(lines)]


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    for title, prefix in (
        ("admin socket", "admin."),
        ("internal socket", "internal."),
        ("misc socket", "qubes."),
        ("additions, on the admin socket", "bulkhead."),
    ):
        parts.append(f"\n## Calls: {title}\n\n| Call | D | A | P | Effect | Scope | What |\n")
        parts.append("|---|---|---|---|---|---|---|\n")
        parts += [row + "\n" for row in _rows(prefix)]
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
