"""The rules of qubes as they are stored.

Owns reading and writing rules files, off the loop. Must not know kernels, nor who hears of
a change. Invariants: a file never holds what did not parse; one that does not parse is
never taken for "no rules": it says why, and whoever enforces it refuses everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bulkhead.model.firewall_rules import DEFAULT_RULES, RULES_LIMIT, Rule
from services.firewall.adapters.rules_files import RulesFiles
from services.firewall.core import rules_file, ruleset


@dataclass(frozen=True, slots=True)
class Stored:
    """A qube's rules as read. rules None: the file does not validate, why says how."""

    rules: tuple[Rule, ...] | None
    is_default: bool
    why: str = ""


class StoredRules:
    """Rules files by uuid; all but read raise OSError."""

    def __init__(self, files: RulesFiles, now: Callable[[], float]) -> None:
        self._files = files
        self._now = now

    async def read(self, uuid: str) -> Stored:
        """The stored rules, expired ones included."""
        uuid = canonical(uuid)
        try:
            data = await asyncio.to_thread(self._files.read, uuid)
        except OSError as error:
            return Stored(None, False, f"the rules file cannot be read: {error}")
        return _parse(data)

    async def uuids(self) -> tuple[str, ...]:
        """Qubes that have a file."""
        return await asyncio.to_thread(self._files.uuids)

    async def replace(self, uuid: str, rules: Sequence[Rule]) -> bytes | None:
        """Write the file durably; what was there before, for restore."""
        old = await asyncio.to_thread(self._files.read, uuid)
        await self.write(uuid, rules)
        return old

    async def write(self, uuid: str, rules: Sequence[Rule]) -> None:
        """Write the file durably."""
        data = rules_file.render(rules, self._now())
        await asyncio.to_thread(self._files.write, uuid, data)

    async def restore(self, uuid: str, old: bytes | None) -> None:
        """Bring back what replace found."""
        await asyncio.to_thread(self._files.restore, uuid, old)

    def delete(self, uuid: str) -> None:
        """No file is left. Blocks: for a thread."""
        self._files.delete(uuid)


def _parse(data: bytes | None) -> Stored:
    if data is None:
        return Stored(DEFAULT_RULES, True)
    try:
        rules = rules_file.parse(data)
    except rules_file.RulesFileError as error:
        return Stored(None, False, str(error))
    if len(rules) > RULES_LIMIT:
        return Stored(None, False, f"more than {RULES_LIMIT} rules")
    return Stored(rules, False)


def canonical(untrusted_uuid: str) -> str:
    """The one form of a uuid that files and locks are named by. Refusal."""
    tag = ruleset.tag(untrusted_uuid)
    return f"{tag[:8]}-{tag[8:12]}-{tag[12:16]}-{tag[16:20]}-{tag[20:]}"
