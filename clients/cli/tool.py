"""What every qvm-* tool shares: options, the client, errors, tables, progress.

Owns nothing but the manner of talking to a person. Must not know single calls.
Invariant: a refusal ends in one sentence on stderr and exit status 1, a usage error in 2;
nothing but the tool's own output goes to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from clients.admin import AdminClient, exceptions

# Progress is drawn only for work that takes longer than this.
PROGRESS_AFTER_S = 0.5
PROGRESS_PERIOD_S = 0.2
BAR_WIDTH = 30


class UsageError(Exception):
    """The arguments do not fit together; exit status 2."""


class ToolError(Exception):
    """The tool cannot do it, for a reason that is not the daemon's; exit status 1."""


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that all tools have."""
    made = argparse.ArgumentParser(prog=name, description=description)
    made.add_argument("--verbose", "-v", action="count", default=0, help="say more")
    made.add_argument("--quiet", "-q", action="store_true", help="say less, no progress")
    where = made.add_mutually_exclusive_group()
    where.add_argument("--root", metavar="DIR", help="the instance below DIR")
    where.add_argument("--socket", metavar="PATH", help="the Admin API socket")
    return made


def client(args: argparse.Namespace) -> AdminClient:
    """The client that the options name."""
    if args.socket:
        return AdminClient(Path(args.socket))
    return AdminClient.local(args.root)


def run(
    made: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace, AdminClient], int],
    argv: Sequence[str] | None,
) -> int:
    """Parse, work, and turn failures into exit statuses."""
    args = made.parse_args(argv)
    try:
        return work(args, client(args))
    except UsageError as error:
        made.print_usage(sys.stderr)
        print(f"{made.prog}: {error}", file=sys.stderr)
        return 2
    except (
        exceptions.QubesException,
        exceptions.PermissionDenied,
        exceptions.ProtocolError,
        ToolError,
    ) as error:
        text = error.args[0] if error.args else type(error).__name__
        print(f"{made.prog}: {text}", file=sys.stderr)
        if args.verbose:
            print(f"{made.prog}: ({type(error).__name__})", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{made.prog}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130


def table(rows: Iterable[Sequence[str]], *, out: Callable[[str], object] = print) -> None:
    """Print rows with aligned columns, two spaces between them."""
    lines = [tuple(row) for row in rows]
    if not lines:
        return
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths))
        out("  ".join(cells).rstrip())


def yes(text: str) -> bool:
    """A word for a truth value. UsageError for any other."""
    if text.lower() in ("1", "yes", "true", "on"):
        return True
    if text.lower() in ("0", "no", "false", "off"):
        return False
    raise UsageError(f"{text} is neither true nor false")


def confirm(question: str) -> bool:
    """Ask on the terminal; anything but y is a no."""
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


@contextlib.contextmanager
def progress(api: AdminClient, qube: str, title: str, *, quiet: bool) -> Iterator[None]:
    """Draw a bar on stderr for the operation that runs on a qube, while the block runs.

    Nothing is drawn where stderr is no terminal, where the daemon does not know our
    calls, or when the work is over at once.
    """
    if quiet or not sys.stderr.isatty():
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_draw, args=(api, qube, title, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _draw(api: AdminClient, qube: str, title: str, over: threading.Event) -> None:
    began = time.monotonic()
    if over.wait(PROGRESS_AFTER_S):
        return
    drawn = False
    while not over.wait(PROGRESS_PERIOD_S):
        share, text = _share(api, qube)
        if share is None:
            return
        filled = int(share * BAR_WIDTH)
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        seconds = time.monotonic() - began
        sys.stderr.write(f"\r{title} [{bar}] {share:4.0%} {seconds:5.1f} s {text[:24]:<24}")
        sys.stderr.flush()
        drawn = True
    if drawn:
        sys.stderr.write("\r" + " " * (len(title) + BAR_WIDTH + 44) + "\r")
        sys.stderr.flush()


def _share(api: AdminClient, qube: str) -> tuple[float | None, str]:
    """Progress of the newest unfinished operation on the qube; None when it cannot be told."""
    try:
        lines = api.lines("bulkhead.op.List")
    except (
        exceptions.QubesException,
        exceptions.ProtocolError,
        exceptions.PermissionDenied,
        OSError,
    ):
        return None, ""
    for line in reversed(lines):
        record = json.loads(line)
        if qube in record["qubes"] and not record["finished"]:
            return float(record["progress"]), str(record["text"] or record["step"])
    return 0.0, ""


def complain(sentence: str) -> None:
    """One line on stderr, for a failure that does not end the tool."""
    print(sentence, file=sys.stderr)
