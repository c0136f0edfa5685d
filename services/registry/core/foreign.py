"""What to do with the qubes.xml and the journal that are found at start.

Owns the decision table, the processing instruction and the difference shown to a
person. Must not open files or databases. Invariant: a file that the registry did not
write is never merged silently and never overwritten.
"""

from __future__ import annotations

import difflib
import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass

INTENDED = "intended"
DONE = "done"
# The longest difference that status shows, in characters.
DIFFERENCE_LIMIT = 64 * 1024
# Comparing line by line takes time by the square of what differs.
_COMPARED_LINES = 4_000


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """One row of the checkpoint table. covers: no change of revisions up to it alters
    the file any more (>= revision). sha256: hex, of the whole file."""

    revision: int
    covers: int
    sha256: str
    state: str


@dataclass(frozen=True, slots=True)
class Instruction:
    """Store id and revision from the top of the file."""

    store_id: str
    revision: int

    def render(self) -> bytes:
        """The line as it stands in the file."""
        return f'<?bulkhead store="{self.store_id}" revision="{self.revision}"?>\n'.encode()


_INSTRUCTION = re.compile(rb'<\?bulkhead store="([0-9a-f-]{36})" revision="([0-9]{1,18})"\?>')


def read_instruction(untrusted_document: bytes) -> Instruction | None:
    """The instruction before the root element, or None."""
    match = _INSTRUCTION.match(untrusted_document.lstrip()[:200])
    if match is None:
        return None
    return Instruction(match[1].decode(), int(match[2]))


class Start(enum.Enum):
    """What the registry does with what it found."""

    REPLAY = "load the file, replay the journal"
    FROM_BLOB = "the file is missing or torn: take the newest checkpoint from the journal"
    FOREIGN = "somebody else wrote the file: serve the journal's state"
    ALONE = "no journal: the file alone is the state, under a new store id"
    NO_STORE = "neither a file nor a journal"
    LOST = "the file is missing or torn and nothing can replace it"


@dataclass(frozen=True, slots=True)
class Found:
    """What was found. sha256: hex of the file, "" = there is none. parses: it is
    well-formed XML with the right root. blobs: sha256 of the checkpoint documents in
    the journal that verify."""

    sha256: str
    parses: bool
    journal: bool
    rows: tuple[CheckpointRow, ...] = ()
    blobs: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Decision:
    """start, the checkpoint row to build on (None where there is none), and whether
    the bad file has to be kept beside before it is replaced."""

    start: Start
    row: CheckpointRow | None = None
    keep_beside: bool = False


def newest(rows: Iterable[CheckpointRow], blobs: frozenset[str]) -> CheckpointRow | None:
    """The newest row whose document is at hand."""
    good = [row for row in rows if row.sha256 in blobs]
    return max(good, key=lambda row: row.revision, default=None)


def decide(found: Found) -> Decision:
    """The decision table of a start."""
    if not found.journal:
        if found.sha256 and found.parses:
            return Decision(Start.ALONE)
        return Decision(Start.LOST if found.sha256 else Start.NO_STORE)
    ours = [row for row in found.rows if row.sha256 == found.sha256]
    if ours:
        return Decision(Start.REPLAY, max(ours, key=lambda row: row.revision))
    base = newest(found.rows, found.blobs)
    if not found.sha256 or not found.parses:
        if base is None:
            return Decision(Start.LOST)
        return Decision(Start.FROM_BLOB, base, keep_beside=bool(found.sha256))
    if base is None:
        # A journal that has no picture to build on is as good as none.
        return Decision(Start.ALONE)
    return Decision(Start.FOREIGN, base)


def difference(ours: bytes, untrusted_theirs: bytes) -> str:
    """Unified difference, journal's state -> edited file, bounded; without the
    instruction line. "" = the same."""
    old, new = _lines(ours), _lines(untrusted_theirs)
    start = 0
    while start < min(len(old), len(new)) and old[start] == new[start]:
        start += 1
    end = 0
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    old, new = old[start : len(old) - end], new[start : len(new) - end]
    if not old and not new:
        return ""
    if len(old) + len(new) > _COMPARED_LINES:
        return (
            f"{len(old)} lines from line {start + 1} on were replaced by {len(new)} others; "
            f"too many to show"
        )
    out: list[str] = []
    size = 0
    for line in difflib.unified_diff(old, new, "journal", "qubes.xml", n=2, lineterm=""):
        if line.startswith("@@"):
            line = f"@@ after line {start} @@ {line}"
        size += len(line) + 1
        if size > DIFFERENCE_LIMIT:
            out.append("... (the difference is longer)")
            break
        out.append(line)
    return "\n".join(out)


def _lines(document: bytes) -> list[str]:
    return _INSTRUCTION.sub(b"", document, count=1).decode(errors="replace").strip().splitlines()
