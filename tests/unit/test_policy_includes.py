"""The default policy files against the assignment of release 4.4."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from bulkhead.model.policy import Directory, Evaluator, ViewWorld, parse, problems
from bulkhead.model.records import QubePut
from bulkhead.policy_files import PolicyFiles
from services.adminapi import includes
from services.adminapi.core.calls import all_calls
from services.adminapi.core.policy_includes import assignment, generated_files, include_of
from tests.unit.test_policy_rules import world

_CLASSES = ("block", "pci", "usb", "mic")
_MADE = ("AdminVM", "AppVM", "DispVM", "StandaloneVM", "TemplateVM")


def _names(prefix: str, words: str) -> set[str]:
    return {f"admin.{prefix}{word}" for word in words.split()}


GOLDEN = {
    "include/admin-global-ro": _names("", "Events deviceclass.List vm.List vm.Stats vmclass.List")
    | _names("label.", "Get Index List")
    | _names("pool.", "Info List ListDrivers UsageDetails volume.List")
    | _names("property.", "Get GetAll GetDefault Help List"),
    "include/admin-global-rwx": _names("backup.", "Cancel Execute")
    | _names("label.", "Create Remove")
    | _names("pool.", "Add Remove Set.revisions_to_keep Set.ephemeral_volatile")
    | _names("property.", "Reset Set")
    | _names("vm.", "CreateDisposable Remove")
    | {f"admin.vm.Create.{c}" for c in _MADE}
    | {f"admin.vm.CreateInPool.{c}" for c in _MADE},
    "include/admin-local-ro": _names("", "backup.Info vm.CurrentState vm.device.denied.List")
    | {f"admin.vm.device.{c}.{v}" for c in _CLASSES for v in ("Assigned", "Attached", "Available")}
    | _names("vm.feature.", "List Get CheckWithTemplate CheckWithNetvm CheckWithAdminVM")
    | _names("vm.", "feature.CheckWithTemplateAndAdminVM firewall.Get notes.Get tag.Get tag.List")
    | _names("vm.property.", "Get GetAll GetDefault Help List")
    | _names("vm.volume.", "Info List ListSnapshots"),
    "include/admin-local-rwx": _names(
        "vm.", "Console Kill Pause Resume Shutdown Start Suspend Unpause"
    )
    | {
        f"admin.vm.device.{c}.{v}"
        for c in _CLASSES
        for v in ("Assign", "Attach", "Detach", "Set.assignment", "Unassign")
    }
    | _names("vm.device.denied.", "Add Remove")
    | _names("vm.", "feature.Remove feature.Set firewall.Reload firewall.Set notes.Set")
    | _names("vm.", "property.Reset property.Set tag.Remove tag.Set")
    | _names("vm.volume.", "Clear CloneFrom CloneTo Import ImportWithSize Resize Revert")
    | _names("vm.volume.Set.", "revisions_to_keep rw ephemeral"),
}


def test_the_assignment_is_that_of_the_release() -> None:
    assert len(GOLDEN["include/admin-global-ro"]) == 18
    assert len(GOLDEN["include/admin-global-rwx"]) == 22
    ours = {
        path: {name for name in names if name.startswith("admin.")}
        for path, names in assignment().items()
    }
    assert ours == GOLDEN


def test_every_call_with_a_scope_is_in_one_file_and_no_other_is() -> None:
    listed = [name for names in assignment().values() for name in names]
    assert len(listed) == len(set(listed))
    for call in all_calls():
        assert (call.name in listed) is bool(include_of(call)), call.name
        if call.name not in listed:
            assert not call.scope or call.param == "RemoteVM", call.name


def test_written_files_are_in_force_and_rules_are_kept(tmp_path: Path) -> None:
    includes.write(tmp_path)
    rules = "# mine\nmgmt @tag:created-by-mgmt allow target=dom0\n"
    (tmp_path / "include/admin-local-rwx").write_text(rules)
    (tmp_path / "91-admin-default-deny.policy").write_text("# replaced by hand\n")
    told = includes.write(tmp_path)
    assert (tmp_path / "include/admin-local-rwx").read_text() == rules
    assert (tmp_path / "91-admin-default-deny.policy").read_text() == "# replaced by hand\n"
    assert sum(s.startswith("kept") for s in told) == 5
    tree, legacy = PolicyFiles((tmp_path,)).read()
    assert problems(tree, legacy) == []
    view = world()
    evaluator = Evaluator(ViewWorld(lambda: view))
    evaluator.replace(parse(tree, legacy))
    for method, target, allowed in (
        ("admin.vm.Start", "v1", True),
        ("admin.vm.property.Get", "v1", True),  # who may change may read
        ("admin.vm.Start", "v2", False),
        ("admin.vm.Remove", "v1", False),  # global, though it names a qube
        ("bulkhead.vm.firewall.Effective", "v1", True),
        ("bulkhead.caller.Open", "v1", False),
    ):
        assert evaluator.allows(method, "+", "mgmt", target) is allowed, (method, target)
    decided = evaluator.decide("admin.vm.property.Get", "+netvm", "mgmt", "v1").rule
    assert decided is not None and decided.where == f"{tmp_path}/include/admin-local-rwx:2"
    assert [w.split(":")[0].removeprefix(f"{tmp_path}/") for w in decided.via] == [
        "include/admin-local-ro",
        "90-admin-default.policy",
    ]


def test_the_written_policy_alone_allows_nothing(tmp_path: Path) -> None:
    includes.write(tmp_path)
    rules = parse(PolicyFiles((tmp_path,)).read()[0])
    allowing = [rule for rule in rules if rule.action != "deny"]
    # dom0 gives that tag to the qube that restores a backup, and to no other.
    assert {rule.source for rule in allowing} == {"@tag:backup-restore-mgmt"}
    assert parse([Directory("x", {})]) == ()


def test_the_list_is_printed_without_a_directory() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.adminapi.includes"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert "include/admin-local-rwx\n    admin.vm.Console\n" in done.stdout


def test_who_restores_backups_reaches_only_what_is_being_restored() -> None:
    text = generated_files()["85-admin-backup-restore.policy"]
    view = world()

    def tagged(name: str, tag: str) -> None:
        qube = view.qube(name)
        assert qube is not None
        view.apply(QubePut(replace(qube, tags=qube.tags | {tag})))

    tagged("mgmt", "backup-restore-mgmt")
    tagged("v1", "backup-restore-in-progress")
    tagged("v2", "backup-restore-storage")
    evaluator = Evaluator(ViewWorld(lambda: view))
    evaluator.replace(parse([Directory("etc", {"85.policy": text})]))
    allowed = {
        ("admin.vm.Create.AppVM", "+tmpl", "dom0"),
        ("admin.vm.List", "+", "dom0"),
        ("admin.vm.List", "+", "v2"),
        ("admin.vm.property.Get", "+provides_network", "v2"),
        ("admin.vm.property.Set", "+netvm", "v1"),
        ("admin.vm.volume.ImportWithSize", "+private", "v1"),
        ("qubes.RestoreById", "+x", "v2"),
    }
    denied = {
        ("admin.vm.Create.DispVM", "+dvm", "dom0"),
        ("admin.vm.property.Get", "+netvm", "v2"),
        ("admin.vm.property.Set", "+netvm", "v2"),
        ("admin.vm.Start", "+", "v1"),
        ("qubes.RestoreById", "+x", "v1"),
    }
    for call in allowed | denied:
        service, argument, target = call
        assert evaluator.allows(service, argument, "mgmt", target) is (call in allowed), call
        assert not evaluator.allows(service, argument, "v1", target), call
    assert evaluator.decide("admin.vm.tag.Set", "+x", "mgmt", "v1").target == "dom0"
    assert evaluator.decide("qubes.RestoreById", "+x", "mgmt", "v2").target == "v2"
