"""What changes on a running guest of a libvirt that is played here: its one interface, moved,
renewed or taken away, and how far its memory may grow."""

from __future__ import annotations

import asyncio
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import libvirt
import pytest

from services.domains.adapters.hypervisor import Failure, HypervisorError
from services.domains.adapters.libvirt_adapter import LibvirtHypervisor
from services.domains.core.plugging import Plugging
from services.domains.core.spec import DomainSpec, InterfaceSpec
from services.domains.core.xml import Flavour

NIC = InterfaceSpec(
    mac="00:16:3e:5e:6c:00", ip="10.137.0.5", ip6="fd09:24ef:4179::a89:5", backend="fw"
)


class Domain:
    """A guest's interfaces, and what is asked of it, in order."""

    def __init__(self) -> None:
        self.interfaces: list[ET.Element] = []
        self.asked: list[str] = []
        self.obeys = True
        self.tells_addresses = True

    def name(self) -> str:
        return "work"

    def ID(self) -> int:  # noqa: N802
        return 12

    def XMLDesc(self) -> str:  # noqa: N802 - libvirt's name
        root = ET.Element("domain")
        devices = ET.SubElement(root, "devices")
        for interface in self.interfaces:
            shown = ET.fromstring(ET.tostring(interface))
            if not self.tells_addresses:
                for ip in shown.findall("ip"):
                    shown.remove(ip)
            devices.append(shown)
        return ET.tostring(root, encoding="unicode")

    def attachDeviceFlags(self, text: str, _flags: int) -> None:  # noqa: N802
        interface = ET.fromstring(text)
        self.interfaces.append(interface)
        self.asked.append(f"attach {Plugging.of(interface).backend}")

    def detachDeviceFlags(self, text: str, _flags: int) -> None:  # noqa: N802
        gone = Plugging.of(ET.fromstring(text))
        self.asked.append(f"detach {gone.backend}")
        if self.obeys:
            self.interfaces = [i for i in self.interfaces if Plugging.of(i).mac != gone.mac]


@pytest.fixture
def domain() -> Domain:
    return Domain()


@pytest.fixture
def hypervisor(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> LibvirtHypervisor:
    made = LibvirtHypervisor("xen:///")

    async def on_domain(_uuid: str, call: Callable[[Any], None], _timeout: float) -> None:
        call(domain)

    monkeypatch.setattr(made, "_on_domain", on_domain)
    return made


def attach(hypervisor: LibvirtHypervisor, nic: InterfaceSpec, *, anew: bool = False) -> None:
    asyncio.run(hypervisor.attach_interface("u", nic, 1.0, anew=anew))


@pytest.mark.parametrize("tells_addresses", [True, False])
def test_what_is_plugged_as_wanted_is_left_alone(
    hypervisor: LibvirtHypervisor, domain: Domain, tells_addresses: bool
) -> None:
    domain.tells_addresses = tells_addresses
    for _ in range(2):
        attach(hypervisor, NIC)
    assert domain.asked == ["attach fw"]


@pytest.mark.parametrize(
    ("other", "anew"),
    [
        (replace(NIC, backend="net2"), False),
        (replace(NIC, mac="00:16:3e:5e:6c:01"), False),
        (replace(NIC, ip="10.137.0.9"), False),
        (replace(NIC, ip6=""), False),
        (NIC, True),
    ],
)
def test_another_one_takes_its_place(
    hypervisor: LibvirtHypervisor, domain: Domain, other: InterfaceSpec, anew: bool
) -> None:
    attach(hypervisor, NIC)
    attach(hypervisor, other, anew=anew)
    assert domain.asked == ["attach fw", "detach fw", f"attach {other.backend}"]
    assert [Plugging.of(i).mac for i in domain.interfaces] == [other.mac]


def test_a_guest_that_does_not_let_go_gets_no_second_one(
    hypervisor: LibvirtHypervisor, domain: Domain
) -> None:
    attach(hypervisor, NIC)
    domain.obeys = False
    with pytest.raises(HypervisorError) as refused:
        attach(hypervisor, replace(NIC, backend="net2"))
    assert refused.value.failure is Failure.BUSY
    assert len(domain.interfaces) == 1


def test_only_what_hangs_at_the_backend_goes_with_it(
    hypervisor: LibvirtHypervisor, domain: Domain
) -> None:
    attach(hypervisor, NIC)
    asyncio.run(hypervisor.detach_interface("u", "net2", 1.0))
    assert len(domain.interfaces) == 1
    asyncio.run(hypervisor.detach_interface("u", "fw", 1.0))
    assert domain.interfaces == []
    attach(hypervisor, NIC)
    asyncio.run(hypervisor.detach_interface("u", "", 1.0))
    assert domain.interfaces == []


class Store:
    """XenStore as far as memory goes; every other call fails."""

    present = True

    def __init__(self) -> None:
        self.limits: list[tuple[int, int]] = []

    def set_hotplug_max(self, xid: int, maxmem_mib: int) -> None:
        self.limits.append((xid, maxmem_mib))
        if maxmem_mib == 1:
            raise OSError("not taken")


def test_a_new_maximum_reaches_the_balancer_and_takes_no_memory_away(
    hypervisor: LibvirtHypervisor, domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store()
    monkeypatch.setattr(hypervisor, "_xenstore", store)
    with pytest.raises(HypervisorError) as refused:  # stock libvirt makes no domain that grows
        asyncio.run(hypervisor.set_maxmem("u", 3000, 1.0))
    assert refused.value.failure is Failure.UNSUPPORTED and store.limits == []
    monkeypatch.setattr(hypervisor, "_flavour", Flavour("xen", qubes=True))
    asyncio.run(hypervisor.set_maxmem("u", 3000, 1.0))
    assert store.limits == [(12, 3000)]
    assert domain.asked == []
    for left, failure in ((store, Failure.FAILED), (None, Failure.UNSUPPORTED)):
        monkeypatch.setattr(hypervisor, "_xenstore", left)
        with pytest.raises(HypervisorError) as refused:
            asyncio.run(hypervisor.set_maxmem("u", 1, 1.0))
        assert refused.value.failure is failure


class Refusing:
    """A libxl that tells no reason, and what Xen has free."""

    def __init__(self, free_mib: int) -> None:
        self._free = free_mib << 20

    def createXML(self, _text: str, _flags: int) -> None:  # noqa: N802
        error = libvirt.libvirtError("")
        error.err = (libvirt.VIR_ERR_INTERNAL_ERROR, 0, "internal error: libxenlight failed to "
                     "create new domain 'work'", 2, "", "", "", -1, -1)  # fmt: skip
        raise error

    def getFreeMemory(self) -> int:  # noqa: N802
        return self._free


@pytest.mark.parametrize(
    ("free_mib", "failure", "says"),
    [
        (399, Failure.NO_MEMORY, "work asks for 400 MiB, 399 MiB are free in Xen"),
        (400, Failure.FAILED, "libxl-driver.log says why"),
    ],
)
def test_a_start_that_fails_says_what_is_known(
    hypervisor: LibvirtHypervisor,
    monkeypatch: pytest.MonkeyPatch,
    free_mib: int,
    failure: Failure,
    says: str,
) -> None:
    async def call(_uuid: str, made: Callable[[Any], None], _timeout: float) -> None:
        made(Refusing(free_mib))

    monkeypatch.setattr(hypervisor, "_call", call)
    spec = DomainSpec(
        uuid="11111111-1111-4111-8111-111111111101", name="work", boot_id="b1", memory_mib=400
    )
    with pytest.raises(HypervisorError) as refused:
        asyncio.run(hypervisor.create_paused(spec, 1.0))
    assert refused.value.failure is failure
    assert refused.value.message.endswith(says)
