"""The grammar of firewall rules: one rule as a value, and its four text forms.

Owns parsing of an untrusted rule and the texts made from a rule: the API line, the
value that a network qube reads from its guest keys, and the properties of the rules
file. Must not know where rules are stored or how they are enforced. Invariant: a Rule
that exists is valid, so no text made from one can hold a character outside
[A-Za-z0-9:;,./_[]-] (and a space in a comment), and parsing a line made from a rule
gives an equal rule.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bulkhead.model.refusal import Refusal

# Text order of all forms. In an API line the comment is moved to the end.
ORDER: tuple[str, ...] = (
    "action",
    "comment",
    "expire",
    "dsthost",
    "proto",
    "specialtarget",
    "dstports",
    "icmptype",
)
DESTINATION_KEYS = frozenset({"dsthost", "dst4", "dst6", "dstname"})
ACTIONS = frozenset({"accept", "drop"})
PROTOCOLS = frozenset({"tcp", "udp", "icmp"})
SPECIAL_TARGETS = frozenset({"dns"})
# A guest key's value holds at most this many bytes, its number four digits.
VALUE_LIMIT = 3072
RULES_LIMIT = 10_000
POLICY = "drop"

_VALUE = re.compile(r"[A-Za-z0-9:;,./_\[\]-]*\Z")
_COMMENT = re.compile(r"[A-Za-z0-9:;,./_\[\] -]*\Z")
_DIGITS = re.compile(r"[0-9]+\Z")
_HOST = re.compile(r"[a-z0-9._-]*\Z")
_HOST_LIMIT = 253
_LABEL_LIMIT = 63
_EXPIRE_DIGITS = 15
_NUMBER_DIGITS = 10  # with leading zeros
_PORT_LIMIT = 65535


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a rule points. key: "dst4" or "dst6" (text is ADDRESS/LENGTH) or "dsthost".

    The text is as it was set: host bits, letter case and zeros before the length stay.
    A host name has a name's characters, and need not be one that can be looked up.
    """

    key: str
    text: str

    def network(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
        """The network with its host bits cleared; None for a host name."""
        if self.key == "dsthost":
            return None
        return ipaddress.ip_network(self.text, strict=False)

    def problem(self) -> str:
        """Why a host name cannot be looked up by anybody, "" where it can or is none.

        "127.1" and "1.2.3" are read as addresses by some resolvers and as names by others.
        """
        if self.key != "dsthost":
            return ""
        if not self.text:
            return "the host name is empty"
        labels = self.text.removesuffix(".").split(".")
        if len(self.text) > _HOST_LIMIT or any(len(label) > _LABEL_LIMIT for label in labels):
            return f"{self.text[:40]}... is longer than a host name can be"
        if not all(labels) or self.text.startswith("-"):
            return f"{self.text} is no host name"
        if labels[-1].isdigit():
            return f"{self.text} ends in a number: write the whole address"
        return ""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, valid by construction when made by this module.

    expire: seconds since the epoch as text ("" = never). dstports: (first, last),
    both 0..65535. "" or None: the key is absent.
    """

    action: str
    destination: Destination | None = None
    proto: str = ""
    specialtarget: str = ""
    dstports: tuple[int, int] | None = None
    icmptype: int | None = None
    expire: str = ""
    comment: str = ""

    def expired(self, now: float) -> bool:
        """True when now (seconds since the epoch) is past the rule's end."""
        return self.expire != "" and int(self.expire) < now


DEFAULT_RULES: tuple[Rule, ...] = (Rule("accept"),)


def _refuse(why: str, **metadata: str) -> Refusal:
    return Refusal("INVALID_RULE", f"invalid firewall rule: {why}", **metadata)


# ---- single values


def parse_destination(untrusted_text: str) -> Destination:
    """An address, a network or a host name, whichever key it came under.

    Refusal INVALID_RULE. Host bits of a network are kept in the text (a reader sees
    what was set) and ignored by network(); so is a host name that nobody can look up,
    see Destination.problem().
    """
    untrusted_text = _plain("dsthost", untrusted_text)
    if "/" in untrusted_text:
        return _parse_network(untrusted_text)
    try:
        address = ipaddress.ip_address(untrusted_text)
    except ValueError:
        return Destination("dsthost", _host_name(untrusted_text))
    if address.version == 4:
        return Destination("dst4", f"{untrusted_text}/32")
    return Destination("dst6", f"{untrusted_text}/128")


def _parse_network(untrusted_text: str) -> Destination:
    untrusted_address, _, untrusted_length = untrusted_text.partition("/")
    try:
        address = ipaddress.ip_address(untrusted_address)
    except ValueError:
        raise _refuse(
            f"{untrusted_text} is no network: {untrusted_address} is no full address",
            key="dsthost",
            value=untrusted_text,
        ) from None
    limit = 32 if address.version == 4 else 128
    if not _DIGITS.match(untrusted_length):
        raise _refuse(
            f"{untrusted_text} has no decimal prefix length", key="dsthost", value=untrusted_text
        )
    if len(untrusted_length) > _NUMBER_DIGITS or int(untrusted_length) > limit:
        raise _refuse(
            f"{untrusted_text} has a prefix length over {limit}",
            key="dsthost",
            value=untrusted_text,
        )
    return Destination("dst4" if address.version == 4 else "dst6", untrusted_text)


def _host_name(untrusted_name: str) -> str:
    if not _HOST.match(untrusted_name):
        raise _refuse(
            f"{untrusted_name[:80]} is neither an address nor a host name of lower-case "
            "letters, digits, '-', '.' and '_'",
            key="dsthost",
            value=untrusted_name[:80],
        )
    return untrusted_name


def parse_ports(untrusted_text: str) -> tuple[int, int]:
    """ "N" or "N-M", 0..65535, N <= M. Refusal INVALID_RULE."""
    untrusted_first, dash, untrusted_last = untrusted_text.partition("-")
    if not dash:
        untrusted_last = untrusted_first
    for untrusted_number in (untrusted_first, untrusted_last):
        if not _DIGITS.match(untrusted_number) or len(untrusted_number) > _NUMBER_DIGITS:
            raise _refuse(
                f"dstports {untrusted_text[:80]} is not N or N-M",
                key="dstports",
                value=untrusted_text[:80],
            )
    first, last = int(untrusted_first), int(untrusted_last)
    if last > _PORT_LIMIT or first > last:
        raise _refuse(
            f"dstports {untrusted_text} is not a range within 0-{_PORT_LIMIT}",
            key="dstports",
            value=untrusted_text,
        )
    return first, last


def _parse_icmptype(untrusted_text: str) -> int:
    if not _DIGITS.match(untrusted_text) or len(untrusted_text) > 3 or int(untrusted_text) > 255:
        raise _refuse(
            f"icmptype {untrusted_text[:80]} is not 0..255",
            key="icmptype",
            value=untrusted_text[:80],
        )
    return int(untrusted_text)


def _parse_expire(untrusted_text: str) -> str:
    if not _DIGITS.match(untrusted_text) or len(untrusted_text) > _EXPIRE_DIGITS:
        raise _refuse(
            f"expire {untrusted_text[:80]} is not a number of seconds since 1970",
            key="expire",
            value=untrusted_text[:80],
        )
    return untrusted_text


def _one_of(key: str, untrusted_text: str, allowed: frozenset[str]) -> str:
    if untrusted_text not in allowed:
        raise _refuse(
            f"{key} {untrusted_text[:80]} is none of {', '.join(sorted(allowed))}",
            key=key,
            value=untrusted_text[:80],
        )
    return untrusted_text


def _plain(key: str, untrusted_text: str) -> str:
    if not _VALUE.match(untrusted_text):
        raise _refuse(f"{key} holds a character outside letters, digits and :;,./-_[]", key=key)
    return untrusted_text


# ---- rules


def make_rule(untrusted_values: Mapping[str, str]) -> Rule:
    """A rule from {key: text}; keys as in an API line (dst4, dst6, dsthost, dstname ...).

    Refusal INVALID_RULE: unknown key, no action, a value outside its grammar, two
    destinations, ports without tcp or udp, an ICMP type without icmp, or too long for
    a guest key.
    """
    values: dict[str, str] = {}
    for key, untrusted_text in untrusted_values.items():
        name = "dsthost" if key in DESTINATION_KEYS else key
        if name not in ORDER:
            raise _refuse(f"unknown key {key[:40]!r}", key=key[:40])
        if name in values:
            raise _refuse("more than one destination", key=key)
        if name == "comment":
            if not _COMMENT.match(untrusted_text):
                raise _refuse(
                    "the comment holds a character outside letters, digits, space and :;,./-_[]",
                    key="comment",
                )
        else:
            untrusted_text = _plain(name, untrusted_text)
        values[name] = untrusted_text
    if "action" not in values:
        raise _refuse("no action; give action=accept or action=drop", key="action")
    rule = Rule(
        action=_one_of("action", values["action"], ACTIONS),
        destination=parse_destination(values["dsthost"]) if "dsthost" in values else None,
        proto=_one_of("proto", values["proto"], PROTOCOLS) if "proto" in values else "",
        specialtarget=_one_of("specialtarget", values["specialtarget"], SPECIAL_TARGETS)
        if "specialtarget" in values
        else "",
        dstports=parse_ports(values["dstports"]) if "dstports" in values else None,
        icmptype=_parse_icmptype(values["icmptype"]) if "icmptype" in values else None,
        expire=_parse_expire(values["expire"]) if "expire" in values else "",
        comment=values.get("comment", ""),
    )
    if rule.dstports is not None and rule.proto not in ("tcp", "udp"):
        raise _refuse("dstports needs proto=tcp or proto=udp", key="dstports")
    if rule.icmptype is not None and rule.proto != "icmp":
        raise _refuse("icmptype needs proto=icmp", key="icmptype")
    if len(guest_value(rule)) > VALUE_LIMIT:
        raise _refuse(f"longer than {VALUE_LIMIT} bytes")
    return rule


def with_proto(rule: Rule, untrusted_proto: str) -> Rule:
    """The rule with another protocol ("" = any); options that no longer fit are dropped."""
    proto = _one_of("proto", untrusted_proto, PROTOCOLS) if untrusted_proto else ""
    return replace(
        rule,
        proto=proto,
        dstports=rule.dstports if proto in ("tcp", "udp") else None,
        icmptype=rule.icmptype if proto == "icmp" else None,
    )


def parse_line(untrusted_line: str) -> Rule:
    """A rule from one API line: KEY=VALUE tokens parted by single spaces, comment last.

    Space around the line's keys is ignored. Refusal INVALID_RULE; an empty line, a double
    space and a repeated key are refused.
    """
    untrusted_head, found, untrusted_comment = untrusted_line.partition("comment=")
    untrusted_values: dict[str, str] = {}
    for untrusted_token in untrusted_head.strip().split(" "):
        key, equals, untrusted_text = untrusted_token.partition("=")
        if not equals:
            raise _refuse(
                f"{untrusted_token[:80]!r} is not KEY=VALUE; keys are parted by one space"
            )
        if key in untrusted_values:
            raise _refuse(f"key {key[:40]!r} given twice", key=key[:40])
        untrusted_values[key] = untrusted_text
    if found and untrusted_comment:
        untrusted_values["comment"] = untrusted_comment
    return make_rule(untrusted_values)


def parse_lines(untrusted_lines: Iterable[str]) -> tuple[Rule, ...]:
    """All lines, or Refusal INVALID_RULE that names the first bad one (metadata "number").

    The list may be empty: then everything is dropped.
    """
    rules: list[Rule] = []
    for number, untrusted_line in enumerate(untrusted_lines, start=1):
        if number > RULES_LIMIT:
            raise _refuse(f"more than {RULES_LIMIT} rules")
        try:
            rules.append(parse_line(untrusted_line))
        except Refusal as refusal:
            metadata = {**refusal.metadata, "number": str(number)}
            raise Refusal(
                refusal.reason, f"{refusal.message} (rule {number})", **metadata
            ) from None
    return tuple(rules)


# ---- texts


def _ports_text(ports: tuple[int, int]) -> str:
    return f"{ports[0]}-{ports[1]}"


def _parts(rule: Rule) -> list[tuple[str, str]]:
    """(key, text) in ORDER as API lines and guest values print them."""
    parts = [("action", rule.action)]
    if rule.comment:
        parts.append(("comment", rule.comment))
    if rule.expire:
        parts.append(("expire", rule.expire))
    if rule.destination is not None:
        parts.append((rule.destination.key, rule.destination.text))
    if rule.proto:
        parts.append(("proto", rule.proto))
    if rule.specialtarget:
        parts.append(("specialtarget", rule.specialtarget))
    if rule.dstports is not None:
        parts.append(("dstports", _ports_text(rule.dstports)))
    if rule.icmptype is not None:
        parts.append(("icmptype", str(rule.icmptype)))
    return parts


def api_line(rule: Rule) -> str:
    """The rule as admin.vm.firewall.Get prints it, without a newline."""
    parts = _parts(rule)
    ordered = [part for part in parts if part[0] != "comment"]
    ordered += [part for part in parts if part[0] == "comment"]
    return " ".join(f"{key}={text}" for key, text in ordered)


def api_lines(rules: Iterable[Rule], now: float) -> tuple[str, ...]:
    """Lines of the rules that have not expired at now (seconds since the epoch)."""
    return tuple(api_line(rule) for rule in rules if not rule.expired(now))


def guest_value(rule: Rule) -> str:
    """The rule as a network qube reads it from its guest keys: no expire, no comment.

    A prefix length without zeros before it, which the kernel's tool does not take.
    """
    return " ".join(
        f"{key}={_plain_length(text) if key in ('dst4', 'dst6') else text}"
        for key, text in _parts(rule)
        if key not in ("expire", "comment")
    )


def _plain_length(text: str) -> str:
    address, _, length = text.partition("/")
    return f"{address}/{int(length)}"


def properties(rule: Rule) -> tuple[tuple[str, str], ...]:
    """(name, text) of the rules file's <property> elements, in ORDER.

    The destination is always named dsthost; one port is printed as N.
    """
    result: list[tuple[str, str]] = []
    for key, text in _parts(rule):
        if key in DESTINATION_KEYS:
            key = "dsthost"
        elif key == "dstports" and rule.dstports is not None:
            first, last = rule.dstports
            text = str(first) if first == last else text
        result.append((key, text))
    return tuple(result)


def same_rule(one: Rule, other: Rule, now: float) -> bool:
    """True when both print the same API line; two expired rules print nothing, so are equal."""
    if one.expired(now) or other.expired(now):
        return one.expired(now) and other.expired(now)
    return api_line(one) == api_line(other)


def digest(rules: Sequence[Rule]) -> str:
    """Hex sha256 of the rules' API lines, whatever the time; equal lists, equal digests."""
    text = "".join(f"{api_line(rule)}\n" for rule in rules)
    return hashlib.sha256(text.encode()).hexdigest()


def iptables_owner(uuid: str, address: str) -> tuple[str, str]:
    """The first lines of a client's iptables-save text: comments that say whose it is, and
    by which it is found where the client left."""
    return f"# {uuid}", f"# {address}"
