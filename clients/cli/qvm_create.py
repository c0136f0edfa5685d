"""qvm-create: make a new qube."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from clients.admin import AdminClient
from clients.cli import tool

WITH_TEMPLATE = ("AppVM", "DispVM")


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """Create, then set the properties that were asked for; a failure there removes it again."""
    if args.help_classes:
        print("\n".join(api.lines("admin.vmclass.List")))
        return 0
    if not args.name:
        raise tool.UsageError("a name is needed")
    settings = [_pair(text) for text in args.property]
    label = args.label or next((value for key, value in settings if key == "label"), "")
    if not label:
        raise tool.UsageError("a label is needed: --label red")
    template = args.template or next((value for key, value in settings if key == "template"), "")
    if template and args.klass not in WITH_TEMPLATE:
        raise tool.UsageError(f"a {args.klass} has no template; clone the template instead")
    payload = f"name={args.name} label={label}"
    pools = [f" pool:{text}" if "=" in text else f" pool={text}" for text in args.pool]
    method = "admin.vm.CreateInPool" if pools else "admin.vm.Create"
    with tool.progress(api, f"creating {args.name}", kind="CREATE", quiet=args.quiet):
        api.call(
            f"{method}.{args.klass}", arg=template, payload=(payload + "".join(pools)).encode()
        )
    for key, value in settings:
        if key in ("label", "template", "name"):
            continue
        try:
            api.set(args.name, key, value)
        except Exception:
            api.call("admin.vm.Remove", args.name)
            raise
    return 0


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise tool.UsageError(f"--property {text}: say NAME=VALUE")
    return key, value


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = tool.parser("qvm-create", "Make a new qube.")
    made.add_argument("name", nargs="?", metavar="VMNAME")
    made.add_argument("--class", "-C", dest="klass", default="AppVM", metavar="CLASS")
    made.add_argument("--label", "-l")
    made.add_argument("--template", "-t")
    made.add_argument("--property", "--prop", action="append", default=[], metavar="NAME=VALUE")
    made.add_argument("--pool", "-P", action="append", default=[], metavar="POOL or VOLUME=POOL")
    made.add_argument("--help-classes", action="store_true", help="list classes")
    return tool.run(made, work, argv)
