"""The rules as a network qube that is a guest reads them.

Owns the names and the order of the keys below /qubes-firewall/ADDRESS. Must not know
how keys are written. Invariant: the entry's number is its place in the whole list
(rules left out leave gaps), the policy is always there, and the empty base key comes
last because its write is the signal to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bulkhead.model.firewall_rules import POLICY, Rule, guest_value

BASE = "/qubes-firewall/"


def tree(rules: Sequence[Rule], address: str, now: float) -> tuple[tuple[str, str], ...]:
    """(path, value) in write order for one address of the client.

    address decides the family: rules of the other family are left out, rules by host
    name are in both. A host name that nobody can look up would block the whole client
    there: such a rule is left out where it accepts and drops every destination where it
    drops, as in a namespace. The caller removes everything below the base key first.
    """
    other = "dst4" if ":" in address else "dst6"
    base = f"{BASE}{address}"
    entries = [(f"{base}/policy", POLICY)]
    for number, rule in enumerate(rules):
        if rule.expired(now):
            continue
        if rule.destination is not None and rule.destination.key == other:
            continue
        if rule.destination is not None and rule.destination.problem():
            if rule.action == "accept":
                continue
            rule = replace(rule, destination=None)
        entries.append((f"{base}/{number:04d}", guest_value(rule)))
    entries.append((base, ""))
    return tuple(entries)


def blocked_tree(address: str) -> tuple[tuple[str, str], ...]:
    """The tree that lets nothing pass, for rules that cannot be read."""
    return tree((), address, 0)


def trees(rules: Sequence[Rule] | None, addresses: Sequence[str], now: float) -> tuple[str, ...]:
    """ "path=value" of every address that is not empty; rules None: nothing may pass."""
    result: list[str] = []
    for address in addresses:
        if address:
            entries = blocked_tree(address) if rules is None else tree(rules, address, now)
            result.extend(f"{path}={value}" for path, value in entries)
    return tuple(result)
