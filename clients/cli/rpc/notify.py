"""qubes.FeaturesRequest, qubes.NotifyTools and qubes.NotifyUpdates: what guests tell.

Owns reading the one line of NotifyUpdates. Must not interpret it: the daemon does.
Invariant: the guest gets no text back, whatever the daemon says of it; the exit status
is 0 (accepted), 2 (refused) or 1 (no answer), and stderr, the log of this side, has why.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from clients.cli.rpc import service

# More than any count; a guest cannot make us read on.
LINE_LIMIT = 64


def features_request(argv: Sequence[str] | None = None) -> int:
    """The guest has written /features-request into its QubesDB."""
    return _run("qubes.FeaturesRequest", argv)


def notify_tools(argv: Sequence[str] | None = None) -> int:
    """The guest has written /qubes-tools into its QubesDB."""
    return _run("qubes.NotifyTools", argv)


def notify_updates(argv: Sequence[str] | None = None) -> int:
    """The guest says on stdin how many updates there are."""
    return _run("qubes.NotifyUpdates", argv, line=True)


def _run(name: str, argv: Sequence[str] | None, *, line: bool = False) -> int:
    try:
        request = service.request(sys.argv[1:] if argv is None else argv, os.environ)
        untrusted_line = _line() if line else b""
        reply = service.whole(
            request.socket("misc"),
            # Always about the source, whatever target it named.
            service.frame_head(name, request.argument, request.source, "dom0") + untrusted_line,
        )
    except service.ServiceError as error:
        service.fail(name, error)
    if reply[:2] == b"0\0":
        return 0
    if reply[:2] == b"2\0":
        fields = reply.split(b"\0")
        said = b": ".join(field for field in (fields[1], *fields[3:4]) if field)
        shown = "".join(c if " " <= c <= "~" else "?" for c in said.decode("ascii", "replace"))
        print(f"{name}: {request.source}: {shown}", file=sys.stderr)
        return 2
    print(f"{name}: {request.source}: no answer", file=sys.stderr)
    return 1


def _line() -> bytes:
    """Stdin up to the end of its first line. ServiceError where that is too long."""
    data = b""
    while b"\n" not in data:
        if len(data) > LINE_LIMIT:
            raise service.ServiceError("the line is too long for a number of updates")
        more = os.read(0, LINE_LIMIT)
        if not more:
            break
        data += more
    return data.partition(b"\n")[0]


if __name__ == "__main__":
    services = {
        "qubes.FeaturesRequest": features_request,
        "qubes.NotifyTools": notify_tools,
        "qubes.NotifyUpdates": notify_updates,
    }
    if sys.argv[1:2] == [] or sys.argv[1] not in services:
        service.fail("notify", f"say one of {', '.join(services)}")
    sys.exit(services[sys.argv[1]](sys.argv[2:]))
