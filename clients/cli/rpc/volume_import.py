"""admin.vm.volume.Import and admin.vm.volume.ImportWithSize.

Owns the stream: with ImportWithSize a line with the size, then the data on stdin; a reply
of the Admin API on stdout. Must not choose where data go: ImportBegin says so. Invariant:
an import that was begun is ended, as failed unless exactly its bytes are durable.

Exit status: 0 = the reply of ImportEnd was handed on; 1 = the import did not begin.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from clients.admin import importing
from clients.cli.rpc import service

BEGIN = "internal.vm.volume.ImportBegin"
HOLD = "bulkhead.vm.volume.ImportHold"
END = "internal.vm.volume.ImportEnd"
# Bytes of the first line, its end included.
SIZE_LIMIT = 21


def plain(argv: Sequence[str] | None = None) -> int:
    """admin.vm.volume.Import: the data have the volume's size."""
    return _run("admin.vm.volume.Import", argv, sized=False)


def sized(argv: Sequence[str] | None = None) -> int:
    """admin.vm.volume.ImportWithSize: the first line says how many bytes come."""
    return _run("admin.vm.volume.ImportWithSize", argv, sized=True)


def _run(name: str, argv: Sequence[str] | None, *, sized: bool) -> int:
    try:
        request = service.request(sys.argv[1:] if argv is None else argv, os.environ)
        announced = b""
        if sized:
            try:
                announced = size_line()
            except ValueError as error:
                service.write(service.exception("ProtocolError", str(error)))
                return 1
        path = request.socket("internal")
        with service.stoppable():
            return _import(request, path, announced)
    except (service.ServiceError, BrokenPipeError) as error:
        service.fail(name, error)
    except service.Stopped as error:
        service.fail(name, error)


def size_line() -> bytes:
    """The first line of stdin, read no further than its end. ValueError."""
    line = b""
    while not line.endswith(b"\n"):
        if len(line) == SIZE_LIMIT:
            raise ValueError(f"the size has more than {SIZE_LIMIT - 1} digits")
        # One at a time: what follows are the data.
        byte = os.read(0, 1)
        if not byte:
            raise ValueError("the data end within the line that says their size")
        line += byte
    untrusted_digits = line[:-1]
    if not untrusted_digits.isdigit():
        raise ValueError("the first line is no number of bytes")
    return untrusted_digits


def _import(request: service.Request, path: Path, announced: bytes) -> int:
    stopped: service.Stopped | None = None
    with contextlib.ExitStack() as quiet:
        quiet.enter_context(service.undisturbed())
        answer = service.whole(path, request.head(BEGIN) + announced)
        if answer[:2] != b"0\0":
            service.write(answer)
            return 1
        try:
            # Who stopped us meanwhile does so here, where what was begun gets ended.
            quiet.close()
            held = quiet.enter_context(service.Hold(path, request.head(HOLD)))
            number, _, target = answer[2:].decode().partition(" ")
            with open(0, "rb", buffering=0, closefd=False) as source:
                importing.copy_data(source, Path(target), int(number), lambda *_: held.keep())
            quiet.enter_context(service.undisturbed())
            outcome = b"ok"
        except (OSError, ValueError) as error:
            outcome = importing.failure(error)
        except service.Stopped as error:
            stopped, outcome = error, importing.failure(error)
        quiet.enter_context(service.undisturbed())
        reply = service.whole(path, request.head(END) + outcome)
        if stopped is None:
            service.write(reply)
    if stopped is not None:
        raise stopped
    return 0 if reply else 1


if __name__ == "__main__":
    # Run by name: "Import" or "ImportWithSize" comes first.
    kinds = {"Import": plain, "ImportWithSize": sized}
    if sys.argv[1:2] == [] or sys.argv[1] not in kinds:
        service.fail("volume_import", "say Import or ImportWithSize")
    sys.exit(kinds[sys.argv[1]](sys.argv[2:]))
