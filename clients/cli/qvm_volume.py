"""qvm-volume: look at volumes, change them, give them data.

Owns how data gets into a volume: through the internal socket of this machine, or as a
stream through qrexec from inside a qube. Invariant: an import that did not bring exactly
the bytes it announced is ended as failed, so the volume keeps what it had.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from clients.admin import AdminClient, importing, wire
from clients.admin.paths import QREXEC_CLIENT
from clients.cli import tool
from clients.cli.rpc import service

SETTABLE = ("rw", "revisions_to_keep", "ephemeral")


def volume_of(text: str) -> tuple[str, str]:
    """VMNAME:VOLUME in two. UsageError."""
    qube, colon, volume = text.partition(":")
    if not colon or not qube or not volume:
        raise tool.UsageError(f"{text}: say VMNAME:VOLUME")
    return qube, volume


# ---- looking


def list_work(args: argparse.Namespace, api: AdminClient) -> int:
    """One line per volume."""
    operands: list[str] = args.names
    whole = {text for text in operands if ":" not in text}
    single = {volume_of(text) for text in operands if ":" in text}
    known = [line.name for line in api.qubes()]
    for name in sorted(whole | {qube for qube, _ in single}):
        if name not in known:
            raise tool.ToolError(f"there is no qube {name}")
    rows: list[tuple[str, ...]] = []
    for qube in known:
        for volume in api.lines("admin.vm.volume.List", qube):
            if operands and qube not in whole and (qube, volume) not in single:
                continue
            info = api.info("admin.vm.volume.Info", qube, volume)
            if args.pool and info.get("pool") != args.pool:
                continue
            revisions = api.lines("admin.vm.volume.ListSnapshots", qube, volume)
            rows.append(
                (
                    f"{info.get('pool', '')}:{info.get('vid', '')}",
                    qube,
                    volume,
                    "Yes" if revisions else "No",
                    info.get("size", ""),
                    info.get("usage", ""),
                )
            )
    columns: tuple[str, ...] = (
        "POOL:VOLUME",
        "VMNAME",
        "VOLUME_NAME",
        "REVERT_POSSIBLE",
        "SIZE",
        "USAGE",
    )
    if not args.full:
        columns, rows = columns[:4], [row[:4] for row in rows]
    tool.show(args, columns, rows)
    return 0


def info_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Everything about one volume, or one property of it."""
    qube, volume = volume_of(args.volume)
    info = api.info("admin.vm.volume.Info", qube, volume)
    if args.property and args.property not in (*info, "revisions"):
        raise tool.ToolError(
            f"a volume has no property {args.property}; it has {', '.join([*info, 'revisions'])}"
        )
    if args.property and args.property != "revisions":
        print(info[args.property])
        return 0
    revisions = api.lines("admin.vm.volume.ListSnapshots", qube, volume)
    if args.property:
        for revision in revisions:
            print(revision)
    elif args.json:
        tool.as_json({**info, "revisions": revisions})
    else:
        tool.table(info.items())
        print("Available revisions (for revert):" + ("" if revisions else " none"))
        for revision in revisions:
            print(f"  {revision}")
    return 0


# ---- changing


def config_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Set one property of a volume."""
    qube, volume = volume_of(args.volume)
    api.call(f"admin.vm.volume.Set.{args.property}", qube, volume, args.value.encode())
    return 0


def resize_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Grow; shrink only when forced."""
    qube, volume = volume_of(args.volume)
    wanted = tool.size(args.size)
    now = int(api.info("admin.vm.volume.Info", qube, volume).get("size") or 0)
    if wanted < now and not args.force:
        raise tool.ToolError(
            f"{args.volume} has {now} bytes; smaller would lose data, --force asks for it anyway"
        )
    with tool.progress(api, f"resizing {args.volume}", kind="RESIZE", qube=qube, quiet=args.quiet):
        api.call("admin.vm.volume.Resize", qube, volume, str(wanted).encode())
    return 0


def revert_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Back to a revision, the newest one where none is named."""
    qube, volume = volume_of(args.volume)
    revision = args.revision
    if not revision:
        revisions = api.lines("admin.vm.volume.ListSnapshots", qube, volume)
        if not revisions:
            raise tool.ToolError(f"{args.volume} has no revision to go back to")
        revision = revisions[-1]
    with tool.progress(api, f"reverting {args.volume}", kind="REVERT", qube=qube, quiet=args.quiet):
        api.call("admin.vm.volume.Revert", qube, volume, revision.encode())
    return 0


def clear_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Empty the volume."""
    qube, volume = volume_of(args.volume)
    with tool.progress(api, f"clearing {args.volume}", kind="CLEAR", qube=qube, quiet=args.quiet):
        api.call("admin.vm.volume.Clear", qube, volume)
    return 0


def clone_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Give a volume the content of another."""
    from_qube, from_volume = volume_of(args.source)
    to_qube, to_volume = volume_of(args.volume)
    token = api.call("admin.vm.volume.CloneFrom", from_qube, from_volume)
    with tool.progress(
        api, f"cloning {args.source}", kind="CLONE_VOLUME", qube=to_qube, quiet=args.quiet
    ):
        api.call("admin.vm.volume.CloneTo", to_qube, to_volume, token)
    return 0


# ---- data


def import_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Replace a volume's data with those of a file or of stdin."""
    if args.size and args.no_resize:
        raise tool.UsageError("--size and --no-resize exclude each other")
    size = tool.size(args.size) if args.size else None
    bring(api, args.volume, args.path, size, resize=not args.no_resize, quiet=args.quiet)
    return 0


def bring(
    api: AdminClient, target: str, path: str, size: int | None, *, resize: bool, quiet: bool
) -> None:
    """Import into VMNAME:VOLUME from a path, "-" = stdin.

    size: bytes that come, None = the file's, or without resize the volume's.
    """
    qube, volume = volume_of(target)
    with _opened(path) as source:
        if size is None and not resize:
            size = int(api.info("admin.vm.volume.Info", qube, volume).get("size") or 0)
        if size is None:
            size = _size_of(source)
        bar = tool.Bar(f"importing {target}", quiet=quiet)
        try:
            if api.path is None:
                _through_qrexec(qube, volume, source, size, bar, resize=resize)
            else:
                internal = AdminClient(Path(api.path).resolve().with_name("qubesd.internal.sock"))
                _into_path(internal, qube, volume, source, size, bar, resize=resize)
        finally:
            bar.clear()


@contextlib.contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    if path == "-":
        with open(0, "rb", buffering=0, closefd=False) as source:
            yield source
    else:
        with Path(path).open("rb", buffering=0) as source:
            yield source


def _size_of(source: IO[bytes]) -> int:
    """How many bytes a file or device has."""
    mode = os.fstat(source.fileno()).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise tool.UsageError("the size of that is not known: say --size, or --no-resize")
    here = source.tell()
    size = source.seek(0, os.SEEK_END) - here
    source.seek(here)
    return size


def _into_path(
    internal: AdminClient,
    qube: str,
    volume: str,
    source: IO[bytes],
    size: int,
    bar: tool.Bar,
    *,
    resize: bool,
) -> None:
    announced = str(size).encode() if resize else b""
    answer = internal.text("internal.vm.volume.ImportBegin", qube, volume, announced)
    hold = service.frame_head("bulkhead.vm.volume.ImportHold", volume, "dom0", qube)
    end = "internal.vm.volume.ImportEnd"
    show = _shown(bar)
    with service.Hold(Path(str(internal.path)), hold) as held:

        def progress(done: int, size: int) -> None:
            held.keep()
            show(done, size)

        try:
            number, _, path = answer.partition(" ")
            importing.copy_data(source, Path(path), int(number), progress)
        except BaseException as error:
            with contextlib.suppress(*tool.FAILURES):
                # Its answer is an exception that repeats the reason; ours says more.
                internal.call(end, qube, volume, importing.failure(error))
            raise
        internal.call(end, qube, volume, b"ok")


def _shown(bar: tool.Bar) -> importing.Progress:
    return lambda done, size: bar.show(done / max(size, 1), f"{done >> 20} of {size >> 20} MiB")


def _through_qrexec(
    qube: str,
    volume: str,
    source: IO[bytes],
    size: int,
    bar: tool.Bar,
    *,
    resize: bool,
) -> None:
    method = "admin.vm.volume.ImportWithSize" if resize else "admin.vm.volume.Import"
    command = [QREXEC_CLIENT, qube, f"{method}+{volume}"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # A refusal closes the pipe early; what was answered then says why.
            with contextlib.suppress(BrokenPipeError):
                if resize:
                    process.stdin.write(f"{size}\n".encode())
                done = 0
                show = _shown(bar)
                for piece in importing.pieces(source, size):
                    _pipe_all(process.stdin, piece)
                    done += len(piece)
                    show(done, size)
        except BaseException:
            # Short data end the import as failed on the other side.
            process.kill()
            raise
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        answer = process.stdout.read()
    wire.parse_reply(answer)


def _pipe_all(pipe: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[pipe.write(view) :]


# ---- the tool


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """The subcommand's part."""
    status: int = args.work(args, api)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = tool.parser("qvm-volume", "Look at and change volumes of qubes.")
    # Without a subcommand: list everything.
    made.set_defaults(work=list_work, names=[], pool="", full=False, json=False)
    command = tool.commands(made)

    verb = command("list", "list volumes", aliases=("ls", "l"))
    verb.set_defaults(work=list_work)
    verb.add_argument("names", nargs="*", metavar="VMNAME[:VOLUME]", help="only these")
    verb.add_argument("--pool", "-p", default="", metavar="POOL", help="only in this pool")
    verb.add_argument("--full", action="store_true", help="with size and usage in bytes")
    tool.json_option(verb)

    verb = _verb(command, "info", "show one volume", info_work, "i")
    verb.add_argument("property", nargs="?", metavar="PROPERTY", help="only this; or revisions")
    tool.json_option(verb)

    verb = _verb(command, "config", "set a property of a volume", config_work, "c", "set", "s")
    verb.add_argument("property", choices=SETTABLE, metavar="PROPERTY", help=", ".join(SETTABLE))
    verb.add_argument("value", metavar="VALUE")

    verb = _verb(command, "resize", "change the size", resize_work, "r", "extend")
    verb.add_argument("size", metavar="SIZE", help="bytes, or a number with K, M, G or T")
    verb.add_argument("--force", "-f", action="store_true", help="also if it becomes smaller")

    verb = _verb(command, "revert", "go back to a revision", revert_work, "rv")
    verb.add_argument("revision", nargs="?", metavar="REVISION", help="default: the newest")

    verb = _verb(command, "import", "replace the data", import_work)
    verb.add_argument("path", metavar="PATH", help="file, block device, or - for stdin")
    verb.add_argument("--size", metavar="SIZE", help="bytes that come, and the new size")
    verb.add_argument("--no-resize", action="store_true", help="the data fit the size exactly")

    _verb(command, "clear", "empty the volume", clear_work)

    verb = command("clone", "give a volume the content of another")
    verb.set_defaults(work=clone_work)
    verb.add_argument("source", metavar="SRC_VMNAME:VOLUME")
    verb.add_argument("volume", metavar="VMNAME:VOLUME")
    return tool.run(made, work, argv)


def _verb(
    command: tool.Command, name: str, about: str, act: tool.Work, *aliases: str
) -> argparse.ArgumentParser:
    verb = command(name, about, aliases=aliases)
    verb.set_defaults(work=act)
    verb.add_argument("volume", metavar="VMNAME:VOLUME")
    return verb
