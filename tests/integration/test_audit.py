"""The audit log of a running instance: every mutating call once, over crashes too."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.instance import PYTHON, Instance, running

_COMMENT = "comment=told once "
FAILPOINTS = ("before_append", "before_sync", "after_append")


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    with running() as made:
        made.ok("admin.vm.Create.StandaloneVM", payload=b"name=audited label=red")
        yield made


def _audit(instance: Instance, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, "-m", "clients.cli.bulkhead", "audit", "--root", str(instance.root), *more],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def _records(instance: Instance) -> list[dict[str, object]]:
    done = _audit(instance, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _verified(instance: Instance) -> None:
    done = _audit(instance, "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken, the newest" in done.stdout


def _telling(instance: Instance, word: str, count: int = 1) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []

    def there() -> bool:
        found[:] = [r for r in _records(instance) if word in json.dumps(r)]
        return len(found) >= count

    instance.until(there, 20, f"{count} record(s) of {word}")
    return found


def test_a_change_is_one_record(instance: Instance) -> None:
    instance.ok("admin.vm.tag.Set", "dom0", "audited-once")
    (record,) = _telling(instance, "audited-once")
    assert (record["kind"], record["source"]) == ("change", "dom0")
    assert record["method"] == "Mutate.set_tag"
    assert record["revision"]


def test_a_refused_call_is_one_record_and_a_read_is_none(instance: Instance) -> None:
    assert instance.call("admin.vm.tag.Remove", "dom0", "refused-once").kind == "exc"
    assert instance.call("admin.vm.tag.Get", "dom0", "only-read").kind == "ok"
    (record,) = _telling(instance, "refused-once")
    assert (record["kind"], record["method"]) == ("refused", "admin.vm.tag.Remove")
    assert str(record["result"]).startswith("TAG_NOT_FOUND")
    # Refused before it is a call: the qube is not there.
    instance.call("admin.vm.Start", "not-there-qube")
    assert _telling(instance, "not-there-qube")[0]["kind"] == "refused"
    assert not [r for r in _records(instance) if "only-read" in json.dumps(r)]


def test_secrets_stay_out(instance: Instance) -> None:
    instance.ok("admin.vm.feature.Set", "dom0", "wifi.password", b"hunter2secret")
    _telling(instance, "wifi.password")
    directory = instance.root / "var/log/qubes/audit"
    assert all(b"hunter2secret" not in path.read_bytes() for path in directory.iterdir())


def test_nothing_is_lost_or_repeated_over_kills(instance: Instance) -> None:
    for number, name in enumerate(FAILPOINTS):
        old = instance.pid("adminapi")
        instance.arm(f"adminapi.audit.{name}=kill")
        instance.ok("admin.vm.tag.Set", "dom0", f"killed-{number}")
        instance.wait_restarted("adminapi", old)
        instance.wait_ready()
        assert instance.fired() == [f"adminapi.audit.{name}"]
        _telling(instance, f"killed-{number}")
    changes = [r for r in _records(instance) if r["kind"] == "change"]
    revisions = [int(str(r["revision"])) for r in changes]
    assert revisions == list(range(revisions[0], revisions[0] + len(revisions)))
    _verified(instance)


def test_a_refused_call_is_told_once_whatever_is_killed_behind_its_answer(
    instance: Instance,
) -> None:
    for number, service in enumerate(("adminapi", "registry", "adminapi")):
        old = instance.pid(service)
        # A change just before keeps the writer busy with its own record.
        instance.ok("admin.vm.tag.Set", "dom0", f"before-kill-{number}")
        refused = f"refused-{number}-{service}"
        assert instance.call("admin.vm.tag.Remove", "dom0", refused).kind == "exc"
        rule = f"action=drop {_COMMENT}{number}".encode()
        instance.ok("admin.vm.firewall.Set", "audited", payload=rule)
        instance.kill(service)
        instance.wait_restarted(service, old)
        instance.wait_ready()
        assert len(_telling(instance, refused)) == 1
        assert len(_telling(instance, f"{_COMMENT}{number}")) == 1
    _verified(instance)


def test_an_end_without_changes_that_was_cut_off_is_found(instance: Instance) -> None:
    instance.call("admin.vm.tag.Remove", "dom0", "cut-off-later")
    _telling(instance, "cut-off-later")
    _verified(instance)
    path = instance.root / "var/log/qubes/audit/audit-000001.jsonl"
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    assert b"cut-off-later" in last
    os.truncate(path, len(whole) - len(last))
    done = _audit(instance, "--verify")
    number = json.loads(last)["number"]
    assert done.returncode == 1
    assert f"records {number} to {number} are missing at the end" in done.stderr
    with path.open("ab") as file:
        file.write(last)
    _verified(instance)


def test_an_altered_byte_is_named(instance: Instance, tmp_path: Path) -> None:
    del tmp_path
    instance.ok("admin.vm.tag.Set", "dom0", "to-be-altered")
    _telling(instance, "to-be-altered")
    _verified(instance)
    path = instance.root / "var/log/qubes/audit/audit-000001.jsonl"
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    number = next(i for i, line in enumerate(lines, 1) if b"to-be-altered" in line)
    path.write_bytes(whole.replace(b"to-be-altered", b"to-be-ALTERED"))
    done = _audit(instance, "--verify")
    assert done.returncode == 1
    assert f"audit-000001.jsonl:{number}: the line was altered" in done.stderr
    path.write_bytes(whole)
    _verified(instance)


def test_the_chain_holds_over_a_restart(instance: Instance) -> None:
    before = len(_records(instance))
    assert instance.stop() == 0
    instance.start()
    instance.ok("admin.vm.tag.Set", "dom0", "after-restart")
    _telling(instance, "after-restart")
    assert len(_records(instance)) > before
    _verified(instance)
    done = _audit(instance, "--qube", "no-such-qube")
    assert (done.returncode, done.stdout) == (0, "")
