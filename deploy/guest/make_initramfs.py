"""Makes the initramfs of a small guest: busybox, virtio or Xen modules, one init script.

Run as: python3 make_initramfs.py KERNEL_DIRECTORY OUTPUT. KERNEL_DIRECTORY is what
fetch-kernel.sh made. Needs busybox (static), no root. In the guest the init script loads
the modules and mounts the first disk read-only, then hands over to its /sbin/init. Without a
first disk it stays itself, says on the console

    BULKHEAD initramfs
    BULKHEAD disk NAME SIZE_IN_512_BYTE_SECTORS    for each disk, whenever that changes
    BULKHEAD ready

and powers off when told to by the hypervisor's power button (or at once with bh.once).
"""

from __future__ import annotations

import argparse
import gzip
import io
import stat
import sys
from pathlib import Path

BUSYBOX = ("/bin/busybox", "/usr/bin/busybox", "/usr/sbin/busybox")
APPLETS = ("sh", "mount", "insmod", "switch_root", "sleep", "cat", "echo", "grep", "poweroff",
           "acpid", "ls", "mknod", "usleep")  # fmt: skip
# Each after what it needs; one that the kernel has built in is not in the directory.
MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev",
           "virtio_pci", "virtio_blk", "failover", "net_failover", "virtio_net",
           "virtio_balloon", "evdev", "button", "xen-blkfront", "xen-netfront")  # fmt: skip

INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
exec >/dev/console 2>&1 </dev/console
while read -r module; do
  insmod "/modules/$module.ko"
done </modules/order
for word in $(cat /proc/cmdline); do
  case "$word" in
    bh.once) once=1 ;;
  esac
done
# A disk may take a moment; a guest without one does not wait long.
n=0
while [ ! -b /dev/vda ] && [ ! -b /dev/xvda ] && [ "$n" -lt 20 ]; do
  usleep 50000
  n=$((n + 1))
done
first=/dev/vda
[ -b /dev/xvda ] && first=/dev/xvda
if [ -b "$first" ] && mount -t ext4 -o ro "$first" /root 2>/dev/null; then
  mount -o move /dev /root/dev
  exec switch_root /root /sbin/init
fi
echo "BULKHEAD initramfs"
[ -n "$once" ] && echo "BULKHEAD ready" && poweroff -f
# Xen has no power button: its kernel runs /sbin/poweroff itself.
if [ "$(cat /sys/hypervisor/type 2>/dev/null)" != xen ]; then
  acpid -f -d -c /etc/acpi >/dev/null 2>&1 &
  # A press of the power button before this moment would be lost.
  n=0
  until ls -l "/proc/$!/fd" 2>/dev/null | grep -q event || [ "$n" -gt 100 ]; do
    usleep 20000
    n=$((n + 1))
  done
fi
echo "BULKHEAD ready"
said=""
while :; do
  now=""
  for disk in /sys/block/vd* /sys/block/xvd*; do
    [ -e "$disk" ] && now="$now BULKHEAD disk ${disk##*/} $(cat "$disk/size");"
  done
  if [ "$now" != "$said" ]; then
    echo "$now"
    said=$now
  fi
  usleep 100000
done
"""

# By its path: one of these is the first "poweroff" that a search finds.
POWER = """#!/bin/sh
exec /bin/poweroff -f
"""


class Archive:
    """A cpio archive in the "newc" format, all owned by root, all times 0."""

    def __init__(self) -> None:
        self._data = io.BytesIO()
        self._inode = 0

    def add(
        self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        """One entry; mode with its file type."""
        self._inode += 1
        fields = (
            self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0,
        )  # fmt: skip
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._write(header + name.encode() + b"\0")
        self._write(content)

    def _write(self, data: bytes) -> None:
        self._data.write(data)
        self._data.write(b"\0" * (-len(data) % 4))

    def finish(self) -> bytes:
        """The whole archive."""
        self.add("TRAILER!!!", 0)
        return self._data.getvalue()


def busybox() -> Path:
    """The static busybox of this machine; SystemExit when there is none."""
    for name in BUSYBOX:
        if Path(name).exists():
            return Path(name)
    raise SystemExit(
        "busybox is not installed: install busybox-static (Debian) or busybox (Fedora)"
    )


def build(kernel: Path) -> bytes:
    """The compressed archive; the same input gives the same bytes."""
    present = [name for name in MODULES if (kernel / f"modules/{name}.ko").exists()]
    if not {"virtio_blk", "xen-blkfront"} & set(present):
        raise SystemExit(f"{kernel}/modules holds no virtio_blk.ko: run fetch-kernel.sh {kernel}")
    archive = Archive()
    for name in (
        "bin",
        "dev",
        "etc",
        "etc/acpi",
        "etc/acpi/PWRF",
        "modules",
        "proc",
        "root",
        "sbin",
        "sys",
    ):
        archive.add(name, stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("dev/null", stat.S_IFCHR | 0o666, device=(1, 3))
    archive.add("bin/busybox", stat.S_IFREG | 0o755, busybox().read_bytes())
    for applet in APPLETS:
        archive.add(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox")
    for name in present:
        content = (kernel / f"modules/{name}.ko").read_bytes()
        archive.add(f"modules/{name}.ko", stat.S_IFREG | 0o644, content)
    archive.add("modules/order", stat.S_IFREG | 0o644, ("\n".join(present) + "\n").encode())
    archive.add("etc/acpi/PWRF/00000080", stat.S_IFREG | 0o755, POWER.encode())
    archive.add("sbin/poweroff", stat.S_IFREG | 0o755, POWER.encode())
    archive.add("init", stat.S_IFREG | 0o755, INIT.encode())
    return gzip.compress(archive.finish(), compresslevel=6, mtime=0)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make a small guest's initramfs.")
    parser.add_argument("kernel", type=Path, help="directory that fetch-kernel.sh filled")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    args.output.write_bytes(build(args.kernel))
    return 0


if __name__ == "__main__":
    sys.exit(main())
