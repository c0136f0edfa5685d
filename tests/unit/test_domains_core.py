"""Pure rules of domains: spec checks, guest keys, memory, power reports, epochs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.api import domains_pb2
from services.domains.core import guest_keys, memory, power, spec, tracker
from services.domains.core.reasons import REASONS, DomainsError
from services.domains.messages import spec_from

UUID = "11111111-1111-4111-8111-111111111101"
GOOD = spec.DomainSpec(
    uuid=UUID, name="work", boot_id="b-1", memory_mib=400, kernel="/k/vmlinuz", cmdline="quiet"
)
DISK = spec.DiskSpec("xvda", "/dev/loop0")
NIC = spec.InterfaceSpec("00:16:3e:5e:6c:00", "10.137.0.5")


@pytest.mark.parametrize(
    "bad",
    [
        {"uuid": "x"},
        {"uuid": UUID.upper().replace("1", "A")},
        {"boot_id": "b 1"},
        {"boot_id": ""},
        {"name": "-x"},
        {"name": "a" * 64},
        {"virt_mode": "xenpv"},
        {"memory_mib": 0},
        {"maxmem_mib": -1},
        {"vcpus": 0},
        {"kernel": "relative/vmlinuz"},
        {"kernel": "/a/../etc/shadow"},
        {"cmdline": "a\x00b"},
        {"cmdline": "a\nb"},
        {"cmdline": "x" * 4097},
        {"timezone": "Europe/Berlin"},
        {"video_model": "v<ga"},
        {"gui_domain": "a b"},
        {"disks": (dataclasses.replace(DISK, target="hda"),)},
        {"disks": (dataclasses.replace(DISK, format="vmdk"),)},
        {"disks": (dataclasses.replace(DISK, devtype="floppy"),)},
        {"disks": (dataclasses.replace(DISK, serial="<x>"),)},
        {"disks": (DISK, DISK)},
        {"disks": tuple(dataclasses.replace(DISK) for _ in range(65))},
        {"interfaces": (dataclasses.replace(NIC, mac="00:16:3e"),)},
        {"interfaces": (dataclasses.replace(NIC, ip="10.0.0.300"),)},
        {"interfaces": (dataclasses.replace(NIC, ip6="fe80::1%eth0"),)},
        {"interfaces": (dataclasses.replace(NIC, tap="x" * 16),)},
        {"interfaces": (dataclasses.replace(NIC, dns=("a",)),)},
        {"hostdevs": (spec.HostdevSpec(slot=32),)},
        {"emulator": spec.EmulatorSpec(audiovm_xid=-2)},
        {"emulator": spec.EmulatorSpec(extra_args="a\x1bb")},
    ],
    ids=str,
)
def test_a_bad_spec_is_refused_with_its_field(bad: dict[str, object]) -> None:
    with pytest.raises(DomainsError) as caught:
        spec.check(dataclasses.replace(GOOD, **bad))  # type: ignore[arg-type]
    assert caught.value.reason == "INVALID_DOMAIN_SPEC"
    assert caught.value.metadata["field"]
    assert caught.value.code == "INVALID_ARGUMENT"


def test_a_good_spec_passes_unchanged() -> None:
    full = dataclasses.replace(
        GOOD, disks=(DISK,), interfaces=(NIC,), hostdevs=(spec.HostdevSpec(bus=3),)
    )
    assert spec.check(full) is full


def test_the_message_and_the_spec_have_the_same_fields() -> None:
    pairs: list[tuple[Any, Any]] = [
        (domains_pb2.DomainSpec, spec.DomainSpec),
        (domains_pb2.DiskSpec, spec.DiskSpec),
        (domains_pb2.InterfaceSpec, spec.InterfaceSpec),
        (domains_pb2.HostdevSpec, spec.HostdevSpec),
        (domains_pb2.EmulatorSpec, spec.EmulatorSpec),
    ]
    for message, record in pairs:
        ours = {row.name for row in dataclasses.fields(record)}
        assert ours == {field.name for field in message.DESCRIPTOR.fields}


def test_every_message_field_arrives_in_the_spec() -> None:
    message: Any = domains_pb2.DomainSpec()
    expected: dict[str, object] = {}
    for number, field in enumerate(message.DESCRIPTOR.fields, 1):
        if field.message_type is not None:
            continue
        value: object = number
        if field.type == field.TYPE_STRING:
            value = f"text{number}"
        elif field.type == field.TYPE_BOOL:
            value = True
        setattr(message, field.name, value)
        expected[field.name] = value
    message.disks.add(target="xvda", path="/p", rw=True, backend="b", serial="s", script=True)
    message.interfaces.add(mac="m", ip="i", tap="t", dns=["d"])
    message.hostdevs.add(bus=3, permissive=True)
    message.emulator.full_image = True
    message.emulator.audiovm_xid = 7
    got = spec_from(message)
    for name, value in expected.items():
        assert getattr(got, name) == value, name
    assert got.disks[0] == spec.DiskSpec(
        "xvda", "/p", rw=True, backend="b", serial="s", script=True
    )
    assert got.interfaces[0] == spec.InterfaceSpec("m", "i", tap="t", dns=("d",))
    assert got.hostdevs[0] == spec.HostdevSpec(bus=3, permissive=True)
    assert got.emulator == spec.EmulatorSpec(
        linux_stubdom=False, full_image=True, memory_mib=0, audiovm_xid=7
    )


@pytest.mark.parametrize(
    ("active", "state", "word"),
    [
        (False, 5, "halted"),
        (True, 1, "running"),
        (True, 2, "running"),
        (True, 0, "running"),
        (True, 3, "paused"),
        (True, 4, "shutdown"),
        (True, 5, "shutoff"),
        (True, 6, "crashed"),
        (True, 7, "pmsuspended"),
        (True, 99, "running"),
    ],
)
def test_power_words(active: bool, state: int, word: str) -> None:
    assert power.power_of(active, state) == word
    assert word in power.POWERS


# ---- guest keys


@pytest.mark.parametrize("path", ["/a", "/qubes-ip", "/a/b_c.d:e-f", "/" + "x" * 62])
def test_good_keys(path: str) -> None:
    assert guest_keys.check_key(path) == path


@pytest.mark.parametrize(
    "path", ["", "a", "/", "/a/", "/a b", "/ä", "/" + "x" * 63, "/a\0", "/a\n"]
)
def test_bad_keys(path: str) -> None:
    with pytest.raises(DomainsError, match="guest key"):
        guest_keys.check_key(path)


def test_value_limits() -> None:
    guest_keys.check_value("/a", "x" * 3072)
    for value in ("x" * 3073, "ä" * 1537, "a\0b"):
        with pytest.raises(DomainsError):
            guest_keys.check_value("/a", value)


def test_removal_comes_before_writing_and_a_subtree_spares_its_root() -> None:
    present = {"/a": "1", "/a/b": "2", "/a/c": "3", "/ab": "4"}
    got = guest_keys.apply(present, [("/a/d", "5")], ["/a/"], False)
    assert got == {"/a": "1", "/ab": "4", "/a/d": "5"}
    assert guest_keys.apply(present, [], ["/a", "/none"], False).keys() == {"/a/b", "/a/c", "/ab"}
    assert guest_keys.apply(present, [("/z", "")], [], True) == {"/z": ""}


def test_a_bad_key_among_good_ones_changes_nothing() -> None:
    with pytest.raises(DomainsError):
        guest_keys.apply({}, [("/a", "1"), ("/b/", "2")], [], False)


def test_the_number_of_keys_is_bounded() -> None:
    many = [(f"/k{n}", "") for n in range(guest_keys.STORE_KEYS + 1)]
    with pytest.raises(DomainsError) as caught:
        guest_keys.apply({}, many, [], False)
    assert caught.value.reason == "GUEST_KEYS_FULL"


@given(
    st.dictionaries(st.from_regex(r"/[a-c]{1,3}(/[a-c]{1,2})?", fullmatch=True), st.text("ab")),
    st.lists(st.from_regex(r"/[a-c]{1,3}/?", fullmatch=True), max_size=3),
)
def test_removing_is_idempotent_and_select_agrees(
    present: dict[str, str], removed: list[str]
) -> None:
    once = guest_keys.apply(present, [], removed, False)
    assert guest_keys.apply(once, [], removed, False) == once
    for prefix in removed:
        assert guest_keys.select(once, prefix) == {}


# ---- memory


def test_reservations_do_not_exceed_the_host() -> None:
    ledger = memory.MemoryLedger()
    ledger.reserve("b1", 600, 1000, {}, 1000)
    with pytest.raises(DomainsError) as caught:
        ledger.reserve("b2", 500, 1000, {}, 1000)
    assert caught.value.reason == "NOT_ENOUGH_MEMORY"
    assert caught.value.metadata["free"] == "400"
    ledger.reserve("b1", 900, 1000, {}, 1000)  # its own promise does not stand in its way
    assert ledger.release("b1")
    assert not ledger.release("b1")
    ledger.reserve("b2", 1000, 1000, {}, 1000)


def test_a_boot_that_exists_is_counted_once() -> None:
    ledger = memory.MemoryLedger()
    ledger.reserve("b1", 600, 1000, {}, 1000)
    assert ledger.free(1000, {"b1": 500}) == 500
    ledger.reserve("b2", 500, 1000, {"b1": 500}, 500)


def test_what_the_host_says_is_free_bounds_too() -> None:
    ledger = memory.MemoryLedger()
    with pytest.raises(DomainsError):
        ledger.reserve("b1", 300, 1000, {}, 200)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 700), st.booleans())))
def test_the_sum_of_promises_fits_whatever_happens(steps: list[tuple[str, int, bool]]) -> None:
    ledger = memory.MemoryLedger()
    domains: dict[str, int] = {}
    kept: dict[str, int] = {}
    for boot_id, size, starts in steps:
        try:
            ledger.reserve(boot_id, size, 1000, domains, 1000 - sum(domains.values()))
        except DomainsError:
            continue
        kept[boot_id] = size
        if starts:
            domains[boot_id] = size
        promised = sum(s for b, s in kept.items() if b not in domains)
        assert promised + sum(domains.values()) <= 1000 or boot_id in domains


# ---- reports


def sighting(boot_id: str = "b1", word: str = "paused", **more: object) -> tracker.Sighting:
    return tracker.Sighting(UUID, boot_id, word, **more)  # type: ignore[arg-type]


def test_a_report_is_made_only_of_a_change_and_numbers_grow() -> None:
    reports = tracker.PowerTracker()
    (first,) = reports.seen(sighting(xid=3), 100)
    assert (first.number, first.power, first.xid) == (100, "paused", 3)
    assert reports.seen(sighting(xid=3), 200) == ()
    (second,) = reports.seen(sighting(word="running", xid=3), 50)
    assert second.number == 101
    (end,) = reports.gone(UUID, "b1", 7, "shutdown")
    assert (end.number, end.power, end.stop_reason, end.xid) == (102, "halted", "shutdown", -1)
    assert reports.gone(UUID, "b1", 8) == ()
    assert reports.current(UUID) is None


def test_another_boot_ends_the_one_before() -> None:
    reports = tracker.PowerTracker()
    reports.seen(sighting("b1"), 1)
    end, begin = reports.seen(sighting("b2"), 2)
    assert (end.boot_id, end.power) == ("b1", "halted")
    assert (begin.boot_id, begin.power) == ("b2", "paused")
    assert reports.gone(UUID, "b1", 3) == ()
    assert reports.facts() == (begin,)


def test_a_buried_boot_stays_buried() -> None:
    reports = tracker.PowerTracker()
    reports.bury(UUID, "b1")
    assert reports.buried(UUID, "b1")
    assert not reports.buried(UUID, "b2")
    for number in range(tracker.TOMBSTONES):
        reports.bury(UUID, f"x{number}")
    assert not reports.buried(UUID, "b1")  # bounded: the oldest goes


def test_reasons_are_upper_snake_and_need_a_row() -> None:
    assert all(name == row.name and name.isupper() for name, row in REASONS.items())
    with pytest.raises(KeyError):
        DomainsError("NO_SUCH_ROW", "x")
