"""When the next rule ends.

Owns that arithmetic only: now is an argument, in seconds since the epoch. Invariant:
the answer depends on the rules alone, so after a restart the timers come back from
the files.
"""

from __future__ import annotations

from collections.abc import Sequence

from bulkhead.model.firewall_rules import Rule


def next_expiry(rules: Sequence[Rule], now: float) -> float | None:
    """The nearest end of a rule that has not ended; None when none will end."""
    ends = [int(rule.expire) for rule in rules if rule.expire and not rule.expired(now)]
    return float(min(ends)) if ends else None


def without_expired(rules: Sequence[Rule], now: float) -> tuple[Rule, ...]:
    """The rules that still count at now, in order."""
    return tuple(rule for rule in rules if not rule.expired(now))
