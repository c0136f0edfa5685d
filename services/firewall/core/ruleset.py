"""Rules and targets as nftables commands: the pure translation.

Owns the table `inet bulkhead` of a network qube's namespace: its chains, sets and the
commands that change them. Must not know how commands reach the kernel. Invariants: a
list of commands is one transaction; every command names this table only; a qube's
chain is reached by its interface alone; what no chain accepts is dropped.

The table:
  prerouting   raw: an uplink may not claim a client's address; a client's packet must
               carry the address of its interface; any other interface is dropped
  to_resolvers the virtual resolvers become the real ones (only where there are any)
  input        nothing but answers, ICMP from clients and neighbour discovery
  forward      policy drop: established, related; never anew towards a client; then the
               map by_interface leads to the qube's own chain
  leak         raw: a client's address goes out to clients only
  masquerade   on the uplink
  q_UUID       one per qube, replaced whole; ends with the policy (reject)
  g_UUID       one rule, never reached: its comment is the digest of the transaction
               that made q_UUID, so a reader sees which rules the kernel holds
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import uuid as uuids
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bulkhead.model.firewall_rules import Rule, api_line
from bulkhead.model.refusal import Refusal

TABLE = "inet bulkhead"
# The resolvers that every client is told; a network qube rewrites them to real ones.
VIRTUAL_RESOLVERS: tuple[str, ...] = ("10.139.1.1", "10.139.1.2")
BASE_COUNTERS: tuple[str, ...] = (
    "spoofed",
    "unknown",
    "invalid",
    "between",
    "leaked",
    "unmatched",
    "refused_input",
)
REJECT = "reject with icmpx admin-prohibited"

# How a list of addresses by host name reaches the translation: name -> addresses known
# now; a name that is absent or empty is unresolved.
Addresses = Mapping[str, Sequence[str]]

# Numbers, because names would be looked up in a file that need not be there.
_NUMBERS = {"tcp": 6, "udp": 17}
_INTERFACE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,14}\Z")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a qube's rules hang. uuid and netvm_uuid: canonical text. ip, ip6: "" = none."""

    uuid: str
    qube: str
    boot_id: str
    netvm_uuid: str
    namespace: str
    interface: str
    ip: str
    ip6: str


@dataclass(frozen=True, slots=True)
class Compiled:
    """One rule translated. matches: nft expressions, none where the rule is inert."""

    rule: Rule
    matches: tuple[str, ...]
    why: str = ""

    @property
    def inert(self) -> bool:
        """The rule matches no packet at all; why says the reason."""
        return not self.matches


@dataclass(frozen=True, slots=True)
class Transaction:
    """Commands that the kernel takes together or not at all, and what proves them.

    marks: tag of a qube -> digest that its g_ chain must show afterwards ("" = absent).
    """

    commands: tuple[str, ...]
    marks: Mapping[str, str]


def _refuse(why: str, **metadata: str) -> Refusal:
    return Refusal("INVALID_VALUE", f"invalid firewall target: {why}", **metadata)


def make_target(
    untrusted_uuid: str,
    qube: str,
    boot_id: str,
    netvm_uuid: str,
    namespace: str,
    untrusted_interface: str,
    untrusted_ip: str,
    untrusted_ip6: str,
) -> Target:
    """A checked target; Refusal INVALID_VALUE where a part would not be safe in a command.

    A target without netvm is never enforced: it may lack interface and addresses.
    """
    tag(untrusted_uuid)
    if netvm_uuid:
        tag(netvm_uuid)
    if untrusted_interface and not _INTERFACE.match(untrusted_interface):
        raise _refuse(f"{untrusted_interface[:40]!r} is no interface name", key="interface")
    addresses: list[str] = []
    for key, untrusted_text, version in (("ip", untrusted_ip, 4), ("ip6", untrusted_ip6, 6)):
        if not untrusted_text:
            addresses.append("")
            continue
        try:
            address = ipaddress.ip_address(untrusted_text)
        except ValueError:
            raise _refuse(f"{untrusted_text[:60]!r} is no address", key=key) from None
        if address.version != version or "%" in untrusted_text:
            raise _refuse(f"{untrusted_text[:60]!r} is no IPv{version} address", key=key)
        addresses.append(str(address))
    if netvm_uuid and namespace and not untrusted_interface:
        raise _refuse("a namespace without an interface", key="interface")
    return Target(
        untrusted_uuid,
        qube,
        boot_id,
        netvm_uuid,
        namespace,
        # A plan needs a name too; no interface of a kernel is meant.
        untrusted_interface or f"v{tag(untrusted_uuid)[:12]}",
        addresses[0],
        addresses[1],
    )


def check_interface(untrusted_name: str) -> str:
    """The name, if it can stand in a command. Refusal INVALID_VALUE."""
    if not _INTERFACE.match(untrusted_name):
        raise _refuse(f"{untrusted_name[:40]!r} is no interface name", key="interface")
    return untrusted_name


def tag(untrusted_uuid: str) -> str:
    """The part of object names that stands for a qube: its uuid in 32 hex digits."""
    try:
        return uuids.UUID(untrusted_uuid).hex
    except ValueError:
        raise _refuse(f"{untrusted_uuid[:60]!r} is no uuid", key="uuid") from None


# ---- what an enforce worker may be told

_COMMAND = re.compile(
    r"(add|delete|flush) (table|chain|set|map|element|counter|rule) inet bulkhead( [^\n\\`$]*)?\Z"
)
COMMAND_LIMIT = 16 * 1024


def check_command(untrusted_command: str) -> str:
    """The command, if it changes this table and nothing else. Refusal INVALID_VALUE.

    The shape is checked, not the meaning: one command, one line, no include and no
    variable, named for this table.
    """
    if (
        len(untrusted_command) > COMMAND_LIMIT
        or not untrusted_command.isascii()
        or not _COMMAND.match(untrusted_command)
    ):
        raise _refuse(f"{untrusted_command[:80]!r} is no command on table {TABLE}", key="command")
    outside = re.sub(r"\{[^{}]*\}", "", re.sub(r'"[^"]*"', "", untrusted_command))
    if ";" in outside or '"' in outside:
        raise _refuse(f"{untrusted_command[:80]!r} is more than one command", key="command")
    return untrusted_command


# ---- one rule


def _family(address: str) -> str:
    return "ip6" if ":" in address else "ip"


def _set_of(addresses: Iterable[str], version: int) -> str:
    """ "{ a, b }" of one family in numeric order; "" when none is."""
    parsed = {ipaddress.ip_address(text) for text in addresses}
    chosen = sorted(int(address) for address in parsed if address.version == version)
    if not chosen:
        return ""
    make = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address
    return "{ " + ", ".join(str(make(number)) for number in chosen) + " }"


def _ports(ports: tuple[int, int]) -> str:
    first, last = ports
    return str(first) if first == last else f"{first}-{last}"


def compile_rule(rule: Rule, addresses: Addresses) -> Compiled:
    """The packets that the rule speaks of, as alternatives of nft expressions.

    A host name without addresses: an accepting rule matches nothing; a dropping rule
    matches every destination, since what it would have closed is unknown.
    """
    why = ""
    heads: list[tuple[str, int]] = [("", 0)]  # (expression, IP version; 0 = both)
    if rule.destination is not None:
        network = rule.destination.network()
        if network is not None:
            word = "ip" if network.version == 4 else "ip6"
            # Written even for /0: it keeps the rule to its family.
            heads = [(f"{word} daddr {network}", network.version)]
        else:
            known = addresses.get(rule.destination.text, ())
            heads = [
                (f"{word} daddr {text}", version)
                for word, version in (("ip", 4), ("ip6", 6))
                if (text := _set_of(known, version))
            ]
            if not heads:
                why = rule.destination.problem() or (
                    f"{rule.destination.text} has no known address"
                )
                if rule.action == "accept":
                    return Compiled(rule, (), why)
                why += ": every destination is dropped instead"
                heads = [("", 0)]
    if rule.specialtarget == "dns":
        heads, dns_why = _dns_heads(rule, heads)
        if not heads:
            return Compiled(rule, (), dns_why)
        return Compiled(rule, tuple(head for head, _ in heads), why)
    tails = _tails(rule)
    matches = tuple(
        " ".join(part for part in (head, tail) if part)
        for head, version in heads
        for tail, tail_version in tails
        if not version or not tail_version or version == tail_version
    )
    return Compiled(rule, matches, why)


def _dns_heads(rule: Rule, heads: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], str]:
    if rule.proto == "icmp":
        return [], "resolvers are not reached by icmp"
    if rule.dstports is not None and rule.dstports != (53, 53):
        return [], "resolvers listen on port 53 only"
    protos = (rule.proto,) if rule.proto else ("tcp", "udp")
    result = [
        (" ".join(p for p in (head, f"{word} daddr @dns{own}", f"{proto} dport 53") if p), own)
        for head, version in heads
        for word, own in (("ip", 4), ("ip6", 6))
        if version in (0, own)
        for proto in protos
    ]
    return result, ""


def _tails(rule: Rule) -> list[tuple[str, int]]:
    if rule.proto == "icmp":
        if rule.icmptype is None:
            return [("meta l4proto 1", 4), ("meta l4proto 58", 6)]
        return [(f"icmp type {rule.icmptype}", 4), (f"icmpv6 type {rule.icmptype}", 6)]
    if not rule.proto:
        return [("", 0)]
    if rule.dstports is None:
        return [(f"meta l4proto {_NUMBERS[rule.proto]}", 0)]
    return [(f"{rule.proto} dport {_ports(rule.dstports)}", 0)]


def compile_rules(
    rules: Sequence[Rule], addresses: Addresses, strict: bool = False
) -> tuple[Compiled, ...]:
    """Every rule in order. strict: one unresolved host name makes all of them inert."""
    compiled = tuple(compile_rule(rule, addresses) for rule in rules)
    if strict and any(item.why and _by_name(item.rule) for item in compiled):
        return tuple(
            Compiled(item.rule, (), item.why or "another rule's host has no known address")
            for item in compiled
        )
    return compiled


def _by_name(rule: Rule) -> bool:
    return rule.destination is not None and rule.destination.key == "dsthost"


def host_names(rules: Iterable[Rule]) -> tuple[str, ...]:
    """The host names that the rules speak of, each once, in order."""
    names = {
        rule.destination.text: None
        for rule in rules
        if rule.destination is not None and rule.destination.key == "dsthost"
    }
    return tuple(names)


# ---- the table


def _base_chain(name: str, kind: str, hook: str, priority: str, policy: str) -> str:
    return (
        f"add chain {TABLE} {name} "
        f"{{ type {kind} hook {hook} priority {priority} ; policy {policy} ; }}"
    )


def base_commands(uplink: str, resolvers: Sequence[str]) -> tuple[str, ...]:
    """The whole table without clients, replacing any earlier one.

    uplink: interface towards the netvm's own netvm, "" = none. resolvers: addresses of
    real resolvers; empty: clients' queries go on to the virtual ones.
    """
    t = TABLE
    commands = [f"add table {t}", f"delete table {t}", f"add table {t}"]
    commands += [f"add counter {t} {name}" for name in BASE_COUNTERS]
    spoofed = "counter name spoofed drop"
    commands += [
        f"add set {t} uplinks {{ type ifname ; }}",
        f"add set {t} clients {{ type ifname ; }}",
        f"add set {t} clients6 {{ type ifname ; }}",
        f"add set {t} source4 {{ type ifname . ipv4_addr ; }}",
        f"add set {t} source6 {{ type ifname . ipv6_addr ; }}",
        f"add set {t} address4 {{ type ipv4_addr ; }}",
        f"add set {t} address6 {{ type ipv6_addr ; }}",
        f"add set {t} dns4 {{ type ipv4_addr ; }}",
        f"add set {t} dns6 {{ type ipv6_addr ; }}",
        f"add map {t} by_interface {{ type ifname : verdict ; }}",
        _base_chain("prerouting", "filter", "prerouting", "raw", "accept"),
        _base_chain("input", "filter", "input", "filter", "drop"),
        _base_chain("forward", "filter", "forward", "filter", "drop"),
        _base_chain("leak", "filter", "postrouting", "raw", "accept"),
        _base_chain("masquerading", "nat", "postrouting", "srcnat", "accept"),
        f'add rule {t} prerouting iifname "lo" accept',
        f"add rule {t} prerouting iifname != @clients ip saddr @address4 {spoofed}",
        f"add rule {t} prerouting iifname != @clients ip6 saddr @address6 {spoofed}",
        f"add rule {t} prerouting iifname @uplinks accept",
        f"add rule {t} prerouting iifname != @clients counter name unknown drop",
        f"add rule {t} prerouting iifname . ip saddr @source4 accept",
        f"add rule {t} prerouting iifname . ip6 saddr @source6 accept",
        f"add rule {t} prerouting iifname @clients6 ip6 saddr {{ ::, fe80::/10 }} "
        "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept",
        f"add rule {t} prerouting counter name spoofed drop",
        f'add rule {t} input iifname "lo" accept',
        f"add rule {t} input ct state invalid counter name invalid drop",
        f"add rule {t} input ct state established,related accept",
        f"add rule {t} input icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept",
        f"add rule {t} input iifname @uplinks icmpv6 type nd-router-advert accept",
        f"add rule {t} input iifname @clients meta l4proto 1 accept",
        f"add rule {t} input iifname @clients icmpv6 type echo-request accept",
        f"add rule {t} input counter name refused_input drop",
        f"add rule {t} forward ct state invalid counter name invalid drop",
        f"add rule {t} forward ct state established,related accept",
        f"add rule {t} forward oifname @clients counter name between drop",
        f"add rule {t} forward iifname vmap @by_interface",
        f"add rule {t} forward counter name unmatched drop",
        f"add rule {t} leak oifname != @clients ip daddr @address4 counter name leaked drop",
        f"add rule {t} leak oifname != @clients ip6 daddr @address6 counter name leaked drop",
        f"add rule {t} masquerading oifname @uplinks masquerade",
    ]
    if uplink:
        commands.append(f'add element {t} uplinks {{ "{check_interface(uplink)}" }}')
    commands += _resolver_commands(resolvers)
    return tuple(commands)


def _resolver_commands(resolvers: Sequence[str]) -> list[str]:
    t = TABLE
    four = [text for text in resolvers if ipaddress.ip_address(text).version == 4]
    commands: list[str] = []
    for version, extra in ((4, VIRTUAL_RESOLVERS), (6, ())):
        elements = _set_of((*resolvers, *extra), version)
        if elements:
            commands.append(f"add element {t} dns{version} {elements}")
    if four:
        commands.append(_base_chain("to_resolvers", "nat", "prerouting", "dstnat", "accept"))
        for number, virtual in enumerate(VIRTUAL_RESOLVERS):
            real = four[number % len(four)]
            for proto in ("udp", "tcp"):
                match = f"ip daddr {virtual} {proto} dport 53"
                commands.append(f"add rule {t} to_resolvers {match} dnat ip to {real}")
    return commands


def _elements(target: Target) -> list[tuple[str, str]]:
    """(set or map, element) of a client; the map's element carries its verdict."""
    quoted = f'"{target.interface}"'
    elements = [
        ("clients", quoted),
        ("by_interface", f"{quoted} : goto q_{tag(target.uuid)}"),
    ]
    if target.ip:
        elements += [("source4", f"{quoted} . {target.ip}"), ("address4", target.ip)]
    if target.ip6:
        elements += [
            ("source6", f"{quoted} . {target.ip6}"),
            ("address6", target.ip6),
            ("clients6", quoted),
        ]
    return elements


def _chain_commands(target: Target, compiled: Sequence[Compiled], mark: str) -> list[str]:
    own = tag(target.uuid)
    commands = [
        f"add chain {TABLE} q_{own}",
        f"flush chain {TABLE} q_{own}",
        f"add chain {TABLE} g_{own}",
        f"flush chain {TABLE} g_{own}",
        f'add rule {TABLE} g_{own} counter comment "{mark}"',
    ]
    for number, item in enumerate(compiled):
        verdict = "accept" if item.rule.action == "accept" else REJECT
        for match in item.matches:
            head = f"{match} " if match else ""
            commands.append(f'add rule {TABLE} q_{own} {head}counter {verdict} comment "r{number}"')
    commands.append(f'add rule {TABLE} q_{own} counter {REJECT} comment "policy"')
    return commands


def mark_of(target: Target, compiled: Sequence[Compiled]) -> str:
    """Digest of everything that the kernel is given for the qube; 16 hex digits."""
    parts = [target.interface, target.ip, target.ip6]
    parts += [f"{item.rule.action}|{'|'.join(item.matches)}" for item in compiled]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def removal_commands(target: Target) -> list[str]:
    """Take the qube out of every set and map; accepted also where it never was in.

    The chains stay (see withdraw): other commands of the transaction may need them.
    """
    own = tag(target.uuid)
    commands = [f"add chain {TABLE} q_{own}"]
    for name, element in _elements(target):
        # Deleting what is not there fails; adding what is there does not.
        commands.append(f"add element {TABLE} {name} {{ {element} }}")
        commands.append(f"delete element {TABLE} {name} {{ {element} }}")
    return commands


def apply(
    target: Target, compiled: Sequence[Compiled], former: Sequence[Target] = ()
) -> Transaction:
    """Replace the qube's chain and places, in one transaction.

    former: targets whose places it takes over: its own earlier one where interface or
    address differ, and any other qube's on the same interface or address.
    """
    mark = mark_of(target, compiled)
    marks = {tag(target.uuid): mark}
    commands: list[str] = []
    for old in former:
        commands += removal_commands(old)
        if old.uuid != target.uuid:
            commands += _drop_chains(old.uuid)
            marks[tag(old.uuid)] = ""
    commands += _chain_commands(target, compiled, mark)
    commands += [
        f"add element {TABLE} {name} {{ {element} }}" for name, element in _elements(target)
    ]
    return Transaction(tuple(commands), marks)


def block(target: Target, former: Sequence[Target] = ()) -> Transaction:
    """The qube's chain refuses everything."""
    return apply(target, (), former)


def withdraw(target: Target) -> Transaction:
    """The qube leaves the table; its interface is unknown from then on, so dropped."""
    commands = removal_commands(target)
    commands += _drop_chains(target.uuid)
    return Transaction(tuple(commands), {tag(target.uuid): ""})


def _drop_chains(uuid: str) -> list[str]:
    commands: list[str] = []
    for name in (f"q_{tag(uuid)}", f"g_{tag(uuid)}"):
        commands += [
            f"add chain {TABLE} {name}",
            f"flush chain {TABLE} {name}",
            f"delete chain {TABLE} {name}",
        ]
    return commands


def define(
    uplink: str,
    resolvers: Sequence[str],
    clients: Sequence[tuple[Target, Sequence[Compiled]]],
) -> Transaction:
    """The whole table with all clients, replacing any earlier one in one transaction."""
    commands = list(base_commands(uplink, resolvers))
    marks: dict[str, str] = {}
    for target, compiled in clients:
        one = apply(target, compiled)
        commands += one.commands
        marks.update(one.marks)
    return Transaction(tuple(commands), marks)


def remove_table() -> Transaction:
    """The table goes; used only when its namespace goes too."""
    return Transaction((f"add table {TABLE}", f"delete table {TABLE}"), {})


def describe(compiled: Sequence[Compiled]) -> tuple[tuple[str, bool, str], ...]:
    """(API line, inert, why) per rule, for people."""
    return tuple((api_line(item.rule), item.inert, item.why) for item in compiled)
