"""Every step of every driver operation, killed there, then repeated.

An operation is run once undisturbed to see which failpoints it passes and where it ends.
Then, for each of these points, on a fresh copy of the same beginning: a process is killed
there (SIGKILL), or the step fails with an error; the state must be usable, and the same
call again must end where the undisturbed one did. With BULKHEAD_FAULT_KILLS=2 the repeat is
killed at each of its points too, before a third call.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bulkhead import failpoints
from bulkhead.model.records import Pool, Volume
from services.storage import failpoint_table  # noqa: F401
from services.storage.core.names import classify
from services.storage.core.reasons import StorageRefusal
from services.storage.core.states import Found
from services.storage.drivers import files
from services.storage.drivers.directory.driver import DirectoryDriver
from services.storage.drivers.interface import Cancel, Driver
from services.storage.drivers.linux_kernel import LinuxKernelDriver
from services.storage.drivers.load import open_pool
from tests.fakes import loopfs

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]

KIB = 1 << 10
OWNER = "6f5d4c3b-0000-4000-8000-000000000001"
OTHER = "6f5d4c3b-0000-4000-8000-000000000002"
FULL = os.environ.get("BULKHEAD_FAULT_KILLS") == "2"

PRIVATE = Volume("private", "p", "appvms/work/private", 256 * KIB, 1, True, True)
SECOND = Volume("private", "p", "appvms/second/private", 256 * KIB, 1, True, True)
TEMPLATE = Volume("root", "p", "vm-templates/tmpl/root", 256 * KIB, 1, True, True)
CHILD = Volume("root", "p", "appvms/work/root", 256 * KIB, 0, True, False, True, TEMPLATE.vid)
VOLATILE = Volume("volatile", "p", "appvms/work/volatile", 128 * KIB, 0, True)
A, B = b"\xaa" * 4096, b"\xbb" * 4096


def write(path: str, data: bytes) -> None:
    """As the guest does: by a rewrite of the format's own tool where it is no raw file."""
    if path.endswith(".qcow2"):
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", f"write -P {data[0]} 0 {len(data)}", path],
            check=True,
            capture_output=True,
        )
    else:
        with Path(path).open("r+b") as file:
            file.write(data)


def run(driver: Driver, volume: Volume, data: bytes, owner: str = OWNER) -> None:
    """A run of the qube that writes data and ends without a stop."""
    device = driver.start(owner, "boot-1", volume, None, Cancel())
    assert device is not None
    write(device.path, data)


def cycle(driver: Driver, volume: Volume, data: bytes, owner: str = OWNER) -> None:
    run(driver, volume, data, owner)
    driver.stop(owner, "boot-1", volume, Cancel())


def two_states(driver: Driver, volume: Volume = PRIVATE) -> None:
    """A current state, A, and one revision, zeroes."""
    driver.ensure(OWNER, volume)
    cycle(driver, volume, A)


def without_ready_copy(driver: Driver) -> None:
    two_states(driver)
    assert isinstance(driver, DirectoryDriver)
    (driver.root / "appvms/work/private-precache.img").unlink(missing_ok=True)


def template(driver: Driver) -> None:
    driver.ensure(OTHER, TEMPLATE)
    cycle(driver, TEMPLATE, A, OTHER)


def importing(driver: Driver) -> None:
    two_states(driver)
    target = driver.import_begin(OWNER, PRIVATE, 512 * KIB, "op", False)
    write(target.path, B)


def awaiting(driver: Driver) -> None:
    two_states(driver)
    write(driver.import_begin(OWNER, PRIVATE, 0, "op", True).path, B)


def with_child(driver: Driver) -> None:
    template(driver)
    run(driver, CHILD, B)


def untagged(driver: Driver) -> None:
    assert isinstance(driver, DirectoryDriver)
    (driver.root / "appvms/work").mkdir()
    (driver.root / "appvms/work/private.img").write_bytes(A)


def everything(driver: Driver) -> None:
    two_states(driver)
    run(driver, PRIVATE, B)


def copied(driver: Driver, fill: bool) -> None:
    with driver.committed(TEMPLATE) as state:
        step = driver.clone if fill else driver.replace
        step(OWNER, PRIVATE, state, "op", Cancel())


def start(volume: Volume, boot: str = "boot-2") -> Callable[[Driver], object]:
    return lambda driver: driver.start(OWNER, boot, volume, None, Cancel())


def stop(volume: Volume) -> Callable[[Driver], object]:
    return lambda driver: driver.stop(OWNER, "boot-1", volume, Cancel())


def quarantine(driver: Driver) -> None:
    driver.quarantine(Found(PRIVATE.vid, OWNER, "", "committed", True))


def nothing(_: Driver) -> None:
    pass


def in_order(*parts: Callable[[Driver], object]) -> Callable[[Driver], object]:
    """One preparation after the other."""

    def prepare(driver: Driver) -> None:
        for part in parts:
            part(driver)

    return prepare


IN_PLACE = replace(PRIVATE, revisions_to_keep=-1)
NO_REVISIONS = replace(PRIVATE, revisions_to_keep=0)


@dataclass(frozen=True)
class Scenario:
    """prepare, then the operation that is disturbed."""

    name: str
    prepare: Callable[[Driver], object]
    operate: Callable[[Driver], object]


SCENARIOS = [
    Scenario("ensure", nothing, lambda d: d.ensure(OWNER, PRIVATE)),
    Scenario("ensure-beside-untagged", untagged, lambda d: d.ensure(OWNER, PRIVATE)),
    Scenario("clone", template, lambda d: copied(d, True)),
    Scenario("start-origin", two_states, start(PRIVATE)),
    Scenario("start-origin-unprepared", without_ready_copy, start(PRIVATE)),
    Scenario("start-dirty", everything, start(PRIVATE)),
    Scenario("start-in-place", two_states, start(IN_PLACE)),
    Scenario(
        "start-in-place-below-a-child",
        with_child,
        lambda d: d.start(OTHER, "b", replace(TEMPLATE, revisions_to_keep=-1), None, Cancel()),
    ),
    Scenario("start-snapshot", template, start(CHILD)),
    Scenario("start-snapshot-again", with_child, start(CHILD)),
    Scenario("start-volatile", nothing, start(VOLATILE)),
    Scenario("stop-origin", everything, stop(PRIVATE)),
    Scenario("stop-without-revisions", everything, stop(NO_REVISIONS)),
    Scenario(
        "stop-in-place",
        in_order(two_states, lambda d: run(d, IN_PLACE, B)),
        stop(IN_PLACE),
    ),
    Scenario("stop-snapshot", with_child, stop(CHILD)),
    Scenario("stop-volatile", lambda d: run(d, VOLATILE, B), stop(VOLATILE)),
    Scenario(
        "revert",
        in_order(two_states, lambda d: cycle(d, PRIVATE, B)),
        lambda d: d.revert(OWNER, PRIVATE, "", "op"),
    ),
    Scenario("resize", two_states, lambda d: d.resize(OWNER, PRIVATE, 512 * KIB, Cancel())),
    Scenario(
        "resize-running", everything, lambda d: d.resize(OWNER, PRIVATE, 512 * KIB, Cancel())
    ),
    Scenario(
        "import-begin", two_states, lambda d: d.import_begin(OWNER, PRIVATE, 0, "op", False)
    ),
    Scenario("import-arrived", awaiting, lambda d: d.import_arrived(OWNER, PRIVATE, "op")),
    Scenario("import-end", importing, lambda d: d.import_end(OWNER, PRIVATE, True, "op")),
    Scenario("import-discard", importing, lambda d: d.import_end(OWNER, PRIVATE, False, "op")),
    Scenario("clear", two_states, lambda d: d.replace(OWNER, PRIVATE, None, "op", Cancel())),
    Scenario(
        "replace", in_order(two_states, template), lambda d: copied(d, False)
    ),
    Scenario("remove", everything, lambda d: d.remove(OWNER, PRIVATE)),
    Scenario("quarantine", everything, quarantine),
    Scenario("setup", lambda d: remove_pool(d), lambda d: d.setup()),
]  # fmt: skip


def remove_pool(driver: Driver) -> None:
    driver.teardown()


# ---- what there is


def guest_view(path: Path) -> bytes:
    """The bytes that a guest with this image reads."""
    if path.suffix != ".qcow2":
        return path.read_bytes()
    with tempfile.TemporaryDirectory() as directory:
        flat = Path(directory, "flat")
        subprocess.run(
            ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(flat)], check=True
        )
        return flat.read_bytes()


def picture(driver: Driver) -> dict[str, Any]:
    """All that counts of a pool: names, contents, tags; without times and random ids."""
    if isinstance(driver, LinuxKernelDriver):
        root = driver.root
        return {
            str(p.relative_to(root)): p.read_bytes() if p.is_file() else None
            for p in sorted(root.rglob("*"))
        }
    assert isinstance(driver, DirectoryDriver)
    shown: dict[str, Any] = {}
    for path in sorted(driver.root.rglob("*")):
        name = str(path.relative_to(driver.root))
        if path.is_dir():
            shown[name] = None
            continue
        known = classify(path.name)
        if known is not None and known.revision is not None and not known.temporary:
            name = f"{path.parent.name}/{known.volume} revision {known.revision.id}"
        tags = {tag: files.get_tag(path, tag) for tag in ("owner", "boot", "transfer")}
        content = guest_view(path)
        shown[name] = (hashlib.sha256(content).hexdigest(), len(content), tags)
    return shown


def check_usable(driver: Driver) -> None:
    """Whatever happened: each volume that had data has exactly one state to go on with."""
    for volume in (PRIVATE, TEMPLATE):
        assert isinstance(driver, DirectoryDriver)
        clean = driver.root / f"{volume.vid}.img"
        if not clean.parent.is_dir():
            continue
        state = driver.describe(volume, None)
        if clean.exists() and not state.is_dirty:
            with driver.committed(volume) as committed:
                content = os.pread(committed.fd, 4096, 0)
            assert content in (A, B, bytes(4096))


# ---- disturbing


class Recorder:
    """Counts failpoints in place of the real action, and acts at the n-th."""

    def __init__(self, act_at: int = -1, act: Callable[[str], None] = lambda _: None) -> None:
        self.names: list[str] = []
        self._act_at = act_at
        self._act = act

    def __call__(self, name: str) -> None:
        assert name in failpoints.table(), name
        self.names.append(name)
        if len(self.names) - 1 == self._act_at:
            self._act(name)


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recorder | None], None]:
    def arm(recorder: Recorder | None) -> None:
        monkeypatch.setattr(failpoints, "_ACTIVE", recorder is not None)
        if recorder is not None:
            monkeypatch.setattr(failpoints, "_fire", recorder)

    return arm


def die(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(name: str) -> None:
    raise failpoints.FailpointError(f"failpoint {name}")


Arm = Callable[[Recorder | None], None]


def killed_at(arm: Arm, operate: Callable[[], object], point: int) -> bool:
    """Run in a process of its own that dies at that point; False: it never came there."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            arm(Recorder(point, die))
            operate()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def record(arm: Arm, operate: Callable[[], object]) -> list[str]:
    recorder = Recorder()
    arm(recorder)
    try:
        operate()
    finally:
        arm(None)
    return recorder.names


@pytest.fixture(scope="module")
def place() -> Iterator[dict[str, Path]]:
    with loopfs.mounted("xfs", 512) as xfs, loopfs.mounted("tmpfs", 512) as tmpfs:
        yield {"file-reflink": xfs, "file": tmpfs}


PASSED: set[str] = set()


@pytest.mark.parametrize("driver_name", ["file-reflink", "file"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_killed_or_failed_at_every_point(
    place: dict[str, Path], driver_name: str, scenario: Scenario, armed: Arm
) -> None:
    root = place[driver_name] / scenario.name
    root.mkdir()
    count = 0

    def pool_at(path: Path) -> Driver:
        return open_pool(Pool("p", driver_name, {"dir_path": str(path)}))

    beginning = pool_at(root / "beginning")
    beginning.setup()
    scenario.prepare(beginning)

    def again() -> Driver:
        nonlocal count
        count += 1
        if (root / "beginning").exists():
            subprocess.run(
                ["cp", "-a", "--reflink=auto", str(root / "beginning"), str(root / str(count))],
                check=True,
            )
        if count > 2:
            subprocess.run(["rm", "-rf", str(root / str(count - 2))], check=True)
        return pool_at(root / str(count))

    driver = again()
    points = record(armed, lambda: scenario.operate(driver))
    PASSED.update(points)
    expected = picture(driver)
    assert points, "the scenario passes no failpoint"
    scenario.operate(driver)
    assert picture(driver) == expected, "an undisturbed repeat changed something"

    for point, name in enumerate(points):
        driver = again()
        assert killed_at(armed, lambda d=driver: scenario.operate(d), point), name  # type: ignore[misc]
        check_usable(driver)
        scenario.operate(driver)
        assert picture(driver) == expected, f"after a kill at {name}"

        driver = again()
        armed(Recorder(point, fail))
        try:
            scenario.operate(driver)
        except OSError:
            pass
        except StorageRefusal as refusal:
            assert refusal.reason == "STORAGE_FAILED", refusal
        armed(None)
        check_usable(driver)
        scenario.operate(driver)
        assert picture(driver) == expected, f"after a failure at {name}"

        second = 0
        while FULL or second == 0:
            driver = again()
            killed_at(armed, lambda d=driver: scenario.operate(d), point)  # type: ignore[misc]
            died = killed_at(armed, lambda d=driver: scenario.operate(d), second)  # type: ignore[misc]
            scenario.operate(driver)
            assert picture(driver) == expected, f"after a kill at {name} and at repeat {second}"
            if not died:
                break
            second += 1
    subprocess.run(["rm", "-rf", str(root)], check=True)


KERNEL_SCENARIOS = [
    Scenario("setup", remove_pool, lambda d: d.setup()),
    Scenario("kernel-add", nothing, lambda d: add_kernel(d)),
    Scenario("kernel-remove", lambda d: add_kernel(d), lambda d: d.kernel_remove("6.1-x", "op")),
]


def add_kernel(driver: Driver) -> None:
    assert isinstance(driver, LinuxKernelDriver)
    parts = []
    for part in ("vmlinuz", "initramfs", "modules"):
        path = driver.root.parent / part
        path.write_bytes(part.encode() * 1000)
        parts.append(path)
    driver.kernel_add("6.1-x", parts[0], parts[1], parts[2], Cancel())


@pytest.mark.parametrize("scenario", KERNEL_SCENARIOS, ids=lambda s: s.name)
def test_kernels_killed_at_every_point(tmp_path: Path, scenario: Scenario, armed: Arm) -> None:
    count = 0

    def again() -> Driver:
        nonlocal count
        count += 1
        driver = open_pool(Pool("k", "linux-kernel", {"dir_path": str(tmp_path / str(count))}))
        driver.setup()
        scenario.prepare(driver)
        return driver

    driver = again()
    points = record(armed, lambda: scenario.operate(driver))
    PASSED.update(points)
    expected = picture(driver)
    for point, name in enumerate(points):
        driver = again()
        assert killed_at(armed, lambda d=driver: scenario.operate(d), point), name  # type: ignore[misc]
        whole = [k for k in driver.kernels() if not k.has_modules]
        assert whole == [], "a kernel shows with a part of its files"
        scenario.operate(driver)
        assert picture(driver) == expected, f"after a kill at {name}"


def test_every_failpoint_of_the_table_was_passed(request: pytest.FixtureRequest) -> None:
    """Counted against the table; only meaningful after all of the above."""
    ran = {item.name for item in request.session.items if "every_point" in item.name}
    if len(ran) != 2 * len(SCENARIOS) + len(KERNEL_SCENARIOS):
        pytest.skip("only a part of the scenarios was selected")
    ours = {name for name in failpoints.table() if name.startswith("storage.")}
    assert ours - PASSED == set()
