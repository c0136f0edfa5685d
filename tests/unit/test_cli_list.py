"""qvm-ls, qvm-check, qvm-prefs, qubes-prefs: what is shown of qubes, and how."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients.cli import qubes_prefs, qvm_check, qvm_ls, qvm_prefs
from tests.fakes.admin_daemon import AdminDaemon, Answer, Refused

LIST = (
    "dom0 class=AdminVM state=Running uuid=u0\n"
    "net class=AppVM state=Running uuid=u1\n"
    "tmpl class=TemplateVM state=Halted uuid=u2\n"
    "work class=AppVM state=Paused uuid=u3\n"
)
PROPERTIES = {
    "dom0": {"label": "black"},
    "net": {"label": "red", "template": "tmpl", "netvm": "", "ip": "10.0.0.1", "qid": "2"},
    "tmpl": {"label": "black", "netvm": "", "qid": "10", "updateable": "True"},
    "work": {"label": "blue", "template": "tmpl", "netvm": "net", "ip": "10.0.0.2", "qid": "3"},
}
TYPES = {"label": "label", "template": "vm", "netvm": "vm", "qid": "int"}


def _get_all(name: str) -> str:
    return "".join(
        f"{key} default={key == 'ip'} type={TYPES.get(key, 'str')} {value}\n"
        for key, value in PROPERTIES[name].items()
    )


OLD: dict[str, Answer] = {
    "admin.vm.List": LIST,
    **{f"admin.vm.property.GetAll {name}": _get_all(name) for name in PROPERTIES},
    "admin.vm.tag.List": "a\n",
    "admin.vm.tag.List work": "a\nb\n",
    "admin.vm.feature.Get": Refused("QubesFeatureNotFoundError", "none"),
    "admin.vm.feature.Get+gui work": "1",
    "admin.vm.feature.Get+servicevm net": "1",
    "admin.vm.volume.Info": Refused("PermissionDenied", "no such volume"),
    "admin.vm.volume.Info+private work": "size=2097152\nusage=1048576\n",
    "admin.vm.volume.Info+root work": "size=4194304\nusage=0\n",
    "admin.vm.CurrentState": "mem=409600 mem_static_max=0 cputime=0 power_state=Running",
    "admin.vm.property.List": "name\nlabel\n",
}


def _record(line: str) -> str:
    name, klass, state, uuid = (word.partition("=")[2] or word for word in line.split())
    properties = {
        key: {"value": value, "type": TYPES.get(key, "str"), "default": False}
        for key, value in PROPERTIES[name].items()
    }
    record = {"name": name, "class": klass, "state": state, "uuid": uuid}
    work = name == "work"
    features = {"work": {"gui": "1"}, "net": {"servicevm": "1"}}.get(name, {})
    more = {"features": features, "tags": ["a", "b"] if work else ["a"]}
    return json.dumps({**record, "properties": properties, **more})


NEW: dict[str, Answer] = {
    **OLD,
    "bulkhead.vm.GetAll": "\n".join(_record(line) for line in LIST.splitlines()) + "\n",
}


@pytest.fixture(params=["old", "new"])
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AdminDaemon]:
    with AdminDaemon(tmp_path / "s", OLD if request.param == "old" else NEW) as made:
        yield made


def _run(daemon: AdminDaemon, *argv: str) -> int:
    return qvm_ls.main(["--socket", str(daemon.path), *argv])


def test_the_usual_table(daemon: AdminDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(daemon) == 0
    assert capsys.readouterr().out == (
        "NAME  STATE    CLASS       LABEL  TEMPLATE  NETVM\n"
        "dom0  Running  AdminVM     black  -         -\n"
        "net   Running  AppVM       red    tmpl      -\n"
        "tmpl  Halted   TemplateVM  black  -         -\n"
        "work  Paused   AppVM       blue   tmpl      net\n"
    )


def test_one_call_where_the_daemon_has_it(daemon: AdminDaemon) -> None:
    assert _run(daemon) == 0
    if "bulkhead.vm.GetAll" in daemon.answers:
        assert daemon.briefs == ["bulkhead.vm.GetAll dom0"]
    else:
        assert daemon.briefs[:2] == ["bulkhead.vm.GetAll dom0", "List dom0"]
        assert len(daemon.briefs) == 2 + 4


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["work"], "work"),
        (["w*", "tm?l"], "tmpl work"),
        (["--running"], "dom0 net"),
        (["--running", "--paused"], "dom0 net work"),
        (["--class", "AppVM,TemplateVM"], "net tmpl work"),
        (["--label", "black"], "dom0 tmpl"),
        (["--template-source", "tmpl"], "net work"),
        (["--netvm-is", "net"], "work"),
        (["--tags", "a", "b"], "work"),
        (["--features", "gui=1"], "work"),
        (["--features", "gui"], "work"),
        (["--prefs", "ip=10.0.0.1"], "net"),
        (["--servicevm", "y"], "net"),
        (["--servicevm", "n", "--internal", "n"], "dom0 tmpl work"),
        (["--pending-update", "y"], ""),
        (["--default-dispvm-is", "tmpl"], ""),
        (["--updateable", "y"], "tmpl"),
        (["--sort", "label", "-r", "-i"], "net work tmpl dom0"),
        (["--exclude", "dom0", "--exclude", "net"], "tmpl work"),
        (["--sort", "qid", "--exclude", "dom0"], "net work tmpl"),
        (["--reverse"], "work tmpl net dom0"),
        (["--class", "AppVM", "--running"], "net"),
    ],
)
def test_filters_and_order(
    daemon: AdminDaemon, capsys: pytest.CaptureFixture[str], argv: list[str], names: str
) -> None:
    assert _run(daemon, "--raw-list", *argv) == 0
    assert capsys.readouterr().out.split() == names.split()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--fields", "NAME,STATE"], "work|Paused"),
        (["--fields", "state,uuid,qid"], "Paused|u3|3"),
        (["-n"], "work|Paused|net|10.0.0.2|10.0.0.1|-"),
        (["-d"], "work|Paused|1|1|2|50%|0|4|0%"),
        (["--fields", "MEMORY"], "400"),
        (["-o", "minimal"], "work"),
    ],
)
def test_columns(
    daemon: AdminDaemon, capsys: pytest.CaptureFixture[str], argv: list[str], line: str
) -> None:
    assert _run(daemon, "--raw-data", *argv, "work") == 0
    assert capsys.readouterr().out == f"{line}\n"


def test_json_and_tree(daemon: AdminDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(daemon, "--json", "--fields", "NAME,LABEL", "work", "net") == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "net", "label": "red"},
        {"name": "work", "label": "blue"},
    ]
    assert _run(daemon, "--tree", "--raw-data", "--fields", "NAME") == 0
    assert capsys.readouterr().out.splitlines() == ["dom0", "net", "  work", "tmpl"]


def test_unknown_names_and_fields(daemon: AdminDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(daemon, "nope") == 1
    assert capsys.readouterr().err == "qvm-ls: there is no qube nope\n"
    assert _run(daemon, "--fields", "NAME,,STATE") == 2
    capsys.readouterr()


def test_help_lists(daemon: AdminDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(daemon, "--help-formats") == 0
    assert "network  NAME STATE NETVM IP IPBACK GATEWAY" in capsys.readouterr().out
    assert _run(daemon, "--help-columns") == 0
    assert "LABEL" in capsys.readouterr().out


# ---- qvm-check


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["work"], 0),
        (["nope"], 1),
        (["work", "nope"], 3),
        (["--running", "net"], 0),
        (["--running", "net", "work"], 3),
        (["--paused", "work"], 0),
        (["--template", "work"], 1),
        (["--networked", "work"], 0),
        (["--networked", "tmpl"], 1),
        ([], 2),
    ],
)
def test_check(tmp_path: Path, argv: list[str], status: int) -> None:
    with AdminDaemon(tmp_path / "s", OLD):
        assert qvm_check.main(["--socket", str(tmp_path / "s"), "-q", *argv]) == status


# ---- qvm-prefs and qubes-prefs

PREFS: dict[str, Answer] = {
    "admin.vm.property.GetAll work": (
        "netvm default=False type=vm \nvcpus default=True type=int 2\n"
        "stubdom_mem default=True type=int \nlabel default=False type=label red\n"
    ),
    "admin.vm.property.Get+netvm work": "default=False type=vm ",
    "admin.vm.property.Get+default_user work": "default=False type=str none",
    "admin.vm.property.Set": "",
    "admin.vm.property.Reset": "",
    "admin.vm.property.List work": "netvm\n",
    "admin.vm.property.Help": "its network qube",
    "admin.property.GetAll": "clockvm default=True type=vm \n",
    "admin.property.Get+clockvm": "default=True type=vm ",
    "admin.property.Set": "",
    "admin.property.Reset": "",
}


def test_prefs_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with AdminDaemon(tmp_path / "s", PREFS):
        where = ["--socket", str(tmp_path / "s"), "work"]
        assert qvm_prefs.main(where) == 0
        assert capsys.readouterr().out == (
            "label        -  red\nnetvm        -  None\nstubdom_mem  U\nvcpus        D  2\n"
        )
        assert qvm_prefs.main([*where, "--hide-default", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"label": "red", "netvm": ""}
        assert qvm_prefs.main([*where, "--help-properties"]) == 0
        assert capsys.readouterr().out == "netvm\n    its network qube\n"


def test_prefs_get_set_reset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with AdminDaemon(tmp_path / "s", PREFS) as daemon:
        where = ["--socket", str(tmp_path / "s"), "work"]
        assert qvm_prefs.main([*where, "netvm"]) == 0
        shown = capsys.readouterr().out
        assert shown == "None\n"
        # What is shown can be given back; only a reference is emptied by it.
        assert qvm_prefs.main([*where, "netvm", shown.strip()]) == 0
        assert qvm_prefs.main([*where, "default_user", "none"]) == 0
        assert qvm_prefs.main([*where, "--default", "netvm"]) == 0
        assert daemon.payload("property.Set+netvm work") == b""
        assert daemon.payload("property.Set+default_user work") == b"none"
        assert daemon.briefs[-1] == "property.Reset+netvm work"


def test_system_prefs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with AdminDaemon(tmp_path / "s", PREFS) as daemon:
        where = ["--socket", str(tmp_path / "s")]
        assert qubes_prefs.main(where) == 0
        assert capsys.readouterr().out == "clockvm  D  None\n"
        assert qubes_prefs.main([*where, "clockvm", "none"]) == 0
        assert qubes_prefs.main([*where, "-D", "clockvm"]) == 0
        assert daemon.briefs == [
            "property.GetAll dom0",
            "property.Get+clockvm dom0",
            "property.Set+clockvm dom0",
            "property.Reset+clockvm dom0",
        ]
