"""Ends the flows that rules do not allow any more.

Owns which flows those are. Must not know files, notes or chains. Invariant: no flow that
the rules forbid outlives the cut, as far as the kernel lets it be ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from bulkhead.model.firewall_rules import Rule
from services.firewall.applied import Applied
from services.firewall.core import flows, ruleset
from services.firewall.core.enforcement import Enforcer, KernelRefusal
from services.firewall.core.expiry import without_expired
from services.firewall.core.flows import Flow
from services.firewall.core.ruleset import Target


class FlowCutter:
    """The caller holds the table's lock."""

    def __init__(
        self, resolvers: tuple[str, ...], now: Callable[[], float], log: logging.Logger
    ) -> None:
        self._resolvers = resolvers
        self._now = now
        self._log = log

    async def cut(
        self,
        enforcer: Enforcer,
        target: Target,
        rules: Sequence[Rule] | None,
        applied: Applied | None = None,
    ) -> None:
        """End the flows that the rules forbid; rules None: all flows from or to the qube."""
        own = tuple(text for text in (target.ip, target.ip6) if text)
        if not own or not enforcer.real:
            return
        try:
            found = await enforcer.flows(own)
            if rules is None or applied is None:
                await enforcer.cut(found)
                return
            from_it = tuple(flow for flow in found if flow.source in own)
            await enforcer.cut(self.forbidden(from_it, rules, applied))
        except KernelRefusal as error:
            self._log.error("flows of %s cannot be cut: %s", target.qube, error)

    def forbidden(
        self, found: Sequence[Flow], rules: Sequence[Rule], applied: Applied
    ) -> tuple[Flow, ...]:
        """Those of the found that an applied qube's rules do not let pass."""
        names = ruleset.host_names(rules)
        if applied.strict and not all(applied.addresses.get(name) for name in names):
            return tuple(found)
        rules = without_expired(rules, self._now())
        dns = (*self._resolvers, *ruleset.VIRTUAL_RESOLVERS)
        return flows.forbidden(found, rules, applied.addresses, dns)
