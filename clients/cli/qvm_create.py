"""qvm-create: make a new qube."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from clients.admin import AdminClient
from clients.cli import qvm_clone, qvm_prefs, qvm_volume, tool

WITH_TEMPLATE = ("AppVM", "DispVM")


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """Create, then set the properties that were asked for; a failure there removes it again."""
    if args.help_classes:
        print("\n".join(api.lines("admin.vmclass.List")))
        return 0
    if not args.name:
        raise tool.UsageError("a name is needed")
    settings = dict(tool.pair("--property", text) for text in args.property)
    label = args.label or settings.pop("label", "red" if args.disp else "")
    template = args.template or settings.pop("template", "")
    for key, option in (("label", args.label), ("template", args.template), ("name", args.name)):
        if option and key in settings:
            raise tool.UsageError(f"{key} is given twice")
    if not label:
        raise tool.UsageError("a label is needed: --label red")
    klass = "DispVM" if args.disp else "StandaloneVM" if args.standalone else args.klass
    root = args.root_copy_from or args.root_move_from
    pools = qvm_clone.pool_words(args.pool)
    if template and klass == "StandaloneVM":
        qvm_clone.clone(
            api,
            template,
            args.name,
            klass=klass,
            pools=pools,
            ignore_errors=False,
            quiet=args.quiet,
        )
        # Its root is the template's, the rest is its own.
        settings = {"label": label, **settings}
    elif template and klass not in WITH_TEMPLATE:
        raise tool.UsageError(f"a {klass} has no template; qvm-clone copies one")
    else:
        _create(args, api, klass, template, [f"name={args.name}", f"label={label}"], pools)
    try:
        if template and klass == "StandaloneVM":
            api.call("admin.vm.volume.Clear", args.name, "private")
        for key, value in settings.items():
            qvm_prefs.put(api, args.name, key, value)
        if root:
            qvm_volume.bring(api, f"{args.name}:root", root, None, resize=True, quiet=args.quiet)
    except BaseException:
        api.call("admin.vm.Remove", args.name)
        raise
    if args.root_move_from:
        Path(args.root_move_from).unlink()
    return 0


def _create(
    args: argparse.Namespace,
    api: AdminClient,
    klass: str,
    template: str,
    words: Sequence[str],
    pools: Sequence[str],
) -> None:
    method = "admin.vm.CreateInPool" if pools else "admin.vm.Create"
    with tool.progress(api, f"creating {args.name}", kind="CREATE", quiet=args.quiet):
        api.call(f"{method}.{klass}", arg=template, payload=" ".join([*words, *pools]).encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = tool.parser("qvm-create", "Make a new qube.")
    made.add_argument("name", nargs="?", metavar="VMNAME")
    kind = made.add_mutually_exclusive_group()
    kind.add_argument("--class", "-C", dest="klass", default="AppVM", metavar="CLASS")
    kind.add_argument(
        "--standalone", "-S", action="store_true", help="the same as --class StandaloneVM"
    )
    kind.add_argument(
        "--disp", action="store_true", help="a named disposable: --class DispVM --label red"
    )
    made.add_argument("--label", "-l", metavar="LABEL")
    made.add_argument(
        "--template",
        "-t",
        metavar="VMNAME",
        help="for a StandaloneVM: whose root and settings it begins with",
    )
    made.add_argument("--property", "--prop", action="append", default=[], metavar="NAME=VALUE")
    made.add_argument(
        "--pool",
        "-P",
        "-p",
        action="append",
        default=[],
        metavar="POOL|VOLUME=POOL",
        help="where its volumes go",
    )
    source = made.add_mutually_exclusive_group()
    source.add_argument(
        "--root-copy-from", "-r", metavar="FILE", help="import its root volume from a file"
    )
    source.add_argument(
        "--root-move-from", "-R", metavar="FILE", help="the same, and remove the file then"
    )
    made.add_argument("--help-classes", action="store_true", help="list classes")
    return tool.run(made, work, argv)
