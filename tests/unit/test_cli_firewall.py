"""qvm-firewall: the grammar of rules, and what each subcommand sends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.cli import qvm_firewall as firewall
from clients.cli import tool
from tests.fakes.admin_daemon import AdminDaemon, Answer

GET = "admin.vm.firewall.Get"


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("accept", "action=accept"),
        ("drop 10.0.0.1", "action=drop dst4=10.0.0.1/32"),
        (
            "accept 10.0.0.1/32 tcp 443",
            "action=accept proto=tcp dst4=10.0.0.1/32 dstports=443-443",
        ),
        ("accept fd00::1 udp 1-2", "action=accept proto=udp dst6=fd00::1/128 dstports=1-2"),
        ("accept example.org icmp 8", "action=accept proto=icmp dsthost=example.org icmptype=8"),
        ("accept tcp 22", "action=accept proto=tcp dstports=22-22"),
        ("accept 0.0.0.0/0 tcp", "action=accept proto=tcp"),
        ("action=drop proto=icmp", "action=drop proto=icmp"),
        ("accept specialtarget=dns", "action=accept specialtarget=dns"),
        ("accept dst4=10.0.0.0/8 tcp 1", "action=accept proto=tcp dst4=10.0.0.0/8 dstports=1-1"),
        ("accept dstname=a.b", "action=accept dsthost=a.b"),
        ("accept expire=+60", "action=accept expire=1060"),
        ("accept expire=2000", "action=accept expire=2000"),
    ],
)
def test_rules_as_typed(words: str, rule: str) -> None:
    assert firewall.text(firewall.typed(words.split(), 1000.0)) == rule


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("", "begins with accept or drop"),
        ("allow", "begins with accept or drop"),
        ("accept a tcp 1 2", "a rule is ACTION"),
        ("accept dst4=10.0.0.1 dst6=fd00::1", "given twice"),
        ("accept proto=tcp proto=udp", "given twice"),
        ("accept colour=red", "no part of a rule"),
        ("accept expire=+soon", "Unix time"),
        ("accept dsthost=", "host is empty"),
    ],
)
def test_what_is_no_rule(words: str, why: str) -> None:
    with pytest.raises(tool.UsageError, match=why):
        firewall.typed(words.split(), 1000.0)


_value = st.text(st.sampled_from("abc019./:-"), min_size=1, max_size=8)


@given(st.dictionaries(st.sampled_from(firewall.ORDER), _value, min_size=1))
def test_a_rule_survives_being_written_and_read(rule: dict[str, str]) -> None:
    assert firewall.parse(firewall.text(rule)) == rule


def test_an_empty_host_is_not_shown_as_every_destination(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(tmp_path / "s", "action=accept dsthost=\naction=drop\n")
    with world.daemon:
        assert world.run("work", "list") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[2] for row in rows[-2:]] == ['""', "-"]


def test_a_comment_may_have_spaces_and_signs() -> None:
    rule = firewall.parse("action=accept dsthost=a comment=for action=drop, see [1]")
    assert rule["comment"] == "for action=drop, see [1]"
    assert rule["action"] == "accept"


class World:
    """A qube whose rules the fake daemon keeps."""

    def __init__(self, path: Path, rules: str) -> None:
        self.rules = rules
        answers: dict[str, Answer] = {
            GET: lambda call: self.rules,
            "admin.vm.firewall.Set": self._set,
            "admin.vm.firewall.Reload": "",
        }
        self.daemon = AdminDaemon(path, answers)

    def _set(self, call: object) -> str:
        self.rules = self.daemon.calls[-1].payload.decode()
        assert self.rules, "the daemon takes no empty list"
        return ""

    def run(self, *argv: str) -> int:
        return firewall.main(["--socket", str(self.daemon.path), *argv])


ONE = "action=accept dst4=10.0.0.1/32 proto=tcp dstports=443-443\n"


@pytest.mark.parametrize(
    ("before", "argv", "after"),
    [
        ("action=accept\n", ["add", "drop"], ["action=accept", "action=drop"]),
        ("action=accept\n", ["add", "--before", "0", "drop"], ["action=drop", "action=accept"]),
        ("action=drop\n", ["add", "accept", "a.b"], ["action=accept dsthost=a.b"]),
        # What speaks of no host must not become one that speaks of all.
        (
            "action=accept dsthost=\n",
            ["add", "drop"],
            ["action=accept dsthost=", "action=drop"],
        ),
        (
            "action=drop\n",
            ["add", "--before", "0", "accept", "a.b"],
            ["action=accept dsthost=a.b", "action=drop"],
        ),
        ("action=accept\n", ["del", "--rule-no", "0"], ["action=drop"]),
        ("action=accept\naction=drop\n", ["del", "--rule-no", "1"], ["action=accept"]),
        (f"{ONE}action=drop\n", ["del", "accept", "10.0.0.1", "tcp", "443"], ["action=drop"]),
        (f"{ONE}action=drop\n", ["del", "--rule", "accept 10.0.0.1 tcp 443"], ["action=drop"]),
        (ONE, ["reset"], ["action=accept"]),
    ],
)
def test_changes(tmp_path: Path, before: str, argv: Sequence[str], after: Sequence[str]) -> None:
    world = World(tmp_path / "s", before)
    with world.daemon:
        assert world.run("work", *argv) == 0
    assert world.rules.splitlines() == after


@pytest.mark.parametrize(
    ("argv", "status", "why"),
    [
        (["del", "--rule-no", "1"], 1, "work has no rule 1"),
        (["del", "drop"], 1, "work has no rule action=drop"),
        (["del"], 2, "say --rule-no N"),
        (["del", "--rule-no", "0", "accept"], 2, "say --rule-no N"),
        (["add", "--before", "2", "drop"], 2, "--before 2"),
        (["add", "--before", "-1", "drop"], 2, "--before -1"),
    ],
)
def test_refusals_change_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: Sequence[str],
    status: int,
    why: str,
) -> None:
    world = World(tmp_path / "s", "action=accept\n")
    with world.daemon:
        assert world.run("work", *argv) == status
        assert [call.method for call in world.daemon.calls if "Set" in call.method] == []
    assert why in capsys.readouterr().err


def test_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path / "s", ONE + "action=drop comment=the rest\n")
    with world.daemon:
        assert world.run("work") == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split("  ")[0] == "NO"
        assert lines[1].split() == ["0", "accept", "10.0.0.1/32", "tcp", "443", "-", "-", "-", "-"]
        assert lines[2].endswith("the rest")
        assert world.run("work", "list", "--raw") == 0
        assert capsys.readouterr().out.splitlines() == [
            "action=accept proto=tcp dst4=10.0.0.1/32 dstports=443-443",
            "action=drop comment=the rest",
        ]


def test_json_and_reload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path / "s", "action=drop\n")
    with world.daemon:
        assert world.run("work", "list", "--json") == 0
        assert json.loads(capsys.readouterr().out) == [{"action": "drop"}]
        assert world.run("--reload", "work") == 0
        assert capsys.readouterr().out == ""
        assert world.run("work", "add", "accept", "--reload") == 0
    assert [b.removeprefix("firewall.") for b in world.daemon.briefs] == [
        "Get work",
        "Reload work",
        "Get work",
        "Set work",
        "Reload work",
    ]


def test_what_is_in_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {
        "enforced": True,
        "ruleset": "table x",
        "rules": [
            {"rule": "action=accept", "packets": 3, "bytes": 90, "inert": False, "why": ""},
            {"rule": "dsthost=z", "packets": 0, "bytes": 0, "inert": True, "why": "no address"},
        ],
    }
    answers = {"bulkhead.vm.firewall.Effective work": json.dumps(answer)}
    with AdminDaemon(tmp_path / "s", answers):
        where = ["--socket", str(tmp_path / "s"), "work", "effective"]
        assert firewall.main(where) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].split() == ["0", "3", "90", "action=accept"]
        assert lines[2].endswith("without effect: no address")
        assert firewall.main([*where, "--raw"]) == 0
        assert capsys.readouterr().out == "table x\n"
