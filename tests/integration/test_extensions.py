"""The example extension in a running instance: it refuses, and silence refuses too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.instance import PYTHON, Instance, exchange, parse

EXAMPLE = Path(__file__).parents[2] / "docs/extensions/deny_netvm/deny_netvm.py"
DECLARATION = EXAMPLE.with_suffix(".toml")
SERVICE = "ext-deny_netvm"
# One that fails where it should decide, and tries what is none of its business.
BROKEN = """
import socket, sys
from bulkhead.bus.runtime import serve

class Broken:
    async def ask(self, request, call):
        raise RuntimeError("a bug")

def reach(path):
    with socket.socket(socket.AF_UNIX) as peer:
        try:
            peer.connect(str(path))
        except OSError as error:
            return type(error).__name__
    return "connected"

async def build(context):
    run = context.settings.root / "run"
    for name in ("qubesd.sock", "qubesd.internal.sock",
                 "bulkhead/ext-deny_netvm/admin.sock", "bulkhead/ext-broken/admin.sock"):
        context.log.info("reach %s: %s", name, reach(run / name))
    return Broken()

serve("ext-broken", build, ["Extension"], arguments=sys.argv[1:])
"""


def write_broken(root: Path) -> Path:
    path = root / "broken.py"
    path.write_text(BROKEN)
    path.chmod(0o644)
    return path


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    made = Instance()
    try:
        directory = made.root / "etc/bulkhead/extensions"
        directory.mkdir(parents=True, exist_ok=True)
        # The declaration of the example itself, where its program is here.
        declared = DECLARATION.read_text().splitlines()
        command = f'command = ["{PYTHON}", "{EXAMPLE}"]'
        lines = [command if line.startswith("command") else line for line in declared]
        (directory / "deny_netvm.toml").write_text("\n".join(lines) + "\n")
        (directory / "broken.toml").write_text(
            f'command = ["{PYTHON}", "{write_broken(made.root)}"]\n'
            'vetoes = ["domain-feature-pre-set:broken"]\n'
            'grants = ["admin.vm.tag.List *", "admin.vm.tag.Set+seen *"]\n'
        )
        made.start()
        made.ok("admin.vm.Create.TemplateVM", "dom0", "", b"name=tmpl label=black")
        for name in ("net", "work", "free"):
            made.ok("admin.vm.Create.AppVM", "dom0", "tmpl", f"name={name} label=red".encode())
        made.ok("admin.vm.property.Set", "net", "provides_network", b"True")
        made.ok("admin.vm.tag.Set", "work", "offline")
        yield made
    finally:
        made.close()


def _netvm(instance: Instance, qube: str, value: bytes = b"net") -> str:
    reply = instance.call("admin.vm.property.Set", qube, "netvm", value)
    return "" if reply.kind == "ok" else reply.message


def _now(instance: Instance, qube: str) -> str:
    return instance.ok("admin.vm.property.Get", qube, "netvm").rpartition(" ")[2]


def test_it_runs_as_a_user_of_its_own(instance: Instance) -> None:
    status = Path(f"/proc/{instance.pid(SERVICE)}/status").read_text()
    uid = int(status.split("Uid:")[1].split()[0])
    if os.getuid() == 0:
        assert uid not in (0, Path(f"/proc/{instance.pid('adminapi')}").stat().st_uid)
        directory = (instance.root / "run/bulkhead" / SERVICE).stat()
        assert (directory.st_uid, directory.st_mode & 0o7777) == (uid, 0o2710)
    else:
        assert uid == os.getuid()


def test_it_refuses_what_it_is_declared_for(instance: Instance) -> None:
    before = instance.dump()
    said = _netvm(instance, "work")
    assert "extension deny_netvm refuses: the qube has the tag offline" in said
    assert instance.dump() == before
    assert _netvm(instance, "free") == ""
    assert _now(instance, "free") == "net"
    assert _netvm(instance, "work", b"") == ""


def test_silence_refuses_in_two_seconds_and_nothing_else_waits(instance: Instance) -> None:
    pid = instance.pid(SERVICE)
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        said = _netvm(instance, "free", b"")
        took = time.monotonic() - began
        assert "did not answer" in said
        assert 1.5 < took < 4.0
        began = time.monotonic()
        instance.ok("admin.vm.property.Set", "free", "label", b"blue")
        instance.ok("admin.vm.tag.Set", "free", "unrelated")
        assert time.monotonic() - began < 1.5
        assert _now(instance, "free") == "net"
    finally:
        os.kill(pid, signal.SIGCONT)
    instance.until(lambda: _netvm(instance, "free", b"") == "", 15, "it answers again")


def test_a_dead_one_refuses_until_it_runs_again(instance: Instance) -> None:
    old = instance.kill(SERVICE)
    instance.wait_restarted(SERVICE, old)
    instance.until(lambda: _netvm(instance, "free") == "", 15, "it answers again")
    assert "refuses" in _netvm(instance, "work")


def test_a_qube_that_gets_the_tag_loses_its_netvm(instance: Instance) -> None:
    """By events and by calls that were granted; also what it missed while it was dead."""
    instance.ok("admin.vm.Create.AppVM", "dom0", "tmpl", b"name=tagged label=red")
    for way in ("told", "missed"):
        assert _netvm(instance, "tagged") == ""
        if way == "missed":
            old = instance.pid(SERVICE)
            os.kill(old, signal.SIGSTOP)
        instance.ok("admin.vm.tag.Set", "tagged", "offline")
        if way == "missed":
            instance.kill(SERVICE)
            instance.wait_restarted(SERVICE, old)
        instance.until(lambda: _now(instance, "tagged") == "", 30, "it has no netvm")
        assert "refuses" in _netvm(instance, "tagged")
        instance.ok("admin.vm.tag.Remove", "tagged", "offline")


def test_one_that_fails_refuses_and_says_where_to_look(instance: Instance) -> None:
    reply = instance.call("admin.vm.feature.Set", "free", "broken", b"1")
    assert "extension broken failed" in reply.message and "ext-broken.log" in reply.message
    assert instance.call("admin.vm.feature.Get", "free", "broken").kind == "exc"
    log = (instance.root / "var/log/qubes/ext-broken.log").read_text()
    assert "RuntimeError: a bug" in log


def test_it_reaches_its_own_socket_alone(instance: Instance) -> None:
    log = (instance.root / "var/log/qubes/ext-broken.log").read_text()
    reached = dict(
        line.partition("reach ")[2].split(": ") for line in log.splitlines() if "reach " in line
    )
    # Without root all services share one user.
    others = "PermissionError" if os.getuid() == 0 else "connected"
    assert reached == {
        "qubesd.sock": others,
        "qubesd.internal.sock": others,
        f"bulkhead/{SERVICE}/admin.sock": others,
        "bulkhead/ext-broken/admin.sock": "connected",
    }


def test_it_may_make_the_calls_that_it_was_granted_and_no_other(instance: Instance) -> None:
    path = instance.root / "run/bulkhead/ext-broken/admin.sock"

    def call(text: bytes) -> str:
        return parse(exchange(path, text + b"\0")).kind

    assert call(b"admin.vm.tag.List+ dom0 name work") == "ok"
    assert call(b"admin.vm.tag.Set+seen whoever name work") == "ok"
    assert call(b"admin.vm.tag.Set+other dom0 name work") == "none"
    assert call(b"admin.vm.List+ dom0 name dom0") == "none"
    assert "seen" in instance.ok("admin.vm.tag.List", "work").split()
    directory = instance.root / "var/log/qubes/audit"

    def audited() -> bool:
        lines = [line for p in directory.iterdir() for line in p.read_text().splitlines()]
        records = [json.loads(line) for line in lines]
        return any(r["source"] == "ext-broken" and r.get("argument") == "seen" for r in records)

    instance.until(audited, 15, "the extension's call is in the audit log")


def test_status_shows_one_that_does_not_answer(instance: Instance) -> None:
    command = [PYTHON, "-m", "clients.cli.bulkhead", "status", "--root", str(instance.root)]

    def status() -> dict[str, bool]:
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
        rows = {row["service"]: row["ready"] for row in json.loads(done.stdout)}
        assert (done.returncode == 0) is all(rows.values())
        return rows

    instance.until(lambda: all(status().values()), 30, "all answer")
    assert status()["ext-broken"] and status()[SERVICE]
    assert SERVICE in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pid = instance.pid(SERVICE)
    os.kill(pid, signal.SIGSTOP)
    try:
        rows = status()
        assert not rows[SERVICE] and rows["ext-broken"] and rows["adminapi"]
    finally:
        os.kill(pid, signal.SIGCONT)
