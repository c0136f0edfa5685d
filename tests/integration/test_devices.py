"""Devices that exist, on real services and the simulated hypervisor: what is listed, byte
for byte, who gets them, by hand and by themselves, and what clients are told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from bulkhead.model.records import ADMINVM_UUID
from services.domains.simhv.client import SimControl
from tests.integration.adminapi_world import started
from tests.integration.test_adminapi_sections_b import Script

pytestmark = pytest.mark.integration

ID = "0000:0000::?******:0"  # a disk without a parent
ARG = "back+sda+0000+0000++_______+0"
STICK: dict[str, Any] = {
    "devclass": "block",
    "port": "sda",
    "device_id": ID,
    "interfaces": "b******",
    "data": {"mode": "w", "size": "4096"},
    "fields": {"name": "O'Brien stick"},
}
PART = {**STICK, "port": "sda1", "parent_port": "sda", "parent_devclass": "block", "fields": {}}
DISC = {**STICK, "port": "sr0", "data": {"mode": "r", "size": "1"}, "fields": {}}
CARD: dict[str, Any] = {
    "devclass": "pci",
    "port": "00_1f.2",
    "device_id": "8086:1234::p028000",
    "interfaces": "p028000",
    "data": {"sbdf": "0000:00:1f.2"},
    "fields": {"vendor": "ACME"},
}
HEAD = f"device_id='{ID}' port_id='{{0}}' devclass='block' backend_domain='back'"


class Lab(Script):
    """work and other may use what back offers."""

    sim: SimControl

    def _where(self) -> str:
        frame = sys._getframe(2)
        while frame.f_back is not None and not frame.f_code.co_name.startswith("test_"):
            frame = frame.f_back
        return f"line {frame.f_lineno}"

    def prepare(self, sim: SimControl) -> None:
        self.sim = sim
        for name in ("work", "other", "back"):
            self.c("vm.Create.AppVM", arg="tmpl", payload=f"name={name} label=red")
        self.uuid = {
            name: self.instance.ok("admin.vm.property.Get", name, "uuid").split()[-1]
            for name in ("work", "other", "back")
        }
        self.uuid["dom0"] = ADMINVM_UUID
        for name in ("work", "back"):
            self.c("vm.Start", name)
        self.subscribe("all")

    def offer(self, backend: str, *devices: dict[str, Any]) -> None:
        """All that a backend has from now on; returns when that is listed."""
        self.sim.devices(self.uuid[backend], *devices)
        wanted = {(str(d["devclass"]), str(d["port"])) for d in devices}
        self.instance.until(lambda: self.listed(backend) == wanted, 10, "the devices are listed")

    def listed(self, backend: str) -> set[tuple[str, str]]:
        """Class and port of everything that a backend offers."""
        return {
            (devclass, line.partition(":")[0])
            for devclass in ("block", "pci")
            for line in self.instance.ok(
                f"admin.vm.device.{devclass}.Available", backend
            ).splitlines()
        }

    def until(self, last: str) -> list[str]:
        """Events of all up to that line."""
        return self._streams["all"].read(lambda line: line == last)

    def disks(self, name: str) -> dict[str, dict[str, Any]]:
        """Target to disk of the running qube, without its volumes."""
        rows = self.sim.guest(self.uuid[name])["disks"]
        return {str(row["target"]): row for row in rows if row["target"] > "xvdd"}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with started() as (instance, _client, pool), SimControl.of(instance.root) as sim:
        script = Lab(instance, pool)
        script.prepare(sim)
        yield script
        script.close()


@pytest.fixture
def r(lab: Lab) -> Iterator[Lab]:
    lab.forget("all")
    lab.wrong.clear()
    yield lab
    assert not lab.wrong, "\n".join(lab.wrong)


def added(backend: str, device: dict[str, Any]) -> str:
    what = f"{backend}:{device['port']}:{device['device_id']}"
    return f"{backend}:device-added:{device['devclass']} device={what}"


def test_lists_are_sorted_and_written_as_the_interface_says(r: Lab) -> None:
    r.offer("back", PART, STICK)
    r.events(
        "all",
        "back:device-list-change:block",
        added("back", STICK),
        added("back", PART),
        until=added("back", PART).split(" ")[0],
    )
    line = (
        f"sda:{ID} {HEAD.format('sda')} name='O\\'Brien stick' interfaces='b******'"
        " _mode='w' _size='4096'\n"
    )
    part = (
        f"sda1:{ID} {HEAD.format('sda1')}  interfaces='b******'"
        " parent_port_id='sda' parent_devclass='block' _mode='w' _size='4096'\n"
    )
    r.c("dev.block.Available", "back", want="=" + part + line)
    r.c("dev.block.Available", "back", "sda", want="=" + line)
    r.c("dev.block.Available", "back", "sd")
    r.c("dev.pci.Available", "back")
    r.offer("dom0", CARD)
    r.forget("all", until=added("dom0", CARD).split(" ")[0])
    r.c(
        "dev.pci.Available",
        want="=00_1f.2:8086:1234::p028000 device_id='8086:1234::p028000' port_id='00_1f.2'"
        " devclass='pci' backend_domain='dom0' vendor='ACME' interfaces='p028000'"
        " _sbdf='0000:00:1f.2'\n",
    )
    r.offer("back")
    r.events(
        "all",
        "back:device-list-change:block",
        "back:device-removed:block port=back:sda",
        "back:device-removed:block port=back:sda1",
        until="back:device-removed:block",
    )


def test_attached_by_hand(r: Lab) -> None:
    r.offer("back", STICK, DISC)
    r.forget("all", until="back:device-added:block")
    attach, detach = "dev.block.Attach", "dev.block.Detach"
    r.c(attach, "work", "back+sr0", "_read-only='off'", want="QubesValueError")
    r.c(attach, "work", "back+sr0", "_nosuch='1'", want="QubesValueError")
    r.c(attach, "work", ARG)
    r.c(attach, "work", "back+sr0", "_devtype='cdrom'")
    pre, done = "work:device-pre-attach:block", "work:device-attach:block"
    r.events(
        "all",
        f"{pre} device=back:sr0:{ID} options={{'read-only': 'off'}}",
        f"{pre} device=back:sr0:{ID} options={{'nosuch': '1'}}",
        f"{pre} device=back:sda:{ID} options={{}}",
        f"{done} device=back:sda:{ID} options={{}}",
        f"{pre} device=back:sr0:{ID} options={{'devtype': 'cdrom'}}",
        f"{done} device=back:sr0:{ID} options={{'devtype': 'cdrom'}}",
    )
    found = {t: (d["path"], d["rw"], d["devtype"]) for t, d in r.disks("work").items()}
    assert found == {"xvdi": ("/dev/sda", True, "disk"), "xvdj": ("/dev/sr0", False, "cdrom")}
    manual = " mode='manual' frontend_domain='work'"
    stick = (
        f"back+sda:{ID} {HEAD.format('sda')}{manual}"
        " _frontend-dev='xvdi' _read-only='no' _devtype='disk'\n"
    )
    disc = (
        f"back+sr0:{ID} {HEAD.format('sr0')}{manual}"
        " _frontend-dev='xvdj' _read-only='yes' _devtype='cdrom'\n"
    )
    r.c("dev.block.Attached", "work", want="=" + stick + disc)
    r.c("dev.block.Attached", "work", "back+sda", want="=" + stick)
    r.c("dev.block.Available", "back", "sda", want="~.* attachment='work' interfaces=.*\n")
    r.c(attach, "work", "back+sda", want="DeviceAlreadyAttached")
    r.c("vm.Start", "other")
    r.c(attach, "other", "back+sda", want="DeviceAlreadyAttached")
    r.forget("all")
    r.c(detach, "work", "other+sr0+1+2")
    r.c(detach, "work", ARG)
    r.c(detach, "work", ARG, want="DeviceNotAssigned")
    r.events(
        "all",
        *(
            f"work:device-{word}:block port=back:{port}"
            for port in ("sr0", "sda")
            for word in ("pre-detach", "detach")
        ),
    )
    assert r.disks("work") == {}
    r.offer("dom0", CARD)
    r.c("dev.pci.Attach", "work", "dom0+00_1f.2", want="QubesException")
    # A backend that stops offers nothing, and who had something of it has it no more.
    r.c(attach, "other", ARG)
    r.forget("all")
    r.c("vm.Kill", "back")
    told = r.until("back:device-removed:block port=back:sr0")
    assert [line for line in told if "device-" in line] == [
        "back:device-list-change:block",
        "other:device-detach:block port=back:sda",
        "back:device-removed:block port=back:sda",
        "back:device-removed:block port=back:sr0",
    ]
    r.c("dev.block.Available", "back")
    r.c("vm.Kill", "other")
    r.c("vm.Start", "back")
    r.c("dev.block.Available", "back")


def test_denied_interfaces(r: Lab) -> None:
    r.offer("back", STICK)
    r.forget("all", until="back:device-added:block")
    attach = "dev.block.Attach"
    r.c("dev.denied.Add", "work", payload="b******")
    r.c(attach, "work", ARG, want="PermissionDenied")
    r.c(attach, "work", "back+nosuch", want="PermissionDenied")
    r.c(attach, "work", ARG, "mode='bad'", want="ProtocolError")
    r.c(attach, "work", ARG, "mode='auto-attach'")
    r.c("dev.block.Detach", "work", ARG)
    r.c("dev.denied.Add", "work", payload="u******")
    r.c("dev.denied.Remove", "work", payload="b******")
    r.c(attach, "work", ARG)
    r.c("dev.block.Detach", "work", ARG)
    r.c("dev.denied.Remove", "work", payload="all")


def test_attached_by_themselves(r: Lab) -> None:
    r.offer("back")
    r.c("dev.block.Assign", "work", "back+_", "mode='auto-attach' _read-only='yes'")
    r.c("dev.block.Assign", "work", "back+sda", "mode='auto-attach'")
    r.forget("all")
    # When it appears: the better claim of the two decides the options.
    r.offer("back", STICK)
    attached = f"device=back:sda:{ID} options={{}}"
    r.events(
        "all",
        "back:device-list-change:block",
        added("back", STICK),
        f"work:device-pre-attach:block {attached}",
        f"work:device-attach:block {attached}",
        until="work:device-attach:block",
    )
    # Detached by hand it stays so, until the qube starts again.
    r.c("dev.block.Detach", "work", ARG)
    r.c("vm.Kill", "work")
    r.c("dev.block.Attached", "work")
    r.c("vm.Start", "work")
    r.forget("all", until="work:device-attach:block")
    assert r.disks("work")["xvdi"]["rw"] is True
    # Claimed by two qubes it goes to none.
    r.c("vm.Start", "other")
    r.c("dev.block.Assign", "other", "_+_", "mode='auto-attach'")
    r.offer("back")
    r.forget("all", until="back:device-removed:block")
    r.instance.until(lambda: not r.disks("work"), 10, "the withdrawn stick is unplugged")
    r.instance.until(
        lambda: r.instance.ok("admin.vm.device.block.Attached", "work") == "", 10, "it is known"
    )
    r.offer("back", STICK)
    r.events(
        "all",
        "back:device-list-change:block",
        added("back", STICK),
        until="back:device-added:block",
    )
    r.c("dev.block.Attached", "work")
    assert r.disks("work") == r.disks("other") == {}
    r.c("vm.Kill", "other")
    for arg in ("back+_", "back+sda"):
        r.c("dev.block.Unassign", "work", arg)
    r.c("dev.block.Unassign", "other", "_+_")


def test_required_devices_are_part_of_the_start(r: Lab) -> None:
    r.c("vm.Kill", "work")
    r.offer("dom0", CARD)
    r.offer("back", DISC)
    r.forget("all", until="back:device-added:block")
    r.c("dev.block.Assign", "work", "_+_", "mode='required' _frontend-dev='xvdq'")
    r.c(
        "dev.pci.Assign",
        "work",
        "dom0+00_1f.2+8086+1234++p028000",
        "mode='required' _no-strict-reset='yes'",
    )
    r.c("prop.Get", "work", "virt_mode", want="=default=True type=str hvm")
    r.c("vm.Start", "work")
    disk = r.disks("work")["xvdq"]
    assert (disk["path"], disk["rw"], disk["backend"]) == ("/dev/sr0", False, "back")
    (card,) = r.sim.guest(r.uuid["work"])["spec"]["hostdevs"]
    assert (card["slot"], card["function"], card["no_strict_reset"]) == (0x1F, 2, True)
    r.c("dev.pci.Available", want="~.* vendor='ACME' attachment='work' .*")
    r.c("dev.block.Detach", "work", "back+sr0", want="QubesVMNotHaltedError")
    r.c("dev.pci.Detach", "work", "dom0+00_1f.2", want="QubesVMNotHaltedError")
    r.c("vm.Kill", "work")
    r.c("dev.block.Unassign", "work", "_+_")
    r.c("dev.block.Assign", "work", "back+sr0", "mode='required' _devtype='tape'")
    r.c("vm.Start", "work", want="QubesValueError")
    r.c("dev.block.Unassign", "work", "back+sr0")
    r.c("dev.block.Assign", "work", "back+sr0+1", "mode='required'")
    r.c("vm.Start", "work", want="QubesException")
    r.c("dev.block.Unassign", "work", "back+sr0+1")
    r.c("dev.pci.Unassign", "work", "dom0+00_1f.2+8086+1234++p028000")
