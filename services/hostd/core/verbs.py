"""The arguments of every verb, checked, and the names made from them.

Owns the grammar of what may reach root. Must not know how a verb is carried out.
Invariant: what comes out holds only numbers, canonical addresses and names of fixed
shape, so no argument can be read as an option, a path or a second command.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import dataclass

from bulkhead.model.refusal import Refusal

QID_LIMIT = 65535
UID_LIMIT = 2**31 - 1
# The operator's side of an uplink has this address; it is never routed.
OUTER_GATEWAY = "169.254.1.1"
INNER_UPLINK = "up0"

_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
_QUBE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,30}\Z")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z")
_PCI = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]\Z")


def _refuse(key: str, value: object, what: str) -> Refusal:
    return Refusal("INVALID_VALUE", f"{str(value)[:60]!r} is not {what}", key=key)


def check_qid(untrusted_qid: int, key: str = "qid") -> int:
    """1..QID_LIMIT. Refusal INVALID_VALUE."""
    if not 1 <= untrusted_qid <= QID_LIMIT:
        raise _refuse(key, untrusted_qid, f"a qid from 1 to {QID_LIMIT}")
    return untrusted_qid


def check_uid(untrusted_uid: int) -> int:
    """0..UID_LIMIT."""
    if not 0 <= untrusted_uid <= UID_LIMIT:
        raise _refuse("owner_uid", untrusted_uid, "a user id")
    return untrusted_uid


def check_address(untrusted_text: str, version: int, key: str) -> str:
    """Canonical text of a single unicast address; "" stays ""."""
    if untrusted_text == "":
        return ""
    try:
        address = ipaddress.ip_address(untrusted_text)
    except ValueError:
        raise _refuse(key, untrusted_text, f"an IPv{version} address") from None
    if address.version != version or "%" in untrusted_text:
        raise _refuse(key, untrusted_text, f"a plain IPv{version} address")
    if address.is_unspecified or address.is_multicast or address.is_loopback:
        raise _refuse(key, untrusted_text, "an address of a host")
    return str(address)


def check_namespace(untrusted_name: str) -> str:
    """A namespace that the operator named; "" = none."""
    if untrusted_name and not _NAMESPACE.match(untrusted_name):
        raise _refuse("uplink_namespace", untrusted_name, "a namespace's name")
    return untrusted_name


def check_qube(untrusted_name: str) -> str:
    """A qube's name as in a unit's instance."""
    if not _QUBE.match(untrusted_name):
        raise _refuse("qube", untrusted_name, "a qube's name")
    return untrusted_name


def check_mac(untrusted_text: str) -> str:
    """Lower-case aa:bb:cc:dd:ee:ff, no group address; "" = none."""
    if not untrusted_text:
        return ""
    text = untrusted_text.lower()
    if not _MAC.match(text) or int(text[:2], 16) & 1:
        raise _refuse("mac", untrusted_text, "the hardware address of one interface")
    return text


def check_pci(untrusted_text: str) -> str:
    """DDDD:BB:DD.F in lower-case hex digits."""
    if not _PCI.match(untrusted_text):
        raise _refuse("address", untrusted_text, "a PCI address like 0000:03:00.0")
    return untrusted_text


# ---- names


@dataclass(frozen=True, slots=True)
class Names:
    """Names of what one instance makes; tag "" for the instance of the whole machine.

    Other instances carry four hex digits, so that several on one machine do not meet
    and each cleans up only its own.
    """

    tag: str = ""

    @classmethod
    def of_root(cls, root: str) -> Names:
        """The names of the instance below root."""
        return cls("" if root == "/" else hashlib.sha256(root.encode()).hexdigest()[:4])

    def namespace(self, qid: int) -> str:
        """The namespace of a network qube."""
        return f"bh{self.tag}-net-{qid}"

    def tap(self, qid: int) -> str:
        """A qube's interface, in whichever namespace it is; at most 15 characters."""
        return f"bh{self.tag}-{qid}" if self.tag else f"bh{qid}"

    def uplink(self, qid: int) -> str:
        """The far end of a network qube's uplink, in the other namespace."""
        return f"bu{self.tag}-{qid}" if self.tag else f"bu{qid}"

    def qid_of_namespace(self, name: str) -> int:
        """The qid, or 0 for a name that is not ours."""
        return self._qid(name, f"bh{self.tag}-net-")

    def qid_of_tap(self, name: str) -> int:
        """The qid, or 0 for an interface that is not ours."""
        return self._qid(name, f"bh{self.tag}-" if self.tag else "bh")

    @staticmethod
    def _qid(name: str, prefix: str) -> int:
        digits = name.removeprefix(prefix)
        if digits == name or not digits.isascii() or not digits.isdigit() or len(digits) > 5:
            return 0
        return int(digits)


# ---- verbs with several arguments


@dataclass(frozen=True, slots=True)
class Link:
    """One point-to-point link: the client's addresses and the other side's. "" = none."""

    ip: str
    gateway: str
    ip6: str = ""
    gateway6: str = ""
    mac: str = ""


def check_link(
    untrusted_ip: str,
    untrusted_gateway: str,
    untrusted_ip6: str,
    untrusted_gateway6: str,
    untrusted_mac: str,
) -> Link:
    """A link with addresses of both ends per family, or none of that family."""
    link = Link(
        check_address(untrusted_ip, 4, "ip"),
        check_address(untrusted_gateway, 4, "gateway"),
        check_address(untrusted_ip6, 6, "ip6"),
        check_address(untrusted_gateway6, 6, "gateway6"),
        check_mac(untrusted_mac),
    )
    if not link.ip or not link.gateway:
        raise _refuse("ip", untrusted_ip, "complete: a link needs ip and gateway")
    if bool(link.ip6) != bool(link.gateway6):
        raise _refuse("ip6", untrusted_ip6, "complete: give ip6 and gateway6, or neither")
    if link.ip == link.gateway or (link.ip6 and link.ip6 == link.gateway6):
        raise _refuse("gateway", untrusted_gateway, "another address than the qube's")
    return link


def uplink_link(qid: int, untrusted_ip: str, untrusted_gateway: str) -> Link:
    """The addresses of an uplink; without any, those of an outermost network qube: the
    address that its qid has, and a gateway that is never routed."""
    ip = untrusted_ip or f"10.137.{qid >> 8}.{qid & 255}"
    return check_link(ip, untrusted_gateway or OUTER_GATEWAY, "", "", "")
