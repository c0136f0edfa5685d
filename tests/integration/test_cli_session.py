"""Every tool as a process against a whole instance: one session, as a person would have it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.instance import Instance, running

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

BIN = Path(sys.executable).parent


class Shell:
    """Runs tools against one instance."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance

    def run(self, name: str, *args: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """The tool's outcome."""
        return subprocess.run(
            [str(BIN / name), "--socket", str(self.instance.socket), *args],
            input=given,
            capture_output=True,
            check=False,
            timeout=120,
        )

    def ok(self, name: str, *args: str, given: bytes = b"") -> str:
        """Output of a tool that must succeed and say nothing on stderr."""
        done = self.run(name, *args, given=given)
        assert (done.returncode, done.stderr) == (0, b""), (name, args, done)
        return done.stdout.decode()

    def refused(self, name: str, *args: str, status: int = 1) -> str:
        """The one sentence of a tool that must be refused."""
        done = self.run(name, *args)
        assert done.returncode == status, (name, args, done)
        said = done.stderr.decode()
        assert said.count("\n") == 1, said
        assert "Traceback" not in said
        return said

    def states(self) -> dict[str, str]:
        """name -> state by qvm-ls."""
        lines = self.ok("qvm-ls", "--raw-data", "--fields", "NAME,STATE").splitlines()
        return dict(line.split("|") for line in lines)


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    """An instance with a kernel, a template and two qubes."""
    with running() as instance:
        kernel = instance.root / "kernel"
        kernel.write_bytes(b"k" * 4096)
        made = Shell(instance)
        subprocess.run(
            [str(BIN / "bulkhead"), "kernel", "add", "lab", "--vmlinuz", str(kernel),
             "--initramfs", str(kernel), "--root", str(instance.root)],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        made.ok("qubes-prefs", "default_kernel", "lab")
        made.ok("qvm-create", "--class", "TemplateVM", "--label", "black", "tmpl")
        made.ok("qvm-create", "-t", "tmpl", "-l", "green", "net",
                "--prop", "provides_network=True", "--prop", "netvm=")  # fmt: skip
        made.ok("qvm-create", "--template", "tmpl", "--label", "red", "work")
        made.ok("qvm-prefs", "work", "netvm", "net")
        yield made


def test_list_in_several_formats(shell: Shell) -> None:
    assert shell.ok("qvm-ls", "work", "net", "--raw-list") == "net\nwork\n"
    lines = shell.ok("qvm-ls").splitlines()
    assert lines[0].split() == ["NAME", "STATE", "CLASS", "LABEL", "TEMPLATE", "NETVM"]
    assert ["work", "Halted", "AppVM", "red", "tmpl", "net"] in [line.split() for line in lines]
    (row,) = json.loads(shell.ok("qvm-ls", "--json", "-O", "name,ip,vcpus", "work"))
    assert row["name"] == "work"
    assert row["ip"].startswith("10.137.")
    for form in ("network", "kernel", "full", "prefs", "disk"):
        assert "\nwork  " in shell.ok("qvm-ls", "--format", form)
    assert shell.ok("qvm-ls", "--tree", "--raw-data", "-O", "NAME", "net", "work") == (
        "net\n  work\n"
    )
    assert "there is no qube nope" in shell.refused("qvm-ls", "nope")


def test_the_one_call_shows_what_the_single_calls_show(shell: Shell) -> None:
    columns = "name,label,netvm,template,ip,vcpus,maxmem,kernel,virt_mode,xid"
    for line in shell.ok("qvm-ls", "--raw-data", "-O", columns).splitlines():
        name, *values = line.split("|")
        for column, value in zip(columns.split(",")[1:], values, strict=True):
            reply = shell.instance.call("admin.vm.property.Get", name, column)
            single = reply.text.split(" ", 2)[2] if reply.kind == "ok" else ""
            assert value == (single or "-"), (name, column)


def test_properties(shell: Shell) -> None:
    assert shell.ok("qvm-prefs", "work", "netvm") == "net\n"
    shell.ok("qvm-prefs", "work", "memory", "600")
    assert ["memory", "-", "600"] in [
        line.split() for line in shell.ok("qvm-prefs", "work").splitlines()
    ]
    shell.ok("qvm-prefs", "work", "--default", "memory")
    assert json.loads(shell.ok("qvm-prefs", "work", "--json"))["memory"] == "400"
    shell.ok("qvm-prefs", "work", "netvm", "none")
    assert shell.ok("qvm-prefs", "work", "netvm") == "None\n"
    shell.ok("qvm-prefs", "work", "netvm", "net")
    assert "colour" in shell.refused("qvm-prefs", "work", "colour")
    assert "vcpus" in shell.refused("qvm-prefs", "work", "vcpus", "many")
    assert "nope" in shell.refused("qvm-prefs", "nope")
    assert "default_kernel" in shell.ok("qubes-prefs")


def test_power(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"data")
    shell.ok("qvm-start", "work")
    assert shell.states()["work"] == "Running"
    assert shell.states()["net"] == "Running"
    assert "work is Running already" in shell.refused("qvm-start", "work")
    shell.ok("qvm-start", "--skip-if-running", "work")
    shell.ok("qvm-pause", "work")
    assert shell.run("qvm-check", "-q", "--paused", "work").returncode == 0
    shell.ok("qvm-unpause", "work")
    assert "not paused" in shell.refused("qvm-unpause", "work")
    assert "work" in shell.refused("qvm-shutdown", "net")
    refusal = shell.refused("qvm-volume", "import", "work:private", str(tmp_path / "data"))
    assert "not powered off" in refusal
    shell.ok("qvm-shutdown", "--wait", "--all")
    states = shell.states()
    assert (states["work"], states["net"]) == ("Halted", "Halted")
    shell.ok("qvm-start", "work")
    shell.ok("qvm-kill", "work")
    assert shell.states()["work"] == "Halted"
    assert "work" in shell.refused("qvm-kill", "work")
    shell.ok("qvm-shutdown", "--wait", "net")


def test_volumes(shell: Shell, tmp_path: Path) -> None:
    first = os.urandom(70000) + bytes(4 << 20) + b"one"
    second = b"two" * 5000
    (tmp_path / "first").write_bytes(first)
    shell.ok("qvm-volume", "import", "tmpl:root", str(tmp_path / "first"))
    assert shell.ok("qvm-volume", "info", "tmpl:root", "size") == f"{len(first)}\n"
    path = Path(shell.ok("qvm-volume", "info", "tmpl:root", "path").strip())
    committed = path.with_name("root.img")
    assert committed.read_bytes() == first
    assert committed.stat().st_blocks * 512 < 1 << 20
    shell.ok("qvm-volume", "import", "tmpl:root", "--size", str(len(second)), "-", given=second)
    assert committed.read_bytes() == second
    for size in (len(second) - 1, len(second) + 1):
        done = shell.run(
            "qvm-volume", "import", "tmpl:root", "--size", str(size), "-", given=second
        )
        assert done.returncode == 1
        assert committed.read_bytes() == second
    revisions = shell.ok("qvm-volume", "info", "tmpl:root", "revisions").split()
    assert len(revisions) == 1
    shell.ok("qvm-volume", "revert", "tmpl:root")
    assert committed.read_bytes() == first
    listed = json.loads(shell.ok("qvm-volume", "list", "--json", "--full", "tmpl"))
    assert {row["volume_name"] for row in listed} == {"root", "private", "volatile", "kernel"}
    shell.ok("qvm-volume", "resize", "work:private", "3G")
    assert shell.ok("qvm-volume", "info", "work:private", "size") == f"{3 << 30}\n"
    assert "--force" in shell.refused("qvm-volume", "resize", "work:private", "1G")
    shell.ok("qvm-volume", "config", "work:private", "rw", "False")
    assert shell.ok("qvm-volume", "info", "work:private", "rw") == "False\n"
    shell.ok("qvm-volume", "config", "work:private", "rw", "True")
    shell.ok("qvm-volume", "clear", "work:private")
    assert "no volume nope" in shell.refused("qvm-volume", "info", "work:nope")


def test_firewall(shell: Shell) -> None:
    assert [
        r["action"] for r in json.loads(shell.ok("qvm-firewall", "work", "list", "--json"))
    ] == ["accept"]
    shell.ok("qvm-firewall", "work", "reset")
    shell.ok("qvm-firewall", "work", "del", "--rule-no", "0")
    assert shell.ok("qvm-firewall", "--raw", "work") == "action=drop\n"
    shell.ok("qvm-firewall", "work", "add", "accept", "10.99.0.1/32", "tcp", "443")
    rule = "action=accept proto=tcp dst4=10.99.0.1/32 dstports=443-443\n"
    assert shell.ok("qvm-firewall", "--raw", "work") == rule
    shell.ok(
        "qvm-firewall", "work", "add", "--before", "0", "drop", "proto=icmp", "comment=no ping"
    )
    lines = shell.ok("qvm-firewall", "work").splitlines()
    assert lines[1].split()[:2] == ["0", "drop"]
    assert lines[1].endswith("no ping")
    assert lines[2].split()[:5] == ["1", "accept", "10.99.0.1/32", "tcp", "443"]
    shell.ok("qvm-firewall", "work", "del", "accept", "10.99.0.1", "tcp", "443")
    assert "no rule" in shell.refused("qvm-firewall", "work", "del", "--rule-no", "7")
    shell.ok("qvm-firewall", "--reload", "work")
    assert "nothing is enforced" in shell.ok("qvm-firewall", "work", "effective")
    shell.refused("qvm-firewall", "work", "add", "accept", "bad!host")


def test_features_tags_and_notes(shell: Shell) -> None:
    shell.ok("qvm-features", "work", "colour", "blue")
    assert shell.ok("qvm-features", "work", "colour") == "blue\n"
    shell.ok("qvm-service", "work", "cups", "on")
    assert shell.ok("qvm-service", "work") == "cups  on\n"
    assert "service.cups" in shell.ok("qvm-features", "work")
    shell.ok("qvm-service", "--default", "work", "cups")
    shell.ok("qvm-features", "--unset", "work", "colour")
    assert "no feature colour" in shell.refused("qvm-features", "work", "colour")

    shell.ok("qvm-tags", "work", "add", "secret", "mine")
    # Adding what is there is no change, and no error.
    shell.ok("qvm-tags", "work", "add", "mine")
    shell.ok("qvm-tags", "work", "del", "secret")
    assert "mine\n" in shell.ok("qvm-tags", "work")
    assert shell.run("qvm-tags", "work", "list", "secret").returncode == 1
    assert shell.ok("qvm-ls", "--tags", "mine", "--raw-list") == "work\n"

    shell.ok("qvm-notes", "work", "--set", "ünïcode")
    shell.ok("qvm-notes", "work", "--append", "more")
    assert shell.ok("qvm-notes", "work", "--print") == "ünïcode\nmore\n"
    shell.ok("qvm-notes", "work", "--delete", "--force")
    assert shell.ok("qvm-notes", "work") == ""


def test_pools(shell: Shell) -> None:
    root = shell.instance.root
    directory = root / "more"
    directory.mkdir()
    # As an administrator has to: the pool's directory belongs to the storage service.
    owner = (root / "var/lib/qubes/appvms").stat()
    os.chown(directory, owner.st_uid, owner.st_gid)
    shell.ok("qvm-pool", "add", "more", "file", "-o", f"dir_path={directory}")
    assert ["more", "file"] in [line.split() for line in shell.ok("qvm-pool").splitlines()]
    info = json.loads(shell.ok("qvm-pool", "info", "more", "--json"))
    assert (info["driver"], info["dir_path"]) == ("file", str(directory))
    shell.ok("qvm-create", "-l", "red", "-t", "tmpl", "-P", "private=more", "elsewhere")
    assert "more" in shell.refused("qvm-pool", "remove", "more")
    assert shell.ok("qvm-volume", "info", "elsewhere:private", "pool") == "more\n"
    assert len(json.loads(shell.ok("qvm-volume", "list", "--pool", "more", "--json"))) == 1
    shell.ok("qvm-remove", "-f", "elsewhere")
    shell.ok("qvm-pool", "remove", "more")
    assert "file-reflink" in shell.ok("qvm-pool", "drivers")


def test_devices(shell: Shell) -> None:
    assert shell.ok("qvm-device", "--list-device-classes") == "block\npci\n"
    assert "no block device" in shell.refused("qvm-block", "attach", "work", "dom0:sda")
    shell.ok("qvm-pci", "assign", "work", "dom0:00_1f.2", "--port")
    assert "work (required)" in shell.ok("qvm-pci", "list", "--assignments")
    shell.ok("qvm-clone", "work", "with-device")
    assert "with-device (required)" in shell.ok("qvm-pci", "list", "-s")
    shell.ok("qvm-remove", "--force", "with-device")
    shell.ok("qvm-pci", "unassign", "work", "dom0:00_1f.2")
    assert "work" not in shell.ok("qvm-pci", "list", "-s")


def _clones(shell: Shell, name: str) -> None:
    assert shell.ok("qvm-tags", name) == shell.ok("qvm-tags", "work")
    assert shell.ok("qvm-features", name) == shell.ok("qvm-features", "work")
    assert shell.ok("qvm-notes", name) == shell.ok("qvm-notes", "work")
    assert shell.ok("qvm-firewall", "--raw", name) == shell.ok("qvm-firewall", "--raw", "work")
    assert shell.ok("qvm-prefs", name, "netvm") == "net\n"
    assert shell.ok("qvm-prefs", name, "memory") == "333\n"


def test_clone_and_remove(shell: Shell, tmp_path: Path) -> None:
    data = os.urandom(50000)
    (tmp_path / "data").write_bytes(data)
    shell.ok("qvm-volume", "import", "work:private", str(tmp_path / "data"))
    shell.ok("qvm-prefs", "work", "memory", "333")
    shell.ok("qvm-tags", "work", "add", "copied")
    shell.ok("qvm-features", "work", "kept", "yes")
    shell.ok("qvm-notes", "work", "--set", "a note")
    shell.ok("qvm-clone", "work", "copy")
    _clones(shell, "copy")
    path = Path(shell.ok("qvm-volume", "info", "copy:private", "path").strip())
    assert path.with_name("private.img").read_bytes() == data
    assert "copy" in shell.refused("qvm-clone", "work", "copy")
    assert "tmpl" in shell.refused("qvm-remove", "--force", "tmpl")
    assert "work.template" in shell.refused("qvm-remove", "--force", "tmpl")
    assert shell.run("qvm-remove", "copy", given=b"n\n").returncode == 1
    shell.ok("qvm-remove", "copy", given=b"y\n")
    assert "copy" not in shell.states()
    assert not path.parent.exists()
    assert "nope" in shell.refused("qvm-remove", "-f", "nope")


def test_a_clone_made_of_the_calls_of_release_4_4(shell: Shell) -> None:
    """What our daemon refuses as one operation goes call by call."""
    shell.ok("qvm-prefs", "work", "memory", "333")
    shell.ok("qvm-clone", "--class", "StandaloneVM", "work", "alone")
    _clones(shell, "alone")
    assert shell.ok("qvm-ls", "--raw-data", "-O", "CLASS", "alone") == "StandaloneVM\n"
    roots = [
        Path(shell.ok("qvm-volume", "info", f"{name}:root", "path").strip()).with_name("root.img")
        for name in ("alone", "tmpl")
    ]
    assert roots[0].read_bytes() == roots[1].read_bytes()
    shell.ok("qvm-remove", "-f", "alone")


def test_a_standalone_from_a_template(shell: Shell) -> None:
    shell.ok("qvm-create", "-C", "StandaloneVM", "-t", "tmpl", "-l", "blue", "single")
    assert shell.ok("qvm-ls", "--raw-data", "-O", "CLASS,LABEL", "single") == "StandaloneVM|blue\n"
    shell.ok("qvm-remove", "-f", "single")


def test_disposables(shell: Shell) -> None:
    shell.ok("qvm-create", "-t", "tmpl", "-l", "orange", "dvm",
             "--prop", "template_for_dispvms=True", "--prop", "netvm=")  # fmt: skip
    name = shell.ok("qvm-run-disposable", "dvm").strip()
    assert shell.states()[name] == "Running"
    shell.ok("qvm-kill", name)
    shell.instance.until(lambda: name not in shell.states(), 20, f"{name} is gone")

    waiting = subprocess.Popen(
        [str(BIN / "qvm-run-disposable"), "--socket", str(shell.instance.socket), "--wait", "dvm"],
        stdout=subprocess.PIPE,
    )
    assert waiting.stdout is not None
    with waiting:
        name = waiting.stdout.readline().decode().strip()
        assert waiting.poll() is None
        shell.ok("qvm-shutdown", "--wait", name)
        assert waiting.wait(30) == 0
    assert name not in shell.states()
    assert "default_dispvm" in shell.refused("qvm-run-disposable")
    shell.ok("qvm-remove", "-f", "dvm")


def test_operations(shell: Shell) -> None:
    assert shell.ok("qvm-op", "list").splitlines()[1:] == []
    past = json.loads(shell.ok("qvm-op", "list", "--all", "--json"))
    made = next(r for r in past if r["kind"] == "CREATE" and r["qubes"] == ["work"])
    assert made["state"] == "succeeded"
    assert json.loads(shell.ok("qvm-op", "info", made["id"])) == made
    assert shell.ok("qvm-op", "watch", made["id"]).endswith(f"{made['id']} succeeded\n")
    assert "is over" in shell.refused("qvm-op", "cancel", made["id"])

    # An import that nobody finishes can be cancelled.
    internal = shell.instance.root / "run/qubesd.internal.sock"
    begun = shell.instance.call(
        "internal.vm.volume.ImportBegin", "work", "private", b"4096", socket_path=internal
    )
    assert begun.kind == "ok"
    (waiting,) = json.loads(shell.ok("qvm-op", "--json"))
    assert (waiting["kind"], waiting["state"]) == ("IMPORT", "waiting-data")
    shell.ok("qvm-op", "cancel", waiting["id"])
    done = shell.run("qvm-op", "watch", waiting["id"])
    assert done.returncode == 1
    assert b"cancelled" in done.stdout


def test_check_and_the_root_option(shell: Shell) -> None:
    assert shell.ok("qvm-check", "work") == "work: exists\n"
    assert shell.run("qvm-check", "work", "nope").returncode == 3
    done = subprocess.run(
        [str(BIN / "qvm-ls"), "--root", str(shell.instance.root), "--raw-list", "work"],
        capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"work\n")
