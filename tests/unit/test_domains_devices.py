"""Devices: paths of PCI functions, what guests may say of block devices, who has what."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.model.records import ADMINVM_UUID
from services.domains.adapters import pci
from services.domains.core.devices import (
    PER_BACKEND,
    UNKNOWN,
    DeviceBook,
    PciFunction,
    block_facts,
    pci_fact,
    pci_port,
)
from services.domains.core.spec import DiskSpec

BACKEND = "22222222-2222-4222-8222-222222222222"
FRONTEND = "11111111-1111-4111-8111-111111111101"


def keys(port: str, **values: str) -> dict[str, str]:
    return {f"/qubes-block-devices/{port}/{name}": value for name, value in values.items()}


@pytest.mark.parametrize(
    ("function", "port"),
    [
        (PciFunction("0000:00:1f.2", "8086", "9d23", "0c0330"), "00_1f.2"),
        (
            PciFunction("0000:03:00.0", "8086", "9d23", "028000", (("0000:00:1c.0", 3),)),
            "00_1c.0-00_00.0",
        ),
        (
            PciFunction("0000:05:02.1", "1", "2", "3", (("0000:00:1c.0", 3), ("0000:03:00.0", 4))),
            "00_1c.0-00_00.0-01_02.1",
        ),
        (PciFunction("10000:00:01.0"[1:], "1", "2", "3"), "00_01.0"),
        (PciFunction("0001:00:01.0", "1", "2", "3"), "0001_00_01.0"),
    ],
)
def test_pci_ports_are_bus_paths(function: PciFunction, port: str) -> None:
    assert pci_port(function) == port


def test_a_pci_fact_has_ids_names_and_its_address() -> None:
    fact = pci_fact(
        PciFunction("0000:00:1f.2", "8086", "9d23", "0c0330", (), "Intel", "SATA='x'\nüz")
    )
    assert fact.backend_uuid == ADMINVM_UUID
    assert fact.device_id == "8086:9d23::p0c0330"
    assert fact.interfaces == "p0c0330"
    assert fact.data == {"sbdf": "0000:00:1f.2"}
    assert fact.fields == {"vendor": "Intel", "product": "SATA=_x'__z"}


def test_functions_are_read_from_sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "devices/pci0000:00"
    bridge = real / "0000:00:1c.0"
    card = bridge / "0000:03:00.0"
    card.mkdir(parents=True)
    (bridge / "secondary_bus_number").write_text("3\n")
    for path, pci_class in ((bridge, "0x060400"), (card, "0x028000")):
        (path / "class").write_text(f"{pci_class}\n")
        (path / "vendor").write_text("0x8086\n")
        (path / "device").write_text("0x0a0b\n")
    broken = real / "0000:00:02.0"
    broken.mkdir()
    listing = tmp_path / "bus"
    listing.mkdir()
    for path in (bridge, card, broken):
        (listing / path.name).symlink_to(path)
    names = tmp_path / "pci.ids"
    names.write_text("# x\n8086  Intel\n\t0a0b  A card\n\t\t1028 0001  Sub\nC 02  Network\n")
    monkeypatch.setattr(pci, "NAMES", (names,))
    pci._names.cache_clear()
    try:
        (found,) = pci.functions(listing)
    finally:
        pci._names.cache_clear()
    assert found == PciFunction(
        "0000:03:00.0", "8086", "0a0b", "028000", (("0000:00:1c.0", 3),), "Intel", "A card"
    )
    assert pci.functions(tmp_path / "none") == ()


def test_block_devices_of_a_guest() -> None:
    untrusted = {
        **keys("sda", desc="A stick", size="4096", mode="w", parent="2-1:1.0"),
        **keys("sda1", desc="x", size="1024", mode="r", parent="sda"),
        **keys("nvme0n1p2", size="7", mode="r", parent="nvme0n1"),
        "/qubes-block-devices": "",
    }
    facts = {fact.port: fact for fact in block_facts(BACKEND, untrusted)}
    assert set(facts) == {"sda", "sda1", "nvme0n1p2"}
    assert facts["sda"].data == {"mode": "w", "size": "4096"}
    assert facts["sda"].fields == {"name": "A stick"}
    assert (facts["sda"].parent_port, facts["sda"].parent_devclass) == ("2-1", "usb")
    assert (facts["sda1"].parent_port, facts["sda1"].parent_devclass) == ("sda", "block")
    assert facts["sda1"].device_id == f"{UNKNOWN}:1"
    assert facts["nvme0n1p2"].parent_port == ""


@pytest.mark.parametrize(
    "untrusted",
    [
        keys("sda", size="4096"),
        keys("sda", size="x", mode="r"),
        keys("sda", size="-1", mode="r"),
        keys("sda", size="1", mode="rw"),
        keys("SDA", size="1", mode="r"),
        keys("a" * 13, size="1", mode="r"),
        keys("../x", size="1", mode="r"),
        keys("sda/x", size="1", mode="r"),
    ],
)
def test_bad_block_devices_are_left_out(untrusted: dict[str, str]) -> None:
    assert block_facts(BACKEND, untrusted) == ()


@given(st.dictionaries(st.text(max_size=40), st.text(max_size=40), max_size=8))
def test_whatever_a_guest_says_nothing_breaks(untrusted: dict[str, str]) -> None:
    shaped = {f"/qubes-block-devices/{k}": v for k, v in untrusted.items()} | keys(
        "sda", desc="".join(untrusted), size="1", mode="r"
    )
    for fact in block_facts(BACKEND, shaped):
        for text in (*fact.fields.values(), fact.parent_port, fact.device_id):
            assert text.isascii() and text.isprintable() and "='" not in text


def test_a_guest_cannot_fill_the_book() -> None:
    untrusted: dict[str, str] = {}
    for number in range(PER_BACKEND + 50):
        untrusted |= keys(f"s{number}", size="1", mode="r")
    assert len(block_facts(BACKEND, untrusted)) == PER_BACKEND


def test_the_book_knows_who_has_what() -> None:
    book = DeviceBook()
    book.offer(BACKEND, block_facts(BACKEND, keys("sda", size="1", mode="w")))
    book.offer("host", [pci_fact(PciFunction("0000:00:1f.2", "1", "2", "3"))])
    sda, sata = f"device/{BACKEND}/block/sda", f"device/{ADMINVM_UUID}/pci/00_1f.2"
    assert {key: fact.attached_to for key, fact in book.facts().items()} == {sda: "", sata: ""}
    book.has(BACKEND, "sys-usb", (), ())
    by_name = DiskSpec("xvdi", "/dev/sda", rw=True, backend="sys-usb")
    book.has(FRONTEND, "work", [by_name], ["0000:00:1f.2"])
    assert {fact.attached_to for fact in book.facts().values()} == {FRONTEND}
    assert book.facts()[sda].attach_options["read-only"] == "no"
    book.has(FRONTEND, "work", [], [])
    assert {fact.attached_to for fact in book.facts().values()} == {""}
    # A disk of dom0 with the same path is another device.
    book.has(FRONTEND, "work", [DiskSpec("xvdi", "/dev/sda")], [])
    assert book.facts()[sda].attached_to == ""
    book.gone(BACKEND)
    assert set(book.facts()) == {sata}


def test_devices_of_a_guest_go_with_it_whoever_listed_them() -> None:
    book = DeviceBook()
    sata = pci_fact(PciFunction("0000:00:1f.2", "1", "2", "3"))
    (listed,) = block_facts(BACKEND, keys("sdb", size="1", mode="w"))
    book.offer("host", [sata, listed])
    book.offer(BACKEND, block_facts(BACKEND, keys("sda", size="1", mode="w")))
    book.gone(BACKEND)
    assert [fact.port for fact in book.facts().values()] == [sata.port]
