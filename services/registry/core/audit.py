"""What a change row tells a person: the altered parts before and after, as JSON.

Owns the form of the audit columns and what is left out of them. Must not know SQLite.
Invariant: no secret and no content of notes gets in; replay never reads these columns.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

from bulkhead.model.records import (
    Change,
    FactPut,
    FactRemoved,
    LabelPut,
    LabelRemoved,
    OperationPut,
    OperationRemoved,
    PoolPut,
    PoolRemoved,
    QubePut,
    QubeRemoved,
    SystemPut,
    SystemRemoved,
)
from services.registry.core.visibility import Done

_SECRET = re.compile(r"passw|passphrase|secret|token|credential|private[-_.]?key", re.IGNORECASE)
LEFT_OUT = "(left out)"
# Parts that change with every step and say nothing to an auditor.
_SKIPPED = frozenset({"revision", "progress", "progress_text", "data", "request_id"})


def plain(value: Any) -> Any:
    """A record as JSON-ready values: mappings sorted, sets as sorted lists, bytes as
    their digest, secrets left out."""
    kind = type(value)
    # Every change passes here, and most of what it holds is one of these.
    if kind in _AS_IT_IS:
        return value
    if kind is tuple or kind is list:
        return [plain(v) for v in value]
    names = _all_names(kind)
    if names is not None:
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes):
        return _digest(value)
    if isinstance(value, Mapping):
        return {
            str(k): LEFT_OUT if _is_secret(str(k)) else plain(v) for k, v in sorted(value.items())
        }
    if isinstance(value, frozenset | set):
        return sorted(plain(v) for v in value)
    return value


_AS_IT_IS = frozenset({str, int, float, bool, type(None)})


_FIELDS: dict[type[Any], tuple[str, ...] | None] = {}


def _all_names(kind: type[Any]) -> tuple[str, ...] | None:
    """Fields of a dataclass that make two of it differ; None for other types."""
    if kind not in _FIELDS:
        names = tuple(f.name for f in fields(kind) if f.compare) if is_dataclass(kind) else None
        _FIELDS[kind] = names
    return _FIELDS[kind]


@lru_cache(1024)
def _is_secret(key: str) -> bool:
    return _SECRET.search(key) is not None


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}" if data else ""


def _described(change: Change) -> tuple[str, object | None]:
    """(key of the object, the object; None = it is not there)."""
    match change:
        case QubePut(qube):
            return f"qube/{qube.uuid}", qube
        case QubeRemoved(uuid):
            return f"qube/{uuid}", None
        case SystemPut(name, _):
            return f"property/{name}", change
        case SystemRemoved(name):
            return f"property/{name}", None
        case LabelPut(label):
            return f"label/{label.name}", label
        case LabelRemoved(name):
            return f"label/{name}", None
        case PoolPut(pool):
            return f"pool/{pool.name}", pool
        case PoolRemoved(name):
            return f"pool/{name}", None
        case OperationPut(operation):
            return f"operation/{operation.id}", operation
        case OperationRemoved(op_id):
            return f"operation/{op_id}", None
        case FactPut() | FactRemoved():
            return "", None


_NAMES: dict[type, tuple[str, ...]] = {}


def _names(kind: type[Any]) -> tuple[str, ...]:
    if kind not in _NAMES:
        _NAMES[kind] = tuple(f.name for f in fields(kind) if f.name not in _SKIPPED)
    return _NAMES[kind]


def _parts(what: object, other: object | None) -> dict[str, Any] | None:
    """The parts of a record that differ from the other one, and its name; of mappings
    the entries that differ."""
    if what is None or isinstance(what, type) or not is_dataclass(what):
        return None
    out: dict[str, Any] = {}
    for name in _names(type(what)):
        value = getattr(what, name)
        if name != "name" and other is not None and getattr(other, name) == value:
            continue
        if name == "notes":
            out[name] = _digest(value.encode())
        elif name == "value" and isinstance(what, SystemPut):
            out[name] = LEFT_OUT if _SECRET.search(what.name) else value
        else:
            if other is not None and isinstance(value, Mapping):
                theirs = getattr(other, name)
                value = {k: v for k, v in value.items() if theirs.get(k) != v}
            out[name] = plain(value)
    return out


def before_after(done: Iterable[Done]) -> tuple[str, str]:
    """(before, after): JSON objects, key of object -> parts that differ; null = absent.

    Of a record that was there before and after only the differing parts are told, and
    its name.
    """
    first: dict[str, object | None] = {}
    last: dict[str, object | None] = {}
    for change, inverse in done:
        key, now = _described(change)
        if key:
            # An object twice in one mutation: the first "before" counts.
            first.setdefault(key, _described(inverse)[1] if inverse is not None else None)
            last[key] = now
    return (
        _dump({key: _parts(was, last[key]) for key, was in first.items()}),
        _dump({key: _parts(now, first[key]) for key, now in last.items()}),
    )


_dump = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode
