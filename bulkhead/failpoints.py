"""Named places at which a test can make this process die, fail or wait.

Owns the one table of failpoints of all services and the check in front of each.
Must not know what any service does. Invariant: with nothing armed, hit() costs one
truth test and changes nothing.

Armed by the environment variable BULKHEAD_FAILPOINTS (read once, at import):
"NAME=ACTION[,NAME=ACTION]", ACTION one of
  kill         SIGKILL this process
  kill:N       at the N-th hit
  error        raise FailpointError
  error:N      at the N-th hit only
  sleep:SECONDS
or, for running services under test, by the file named in BULKHEAD_FAILPOINTS_FILE, which
is re-read at every hit while that variable is set. There the text is one or more stages
separated by "|"; only the first is armed, and a kill or error that fires drops its
stage first, so each stage fires once, however often the process starts again. What
fired is appended to FILE.fired, one name a line.

BULKHEAD_FAILPOINTS_TRACE names a file that gets a line "NAME" for each hit, of all
processes in order: how a test learns which failpoints an operation passes.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

_TABLE: dict[str, str] = {}
_HITS: dict[str, int] = {}


class FailpointError(OSError):
    """What an armed "error" failpoint raises; an OSError, so that real paths are taken."""


def register(service: str, rows: dict[str, str]) -> None:
    """Add a service's failpoints: {"storage.ensure.before_rename": "what it stands before"}.

    Each service declares its rows in services/<service>/failpoint_table.py.
    Raises KeyError on a name twice or a name outside "<service>.".
    """
    for name, where in rows.items():
        if name in _TABLE and _TABLE[name] != where:
            raise KeyError(f"failpoint {name} is declared twice")
        if not name.startswith(f"{service}."):
            raise KeyError(f"failpoint {name} is not below {service}.")
        _TABLE[name] = where


def table() -> dict[str, str]:
    """Every registered failpoint with the place that it stands for."""
    return dict(_TABLE)


def _parse(text: str) -> dict[str, str]:
    return dict(part.strip().split("=", 1) for part in text.split(",") if "=" in part)


_FILE = os.environ.get("BULKHEAD_FAILPOINTS_FILE", "")
_ARMED = _parse(os.environ.get("BULKHEAD_FAILPOINTS", ""))
_TRACE = os.environ.get("BULKHEAD_FAILPOINTS_TRACE", "")
_ACTIVE = bool(_ARMED or _FILE or _TRACE)


def directories() -> tuple[Path, ...]:
    """Directories that an armed process must be able to write; none outside of tests."""
    return tuple({Path(name).parent for name in (_FILE, _TRACE) if name})


def hit(name: str) -> None:
    """Pass the failpoint: does nothing unless it is armed. KeyError when undeclared."""
    if not _ACTIVE:
        return
    _fire(name)


def _fire(name: str) -> None:
    if name not in _TABLE:
        raise KeyError(f"failpoint {name} is in no table")
    if _TRACE:
        with Path(_TRACE).open("a") as trace:
            trace.write(name + "\n")
    armed = _ARMED
    stages: list[str] = []
    if _FILE:
        try:
            stages = Path(_FILE).read_text().strip().split("|")
            armed = {**_ARMED, **_parse(stages[0])}
        except FileNotFoundError:
            pass
    action = armed.get(name)
    if action is None:
        return
    _HITS[name] = _HITS.get(name, 0) + 1
    verb, _, value = action.partition(":")
    if verb == "sleep":
        time.sleep(float(value))
        return
    if value and _HITS[name] != int(value):
        return
    if stages and not _drop_stage(name, stages):
        return
    if verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # the signal is on its way; go no further
    if verb == "error":
        raise FailpointError(f"failpoint {name}")


def _drop_stage(name: str, stages: list[str]) -> bool:
    """Disarm the first stage in the file; False when another process was faster."""
    path = Path(_FILE)
    claimed = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.rename(claimed)
    except FileNotFoundError:
        return False
    with path.with_name(path.name + ".fired").open("a") as fired:
        fired.write(name + "\n")
    if stages[1:]:
        claimed.write_text("|".join(stages[1:]))
        claimed.rename(path)
    else:
        claimed.unlink()
    return True
