"""An installation below a temporary DESTDIR: the tree, and that it runs."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from clients.cli.rpc import query
from deploy import completion
from deploy import services as rpc
from deploy.install import SOURCE, Installation, runtime_distributions, scripts, sysusers
from services.adminapi.core.calls import CALLS
from tests.instance import running

pytestmark = pytest.mark.integration
PREFIX = Path("/opt/bulkhead")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("destdir")
    for _ in range(2):  # a second run changes nothing and stumbles over nothing
        Installation(place, PREFIX).run()
    return place


def test_every_call_is_a_link_or_a_program(tree: Path) -> None:
    folder = tree / "etc/qubes-rpc"
    links = {path.name for path in folder.iterdir() if path.is_symlink()}
    programs = {path.name for path in folder.iterdir() if not path.is_symlink()}
    assert all(str((folder / name).readlink()) == rpc.SOCKET for name in links)
    assert links < set(CALLS["admin"])
    assert {"admin.vm.List", "admin.vm.Start", "admin.Events", "bulkhead.op.List"} <= links
    assert {"admin.vm.Suspend", "admin.vm.Resume", "admin.vm.Create.RemoteVM"}.isdisjoint(links)
    # Nothing internal is to be had through qrexec.
    assert not any(name.startswith("internal.") for name in links | programs)
    assert programs == {"admin.vm.Console", *CALLS["exec"], *CALLS["misc"]}
    for name in programs:
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o755
        assert f"exec {PREFIX}/.venv/bin/python -I -m " in (folder / name).read_text()


def test_commands_and_snippets(tree: Path) -> None:
    for name in scripts():
        assert str((tree / "usr/bin" / name).readlink()) == f"{PREFIX}/.venv/bin/{name}"
        command = tree / str(PREFIX).lstrip("/") / ".venv/bin" / name
        assert os.access(command, os.X_OK)
    unit = (tree / "usr/lib/systemd/system/bulkhead.service").read_text()
    assert f"ExecStart={PREFIX}/.venv/bin/bulkhead run" in unit
    sleep = (tree / "usr/lib/systemd/system/bulkhead-suspend.service").read_text()
    for when, call in (("Start", "Pre"), ("Stop", "Post")):
        (line,) = [x for x in sleep.splitlines() if x.startswith(f"Exec{when}=")]
        program, *words = line.removeprefix(f"Exec{when}=-").split()
        assert Path(program).name in scripts() and program.startswith(str(PREFIX))
        asked = query.parser().parse_args(words)
        assert asked.connect == "/run/qubesd.internal.sock"
        assert asked.method == f"internal.Suspend{call}" and asked.method in CALLS["internal"]
    users = (tree / "usr/lib/sysusers.d/bulkhead.conf").read_text()
    assert users == sysusers()
    assert 'u bulkhead-storage - "' in users
    assert "u bulkhead-hostd" not in users  # it stays root
    assert "d /run/bulkhead " in (tree / "usr/lib/tmpfiles.d/bulkhead.conf").read_text()
    rule = (tree / "usr/share/polkit-1/rules.d/50-bulkhead.rules").read_text()
    assert '"org.libvirt.unix.manage" && subject.user == "bulkhead-domains"' in rule


def test_nothing_names_the_place_it_was_made_in(tree: Path) -> None:
    for path in tree.rglob("*"):
        if path.is_symlink():
            assert not str(path.readlink()).startswith((str(tree), str(SOURCE))), path
        elif path.is_file() and "site-packages" not in path.parts:
            data = path.read_bytes()
            assert str(tree).encode() not in data, path
            assert str(SOURCE).encode() not in data, path


def test_the_installed_environment_is_whole(tree: Path) -> None:
    python = tree / str(PREFIX).lstrip("/") / ".venv/bin/python"
    code = (
        "import sys, zmq, uvloop, lxml.etree, libvirt, nftables, google.protobuf;"
        "from bulkhead.api import envelope_pb2; import clients.cli.bulkhead, clients.bus;"
        "import services.registry.engine, services.adminapi.handlers;"
        "print(clients.cli.bulkhead.__file__)"
    )
    done = subprocess.run(
        [str(python), "-I", "-c", code], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tree))
    done = subprocess.run(
        [str(python), "-I", "-m", "clients.cli.rpc.query", "--help"],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    assert "--single-line" in done.stdout
    assert {"pyzmq", "protobuf", "lxml", "uvloop"} <= set(runtime_distributions("qubes-bulkhead"))
    assert "pytest" not in runtime_distributions("qubes-bulkhead")


def test_the_installed_executables_answer(tmp_path: Path) -> None:
    prefix = tmp_path / "opt"
    Installation(tmp_path, prefix).run()
    # As if DESTDIR were the root: what the files name is where they say.
    prefix.symlink_to(tmp_path / str(prefix).lstrip("/"))
    with running() as instance:
        instance.ok("admin.vm.Create.StandaloneVM", payload=b"name=work label=red")

        def run(
            path: str, *argv: str, given: bytes = b"", source: str = "dom0"
        ) -> tuple[int, bytes]:
            done = subprocess.run(
                [str(tmp_path / path), *argv],
                input=given, capture_output=True, check=False, timeout=60, cwd="/",
                env={
                    "PATH": os.environ["PATH"],
                    "BULKHEAD_ROOT": str(instance.root),
                    "QREXEC_REMOTE_DOMAIN": source,
                    "QREXEC_REQUESTED_TARGET": "work",
                },
            )  # fmt: skip
            return done.returncode, done.stdout

        rpc_dir = "etc/qubes-rpc"
        sized, plain = (
            f"{rpc_dir}/admin.vm.volume.ImportWithSize",
            f"{rpc_dir}/admin.vm.volume.Import",
        )
        assert run(sized, "private", given=b"4096\n" + bytes(4096)) == (0, b"0\0")
        assert run(plain, "private", given=bytes(4096)) == (0, b"0\0")
        assert run(plain, "private", given=bytes(4095))[1].startswith(b"2\0QubesException\0\0")
        status, said = run(plain, "nosuch")
        assert (status, said[:16]) == (1, b"2\0ProtocolError\0")
        status, said = run(f"{rpc_dir}/admin.vm.Console")
        assert (status, said[:25]) == (1, b"2\0QubesVMNotRunningError\0")
        assert run(f"{rpc_dir}/qubes.NotifyUpdates", given=b"3\n", source="work") == (0, b"")
        query = "usr/bin/qubesd-query"
        call = ("dom0", "admin.vm.feature.Get", "work")
        assert run(query, "-e", "--fail", *call, "updates-available") == (0, b"0\0001")
        assert run(query, "-e", "--fail", *call, "nosuch")[0] == 2
        assert run(query, "-e", *call, "nosuch")[0] == 0
        assert (
            run(query, "--fail", "--single-line", "dom0", "admin.vm.tag.Set", "work", "a b")[0] == 1
        )
        status, said = run("usr/bin/qvm-ls", "--raw-list")
        assert (status, said) == (0, b"dom0\nwork\n")


def test_completions_are_what_the_parsers_accept(tree: Path) -> None:
    folder = tree / "usr/share/bash-completion/completions"
    assert {path.name for path in folder.iterdir()} == set(scripts())
    for path in folder.iterdir():
        subprocess.run(["bash", "-n", str(path)], check=True)
    parser = completion.parser_of(scripts()["qvm-volume"])
    assert parser.prog == "qvm-volume"
    said = subprocess.run(
        ["bash", "-c",
         f". {folder}/qvm-volume; COMP_WORDS=(qvm-volume import --s); COMP_CWORD=2;"
         '_qvm_volume; echo "${COMPREPLY[*]}"'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.split() == ["--size", "--socket"]
    said = subprocess.run(
        ["bash", "-c",
         f". {folder}/qvm-volume; COMP_WORDS=(qvm-volume re); COMP_CWORD=1;"
         '_qvm_volume; echo "${COMPREPLY[*]}"'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {"resize", "revert"} <= set(said.stdout.split())
