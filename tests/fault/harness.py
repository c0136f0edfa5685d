"""Kills one process at a failpoint of a running operation, then judges what is left.

Owns the invariants. Uses real processes, a real reflink file system
and the simulated hypervisor, which outlives the others as a real one does. Invariant: a
case leaves the instance as it found it, or it has failed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bulkhead.bus.errors import BusError
from clients.cli.instance import operator
from services.registry import store
from services.registry.core import canonical
from tests.fault.follower import Follower
from tests.fault.scenarios import NETVM, SECOND, Scenario
from tests.instance import Instance, Reply

QUIET_TIMEOUT_S = 10.0
# More than a checkpoint takes to come on a busy machine.
FIRE_TIMEOUT_S = 6.0
TRACE = "trace"
# Their death may lose events, which is said then.
TELLERS = ("registry.", "adminapi.")
# What a client is told where it has to look for itself.
OUTCOME_UNKNOWN = ("unknown", "is still under way")
# A tag whose events tell that those before it were read.
SEEN = "seen"
RESYNCS = 5


# ---- judging


@dataclass(frozen=True)
class State:
    """What is there, from outside: records, files, kernels' directories, domains, rules in
    force (uuid -> boot) and rules files; complaints: what the registry says of its store."""

    records: dict[str, dict[str, object]]
    operations: list[str]
    files: frozenset[str]
    domains: dict[str, str]
    chains: dict[str, str]
    rules_files: frozenset[str]
    kernels: frozenset[str]
    complaints: list[str]


def observe(instance: Instance, pool: Path) -> State:
    """Records from the canonical dump, files from the pool, domains from the hypervisor."""
    records: dict[str, dict[str, object]] = {}
    operations: list[str] = []
    for line in instance.dump().splitlines():
        row = json.loads(line)
        if row["kind"] == "qube":
            records[row["value"]["name"]] = row["value"]
        elif row["kind"] == "operation":
            operations.append(f"{row['value']['kind']} at {row['value']['cursor'] or 'begin'}")
    files = frozenset(
        str(path.relative_to(pool))
        for folder in ("appvms", "vm-templates", ".bulkhead-quarantine", SECOND)
        for path in (pool / folder).rglob("*")
        if path.is_file()
    )
    rules = instance.firewall()
    return State(
        records,
        operations,
        files,
        instance.domains(),
        {item.uuid: item.boot_id for item in rules if item.chain},
        frozenset(item.uuid for item in rules if item.rules_file),
        frozenset(path.name for path in (pool / "vm-kernels").iterdir()),
        complaints(instance),
    )


def complaints(instance: Instance) -> list[str]:
    """What the registry finds wrong with its own store."""
    try:
        status = operator.store_status(instance.settings)
    except BusError as error:
        raise AssertionError(f"no status of the store: {error.message}") from error
    found = [f"the store warns: {warning}" for warning in status.warnings]
    found.extend(f"in quarantine: {line}" for line in status.quarantined)
    if status.foreign_edit:
        found.append(f"qubes.xml is not what was written: {status.foreign_difference}")
    return found


def violations(instance: Instance, pool: Path) -> list[str]:
    """Sentences about every invariant that does not hold now."""
    state = observe(instance, pool)
    found = [f"operation {operation} has not ended" for operation in state.operations]
    found.extend(state.complaints)
    listed = instance.ok("bulkhead.kernel.List").splitlines()
    installed = {json.loads(line)["name"] for line in listed}
    if state.kernels != installed:
        found.append(f"kernels {sorted(installed)} are listed, and {sorted(state.kernels)} there")
    allowed: set[str] = set()
    for name, record in state.records.items():
        if record["state"] != "active":
            found.append(f"{name} is still {record['state']}")
        run = record["run"]
        assert isinstance(run, dict)
        boot = state.domains.get(str(record["uuid"]))
        if run["phase"] == "up" and boot != run["boot_id"]:
            found.append(f"{name} is up, and its domain is {boot}")
        if run["phase"] == "halted" and boot is not None:
            found.append(f"{name} is halted, and a domain of boot {boot} runs")
        if run["phase"] in ("starting", "stopping"):
            found.append(f"{name} is still {run['phase']}")
        volumes = record["volumes"]
        assert isinstance(volumes, list)
        for volume in volumes:
            allowed.add(volume["vid"])
            image = f"{volume['vid']}.img"
            if volume["save_on_stop"] and image not in state.files:
                found.append(f"{image} of {name} is missing")
            if run["phase"] == "halted" and f"{volume['vid']}-dirty.img" in state.files:
                found.append(f"{volume['vid']}-dirty.img is left of a stopped boot")
    for file in state.files:
        owner = file.split(".img", 1)[0].removesuffix("-dirty").removesuffix("-precache")
        owner = owner.removesuffix("-import")
        if owner not in allowed or "~" in file:
            found.append(f"file {file} belongs to no record")
    uuids = {str(record["uuid"]) for record in state.records.values()}
    found.extend(
        f"domain {uuid} belongs to no record" for uuid in state.domains if uuid not in uuids
    )
    for name, record in state.records.items():
        uuid, run = str(record["uuid"]), record["run"]
        assert isinstance(run, dict)
        properties = record["properties"]
        assert isinstance(properties, dict)
        chain = state.chains.get(uuid)
        if run["phase"] == "up" and properties.get("netvm") and chain != run["boot_id"]:
            found.append(f"{name} is up with a netvm, and its rules are of boot {chain}")
        if run["phase"] == "halted" and chain is not None:
            found.append(f"{name} is halted, and rules of boot {chain} are in force")
    found.extend(
        f"rules of {uuid} belong to no record"
        for uuid in state.rules_files | state.chains.keys()
        if uuid not in uuids
    )
    return found


def boot_of(instance: Instance, qube: str) -> str:
    """Boot id of a qube's domain; empty when it has none."""
    for line in instance.dump().splitlines():
        row = json.loads(line)
        if row["kind"] == "qube" and row["value"]["name"] == qube:
            return instance.domains().get(row["value"]["uuid"], "")
    return ""


def wait_quiet(instance: Instance, pool: Path, timeout: float = QUIET_TIMEOUT_S) -> list[str]:
    """Violations that are still there after the time that recovery may take."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            found = violations(instance, pool)
        except (AssertionError, OSError) as error:
            found = [f"cannot be observed: {error}"]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def wait_stored(instance: Instance, timeout: float = QUIET_TIMEOUT_S) -> list[str]:
    """Differences of qubes.xml, read back, from the records, after a checkpoint's time."""
    deadline = time.monotonic() + timeout
    while (found := instance.unstored()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def wait_loadable(instance: Instance, timeout: float = QUIET_TIMEOUT_S) -> list[str]:
    """Differences of what a registry that started now would load from what is served.

    A checkpoint may be written while the files are copied: then they are copied again.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            found = _unlike_when_loaded(instance)
        except (store.StoreError, OSError, AssertionError) as error:
            found = [f"the store does not load: {error}"]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def _unlike_when_loaded(instance: Instance) -> list[str]:
    with tempfile.TemporaryDirectory() as place:
        for path in instance.settings.state_dir.iterdir():
            if path.name == "qubes.xml" or path.name.startswith("journal.sqlite"):
                shutil.copy(path, Path(place) / path.name)
        loaded = store.open_store(Path(place))
        try:
            lines = set(canonical.lines(loaded.view))
        finally:
            loaded.journal.close()
        served = set(instance.dump().splitlines())
    return [
        *(f"served, and not in the store: {line}" for line in sorted(served - lines)),
        *(f"in the store, and not served: {line}" for line in sorted(lines - served)),
        *loaded.warnings,
        *(["the store has a foreign edit"] if loaded.foreign else []),
    ]


def told(instance: Instance, follower: Follower) -> list[str]:
    """What the stream of events, read to its end, says otherwise than the state."""
    listed = instance.ok("admin.vm.tag.List", NETVM).split()
    verb, event = ("Remove", "delete") if SEEN in listed else ("Set", "add")
    for _ in range(RESYNCS):
        lost = follower.lost
        if follower.wait_seen(
            f"domain-tag-{event}:{SEEN}",
            partial(instance.ok, f"admin.vm.tag.{verb}", NETVM, SEEN),
            QUIET_TIMEOUT_S,
        ):
            break
        if follower.lost == lost:
            return ["an event did not come, and none was said to be lost"]
        verb, event = ("Set", "add") if verb == "Remove" else ("Remove", "delete")
    lines = [line.split(" ") for line in instance.ok("admin.vm.List").splitlines()]
    return follower.problems(
        {
            line[0]: next(word for word in line if word.startswith("state="))[6:]
            for line in lines
            if line[0] != "dom0"
        }
    )


@dataclass(frozen=True)
class Case:
    """What came of one case: sentences about what does not hold, and how many kills fired."""

    problems: list[str]
    fired: int


def wait_fired(instance: Instance, pool: Path, stages: tuple[str, ...]) -> list[str]:
    """Wait for the first kill, and for the others until all is quiet without them.

    The first may come after the answer: when the end is durable and nobody waits, or with
    the next checkpoint. Later ones fire in the recovery, or never.
    """
    deadline = time.monotonic() + FIRE_TIMEOUT_S
    while not instance.fired() and time.monotonic() < deadline:
        time.sleep(0.01)
    while len(instance.fired()) < len(stages) and time.monotonic() < deadline:
        try:
            if not violations(instance, pool):
                break
        except (AssertionError, OSError):
            pass
        time.sleep(0.05)
    fired = instance.fired()
    instance.disarm()
    return fired


def run_case(
    instance: Instance, pool: Path, follower: Follower, scenario: Scenario, *stages: str
) -> Case:
    """One case; fired is 0 where the pass that was to be its last did not come."""
    scenario.prepare(instance)
    problems = [f"before: {p}" for p in wait_quiet(instance, pool)]
    if problems:
        return Case(problems, 0)
    network_boot, lost = boot_of(instance, NETVM), follower.lost
    instance.arm(*stages)
    try:
        reply = scenario.act(instance)
    except (OSError, TimeoutError) as error:
        reply = Reply("none", message=str(error))
    fired = wait_fired(instance, pool, stages)
    problems = wait_quiet(instance, pool)
    if boot_of(instance, NETVM) != network_boot:
        problems.append(f"recovery ended the boot of {NETVM}")
    if stages[0].startswith("registry."):
        problems.extend(wait_stored(instance))
    problems.extend(wait_loadable(instance))
    problems.extend(told(instance, follower))
    if follower.lost != lost and not any(name.startswith(TELLERS) for name in fired):
        problems.append("events were said to be lost, and nothing between them and us died")
    done = scenario.done(instance)
    if reply.kind == "ok" and not done:
        problems.append("the client was told ok, and the effect is not there")
    # adminapi itself may be the victim: then the client sees its connection die.
    if reply.kind == "none" and not stages[0].startswith("adminapi."):
        problems.append(f"the client got no answer {reply.message}")
    if reply.kind == "exc":
        vague = any(words in reply.message for words in OUTCOME_UNKNOWN)
        # A disposable's act is several calls, and the first failure ends it.
        if done and not vague and scenario.name != "disposable":
            problems.append(
                f"the client was told {reply.exception} ({reply.message}), and the effect is there"
            )
        # What is restarted goes on: only a part that was away too long is a reason to refuse.
        if not vague and "nothing was changed" not in reply.message.lower():
            problems.append(f"a kill made the call fail: {reply.exception} ({reply.message})")
    if not done:
        # A retry must go through, whatever the crash left.
        again = scenario.act(instance)
        if again.kind != "ok" or not scenario.done(instance):
            problems.append(f"a retry failed: {again.exception} {again.message}")
        problems.extend(f"after the retry: {p}" for p in wait_quiet(instance, pool))
    scenario.clean(instance)
    problems.extend(f"after cleaning: {p}" for p in wait_quiet(instance, pool))
    return Case(problems, len(fired))
