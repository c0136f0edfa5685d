"""What a volume is: its kind from its flags, its id, and what its flags allow.

Owns the kind table and the checks of ids and flags. Must not know files or devices.
Invariant: an id that passed parse_vid names exactly one place inside its pool and
cannot lead out of it.
"""

from __future__ import annotations

import enum
import posixpath
import re
from collections.abc import Collection
from dataclasses import dataclass

from bulkhead.model.records import REVISIONS_LIMIT, Pool, Volume
from services.storage.core.reasons import StorageRefusal

PREFIXES: tuple[str, ...] = ("appvms", "vm-templates")
QUARANTINE = ".bulkhead-quarantine"


class Kind(enum.Enum):
    """What start and stop do with a volume."""

    VOLATILE = "volatile"  # new and zero at every start, gone at stop
    SNAPSHOT = "snapshot"  # at start a copy of its source's last commit, gone at stop
    ORIGIN = "origin"  # its own data, committed at stop


def kind_of(volume: Volume) -> Kind:
    """The kind of a volume of a disk pool.

    Raises VOLUME_REFUSED for save_on_stop with snap_on_start: every start would take
    the source's state again, so what was saved could never reappear.
    """
    if volume.save_on_stop and volume.snap_on_start:
        raise StorageRefusal(
            "VOLUME_REFUSED",
            f"volume {volume.vid} both saves on stop and takes its source's state at start: "
            "what it saved would be lost; switch one of the two off",
            volume=volume.vid,
        )
    if volume.snap_on_start and not volume.source:
        raise StorageRefusal(
            "INVALID_VOLUME",
            f"volume {volume.vid} takes a snapshot at start but names no source",
            volume=volume.vid,
        )
    if volume.source and not volume.snap_on_start:
        raise StorageRefusal(
            "INVALID_VOLUME",
            f"volume {volume.vid} names a source but takes no snapshot at start",
            volume=volume.vid,
        )
    if volume.save_on_stop:
        return Kind.ORIGIN
    return Kind.SNAPSHOT if volume.snap_on_start else Kind.VOLATILE


def require_origin(volume: Volume, what: str) -> None:
    """NOT_ORIGIN, in words that say what cannot be done, for a volume of another kind."""
    if kind_of(volume) is not Kind.ORIGIN:
        raise StorageRefusal(
            "NOT_ORIGIN",
            f"cannot {what} volume {volume.vid}: it keeps no data of its own between starts",
            volume=volume.vid,
        )


def source_of(volume: Volume, source: Volume | None) -> Volume:
    """A snapshot's source: as the caller told, else what the volume itself says of it."""
    if source is not None:
        return source
    return Volume(name=volume.name, pool=volume.pool, vid=volume.source, rw=True, save_on_stop=True)


@dataclass(frozen=True, slots=True)
class Vid:
    """A checked volume id of a directory pool: "<prefix>/<qube>/<name>"."""

    prefix: str
    qube: str
    name: str

    def __str__(self) -> str:
        return f"{self.prefix}/{self.qube}/{self.name}"


_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
# A volume name that ends like the name of another role would make two volumes share a file.
_ROLE_END = re.compile(r"(-(dirty|import|precache|base|cow)|\.img.*|\.qcow2.*)$")


def parse_vid(untrusted_vid: str) -> Vid:
    """Check a volume id. INVALID_VOLUME unless it is PREFIX/QUBE/NAME in safe letters."""
    parts = untrusted_vid.split("/")
    if (
        len(parts) != 3
        or parts[0] not in PREFIXES
        or not all(_PART.fullmatch(part) for part in parts[1:])
        or _ROLE_END.search(parts[2])
    ):
        raise StorageRefusal(
            "INVALID_VOLUME",
            f"volume id {untrusted_vid!r} is not appvms/QUBE/NAME or vm-templates/QUBE/NAME",
            volume=untrusted_vid,
        )
    return Vid(*parts)


def ephemeral(volume: Volume, pool: Pool) -> bool:
    """Whether the volume must lie on a throw-away key: its own choice, else the pool's.

    VOLUME_REFUSED when it was chosen for a volume that cannot be.
    """
    eligible = volume.rw and not volume.save_on_stop and not volume.snap_on_start
    if volume.ephemeral is None:
        return eligible and parse_bool(pool, "ephemeral_volatile", False)
    if volume.ephemeral and not eligible:
        raise StorageRefusal(
            "VOLUME_REFUSED",
            f"volume {volume.vid} cannot be ephemeral: only a writable volume that neither "
            "saves on stop nor has a source can",
            volume=volume.vid,
        )
    return volume.ephemeral


_TRUE = frozenset({"True", "true", "1", "on", "yes"})
_FALSE = frozenset({"False", "false", "0", "off", "no", ""})


def parse_bool(pool: Pool, option: str, default: bool) -> bool:
    """A pool's boolean option. INVALID_POOL when it is neither."""
    text = pool.options.get(option)
    if text is None:
        return default
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise StorageRefusal(
        "INVALID_POOL",
        f"pool {pool.name}: option {option} is {text!r}, use True or False",
        pool=pool.name,
        option=option,
    )


def parse_directory(pool: Pool, driver: str, known: Collection[str]) -> str:
    """dir_path of a pool in a directory, normalised; INVALID_POOL.

    known: every option that the driver has.
    """
    unknown = sorted(set(pool.options) - set(known))
    if unknown:
        raise StorageRefusal(
            "INVALID_POOL",
            f"pool {pool.name}: driver {driver} has no option {unknown[0]}",
            pool=pool.name,
            option=unknown[0],
        )
    path = pool.options.get("dir_path", "")
    if not path.startswith("/") or "\0" in path:
        raise StorageRefusal(
            "INVALID_POOL",
            f"pool {pool.name}: dir_path must be an absolute path, not {path!r}",
            pool=pool.name,
            option="dir_path",
        )
    return posixpath.normpath(path)


def parse_revisions(pool: Pool) -> int:
    """The pool's revisions_to_keep, 1 by default. INVALID_POOL below -1 or no number."""
    text = pool.options.get("revisions_to_keep", "1")
    if re.fullmatch(r"-1|[0-9]{1,10}", text) is None or int(text) > REVISIONS_LIMIT:
        raise StorageRefusal(
            "INVALID_POOL",
            f"pool {pool.name}: revisions_to_keep is {text!r}, use a number from -1 on",
            pool=pool.name,
            option="revisions_to_keep",
        )
    return int(text)
