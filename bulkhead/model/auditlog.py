"""Lines of the exported audit log: JSON, each chained to the one before.

Owns the form of a line and the check of the chain. Must not know files or where records
come from. Invariant: the hash covers every byte of a line but the hash itself and the
line's own end, which are fixed, so no byte can be altered unseen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GENESIS = "0" * 64
_MARK = b',"hash":"'
_END = b'"}\n'
_TAIL = len(_MARK) + 64 + len(_END)


class AuditBroken(ValueError):
    """A line does not fit the chain; the text says how."""


@dataclass(frozen=True, slots=True)
class Head:
    """Where a log ends: number and hash of its last line, the last exported revision and
    the registry's hash of that."""

    number: int = 0
    hash: str = GENESIS
    exported: int = 0
    registry_hash: str = ""


def make_line(head: Head, record: Mapping[str, Any]) -> tuple[bytes, Head]:
    """The line that follows `head`, with its newline, and the new head.

    record: JSON-ready. With the keys "exported" and "registry_hash" it moves the export on.
    """
    body = {
        "number": head.number + 1,
        "exported": head.exported,
        "registry_hash": head.registry_hash,
        **record,
        "previous": head.hash,
    }
    text = json.dumps(body, ensure_ascii=True, separators=(",", ":"))
    raw = text.encode("ascii")[:-1]
    digest = _digest(raw)
    new = Head(head.number + 1, digest, body["exported"], body["registry_hash"])
    return raw + _MARK + digest.encode() + _END, new


def read_line(untrusted_line: bytes) -> tuple[dict[str, Any], Head]:
    """A line's record and the head after it. AuditBroken when it was altered or cut off."""
    if not untrusted_line.endswith(b"\n"):
        raise AuditBroken("the line is cut off")
    raw, tail = untrusted_line[:-_TAIL], untrusted_line[-_TAIL:]
    if not raw or not tail.startswith(_MARK) or not tail.endswith(_END):
        raise AuditBroken("the line does not end in its hash")
    untrusted_hash = tail[len(_MARK) : -len(_END)].decode("ascii", "replace")
    if _digest(raw) != untrusted_hash:
        raise AuditBroken("the line was altered: its hash does not fit")
    try:
        record = json.loads(raw + b"}")
        head = Head(record["number"], untrusted_hash, record["exported"], record["registry_hash"])
        record["previous"]
    except (ValueError, KeyError, TypeError) as error:
        raise AuditBroken(f"the line is no audit record: {error}") from error
    record["hash"] = untrusted_hash
    return record, head


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


class Chain:
    """Checks lines one after the other, across files. head: what the first line has to
    follow, Head() for the first of all; None where nobody knows that any more."""

    def __init__(self, head: Head | None = None) -> None:
        self.head = head

    def feed(self, untrusted_line: bytes) -> dict[str, Any]:
        """The record of the next line. AuditBroken; the line after that is checked against
        what this one claims, where it can be read."""
        before, self.head = self.head, None
        record, self.head = read_line(untrusted_line)
        if before is None:
            return record
        if record["number"] != before.number + 1:
            raise AuditBroken(
                f"record {before.number + 1} is missing, record {record['number']} follows"
            )
        if record["previous"] != before.hash:
            raise AuditBroken("the line does not follow the one before it")
        return record
