"""bulkhead init --adopt: a store as release 4.4 leaves it, with kills in between."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bulkhead import failpoints
from clients.admin import AdminClient
from clients.cli.instance import adoption as _adoption  # noqa: F401  (declares the failpoints)
from tests.instance import Instance

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]
RULES = (
    b"<?xml version='1.0' encoding='utf-8'?>\n<firewall version=\"2\"><rules><rule><properties>"
    b'<property name="action">accept</property><property name="dst4">10.99.0.1/32</property>'
    b"</properties></rule></rules></firewall>\n"
)
POINTS = sorted(name for name in failpoints.table() if name.startswith("adopt."))


class Old:
    """A machine whose /var/lib/qubes is as release 4.4 left it."""

    def __init__(self) -> None:
        self.instance = Instance()
        self.state = self.instance.root / "var/lib/qubes"
        self.instance.start()
        api = AdminClient.local(self.instance.root, timeout=60)
        api.call("admin.vm.Create.TemplateVM", payload=b"name=tmpl label=black")
        api.call("admin.vm.Create.AppVM", arg="tmpl", payload=b"name=work label=red")
        self.uuids = {line.name: line.uuid for line in api.qubes()}
        self.instance.stop()
        for path in self.state.glob("journal.sqlite*"):
            path.unlink()
        for path in (self.state / "firewall").iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)
        store = self.state / "qubes.xml"
        lines = [line for line in store.read_bytes().splitlines(True) if b"<?bulkhead" not in line]
        store.write_bytes(b"".join(lines))
        self.folder = self.state / "appvms/work"
        (self.folder / "firewall.xml").write_bytes(RULES)
        (self.folder / "notes.txt").write_text("ünicode\n")
        (self.state / "vm-templates/tmpl/notes.txt").write_text("of a template")
        if os.getuid() == 0:
            for path in (self.folder, *self.folder.iterdir()):
                os.chown(path, 0, 0)

    def adopt(self, armed: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "clients.cli.bulkhead", "init", "--adopt",
             "--root", str(self.instance.root)],
            capture_output=True, text=True, check=False, timeout=60,
            env={**os.environ, "BULKHEAD_FAILPOINTS": armed},
        )  # fmt: skip

    def moved(self) -> bool:
        """Each file is where services look, and is found from where 4.4 looks."""
        rules = self.state / f"firewall/{self.uuids['work']}.xml"
        notes = self.state / f"notes/{self.uuids['work']}.txt"
        links = [self.folder / "firewall.xml", self.folder / "notes.txt"]
        return (
            all(link.is_symlink() for link in links)
            and [str(link.readlink()) for link in links]
            == [f"../../firewall/{rules.name}", f"../../notes/{notes.name}"]
            and rules.read_bytes() == RULES
            and notes.read_text() == "ünicode\n"
        )


@pytest.fixture
def old() -> Iterator[Old]:
    made = Old()
    try:
        yield made
    finally:
        made.instance.close()


def test_rules_and_notes_are_kept(old: Old) -> None:
    done = old.adopt()
    assert done.returncode == 0, done.stderr
    assert "3 file(s)" in done.stdout
    assert old.moved()
    if os.getuid() == 0:
        storage = (old.state / "appvms").stat().st_uid
        assert storage != 0
        assert {path.lstat().st_uid for path in old.folder.iterdir()} == {storage}
    again = old.adopt()
    assert again.returncode == 0, again.stderr
    assert "0 file(s)" in again.stdout
    assert old.moved()
    old.instance.start()
    assert old.instance.ok("admin.vm.firewall.Get", "work") == ("action=accept dst4=10.99.0.1/32\n")
    assert old.instance.ok("admin.vm.notes.Get", "work") == "ünicode\n"
    assert old.instance.ok("admin.vm.notes.Get", "tmpl") == "of a template"
    refused = old.adopt()
    assert refused.returncode == 1
    assert "ours already" in refused.stderr


def test_a_kill_anywhere_loses_nothing(old: Old) -> None:
    assert len(POINTS) == 6 or os.getuid() != 0
    for point in POINTS:
        if os.getuid() != 0 and ".own." in point:
            continue
        for name, data in (("firewall.xml", RULES), ("notes.txt", "ünicode\n".encode())):
            (old.folder / name).unlink()
            (old.folder / name).write_bytes(data)
        for path in (*(old.state / "firewall").iterdir(), *(old.state / "notes").glob("*")):
            path.unlink()
        killed = old.adopt(f"{point}=kill")
        assert killed.returncode == -signal.SIGKILL, point
        assert (old.folder / "firewall.xml").read_bytes() == RULES, point
        assert (old.folder / "notes.txt").read_text() == "ünicode\n", point
        done = old.adopt()
        assert done.returncode == 0, (point, done.stderr)
        assert old.moved(), point


def test_refusals_change_nothing(old: Old) -> None:
    store = old.state / "qubes.xml"
    data = store.read_bytes()
    path = old.instance.root / "run/qubesd.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as daemon:
        daemon.bind(str(path))
        daemon.listen(1)
        done = old.adopt()
        assert (done.returncode, "stop it first" in done.stderr) == (1, True)
    path.unlink()
    store.write_bytes(b"<qubes")
    done = old.adopt()
    assert (done.returncode, "does not load" in done.stderr) == (1, True)
    store.unlink()
    done = old.adopt()
    assert (done.returncode, "nothing to adopt" in done.stderr) == (1, True)
    store.write_bytes(data)
    (old.folder / "firewall.xml").unlink()
    (old.folder / "firewall.xml").symlink_to("/etc/hostname")
    done = old.adopt()
    assert (done.returncode, "no file of its own" in done.stderr) == (1, True)
    assert (old.folder / "notes.txt").is_file()
    assert not (old.folder / "notes.txt").is_symlink()


def _with_thin_pool(old: Old, *moved: str) -> None:
    """Adopt a store with a pool of a driver that this build lacks, these volumes in it."""
    store = old.state / "qubes.xml"
    pool = b'<pool name="thin" driver="lvm_thin" volume_group="vg" thin_pool="tp"/></pools>'
    data = store.read_bytes()
    assert data.count(b"</pools>") == 1
    data = data.replace(b"</pools>", pool)
    for vid in moved:
        there = f'pool="varlibqubes" vid="{vid}"'.encode()
        assert data.count(there) == 1, data
        data = data.replace(there, b'pool="thin" vid="vg/vm-%s"' % vid.replace("/", "-").encode())
    store.write_bytes(data)
    assert old.adopt().returncode == 0
    old.instance.start()


def test_a_pool_that_this_build_cannot_use_takes_no_qube_and_holds_no_name(old: Old) -> None:
    _with_thin_pool(old)
    for payload in (
        b"name=x label=red pool=thin",
        b"name=x label=red pool:volatile=thin",
        b"name=x label=red pool:private=thin",
    ):
        # Refused for good, and what was made elsewhere is taken back: the name is free.
        reply = old.instance.call("admin.vm.CreateInPool.AppVM", arg="tmpl", payload=payload)
        assert reply.exception == "StoragePoolException", reply
        assert "lvm_thin" in reply.message
        assert not (old.state / "appvms/x").exists()
    old.instance.ok("admin.vm.Create.AppVM", arg="tmpl", payload=b"name=x label=red")


def test_a_qube_in_such_a_pool_is_refused_what_needs_its_data(old: Old) -> None:
    _with_thin_pool(old, "appvms/work/private")
    call = old.instance.call
    for _ in range(2):  # nothing of the first one is left in the way
        for method, arg, payload in (
            ("admin.vm.Start", "", b""),
            ("admin.vm.volume.Clear", "private", b""),
            ("admin.vm.volume.Resize", "private", b"4294967296"),
            ("admin.vm.volume.Revert", "private", b"1"),
        ):
            reply = call(method, "work", arg, payload)
            assert reply.exception == "StoragePoolException", (method, reply)
            assert "lvm_thin" in reply.message
        assert "power_state=Halted" in old.instance.ok("admin.vm.CurrentState", "work")
    old.instance.ok("admin.vm.volume.Info", "work", "private")
