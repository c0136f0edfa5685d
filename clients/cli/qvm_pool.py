"""qvm-pool: storage pools."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from clients.admin import AdminClient
from clients.cli import tool

SETTABLE = ("revisions_to_keep", "ephemeral_volatile")


def list_work(args: argparse.Namespace, api: AdminClient) -> int:
    """One line per pool."""
    rows = [
        (name, api.info("admin.pool.Info", arg=name).get("driver", ""))
        for name in api.lines("admin.pool.List")
    ]
    tool.show(args, ("NAME", "DRIVER"), rows)
    return 0


def info_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Everything about one pool."""
    info = {"name": args.pool, **api.info("admin.pool.Info", arg=args.pool)}
    for key, value in api.info("admin.pool.UsageDetails", arg=args.pool).items():
        info.setdefault(key, value)
    if args.json:
        tool.as_json(info)
    else:
        tool.table(info.items())
    return 0


def drivers_work(args: argparse.Namespace, api: AdminClient) -> int:
    """One line per driver."""
    rows = []
    for line in api.lines("admin.pool.ListDrivers"):
        driver, _, options = line.partition(" ")
        rows.append((driver, ", ".join(options.split())))
    tool.show(args, ("DRIVER", "OPTIONS"), rows)
    return 0


def options_of(texts: Sequence[str]) -> dict[str, str]:
    """-o KEY=VALUE[,KEY=VALUE]... UsageError."""
    found: dict[str, str] = {}
    for text in texts:
        for item in text.split(","):
            key, value = tool.pair("--option", item, "KEY=VALUE")
            if key in found:
                raise tool.UsageError(f"option {key} is given twice")
            found[key] = value
    return found


def add_work(args: argparse.Namespace, api: AdminClient) -> int:
    """A new pool."""
    options = options_of(args.option)
    if "name" in options:
        raise tool.UsageError("the name is not an option")
    lines = "".join(f"{k}={v}\n" for k, v in {"name": args.pool, **options}.items())
    with tool.progress(api, f"adding {args.pool}", kind="POOL_ADD", quiet=args.quiet):
        api.call("admin.pool.Add", arg=args.driver, payload=lines.encode())
    return 0


def set_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Change what can be changed of a pool."""
    options = options_of(args.option)
    if not options:
        raise tool.UsageError("say what: -o revisions_to_keep=2")
    for key in options:
        if key not in SETTABLE:
            raise tool.UsageError(f"{key} cannot be changed; {' and '.join(SETTABLE)} can")
    for key, value in options.items():
        api.call(f"admin.pool.Set.{key}", arg=args.pool, payload=value.encode())
    return 0


def remove_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Forget pools; their data must be gone already."""
    return tool.each(args.pools, lambda pool: api.call("admin.pool.Remove", arg=pool), "removed")


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """The subcommand's part."""
    status: int = args.work(args, api)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = tool.parser("qvm-pool", "Look at and change storage pools.")
    made.set_defaults(work=list_work)
    tool.json_option(made)
    command = tool.commands(made)

    verb = command("list", "list pools", aliases=("ls", "l"))
    verb.set_defaults(work=list_work)
    tool.json_option(verb, again=True)

    verb = command("info", "show one pool", aliases=("i",))
    verb.set_defaults(work=info_work)
    verb.add_argument("pool", metavar="POOL")
    tool.json_option(verb, again=True)

    verb = command("drivers", "list drivers and their options", aliases=("d",))
    verb.set_defaults(work=drivers_work)
    tool.json_option(verb, again=True)

    verb = command("add", "add a pool", aliases=("a",))
    verb.set_defaults(work=add_work)
    verb.add_argument("pool", metavar="POOL")
    verb.add_argument("driver", metavar="DRIVER")
    _option(verb)

    verb = command("set", "change a pool", aliases=("s",))
    verb.set_defaults(work=set_work)
    verb.add_argument("pool", metavar="POOL")
    _option(verb)

    verb = command("remove", "forget pools", aliases=("rm", "r"))
    verb.set_defaults(work=remove_work)
    verb.add_argument("pools", nargs="+", metavar="POOL")
    return tool.run(made, work, argv)


def _option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--option",
        "-o",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the driver; several with commas",
    )
