"""qvm-prefs and qubes-prefs: look at and change properties of a qube or of the system.

Owns how a property's value is written for people. Must not know what properties there are.
Invariant: what is printed for a value can be given to set it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from clients.admin import AdminClient, PropertyValue
from clients.cli import tool

_NO_QUBE = "None"


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """List, get, set or reset; args.qube "" = the system."""
    if args.help_properties:
        method = "admin.vm.property" if args.qube else "admin.property"
        dest = args.qube or "dom0"
        for name in api.lines(f"{method}.List", dest):
            print(f"{name}\n    {api.text(f'{method}.Help', dest, name)}")
        return 0
    if not args.property:
        if args.default:
            raise tool.UsageError("--default needs a property")
        return _list(args, api)
    if args.default:
        if args.value is not None:
            raise tool.UsageError("--default takes no value")
        api.reset(args.qube, args.property)
        return 0
    if args.value is None:
        print(shown(api.get(args.qube, args.property)))
        return 0
    put(api, args.qube, args.property, args.value)
    return 0


def put(api: AdminClient, qube: str, name: str, typed: str) -> None:
    """Set a property to what was typed: "none" is no qube where one is meant."""
    value = "" if typed.lower() == "none" and api.get(qube, name).type == "vm" else typed
    api.set(qube, name, value)


def shown(value: PropertyValue) -> str:
    """A value for people."""
    return value.value or (_NO_QUBE if value.type in ("vm", "label") else "")


def _list(args: argparse.Namespace, api: AdminClient) -> int:
    values = api.get_all(args.qube)
    chosen = [
        values[name]
        for name in sorted(values)
        if not (args.hide_default and values[name].is_default)
    ]
    if args.json:
        tool.as_json({value.name: value.value for value in chosen})
    else:
        tool.table((v.name, _mark(v), shown(v)) for v in chosen)
    return 0


def _mark(value: PropertyValue) -> str:
    """D by default, U without any value, - set."""
    if not value.value and value.type in ("int", "bool"):
        return "U"
    return "D" if value.is_default else "-"


def _options(made: argparse.ArgumentParser) -> None:
    made.add_argument("property", nargs="?", metavar="PROPERTY")
    made.add_argument("value", nargs="?", metavar="VALUE", help="none = no qube")
    made.add_argument("--default", "--unset", "-D", action="store_true", help="back to the default")
    made.add_argument("--hide-default", action="store_true", help="list only what is set")
    made.add_argument("--help-properties", action="store_true", help="say what each one is")
    tool.json_option(made)
    # These say what the operands say already; scripts use them.
    for option, letter in (("--get", "-g"), ("--set", "-s"), ("--list", "-l")):
        made.add_argument(option, letter, action="store_true", help=argparse.SUPPRESS)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvm-prefs."""
    made = tool.parser("qvm-prefs", "Look at and change a qube's properties.")
    made.add_argument("qube", metavar="VMNAME")
    _options(made)
    return tool.run(made, work, argv)


def system(argv: Sequence[str] | None = None) -> int:
    """Entry point of qubes-prefs."""
    made = tool.parser("qubes-prefs", "Look at and change properties of the whole system.")
    _options(made)
    made.set_defaults(qube="")
    return tool.run(made, work, argv)
