"""PCI functions of this host, from sysfs and the list of names.

Owns reading /sys/bus/pci. Must not know facts or the bus. Invariant: what cannot be read
is left out; nothing here opens a device.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from services.domains.core.devices import PciFunction

SYSFS = Path("/sys/bus/pci/devices")
NAMES = (Path("/usr/share/hwdata/pci.ids"), Path("/usr/share/misc/pci.ids"))
_SBDF = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


def functions(directory: Path = SYSFS) -> tuple[PciFunction, ...]:
    """All functions but bridges; blocking, some milliseconds."""
    found = []
    try:
        entries = sorted(directory.iterdir())
    except OSError:
        return ()
    for entry in entries:
        function = _function(entry)
        if function is not None:
            found.append(function)
    return tuple(found)


def _hex(path: Path, digits: int) -> str:
    return path.read_text().strip().removeprefix("0x").zfill(digits)[-digits:]


def _function(entry: Path) -> PciFunction | None:
    try:
        real = entry.resolve(strict=True)
        pci_class = _hex(real / "class", 6)
        if pci_class.startswith("0604"):
            return None  # a bridge is part of others' paths, nothing that a qube could have
        vendor_id, product_id = _hex(real / "vendor", 4), _hex(real / "device", 4)
        above = []
        for parent in reversed(real.parents):
            if _SBDF.fullmatch(parent.name):
                behind = (parent / "secondary_bus_number").read_text()
                above.append((parent.name, int(behind)))
    except (OSError, ValueError):
        return None
    vendor, product = _names().get((vendor_id, product_id), ("", ""))
    if not vendor:
        vendor = _names().get((vendor_id, ""), ("", ""))[0]
    return PciFunction(entry.name, vendor_id, product_id, pci_class, tuple(above), vendor, product)


@lru_cache(maxsize=1)
def _names() -> dict[tuple[str, str], tuple[str, str]]:
    """(vendor, product) names by ids; (vendor id, "") has the vendor's alone."""
    for path in NAMES:
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        return _parse_names(text)
    return {}


def _parse_names(text: str) -> dict[tuple[str, str], tuple[str, str]]:
    names: dict[tuple[str, str], tuple[str, str]] = {}
    vendor_id = vendor = ""
    for line in text.splitlines():
        if line.startswith("C "):
            break  # classes follow
        if not line.strip() or line.startswith(("#", "\t\t")):
            continue
        number, _, name = line.strip().partition("  ")
        if not line.startswith("\t"):
            vendor_id, vendor = number, name
            names[(vendor_id, "")] = (vendor, "")
        else:
            names[(vendor_id, number)] = (vendor, name)
    return names
