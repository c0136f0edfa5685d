"""The parent of a private libvirtd and of its guests' processes: takes leave of the dead.

Owns waiting for whatever ends below it. Must not know libvirt. Invariant: a guest's
process that has ended is gone at once. libvirt waits until it is, and the first process
of a container may take seconds over that.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from types import FrameType

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(become: Callable[[], None]) -> int:
    """Run become() in a child, which must exec; the exit status of that child.

    SIGTERM, SIGINT and SIGHUP are handed on to it. When this process is killed the child
    is killed too; what it has left behind in the background lives on.
    """
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            become()
        finally:
            os._exit(127)

    def hand_on(number: int, _frame: FrameType | None) -> None:
        try:
            os.kill(child, number)
        except ProcessLookupError:
            pass  # it has just ended; the wait below returns

    for number in FORWARDED:
        signal.signal(number, hand_on)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            return os.waitstatus_to_exitcode(status)
        assert pid != parent


def die_with(parent: int) -> None:
    """In the child: be killed when parent is. After the last change of user."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it died before this could hold
