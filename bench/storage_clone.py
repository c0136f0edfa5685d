"""What a clone of a volume costs on top of the kernel's own clone.

A volume of 2 GiB, every block written, is cloned by the driver (new file, tags, fsync,
rename, fsync of the directories; a directory for the qube) and, in the same round,
by a bare FICLONE with the same fsyncs and nothing else. The median of the ratios of
neighbours counts, on XFS and btrfs. Also shown: start (a rename) and stop (a commit) in
the same unit, and a full copy once, for contrast. Exit status 1 above a limit.
Run as root: mounts file systems on sparse files.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bulkhead.durable import fsync_directory
from bulkhead.model.records import Pool, Volume
from services.storage.drivers import files
from services.storage.drivers.interface import Cancel, Driver
from services.storage.drivers.load import open_pool
from tests.fakes import loopfs

ROUNDS = 15
SIZE = 2 << 30
LIMIT = 4.0
OWNER = "6f5d4c3b-0000-4000-8000-000000000001"


def volume(qube: str) -> Volume:
    """An origin volume of that qube."""
    return Volume("private", "p", f"appvms/{qube}/private", SIZE, 1, True, True)


def fill(path: Path, size: int) -> None:
    """Write every block, durably."""
    data = os.urandom(8 << 20)
    with path.open("r+b") as file:
        for _ in range(size // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def timed(function: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bare_clone(source: Path, target: Path, durable: bool) -> None:
    """The floor: FICLONE, and, with durable, fsync of file and directory."""
    with source.open("rb") as one, target.open("wb") as two:
        if not files.ficlone(one.fileno(), two.fileno()):
            raise SystemExit(f"{source} cannot be cloned")
        if durable:
            os.fsync(two.fileno())
    if durable:
        fsync_directory(target.parent)


def clone(driver: Driver, qube: str) -> None:
    """As EnsureCloned does it."""
    with driver.committed(volume("source")) as state:
        driver.clone(OWNER, volume(qube), state, "op", Cancel())


def measure(kind: str, rounds: int, size: int) -> bool:
    """One file system; prints its lines. False above the limit."""
    with loopfs.mounted(kind, (3 * size >> 20) + 1024) as place:
        driver = open_pool(Pool("p", "file-reflink", {"dir_path": str(place / "pool")}))
        driver.setup()
        driver.ensure(OWNER, Volume("private", "p", "appvms/source/private", size, 1, True, True))
        clean = place / "pool/appvms/source/private.img"
        fill(clean, size)
        ratios, ours, floors, bares, starts, stops = [], [], [], [], [], []
        for number in range(rounds):
            qube = f"clone{number}"
            floor = timed(lambda: bare_clone(clean, place / "floor", True))
            (place / "floor").unlink()
            ours.append(timed(lambda: clone(driver, qube)))  # noqa: B023
            floors.append(floor)
            ratios.append(ours[-1] / floor)
            bares.append(timed(lambda: bare_clone(clean, place / "bare", False)))
            (place / "bare").unlink()
            one = volume(qube)
            starts.append(timed(lambda: driver.start(OWNER, "b", one, None, Cancel())))  # noqa: B023
            stops.append(timed(lambda: driver.stop(OWNER, "b", one, Cancel())))  # noqa: B023
            driver.remove(OWNER, one)
        whole = place / "whole"
        command = ["cp", "--reflink=never", "--sparse=always", str(clean), str(whole)]
        copied = timed(lambda: subprocess.run(command, check=True))
        ratio = statistics.median(ratios)
        mib = size >> 20
        print(f"{kind}: clone of {mib} MiB full, median of {rounds}")
        for name, values in (
            ("FICLONE alone", bares),
            ("FICLONE + fsync + fsync(dir)  [floor]", floors),
            ("driver clone", ours),
            ("driver start", starts),
            ("driver stop (commit)", stops),
        ):
            print(
                f"  {name:<40} {statistics.median(values) * 1e3:9.2f} ms"
                f"   (max {max(values) * 1e3:.1f})"
            )
        print(f"  {'full copy, once':<40} {copied * 1e3:9.2f} ms")
        print(f"  ratio driver clone / floor = {ratio:.2f} (limit {LIMIT})")
        return ratio <= LIMIT


def main() -> int:
    """0 within the limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--size", type=int, default=SIZE, help="bytes")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("storage_clone: run as root, it mounts file systems", file=sys.stderr)
        return 1
    good = [measure(kind, arguments.rounds, arguments.size) for kind in ("xfs", "btrfs")]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
