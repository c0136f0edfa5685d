"""Texts about volumes and pools, from what is declared and what storage says.

Owns order and rendering of volume.Info, ListSnapshots, pool.Info, UsageDetails and
ListDrivers. Must not know the bus. Invariant: where storage says nothing, what is
declared is shown, never nothing at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from bulkhead.model.evaluate import evaluate
from bulkhead.model.properties import has_property
from bulkhead.model.records import Pool, PoolFact, Qube, Volume
from bulkhead.model.view import View

_TOKEN_LIMIT = 10_000
TOKEN_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
TOKEN_LENGTH = 32
_TOKEN = re.compile(rf"[{TOKEN_CHARACTERS}]{{{TOKEN_LENGTH}}}")


@dataclass(frozen=True, slots=True)
class Live:
    """What storage says of a volume now; size and usage in bytes, path "" = none."""

    size: int = 0
    usage: int = 0
    path: str = ""
    outdated: bool | None = None


def effective(view: View, qube: Qube, volume: Volume) -> Volume:
    """The declared volume with what follows from properties: a kernel volume's id."""
    pool = view.pools.get(volume.pool)
    kernels = not volume.vid or (pool is not None and pool.driver == "linux-kernel")
    if volume.name == "kernel" and kernels and has_property(qube.klass, "kernel"):
        kernel = evaluate(view, qube, "kernel")
        return replace(volume, vid=str(kernel or ""))
    return volume


def is_ephemeral(pool: Pool | None, volume: Volume) -> bool:
    """The explicit setting, else the pool's for a writable volume that keeps nothing."""
    if volume.ephemeral is not None:
        return volume.ephemeral
    if volume.snap_on_start or volume.save_on_stop or not volume.rw or pool is None:
        return False
    return pool.options.get("ephemeral_volatile", "False").lower() in ("true", "1", "on", "yes")


def source_of(view: View, volume: Volume) -> Volume | None:
    """The declared volume that this one is a snapshot of."""
    if not volume.source:
        return None
    owner = view.vid_owner(volume.pool, volume.source)
    if owner is None:
        return None
    return next((v for v in owner.volumes if v.vid == volume.source), None)


def info(pool: Pool | None, volume: Volume, live: Live | None) -> str:
    """The reply of volume.Info; a kernel has no size of its own there."""
    if live is not None and pool is not None and pool.driver == "linux-kernel":
        live = replace(live, size=0, usage=0)
    size = live.size if live is not None and live.size else volume.size
    lines: list[tuple[str, object]] = [
        ("pool", volume.pool),
        ("vid", volume.vid),
        ("size", size),
        ("usage", live.usage if live is not None else 0),
        ("rw", volume.rw),
        ("source", volume.source),
        ("path", live.path if live is not None else ""),
        ("save_on_stop", volume.save_on_stop),
        ("snap_on_start", volume.snap_on_start),
        ("revisions_to_keep", volume.revisions_to_keep),
        ("ephemeral", is_ephemeral(pool, volume)),
    ]
    if live is not None and live.outdated is not None:
        lines.append(("is_outdated", live.outdated))
    return "".join(f"{key}={value}\n" for key, value in lines)


def pool_info(pool: Pool, config: Mapping[str, str], fact: PoolFact | None) -> str:
    """The reply of pool.Info: configuration by key, then size, usage, included_in."""
    merged = {**pool.options, **config, "name": pool.name, "driver": pool.driver}
    merged.pop("setup_check", None)  # what the set-up looks at is no setting of the pool
    lines = [f"{key}={merged[key]}\n" for key in sorted(merged)]
    if fact is not None:
        if fact.size is not None:
            lines.append(f"size={fact.size}\n")
        if fact.usage is not None:
            lines.append(f"usage={fact.usage}\n")
        if fact.included_in:
            lines.append(f"included_in={fact.included_in}\n")
    return "".join(lines)


def usage_details(fact: PoolFact | None) -> str:
    """The reply of pool.UsageDetails; empty where nothing is known."""
    details = fact.usage_details if fact is not None else {}
    return "".join(f"{key}={details[key]}\n" for key in sorted(details))


def drivers(rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """The reply of pool.ListDrivers."""
    return "".join(" ".join([name, *parameters]) + "\n" for name, parameters in rows)


@dataclass(frozen=True, slots=True)
class CopySource:
    """What a clone token stands for."""

    qube_uuid: str
    volume: str
    pool: str
    vid: str


class CopyTokens:
    """Clone tokens: made by CloneFrom, used up by CloneTo; the oldest go when there are
    too many."""

    def __init__(self) -> None:
        self._sources: dict[str, CopySource] = {}

    def add(self, token: str, source: CopySource) -> None:
        """Remember a fresh random token."""
        while len(self._sources) >= _TOKEN_LIMIT:
            del self._sources[next(iter(self._sources))]
        self._sources[token] = source

    def take(self, untrusted_token: str) -> CopySource | None:
        """What the token stands for, once."""
        token = untrusted_token.strip()
        return self._sources.pop(token, None) if _TOKEN.fullmatch(token) else None
