"""The audit log: form of a line, files, what is told of calls, reading and verifying."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from bulkhead.config import Settings
from bulkhead.model.auditlog import GENESIS, AuditBroken, Chain, Head, make_line, read_line
from clients.cli.instance.audit import AuditError, Reader, since_time
from services.adminapi.adapters.audit_file import AuditFile
from services.adminapi.audit_exporter import AuditExporter
from services.adminapi.core.audit import BURST, LEFT_OUT, RATE, Bound, of_call, of_frame
from services.adminapi.core.calls import CALLS
from services.adminapi.core.checks import Checked
from tests.fakes.adminapi import app


def _log(directory: Path, count: int, rotate: int = 1 << 20) -> AuditFile:
    file = AuditFile(directory, rotate)
    file.open()
    for number in range(1, count + 1):
        file.append(
            [{"kind": "change", "revision": number, "exported": number, "registry_hash": "ab"}]
        )
    return file


def _problems(directory: Path) -> list[tuple[str, str]]:
    reader = Reader(directory)
    lines = list(reader.read())
    rest = reader.rest()
    if rest is not None:
        lines.append(rest)
    return [(line.where, line.problem) for line in lines if line.record is None]


def test_a_line_follows_its_predecessor() -> None:
    first, head = make_line(Head(), {"kind": "gap"})
    second, end = make_line(head, {"exported": 7, "registry_hash": "aa"})
    assert json.loads(first)["previous"] == GENESIS
    assert json.loads(second)["previous"] == json.loads(first)["hash"]
    assert (end.number, end.exported, end.registry_hash) == (2, 7, "aa")
    assert read_line(second)[1] == end


def test_every_altered_byte_is_found_and_its_line_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody writes here: an unfinished line need not be given time.
    monkeypatch.setattr("clients.cli.instance.audit._SETTLE_S", -1.0)
    _log(tmp_path, 3).close()
    path = tmp_path / "audit-000001.jsonl"
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == 0x0A]
    assert _problems(tmp_path) == []
    with path.open("r+b", buffering=0) as file:  # in place: a new file each time is slow
        for position, byte in enumerate(whole):
            os.pwrite(file.fileno(), bytes([byte ^ 1]), position)
            line = 1 + sum(end < position for end in ends)
            found = _problems(tmp_path)
            assert found and found[0][0] == f"{path.name}:{line}", position
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert _problems(tmp_path) == []
    for cut in range(1, 20):
        path.write_bytes(whole[:-cut])
        assert _problems(tmp_path)[0][0] == f"{path.name}:3"


def test_a_removed_and_a_repeated_line_are_found() -> None:
    lines, head = [], Head()
    for _ in range(4):
        line, head = make_line(head, {"kind": "gap"})
        lines.append(line)
    chain = Chain()
    chain.feed(lines[0])
    with pytest.raises(AuditBroken, match="record 2 is missing"):
        chain.feed(lines[2])
    chain.feed(lines[3])
    with pytest.raises(AuditBroken):
        chain.feed(lines[3])


def test_a_beginning_that_was_cut_off_is_found_unless_files_were_archived(tmp_path: Path) -> None:
    _log(tmp_path, 6, rotate=600).close()
    first, second = sorted(tmp_path.iterdir())[:2]
    whole = first.read_bytes()
    first.write_bytes(whole[whole.index(b"\n") + 1 :])
    (found,) = _problems(tmp_path)
    assert found == (f"{first.name}:1", "record 1 is missing, record 2 follows")
    first.unlink()
    assert second.name == "audit-000002.jsonl"
    assert _problems(tmp_path) == []


def test_a_write_that_fails_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _log(tmp_path, 2)
    path = tmp_path / "audit-000001.jsonl"
    whole, head = path.read_bytes(), file.head
    write = os.write

    def short(handle: int, data: bytes) -> int:
        if len(data) < 500:
            raise OSError(errno.ENOSPC, "no space left")
        return write(handle, bytes(data)[:500])

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(OSError, match="no space"):
        file.append([{"kind": "call", "result": "x" * 300}, {"kind": "call", "result": "y" * 300}])
    monkeypatch.undo()
    assert (path.read_bytes(), file.head) == (whole, head)
    file.append([{"kind": "call"}])
    file.close()
    assert _problems(tmp_path) == []


def test_the_chain_goes_on_over_files_and_restarts(tmp_path: Path) -> None:
    _log(tmp_path, 5, rotate=100).close()
    again = _log(tmp_path, 0, rotate=100)
    assert (again.head.number, again.head.exported) == (5, 5)
    again.append([{"kind": "change", "exported": 6, "registry_hash": "cd"}])
    again.close()
    assert len(list(tmp_path.iterdir())) > 3
    lines = list(Reader(tmp_path).read())
    assert [line.record["number"] for line in lines if line.record] == [1, 2, 3, 4, 5, 6]
    assert _problems(tmp_path) == []
    sorted(tmp_path.iterdir())[1].unlink()
    assert any("missing" in problem for _, problem in _problems(tmp_path))


def test_what_a_crash_left_of_a_line_is_cut_off(tmp_path: Path) -> None:
    _log(tmp_path, 2).close()
    path = tmp_path / "audit-000001.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"number":3,"expo')
    file = _log(tmp_path, 0)
    assert (file.head.number, path.read_bytes()) == (2, whole)
    file.append([{"kind": "gap"}])
    file.close()
    assert _problems(tmp_path) == []


def test_a_rotation_cut_short_leaves_an_empty_file(tmp_path: Path) -> None:
    _log(tmp_path, 2).close()
    (tmp_path / "audit-000002.jsonl").touch()
    file = _log(tmp_path, 0)
    assert file.head.number == 2
    file.append([{"kind": "gap"}])
    file.close()
    assert _problems(tmp_path) == []


def test_a_damaged_end_is_kept_and_told(tmp_path: Path) -> None:
    _log(tmp_path, 2).close()
    path = tmp_path / "audit-000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"revision":2', b'"revision":9'))
    file = _log(tmp_path, 0)
    assert "altered" in file.finding
    file.close()


def test_secrets_and_notes_stay_out() -> None:
    def record(method: str, arg: str, payload: bytes) -> dict[str, object]:
        call = CALLS["admin"][method]
        return of_call(Checked(call, app(), app(), arg, payload), "refused", "NO")

    assert record("admin.vm.feature.Set", "vpn.password", b"hunter2")["payload"] == LEFT_OUT
    assert record("admin.pool.Add", "x", b"name=y\npassphrase=z")["payload"] == LEFT_OUT
    assert "dear" not in str(record("admin.vm.notes.Set", "", b"dear diary"))
    assert record("admin.vm.property.Set", "netvm", b"sys")["payload"] == "sys"


def test_a_refused_frame_is_told_unless_it_could_change_nothing() -> None:
    told = of_frame("admin", b"admin.vm.Start+ nobody name work\0", "no such qube")
    assert told is not None and (told["source"], told["method"]) == ("nobody", "admin.vm.Start")
    assert of_frame("admin", b"admin.vm.List+ nobody name work\0", "") is None
    assert of_frame("admin", b"admin.vm.Nothing+ nobody name work\0", "") is None
    assert of_frame("admin", b"\xff\xff", "") is None


def test_refused_calls_cannot_fill_the_disk() -> None:
    bound = Bound()
    admitted = sum(bound.admit("bad", 0.0) for _ in range(1000))
    assert admitted == int(BURST)
    assert bound.admit("good", 0.0)
    assert sum(bound.admit("bad", 1.0) for _ in range(1000)) == int(RATE)
    assert bound.take_held_back() == {"bad": 2000 - int(BURST) - int(RATE)}
    assert bound.take_held_back() == {}


def test_what_succeeded_and_what_dom0_tried_is_told_whole(tmp_path: Path) -> None:
    async def scene() -> None:
        replica = SimpleNamespace(subscribe=lambda _: None, revision=0)
        exporter = AuditExporter(tmp_path, lambda: pytest.fail("asked"), replica)  # type: ignore[arg-type]
        for number in range(300):
            exporter.note({"kind": "call", "source": "work", "result": f"work {number}"})
            exporter.note({"kind": "refused", "source": "dom0", "result": f"dom0 {number}"})
            exporter.note({"kind": "refused", "source": "work", "result": "again"})
        await exporter.close()

    asyncio.run(scene())
    told = [line.record["result"] for line in Reader(tmp_path).read() if line.record]
    for source in ("work", "dom0"):
        assert [text for text in told if text.startswith(source)] == [
            f"{source} {number}" for number in range(300)
        ]
    assert int(BURST) <= told.count("again") < 300
    assert told[-1].endswith("they were too many")


def test_since() -> None:
    assert since_time("", 1000.0) == 0.0
    assert since_time("10m", 1000.0) == 400.0
    assert since_time("1970-01-02T00:00+00:00", 0.0) == 86400.0
    with pytest.raises(AuditError):
        since_time("yesterday", 0.0)


def test_the_directory_is_below_the_logs(tmp_path: Path) -> None:
    from clients.cli.instance.audit import directory_of

    assert directory_of(Settings(root=tmp_path)) == tmp_path / "var/log/qubes/audit"


def test_a_record_that_comes_while_a_thread_writes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    may_write.set()
    write = AuditFile.write

    def slowly(file: AuditFile, records: Sequence[Mapping[str, object]]) -> None:
        assert threading.current_thread() is not threading.main_thread()  # it may take its time
        assert may_write.wait(30)
        write(file, records)

    monkeypatch.setattr(AuditFile, "write", slowly)

    async def scene() -> list[object]:
        replica = SimpleNamespace(subscribe=lambda _: None, revision=0)
        exporter = AuditExporter(tmp_path, lambda: pytest.fail("asked"), replica)  # type: ignore[arg-type]
        exporter.note({"kind": "refused", "source": "dom0", "result": "before the file is open"})
        told = [exporter.waiting]  # nobody is kept waiting for a file that cannot be had
        assert await exporter.flush()
        may_write.clear()
        page = asyncio.create_task(exporter._append([{"kind": "gap", "result": "a page"}]))
        await asyncio.sleep(0)
        exporter.note({"kind": "refused", "source": "dom0", "result": "meanwhile"})
        told.append(exporter.waiting)
        may_write.set()
        await exporter.written()
        found = [line.record["result"] for line in Reader(tmp_path).read() if line.record]
        exporter.note({"kind": "call", "source": "dom0", "result": "at once"})
        told.append(exporter.waiting)
        await exporter.written()
        found += [line.record["result"] for line in Reader(tmp_path).read() if line.record][-1:]
        told.append(exporter.waiting)
        assert told == [False, True, True, False]
        await page
        assert exporter.counters["audit_number"] == exporter.counters["audit_records"] == 4
        await exporter.close()
        return found

    assert asyncio.run(scene()) == ["before the file is open", "a page", "meanwhile", "at once"]
    assert _problems(tmp_path) == []
