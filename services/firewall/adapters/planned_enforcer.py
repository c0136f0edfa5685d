"""Rules that are planned only: the netvm is simulated, or a guest that reads its keys.

Owns one planned table. Must not know why nothing is enforced. Invariant: answers as a
real enforcer whose namespace sees no traffic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from services.firewall.core.enforcement import KernelRefusal, TableStatus
from services.firewall.core.flows import Flow
from services.firewall.core.planned_table import PlannedTable
from services.firewall.core.ruleset import BASE_COUNTERS, Transaction


class PlannedEnforcer:
    """An Enforcer without a kernel."""

    def __init__(self) -> None:
        self.table = PlannedTable()

    @property
    def real(self) -> bool:
        return False

    async def change(self, transaction: Transaction) -> None:
        self.table.execute(transaction.commands)
        for tag, mark in transaction.marks.items():
            if self.table.mark(tag) != mark:
                raise KernelRefusal(f"the mark of {tag} is not what was asked for")

    async def status(self) -> TableStatus:
        marks = {
            name.removeprefix("g_"): self.table.mark(name.removeprefix("g_"))
            for name in self.table.chains
            if name.startswith("g_")
        }
        counters = dict.fromkeys(BASE_COUNTERS, (0, 0)) if self.table.present else {}
        return TableStatus(self.table.present, marks, counters)

    async def rule_counters(self, tag: str) -> Mapping[str, tuple[int, int]]:
        return dict.fromkeys(self.table.comments(f"q_{tag}"), (0, 0))

    async def listing(self, tag: str) -> str:
        return self.table.text(f"q_{tag}")

    async def flows(self, addresses: Sequence[str]) -> tuple[Flow, ...]:
        del addresses  # nothing passes here
        return ()

    async def cut(self, flows: Sequence[Flow]) -> None:
        del flows

    async def close(self) -> None:
        """Nothing is held."""
