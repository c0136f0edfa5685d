"""Default network addresses, from a qube's number.

Owns the two formulas. Must not know records. Invariant: different numbers of one kind
give different addresses.
"""

from __future__ import annotations

import ipaddress

NETMASK = "255.255.255.255"
DNS: tuple[str, str] = ("10.139.1.1", "10.139.1.2")
_IPV6_PREFIX = "fd09:24ef:4179:0000"


def ipv4(number: int, *, disposable: bool) -> str:
    """IPv4 of a qid, or of a dispid where disposable; numbers 0 to 10000."""
    prefix = "10.138" if disposable else "10.137"
    if number < 255:
        return f"{prefix}.0.{number}"
    high, low = divmod(number - 1, 254)
    return f"{prefix}.{high}.{low + 1}"


def ipv6(number: int, *, disposable: bool) -> str:
    """IPv6 of a qid, or of a dispid where disposable, in compressed form."""
    host = "a8a" if disposable else "a89"
    return str(ipaddress.IPv6Address(f"{_IPV6_PREFIX}::{host}:{number:x}"))
