"""What may reach root: the grammar of hostd's arguments, with hostile input."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.model.refusal import Refusal
from services.hostd.adapters.autostart import TEMPLATE, Autostart
from services.hostd.adapters.pci import DeviceMissing, PciBinding
from services.hostd.adapters.workers import worker_command
from services.hostd.core import verbs
from services.hostd.core.verbs import Names

HOSTILE = [
    "-rf",
    "--help",
    "a b",
    "a;b",
    "$(id)",
    "`id`",
    "../../etc/passwd",
    "/etc/passwd",
    "a\nb",
    "a\0b",
    "\u00e4",
    "a" * 300,
    "a/b",
    ".",
    "..",
    "'",
    '"',
    "*",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    "check",
    [
        verbs.check_namespace,
        verbs.check_qube,
        verbs.check_mac,
        verbs.check_pci,
        lambda text: verbs.check_address(text, 4, "ip"),
        lambda text: verbs.check_address(text, 6, "ip6"),
    ],
)
def test_hostile_text_is_refused(check: Callable[[str], str], text: str) -> None:
    with pytest.raises(Refusal) as refused:
        check(text)
    assert refused.value.reason == "INVALID_VALUE"
    assert len(refused.value.message) < 200


@given(st.text(alphabet=string.printable + "\u00e4\x00", max_size=80))
def test_what_passes_is_one_harmless_word(text: str) -> None:
    for check in (verbs.check_namespace, verbs.check_qube, verbs.check_mac, verbs.check_pci):
        try:
            passed = check(text)
        except Refusal:
            continue
        assert re.fullmatch(r"[A-Za-z0-9_.:-]*", passed) and not passed.startswith("-")
        assert passed not in (".", "..") and "/" not in passed


@pytest.mark.parametrize("qid", [0, -1, 65536, 2**31])
def test_qid_outside_its_range_is_refused(qid: int) -> None:
    with pytest.raises(Refusal):
        verbs.check_qid(qid)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("::1", 4),
        ("10.0.0.1", 6),
        ("0.0.0.0", 4),
        ("127.0.0.1", 4),
        ("224.0.0.1", 4),
        ("10.0.0.1/24", 4),
        ("fe80::1%eth0", 6),
        ("10.0.0.01", 4),
    ],
)
def test_address_that_is_no_hosts_is_refused(text: str, version: int) -> None:
    with pytest.raises(Refusal):
        verbs.check_address(text, version, "ip")


@pytest.mark.parametrize(
    "parts",
    [
        ("", "10.137.0.6", "", "", ""),
        ("10.137.0.20", "", "", "", ""),
        ("10.137.0.6", "10.137.0.6", "", "", ""),
        ("10.137.0.20", "10.137.0.6", "fd00::1", "", ""),
        ("10.137.0.20", "10.137.0.6", "fd00::1", "fd00::1", ""),
        ("10.137.0.20", "10.137.0.6", "", "", "01:00:00:00:00:00"),
        ("10.137.0.20", "10.137.0.6", "", "", "00:16:3e:5e:6c"),
    ],
)
def test_incomplete_link_is_refused(parts: tuple[str, str, str, str, str]) -> None:
    with pytest.raises(Refusal):
        verbs.check_link(*parts)


def test_link_is_canonical() -> None:
    link = verbs.check_link(
        "10.137.0.20", "10.137.0.6", "FD09::14", "fd09:0::6", "00:16:3E:5E:6C:00"
    )
    assert (link.ip6, link.gateway6, link.mac) == ("fd09::14", "fd09::6", "00:16:3e:5e:6c:00")


def test_outermost_uplink_has_the_addresses_of_its_qid() -> None:
    link = verbs.uplink_link(0x0102, "", "")
    assert (link.ip, link.gateway) == ("10.137.1.2", "169.254.1.1")


def test_names_of_instances_do_not_meet_and_fit() -> None:
    whole, one, two = Names.of_root("/"), Names.of_root("/tmp/a"), Names.of_root("/tmp/b")
    assert (whole.namespace(6), whole.tap(20)) == ("bh-net-6", "bh20")
    assert one.namespace(6) != two.namespace(6) and one.tap(20) != two.tap(20)
    for names in (whole, one, two):
        assert len(names.tap(65535)) <= 15 and len(names.uplink(65535) + "i") <= 15
        assert names.qid_of_namespace(names.namespace(77)) == 77
        assert names.qid_of_tap(names.tap(77)) == 77
        for other in {whole, one, two} - {names}:
            assert names.qid_of_namespace(other.namespace(77)) == 0
            assert names.qid_of_tap(other.tap(77)) == 0
    for foreign in ("eth0", "virbr0", "bh", "bhx", "bh-net-", "docker0"):
        assert whole.qid_of_tap(foreign) == 0 == whole.qid_of_namespace(foreign)


def test_worker_is_started_with_one_capability_and_no_shell() -> None:
    command = worker_command("bh-net-6", 1001, 1001, 9, 77)
    assert command[:4] == ["ip", "netns", "exec", "bh-net-6"]
    assert "--no-new-privs" in command and "--clear-groups" in command
    assert {"--bounding-set=-all,+net_admin", "--reuid=1001"} <= set(command)
    assert not any(word in ("sh", "bash", "-c") for word in command)


# ---- autostart


def test_autostart_link_is_made_and_removed_repeatably(tmp_path: Path) -> None:
    autostart = Autostart(tmp_path)
    link = tmp_path / "etc/systemd/system/multi-user.target.wants/qubes-vm@work.service"
    autostart.set("work", False)
    for _ in range(2):
        autostart.set("work", True)
        assert link.readlink() == TEMPLATE
    assert [path.name for path in link.parent.iterdir()] == [link.name]
    for _ in range(2):
        autostart.set("work", False)
        assert not link.is_symlink()


def test_autostart_corrects_a_wrong_link_and_leaves_a_file_alone(tmp_path: Path) -> None:
    autostart = Autostart(tmp_path)
    autostart.set("work", True)
    link = tmp_path / "etc/systemd/system/multi-user.target.wants/qubes-vm@work.service"
    link.unlink()
    link.symlink_to("/nowhere")
    autostart.set("work", True)
    assert link.readlink() == TEMPLATE
    link.unlink()
    link.write_text("by hand")
    for enabled in (True, False):
        with pytest.raises(FileExistsError):
            autostart.set("work", enabled)
    assert link.read_text() == "by hand"


# ---- PCI


class Sysfs:
    """A tree like sysfs whose files act when they are written, as far as bind() sees."""

    def __init__(self, root: Path, driver: str) -> None:
        self.root = root
        self.device = root / "bus/pci/devices/0000:03:00.0"
        self.device.mkdir(parents=True)
        (root / "bus/pci/drivers_probe").write_text("")
        (self.device / "driver_override").write_text("")
        self.drive(driver)

    def drive(self, driver: str) -> None:
        link = self.device / "driver"
        link.unlink(missing_ok=True)
        if driver:
            target = self.root / "bus/pci/drivers" / driver
            target.mkdir(parents=True, exist_ok=True)
            (target / "unbind").write_text("")
            link.symlink_to(target)


class Kernel(PciBinding):
    """The kernel's part: the driver follows driver_override when probed."""

    def __init__(self, sysfs: Sysfs, loaded: bool = True) -> None:
        super().__init__("vfio-pci", sysfs.root)
        self.sysfs = sysfs
        self.loaded = loaded

    def _driver(self, device: Path) -> str:
        unbind = device / "driver/unbind"
        if unbind.exists() and unbind.read_text():
            self.sysfs.drive("")
        probe = self.sysfs.root / "bus/pci/drivers_probe"
        if probe.read_text():
            probe.write_text("")
            wanted = (device / "driver_override").read_text().strip()
            self.sysfs.drive(wanted if wanted and self.loaded else "" if wanted else "e1000e")
        return super()._driver(device)


def test_pci_device_goes_to_the_stub_and_back(tmp_path: Path) -> None:
    sysfs = Sysfs(tmp_path, "e1000e")
    kernel = Kernel(sysfs)
    for _ in range(2):
        kernel.bind("0000:03:00.0", True)
        assert (sysfs.device / "driver").resolve().name == "vfio-pci"
    for _ in range(2):
        kernel.bind("0000:03:00.0", False)
        assert kernel._driver(sysfs.device) == "e1000e"


def test_pci_without_the_stubs_module_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="module"):
        Kernel(Sysfs(tmp_path, "e1000e"), loaded=False).bind("0000:03:00.0", True)


def test_pci_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DeviceMissing):
        PciBinding("vfio-pci", tmp_path).bind("0000:03:00.0", True)
