"""Addresses of host names over time.

Owns which addresses a name has now and when to ask again. Must not know how to ask.
Time is seconds on any clock that only grows. Invariant: an address stays for HOLD_S
after it was last seen, so that a name whose answers rotate does not flicker; a failed
question changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

HOLD_S = 300.0
TTL_LEAST_S = 30.0
TTL_MOST_S = 3600.0
RETRY_S = 15.0
ADDRESSES_LIMIT = 64


@dataclass(slots=True)
class _Name:
    seen: dict[str, float] = field(default_factory=dict)
    due: float = 0.0
    error: str = ""


class NameTable:
    """Names that rules speak of."""

    def __init__(self) -> None:
        self._names: dict[str, _Name] = {}

    def want(self, names: Iterable[str]) -> None:
        """Start to follow the names; a new one is due at once."""
        for name in names:
            self._names.setdefault(name, _Name())

    def keep_only(self, names: Iterable[str]) -> None:
        """Stop following all other names."""
        kept = set(names)
        self._names = {name: item for name, item in self._names.items() if name in kept}

    def seed(self, name: str, addresses: Sequence[str], now: float) -> None:
        """What was known before a restart; the name stays due."""
        item = self._names.setdefault(name, _Name())
        for address in addresses[:ADDRESSES_LIMIT]:
            item.seen.setdefault(address, now)

    def due(self, now: float) -> tuple[str, ...]:
        """Names to ask about."""
        return tuple(name for name, item in self._names.items() if item.due <= now)

    def next_due(self) -> float | None:
        """When the first name is due; None when nothing is followed."""
        return min((item.due for item in self._names.values()), default=None)

    def answer(self, name: str, addresses: Sequence[str], ttl: float, now: float) -> bool:
        """Take an answer; True when the addresses of the name changed."""
        item = self._names.get(name)
        if item is None:
            return False
        before = set(item.seen)
        for address in addresses[:ADDRESSES_LIMIT]:
            item.seen[address] = now
        fresh = sorted(item.seen, key=lambda address: (-item.seen[address], address))
        item.seen = {
            address: item.seen[address]
            for address in fresh[:ADDRESSES_LIMIT]
            if now - item.seen[address] < HOLD_S
        }
        item.due = now + min(max(ttl, TTL_LEAST_S), TTL_MOST_S)
        item.error = ""
        return set(item.seen) != before

    def failed(self, name: str, why: str, now: float) -> None:
        """A question without an answer: what is known stays, and is asked again soon."""
        item = self._names.get(name)
        if item is not None:
            item.due = now + RETRY_S
            item.error = why

    def addresses(self, names: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
        """Name -> addresses known now, sorted; unknown names are left out."""
        return {
            name: tuple(sorted(self._names[name].seen))
            for name in names
            if name in self._names and self._names[name].seen
        }

    def error(self, name: str) -> str:
        """Why the last question failed; "" when it did not."""
        item = self._names.get(name)
        return item.error if item is not None else ""
