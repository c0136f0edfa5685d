"""A client's rules as iptables-save text, for network qubes that know no /qubes-firewall.

Owns the text of /qubes-iptables-header and /qubes-iptables-domainrules/XID, and the order
of these keys. Must not know how keys are written. Invariants: a text holds numbers,
addresses and host names that were checked, never a comment of a rule; header and text of
a client together let through no packet that its rules do not accept; without its text
nothing of the client passes.

The agent there loads the header (`iptables-restore`, which empties the table), then the
text of each client (`iptables-restore --noflush`). The header is the same for all: a
client's own text has the jump from its address, so that it leaves with its text.

  FORWARD         policy DROP: what is invalid; answers; never anew towards a client; then
                  what comes from clients goes to `clients`
  clients         one jump per client's source address
  qXID            the client's rules in order; the last refuses
  dns-accept, dns-refuse
                  port 53 of the resolvers that clients are told. By the address that the
                  client asked, since the network qube may have rewritten it by then
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bulkhead.model.firewall_rules import VALUE_LIMIT, Rule, iptables_owner
from services.firewall.core.ruleset import VIRTUAL_RESOLVERS

HEADER_KEY = "/qubes-iptables-header"
RULES_KEY = "/qubes-iptables-domainrules/"
RELOAD_KEY, RELOAD = "/qubes-iptables", "reload"
# In iptables this number of an ICMP type stands for all types.
_ANY_TYPE = 255


def header() -> str:
    """The table without clients: everything that is not an answer is refused."""
    lines = [
        "*filter",
        ":INPUT DROP [0:0]",
        ":FORWARD DROP [0:0]",
        ":OUTPUT ACCEPT [0:0]",
        ":clients - [0:0]",
        ":dns-accept - [0:0]",
        ":dns-refuse - [0:0]",
        ":refuse - [0:0]",
        "-A INPUT -m conntrack --ctstate INVALID -j DROP",
        "-A INPUT -i vif+ -p udp --dport 68 -j DROP",
        "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A INPUT -i vif+ -p icmp -j ACCEPT",
        "-A INPUT -i lo -j ACCEPT",
        "-A INPUT -i vif+ -j REJECT --reject-with icmp-host-prohibited",
        "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
        "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A FORWARD -o vif+ -j DROP",
        "-A FORWARD -i vif+ -j clients",
    ]
    for chain, verdict in (("dns-accept", "ACCEPT"), ("dns-refuse", "refuse")):
        lines += [
            f"-A {chain} -p {proto} -m conntrack --ctorigdst {resolver} --ctorigdstport 53"
            f" -j {verdict}"
            for resolver in VIRTUAL_RESOLVERS
            for proto in ("udp", "tcp")
        ]
    lines += ["-A refuse -j REJECT --reject-with icmp-admin-prohibited", "COMMIT", ""]
    return "\n".join(lines)


def domain_rules(rules: Sequence[Rule], uuid: str, address: str, xid: int, now: float) -> str:
    """The text of one client, at whatever length. address: its IPv4.

    Host names stay names: the network qube resolves them when it loads the text, as it
    does with /qubes-firewall; where one has no address the text is not loaded, so that
    nothing of the client passes.
    """
    chain = f"q{xid}"
    lines = [
        *iptables_owner(uuid, address),
        "*filter",
        f":{chain} - [0:0]",
        f"-A clients -s {address} -j {chain}",
    ]
    for rule in rules:
        if not rule.expired(now):
            lines += [f"-A {chain} {match}" for match in _matches(rule)]
    lines += [f"-A {chain} -j refuse", "COMMIT", ""]
    return "\n".join(lines)


def keys(
    rules: Sequence[Rule] | None, uuid: str, address: str, xid: int, now: float
) -> tuple[tuple[tuple[str, str], ...], bool]:
    """((path, value) in write order, whether the client's rules are in them).

    rules None, or more of them than one guest key holds: nothing of the client passes.
    """
    text = domain_rules(rules or (), uuid, address, xid, now)
    fits = len(text) <= VALUE_LIMIT
    if not fits:
        text = domain_rules((), uuid, address, xid, now)
    entries = ((HEADER_KEY, header()), (f"{RULES_KEY}{xid}", text), (RELOAD_KEY, RELOAD))
    return entries, fits and rules is not None


def _matches(rule: Rule) -> Iterator[str]:
    """The rule as the ends of iptables commands; none where it can match no packet here."""
    accepts = rule.action == "accept"
    proto, icmptype = rule.proto, rule.icmptype
    if rule.destination is None:
        destinations = [""]
    elif rule.destination.problem():
        # As in /qubes-firewall: a name that nobody can look up would block everything.
        destinations = [] if accepts else [""]
    elif rule.destination.key == "dsthost":
        destinations = [f"-d {rule.destination.text}"]
    else:
        network = rule.destination.network()
        # The table has IPv4 alone.
        destinations = [f"-d {network}"] if rule.destination.key == "dst4" else []
    if rule.specialtarget == "dns":
        if proto == "icmp" or rule.dstports not in (None, (53, 53)):
            return
        if not accepts and destinations:
            # The address that the client asked may have become another one.
            destinations = [""]
        target = "dns-accept" if accepts else "dns-refuse"
    else:
        target = "ACCEPT" if accepts else "refuse"
    if icmptype == _ANY_TYPE:
        if accepts:
            return
        icmptype = None
    for destination in destinations:
        words = [destination] if destination else []
        if proto:
            words.append(f"-p {proto}")
        if rule.dstports is not None and rule.specialtarget != "dns":
            first, last = rule.dstports
            words.append(f"--dport {first}" if first == last else f"--dport {first}:{last}")
        if icmptype is not None:
            words.append(f"--icmp-type {icmptype}")
        yield " ".join([*words, f"-j {target}"])
