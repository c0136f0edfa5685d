"""Drivers that this build lacks: their options are known, and nothing was ever begun."""

from __future__ import annotations

import pytest

from bulkhead.model.records import Pool, Volume
from services.storage.core.reasons import StorageRefusal
from services.storage.drivers.interface import Cancel, Driver
from services.storage.drivers.load import open_pool

POOLS = (
    Pool("p", "lvm_thin", {"volume_group": "vg", "thin_pool": "tp"}),
    Pool("p", "zfs", {"container": "tank"}),
    Pool("p", "callback", {"conf_id": "c"}),
)
VOLUME = Volume("private", "p", "vg/vm-x-private", rw=True, save_on_stop=True)


@pytest.fixture(params=POOLS, ids=lambda pool: pool.driver)
def driver(request: pytest.FixtureRequest) -> Driver:
    return open_pool(request.param)


def test_what_was_never_begun_is_ended(driver: Driver) -> None:
    driver.stop("owner", "boot", VOLUME, Cancel())
    driver.import_end("owner", VOLUME, False, "op")


def test_whatever_needs_data_is_refused_with_the_reason(driver: Driver) -> None:
    for work in (
        lambda: driver.setup(),
        lambda: driver.ensure("owner", VOLUME),
        lambda: driver.start("owner", "boot", VOLUME, None, Cancel()),
        lambda: driver.import_begin("owner", VOLUME, 0, "op", False),
        lambda: driver.import_end("owner", VOLUME, True, "op"),
        lambda: driver.remove("owner", VOLUME),  # 4.4 may have made it
    ):
        with pytest.raises(StorageRefusal, match=f"driver {driver.name} is not available") as told:
            work()
        assert told.value.reason == "POOL_UNUSABLE"
    assert driver.describe(VOLUME, None).problem.startswith(f"driver {driver.name}")
