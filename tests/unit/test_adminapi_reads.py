"""Reads on a view: recorded replies, formats, and what restricted sources see."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.model.grammar import parse_pairs
from bulkhead.model.records import (
    Assignment,
    DeviceFact,
    FactPut,
    Phase,
    PowerFact,
    QubePut,
    Run,
    WireEvent,
)
from services.adminapi.core import devices
from services.adminapi.core.answer import begin
from services.adminapi.core.checks import Checked
from services.adminapi.core.frame import Drop
from services.adminapi.core.permission import DenyAll, may_see_event
from services.adminapi.core.reads import ReadContext, qube_record
from tests.fakes import admin_replay
from tests.fakes.adminapi import DIRECTORY, TMPL_UUID, WORK_UUID, app, start_view


def context(*, work: bool = False) -> ReadContext:
    view = start_view()
    if work:
        view.apply(QubePut(app()))
    return ReadContext(view, DenyAll())


def ask(ctx: ReadContext, frame: bytes, socket: str = "admin") -> bytes | Checked:
    try:
        return begin(ctx, socket, frame)
    except Drop:
        return b""


def text(ctx: ReadContext, method: str, dest: str = "dom0", source: str = "dom0") -> str:
    reply = ask(ctx, f"{method} {source} name {dest}\0".encode())
    assert isinstance(reply, bytes) and reply[:2] == b"0\0", reply
    return reply[2:].decode()


@pytest.mark.parametrize("section", ["frame", "read"])
def test_recorded_replies_of_the_replica(section: str) -> None:
    ctx = context()
    asked = 0
    for step in admin_replay.steps(section):
        reply = ask(ctx, step.frame)
        if isinstance(reply, Checked):
            continue  # needs another service; the integration test replays it
        if step.id in ("frame/041", "frame/042"):
            continue  # depend on what a mutation and a closed write side did before
        asked += 1
        assert admin_replay.verdict(step, reply, DIRECTORY) in ("same", "cleaner"), (step, reply)
    assert asked >= {"frame": 36, "read": 130}[section]


def test_get_all_of_an_appvm_as_recorded() -> None:
    ctx = context(work=True)
    step = next(s for s in admin_replay.steps("create") if s.id == "create/003")
    reply = ask(ctx, step.frame)
    assert isinstance(reply, bytes)
    assert admin_replay.verdict(step, reply, DIRECTORY) == "same", reply.decode()


def test_get_all_lists_by_stage_then_name() -> None:
    names = [
        line.split()[0] for line in text(context(), "admin.vm.property.GetAll", "tmpl").splitlines()
    ]
    assert names == text(context(), "admin.vm.property.List", "tmpl").splitlines()
    assert names.index("xid") < names.index("audiovm")


def test_labels_in_index_order_and_by_index() -> None:
    assert text(context(), "admin.label.List").splitlines()[:2] == ["red", "orange"]
    assert text(context(), "admin.label.Get+4") == "0x73d216"


def test_without_rules_a_restricted_source_sees_nothing() -> None:
    ctx = context(work=True)
    for dest in ("dom0", "tmpl", "work"):
        assert text(ctx, "admin.vm.List", dest, "work") == ""
        assert text(ctx, "admin.vm.List", dest) != ""


def test_policy_widens_what_a_source_sees() -> None:
    asked: list[tuple[str, str, str, str]] = []

    class Some:
        def allows(self, service: str, argument: str, source: str, target: str) -> bool:
            asked.append((service, argument, source, target))
            return target == "tmpl"

    ctx = ReadContext(context(work=True).view, Some())
    assert text(ctx, "admin.vm.List", "dom0", "work").split()[0] == "tmpl"
    assert ("admin.vm.List", "+", "work", "@adminvm") in asked


@pytest.mark.parametrize(
    ("event", "target"),
    [
        (WireEvent("tmpl", "property-set:netvm"), "tmpl"),
        (WireEvent("", "domain-delete", (("vm", "gone"),)), "gone"),
        (WireEvent("", "pool-add", (("pool", "p"),)), "@adminvm"),
    ],
)
def test_events_are_judged_by_their_subject(event: WireEvent, target: str) -> None:
    asked: list[tuple[str, str, str, str]] = []

    class Log:
        def allows(self, service: str, argument: str, source: str, target: str) -> bool:
            asked.append((service, argument, source, target))
            return False

    view = context(work=True).view
    assert not may_see_event(Log(), view, "work", event)
    argument = "+" + event.name.replace(":", "_")
    assert asked == [("admin.Events", argument, "work", target)]
    assert may_see_event(Log(), view, "dom0", event)


def test_a_restricted_caller_reads_no_names_in_refusals() -> None:
    ctx = context(work=True)
    told = ask(ctx, b"admin.vm.feature.Get+secret dom0 name work\0")
    untold = ask(ctx, b"admin.vm.feature.Get+secret work name work\0")
    assert isinstance(told, bytes) and b"secret" in told
    assert isinstance(untold, bytes) and b"secret" not in untold
    assert untold.startswith(b"2\0QubesFeatureNotFoundError\0")


def test_get_system_info() -> None:
    ctx = context(work=True)
    reply = ask(ctx, b"internal.GetSystemInfo+ dom0 name dom0\0", "internal")
    assert isinstance(reply, bytes)
    domains = json.loads(reply[2:])["domains"]
    assert list(domains) == ["dom0", "tmpl", "work"]
    assert domains["dom0"]["guivm"] is None
    assert domains["work"] == {
        "internal": None,
        "tags": ["audiovm-dom0", "created-by-dom0", "guivm-dom0"],
        "type": "AppVM",
        "template_for_dispvms": False,
        "default_dispvm": None,
        "icon": "appvm-red",
        "label": "0xcc0000",
        "guivm": "dom0",
        "relayvm": None,
        "transport_rpc": None,
        "power_state": "Halted",
        "uuid": WORK_UUID,
    }


def test_device_lines() -> None:
    ctx = context(work=True)
    device = "1234:5678:ABC:u080650"
    ctx.view.apply(
        FactPut(
            DeviceFact(
                TMPL_UUID, "block", "sda1", device,
                {"vendor": "ACME", "product": "O'Brien stick", "serial": "unknown"},
                "u080650", attached_to=WORK_UUID,
            )
        )
    )  # fmt: skip
    work = replace(
        app(),
        devices=(Assignment("block", "tmpl", "sda1", "*", "required", {"read-only": "yes"}),),
    )
    ctx.view.apply(QubePut(work))
    assert text(ctx, "admin.vm.device.block.Available", "tmpl") == (
        f"sda1:{device} device_id='{device}' port_id='sda1' devclass='block' "
        r"backend_domain='tmpl' vendor='ACME' product='O\'Brien stick' attachment='work' "
        "interfaces='u080650'\n"
    )
    assert text(ctx, "admin.vm.device.block.Available+sdb", "tmpl") == ""
    assert text(ctx, "admin.vm.device.block.Assigned", "work") == (
        "tmpl+sda1:* device_id='*' port_id='sda1' devclass='block' backend_domain='tmpl' "
        "mode='required' frontend_domain='work' _read-only='yes'\n"
    )
    assert text(ctx, "admin.vm.device.block.Attached+tmpl+sda1", "work").startswith(
        f"tmpl+sda1:{device} device_id='{device}' port_id='sda1' devclass='block' "
        "backend_domain='tmpl' mode='manual'"
    )
    assert text(ctx, "admin.vm.device.block.Attached+tmpl+sdz", "work") == ""
    refused = ask(ctx, b"admin.vm.device.block.Assigned+nonsense dom0 name work\0")
    assert isinstance(refused, bytes) and refused.startswith(b"2\0ProtocolError\0")


def test_state_in_the_list_follows_phase_and_power() -> None:
    ctx = context(work=True)
    ctx.view.apply(QubePut(replace(app(), run=Run(Phase.UP, "boot"))))
    ctx.view.apply(FactPut(PowerFact(WORK_UUID, "boot", 1, "paused", xid=3)))
    assert text(ctx, "admin.vm.List", "work") == (
        f"work class=AppVM state=Paused uuid={WORK_UUID}\n"
    )
    qube = ctx.view.qube("work")
    assert qube is not None
    assert json.loads(qube_record(ctx.view, qube))["properties"]["xid"] == {
        "value": "3",
        "type": "int",
        "default": True,
    }


@given(st.text(max_size=20), st.text(max_size=20))
def test_a_guest_cannot_break_the_line_of_its_device(vendor: str, extra: str) -> None:
    view = start_view()
    fact = DeviceFact(
        TMPL_UUID, "block", "sda", "1:2::b******", {"vendor": vendor}, data={"note": extra}
    )
    view.apply(FactPut(fact))
    line = devices.available(view, view.qube("tmpl") or app(), "block", "")
    head, _, rest = line.partition(" ")
    assert head == "sda:1:2::b******" and line.count("\n") == 1
    pairs = parse_pairs(rest)
    assert pairs["port_id"] == "sda" and set(pairs) >= {"device_id", "devclass", "_note"}


def test_an_assignment_with_unreadable_options_is_still_listed() -> None:
    device = Assignment("block", "dom0", "sda", "*", "required", {"a": "\n"})
    line = devices.assigned(replace(app(), devices=(device,)), "block", None)
    assert "mode='required'" in line and "_a" not in line
