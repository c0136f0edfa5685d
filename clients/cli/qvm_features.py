"""qvm-features and qvm-service: features of a qube, and those that switch its services."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from clients.admin import AdminClient
from clients.cli import tool

SERVICE = "service."


def _values(api: AdminClient, qube: str, prefix: str = "") -> dict[str, str]:
    return {
        name.removeprefix(prefix): api.text("admin.vm.feature.Get", qube, name)
        for name in sorted(api.lines("admin.vm.feature.List", qube))
        if name.startswith(prefix)
    }


def features_work(args: argparse.Namespace, api: AdminClient) -> int:
    """List, get, set or unset."""
    if args.feature is None:
        if args.unset:
            raise tool.UsageError("--unset needs a feature")
        values = _values(api, args.qube)
        if args.json:
            tool.as_json(values)
        else:
            tool.table(values.items())
    elif args.unset:
        if args.value is not None:
            raise tool.UsageError("--unset takes no value")
        api.call("admin.vm.feature.Remove", args.qube, args.feature)
    elif args.value is None:
        print(api.text("admin.vm.feature.Get", args.qube, args.feature))
    else:
        api.call("admin.vm.feature.Set", args.qube, args.feature, args.value.encode())
    return 0


def service_work(args: argparse.Namespace, api: AdminClient) -> int:
    """List, get, switch or unset."""
    wanted: bool | None = None if args.value is None else tool.yes(args.value)
    if args.enable or args.disable:
        if wanted is not None:
            raise tool.UsageError("say on or off once")
        wanted = bool(args.enable)
    if args.unset and wanted is not None:
        raise tool.UsageError("--default takes no value")
    if args.service is None:
        if args.unset or wanted is not None:
            raise tool.UsageError("name a service")
        values = {n: "on" if v else "off" for n, v in _values(api, args.qube, SERVICE).items()}
        if args.json:
            tool.as_json(values)
        else:
            tool.table(values.items())
        return 0
    feature = SERVICE + args.service
    if args.unset:
        api.call("admin.vm.feature.Remove", args.qube, feature)
    elif wanted is None:
        print("on" if api.call("admin.vm.feature.Get", args.qube, feature) else "off")
    else:
        api.call("admin.vm.feature.Set", args.qube, feature, b"1" if wanted else b"")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvm-features."""
    made = tool.parser("qvm-features", "Look at and change a qube's features.")
    made.add_argument("qube", metavar="VMNAME")
    made.add_argument("feature", nargs="?", metavar="FEATURE")
    made.add_argument("value", nargs="?", metavar="VALUE", help="an empty one means false")
    made.add_argument(
        "--unset", "--default", "--delete", "-D", action="store_true", help="take it away"
    )
    tool.json_option(made)
    return tool.run(made, features_work, argv)


def service(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvm-service."""
    made = tool.parser("qvm-service", "Switch services of a qube on and off.")
    made.add_argument("qube", metavar="VMNAME")
    made.add_argument("service", nargs="?", metavar="SERVICE")
    made.add_argument("value", nargs="?", metavar="on|off")
    how = made.add_mutually_exclusive_group()
    how.add_argument("--enable", "-e", action="store_true", help="the same as on")
    how.add_argument("--disable", "-d", action="store_true", help="the same as off")
    how.add_argument(
        "--default", "--unset", "--delete", "-D", dest="unset", action="store_true",
        help="leave it to the qube",
    )  # fmt: skip
    how.add_argument("--list", "-l", action="store_true", help=argparse.SUPPRESS)
    tool.json_option(made)
    return tool.run(made, service_work, argv)
