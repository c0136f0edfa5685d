"""The simulated host alone: what its guests use, answer and do when they are asked to stop."""

from __future__ import annotations

from typing import Any

import pytest

from services.domains.simhv.machine import CPU_SHARE, Machine


class Host:
    """A machine with a clock of its own and one guest that runs."""

    def __init__(self) -> None:
        self.time = 0.0
        self.news: list[dict[str, Any]] = []
        self.machine = Machine(self.news.append, lambda: self.time)
        self.machine.create_paused(
            {
                "uuid": "u", "name": "work", "boot_id": "b", "epoch": 1, "memory_mib": 400,
                "maxmem_mib": 4000, "vcpus": 2, "virt_mode": "pvh", "console_log": "",
                "disks": [], "interfaces": [], "hostdevs": [],
            }
        )  # fmt: skip
        self.machine.resume("u")

    def guest(self) -> dict[str, Any]:
        shown = self.machine.describe("u")
        assert shown is not None
        return shown


@pytest.fixture
def host() -> Host:
    return Host()


def test_an_idle_guest_uses_a_small_share_of_its_time_and_none_while_paused(host: Host) -> None:
    host.time = 10.0
    assert host.guest()["cpu_time_ns"] == int(10 * CPU_SHARE * 1e9)
    host.machine.pause("u")
    host.time = 20.0
    assert host.guest()["cpu_time_ns"] == int(10 * CPU_SHARE * 1e9)
    host.machine.resume("u")
    host.time = 30.0
    assert host.guest()["cpu_time_ns"] == int(20 * CPU_SHARE * 1e9)


def test_a_guest_without_a_log_has_no_console(host: Host) -> None:
    assert host.guest()["console"] == ""


@pytest.mark.parametrize("asleep", [False, True])
def test_a_guest_that_obeys_stops_awake_or_asleep(host: Host, asleep: bool) -> None:
    if asleep:
        host.machine.pm_suspend("u")
    host.machine.shutdown("u")
    assert host.machine.describe("u") is None
    assert host.news[-1]["reason"] == "shutdown"


def test_a_paused_guest_hears_nothing(host: Host) -> None:
    host.machine.pause("u")
    host.machine.shutdown("u")
    assert host.guest()["power"] == "paused"
