"""Names of a volume's files.

Owns the roles and the mapping (volume, role) <-> file name. Must not know what is in a
file. Invariant: classify() is the inverse of every name made here, and no name of one
volume is also a name of another.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from services.storage.core.revisions import Revision


class Role(enum.Enum):
    """What a file of a volume is; the value is the end of its name."""

    CLEAN = ".img"  # the last commit
    DIRTY = "-dirty.img"  # running data, raw
    OVERLAY = "-dirty.qcow2"  # running data, as the difference to BASE
    BASE = "-base.img"  # second name of the commit below an overlay
    PRECACHE = "-precache.img"  # ready copy of CLEAN, so that a start is a rename
    IMPORT = "-import.img"  # target of an import
    REVISION = ".img."  # + "<number>@<time>Z"
    LEGACY = "-cow.img"  # copy-on-write stores of the 4.4 file driver, also ".old"


@dataclass(frozen=True, slots=True)
class Name:
    """A file name taken apart. revision: only for REVISION; temporary: an unfinished file."""

    volume: str
    role: Role
    revision: Revision | None = None
    temporary: bool = False


_TIME = "%Y-%m-%dT%H:%M:%S"
_NAME = re.compile(
    r"(?P<volume>[A-Za-z0-9_][A-Za-z0-9_.-]*?)"
    r"(?P<role>-dirty\.img|-dirty\.qcow2|-base\.img|-precache\.img|-import\.img"
    r"|-cow\.img(?:\.old)?"
    r"|\.img\.(?P<number>[1-9][0-9]{0,17})@(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)Z|\.img)"
    r"(?P<temporary>~[^/]*)?"
)


def file_name(volume: str, role: Role, revision: Revision | None = None) -> str:
    """The name of a volume's file in its qube's directory."""
    if role is Role.REVISION:
        assert revision is not None
        when = datetime.fromtimestamp(revision.time, UTC).strftime(_TIME)
        return f"{volume}.img.{revision.number}@{when}Z"
    ending: str = role.value
    return volume + ending


def classify(name: str) -> Name | None:
    """Take a file name apart; None when it is no name of ours."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    temporary = match["temporary"] is not None
    if match["number"] is not None:
        try:
            when = datetime.strptime(match["time"], _TIME).replace(tzinfo=UTC)
        except ValueError:
            return None
        revision = Revision(int(match["number"]), int(when.timestamp()))
        return Name(match["volume"], Role.REVISION, revision, temporary)
    ending = match["role"]
    role = Role.LEGACY if ending.startswith("-cow.img") else Role(ending)
    return Name(match["volume"], role, None, temporary)
