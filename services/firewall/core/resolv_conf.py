"""The name servers in a text in the format of resolv.conf.

Owns that one line's form. Invariant: only plain addresses come out; a scoped address
means nothing in another namespace and is left out.
"""

from __future__ import annotations

import ipaddress


def name_servers(untrusted_text: str) -> tuple[str, ...]:
    """Canonical addresses of the "nameserver" lines, in order, each once."""
    found: dict[str, None] = {}
    for line in untrusted_text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver" or "%" in words[1]:
            continue
        try:
            found[str(ipaddress.ip_address(words[1]))] = None
        except ValueError:
            continue
    return tuple(found)
