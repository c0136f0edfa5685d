"""qvm-remove: remove qubes with their data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from clients.admin import AdminClient, exceptions
from clients.cli import tool

# Properties that refer to a qube: who has one of them set to it keeps it from going.
SYSTEM = (
    "default_dispvm",
    "default_netvm",
    "default_guivm",
    "default_audiovm",
    "default_template",
    "clockvm",
    "updatevm",
    "management_dispvm",
)
OF_QUBES = ("template", "netvm", "guivm", "audiovm", "default_dispvm", "management_dispvm")


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """Ask, then remove each; who depends on one that stays is told."""
    names = tool.selected(args, api.qubes() if args.all or _patterns(args.names) else [])
    if not names:
        return 0
    if not args.force:
        print("This removes for good, with all data:")
        for name in names:
            print(f"  {name}")
        if not tool.confirm("Remove?"):
            tool.complain("nothing was removed")
            return 1

    def act(name: str) -> None:
        try:
            with tool.progress(api, f"removing {name}", kind="REMOVE", qube=name, quiet=args.quiet):
                api.call("admin.vm.Remove", name)
        except exceptions.QubesVMInUseError as error:
            users = dependants(api, name)
            if users:
                raise tool.ToolError(f"{tool.sentence(error)} (used by: {', '.join(users)})") from (
                    error
                )
            raise

    return tool.each(names, act, "removed")


def _patterns(names: Sequence[str]) -> bool:
    return any(sign in name for name in names for sign in "*?[")


def dependants(api: AdminClient, name: str) -> list[str]:
    """Every "QUBE.PROPERTY" or "system.PROPERTY" whose stored value is the qube."""
    found = []
    for prop in SYSTEM:
        try:
            value = api.get("", prop)
        except tool.FAILURES:
            continue
        if value.value == name and not value.is_default:
            found.append(f"system.{prop}")
    for line in api.qubes():
        if line.name == name:
            continue
        try:
            values = api.get_all(line.name)
        except tool.FAILURES:
            continue
        for prop in OF_QUBES:
            held = values.get(prop)
            if held is not None and held.value == name and not held.is_default:
                found.append(f"{line.name}.{prop}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = tool.parser("qvm-remove", "Remove qubes with all their data.")
    tool.selection(made, "every qube but dom0")
    made.add_argument("--force", "-f", action="store_true", help="do not ask")
    return tool.run(made, work, argv)
