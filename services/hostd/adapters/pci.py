"""Binding PCI devices to the driver that hands them to guests.

Owns a few files of sysfs. Must not know qubes. All methods block. Invariant: after a
kill anywhere, repeating the verb ends in the asked state.
"""

from __future__ import annotations

from pathlib import Path

from bulkhead import failpoints
from services.hostd import failpoint_table  # noqa: F401  (declares the rows)

XEN_STUB = "pciback"
KVM_STUB = "vfio-pci"


class DeviceMissing(LookupError):
    """There is no such device."""


class PciBinding:
    """Devices below SYSFS/bus/pci."""

    def __init__(self, stub: str, sysfs: Path = Path("/sys")) -> None:
        """stub: the driver that keeps a device for guests."""
        self._stub = stub
        self._bus = sysfs / "bus/pci"

    def _driver(self, device: Path) -> str:
        link = device / "driver"
        return link.resolve().name if link.is_symlink() else ""

    def bind(self, address: str, stub: bool) -> None:
        """To the stub, or back to the kernel's own choice. DeviceMissing, OSError."""
        device = self._bus / "devices" / address
        if not device.exists():
            raise DeviceMissing(address)
        if stub and self._driver(device) == self._stub:
            return
        if not stub and self._driver(device) not in ("", self._stub):
            return
        # A newline empties it: the kernel chooses again.
        (device / "driver_override").write_text(f"{self._stub}\n" if stub else "\n")
        failpoints.hit("hostd.pci.after_override")
        if self._driver(device):
            (device / "driver/unbind").write_text(address)
        failpoints.hit("hostd.pci.after_unbind")
        (self._bus / "drivers_probe").write_text(address)
        if stub and self._driver(device) != self._stub:
            raise OSError(f"{address} did not bind to {self._stub}; is its module loaded?")
