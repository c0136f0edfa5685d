"""Adapters with one or two durable steps: killed at each failpoint, then asked again.

What they leave is on disk alone, so the process that dies is a fork that runs the
adapter and nothing else.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from bulkhead import failpoints
from clients.cli.instance.audit import Reader
from services.adminapi.adapters.audit_file import AuditFile
from services.dispvm import failpoint_table as _dispvm_failpoints  # noqa: F401
from services.dispvm.adapters.boot_marker import BootMarker
from services.hostd.adapters.autostart import TEMPLATE, Autostart
from tests.unit.test_hostd_verbs import Kernel, Sysfs

pytestmark = pytest.mark.fault

ADDRESS = "0000:03:00.0"


def kill_at(name: str, work: Callable[[], object]) -> None:
    """Run the work in a process that dies by SIGKILL at the failpoint."""
    assert name in failpoints.table()
    pid = os.fork()
    if pid == 0:
        try:
            failpoints._ARMED[name] = "kill"
            failpoints._ACTIVE = True
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{name}: {status}"


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("name", ["hostd.autostart.before_link", "hostd.autostart.after_link"])
def test_an_autostart_link_is_the_old_or_the_new_one(
    tmp_path: Path, name: str, enabled: bool
) -> None:
    autostart = Autostart(tmp_path)
    link = tmp_path / "etc/systemd/system/multi-user.target.wants/qubes-vm@work.service"
    autostart.set("other", True)
    autostart.set("work", not enabled)
    kill_at(name, lambda: autostart.set("work", enabled))
    autostart.set("work", enabled)
    assert link.is_symlink() == enabled
    assert not enabled or link.readlink() == TEMPLATE
    left = {path.name for path in link.parent.iterdir()} - {"qubes-vm@other.service"}
    assert left == ({link.name} if enabled else set())


@pytest.mark.parametrize("stub", [True, False])
@pytest.mark.parametrize("name", ["hostd.pci.after_override", "hostd.pci.after_unbind"])
def test_a_pci_device_gets_its_driver_by_the_repeat(tmp_path: Path, name: str, stub: bool) -> None:
    sysfs = Sysfs(tmp_path, "e1000e")
    kernel = Kernel(sysfs)
    kernel.bind(ADDRESS, not stub)
    kill_at(name, lambda: kernel.bind(ADDRESS, stub))
    kernel.bind(ADDRESS, stub)
    assert kernel._driver(sysfs.device) == ("vfio-pci" if stub else "e1000e")


def test_the_marker_of_a_boot_is_whole_or_absent(tmp_path: Path) -> None:
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("one\n")
    marker = BootMarker(tmp_path, boot_id)
    kill_at("dispvm.boot_marker.before", marker.done)
    assert BootMarker(tmp_path, boot_id).fresh()
    kill_at("dispvm.boot_marker.after", marker.done)
    assert not BootMarker(tmp_path, boot_id).fresh()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boot_id", "host-boot"]


@pytest.mark.parametrize("name", ["adminapi.audit.before_rotate", "adminapi.audit.after_rotate"])
def test_the_audit_chain_goes_on_over_a_kill_between_two_files(tmp_path: Path, name: str) -> None:
    def write(first: int, last: int) -> None:
        file = AuditFile(tmp_path, 100)
        file.open()
        for number in range(max(first, file.head.exported + 1), last + 1):
            file.append([{"kind": "change", "exported": number, "registry_hash": "ab"}])
        file.close()

    kill_at(name, lambda: write(1, 4))
    write(1, 4)
    records = [line.record for line in Reader(tmp_path).read()]
    assert [record["exported"] for record in records if record] == [1, 2, 3, 4]
    assert None not in records
