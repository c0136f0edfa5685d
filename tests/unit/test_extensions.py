"""Declarations of extensions, and which pre-events are asked about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bulkhead.config import SettingsError
from bulkhead.extensions import ALONE, OF_OTHERS, OF_PROPERTIES, load, parse
from bulkhead.model import specs
from bulkhead.model.records import Phase, QubePut, Run
from services.adminapi import vetoes
from services.adminapi.vetoes import planned
from tests.fakes.adminapi import app, start_view

WHERE = Path("x.toml")
GOOD = 'command = ["/bin/x"]\n'


def test_the_example_is_a_declaration() -> None:
    path = Path(__file__).parents[2] / "docs/extensions/deny_netvm/deny_netvm.toml"
    extension = parse("deny_netvm", path.read_text(), path)
    assert extension.service == "ext-deny_netvm"
    assert extension.vetoes_event("property-pre-set:netvm")
    assert not extension.vetoes_event("property-pre-set:label")
    assert extension.may_call("admin.vm.tag.Get", "offline", "work")
    assert not extension.may_call("admin.vm.tag.Get", "other", "work")
    assert not extension.may_call("bulkhead.Events", "", "work")
    assert not extension.may_call("admin.vm.tag.Set", "x", "work")


def test_patterns_and_arguments() -> None:
    text = 'vetoes = ["property-pre-set:*"]\ngrants = ["admin.vm.tag.Set+seen *"]\n'
    extension = parse("x", GOOD + text, WHERE)
    assert extension.vetoes_event("property-pre-set:label")
    assert not extension.vetoes_event("property-pre-reset:label")
    assert extension.may_call("admin.vm.tag.Set", "seen", "work")
    assert not extension.may_call("admin.vm.tag.Set", "other", "work")


@pytest.mark.parametrize(
    "text",
    [
        "", "command = []", 'command = ["relative"]', "command = 3", "not toml", GOOD + "other = 1",
        GOOD + 'vetoes = ["domain-start"]', GOOD + 'vetoes = ["*"]', GOOD + 'grants = ["a"]',
        GOOD + 'grants = ["* *"]', GOOD + 'vetoes = "property-pre-set:netvm"',
        # What nobody would ever be asked about.
        GOOD + 'vetoes = ["domain-pre-strat"]', GOOD + 'vetoes = ["domain-pre-spawn"]',
        GOOD + 'vetoes = ["property-pre-set"]', GOOD + 'vetoes = ["property-pre-set:netmv"]',
        GOOD + 'vetoes = ["domain-pre-start:*"]', GOOD + 'vetoes = ["device-pre-attach:"]',
    ],
)  # fmt: skip
def test_an_unusable_declaration_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"x\.toml"):
        parse("x", text, WHERE)


def test_one_unusable_declaration_stops_all(tmp_path: Path) -> None:
    assert load(tmp_path) == ()
    directory = tmp_path / "etc/bulkhead/extensions"
    directory.mkdir(parents=True)
    (directory / "good.toml").write_text(GOOD)
    assert [extension.name for extension in load(tmp_path)] == ["good"]
    (directory / "Bad.toml").write_text(GOOD)
    with pytest.raises(SettingsError):
        load(tmp_path)


def test_pre_events_are_planned_from_the_view_alone() -> None:
    view = start_view()
    view.apply(QubePut(app()))
    before = view.qube("work")
    events = planned(view, specs.SetProperty("work", "label", "blue"), "dom0") or []
    assert [(e.subject, e.name) for e in events] == [("work", "property-pre-set:label")]
    assert view.qube("work") is before
    assert planned(view, specs.SetProperty("work", "label", "no-such"), "dom0") is None
    names = [e.name for e in planned(view, specs.StartSpec("work"), "dom0") or ()]
    assert "domain-pre-start" in names


def test_what_may_begin_after_all_is_asked_about() -> None:
    """The registry may know more than the view here: a stop that is over, a start."""
    view = start_view()
    view.apply(QubePut(app()))

    def asked(spec: specs.OperationSpec) -> list[str]:
        return [e.name for e in planned(view, spec, "dom0") or ()]

    assert asked(specs.ShutdownSpec("work")) == ["domain-pre-shutdown"]  # halted, as known here
    assert asked(specs.UnpauseSpec("work")) == ["domain-pre-unpaused"]
    assert asked(specs.ResumeSpec("work")) == ["domain-pre-unpaused"]
    assert asked(specs.RemoveSpec("work")) == ["domain-pre-delete"]
    for phase, expected in (
        (Phase.STOPPING, ["domain-pre-start"]),
        # Every call of a service begins with a start of a qube that is up.
        (Phase.UP, []),
    ):
        view.apply(QubePut(replace(app(), run=Run(phase, "b"))))
        assert asked(specs.StartSpec("work")) == expected
    assert asked(specs.RemoveSpec("work")) == ["domain-pre-delete"]  # it runs, as known here
    assert planned(view, specs.SetProperty("nobody", "label", "red"), "dom0") is None


def test_every_event_that_is_asked_about_can_be_declared() -> None:
    for veto in (*ALONE, *(f"{kind}:*" for kind in OF_PROPERTIES + OF_OTHERS)):
        assert parse("x", GOOD + f'vetoes = ["{veto}"]', WHERE).vetoes == (veto,)
    assert set(vetoes._LATER.values()) <= set(ALONE)
