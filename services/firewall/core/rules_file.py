"""The text of a qube's rules file, versions 1 (read) and 2 (read and written).

Owns the XML of firewall.xml. Must not know paths nor clocks. Invariant: a file that
holds anything outside the grammar is refused whole, never read in part, because a
dropped rule could open what it closed.
"""

from __future__ import annotations

from collections.abc import Iterable
from xml.etree import ElementTree

from bulkhead.model.firewall_rules import Rule, make_rule, properties
from bulkhead.model.refusal import Refusal

SIZE_LIMIT = 4 * 1024 * 1024


class RulesFileError(ValueError):
    """The file is no rules file; the message says why."""


class _PlainBuilder(ElementTree.TreeBuilder):
    """Refuses document types, so that no entity can be declared."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        del name, pubid, system  # whatever it says, it is not wanted
        raise RulesFileError("a document type is not allowed")


def render(rules: Iterable[Rule], now: float) -> bytes:
    """Version 2, UTF-8, without the rules that have expired at now (epoch seconds)."""
    root = ElementTree.Element("firewall", version="2")
    listed = ElementTree.SubElement(root, "rules")
    for rule in rules:
        if rule.expired(now):
            continue
        holder = ElementTree.SubElement(ElementTree.SubElement(listed, "rule"), "properties")
        for name, text in properties(rule):
            ElementTree.SubElement(holder, "property", name=name).text = text
    ElementTree.indent(root, "  ")
    body: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return body + b"\n"


def parse(untrusted_data: bytes) -> tuple[Rule, ...]:
    """The rules of a version 1 or 2 file, expired ones included. RulesFileError."""
    if len(untrusted_data) > SIZE_LIMIT:
        raise RulesFileError(f"longer than {SIZE_LIMIT} bytes")
    parser = ElementTree.XMLParser(target=_PlainBuilder())
    try:
        parser.feed(untrusted_data)
        root = parser.close()
    except ElementTree.ParseError as error:
        raise RulesFileError(f"not XML: {error}") from error
    if root.tag != "firewall":
        raise RulesFileError(f"the root element is <{root.tag}>, not <firewall>")
    version = root.get("version", "1")
    try:
        if version == "2":
            return _parse_v2(root)
        if version == "1":
            return _parse_v1(root)
    except Refusal as refusal:
        raise RulesFileError(refusal.message) from refusal
    raise RulesFileError(f"version {version} is unknown; 1 and 2 are read")


def _parse_v2(root: ElementTree.Element) -> tuple[Rule, ...]:
    listed = root.find("rules")
    if listed is None:
        raise RulesFileError("no <rules>")
    rules: list[Rule] = []
    for element in listed:
        holder = element.find("properties")
        if element.tag != "rule" or holder is None:
            raise RulesFileError("an entry of <rules> is no <rule> with <properties>")
        untrusted_values: dict[str, str] = {}
        for item in holder:
            name = item.get("name", "")
            if item.tag != "property" or not name or name in untrusted_values:
                raise RulesFileError("a rule's <property> has no name, or one name twice")
            untrusted_values[name] = item.text or ""
        rules.append(make_rule(untrusted_values))
    return tuple(rules)


def _opposite(action: str) -> str:
    return "drop" if action == "accept" else "accept"


def _action(root: ElementTree.Element, attribute: str, default: str) -> str:
    untrusted_text = root.get(attribute)
    if untrusted_text is None:
        return default
    if untrusted_text not in ("allow", "deny"):
        raise RulesFileError(f"{attribute} is neither allow nor deny")
    return "accept" if untrusted_text == "allow" else "drop"


def _parse_v1(root: ElementTree.Element) -> tuple[Rule, ...]:
    policy = _action(root, "policy", "")
    if not policy:
        raise RulesFileError("version 1 without policy")
    rules = [
        make_rule({"action": _action(root, "dns", policy), "specialtarget": "dns"}),
        make_rule({"action": _action(root, "icmp", policy), "proto": "icmp"}),
    ]
    for element in root:
        untrusted_values = {"action": _opposite(policy)}
        untrusted_address = element.get("address", "")
        if untrusted_address:
            # Length 0 was written for "not given": the full length.
            untrusted_length = element.get("netmask", "32")
            if untrusted_length in ("0", "32"):
                untrusted_values["dsthost"] = untrusted_address
            else:
                untrusted_values["dsthost"] = f"{untrusted_address}/{untrusted_length}"
        untrusted_proto = element.get("proto", "any")
        if untrusted_proto != "any":
            untrusted_values["proto"] = untrusted_proto
        untrusted_port = element.get("port", "")
        if untrusted_port and untrusted_port != "0":
            untrusted_last = element.get("toport", "")
            untrusted_values["dstports"] = (
                f"{untrusted_port}-{untrusted_last}"
                if untrusted_last and untrusted_last != "0"
                else untrusted_port
            )
            untrusted_values.setdefault("proto", "tcp")
        untrusted_expire = element.get("expire", "")
        if untrusted_expire and untrusted_expire != "0":
            untrusted_values["expire"] = untrusted_expire
        rules.append(make_rule(untrusted_values))
    if policy == "accept":
        rules.append(make_rule({"action": "accept"}))
    return tuple(rules)
