"""PCI functions that are assigned: which ones the host lets go of, and when."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from bulkhead.bus.errors import BusError
from bulkhead.model.records import Assignment, DeviceFact, FactPut, HostFact
from services.lifecycle.core import boot
from services.lifecycle.executor import StepFailed
from services.lifecycle.steps.start import Devices
from tests.unit.plan_world import World, world

CARD, DISPLAY = "0000:00:1f.2", "0000:03:00.0"


@pytest.fixture
def w() -> World:
    made = world()
    dom0 = made.view.adminvm.uuid
    for port, sbdf in (("00_1f.2", CARD), ("00_1c.0-00_00.0", DISPLAY)):
        fact = DeviceFact(dom0, "pci", port, "8086:1234::p028000", data={"sbdf": sbdf})
        made.view.apply(FactPut(fact))
    return made


def pci(port: str, mode: str, identity: str = "*") -> Assignment:
    return Assignment("pci", "dom0", port, identity, mode)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ((), ()),
        ((pci("00_1f.2", "required"),), ((CARD, True),)),
        ((pci("00_1f.2", "ask-to-attach"),), ((CARD, False),)),
        ((pci("00_1f.2", "auto-attach"), pci("00_1f.2", "required", "*")), ((CARD, True),)),
        ((pci("00_1f.2", "required", "1:2"),), ()),
        # dom0 must not lose all of its devices to a pattern.
        ((pci("*", "auto-attach"),), ()),
        ((pci("*", "required"),), ((DISPLAY, True),)),
        ((Assignment("block", "dom0", "00_1f.2", "*", "required"),), ()),
    ],
)
def test_what_the_host_lets_go_of(
    w: World, devices: tuple[Assignment, ...], expected: tuple[tuple[str, bool], ...]
) -> None:
    w.patch("work", devices=devices)
    assert boot.stub_addresses(w.view, w.qube("work")) == expected


class Host:
    """hostd: remembers what it bound; refuses the addresses in `bad`."""

    def __init__(self, *bad: str) -> None:
        self.bad = bad
        self.bound: list[tuple[str, bool]] = []

    async def bind_pci(self, request: Any, *, timeout: float, context: object) -> None:
        assert timeout > 0 and context is not None
        if request.address in self.bad:
            raise BusError("INTERNAL", "HOST_REFUSED", "no such driver")
        self.bound.append((request.address, request.stub))


def forward(w: World, host: Host | None) -> None:
    context: Any = SimpleNamespace(
        view=w.view,
        participants=SimpleNamespace(hostd=host),
        operation=SimpleNamespace(subjects=(w.qube("work").uuid,)),
        call=lambda name="": name or "step",
    )
    asyncio.run(Devices().forward(context))


def test_bound_at_start_where_there_is_a_host_to_do_it(w: World) -> None:
    w.patch("work", devices=(pci("00_1f.2", "required"), pci("00_1c.0-00_00.0", "auto-attach")))
    host = Host()
    forward(w, host)  # simulated: the addresses would be the real machine's
    assert host.bound == []
    forward(w, None)
    w.view.apply(FactPut(HostFact("xen", memory_kib=1 << 24, cpus=4)))
    forward(w, host)
    assert host.bound == [(CARD, True), (DISPLAY, True)]
    other = Host(DISPLAY)
    forward(w, other)  # one that the start does not need
    assert other.bound == [(CARD, True)]
    with pytest.raises(BusError):
        forward(w, Host(CARD))


def test_what_another_qube_has_is_not_available(w: World) -> None:
    """Two qubes that require one device: whichever starts first has it."""
    card = next(f for f in w.view.devices_of(w.view.adminvm.uuid) if f.port == "00_1f.2")
    w.patch("work", devices=(pci("00_1f.2", "required"),))
    for holder, missing in (("vault", 1), ("work", 0), ("", 0)):
        uuid = w.qube(holder).uuid if holder else ""
        w.view.apply(FactPut(replace(card, attached_to=uuid)))
        assert len(boot.missing_devices(w.view, w.qube("work"))) == missing


def test_nothing_is_bound_for_a_start_that_is_refused(w: World) -> None:
    w.view.apply(FactPut(HostFact("xen", memory_kib=1 << 24, cpus=4)))
    absent = replace(pci("00_1f.2", "required"), port="01_00.0")
    w.patch("work", devices=(pci("00_1f.2", "required"), absent))
    host = Host()
    with pytest.raises(StepFailed, match="Pci device dom0:01_00.0:\\* not available"):
        forward(w, host)
    assert host.bound == []
