"""Domain XML: golden files, libvirt's own schema, and every field of the spec in use.

With BULKHEAD_REGENERATE=1 the golden files are written anew; look at the difference.
"""

from __future__ import annotations

import dataclasses
import os
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from services.domains.core.reasons import DomainsError
from services.domains.core.spec import (
    DiskSpec,
    DomainSpec,
    EmulatorSpec,
    HostdevSpec,
    InterfaceSpec,
    check,
)
from services.domains.core.xml import (
    METADATA_NS,
    Flavour,
    disk_fragment,
    flavour_named,
    interface_fragment,
    read_metadata,
    render,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden/domain_xml"
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
REGENERATE = "BULKHEAD_REGENERATE" in os.environ

XEN, QUBES, KVM, QEMU = (
    flavour_named("xen"),
    flavour_named("xen-qubes"),
    flavour_named("kvm"),
    flavour_named("qemu"),
)

ROOT = DiskSpec("xvda", "/dev/mapper/snap-root", block=True, serial="root")
PRIVATE = DiskSpec("xvdb", "/dev/loop3", rw=True, block=True, serial="private")
KERNEL_DISK = DiskSpec("xvdd", "/var/lib/qubes/vm-kernels/6.12/modules.img", serial="kernel")
FROM_USB = DiskSpec(
    "xvdi",
    "/dev/sda",
    block=True,
    backend="sys-usb",
    backend_uuid="22222222-2222-4222-8222-222222222222",
    script=True,
)
CDROM = DiskSpec("xvdj", "/srv/installer.iso", devtype="cdrom", script=True)
QCOW = DiskSpec("xvdk", "/srv/old.qcow2", rw=True, format="qcow2")
NIC = InterfaceSpec(
    mac="00:16:3e:5e:6c:00",
    ip="10.137.0.5",
    ip6="fd09:24ef:4179::a89:5",
    backend="sys-firewall",
    backend_uuid="33333333-3333-4333-8333-333333333333",
    tap="bh5",
    gateway="10.137.0.6",
    netmask="255.255.255.255",
    dns=("10.139.1.1", "10.139.1.2"),
)
GPU = HostdevSpec(0, 3, 0, 1, True, True, True)
NETCARD = HostdevSpec(0, 0, 0x1F, 6)

BASE = DomainSpec(
    uuid="11111111-1111-4111-8111-111111111101",
    name="work",
    boot_id="9f0c6a0e-7d55-4f0b-8f3b-0d8a2c1b4e5f",
    epoch=7,
    memory_mib=400,
    maxmem_mib=4000,
    vcpus=2,
    kernel="/var/lib/qubes/vm-kernels/6.12/vmlinuz",
    initramfs="/var/lib/qubes/vm-kernels/6.12/initramfs",
    cmdline="root=/dev/mapper/dmroot console=hvc0 swiotlb=2048 x=<&\"'>",
    disks=(ROOT, PRIVATE, KERNEL_DISK),
    interfaces=(NIC,),
    console_log="/var/log/qubes/guest-work.log",
)
PLAIN_NIC = replace(NIC, ip6="", dns=(), backend="sys-net")
HVM = replace(
    BASE,
    virt_mode="hvm",
    kernel="",
    initramfs="",
    cmdline="",
    maxmem_mib=0,
    emulator=EmulatorSpec(memory_mib=192, audiovm_xid=4, extra_args="-device foo", debug=True),
    video_model="vga",
    gui_domain="sys-gui",
    audio_model="ich9",
    debug=True,
    disks=(ROOT, PRIVATE, FROM_USB, CDROM),
)
LOCAL_HVM = replace(HVM, disks=(ROOT, PRIVATE, CDROM, QCOW))

# name -> (spec, flavour). A name is a golden file.
CASES: dict[str, tuple[DomainSpec, Flavour]] = {
    "pv": (replace(BASE, virt_mode="pv"), XEN),
    "pv-qubes": (replace(BASE, virt_mode="pv", e820_host=True, has_pci=True, maxmem_mib=0,
                         hostdevs=(NETCARD,)), QUBES),
    "pv-own-kernel": (replace(BASE, virt_mode="pv", kernel="", initramfs="", cmdline=""), XEN),
    "pvh": (replace(BASE, virt_mode="pvh"), XEN),
    "pvh-qubes": (replace(BASE, disks=(ROOT, PRIVATE, FROM_USB)), QUBES),
    "pvh-hotplug": (replace(BASE, hotplug=True, rdrand_disable=True), QUBES),
    "pvh-no-hotplug": (replace(BASE, hotplug=True, rdrand_disable=True), XEN),
    "pvh-own-kernel": (replace(BASE, kernel="", initramfs="", cmdline="", interfaces=()), XEN),
    "hvm": (LOCAL_HVM, XEN),
    "hvm-kernel": (replace(LOCAL_HVM, kernel="/k/vmlinuz", initramfs="/k/initramfs",
                           cmdline="console=ttyS0"), XEN),
    "hvm-qubes": (HVM, QUBES),
    "hvm-qubes-kernel": (replace(HVM, kernel="/k/vmlinuz", cmdline="console=hvc0",
                                 disks=(ROOT, PRIVATE, KERNEL_DISK)), QUBES),
    "hvm-qubes-full": (replace(HVM, emulator=EmulatorSpec(full_image=True), interfaces=(PLAIN_NIC,),
                               timezone="localtime", uefi=True, gui_domain="", debug=False), QUBES),
    "hvm-qubes-minios": (replace(HVM, emulator=EmulatorSpec(linux_stubdom=False),
                                 video_model="cirrus"), QUBES),
    "hvm-qubes-headless": (replace(HVM, video_model="none", audio_model="", interfaces=()), QUBES),
    "hvm-pci": (replace(LOCAL_HVM, has_pci=True, e820_host=True, hostdevs=(GPU, NETCARD),
                        timezone="-3600", maxmem_mib=4000, uefi=True), XEN),
    "hvm-pci-qubes": (replace(HVM, has_pci=True, e820_host=True, hostdevs=(GPU, NETCARD),
                              timezone="-3600", maxmem_mib=4000), QUBES),
    "kvm-direct": (replace(BASE, maxmem_mib=0), KVM),
    "kvm-balloon": (replace(BASE, rdrand_disable=True), KVM),
    "kvm-hvm": (replace(LOCAL_HVM, timezone="localtime"), KVM),
    "kvm-hvm-uefi": (replace(LOCAL_HVM, uefi=True, timezone="7200", interfaces=()), KVM),
    "kvm-hvm-pci": (replace(LOCAL_HVM, has_pci=True, hostdevs=(GPU,), maxmem_mib=4000), KVM),
    "qemu-direct": (replace(BASE, maxmem_mib=0, interfaces=()), QEMU),
    "qemu-session": (replace(BASE, maxmem_mib=0, console_log="", disks=(KERNEL_DISK,)), QEMU),
    "qemu-system": (replace(BASE, maxmem_mib=0), replace(QEMU, no_dac=True)),
}  # fmt: skip

# Fields that no hypervisor sees, and why.
NOT_RENDERED = {
    "qid": "taps and namespaces are named and made before the domain",
    "network_namespace": "such a qube is no guest of a hypervisor",
    "disks.backend_uuid": "libvirt knows backends by name",
    "interfaces.backend_uuid": "libvirt knows backends by name",
}


@pytest.fixture(scope="module")
def schema() -> etree.RelaxNG:
    return etree.RelaxNG(etree.parse(str(SCHEMA)))


def stock(root: etree._Element) -> etree._Element:
    """The XML without what only the libvirt of Qubes has: nothing else is taken away."""
    for emulator in root.iter("emulator"):
        emulator.attrib.clear()
        emulator.text = "/usr/libexec/xen-qemu-system-i386"
    for element in [*root.iterfind(".//graphics[@type='qubes']"), *root.iterfind(".//disk/script"),
                    *root.iterfind(".//os/loader[@type='rom']")]:  # fmt: skip
        parent = element.getparent()
        assert parent is not None
        parent.remove(element)
    for element in root.iter("hostdev"):
        element.attrib.pop("nostrictreset", "")
    for element in root.iter("source"):
        element.attrib.pop("powerManagementFiltering", "")
    return root


@pytest.mark.parametrize("name", CASES)
def test_xml_is_the_golden_file(name: str) -> None:
    spec, flavour = CASES[name]
    text = render(check(spec), flavour, started="1700000000.250")
    path = GOLDEN / f"{name}.xml"
    if REGENERATE:
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs; BULKHEAD_REGENERATE=1 writes it anew"


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.xml")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_libvirt_accepts_it(name: str, schema: etree.RelaxNG) -> None:
    spec, flavour = CASES[name]
    root = etree.fromstring(render(check(spec), flavour))
    if flavour.qubes:
        root = stock(root)
    assert schema.validate(root), schema.error_log.last_error


def test_stock_xml_holds_no_extension() -> None:
    for name, (spec, flavour) in CASES.items():
        if flavour.qubes:
            continue
        text = render(spec, flavour)
        words = ["stubdom", 'type="qubes"', "qubes-block", "nostrictreset",
                 "powerManagementFiltering"]  # fmt: skip
        if flavour.hypervisor == "xen":
            words.append("maxMemory")  # "not supported by this hypervisor driver"
        for word in words:
            assert word not in text, (name, word)


def test_a_file_that_is_read_only_is_one_that_dom0s_device_model_opens() -> None:
    """It refuses others ("Block node is read-only"); the guest then starts without them."""

    def kinds(flavour: Flavour, spec: DomainSpec) -> dict[str, str]:
        root = ET.fromstring(render(spec, flavour))
        return {
            target.get("dev", ""): disk.get("device", "")
            for disk in root.iterfind("devices/disk")
            for target in disk.iterfind("target")
        }

    spec = replace(BASE, virt_mode="pv")
    assert kinds(XEN, spec) == {"xvda": "disk", "xvdb": "disk", "xvdd": "cdrom"}
    assert set(kinds(QUBES, spec).values()) == {"disk"}
    # Linux in PVH does not take a CD-ROM.
    assert set(kinds(XEN, replace(BASE, virt_mode="pvh")).values()) == {"disk"}


def _changes() -> list[tuple[str, object]]:
    """Every field with another value: {"disks.rw": spec}, the parts of tuples too."""
    rows: list[tuple[str, object]] = []
    for field in dataclasses.fields(DomainSpec):
        if field.name in ("disks", "interfaces", "hostdevs", "emulator"):
            kind = {
                "disks": DiskSpec, "interfaces": InterfaceSpec, "hostdevs": HostdevSpec,
                "emulator": EmulatorSpec,
            }[field.name]  # fmt: skip
            rows.extend((f"{field.name}.{part.name}", None) for part in dataclasses.fields(kind))
        else:
            rows.append((field.name, None))
    return rows


def _other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, tuple):
        return ("10.1.1.1", *value[1:])
    return {"disk": "cdrom", "raw": "qcow2", "pvh": "pv", "pv": "pvh", "hvm": "pvh"}.get(
        str(value), f"{value}x" if value else "y"
    )


def _variant(spec: DomainSpec, path: str) -> DomainSpec | None:
    """The spec with that one field changed, None where it has no such part."""
    outer, _, inner = path.partition(".")
    value = getattr(spec, outer)
    if not inner:
        return replace(spec, **{outer: _other(value)})
    if isinstance(value, tuple):
        if not value:
            return None
        changed: Any = [replace(part, **{inner: _other(getattr(part, inner))}) for part in value]
        parts: dict[str, Any] = {outer: tuple(changed)}
        return replace(spec, **parts)
    return replace(spec, **{outer: replace(value, **{inner: _other(getattr(value, inner))})})


@pytest.mark.parametrize("path", [path for path, _ in _changes()])
def test_every_field_of_the_spec_shows_in_some_golden_file(path: str) -> None:
    shows = []
    for name, (spec, flavour) in CASES.items():
        variant = _variant(spec, path)
        if variant is None:
            continue
        try:
            if render(variant, flavour) != render(spec, flavour):
                shows.append(name)
        except DomainsError:
            continue
    assert bool(shows) is (path not in NOT_RENDERED), (path, shows)


def test_metadata_comes_back_in_every_spelling() -> None:
    text = render(BASE, XEN, started="1700000000.250")
    root = etree.fromstring(text)
    element = root.find(f"metadata/{{{METADATA_NS}}}qube")
    assert element is not None
    expected = (BASE.boot_id, 7, 1700000000.25)
    assert read_metadata(etree.tostring(element, encoding="unicode")) == expected
    # libvirt gives the element back without its prefix.
    bare = '<qube boot="b" epoch="3"/>'
    assert read_metadata(bare) == ("b", 3, None)
    for broken in ("", "<x", "<other boot='b'/>", "<qube epoch='x'/>", "<qube started='x'/>"):
        assert read_metadata(broken) == ("", 0, None)


def test_what_only_xen_has_is_refused_elsewhere() -> None:
    with pytest.raises(DomainsError) as caught:
        render(replace(BASE, kernel="", initramfs="", cmdline=""), KVM)
    assert caught.value.reason == "INVALID_DOMAIN_SPEC"
    with pytest.raises(DomainsError) as caught:
        render(replace(BASE, disks=(FROM_USB,)), KVM)
    assert caught.value.reason == "HYPERVISOR_UNSUPPORTED"
    with pytest.raises(DomainsError) as caught:
        render(replace(BASE, interfaces=(replace(NIC, tap=""),)), KVM)
    assert caught.value.reason == "NETWORK_UNAVAILABLE"


def test_fragments_are_the_elements_of_the_whole() -> None:
    for flavour in (XEN, QUBES, KVM):
        whole = etree.fromstring(render(replace(BASE, disks=(ROOT,)), flavour))
        for fragment, tag in (
            (disk_fragment(ROOT, flavour), "disk"),
            (interface_fragment(NIC, flavour), "interface"),
        ):
            inside = whole.find(f"devices/{tag}")
            assert inside is not None
            canonical = [
                re.sub(r">\s+<", "><", etree.tostring(e, method="c14n").decode().strip())
                for e in (inside, etree.fromstring(fragment))
            ]
            assert canonical[0] == canonical[1]


@given(st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), max_size=60))
def test_any_command_line_that_passes_arrives_as_it_is(cmdline: str) -> None:
    spec = replace(BASE, cmdline=cmdline)
    try:
        check(spec)
    except DomainsError:
        return
    for flavour in (XEN, KVM):
        assert etree.fromstring(render(spec, flavour)).findtext("os/cmdline", "") == cmdline
