"""Makes a small guest's root image: ext4, busybox, one init script that reports.

Run as: python3 make_root.py IMAGE --version TEXT [--size-mib N]. Needs busybox (static)
and mkfs.ext4, no root and no mount. The guest reads its address and what to try from the
kernel command line (bh.ip= bh.gw= bh.try=HOST:PORT,... bh.once), says on the console

    BULKHEAD root VERSION
    BULKHEAD port HOST:PORT open|closed
    BULKHEAD ready

and then powers off (bh.once) or stays until it is told to.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BUSYBOX = ("/bin/busybox", "/usr/bin/busybox", "/usr/sbin/busybox")
APPLETS = ("sh", "mount", "ip", "nc", "timeout", "sleep", "cat", "echo", "poweroff", "acpid",
           "grep", "mknod", "insmod", "ls", "usleep")  # fmt: skip

INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
exec >/dev/console 2>&1 </dev/console
echo "BULKHEAD root $(cat /etc/version)"
for word in $(cat /proc/cmdline); do
  case "$word" in
    bh.ip=*) address=${word#bh.ip=} ;;
    bh.gw=*) gateway=${word#bh.gw=} ;;
    bh.try=*) targets=${word#bh.try=} ;;
    bh.once) once=1 ;;
  esac
done
ip link set lo up
if [ -n "$address" ]; then
  ip addr add "$address/32" dev eth0
  ip link set eth0 up
  ip route add "$gateway" dev eth0
  ip route add default via "$gateway" dev eth0
fi
IFS=,
for target in $targets; do
  host=${target%:*}
  port=${target#*:}
  if timeout 3 nc -w 3 "$host" "$port" </dev/null | grep -q hello; then
    echo "BULKHEAD port $target open"
  else
    echo "BULKHEAD port $target closed"
  fi
done
unset IFS
[ -n "$once" ] && echo "BULKHEAD ready" && poweroff -f
# The power button of the hypervisor ends the guest.
acpid -f -d -c /etc/acpi >/dev/null 2>&1 &
# A press before this moment would be lost.
n=0
until ls -l "/proc/$!/fd" 2>/dev/null | grep -q event || [ "$n" -gt 100 ]; do
  usleep 20000
  n=$((n + 1))
done
echo "BULKHEAD ready"
while :; do sleep 3600; done
"""

POWER = """#!/bin/sh
poweroff -f
"""


def busybox() -> Path:
    """The static busybox of this machine; SystemExit when there is none."""
    for name in BUSYBOX:
        if Path(name).exists():
            return Path(name)
    raise SystemExit(
        "busybox is not installed: install busybox-static (Debian) or busybox (Fedora)"
    )


def build(image: Path, *, version: str, size_mib: int) -> None:
    """Write the image, replacing an older one."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "root"
        for name in ("bin", "sbin", "etc/acpi/PWRF", "proc", "sys", "dev", "rw", "mnt"):
            (tree / name).mkdir(parents=True)
        shutil.copy(busybox(), tree / "bin/busybox")
        for applet in APPLETS:
            (tree / "bin" / applet).symlink_to("busybox")
        for path, text in (
            ("sbin/init", INIT),
            ("etc/acpi/PWRF/00000080", POWER),
            ("etc/version", version + "\n"),
        ):
            (tree / path).write_text(text)
            (tree / path).chmod(0o755)
        image.unlink(missing_ok=True)
        with image.open("wb") as file:
            os.truncate(file.fileno(), size_mib << 20)
        tool = shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin:/bin")
        if tool is None:
            raise SystemExit("mkfs.ext4 is not installed: install e2fsprogs")
        subprocess.run(
            [tool, "-q", "-F", "-d", str(tree), "-E", "root_owner=0:0", "-O", "^has_journal",
             str(image)],
            check=True,
        )  # fmt: skip


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make a small guest's root image.")
    parser.add_argument("image", type=Path)
    parser.add_argument("--version", default="1")
    parser.add_argument("--size-mib", type=int, default=64)
    args = parser.parse_args()
    build(args.image, version=args.version, size_mib=args.size_mib)
    return 0


if __name__ == "__main__":
    sys.exit(main())
