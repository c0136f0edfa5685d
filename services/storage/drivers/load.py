"""Which drivers exist.

Owns the one table name -> class. Must not know what they do. Invariant: admin.pool.
ListDrivers reports exactly these.
"""

from __future__ import annotations

from bulkhead.model.records import Pool
from services.storage.core.reasons import StorageRefusal
from services.storage.drivers.absent import CallbackDriver, LvmThinDriver, ZfsDriver
from services.storage.drivers.file import FileDriver
from services.storage.drivers.file_reflink import FileReflinkDriver
from services.storage.drivers.interface import Driver, DriverInfo
from services.storage.drivers.linux_kernel import LinuxKernelDriver

DRIVERS: dict[str, type[Driver]] = {
    driver.name: driver
    for driver in (
        CallbackDriver,
        FileDriver,
        FileReflinkDriver,
        LinuxKernelDriver,
        LvmThinDriver,
        ZfsDriver,
    )
}


def open_pool(pool: Pool) -> Driver:
    """The driver of a pool, options checked, nothing touched. INVALID_POOL."""
    driver = DRIVERS.get(pool.driver)
    if driver is None:
        raise StorageRefusal(
            "INVALID_POOL",
            f"pool {pool.name}: there is no driver {pool.driver!r}",
            pool=pool.name,
            driver=pool.driver,
        )
    return driver(pool)


def list_drivers() -> list[DriverInfo]:
    """Every driver as on this host now, by name."""
    return [DRIVERS[name].info() for name in sorted(DRIVERS)]
