"""qvm-tags: tags of a qube."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from clients.admin import AdminClient
from clients.cli import tool


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """List, add or take away; with list TAG the exit status says whether it is there."""
    if args.act in ("add", "del"):
        method = "admin.vm.tag.Set" if args.act == "add" else "admin.vm.tag.Remove"
        for tag in args.tags:
            api.call(method, args.qube, tag)
        return 0
    if args.tag is not None:
        there = api.text("admin.vm.tag.Get", args.qube, args.tag) == "1"
        if there:
            print(args.tag)
        return 0 if there else 1
    tags = api.lines("admin.vm.tag.List", args.qube)
    if args.json:
        tool.as_json(tags)
    else:
        for tag in tags:
            print(tag)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = tool.parser("qvm-tags", "Look at and change a qube's tags.")
    made.add_argument("qube", metavar="VMNAME")
    made.set_defaults(act="list", tag=None)
    tool.json_option(made)
    command = tool.commands(made)
    verb = command("list", "list tags", aliases=("ls", "l"))
    verb.set_defaults(act="list")
    verb.add_argument("tag", nargs="?", metavar="TAG", help="only say whether this one is there")
    tool.json_option(verb, again=True)
    verb = command("add", "add tags", aliases=("a", "set"))
    verb.set_defaults(act="add")
    verb.add_argument("tags", nargs="+", metavar="TAG")
    verb = command("del", "take tags away", aliases=("d", "remove", "unset"))
    verb.set_defaults(act="del")
    verb.add_argument("tags", nargs="+", metavar="TAG")
    return tool.run(made, work, argv)
