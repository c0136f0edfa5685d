"""From a qube's records to the XML that Xen gets: modes, kernels, boot modes, devices."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import pytest

from bulkhead.model.records import (
    Assignment,
    DeviceFact,
    FactPut,
    KernelFact,
    Qube,
)
from services.domains.core.spec import check
from services.domains.core.xml import Flavour, render
from services.domains.messages import spec_from
from services.lifecycle.core import boot
from services.lifecycle.participants import domain_message
from tests.unit.plan_world import World, world

XEN = Flavour("xen", qubes=True)
COMMON = (
    "root=/dev/mapper/dmroot ro nomodeset console=hvc0 rd_NO_PLYMOUTH rd.plymouth.enable=0"
    " plymouth.enable=0 xen_privcmd.unrestricted "
)
GRUB = "/var/lib/qubes/vm-kernels"


@pytest.fixture
def w() -> World:
    made = world()
    host = made.view.host
    assert host is not None
    made.view.apply(FactPut(replace(host, hypervisor="xen")))
    made.view.apply(
        FactPut(KernelFact("6.12.1-lab", directory="/k/6", has_initramfs=True, has_modules=True))
    )
    return made


def domain(w: World, qube: Qube | str, *devices: boot.BlockDevice) -> ET.Element:
    """The XML of a start, checked and sent as it is on the way to libvirt."""
    record = w.qube(qube) if isinstance(qube, str) else qube
    record = replace(record, run=replace(record.run, boot_id="b1"))
    spec = boot.domain(w.view, record, epoch=1, devices=devices)
    return ET.fromstring(render(check(spec_from(domain_message(spec))), XEN))


def text(root: ET.Element, path: str) -> str | None:
    found = root.find(path)
    return None if found is None else found.text or ""


def attributes(root: ET.Element, path: str) -> dict[str, str] | None:
    found = root.find(path)
    return None if found is None else dict(found.attrib)


def pci(w: World, qube: str, **more: Any) -> None:
    """A graphics card of dom0, required by the qube."""
    fact = DeviceFact(
        w.view.adminvm.uuid,
        "pci",
        "03_00.1",
        device_id="0x1:0x2::p030000",
        interfaces="p030000",
        data={"sbdf": "0000:03:00.1"},
    )
    w.view.apply(FactPut(fact))
    assignment = Assignment("pci", "dom0", "03_00.1", mode="required", **more)
    w.patch(qube, devices=(assignment,))


def test_pvh_with_the_kernel_of_dom0(w: World) -> None:
    root = domain(w, "work")
    assert root.get("type") == "xen"
    assert (text(root, "memory"), text(root, "currentMemory")) == ("4000", "400")
    assert root.find("maxMemory") is None
    assert attributes(root, "os/type") == {"arch": "x86_64", "machine": "xenpvh"}
    assert text(root, "os/type") == "xenpvh"
    assert text(root, "os/kernel") == "/k/6/vmlinuz"
    assert text(root, "os/initrd") == "/k/6/initramfs"
    assert text(root, "os/cmdline") == f"{COMMON}swiotlb=2048"
    assert [e.tag for e in root.findall("features/*")] == ["pae", "acpi", "apic", "viridian"]
    assert attributes(root, "clock") == {"offset": "utc", "adjustment": "reset"}
    assert attributes(root, "clock/timer") == {"name": "tsc", "mode": "native"}
    for event in ("on_poweroff", "on_reboot", "on_crash"):
        assert text(root, event) == "destroy"
    for absent in ("emulator", "input", "sound", "video", "graphics", "hostdev"):
        assert root.find(f"devices/{absent}") is None


def test_pv_has_neither_processor_nor_features(w: World) -> None:
    w.set("work", "virt_mode", "pv")
    root = domain(w, "work")
    assert (text(root, "os/type"), root.find("cpu"), root.find("features")) == ("linux", None, None)


@pytest.mark.parametrize(
    ("mode", "loader"), [("pvh", "pvgrub2-pvh"), ("pv", "pvgrub2"), ("hvm", "")]
)
@pytest.mark.parametrize("installed", [False, True])
def test_a_kernel_of_the_guests_own(w: World, mode: str, loader: str, installed: bool) -> None:
    """No options, no initramfs: nothing but a loader, where one is needed."""
    w.set("work", "virt_mode", mode)
    w.set("work", "kernel", "")
    directory = GRUB
    if installed and loader:
        directory = "/elsewhere"
        w.view.apply(FactPut(KernelFact(loader, directory=f"/elsewhere/{loader}")))
    root = domain(w, "work")
    assert text(root, "os/kernel") == (f"{directory}/{loader}/vmlinuz" if loader else None)
    assert root.find("os/initrd") is None
    assert root.find("os/cmdline") is None


def test_options_of_features_and_boot_modes(w: World) -> None:
    options = "swiotlb=2048"
    uuid = w.qube("work").uuid.replace("-", "")
    w.feature("tmpl", "os", "Linux")
    w.feature("tmpl", "selinux")
    w.feature("tmpl", "boot-mode.kernelopts.debug", "systemd.debug-shell")
    machine = f"systemd.machine_id={uuid} {COMMON}{options}"
    assert text(domain(w, "work"), "os/cmdline") == f"{machine} selinux=1 security=selinux"
    w.feature("tmpl", "apparmor")
    w.set("work", "bootmode", "debug")
    assert text(domain(w, "work"), "os/cmdline") == (
        f"{machine} apparmor=1 security=apparmor systemd.debug-shell"
    )
    w.feature("tmpl", "no-nomodeset")
    assert "nomodeset" not in (text(domain(w, "work"), "os/cmdline") or "")
    w.feature("tmpl", "no-default-kernelopts")
    w.set("work", "kernelopts", "quiet")
    assert text(domain(w, "work"), "os/cmdline") == "quiet systemd.debug-shell"
    w.set("work", "bootmode", "unknown")
    assert text(domain(w, "work"), "os/cmdline") == "quiet"
    w.set("work", "kernelopts", "")
    assert text(domain(w, "work"), "os/cmdline") is None


def test_hvm_boots_its_kernel_through_the_stubdomain(w: World) -> None:
    w.set("work", "virt_mode", "hvm")
    w.feature("tmpl", "qemu-extra-args", "  -device foo ")
    w.set("work", "stubdom_mem", "200")
    w.set("work", "debug", "True")
    w.set("work", "audiovm", "")
    root = domain(w, "work")
    assert (text(root, "os/type"), text(root, "os/loader")) == ("hvm", "hvmloader")
    assert [b.get("dev") for b in root.findall("os/boot")] == ["cdrom", "hd"]
    assert root.find("os/kernel") is None and root.find("os/initrd") is None
    assert text(root, "os/cmdline") == f"{COMMON}swiotlb=2048"
    emulator = attributes(root, "devices/emulator")
    assert emulator is not None
    arguments = emulator.pop("cmdline")
    assert emulator == {"type": "stubdom-linux", "memory": str(200 * 1024)}
    head = "-qubes-audio:audiovm_xid=-1 -device foo -trace xen_platform_log -qubes-net:client_ip="
    netvm = w.qube("sys-net")
    assert arguments == (
        f"{head}10.137.0.{w.qube('work').qid},dns_0=10.139.1.1,dns_1=10.139.1.2"
        f",gw=10.137.0.{netvm.qid},netmask=255.255.255.255"
    )
    assert attributes(root, "clock") == {"offset": "variable", "adjustment": "0", "basis": "utc"}
    assert attributes(root, "devices/input") == {"type": "tablet", "bus": "usb"}
    assert attributes(root, "devices/video/model") == {"type": "vga"}
    assert attributes(root, "devices/graphics") == {"type": "qubes", "log_level": "2"}
    assert root.find("devices/sound") is None


def test_hvm_by_its_features(w: World) -> None:
    w.set("work", "virt_mode", "hvm")
    for name, value in {
        "uefi": "1",
        "audio-model": "ich6",
        "video-model": "none",
        "timezone": "localtime",
    }.items():
        w.feature("work", name, value)
    w.start("vault")
    w.set("work", "audiovm", "vault")
    root = domain(w, "work")
    emulator = attributes(root, "devices/emulator") or {}
    assert emulator["cmdline"].startswith("-qubes-audio:audiovm_xid=5")
    full = "/usr/libexec/xen/boot/qemu-stubdom-linux-full-"
    assert (emulator["kernel"], emulator["ramdisk"]) == (f"{full}kernel", f"{full}rootfs")
    assert text(root, "os/loader") == "/usr/share/edk2/xen/OVMF.fd"
    assert attributes(root, "os/loader") == {"type": "pflash"}
    assert attributes(root, "devices/sound") == {"model": "ich6"}
    assert root.find("devices/video") is None and root.find("devices/graphics") is None
    assert (attributes(root, "clock") or {})["basis"] == "localtime"
    w.feature("work", "linux-stubdom", "")
    w.feature("work", "video-model", "cirrus")
    root = domain(w, "work")
    assert (attributes(root, "devices/emulator") or {})["type"] == "stubdom"
    assert attributes(root, "devices/video/model") == {"type": "cirrus"}
    assert root.find("devices/graphics") is None


@pytest.mark.parametrize(
    ("value", "adjustment"), [("-3600", "-3600"), ("7200", "7200"), ("Europe/Paris", "0")]
)
def test_a_clock_that_cannot_be_set_so_is_utc(w: World, value: str, adjustment: str) -> None:
    w.feature("work", "timezone", value)
    w.feature("work", "audio-model", "Sound Blaster")
    # Neither matters to a guest without an emulator, whose start they must not refuse.
    assert attributes(domain(w, "work"), "clock") == {"offset": "utc", "adjustment": "reset"}
    w.set("work", "virt_mode", "hvm")
    w.feature("work", "audio-model", "")
    assert attributes(domain(w, "work"), "clock") == {
        "offset": "variable",
        "adjustment": adjustment,
        "basis": "utc",
    }


def test_a_running_guivm_shows_the_screen(w: World) -> None:
    w.set("work", "virt_mode", "hvm")
    w.set("work", "guivm", "vault")
    assert attributes(domain(w, "work"), "devices/graphics") == {"type": "qubes"}
    w.start("vault")
    assert attributes(domain(w, "work"), "devices/graphics") == {
        "type": "qubes",
        "domain": "vault",
    }


@pytest.mark.parametrize("port", ["03_00.1", "*"])
def test_a_graphics_card(w: World, port: str) -> None:
    pci(w, "work", options={"permissive": "True", "no-strict-reset": "yes"})
    w.patch("work", devices=(replace(w.qube("work").devices[0], port=port),))
    root = domain(w, "work")
    assert text(root, "os/type") == "hvm"
    assert text(root, "memory") == text(root, "currentMemory") == "400"
    assert attributes(root, "features/xen/e820_host") == {"state": "on"}
    assert attributes(root, "devices/hostdev") == {
        "type": "pci", "managed": "yes", "mode": "subsystem", "nostrictreset": "yes",
    }  # fmt: skip
    assert attributes(root, "devices/hostdev/source") == {"writeFiltering": "no"}
    assert attributes(root, "devices/hostdev/source/address") == {
        "domain": "0x0000", "bus": "0x03", "slot": "0x00", "function": "0x1",
    }  # fmt: skip
    # Its driver sets the mode: the common options let it.
    assert text(root, "os/cmdline") == COMMON.replace("nomodeset ", "").rstrip(" ") + " "
    w.feature("dom0", "suspend-s0ix")
    w.feature("work", "pci-e820-host", "")
    root = domain(w, "work")
    assert root.find("features/xen") is None
    assert attributes(root, "devices/hostdev/source") == {
        "writeFiltering": "no", "powerManagementFiltering": "no",
    }  # fmt: skip
    assert (text(root, "os/cmdline") or "").endswith(" qubes_exp_pm_use_suspend=1")


def test_a_card_that_is_not_required_is_not_in_the_start(w: World) -> None:
    pci(w, "work")
    w.patch("work", devices=(replace(w.qube("work").devices[0], mode="auto-attach"),))
    root = domain(w, "work")
    assert text(root, "os/type") == "hvm"  # it may get it
    assert root.find("devices/hostdev") is None


def test_disks_of_volumes_and_of_other_qubes(w: World) -> None:
    names = ("root", "private", "volatile", "kernel", "data", "more")
    devices = [
        boot.BlockDevice(name, f"/dev/{name}", rw=name != "kernel", block=True) for name in names
    ]
    rows: tuple[dict[str, str], ...] = (
        {},
        {"frontend-dev": "xvdj"},
        {"devtype": "cdrom"},
        {"read-only": "yes"},
    )
    for number, _ in enumerate(rows):
        w.device("vault", f"mapper_d{number}", device_id=f"id{number}")
    w.patch(
        "work",
        devices=tuple(
            Assignment("block", "vault", f"mapper_d{number}", mode="required", options=options)
            for number, options in enumerate(rows)
        ),
    )
    w.set("work", "kernel", "")
    root = domain(w, "work", *[d for d in devices if d.name != "kernel"])
    found = []
    for disk in root.findall("devices/disk"):
        target, source = disk.find("target"), disk.find("source")
        assert target is not None and source is not None
        backend = disk.find("backenddomain")
        found.append(
            (
                target.get("dev"),
                source.get("dev"),
                disk.get("device"),
                disk.find("readonly") is not None,
                "" if backend is None else backend.get("name"),
                disk.find("script") is not None,
            )
        )
    # vault's agent is older than the script that would look the device up there.
    assert found == [
        ("xvda", "/dev/root", "disk", False, "", True),
        ("xvdb", "/dev/private", "disk", False, "", True),
        ("xvdc", "/dev/volatile", "disk", False, "", True),
        ("xvde", "/dev/data", "disk", False, "", True),
        ("xvdf", "/dev/more", "disk", False, "", True),
        ("xvdi", "/dev/mapper/d0", "disk", False, "vault", False),
        ("xvdj", "/dev/mapper/d1", "disk", False, "vault", False),
        ("xvdd", "/dev/mapper/d2", "cdrom", False, "vault", False),
        ("xvdk", "/dev/mapper/d3", "disk", True, "vault", False),
    ]
    w.feature("vault", "qubes-agent-version", "4.10")
    root = domain(w, "work", devices[0])
    assert [d.find("script") is not None for d in root.findall("devices/disk")] == [True] * 5


def test_memory_that_can_grow(w: World) -> None:
    w.feature("work", "memory-hotplug")
    root = domain(w, "work")
    assert attributes(root, "maxMemory") == {"slots": "1", "unit": "MiB"}
    assert [text(root, tag) for tag in ("maxMemory", "memory", "currentMemory")] == [
        "4000", "400", "400",
    ]  # fmt: skip
    w.set("work", "maxmem", "0")
    root = domain(w, "work")
    assert root.find("maxMemory") is None and text(root, "memory") == "400"


def test_the_interface_has_the_real_addresses(w: World) -> None:
    w.feature("work", "net.fake-ip", "192.168.1.5")
    w.feature("sys-net", "ipv6")
    work = w.qube("work")
    root = domain(w, "work")
    assert attributes(root, "devices/interface") == {"type": "ethernet"}
    assert [e.attrib for e in root.findall("devices/interface/ip")] == [
        {"address": f"10.137.0.{work.qid}"},
        {"family": "ipv6", "address": f"fd09:24ef:4179::a89:{work.qid:x}"},
    ]
    assert attributes(root, "devices/interface/backenddomain") == {"name": "sys-net"}
    assert attributes(root, "devices/interface/script") == {"path": "vif-route-qubes"}
    assert domain(w, "alone").find("devices/interface") is None
