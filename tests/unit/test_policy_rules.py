"""Policy: syntax, first match, the recorded vectors, and files that are in the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bulkhead.model.policy import (
    Decision,
    Directory,
    Evaluator,
    InfoWorld,
    PolicyError,
    ViewWorld,
    parse,
    problems,
)
from bulkhead.model.records import QubePut
from bulkhead.model.view import View
from bulkhead.policy_files import PolicyFiles
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


def tree(files: dict[str, str]) -> list[Directory]:
    return [Directory("etc", files)]


def evaluator_of(rules: str) -> Evaluator:
    view = world()
    evaluator = Evaluator(ViewWorld(lambda: view))
    try:
        evaluator.replace(parse(tree({"30-user.policy": rules})))
    except PolicyError:
        evaluator.replace(())
    return evaluator


def ask(rules: str, source: str, target: str, argument: str = "+x") -> bool:
    return evaluator_of(rules).allows("S", argument, source, target)


def decide(rules: str, source: str, target: str, argument: str = "+x") -> Decision:
    return evaluator_of(rules).decide("S", argument, source, target)


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
    found = parse(tree(files))
    assert [(r.service, r.source, r.target, r.action) for r in found] == [
        ("S", "mgmt", "@tag:created-by-mgmt", "allow"),
        ("T", "*", "*", "deny"),
        ("U", "@anyvm", "@anyvm", "allow"),
    ]
    assert found[0].redirect == "dom0" and found[0].where == "etc/include/admin-local-rwx:1"


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
        {"a.policy": "!include-service S * old\n", "old": "!include-dir d\n"},
        {"a.policy": "!include-service * +x old\n", "old": ""},
        {"a.policy": "!include-service S old\n", "old": ""},
        {"a.policy": "!include-dir d\n", "d/B.policy": ""},
        {"a.policy": "S+x * a b allow\n"},
        {"a.policy": "S,T * a b allow\n"},
        {"a.policy": "S * @default b allow\n"},
        {"a.policy": "S * a @type: allow\n"},
        {"a.policy": "S * a @dispvm: allow\n"},
        {"a.policy": "S * a @dispvm:@tag: allow\n"},
        {"a.policy": "S * a @dispvm:@anyvm allow\n"},
        {"a.policy": "S * a uuid:x allow\n"},
        {"a.policy": "S * a b allow target=@default\n"},
        {"a.policy": "S * a b allow target=*\n"},
        {"a.policy": "S * a b allow target=@tag:x\n"},
        {"a.policy": "S * a b allow target=@type:AppVM\n"},
        {"a.policy": "S * a b allow target=@dispvm:@tag:x\n"},
        {"a.policy": "S * a b allow target=\n"},
        {"a.policy": "S * a b allow default_target=dom0\n"},
        {"a.policy": "S * a b deny autostart=no\n"},
        {"a.policy": "S * a b deny user=root\n"},
        {"a.policy": "S * a b allow autostart=maybe\n"},
        {"a.policy": "S * a b permit\n"},
        {"A b.policy": ""},
    ],
)
def test_any_error_refuses_the_whole(files: dict[str, str]) -> None:
    with pytest.raises(PolicyError):
        parse(tree(files))


@pytest.mark.parametrize("odd", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_nothing_but_a_newline_ends_a_comment(odd: str) -> None:
    assert parse(tree({"a.policy": f"# off:{odd}S * mgmt v1 allow target=dom0\n"})) == ()


def test_the_older_form_includes_in_two_ways() -> None:
    files = {
        "a.policy": "!include-service S +y old\n",
        "old": "$include:one\n!include\ttwo\n",
        "one": "$anyvm $adminvm deny\n",
        "two": "$tag:t,$dispvm:dvm,ask,default_target=$dispvm:dvm\n",
    }
    assert [(r.argument, r.source, r.target, r.action) for r in parse(tree(files))] == [
        ("+y", "@anyvm", "@adminvm", "deny"),
        ("+y", "@tag:t", "@dispvm:dvm", "ask"),
    ]


def test_files_order_and_hiding(tmp_path: Path) -> None:
    run, etc = tmp_path / "run", tmp_path / "etc"
    run.mkdir()
    (etc / "include").mkdir(parents=True)
    (run / "50.policy").write_text("S * * * deny\n")
    (etc / "50.policy").write_text("S * * * allow target=dom0\n")
    (etc / "10.policy").write_text("T * * * deny\n")
    (etc / "include/x").write_text("")
    files = PolicyFiles((run, etc))
    assert [(r.service, r.action) for r in parse(*files.read())] == [("T", "deny"), ("S", "deny")]


def test_the_keeper_follows_changes_and_errors(tmp_path: Path) -> None:
    view = world()
    keeper = PolicyKeeper(PolicyFiles((tmp_path,)), Evaluator(ViewWorld(lambda: view)))
    keeper.load()
    for target in ("v1", "v2"):
        assert not keeper.allows("admin.vm.List", "+", "v1", target)
        assert keeper.allows("admin.vm.List", "+", "dom0", target)
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
    assert not keeper.allows("admin.vm.List", "+", "v1", "v2")
    file.write_text("admin.vm.List * v1 v2 allow target=dom0\n")
    keeper.load()
    assert keeper.allows("admin.vm.List", "+", "v1", "v2")
    file.unlink()
    keeper.load()
    assert not keeper.allows("admin.vm.List", "+", "v1", "v2")


def test_a_qube_that_has_gone_is_judged_by_its_last_record() -> None:
    view = world()
    gone = replace(app("old", "66666666-6666-4666-8666-666666666666", 9), tags=frozenset({"t"}))
    known = {"old": gone}
    evaluator = Evaluator(ViewWorld(lambda: view, known.get))
    evaluator.replace(parse(tree({"a.policy": "admin.Events * mgmt @tag:t allow target=dom0\n"})))
    assert evaluator.allows("admin.Events", "+domain-delete", "mgmt", "old")
    known.clear()
    assert not evaluator.allows("admin.Events", "+domain-delete", "mgmt", "old")


@pytest.mark.parametrize(
    ("rules", "target", "argument", "outcome", "actual", "requested"),
    [
        (OWN, "v1", "+x", "allow", "dom0", "v1"),
        (OWN, f"uuid:{V1_UUID}", "+x", "allow", "dom0", f"uuid:{V1_UUID}"),
        (OWN, "v2", "+x", "deny", "", "v2"),
        (OWN, "nosuch", "+x", "deny", "", "@default"),
        ("S * mgmt @anyvm allow target=dom0", "nosuch", "+x", "allow", "dom0", "@default"),
        ("S * mgmt @anyvm allow target=dom0", "", "+x", "allow", "dom0", "@default"),
        ("S * mgmt dom0 allow", "@adminvm", "+x", "allow", "dom0", "@adminvm"),
        ("S * mgmt @adminvm allow", "dom0", "+x", "allow", "dom0", "dom0"),
        ("S * mgmt v1 allow target=nosuch", "v1", "+x", "deny", "", "v1"),
        ("S * mgmt v1 allow target=@dispvm", "v1", "+x", "allow", "@dispvm:dvm", "v1"),
        ("S * mgmt v1 allow target=@dispvm:v2", "v1", "+x", "deny", "", "v1"),
        ("S * mgmt v1 allow target=@adminvm", "v1", "+x", "allow", "dom0", "v1"),
        ("S * mgmt v1 allow target=dom0 autostart=no", "v1", "+x", "allow", "dom0", "v1"),
        ("S * mgmt @dispvm allow autostart=no", "@dispvm", "+x", "deny", "", "@dispvm"),
        ("S * mgmt @anyvm allow target=v2", "@dispvm", "+x", "allow", "v2", "@dispvm"),
        ("S * mgmt @anyvm allow target=v2", "@dispvm:dvm", "+x", "allow", "v2", "@dispvm:dvm"),
        ("S * mgmt @dispvm allow target=v2", "@dispvm:dvm", "+x", "deny", "", "@dispvm:dvm"),
        ("S * mgmt @type:Nosuch allow", "v1", "+x", "deny", "", "v1"),
        ("S * @dispvm:dvm v1 allow", "v1", "+x", "deny", "", "v1"),
        ("S * @type:AppVM @type:TemplateVM allow", "tmpl", "+x", "allow", "tmpl", "tmpl"),
        ("S * mgmt @dispvm allow", "@dispvm", "+x", "allow", "@dispvm:dvm", "@dispvm"),
        ("S * mgmt @dispvm:dvm allow", "@dispvm", "+x", "allow", "@dispvm:dvm", "@dispvm"),
        ("S * mgmt @default allow target=v1", "nosuch", "+x", "allow", "v1", "@default"),
        ("S * mgmt v1 ask", "v1", "+x", "ask", "", "v1"),
        ("S * * * allow", "@anyvm", "+x", "deny", "", ""),
        ("S * * * allow", "@tag:created-by-mgmt", "+x", "deny", "", ""),
    ],
)
def test_a_decision_says_where_the_call_goes(
    rules: str, target: str, argument: str, outcome: str, actual: str, requested: str
) -> None:
    found = decide(rules, "mgmt", target, argument)
    assert (found.outcome, found.target, found.requested) == (outcome, actual, requested)


def test_a_decision_names_file_and_line_and_what_included_it() -> None:
    files = {
        "90-a.policy": "# first\n!include-service S * include/x\n",
        "include/x": "\nmgmt @anyvm deny\nmgmt * allow target=dom0\n",
    }
    view = world()
    evaluator = Evaluator(ViewWorld(lambda: view))
    evaluator.replace(parse(tree(files)))
    found = evaluator.decide("S", "+", "mgmt", "v1").rule
    assert found is not None and (found.where, found.via) == (
        "etc/include/x:2",
        ("etc/90-a.policy:2",),
    )
    assert found.text == "mgmt @anyvm deny"
    assert evaluator.decide("T", "+", "mgmt", "v1").rule is None


def test_an_include_is_looked_for_beside_the_file_that_names_it() -> None:
    run = Directory("run", {"10.policy": "!include x\n", "x": "S * a b deny\n"})
    etc = Directory("etc", {"10.policy": "", "20.policy": "!include x\n", "x": "T * a b deny\n"})
    assert [r.service for r in parse([run, etc])] == ["S", "T"]
    with pytest.raises(PolicyError, match=r"etc/20\.policy:1: there is no file y in etc"):
        parse([Directory("run", {"y": ""}), Directory("etc", {"20.policy": "!include y\n"})])


def test_problems_lists_every_error_once() -> None:
    files = {
        "a.policy": "S * a\nS * a b allow\n!include-service S * i\n!include-service T * i\n",
        "b.policy": "!include nosuch\n",
        "i": "a b wrong\n",
    }
    assert problems(tree(files)) == [
        "etc/a.policy:1: a rule is SERVICE ARGUMENT SOURCE TARGET ACTION",
        "etc/i:1: 'wrong' is not allow, ask or deny",
        "etc/b.policy:1: there is no file nosuch in etc",
    ]
    assert problems(tree({"a.policy": "S * a b allow\n"})) == []


def test_an_include_that_doubles_at_each_level_ends() -> None:
    files = {f"f{n}": f"!include f{n + 1}\n!include f{n + 1}\n" for n in range(15)}
    with pytest.raises(PolicyError, match="too deep"):
        parse(tree({"a.policy": "!include f0\n", **files, "f15": ""}))


def test_files_of_release_4_0_are_read_where_compat_says() -> None:
    legacy = Directory("old", {"S": "$anyvm v1 allow,target=dom0\n", "S+x": "mgmt v1 allow\n"})
    rules = parse(tree({"35-compat.policy": "!compat-4.0\n"}), legacy)
    assert [(r.service, r.argument, r.source, r.target, r.action) for r in rules] == [
        ("S", "+x", "mgmt", "v1", "allow"),
        ("S", "+x", "*", "@anyvm", "deny"),
        ("S", "+x", "*", "@adminvm", "deny"),
        ("S", "*", "@anyvm", "v1", "allow"),
    ]
    assert parse(tree({"35.policy": "# nothing\n"}), legacy) == ()


def test_the_same_decisions_from_system_info() -> None:
    def entry(uuid: str, klass: str = "AppVM", **more: object) -> dict[str, object]:
        base = {"tags": [], "template_for_dispvms": False, "default_dispvm": None}
        return {**base, "uuid": uuid, "type": klass, "power_state": "Halted", **more}

    info = {
        "domains": {
            "dom0": entry("00000000-0000-0000-0000-000000000000", "AdminVM"),
            "mgmt": entry("a" * 8, default_dispvm="dvm"),
            "v1": entry(V1_UUID, tags=["created-by-mgmt"]),
            "dvm": entry("b" * 8, template_for_dispvms=True, tags=["dtag"]),
        }
    }
    rules = f"{OWN}\nS * mgmt @dispvm:@tag:dtag allow\nS * mgmt dvm allow autostart=no\n"
    evaluator = Evaluator(InfoWorld(info))
    evaluator.replace(parse(tree({"a.policy": rules})))
    for target, outcome, actual in (
        ("v1", "allow", "dom0"),
        (f"uuid:{V1_UUID}", "allow", "dom0"),
        ("@dispvm", "allow", "@dispvm:dvm"),
        ("dvm", "deny", ""),
        ("nosuch", "deny", ""),
        ("dom0", "deny", ""),
    ):
        found = evaluator.decide("S", "+", "mgmt", target)
        assert (found.outcome, found.target) == (outcome, actual), target
    info["domains"]["dvm"]["power_state"] = "Running"
    assert Evaluator(InfoWorld(info)).decide("S", "+", "mgmt", "dvm").outcome == "deny"
    assert evaluator.decide("S", "+", "mgmt", "dvm").target == "dvm"


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "50.policy").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="link to nothing"):
        PolicyFiles((tmp_path,)).read()
    (tmp_path / "50.policy").unlink()
    (tmp_path / "50.policy").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not text"):
        PolicyFiles((tmp_path,)).read()
