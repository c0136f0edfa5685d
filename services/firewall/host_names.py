"""What the host names in rules mean now.

Owns the table of answers, and asking. Must not know rules, qubes or kernels. Invariants:
nobody waits long for a name, which then means nothing until it is answered; an answer is
asked for again before it is too old.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol

from services.firewall.core.names import NameTable

# A name that a new rule speaks of is waited for at most this long; then it is unresolved.
NAME_WAIT_S = 2.0
# Names asked about at once.
QUESTIONS_AT_ONCE = 8


class Resolver(Protocol):
    """Answers host names."""

    async def resolve(self, name: str) -> tuple[tuple[str, ...], float]:
        """(addresses of both families, time to live in seconds). OSError, TimeoutError."""


class HostNames:
    """Names that rules speak of."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._table = NameTable()
        self._wake = asyncio.Event()

    def addresses(self, names: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        """What is known of the names."""
        return self._table.addresses(names)

    def want(self, names: Iterable[str]) -> None:
        """Keep asking about these too."""
        self._table.want(names)

    def seed(self, name: str, addresses: Sequence[str], now: float) -> None:
        """An answer of an earlier run, until there is a new one."""
        self._table.seed(name, addresses, now)

    def keep_only(self, names: Iterable[str]) -> None:
        """No rule speaks of others any more."""
        self._table.keep_only(names)

    def follow(self, names: Sequence[str]) -> None:
        """Ask about these too, while nobody waits for the answers."""
        if names:
            self._table.want(names)
            self._wake.set()

    async def ask(self, names: Sequence[str], again: bool = False) -> None:
        """Wait a little until names that are new (again: all of them) are answered."""
        if not names:
            return
        known = self._table.addresses(names)
        self._table.want(names)
        asked = [name for name in names if again or name not in known]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NAME_WAIT_S):
                await self._questions(asked)
        self._wake.set()

    async def _questions(self, names: Sequence[str]) -> set[str]:
        """Ask about the names, a few at once; those whose addresses changed."""
        gate = asyncio.Semaphore(QUESTIONS_AT_ONCE)

        async def one(name: str) -> str:
            async with gate:
                try:
                    addresses, ttl = await self._resolver.resolve(name)
                except (OSError, TimeoutError) as error:
                    self._table.failed(name, str(error) or "no answer", time.monotonic())
                    return ""
                changed = self._table.answer(name, addresses, ttl, time.monotonic())
                return name if changed else ""

        return {name for name in await asyncio.gather(*map(one, names)) if name}

    async def run(self, refresh: Callable[[set[str]], Awaitable[None]]) -> None:
        """Ask again when answers age; refresh gets the names that mean something else now.

        Never ends.
        """
        while True:
            self._wake.clear()
            due = self._table.due(time.monotonic())
            if due:
                await refresh(await self._questions(due))
            end = self._table.next_due()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(
                    None if end is None else max(0.05, end - time.monotonic())
                ):
                    await self._wake.wait()
