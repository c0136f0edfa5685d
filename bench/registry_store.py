"""Cost of a durable change and of a start, at 10 and at 5,000 qubes.

python -m bench.registry_store [--changes N] [--directory DIR]

Runs the registry's engine, checkpointer and store as the service does, without the bus.
Changes with 10 qubes, changes with 5,000 and raw appends with fdatasync are interleaved,
so that what else the machine does falls on all alike. Exits 1 above a limit.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import secrets
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import uvloop

from bulkhead.api import records_pb2, registry_pb2
from bulkhead.bus.dispatch import Call
from bulkhead.model import xmlstore
from bulkhead.model.defaults import class_volumes, new_store, new_volume
from bulkhead.model.records import Qube, QubePut
from bulkhead.model.view import View
from services.registry.checkpointer import Checkpointer
from services.registry.core.group import Accepted
from services.registry.engine import Engine
from services.registry.handlers import RegistryHandlers
from services.registry.replies import DurableReplies
from services.registry.store import open_store

FEW, MANY = 10, 5_000
GROWTH_LIMIT = 1.3
RAW_LIMIT = 4.0
LOAD_LIMIT_S = 2.0


def make_store(directory: Path, qubes: int) -> int:
    """A qubes.xml with that many AppVMs of one template; returns its size in bytes."""
    view = View()
    view.apply_all(new_store(str(directory), False))

    def add(name: str, qid: int, klass: str, **properties: str) -> None:
        qube = Qube(
            str(uuid.uuid5(uuid.NAMESPACE_DNS, name)),
            name,
            qid,
            klass,
            properties={"label": "red", **properties},
            features={"gui": "1", "qrexec": "1", "os": "Linux"},
            tags=frozenset({"created-by-dom0", f"group-{qid % 7}"}),
        )
        volumes = tuple(new_volume(view, qube, spec) for spec in class_volumes(klass))
        view.apply(QubePut(replace(qube, volumes=volumes)))

    add("tmpl", 1, "TemplateVM")
    for number in range(qubes):
        add(f"q{number}", number + 2, "AppVM", template="tmpl", netvm="", memory="400")
    data = xmlstore.document_of(view, "", 0)
    (directory / "qubes.xml").write_bytes(data)
    return len(data)


class NoStream:
    """Nobody listens; the messages are made all the same."""

    def publish(
        self, entry: records_pb2.StreamEntry, public: records_pb2.StreamEntry | None = None
    ) -> None:
        entry.SerializeToString()
        del public

    def skip(self, seq: int, revision: int) -> None:
        del seq, revision


class Bench:
    """One running store."""

    def __init__(self, directory: Path, qubes: int) -> None:
        log = logging.getLogger("bench")
        self.qubes = qubes
        self.store = open_store(directory)
        checkpointers: list[Checkpointer] = []

        def committed(pieces: Sequence[Accepted]) -> None:
            for checkpointer in checkpointers:
                checkpointer.changed(pieces)

        def fatal(error: BaseException) -> None:
            raise SystemExit(f"the journal broke: {error}")

        self.engine = Engine(
            self.store.view,
            self.store.journal,
            NoStream(),
            committed=committed,
            fatal=fatal,
            log=log,
        )
        self.checkpointer = Checkpointer(self.store, self.engine, log=log)
        checkpointers.append(self.checkpointer)
        self.handlers = RegistryHandlers(
            self.store,
            self.engine,
            self.checkpointer,
            DurableReplies(lambda: self.engine.seq),
            registry_boot=str(uuid.uuid4()),
            subscribers=lambda: 0,
            recent_dispids=(),
            log=log,
        )

    async def change(self, number: int) -> float:
        """Set a property of one qube; seconds until it is durable and answered."""
        call = Call(
            "adminapi", request_id=secrets.token_bytes(16), method="bulkhead.api.Registry.Mutate"
        )
        request = registry_pb2.MutateRequest(
            set_property=registry_pb2.SetProperty(
                qube=f"q{number % self.qubes}",
                name="memory",
                untrusted_value=str(300 + number % 1000),
            )
        )
        began = time.perf_counter()
        await self.handlers.mutate(request, call)
        return time.perf_counter() - began

    async def close(self) -> None:
        await self.checkpointer.close()
        await self.engine.close()
        self.store.journal.close()


def append(fd: int, data: bytes) -> float:
    """A raw append and fdatasync; seconds."""
    began = time.perf_counter()
    os.write(fd, data)
    os.fdatasync(fd)
    return time.perf_counter() - began


async def changes(directory: Path, count: int) -> tuple[float, float, float]:
    """Medians in seconds: (few qubes, many qubes, raw append)."""
    benches = []
    for qubes in (FEW, MANY):
        place = directory / f"with-{qubes}"
        place.mkdir()
        make_store(place, qubes)
        benches.append(Bench(place, qubes))
    few, many = benches
    fd = os.open(directory / "raw", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    # About what a change's row and stored reply take.
    row = secrets.token_bytes(2048)
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    for number in range(count + 50):
        sample = (await few.change(number), await many.change(number), append(fd, row))
        if number >= 50:
            for kept, seconds in zip(times, sample, strict=True):
                kept.append(seconds)
    os.close(fd)
    written = many.checkpointer.written
    await few.close()
    await many.close()
    print(f"checkpoints of {MANY} qubes written beside: {written}")
    few_s, many_s, raw_s = (statistics.median(kept) for kept in times)
    return few_s, many_s, raw_s


def load(directory: Path) -> float:
    """Median seconds of three starts with 5,000 qubes, with a journal to replay."""
    took = []
    for _ in range(3):
        gc.collect()
        began = time.perf_counter()
        store = open_store(directory / f"with-{MANY}")
        took.append(time.perf_counter() - began)
        assert len(store.view) == MANY + 2, "qubes were lost"
        store.journal.close()
    return statistics.median(took)


def main() -> None:
    """Exit status 1 above a limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--changes", type=int, default=1500)
    parser.add_argument("--directory", type=Path, help="on the file system to measure")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        # The loop that the service runs on.
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            few, many, raw = runner.run(changes(directory, arguments.changes))
        load_s = load(directory)
    print(f"durable change with {FEW:5} qubes: {few * 1e3:6.3f} ms")
    print(f"durable change with {MANY:5} qubes: {many * 1e3:6.3f} ms")
    print(f"raw append + fdatasync:         {raw * 1e3:6.3f} ms")
    rows = (
        (f"{MANY} qubes / {FEW} qubes", many / few, GROWTH_LIMIT),
        ("change / raw append", many / raw, RAW_LIMIT),
        (f"load of {MANY} qubes in s", load_s, LOAD_LIMIT_S),
    )
    failed = False
    for what, value, limit in rows:
        over = value > limit
        failed = failed or over
        print(f"{what:28} {value:6.2f}  limit {limit:.2f}  {'OVER' if over else 'ok'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
