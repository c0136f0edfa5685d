"""admin.vm.Console: a qube's console on stdin and stdout.

Owns the lock that admits one reader of a console, and the bytes between the caller and
the terminal. Must not interpret them. Invariant: while it runs nobody else has the
console through it; nothing is sent before the daemon has permitted it.

Exit status: 0 = the console or the caller ended it; 1 = refused, the exception is on
stdout; 200 = somebody else has the console.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from pathlib import Path

from clients.admin.paths import ROOT_VARIABLE
from clients.cli.rpc import service

NAME = "admin.vm.Console"
BUSY = 200
# Seconds for what the console still says after the caller has ended its side.
LAST_WORDS_S = 0.5
_CHUNK = 65536


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    try:
        request = service.request(sys.argv[1:] if argv is None else argv, os.environ)
        answer = service.whole(request.socket("admin"), request.head(NAME))
        if answer[:2] != b"0\0":
            service.write(answer)
            return 1
        name = _name(request)
        if answer[2:] == b"":
            raise service.ServiceError(f"{name} has no console; only guests with a tty have one")
        with _locked(_lock_path(request.root, name)) as mine:
            if not mine:
                print(f"{NAME}: somebody else has the console of {name}", file=sys.stderr)
                return BUSY
            with service.stoppable():
                _splice(Path(os.fsdecode(answer[2:])))
        return 0
    except (service.ServiceError, OSError) as error:
        service.fail(NAME, error)
    except service.Stopped:
        return 0


def _name(request: service.Request) -> str:
    """The name of the target, which may have been asked for by its uuid."""
    if not request.target.startswith("uuid:"):
        return request.target
    reply = service.whole(
        request.socket("admin"),
        service.frame_head("admin.vm.List", "", "dom0", request.target),
    )
    name = reply[2:].decode("ascii", "replace").split(" ", 1)[0]
    if reply[:2] != b"0\0" or not name or "/" in name:
        raise service.ServiceError(f"there is no qube {request.target}")
    return name


def _lock_path(root: str | None, name: str) -> Path:
    # The daemon knows the qube, so its name is one: no "/" and no leading dot.
    base = Path(root or os.environ.get(ROOT_VARIABLE) or "/")
    return base.absolute() / "run/qubes" / f"{name}.terminal.lock"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """True while the lock is ours, False where somebody else has it."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        # The file stays: removing it would let two hold "the" lock.
        yield True
    finally:
        os.close(handle)


def _splice(path: Path) -> None:
    """Bytes both ways until one side ends. OSError where the terminal does not open."""
    console = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with contextlib.suppress(termios.error):  # no terminal: as it is
            tty.setraw(console)
        _both_ways(console)
    finally:
        os.close(console)


def _both_ways(console: int) -> None:
    waiting = b""  # from the caller, for the console: one piece at most
    open_side = True
    while True:
        reads = [console]
        if open_side and not waiting:
            reads.append(0)
        writes = [console] if waiting else []
        readable, writable, _ = select.select(
            reads, writes, [], None if open_side else LAST_WORDS_S
        )
        if not readable and not writable:
            return
        if console in readable:
            try:
                said = os.read(console, _CHUNK)
            except BlockingIOError:
                said = None
            except OSError:
                return  # EIO: the guest's side is gone
            if said == b"":
                return
            if said:
                try:
                    service.write(said)
                except OSError:
                    return
        if 0 in readable:
            waiting = os.read(0, _CHUNK)
            open_side = bool(waiting)
        if waiting and console in writable:
            with contextlib.suppress(BlockingIOError):
                waiting = waiting[os.write(console, waiting) :]


if __name__ == "__main__":
    sys.exit(main())
