"""Who waits for whom on real services, with guests that do not do as they are told."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from clients.cli.instance import kernels
from services.domains.simhv.client import SimControl
from tests.instance import Instance, Reply, running
from tests.integration.adminapi_world import KERNEL, add_kernel

pytestmark = pytest.mark.integration

# What a call may take that waits for nobody, on a machine that is busy. The timeouts of
# the guests below are far longer, and no test waits for them.
SOON_S = 30.0
LONG = "600"


class World:
    """An instance whose guests never obey a shutdown and never connect an agent."""

    def __init__(self, instance: Instance, sim: SimControl) -> None:
        self.instance = instance
        self.sim = sim
        self.threads = ThreadPoolExecutor(8)

    def make(self, name: str, **properties: str) -> None:
        ok = self.instance.ok
        ok("admin.vm.Create.AppVM", arg="tmpl", payload=f"name={name} label=red".encode())
        for key, value in properties.items():
            ok("admin.vm.property.Set", name, key, value.encode())

    def later(self, method: str, dest: str, arg: str = "") -> Future[Reply]:
        """The call, made from another connection."""
        return self.threads.submit(self.instance.call, method, dest, arg, timeout=120.0)

    def under_way(self, name: str, kind: str, state: str, step: str = "") -> str:
        """Id of such an operation on the qube ("" = any, or none); "" without one."""
        for line in self.instance.ok("bulkhead.op.List").splitlines():
            row = json.loads(line)
            if step not in ("", row["step"]) or (name and name not in row["qubes"]):
                continue
            if (row["kind"], row["state"]) == (kind, state):
                return str(row["id"])
        return ""

    def until(self, condition: Callable[[], object], what: str) -> None:
        self.instance.until(lambda: bool(condition()), SOON_S, what)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with running() as instance, SimControl.of(instance.root) as sim:
        add_kernel(instance)
        instance.ok("admin.property.Set", arg="default_kernel", payload=KERNEL.encode())
        instance.ok("admin.vm.Create.TemplateVM", payload=b"name=tmpl label=black")
        sim.nature("*", shutdown="ignore")
        found = World(instance, sim)
        yield found
        found.threads.shutdown()


def test_power_calls_pass_a_shutdown_whose_guest_does_not_obey(world: World) -> None:
    world.make("stubborn", shutdown_timeout=LONG)
    ok = world.instance.ok
    ok("admin.vm.Start", "stubborn")
    began = time.monotonic()
    shutdown = world.later("admin.vm.Shutdown", "stubborn", "wait")
    world.until(lambda: world.under_way("stubborn", "SHUTDOWN", "running", "stopped"), "it waits")
    removal = world.later("admin.vm.Remove", "stubborn")
    world.until(lambda: world.under_way("stubborn", "REMOVE", "queued"), "the removal waits")
    for call in ("Pause", "Unpause", "Suspend", "Resume", "Shutdown"):
        ok(f"admin.vm.{call}", "stubborn")
    assert not shutdown.done() and not removal.done()
    ok("admin.vm.Kill", "stubborn")
    # Both ends that it makes way for come at once, none after its own timeout.
    assert shutdown.result(SOON_S).kind == "ok"
    assert removal.result(SOON_S).kind == "ok"
    assert time.monotonic() - began < float(LONG) / 2
    assert world.instance.call("admin.vm.CurrentState", "stubborn").exception == (
        "QubesVMNotFoundError"
    )


def test_who_waited_too_long_is_told_in_the_words_of_4_4(world: World) -> None:
    world.make("late", shutdown_timeout="1")
    world.instance.ok("admin.vm.Start", "late")
    reply = world.instance.call("admin.vm.Shutdown", "late", "wait")
    assert reply.exception == "QubesVMShutdownTimeoutError"
    # domain-shutdown-failed carries the same sentence.
    assert reply.message == "Domain shutdown timed out: 'late'"
    world.instance.ok("admin.vm.Kill", "late")


def test_a_wait_for_a_guest_can_be_cancelled(world: World) -> None:
    world.make("waited", shutdown_timeout=LONG)
    world.instance.ok("admin.vm.Start", "waited")
    shutdown = world.later("admin.vm.Shutdown", "waited", "wait")
    world.until(lambda: world.under_way("waited", "SHUTDOWN", "running", "stopped"), "it waits")
    operation = world.under_way("waited", "SHUTDOWN", "running")
    world.instance.ok("bulkhead.op.Cancel", arg=operation)
    reply = shutdown.result(SOON_S)
    assert reply.kind == "exc" and "cancelled" in reply.message
    assert world.instance.state("waited") == "Running"
    world.instance.ok("admin.vm.Kill", "waited")


def test_a_guest_whose_agent_does_not_come_can_be_paused_and_killed(world: World) -> None:
    world.sim.nature("agentless", agent="never", shutdown="ignore")
    world.make("agentless", qrexec_timeout=LONG)
    world.instance.ok("admin.vm.feature.Set", "agentless", "qrexec", b"1")
    start = world.later("admin.vm.Start", "agentless")
    world.until(lambda: world.under_way("agentless", "START", "running", "daemons"), "it waits")
    world.instance.ok("admin.vm.Pause", "agentless")
    world.instance.ok("admin.vm.Unpause", "agentless")
    world.instance.ok("admin.vm.Shutdown", "agentless")
    assert not start.done()
    world.instance.ok("admin.vm.Kill", "agentless")
    assert start.result(SOON_S).kind == "exc"
    assert world.instance.state("agentless") == "Halted"


def test_nobody_waits_behind_an_import_whose_place_is_being_made(world: World) -> None:
    world.make("imported")
    storage = world.instance.pid("storage")
    os.kill(storage, signal.SIGSTOP)
    try:
        begin = world.threads.submit(
            world.instance.call,
            "internal.vm.volume.ImportBegin",
            "imported",
            "private",
            timeout=120.0,
            socket_path=world.instance.settings.admin_sockets()["internal"],
        )
        world.until(
            lambda: world.under_way("imported", "IMPORT", "running", "import_begin"),
            "the import asks for its place",
        )
        for call in ("Start", "Remove"):
            reply = world.instance.call(f"admin.vm.{call}", "imported", timeout=SOON_S)
            assert reply.kind == "exc"
            assert "import" in reply.message
    finally:
        os.kill(storage, signal.SIGCONT)
    assert begin.result(SOON_S).kind == "ok"
    reply = world.instance.call(
        "internal.vm.volume.ImportEnd",
        "imported",
        "private",
        b"fail\nno data",
        socket_path=world.instance.settings.admin_sockets()["internal"],
    )
    assert reply.kind == "exc"
    world.instance.ok("admin.vm.Remove", "imported")


def test_a_copy_to_a_starting_client_does_not_hold_up_its_netvm(world: World) -> None:
    world.make("uplink", provides_network="True")
    world.make("client", netvm="uplink")
    token = world.instance.ok("admin.vm.volume.CloneFrom", "uplink", "private")
    storage = world.instance.pid("storage")
    os.kill(storage, signal.SIGSTOP)
    try:
        start = world.later("admin.vm.Start", "client")
        world.until(lambda: world.under_way("client", "START", "running", "verify"), "it starts")
        copy = world.threads.submit(
            world.instance.call,
            "admin.vm.volume.CloneTo",
            "client",
            "private",
            token.encode(),
            timeout=120.0,
        )
        world.until(lambda: world.under_way("uplink", "CLONE_VOLUME", "queued"), "the copy waits")
    finally:
        os.kill(storage, signal.SIGCONT)
    assert start.result(SOON_S).kind == "ok"
    assert copy.result(SOON_S).exception == "QubesVMNotHaltedError"
    for name in ("client", "uplink"):
        world.instance.ok("admin.vm.Kill", name)


def test_a_kernel_that_goes_is_chosen_by_nobody(world: World) -> None:
    instance = world.instance
    source = instance.root / "kernel-other"
    source.write_bytes(bytes(4096))
    kernels.add(instance.settings, "other", vmlinuz=source, initramfs=None, modules=None)
    world.make("chooser")
    storage = instance.pid("storage")
    os.kill(storage, signal.SIGSTOP)
    try:
        removal = world.threads.submit(
            instance.call, "bulkhead.kernel.Remove", arg="other", timeout=120.0
        )
        world.until(lambda: world.under_way("", "KERNEL_REMOVE", "running"), "it is under way")
        for reply in (
            instance.call("admin.property.Set", "dom0", "default_kernel", b"other"),
            instance.call("admin.vm.property.Set", "chooser", "kernel", b"other"),
        ):
            assert (reply.kind, reply.exception) == ("exc", "QubesPropertyValueError")
    finally:
        os.kill(storage, signal.SIGCONT)
    assert removal.result(SOON_S).kind == "ok"
    # The other way round: what is chosen stays.
    kernels.add(instance.settings, "other", vmlinuz=source, initramfs=None, modules=None)
    instance.ok("admin.vm.property.Set", "chooser", "kernel", b"other")
    reply = instance.call("bulkhead.kernel.Remove", arg="other")
    assert (reply.kind, reply.exception) == ("exc", "QubesVMInUseError")
    assert "other" in instance.ok("bulkhead.kernel.List")


def test_choosers_and_removers_of_a_kernel_race(world: World) -> None:
    """Whoever comes first: no property ever names a kernel that is not there."""
    instance = world.instance
    source = instance.root / "kernel-raced"
    source.write_bytes(bytes(4096))
    for _ in range(12):
        if "raced" not in instance.ok("bulkhead.kernel.List"):
            kernels.add(instance.settings, "raced", vmlinuz=source, initramfs=None, modules=None)
        remove = world.threads.submit(instance.call, "bulkhead.kernel.Remove", arg="raced")
        chosen = instance.call("admin.property.Set", "dom0", "default_kernel", b"raced")
        removed = remove.result(SOON_S)
        assert (chosen.kind == "ok") != (removed.kind == "ok"), (chosen, removed)
        assert ("raced" in instance.ok("bulkhead.kernel.List")) == (chosen.kind == "ok")
        instance.ok("admin.property.Set", arg="default_kernel", payload=KERNEL.encode())


def test_a_kill_that_cannot_be_done_says_so_and_is_done_later(world: World) -> None:
    world.make("unkillable")
    world.instance.ok("admin.vm.Start", "unkillable")
    fault = world.sim.fail("unkillable", "destroy", kind="failed", message="no such luck")
    try:
        reply = world.later("admin.vm.Kill", "unkillable").result(60.0)
        assert reply.kind == "exc"
        assert "stuck" in reply.message and "no such luck" in reply.message
        assert world.under_way("unkillable", "KILL", "stuck")
    finally:
        world.sim.clear(fault)
    world.until(lambda: world.instance.state("unkillable") == "Halted", "it was killed after all")
    world.instance.ok("admin.vm.Remove", "unkillable")
