"""Kills one process at a failpoint of a running operation, then judges what is left.

Owns the scenarios and the invariants. Uses real processes, a real reflink file system
and the simulated hypervisor, which outlives the others as a real one does. Invariant: a
case leaves the instance as it found it, or it has failed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.domains.simhv.client import SimControl
from tests.instance import Instance, Reply

QUIET_TIMEOUT_S = 10.0
TRACE = "trace"
# A network qube that runs all the time: no recovery may end its boot.
NETVM = "net"


@dataclass(frozen=True)
class Scenario:
    """One operation: how to bring its start state about, do it, and take it away again.

    done(instance) tells from outside whether the operation's effect is there. brief: in a
    sample it is killed only where no scenario before it was, and at two points of every one.
    """

    name: str
    prepare: Callable[[Instance], object]
    act: Callable[[Instance], Reply]
    done: Callable[[Instance], bool]
    clean: Callable[[Instance], object]
    brief: bool = False


def exists(instance: Instance, qube: str) -> bool:
    """The qube is listed."""
    lines = instance.ok("admin.vm.List").splitlines()
    return any(line.split(" ", 1)[0] == qube for line in lines)


def running(instance: Instance, qube: str) -> bool:
    """The qube is listed and not halted."""
    return exists(instance, qube) and instance.state(qube) != "Halted"


def _remove(instance: Instance, *qubes: str) -> None:
    for qube in qubes:
        _remove_one(instance, qube)


def _remove_one(instance: Instance, qube: str) -> None:
    def gone() -> bool:
        # Refused while another removal, of a disposable of it, is under way.
        return not exists(instance, qube) or instance.call("admin.vm.Remove", qube).kind == "ok"

    if exists(instance, qube) and running(instance, qube):
        instance.call("admin.vm.Kill", qube)
        instance.until(lambda: not running(instance, qube), 10.0, f"{qube} is halted")
    instance.until(gone, 10.0, f"{qube} is removed")


def _create(instance: Instance, qube: str) -> Reply:
    return instance.call(
        "admin.vm.Create.AppVM", arg="tmpl", payload=f"name={qube} label=red".encode()
    )


def _made(instance: Instance, qube: str) -> None:
    if not exists(instance, qube):
        reply = _create(instance, qube)
        assert reply.kind == "ok", f"{reply.message}\n{instance.logs()}"


def _networked(instance: Instance, qube: str) -> None:
    """A qube behind the network qube, so that its start plans rules."""
    _made(instance, qube)
    instance.ok("admin.vm.property.Set", qube, "netvm", NETVM.encode())


def _started(instance: Instance, qube: str) -> None:
    _networked(instance, qube)
    reply = instance.call("admin.vm.Start", qube)
    assert reply.kind == "ok", reply.message


def _disposables(instance: Instance) -> list[str]:
    return [
        line.split(" ", 1)[0]
        for line in instance.ok("admin.vm.List").splitlines()
        if " class=DispVM " in line
    ]


def _prepare_disposable(instance: Instance) -> None:
    _made(instance, "dvm")
    instance.ok("admin.vm.property.Set", "dvm", "template_for_dispvms", b"True")


def _run_disposable(instance: Instance) -> Reply:
    """Create, start and kill a disposable, as a client does; the first failure ends it.

    One whose client never learned its name is nobody's: the next client takes it away.
    """
    _remove(instance, *_disposables(instance))
    reply = instance.call("admin.vm.CreateDisposable", "dvm")
    if reply.kind != "ok":
        return reply
    started = instance.call("admin.vm.Start", reply.text)
    if started.kind != "ok":
        return started
    return instance.call("admin.vm.Kill", reply.text)


def _uuid(instance: Instance, qube: str) -> str:
    return instance.ok("admin.vm.property.Get", qube, "uuid").rpartition(" ")[2]


def _start_in_vain(instance: Instance) -> Reply:
    """A start that the hypervisor refuses, and all of it undone: told so is ok here."""
    with SimControl.of(instance.root) as control:
        fault = control.fail(_uuid(instance, "worker"), "create_paused")
        try:
            reply = instance.call("admin.vm.Start", "worker")
        finally:
            control.clear(fault)
    return Reply("ok") if reply.kind == "exc" else Reply("exc", message=f"told {reply.kind}")


def _with_agent(instance: Instance) -> None:
    """A running qube whose guest answers, so that a resize reaches its file system."""
    _started(instance, "worker")
    with SimControl.of(instance.root) as control:
        control.agent(_uuid(instance, "worker"), True)


def _unconnected(instance: Instance) -> None:
    """A running qube without a netvm."""
    _made(instance, "worker")
    instance.ok("admin.vm.Start", "worker")


def _stopped(instance: Instance, qube: str) -> None:
    """A qube that has run, hence has a revision to go back to."""
    _started(instance, qube)
    instance.ok("admin.vm.Shutdown", qube, "wait")


def _revert(instance: Instance) -> Reply:
    revisions = instance.ok("admin.vm.volume.ListSnapshots", "worker", "private").split()
    return instance.call("admin.vm.volume.Revert", "worker", "private", revisions[-1].encode())


def _attribute(instance: Instance, call: str, arg: str, name: str) -> str:
    lines = instance.ok(call, "worker", arg).splitlines()
    return dict(line.split("=", 1) for line in lines)[name]


LARGER = str(3 << 30)
RULES = "action=drop dst4=1.2.3.4/32\naction=accept\n"


def _brief(
    name: str,
    prepare: Callable[[Instance], object],
    act: Callable[[Instance], Reply],
    done: Callable[[Instance], bool],
) -> Scenario:
    return Scenario(name, prepare, act, done, lambda i: _remove(i, "worker"), brief=True)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "create",
        prepare=lambda i: None,
        act=lambda i: _create(i, "fresh"),
        done=lambda i: exists(i, "fresh"),
        clean=lambda i: _remove(i, "fresh"),
    ),
    Scenario(
        "clone",
        prepare=lambda i: _made(i, "origin"),
        act=lambda i: i.call("bulkhead.vm.Clone", "origin", payload=b"name=copy"),
        done=lambda i: exists(i, "copy"),
        clean=lambda i: _remove(i, "copy", "origin"),
    ),
    Scenario(
        "remove",
        prepare=lambda i: _made(i, "doomed"),
        act=lambda i: i.call("admin.vm.Remove", "doomed"),
        done=lambda i: not exists(i, "doomed"),
        clean=lambda i: _remove(i, "doomed"),
    ),
    Scenario(
        "start",
        prepare=lambda i: _networked(i, "worker"),
        act=lambda i: i.call("admin.vm.Start", "worker"),
        done=lambda i: running(i, "worker"),
        clean=lambda i: _remove(i, "worker"),
    ),
    Scenario(
        "shutdown",
        prepare=lambda i: _started(i, "worker"),
        act=lambda i: i.call("admin.vm.Shutdown", "worker", "wait"),
        done=lambda i: not running(i, "worker"),
        clean=lambda i: _remove(i, "worker"),
    ),
    Scenario(
        "kill",
        prepare=lambda i: _started(i, "worker"),
        act=lambda i: i.call("admin.vm.Kill", "worker"),
        done=lambda i: not running(i, "worker"),
        clean=lambda i: _remove(i, "worker"),
    ),
    Scenario(
        "disposable",
        prepare=_prepare_disposable,
        act=_run_disposable,
        done=lambda i: not _disposables(i),
        clean=lambda i: _remove(i, *_disposables(i), "dvm"),
    ),
    _brief(
        "failed-start",
        prepare=lambda i: _networked(i, "worker"),
        act=_start_in_vain,
        done=lambda i: not running(i, "worker"),
    ),
    _brief(
        "pause",
        prepare=lambda i: _started(i, "worker"),
        act=lambda i: i.call("admin.vm.Pause", "worker"),
        done=lambda i: i.state("worker") == "Paused",
    ),
    _brief(
        "leave-netvm",
        prepare=lambda i: _started(i, "worker"),
        act=lambda i: i.call("admin.vm.property.Set", "worker", "netvm", b""),
        done=lambda i: NETVM not in i.ok("admin.vm.property.Get", "worker", "netvm"),
    ),
    _brief(
        "join-netvm",
        prepare=_unconnected,
        act=lambda i: i.call("admin.vm.property.Set", "worker", "netvm", NETVM.encode()),
        done=lambda i: NETVM in i.ok("admin.vm.property.Get", "worker", "netvm"),
    ),
    _brief(
        "rules",
        prepare=lambda i: _started(i, "worker"),
        act=lambda i: i.call("admin.vm.firewall.Set", "worker", payload=RULES.encode()),
        done=lambda i: i.ok("admin.vm.firewall.Get", "worker") == RULES,
    ),
    _brief(
        "resize",
        prepare=_with_agent,
        act=lambda i: i.call("admin.vm.volume.Resize", "worker", "private", LARGER.encode()),
        done=lambda i: _attribute(i, "admin.vm.volume.Info", "private", "size") == LARGER,
    ),
    _brief(
        "revert",
        prepare=lambda i: _stopped(i, "worker"),
        act=_revert,
        # Reverting again is harmless, and nothing of it can be seen from outside.
        done=lambda i: exists(i, "worker"),
    ),
)


# ---- judging


@dataclass(frozen=True)
class State:
    """What is there, from outside: records, files, domains, rules in force (uuid -> boot)
    and rules files."""

    records: dict[str, dict[str, object]]
    operations: list[str]
    files: frozenset[str]
    domains: dict[str, str]
    chains: dict[str, str]
    rules_files: frozenset[str]


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
        for folder in ("appvms", "vm-templates", ".bulkhead-quarantine")
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
    )


def violations(instance: Instance, pool: Path) -> list[str]:
    """Sentences about every invariant that does not hold now."""
    state = observe(instance, pool)
    found = [f"operation {operation} has not ended" for operation in state.operations]
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
        except AssertionError as error:
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


def run_case(instance: Instance, pool: Path, scenario: Scenario, *stages: str) -> list[str]:
    """One case; sentences about what does not hold, empty when all is well."""
    scenario.prepare(instance)
    problems = [f"before: {p}" for p in wait_quiet(instance, pool)]
    if problems:
        return problems
    network_boot = boot_of(instance, NETVM)
    instance.arm(*stages)
    try:
        reply = scenario.act(instance)
    except (OSError, TimeoutError) as error:
        reply = Reply("none", message=str(error))
    # A failpoint after the answer (the end is durable, nobody waits) fires a little later.
    deadline = time.monotonic() + 2.0
    while len(instance.fired()) < len(stages) and time.monotonic() < deadline:
        time.sleep(0.01)
    fired = instance.fired()
    instance.disarm()
    problems = wait_quiet(instance, pool)
    if not fired:
        problems.append(f"{stages[0]} did not fire")
    if boot_of(instance, NETVM) != network_boot:
        problems.append(f"recovery ended the boot of {NETVM}")
    if stages[0].startswith("registry."):
        problems.extend(wait_stored(instance))
    done = scenario.done(instance)
    if reply.kind == "ok" and not done:
        problems.append("the client was told ok, and the effect is not there")
    # adminapi itself may be the victim: then the client sees its connection die.
    if reply.kind == "none" and not stages[0].startswith("adminapi."):
        problems.append(f"the client got no answer {reply.message}")
    unknown = "unknown" in reply.message or "is still under way" in reply.message
    if reply.kind == "exc" and done and not unknown and scenario.name != "disposable":
        problems.append(
            f"the client was told {reply.exception} ({reply.message}), and the effect is there"
        )
    if not done:
        # A retry must go through, whatever the crash left.
        again = scenario.act(instance)
        if again.kind != "ok" or not scenario.done(instance):
            problems.append(f"a retry failed: {again.exception} {again.message}")
        problems.extend(f"after the retry: {p}" for p in wait_quiet(instance, pool))
    scenario.clean(instance)
    problems.extend(f"after cleaning: {p}" for p in wait_quiet(instance, pool))
    return problems
