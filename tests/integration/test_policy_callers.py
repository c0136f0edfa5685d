"""Sockets of callers on a running instance: a management qube with two qubes of its own."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients.admin import AdminClient
from clients.admin.exceptions import (
    QubesDaemonAccessError,
    QubesDaemonCommunicationError,
    QubesVMNotFoundError,
)
from tests.instance import Instance, exchange, running

POLICY = """\
admin.vm.List * mgmt @adminvm allow target=dom0
admin.vm.List * mgmt @tag:created-by-mgmt allow target=dom0
admin.Events * mgmt @adminvm allow target=dom0
admin.Events * mgmt @tag:created-by-mgmt allow target=dom0
admin.vm.Create.AppVM +tmpl mgmt @adminvm allow target=dom0
admin.vm.Remove * mgmt @tag:created-by-mgmt allow target=dom0
"""
LOCAL = "mgmt @tag:created-by-mgmt allow target=dom0\n"
NEW = b"name=%s label=red"


def command(instance: Instance, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "clients.cli.bulkhead", "policy", *words]
    return subprocess.run(
        [*argv, "--root", str(instance.root)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[Instance, AdminClient, AdminClient]]:
    """The instance, dom0's client and the client of mgmt on its own socket."""
    with running() as instance:
        dom0 = AdminClient.local(instance.root, timeout=60)
        dom0.call("admin.vm.Create.TemplateVM", payload=NEW % b"tmpl")
        dom0.set("", "default_template", "tmpl")
        for name in (b"mgmt", b"secret"):
            dom0.call("admin.vm.Create.AppVM", payload=NEW % name)
        directory = instance.root / "etc/qubes/policy.d"
        assert command(instance, "includes", "--write", str(directory)).returncode == 0
        (directory / "include/admin-local-rwx").write_text(LOCAL)
        (directory / "30-user.policy").write_text(POLICY)
        path = command(instance, "open", "mgmt").stdout.strip()
        mgmt = AdminClient(path, source="dom0", timeout=60)
        instance.until(lambda: answers(mgmt), 20.0, "the policy is in force")
        mgmt.call("admin.vm.Create.AppVM", arg="tmpl", payload=NEW % b"own")
        yield instance, dom0, mgmt


def answers(client: AdminClient) -> bool:
    try:
        client.qubes()
    except QubesDaemonAccessError:
        return False
    return True


def names(client: AdminClient) -> set[str]:
    return {qube.name for qube in client.qubes()}


def test_the_caller_sees_its_own_qubes_and_no_other(
    world: tuple[Instance, AdminClient, AdminClient],
) -> None:
    _instance, dom0, mgmt = world
    assert names(mgmt) == {"dom0", "own"}
    assert {"mgmt", "secret", "tmpl"} < names(dom0)
    # The source is the socket's, whatever the frame says.
    assert dom0.text("admin.vm.tag.Get", "own", "created-by-mgmt") == "1"


def test_a_refusal_is_silence_whether_the_target_exists_or_not(
    world: tuple[Instance, AdminClient, AdminClient],
) -> None:
    instance, dom0, mgmt = world
    path = Path(str(mgmt.path))
    uuid = next(q.uuid for q in dom0.qubes() if q.name == "secret")
    for target in ("secret", "nosuch", f"uuid:{uuid}", "uuid:" + "0" * 35 + "1", "@dispvm", "a b"):
        for method in ("admin.vm.property.Get+netvm", "admin.vm.Start+", "admin.vm.Remove+"):
            frame = f"{method} dom0 name {target}".encode() + b"\0"
            assert exchange(path, frame) == b"", (method, target)
    for frame in (
        b"admin.label.List+ dom0 name dom0\0",
        b"admin.vm.List+ dom0 keyword default\0",
        b"bulkhead.caller.Open+ dom0 name own\0",
        b"internal.GetSystemInfo+ dom0 name dom0\0",
        b"garbage",
    ):
        assert exchange(path, frame) == b"", frame
    assert instance.state("secret") == "Halted"


def test_a_hidden_qube_in_argument_or_payload_is_as_one_that_is_not_there(
    world: tuple[Instance, AdminClient, AdminClient],
) -> None:
    _instance, _dom0, mgmt = world
    path = Path(str(mgmt.path))

    def both(shape: bytes) -> tuple[bytes, bytes]:
        return exchange(path, shape % b"secret"), exchange(path, shape % b"nosuch")

    for shape in (
        b"admin.vm.property.Set+netvm dom0 name own\0%s",
        b"admin.vm.property.Set+template dom0 name own\0%s",
        b"admin.vm.device.block.Assign+%s+sda dom0 name own\0mode='auto-attach'",
    ):
        hidden, absent = both(shape)
        assert hidden == absent and hidden.startswith(b"2\0QubesVMNotFoundError\0"), shape
        assert b"secret" not in hidden
    # Any backend would be the hidden ones too.
    for call in (b"Attach+_+sda dom0 name own\0", b"Assign+*+_ dom0 name own\0mode='required'"):
        answer = exchange(path, b"admin.vm.device.block." + call)
        assert answer.startswith((b"2\0QubesVMNotFoundError\0", b"2\0QubesValueError\0")), call
    # No rule allows the argument: silence for both.
    assert both(b"admin.vm.Create.AppVM+%s dom0 name dom0\0name=x label=red") == (b"", b"")


def test_events_of_own_qubes_only(world: tuple[Instance, AdminClient, AdminClient]) -> None:
    _instance, dom0, mgmt = world
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(mgmt.path))
        connection.sendall(b"admin.Events+ dom0 name dom0\0")
        connection.shutdown(socket.SHUT_WR)
        seen = connection.recv(65536)
        dom0.set("secret", "vcpus", "2")
        dom0.call("admin.vm.Create.AppVM", arg="tmpl", payload=NEW % b"secret2")
        dom0.call("admin.vm.Remove", "secret2")
        dom0.call("admin.vm.tag.Set", "own", "marked")
        while b"domain-tag-add:marked" not in seen:
            part = connection.recv(65536)
            assert part, "the stream ended"
            seen += part
    assert b"secret" not in seen
    assert seen.startswith(b"1\0\0connection-established\0\0")


def test_explain_names_file_and_line(world: tuple[Instance, AdminClient, AdminClient]) -> None:
    instance, _dom0, _mgmt = world
    directory = instance.root / "etc/qubes/policy.d"
    done = command(instance, "explain", "mgmt", "admin.vm.Start", "own")
    assert done.returncode == 0, done.stderr
    assert f"{directory}/include/admin-local-rwx:1: {LOCAL.strip()}" in done.stdout
    assert f"    included from {directory}/90-admin-default.policy:" in done.stdout
    done = command(instance, "explain", "mgmt", "admin.vm.Create.AppVM+tmpl", "@adminvm")
    assert done.returncode == 0 and f"{directory}/30-user.policy:5: " in done.stdout
    done = command(instance, "explain", "mgmt", "admin.vm.Start", "secret")
    assert done.returncode == 1 and "no rule matches" in done.stdout
    assert "no errors" in command(instance, "lint").stdout


def test_an_error_in_any_file_denies_everything_and_is_named(
    world: tuple[Instance, AdminClient, AdminClient],
) -> None:
    instance, _dom0, mgmt = world
    bad = instance.root / "etc/qubes/policy.d/99-bad.policy"
    bad.write_text("admin.vm.List * mgmt dom0 allow # why not\n")
    try:
        instance.until(lambda: not answers(mgmt), 20.0, "nothing is allowed")
        assert f"{bad}:1: parameter '#' is not possible here" in command(instance, "lint").stdout
        assert f"{bad}:1" in (instance.root / "var/log/qubes/adminapi.log").read_text()
        argv = [sys.executable, "-m", "clients.cli.bulkhead", "doctor", "--root"]
        doctor = subprocess.run(
            [*argv, str(instance.root)], capture_output=True, text=True, check=False, timeout=60
        )
        assert doctor.returncode == 1 and f"policy: {bad}:1" in doctor.stdout
        done = command(instance, "explain", "mgmt", "admin.vm.List", "dom0")
        assert done.returncode == 1 and f"{bad}:1" in done.stdout
    finally:
        bad.unlink()
    instance.until(lambda: answers(mgmt), 20.0, "the policy is in force again")


def test_a_socket_outlives_the_service_and_ends_with_its_qube(
    world: tuple[Instance, AdminClient, AdminClient],
) -> None:
    instance, dom0, mgmt = world
    path = instance.settings.callers_dir / "mgmt.sock"
    assert str(path) == mgmt.path and stat.S_IMODE(path.stat().st_mode) == 0o770
    assert command(instance, "callers").stdout == f"mgmt {path}\n"
    instance.wait_restarted("adminapi", instance.kill("adminapi"))

    def again() -> bool:
        try:
            return names(mgmt) == {"dom0", "own"}
        except (QubesDaemonAccessError, QubesDaemonCommunicationError):
            return False

    instance.until(again, 30.0, "the socket is served again")
    dom0.call("admin.vm.Create.AppVM", arg="tmpl", payload=NEW % b"short")
    other = Path(command(instance, "open", "short").stdout.strip())
    assert exchange(other, b"admin.vm.List+ short name dom0\0") == b""  # no rule for it
    with socket.socket(socket.AF_UNIX) as idle:
        idle.settimeout(30)
        idle.connect(str(other))
        dom0.call("admin.vm.Remove", "short")
        assert idle.recv(1) == b""
    assert not other.exists() and not other.with_suffix(".uuid").exists()
    assert command(instance, "close", "nosuch").returncode == 1
    assert command(instance, "open", "dom0").returncode == 1


def test_the_library_sees_a_refusal_as_no_access(
    world: tuple[Instance, AdminClient, AdminClient],
) -> None:
    _instance, _dom0, mgmt = world
    with pytest.raises(QubesDaemonAccessError):
        mgmt.get("secret", "vcpus")
    with pytest.raises(QubesVMNotFoundError):
        mgmt.set("own", "netvm", "secret")
    assert mgmt.get("own", "vcpus").value
