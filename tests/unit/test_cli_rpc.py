"""The executables of /etc/qubes-rpc and qubesd-query, as processes against small daemons."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.fakes.admin_daemon import AdminDaemon, Call, Raw, Refused

BEGIN = "internal.vm.volume.ImportBegin"
END = "internal.vm.volume.ImportEnd"
HOLD = "bulkhead.vm.volume.ImportHold"
TARGET = {
    "QREXEC_REMOTE_DOMAIN": "mgmt",
    "QREXEC_REQUESTED_TARGET": "work",
    "QREXEC_REQUESTED_TARGET_TYPE": "name",
}
DEPLOYED = Path(__file__).parents[2] / "deploy/qubes-rpc"


class Host:
    """The three sockets of a machine, and the place that an import writes to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "run").mkdir()
        self.target = root / "import.img"
        self.target.touch()
        self.admin = AdminDaemon(root / "run/qubesd.sock", {})
        self.internal = AdminDaemon(
            root / "run/qubesd.internal.sock", {BEGIN: self._begin, END: "ended"}
        )
        self.internal.aside = frozenset({HOLD})
        self.misc = AdminDaemon(root / "run/qubesd.misc.sock", {})

    def _begin(self, call: Call) -> str:
        size = int(call.payload or 1 << 20)
        os.truncate(self.target, size)
        return f"{size} {self.target}"

    def command(self, name: str, *argv: str) -> list[str]:
        """What the deployed script runs, with this interpreter."""
        if name == "qubesd-query":
            return [sys.executable, "-I", "-m", "clients.cli.rpc.query", *argv]
        line = (DEPLOYED / name).read_text().splitlines()[1]
        words = line.removeprefix("exec ").removesuffix(' "$@"').split()
        assert words[0] == "@PYTHON@"
        return [sys.executable, *words[1:], *argv]

    def run(
        self,
        name: str,
        *argv: str,
        given: bytes = b"",
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.command(name, *argv),
            input=given,
            capture_output=True,
            check=False,
            timeout=60,
            env=self.environment(environment),
        )

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("QREXEC_", "BULKHEAD_"))}
        return {**kept, "BULKHEAD_ROOT": str(self.root), **(TARGET if more is None else more)}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    with made.admin, made.internal, made.misc:
        yield made


# ---- import


def test_an_import_with_size(host: Host) -> None:
    data = os.urandom(5000) + bytes(3 << 20) + b"end"
    given = f"{len(data)}\n".encode() + data
    done = host.run("admin.vm.volume.ImportWithSize", "private", given=given)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"0\0ended", b"")
    assert host.target.read_bytes() == data
    assert host.target.stat().st_blocks * 512 < 1 << 20
    begin, end = host.internal.calls
    assert begin == Call(BEGIN, "work", "private", str(len(data)).encode(), "mgmt")
    assert end == Call(END, "work", "private", b"ok", "mgmt")


def test_who_brings_the_data_holds_on_until_the_end(host: Host) -> None:
    host.internal.aside = frozenset()
    done = host.run("admin.vm.volume.ImportWithSize", "private", given=b"3\nabc")
    # The service does not know the call here: it is done without.
    assert (done.returncode, done.stdout) == (0, b"0\0ended")
    begin, hold, end = host.internal.calls
    assert (begin.method, end.method) == (BEGIN, END)
    assert hold == Call(HOLD, "work", "private", b"", "mgmt")


def test_an_import_without_size_as_the_tools_of_dom0_run_it(host: Host) -> None:
    data = b"x" * (1 << 20)
    environment = {"QREXEC_REMOTE_DOMAIN": "dom0", "QREXEC_REQUESTED_TARGET": "work"}
    done = host.run("admin.vm.volume.Import", "root", given=data, environment=environment)
    assert (done.returncode, done.stdout) == (0, b"0\0ended")
    assert host.target.read_bytes() == data
    assert host.internal.calls[0] == Call(BEGIN, "work", "root", b"", "dom0")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (b"6\n12345", b"the data end after 5 of 6 bytes"),
        (b"4\n12345", b"there are more than the announced 4 bytes"),
    ],
)
def test_other_than_the_announced_bytes_end_the_import_as_failed(
    host: Host, given: bytes, why: bytes
) -> None:
    host.internal.answers = {**host.internal.answers, END: Refused("QubesException", "kept")}
    done = host.run("admin.vm.volume.ImportWithSize", "private", given=given)
    assert done.returncode == 0
    assert done.stdout == b"2\0QubesException\0\0kept\0"
    assert host.internal.calls[1].payload == b"fail\nDataError: " + why


def test_a_target_that_is_not_there_is_not_made(host: Host, tmp_path: Path) -> None:
    host.internal.answers = {BEGIN: f"5 {tmp_path / 'gone'}", END: "ended"}
    host.run("admin.vm.volume.ImportWithSize", "private", given=b"5\n12345")
    assert host.internal.calls[1].payload.startswith(b"fail\nFileNotFoundError")
    assert not (tmp_path / "gone").exists()


def test_a_refused_begin_is_handed_on_and_nothing_ended(host: Host) -> None:
    host.internal.answers = {BEGIN: Refused("QubesVMNotHaltedError", "running")}
    done = host.run("admin.vm.volume.Import", "private", given=b"")
    assert (done.returncode, done.stdout) == (1, b"2\0QubesVMNotHaltedError\0\0running\0")
    assert len(host.internal.calls) == 1


@pytest.mark.parametrize(
    "line", [b"", b"12", b"-1\n", b"\n", b"1 2\n", b"1" * 21 + b"\n", b"\xff\n"]
)
def test_a_size_that_is_none_begins_nothing(host: Host, line: bytes) -> None:
    done = host.run("admin.vm.volume.ImportWithSize", "private", given=line)
    assert done.returncode == 1
    assert done.stdout.startswith(b"2\0ProtocolError\0\0")
    assert done.stdout.endswith(b"\0")
    assert host.internal.calls == []


def test_a_stopped_import_is_ended_as_failed(host: Host) -> None:
    with subprocess.Popen(
        host.command("admin.vm.volume.ImportWithSize", "private"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=host.environment(),
    ) as process:  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(b"100\nabc")
        process.stdin.flush()
        while not host.target.stat().st_size or not host.target.read_bytes().startswith(b"abc"):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 1
    assert host.internal.calls[1].payload == b"fail\nStopped: stopped by SIGTERM"


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_an_import_that_is_stopped_while_it_begins_is_ended(
    host: Host, which: signal.Signals
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def begin(_call: Call) -> str:
        started[0].send_signal(which)
        time.sleep(0.2)
        return f"100 {host.target}"

    host.internal.answers = {BEGIN: begin, END: "ended"}
    with subprocess.Popen(
        host.command("admin.vm.volume.ImportWithSize", "private"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=host.environment(),
    ) as process:  # fmt: skip
        started.append(process)
        assert process.stdin is not None
        process.stdin.write(b"100\n")
        process.stdin.flush()
        assert process.wait(30) == 1
    assert [call.method for call in host.internal.calls] == [BEGIN, END]
    assert host.internal.calls[1].payload == b"fail\nStopped: stopped by " + which.name.encode()


def test_a_stop_behind_the_data_does_not_hide_what_came_of_them(host: Host) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def end(_call: Call) -> str:
        started[0].send_signal(signal.SIGTERM)
        time.sleep(0.2)
        return "ended"

    host.internal.answers = {**host.internal.answers, END: end}
    with subprocess.Popen(
        host.command("admin.vm.volume.ImportWithSize", "private"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=host.environment(),
    ) as process:  # fmt: skip
        started.append(process)
        said, _ = process.communicate(b"3\nabc", 30)
    assert said == b"0\0ended"
    assert host.internal.calls[1].payload == b"ok"


def test_without_a_caller_nothing_is_asked(host: Host) -> None:
    for name in ("admin.vm.volume.Import", "admin.vm.Console", "qubes.NotifyTools"):
        done = host.run(name, environment={"QREXEC_REQUESTED_TARGET": "work"})
        assert done.returncode == 1
        assert b"QREXEC_REMOTE_DOMAIN" in done.stderr
    assert host.admin.calls == host.internal.calls == host.misc.calls == []


# ---- what guests tell


def test_the_count_of_updates_is_handed_on_as_it_is(host: Host) -> None:
    host.misc.answers = {"qubes.NotifyUpdates": ""}
    done = host.run("qubes.NotifyUpdates", given=b" 12\nmore")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert host.misc.calls == [Call("qubes.NotifyUpdates", "dom0", "", b" 12", "mgmt")]


@pytest.mark.parametrize("name", ["qubes.FeaturesRequest", "qubes.NotifyTools"])
def test_a_notice_reads_no_input(host: Host, name: str) -> None:
    host.misc.answers = {name: ""}
    assert host.run(name, given=b"ignored").returncode == 0
    assert host.misc.calls == [Call(name, "dom0", "", b"", "mgmt")]


def test_a_refused_notice_tells_the_log_and_not_the_guest(host: Host) -> None:
    host.misc.answers = {"qubes.NotifyUpdates": Refused("ProtocolError", "no\x1b number")}
    done = host.run("qubes.NotifyUpdates", given=b"x")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"qubes.NotifyUpdates: mgmt: ProtocolError: no? number\n"
    host.misc.answers = {"qubes.NotifyUpdates": Raw(b"")}
    assert host.run("qubes.NotifyUpdates", given=b"1").returncode == 1


def test_an_endless_line_of_a_guest_is_not_read(host: Host) -> None:
    done = host.run("qubes.NotifyUpdates", given=b"1" * 100_000)
    assert done.returncode == 1
    assert host.misc.calls == []


# ---- console


def test_a_console_that_is_refused(host: Host) -> None:
    host.admin.answers = {"admin.vm.Console": Refused("QubesVMNotRunningError", "halted")}
    done = host.run("admin.vm.Console")
    assert (done.returncode, done.stdout) == (1, b"2\0QubesVMNotRunningError\0\0halted\0")
    assert host.admin.calls == [Call("admin.vm.Console", "work", "", b"", "mgmt")]


def test_a_qube_without_a_console(host: Host) -> None:
    host.admin.answers = {"admin.vm.Console": ""}
    done = host.run("admin.vm.Console")
    assert done.returncode == 1 and b"work has no console" in done.stderr
    assert not (host.root / "run/qubes/work.terminal.lock").exists()


def _read(handle: int, wanted: int) -> bytes:
    """That many bytes, each within 30 s."""
    data = b""
    while len(data) < wanted:
        assert select.select([handle], [], [], 30)[0], data
        data += os.read(handle, wanted - len(data))
    return data


@pytest.mark.parametrize("asked", ["work", "uuid:5c6e1b3e-0000-4000-8000-000000000001"])
def test_a_console_goes_both_ways_to_one_caller_at_a_time(host: Host, asked: str) -> None:
    guest, terminal = pty.openpty()
    host.admin.answers = {
        "admin.vm.Console": os.ttyname(terminal),
        "admin.vm.List": "work class=AppVM state=Running uuid=1\n",
    }
    environment = host.environment({**TARGET, "QREXEC_REQUESTED_TARGET": asked})
    with subprocess.Popen(
        host.command("admin.vm.Console"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\x03hello\n")
        process.stdin.flush()
        # Raw: neither is ^C a signal, nor is anything echoed.
        assert _read(guest, 7) == b"\x03hello\n"
        os.write(guest, b"login: ")
        assert _read(process.stdout.fileno(), 7) == b"login: "
        second = host.run("admin.vm.Console")
        assert (second.returncode, second.stdout) == (200, b"")
        assert (host.root / "run/qubes/work.terminal.lock").exists()
        os.write(guest, b"bye")
        process.stdin.close()
        assert process.stdout.read() == b"bye"
        assert process.wait(30) == 0
    with (host.root / "run/qubes/work.terminal.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(terminal)
    os.close(guest)


# ---- qubesd-query


def test_query_hands_the_reply_on(host: Host) -> None:
    host.admin.answers = {
        "admin.vm.tag.Set": "done",
        "admin.vm.List": Refused("ProtocolError", "x"),
    }
    done = host.run("qubesd-query", "dom0", "admin.vm.tag.Set", "work", "mine", given=b"load")
    assert (done.returncode, done.stdout) == (0, b"0\0done")
    assert host.admin.calls == [Call("admin.vm.tag.Set", "work", "mine", b"load", "dom0")]
    done = host.run("qubesd-query", "-e", "dom0", "admin.vm.List", "dom0", given=b"unread")
    assert (done.returncode, done.stdout) == (0, b"2\0ProtocolError\0\0x\0")
    assert host.admin.calls[1].payload == b""


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (Raw(b"0\0"), 0),
        (Raw(b"1\0\0connection-established\0\0"), 1),
        (Raw(b"2\0ProtocolError\0\0x\0"), 2),
        (Raw(b""), 1),
    ],
)
def test_query_fails_with_the_type(host: Host, answer: Raw, status: int) -> None:
    host.misc.answers = {"m": answer}
    options = ("-c", str(host.misc.path), "-e")
    assert host.run("qubesd-query", *options, "--fail", "dom0", "m", "dom0").returncode == status
    done = host.run("qubesd-query", *options, "--null", "dom0", "m", "dom0")
    assert (done.returncode, done.stdout) == (0, answer.data + b"\0")


def test_query_limits_what_it_reads(host: Host) -> None:
    host.admin.answers = {"m": ""}
    call = ("dom0", "m", "dom0")
    query = "qubesd-query"
    assert host.run(query, *call, given=b"x" * 65537).returncode == 1
    assert host.run(query, "--max-bytes", "4", *call, given=b"12345").returncode == 1
    assert host.run(query, "--single-line", *call, given=b"x" * 1024 + b"\n").returncode == 1
    assert (
        host.run(query, "--single-line", "--max-bytes", "3", *call, given=b"123\n").returncode == 1
    )
    assert host.run(query, "--single-line", *call, given=b"tab\t\n").returncode == 1
    for wrong in (("--max-bytes", "65537"), ("--null", "--fail"), ("-c", "x", "--root", "y")):
        assert host.run(query, *wrong, *call).returncode == 2
    assert host.run(query, "dom0", "a b", "dom0").returncode == 1
    assert host.admin.calls == []
    assert host.run(query, "--max-bytes", "4", *call, given=b"1234").returncode == 0
    assert host.run(query, "--single-line", *call, given=b"x" * 1023 + b"\nrest").returncode == 0
    assert [c.payload for c in host.admin.calls] == [b"1234", b"x" * 1023]


def test_query_leaves_what_stands_behind_the_line(host: Host) -> None:
    host.admin.answers = {"m": ""}
    reading, writing = os.pipe()
    os.write(writing, b"line\nrest")
    subprocess.run(
        host.command("qubesd-query", "--single-line", "dom0", "m", "dom0"),
        stdin=reading, check=True, capture_output=True, timeout=60, env=host.environment(),
    )  # fmt: skip
    assert os.read(reading, 100) == b"rest"
    os.close(reading)
    os.close(writing)
    assert host.admin.calls[0].payload == b"line"


def test_query_without_anybody_there(host: Host, tmp_path: Path) -> None:
    done = host.run("qubesd-query", "--root", str(tmp_path / "none"), "-e", "dom0", "m", "dom0")
    assert done.returncode == 1
    assert b"nobody answers" in done.stderr
