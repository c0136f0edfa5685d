"""Power, devices, features, services, tags, pools and notes: what is asked and shown."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.admin import AdminClient
from clients.cli import (
    qvm_device,
    qvm_features,
    qvm_notes,
    qvm_pool,
    qvm_power,
    qvm_tags,
    tool,
)
from tests.fakes.admin_daemon import AdminDaemon, Answer, Call, Refused


def _list(**states: str) -> str:
    return "dom0 class=AdminVM state=Running uuid=0\n" + "".join(
        f"{name} class=AppVM state={state} uuid={name}\n" for name, state in states.items()
    )


# ---- power


def test_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers: dict[str, Answer] = {
        "admin.vm.List": _list(off="Halted", on="Running"),
        "admin.vm.Start": "",
        "admin.vm.property.Get+autostart off": "default=False type=bool True",
        "admin.vm.property.Get+autostart on": "default=True type=bool False",
    }
    with AdminDaemon(tmp_path / "s", answers) as daemon:
        where = ["--socket", str(tmp_path / "s")]
        assert qvm_power.start([*where, "on", "off"]) == 1
        assert capsys.readouterr().err == "on was not started: on is Running already\n"
        assert daemon.briefs == ["List dom0", "Start off"]
        assert qvm_power.start([*where, "--skip-if-running", "on"]) == 0
        daemon.calls.clear()
        assert qvm_power.start([*where, "--all"]) == 0
        assert daemon.briefs[-1] == "Start off"
        assert "Start on" not in daemon.briefs


def test_start_with_a_drive(tmp_path: Path) -> None:
    answers: dict[str, Answer] = {
        "admin.vm.List": _list(work="Halted"),
        "admin.vm.device.block.Available": (
            "sda:1:2 device_id='1:2' port_id='sda' devclass='block' backend_domain='sys-usb'\n"
        ),
        "admin.vm.device.block.Assign": "",
        "admin.vm.device.block.Unassign": "",
        "admin.vm.Start": Refused("QubesMemoryError", "no memory"),
    }
    with AdminDaemon(tmp_path / "s", answers) as daemon:
        argv = ["--socket", str(tmp_path / "s"), "work", "--cdrom", "sys-usb:sda"]
        assert qvm_power.start(argv) == 1
    assert daemon.briefs[1:] == [
        "device.block.Available+sda sys-usb",
        "device.block.Assign+sys-usb+sda+1+2 work",
        "Start work",
        "device.block.Unassign+sys-usb+sda+1+2 work",
    ]
    assert daemon.calls[2].payload == (
        b"device_id='1:2' port_id='sda' devclass='block' backend_domain='sys-usb' "
        b"mode='required' _devtype='cdrom' _read-only='yes'"
    )


class Guests:
    """Qubes that go down some looks after they were asked; None = never."""

    def __init__(self, path: Path, **looks: int | None) -> None:
        self.looks: dict[str, int | None] = looks
        self.asked: set[str] = set()
        self.needed_by: dict[str, str] = {}
        answers: Mapping[str, Answer] = {
            "admin.vm.List": self._states,
            "admin.vm.Shutdown": self._shutdown,
            "admin.vm.Kill": self._kill,
        }
        self.daemon = AdminDaemon(path, answers)

    def _states(self, _call: Call) -> str:
        for name in self.asked:
            left = self.looks[name]
            if left:
                self.looks[name] = left - 1
        return _list(**{n: "Halted" if left == 0 else "Running" for n, left in self.looks.items()})

    def _shutdown(self, call: Call) -> str | Refused:
        user = self.needed_by.get(call.dest)
        if user and self.looks[user] != 0:
            return Refused("QubesVMInUseError", f"{user} uses it")
        self.asked.add(call.dest)
        return ""

    def _kill(self, call: Call) -> str:
        self.looks[call.dest] = 0
        return ""

    def run(self, *argv: str) -> int:
        return qvm_power.shutdown(["--socket", str(self.daemon.path), *argv])

    def asked_for(self) -> list[str]:
        return [brief for brief in self.daemon.briefs if not brief.startswith("List")]


def test_shutdown_asks_once_and_waits(tmp_path: Path) -> None:
    guests = Guests(tmp_path / "s", a=3, b=1)
    with guests.daemon:
        assert guests.run("--wait", "a", "b") == 0
    assert guests.asked_for() == ["Shutdown a", "Shutdown b"]
    assert guests.looks == {"a": 0, "b": 0}


def test_shutdown_without_wait_only_asks(tmp_path: Path) -> None:
    guests = Guests(tmp_path / "s", a=None)
    with guests.daemon:
        assert guests.run("--force", "a") == 0
    assert guests.asked_for() == ["Shutdown+force a"]


def test_shutdown_tells_whom_it_would_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guests = Guests(tmp_path / "s", a=None, b=None, c=0)
    with guests.daemon:
        assert guests.run("--all", "--exclude", "b", "--dry-run") == 0
    assert guests.asked_for() == []
    assert capsys.readouterr().out == "a\n"


def test_shutdown_kills_what_is_too_slow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guests = Guests(tmp_path / "s", a=None)
    with guests.daemon:
        assert guests.run("--wait", "--timeout", "0.1", "a") == 0
    assert guests.asked_for() == ["Shutdown a", "Kill a"]
    assert "a did not stop within" in capsys.readouterr().err


def test_what_others_use_goes_after_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guests = Guests(tmp_path / "s", net=1, work=1)
    guests.needed_by["net"] = "work"
    with guests.daemon:
        assert guests.run("net") == 1
        assert capsys.readouterr().err == "net was not shut down: work uses it\n"
        assert guests.run("--all", "--wait") == 0
    assert guests.looks == {"net": 0, "work": 0}


def test_shutdown_of_what_is_off_or_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guests = Guests(tmp_path / "s", off=0)
    with guests.daemon:
        assert guests.run("off") == 0
        assert guests.run("--wait", "nope") == 1
    assert guests.asked_for() == []
    assert capsys.readouterr().err == "nope was not shut down: there is no such qube\n"


def test_unpause_wakes_a_sleeping_one(tmp_path: Path) -> None:
    answers: dict[str, Answer] = {
        "admin.vm.List": _list(a="Paused", b="Suspended"),
        "admin.vm.CurrentState a": "mem=0 power_state=Paused",
        "admin.vm.CurrentState b": "mem=0 power_state=Suspended",
        "admin.vm.Unpause": "",
        "admin.vm.Resume": "",
        "admin.vm.Pause": "",
        "admin.vm.Suspend": "",
    }
    with AdminDaemon(tmp_path / "s", answers) as daemon:
        where = ["--socket", str(tmp_path / "s")]
        assert qvm_power.unpause([*where, "--all"]) == 0
        assert qvm_power.pause([*where, "a"]) == 0
        assert qvm_power.pause([*where, "-S", "a"]) == 0
        asked = [b for b in daemon.briefs if not b.startswith(("List", "CurrentState"))]
    assert asked == ["Unpause a", "Resume b", "Pause a", "Suspend a"]


# ---- devices

SAMPLE = (
    "1-1:1234:5678:ABC:u080650 device_id='1234:5678:ABC:u080650' port_id='1-1' "
    "devclass='testclass' backend_domain='sys-net' vendor='ACME' product='O\\'Brien stick' "
    "interfaces='u080650'"
)
UNKNOWN = (
    "1-2:0000:0000::?****** device_id='0000:0000::?******' port_id='1-2' "
    "devclass='testclass' backend_domain='sys-net'  interfaces='?******'"
)


def test_device_lines() -> None:
    first, second = qvm_device.parse_available("sys-net", [SAMPLE, UNKNOWN])
    assert (first.port, first.device) == ("1-1", "1234:5678:ABC:u080650")
    assert first.description == "ACME O'Brien stick"
    assert qvm_device.argument(first.ident) == "sys-net+1-1+1234+5678+ABC+u080650"
    assert second.fields["interfaces"] == "?******"
    assert second.description == "?"
    assert qvm_device.argument(second.ident) == "sys-net+1-2+0000+0000++_______"


_key = st.text(st.sampled_from("abcz_-.09"), min_size=1, max_size=6)
_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)


@given(st.dictionaries(_key, _text.filter(lambda t: "='" not in t), min_size=1, max_size=5))
def test_a_serialisation_survives(fields: dict[str, str]) -> None:
    # A backslash before a quote cannot be told from an escaped quote: the format's own limit.
    if any("\\" in value for value in fields.values()):
        fields = {key: value.replace("\\", "/") for key, value in fields.items()}
    if any("=" in value for value in fields.values()):
        fields = {key: value.replace("=", "-") for key, value in fields.items()}
    assert qvm_device.fields_of(qvm_device.written(fields).decode()) == fields


DEVICES: dict[str, Answer] = {
    "admin.vm.List": _list(**{"sys-net": "Running", "work": "Running"}),
    "admin.vm.device.testclass.Available": "",
    "admin.vm.device.testclass.Available sys-net": f"{SAMPLE}\n{UNKNOWN}\n",
    "admin.vm.device.testclass.Attached": "",
    "admin.vm.device.testclass.Attached work": (
        "sys-net+1-1:1234:5678:ABC:u080650 device_id='1234:5678:ABC:u080650' port_id='1-1' "
        "devclass='testclass' backend_domain='sys-net' mode='manual' frontend_domain='work'\n"
    ),
    "admin.vm.device.testclass.Assigned": "",
    "admin.vm.device.testclass.Assigned work": (
        "sys-net+1-2:* device_id='*' port_id='1-2' devclass='testclass' "
        "backend_domain='sys-net' mode='required' frontend_domain='work'\n"
    ),
    **{
        f"admin.vm.device.testclass.{verb}": ""
        for verb in ("Attach", "Detach", "Assign", "Unassign", "Set.assignment")
    },
    "admin.deviceclass.List": "block\ntestclass\n",
}


@pytest.mark.parametrize(
    ("argv", "asked", "payload"),
    [
        (
            ["attach", "work", "sys-net:1-1", "--ro"],
            "Attach+sys-net+1-1+1234+5678+ABC+u080650 work",
            b"device_id='1234:5678:ABC:u080650' port_id='1-1' devclass='testclass' "
            b"backend_domain='sys-net' mode='manual' _read-only='yes'",
        ),
        (
            ["assign", "work", "sys-net:1-1", "-o", "a=b"],
            "Assign+sys-net+1-1+1234+5678+ABC+u080650 work",
            b"device_id='1234:5678:ABC:u080650' port_id='1-1' devclass='testclass' "
            b"backend_domain='sys-net' mode='auto-attach' _a='b'",
        ),
        (
            ["assign", "work", "sys-net:1-9", "--port", "--required"],
            "Assign+sys-net+1-9+_ work",
            b"device_id='*' port_id='1-9' devclass='testclass' backend_domain='sys-net' "
            b"mode='required'",
        ),
        (
            ["assign", "work", "sys-net:1-1", "--device", "-a"],
            "Assign+sys-net+_+1234+5678+ABC+u080650 work",
            b"device_id='1234:5678:ABC:u080650' port_id='*' devclass='testclass' "
            b"backend_domain='sys-net' mode='ask-to-attach'",
        ),
        (
            ["assign", "work", "sys-net:1-2", "--port", "--ask"],
            "Set.assignment+sys-net+1-2+_ work",
            b"ask-to-attach",
        ),
        (["detach", "work"], "Detach+sys-net+1-1+1234+5678+ABC+u080650 work", b""),
        (["detach", "work", "sys-net:1-1"], "Detach+sys-net+1-1+1234+5678+ABC+u080650 work", b""),
        (["unassign", "work", "sys-net:1-2"], "Unassign+sys-net+1-2+_ work", b""),
    ],
)
def test_device_changes(tmp_path: Path, argv: list[str], asked: str, payload: bytes) -> None:
    with AdminDaemon(tmp_path / "s", DEVICES) as daemon:
        assert qvm_device.main(["--socket", str(tmp_path / "s"), "testclass", *argv]) == 0
    assert daemon.briefs[-1] == f"device.testclass.{asked}"
    assert daemon.calls[-1].payload == payload


@pytest.mark.parametrize(
    ("argv", "status", "why"),
    [
        (["attach", "work", "sys-net:9-9"], 1, "no testclass device at 9-9"),
        (["attach", "work", "sys-net"], 2, "say BACKEND:PORT"),
        (["detach", "work", "sys-net:1-2"], 1, "is not attached to work"),
        (["unassign", "work", "sys-net:1-2:1:2"], 1, "is not assigned to work"),
        (["assign", "work", "sys-net:1-1", "--port", "--device"], 2, "exclude each other"),
        (["list", "nope"], 1, "there is no qube nope"),
        (["list", "--exclude", "nope"], 1, "there is no qube nope"),
        (["list", "--all", "work"], 2, "not both"),
    ],
)
def test_device_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], status: int, why: str
) -> None:
    with AdminDaemon(tmp_path / "s", DEVICES):
        argv = ["--socket", str(tmp_path / "s"), "testclass", *argv]
        assert qvm_device.main(argv) == status
    assert why in capsys.readouterr().err


def test_device_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with AdminDaemon(tmp_path / "s", DEVICES):
        where = ["--socket", str(tmp_path / "s")]
        assert qvm_device.main([*where, "testclass", "list", "-s"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "BACKEND:DEVID  DESCRIPTION         USED BY",
            "sys-net:1-1    ACME O'Brien stick  work (attached)",
            "sys-net:1-2    ?                   work (required)",
        ]
        assert qvm_device.main([*where, "testclass", "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)
        assert [row["used_by"] for row in listed] == ["work (attached)", ""]
        for name, count in (("sys-net", 1), ("work", 2)):
            argv = [*where, "testclass", "list", "--all", "--exclude", name, "--json"]
            assert qvm_device.main(argv) == 0
            assert len(json.loads(capsys.readouterr().out)) == count
        for name, count in (("work", 1), ("sys-net", 2)):
            assert qvm_device.main([*where, "testclass", "list", "--json", name]) == 0
            assert len(json.loads(capsys.readouterr().out)) == count
        assert qvm_device.main([*where, "--list-device-classes"]) == 0
        assert capsys.readouterr().out == "block\ntestclass\n"


def test_a_pci_device_is_always_required(tmp_path: Path) -> None:
    answers: dict[str, Answer] = {
        "admin.vm.device.pci.Assigned": "",
        "admin.vm.device.pci.Assign": "",
    }
    with AdminDaemon(tmp_path / "s", answers) as daemon:
        argv = ["--socket", str(tmp_path / "s"), "assign", "work", "dom0:00_1f.2", "--port"]
        assert qvm_device.pci(argv) == 0
    assert b"mode='required'" in daemon.calls[-1].payload


# ---- features, services, tags

FEATURES: dict[str, Answer] = {
    "admin.vm.feature.List": "service.cups\nzeta\nservice.updates\n",
    "admin.vm.feature.Get+service.cups work": "1",
    "admin.vm.feature.Get+service.updates work": "",
    "admin.vm.feature.Get+zeta work": "z",
    "admin.vm.feature.Set": "",
    "admin.vm.feature.Remove": "",
}


def test_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with AdminDaemon(tmp_path / "s", FEATURES) as daemon:
        where = ["--socket", str(tmp_path / "s"), "work"]
        assert qvm_features.main(where) == 0
        assert (
            capsys.readouterr().out == "service.cups     1\nservice.updates\nzeta             z\n"
        )
        assert qvm_features.main([*where, "zeta"]) == 0
        assert capsys.readouterr().out == "z\n"
        assert qvm_features.main([*where, "zeta", ""]) == 0
        assert daemon.payload("feature.Set+zeta work") == b""
        assert qvm_features.main([*where, "--unset", "zeta"]) == 0
        assert daemon.briefs[-1] == "feature.Remove+zeta work"
        assert qvm_features.main([*where, "--unset"]) == 2
        assert qvm_features.main([*where, "--unset", "zeta", "1"]) == 2
        assert qvm_features.main([*where, "absent"]) == 1
        capsys.readouterr()


def test_services(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with AdminDaemon(tmp_path / "s", FEATURES) as daemon:
        where = ["--socket", str(tmp_path / "s"), "work"]
        assert qvm_features.service(where) == 0
        assert capsys.readouterr().out == "cups     on\nupdates  off\n"
        assert qvm_features.service([*where, "updates"]) == 0
        assert capsys.readouterr().out == "off\n"
        assert qvm_features.service([*where, "updates", "on"]) == 0
        assert qvm_features.service([*where, "-d", "cups"]) == 0
        assert daemon.payload("feature.Set+service.updates work") == b"1"
        assert daemon.payload("feature.Set+service.cups work") == b""
        assert qvm_features.service([*where, "-D", "cups"]) == 0
        assert daemon.briefs[-1] == "feature.Remove+service.cups work"
        for wrong in (["-e"], ["cups", "perhaps"], ["-e", "cups", "on"], ["-D", "cups", "on"]):
            assert qvm_features.service([*where, *wrong]) == 2
    capsys.readouterr()


def test_tags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers: dict[str, Answer] = {
        "admin.vm.tag.List": "a\nb\n",
        "admin.vm.tag.Get": "0",
        "admin.vm.tag.Get+a work": "1",
        "admin.vm.tag.Set": "",
        "admin.vm.tag.Remove": "",
    }
    with AdminDaemon(tmp_path / "s", answers) as daemon:
        where = ["--socket", str(tmp_path / "s"), "work"]
        assert qvm_tags.main(where) == 0
        assert qvm_tags.main([*where, "list", "a"]) == 0
        assert capsys.readouterr().out == "a\nb\na\n"
        assert qvm_tags.main([*where, "list", "c"]) == 1
        assert qvm_tags.main([*where, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == ["a", "b"]
        assert qvm_tags.main([*where, "add", "x", "y"]) == 0
        assert qvm_tags.main([*where, "del", "x"]) == 0
        assert daemon.briefs[-3:] == ["tag.Set+x work", "tag.Set+y work", "tag.Remove+x work"]


# ---- pools and notes


def test_pools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers: dict[str, Answer] = {
        "admin.pool.List": "a\nb\n",
        "admin.pool.Info": "driver=file\nsize=10\n",
        "admin.pool.UsageDetails": "data_size=10\n",
        "admin.pool.ListDrivers": "file dir_path revisions_to_keep\n",
        "admin.pool.Add": "",
        "admin.pool.Set.revisions_to_keep": "",
        "admin.pool.Remove": "",
        "admin.pool.Remove+b": Refused("QubesPoolInUseError", "b is in use"),
    }
    with AdminDaemon(tmp_path / "s", answers) as daemon:
        where = ["--socket", str(tmp_path / "s")]
        assert qvm_pool.main(where) == 0
        assert capsys.readouterr().out == "NAME  DRIVER\na     file\nb     file\n"
        assert qvm_pool.main([*where, "info", "a"]) == 0
        assert capsys.readouterr().out == (
            "name       a\ndriver     file\nsize       10\ndata_size  10\n"
        )
        assert qvm_pool.main([*where, "drivers"]) == 0
        assert capsys.readouterr().out == "DRIVER  OPTIONS\nfile    dir_path, revisions_to_keep\n"
        assert qvm_pool.main([*where, "add", "c", "file", "-o", "x=1,y=2", "-o", "z=3"]) == 0
        assert daemon.payload("pool.Add+file dom0") == b"name=c\nx=1\ny=2\nz=3\n"
        assert qvm_pool.main([*where, "set", "a", "-o", "revisions_to_keep=2"]) == 0
        assert daemon.payload("pool.Set.revisions_to_keep+a dom0") == b"2"
        assert qvm_pool.main([*where, "remove", "b", "a"]) == 1
        assert daemon.briefs[-1] == "pool.Remove+a dom0"
        assert capsys.readouterr().err == "b was not removed: b is in use\n"
        for wrong in (
            ["set", "a"],
            ["set", "a", "-o", "x=1"],
            ["add", "c", "file", "-o", "x"],
            ["add", "c", "file", "-o", "x=1,x=2"],
            ["add", "c", "file", "-o", "name=d"],
        ):
            assert qvm_pool.main([*where, *wrong]) == 2
    capsys.readouterr()


class Notes:
    """A qube whose notes the fake daemon keeps."""

    def __init__(self, path: Path, text: str) -> None:
        self.text = text
        answers: dict[str, Answer] = {
            "admin.vm.notes.Get": lambda call: self.text,
            "admin.vm.notes.Set": self._set,
        }
        self.daemon = AdminDaemon(path, answers)

    def _set(self, call: Call) -> str:
        self.text = call.payload.decode()
        return ""

    def run(self, *argv: str) -> int:
        return qvm_notes.main(["--socket", str(self.daemon.path), "work", *argv])


def test_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Notes(tmp_path / "s", "")
    with notes.daemon:
        assert notes.run("--set", "één") == 0
        assert notes.run("--append", "two") == 0
        assert notes.run("--print") == 0
        assert capsys.readouterr().out == "één\ntwo\n"
        monkeypatch.setattr(sys, "stdin", io.StringIO("other\n"))
        assert notes.run("--import", "-") == 1
        assert "--force replaces them" in capsys.readouterr().err
        monkeypatch.setattr(sys, "stdin", io.StringIO("other\n"))
        assert notes.run("--force", "--import", "-") == 0
        assert notes.text == "other\n"
        monkeypatch.setattr("builtins.input", lambda question: "no")
        assert notes.run("--delete") == 1
        assert notes.run("--delete", "-f") == 0
        assert notes.text == ""
    capsys.readouterr()


def test_notes_in_an_editor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Notes(tmp_path / "s", "before\n")
    monkeypatch.setenv("VISUAL", "sed -i s/before/after/")
    with notes.daemon:
        assert notes.run("--edit") == 0
        assert notes.text == "after\n"
        monkeypatch.setenv("VISUAL", "false")
        assert notes.run("--edit") == 1
        assert notes.text == "after\n"
    assert "nothing was changed" in capsys.readouterr().err


def test_too_long_notes_are_refused_here(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "s", "")
    with notes.daemon:
        with pytest.raises(tool.ToolError, match="65536 are allowed"):
            tool.Client(notes.daemon.path).call("admin.vm.notes.Set", "work", payload=b"x" * 70000)
        assert AdminClient(notes.daemon.path).call("admin.vm.notes.Get", "work") == b""
