"""Drivers that 4.4 has and that no pool can be set up with here: lvm_thin, zfs, callback.

Owns their names, parameters and why they do not work on this host, so that a pool of
theirs in qubes.xml is listed and refused clearly. Must not touch anything. Invariant:
every call about data is refused with POOL_UNUSABLE and changes nothing.
"""

# ruff: noqa: ARG002  (the interface's arguments, whether a driver needs them or not)

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar, NoReturn

from bulkhead.model.records import Pool, Volume
from services.storage.core.reasons import StorageRefusal
from services.storage.core.states import Device, Found, Import, PoolUsage, VolumeState
from services.storage.drivers.interface import Cancel, Committed, Driver, DriverInfo

_SEARCH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


class AbsentDriver(Driver):
    """Base: knows its options, refuses the rest; the end of what cannot have begun is done."""

    parameters: ClassVar[tuple[str, ...]]
    required: ClassVar[tuple[str, ...]]
    block_devices: ClassVar[bool] = True

    @classmethod
    def info(cls) -> DriverInfo:
        return DriverInfo(
            name=cls.name,
            parameters=cls.parameters,
            required=cls.required,
            why_not=cls._why_not(),
            negative_revisions=cls.block_devices,
            block_devices=cls.block_devices,
        )

    @classmethod
    def _why_not(cls) -> str:
        raise NotImplementedError

    def __init__(self, pool: Pool) -> None:
        unknown = sorted(set(pool.options) - set(self.parameters))
        missing = [name for name in self.required if not pool.options.get(name)]
        if unknown or missing:
            text = f"has no option {unknown[0]}" if unknown else f"needs the option {missing[0]}"
            raise StorageRefusal(
                "INVALID_POOL",
                f"pool {pool.name}: driver {self.name} {text}",
                pool=pool.name,
                option=(unknown or missing)[0],
            )
        self.pool = pool

    def _refuse(self) -> NoReturn:
        why_not = self._why_not()
        raise StorageRefusal(
            "POOL_UNUSABLE",
            f"driver {self.name} is not available on this host: {why_not}",
            driver=self.name,
            pool=self.pool.name,
            why_not=why_not,
        )

    def setup(self) -> None:
        self._refuse()

    def teardown(self) -> None:
        """Nothing was set up."""

    def config(self) -> dict[str, str]:
        return {"name": self.pool.name, "driver": self.name, **self.pool.options}

    def usage(self) -> PoolUsage:
        return PoolUsage()

    def location(self) -> Path | None:
        return None

    def check(self) -> None:
        self._refuse()

    def ensure(self, owner: str, volume: Volume) -> None:
        self._refuse()

    def clone(
        self, owner: str, volume: Volume, source: Committed, key: str, cancel: Cancel
    ) -> None:
        self._refuse()

    def replace(
        self, owner: str, volume: Volume, source: Committed | None, key: str, cancel: Cancel
    ) -> None:
        self._refuse()

    def remove(self, owner: str, volume: Volume) -> None:
        self._refuse()

    def verify(self, owner: str, volume: Volume, source: Volume | None) -> None:
        self._refuse()

    def start(
        self, owner: str, boot_id: str, volume: Volume, source: Volume | None, cancel: Cancel
    ) -> Device | None:
        self._refuse()

    def stop(self, owner: str, boot_id: str, volume: Volume, cancel: Cancel) -> None:
        """Nothing was started."""

    def describe(self, volume: Volume, source: Volume | None) -> VolumeState:
        why_not = f"driver {self.name} is not available on this host: {self._why_not()}"
        return VolumeState(size=volume.size, is_outdated=None, problem=why_not)

    def revert(self, owner: str, volume: Volume, revision: str, key: str) -> None:
        self._refuse()

    def resize(self, owner: str, volume: Volume, size: int, cancel: Cancel) -> int:
        self._refuse()

    def import_begin(self, owner: str, volume: Volume, size: int, key: str, ticket: bool) -> Import:
        self._refuse()

    def import_arrived(self, owner: str, volume: Volume, key: str) -> None:
        self._refuse()

    def import_end(self, owner: str, volume: Volume, success: bool, key: str) -> None:
        if success:
            self._refuse()

    def committed(self, volume: Volume, revision: str = "") -> AbstractContextManager[Committed]:
        self._refuse()

    def inventory(self) -> Sequence[Found]:
        return ()

    def quarantine(self, found: Found) -> str:
        self._refuse()

    def clear_temporaries(self, vid: str) -> list[str]:
        return []


def _missing(tools: Sequence[str]) -> str:
    return ", ".join(tool for tool in tools if shutil.which(tool, path=_SEARCH) is None)


class LvmThinDriver(AbsentDriver):
    """LVM thin volumes."""

    name = "lvm_thin"
    parameters = ("revisions_to_keep", "volume_group", "thin_pool", "ephemeral_volatile")
    required = ("volume_group", "thin_pool")

    @classmethod
    def _why_not(cls) -> str:
        missing = _missing(["lvs", "lvcreate"])
        if missing:
            return f"{missing} not installed (package lvm2)"
        if not Path("/dev/mapper/control").exists():
            return "the kernel has no device-mapper"
        return "this build has no LVM steps"


class ZfsDriver(AbsentDriver):
    """ZFS volumes."""

    name = "zfs"
    parameters = (
        "revisions_to_keep",
        "container",
        "ephemeral_volatile",
        "snap_on_start_forensics",
    )
    required = ("container",)

    @classmethod
    def _why_not(cls) -> str:
        missing = _missing(["zfs", "zpool"])
        if missing:
            return f"{missing} not installed (package zfsutils-linux)"
        if not Path("/dev/zfs").exists():
            return "the kernel has no ZFS"
        return "this build has no ZFS steps"


class CallbackDriver(AbsentDriver):
    """Hooks around another driver, run by a shell."""

    name = "callback"
    parameters = ("conf_id",)
    required = ("conf_id",)
    block_devices = False

    @classmethod
    def _why_not(cls) -> str:
        return "storage may not run shell hooks; use a pool of the driver behind the hooks"
