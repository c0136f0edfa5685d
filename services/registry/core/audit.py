"""What a change row tells a person: the altered parts before and after, as JSON.

Owns the form of the audit columns and what is left out of them. Must not know SQLite.
Invariant: no secret and no content of notes gets in; replay never reads these columns.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
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
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes):
        return _digest(value)
    if isinstance(value, Mapping):
        return {
            str(k): LEFT_OUT if _SECRET.search(str(k)) else plain(v)
            for k, v in sorted(value.items())
        }
    if isinstance(value, frozenset | set):
        return sorted(plain(v) for v in value)
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return value


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}" if data else ""


def _record(what: object) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    if not is_dataclass(what) or isinstance(what, type):
        return parts
    for f in fields(what):
        if f.name in _SKIPPED:
            continue
        value = getattr(what, f.name)
        parts[f.name] = _digest(value.encode()) if f.name == "notes" else plain(value)
    return parts


def _described(change: Change) -> tuple[str, dict[str, Any] | None]:
    """(key of the object, its parts; None = it is not there)."""
    match change:
        case QubePut(qube):
            return f"qube/{qube.uuid}", _record(qube)
        case QubeRemoved(uuid):
            return f"qube/{uuid}", None
        case SystemPut(name, value):
            return f"property/{name}", {"value": LEFT_OUT if _SECRET.search(name) else value}
        case SystemRemoved(name):
            return f"property/{name}", None
        case LabelPut(label):
            return f"label/{label.name}", asdict(label)
        case LabelRemoved(name):
            return f"label/{name}", None
        case PoolPut(pool):
            return f"pool/{pool.name}", _record(pool)
        case PoolRemoved(name):
            return f"pool/{name}", None
        case OperationPut(operation):
            return f"operation/{operation.id}", _record(operation)
        case OperationRemoved(op_id):
            return f"operation/{op_id}", None
        case FactPut() | FactRemoved():
            return "", None


def before_after(done: Iterable[Done]) -> tuple[str, str]:
    """(before, after): JSON objects, key of object -> parts that differ; null = absent.

    Of a record that was there before and after only the differing parts are told, and
    its name.
    """
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    for change, inverse in done:
        key, now = _described(change)
        if not key:
            continue
        was = _described(inverse)[1] if inverse is not None else None
        if key in before:  # an object twice in one mutation: the first "before" counts
            was = before[key]
        if isinstance(was, dict) and isinstance(now, dict):
            keep = {k for k in {*was, *now} if was.get(k) != now.get(k)} | {"name"}
            was = {k: v for k, v in was.items() if k in keep}
            now = {k: v for k, v in now.items() if k in keep}
        before[key] = was
        after[key] = now
    return _dump(before), _dump(after)


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
