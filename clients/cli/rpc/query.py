"""qubesd-query: one raw call, for scripts.

Owns its options and exit statuses. Must not know what calls mean. Invariant: the reply
goes to stdout byte for byte, its message type first; with --fail the exit status is that
type (0 ok, 1 event or no reply, 2 exception).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from clients.admin.paths import socket_path
from clients.cli.rpc import service

PAYLOAD_LIMIT = 65536
LINE_LIMIT = 1024


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="qubesd-query", description="One call, as it is.")
    where = made.add_mutually_exclusive_group()
    where.add_argument("--connect", "-c", metavar="SOCK", help="the socket to connect to")
    where.add_argument("--root", metavar="DIR", help="the instance below DIR")
    made.add_argument("--empty", "-e", action="store_true", help="no payload, stdin is not read")
    made.add_argument("--fail", action="store_true", help="exit with the message type")
    made.add_argument(
        "--max-bytes", type=int, metavar="N", help=f"of payload, at most {PAYLOAD_LIMIT}"
    )
    made.add_argument("--single-line", action="store_true", help="the payload is one line of stdin")
    made.add_argument("--null", action="store_true", help="a NUL byte after the reply")
    made.add_argument("source", metavar="SRC", help="the qube that asks")
    made.add_argument("method", metavar="METHOD")
    made.add_argument("dest", metavar="DEST", help="the qube that is asked about")
    made.add_argument("argument", metavar="ARG", nargs="?", default="")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = parser()
    args = made.parse_args(argv)
    if args.null and args.fail:
        made.error("--null goes without --fail")
    limit = args.max_bytes
    if limit is None:
        limit = LINE_LIMIT if args.single_line else PAYLOAD_LIMIT
    if not 0 <= limit <= PAYLOAD_LIMIT:
        made.error(f"--max-bytes is at most {PAYLOAD_LIMIT}")
    try:
        kind, dest = "name", args.dest
        if dest.startswith("@"):
            kind, dest = "keyword", dest[1:]
        frame = service.frame_head(args.method, args.argument, args.source, dest, kind)
        if not args.empty:
            frame += _line(limit) if args.single_line else _all(limit)
        path = Path(args.connect) if args.connect else socket_path(args.root)
        first = b""
        for chunk in service.exchange(path, frame):
            first = first or chunk[:1]
            service.write(chunk)
        if args.null:
            service.write(b"\0")
    except service.ServiceError as error:
        service.fail(made.prog, error)
    except BrokenPipeError:
        return 1
    if not args.fail:
        return 0
    return int(first) if first in (b"0", b"1", b"2") else 1


def _all(limit: int) -> bytes:
    """Stdin to its end. ServiceError above the limit."""
    data = b""
    while chunk := os.read(0, PAYLOAD_LIMIT + 1):
        data += chunk
        if len(data) > limit:
            raise service.ServiceError(f"the payload has more than {limit} bytes")
    return data


def _line(limit: int) -> bytes:
    """One line of printable ASCII, without its end; nothing behind it is read."""
    line = b""
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        if not b" " <= byte <= b"~":
            raise service.ServiceError("the line has a character that is not printable ASCII")
        line += byte
        # The end of the line counts, too.
        if len(line) >= limit:
            raise service.ServiceError(f"the line has more than {limit} bytes")
    return line


if __name__ == "__main__":
    sys.exit(main())
