"""What every qvm-* tool shares: options, the client, errors, tables, progress.

Owns nothing but the manner of talking to a person. Must not know single calls, except the
two of bulkhead.op that progress is drawn from. Invariant: a refusal ends in one sentence
on stderr and exit status 1, a usage error in 2; nothing but the tool's own output goes to
stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clients.admin import AdminClient, AdminError, QubeLine, exceptions
from clients.admin.importing import DataError
from clients.admin.paths import QREXEC_CLIENT, ROOT_VARIABLE, socket_path

SOCKET_VARIABLE = "QUBESD_SOCKET"

# Progress is drawn only for work that takes longer than this.
PROGRESS_AFTER_S = 0.5
PROGRESS_PERIOD_S = 0.2
BAR_WIDTH = 30

# What a daemon answers that does not have one of our own calls: 4.4 says ProtocolError, a
# qrexec policy of 4.4 refuses without an answer.
UNKNOWN_CALL = (
    exceptions.ProtocolError,
    exceptions.QubesNotImplementedError,
    exceptions.QubesDaemonAccessError,
)
_ALWAYS_ON = ("AdminVM", "RemoteVM")


class UsageError(Exception):
    """The arguments do not fit together; exit status 2."""


class ToolError(Exception):
    """The tool cannot do it, for a reason that is not the daemon's; exit status 1."""


FAILURES = (*AdminError, ToolError, DataError)

Work = Callable[[argparse.Namespace, AdminClient], int]
Command = Callable[..., argparse.ArgumentParser]


class Client(AdminClient):
    """AdminClient for what a person typed: what cannot be sent at all is a ToolError."""

    def call(
        self,
        method: str,
        dest: str = "dom0",
        arg: str = "",
        payload: bytes = b"",
        *,
        timeout: float | None = None,
    ) -> bytes:
        """As AdminClient.call; ToolError for a word or a size that no request can have."""
        try:
            return super().call(method, dest, arg, payload, timeout=timeout)
        except exceptions.QubesException:
            raise
        except ValueError as error:
            raise ToolError(str(error)) from error


# ---- options


def parser(name: str, description: str, **more: Any) -> argparse.ArgumentParser:
    """A parser with the options that all tools have."""
    made = argparse.ArgumentParser(prog=name, description=description, **more)
    _common(made, again=False)
    return made


def commands(made: argparse.ArgumentParser) -> Command:
    """Give the tool subcommands; the function that is returned makes one.

    It takes the subcommand's name, its help, and aliases as a keyword. A subcommand has the
    common options again, so they may stand before or after it. args.command is the name as
    it was typed, None without one.
    """
    verbs = made.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str, *, aliases: Sequence[str] = ()) -> argparse.ArgumentParser:
        verb: argparse.ArgumentParser = verbs.add_parser(
            name, help=text, description=text, aliases=list(aliases)
        )
        _common(verb, again=True)
        return verb

    return command


def _common(made: argparse.ArgumentParser, *, again: bool) -> None:
    # A subcommand's parser must not overwrite what stood before the subcommand.
    def default(value: object) -> object:
        return argparse.SUPPRESS if again else value

    made.add_argument("--verbose", "-v", action="count", default=default(0), help="say more")
    made.add_argument(
        "--quiet", "-q", action="store_true", default=default(False), help="no progress"
    )
    where = made.add_mutually_exclusive_group()
    where.add_argument(
        "--root", metavar="DIR", default=default(None), help="the instance below DIR"
    )
    where.add_argument(
        "--socket", metavar="PATH", default=default(None), help="the Admin API socket"
    )


def json_option(made: argparse.ArgumentParser, *, again: bool = False) -> None:
    """The option --json; again for a subcommand whose tool has it too."""
    made.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS if again else False,
        help="a JSON list",
    )


def selection(made: argparse.ArgumentParser, every: str) -> None:
    """Operands VMNAME..., or --all (described by every) without those of --exclude."""
    made.add_argument("names", nargs="*", metavar="VMNAME", help="a name, or a pattern with * or ?")
    made.add_argument("--all", action="store_true", help=every)
    made.add_argument(
        "--exclude", action="append", default=[], metavar="VMNAME", help="not this one, with --all"
    )


def selected(
    args: argparse.Namespace,
    lines: Collection[QubeLine],
    matches: Callable[[QubeLine], bool] = lambda _line: True,
) -> list[str]:
    """The names that the operands of selection() mean; matches filters --all only.

    A name that no qube has stays: the daemon refuses it with its own sentence.
    """
    if args.all:
        if args.names:
            raise UsageError("name qubes, or say --all, not both")
        return [
            line.name
            for line in lines
            if line.klass not in _ALWAYS_ON
            and not any(fnmatch.fnmatchcase(line.name, text) for text in args.exclude)
            and matches(line)
        ]
    if args.exclude:
        raise UsageError("--exclude goes with --all")
    if not args.names:
        raise UsageError("name a qube, or say --all")
    names: dict[str, None] = {}
    for text in args.names:
        if any(sign in text for sign in "*?["):
            found = [line.name for line in lines if fnmatch.fnmatchcase(line.name, text)]
            if not found:
                raise ToolError(f"no qube matches {text}")
            names.update(dict.fromkeys(found))
        else:
            names[text] = None
    return list(names)


def client(args: argparse.Namespace) -> Client:
    """The client that the options name, else the environment, else this machine.

    Without any of them: the system's socket, and qrexec where only that is there.
    """
    if args.socket and args.root:
        raise UsageError("--root and --socket exclude each other")
    if args.socket:
        return Client(Path(args.socket))
    if args.root:
        return Client(socket_path(args.root))
    if named := os.environ.get(SOCKET_VARIABLE):
        return Client(Path(named))
    path = socket_path(None)
    if not os.environ.get(ROOT_VARIABLE) and not path.exists() and Path(QREXEC_CLIENT).exists():
        return Client(None)
    return Client(path)


# ---- running


def run(
    made: argparse.ArgumentParser,
    work: Work,
    argv: Sequence[str] | None,
) -> int:
    """Parse, work, and turn failures into exit statuses."""
    args = _parsed(made, argv)
    try:
        status = work(args, client(args))
        sys.stdout.flush()
        return status
    except UsageError as error:
        made.print_usage(sys.stderr)
        print(f"{made.prog}: {error}", file=sys.stderr)
        return 2
    except FAILURES as error:
        print(f"{made.prog}: {sentence(error)}", file=sys.stderr)
        if args.verbose:
            print(f"{made.prog}: ({type(error).__name__})", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read our output has enough. Python flushes once more at exit: to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"{made.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"{made.prog}: interrupted; what the system has begun goes on, see qvm-op list",
            file=sys.stderr,
        )
        return 130


def _parsed(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments with options between the operands, as in `qvm-prefs work --default netvm`."""
    try:
        return made.parse_intermixed_args(argv)
    except TypeError:
        # What argparse says, before it reads anything, of a parser that has subcommands.
        return made.parse_args(argv)


def sentence(error: BaseException) -> str:
    """What a failure says."""
    return str(error.args[0]) if error.args else type(error).__name__


def complain(text: str) -> None:
    """One line on stderr, for a failure that does not end the tool."""
    print(text, file=sys.stderr)


def each(names: Iterable[str], act: Callable[[str], object], verb: str) -> int:
    """Do it for every name; failures are told, the others still get their turn."""
    failed = 0
    for name in names:
        try:
            act(name)
        except FAILURES as error:
            failed += 1
            complain(f"{name} was not {verb}: {sentence(error)}")
    return 1 if failed else 0


# ---- output


def table(rows: Iterable[Sequence[str]], *, out: Callable[[str], object] = print) -> None:
    """Print rows with aligned columns, two spaces between them."""
    lines = [tuple(row) for row in rows]
    if not lines:
        return
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        out("  ".join(cells).rstrip())


def show(args: argparse.Namespace, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A list with a header, or with --json as objects whose keys are the columns."""
    if args.json:
        keys = [column.lower().replace(" ", "_") for column in columns]
        as_json([dict(zip(keys, row, strict=True)) for row in rows])
    else:
        table([columns, *rows])


def as_json(value: object) -> None:
    """Print a value for programs."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


# ---- small grammars


def yes(text: str) -> bool:
    """A word for a truth value. UsageError for any other."""
    if text.lower() in ("1", "yes", "true", "on"):
        return True
    if text.lower() in ("0", "no", "false", "off"):
        return False
    raise UsageError(f"{text} is neither true nor false")


def pair(option: str, text: str, means: str = "NAME=VALUE") -> tuple[str, str]:
    """KEY=VALUE in two. UsageError for another text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{option} {text}: say {means}")
    return key, value


_UNITS: Mapping[str, int] = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def size(text: str) -> int:
    """Bytes: a number, with K, M, G or T (also KiB, KB ...) for powers of 1024."""
    digits = text.rstrip("KMGTBkmgtbi")
    unit = text[len(digits) :].lower().removesuffix("b").removesuffix("i")
    if not digits.isascii() or not digits.isdigit() or unit not in _UNITS:
        raise UsageError(f"{text} is no size: say a number of bytes, or one with K, M, G or T")
    return int(digits) << _UNITS[unit]


def confirm(question: str) -> bool:
    """Ask on the terminal; anything but y is a no, and so is the end of the input."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


# ---- progress


class Bar:
    """One line on stderr that shows how far work is; nothing where stderr is no terminal."""

    def __init__(self, title: str, *, quiet: bool) -> None:
        self.live = not quiet and sys.stderr.isatty()
        self._title = title
        self._began = time.monotonic()
        self._next = self._began + PROGRESS_AFTER_S
        self._drawn = 0

    def show(self, share: float, text: str = "") -> None:
        """Draw the share (0 to 1), at most a few times a second."""
        now = time.monotonic()
        if not self.live or now < self._next:
            return
        self._next = now + PROGRESS_PERIOD_S
        filled = int(min(max(share, 0.0), 1.0) * BAR_WIDTH)
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        line = f"{self._title} [{bar}] {share:4.0%} {now - self._began:5.1f} s {text[:24]}"
        sys.stderr.write("\r" + line.ljust(self._drawn))
        sys.stderr.flush()
        self._drawn = len(line)

    def clear(self) -> None:
        """Take the line away."""
        if self._drawn:
            sys.stderr.write("\r" + " " * self._drawn + "\r")
            sys.stderr.flush()
            self._drawn = 0


@contextlib.contextmanager
def progress(
    api: AdminClient, title: str, *, kind: str, qube: str = "", quiet: bool
) -> Iterator[None]:
    """Draw a bar for the operation that the block begins: one of that kind on that qube.

    qube "": of any qube, for one that does not exist yet. Nothing is drawn where stderr is
    no terminal, where the daemon does not know our calls, or when the work is over at once.
    """
    bar = Bar(title, quiet=quiet)
    if not bar.live:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_follow, args=(api, bar, kind, qube, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        bar.clear()


def _follow(api: AdminClient, bar: Bar, kind: str, qube: str, over: threading.Event) -> None:
    if over.wait(PROGRESS_AFTER_S):
        return
    while True:
        try:
            share, text = share_of(api.lines("bulkhead.op.List"), kind, qube)
        except (*AdminError, OSError):
            return
        bar.show(share, text)
        if over.wait(PROGRESS_PERIOD_S):
            return


def share_of(lines: Iterable[str], kind: str, qube: str) -> tuple[float, str]:
    """(share, what it does) of the newest unfinished operation of a kind, from op.List's lines."""
    found = (0.0, "")
    for line in lines:
        record = json.loads(line)
        if record["finished"] or record["kind"] != kind:
            continue
        if not qube or qube in record["qubes"]:
            found = float(record["progress"]), str(record["text"] or record["step"])
    return found
