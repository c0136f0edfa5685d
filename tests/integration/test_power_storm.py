"""Power calls of many clients at once on a few qubes whose guests are of every kind.

Nothing is said about which call wins: each is answered, with a reason or without, and
afterwards every invariant holds: no operation under way, no phase without its domain, no
rule, file or domain that belongs to nobody.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.domains.simhv.client import SimControl
from tests.fakes import loopfs
from tests.fault.harness import wait_quiet
from tests.instance import Instance, running
from tests.integration.adminapi_world import KERNEL, add_kernel

pytestmark = pytest.mark.integration

SEED = int(os.environ.get("BULKHEAD_STORM_SEED", "1"))
CALLS = int(os.environ.get("BULKHEAD_STORM_CALLS", "400"))
CLIENTS = 12
# By docs/operations.md: the queue of a qube, then a start with its netvm; no call comes near.
ANSWER_S = 240.0
QUIET_S = 120.0
GUEST_TIMEOUT = "2"
QUBES = ("net", "other-net", "obeys", "ignores", "agentless", "plain")
NATURES = {
    "ignores": {"agent": "connect", "shutdown": "ignore"},
    "agentless": {"agent": "never"},
    "obeys": {"agent": "connect"},
    "plain": {"agent": "absent", "pm_suspend": "unsupported"},
}
CALLS_OF_A_QUBE: tuple[tuple[str, str, bytes], ...] = (
    ("admin.vm.Start", "", b""),
    ("admin.vm.Start", "", b""),
    ("admin.vm.Start", "", b""),
    ("admin.vm.Shutdown", "", b""),
    ("admin.vm.Shutdown", "wait", b""),
    ("admin.vm.Shutdown", "force", b""),
    ("admin.vm.Shutdown", "force+wait", b""),
    ("admin.vm.Kill", "", b""),
    ("admin.vm.Pause", "", b""),
    ("admin.vm.Unpause", "", b""),
    ("admin.vm.Suspend", "", b""),
    ("admin.vm.Resume", "", b""),
    ("admin.vm.property.Set", "netvm", b"net"),
    ("admin.vm.property.Set", "netvm", b"other-net"),
    ("admin.vm.property.Set", "netvm", b""),
    ("admin.vm.volume.Resize", "private", b"3000000000"),
    ("admin.vm.CurrentState", "", b""),
)


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Instance, Path]]:
    with loopfs.mounted("xfs", 2048) as mount:
        mount.parent.chmod(0o755)
        pool = mount / "pool"
        pool.mkdir(mode=0o755)
        with running(pool_dir=pool) as instance:
            yield instance, pool


def prepare(instance: Instance) -> None:
    add_kernel(instance)
    instance.until(
        lambda: KERNEL in instance.ok("bulkhead.kernel.List"), 20.0, "the kernel is known"
    )
    for name, value in (
        ("default_kernel", KERNEL),
        ("default_shutdown_timeout", GUEST_TIMEOUT),
        ("default_qrexec_timeout", GUEST_TIMEOUT),
    ):
        instance.ok("admin.property.Set", arg=name, payload=value.encode())
    with SimControl.of(instance.root) as sim:
        for name, nature in NATURES.items():
            sim.nature(name, **nature)
    instance.ok("admin.vm.Create.TemplateVM", payload=b"name=tmpl label=black")
    for name in QUBES:
        instance.ok("admin.vm.Create.AppVM", arg="tmpl", payload=f"name={name} label=red".encode())
        if name in ("agentless", "ignores", "obeys"):
            instance.ok("admin.vm.feature.Set", name, "qrexec", b"1")
    for name in ("net", "other-net"):
        instance.ok("admin.vm.property.Set", name, "provides_network", b"True")
        instance.ok("admin.vm.property.Set", name, "netvm", b"")


@pytest.mark.timeout(900)
def test_whoever_wins_nothing_is_left_half_done(place: tuple[Instance, Path]) -> None:
    instance, pool = place
    prepare(instance)
    pids = {name: instance.pid(name) for name in ("registry", "lifecycle", "domains", "adminapi")}
    choose = random.Random(SEED)
    calls = [(choose.choice(QUBES), *choose.choice(CALLS_OF_A_QUBE)) for _ in range(CALLS)]
    outcomes: Counter[tuple[str, str]] = Counter()

    def ask(call: tuple[str, str, str, bytes]) -> None:
        qube, method, arg, payload = call
        reply = instance.call(method, qube, arg, payload, timeout=ANSWER_S)
        assert reply.kind in ("ok", "exc"), (call, reply)
        assert "internal error" not in reply.message, (call, reply)
        assert "stuck" not in reply.message, (call, reply)
        outcomes[method, reply.kind] += 1

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(ask, calls))
    # Qubes came and went meanwhile; who caught one running is luck.
    for call in ("Start", "Shutdown", "Kill"):
        assert outcomes[f"admin.vm.{call}", "ok"] >= 3, outcomes
    for name in QUBES:  # a paused one keeps the network that it had until it goes on
        instance.call("admin.vm.Resume", name)
    assert wait_quiet(instance, pool, QUIET_S) == []
    assert pids == {name: instance.pid(name) for name in pids}
    for log in sorted((instance.root / "var/log/qubes").glob("*.log")):
        assert "Traceback" not in log.read_text(errors="replace"), log.read_text()[-4000:]
    # And all of them can still be brought up and down.
    for name in QUBES:
        if name != "agentless":
            if instance.state(name) != "Halted":
                instance.ok("admin.vm.Kill", name)
            instance.ok("admin.vm.Start", name)
    for name in QUBES:
        if name != "agentless":
            instance.call("admin.vm.Kill", name)
    assert wait_quiet(instance, pool, QUIET_S) == []
