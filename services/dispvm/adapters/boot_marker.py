"""Tells the first start after a boot of the host from a restart of the service.

Owns one small file that holds the kernel's boot id. Invariant: the marker is written
only after the work for this boot is done, so a kill in between repeats the work.
"""

from __future__ import annotations

from pathlib import Path

from bulkhead.durable import write_file
from bulkhead.failpoints import hit

KERNEL_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class BootMarker:
    """The marker below the service's run directory."""

    def __init__(self, directory: Path, kernel_boot_id: Path = KERNEL_BOOT_ID) -> None:
        self.path = directory / "host-boot"
        self.current = kernel_boot_id.read_text().strip()

    def fresh(self) -> bool:
        """True when nothing was cleaned up since the host booted."""
        try:
            return self.path.read_text().strip() != self.current
        except FileNotFoundError:
            return True

    def done(self) -> None:
        """The clean-up of this boot is complete."""
        hit("dispvm.boot_marker.before")
        write_file(self.path, self.current.encode() + b"\n")
        hit("dispvm.boot_marker.after")
