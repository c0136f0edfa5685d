"""qvm-op: operations of the system: what runs, how far it is, and an end to it.

Speaks bulkhead.op.* only, which release 4.4 does not have.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from clients.admin import AdminClient, Event
from clients.cli import tool

COLUMNS = ("ID", "KIND", "STATE", "QUBES", "PROGRESS", "SINCE", "TEXT")
FINAL = ("succeeded", "failed", "cancelled")


def records(api: AdminClient) -> list[Mapping[str, Any]]:
    """Every operation that the system remembers, oldest first."""
    return [json.loads(line) for line in api.lines("bulkhead.op.List")]


def list_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Those under way; with --all also those that are over."""
    chosen = [r for r in records(api) if args.all or r["state"] not in FINAL]
    if args.json:
        tool.as_json(chosen)
    else:
        tool.table([COLUMNS, *(row(record) for record in chosen)])
    return 0


def row(record: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the list."""
    began = datetime.datetime.fromtimestamp(float(record["created"]))
    return (
        str(record["id"]),
        str(record["kind"]),
        str(record["state"]),
        " ".join(record["qubes"]),
        f"{float(record['progress']):.0%}",
        began.strftime("%Y-%m-%d %H:%M:%S"),
        str(record.get("error") or record["text"] or record["step"]),
    )


def resolve(api: AdminClient, text: str) -> str:
    """The id that begins with text, if it is one only."""
    found = [str(r["id"]) for r in records(api) if str(r["id"]).startswith(text)]
    if text in found or not found:
        return text
    if len(found) > 1:
        raise tool.ToolError(f"{len(found)} operations begin with {text}: say more of the id")
    return found[0]


def info_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Everything about one operation."""
    tool.as_json(json.loads(api.text("bulkhead.op.Get", arg=resolve(api, args.id))))
    return 0


def cancel_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Ask operations to end at their next cancel point."""

    def act(text: str) -> None:
        api.call("bulkhead.op.Cancel", arg=resolve(api, text))

    return tool.each(args.ids, act, "cancelled")


def watch_work(args: argparse.Namespace, api: AdminClient) -> int:
    """A line per change; for one operation until it is over, exit status 1 if it failed."""
    number = resolve(api, args.id) if args.id else ""
    bar = tool.Bar(number[:8], quiet=args.quiet or not number)
    state = ""
    method = f"bulkhead.op.Watch+{number}" if number else "bulkhead.op.Watch"
    try:
        for event in api.events(method=method):
            if event.name != "bulkhead-operation":
                continue
            state = event.values["state"]
            if bar.live:
                bar.show(float(event.values["progress"]), event.values["text"])
            else:
                print(_line(event), flush=True)
            if number and state in FINAL:
                break
    finally:
        bar.clear()
    if not number:
        return 0
    if state not in FINAL:
        raise tool.ToolError("the stream ended before the operation did")
    print(f"{number} {state}" + (f": {event.values['error']}" if event.values["error"] else ""))
    return 0 if state == "succeeded" else 1


def _line(event: Event) -> str:
    values = event.values
    share = f"{float(values['progress']):.0%}"
    last = values["error"] or values["text"] or values["step"]
    words = (values["id"], values["kind"], values["state"], values["qubes"], share, last)
    return " ".join(word for word in words if word)


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """The subcommand's part."""
    status: int = args.work(args, api)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = tool.parser("qvm-op", "Look at operations under way, watch and cancel them.")
    made.set_defaults(work=list_work, all=False)
    tool.json_option(made)
    command = tool.commands(made)
    verb = command("list", "list operations", aliases=("ls", "l"))
    verb.set_defaults(work=list_work)
    verb.add_argument("--all", "-a", action="store_true", help="also those that are over")
    tool.json_option(verb, again=True)
    verb = command("info", "show one operation")
    verb.set_defaults(work=info_work)
    verb.add_argument("id", metavar="ID", help="an id, or how it begins")
    verb = command("cancel", "ask operations to end")
    verb.set_defaults(work=cancel_work)
    verb.add_argument("ids", nargs="+", metavar="ID", help="an id, or how it begins")
    verb = command("watch", "print every change as it comes")
    verb.set_defaults(work=watch_work)
    verb.add_argument("id", nargs="?", metavar="ID", help="only this one, until it is over")
    return tool.run(made, work, argv)
