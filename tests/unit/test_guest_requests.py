"""What a guest tells of itself: which wishes become features, row by row, and which do not."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from bulkhead.model import specs
from bulkhead.model.refusal import Refusal
from services.adminapi.core.requests import (
    check_features,
    check_tools,
    may_be_refused,
    updates,
    wishes,
)
from tests.unit.plan_world import World, refused, world

NOW = 1_700_000_000
STAMP = "2023-11-14 22:13:20"


@pytest.fixture
def w() -> World:
    return world()


def shown(command: specs.Command) -> str:
    match command:
        case specs.SetFeature(qube, name, value):
            return f"{qube} {name}={value}"
        case specs.RemoveFeature(qube, name):
            return f"{qube} -{name}"
        case specs.SetProperty(qube, name, value):
            return f"{qube}.{name}={value}"
    raise AssertionError(command)


def asked(w: World, qube: str, **features: str) -> list[str]:
    named = {name.replace("__", ".").replace("_", "-"): v for name, v in features.items()}
    return [shown(command) for command in wishes(w.view, w.qube(qube), named)]


def modes(w: World, features: Mapping[str, str]) -> list[str]:
    named = {f"boot-mode.{name}": value for name, value in features.items()}
    return [shown(command) for command in wishes(w.view, w.qube("tmpl"), named)]


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"qrexec": "1", "gui": "0"}, ["tmpl qrexec=1", "tmpl gui="]),
        ({"gui_emulated": "1"}, ["tmpl gui-emulated=1"]),
        ({"qrexec": "yes", "gui": ""}, []),
        ({"qubes_firewall": "1", "vmexec": "0"}, ["tmpl qubes-firewall=1", "tmpl vmexec="]),
        ({"vmexec": "2"}, []),
        ({"os": "Linux"}, ["tmpl os=Linux"]),
        ({"os": "BeOS"}, []),
        ({"os_distribution": "debian"}, ["tmpl os-distribution=debian"]),
        ({"os_distribution": "", "os_distribution_like": ""}, []),
        ({"os_version": "12.1-3"}, ["tmpl os-version=12.1-3"]),
        ({"os_version": ".12"}, []),
        ({"os_version": "12a"}, []),
        ({"os_eol": "2027-02-28"}, ["tmpl os-eol=2027-02-28"]),
        ({"os_eol": "2027-02-30"}, []),
        ({"os_eol": "20270228"}, []),
        ({"qubes_agent_version": "4.3"}, ["tmpl qubes-agent-version=4.3"]),
        ({"qubes_agent_version": "4.3.1"}, []),
        ({"qubes_agent_version": "4.1234"}, []),
        ({"anon_timezone": "1"}, ["tmpl anon-timezone=1"]),
        ({"anon_timezone": "0"}, []),
        ({"internal": "1", "service__x": "1", "prohibit_start": ""}, []),
    ],
)
def test_rows(w: World, features: dict[str, str], expected: list[str]) -> None:
    assert asked(w, "tmpl", **features) == expected


def test_what_is_set_once_stays(w: World) -> None:
    w.feature("tmpl", "qrexec", "")
    w.feature("tmpl", "vmexec", "1")
    assert asked(w, "tmpl", qrexec="1", vmexec="0") == ["tmpl vmexec="]


def test_a_qube_based_on_a_template_reports_its_services_alone(w: World) -> None:
    everything = {"qrexec": "1", "os": "Linux", "vmexec": "1", "supported_service__x": "1"}
    assert asked(w, "work", **everything) == []
    assert asked(w, "work", supported_rpc__a="1") == ["work supported-rpc.a=1"]


def test_supported_sets_replace_each_other(w: World) -> None:
    w.feature("tmpl", "supported-service.old")
    w.feature("tmpl", "supported-rpc.kept")
    assert asked(w, "tmpl", supported_service__new="1", supported_service__no="0") == [
        "tmpl supported-service.new=1",
        "tmpl -supported-service.old",
    ]
    assert asked(w, "tmpl", supported_service__no="0") == []
    assert asked(w, "tmpl", supported_feature__f="1") == ["tmpl supported-feature.f=1"]


def test_apparmor_comes_and_goes_with_its_service(w: World) -> None:
    named = "tmpl supported-service.apparmor=1"
    assert asked(w, "tmpl", supported_service__apparmor="1") == [named, "tmpl apparmor=1"]
    w.feature("tmpl", "supported-service.apparmor")
    w.feature("tmpl", "apparmor")
    assert asked(w, "tmpl", supported_service__x="1") == [
        "tmpl supported-service.x=1",
        "tmpl -supported-service.apparmor",
        "tmpl -apparmor",
    ]


def test_windows(w: World) -> None:
    w.feature("tmpl", "timezone", "3600")
    assert asked(w, "tmpl", os="Windows", qrexec="0") == ["tmpl qrexec=", "tmpl os=Windows"]
    assert asked(w, "tmpl", os="Windows", qrexec="1") == [
        "tmpl qrexec=1",
        "tmpl os=Windows",
        "tmpl rpc-clipboard=1",
        "tmpl stubdom-qrexec=1",
        "tmpl audio-model=ich6",
        "tmpl no-monitor-layout=1",
        "tmpl.qrexec_timeout=6000",
        "tmpl.maxmem=0",
    ]
    # It runs while it asks, and its memory limit cannot change then.
    w.start("tmpl")
    limit = specs.SetProperty("tmpl", "maxmem", "0")
    reason = refused(lambda: w.do(limit)).reason
    assert may_be_refused(limit, reason)
    assert not may_be_refused(limit, "INVALID_PROPERTY_VALUE")
    assert not may_be_refused(specs.SetFeature("tmpl", "maxmem", "0"), reason)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (
            {"kernelopts.a": "x", "name.a": "A", "active": "a"},
            ["tmpl boot-mode.active=a", "tmpl boot-mode.kernelopts.a=x", "tmpl boot-mode.name.a=A"],
        ),
        ({"name.default": "Plain"}, ["tmpl boot-mode.name.default=Plain"]),
        ({"kernelopts.default": "x"}, []),
        ({"kernelopts.a.b": "x"}, []),
        ({"kernelopts.": "x"}, []),
        ({"kernelopts": "x"}, []),
        ({"kernelopts.a": "x", "kernelopts.b": "x"}, None),
        ({"name.a": "A", "name.b": "A"}, []),
        ({"default-user.a": "u", "default-user.b": "u"}, []),
        (
            {"kernelopts.a": "x", "active": "b", "appvm-default": "default"},
            ["tmpl boot-mode.appvm-default=default", "tmpl boot-mode.kernelopts.a=x"],
        ),
        ({"active": "default"}, []),
        ({f"kernelopts.m{n}": "" for n in range(65)}, []),
    ],
)
def test_boot_modes(w: World, features: dict[str, str], expected: list[str] | None) -> None:
    got = modes(w, features)
    if expected is None:
        expected = [f"tmpl boot-mode.{name}={value}" for name, value in features.items()]
    assert got == expected


def test_boot_modes_replace_the_former_ones(w: World) -> None:
    w.feature("tmpl", "boot-mode.kernelopts.old", "x")
    w.feature("tmpl", "boot-mode.active", "old")
    assert modes(w, {"kernelopts.new": "y"}) == [
        "tmpl -boot-mode.active",
        "tmpl -boot-mode.kernelopts.old",
        "tmpl boot-mode.kernelopts.new=y",
    ]


@pytest.mark.parametrize(
    ("path", "value"), [("a", "x;y"), ("a", "x\ny"), ("a", "ü"), ("a/b", "x"), ("", "x")]
)
def test_one_bad_value_refuses_the_whole_request(path: str, value: str) -> None:
    with pytest.raises(Refusal) as caught:
        check_features({"/features-request/good": "1", f"/features-request/{path}": value})
    assert caught.value.reason == "PROTOCOL"


def test_tools_are_the_five_known_ones() -> None:
    keys = {"/qubes-tools/qrexec": "1", "/qubes-tools/os": "Linux", "/qubes-tools/x": "?"}
    assert check_tools(keys) == {"qrexec": "1", "os": "Linux"}
    assert refused(lambda: check_tools({"/qubes-tools/gui": "1 "})).reason == "PROTOCOL"


def told(w: World, qube: str, payload: bytes, outdated: bool = False) -> list[str]:
    found = updates(w.view, w.qube(qube), payload, NOW, outdated=outdated)
    return [shown(command) for command in found]


def test_updates(w: World) -> None:
    some = ["tmpl updates-available=1", f"tmpl last-updates-check={STAMP}"]
    none = ["tmpl updates-available=", f"tmpl last-updates-check={STAMP}"]
    assert told(w, "tmpl", b" 12\n") == told(w, "work", b"1") == some
    assert told(w, "tmpl", b"0") == none
    w.feature("tmpl", "updates-available")
    assert told(w, "tmpl", b"0") == [f"tmpl last-update={STAMP}", *none]
    assert told(w, "work", b"0") == told(w, "work", b"3", outdated=True) == []
    w.start("tmpl")
    assert told(w, "work", b"3") == []
    for bad in (b"", b"x", b"-1", b"1.5", "٣".encode()):
        assert refused(lambda p=bad: told(w, "tmpl", p)).reason == "PROTOCOL"
