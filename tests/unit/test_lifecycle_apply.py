"""What a change of a running qube asks of the hypervisor's service, and what it leaves alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from bulkhead.bus.errors import BusError
from bulkhead.model.records import FactPut, Operation, OperationPut, OperationState, Phase, Run
from bulkhead.model.specs import ApplySpec, StoppedSpec
from services.lifecycle.executor import StepContext
from services.lifecycle.steps.live import Apply
from services.lifecycle.steps.power import WithdrawRules
from tests.unit.plan_world import World, world


class Domains:
    """Every call that is made, in order; one of them may be refused."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.refuses: dict[str, BusError] = {}
        # What happens at the first call, after which nothing is refused any more.
        self.stops: Callable[[], object] | None = None

    def __getattr__(self, name: str) -> Any:
        async def call(request: Any, **_: object) -> Any:
            self.calls.append((name, request))
            refusal = self.refuses.get(name)
            if self.stops is not None:
                self.stops()
                self.stops = None
                self.refuses.clear()
            if refusal is not None:
                raise refusal
            return SimpleNamespace(untrusted_keys=[])

        return call

    def of(self, name: str) -> list[Any]:
        return [request for called, request in self.calls if called == name]


class Firewall(Domains):
    async def apply(self, request: Any, **_: object) -> Any:
        self.calls.append(("apply", request))
        return SimpleNamespace(guest_keys=["/qubes-firewall/10.137.0.4/policy=drop"])


@pytest.fixture
def w() -> World:
    made = world()
    host = made.view.host
    assert host is not None
    made.view.apply(FactPut(replace(host, hypervisor="xen")))
    made.start("sys-net")
    made.start("work")
    return made


def applied(w: World, domains: Domains, qube: str = "work", *parts: str) -> None:
    record = w.qube(qube)
    spec = ApplySpec(record.uuid, record.run.boot_id, parts=parts)
    operation = Operation("op", "APPLY", spec, (record.uuid,), OperationState.RUNNING)
    participants: Any = SimpleNamespace(domains=domains, firewall=Firewall(), hostd=None)
    executor: Any = SimpleNamespace(replica=SimpleNamespace(view=w.view))
    context = StepContext(operation, "apply", participants, 1, executor)
    asyncio.run(Apply().forward(context))


def test_the_maximum_of_memory_that_can_grow_is_told_and_nothing_is_taken(w: World) -> None:
    domains = Domains()
    applied(w, domains)
    assert domains.of("set_maxmem") == []
    w.feature("tmpl", "memory-hotplug")
    w.set("work", "maxmem", "3000")
    applied(w, domains)
    (request,) = domains.of("set_maxmem")
    assert request.maxmem_mib == 3000
    assert not hasattr(request, "memory_mib")


def test_a_host_that_cannot_add_memory_keeps_nothing_else_from_the_guest(w: World) -> None:
    domains = Domains()
    domains.refuses["set_maxmem"] = BusError("UNIMPLEMENTED", "HYPERVISOR_UNSUPPORTED", "no")
    w.feature("tmpl", "memory-hotplug")
    w.feature("work", "service.x")
    applied(w, domains)
    assert any(
        key.path == "/qubes-service/x" for r in domains.of("write_guest_keys") for key in r.keys
    )
    domains.refuses["set_maxmem"] = BusError("UNAVAILABLE", "HYPERVISOR_TIMEOUT", "late")
    with pytest.raises(BusError):
        applied(w, domains)


def test_the_guests_seed_and_lists_are_not_written_again(w: World) -> None:
    domains = Domains()
    applied(w, domains)
    (own,) = [r for r in domains.of("write_guest_keys") if r.boot.uuid == w.qube("work").uuid]
    assert own.changed_only
    paths = {key.path for key in own.keys}
    assert {"/name", "/default-user", "/qubes-debug-mode", "/qubes-ip"} <= paths
    assert not paths & {
        "/qubes-random-seed",
        "/qubes-block-devices",
        "/qubes-usb-devices",
        "/qubes-iptables-error",
        "/qubes-vm-type",
    }


def _texts_taken(domains: Domains, *netvms: str, w: World) -> bool:
    """The qube's iptables-save texts are taken from exactly these network qubes."""
    found = {
        request.boot.uuid
        for request in domains.of("write_guest_keys")
        if request.HasField("removed_of")
    }
    return found == {w.qube(name).uuid for name in netvms}


def _ended(w: World, domains: Domains) -> None:
    """The stop of work, as far as rules are concerned."""
    record = w.qube("work")
    spec = StoppedSpec(record.uuid, record.run.boot_id)
    data = {"boot_id": record.run.boot_id}
    operation = Operation("op", "STOPPED", spec, (record.uuid,), OperationState.RUNNING, data=data)
    participants: Any = SimpleNamespace(domains=domains, firewall=Firewall(), hostd=None)
    executor: Any = SimpleNamespace(replica=SimpleNamespace(view=w.view))
    context = StepContext(operation, "withdraw_rules", participants, 1, executor)
    asyncio.run(WithdrawRules().forward(context))


def test_texts_for_iptables_leave_every_netvm_that_may_have_one(w: World) -> None:
    w.create("other-net")
    w.set("other-net", "provides_network", "True")
    w.start("other-net")
    for act in (applied, _ended):
        domains = Domains()
        act(w, domains)
        assert _texts_taken(domains, "sys-net", "other-net", w=w)
    # One that does not answer holds up no stop, nor does one that knows /qubes-firewall.
    w.feature("sys-net", "qubes-firewall")
    domains = Domains()
    domains.refuses["write_guest_keys"] = BusError("UNAVAILABLE", "GUEST_DAEMON_FAILED", "late")
    with pytest.raises(BusError):
        _ended(w, domains)  # its own
    w.set("work", "netvm", "")
    domains.calls.clear()
    _ended(w, domains)
    assert _texts_taken(domains, "other-net", w=w)
    w.feature("other-net", "qubes-firewall")
    domains.calls.clear()
    _ended(w, domains)
    assert domains.of("write_guest_keys") == []


def _told(domains: Domains, w: World) -> dict[str, set[str]]:
    """Qube -> first parts of the keys that it is told."""
    names = {w.qube(name).uuid: name for name in ("work", "sys-net", "other-net")}
    return {
        names[request.boot.uuid]: {"/" + key.path.split("/")[1] for key in request.keys}
        for request in domains.of("write_guest_keys")
    }


def test_a_part_is_brought_without_the_rest(w: World) -> None:
    w.create("other-net")
    w.set("other-net", "provides_network", "True")
    w.start("other-net")
    w.feature("work", "service.x")
    calls = {}
    for part, qube in (("keys", "work"), ("rules", "work"), ("clients", "sys-net")):
        domains = Domains()
        applied(w, domains, qube, part)
        calls[part] = _told(domains, w)
        assert {name for name, _ in domains.calls} <= {"write_guest_keys", "read_guest_keys"}
    assert calls["keys"].keys() == {"work"}
    assert {"/name", "/qubes-service", "/qubes-ip"} <= calls["keys"]["work"]
    assert calls["rules"] == {"sys-net": {"/qubes-firewall"}}
    assert calls["clients"] == {"sys-net": {"/connected-ips", "/connected-ips6"}}
    both = Domains()
    applied(w, both, "work", "keys", "rules")
    assert _told(both, w).keys() == {"work", "sys-net"}


def test_rules_alone_go_nowhere_without_a_netvm_that_runs(w: World) -> None:
    domains = Domains()
    w.set("work", "netvm", "")
    applied(w, domains, "work", "rules")
    assert domains.calls == []


@pytest.mark.parametrize("state", [OperationState.FAILED, OperationState.CANCELLED])
def test_what_an_earlier_one_left_undone_is_mended_by_the_next(
    w: World, state: OperationState
) -> None:
    record = w.qube("work")
    spec = ApplySpec(record.uuid, record.run.boot_id)
    w.view.apply(OperationPut(Operation("earlier", "APPLY", spec, (record.uuid,), state)))
    domains = Domains()
    applied(w, domains, "work", "rules")
    assert domains.of("attach_interface")
    # Of another boot: that one's start has brought everything.
    old = replace(spec, boot_id="old")
    w.view.apply(OperationPut(Operation("earlier", "APPLY", old, (record.uuid,), state)))
    domains = Domains()
    applied(w, domains, "work", "rules")
    assert not domains.of("attach_interface")


def test_a_guest_is_told_its_network_before_it_is_plugged_anew(w: World) -> None:
    w.create("other-net")
    w.set("other-net", "provides_network", "True")
    w.start("other-net")
    w.set("work", "netvm", "other-net")
    domains = Domains()
    applied(w, domains)
    (at,) = [n for n, (name, _) in enumerate(domains.calls) if name == "attach_interface"]
    before = {r.boot.uuid for name, r in domains.calls[:at] if name == "write_guest_keys"}
    assert before == {w.qube(name).uuid for name in ("work", "sys-net", "other-net")}
    assert not any(name == "write_guest_keys" for name, _ in domains.calls[at:])


def test_a_tap_moves_once_the_rules_are_in_the_other_namespace(w: World) -> None:
    host = w.view.host
    assert host is not None
    w.view.apply(FactPut(replace(host, hypervisor="kvm")))
    order = Domains()

    class Both(Firewall):
        """One list of calls for all, and what a namespace is called."""

        def __getattr__(self, name: str) -> Any:
            async def call(_: Any, **__: object) -> Any:
                order.calls.append((name, None))
                return SimpleNamespace(namespace="bh-net", tap="tap")

            return call

        async def apply(self, request: Any, **_: object) -> Any:
            order.calls.append(("apply", request))
            return SimpleNamespace(guest_keys=[])

    record = w.qube("work")
    spec = ApplySpec(record.uuid, record.run.boot_id)
    operation = Operation("op", "APPLY", spec, (record.uuid,), OperationState.RUNNING)
    participants: Any = SimpleNamespace(domains=order, firewall=Both(), hostd=Both())
    executor: Any = SimpleNamespace(replica=SimpleNamespace(view=w.view))
    asyncio.run(Apply().forward(StepContext(operation, "apply", participants, 1, executor)))
    moves = [name for name, _ in order.calls if name in ("apply", "unplug", "plug")]
    assert moves == ["apply", "unplug", "plug"]
    assert [r.boot.uuid for r in order.of("write_guest_keys")] == [record.uuid]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_netvm_that_was_left_is_told_although_the_qube_stops(w: World, when: str) -> None:
    w.create("other-net")
    w.set("other-net", "provides_network", "True")
    w.start("other-net")
    w.set("work", "netvm", "other-net")
    domains = Domains()
    boot_id = w.qube("work").run.boot_id
    stopping = Run(Phase.STOPPING, boot_id)
    if when == "before":
        w.patch("work", run=stopping)
    else:
        domains.stops = lambda: w.patch("work", run=stopping)
        domains.refuses["write_guest_keys"] = BusError("NOT_FOUND", "DOMAIN_NOT_FOUND", "gone")
    applied(w, domains)
    left = [r for r in domains.of("write_guest_keys") if r.boot.uuid == w.qube("sys-net").uuid]
    assert {"/connected-ips": ""}.items() <= {k.path: k.value for k in left[-1].keys}.items()
    assert left[-1].HasField("removed_of")
    # A part was about nothing of the kind.
    domains = Domains()
    applied(w, domains, "work", "keys")
    assert domains.calls == []
