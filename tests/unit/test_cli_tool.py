"""What all tools have in common: options, exit statuses, sentences, selection, progress."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from clients.admin import AdminClient, QubeLine
from clients.cli import qvm_ls, qvm_op, qvm_pool, qvm_power, qvm_prefs, tool
from tests.fakes.admin_daemon import AdminDaemon, Answer, Raw, Refused

TWO = "dom0 class=AdminVM state=Running uuid=0\nwork class=AppVM state=Halted uuid=1\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "qubesd.sock"


@pytest.fixture(autouse=True)
def _directory(path: Path) -> None:
    path.parent.mkdir()


def test_socket_and_root_name_the_same_daemon(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with AdminDaemon(path, {"admin.vm.List": TWO}):
        assert qvm_ls.main(["--socket", str(path), "--raw-list"]) == 0
        assert qvm_ls.main(["--root", str(path.parent.parent), "--raw-list"]) == 0
        monkeypatch.setenv("QUBESD_SOCKET", str(path))
        assert qvm_ls.main(["--raw-list"]) == 0
        monkeypatch.delenv("QUBESD_SOCKET")
        monkeypatch.setenv("BULKHEAD_ROOT", str(path.parent.parent))
        assert qvm_ls.main(["--raw-list"]) == 0
    assert capsys.readouterr().out == "dom0\nwork\n" * 4


@pytest.mark.parametrize("before", [True, False])
def test_common_options_stand_before_or_after_the_subcommand(
    path: Path, capsys: pytest.CaptureFixture[str], before: bool
) -> None:
    where = ["--socket", str(path)]
    with AdminDaemon(path, {"admin.pool.List": "p\n", "admin.pool.Info": "driver=file\n"}):
        argv = [*where, "--json", "list"] if before else ["list", *where, "--json"]
        assert qvm_pool.main(argv) == 0
    assert json.loads(capsys.readouterr().out) == [{"name": "p", "driver": "file"}]


def test_socket_here_and_root_there_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert qvm_pool.main(["--root", "/a", "list", "--socket", "/b"]) == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        (Refused("QubesVMNotFoundError", "there is no x"), "qvm-prefs: there is no x\n"),
        (Refused("ProtocolError", "50% wrong"), "qvm-prefs: 50% wrong\n"),
        (Refused("PermissionDenied", "you may not"), "qvm-prefs: you may not\n"),
    ],
)
def test_a_refusal_is_one_sentence_and_status_1(
    path: Path, capsys: pytest.CaptureFixture[str], refusal: Refused, sentence: str
) -> None:
    with AdminDaemon(path, {"admin.vm.property.Get": refusal}):
        assert qvm_prefs.main(["--socket", str(path), "x", "netvm"]) == 1
        assert capsys.readouterr() == ("", sentence)
        assert qvm_prefs.main(["--socket", str(path), "-v", "x", "netvm"]) == 1
        assert capsys.readouterr().err == f"{sentence}qvm-prefs: ({refusal.name})\n"


def test_nobody_there_is_one_sentence(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qvm_ls.main(["--socket", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"qvm-ls: nobody answers at {path}")
    assert err.count("\n") == 1


def test_a_word_that_cannot_be_sent(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qvm_prefs.main(["--socket", str(path), "two words"]) == 1
    assert "cannot stand in an Admin API request" in capsys.readouterr().err


def test_usage_errors_are_status_2(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qvm_prefs.main(["--socket", str(path), "work", "netvm", "x", "--default"]) == 2
    assert "--default takes no value" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        qvm_prefs.main(["--no-such-option", "work"])
    assert caught.value.code == 2
    capsys.readouterr()


def test_an_interrupt_is_told(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: AdminClient, dest: str = "dom0") -> list[QubeLine]:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool.Client, "qubes", interrupted)
    assert qvm_ls.main(["--socket", str(path), "--raw-list"]) == 130
    assert "goes on" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error(path: Path) -> None:
    many = "".join(f"q{n} class=AppVM state=Halted uuid={n}\n" for n in range(30000))
    with AdminDaemon(path, {"admin.vm.List": many}):
        code = "import sys; from clients.cli.qvm_ls import main; sys.exit(main())"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "--socket", str(path), "--raw-list"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"q0\n"
        process.stdout.close()
        said = process.stderr.read()
        process.stderr.close()
        assert process.wait(30) == 0
    assert said == b""


# ---- small grammars


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("1K", 1024), ("3M", 3 << 20), ("2GiB", 2 << 30), ("1tb", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert tool.size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5G", "1X", "G", "1 G", "²"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(tool.UsageError):
        tool.size(text)


def test_truth() -> None:
    assert [tool.yes(word) for word in ("1", "on", "TRUE", "no", "0")] == [True] * 3 + [False] * 2
    with pytest.raises(tool.UsageError):
        tool.yes("maybe")


def test_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    tool.table([("A", "B"), ("long", ""), ("x", "y")])
    assert capsys.readouterr().out == "A     B\nlong\nx     y\n"


# ---- selection


def _lines(*names: str) -> list[QubeLine]:
    return [QubeLine(n, "AdminVM" if n == "dom0" else "AppVM", "Halted", "") for n in names]


def _args(*argv: str) -> argparse.Namespace:
    made = tool.parser("t", "")
    tool.selection(made, "all")
    return made.parse_args(argv)


def test_selection() -> None:
    lines = _lines("dom0", "work", "web", "vault")
    assert tool.selected(_args("work", "nope", "work"), lines) == ["work", "nope"]
    assert tool.selected(_args("w*", "vault"), lines) == ["work", "web", "vault"]
    assert tool.selected(_args("--all"), lines) == ["work", "web", "vault"]
    assert tool.selected(_args("--all", "--exclude", "w*"), lines) == ["vault"]
    assert tool.selected(_args("--all"), lines, lambda line: line.name == "web") == ["web"]
    with pytest.raises(tool.ToolError, match="no qube matches z"):
        tool.selected(_args("z*"), lines)
    for wrong in ([], ["--all", "work"], ["work", "--exclude", "web"]):
        with pytest.raises(tool.UsageError):
            tool.selected(_args(*wrong), lines)


def test_one_failure_does_not_keep_the_others_from_their_turn(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: dict[str, Answer] = {
        "admin.vm.List": TWO,
        "admin.vm.Kill a": Refused("QubesVMNotStartedError", "a is off"),
        "admin.vm.Kill b": "",
    }
    with AdminDaemon(path, answers) as daemon:
        assert qvm_power.kill(["--socket", str(path), "a", "b"]) == 1
        assert daemon.briefs == ["List dom0", "Kill a", "Kill b"]
    assert capsys.readouterr().err == "a was not killed: a is off\n"


# ---- progress


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


def _record(number: str, **more: object) -> str:
    record = {
        "id": number,
        "kind": "CLONE",
        "state": "running",
        "qubes": ["work"],
        "progress": 0.5,
        "text": "",
        "step": "ensure",
        "source": "dom0",
        "created": 1.0,
        "finished": 0.0,
    }
    return json.dumps({**record, **more})


def test_the_newest_unfinished_operation_of_that_kind_is_shown() -> None:
    lines = [
        _record("1", progress=0.1),
        _record("2", progress=0.3, text="copying"),
        _record("3", finished=5.0, progress=1.0),
        _record("4", qubes=["other"], progress=0.9),
        _record("5", kind="START", progress=0.8),
    ]
    assert tool.share_of(lines, "CLONE", "work") == (0.3, "copying")
    assert tool.share_of(lines, "CLONE", "") == (0.9, "ensure")
    assert tool.share_of(lines, "REMOVE", "work") == (0.0, "")


def test_a_bar_is_drawn_on_a_terminal_and_taken_away(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(tool, "PROGRESS_AFTER_S", 0.0)
    bar = tool.Bar("work", quiet=False)
    bar.show(0.5, "half")
    assert screen.getvalue().startswith("\rwork [###############...............]  50%")
    bar.clear()
    assert screen.getvalue().endswith("\r")


def test_no_bar_without_a_terminal_or_when_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "PROGRESS_AFTER_S", 0.0)
    bar = tool.Bar("work", quiet=False)
    bar.show(0.5)
    bar.clear()
    assert capsys.readouterr().err == ""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    tool.Bar("work", quiet=True).show(0.5)
    assert screen.getvalue() == ""


def test_progress_follows_the_operation(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Terminal):
        def write(self, text: str) -> int:
            if "half way" in text:
                drawn.set()
            return super().write(text)

    drawn = threading.Event()
    screen = Seen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(tool, "PROGRESS_AFTER_S", 0.0)
    monkeypatch.setattr(tool, "PROGRESS_PERIOD_S", 0.01)
    with AdminDaemon(path, {"bulkhead.op.List": _record("1", text="half way") + "\n"}):
        with tool.progress(AdminClient(path), "cloning", kind="CLONE", qube="work", quiet=False):
            assert drawn.wait(20)
    assert "50%" in screen.getvalue()


def test_progress_of_a_daemon_that_has_no_such_call(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(tool, "PROGRESS_AFTER_S", 0.0)
    with AdminDaemon(path, {}):
        with tool.progress(AdminClient(path), "cloning", kind="CLONE", quiet=False):
            pass
    assert screen.getvalue() == ""


# ---- qvm-op


def test_op_list_and_prefixes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = _record("aa1") + "\n" + _record("aa2", state="failed", error="broke") + "\n"
    answers: dict[str, Answer] = {"bulkhead.op.List": listed, "bulkhead.op.Cancel": ""}
    with AdminDaemon(path, answers) as daemon:
        where = ["--socket", str(path)]
        assert qvm_op.main(where) == 0
        out = capsys.readouterr().out.splitlines()
        assert len(out) == 2
        assert out[1].split()[:5] == ["aa1", "CLONE", "running", "work", "50%"]
        assert qvm_op.main([*where, "list", "--all"]) == 0
        assert capsys.readouterr().out.splitlines()[2].endswith("broke")
        assert qvm_op.main([*where, "cancel", "aa1"]) == 0
        assert daemon.briefs[-1] == "bulkhead.op.Cancel+aa1 dom0"
        assert qvm_op.main([*where, "cancel", "aa"]) == 1
        assert "2 operations begin with aa" in capsys.readouterr().err
        assert qvm_op.main([*where, "--json"]) == 0
        assert [r["id"] for r in json.loads(capsys.readouterr().out)] == ["aa1"]


def _event(state: str, error: str = "") -> bytes:
    pairs = (
        f"id\0aa1\0kind\0CLONE\0state\0{state}\0qubes\0work\0progress\0{0.5}\0step\0s\0text\0\0"
        f"error\0{error}\0\0"
    )
    return f"1\0\0bulkhead-operation\0{pairs}".encode()


@pytest.mark.parametrize(
    ("last", "status", "said"),
    [
        (_event("succeeded"), 0, "aa1 succeeded"),
        (_event("failed", "no space"), 1, "aa1 failed: no space"),
    ],
)
def test_op_watch_ends_with_the_operation(
    path: Path, capsys: pytest.CaptureFixture[str], last: bytes, status: int, said: str
) -> None:
    stream = b"1\0\0connection-established\0\0" + _event("running") + last
    answers: dict[str, Answer] = {
        "bulkhead.op.List": _record("aa1") + "\n",
        "bulkhead.op.Watch": Raw(stream),
    }
    with AdminDaemon(path, answers):
        assert qvm_op.main(["--socket", str(path), "watch", "aa"]) == status
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_op_watch_that_is_cut_off(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers: dict[str, Answer] = {
        "bulkhead.op.List": "",
        "bulkhead.op.Watch": Raw(_event("running")),
    }
    with AdminDaemon(path, answers):
        assert qvm_op.main(["--socket", str(path), "watch", "aa1"]) == 1
    assert "before the operation did" in capsys.readouterr().err


def test_every_console_script_has_an_entry_point() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    scripts: dict[str, str] = tomllib.loads(text)["project"]["scripts"]
    tools = {name: where for name, where in scripts.items() if name != "bulkhead"}
    assert len(tools) > 20
    for name, where in tools.items():
        module, _, function = where.partition(":")
        main = getattr(importlib.import_module(module), function)
        with pytest.raises(SystemExit) as caught:
            main(["--help"])
        assert caught.value.code == 0, name
