"""What calls cost over the Admin API's socket, and how that grows with the qubes.

Works on a running instance (see bulkhead run). Adds qubes up to each wanted number, then
measures single calls one after the other: List, property Get, GetAll, GetAll of every
qube at once, and Set, in interleaved rounds. The floor is a plain echo over a unix
socket with the same connect, half-close and read to the end. Exit status 1 when a ratio
is above its limit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import uvloop

from clients.admin import AdminClient

ROUNDS = 9
CALLS = 60
PREFIX = "bench-"
# Calls whose cost must not depend on how many qubes there are: the largest number's
# median to the smallest's.
CONSTANT = ("Get", "GetAll", "Set")
LIMIT_CONSTANT = 1.5
# One qube's share of List, to the cost of a Get.
LIMIT_SHARE = 0.2


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


@contextlib.contextmanager
def echo_server() -> Iterator[AdminClient]:
    """The floor, in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "echo"
        command = [sys.executable, "-m", "bench.admin_api", "--echo", str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                yield AdminClient(path)
            finally:
                process.kill()


def measure(call: Callable[[], object], times: int) -> list[float]:
    """Seconds of each call."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def grow(client: AdminClient, count: int) -> None:
    """Have that many qubes of the bench."""
    have = {q.name for q in client.qubes()}
    for number in range(count):
        name = f"{PREFIX}{number}"
        if name not in have:
            payload = f"name={name} label=red".encode()
            client.call("admin.vm.Create.AppVM", payload=payload)


def clean(client: AdminClient) -> None:
    """Remove the bench's qubes."""
    for qube in client.qubes():
        if qube.name.startswith(PREFIX):
            client.call("admin.vm.Remove", qube.name)


def rounds(client: AdminClient, echo: AdminClient) -> dict[str, list[float]]:
    """Seconds of every call of every round, by name."""
    name = f"{PREFIX}0"
    memory = iter(range(400, 10**6))
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "echo": (lambda: echo.call("x"), CALLS),
        "Get": (lambda: client.get(name, "memory"), CALLS),
        "GetAll": (lambda: client.get_all(name), CALLS),
        "List": (lambda: client.call("admin.vm.List"), CALLS // 3),
        "Set": (lambda: client.set(name, "memory", str(next(memory))), CALLS // 3),
        "every qube": (lambda: client.call("bulkhead.vm.GetAll"), 3),
    }
    found: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, (call, times) in calls.items():
            found[key] += measure(call, times)
    return found


def percentile(values: list[float], share: float) -> float:
    """The value that this share of all values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> int:
    """Measure, print, compare with the limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, help="qubesd.sock of the instance")
    parser.add_argument("--echo", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--qubes", default="10,100,500", help="numbers of qubes, growing")
    parser.add_argument("--keep", action="store_true", help="leave the bench's qubes")
    args = parser.parse_args()
    if args.echo is not None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_echo(args.echo))
    if args.socket is None:
        with own_instance() as path:
            return compare(path, args)
    return compare(args.socket, args)


@contextlib.contextmanager
def own_instance() -> Iterator[Path]:
    """The socket of an instance with the simulated hypervisor, made for this run."""
    root = Path(tempfile.mkdtemp(prefix="bhb", dir="/tmp"))
    root.chmod(0o755)
    command = [sys.executable, "-m", "clients.cli.bulkhead"]
    launcher = None
    try:
        subprocess.run(
            [*command, "init", "--root", str(root)], check=True, stdout=subprocess.DEVNULL
        )
        launcher = subprocess.Popen(
            [*command, "run", "--root", str(root), "--hypervisor", "sim:"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert launcher.stdout is not None
        if not any(line.startswith("ready") for line in launcher.stdout):
            raise RuntimeError("the instance did not come up")
        client = AdminClient(root / "run/qubesd.sock", timeout=60)
        kernel = root / "kernel"
        kernel.write_bytes(bytes(4096))
        subprocess.run(
            [*command, "kernel", "add", "bench", "--vmlinuz", str(kernel), "--root", str(root)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        client.call("admin.property.Set", arg="default_kernel", payload=b"bench")
        client.call("admin.vm.Create.TemplateVM", payload=b"name=tmpl label=black")
        client.call("admin.property.Set", arg="default_template", payload=b"tmpl")
        yield root / "run/qubesd.sock"
    finally:
        if launcher is not None:
            launcher.terminate()
            launcher.wait(timeout=60)
            if launcher.stdout is not None:
                launcher.stdout.close()
        shutil.rmtree(root, ignore_errors=True)


def compare(socket: Path, args: argparse.Namespace) -> int:
    """All rounds at all sizes; exit status 1 when a ratio is above its limit."""
    counts = [int(word) for word in args.qubes.split(",")]
    client = AdminClient(socket, timeout=120)
    medians: dict[int, dict[str, float]] = {}
    with echo_server() as echo:
        for count in counts:
            grow(client, count)
            found = rounds(client, echo)
            medians[count] = {key: statistics.median(v) for key, v in found.items()}
            floor = medians[count]["echo"]
            print(f"{count} qubes")
            for key, values in found.items():
                middle, late = statistics.median(values), percentile(values, 0.99)
                print(
                    f"  {key:<11} p50 {middle * 1e3:7.3f} ms   p99 {late * 1e3:7.3f} ms   "
                    f"{middle / floor:6.2f} x echo"
                )
    if not args.keep:
        clean(client)
    return judge(counts, medians)


def judge(counts: list[int], medians: dict[int, dict[str, float]]) -> int:
    """Print the ratios; 1 when one is above its limit."""
    status = 0
    first, last = counts[0], counts[-1]
    if first == last:
        return 0
    for key in CONSTANT:
        ratio = medians[last][key] / medians[first][key]
        bad = ratio > LIMIT_CONSTANT
        status |= bad
        print(f"{key} at {last} to {first} qubes: {ratio:.2f} (limit {LIMIT_CONSTANT})")
    share = (medians[last]["List"] - medians[first]["List"]) / (last - first)
    ratio = share / medians[last]["Get"]
    print(f"List, per qube: {share * 1e6:.2f} us = {ratio:.3f} of a Get (limit {LIMIT_SHARE})")
    return int(status or ratio > LIMIT_SHARE)


if __name__ == "__main__":
    sys.exit(main())
