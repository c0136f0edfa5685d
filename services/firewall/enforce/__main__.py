"""python -m services.firewall.enforce --listen-fd N

Started by hostd inside the namespace with CAP_NET_ADMIN and nothing else. Gives up the
rest itself (system calls, files, sockets but netlink), then serves until it is killed.
Invariant: no request is read before the restrictions are in force.
"""

from __future__ import annotations

import argparse
import ctypes
import encodings.idna  # noqa: F401  (imported before files are out of reach)
import os
import signal
import socket
import sys

from bulkhead.bus import confine
from bulkhead.bus.confine import Confinement
from services.firewall import failpoint_table
from services.firewall.enforce.conntrack import Tracker
from services.firewall.enforce.kernel import KernelTable
from services.firewall.enforce.server import EnforceServer, Forwarding

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve on the inherited listening socket."""
    parser = argparse.ArgumentParser(prog="enforce")
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True, help="pid of hostd; dies with it")
    arguments = parser.parse_args()
    # The tables stay when this process goes: hostd starts a new worker when it is back.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != arguments.parent:
        sys.exit("hostd is gone")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    listener = socket.socket(fileno=arguments.listen_fd)
    server = EnforceServer(listener, KernelTable(), Tracker(), Forwarding())
    confine.apply(
        Confinement(
            write=failpoint_table.directories(), keep_caps=("net_admin",), netlink=True, unix=False
        )
    )
    server.run()


if __name__ == "__main__":
    main()
