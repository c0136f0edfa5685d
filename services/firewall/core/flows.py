"""Does a flow that is already established still pass? Rules judged in software.

Owns the judgement; must not know how flows are listed or cut. Invariant: it says yes
only where the chain made from the same rules would accept the flow's first packet.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bulkhead.model.firewall_rules import Rule
from services.firewall.core.ruleset import Addresses, Compiled

_NUMBERS = {"icmp": (1, 58), "tcp": (6,), "udp": (17,)}


@dataclass(frozen=True, slots=True)
class Flow:
    """Tracked connections that rules cannot tell apart, seen from the client.

    destination: the address that the packets really go to. port, icmptype: None where
    the protocol has none.
    """

    source: str
    destination: str
    protocol: int
    port: int | None = None
    icmptype: int | None = None


def passes(flow: Flow, rules: Sequence[Rule], addresses: Addresses, dns: Iterable[str]) -> bool:
    """True when the first rule that matches the flow accepts it; none matching: False.

    addresses: host name -> addresses, as given to the translation. dns: addresses of
    the resolvers.
    """
    resolvers = {ipaddress.ip_address(text) for text in dns}
    destination = ipaddress.ip_address(flow.destination)
    for rule in rules:
        if rule.proto and flow.protocol not in _NUMBERS[rule.proto]:
            continue
        if rule.destination is not None:
            network = rule.destination.network()
            if network is not None:
                if destination.version != network.version or destination not in network:
                    continue
            else:
                known = addresses.get(rule.destination.text, ())
                if not known:
                    # As in the translation: unknown closes, and never opens.
                    if rule.action == "accept":
                        continue
                elif destination not in {ipaddress.ip_address(text) for text in known}:
                    continue
        if rule.specialtarget == "dns":
            if rule.proto == "icmp" or rule.dstports not in (None, (53, 53)):
                continue
            if flow.port != 53 or flow.protocol not in (6, 17) or destination not in resolvers:
                continue
        if rule.dstports is not None and (
            flow.port is None or not rule.dstports[0] <= flow.port <= rule.dstports[1]
        ):
            continue
        if rule.icmptype is not None and flow.icmptype != rule.icmptype:
            continue
        return rule.action == "accept"
    return False


def only_loosened(old: Sequence[Compiled], new: Sequence[Compiled]) -> bool:
    """True when nothing that the old chain accepted can be refused by the new one.

    Sure for what people do most: rules that accept were added, rules that drop were
    taken out. False means "not sure".
    """
    at = 0
    for item in new:
        while at < len(old) and not _same(old[at], item) and old[at].rule.action == "drop":
            at += 1
        if at < len(old) and _same(old[at], item):
            at += 1
        elif item.rule.action == "drop" and not item.inert:
            return False
    return all(item.rule.action == "drop" or item.inert for item in old[at:])


def _same(one: Compiled, other: Compiled) -> bool:
    return one.rule.action == other.rule.action and one.matches == other.matches


def forbidden(
    flows: Iterable[Flow], rules: Sequence[Rule], addresses: Addresses, dns: Sequence[str]
) -> tuple[Flow, ...]:
    """The flows that the rules no longer let pass."""
    return tuple(flow for flow in flows if not passes(flow, rules, addresses, dns))
