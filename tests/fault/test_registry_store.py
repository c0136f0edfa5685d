"""The registry's store, killed at every failpoint, torn, full and edited by others."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bulkhead.api import records_pb2, registry_pb2
from bulkhead.model import xmlstore
from bulkhead.model.defaults import class_volumes, new_store, new_volume
from bulkhead.model.records import Qube, QubePut
from bulkhead.model.view import View
from services.registry import failpoint_table
from services.registry.core import canonical

pytestmark = pytest.mark.fault

WAIT_S = 60


def qubes_xml(state_dir: Path) -> None:
    """A store as 4.4 leaves it: no instruction, no journal."""
    view = View()
    view.apply_all(new_store(str(state_dir), False))
    for number, (name, klass) in enumerate((("tmpl", "TemplateVM"), ("work", "AppVM")), 1):
        properties = {"label": "red"} | ({"template": "tmpl"} if klass == "AppVM" else {})
        qube = Qube(str(uuid.uuid4()), name, number, klass, properties=properties)
        volumes = tuple(new_volume(view, qube, spec) for spec in class_volumes(klass))
        view.apply(QubePut(replace(qube, volumes=volumes)))
    (state_dir / "qubes.xml").write_bytes(xmlstore.document_of(view, "", 0))


class Died(Exception):
    """The driver was killed; what it had said before is in .said."""


class Registry:
    """One run of the driver."""

    def __init__(self, state_dir: Path, failpoints: str = "", *arguments: str) -> None:
        environment = {**os.environ, "BULKHEAD_FAILPOINTS": failpoints}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.registry_driver", str(state_dir), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self.started: dict[str, Any] = {}

    def start(self) -> Registry:
        self.started = self.read()
        return self

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait(WAIT_S)
            assert status == -signal.SIGKILL, f"the driver ended with {status}"
            raise Died
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        return self.read()

    def mutate(self, request_id: str, **command: Any) -> dict[str, Any]:
        message = registry_pb2.MutateRequest(**command).SerializeToString().hex()
        return self.ask("mutate", id=request_id, message=message)

    def call(self, do: str, message: Any, request_id: str = "") -> dict[str, Any]:
        request_id = request_id or uuid.uuid4().hex
        return self.ask(do, id=request_id, message=message.SerializeToString().hex())

    def status(self) -> registry_pb2.StoreStatusReply:
        answer = self.call("store_status", registry_pb2.StoreStatusRequest())
        return registry_pb2.StoreStatusReply.FromString(bytes.fromhex(answer["reply"]))

    def dump(self) -> str:
        text: str = self.ask("dump")["dump"]
        return text

    def stop(self) -> None:
        self.ask("stop")
        assert self.process.wait(WAIT_S) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)

    def __enter__(self) -> Registry:
        try:
            return self.start()
        except Died:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass


def feature(value: str, name: str = "f") -> dict[str, Any]:
    return {"set_feature": registry_pb2.SetFeature(qube="work", name=name, value=value)}


def notes(text: str) -> dict[str, Any]:
    return {"set_notes": registry_pb2.SetNotes(qube="work", notes=text)}


def file_dump(state_dir: Path) -> str:
    """The canonical dump of qubes.xml alone, without what it cannot hold."""
    view = xmlstore.parse((state_dir / "qubes.xml").read_bytes()).view()
    return without_asides("".join(canonical.pages(view, 1 << 24)))


def without_asides(dump: str) -> str:
    out = []
    for line in dump.splitlines():
        record = json.loads(line)
        if record["kind"] == "operation":
            continue
        if record["kind"] == "qube":
            if record["value"]["state"] != "active":
                continue
            for name in ("run", "notes", "rules_digest"):
                record["value"].pop(name)
        out.append(json.dumps(record, sort_keys=True))
    return "\n".join(sorted(out))


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "qubes"
    directory.mkdir()
    qubes_xml(directory)
    return directory


@pytest.fixture
def old_store(state_dir: Path) -> Path:
    """A store that has been in use: two changes, one of them notes, all in the file."""
    with Registry(state_dir) as registry:
        assert registry.mutate("aa" * 16, **feature("old"))["reply"] is not None
        assert "reply" in registry.mutate("ab" * 16, **notes("old notes"))
        registry.stop()
    return state_dir


# ---- a kill at every failpoint


@dataclass(frozen=True)
class Scenario:
    """How a failpoint is reached.

    prepare: what is done to the files before the start that is killed. act: requests of
    the killed run, each (id, command); a reply before the kill makes it acknowledged.
    settle: ask for a checkpoint after them. resolve: adopt or discard.
    """

    prepare: Callable[[Path], None] | None = None
    act: tuple[tuple[str, dict[str, Any]], ...] = ()
    settle: bool = False
    resolve: bool | None = None


def tear(directory: Path) -> None:
    path = directory / "qubes.xml"
    path.write_bytes(path.read_bytes()[:-40])


def spoil_journal(directory: Path) -> None:
    path = directory / "journal.sqlite"
    data = bytearray(path.read_bytes())
    for at in range(4096, len(data), 4096):
        data[at : at + 512] = b"\xff" * 512
    path.write_bytes(data)


def drop_journal(directory: Path) -> None:
    for path in directory.glob("journal.sqlite*"):
        path.unlink()


def edit(directory: Path) -> None:
    path = directory / "qubes.xml"
    data = path.read_bytes()
    assert data.count(b">old</feature>") == 1
    path.write_bytes(data.replace(b">old</feature>", b">edited</feature>"))


CHANGE = ("c1" * 16, feature("new"))
SCENARIOS: dict[str, Scenario] = {
    "registry.commit.": Scenario(act=(CHANGE,)),
    "registry.publish.": Scenario(act=(CHANGE,)),
    "registry.reply.": Scenario(act=(CHANGE,)),
    "registry.checkpoint.": Scenario(act=(CHANGE,), settle=True),
    "registry.notes.before_write": Scenario(act=(("c2" * 16, notes("new")),), settle=True),
    "registry.notes.after_write": Scenario(act=(("c2" * 16, notes("new")),), settle=True),
    "registry.notes.before_remove": Scenario(act=(("c3" * 16, notes("")),), settle=True),
    "registry.notes.after_remove": Scenario(act=(("c3" * 16, notes("")),), settle=True),
    "registry.load.before_keep": Scenario(prepare=tear),
    "registry.load.after_keep": Scenario(prepare=tear),
    "registry.load.before_set_aside": Scenario(prepare=spoil_journal),
    "registry.load.during_set_aside": Scenario(prepare=spoil_journal),
    "registry.load.after_set_aside": Scenario(prepare=spoil_journal),
    "registry.load.before_new_journal": Scenario(prepare=drop_journal),
    "registry.load.after_new_journal": Scenario(prepare=drop_journal),
    "registry.resolve.": Scenario(prepare=edit, resolve=True),
}


def scenario_of(failpoint: str) -> Scenario | None:
    for prefix, scenario in SCENARIOS.items():
        if failpoint.startswith(prefix):
            return scenario
    return None


STORE_FAILPOINTS = sorted(
    name for name in failpoint_table.ROWS if not name.startswith("registry.init.")
)
INIT_FAILPOINTS = sorted(name for name in failpoint_table.ROWS if name not in STORE_FAILPOINTS)


def test_every_failpoint_has_a_scenario() -> None:
    assert [name for name in STORE_FAILPOINTS if scenario_of(name) is None] == []
    assert len(STORE_FAILPOINTS) + len(INIT_FAILPOINTS) == len(failpoint_table.ROWS)


def play(registry: Registry, scenario: Scenario, acknowledged: dict[str, str]) -> None:
    """Do the scenario's requests; replies that came are kept by request id."""
    for request_id, command in scenario.act:
        answer = registry.mutate(request_id, **command)
        acknowledged[request_id] = answer["reply"]
    if scenario.resolve is not None and registry.started["foreign"]:
        request = registry_pb2.ResolveForeignEditRequest(adopt=scenario.resolve)
        registry.call("resolve_foreign_edit", request)
    if scenario.settle:
        registry.ask("settle")


@pytest.mark.parametrize("again", [False, True], ids=["once", "killed-again"])
@pytest.mark.parametrize("failpoint", STORE_FAILPOINTS)
def test_killed(old_store: Path, failpoint: str, again: bool) -> None:
    scenario = scenario_of(failpoint)
    assert scenario is not None
    with Registry(old_store) as registry:
        before = registry.dump()
    if scenario.prepare is not None:
        scenario.prepare(old_store)

    acknowledged: dict[str, str] = {}
    with pytest.raises(Died):
        with Registry(old_store, f"{failpoint}=kill") as registry:
            play(registry, scenario, acknowledged)
    if again:
        # Killed once more on the way back, wherever that start writes something.
        everywhere = "registry.checkpoint.after_rename=kill,registry.load.after_keep=kill"
        try:
            with Registry(old_store, everywhere) as registry:
                play(registry, scenario, acknowledged)
        except Died:
            pass

    with Registry(old_store) as registry:
        present = registry.dump()
        features = [
            json.loads(line)["value"]["features"]
            for line in present.splitlines()
            if '"name":"work"' in line
        ]
        assert features[0]["f"] in ("old", "new", "edited")
        for request_id, command in scenario.act:
            answer = registry.mutate(request_id, **command)
            if request_id in acknowledged:
                assert answer["repeated"], "an acknowledged change was run again"
                assert answer["reply"] == acknowledged[request_id]
                assert registry.dump() == present, "an acknowledged change was lost"
            else:
                assert "reply" in answer
        if scenario.act:
            after = registry.dump()
            assert present in (before, after)
            assert after != before
        elif scenario.resolve is None:
            assert present == before
        else:
            play(registry, scenario, {})
            assert '"f":"edited"' in registry.dump()
            assert not registry.status().foreign_edit
        registry.ask("settle")
        settled = registry.dump()
        registry.stop()
    assert file_dump(old_store) == without_asides(settled)
    assert not list(old_store.glob("qubes.xml~*"))
    with Registry(old_store) as registry:
        assert registry.started["start"] == "REPLAY"
        assert registry.dump() == settled
        assert_notes_in_step(old_store, settled)


def assert_notes_in_step(directory: Path, dump: str) -> None:
    wanted = {}
    for line in dump.splitlines():
        record = json.loads(line)
        if record["kind"] == "qube" and record["value"]["notes"]:
            wanted[record["key"]] = record["value"]["notes"]
    found = {p.stem: p.read_text() for p in (directory / "notes").glob("*")}
    assert found == wanted


@pytest.mark.parametrize("failpoint", INIT_FAILPOINTS)
def test_killed_while_a_store_is_made(tmp_path: Path, failpoint: str) -> None:
    directory = tmp_path / "new" / "qubes"
    died = Registry(directory, f"{failpoint}=kill", "init")
    assert died.process.wait(WAIT_S) == -signal.SIGKILL
    died.__exit__()
    repeated = Registry(directory, "", "init")
    answer = repeated.read()
    repeated.__exit__()
    # Made now, or whole already and not made again.
    assert ("refused" in answer) is (failpoint == "registry.init.after_store")
    assert ("store_id" in answer) is (failpoint != "registry.init.after_store")
    with Registry(directory) as registry:
        assert registry.started["start"] in ("REPLAY", "ALONE")
        assert '"name":"dom0"' in registry.dump()


# ---- groups


def test_a_refused_commit_changes_nothing(old_store: Path) -> None:
    with Registry(old_store, "registry.commit.before_commit=error:1") as registry:
        before = registry.dump()
        refused = registry.mutate("d1" * 16, **feature("new"))
        assert refused["refused"] == "STORE_FAILED"
        assert registry.dump() == before
        assert "reply" in registry.mutate("d1" * 16, **feature("new"))


def test_many_waiting_changes_are_durable_when_answered(old_store: Path) -> None:
    requests = [
        {
            "do": "mutate",
            "id": uuid.uuid4().hex,
            "message": registry_pb2.MutateRequest(**feature(str(n), f"f{n}"))
            .SerializeToString()
            .hex(),
        }
        for n in range(200)
    ]
    with Registry(old_store) as registry:
        answers = registry.ask("many", all=requests)["all"]
        assert all("reply" in answer for answer in answers)
        revisions = [answer["revision"] for answer in answers]
        assert len(set(revisions)) == 200
        registry.kill()
    with Registry(old_store) as registry:
        dump = registry.dump()
        assert all(f'"f{n}":"{n}"' in dump for n in range(200))
        answers = registry.ask("many", all=requests)["all"]
        assert all(answer["repeated"] for answer in answers)


# ---- damage


def test_a_torn_file_is_made_anew_and_kept(old_store: Path) -> None:
    tear(old_store)
    torn = (old_store / "qubes.xml").read_bytes()
    with Registry(old_store) as registry:
        assert registry.started["start"] == "FROM_BLOB"
        assert "nothing is lost" in " ".join(registry.started["warnings"])
        assert '"f":"old"' in registry.dump()
    assert [p.read_bytes() for p in old_store.glob("qubes.xml.bad-*")] == [torn]
    assert xmlstore.parse((old_store / "qubes.xml").read_bytes()).store_id


def test_a_missing_file_is_made_anew(old_store: Path) -> None:
    with Registry(old_store) as registry:
        registry.mutate("d2" * 16, **feature("newer"))
        registry.kill()
    (old_store / "qubes.xml").unlink()
    with Registry(old_store) as registry:
        assert registry.started["start"] == "FROM_BLOB"
        assert '"f":"newer"' in registry.dump()
    assert (old_store / "qubes.xml").exists()


def test_a_damaged_journal_is_set_aside_with_a_clear_message(old_store: Path) -> None:
    with Registry(old_store) as registry:
        old_id = registry.started["store_id"]
    spoil_journal(old_store)
    with Registry(old_store) as registry:
        assert registry.started["start"] == "ALONE"
        assert registry.started["store_id"] != old_id
        said = " ".join(registry.started["warnings"])
        assert "journal.sqlite.bad-" in said and "sweep" in said
        assert '"f":"old"' in registry.dump()
        assert '"notes":"old notes"' in registry.dump()
        status = registry.status()
        assert "journal.sqlite.bad-" in " ".join(status.warnings)
    assert list(old_store.glob("journal.sqlite.bad-*"))


def spoil_replies(directory: Path) -> None:
    """Damage that the state is not made of."""
    path = directory / "journal.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'reply'").fetchone()
    with open(path, "r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 512)


@pytest.mark.parametrize(
    "failpoint", ["", *(f"registry.load.{at}_set_aside" for at in ("before", "during", "after"))]
)
def test_a_journal_damaged_elsewhere_loses_nothing(old_store: Path, failpoint: str) -> None:
    with Registry(old_store) as registry:
        registry.call("take_epoch", registry_pb2.TakeEpochRequest())
        create = records_pb2.CreateSpec(name="fresh", klass="StandaloneVM", label="red")
        spec = records_pb2.OperationSpec(create=create)
        assert "reply" in registry.call("begin", registry_pb2.BeginRequest(spec=spec))
        assert "reply" in registry.mutate("d8" * 16, **notes("unsaved"))
        dump = registry.dump()
        assert '"state":"running"' in dump and '"name":"fresh"' in dump
        revision = registry.mutate("d9" * 16, **feature("unsaved"))["revision"]
        dump = registry.dump()
        registry.kill()
    spoil_replies(old_store)
    if failpoint:
        with pytest.raises(Died):
            with Registry(old_store, f"{failpoint}=kill"):
                pass
    with Registry(old_store) as registry:
        assert registry.started["start"] == "REPLAY"
        assert registry.started["revision"] == revision
        assert registry.dump() == dump
        assert registry.mutate("da" * 16, **feature("next"))["revision"] == revision + 1
        registry.stop()
    assert list(old_store.glob("journal.sqlite.bad-*"))
    assert not list(old_store.glob("*~*"))


def test_an_altered_change_is_noticed(old_store: Path) -> None:
    """The chain over the rows: a row that was tampered with is not replayed."""
    with Registry(old_store) as registry:
        registry.mutate("d3" * 16, **feature("unsaved"))
        registry.kill()
    with sqlite3.connect(old_store / "journal.sqlite") as db:
        db.execute("UPDATE change SET caller = 'nobody' WHERE revision > 0")
    db.close()
    with Registry(old_store) as registry:
        assert registry.started["start"] == "ALONE"
        assert "was altered" in " ".join(registry.started["warnings"])


def test_without_file_and_journal_nothing_is_served(tmp_path: Path) -> None:
    with Registry(tmp_path) as registry:
        assert "bulkhead init" in registry.started["refused"]


def test_a_newer_journal_is_refused(old_store: Path) -> None:
    with sqlite3.connect(old_store / "journal.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = (old_store / "journal.sqlite").read_bytes()
    with Registry(old_store) as registry:
        assert "schema 99" in registry.started["refused"]
    assert (old_store / "journal.sqlite").read_bytes() == before


def test_a_second_registry_is_refused(old_store: Path) -> None:
    with Registry(old_store) as first, Registry(old_store) as second:
        assert str(first.process.pid) in second.started["refused"]
        assert "dump" in first.ask("dump")


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(directory)], check=True
    )
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_leaves_the_old_state(small_disk: Path) -> None:
    qubes_xml(small_disk)
    with Registry(small_disk) as registry:
        acknowledged = 0
        for number in range(200):
            before = registry.dump()
            answer = registry.mutate(uuid.uuid4().hex, **feature("x" * 20_000, f"g{number}"))
            if "refused" in answer:
                break
            acknowledged += 1
        assert answer["refused"] == "STORE_FULL"
        assert "nothing was changed" in answer["message"]
        assert registry.dump() == before
        assert acknowledged > 3
        registry.kill()
    filler = small_disk / "filler"
    assert not filler.exists()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    with Registry(small_disk) as registry:
        assert registry.dump() == before
        assert "reply" in registry.mutate("d4" * 16, **feature("fits"))
        registry.stop()
    assert b">fits</feature>" in (small_disk / "qubes.xml").read_bytes()


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_does_not_harm_the_file(small_disk: Path) -> None:
    """The journal has room left, the new qubes.xml has not."""
    qubes_xml(small_disk)
    with Registry(small_disk) as registry:
        registry.mutate("d5" * 16, **feature("small"))
        registry.ask("settle")
        old = (small_disk / "qubes.xml").read_bytes()
        filler = os.open(small_disk / "filler", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError):
            while True:
                os.write(filler, b"\0" * 4096)
        os.close(filler)
        registry.mutate("d6" * 16, **feature("later"))
        registry.ask("settle")
        assert (small_disk / "qubes.xml").read_bytes() == old
        (small_disk / "filler").unlink()
        answer = registry.mutate("d7" * 16, **feature("later"))
        assert "reply" in answer
        registry.stop()
    assert b">later</feature>" in (small_disk / "qubes.xml").read_bytes()
    assert not list(small_disk.glob("qubes.xml~*"))


# ---- somebody else edits the file


def test_an_edit_is_neither_merged_nor_overwritten(old_store: Path) -> None:
    edit(old_store)
    edited = (old_store / "qubes.xml").read_bytes()
    with Registry(old_store) as registry:
        assert registry.started["foreign"]
        assert '"f":"old"' in registry.dump()
        assert "reply" in registry.mutate("e1" * 16, **feature("mine", "g"))
        registry.ask("settle")
        status = registry.status()
        assert status.foreign_edit
        assert ">edited</feature>" in status.foreign_difference
        registry.stop()
    assert (old_store / "qubes.xml").read_bytes() == edited


def test_an_edit_while_running_stops_the_checkpoints(old_store: Path) -> None:
    with Registry(old_store) as registry:
        edit(old_store)
        edited = (old_store / "qubes.xml").read_bytes()
        registry.mutate("e2" * 16, **feature("mine", "g"))
        registry.ask("settle")
        assert (old_store / "qubes.xml").read_bytes() == edited
        assert registry.status().foreign_edit
        assert not list(old_store.glob("qubes.xml~*"))


def test_discard_keeps_the_edit_beside(old_store: Path) -> None:
    edit(old_store)
    edited = (old_store / "qubes.xml").read_bytes()
    with Registry(old_store) as registry:
        request = registry_pb2.ResolveForeignEditRequest(adopt=False)
        assert "reply" in registry.call("resolve_foreign_edit", request)
        assert not registry.status().foreign_edit
        registry.stop()
    assert b">old</feature>" in (old_store / "qubes.xml").read_bytes()
    assert [p.read_bytes() for p in old_store.glob("qubes.xml.foreign-*")] == [edited]


def test_adopt_keeps_what_the_file_cannot_say(old_store: Path) -> None:
    """The same file as 4.4 saves it: without instruction, with another value."""
    edit(old_store)
    path = old_store / "qubes.xml"
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])
    with Registry(old_store) as registry:
        assert registry.started["foreign"]
        request = registry_pb2.ResolveForeignEditRequest(adopt=True)
        assert "reply" in registry.call("resolve_foreign_edit", request)
        dump = registry.dump()
        assert '"f":"edited"' in dump and '"notes":"old notes"' in dump
        again = registry.call("resolve_foreign_edit", request)
        assert again["refused"] == "NO_FOREIGN_EDIT"
        registry.stop()
    with Registry(old_store) as registry:
        assert registry.started["start"] == "REPLAY"
        assert registry.dump() == dump


def test_an_equal_file_by_another_hand_is_no_edit(old_store: Path) -> None:
    path = old_store / "qubes.xml"
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])
    with Registry(old_store) as registry:
        assert not registry.started["foreign"]
    assert path.read_bytes().startswith(b"<?bulkhead")


# ---- what the file cannot hold


def test_operations_and_hidden_records_outlive_a_kill(old_store: Path) -> None:
    with Registry(old_store) as registry:
        registry.call("take_epoch", registry_pb2.TakeEpochRequest())
        spec = records_pb2.OperationSpec(
            create=records_pb2.CreateSpec(name="fresh", klass="AppVM", label="red", template="tmpl")
        )
        xml = (old_store / "qubes.xml").read_bytes()
        begun = registry.call("begin", registry_pb2.BeginRequest(spec=spec))
        operation = registry_pb2.BeginReply.FromString(bytes.fromhex(begun["reply"])).operation
        dump = registry.dump()
        assert '"state":"creating"' in dump
        registry.ask("settle")
        assert (old_store / "qubes.xml").read_bytes() == xml, "a hidden record changed the file"
        registry.kill()
    with Registry(old_store) as registry:
        assert registry.dump() == dump
        stale = registry_pb2.EndRequest(
            operation_id=operation.id, epoch=0, outcome=records_pb2.OPERATION_STATE_SUCCEEDED
        )
        assert registry.call("end", stale)["refused"] == "STALE_EPOCH"
        ended = registry_pb2.EndRequest(
            operation_id=operation.id, epoch=1, outcome=records_pb2.OPERATION_STATE_SUCCEEDED
        )
        assert "reply" in registry.call("end", ended)
        registry.kill()
    with Registry(old_store) as registry:
        assert '"name":"fresh"' in registry.dump() and '"creating"' not in registry.dump()
        registry.stop()
    assert b">fresh<" in (old_store / "qubes.xml").read_bytes()


def test_a_rules_digest_outlives_a_kill_and_is_not_in_the_file(old_store: Path) -> None:
    with Registry(old_store) as registry:
        work = next(
            json.loads(line)["key"]
            for line in registry.dump().splitlines()
            if '"name":"work"' in line
        )
        xml = (old_store / "qubes.xml").read_bytes()
        request = registry_pb2.AnnounceRequest(uuid=work, rules_digest="ab" * 32)
        assert "reply" in registry.call("announce", request)
        registry.ask("settle")
        assert (old_store / "qubes.xml").read_bytes() == xml
        registry.kill()
    with Registry(old_store) as registry:
        assert f'"rules_digest":"{"ab" * 32}"' in registry.dump()
