"""The same request, sent again after a kill, is answered alike and has no second effect;
and a registry that has just started refuses nothing because it knows no facts yet."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from bulkhead import codec
from bulkhead.api import lifecycle_pb2, registry_pb2
from bulkhead.model.specs import CreateSpec, OperationSpec, RemoveSpec, StartSpec
from clients.cli.instance.accounts import ensure_accounts
from clients.cli.instance.supervisor import RESTART_DELAY_LIMIT
from tests.fakes.loopfs import mounted
from tests.fault.harness import wait_quiet
from tests.fault.scenarios import SCENARIOS
from tests.fault.test_operations import prepare
from tests.instance import Instance

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

SUBMIT = "bulkhead.api.Lifecycle.Submit"
MUTATE = "bulkhead.api.Registry.Mutate"
TIMEOUT_S = 20.0

DURABLE = (
    "registry.commit.before_commit",
    "registry.commit.after_commit",
    "registry.publish.before",
    "registry.reply.before",
)
AFTER = ("lifecycle.step.after", "registry.commit.after_commit")
BEGUN = (
    *(("CREATE", f"lifecycle.begin.{when}") for when in ("before", "after")),
    *(("CREATE", point) for point in DURABLE),
    *((kind, point) for kind in ("START", "REMOVE") for point in AFTER),
)


@dataclass
class Ground:
    """An instance, its pool, and a process that speaks as adminapi."""

    instance: Instance
    pool: Path
    client: subprocess.Popen[str]

    def send(self, method: str, body: bytes, request_id: bytes) -> bytes:
        """The reply's bytes; AssertionError where it is refused."""
        assert self.client.stdin is not None and self.client.stdout is not None
        asked = {"method": method, "body": body.hex(), "request_id": request_id.hex(),
                 "timeout": str(TIMEOUT_S)}  # fmt: skip
        self.client.stdin.write(json.dumps(asked) + "\n")
        self.client.stdin.flush()
        told = json.loads(self.client.stdout.readline())
        assert "body" in told, told
        return bytes.fromhex(told["body"])

    def submit(self, spec: OperationSpec, request_id: bytes) -> lifecycle_pb2.SubmitReply:
        request = lifecycle_pb2.SubmitRequest(spec=codec.spec_to_proto(spec))
        reply = lifecycle_pb2.SubmitReply()
        reply.ParseFromString(self.send(SUBMIT, request.SerializeToString(), request_id))
        return reply


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with mounted("xfs", 1024) as pool:
        instance = Instance(pool_dir=pool)
        try:
            instance.start(environment={RESTART_DELAY_LIMIT: "0.05"})
            prepare(instance, pool)
            isolated = instance.settings.isolated
            account = ensure_accounts()["adminapi"] if isolated else None
            with subprocess.Popen(
                [sys.executable, "-m", "tests.fault.submitter", str(instance.root)],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                user=account.uid if account is not None else None,
                group=account.gid if account is not None else None,
                extra_groups=list(account.groups) if account is not None else None,
            ) as client:
                try:
                    yield Ground(instance, pool, client)
                finally:
                    client.kill()
        finally:
            instance.close()


def killed(ground: Ground, point: str) -> None:
    """Wait for the kill, and for the recovery from it."""
    ground.instance.until(lambda: bool(ground.instance.fired()), 10.0, f"{point} has fired")
    ground.instance.disarm()
    assert wait_quiet(ground.instance, ground.pool) == []


@pytest.mark.parametrize(("kind", "point"), BEGUN)
def test_an_operation_is_begun_once(ground: Ground, kind: str, point: str) -> None:
    instance = ground.instance
    name = f"q{uuid4().hex[:8]}"
    spec: OperationSpec = CreateSpec(
        name, "AppVM", label="red", template="tmpl", template_given=True
    )
    if kind != "CREATE":
        instance.ok("admin.vm.Create.AppVM", arg="tmpl", payload=f"name={name} label=red".encode())
        spec = StartSpec(name) if kind == "START" else RemoveSpec(name)
    request_id = uuid4().bytes
    instance.arm(f"{point}=kill")
    first = ground.submit(spec, request_id)
    killed(ground, point)
    operation = json.loads(instance.ok("bulkhead.op.Get", arg=first.operation.id))
    assert operation["state"] == "succeeded", operation
    before = instance.dump()
    for service in ("", "lifecycle", "registry"):
        if service:
            old = instance.kill(service)
            instance.wait_restarted(service, old)
        again = ground.submit(spec, request_id)
        assert again.operation.id == first.operation.id
        assert again.operation.subjects == first.operation.subjects
        assert (again.joined, again.revision) == (first.joined, first.revision)
    assert wait_quiet(instance, ground.pool) == []
    assert instance.dump() == before
    if kind == "START":
        instance.ok("admin.vm.Kill", name)


@pytest.mark.parametrize("point", DURABLE)
def test_a_change_is_made_once(ground: Ground, point: str) -> None:
    instance = ground.instance
    request_id, tag = uuid4().bytes, f"t{uuid4().hex[:8]}"
    request = registry_pb2.MutateRequest()
    request.set_tag.qube, request.set_tag.tag = "net", tag
    body = request.SerializeToString()
    instance.arm(f"{point}=kill")
    first = ground.send(MUTATE, body, request_id)
    killed(ground, point)
    assert tag in instance.ok("admin.vm.tag.List", "net").split()
    instance.ok("admin.vm.tag.Remove", "net", tag)
    before = instance.dump()
    assert ground.send(MUTATE, body, request_id) == first
    old = instance.kill("registry")
    instance.wait_restarted("registry", old)
    assert ground.send(MUTATE, body, request_id) == first
    assert instance.dump() == before


def test_nothing_is_refused_because_the_registry_has_just_started(ground: Ground) -> None:
    instance, scenario = ground.instance, {s.name: s for s in SCENARIOS}["attach"]
    scenario.prepare(instance)
    for method, arg, payload in (
        ("admin.vm.device.block.Attach", "dom0+sdy", b""),
        ("admin.vm.device.block.Detach", "dom0+sdy", b""),
        ("admin.vm.Suspend", "", b""),
        ("admin.vm.Resume", "", b""),
        ("admin.vm.Pause", "", b""),
        ("admin.vm.Unpause", "", b""),
        ("admin.vm.Shutdown", "wait", b""),
        ("admin.vm.property.Set", "kernel", b"test"),
        ("admin.vm.Start", "", b""),
    ):
        old = instance.kill("registry")
        reply = instance.call(method, "worker", arg, payload)
        assert reply.kind == "ok", f"{method}: {reply.exception} {reply.message}"
        instance.wait_restarted("registry", old)
    scenario.clean(instance)
    kernel = {s.name: s for s in SCENARIOS}["remove-kernel"]
    kernel.prepare(instance)
    old = instance.kill("registry")
    told = kernel.act(instance)
    assert told.kind == "ok", told.message
    instance.wait_restarted("registry", old)
    assert wait_quiet(instance, ground.pool) == []
