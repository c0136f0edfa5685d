"""What a place of enforcement can do, whether a kernel or a plan.

Owns the interface and its two errors. Must not know sockets or nftables. Invariant:
change() is atomic: after it returned, the marks hold; after it raised KernelRefusal,
nothing changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.firewall.core.flows import Flow
from services.firewall.core.ruleset import Transaction


class KernelRefusal(Exception):
    """The transaction was refused as a whole; the message is the kernel's."""


class EnforcerGone(Exception):
    """Nobody answers for the namespace; what the kernel holds is unknown but unchanged
    or exactly the transaction that was under way."""


class NamespaceGone(EnforcerGone):
    """The namespace itself is not there, and its tables went with it."""


@dataclass(frozen=True, slots=True)
class TableStatus:
    """present: the table exists. marks: tag -> digest. counters: name -> (packets, bytes)."""

    present: bool
    marks: Mapping[str, str]
    counters: Mapping[str, tuple[int, int]]


class Enforcer(Protocol):
    """One network qube's table."""

    @property
    def real(self) -> bool:
        """True where packets are really filtered."""

    async def change(self, transaction: Transaction) -> None:
        """Apply it in one go. KernelRefusal, EnforcerGone."""

    async def status(self) -> TableStatus:
        """What is there. EnforcerGone."""

    async def rule_counters(self, tag: str) -> Mapping[str, tuple[int, int]]:
        """Comment of each rule of the qube's chain -> (packets, bytes); empty when absent."""

    async def listing(self, tag: str) -> str:
        """The qube's chain as text, "" when absent."""

    async def flows(self, addresses: Sequence[str]) -> tuple[Flow, ...]:
        """Tracked connections from or to one of the addresses, each kind once."""

    async def cut(self, flows: Sequence[Flow]) -> None:
        """Forget all connections of these kinds; one that is already gone is no error."""

    async def close(self) -> None:
        """Let go of it; the table stays."""
