"""Runs the simulated hypervisor: python -m services.domains.simhv --root DIR.

Owns the process: lock, socket, signals. Must not know any service. Invariant: one per
root; it ends only by SIGTERM or SIGINT, never because a client did.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import signal
import sys
from pathlib import Path

from bulkhead.config import SOCKET_PATH_LIMIT

from .server import SimServer


def socket_path(root: Path) -> Path:
    """Where the simulated hypervisor of this root listens."""
    return root / "run/bulkhead/simhv/hv.sock"


async def _run(path: Path) -> None:
    server = SimServer(path)
    await server.start()
    print(f"simulated hypervisor on {path}", file=sys.stderr, flush=True)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    await ended.wait()
    await server.stop()


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM; 2 when the path is too long, 3 when another one runs."""
    parser = argparse.ArgumentParser(prog="bulkhead-simhv", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="directory of the instance")
    options = parser.parse_args(argv)
    path = socket_path(options.root.absolute())
    if len(str(path).encode()) > SOCKET_PATH_LIMIT:
        print(f"{path} is too long for a unix socket; use a shorter --root", file=sys.stderr)
        return 2
    path.parent.mkdir(parents=True, exist_ok=True)
    # The lock comes before the bind: binding a live path would silently steal it.
    lock = os.open(path.parent / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"a simulated hypervisor runs already below {options.root}", file=sys.stderr)
        return 3
    asyncio.run(_run(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
