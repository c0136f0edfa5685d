"""Every operation x every failpoint that it passes x SIGKILL of the process there.

The failpoints are learned from a traced run of each operation, so a new one is tested
without being named here. BULKHEAD_FAULT_KILLS=2 adds a second kill of the same kind of
step during recovery; BULKHEAD_FAULT_ALL_HITS=1 kills at every pass, not at one per name.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bulkhead import failpoints
from bulkhead.model.specs import KINDS
from clients.cli.instance.supervisor import RESTART_DELAY_LIMIT
from tests.fakes.loopfs import mounted
from tests.fault.follower import Follower
from tests.fault.harness import TRACE, run_case, told, wait_quiet, wait_stored
from tests.fault.scenarios import NETVM, SCENARIOS, Scenario
from tests.instance import Instance

pytestmark = [pytest.mark.fault, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("BULKHEAD_FAULT_KILLS", "1"))
# Killed in every scenario, a brief one too: the participant has done its part and nobody
# knows; the change is durable and nobody was told.
ALWAYS_AGAIN = frozenset({"lifecycle.step.after", "registry.commit.after_commit"})
# Passed by the clock, in whatever operation is under way or in none; every row of them is
# killed by tests/fault/test_registry_store.py.
BY_THE_CLOCK = "registry.checkpoint."
ALL_HITS = os.environ.get("BULKHEAD_FAULT_ALL_HITS", "") == "1" or KILLS > 1


@dataclass
class Ground:
    """One instance on a reflink pool, with a template; kept for all cases."""

    instance: Instance
    pool: Path
    trace: Path
    follower: Follower
    # Failpoints that each scenario passes undisturbed, as far as they are learned.
    passed: dict[str, Counter[str]] = field(default_factory=dict)
    # Kinds of operations that they are made of.
    kinds: dict[str, set[str]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    """The instance under attack."""
    with mounted("xfs", 1024) as pool:
        instance = Instance(pool_dir=pool)
        trace = instance.root / "fp" / TRACE
        trace.write_text("")
        trace.chmod(0o666)
        try:
            instance.start(
                environment={
                    "BULKHEAD_FAILPOINTS_TRACE": str(trace),
                    # Or most of the time goes into waiting for the next start of a service.
                    RESTART_DELAY_LIMIT: "0.05",
                }
            )
            prepare(instance, pool)
            follower = Follower(instance)
            try:
                assert told(instance, follower) == []
                yield Ground(instance, pool, trace, follower)
            finally:
                instance.close()
                follower.close()
        finally:
            instance.close()


def prepare(instance: Instance, pool: Path) -> None:
    """A kernel, a template, and the defaults that creating qubes needs."""
    kernel = pool / "vm-kernels" / "test"
    kernel.mkdir()
    for name in ("vmlinuz", "initramfs", "modules.img"):
        (kernel / name).write_bytes(b"\0" * 4096)
    instance.until(
        lambda: (
            instance.call("admin.property.Set", arg="default_kernel", payload=b"test").kind == "ok"
        ),
        60.0,
        "the kernel is known",
    )
    instance.ok("admin.vm.Create.TemplateVM", payload=b"name=tmpl label=black")
    instance.ok("admin.property.Set", arg="default_template", payload=b"tmpl")
    instance.ok("admin.vm.Create.AppVM", arg="tmpl", payload=f"name={NETVM} label=red".encode())
    instance.ok("admin.vm.property.Set", NETVM, "provides_network", b"True")
    instance.ok("admin.vm.property.Set", NETVM, "netvm", b"")
    instance.ok("admin.vm.Start", NETVM)
    # What dispvm does once for a host's boot is no part of any operation.
    marker = instance.settings.service_dir("dispvm") / "host-boot"
    instance.until(marker.exists, 60.0, "dispvm has noted this boot of the host")


def passes(ground: Ground, scenario: Scenario) -> Counter[str]:
    """Failpoints that an undisturbed run of the operation passes, and how often."""
    if scenario.name in ground.passed:
        return ground.passed[scenario.name]
    scenario.prepare(ground.instance)
    assert wait_quiet(ground.instance, ground.pool) == []
    ground.trace.write_text("")
    earlier = operations(ground.instance).keys()
    reply = scenario.act(ground.instance)
    assert reply.kind == "ok", f"{scenario.name}: {reply.exception} {reply.message}"
    assert wait_quiet(ground.instance, ground.pool) == []
    seen = Counter(
        name for name in ground.trace.read_text().split() if not name.startswith(BY_THE_CLOCK)
    )
    ground.kinds[scenario.name] = {
        kind for key, kind in operations(ground.instance).items() if key not in earlier
    }
    scenario.clean(ground.instance)
    assert wait_quiet(ground.instance, ground.pool) == []
    ground.passed[scenario.name] = seen
    return seen


def operations(instance: Instance) -> dict[str, str]:
    """Id -> kind of the operations that are remembered."""
    rows = map(json.loads, instance.ok("bulkhead.op.List").splitlines())
    return {row["id"]: row["kind"] for row in rows}


def worth_a_kill(ground: Ground, scenario: Scenario) -> Counter[str]:
    """The failpoints at which this scenario is killed: in a sample a brief one only where
    those before it were not."""
    seen = passes(ground, scenario)
    if ALL_HITS or not scenario.brief:
        return seen
    earlier = {
        name for other in SCENARIOS[: SCENARIOS.index(scenario)] for name in passes(ground, other)
    }
    return Counter(
        {name: hits for name, hits in seen.items() if name in ALWAYS_AGAIN or name not in earlier}
    )


def stages(name: str, hits: int) -> list[tuple[str, ...]]:
    """The kills of one failpoint: at its middle pass, or at every one; then again."""
    numbers = range(1, hits + 1) if ALL_HITS else [(hits + 1) // 2]
    return [tuple(f"{name}=kill:{n}" if k == 0 else f"{name}=kill" for k in range(KILLS))
            for n in numbers]  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_a_kill_at_every_failpoint(ground: Ground, scenario: Scenario) -> None:
    seen = worth_a_kill(ground, scenario)
    assert seen, f"{scenario.name} passes no failpoint"
    failures: list[str] = []
    cases = missed = 0
    began = time.monotonic()
    for name, hits in sorted(seen.items()):
        for kills in stages(name, hits):
            cases += 1
            case = run_case(ground.instance, ground.pool, ground.follower, scenario, *kills)
            if not case.fired:
                # Commits and reports are made together, now more of them, now fewer: a pass
                # that does not come each time is one less, but the first always comes.
                missed += 1
                failures.extend(f"{kills[0]} missed: {problem}" for problem in case.problems)
                kills = (f"{name}=kill", *kills[1:])
                case = run_case(ground.instance, ground.pool, ground.follower, scenario, *kills)
                if not case.fired:
                    failures.append(f"{name} was not passed")
            failures.extend(f"{' then '.join(kills)}: {problem}" for problem in case.problems)
            assert len(failures) < 20, "\n".join(failures)
    failures.extend(wait_stored(ground.instance))
    print(
        f"{scenario.name}: {cases} cases at {len(seen)} failpoints, {missed} at the first pass "
        f"instead, {len(failures)} violations, {time.monotonic() - began:.0f} s"
    )
    assert not failures, "\n".join(failures)


def test_every_kind_of_operation_is_killed(ground: Ground) -> None:
    for scenario in SCENARIOS:
        passes(ground, scenario)
    assert set().union(*ground.kinds.values()) == set(KINDS)


# Tables of which another test kills at every row; what it says to prove that.
EVERY_ROW_ELSEWHERE = {
    "adopt": ("tests/integration/test_adoption.py", "for point in POINTS"),
    "registry": ("tests/fault/test_registry_store.py", "in failpoint_table.ROWS"),
    "firewall": ("tests/fault/test_firewall_crash.py", "*sorted(ROWS)"),
    "storage": ("tests/fault/test_storage_crash.py", "in failpoints.table()"),
}
# Failpoints at which nothing kills, and why that is no gap.
NOT_KILLED = {
    "hostd.enforcer.after_spawn": "nothing durable: the worker ends with hostd (--parent), and "
    "the next ensure() binds its socket anew; the kernel keeps the tables meanwhile",
}


def test_every_failpoint_of_every_table_is_killed_somewhere(ground: Ground) -> None:
    """Here, by a test that goes through its whole table, or by a test that names it."""
    root = Path(__file__).parents[2]
    for table in sorted(root.glob("services/*/failpoint_table.py")):
        importlib.import_module(f"services.{table.parent.name}.failpoint_table")
    importlib.import_module("clients.cli.instance.adoption")
    names = set(failpoints.table())
    assert len({name.partition(".")[0] for name in names}) >= 8
    for service, (file, proof) in EVERY_ROW_ELSEWHERE.items():
        assert proof in (root / file).read_text(), f"{file} does not kill at all of {service}"
    text = "".join(
        path.read_text() for path in root.glob("tests/*/test_*.py") if path != Path(__file__)
    )
    left = {
        name
        for name in names
        if name.partition(".")[0] not in EVERY_ROW_ELSEWHERE
        and f'"{name}' not in text
        and not any(name in passes(ground, scenario) for scenario in SCENARIOS)
    }
    assert left == set(NOT_KILLED), " ".join(sorted(left ^ set(NOT_KILLED)))
