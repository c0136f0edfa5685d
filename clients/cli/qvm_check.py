"""qvm-check: whether qubes exist, run, are paused ... as an exit status.

Invariant: 0 = all of them, 1 = none, 3 = some.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from clients.admin import AdminClient, QubeLine
from clients.cli import tool

ALL, NONE, SOME = 0, 1, 3


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """Ask, tell, and count."""
    check, words = _question(args, api)
    known = {line.name: line for line in api.qubes()}
    names = tool.selected(args, known.values())
    held = 0
    for name in names:
        line = known.get(name)
        yes = line is not None and check(line)
        held += yes
        if not args.quiet:
            if line is None:
                print(f"{name}: does not exist")
            else:
                print(f"{name}: {words[0] if yes else words[1]}")
    if not held:
        return NONE
    return ALL if held == len(names) else SOME


def _question(
    args: argparse.Namespace, api: AdminClient
) -> tuple[Callable[[QubeLine], bool], tuple[str, str]]:
    if args.running:
        return lambda line: line.state == "Running", ("runs", "does not run")
    if args.paused:
        return lambda line: line.state == "Paused", ("is paused", "is not paused")
    if args.template:
        return lambda line: line.klass == "TemplateVM", ("is a template", "is no template")
    if args.networked:
        return lambda line: _networked(api, line.name), ("has a network", "has no network")
    return lambda line: bool(line.name), ("exists", "does not exist")


def _networked(api: AdminClient, name: str) -> bool:
    values = api.get_all(name)
    if "provides_network" in values and values["provides_network"].value == "True":
        return True
    return "netvm" in values and bool(values["netvm"].value)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = tool.parser("qvm-check", "Ask whether qubes exist, or are in some state.")
    tool.selection(made, "every qube but dom0")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--running", action="store_true", help="they run")
    what.add_argument("--paused", action="store_true", help="they are paused")
    what.add_argument("--template", action="store_true", help="they are templates")
    what.add_argument("--networked", action="store_true", help="they have a network")
    return tool.run(made, work, argv)
