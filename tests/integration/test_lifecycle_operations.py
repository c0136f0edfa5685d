"""Operations on real services and the simulated hypervisor: chains, joining, pre-emption,
guests that end by themselves, services that restart under running guests."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from services.domains.simhv.client import SimControl
from tests.fakes import loopfs
from tests.fault.harness import boot_of, wait_quiet
from tests.fault.scenarios import exists
from tests.instance import Instance, Reply, running
from tests.integration.adminapi_world import add_kernel

pytestmark = pytest.mark.integration

KERNEL = "6.12.1-lab"


class World:
    """The instance, its pool, the hypervisor's control and a few threads for callers."""

    def __init__(self, instance: Instance, pool: Path, sim: SimControl) -> None:
        self.instance = instance
        self.pool = pool
        self.sim = sim
        self.threads = ThreadPoolExecutor(8)

    def make(self, name: str, **properties: str) -> str:
        """A new qube of the template, properties set; its uuid."""
        call = self.instance.ok
        call("admin.vm.Create.AppVM", arg="tmpl", payload=f"name={name} label=red".encode())
        for key, value in properties.items():
            call("admin.vm.property.Set", name, key, value.encode())
        return self.uuid(name)

    def record(self, name: str) -> dict[str, Any]:
        """The qube's record as the dump has it."""
        for line in self.instance.dump().splitlines():
            row = json.loads(line)
            if row["kind"] == "qube" and row["value"]["name"] == name:
                return dict(row["value"])
        raise AssertionError(f"no record of {name}")

    def uuid(self, name: str) -> str:
        return str(self.record(name)["uuid"])

    def later(self, method: str, dest: str, arg: str = "", payload: bytes = b"") -> Future[Reply]:
        """The call, made from another connection."""
        return self.threads.submit(self.instance.call, method, dest, arg, payload)

    def operations(self, name: str) -> list[tuple[str, str]]:
        """(kind, state) of every operation on the qube that is still known, oldest first."""
        rows = [json.loads(line) for line in self.instance.ok("bulkhead.op.List").splitlines()]
        return [(row["kind"], row["state"]) for row in rows if name in row["qubes"]]

    def under_way(self, name: str, kind: str, state: str = "running") -> str:
        """Id of the operation of that kind on the qube in that state; "" without one."""
        for line in self.instance.ok("bulkhead.op.List").splitlines():
            row = json.loads(line)
            if row["kind"] == kind and name in row["qubes"] and row["state"] == state:
                return str(row["id"])
        return ""

    def until(self, condition: Callable[[], bool], what: str, timeout: float = 10.0) -> None:
        self.instance.until(condition, timeout, what)

    def quiet(self) -> None:
        """Every invariant of the fault tests holds."""
        assert wait_quiet(self.instance, self.pool) == []


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with loopfs.mounted("xfs", 2048) as place:
        place.parent.chmod(0o755)
        pool = place / "pool"
        pool.mkdir(mode=0o755)
        with running(pool_dir=pool) as instance, SimControl.of(instance.root) as sim:
            add_kernel(instance)
            instance.until(
                lambda: KERNEL in instance.ok("bulkhead.kernel.List"), 20.0, "the kernel is known"
            )
            instance.ok("admin.property.Set", arg="default_kernel", payload=KERNEL.encode())
            instance.ok("admin.vm.Create.TemplateVM", payload=b"name=tmpl label=black")
            instance.ok("admin.property.Set", arg="default_template", payload=b"tmpl")
            found = World(instance, pool, sim)
            yield found
            sim.clear()
            found.threads.shutdown()


def test_a_start_starts_its_netvms_first_and_others_join_them(world: World) -> None:
    outer = world.make("outer", provides_network="True")
    inner = world.make("inner", provides_network="True", netvm="outer")
    users = [world.make(f"user{n}", netvm="inner") for n in range(3)]
    starts = [world.later("admin.vm.Start", f"user{n}") for n in range(3)]
    assert [start.result(30).kind for start in starts] == ["ok"] * 3
    resumed = [call["uuid"] for call in world.sim.calls("resume")]
    mine = [uuid for uuid in resumed if uuid in (outer, inner, *users)]
    assert mine[:2] == [outer, inner] and sorted(mine[2:]) == sorted(users)
    assert world.operations("outer").count(("START", "succeeded")) == 1
    assert world.operations("inner").count(("START", "succeeded")) == 1
    world.quiet()


def test_a_netvm_with_clients_is_not_shut_down(world: World) -> None:
    world.make("nv", provides_network="True")
    world.make("client", netvm="nv")
    world.instance.ok("admin.vm.Start", "client")
    boot = boot_of(world.instance, "nv")
    reply = world.instance.call("admin.vm.Shutdown", "nv", "wait")
    assert reply.kind == "exc", reply
    assert boot_of(world.instance, "nv") == boot
    world.instance.ok("admin.vm.Shutdown", "client", "wait")
    world.instance.ok("admin.vm.Shutdown", "nv", "wait")
    world.quiet()


def test_concurrent_starts_of_one_qube_are_one_start(world: World) -> None:
    uuid = world.make("twice")
    slow = world.sim.delay(uuid, "create_paused", 0.5)
    replies = [world.later("admin.vm.Start", "twice") for _ in range(4)]
    assert [reply.result(30).kind for reply in replies] == ["ok"] * 4
    world.sim.clear(slow)
    assert world.operations("twice").count(("START", "succeeded")) == 1
    assert len(world.sim.calls("create_paused", uuid)) == 1
    world.quiet()


def test_kill_goes_before_a_start_that_hangs_and_nobody_else_waits(world: World) -> None:
    uuid = world.make("hung")
    world.make("other")
    fault = world.sim.hang(uuid, "create_paused")
    start = world.later("admin.vm.Start", "hung")
    world.until(lambda: world.record("hung")["run"]["phase"] == "starting", "it starts")
    for call, arg in (("Start", ""), ("Pause", ""), ("Unpause", ""), ("Shutdown", "wait")):
        world.instance.ok(f"admin.vm.{call}", "other", arg)
    world.instance.ok("admin.vm.Remove", "other")
    assert not start.done()
    began = time.monotonic()
    killed = world.instance.call("admin.vm.Kill", "hung")
    took = time.monotonic() - began
    assert killed.kind == "ok", killed.message
    assert took < 5.0, f"Kill took {took:.1f} s"
    assert start.result(30).kind == "exc"
    world.sim.clear(fault)
    world.quiet()
    world.instance.ok("admin.vm.Start", "hung")
    world.instance.ok("admin.vm.Kill", "hung")
    world.quiet()


def test_a_start_can_be_cancelled_before_its_pivot(world: World) -> None:
    uuid = world.make("regretted")
    slow = world.sim.delay(uuid, "create_paused", 1.0)
    start = world.later("admin.vm.Start", "regretted")
    world.until(lambda: bool(world.under_way("regretted", "START")), "the start is under way")
    world.instance.ok("bulkhead.op.Cancel", arg=world.under_way("regretted", "START"))
    assert start.result(30).kind == "exc"
    world.sim.clear(slow)
    assert ("START", "cancelled") in world.operations("regretted")
    assert world.record("regretted")["run"]["phase"] == "halted"
    world.quiet()


def test_a_clone_is_cancelled_once_its_data_is_copied(world: World) -> None:
    world.make("origin")
    world.instance.arm("storage.clone.before_rename=sleep:1.5")
    clone = world.later("bulkhead.vm.Clone", "origin", payload=b"name=unwanted")
    world.until(lambda: bool(world.under_way("origin", "CLONE")), "the clone is under way")
    world.instance.ok("bulkhead.op.Cancel", arg=world.under_way("origin", "CLONE"))
    assert clone.result(30).kind == "exc"
    world.instance.disarm()
    assert ("CLONE", "cancelled") in world.operations("origin")
    assert not exists(world.instance, "unwanted")
    world.quiet()


def test_what_waits_is_cancelled_at_once(world: World) -> None:
    uuid = world.make("queued")
    slow = world.sim.delay(uuid, "create_paused", 2.0)
    start = world.later("admin.vm.Start", "queued")
    world.until(lambda: bool(world.under_way("queued", "START")), "the start is under way")
    removal = world.later("admin.vm.Remove", "queued")
    world.until(lambda: bool(world.under_way("queued", "REMOVE", "queued")), "the removal waits")
    world.instance.ok("bulkhead.op.Cancel", arg=world.under_way("queued", "REMOVE", "queued"))
    assert removal.result(1.5).kind == "exc"
    assert not start.done()
    assert start.result(30).kind == "ok"
    world.sim.clear(slow)
    world.instance.ok("admin.vm.Kill", "queued")
    world.quiet()


@pytest.mark.parametrize("end", ["poweroff", "crash"])
def test_a_guest_that_ends_by_itself_is_cleaned_up_once(world: World, end: str) -> None:
    name = f"own-{end}"
    uuid = world.make(name)
    world.instance.ok("admin.vm.Start", name)
    getattr(world.sim, end)(uuid)
    world.until(lambda: world.record(name)["run"]["phase"] == "halted", "it is halted")
    world.quiet()
    assert world.operations(name).count(("STOPPED", "succeeded")) == 1
    world.instance.ok("admin.vm.Start", name)
    world.instance.ok("admin.vm.Kill", name)


def test_a_disposable_that_crashes_is_removed(world: World) -> None:
    world.make("dvm", template_for_dispvms="True")
    name = world.instance.ok("admin.vm.CreateDisposable", "dvm")
    world.instance.ok("admin.vm.Start", name)
    world.sim.crash(world.uuid(name))
    world.until(lambda: not exists(world.instance, name), "the disposable is removed")
    world.quiet()


@pytest.mark.parametrize(
    "service", ["registry", "lifecycle", "domains", "storage", "firewall", "dispvm", "adminapi"]
)
def test_a_running_guest_outlives_a_restart_of_each_service(world: World, service: str) -> None:
    name = f"lives-{service}"
    world.make(f"nv-{service}", provides_network="True")
    world.make(name, netvm=f"nv-{service}")
    world.instance.ok("admin.vm.Start", name)
    boot = boot_of(world.instance, name)
    assert boot
    world.instance.wait_restarted(service, world.instance.kill(service))
    world.quiet()
    assert boot_of(world.instance, name) == boot
    assert world.instance.state(name) == "Running"
    world.instance.ok("admin.vm.Shutdown", name, "wait")
    world.instance.ok("admin.vm.Shutdown", f"nv-{service}", "wait")
    world.quiet()


def test_a_guest_that_ends_while_domains_is_down_is_found_halted(world: World) -> None:
    """Nobody tells: the boot is only absent from what domains says when it is back."""
    uuid = world.make("unseen")
    world.instance.ok("admin.vm.Start", "unseen")
    # The hypervisor acts first: what domains would have told dies with it.
    pid = world.instance.pid("domains")
    world.instance.freeze("domains")
    world.sim.poweroff(uuid)
    assert world.instance.kill("domains") == pid
    world.instance.wait_restarted("domains", pid)
    world.until(lambda: world.record("unseen")["run"]["phase"] == "halted", "it is halted")
    world.quiet()
    assert world.operations("unseen").count(("STOPPED", "succeeded")) == 1


def test_a_new_netvm_of_a_running_qube_is_in_force_at_once(world: World) -> None:
    for name in ("first", "second"):
        world.make(name, provides_network="True")
        world.instance.ok("admin.vm.Start", name)
    world.make("mover", netvm="first")
    world.instance.ok("admin.vm.Start", "mover")
    ip = world.instance.ok("admin.vm.property.Get", "mover", "ip").split(" ")[-1]

    def passes(netvm: str) -> bool:
        folder = world.instance.settings.service_dir("domains") / "guest-keys"
        keys = json.loads((folder / f"{world.uuid(netvm)}.json").read_text())["keys"]
        connected = ip in keys["/connected-ips"].split()
        assert connected == (f"/qubes-firewall/{ip}/0000" in keys)
        return connected

    assert passes("first") and not passes("second")
    world.instance.ok("admin.vm.property.Set", "mover", "netvm", b"second")
    assert passes("second") and not passes("first")
    world.quiet()
    world.instance.ok("admin.vm.property.Set", "mover", "netvm", b"")
    world.until(
        lambda: world.uuid("mover") not in [i.uuid for i in world.instance.firewall() if i.chain],
        "no rules are in force",
    )
    world.quiet()


def _label_and_name_are_free(world: World) -> None:
    """What the removed qube held may be given away and used again at once."""
    call = world.instance.ok
    call("admin.label.Remove", arg="mauve")
    call("admin.label.Create", arg="mauve", payload=b"0x876543")
    call("admin.vm.Create.AppVM", arg="tmpl", payload=b"name=gone label=mauve")
    call("admin.vm.Remove", "gone")
    call("admin.label.Remove", arg="mauve")
    world.quiet()


def _labelled(world: World) -> None:
    world.instance.ok("admin.label.Create", arg="mauve", payload=b"0x123456")
    world.instance.ok("admin.vm.Create.AppVM", arg="tmpl", payload=b"name=gone label=mauve")


def test_a_removal_is_told_before_its_end_and_holds_nothing_then(world: World) -> None:
    _labelled(world)
    folder = world.pool / "appvms" / "gone"
    assert folder.exists()
    # Every commit takes so long: the removal's begin, and the end that nobody waits for.
    world.instance.arm("registry.commit.before_commit=sleep:1.5")
    world.instance.ok("admin.vm.Remove", "gone")
    rows = [json.loads(line) for line in world.instance.ok("bulkhead.op.List").splitlines()]
    assert [row["state"] for row in rows if row["kind"] == "REMOVE"][-1] == "running"
    world.instance.disarm()
    assert not folder.exists()
    _label_and_name_are_free(world)


def test_a_removal_whose_end_is_lost_with_lifecycle_ends_all_the_same(world: World) -> None:
    _labelled(world)
    pid = world.instance.pid("lifecycle")
    # Its end may or may not have left, and nobody was told: they ask again.
    world.instance.arm("lifecycle.carried_out=kill")
    world.instance.ok("admin.vm.Remove", "gone")
    assert world.instance.fired() == ["lifecycle.carried_out"]
    world.instance.disarm()
    world.instance.wait_restarted("lifecycle", pid)
    _label_and_name_are_free(world)


def test_a_name_in_removal_is_waited_for(world: World) -> None:
    """Another client removes it: who makes a new one is not told of a qube that goes."""
    uuid = world.make("leaving")
    slow = world.sim.delay(uuid, "undefine", 2.5)
    removal = world.later("admin.vm.Remove", "leaving")
    world.until(lambda: not exists(world.instance, "leaving"), "it is in no list")
    assert not removal.done()
    world.instance.ok("admin.vm.Create.AppVM", arg="tmpl", payload=b"name=leaving label=red")
    assert removal.result(60).kind == "ok"
    world.sim.clear(slow)
    assert world.uuid("leaving") != uuid
    world.quiet()


def test_what_the_hypervisor_says_of_a_uuid_is_told_of_a_name(world: World) -> None:
    """libvirt and the services know qubes by uuid; who reads the message does not."""
    uuid = world.make("named")
    world.instance.ok("admin.vm.Start", "named")
    said = f"Domain not found: no domain with matching uuid '{uuid}' ({uuid})"
    fault = world.sim.fail("named", "pause", kind="not-found", message=said)
    reply = world.instance.call("admin.vm.Pause", "named")
    world.sim.clear(fault)
    assert reply.kind == "exc" and uuid not in reply.message
    assert "no domain with matching uuid 'named' (named)" in reply.message
    world.instance.ok("admin.vm.Kill", "named")


def test_new_rules_of_a_running_client_reach_its_netvm_whoever_dies(world: World) -> None:
    net = world.make("wall", provides_network="True")
    world.make("behind", netvm="wall")
    for name in ("wall", "behind"):
        world.instance.ok("admin.vm.Start", name)
    ip = world.instance.ok("admin.vm.property.Get", "behind", "ip").split(" ")[-1]
    file = world.instance.settings.service_dir("domains") / "guest-keys" / f"{net}.json"
    base = f"/qubes-firewall/{ip}"

    def rules() -> list[str]:
        keys: dict[str, str] = json.loads(file.read_text())["keys"]
        return [keys[key] for key in sorted(keys) if key.startswith(f"{base}/0")]

    set_rules = "admin.vm.firewall.Set"
    world.instance.ok(set_rules, "behind", payload=b"action=drop dst4=192.0.2.1\n")
    assert rules() == ["action=drop dst4=192.0.2.1/32"]
    # Reload and the same rules again write the keys anew: that is the guest's signal.
    for method, payload in (
        ("admin.vm.firewall.Reload", b""),
        (set_rules, b"action=drop dst4=192.0.2.1"),
    ):
        content = json.loads(file.read_text())
        content["keys"][f"{base}/0000"] = "action=accept"
        file.write_text(json.dumps(content))
        world.instance.ok(method, "behind", payload=payload)
        assert rules() == ["action=drop dst4=192.0.2.1/32"], method
    # The service that brings them there dies in between.
    pid = world.instance.pid("lifecycle")
    world.instance.freeze("lifecycle")
    tightened = world.later(set_rules, "behind", payload=b"action=drop\n")
    world.until(
        lambda: world.instance.ok("admin.vm.firewall.Get", "behind") == "action=drop\n",
        "they are stored",
    )
    assert world.instance.kill("lifecycle") == pid
    world.instance.wait_restarted("lifecycle", pid)
    assert tightened.result(60).kind == "ok"
    assert rules() == ["action=drop"]
    world.quiet()
    # A client that sleeps finds them in force when it wakes.
    world.instance.ok("admin.vm.Pause", "behind")
    world.instance.ok(set_rules, "behind", payload=b"action=drop proto=tcp\n")
    world.instance.ok("admin.vm.Unpause", "behind")
    assert rules() == ["action=drop proto=tcp"]
    for name in ("behind", "wall"):
        world.instance.ok("admin.vm.Kill", name)
    world.quiet()


def test_a_start_waits_for_the_netvm_that_it_has_now(world: World) -> None:
    """Two that were each other's netvm in turn once waited for each other for an hour."""
    world.make("far", provides_network="True")
    world.make("mid", provides_network="True", netvm="far")
    world.make("near", provides_network="True", netvm="mid")
    fault = world.sim.hang(world.uuid("far"), "create_paused")
    try:
        start = world.later("admin.vm.Start", "near")
        world.until(lambda: bool(world.under_way("far", "START")), "the whole chain starts")
        # The first is answered when it has reached the qube, hence after its start.
        left = world.later("admin.vm.property.Set", "near", "netvm", b"")
        assert (start.result(30).kind, left.result(30).kind) == ("ok", "ok")
        assert world.later("admin.vm.property.Set", "mid", "netvm", b"near").result(30).kind == "ok"
        world.until(lambda: world.instance.state("mid") == "Running", "the one in the middle runs")
        world.instance.ok("admin.vm.Kill", "far")
    finally:
        world.sim.clear(fault)
    world.quiet()


def test_kill_ends_a_start_that_waits_for_its_netvm(world: World) -> None:
    world.make("slow", provides_network="True")
    world.make("waits", netvm="slow")
    fault = world.sim.hang(world.uuid("slow"), "create_paused")
    try:
        start = world.later("admin.vm.Start", "waits")
        world.until(lambda: bool(world.under_way("slow", "START")), "its netvm starts")
        assert world.later("admin.vm.Kill", "waits").result(10).kind == "ok"
        assert start.result(10).kind == "exc"
        assert world.instance.state("waits") == "Halted"
        assert world.under_way("slow", "START")  # others may wait for it
        world.instance.ok("admin.vm.Kill", "slow")
    finally:
        world.sim.clear(fault)
    world.quiet()
