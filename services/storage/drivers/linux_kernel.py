"""Driver linux-kernel: kernels that dom0 provides, and their modules as a read-only disk.

Owns the directories below dir_path, one per kernel. Must not know which qube uses
which. Invariant: a kernel's directory appears and disappears as a whole.
"""

# ruff: noqa: ARG002  (the interface's arguments, whether a driver needs them or not)

from __future__ import annotations

import contextlib
import filecmp
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from bulkhead import failpoints
from bulkhead.durable import fsync_directory
from bulkhead.model.records import Pool, Volume
from services.storage import failpoint_table  # noqa: F401  (declares what is hit below)
from services.storage.core.reasons import StorageRefusal
from services.storage.core.states import Device, Found, Import, Kernel, PoolUsage, VolumeState
from services.storage.core.volumes import parse_directory
from services.storage.drivers import files
from services.storage.drivers.files import get_tag, set_tags
from services.storage.drivers.interface import Cancel, Committed, Driver, DriverInfo

_NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]{0,63}")
_OPTIONS_LIMIT = 16384


class LinuxKernelDriver(Driver):
    """Option dir_path. A volume's vid is the kernel's name, "" = no kernel."""

    name = "linux-kernel"

    @classmethod
    def info(cls) -> DriverInfo:
        return DriverInfo(
            name=cls.name,
            parameters=("dir_path",),
            required=("dir_path",),
            resize_running=False,
            disks=False,
        )

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.root = Path(parse_directory(pool, self.name, self.info().parameters))

    # ---- the pool

    def setup(self) -> None:
        failpoints.hit("storage.pool_setup.before_mkdir")
        try:
            files.make_directory(self.root)
        except FileNotFoundError:
            raise StorageRefusal(
                "POOL_UNUSABLE",
                f"pool {self.pool.name}: {self.root.parent} does not exist, make it first",
                pool=self.pool.name,
                path=str(self.root.parent),
            ) from None
        failpoints.hit("storage.pool_setup.after_mkdir")
        self._drop_leftovers()

    def _drop_leftovers(self) -> None:
        for entry in list(os.scandir(self.root)):
            if entry.name.startswith(".") and "~" in entry.name:
                shutil.rmtree(entry.path, ignore_errors=True)

    def teardown(self) -> None:
        with contextlib.suppress(OSError):
            self.root.rmdir()

    def config(self) -> dict[str, str]:
        return {"name": self.pool.name, "driver": self.name, "dir_path": str(self.root)}

    def usage(self) -> PoolUsage:
        return PoolUsage()

    def location(self) -> Path | None:
        return self.root

    def check(self) -> None:
        if not self.root.is_dir():
            raise StorageRefusal(
                "POOL_UNUSABLE",
                f"pool {self.pool.name}: {self.root} does not exist",
                pool=self.pool.name,
                path=str(self.root),
            )

    # ---- volumes: all that a qube may do with its kernel is look

    def _kernel_dir(self, volume: Volume) -> Path | None:
        if volume.rw or volume.save_on_stop or volume.snap_on_start or volume.ephemeral:
            raise StorageRefusal(
                "VOLUME_REFUSED",
                f"volume {volume.name} of a kernel pool can only be read",
                volume=volume.vid,
            )
        if not volume.vid:
            return None
        return self.root / self._check_name(volume.vid)

    def _check_name(self, untrusted_name: str) -> str:
        if _NAME.fullmatch(untrusted_name) is None:
            raise StorageRefusal(
                "INVALID_KERNEL",
                f"{untrusted_name!r} is no kernel name: use letters, digits and _ . + -",
                kernel=untrusted_name,
            )
        return untrusted_name

    def ensure(self, owner: str, volume: Volume) -> None:
        self._kernel_dir(volume)

    def clone(
        self, owner: str, volume: Volume, source: Committed, key: str, cancel: Cancel
    ) -> None:
        self._kernel_dir(volume)

    def replace(
        self, owner: str, volume: Volume, source: Committed | None, key: str, cancel: Cancel
    ) -> None:
        raise self._not_origin(volume)

    def _not_origin(self, volume: Volume) -> StorageRefusal:
        return StorageRefusal(
            "NOT_ORIGIN",
            f"volume {volume.name} is a kernel: it holds no data of the qube",
            volume=volume.vid,
        )

    def remove(self, owner: str, volume: Volume) -> None:
        """Nothing: kernels belong to no qube."""

    def verify(self, owner: str, volume: Volume, source: Volume | None) -> None:
        directory = self._kernel_dir(volume)
        if directory is not None and not (directory / "vmlinuz").is_file():
            raise StorageRefusal(
                "KERNEL_NOT_INSTALLED",
                f"kernel {volume.vid} is not installed: {directory / 'vmlinuz'} does not exist",
                kernel=volume.vid,
                path=str(directory / "vmlinuz"),
            )

    def start(
        self, owner: str, boot_id: str, volume: Volume, source: Volume | None, cancel: Cancel
    ) -> Device | None:
        self.verify(owner, volume, source)
        directory = self._kernel_dir(volume)
        if directory is None or not (directory / "modules.img").is_file():
            return None
        return Device(name=volume.name, path=str(directory / "modules.img"), rw=False)

    def stop(self, owner: str, boot_id: str, volume: Volume, cancel: Cancel) -> None:
        """Nothing was started."""

    def describe(self, volume: Volume, source: Volume | None) -> VolumeState:
        directory = self._kernel_dir(volume)
        if directory is None:
            return VolumeState(size=volume.size)
        image = directory / "modules.img"
        problem = ""
        try:
            self.verify("", volume, source)
        except StorageRefusal as refusal:
            problem = refusal.message
        try:
            status = image.stat()
        except FileNotFoundError:
            return VolumeState(size=volume.size, path=str(image), problem=problem)
        return VolumeState(
            size=status.st_size, usage=status.st_blocks * 512, path=str(image), problem=problem
        )

    def revert(self, owner: str, volume: Volume, revision: str, key: str) -> None:
        raise self._not_origin(volume)

    def resize(self, owner: str, volume: Volume, size: int, cancel: Cancel) -> int:
        raise StorageRefusal(
            "VOLUME_REFUSED",
            f"cannot resize volume {volume.name}: it is a kernel",
            volume=volume.vid,
        )

    def import_begin(self, owner: str, volume: Volume, size: int, key: str, ticket: bool) -> Import:
        raise self._not_origin(volume)

    def import_arrived(self, owner: str, volume: Volume, key: str) -> None:
        raise self._not_origin(volume)

    def import_end(self, owner: str, volume: Volume, success: bool, key: str) -> None:
        if success:
            raise self._not_origin(volume)

    def committed(self, volume: Volume, revision: str = "") -> AbstractContextManager[Committed]:
        raise self._not_origin(volume)

    # ---- upkeep

    def inventory(self) -> Sequence[Found]:
        return ()

    def quarantine(self, found: Found) -> str:
        return f"{found.vid}: kernels are not quarantined"

    def clear_temporaries(self, vid: str) -> list[str]:
        return []

    # ---- kernels

    def kernels(self) -> Sequence[Kernel]:
        try:
            names = sorted(e.name for e in os.scandir(self.root) if e.is_dir())
        except FileNotFoundError:
            return ()
        return [self._describe(self.root / name) for name in names if _NAME.fullmatch(name)]

    def _describe(self, directory: Path) -> Kernel:
        return Kernel(
            name=directory.name,
            directory=str(directory),
            has_vmlinuz=(directory / "vmlinuz").is_file(),
            has_initramfs=(directory / "initramfs").is_file(),
            has_modules=(directory / "modules.img").is_file(),
            memory_hotplug=(directory / "memory-hotplug-supported").exists(),
            kernelopts_common=self._text(directory / "default-kernelopts-common.txt"),
            kernelopts_pci=self._text(directory / "default-kernelopts-pci.txt"),
            kernelopts_nopci=self._text(directory / "default-kernelopts-nopci.txt"),
        )

    def _text(self, path: Path) -> str | None:
        try:
            with path.open("rb") as file:
                return file.read(_OPTIONS_LIMIT).decode("utf-8", "replace")
        except FileNotFoundError:
            return None

    def kernel_add(
        self, name: str, vmlinuz: Path, initramfs: Path | None, modules: Path | None, cancel: Cancel
    ) -> Kernel:
        directory = self.root / self._check_name(name)
        parts = {"vmlinuz": vmlinuz}
        if initramfs is not None:
            parts["initramfs"] = initramfs
        if modules is not None:
            parts["modules.img"] = modules
        for part, path in parts.items():
            if not path.is_absolute() or not path.is_file():
                raise StorageRefusal(
                    "INVALID_KERNEL",
                    f"kernel {name}: {part} {path} is no file with an absolute path",
                    kernel=name,
                    path=str(path),
                )
        self.check()
        if directory.exists():
            self._check_same(directory, parts)
            return self._describe(directory)
        with self._building(name) as place:
            for part, path in parts.items():
                self._install(path, place / part, cancel)
            fsync_directory(place)
            failpoints.hit("storage.kernel_add.before_rename")
            place.rename(directory)
            fsync_directory(self.root)
            failpoints.hit("storage.kernel_add.after_rename")
        return self._describe(directory)

    @contextlib.contextmanager
    def _building(self, name: str) -> Iterator[Path]:
        for leftover in self.root.glob(f".{name}~*"):
            shutil.rmtree(leftover, ignore_errors=True)
        place = self.root / f".{name}~{secrets.token_hex(6)}"
        files.make_directory(place)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _install(self, source: Path, target: Path, cancel: Cancel) -> None:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            out = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                files.copy(fd, out, os.fstat(fd).st_size, cancel)
                files.share_with_guests(out, 0o640)
                os.fsync(out)
            finally:
                os.close(out)
        finally:
            os.close(fd)

    def _check_same(self, directory: Path, parts: dict[str, Path]) -> None:
        present = {
            part for part in ("vmlinuz", "initramfs", "modules.img") if (directory / part).is_file()
        }
        if present != set(parts) or not all(
            filecmp.cmp(path, directory / part, shallow=False) for part, path in parts.items()
        ):
            raise StorageRefusal(
                "KERNEL_EXISTS",
                f"another kernel is installed as {directory.name}; remove it first or choose "
                "another name",
                kernel=directory.name,
            )

    def kernel_remove(self, name: str, key: str) -> None:
        directory = self.root / self._check_name(name)
        self.check()
        mark = f"{name}/{key}"
        doomed = self.root / f".{name}~removed"
        if not directory.is_dir() and not doomed.exists():
            if key and get_tag(self.root, "removed") == mark:
                return
            raise StorageRefusal(
                "KERNEL_NOT_INSTALLED", f"kernel {name} is not installed", kernel=name
            )
        if directory.is_dir():
            shutil.rmtree(doomed, ignore_errors=True)
            # Written first: a repeat after the rename must know that it had been there.
            if key:
                set_tags(self.root, {"removed": mark})
            fsync_directory(self.root)
            failpoints.hit("storage.kernel_remove.before_rename")
            directory.rename(doomed)
            fsync_directory(self.root)
            failpoints.hit("storage.kernel_remove.after_rename")
        shutil.rmtree(doomed)
        fsync_directory(self.root)
        failpoints.hit("storage.kernel_remove.after_delete")
