"""What the audit log tells of calls that leave no change row.

Owns which calls those are, how their arguments are shown, and the bound on refused ones.
Must not know files or the bus. Invariant: no secret and no content of notes gets in, and
a caller can make at most a fixed number of lines a second of what it is refused.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from bulkhead.model.records import ADMINVM_NAME
from services.adminapi.core import calls
from services.adminapi.core.checks import Checked
from services.adminapi.core.frame import Drop, parse_request

# Methods of the bus whose success is a change row that names the caller.
RECORDED = frozenset({"Registry.Mutate", "Lifecycle.Submit", "Lifecycle.SubmitUrgent"})
LEFT_OUT = "(left out)"
_SECRET = re.compile(r"passw|passphrase|secret|token|credential|private[-_.]?key", re.IGNORECASE)
# Payloads that may be anything, or are large: their digest.
_DIGESTED = ("notes_set", "import_begin", "import_end", "volume_import", "clone_to")
_SHOWN = 512
# Lines of refused calls that one source may make: at once, and then each second. A tool of
# dom0 that tries something on every qube is told whole.
BURST = 100.0
RATE = 20.0
TRUSTED = {ADMINVM_NAME: (5000.0, 200.0)}
_SOURCES = 256


def _clean(untrusted: bytes, limit: int = 128) -> str:
    text = untrusted[: limit + 1].decode("ascii", "backslashreplace")
    return text if len(text) <= limit else text[:limit] + "..."


def _payload(handler: str, arg: str, untrusted_payload: bytes) -> str:
    if not untrusted_payload:
        return ""
    if _SECRET.search(arg) or _SECRET.search(untrusted_payload.decode("latin-1")):
        return LEFT_OUT
    if handler in _DIGESTED or len(untrusted_payload) > _SHOWN:
        digest = hashlib.sha256(untrusted_payload).hexdigest()
        return f"sha256:{digest} ({len(untrusted_payload)} bytes)"
    return untrusted_payload.decode("ascii", "backslashreplace")


def of_call(request: Checked, kind: str, result: str) -> dict[str, Any]:
    """The record of a checked call. kind: "call" or "refused"."""
    return {
        "kind": kind,
        "caller": "adminapi",
        "source": request.source.name,
        "method": request.call.name,
        "dest": request.dest.name,
        "argument": request.arg if not _SECRET.search(request.arg) else LEFT_OUT,
        "payload": _payload(request.call.handler, request.arg, request.untrusted_payload),
        "result": result,
    }


def of_frame(socket: str, untrusted_frame: bytes, result: str) -> dict[str, Any] | None:
    """The record of a frame that was refused before it was a call; None for what could not
    have changed anything."""
    try:
        request = parse_request(untrusted_frame)
    except Drop:
        return None
    call = calls.find(socket, request.untrusted_method.decode("ascii", "replace"))
    if call is None or call.effect == "ro":
        return None
    arg = _clean(request.untrusted_arg)
    return {
        "kind": "refused",
        "caller": "adminapi",
        "source": _clean(request.untrusted_source, 40),
        "method": call.name,
        "dest": _clean(request.untrusted_dest, 64),
        "argument": arg if not _SECRET.search(arg) else LEFT_OUT,
        "payload": _payload(call.handler, arg, request.untrusted_payload),
        "result": result,
    }


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


@dataclass(slots=True)
class Bound:
    """Whose refused call may make a line now; what was held back, by source."""

    held_back: dict[str, int] = field(default_factory=dict)
    _buckets: dict[str, _Bucket] = field(default_factory=dict)

    def admit(self, source: str, now: float) -> bool:
        """True when a line of that source may be written. now: seconds, of any origin."""
        burst, rate = TRUSTED.get(source, (BURST, RATE))
        bucket = self._buckets.pop(source, None)
        if bucket is None:
            while len(self._buckets) >= _SOURCES:
                del self._buckets[next(iter(self._buckets))]
            bucket = _Bucket(burst, now)
        self._buckets[source] = bucket
        bucket.tokens = min(burst, bucket.tokens + (now - bucket.at) * rate)
        bucket.at = now
        if bucket.tokens < 1.0:
            known = source if source in self.held_back or len(self.held_back) < _SOURCES else "*"
            self.held_back[known] = self.held_back.get(known, 0) + 1
            return False
        bucket.tokens -= 1.0
        return True

    def take_held_back(self) -> dict[str, int]:
        """What was held back since the last time."""
        taken, self.held_back = self.held_back, {}
        return taken
