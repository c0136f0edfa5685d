"""The namespace's nftables table through libnftables, in this process.

Owns the library handle. Must not know rules, qubes or who asks. Invariant: run() is one
kernel transaction, and proves by the marks that the kernel holds what was asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import nftables

from services.firewall.core.ruleset import TABLE

_ABSENT = ("No such file or directory", "does not exist")


class Refused(Exception):
    """The kernel or the library said no; nothing changed. The message is theirs."""


class KernelTable:
    """The one table of this namespace."""

    def __init__(self) -> None:
        self._nft: Any = nftables.Nftables()
        self._nft.set_numeric_proto_output(True)

    def _cmd(self, text: str, json_output: bool = False) -> tuple[int, str, str]:
        self._nft.set_json_output(json_output)
        code, output, error = self._nft.cmd(text)
        return code, output, error.strip()

    def run(self, commands: Sequence[str], marks: Mapping[str, str]) -> None:
        """All commands in one transaction, then the proof. Refused."""
        code, _, error = self._cmd("\n".join(commands) + "\n")
        if code:
            # The library shows the first input line for every error: the first is enough.
            raise Refused(error.split("\n")[0][:500] or f"libnftables answered {code}")
        if not marks:
            return
        found = self.marks() if len(marks) > 1 else {}
        for tag, mark in marks.items():
            holds = found.get(tag, "") if len(marks) > 1 else self.mark(tag)
            if holds != mark:
                raise Refused(f"chain q_{tag} holds {holds or 'nothing'} instead of {mark}")

    def mark(self, tag: str) -> str:
        """The digest in the qube's g_ chain; "" when absent."""
        for rule in self._rules(f"list chain {TABLE} g_{tag}"):
            return str(rule.get("comment", ""))
        return ""

    def marks(self) -> dict[str, str]:
        """tag -> digest of every qube."""
        return {
            str(rule["chain"]).removeprefix("g_"): str(rule.get("comment", ""))
            for rule in self._rules(f"list table {TABLE}")
            if str(rule["chain"]).startswith("g_")
        }

    def _rules(self, command: str) -> list[dict[str, Any]]:
        return [item["rule"] for item in self._objects(command) if "rule" in item]

    def _objects(self, command: str) -> list[dict[str, Any]]:
        code, output, error = self._cmd(command, json_output=True)
        if code:
            if any(text in error for text in _ABSENT):
                return []
            raise Refused(error[:500])
        return list(json.loads(output)["nftables"]) if output else []

    def present(self) -> bool:
        """The table exists."""
        family, name = TABLE.split(" ")
        return any(
            item["table"]["family"] == family and item["table"]["name"] == name
            for item in self._objects("list tables")
            if "table" in item
        )

    def counters(self) -> dict[str, tuple[int, int]]:
        """Named counter -> (packets, bytes)."""
        return {
            str(item["counter"]["name"]): (item["counter"]["packets"], item["counter"]["bytes"])
            for item in self._objects(f"list counters table {TABLE}")
            if "counter" in item
        }

    def rule_counters(self, tag: str) -> dict[str, tuple[int, int]]:
        """Comment of each rule of the qube's chain -> (packets, bytes), summed."""
        sums: dict[str, tuple[int, int]] = {}
        for rule in self._rules(f"list chain {TABLE} q_{tag}"):
            for expression in rule["expr"]:
                if isinstance(expression, dict) and isinstance(expression.get("counter"), dict):
                    counter = expression["counter"]
                    before = sums.get(str(rule.get("comment", "")), (0, 0))
                    sums[str(rule.get("comment", ""))] = (
                        before[0] + int(counter["packets"]),
                        before[1] + int(counter["bytes"]),
                    )
        return sums

    def listing(self, tag: str) -> str:
        """The qube's chain as text; "" when absent."""
        code, output, _ = self._cmd(f"list chain {TABLE} q_{tag}")
        return "" if code else str(output)
