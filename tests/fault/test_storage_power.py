"""A power cut after each acknowledged call, and a file system that is full.

The file system is shut down without flushing anything (the GOINGDOWN ioctl) as soon as
the call has returned, then mounted again: what was acknowledged is there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bulkhead.model.records import Pool, Volume
from services.storage.core.reasons import StorageRefusal
from services.storage.drivers.directory.driver import DirectoryDriver
from services.storage.drivers.interface import Cancel, Driver
from services.storage.drivers.load import open_pool
from tests.fakes import loopfs

pytestmark = pytest.mark.fault

_GOINGDOWN = 0x8004587D
_NO_FLUSH = 2
MIB = 1 << 20
OWNER = "6f5d4c3b-0000-4000-8000-000000000001"
PRIVATE = Volume("private", "p", "appvms/work/private", MIB, 1, True, True)
COPY = Volume("private", "p", "appvms/copy/private", MIB, 1, True, True)
A, B = b"\xaa" * 4096, b"\xbb" * 4096


def cut_power(place: Path) -> None:
    """Lose everything that is not on the disk, and come back."""
    fd = os.open(place, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _GOINGDOWN, struct.pack("I", _NO_FLUSH))
    finally:
        os.close(fd)
    subprocess.run(["umount", str(place)], check=True)
    image = place.parent / "image"
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)


@pytest.fixture(scope="module", params=[("file-reflink", "xfs"), ("file", "ext4")])
def place(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path]]:
    driver, kind = request.param
    with loopfs.mounted(kind, 512) as path:
        yield driver, path


def guest_writes(path: str, data: bytes) -> None:
    """Write and flush, as a guest's fsync does."""
    if path.endswith(".qcow2"):
        write = f"write -P {data[0]} 0 {len(data)}"
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", write, "-c", "flush", path],
            check=True,
            capture_output=True,
        )
        return
    with Path(path).open("r+b") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def started(driver: Driver, data: bytes) -> None:
    device = driver.start(OWNER, "b", PRIVATE, None, Cancel())
    assert device is not None
    guest_writes(device.path, data)


def first_block(driver: Driver, volume: Volume = PRIVATE) -> bytes:
    with driver.committed(volume) as state:
        return os.pread(state.fd, 4096, 0)


def cloned(driver: Driver) -> None:
    with driver.committed(PRIVATE) as state:
        driver.clone(OWNER, COPY, state, "op", Cancel())


def imported(driver: Driver) -> None:
    target = driver.import_begin(OWNER, PRIVATE, 0, "op", False)
    guest_writes(target.path, B)
    driver.import_end(OWNER, PRIVATE, True, "op")


def check_clone(driver: Driver) -> None:
    assert first_block(driver, COPY) == A


def check_running(driver: Driver) -> None:
    """Running data is kept and committed by the next stop."""
    assert driver.describe(PRIVATE, None).is_dirty
    driver.stop(OWNER, "", PRIVATE, Cancel())
    assert first_block(driver) == B


def check_stopped(driver: Driver) -> None:
    state = driver.describe(PRIVATE, None)
    assert not state.is_dirty
    assert [r.id for r in state.revisions] == ["2"]
    assert first_block(driver) == B


def check_reverted(driver: Driver) -> None:
    assert first_block(driver) == bytes(4096)
    assert [r.id for r in driver.describe(PRIVATE, None).revisions] == ["2"]


def check_removed(driver: Driver) -> None:
    assert list(driver.inventory()) == []


def check_size(driver: Driver) -> None:
    assert driver.describe(PRIVATE, None).size == 2 * MIB
    assert first_block(driver) == A


def stopped(driver: Driver) -> None:
    started(driver, B)
    driver.stop(OWNER, "b", PRIVATE, Cancel())


CASES: dict[str, tuple[Callable[[Driver], object], Callable[[Driver], object]]] = {
    "clone": (cloned, check_clone),
    "start": (lambda d: started(d, B), check_running),
    "stop": (stopped, check_stopped),
    "import": (imported, check_stopped),
    "revert": (lambda d: d.revert(OWNER, PRIVATE, "1", "op"), check_reverted),
    "resize": (lambda d: d.resize(OWNER, PRIVATE, 2 * MIB, Cancel()), check_size),
    "remove": (lambda d: d.remove(OWNER, PRIVATE), check_removed),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_acknowledged_survives_a_power_cut(place: tuple[str, Path], case: str) -> None:
    name, path = place
    driver = open_pool(Pool("p", name, {"dir_path": str(path / case)}))
    assert isinstance(driver, DirectoryDriver)
    driver.setup()
    driver.ensure(OWNER, PRIVATE)
    started(driver, A)
    driver.stop(OWNER, "b", PRIVATE, Cancel())
    act, check = CASES[case]
    act(driver)
    cut_power(path)
    check(driver)


def test_a_stop_without_room_keeps_the_data_for_the_next() -> None:
    """The plain driver writes the whole state at stop: the one that can run out of room."""
    with loopfs.mounted("tmpfs", 8) as path:
        driver = open_pool(Pool("p", "file", {"dir_path": str(path / "p")}))
        driver.setup()
        driver.ensure(OWNER, PRIVATE)
        started(driver, A)
        filler = path / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
            while True:
                file.write(bytes(65536))
        before = sorted(p.name for p in path.rglob("*"))
        with pytest.raises((OSError, StorageRefusal)) as caught:
            driver.stop(OWNER, "b", PRIVATE, Cancel())
        assert getattr(caught.value, "errno", None) == errno.ENOSPC
        assert sorted(p.name for p in path.rglob("*")) == before
        assert driver.describe(PRIVATE, None).is_dirty
        filler.unlink()
        driver.stop(OWNER, "b", PRIVATE, Cancel())
        assert first_block(driver) == A
