"""Devices that backends offer, and who has them.

Owns turning raw descriptions (PCI functions of the host, block devices that guests name
in their keys) into device facts, and the book of what is attached where. Must not know
where descriptions come from. Invariant: text of a guest reaches a fact only after it
matched a pattern or was cut and stripped to printable ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from bulkhead.model.records import ADMINVM_UUID, DeviceFact, fact_key

from .spec import DiskSpec

UNKNOWN = "0000:0000::?******"
BLOCK_KEYS = "/qubes-block-devices/"
# More than any backend has; a guest shall not fill our memory.
PER_BACKEND = 256
TEXT = 128
_BLOCK = re.compile(r"[a-z0-9-]{1,12}")
_USB_PARENT = re.compile(r"([0-9]+-[0-9.]{1,16})(?::([0-9]+)\.([0-9]+))?")
_SBDF = re.compile(r"([0-9a-f]{4}):([0-9a-f]{2}):([0-9a-f]{2}\.[0-7])")


@dataclass(frozen=True, slots=True)
class PciFunction:
    """One PCI function of the host.

    sbdf "0000:03:00.0"; above: the bridges it is behind, outermost first, each with the
    number of the bus behind it; ids are four hex digits, pci_class six.
    """

    sbdf: str
    vendor_id: str
    product_id: str
    pci_class: str
    above: tuple[tuple[str, int], ...] = ()
    vendor: str = ""
    product: str = ""


def pci_port(function: PciFunction) -> str:
    """The bus path: "00_1f.2", behind bridges "00_1c.0-00_00.0" with relative buses."""
    parts: list[str] = []
    base = 0
    for sbdf, behind in (*function.above, (function.sbdf, 0)):
        match = _SBDF.fullmatch(sbdf)
        if match is None:
            raise ValueError(f"{sbdf} is no PCI address")
        domain, bus, rest = match.groups()
        prefix = f"{domain}_" if not parts and domain != "0000" else ""
        parts.append(f"{prefix}{(int(bus, 16) - base) & 0xFF:02x}_{rest}")
        base = behind
    return "-".join(parts)


def pci_fact(function: PciFunction) -> DeviceFact:
    """The device fact of a PCI function, offered by dom0."""
    interface = f"p{function.pci_class}"
    fields = {"vendor": function.vendor, "product": function.product}
    return DeviceFact(
        backend_uuid=ADMINVM_UUID,
        devclass="pci",
        port=pci_port(function),
        device_id=f"{function.vendor_id}:{function.product_id}::{interface}",
        fields={name: _text(value) for name, value in fields.items() if value},
        interfaces=interface,
        data={"sbdf": function.sbdf},
    )


def _text(untrusted_value: str) -> str:
    """Printable ASCII, without what the device format reserves, at most 128 characters."""
    kept = "".join(c if " " <= c <= "~" else "_" for c in untrusted_value[:TEXT])
    return kept.replace("='", "=_").strip()


def block_facts(backend_uuid: str, untrusted_keys: Mapping[str, str]) -> tuple[DeviceFact, ...]:
    """Block devices that a guest names below /qubes-block-devices/; bad ones are left out."""
    rows: dict[str, dict[str, str]] = {}
    for untrusted_path, untrusted_value in untrusted_keys.items():
        parts = untrusted_path.removeprefix(BLOCK_KEYS).split("/")
        if len(parts) != 2 or _BLOCK.fullmatch(parts[0]) is None:
            continue
        if parts[0] not in rows and len(rows) >= PER_BACKEND:
            continue
        rows.setdefault(parts[0], {})[parts[1]] = untrusted_value
    facts = []
    for port, untrusted in sorted(rows.items()):
        size, mode = untrusted.get("size", ""), untrusted.get("mode", "")
        if re.fullmatch(r"[0-9]{1,20}", size) is None or mode not in ("r", "w"):
            continue
        parent_port, parent_class, number = _block_parent(port, untrusted.get("parent", ""), rows)
        name = _text(untrusted.get("desc", ""))
        facts.append(
            DeviceFact(
                backend_uuid=backend_uuid,
                devclass="block",
                port=port,
                device_id=f"{UNKNOWN}:{number}",
                fields={"name": name} if name else {},
                interfaces="b******",
                data={"mode": mode, "size": size},
                parent_port=parent_port,
                parent_devclass=parent_class,
            )
        )
    return tuple(facts)


def _block_parent(
    port: str, untrusted_parent: str, rows: Mapping[str, object]
) -> tuple[str, str, str]:
    """(parent port, its class, partition or interface number) of a block device."""
    if untrusted_parent in rows and untrusted_parent != port:
        return untrusted_parent, "block", port.removeprefix(untrusted_parent).lstrip("p") or "0"
    usb = _USB_PARENT.fullmatch(untrusted_parent)
    if usb is not None:
        return usb.group(1), "usb", usb.group(3) or "0"
    return "", "", "0"


class DeviceBook:
    """What every backend offers and every frontend has.

    Keys of facts are those of the registry: "device/BACKEND/CLASS/PORT".
    """

    def __init__(self) -> None:
        self._offered: dict[str, tuple[DeviceFact, ...]] = {}
        self._disks: dict[str, tuple[DiskSpec, ...]] = {}
        self._functions: dict[str, tuple[str, ...]] = {}
        self._names: dict[str, str] = {}

    def offer(self, source: str, facts: Iterable[DeviceFact]) -> None:
        """All that a source of descriptions (a backend's uuid, "host") knows now."""
        offered = tuple(facts)
        if offered:
            self._offered[source] = offered
        else:
            self._offered.pop(source, None)

    def has(self, uuid: str, name: str, disks: Iterable[DiskSpec], pci: Iterable[str]) -> None:
        """The domain called name has these disks and PCI functions ("0000:03:00.0") now."""
        self._names[name] = uuid
        self._disks[uuid] = tuple(disks)
        self._functions[uuid] = tuple(pci)

    def gone(self, uuid: str) -> None:
        """The domain ended: it offers nothing and has nothing."""
        # A hypervisor may list devices of guests too.
        for source in list(self._offered):
            self.offer(source, (f for f in self._offered[source] if f.backend_uuid != uuid))
        self._disks.pop(uuid, None)
        self._functions.pop(uuid, None)
        self._names = {name: other for name, other in self._names.items() if other != uuid}

    def facts(self) -> dict[str, DeviceFact]:
        """Every offered device, with who has it."""
        attached: dict[tuple[str, str, str], tuple[str, dict[str, str]]] = {}
        for frontend, disks in self._disks.items():
            for disk in disks:
                port = disk.path.removeprefix("/dev/").replace("/", "_")
                backend = disk.backend_uuid or (
                    self._names.get(disk.backend, "") if disk.backend else ADMINVM_UUID
                )
                options = {
                    "frontend-dev": disk.target,
                    "read-only": "no" if disk.rw else "yes",
                    "devtype": disk.devtype,
                }
                attached[(backend, "block", port)] = (frontend, options)
        functions = {sbdf: frontend for frontend, rows in self._functions.items() for sbdf in rows}
        result = {}
        for offered in self._offered.values():
            for fact in offered:
                frontend, options = attached.get(
                    (fact.backend_uuid, fact.devclass, fact.port), ("", {})
                )
                if fact.devclass == "pci":
                    frontend = functions.get(fact.data.get("sbdf", ""), "")
                shown = replace(fact, attached_to=frontend, attach_options=options)
                result[fact_key(shown)] = shown
        return result
