"""Reads and verifies the audit log.

Owns the order of its files, filters and printing. Must not change anything. Invariant:
every record that is shown was checked against the one before it; a break is named with
file and line, and never hides the records behind it.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bulkhead.bus.errors import BusError
from bulkhead.config import Settings, SettingsError
from bulkhead.model.auditlog import AuditBroken, Chain, Head
from clients.cli.instance import operator

POLL_S = 0.2
# A line that is being written is whole after this long.
_SETTLE_S = 1.0
# The newest changes that the registry is asked for, and how long the log may lag behind.
_COMPARED = 200
_LAG_S = 10.0
_FIRST_FILE = 1
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class AuditError(Exception):
    """The log cannot be read, or an argument is unusable."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the log: a record, or what is wrong with it."""

    where: str
    record: dict[str, Any] | None
    problem: str = ""


def directory_of(settings: Settings) -> Path:
    """Where the audit log is."""
    return settings.log_dir / "audit"


def since_time(text: str, now: float) -> float:
    """Epoch seconds of --since; AuditError when it is no time."""
    if not text:
        return 0.0
    ago = re.fullmatch(r"([0-9]+)([smhd])", text)
    if ago:
        return now - int(ago[1]) * _UNITS[ago[2]]
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise AuditError(
            f"--since {text}: write a date or time such as 2026-01-31T12:00, or 90s, 10m, 2h, 3d"
        ) from None


class Reader:
    """Lines in order, across files, from where the last read() ended."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._chain = Chain()
        self._file = 0
        self._offset = 0
        self._count = 0

    def _numbers(self) -> list[int]:
        try:
            names = [p.name for p in self._directory.iterdir()]
        except OSError as error:
            raise AuditError(f"the audit log cannot be read: {error}") from error
        found = (re.fullmatch(r"audit-([0-9]{6})\.jsonl", name) for name in names)
        return sorted(int(match[1]) for match in found if match)

    def _path(self, number: int) -> Path:
        return self._directory / f"audit-{number:06d}.jsonl"

    def read(self) -> Iterator[Line]:
        """What is there now. An unfinished last line is left for the next time, or
        reported when another file follows it."""
        numbers = self._numbers()
        if not self._file and numbers:
            self._file = numbers[0]
            if self._file == _FIRST_FILE:
                # Nothing was before it; where files were archived, anything may have been.
                self._chain = Chain(Head())
        while self._file:
            path = self._path(self._file)
            later = [n for n in numbers if n > self._file]
            yield from self._read_file(path, last=not later)
            if not later:
                return
            if later[0] != self._file + 1:
                yield Line(
                    path.name, None, f"{self._path(self._file + 1).name} is missing after it"
                )
            self._file, self._offset, self._count = later[0], 0, 0

    def _read_file(self, path: Path, *, last: bool) -> Iterator[Line]:
        try:
            with path.open("rb") as file:
                file.seek(self._offset)
                for untrusted_line in file:
                    if last and not untrusted_line.endswith(b"\n"):
                        return
                    self._offset += len(untrusted_line)
                    self._count += 1
                    where = f"{path.name}:{self._count}"
                    try:
                        yield Line(where, self._chain.feed(untrusted_line))
                    except AuditBroken as error:
                        yield Line(where, None, str(error))
        except OSError as error:
            raise AuditError(f"the audit log cannot be read: {error}") from error

    def rest(self) -> Line | None:
        """The unfinished last line, when there still is one after a moment."""
        deadline = time.monotonic() + _SETTLE_S
        path = self._path(self._file)
        while self._file and path.stat().st_size > self._offset:
            if time.monotonic() > deadline:
                return Line(f"{path.name}:{self._count + 1}", None, "the line is cut off")
            time.sleep(POLL_S / 4)
            if b"\n" in path.read_bytes()[self._offset :]:
                return None  # it grew meanwhile: whole lines are for the next read()
        return None


def _about(record: dict[str, Any], qube: str) -> bool:
    if not qube:
        return True
    return f'"{qube}"' in json.dumps([record.get(k) for k in ("dest", "before", "after")]) or (
        f'"{qube}"' in str(record.get("result", ""))
    )


def render(record: dict[str, Any]) -> str:
    """One record for people."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(record.get("time", 0))))
    who = record.get("source") or record.get("caller") or "-"
    what = str(record.get("method", ""))
    if record.get("dest"):
        what += f" {record['dest']}"
    if record.get("argument"):
        what += f" {record['argument']}"
    revision = record.get("revision", "-")
    return (
        f"{record['number']:>8} {revision:>8}  {stamp}  {who:<16} {record.get('kind', ''):<9} "
        f"{what}  {record.get('result', '')}"
    )


class _Tally:
    """What was read: counts, the last number, and the newest changes by their revision."""

    def __init__(self) -> None:
        self.count = self.broken = self.last = 0
        self.exported: dict[int, str] = {}

    def take(self, line: Line) -> dict[str, Any] | None:
        """Count a line and report it where it is broken; its record."""
        record = line.record
        if record is None:
            self.broken += 1
            print(f"{line.where}: {line.problem}", file=sys.stderr)
            return None
        self.count += 1
        self.last = int(record["number"])
        if record.get("kind") == "change":
            self.exported[int(record["revision"])] = str(record["registry_hash"])
            while len(self.exported) > 4 * _COMPARED:
                del self.exported[next(iter(self.exported))]
        return record


def show(
    settings: Settings, *, verify: bool, qube: str, since: str, as_json: bool, follow: bool
) -> int:
    """Print and check; 1 when the chain is broken, 0 otherwise."""
    oldest = since_time(since, time.time())
    reader = Reader(directory_of(settings))
    tally = _Tally()
    while True:
        for line in reader.read():
            record = tally.take(line)
            if record is None or verify:
                continue
            if float(record.get("time", 0)) >= oldest and _about(record, qube):
                print(json.dumps(record) if as_json else render(record), flush=follow)
        if not follow:
            break
        time.sleep(POLL_S)
    rest = reader.rest()
    if rest is not None:
        tally.take(rest)
    if verify:
        return _verdict(settings, reader, tally)
    return 1 if tally.broken else 0


def _verdict(settings: Settings, reader: Reader, tally: _Tally) -> int:
    try:
        kept = operator.history(Settings.load(settings.root), qube="", limit=_COMPARED)
        written = operator.counters(Settings.load(settings.root), "adminapi").get("audit_number", 0)
    except (BusError, SettingsError, OSError):
        kept, written = None, 0
    deadline = time.monotonic() + _LAG_S
    # What was written by then is there now; what changed by then may follow a little later.
    for line in reader.read():
        tally.take(line)
    while kept:
        newest = max(tally.exported, default=0)
        if all(int(row["revision"]) <= newest for row in kept) or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
        for line in reader.read():
            tally.take(line)
    if tally.last < written:
        tally.broken += 1
        print(f"records {tally.last + 1} to {written} are missing at the end", file=sys.stderr)
    oldest = min(tally.exported, default=0)
    for row in kept or ():
        revision = int(row["revision"])
        if revision < oldest:
            continue
        if tally.exported.get(revision) != row["hash"]:
            tally.broken += 1
            what = "differs from" if revision in tally.exported else "is missing, but is in"
            print(f"revision {revision} {what} the registry's journal", file=sys.stderr)
    against = f", the newest {len(kept)} changes compared with the registry" if kept else ""
    if kept is None:
        against = "; the registry does not answer, so nothing was compared with it"
    print(f"{tally.count} records, {tally.broken} broken{against}")
    return 1 if tally.broken else 0
