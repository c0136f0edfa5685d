"""What a change of one qube's rules costs beside a hundred others.

Runs as root. Makes a namespace with an enforce worker in it and a hundred qubes' chains,
then replaces one qube's chain in interleaved rounds: as the bare transaction through the
nftables library inside a process in the namespace (the floor), through the enforce
worker, and as the whole SetRules with its durable file: once where a rule is added that
accepts ("set"), once where flows may have to end ("tighten"), for which the kernel walks
the connection table of the whole host. Exit status 1 when a ratio is above its limit.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

from bulkhead.durable import write_file
from bulkhead.model.firewall_rules import parse_lines
from services.firewall.adapters.enforcer_client import EnforcerClient
from services.firewall.adapters.rules_files import RulesFiles
from services.firewall.adapters.state_files import StateFiles
from services.firewall.core import ruleset
from services.firewall.core.enforcement import Enforcer
from services.firewall.enforce.kernel import KernelTable
from services.firewall.keeper import RuleKeeper
from services.hostd.adapters.plumbing import Plumbing, in_namespace
from services.hostd.adapters.workers import Workers
from services.hostd.core.verbs import Names

QUBES = 100
ROUNDS = 40
NETVM = "99999999-9999-4999-8999-999999999999"
# Through the worker: frame, check, proof and answer on top of the transaction.
LIMIT_WORKER = {10: 6.0, 100: 3.0}
# With file, notes and announcement; the floor of that is the transaction and one durable write.
LIMIT_SET = {10: 10.0, 100: 6.0}


def target(number: int, namespace: str) -> ruleset.Target:
    """The number-th qube."""
    uuid = f"11111111-1111-4111-8111-{number:012d}"
    address = f"10.137.{number >> 8}.{number & 255}"
    return ruleset.make_target(
        uuid, f"q{number}", "b", NETVM, namespace, f"bx{number}", address, ""
    )


def lines(count: int, turn: int) -> list[str]:
    """Rules that differ in every turn."""
    return [
        f"action=accept dst4=10.{turn % 250}.{n % 250}.0/24 proto=tcp dstports={n + 1}-{n + 100}"
        for n in range(count)
    ]


def compiled(count: int, turn: int) -> Sequence[ruleset.Compiled]:
    """The same, translated."""
    return ruleset.compile_rules(parse_lines(lines(count, turn)), {})


class Bare:
    """The library inside the namespace, in a thread that stays there."""

    def __init__(self, namespace: str) -> None:
        self._work: list[tuple[Sequence[str], Any]] = []
        self._wake = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        self._stop = False
        self.took = 0.0
        self._thread = threading.Thread(target=lambda: in_namespace(namespace, self._run))
        self._thread.start()

    def _run(self) -> None:
        kernel = KernelTable()
        while True:
            self._wake.acquire()
            if self._stop:
                return
            commands, marks = self._work.pop()
            started = time.perf_counter()
            kernel.run(commands, marks)
            self.took = time.perf_counter() - started
            self._done.release()

    def run(self, commands: Sequence[str]) -> float:
        """Seconds of the transaction alone, without proof."""
        self._work.append((commands, {}))
        self._wake.release()
        self._done.acquire()
        return self.took

    def close(self) -> None:
        """End the thread."""
        self._stop = True
        self._wake.release()
        self._thread.join()


async def _timed(work: Awaitable[object]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


async def measure(directory: Path, namespace: str, bare: Bare) -> dict[str, Any]:
    """Medians in ms, and ratios."""
    (directory / "rules").mkdir()
    workers = Workers(directory, os.getuid(), logging.getLogger("bench"))

    async def open_enforcer(name: str) -> Enforcer:
        async def spawn() -> str:
            return str((await workers.ensure(6, name))[1])

        return EnforcerClient(spawn)

    async def announce(uuid: str, event: bool, digest: str | None) -> tuple[int, int]:
        del uuid, event, digest
        return 1, 1

    class NoNames:
        async def resolve(self, name: str) -> tuple[tuple[str, ...], float]:
            raise OSError(name)

    keeper = RuleKeeper(
        RulesFiles(directory / "rules"),
        StateFiles(directory / "run"),
        announce,
        open_enforcer,
        NoNames(),
    )
    found: dict[str, Any] = {"qubes": QUBES, "rounds": ROUNDS}
    try:
        await keeper.netvm_up(NETVM, "b", namespace, "up0")
        for number in range(1, QUBES + 1):
            one = target(number, namespace)
            await keeper.set_rules(one.uuid, one.qube, lines(10, number))
            await keeper.apply(one, False)
        worker = await open_enforcer(namespace)
        chosen = target(50, namespace)
        for count in (10, 100):
            times: dict[str, list[float]] = {
                name: [] for name in ("bare", "worker", "tighten", "set", "write")
            }
            for turn in range(ROUNDS):
                change = ruleset.apply(chosen, compiled(count, 3 * turn))
                times["bare"].append(bare.run(change.commands))
                other = ruleset.apply(chosen, compiled(count, 3 * turn + 1))
                times["worker"].append(await _timed(worker.change(other)))
                text = lines(count, 3 * turn + 2)
                times["tighten"].append(
                    await _timed(keeper.set_rules(chosen.uuid, chosen.qube, text))
                )
                more = [*text, "action=accept proto=udp"]
                times["set"].append(await _timed(keeper.set_rules(chosen.uuid, chosen.qube, more)))
                started = time.perf_counter()
                write_file(directory / "floor", b"x" * 200 * count)
                times["write"].append(time.perf_counter() - started)
            median = {name: statistics.median(values) * 1000 for name, values in times.items()}
            found[f"{count} rules"] = {
                **{f"{name} ms": round(value, 3) for name, value in median.items()},
                "worker to bare": round(median["worker"] / median["bare"], 2),
                "set to bare and write": round(
                    median["set"] / (median["bare"] + median["write"]), 2
                ),
            }
        await worker.close()
    finally:
        await keeper.close()
        await workers.close()
    return found


def main() -> int:
    """Print the figures as JSON; 1 when a ratio is above its limit."""
    if os.geteuid() != 0:
        print("firewall_apply needs root for its namespace", file=sys.stderr)
        return 1
    directory = Path(tempfile.mkdtemp(prefix="bhbench"))
    plumbing = Plumbing(Names.of_root(str(directory)))
    namespace = plumbing.ensure_namespace(6)
    bare = Bare(namespace)
    try:
        found = asyncio.run(measure(directory, namespace, bare))
    finally:
        bare.close()
        plumbing.delete_namespace(6)
        shutil.rmtree(directory)
    print(json.dumps(found, indent=1))
    over = [
        f"{count} rules: {what} {found[f'{count} rules'][what]} is above {limit[count]}"
        for what, limit in (
            ("worker to bare", LIMIT_WORKER),
            ("set to bare and write", LIMIT_SET),
        )
        for count in (10, 100)
        if found[f"{count} rules"][what] > limit[count]
    ]
    for line in over:
        print(line, file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
