"""ATTACH and DETACH: who may have which device, in which order it is refused, which disk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bulkhead.model.devices import matching, specificity
from bulkhead.model.plan import PlanRefused
from bulkhead.model.plan.storage import attached_device
from bulkhead.model.records import Assignment, DeviceFact, FactPut
from bulkhead.model.specs import AttachSpec, DetachSpec
from services.lifecycle.core.attaching import at_appearance, at_start
from tests.unit.plan_world import World, names, pairs, refused, snapshot, world

ID = "0000:0000::?******:0"  # a block device without a parent
STICK = Assignment("block", "sys-net", "sda", "*", "manual")


@pytest.fixture
def w() -> World:
    made = world()
    made.start("sys-net")
    for operation in list(made.view.operations_on(made.qube("sys-net").uuid)):
        made.end(operation)
    return made


def offer(w: World, port: str = "sda", mode: str = "w", **more: Any) -> Any:
    more = {"device_id": ID, "interfaces": "b******", **more}
    return w.device("sys-net", port, data={"mode": mode, "size": "4096"}, **more)


def no_change(w: World, spec: Any, reason: str) -> list[str]:
    """Refused for that reason, with nothing changed; the names of the events announced."""
    before = snapshot(w.view)
    refusal = refused(lambda: w.begin(spec))
    assert refusal.reason == reason, refusal
    assert snapshot(w.view) == before
    return names(refusal.events) if isinstance(refusal, PlanRefused) else []


def test_attach_and_detach(w: World) -> None:
    fact = offer(w)
    no_change(w, AttachSpec("work", STICK), "QUBE_NOT_RUNNING")
    w.start("work")
    events = w.run(AttachSpec("work", STICK))
    assert names(events) == ["work:device-pre-attach:block", "work:device-attach:block"]
    assert pairs(events[1]) == {"device": f"sys-net:sda:{ID}", "options": "{}"}
    no_change(w, DetachSpec("work", STICK), "DEVICE_NOT_ASSIGNED")
    w.view.apply(FactPut(replace(fact, attached_to=w.qube("work").uuid)))
    assert no_change(w, AttachSpec("work", STICK), "DEVICE_ALREADY_ATTACHED") == []
    # The port alone says which device to detach, not even its backend.
    events = w.run(DetachSpec("work", replace(STICK, backend="vault", identity="1:2")))
    assert names(events) == ["work:device-pre-detach:block", "work:device-detach:block"]
    assert pairs(events[0]) == {"port": "sys-net:sda"}
    w.patch("work", devices=(replace(STICK, mode="required"),))
    no_change(w, DetachSpec("work", STICK), "QUBE_NOT_HALTED")


def test_the_disk_is_decided_once(w: World) -> None:
    """Repeated after a crash, the attach makes the same disk: all of it is in the operation."""
    w.start("work")
    offer(w, "sda", attached_to=w.qube("work").uuid, attach_options={"frontend-dev": "xvdi"})
    offer(w, "sdb", "r")
    begun = w.begin(AttachSpec("work", Assignment("block", "*", "sdb", "*", "manual")))
    device = attached_device(begun.operation, Assignment("block", "*", "sdb", "*", "manual"))
    assert (device.backend, device.port, device.identity) == ("sys-net", "sdb", ID)
    assert device.options == {"frontend-dev": "xvdj", "read-only": "yes", "devtype": "disk"}


@pytest.mark.parametrize(
    ("options", "disk"),
    [
        ({}, {"frontend-dev": "xvdi", "read-only": "no", "devtype": "disk"}),
        ({"read-only": "True"}, {"frontend-dev": "xvdi", "read-only": "yes", "devtype": "disk"}),
        ({"read-only": "off"}, {"frontend-dev": "xvdi", "read-only": "no", "devtype": "disk"}),
        (
            {"frontend-dev": "xvdz", "devtype": "cdrom"},
            {"frontend-dev": "xvdz", "read-only": "no", "devtype": "cdrom"},
        ),
        ({"devtype": "cdrom"}, {"frontend-dev": "xvdi", "read-only": "no", "devtype": "cdrom"}),
    ],
)
def test_options_of_a_block_device(w: World, options: dict[str, str], disk: dict[str, str]) -> None:
    w.start("work")
    offer(w)
    begun = w.begin(AttachSpec("work", replace(STICK, options=options)))
    assert attached_device(begun.operation, STICK).options == disk


def test_a_cdrom_goes_where_the_kernel_is_not(w: World) -> None:
    w.set("work", "kernel", "")
    w.start("work")
    offer(w)
    begun = w.begin(AttachSpec("work", replace(STICK, options={"devtype": "cdrom"})))
    assert attached_device(begun.operation, STICK).options["frontend-dev"] == "xvdd"


@pytest.mark.parametrize(
    "options",
    [
        {"x": "y"},
        {"": ""},
        {"frontend-dev": "hda"},
        {"frontend-dev": "xvd/a"},
        {"read-only": "maybe"},
        {"devtype": "tape"},
    ],
)
def test_bad_options(w: World, options: dict[str, str]) -> None:
    w.start("work")
    bad = replace(STICK, options=options)
    # What is not there is refused before its options are looked at.
    assert no_change(w, AttachSpec("work", bad), "DEVICE_UNKNOWN") == []
    offer(w)
    told = no_change(w, AttachSpec("work", bad), "INVALID_VALUE")
    assert told == ["work:device-pre-attach:block"]


def test_a_name_that_a_disk_has_is_not_given_twice(w: World) -> None:
    w.start("work")
    offer(w, "sdb", attached_to=w.qube("work").uuid, attach_options={"frontend-dev": "xvdq"})
    offer(w)
    for target in ("xvda", "xvdd", "xvdq"):
        bad = replace(STICK, options={"frontend-dev": target})
        assert no_change(w, AttachSpec("work", bad), "INVALID_VALUE")
    w.begin(AttachSpec("work", replace(STICK, options={"frontend-dev": "xvde"})))


def test_refused(w: World) -> None:
    w.start("work")
    no_change(w, AttachSpec("far", STICK), "QUBE_ERROR")
    no_change(w, AttachSpec("dom0", STICK), "DEVICE_UNKNOWN")
    no_change(w, DetachSpec("dom0", STICK), "DEVICE_NOT_ASSIGNED")
    offer(w, mode="r")
    no_change(w, AttachSpec("dom0", STICK), "QUBE_ERROR")
    no_change(w, AttachSpec("work", replace(STICK, options={"read-only": "no"})), "INVALID_VALUE")
    offer(w, attached_to=w.qube("vault").uuid)
    told = no_change(w, AttachSpec("work", STICK), "DEVICE_ALREADY_ATTACHED")
    assert told == ["work:device-pre-attach:block"]
    offer(w, "sdb")
    no_change(w, AttachSpec("work", replace(STICK, port="*")), "DEVICE_UNKNOWN")
    no_change(w, AttachSpec("work", replace(STICK, identity="1:2")), "DEVICE_UNKNOWN")
    offer(w, "sdc", device_id="0000:0000::?******")
    no_change(w, AttachSpec("work", replace(STICK, port="sdc")), "DEVICE_UNKNOWN")


def test_pci_functions_are_neither_plugged_nor_unplugged(w: World) -> None:
    w.start("work")
    card = DeviceFact(w.view.adminvm.uuid, "pci", "00_1f.2", "8086:1234::p028000")
    w.view.apply(FactPut(card))
    device = Assignment("pci", "dom0", "00_1f.2", "*", "manual")
    assert no_change(w, AttachSpec("work", device), "DEVICE_NOT_PLUGGABLE") == [
        "work:device-pre-attach:pci"
    ]
    w.view.apply(FactPut(replace(card, attached_to=w.qube("work").uuid)))
    assert no_change(w, DetachSpec("work", device), "DEVICE_NOT_PLUGGABLE") == []


def test_a_denied_interface_is_refused_before_anything_else(w: World) -> None:
    w.set("work", "devices_denied", "u******")
    # Absent or ambiguous: its interfaces cannot be known, also of a halted qube.
    assert no_change(w, AttachSpec("work", STICK), "DEVICE_DENIED") == []
    offer(w, interfaces="")
    no_change(w, AttachSpec("work", STICK), "DEVICE_DENIED")
    offer(w, interfaces="b123456u030101")
    no_change(w, AttachSpec("work", STICK), "DEVICE_DENIED")
    offer(w)
    no_change(w, AttachSpec("work", STICK), "QUBE_NOT_RUNNING")
    w.start("work")
    w.set("work", "devices_denied", "b******")
    no_change(w, AttachSpec("work", STICK), "DEVICE_DENIED")
    # Only what a user attaches by hand is denied.
    w.begin(AttachSpec("work", replace(STICK, mode="auto-attach")))


def test_which_devices_an_assignment_means(w: World) -> None:
    offer(w, "sdb", device_id="1:2")
    offer(w)

    def ports(backend: str, port: str, identity: str, devclass: str = "block") -> list[str]:
        device = Assignment(devclass, backend, port, identity, "required")
        return [fact.port for fact, _backend in matching(w.view, device)]

    assert ports("*", "*", "*") == ["sda", "sdb"]
    assert ports("sys-net", "*", "1:2") == ["sdb"]
    assert ports("sys-net", "sda", "1:2") == ports("vault", "*", "*") == []
    assert ports("nosuch", "*", "*") == ports("*", "*", "*", "pci") == []
    ranked = [("sda", "1:2"), ("sda", "*"), ("*", "1:2"), ("*", "*")]
    claims = [specificity(Assignment("block", "*", p, i, "auto-attach")) for p, i in ranked]
    assert claims == sorted(claims, reverse=True) and len(set(claims)) == 4


# ---- devices that attach themselves


def specs_of(found: Any) -> list[tuple[str, str, str, dict[str, str]]]:
    return [(s.qube, s.device.port, s.device.mode, dict(s.device.options)) for s in found]


def wish(port: str = "*", identity: str = "*", **options: str) -> Assignment:
    return Assignment("block", "sys-net", port, identity, "auto-attach", options)


def test_a_started_qube_gets_each_free_device_once_by_its_best_claim(w: World) -> None:
    w.start("work")
    offer(w, "sda")
    offer(w, "sdb", attached_to=w.qube("vault").uuid)
    offer(w, "sdc", device_id="0000:0000::?******")
    offer(w, "sdd")
    w.patch(
        "work",
        devices=(
            wish(devtype="cdrom"),
            wish("sda"),
            replace(wish("sdd"), mode="required"),
            replace(wish("sdd"), devclass="pci"),
        ),
    )
    assert specs_of(at_start(w.view, w.qube("work"))) == [
        ("work", "sda", "auto-attach", {}),
        ("work", "sdd", "auto-attach", {"devtype": "cdrom"}),
    ]
    w.patch("sys-net", devices=(wish(),))
    assert specs_of(at_start(w.view, w.qube("sys-net"))) == []  # its own devices


def test_a_device_that_appears_goes_to_the_one_running_qube_that_wants_it(w: World) -> None:
    w.start("work")
    w.patch("work", devices=(wish(), wish("sda", ID, devtype="cdrom")))
    w.patch("vault", devices=(wish("sda"),))
    spec, claims = at_appearance(w.view, offer(w, "sda"))
    assert (specs_of([spec]), claims) == (
        [("work", "sda", "auto-attach", {"devtype": "cdrom"})],
        ("work",),
    )
    w.start("vault")
    assert at_appearance(w.view, offer(w, "sda")) == (None, ("vault", "work"))
    taken = offer(w, "sda", attached_to=w.qube("vault").uuid)
    assert at_appearance(w.view, taken) == (None, ())
    assert at_appearance(w.view, replace(taken, backend_uuid="gone")) == (None, ())
    card = DeviceFact(w.view.adminvm.uuid, "pci", "00_1f.2", "8086:1234::p028000")
    assert at_appearance(w.view, card) == (None, ())
