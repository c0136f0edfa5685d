"""python -S services/firewall/resolve/supervisor.py --fd N --parent PID ...: starts the worker.

Owns the worker's process and nothing of what it says: the worker is started by the first
question that waits on the inherited socket, and again when one waits after its end. Must not
import more than the interpreter brings: it lives as long as the firewall does, mostly asleep,
on hosts that may have no rule with a name. Invariant: ends when the firewall has closed its
end of the socket, and at once when the firewall dies.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time

_PR_SET_PDEATHSIG = 1
_RESTART_S = 0.2
_WORKER = "services.firewall.resolve"


def die_with(parent: int) -> None:
    """The kernel ends this process when its parent ends; exits if it has already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(0)


def question_waits(fd: int) -> bool:
    """Sleep until there is a question, True, or nobody is left to ask one."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    ((_, events),) = poll.poll()
    return not events & (select.POLLHUP | select.POLLERR | select.POLLNVAL)


def main(fd: int, parent: int, more: list[str]) -> None:
    """Run workers, one at a time, for as long as questions can come."""
    die_with(parent)
    command = [sys.executable, "-m", _WORKER, "--fd", str(fd), "--parent", str(os.getpid()), *more]
    while question_waits(fd):
        worker = os.posix_spawn(sys.executable, command, os.environ)
        _, status = os.waitpid(worker, 0)
        if status == 0:
            return  # the firewall closed its end
        time.sleep(_RESTART_S)


if __name__ == "__main__":
    _, _, _fd, _, _parent, *_more = sys.argv
    main(int(_fd), int(_parent), _more)
