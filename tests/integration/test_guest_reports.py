"""What guests report over qubesd.misc.sock, and all that follows from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from clients.admin import AdminClient, exceptions
from services.domains.simhv.client import SimControl
from tests.fakes import loopfs
from tests.instance import Instance, running
from tests.integration.adminapi_world import KERNEL, Listener, add_kernel

pytestmark = pytest.mark.integration


class World:
    """Guests that write what they like into their keys, and call."""

    def __init__(self, instance: Instance, pool: Path) -> None:
        self.instance = instance
        self.pool = pool
        self.client = AdminClient.local(instance.root, timeout=60)

    def create(self, klass: str, name: str, template: str = "", *, start: bool = True) -> None:
        payload = f"name={name} label=red".encode()
        self.client.call(f"admin.vm.Create.{klass}", arg=template, payload=payload)
        if start:
            self.client.call("admin.vm.Start", name)

    def write(self, qube: str, keys: Mapping[str, str]) -> None:
        """As the guest does; what it wrote before is gone."""
        uuid = self.client.text("admin.vm.property.Get", qube, "uuid").rpartition(" ")[2]
        path = self.instance.root / f"run/bulkhead/domains/guest-keys/{uuid}.json"
        content = json.loads(path.read_text())
        prefixes = ("/features-request/", "/qubes-tools/")
        kept = {k: v for k, v in content["keys"].items() if not k.startswith(prefixes)}
        path.write_text(json.dumps({**content, "keys": {**kept, **keys}}))

    def misc(self, qube: str, call: str, payload: bytes = b"") -> None:
        path = self.instance.root / "run/qubesd.misc.sock"
        AdminClient(path, source=qube, timeout=30).call(call, payload=payload)

    def asks(self, qube: str, **features: str) -> list[str]:
        """A request for features; the events that it makes on the qube, in order."""
        named = {
            f"/features-request/{name.replace('__', '.').replace('_', '-')}": value
            for name, value in features.items()
        }
        self.write(qube, named)
        return self.events(qube, "qubes.FeaturesRequest")

    def events(self, qube: str, call: str, payload: bytes = b"", about: str = "") -> list[str]:
        listener = Listener(self.client)
        try:
            self.misc(qube, call, payload)
            self.client.call("admin.vm.tag.Set", qube, "told")
            seen = listener.until("domain-tag-add:told")
            self.client.call("admin.vm.tag.Remove", qube, "told")
        finally:
            listener.close()
        return [e.name for e in seen if e.subject == (about or qube)][: None if about else -1]

    def features(self, qube: str) -> dict[str, str]:
        names = self.client.text("admin.vm.feature.List", qube).split()
        return {n: self.client.text("admin.vm.feature.Get", qube, n) for n in names}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with loopfs.mounted("xfs", 4096) as place:
        place.parent.chmod(0o755)
        pool = place / "pool"
        pool.mkdir(mode=0o755)
        with running(pool_dir=pool) as instance, SimControl.of(instance.root) as sim:
            sim.nature("*", agent="connect")
            add_kernel(instance)
            w = World(instance, pool)
            w.client.set("", "default_kernel", KERNEL)
            w.create("TemplateVM", "tmpl")
            yield w


def test_the_first_report_of_a_template(world: World) -> None:
    events = world.asks(
        "tmpl",
        qrexec="1",
        gui="1",
        os="Linux",
        os_distribution="debian",
        qubes_firewall="0",
        vmexec="1",
        supported_service__apparmor="1",
        supported_feature__late_gui_daemon="1",
        supported_rpc__qubes="0",
        anon_timezone="1",
        internal="1",
        boot_mode__kernelopts__quiet="quiet",
        boot_mode__name__quiet="Quiet",
        boot_mode__active="quiet",
    )
    assert events[0] == "features-request"
    assert events[-1] == "template-postinstall"
    sets = [e for e in events if e.startswith("domain-feature-set:")]
    assert all(f"domain-feature-pre-set:{e.partition(':')[2]}" in events for e in sets)
    assert world.features("tmpl") == {
        "qrexec": "1",
        "gui": "1",
        "os": "Linux",
        "os-distribution": "debian",
        "qubes-firewall": "",
        "vmexec": "1",
        "supported-service.apparmor": "1",
        "apparmor": "1",
        "supported-feature.late-gui-daemon": "1",
        "anon-timezone": "1",
        "boot-mode.kernelopts.quiet": "quiet",
        "boot-mode.name.quiet": "Quiet",
        "boot-mode.active": "quiet",
    }


def test_later_reports_change_what_may_change(world: World) -> None:
    events = world.asks(
        "tmpl",
        qrexec="0",
        gui="0",
        vmexec="0",
        anon_timezone="0",
        supported_service__cups="1",
        boot_mode__name__default="Plain",
    )
    assert "template-postinstall" not in events
    found = world.features("tmpl")
    assert (found["qrexec"], found["gui"], found["vmexec"]) == ("1", "1", "")
    assert found["anon-timezone"] == "1"
    assert "supported-service.apparmor" not in found and "apparmor" not in found
    assert found["supported-service.cups"] == "1"
    assert {n: v for n, v in found.items() if n.startswith("boot-mode")} == {
        "boot-mode.name.default": "Plain"
    }
    # Nothing is asked for: nothing changes.
    assert world.asks("tmpl") == ["features-request"]
    assert world.features("tmpl") == found


@pytest.mark.parametrize("bad", ["a;b", "a\tb", "caf\u00e9", "x/y"])
def test_one_bad_value_refuses_the_whole_report(world: World, bad: str) -> None:
    before = world.features("tmpl")
    world.write("tmpl", {"/features-request/vmexec": "1", "/features-request/os-eol": bad})
    with pytest.raises(exceptions.ProtocolError):
        world.misc("tmpl", "qubes.FeaturesRequest")
    assert world.features("tmpl") == before


def test_a_qube_of_a_template_reports_its_services_alone(world: World) -> None:
    world.create("AppVM", "work", "tmpl")
    assert world.asks("work", qrexec="1", vmexec="1", os="Linux", supported_rpc__a="1") == [
        "features-request",
        "domain-feature-pre-set:supported-rpc.a",
        "domain-feature-set:supported-rpc.a",
    ]
    assert world.features("work") == {"supported-rpc.a": "1"}


def test_windows_tools_of_old(world: World) -> None:
    """qubes.NotifyTools; the memory limit has to wait until the qube is off."""
    world.create("StandaloneVM", "win")
    tools = {"qrexec": "1", "gui": "1", "default-user": "user", "os": "Windows", "version": "4"}
    world.write("win", {f"/qubes-tools/{name}": value for name, value in tools.items()})
    events = world.events("win", "qubes.NotifyTools")
    assert (events[0], events[-1]) == ("features-request", "template-postinstall")
    assert world.features("win") == {
        "qrexec": "1",
        "gui": "1",
        "os": "Windows",
        "rpc-clipboard": "1",
        "stubdom-qrexec": "1",
        "audio-model": "ich6",
        "timezone": "localtime",
        "no-monitor-layout": "1",
    }
    assert world.client.text("admin.vm.property.Get", "win", "qrexec_timeout").endswith(" 6000")
    world.write("win", {"/qubes-tools/os": "Win;dows"})
    with pytest.raises(exceptions.ProtocolError):
        world.misc("win", "qubes.NotifyTools")


def test_updates_of_an_updateable_qube(world: World) -> None:
    assert world.events("win", "qubes.NotifyUpdates", b" 12\n") == [
        "domain-feature-pre-set:updates-available",
        "domain-feature-set:updates-available",
        "domain-feature-pre-set:last-updates-check",
        "domain-feature-set:last-updates-check",
    ]
    found = world.features("win")
    assert found["updates-available"] == "1" and "last-update" not in found
    world.misc("win", "qubes.NotifyUpdates", b"0")
    found = world.features("win")
    assert found["updates-available"] == "" and found["last-update"]
    for bad in (b"", b"-1", b"one", b"1 2", b"\xff"):
        with pytest.raises(exceptions.ProtocolError):
            world.misc("win", "qubes.NotifyUpdates", bad)


def test_updates_that_an_app_qube_sees_are_its_templates(world: World) -> None:
    assert "Halted" not in (world.instance.state("work"), world.instance.state("tmpl"))
    world.misc("work", "qubes.NotifyUpdates", b"3")  # it may be installing them now
    assert "updates-available" not in world.features("tmpl")
    world.client.call("admin.vm.Kill", "tmpl")
    # The template has committed since: what is installed there, work does not see.
    world.misc("work", "qubes.NotifyUpdates", b"3")
    assert "updates-available" not in world.features("tmpl")
    world.client.call("admin.vm.Kill", "work")
    world.client.call("admin.vm.Start", "work")
    world.misc("work", "qubes.NotifyUpdates", b"0")
    assert "updates-available" not in world.features("tmpl")
    # Whether it is outdated cannot be told: then nothing is said of the template.
    world.instance.freeze("storage")
    world.misc("work", "qubes.NotifyUpdates", b"3")
    assert "updates-available" not in world.features("tmpl")
    old = world.instance.kill("storage")
    world.instance.wait_restarted("storage", old)
    world.misc("work", "qubes.NotifyUpdates", b"3")
    assert world.features("tmpl")["updates-available"] == "1"
    assert "updates-available" not in world.features("work")


def test_only_a_running_qube_reports_what_is_in_its_keys(world: World) -> None:
    for call in ("qubes.FeaturesRequest", "qubes.NotifyTools"):
        with pytest.raises(exceptions.QubesVMNotRunningError):
            world.misc("tmpl", call)
