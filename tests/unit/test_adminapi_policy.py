"""Policy: syntax, first match, the recorded vectors, and files that are in the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bulkhead.model.records import QubePut
from bulkhead.model.view import View
from services.adminapi.adapters.policy_files import PolicyFiles
from services.adminapi.core.policy import Evaluator, PolicyError, parse
from services.adminapi.policy_keeper import PolicyKeeper
from tests.fakes.adminapi import app, start_view

V1_UUID = "22222222-2222-4222-8222-222222222222"


def world() -> View:
    view = start_view()
    dvm = app("dvm", "44444444-4444-4444-8444-444444444444", 5)
    mgmt = app("mgmt", "55555555-5555-4555-8555-555555555555", 6)
    view.apply(QubePut(replace(app("v1", V1_UUID, 3), tags=frozenset({"created-by-mgmt"}))))
    view.apply(QubePut(app("v2", "33333333-3333-4333-8333-333333333333", 4)))
    properties = {**dvm.properties, "template_for_dispvms": "True"}
    view.apply(QubePut(replace(dvm, properties=properties, tags=frozenset({"dtag"}))))
    view.apply(QubePut(replace(mgmt, properties={**mgmt.properties, "default_dispvm": "dvm"})))
    return view


def ask(rules: str, source: str, target: str, argument: str = "+x") -> bool:
    view = world()
    evaluator = Evaluator(lambda: view, lambda name: None)
    try:
        evaluator.replace(parse({"30-user.policy": rules}))
    except PolicyError:
        evaluator.replace(())
    return evaluator.allows("S", argument, source, target)


OWN = "S * mgmt @tag:created-by-mgmt allow target=dom0"


@pytest.mark.parametrize(
    ("rules", "source", "target", "argument", "allowed"),
    [
        (OWN, "mgmt", "v1", "+x", True),
        (OWN, "mgmt", f"uuid:{V1_UUID}", "+x", True),
        (OWN, "mgmt", "v2", "+x", False),
        (OWN, "mgmt", "nosuch", "+x", False),
        (OWN, "mgmt", "dom0", "+x", False),
        (OWN, "v1", "v1", "+x", False),
        ("S * mgmt @anyvm allow target=dom0", "mgmt", "dom0", "+x", False),
        ("S * mgmt @anyvm allow target=dom0", "mgmt", "nosuch", "+x", True),
        ("S * mgmt @anyvm allow target=dom0", "mgmt", "", "+x", True),
        ("S * mgmt @adminvm allow", "mgmt", "dom0", "+x", True),
        ("S * mgmt dom0 allow", "mgmt", "@adminvm", "+x", True),
        ("S +netvm mgmt v1 allow target=dom0", "mgmt", "v1", "+netvm", True),
        ("S +netvm mgmt v1 allow target=dom0", "mgmt", "v1", "+label", False),
        ("S + mgmt v1 allow", "mgmt", "v1", "+", True),
        ("* +x mgmt v1 allow", "mgmt", "v1", "+x", False),
        ("S * mgmt v1 deny\nS * mgmt v1 allow", "mgmt", "v1", "+x", False),
        ("S * @type:AppVM @type:TemplateVM allow", "mgmt", "tmpl", "+x", True),
        ("S * mgmt @dispvm allow", "mgmt", "@dispvm", "+x", True),
        ("S * mgmt @dispvm:dvm allow", "mgmt", "@dispvm", "+x", True),
        ("S * mgmt @dispvm:@tag:dtag allow", "mgmt", "@dispvm:dvm", "+x", True),
        ("S * mgmt @dispvm:v1 allow", "mgmt", "@dispvm:v1", "+x", False),
        ("S * mgmt @default allow", "mgmt", "nosuch", "+x", False),
        ("S * mgmt @default allow target=v1", "mgmt", "nosuch", "+x", True),
        ("S * mgmt v1 allow autostart=no", "mgmt", "v1", "+x", False),
        ("S * mgmt v1 allow,target=dom0", "mgmt", "v1", "+x", False),
        ("S * mgmt v1 allow foo=1", "mgmt", "v1", "+x", False),
        ("S * mgmt v1 allow notify=maybe", "mgmt", "v1", "+x", False),
        ("S * mgmt v1 allow # x", "mgmt", "v1", "+x", False),
        ("S * $anyvm v1 allow", "mgmt", "v1", "+x", False),
        ("S * mgmt v1 ask", "mgmt", "v1", "+x", False),
        ("S * mgmt mgmt allow", "mgmt", "mgmt", "+x", False),
        ("S * mgmt mgmt allow target=dom0", "mgmt", "mgmt", "+x", True),
        ("S * nobody v1 allow", "nobody", "v1", "+x", False),
        ("", "dom0", "v1", "+x", True),
        ("# all\n\n  * * @anyvm * allow target=@adminvm", "v2", "v1", "+x", True),
    ],
)
def test_vectors(rules: str, source: str, target: str, argument: str, allowed: bool) -> None:
    assert ask(rules, source, target, argument) is allowed


def test_includes_of_both_forms() -> None:
    files = {
        "90-default.policy": "!include-service S * include/admin-local-ro\n!include more\n"
        "!include-dir dir\n!compat-4.0\n",
        "include/admin-local-ro": "# nothing\n$include:include/admin-local-rwx\n",
        "include/admin-local-rwx": "mgmt $tag:created-by-mgmt allow,target=dom0\n",
        "more": "T * * * deny\n",
        "dir/a.policy": "U * @anyvm @anyvm allow user=root notify=yes\n",
        "dir/a.txt": "nonsense\n",
    }
    found = parse(files)
    assert [(r.service, r.source, r.target, r.action) for r in found] == [
        ("S", "mgmt", "@tag:created-by-mgmt", "allow"),
        ("T", "*", "*", "deny"),
        ("U", "@anyvm", "@anyvm", "allow"),
    ]
    assert found[0].redirect == "dom0" and found[0].where == "include/admin-local-rwx:1"


@pytest.mark.parametrize(
    "files",
    [
        {"a.policy": "!include nosuch\n"},
        {"a.policy": "!include a.policy\n"},
        {"a.policy": "S * a b\n"},
        {"a.policy": "S\n"},
        {"a.policy": "S x a b allow\n"},
        {"a.policy": "S * @dispvm b allow\n"},
        {"a.policy": "S * @nonsense b allow\n"},
        {"a.policy": "S * @tag: b allow\n"},
        {"a.policy": "S * a b allow target=@anyvm\n"},
        {"a.policy": "S * a b deny target=dom0\n"},
        {"a.policy": "S * a b ask target=x target=y\n"},
        {"a.policy": "!unknown\n"},
        {"a.policy": "!include-service S * old\n", "old": "!compat-4.0\n"},
        {"A b.policy": ""},
    ],
)
def test_any_error_refuses_the_whole(files: dict[str, str]) -> None:
    with pytest.raises(PolicyError):
        parse(files)


def test_files_order_and_hiding(tmp_path: Path) -> None:
    run, etc = tmp_path / "run", tmp_path / "etc"
    run.mkdir()
    (etc / "include").mkdir(parents=True)
    (run / "50.policy").write_text("S * * * deny\n")
    (etc / "50.policy").write_text("S * * * allow target=dom0\n")
    (etc / "10.policy").write_text("T * * * deny\n")
    (etc / "include/x").write_text("")
    files = PolicyFiles((run, etc))
    assert [(r.service, r.action) for r in parse(files.read())] == [("T", "deny"), ("S", "deny")]


def test_the_keeper_follows_changes_and_errors(tmp_path: Path) -> None:
    view = world()
    keeper = PolicyKeeper(PolicyFiles((tmp_path,)), Evaluator(lambda: view, lambda name: None))
    keeper.load()
    assert keeper.allows("admin.vm.List", "+", "v1", "v1")
    assert not keeper.allows("admin.vm.List", "+", "v1", "v2")
    file = tmp_path / "30-user.policy"
    file.write_text("admin.vm.List * v1 v2 allow target=dom0\n")
    keeper.load()
    assert not keeper.allows("admin.vm.List", "+", "v1", "v1")
    assert keeper.allows("admin.vm.List", "+", "v1", "v2")
    file.write_text("admin.vm.List * v1 v2 allow target=dom0 nonsense\n")
    keeper.load()
    assert not keeper.allows("admin.vm.List", "+", "v1", "v2")
    file.unlink()
    keeper.load()
    assert keeper.allows("admin.vm.List", "+", "v1", "v1")


def test_a_qube_that_has_gone_is_judged_by_its_last_record() -> None:
    view = world()
    gone = replace(app("old", "66666666-6666-4666-8666-666666666666", 9), tags=frozenset({"t"}))
    known = {"old": gone}
    evaluator = Evaluator(lambda: view, known.get)
    evaluator.replace(parse({"a.policy": "admin.Events * mgmt @tag:t allow target=dom0\n"}))
    assert evaluator.allows("admin.Events", "+domain-delete", "mgmt", "old")
    known.clear()
    assert not evaluator.allows("admin.Events", "+domain-delete", "mgmt", "old")
