"""One suite for every driver of disk volumes, on the file systems it is meant for.

The invariants of storage as a qube sees them; where a driver states that it differs
(DriverInfo), the stated difference is checked instead.
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bulkhead import failpoints
from bulkhead.model.records import Pool, Volume
from services.storage.core.names import Role, file_name
from services.storage.core.reasons import StorageRefusal
from services.storage.core.states import Found
from services.storage.drivers import files
from services.storage.drivers.directory.driver import DirectoryDriver
from services.storage.drivers.interface import Cancel
from services.storage.drivers.load import open_pool
from tests.fakes import loopfs

pytestmark = pytest.mark.integration

MIB = 1 << 20
OWNER = "6f5d4c3b-0000-4000-8000-000000000001"
OTHER = "6f5d4c3b-0000-4000-8000-000000000002"
BOOT1, BOOT2 = "boot-1", "boot-2"
CASES = [
    ("file-reflink", "xfs"),
    ("file-reflink", "btrfs"),
    ("file", "ext4"),
    ("file", "tmpfs"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def place(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path]]:
    driver, kind = request.param
    with loopfs.mounted(kind, 768) as path:
        yield driver, path


@dataclass
class Pool1:
    """One pool of its own, and short forms of the calls that tests make most."""

    driver: DirectoryDriver
    root: Path

    def path(self, volume: Volume) -> Path:
        return Path(str(self.root / volume.vid))

    def file(self, volume: Volume, role: Role) -> Path:
        vid = Path(volume.vid)
        return self.root / vid.parent / file_name(vid.name, role)

    def start(
        self, volume: Volume, boot: str = BOOT1, source: Volume | None = None, owner: str = OWNER
    ) -> Disk:
        device = self.driver.start(owner, boot, volume, source, Cancel())
        assert device is not None
        return Disk(Path(device.path), device.format)

    def stop(self, volume: Volume, boot: str = BOOT1, owner: str = OWNER) -> None:
        self.driver.stop(owner, boot, volume, Cancel())

    def cycle(self, volume: Volume, data: bytes, offset: int = 0, boot: str = BOOT1) -> None:
        """One run of a qube that writes data."""
        self.start(volume, boot).write(data, offset)
        self.stop(volume, boot)

    def committed(self, volume: Volume, length: int = 16, offset: int = 0) -> bytes:
        with self.driver.committed(volume) as state:
            return os.pread(state.fd, length, offset)

    def revisions(self, volume: Volume) -> list[str]:
        return [r.id for r in self.driver.describe(volume, None).revisions]

    def listing(self) -> list[str]:
        return sorted(str(p.relative_to(self.root)) for p in self.root.rglob("*") if not p.is_dir())


@dataclass
class Disk:
    """What a guest does with its disk."""

    path: Path
    format: str

    def write(self, data: bytes, offset: int = 0) -> None:
        if self.format == "raw":
            with self.path.open("r+b") as file:
                file.seek(offset)
                file.write(data)
            return
        byte = data[0]
        assert data == bytes([byte]) * len(data)
        self._io(f"write -P {byte} {offset} {len(data)}")

    def read(self, length: int, offset: int = 0) -> bytes:
        if self.format == "raw":
            with self.path.open("rb") as file:
                file.seek(offset)
                return file.read(length)
        said = self._io(f"read -v {offset} {length}")
        found = bytearray()
        for line in said.splitlines():
            head, colon, rest = line.partition(":")
            if colon and all(c in "0123456789abcdef" for c in head):
                found += bytes.fromhex(" ".join(rest.split()[:16]))
        return bytes(found[:length])

    def _io(self, command: str) -> str:
        done = subprocess.run(
            ["qemu-io", "-f", self.format, "-c", command, str(self.path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout


@pytest.fixture
def pool(place: tuple[str, Path], request: pytest.FixtureRequest) -> Iterator[Pool1]:
    driver, path = place
    root = path / request.node.name.split("[")[0]
    made = open_pool(Pool("p", driver, {"dir_path": str(root)}))
    assert isinstance(made, DirectoryDriver)
    made.setup()
    yield Pool1(made, root)
    subprocess.run(["rm", "-rf", str(root)], check=True)


def origin(name: str = "private", qube: str = "work", **fields: Any) -> Volume:
    base = Volume(
        name=name,
        pool="p",
        vid=f"appvms/{qube}/{name}",
        size=4 * MIB,
        revisions_to_keep=1,
        rw=True,
        save_on_stop=True,
    )
    return replace(base, **fields)


def snapshot(source: Volume, qube: str = "disp") -> Volume:
    return Volume(
        name="root",
        pool="p",
        vid=f"appvms/{qube}/root",
        size=source.size,
        rw=True,
        snap_on_start=True,
        source=source.vid,
    )


def volatile(**fields: Any) -> Volume:
    base = Volume(name="volatile", pool="p", vid="appvms/work/volatile", size=2 * MIB, rw=True)
    return replace(base, **fields)


def refusal(reason: str) -> pytest.RaisesExc[StorageRefusal]:
    return pytest.raises(StorageRefusal, check=lambda e: e.reason == reason)


A, B, C = b"\xaa" * 4096, b"\xbb" * 4096, b"\xcc" * 4096
ZERO = bytes(4096)


# ---- create, remove


def test_ensure_makes_an_empty_volume_once(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    before = os.stat(pool.file(volume, Role.CLEAN)).st_ino
    pool.driver.ensure(OWNER, volume)
    assert os.stat(pool.file(volume, Role.CLEAN)).st_ino == before
    state = pool.driver.describe(volume, None)
    assert (state.size, state.is_dirty, state.revisions, state.problem) == (4 * MIB, False, (), "")
    assert pool.committed(volume, 4096, MIB) == ZERO


def test_ensure_keeps_data_and_a_dirty_state(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    disk = pool.start(volume)
    disk.write(B)
    pool.driver.ensure(OWNER, volume)
    assert disk.read(4096) == B
    assert pool.committed(volume, 4096) == A


def test_ensure_touches_nothing_for_other_kinds(pool: Pool1) -> None:
    pool.driver.ensure(OWNER, volatile())
    pool.driver.ensure(OWNER, snapshot(origin()))
    assert pool.listing() == []


def test_owner_tag_and_modes(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    clean = pool.file(volume, Role.CLEAN)
    assert files.get_tag(clean, "owner") == OWNER
    assert stat.S_IMODE(clean.stat().st_mode) & 0o027 == 0
    assert stat.S_IMODE(clean.parent.stat().st_mode) == 0o710
    assert stat.S_IMODE((pool.root / "appvms").stat().st_mode) == 0o710
    disk = pool.start(volume)
    expected = 0o660 if files.disk_gid() is not None else 0o600
    assert stat.S_IMODE(disk.path.stat().st_mode) == expected
    assert files.get_tag(disk.path, "owner") == OWNER
    assert files.get_tag(disk.path, "boot") == BOOT1


def test_another_owners_files_are_never_touched(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    before = pool.listing()
    with refusal("VOLUME_FOREIGN"):
        pool.driver.ensure(OTHER, volume)
    with refusal("VOLUME_FOREIGN"):
        pool.start(volume, owner=OTHER)
    with refusal("VOLUME_FOREIGN"):
        pool.driver.replace(OTHER, volume, None, "op", Cancel())
    pool.driver.remove(OTHER, volume)
    assert pool.listing() == before
    assert pool.committed(volume, 4096) == A


def test_untagged_files_are_set_aside_not_reused(pool: Pool1) -> None:
    volume = origin()
    clean = pool.file(volume, Role.CLEAN)
    clean.parent.mkdir()
    clean.write_bytes(b"somebody's data")
    pool.driver.ensure(OWNER, volume)
    assert pool.committed(volume, 16) == bytes(16)
    kept = list((pool.root / "appvms/.bulkhead-quarantine").rglob("private.img"))
    assert [p.read_bytes() for p in kept] == [b"somebody's data"]


def test_untagged_volume_of_4_4_starts_and_commits(pool: Pool1) -> None:
    volume = origin()
    clean = pool.file(volume, Role.CLEAN)
    clean.parent.mkdir()
    clean.write_bytes(A + bytes(4 * MIB - 4096))
    disk = pool.start(volume)
    assert disk.read(4096) == A
    disk.write(B)
    pool.stop(volume)
    assert pool.committed(volume, 4096) == B
    assert files.get_tag(clean, "owner") == OWNER
    assert pool.revisions(volume) == ["1"]


def test_remove_leaves_nothing_and_is_repeatable(pool: Pool1) -> None:
    volume = origin(revisions_to_keep=3)
    pool.driver.ensure(OWNER, volume)
    for data in (A, B, C):
        pool.cycle(volume, data)
    pool.start(volume)
    (pool.root / "appvms/work/firewall.xml").symlink_to("/nonexistent")
    pool.driver.remove(OWNER, volume)
    pool.driver.remove(OWNER, volume)
    assert pool.listing() == []
    assert not (pool.root / "appvms/work").exists()


def test_a_late_removal_beside_a_new_volume(pool: Pool1, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that is repeated late takes the directory away before a file is in it."""
    names: list[str] = []

    def hit(name: str) -> None:
        names.append(name)
        if names.count("storage.ensure.after_directory") == 1 and name == names[0]:
            pool.driver.remove(OTHER, volatile())

    monkeypatch.setattr(failpoints, "hit", hit)
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    assert names.count("storage.ensure.after_directory") == 2
    assert pool.file(volume, Role.CLEAN).exists()


def test_removals_of_two_volumes_beside_each_other(
    pool: Pool1, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one takes the emptied directory away before this one has made its part durable."""
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    passed: list[str] = []

    def hit(name: str) -> None:
        passed.append(name)
        if passed.count("storage.remove.after_unlink") == 1 and name.endswith(".after_unlink"):
            pool.driver.remove(OWNER, volatile())

    monkeypatch.setattr(failpoints, "hit", hit)
    pool.driver.remove(OWNER, volume)
    assert passed.count("storage.remove.after_rmdir") == 1
    assert not (pool.root / "appvms/work").exists()


def test_remove_of_what_never_was(pool: Pool1) -> None:
    pool.driver.remove(OWNER, origin())
    pool.driver.remove(OWNER, volatile())
    assert pool.listing() == []


def test_prefix_of_another_qubes_name(pool: Pool1) -> None:
    one, two = origin(qube="x", name="root"), origin(qube="x-root", name="root")
    for volume in (one, two):
        pool.driver.ensure(OWNER, volume)
        pool.cycle(volume, A)
    pool.driver.remove(OWNER, one)
    assert pool.revisions(two) == ["1"]
    assert pool.committed(two, 4096) == A


@pytest.mark.parametrize(
    "vid", ["appvms/../../etc/x", "appvms/a", "other/a/b", "appvms/a/b/c", "appvms/a/.img",
            "appvms/.bulkhead-quarantine/x", "appvms/a/root-dirty", "/appvms/a/b", ""]
)  # fmt: skip
def test_bad_ids_are_refused(pool: Pool1, vid: str) -> None:
    with refusal("INVALID_VOLUME"):
        pool.driver.ensure(OWNER, origin(vid=vid))
    assert pool.listing() == []


def test_save_and_snapshot_together_are_refused(pool: Pool1) -> None:
    volume = origin(snap_on_start=True, source="vm-templates/t/root")
    with refusal("VOLUME_REFUSED"):
        pool.driver.ensure(OWNER, volume)
    with refusal("VOLUME_REFUSED"):
        pool.start(volume)


# ---- start, stop


def test_start_write_stop_commits(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    disk = pool.start(volume)
    disk.write(A, MIB)
    assert pool.committed(volume, 4096, MIB) == ZERO  # the guest's writes are not yet committed
    assert pool.driver.describe(volume, None).is_dirty
    pool.stop(volume)
    assert pool.committed(volume, 4096, MIB) == A
    assert not pool.driver.describe(volume, None).is_dirty
    assert not disk.path.exists()


def test_start_of_a_dirty_volume_keeps_its_data(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    pool.start(volume, BOOT1).write(A)
    disk = pool.start(volume, BOOT2)  # after a crash of the host
    assert disk.read(4096) == A
    pool.stop(volume, BOOT2)
    assert pool.committed(volume, 4096) == A


def test_stop_of_an_older_boot_does_nothing(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    pool.start(volume, BOOT1).write(A)
    disk = pool.start(volume, BOOT2)
    pool.stop(volume, BOOT1)
    assert disk.read(4096) == A
    assert pool.driver.describe(volume, None).is_dirty
    pool.stop(volume, "")  # whichever boot: after a restart of the host
    assert pool.committed(volume, 4096) == A


def test_stop_without_start_does_nothing(pool: Pool1) -> None:
    volume = origin()
    pool.stop(volume)
    pool.stop(volatile())
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    before = pool.listing()
    pool.stop(volume)
    pool.stop(volume, BOOT2)
    assert pool.listing() == before


def test_start_needs_a_commit(pool: Pool1) -> None:
    with refusal("VOLUME_NOT_FOUND"):
        pool.start(origin())
    assert pool.listing() == []


def test_missing_commit_keeps_the_ready_copy(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    pool.file(volume, Role.CLEAN).rename(pool.root / "kept")
    before = pool.listing()
    with refusal("VOLUME_NOT_FOUND"):
        pool.start(volume)
    assert pool.listing() == before


def test_volatile_is_new_and_zero_at_every_start(pool: Pool1) -> None:
    volume = volatile()
    disk = pool.start(volume)
    inode = disk.path.stat().st_ino
    with disk.path.open("rb"):  # keeps the old inode from being given again
        disk.write(A)
        disk.write(B, MIB)
        again = pool.start(volume, BOOT2)
        assert again.path.stat().st_ino != inode
        assert again.read(4096) == ZERO
        assert again.read(4096, MIB) == ZERO
        assert again.path.stat().st_size == 2 * MIB
    pool.stop(volume, BOOT2)
    assert pool.listing() == []


def test_same_boot_again_keeps_running_data(pool: Pool1) -> None:
    source = origin("root", "tmpl", vid="vm-templates/tmpl/root")
    pool.driver.ensure(OTHER, source)
    for volume in (volatile(), snapshot(source)):
        pool.start(volume, source=source).write(A)
        assert pool.start(volume, source=source).read(4096) == A


def test_snapshot_follows_its_sources_commits_at_start_only(pool: Pool1) -> None:
    source = origin("root", "tmpl", vid="vm-templates/tmpl/root")
    pool.driver.ensure(OTHER, source)

    def change(data: bytes) -> None:
        pool.start(source, owner=OTHER).write(data)
        pool.stop(source, owner=OTHER)

    change(A)
    child = snapshot(source)
    disk = pool.start(child, source=source)
    assert disk.read(4096) == A
    assert pool.driver.describe(child, source).is_outdated is False
    running = pool.start(source, owner=OTHER)
    running.write(B)
    assert disk.read(4096) == A
    pool.stop(source, owner=OTHER)
    assert disk.read(4096) == A
    assert pool.driver.describe(child, source).is_outdated is True
    pool.stop(child)
    assert pool.driver.describe(child, source).is_outdated is False
    for boot, data in (("b2", B), ("b3", C)):  # not stuck at the first change
        change(data)
        disk = pool.start(child, boot, source=source)
        assert disk.read(4096) == data
        pool.stop(child, boot)
    assert not (pool.root / "appvms/disp").exists()


def test_snapshot_of_an_untagged_source(pool: Pool1) -> None:
    source = origin("root", "tmpl", vid="vm-templates/tmpl/root")
    clean = pool.file(source, Role.CLEAN)
    clean.parent.mkdir()
    clean.write_bytes(A + bytes(4 * MIB - 4096))
    child = snapshot(source)
    assert pool.start(child).read(4096) == A
    assert pool.driver.describe(child, None).is_outdated is False
    pool.start(source, owner=OTHER).write(B)
    pool.stop(source, owner=OTHER)
    assert pool.driver.describe(child, None).is_outdated is True


def test_what_a_snapshot_wrote_is_discarded(pool: Pool1) -> None:
    source = origin("root", "tmpl", vid="vm-templates/tmpl/root")
    pool.driver.ensure(OTHER, source)
    child = snapshot(source)
    pool.start(child).write(A)
    pool.stop(child)
    assert pool.start(child, BOOT2).read(4096) == ZERO
    assert pool.committed(source, 4096) == ZERO


def test_source_removed_while_its_snapshot_runs(pool: Pool1) -> None:
    source = origin("root", "tmpl", vid="vm-templates/tmpl/root")
    pool.driver.ensure(OTHER, source)
    pool.start(source, owner=OTHER).write(A)
    pool.stop(source, owner=OTHER)
    child = snapshot(source)
    disk = pool.start(child)
    pool.driver.remove(OTHER, source)
    assert disk.read(4096) == A
    pool.stop(child)
    with refusal("VOLUME_NOT_FOUND"):
        pool.start(child, BOOT2)
    assert pool.listing() == []


def test_guest_does_not_choose_the_format(pool: Pool1) -> None:
    volume = volatile()
    disk = pool.start(volume)
    disk.write(b"QFI\xfb\x00\x00\x00\x03" + bytes(504))
    again = pool.start(volume)
    assert again.format == "raw"
    assert pool.driver.describe(volume, None).size == 2 * MIB


# ---- revisions


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_the_newest_revisions_are_kept(pool: Pool1, keep: int) -> None:
    volume = origin(revisions_to_keep=keep)
    pool.driver.ensure(OWNER, volume)
    for data in (A, B, C, A, B):
        pool.cycle(volume, data)
    assert pool.revisions(volume) == [str(n) for n in range(1, 6)][5 - keep :]
    pool.driver.remove(OWNER, volume)


def test_every_cycle_makes_a_revision(pool: Pool1) -> None:
    volume = origin(revisions_to_keep=2)
    pool.driver.ensure(OWNER, volume)
    for _ in range(2):
        pool.start(volume)
        pool.stop(volume)
    assert pool.revisions(volume) == ["1", "2"]


def test_negative_keeps_every_revision_until_a_start(pool: Pool1) -> None:
    volume = origin(revisions_to_keep=3)
    pool.driver.ensure(OWNER, volume)
    for data in (A, B):
        pool.cycle(volume, data)
    disabled = replace(volume, revisions_to_keep=-1)
    pool.driver.replace(OWNER, disabled, None, "op-1", Cancel())
    assert pool.revisions(disabled) == ["1", "2", "3"]


def test_disabled_snapshots_work_in_place(pool: Pool1) -> None:
    volume = origin(revisions_to_keep=2)
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    disabled = replace(volume, revisions_to_keep=-1)
    inode = pool.file(volume, Role.CLEAN).stat().st_ino
    disk = pool.start(disabled)
    assert (disk.format, disk.path.stat().st_ino) == ("raw", inode)
    assert pool.revisions(disabled) == []
    disk.write(B)
    with refusal("SOURCE_RUNNING"), pool.driver.committed(disabled):
        pass
    with refusal("SOURCE_RUNNING"):
        pool.start(snapshot(disabled))
    again = pool.start(disabled, BOOT2)
    assert again.read(4096) == B
    pool.stop(disabled, BOOT2)
    assert pool.committed(disabled, 4096) == B
    assert pool.file(volume, Role.CLEAN).stat().st_ino == inode
    assert pool.revisions(disabled) == []


def test_working_in_place_does_not_reach_a_running_snapshot(pool: Pool1) -> None:
    source = origin("root", "tmpl", vid="vm-templates/tmpl/root", revisions_to_keep=-1)
    pool.driver.ensure(OTHER, source)
    child = snapshot(source)
    disk = pool.start(child)
    pool.start(source, owner=OTHER).write(A)
    assert disk.read(4096) == ZERO
    pool.stop(source, owner=OTHER)
    assert disk.read(4096) == ZERO
    assert pool.driver.describe(child, source).is_outdated is True


def test_revert_swaps_the_current_state_and_the_revision(pool: Pool1) -> None:
    volume = origin(revisions_to_keep=2)
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    pool.cycle(volume, B)
    assert pool.revisions(volume) == ["1", "2"]  # 1 = empty, 2 = A
    pool.driver.revert(OWNER, volume, "2", "op-1")
    assert pool.committed(volume, 4096) == A
    assert pool.revisions(volume) == ["1", "3"]
    pool.driver.revert(OWNER, volume, "2", "op-1")  # a repeat
    assert pool.revisions(volume) == ["1", "3"]
    pool.driver.revert(OWNER, volume, "", "op-2")  # the newest: back to B
    assert pool.committed(volume, 4096) == B
    pool.driver.revert(OWNER, volume, "", "op-2")
    assert pool.committed(volume, 4096) == B
    assert pool.start(volume).read(4096) == B


def test_revert_without_a_key_is_repeatable_by_its_revision(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    for _ in range(2):
        pool.driver.revert(OWNER, volume, "1", "")
        assert pool.committed(volume, 4096) == ZERO
    assert pool.revisions(volume) == ["2"]


def test_revert_refusals_change_nothing(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    before = pool.listing()
    with refusal("REVISION_NOT_FOUND"):
        pool.driver.revert(OWNER, volume, "", "k")
    with refusal("REVISION_NOT_FOUND"):
        pool.driver.revert(OWNER, volume, "7", "k")
    with refusal("NOT_ORIGIN"):
        pool.driver.revert(OWNER, volatile(), "", "k")
    assert pool.listing() == before
    pool.cycle(volume, A)
    pool.start(volume)
    with refusal("VOLUME_DIRTY"):
        pool.driver.revert(OWNER, volume, "1", "k")


# ---- clones


def test_clone_is_independent_of_its_source(pool: Pool1) -> None:
    volume, copy = origin(), origin(qube="copy")
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    pool.start(volume).write(B)  # a running source: its last commit counts
    for _ in range(2):
        with pool.driver.committed(volume) as state:
            pool.driver.clone(OTHER, copy, state, "op", Cancel())
    assert pool.committed(copy, 4096) == A
    assert pool.revisions(copy) == []
    pool.stop(volume)
    pool.driver.remove(OWNER, volume)
    assert pool.committed(copy, 4096) == A
    assert files.get_tag(pool.file(copy, Role.CLEAN), "owner") == OTHER


def test_clone_of_a_revision(pool: Pool1) -> None:
    volume, copy = origin(), origin(qube="copy")
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    pool.cycle(volume, B)
    with pool.driver.committed(volume, "2") as state:
        pool.driver.clone(OTHER, copy, state, "op", Cancel())
    assert pool.committed(copy, 4096) == A
    with refusal("REVISION_NOT_FOUND"), pool.driver.committed(volume, "1"):
        pass


def test_clone_then_remove_the_clone(pool: Pool1) -> None:
    volume, copy = origin(), origin(qube="copy")
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    with pool.driver.committed(volume) as state:
        pool.driver.clone(OTHER, copy, state, "op", Cancel())
    pool.driver.remove(OTHER, copy)
    assert pool.committed(volume, 4096) == A


def test_replace_makes_the_old_state_a_revision(pool: Pool1) -> None:
    volume, other = origin(), origin(qube="other", size=8 * MIB)
    for v in (volume, other):
        pool.driver.ensure(OWNER, v)
    pool.cycle(volume, A)
    pool.cycle(other, B, 5 * MIB)
    for _ in range(2):
        with pool.driver.committed(other) as state:
            pool.driver.replace(OWNER, volume, state, "op-1", Cancel())
    assert pool.committed(volume, 4096, 5 * MIB) == B
    assert pool.driver.describe(volume, None).size == 8 * MIB
    assert pool.revisions(volume) == ["2"]
    pool.driver.revert(OWNER, volume, "2", "op-2")
    assert pool.committed(volume, 4096) == A


@pytest.mark.parametrize("keep", [0, 1, -1])
def test_replace_by_its_own_state_keeps_the_data(pool: Pool1, keep: int) -> None:
    volume = origin(revisions_to_keep=keep, size=8 * MIB)
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    for _ in range(2):  # again: the same operation, after a crash
        with pool.driver.committed(volume) as state:
            pool.driver.replace(OWNER, volume, state, "op-1", Cancel())
    assert pool.committed(volume, 4096) == A
    assert pool.driver.describe(volume, None).size == 8 * MIB
    assert pool.revisions(volume) == {0: [], 1: ["2"], -1: ["1"]}[keep]


def test_cancelled_or_failing_copy_keeps_the_target(pool: Pool1) -> None:
    volume, other = origin(), origin(qube="other")
    for v in (volume, other):
        pool.driver.ensure(OWNER, v)
        pool.cycle(v, A)
    before = pool.listing()
    cancel = Cancel()
    cancel.set()
    with pool.driver.committed(other) as state:
        with refusal("COPY_CANCELLED"):
            pool.driver.replace(OWNER, volume, state, "op", cancel)
        with refusal("COPY_CANCELLED"):
            pool.driver.clone(OWNER, origin(qube="third"), state, "op", cancel)
    pool.driver.remove(OWNER, origin(qube="third"))
    assert pool.listing() == before
    assert pool.committed(volume, 4096) == A


def test_clear_zeroes_and_keeps_the_size(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    for _ in range(2):
        pool.driver.replace(OWNER, volume, None, "op-1", Cancel())
    assert pool.committed(volume, 4096) == ZERO
    assert pool.driver.describe(volume, None).size == 4 * MIB
    assert pool.revisions(volume) == ["2"]
    assert pool.start(volume).read(4096) == ZERO


# ---- import, export


def test_import_is_visible_only_after_its_end(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    target = pool.driver.import_begin(OWNER, volume, 6 * MIB, "op", False)
    assert target.size == 6 * MIB
    Disk(Path(target.path), "raw").write(B, 5 * MIB)
    assert pool.committed(volume, 4096) == A
    assert pool.driver.describe(volume, None).importing
    for _ in range(2):
        pool.driver.import_end(OWNER, volume, True, "op")
    assert pool.committed(volume, 4096) == ZERO
    assert pool.committed(volume, 4096, 5 * MIB) == B
    assert pool.driver.describe(volume, None).size == 6 * MIB
    assert pool.revisions(volume) == ["2"]
    assert pool.start(volume).read(4096, 5 * MIB) == B


def test_import_of_nothing_zeroes(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    target = pool.driver.import_begin(OWNER, volume, 0, "op", False)
    assert target.size == 4 * MIB
    os.utime(target.path)
    pool.driver.import_end(OWNER, volume, True, "op")
    assert pool.committed(volume, 4096) == ZERO


def test_failed_import_leaves_the_old_bytes(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    before = pool.listing()
    target = pool.driver.import_begin(OWNER, volume, 0, "op", False)
    Disk(Path(target.path), "raw").write(B)
    for _ in range(2):
        pool.driver.import_end(OWNER, volume, False, "op")
    assert pool.committed(volume, 4096) == A
    assert pool.listing() == before


def test_import_begin_again(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    first = pool.driver.import_begin(OWNER, volume, 0, "op-1", False)
    assert pool.driver.import_begin(OWNER, volume, 0, "op-1", False) == first
    with refusal("VOLUME_IMPORTING"):
        pool.driver.import_begin(OWNER, volume, 0, "op-2", False)
    pool.driver.import_end(OWNER, volume, False, "op-2")  # another operation's: left alone
    assert pool.driver.describe(volume, None).importing
    with refusal("VOLUME_NOT_IMPORTING"):
        pool.driver.import_end(OWNER, volume, True, "op-2")
    with refusal("VOLUME_IMPORTING"):
        pool.start(volume)
    with refusal("VOLUME_IMPORTING"):
        pool.driver.replace(OWNER, volume, None, "op-3", Cancel())


def test_import_end_without_begin_has_no_effect(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    before = pool.listing()
    with refusal("VOLUME_NOT_IMPORTING"):
        pool.driver.import_end(OWNER, volume, True, "op")
    pool.driver.import_end(OWNER, volume, False, "op")
    assert pool.listing() == before


def test_import_while_dirty_is_refused(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    pool.start(volume)
    with refusal("VOLUME_DIRTY"):
        pool.driver.import_begin(OWNER, volume, 0, "op", False)
    with refusal("NOT_ORIGIN"):
        pool.driver.import_begin(OWNER, volatile(), 0, "op", False)


def test_import_by_ticket_waits_for_every_byte(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    pool.driver.import_begin(OWNER, volume, 0, "op", True)
    with refusal("IMPORT_INCOMPLETE"):
        pool.driver.import_end(OWNER, volume, True, "op")
    pool.driver.import_arrived(OWNER, volume, "op")
    pool.driver.import_end(OWNER, volume, True, "op")
    assert not pool.driver.describe(volume, None).importing


def test_export_needs_data_of_its_own(pool: Pool1) -> None:
    source = origin("root", "tmpl", vid="vm-templates/tmpl/root")
    pool.driver.ensure(OTHER, source)
    for volume in (volatile(), snapshot(source)):
        with refusal("NOT_ORIGIN"), pool.driver.committed(volume):
            pass


# ---- size


def test_resize_halted(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    for size in (8 * MIB, 8 * MIB, 2 * MIB):
        assert pool.driver.resize(OWNER, volume, size, Cancel()) == size
        assert pool.driver.describe(volume, None).size == size
    assert pool.committed(volume, 4096) == A
    assert pool.revisions(volume) == ["1"]
    disk = pool.start(volume)
    assert disk.read(4096) == A
    assert pool.driver.describe(volume, None).size == 2 * MIB


def test_resize_running_reaches_the_commit_at_stop(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    disk = pool.start(volume)
    for _ in range(2):
        assert pool.driver.resize(OWNER, volume, 8 * MIB, Cancel()) == 8 * MIB
    with pool.driver.committed(volume) as state:
        assert state.size == 4 * MIB
    disk.write(B, 7 * MIB)
    pool.stop(volume)
    assert pool.committed(volume, 4096, 7 * MIB) == B
    with pool.driver.committed(volume) as state:
        assert state.size == 8 * MIB
    again = pool.start(volume, BOOT2)
    assert pool.driver.resize(OWNER, volume, 4 * MIB, Cancel()) == 4 * MIB
    assert pool.driver.describe(volume, None).size == 4 * MIB
    assert again.path.exists()


def test_resize_reaches_a_loop_device(pool: Pool1) -> None:
    volume = volatile()
    disk = pool.start(volume)
    found = subprocess.run(
        ["losetup", "--find", "--show", str(disk.path)], check=True, capture_output=True, text=True
    )
    device = found.stdout.strip()
    try:
        pool.driver.resize(OWNER, volume, 8 * MIB, Cancel())
        sectors = int(Path("/sys/block", Path(device).name, "size").read_text())
        assert sectors * 512 == 8 * MIB
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_resize_of_what_has_no_data_is_only_configured(pool: Pool1) -> None:
    assert pool.driver.resize(OWNER, volatile(), 9 * MIB, Cancel()) == 9 * MIB
    assert pool.listing() == []


def test_resize_of_a_read_only_volume_is_refused(pool: Pool1) -> None:
    volume = origin(rw=False)
    pool.driver.ensure(OWNER, volume)
    with refusal("VOLUME_REFUSED"):
        pool.driver.resize(OWNER, volume, 8 * MIB, Cancel())
    device = pool.driver.start(OWNER, BOOT1, volume, None, Cancel())
    assert device is not None
    assert not device.rw


# ---- the copy that makes a start a rename


def test_stale_ready_copy_is_never_used(pool: Pool1) -> None:
    if not pool.driver.info().reflink:
        volume = origin()
        pool.driver.ensure(OWNER, volume)
        pool.cycle(volume, A)
        assert not pool.file(volume, Role.PRECACHE).exists()
        return
    for spoil in ("time", "size", "content"):
        volume = origin(qube=f"spoil-{spoil}")
        pool.driver.ensure(OWNER, volume)
        pool.cycle(volume, A)
        precache = pool.file(volume, Role.PRECACHE)
        with precache.open("r+b") as file:
            file.write(B)
        clean = pool.file(volume, Role.CLEAN).stat()
        if spoil == "size":
            os.truncate(precache, MIB)
        if spoil != "time":
            os.utime(precache, ns=(clean.st_mtime_ns, clean.st_mtime_ns))
        if spoil == "content":  # same time and size, but made from another commit
            files.set_tags(precache, {"base": "another"})
        assert pool.start(volume).read(4096) == A


def test_start_copies_nothing(pool: Pool1) -> None:
    """The ready copy is renamed, or an overlay is made on the commit's own inode."""
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    if not pool.driver.info().reflink:
        disk = pool.start(volume)
        clean, base = pool.file(volume, Role.CLEAN), pool.file(volume, Role.BASE)
        assert base.stat().st_ino == clean.stat().st_ino
        assert disk.path.stat().st_blocks * 512 < MIB
        return
    pool.cycle(volume, A)
    for boot in (BOOT1, BOOT2):
        precache = pool.file(volume, Role.PRECACHE)
        inode = precache.stat().st_ino
        disk = pool.start(volume, boot)
        assert disk.path.stat().st_ino == inode
        assert not precache.exists()
        pool.stop(volume, boot)


# ---- inventory and quarantine


def test_inventory_names_owner_and_state(pool: Pool1) -> None:
    source = origin("root", "tmpl", vid="vm-templates/tmpl/root")
    child = snapshot(source)
    pool.driver.ensure(OTHER, source)
    pool.driver.ensure(OWNER, origin())
    pool.start(origin())
    pool.start(child)
    found = {f.vid: (f.owner, f.kind, f.running) for f in pool.driver.inventory()}
    assert found == {
        "appvms/disp/root": (OWNER, "running", True),
        "appvms/work/private": (OWNER, "committed", True),
        "vm-templates/tmpl/root": (OTHER, "committed", False),
    }


def test_quarantine_moves_everything_and_deletes_nothing(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    pool.cycle(volume, A)
    found = pool.driver.inventory()[0]
    wrong = Found(found.vid, OTHER, found.path, found.kind, found.running)
    assert "left alone" in pool.driver.quarantine(wrong)
    names = {Path(name).name for name in pool.listing()}
    assert "moved to" in pool.driver.quarantine(found)
    assert "nothing is there" in pool.driver.quarantine(found)
    assert {Path(name).name for name in pool.listing()} == names
    assert pool.driver.inventory() == []
    kept = next((pool.root / "appvms/.bulkhead-quarantine").rglob("private.img"))
    with kept.open("rb") as file:
        assert file.read(4096) == A


def test_temporaries_are_found_and_removed(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    home = pool.root / "appvms/work"
    (home / "private.img~dead").write_bytes(b"x")
    (home / "private-dirty.img~dead").write_bytes(b"x")
    before = sorted(set(pool.listing()) - {f"appvms/work/{n}~dead" for n in (
        "private.img", "private-dirty.img")})  # fmt: skip
    assert len(pool.driver.clear_temporaries(volume.vid)) == 2
    assert pool.listing() == before
    (home / "private.img~dead").write_bytes(b"x")
    pool.start(volume)
    assert "appvms/work/private.img~dead" not in pool.listing()


# ---- the pool


def test_setup_is_repeatable_and_teardown_never_removes_data(pool: Pool1) -> None:
    pool.driver.setup()
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    pool.driver.teardown()
    assert pool.committed(volume, 16) == bytes(16)
    pool.driver.remove(OWNER, volume)
    pool.driver.teardown()
    assert not pool.root.exists()
    with refusal("POOL_UNUSABLE"):
        pool.driver.check()


def test_usage_is_the_file_systems(pool: Pool1) -> None:
    usage = pool.driver.usage()
    assert usage.size is not None
    assert usage.usage is not None
    assert 0 <= usage.usage < usage.size
    assert usage.details == {"data_size": usage.size, "data_usage": usage.usage}
    assert pool.driver.config()["dir_path"] == str(pool.root)


def test_usage_of_a_volume_is_that_of_its_data(pool: Pool1) -> None:
    volume = origin()
    pool.driver.ensure(OWNER, volume)
    # Whatever the file system counts for its tags.
    assert pool.driver.describe(volume, None).usage == 0
    pool.cycle(volume, A)
    assert pool.driver.describe(volume, None).usage >= len(A)
    pool.driver.replace(OWNER, volume, None, "op-1", Cancel())
    assert pool.driver.describe(volume, None).usage == 0


def test_links_are_not_followed(pool: Pool1) -> None:
    volume = origin()
    home = pool.root / "appvms/work"
    home.mkdir()
    secret = pool.root / "secret"
    secret.write_bytes(b"secret")
    (home / "private.img").symlink_to(secret)
    with refusal("VOLUME_NOT_FOUND"):
        pool.start(volume)
    with refusal("VOLUME_NOT_FOUND"), pool.driver.committed(volume):
        pass
    pool.driver.ensure(OWNER, volume)
    assert secret.read_bytes() == b"secret"
    assert pool.committed(volume, 6) == bytes(6)
