"""qvm-clone, qvm-create, qvm-remove, qvm-run-disposable: what they ask, and how they undo."""

from __future__ import annotations

from pathlib import Path

import pytest

from clients.cli import qvm_clone, qvm_create, qvm_remove, qvm_run_disposable
from tests.fakes.admin_daemon import AdminDaemon, Answer, Call, Raw, Refused

LIST = (
    "dom0 class=AdminVM state=Running uuid=0\n"
    "new class=AppVM state=Halted uuid=2\n"
    "work class=AppVM state=Halted uuid=1\n"
)
GET_ALL = (
    "name default=False type=str work\n"
    "qid default=False type=int 5\n"
    "label default=False type=label red\n"
    "template default=False type=vm tmpl\n"
    "netvm default=False type=vm \n"
    "vcpus default=True type=int 2\n"
    "memory default=False type=int 500\n"
)
# What release 4.4 answers: it does not know our calls.
OLD: dict[str, Answer] = {
    "admin.vm.List": LIST,
    "admin.vm.property.Get+template work": "default=False type=vm tmpl",
    "admin.vm.property.Get+label work": "default=False type=label red",
    "admin.vm.property.Get+netvm new": "default=True type=vm net",
    "admin.vm.property.Get+dns new": "default=True type=str ",
    "admin.vm.Create.AppVM": "",
    "admin.vm.Create.DispVM": "",
    "admin.vm.Create.StandaloneVM": "",
    "admin.vm.CreateInPool.AppVM": "",
    "admin.vm.property.GetAll work": GET_ALL,
    "admin.vm.property.Set": "",
    "admin.vm.tag.List": "created-by-dom0\nmine\n",
    "admin.vm.tag.Set": "",
    "admin.vm.feature.List": "f\n",
    "admin.vm.feature.Get": "1",
    "admin.vm.feature.Set": "",
    "admin.vm.notes.Get": "remember",
    "admin.vm.notes.Set": "",
    "admin.vm.firewall.Get": "action=drop\n",
    "admin.vm.firewall.Set": "",
    "admin.vm.volume.List": "root\nprivate\n",
    "admin.vm.volume.Info": "save_on_stop=True\nsnap_on_start=False\n",
    "admin.vm.volume.Info+root": "save_on_stop=False\nsnap_on_start=True\n",
    "admin.vm.volume.CloneFrom": "token",
    "admin.vm.volume.CloneTo": "",
    "admin.deviceclass.List": "block\npci\n",
    "admin.vm.device.block.Assigned": "",
    "admin.vm.device.pci.Assigned": (
        "dom0+00_1f.2:* device_id='*' port_id='00_1f.2' devclass='pci' backend_domain='dom0' "
        "mode='required' frontend_domain='work' _permissive='True'\n"
    ),
    "admin.vm.device.pci.Assign": "",
    "admin.vm.Remove": "",
}


def test_one_operation_where_the_daemon_has_it(tmp_path: Path) -> None:
    with AdminDaemon(tmp_path / "s", {"bulkhead.vm.Clone": ""}) as daemon:
        where = ["--socket", str(tmp_path / "s")]
        assert qvm_clone.main([*where, "work", "new"]) == 0
        assert qvm_clone.main([*where, "-C", "TemplateVM", "-P", "fast", "work", "new"]) == 0
        assert qvm_clone.main([*where, "-p", "root=a", "-p", "private:b", "work", "new"]) == 0
    assert [call.payload for call in daemon.calls] == [
        b"name=new",
        b"name=new class=TemplateVM pool=fast",
        b"name=new pool:root=a pool:private=b",
    ]
    assert daemon.briefs == ["bulkhead.vm.Clone work"] * 3


def test_its_refusal_is_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusal = Refused("QubesVMAlreadyExistsError", "new exists")
    with AdminDaemon(tmp_path / "s", {"bulkhead.vm.Clone": refusal}) as daemon:
        assert qvm_clone.main(["--socket", str(tmp_path / "s"), "work", "new"]) == 1
    assert len(daemon.calls) == 1
    assert capsys.readouterr().err == "qvm-clone: new exists\n"


def test_call_by_call_on_release_4_4(tmp_path: Path) -> None:
    with AdminDaemon(tmp_path / "s", OLD) as daemon:
        assert qvm_clone.main(["--socket", str(tmp_path / "s"), "work", "new"]) == 0
    made = [b for b in daemon.briefs if b.endswith(" new") or b.startswith("Create")]
    assert made == [
        "Create.AppVM+tmpl dom0",
        "property.Set+netvm new",
        "property.Set+memory new",
        "tag.Set+mine new",
        "feature.Set+f new",
        "notes.Set new",
        "firewall.Set new",
        "volume.List new",
        "volume.Info+root new",
        "volume.Info+private new",
        "volume.CloneTo+private new",
        "device.pci.Assign+dom0+00_1f.2+_ new",
    ]
    assert daemon.payload("Create.AppVM+tmpl dom0") == b"name=new label=red"
    assert daemon.payload("property.Set+netvm new") == b""
    assert daemon.payload("notes.Set new") == b"remember"
    assert daemon.payload("volume.CloneTo+private new") == b"token"
    assert daemon.payload("device.pci.Assign+dom0+00_1f.2+_ new") == (
        b"device_id='*' port_id='00_1f.2' devclass='pci' backend_domain='dom0' "
        b"mode='required' _permissive='True'"
    )


def test_devices_may_be_left_out(tmp_path: Path) -> None:
    with AdminDaemon(tmp_path / "s", {**OLD, "bulkhead.vm.Clone": ""}) as daemon:
        argv = ["--socket", str(tmp_path / "s"), "--ignore-devices", "work", "copy"]
        assert qvm_clone.main(argv) == 0
    assert "Create.AppVM+tmpl dom0" in daemon.briefs
    assert not [brief for brief in daemon.briefs if "device" in brief or "Clone " in brief]


def test_what_fails_half_way_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {**OLD, "admin.vm.tag.Set": Refused("PermissionDenied", "no tags")}
    with AdminDaemon(tmp_path / "s", answers) as daemon:
        where = ["--socket", str(tmp_path / "s")]
        assert qvm_clone.main([*where, "work", "new"]) == 1
        assert daemon.briefs[-1] == "Remove new"
        assert capsys.readouterr().err == "qvm-clone: no tags\n"
        daemon.calls.clear()
        assert qvm_clone.main([*where, "--ignore-errors", "work", "new"]) == 0
        assert "Remove new" not in daemon.briefs
        assert capsys.readouterr().err == "tag mine was not copied: no tags\n"


def test_a_change_of_class_that_is_no_operation(tmp_path: Path) -> None:
    answers = {
        **OLD,
        "bulkhead.vm.Clone": Refused("QubesValueError", "cannot be cloned as StandaloneVM"),
        "admin.vm.Create.StandaloneVM": "",
        "admin.vm.volume.Info new": "save_on_stop=True\nsnap_on_start=False\n",
        "admin.vm.volume.Info+root new": "save_on_stop=True\nsnap_on_start=False\n",
    }
    with AdminDaemon(tmp_path / "s", answers) as daemon:
        where = ["--socket", str(tmp_path / "s")]
        assert qvm_clone.main([*where, "-C", "StandaloneVM", "work", "new"]) == 0
    # What work takes from its template at each start comes from there.
    copies = [b for b in daemon.briefs if "CloneFrom" in b]
    assert copies == ["volume.CloneFrom+root tmpl", "volume.CloneFrom+private work"]


@pytest.mark.parametrize(
    "argv",
    [["work", "work"], ["-P", "a", "-P", "b", "x", "y"], ["-P", "a", "-p", "root=b", "x", "y"]],
)
def test_clone_usage(tmp_path: Path, argv: list[str]) -> None:
    with AdminDaemon(tmp_path / "s", {}) as daemon:
        assert qvm_clone.main(["--socket", str(tmp_path / "s"), *argv]) == 2
    assert daemon.calls == []


# ---- qvm-create


def test_create(tmp_path: Path) -> None:
    with AdminDaemon(tmp_path / "s", OLD) as daemon:
        where = ["--socket", str(tmp_path / "s"), "new", "-l", "red"]
        assert qvm_create.main([*where, "-t", "tmpl"]) == 0
        assert qvm_create.main([*where, "-P", "fast", "--prop", "netvm="]) == 0
        assert qvm_create.main([*where, "--prop", "netvm=none", "--prop", "dns=None"]) == 0
        assert [call.payload for call in daemon.calls if ".Set" in call.method] == [
            b"",
            b"",
            b"None",
        ]
        del daemon.calls[3:]
        assert qvm_create.main([*where, "--standalone"]) == 0
        assert qvm_create.main(["--socket", str(tmp_path / "s"), "d", "--disp", "-t", "dvm"]) == 0
    assert daemon.briefs == [
        "Create.AppVM+tmpl dom0",
        "CreateInPool.AppVM dom0",
        "property.Set+netvm new",
        "Create.StandaloneVM dom0",
        "Create.DispVM+dvm dom0",
    ]
    assert daemon.calls[-1].payload == b"name=d label=red"
    assert daemon.calls[0].payload == b"name=new label=red"
    assert daemon.calls[1].payload == b"name=new label=red pool=fast"


def test_a_property_that_is_refused_undoes_the_create(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {**OLD, "admin.vm.property.Set": Refused("QubesPropertyValueError", "not that")}
    with AdminDaemon(tmp_path / "s", answers) as daemon:
        argv = ["--socket", str(tmp_path / "s"), "new", "-l", "red", "--prop", "vcpus=x"]
        assert qvm_create.main(argv) == 1
    assert daemon.briefs == ["Create.AppVM dom0", "property.Set+vcpus new", "Remove new"]
    assert capsys.readouterr().err == "qvm-create: not that\n"


def test_a_standalone_begins_with_a_template(tmp_path: Path) -> None:
    answers = {**OLD, "bulkhead.vm.Clone": "", "admin.vm.volume.Clear": ""}
    with AdminDaemon(tmp_path / "s", answers) as daemon:
        argv = ["--socket", str(tmp_path / "s"), "new", "-l", "blue", "-C", "StandaloneVM"]
        assert qvm_create.main([*argv, "-t", "tmpl"]) == 0
    assert daemon.briefs == [
        "bulkhead.vm.Clone tmpl",
        "volume.Clear+private new",
        "property.Set+label new",
    ]
    assert daemon.calls[0].payload == b"name=new class=StandaloneVM"
    assert daemon.calls[2].payload == b"blue"


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ([], "a name is needed"),
        (["new"], "a label is needed"),
        (["new", "-l", "red", "--prop", "nothing"], "say NAME=VALUE"),
        (["new", "-l", "red", "--prop", "label=blue"], "label is given twice"),
        (["new", "-l", "red", "-C", "TemplateVM", "-t", "tmpl"], "qvm-clone copies one"),
    ],
)
def test_create_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], why: str
) -> None:
    with AdminDaemon(tmp_path / "s", {}) as daemon:
        assert qvm_create.main(["--socket", str(tmp_path / "s"), *argv]) == 2
    assert daemon.calls == []
    assert why in capsys.readouterr().err


# ---- qvm-remove


def test_remove_asks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return "n" if len(asked) == 1 else "yes"

    monkeypatch.setattr("builtins.input", answer)
    with AdminDaemon(tmp_path / "s", OLD) as daemon:
        argv = ["--socket", str(tmp_path / "s"), "work"]
        assert qvm_remove.main(argv) == 1
        assert daemon.calls == []
        assert qvm_remove.main(argv) == 0
        assert daemon.briefs == ["Remove work"]
    assert "nothing was removed" in capsys.readouterr().err


def test_remove_tells_who_needs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def system(call: Call) -> str:
        chosen = "tmpl" if call.arg == "default_template" else ""
        return f"default={not chosen} type=vm {chosen}"

    answers: dict[str, Answer] = {
        **OLD,
        "admin.vm.Remove tmpl": Refused("QubesVMInUseError", "tmpl is in use"),
        "admin.property.Get": system,
        "admin.vm.property.GetAll dom0": "",
        "admin.vm.property.GetAll new": GET_ALL,
    }
    with AdminDaemon(tmp_path / "s", answers):
        assert qvm_remove.main(["--socket", str(tmp_path / "s"), "-f", "tmpl"]) == 1
    said = capsys.readouterr().err
    assert "tmpl is in use" in said
    assert "system.default_template, new.template, work.template" in said


# ---- qvm-run-disposable


def test_a_disposable_is_created_started_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: dict[str, Answer] = {"admin.vm.CreateDisposable": "disp7", "admin.vm.Start": ""}
    with AdminDaemon(tmp_path / "s", answers) as daemon:
        assert qvm_run_disposable.main(["--socket", str(tmp_path / "s"), "dvm"]) == 0
        assert qvm_run_disposable.main(["--socket", str(tmp_path / "s")]) == 0
    assert capsys.readouterr().out == "disp7\ndisp7\n"
    assert daemon.briefs[:2] == ["CreateDisposable dvm", "Start disp7"]
    assert daemon.briefs[2] == "CreateDisposable dom0"


def test_a_disposable_that_does_not_start_is_discarded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: dict[str, Answer] = {
        "admin.vm.CreateDisposable": "disp7",
        "admin.vm.Start": Refused("QubesMemoryError", "no memory"),
        "admin.vm.Kill": Refused("QubesVMNotStartedError", "off"),
        "admin.vm.Remove": "",
    }
    with AdminDaemon(tmp_path / "s", answers) as daemon:
        assert qvm_run_disposable.main(["--socket", str(tmp_path / "s"), "dvm"]) == 1
    assert daemon.briefs[2:] == ["Kill disp7", "Remove disp7"]
    assert capsys.readouterr() == ("", "qvm-run-disposable: no memory\n")


@pytest.mark.parametrize(
    ("gone", "status"),
    [(b"1\0\0domain-delete\0vm\0disp7\0\0", 0), (b"1\0\0domain-delete\0vm\0other\0\0", 1)],
)
def test_waiting_for_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gone: bytes, status: int
) -> None:
    answers: dict[str, Answer] = {
        "admin.vm.CreateDisposable": "disp7",
        "admin.vm.Start": "",
        "admin.Events": Raw(b"1\0\0connection-established\0\0" + gone),
    }
    with AdminDaemon(tmp_path / "s", answers) as daemon:
        assert qvm_run_disposable.main(["--socket", str(tmp_path / "s"), "--wait", "d"]) == status
    # Its end cannot be missed: the events were asked for first.
    assert daemon.briefs[0] == "Events dom0"
    capsys.readouterr()
