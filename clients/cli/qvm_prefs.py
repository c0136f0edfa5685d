"""qvm-prefs: look at and change a qube's properties."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from clients.admin import AdminClient
from clients.cli import tool

# Properties whose value is a qube; "none" means no qube.
REFERENCES = (
    "default_dispvm",
    "netvm",
    "template",
    "guivm",
    "audiovm",
    "management_dispvm",
    "relayvm",
)


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """List, get, set or reset."""
    if args.help_properties:
        for name in api.lines("admin.vm.property.List", args.qube):
            print(f"{name}\n    {api.text('admin.vm.property.Help', args.qube, name)}")
        return 0
    if not args.property:
        return _list(args, api)
    if args.default:
        if args.value is not None:
            raise tool.UsageError("--default takes no value")
        api.reset(args.qube, args.property)
        return 0
    if args.value is None:
        print(api.get(args.qube, args.property).value)
        return 0
    value = args.value
    if args.property in REFERENCES and value.lower() == "none":
        value = ""
    api.set(args.qube, args.property, value)
    return 0


def _list(args: argparse.Namespace, api: AdminClient) -> int:
    values = api.get_all(args.qube)
    if args.json:
        print(json.dumps({n: v.value for n, v in sorted(values.items())}, indent=1))
        return 0
    rows = []
    for name in sorted(values):
        value = values[name]
        text = value.value
        if not text and value.type in ("vm", "label"):
            text = "None"
        rows.append((name, "D" if value.is_default else "-", text))
    tool.table(rows)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = tool.parser("qvm-prefs", "Look at and change a qube's properties.")
    made.add_argument("qube", metavar="VMNAME")
    made.add_argument("property", nargs="?", metavar="PROPERTY")
    made.add_argument("value", nargs="?", metavar="VALUE")
    made.add_argument("--default", "--unset", "-D", action="store_true", help="back to the default")
    made.add_argument("--help-properties", action="store_true", help="say what each one is")
    made.add_argument("--json", action="store_true", help="a JSON object")
    return tool.run(made, work, argv)
