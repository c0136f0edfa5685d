"""What calls cost over the Admin API's socket, how that grows, and what it is beside 4.4.

Two instances of its own run side by side, with few and with many qubes. Rounds of short
slices go round both and both floors, in turns, so that whatever else the machine does falls
on all alike; medians count, and first quartiles where few and many are compared. Floors: a
plain echo over a unix socket with the same connect, half-close and read to the end, for what
only reads; an append with fdatasync on the same file system, for what must be durable. Exit
status 1 when a figure is beyond its limit.

python -m bench.admin_api [--few N] [--many N] [--rounds N]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import uvloop

from bench._instance import LIST, PREFIX, Instance, ask

ROUNDS = 9
CALLS = 40
TURN = 20  # calls here, then as many there
CLIENTS = 32
# Release 4.4 at 500 qubes on two cores: milliseconds at the median for one client. Create
# and Remove write its whole store twice at least; Remove is the middle of 100 to 200.
REFERENCE_MS = {
    "List": 6.0,
    "Get": 1.4,
    "GetAll": 3.4,
    "Set": 88.0,
    "Create": 200.0,
    "Remove": 150.0,
}
# More clients gain it nothing.
REFERENCE_SETS_PER_S = 1000.0 / REFERENCE_MS["Set"]
FASTER = {"List": 5.0, "Get": 5.0, "GetAll": 5.0, "Set": 20.0, "Create": 5.0, "Remove": 20.0}
FASTER_SETS = 40.0
GET_P99_MS = 5.0
START_S = 1.5
PSS_MIB = 250.0
# Calls whose cost must not depend on how many qubes there are.
CONSTANT = ("Get", "GetAll", "Set")
LIMIT_CONSTANT = 1.5


class _Answer(asyncio.Protocol):
    """A fixed reply at the end of the request."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def eof_received(self) -> bool:
        self.transport.write(b"0\0default=True type=int 400")
        self.transport.close()
        return True


async def _echo(path: Path) -> None:
    server = await asyncio.get_running_loop().create_unix_server(_Answer, str(path))
    print("ready", flush=True)
    await server.serve_forever()


async def _writer(path: Path) -> None:
    """Set a property without a pause until killed."""
    print("ready", flush=True)
    number = 0
    while True:
        number += 1
        await _exchange(path, _set(f"{PREFIX}1", 400 + number % 1000))


def _set(qube: str, memory: int) -> bytes:
    return f"admin.vm.property.Set+memory dom0 name {qube}\0{memory}".encode()


async def _exchange(path: Path, frame: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        writer.write(frame)
        writer.write_eof()
        reply = await reader.read()
    finally:
        writer.close()
    if not reply.startswith(b"0\0"):
        raise RuntimeError(f"refused: {reply!r}")


def sets_per_second(path: Path, clients: int, each: int) -> float:
    """Changes of different qubes by that many clients at once."""

    async def client(number: int) -> None:
        for turn in range(each):
            await _exchange(path, _set(f"{PREFIX}{number}", 500 + turn))

    async def all_clients() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(clients)))
        return clients * each / (time.perf_counter() - began)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(all_clients())


@contextlib.contextmanager
def beside(role: str, path: Path) -> Iterator[None]:
    """Another process of this module, ready: "echo" or "writer"."""
    command = [sys.executable, "-m", "bench.admin_api", "--role", role, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def percentile(values: list[float], share: float) -> float:
    """The value that this share of all values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass
class Series:
    """Seconds of each call of a kind, by place: "few", "many" or "" for a floor."""

    found: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def measure(self, key: tuple[str, str], call: Callable[[], object], times: int) -> None:
        """Call so often, note each."""
        values = self.found.setdefault(key, [])
        for _ in range(times):
            start = time.perf_counter()
            call()
            values.append(time.perf_counter() - start)

    def quick_ms(self, what: str, place: str) -> float:
        """The first quartile, in ms. A short call costs half as much where client and service
        share a processor as where one wakes the other's: by luck the median is either."""
        return percentile(self.found[what, place], 0.25) * 1e3

    def ms(self, what: str, place: str) -> float:
        """The median."""
        return statistics.median(self.found[what, place]) * 1e3


class Floors:
    """What nothing could be faster than."""

    def __init__(self, echo: Path, directory: Path) -> None:
        self._echo = echo
        self._fd = os.open(directory / "raw", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._row = os.urandom(2048)

    def echo(self) -> None:
        """One exchange with a server that does nothing."""
        ask(self._echo, LIST)

    def append(self) -> None:
        """About what a change's row takes, durable."""
        os.write(self._fd, self._row)
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def _checked(path: Path, frame: bytes) -> None:
    reply = ask(path, frame)
    if not reply.startswith(b"0\0"):
        raise RuntimeError(f"{frame!r} was refused: {reply!r}")


def _setter(path: Path, qube: str, memory: Iterator[int]) -> Callable[[], None]:
    return lambda: _checked(path, _set(qube, next(memory)))


def _slices(at: Path, turn: int) -> list[tuple[str, int, Callable[[], None]]]:
    """What is called, how often in a round, and the call."""
    qube = f"{PREFIX}0"
    memory = iter(range(400 + turn * CALLS, 10**6))
    get = f"admin.vm.property.Get+memory dom0 name {qube}\0".encode()
    get_all = f"admin.vm.property.GetAll+ dom0 name {qube}\0".encode()
    return [
        ("Get", CALLS, partial(_checked, at, get)),
        ("GetAll", CALLS, partial(_checked, at, get_all)),
        ("List", CALLS // 2, partial(_checked, at, LIST)),
        ("Set", CALLS // 2, _setter(at, qube, memory)),
        ("every qube", 1, partial(_checked, at, b"bulkhead.vm.GetAll+ dom0 name dom0\0")),
    ]


def one_round(series: Series, floors: Floors, places: dict[str, Instance], turn: int) -> None:
    """A slice of everything, here and there in turns: a store that is being written behind
    the calls of one then slows both."""
    series.measure(("echo", ""), floors.echo, CALLS)
    series.measure(("append", ""), floors.append, CALLS)
    slices = {place: _slices(instance.socket, turn) for place, instance in places.items()}
    for same in zip(*slices.values(), strict=True):
        turns = max(1, same[0][1] // TURN)
        for _ in range(turns):
            for place, (what, times, call) in zip(slices, same, strict=True):
                series.measure((what, place), call, times // turns)
    for place, instance in places.items():
        at = instance.socket
        for number in range(4):
            name = f"made-{number}"
            create = f"admin.vm.Create.AppVM+ dom0 name dom0\0name={name} label=red".encode()
            remove = f"admin.vm.Remove+ dom0 name {name}\0".encode()
            series.measure(("Create", place), partial(_checked, at, create), 1)
            series.measure(("Remove", place), partial(_checked, at, remove), 1)


@dataclass
class Verdict:
    """The lines of the report, and whether all limits were met."""

    met: bool = True

    def line(self, what: str, shown: str, good: bool | None = None) -> None:
        """One figure; good None = it has no limit."""
        self.met = self.met and good is not False
        word = {True: "ok", False: "BEYOND ITS LIMIT", None: ""}[good]
        print(f"{what:<28} {shown:<74} {word}".rstrip(), flush=True)


def report_calls(verdict: Verdict, series: Series, few: int, many: int) -> None:
    """The medians with many qubes: beside the floor, beside 4.4, beside few qubes."""
    echo, append = series.ms("echo", ""), series.ms("append", "")
    verdict.line("floor: echo", f"{echo:8.3f} ms")
    verdict.line("floor: append + fdatasync", f"{append:8.3f} ms")
    for what, reference in REFERENCE_MS.items():
        here = series.ms(what, "many")
        floor = echo if what in ("List", "Get", "GetAll") else echo + append
        late = percentile(series.found[what, "many"], 0.99) * 1e3
        faster = reference / here
        verdict.line(
            f"{what}, {many} qubes",
            f"{here:8.3f} ms  p99 {late:8.3f}  {here / floor:6.1f} x floor   "
            f"{faster:6.1f} x 4.4 (at least {FASTER[what]:.0f})",
            faster >= FASTER[what],
        )
    every = series.ms("every qube", "many")
    verdict.line(f"every qube, {many} qubes", f"{every:8.3f} ms  {every / echo:23.1f} x floor")
    for what in CONSTANT:
        ratio = series.quick_ms(what, "many") / series.quick_ms(what, "few")
        verdict.line(
            f"{what}, {many} to {few} qubes",
            f"{ratio:8.2f} (at most {LIMIT_CONSTANT})",
            ratio <= LIMIT_CONSTANT,
        )
    # dom0 and the template are listed too.
    listed = {"few": few + 2, "many": many + 2}
    share = {place: series.ms("List", place) / listed[place] for place in listed}
    ratio = share["many"] / share["few"]
    verdict.line(
        f"List per qube, {many} to {few}",
        f"{ratio:8.2f} (at most {LIMIT_CONSTANT})",
        ratio <= LIMIT_CONSTANT,
    )
    for what in ("Create", "Remove"):
        ratio = series.ms(what, "many") / series.ms(what, "few")
        verdict.line(f"{what}, {many} to {few} qubes", f"{ratio:8.2f}")


def many_clients(verdict: Verdict, path: Path, rounds: int) -> None:
    """Throughput of changes, and reads beside a busy writer, both with many qubes."""
    rates = [sets_per_second(path, CLIENTS, 20) for _ in range(rounds)]
    rate = statistics.median(rates)
    faster = rate / REFERENCE_SETS_PER_S
    verdict.line(
        f"Set, {CLIENTS} clients",
        f"{rate:8.0f} a second{faster:33.1f} x 4.4 (at least {FASTER_SETS:.0f})",
        faster >= FASTER_SETS,
    )
    frame = f"admin.vm.property.Get+memory dom0 name {PREFIX}0\0".encode()
    late = []
    with beside("writer", path):
        for _ in range(rounds):
            series = Series()
            series.measure(("Get", ""), lambda: _checked(path, frame), 200)
            late.append(percentile(series.found["Get", ""], 0.99) * 1e3)
    p99 = statistics.median(late)
    verdict.line(
        "Get beside a writer, p99",
        f"{p99:8.3f} ms (below {GET_P99_MS:.0f})",
        p99 < GET_P99_MS,
    )


def starts(verdict: Verdict, instance: Instance, rounds: int) -> None:
    """Start-up and memory of the instance, alone."""
    took = []
    for _ in range(rounds):
        instance.stop()
        took.append(instance.start())
    first = statistics.median(took)
    verdict.line(
        "start to the first answer",
        f"{first:8.2f} s, fastest {min(took):.2f} (below {START_S})",
        first < START_S,
    )
    for _ in range(50):
        ask(instance.socket, LIST)
    shares = instance.pss()
    parts = ", ".join(f"{name} {mib:.0f}" for name, mib in shares.items())
    total = sum(shares.values()) - shares["launcher"]
    verdict.line(
        "services' memory (PSS)", f"{total:8.0f} MiB (below {PSS_MIB:.0f})", total < PSS_MIB
    )
    print(f"    {parts} MiB")


def main() -> int:
    """Measure, print, compare with the limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", type=int, default=10, help="qubes of the small instance")
    parser.add_argument("--many", type=int, default=500, help="qubes of the large instance")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--role", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.few < 1 or args.many < CLIENTS:  # each of them writes to a qube of its own
        parser.error(f"--few is at least 1, --many at least {CLIENTS}")
    if args.role is not None:
        role = {"echo": _echo, "writer": _writer}[args.role[0]]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(role(Path(args.role[1])))
    verdict = Verdict()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        places: dict[str, Instance] = {}
        for place, count in (("few", args.few), ("many", args.many)):
            places[place] = Instance()
            stack.callback(places[place].close)
            places[place].grow(count)
        stack.enter_context(beside("echo", directory / "echo"))
        floors = Floors(directory / "echo", directory)
        stack.callback(floors.close)
        series = Series()
        for turn in range(args.rounds):
            one_round(series, floors, places, turn)
        report_calls(verdict, series, args.few, args.many)
        places["few"].close()
        many_clients(verdict, places["many"].socket, min(5, args.rounds))
        starts(verdict, places["many"], min(5, args.rounds))
    return 0 if verdict.met else 1


if __name__ == "__main__":
    sys.exit(main())
