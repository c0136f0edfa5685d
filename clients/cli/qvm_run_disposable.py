"""qvm-run-disposable: a fresh disposable, started; its name is printed."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence

from clients.admin import AdminClient, Event
from clients.cli import tool


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """Create, start, print the name; with --wait return when it is gone."""
    # Subscribed before it exists: its end cannot be missed, however short it lives.
    events: Iterator[Event] | None = None
    if args.wait:
        events = api.events()
        next(events, None)
    with tool.progress(api, "creating a disposable", kind="CREATE", quiet=args.quiet):
        name = api.text("admin.vm.CreateDisposable", args.template or "dom0")
    try:
        # A preloaded one is handed out running: Start says so by doing nothing.
        with tool.progress(api, f"starting {name}", kind="START", qube=name, quiet=args.quiet):
            api.call("admin.vm.Start", name)
    except tool.FAILURES:
        _discard(api, name)
        raise
    print(name, flush=True)
    if events is not None and not _gone(events, name):
        raise tool.ToolError(f"the event stream ended before {name} did")
    return 0


def _gone(events: Iterator[Event], name: str) -> bool:
    return any(
        event.name == "domain-delete" and event.values.get("vm", event.subject) == name
        for event in events
    )


def _discard(api: AdminClient, name: str) -> None:
    # It removes itself when it stops; one that never ran has to be removed.
    for method in ("admin.vm.Kill", "admin.vm.Remove"):
        with contextlib.suppress(*tool.FAILURES):
            api.call(method, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = tool.parser("qvm-run-disposable", "Start a fresh disposable and print its name.")
    made.add_argument(
        "template",
        nargs="?",
        metavar="TEMPLATE",
        help="the disposable template (default: default_dispvm)",
    )
    made.add_argument("--wait", action="store_true", help="return when it is gone")
    return tool.run(made, work, argv)
