"""What a boot needs, guest keys and stops, judged from a view alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

import pytest

from bulkhead.api import domains_pb2
from bulkhead.model.defaults import class_volumes, new_store, new_volume
from bulkhead.model.plan.operation_table import unreported
from bulkhead.model.records import (
    Assignment,
    DeviceFact,
    FactPut,
    FactRemoved,
    HostFact,
    KernelFact,
    Phase,
    PoolFact,
    PowerFact,
    Qube,
    QubePut,
    Run,
    SystemPut,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View
from services.lifecycle.core import boot, guest_keys, stops
from services.lifecycle.participants import domain_message

TMPL = "00000000-0000-4000-8000-000000000001"
NET = "00000000-0000-4000-8000-000000000002"
WORK = "00000000-0000-4000-8000-000000000003"
BOOT = Run(Phase.STARTING, "b00t")


def add(view: View, made: Qube) -> None:
    """Put a qube with the volumes of its class into the view."""
    volumes = tuple(new_volume(view, made, spec) for spec in class_volumes(made.klass))
    view.apply(QubePut(replace(made, volumes=volumes)))


def qube(uuid: str, name: str, qid: int, klass: str, **properties: str) -> Qube:
    return Qube(uuid, name, qid, klass, properties={"label": "red", **properties})


@pytest.fixture
def view() -> View:
    """A template, a netvm and a client that is starting, on a Xen host."""
    made = View()
    made.apply_all(new_store("/pool", True))
    made.apply(FactPut(HostFact("xen", memory_kib=16 << 20, cpus=4)))
    made.apply(
        FactPut(KernelFact("6.1", directory="/kernels/6.1", has_initramfs=True, has_modules=True))
    )
    made.apply(SystemPut("default_kernel", "6.1"))
    add(made, qube(TMPL, "tmpl", 1, "TemplateVM"))
    net = qube(NET, "sys-net", 2, "AppVM", template="tmpl", provides_network="True", netvm="")
    add(made, replace(net, run=Run(Phase.UP, "n")))
    made.apply(FactPut(PowerFact(NET, "n", 1, "running", xid=7)))
    work = qube(WORK, "work", 3, "AppVM", template="tmpl", netvm="sys-net")
    add(made, replace(work, run=BOOT))
    return made


def record(view: View, uuid: str) -> Qube:
    found = view.by_uuid(uuid)
    assert found is not None
    return found


def test_volume_specs_carry_their_pool_and_the_kernels_name(view: View) -> None:
    specs = boot.volume_specs(view, record(view, WORK))
    assert [s.declared.name for s in specs] == ["root", "private", "volatile", "kernel"]
    assert specs[0].pool.name == "varlibqubes"
    assert specs[3].declared.vid == "6.1"


def test_sources_are_the_templates_declared_volumes(view: View) -> None:
    (source,) = boot.source_specs(view, record(view, WORK))
    assert source.declared.vid == "vm-templates/tmpl/root"
    assert source.declared.save_on_stop


def test_a_source_that_nobody_owns_is_refused_with_its_name(view: View) -> None:
    work = record(view, WORK)
    lost = replace(work.volumes[0], source="vm-templates/gone/root")
    with pytest.raises(Refusal, match="vm-templates/gone/root"):
        boot.source_specs(view, work.with_volume(lost))


def test_the_domain_of_a_pvh_qube_with_a_netvm(view: View) -> None:
    devices = [
        boot.BlockDevice("root", "/pool/root", rw=True),
        boot.BlockDevice("private", "/pool/private", rw=True),
        boot.BlockDevice("volatile", "/pool/volatile", rw=True),
        boot.BlockDevice("kernel", "/kernels/6.1/modules.img", rw=False),
    ]
    domain = boot.domain(view, record(view, WORK), epoch=3, devices=devices)
    assert (domain.virt_mode, domain.memory_mib, domain.vcpus) == ("pvh", 400, 2)
    assert domain.boot_id == "b00t"
    assert domain.kernel == "/kernels/6.1/vmlinuz"
    assert domain.initramfs == "/kernels/6.1/initramfs"
    assert [d.target for d in domain.disks] == ["xvda", "xvdb", "xvdc", "xvdd"]
    assert [d.serial for d in domain.disks] == ["root", "private", "volatile", "kernel"]
    (interface,) = domain.interfaces
    assert (interface.ip, interface.backend, interface.gateway) == (
        "10.137.0.3",
        "sys-net",
        "10.137.0.2",
    )
    assert domain.emulator is None


def test_the_domain_fits_its_message_field_for_field(view: View) -> None:
    domain = boot.domain(view, record(view, WORK), epoch=3, devices=[])
    message = domain_message(domain)
    assert message.name == "work"
    assert message.interfaces[0].dns == ["10.139.1.1", "10.139.1.2"]
    known = {field.name for field in domains_pb2.DomainSpec.DESCRIPTOR.fields}
    assert known == set(boot.Domain.__dataclass_fields__)


def test_numbers_without_limits_fit_their_messages(view: View) -> None:
    work = record(view, WORK)
    huge = dict.fromkeys(("memory", "maxmem", "vcpus", "stubdom_mem"), "9" * 25)
    work = replace(work, properties={**work.properties, **huge, "virt_mode": "hvm"})
    view.apply(QubePut(work))
    message = domain_message(boot.domain(view, work, epoch=3, devices=[]))
    assert (message.memory_mib, message.vcpus) == (2**40, 2**32 - 1)
    needed = boot.memory_bytes(view, work)
    assert domains_pb2.ReserveMemoryRequest(bytes=needed).bytes == needed > 2**60


@pytest.mark.parametrize(
    ("value", "wanted"), [(None, 60), (0, 1), (-5, 1), (7, 7), (10**25, 365 * 24 * 3600)]
)
def test_seconds_to_wait_are_some_and_end(value: int | None, wanted: int) -> None:
    assert boot.seconds(value) == wanted


def test_a_default_netvm_that_provides_no_network_is_no_backend(view: View) -> None:
    work = record(view, WORK)
    work = replace(work, properties={k: v for k, v in work.properties.items() if k != "netvm"})
    view.apply(QubePut(work))
    for name in ("tmpl", "dom0"):
        view.apply(SystemPut("default_netvm", name))
        assert boot.netvm(view, work) is None
        assert boot.link(view, work) is None
    view.apply(SystemPut("default_netvm", "sys-net"))
    assert boot.netvm(view, work) == record(view, NET)


def test_an_hvm_qube_gets_an_emulator_and_its_memory(view: View) -> None:
    work = record(view, WORK)
    hvm = replace(work, properties={**work.properties, "virt_mode": "hvm", "stubdom_mem": "256"})
    view.apply(QubePut(hvm))
    domain = boot.domain(view, hvm, epoch=1, devices=[])
    assert domain.emulator is not None
    assert (domain.emulator.linux_stubdom, domain.emulator.memory_mib) == (True, 256)


def test_a_kernel_that_vanished_is_named(view: View) -> None:
    work = record(view, WORK)
    gone = replace(work, properties={**work.properties, "kernel": "5.9"})
    view.apply(QubePut(gone))
    with pytest.raises(Refusal, match=r"kernel 5\.9 of work is not installed"):
        boot.domain(view, gone, epoch=1, devices=[])


def test_required_devices_must_be_present_and_known(view: View) -> None:
    work = record(view, WORK)
    wanted = Assignment("pci", "dom0", "00_1f.2")
    view.apply(QubePut(replace(work, devices=(wanted,))))
    assert boot.missing_devices(view, record(view, WORK)) == (wanted,)
    view.apply(FactPut(DeviceFact(view.adminvm.uuid, "pci", "00_1f.2", "8086:1234::p020000")))
    assert boot.missing_devices(view, record(view, WORK)) == ()


def test_guest_keys_of_a_client(view: View) -> None:
    tree = guest_keys.boot_tree(view, record(view, WORK), timezone="Europe/Paris", seed=b"s" * 64)
    keys = dict(tree.write)
    assert keys["/name"] == "work"
    assert keys["/type"] == "AppVM"
    assert keys["/qubes-vm-persistence"] == "rw-only"
    assert keys["/qubes-base-template"] == "tmpl"
    assert keys["/qubes-ip"] == "10.137.0.3"
    assert keys["/qubes-gateway"] == "10.137.0.2"
    assert keys["/qubes-timezone"] == "Europe/Paris"
    assert keys["/qubes-vm-type"] == "AppVM"
    assert keys["/qubes-block-devices"] == ""
    assert "/qubes-netvm-gateway" not in keys
    assert tree.refused == ()
    assert all(PurePosixPath(key).is_absolute() for key in keys)


def test_guest_keys_of_a_netvm_name_its_clients(view: View) -> None:
    tree = guest_keys.boot_tree(view, record(view, NET), timezone="", seed=b"s" * 64)
    keys = dict(tree.write)
    assert keys["/qubes-vm-type"] == "NetVM"
    assert keys["/qubes-netvm-gateway"] == "10.137.0.2"
    assert keys["/connected-ips"] == "10.137.0.3"
    assert "/qubes-timezone" not in keys


def test_exported_features_reach_the_guest(view: View) -> None:
    work = record(view, WORK)
    view.apply(QubePut(replace(work, features={"service.cups": "", "vm-config.x": "y"})))
    keys = dict(guest_keys.exported_tree(view, record(view, WORK)).write)
    assert keys["/qubes-service/cups"] == "0"
    assert keys["/vm-config/x"] == "y"


def test_a_change_leaves_no_key_out_that_the_start_wrote(view: View) -> None:
    work = record(view, WORK)
    marks = {"check-updates": "", "updates-proxy-setup": "1", "service.guivm": "1"}
    view.apply(QubePut(replace(work, features=marks)))
    start = guest_keys.boot_tree(view, record(view, WORK), timezone="", seed=b"s" * 64)
    tree = guest_keys.exported_tree(view, record(view, WORK))
    below = [path for path in tree.remove if path.endswith("/")]
    for path, value in start.write:
        if path.startswith(tuple(below)):
            assert dict(tree.write)[path] == value
    assert dict(tree.write)["/qubes-service/qubes-update-check"] == "0"
    assert dict(tree.write)["/qubes-service/yum-proxy-setup"] == "1"
    assert dict(tree.write)["/guivm-windows-prefix"] == "GuiVM"
    view.apply(QubePut(replace(work, features={})))
    assert "/guivm-windows-prefix" in guest_keys.exported_tree(view, record(view, WORK)).remove


def test_display_and_sound_come_from_qubes_that_run(view: View) -> None:
    def keys(**properties: str) -> tuple[dict[str, str], tuple[str, ...]]:
        work = record(view, WORK)
        view.apply(QubePut(replace(work, properties={**work.properties, **properties})))
        tree = guest_keys.exported_tree(view, record(view, WORK))
        return dict(tree.write), tree.remove

    written, _ = keys()
    assert (written["/qubes-gui-domain-xid"], written["/qubes-audio-domain-xid"]) == ("0", "0")
    written, removed = keys(guivm="sys-net", audiovm="sys-net", keyboard_layout="de++")
    assert (written["/qubes-gui-domain-xid"], written["/qubes-audio-domain-xid"]) == ("7", "7")
    assert written["/keyboard-layout"] == "de++"
    assert "/qubes-audio-domain-xid" not in removed
    users = guest_keys.shown_or_heard_by(view, record(view, NET))
    assert [user.name for user in users] == []  # work is still starting: it reads them itself
    view.apply(QubePut(replace(record(view, WORK), run=Run(Phase.UP, "w"))))
    users = guest_keys.shown_or_heard_by(view, record(view, NET))
    assert [user.name for user in users] == ["work"]
    written, removed = keys(guivm="", audiovm="")
    assert written["/qubes-gui-enabled"] == "False"
    assert {"/keyboard-layout", "/qubes-gui-domain-xid", "/qubes-audio-domain-xid"} <= set(removed)


def test_a_relay_knows_the_names_of_its_remote_qubes(view: View) -> None:
    relay = record(view, NET)
    for number, (name, more) in enumerate((("far", {"remote_name": "x"}), ("away", {}))):
        uuid = f"33333333-3333-4333-8333-33333333333{number}"
        view.apply(QubePut(qube(uuid, name, 20 + number, "RemoteVM", relayvm="sys-net", **more)))
    tree = guest_keys.boot_tree(view, relay, timezone="", seed=b"s" * 64)
    assert dict(tree.write)["/remote/far"] == "x"
    assert dict(tree.write)["/remote/away"] == "away"
    assert "/remote/" in guest_keys.exported_tree(view, relay).remove


def test_a_netvm_is_told_what_its_client_is_shown(view: View) -> None:
    work = record(view, WORK)
    shown = dict(guest_keys.mapped_tree(view, work).write)
    assert shown == {
        "/mapped-ip/10.137.0.3/visible-ip": "10.137.0.3",
        "/mapped-ip/10.137.0.3/visible-gateway": "10.137.0.2",
    }
    view.apply(QubePut(replace(work, features={"net.fake-ip": "192.168.1.2"})))
    shown = dict(guest_keys.mapped_tree(view, record(view, WORK)).write)
    assert shown["/mapped-ip/10.137.0.3/visible-ip"] == "192.168.1.2"
    # Without a netvm it has none, but netvms that knew it have to forget one.
    view.apply(QubePut(replace(work, properties={**work.properties, "netvm": ""})))
    alone = record(view, WORK)
    assert guest_keys.own_addresses(view, alone) == ("10.137.0.3", "fd09:24ef:4179::a89:3")


@pytest.mark.parametrize("phase", [Phase.UP, Phase.STOPPING])
def test_a_halted_boot_is_stopped_once_it_was_up(view: View, phase: Phase) -> None:
    up = replace(record(view, WORK), run=Run(phase, "b00t"))
    gone = PowerFact(WORK, "b00t", 9, "halted")
    spec = stops.stopped(up, gone)
    assert spec is not None
    assert (spec.uuid, spec.boot_id) == (WORK, "b00t")


def test_news_of_another_boot_or_of_a_start_stop_nothing(view: View) -> None:
    up = replace(record(view, WORK), run=Run(Phase.UP, "b00t"))
    assert stops.stopped(up, PowerFact(WORK, "older", 9, "halted")) is None
    assert stops.stopped(up, PowerFact(WORK, "b00t", 9, "running")) is None
    assert stops.stopped(up, None) is None
    starting = record(view, WORK)
    assert stops.stopped(starting, PowerFact(WORK, "b00t", 9, "halted")) is None


def test_silence_is_looked_into_only_after_domains_has_reported(view: View) -> None:
    view.apply(QubePut(replace(record(view, WORK), run=Run(Phase.UP, "b00t"))))
    assert [q.name for q in stops.unaccounted(view)] == ["work"]
    silent = View()
    silent.apply_all(new_store("/pool", True))
    silent.apply(QubePut(record(view, WORK)))
    assert list(stops.unaccounted(silent)) == []


def test_a_start_waits_for_reports_and_a_create_does_not(view: View) -> None:
    assert unreported(view, "START") == ""
    view.apply(FactRemoved("kernel/6.1"))
    assert unreported(view, "START") == "storage"
    view.apply(FactPut(PoolFact("linux-kernel")))
    assert unreported(view, "START") == ""
    view.apply(FactRemoved("host"))
    assert unreported(view, "START") == unreported(view, "STOPPED") == "domains"
    assert unreported(view, "CREATE") == unreported(view, "KILL") == ""
