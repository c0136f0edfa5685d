"""Whether the interface that a guest has is the one that it shall have.

Owns what tells two interfaces apart. Must not know libvirt. Invariant: one that hangs at
another backend is never taken for the wanted one.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plugging:
    """What tells an interface from another: MAC, backend and addresses."""

    mac: str
    backend: str
    addresses: frozenset[str]

    @classmethod
    def of(cls, interface: ET.Element) -> Plugging:
        mac, backend = interface.find("mac"), interface.find("backenddomain")
        return cls(
            (mac.get("address") or "").lower() if mac is not None else "",
            (backend.get("name") or "") if backend is not None else "",
            frozenset(ip.get("address") or "" for ip in interface.findall("ip")),
        )

    def same(self, wanted: Plugging) -> bool:
        """Addresses count where the hypervisor tells them."""
        return (self.mac, self.backend) == (wanted.mac, wanted.backend) and (
            not self.addresses or self.addresses == wanted.addresses
        )
