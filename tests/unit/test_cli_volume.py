"""qvm-volume: data that come, and what the other subcommands ask."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.admin import importing
from clients.cli import qvm_create, tool
from clients.cli import qvm_volume as volume
from tests.fakes.admin_daemon import AdminDaemon, Call, Refused

BEGIN = "internal.vm.volume.ImportBegin"
END = "internal.vm.volume.ImportEnd"
HOLD = "bulkhead.vm.volume.ImportHold"
INFO = (
    "pool=p\nvid=appvms/work/private\nsize=1048576\nusage=4096\nrw=True\nsource=\n"
    "save_on_stop=True\nsnap_on_start=False\nrevisions_to_keep=1\nephemeral=False\n"
)


class Host:
    """The two sockets of a machine, and the place that an import writes to."""

    def __init__(self, directory: Path) -> None:
        self.target = directory / "import.img"
        self.target.touch()
        self.admin = AdminDaemon(
            directory / "qubesd.sock",
            {
                "admin.vm.List": "work class=AppVM state=Halted uuid=1\n",
                "admin.vm.volume.List": "private\n",
                "admin.vm.volume.Info": INFO,
                "admin.vm.volume.ListSnapshots": "1\n2\n",
                "admin.vm.volume.Revert": "",
                "admin.vm.volume.Resize": "",
                "admin.vm.volume.Clear": "",
                "admin.vm.volume.Set.rw": "",
                "admin.vm.volume.CloneFrom": "token",
                "admin.vm.volume.CloneTo": "",
            },
        )
        self.internal = AdminDaemon(
            directory / "qubesd.internal.sock", {BEGIN: self._begin, END: ""}
        )
        self.internal.aside = frozenset({HOLD})

    def _begin(self, call: Call) -> str:
        size = int(call.payload or 1 << 20)
        os.truncate(self.target, size)
        return f"{size} {self.target}"

    def run(self, *argv: str) -> int:
        return volume.main(["--socket", str(self.admin.path), *argv])


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    with made.admin, made.internal:
        yield made


def test_an_import_brings_the_bytes_and_leaves_holes(host: Host, tmp_path: Path) -> None:
    data = os.urandom(5000) + bytes(3 << 20) + b"end"
    (tmp_path / "image").write_bytes(data)
    assert host.run("import", "work:private", str(tmp_path / "image")) == 0
    assert host.target.read_bytes() == data
    assert host.target.stat().st_blocks * 512 < 1 << 20
    assert host.internal.briefs == [f"{BEGIN}+private work", f"{END}+private work"]
    assert host.internal.calls[0].payload == str(len(data)).encode()
    assert host.internal.calls[1].payload == b"ok"
    assert host.internal.calls[0].source == "dom0"


@pytest.mark.parametrize(("option", "left"), [("--root-copy-from", True), ("-R", False)])
def test_a_new_qube_takes_its_root_from_a_file(
    host: Host, tmp_path: Path, option: str, left: bool
) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"root")
    host.admin.answers = {"admin.vm.Create.StandaloneVM": "", "admin.vm.Remove": ""}
    argv = ["--socket", str(host.admin.path), "new", "-S", "-l", "red", option, str(image)]
    assert qvm_create.main(argv) == 0
    assert host.target.read_bytes() == b"root"
    assert host.internal.briefs == [f"{BEGIN}+root new", f"{END}+root new"]
    assert image.exists() == left
    # What did not arrive is not taken away, and the qube is.
    image.write_bytes(b"root")
    host.internal.answers = {BEGIN: Refused("StoragePoolException", "full")}
    assert qvm_create.main(argv) == 1
    assert image.exists()
    assert host.admin.briefs[-1] == "Remove new"


def test_an_import_without_resize_announces_nothing(host: Host, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x" * (1 << 20))
    assert host.run("import", "--no-resize", "work:private", str(tmp_path / "image")) == 0
    assert host.internal.calls[0].payload == b""
    assert host.target.read_bytes() == b"x" * (1 << 20)


@pytest.mark.parametrize(
    ("size", "why"),
    [("4", "there are more than the announced 4 bytes"), ("6", "the data end after 5 of 6 bytes")],
)
def test_the_wrong_number_of_bytes_fails_the_import(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str, why: str
) -> None:
    (tmp_path / "image").write_bytes(b"12345")
    host.internal.answers = {**host.internal.answers, END: Refused("QubesException", "discarded")}
    assert host.run("import", "work:private", "--size", size, str(tmp_path / "image")) == 1
    assert capsys.readouterr().err == f"qvm-volume: {why}\n"
    assert host.internal.calls[1].payload == f"fail\nDataError: {why}".encode()


def test_a_target_that_cannot_be_written_fails_the_import(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image").write_bytes(b"12345")
    host.internal.answers = {BEGIN: f"5 {tmp_path / 'gone'}", END: ""}
    assert host.run("import", "work:private", str(tmp_path / "image")) == 1
    assert "No such file" in capsys.readouterr().err
    assert host.internal.calls[1].payload.startswith(b"fail\nFileNotFoundError")
    assert not (tmp_path / "gone").exists()


def test_an_import_that_is_refused_is_not_ended(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image").write_bytes(b"12345")
    host.internal.answers = {BEGIN: Refused("QubesVMNotHaltedError", "work is running")}
    assert host.run("import", "work:private", str(tmp_path / "image")) == 1
    assert capsys.readouterr().err == "qvm-volume: work is running\n"
    assert len(host.internal.calls) == 1


def test_a_pipe_needs_its_size(
    host: Host, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    keep = os.open(fifo, os.O_RDWR)
    try:
        assert host.run("import", "work:private", str(fifo)) == 2
    finally:
        os.close(keep)
    assert "say --size" in capsys.readouterr().err
    assert host.run("import", "work:private", "x", "--size", "1", "--no-resize") == 2
    assert host.internal.calls == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=40),
            st.integers(1, 3 * importing.BLOCK).map(bytes),
            st.just(b"\1" * importing.BLOCK),
        ),
        max_size=8,
    )
)
def test_any_mixture_of_data_and_zeros_arrives(tmp_path_factory, parts: list[bytes]) -> None:  # type: ignore[no-untyped-def]
    target: Path = tmp_path_factory.mktemp("t") / "image"
    data = b"".join(parts)
    with target.open("wb") as file:
        file.truncate(len(data))
    importing.copy_data(io.BytesIO(data), target, len(data))
    assert target.read_bytes() == data


def test_through_qrexec_the_size_goes_before_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = tmp_path / "qrexec-client-vm"
    client.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"open({str(tmp_path / 'args')!r}, 'w').write(' '.join(sys.argv[1:]))\n"
        f"open({str(tmp_path / 'data')!r}, 'wb').write(sys.stdin.buffer.read())\n"
        "sys.stdout.write('0\\0')\n"
    )
    client.chmod(0o755)
    monkeypatch.setattr(volume, "QREXEC_CLIENT", str(client))
    bar = tool.Bar("", quiet=True)
    volume._through_qrexec("work", "root", io.BytesIO(b"abc"), 3, bar, resize=True)
    assert (tmp_path / "args").read_text() == "work admin.vm.volume.ImportWithSize+root"
    assert (tmp_path / "data").read_bytes() == b"3\nabc"
    volume._through_qrexec("work", "root", io.BytesIO(b"abc"), 3, bar, resize=False)
    assert (tmp_path / "args").read_text() == "work admin.vm.volume.Import+root"
    assert (tmp_path / "data").read_bytes() == b"abc"


# ---- the other subcommands


def test_list(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert host.run("list") == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "p:appvms/work/private",
        "work",
        "private",
        "Yes",
    ]
    assert host.run("list", "work:private", "--full", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["size"] == "1048576"
    assert host.run("list", "--pool", "other", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []
    assert host.run("list", "nope") == 1
    assert "there is no qube nope" in capsys.readouterr().err


def test_info(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert host.run("info", "work:private") == 0
    out = capsys.readouterr().out
    assert "size               1048576\n" in out
    assert out.endswith("Available revisions (for revert):\n  1\n  2\n")
    assert host.run("info", "work:private", "size") == 0
    assert host.run("info", "work:private", "revisions") == 0
    assert capsys.readouterr().out == "1048576\n1\n2\n"
    assert host.run("info", "work:private", "colour") == 1
    assert "no property colour" in capsys.readouterr().err
    assert host.run("info", "work") == 2
    assert "say VMNAME:VOLUME" in capsys.readouterr().err


def test_revert_takes_the_newest(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert host.run("revert", "work:private") == 0
    assert host.run("revert", "work:private", "1") == 0
    reverts = [c.payload for c in host.admin.calls if c.method.endswith("Revert")]
    assert reverts == [b"2", b"1"]
    host.admin.answers = {**host.admin.answers, "admin.vm.volume.ListSnapshots": ""}
    assert host.run("revert", "work:private") == 1
    assert "no revision to go back to" in capsys.readouterr().err


def test_resize(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert host.run("resize", "work:private", "2M") == 0
    assert host.run("extend", "work:private", "512K") == 1
    assert "--force" in capsys.readouterr().err
    assert host.run("resize", "-f", "work:private", "512K") == 0
    sizes = [c.payload for c in host.admin.calls if c.method.endswith("Resize")]
    assert sizes == [b"2097152", b"524288"]


def test_config_clear_and_clone(host: Host) -> None:
    assert host.run("config", "work:private", "rw", "False") == 0
    assert host.run("clear", "work:private") == 0
    assert host.run("clone", "other:private", "work:private") == 0
    assert host.admin.briefs == [
        "volume.Set.rw+private work",
        "volume.Clear+private work",
        "volume.CloneFrom+private other",
        "volume.CloneTo+private work",
    ]
    assert host.admin.payload("volume.CloneTo+private work") == b"token"
    with pytest.raises(SystemExit):
        host.run("config", "work:private", "size", "1")
