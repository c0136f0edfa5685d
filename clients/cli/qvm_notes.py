"""qvm-notes: the notes of a qube."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from clients.admin import AdminClient
from clients.cli import tool


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """Print, replace, extend, delete or edit; print where there is nothing to edit on."""
    if args.set is not None:
        _store(api, args.qube, args.set)
    elif args.append is not None:
        before = load(api, args.qube)
        gap = "\n" if before and not before.endswith("\n") else ""
        _store(api, args.qube, before + gap + args.append)
    elif args.file is not None:
        text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text()
        before = load(api, args.qube)
        if before and before != text and not args.force:
            raise tool.ToolError(f"{args.qube} has notes; --force replaces them")
        _store(api, args.qube, text)
    elif args.delete:
        if not args.force and not tool.confirm(f"Delete the notes of {args.qube}?"):
            tool.complain("nothing was deleted")
            return 1
        _store(api, args.qube, "")
    elif args.print or not (args.edit or sys.stdin.isatty()):
        text = load(api, args.qube)
        if text:
            print(text, end="" if text.endswith("\n") else "\n")
    else:
        _edit(api, args.qube)
    return 0


def load(api: AdminClient, qube: str) -> str:
    """The notes."""
    return api.text("admin.vm.notes.Get", qube)


def _store(api: AdminClient, qube: str, text: str) -> None:
    api.call("admin.vm.notes.Set", qube, payload=text.encode())


def _edit(api: AdminClient, qube: str) -> None:
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    before = load(api, qube)
    with tempfile.TemporaryDirectory(prefix="qvm-notes-") as directory:
        path = Path(directory) / f"{qube}.txt"
        path.write_text(before)
        done = subprocess.run([*shlex.split(editor), str(path)], check=False)
        if done.returncode:
            raise tool.ToolError(f"{editor} ended with {done.returncode}; nothing was changed")
        after = path.read_text()
    if after != before:
        _store(api, qube, after)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = tool.parser("qvm-notes", "Look at and change a qube's notes.")
    made.add_argument("qube", metavar="VMNAME")
    made.add_argument("--force", "-f", action="store_true", help="do not ask")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--edit", "-e", action="store_true", help="in an editor, the default")
    what.add_argument("--print", "-p", action="store_true", help="print them")
    what.add_argument("--import", "-i", dest="file", metavar="FILE", help="from a file, or -")
    what.add_argument("--set", "-s", metavar="TEXT", help="replace them")
    what.add_argument("--append", metavar="TEXT", help="add a line")
    what.add_argument("--delete", "-d", action="store_true", help="delete them")
    return tool.run(made, work, argv)
