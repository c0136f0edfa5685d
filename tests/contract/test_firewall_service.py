"""The keeper with real files and planned tables: every method's promises."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from bulkhead import durable
from bulkhead.api import control_pb2, firewall_pb2
from bulkhead.bus.dispatch import Call
from bulkhead.bus.errors import BusError
from bulkhead.model.firewall_rules import api_line, digest, parse_lines
from bulkhead.model.refusal import Refusal
from services.firewall import keeper as keeper_module
from services.firewall.adapters.planned_enforcer import PlannedEnforcer
from services.firewall.adapters.rules_files import RulesFiles
from services.firewall.adapters.state_files import StateFiles
from services.firewall.core import ruleset
from services.firewall.core.enforcement import Enforcer, EnforcerGone, KernelRefusal
from services.firewall.core.flows import Flow
from services.firewall.core.reasons import REASONS
from services.firewall.core.ruleset import Transaction
from services.firewall.handlers import FirewallHandlers
from services.firewall.host_names import NAME_WAIT_S
from services.firewall.keeper import RuleKeeper

A = "11111111-1111-4111-8111-111111111111"
B = "22222222-2222-4222-8222-222222222222"
NET = "99999999-9999-4999-8999-999999999999"
T = TypeVar("T")


class Kernel(PlannedEnforcer):
    """A planned table that says it is real, can refuse, and shows flows."""

    def __init__(self) -> None:
        super().__init__()
        self.refuse: Callable[[Transaction], bool] = lambda transaction: False
        self.gone = False
        self.tracked: list[Flow] = []
        self.changes: list[Transaction] = []

    @property
    def real(self) -> bool:
        return True

    async def change(self, transaction: Transaction) -> None:
        await asyncio.sleep(0)
        if self.gone:
            raise EnforcerGone("no answer")
        if self.refuse(transaction):
            raise KernelRefusal("the kernel says no")
        self.changes.append(transaction)
        await super().change(transaction)

    async def flows(self, addresses: Sequence[str]) -> tuple[Flow, ...]:
        return tuple(f for f in self.tracked if f.source in addresses or f.destination in addresses)

    async def cut(self, flows: Sequence[Flow]) -> None:
        self.tracked = [flow for flow in self.tracked if flow not in flows]


class World:
    """Everything outside the keeper."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rules = directory / "rules"
        self.rules.mkdir(exist_ok=True)
        self.kernels: dict[str, Kernel] = {}
        self.announced: list[tuple[str, bool, str | None]] = []
        self.registry_up = True
        self.names: dict[str, tuple[str, ...]] = {}
        self.now = 1_000_000.0

    async def announce(self, uuid: str, event: bool, value: str | None) -> tuple[int, int]:
        if not self.registry_up:
            raise BusError("UNAVAILABLE", "NOT_CONNECTED", "the registry is away")
        self.announced.append((uuid, event, value))
        return len(self.announced), 100 + len(self.announced)

    async def open_enforcer(self, namespace: str) -> Enforcer:
        if not namespace:
            return PlannedEnforcer()
        return self.kernels.setdefault(namespace, Kernel())

    async def resolve(self, name: str) -> tuple[tuple[str, ...], float]:
        if name not in self.names:
            raise OSError("no such name")
        return self.names[name], 60.0

    def keeper(self) -> RuleKeeper:
        return RuleKeeper(
            RulesFiles(self.rules),
            StateFiles(self.directory / "run"),
            self.announce,
            self.open_enforcer,
            self,
            now=lambda: self.now,
        )

    def file(self, uuid: str) -> bytes | None:
        path = self.rules / f"{uuid}.xml"
        return path.read_bytes() if path.exists() else None

    def chain(self, uuid: str = A, namespace: str = "bh-net-6") -> tuple[str, ...]:
        return self.kernels[namespace].table.chains[f"q_{ruleset.tag(uuid)}"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def target(
    uuid: str = A, number: int = 20, boot: str = "boot", namespace: str = "bh-net-6"
) -> ruleset.Target:
    interface = f"bh{number}" if namespace else ""
    return ruleset.make_target(
        uuid, f"q{number}", boot, NET, namespace, interface, f"10.137.0.{number}", ""
    )


def run(work: Awaitable[T]) -> T:
    async def main() -> T:
        return await work

    return asyncio.run(main())


async def started(world: World) -> RuleKeeper:
    keeper = world.keeper()
    await keeper.adopt()
    await keeper.netvm_up(NET, "netboot", "bh-net-6", "up0")
    return keeper


@contextlib.asynccontextmanager
async def announcing(keeper: RuleKeeper) -> AsyncIterator[None]:
    task = asyncio.create_task(keeper.run_announcements())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


REJECT = 'counter reject with icmpx admin-prohibited comment "policy"'
ACCEPT_ALL = ('counter accept comment "r0"', REJECT)


# ---- set and get


def test_default_is_one_accept_and_has_no_file(world: World) -> None:
    lines, is_default, value = run(world.keeper().lines(A))
    assert (lines, is_default, value) == (("action=accept",), True, "")
    assert world.file(A) is None


def test_set_saves_announces_and_gets(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        lines = ["action=accept dst4=1.2.3.4 comment=a b", "action=drop expire=5", "action=drop"]
        value, applied, revision, seq = await keeper.set_rules(A, "work", lines)
        kept = parse_lines([lines[0], lines[2]])
        assert (value, applied, revision, seq) == (digest(kept), False, 1, 101)
        assert world.announced == [(A, True, value)]
        assert await keeper.lines(A) == (tuple(map(api_line, kept)), False, value)
        assert not list((world.directory / "run/pending").iterdir())

    run(story())


def test_set_refuses_a_bad_list_and_changes_nothing(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.set_rules(A, "work", ["action=drop"])
        before = world.file(A)
        for bad in (["action=accept", "action=maybe"], [""], ["action=accept dsthost=A"]):
            with pytest.raises(Refusal) as refused:
                await keeper.set_rules(A, "work", bad)
            assert refused.value.reason == "INVALID_RULE"
        assert world.file(A) == before and len(world.announced) == 1

    run(story())


def test_validate_only_parses_and_changes_nothing(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.set_rules(A, "work", ["action=drop"], validate_only=True)
        with pytest.raises(Refusal):
            await keeper.set_rules(A, "work", ["nonsense"], validate_only=True)
        assert world.file(A) is None and not world.announced

    run(story())


def test_set_on_an_applied_qube_replaces_its_chain_in_one_transaction(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        assert await keeper.apply(target(), False) == (1, ())
        assert world.chain() == ACCEPT_ALL
        count = len(world.kernels["bh-net-6"].changes)
        _, applied, _, _ = await keeper.set_rules(A, "q20", ["action=drop"])
        assert applied
        assert len(world.kernels["bh-net-6"].changes) == count + 1
        assert world.chain()[0].endswith('admin-prohibited comment "r0"')

    run(story())


def test_kernel_refusal_blocks_the_qube_and_brings_the_old_file_back(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.apply(target(), False)
        await keeper.apply(target(B, 21), False)
        await keeper.set_rules(A, "q20", ["action=accept dst4=1.2.3.4"])
        old, count = world.file(A), len(world.announced)
        kernel = world.kernels["bh-net-6"]
        kernel.refuse = lambda transaction: any("6.6.6.6" in c for c in transaction.commands)
        with pytest.raises(BusError) as failed:
            await keeper.set_rules(A, "q20", ["action=accept dst4=6.6.6.6"])
        assert failed.value.reason == "KERNEL_REFUSED"
        assert world.file(A) == old and len(world.announced) == count
        assert world.chain() == (REJECT,)
        assert world.chain(B) == ACCEPT_ALL
        assert not list((world.directory / "run/pending").iterdir())
        await keeper.reload(A, "q20")
        assert world.chain()[0] == 'ip daddr 1.2.3.4/32 counter accept comment "r0"'

    run(story())


def test_worker_that_is_gone_leaves_file_and_kernel_as_they_were(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.apply(target(), False)
        kernel = world.kernels["bh-net-6"]
        kernel.gone = True
        with pytest.raises(BusError) as failed:
            await keeper.set_rules(A, "q20", ["action=drop"])
        assert failed.value.reason == "ENFORCER_UNAVAILABLE"
        assert failed.value.code == "UNAVAILABLE"
        assert world.file(A) is None and world.chain() == ACCEPT_ALL
        kernel.gone = False
        await keeper.set_rules(A, "q20", ["action=drop"])
        assert len(world.chain()) == 2 and world.chain() != ACCEPT_ALL

    run(story())


def test_full_disk_leaves_the_old_rules_everywhere(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.apply(target(), False)
        await keeper.set_rules(A, "q20", ["action=accept dst4=1.2.3.4"])
        old = world.file(A)
        chain = world.chain()
        real = durable.write_file

        def full(path: Path, data: bytes, mode: int = 0o600) -> None:
            if path.suffix == ".xml":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            real(path, data, mode)

        monkeypatch.setattr(durable, "write_file", full)
        with pytest.raises(BusError) as failed:
            await keeper.set_rules(A, "q20", ["action=drop"])
        assert failed.value.reason == "RULES_NOT_SAVED"
        assert "firewall save error" in failed.value.message
        assert world.file(A) == old and world.chain() == chain
        assert (await keeper.lines(A))[0] == ("action=accept dst4=1.2.3.4/32",)
        assert len(world.announced) == 1

    run(story())


def test_two_sets_at_once_end_as_one_of_the_two_everywhere(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.apply(target(), False)
        lists = [[f"action=accept dst4=10.0.{n}.{k}" for k in range(20)] for n in range(6)]
        await asyncio.gather(*(keeper.set_rules(A, "q20", lines) for lines in lists))
        lines, _, value = await keeper.lines(A)
        assert list(lines) in [[f"{line}/32" for line in one] for one in lists]
        assert world.announced[-1][2] == value
        last = lines[0].removeprefix("action=accept dst4=")
        assert world.chain()[0] == f'ip daddr {last} counter accept comment "r0"'
        assert len(world.chain()) == 21

    run(story())


def test_registry_that_is_away_hears_of_it_later(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        async with announcing(keeper):
            await until(lambda: (world.directory / "run/started").exists())
            world.registry_up = False
            with pytest.raises(BusError) as failed:
                await keeper.set_rules(A, "work", ["action=drop"])
            assert failed.value.reason == "NOT_CONNECTED"
            assert world.file(A) is not None
            world.registry_up = True
            await until(lambda: bool(world.announced))
            assert world.announced[0][:2] == (A, True)
            await until(lambda: not list((world.directory / "run/pending").iterdir()))

    run(story())


# ---- files


def test_copies_and_deleted_files_leave_others_alone(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        assert await keeper.copy(A, B, "disp1") == ""
        assert world.file(B) is None
        value, *_ = await keeper.set_rules(A, "work", ["action=drop", "action=accept"])
        assert await keeper.copy(A, B, "disp1") == value == await keeper.copy(A, B, "disp1")
        assert world.file(A) == world.file(B)
        assert len(world.announced) == 1
        await keeper.delete(B)
        await keeper.delete(B)
        assert world.file(B) is None and world.file(A) is not None

    run(story())


def test_rules_survive_a_restart_also_those_of_a_disposable(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.set_rules(A, "work", ["action=drop"])
        await keeper.copy(A, B, "disp1")
        again = world.keeper()
        await again.adopt()
        assert (await again.lines(B))[0] == ("action=drop",)

    run(story())


def test_unreadable_file_blocks_its_qube_only_and_set_repairs_it(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        (world.rules / f"{A}.xml").write_bytes(b"<firewall version='2'><rules><oops/></rules>")
        await keeper.apply(target(), False)
        await keeper.apply(target(B, 21), False)
        assert world.chain() == (REJECT,) and world.chain(B) == ACCEPT_ALL
        with pytest.raises(BusError) as failed:
            await keeper.lines(A)
        assert failed.value.reason == "RULES_UNREADABLE"
        await keeper.set_rules(A, "q20", ["action=accept"])
        assert world.chain() == ACCEPT_ALL

    run(story())


def test_link_in_the_place_of_a_file_is_not_followed(world: World, tmp_path: Path) -> None:
    secret = tmp_path / "secret.xml"
    secret.write_text("<firewall version='2'><rules/></firewall>")
    (world.rules / f"{A}.xml").symlink_to(secret)
    with pytest.raises(BusError) as failed:
        run(world.keeper().lines(A))
    assert failed.value.reason == "RULES_UNREADABLE"


# ---- apply and withdraw


def test_apply_needs_a_netvm_that_is_up(world: World) -> None:
    async def story() -> None:
        keeper = world.keeper()
        with pytest.raises(BusError) as failed:
            await keeper.apply(target(), False)
        assert failed.value.reason == "NETVM_NOT_UP"

    run(story())


def test_apply_and_withdraw_by_boot_id(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        for _ in range(2):
            await keeper.apply(target(boot="two"), False)
        await keeper.withdraw(A, "one")
        assert world.chain() == ACCEPT_ALL
        for _ in range(2):
            await keeper.withdraw(A, "two")
        table = world.kernels["bh-net-6"].table
        assert f"q_{ruleset.tag(A)}" not in table.chains
        assert table.elements("by_interface") == {} == table.elements("clients")
        assert await keeper.inventory() == ()
        await keeper.apply(target(boot="three"), False)
        await keeper.withdraw(A, "")
        assert table.elements("by_interface") == {}

    run(story())


def test_delete_leaves_neither_chain_nor_file(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.apply(target(boot="two"), False)
        await keeper.set_rules(A, "work", ["action=drop"])
        for _ in range(2):
            await keeper.delete(A)
        table = world.kernels["bh-net-6"].table
        assert f"q_{ruleset.tag(A)}" not in table.chains
        assert table.elements("by_interface") == {} == table.elements("clients")
        assert world.file(A) is None and await keeper.inventory() == ()

    run(story())


def test_apply_without_netvm_enforces_nothing(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.apply(target(), False)
        alone = ruleset.make_target(A, "q20", "boot", "", "", "", "", "")
        assert await keeper.apply(alone, False) == (1, ())
        assert world.kernels["bh-net-6"].table.elements("clients") == {}

    run(story())


def test_planned_target_gives_guest_keys_and_is_not_enforced(world: World) -> None:
    async def story() -> None:
        keeper = world.keeper()
        await keeper.set_rules(A, "q20", ["action=accept dst4=1.2.3.4", "action=drop"])
        count, keys = await keeper.apply(target(namespace=""), False)
        assert count == 2
        assert keys[0] == "/qubes-firewall/10.137.0.20/policy=drop"
        assert keys[-1] == "/qubes-firewall/10.137.0.20="
        rules, enforced, text = await keeper.effective(A)
        assert [rule.line for rule in rules] == ["action=accept dst4=1.2.3.4/32", "action=drop"]
        assert not enforced and "ip daddr 1.2.3.4/32 counter accept" in text
        _, applied, _, _ = await keeper.set_rules(A, "q20", ["action=drop"])
        assert not applied
        assert [item[0] for item in await keeper.inventory() if item[5]] == [A]

    run(story())


def test_netvm_that_returns_has_its_clients_rules_at_once(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.set_rules(A, "q20", ["action=drop"])
        await keeper.apply(target(), False)
        await keeper.netvm_down(NET, "netboot")
        world.kernels["bh-net-6"] = Kernel()
        await keeper.netvm_up(NET, "again", "bh-net-6", "up0")
        assert len(world.chain()) == 2 and world.chain() != ACCEPT_ALL
        await keeper.netvm_down(NET, "netboot")
        await keeper.set_rules(A, "q20", ["action=accept"])
        assert world.chain() == ACCEPT_ALL

    run(story())


def test_namespace_made_anew_gets_the_whole_table(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.apply(target(), False)
        kernel = world.kernels["bh-net-6"]
        kernel.table.execute(ruleset.remove_table().commands)
        await keeper.apply(target(B, 21), False)
        assert world.chain() == ACCEPT_ALL == world.chain(B)

    run(story())


def test_tightened_rules_cut_the_flows_that_they_forbid(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.apply(target(), False)
        web = Flow("10.137.0.20", "192.0.2.1", 6, 443)
        mail = Flow("10.137.0.20", "192.0.2.1", 6, 25)
        ping = Flow("10.137.0.20", "192.0.2.1", 1, None, 8)
        other = Flow("10.137.0.21", "192.0.2.1", 6, 25)
        kernel = world.kernels["bh-net-6"]
        kernel.tracked = [web, mail, ping, other]
        await keeper.set_rules(A, "q20", ["action=accept proto=tcp dstports=443"])
        assert kernel.tracked == [web, other]
        await keeper.withdraw(A, "boot")
        assert kernel.tracked == [other]

    run(story())


def test_flows_that_a_kill_left_are_cut_at_the_start(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.apply(target(), False)
        await keeper.apply(target(B, 21), False)
        await keeper.set_rules(A, "q20", ["action=accept proto=tcp dstports=443"])
        web = Flow("10.137.0.20", "192.0.2.1", 6, 443)
        mail = Flow("10.137.0.20", "192.0.2.1", 6, 25)
        other = Flow("10.137.0.21", "192.0.2.1", 6, 25)
        kernel = world.kernels["bh-net-6"]
        kernel.tracked = [web, mail, other]
        await world.keeper().adopt()
        assert kernel.tracked == [web, other]

    run(story())


# ---- restart


def test_adopt_leaves_a_right_table_alone_and_repairs_a_wrong_one(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.apply(target(), False)
        kernel = world.kernels["bh-net-6"]
        count = len(kernel.changes)
        again = world.keeper()
        await again.adopt()
        assert len(kernel.changes) == count
        assert await again.check_netvms() == ()
        # A file that changed while the kernel did not: as after a kill between the two.
        RulesFiles(world.rules).write(A, b"<firewall version='2'><rules/></firewall>")
        third = world.keeper()
        await third.adopt()
        assert world.chain() == (REJECT,)
        kernel.table.execute([f"flush chain inet bulkhead g_{ruleset.tag(A)}"])
        assert len(await third.check_netvms()) == 1
        assert await third.check_netvms() == ()

    run(story())


def test_change_cut_short_is_announced_after_the_restart(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        async with announcing(keeper):
            await until(lambda: (world.directory / "run/started").exists())
        StateFiles(world.directory / "run").save("pending", A, {"qube": "work"})
        RulesFiles(world.rules).write(A, b"<firewall version='2'><rules/></firewall>")
        again = world.keeper()
        await again.adopt()
        async with announcing(again):
            await until(lambda: bool(world.announced))
        assert world.announced == [(A, True, digest(()))]

    run(story())


def test_first_start_of_a_boot_announces_every_digest(world: World) -> None:
    async def story() -> None:
        RulesFiles(world.rules).write(A, b"<firewall version='2'><rules/></firewall>")
        keeper = world.keeper()
        await keeper.adopt()
        async with announcing(keeper):
            await until(lambda: (world.directory / "run/started").exists())
        assert world.announced == [(A, False, digest(()))]
        again = world.keeper()
        await again.adopt()
        async with announcing(again):
            await asyncio.sleep(0)
        assert len(world.announced) == 1

    run(story())


# ---- time and names


def test_expired_rule_leaves_file_and_kernel_also_after_a_restart(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.apply(target(), False)
        await keeper.set_rules(
            A, "q20", ["action=accept expire=1000100 dst4=1.2.3.4", "action=drop"]
        )
        await keeper.expire_due()
        assert len(world.chain()) == 3
        again = world.keeper()
        await again.adopt()
        world.now = 1_000_101.0
        await again.expire_due()
        assert len(world.chain()) == 2
        assert (await again.lines(A))[0] == ("action=drop",)
        assert b"1.2.3.4" not in (world.file(A) or b"")
        assert world.announced[-1] == (A, True, digest(parse_lines(["action=drop"])))

    run(story())


def test_expiry_closes_the_kernel_even_when_the_disk_is_full(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.apply(target(), False)
        await keeper.set_rules(A, "q20", ["action=accept expire=1000100"])
        world.now = 1_000_101.0

        def full(path: Path, data: bytes, mode: int = 0o600) -> None:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(durable, "write_file", full)
        await keeper.expire_due()
        assert world.chain() == (REJECT,)
        monkeypatch.undo()
        world.now += 60
        await keeper.expire_due()
        assert (await keeper.lines(A))[0] == ()

    run(story())


def test_timer_of_a_background_expiry_fires(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.apply(target(), False)
        task = asyncio.create_task(keeper.run_expiry())
        await keeper.set_rules(A, "q20", ["action=accept expire=1000001"])
        assert len(world.chain()) == 2
        world.now = 1_000_002.0
        await keeper.set_rules(B, "other", ["action=accept expire=1000010"])
        await until(lambda: len(world.chain()) == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(story())


def test_unknown_name_makes_only_its_rule_inert_until_it_answers(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.apply(target(), False)
        await keeper.set_rules(
            A, "q20", ["action=accept dsthost=late.org", "action=accept dst4=1.2.3.4"]
        )
        assert len(world.chain()) == 2
        rules, enforced, _ = await keeper.effective(A)
        assert enforced and rules[0].inert and "late.org" in rules[0].why and not rules[1].inert
        world.names["late.org"] = ("192.0.2.7",)
        await keeper.reload(A, "q20")
        assert world.chain()[0] == 'ip daddr { 192.0.2.7 } counter accept comment "r0"'
        # A resolver that fails later does not take away what is known, nor does a restart.
        del world.names["late.org"]
        await keeper.reload(A, "q20")
        again = world.keeper()
        await again.adopt()
        assert world.chain()[0].startswith("ip daddr { 192.0.2.7 }")

    run(story())


def test_a_guest_netvm_resolves_itself_so_nobody_waits_for_names_here(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host without a network of its own has no resolver that answers."""
    answer = asyncio.Event()
    known = world.resolve

    async def resolve(name: str) -> tuple[tuple[str, ...], float]:
        await answer.wait()
        return await known(name)

    monkeypatch.setattr(world, "resolve", resolve)
    world.names["a.org"] = ("192.0.2.7",)

    async def story() -> None:
        keeper = world.keeper()
        await keeper.adopt()
        task = asyncio.create_task(keeper.run_names())
        async with asyncio.timeout(NAME_WAIT_S / 2):
            await keeper.apply(target(namespace=""), False)
            await keeper.set_rules(A, "q20", ["action=accept dsthost=a.org"])
            _, keys = await keeper.apply(target(namespace=""), False)
            await keeper.reload(A, "q20")
        assert "/qubes-firewall/10.137.0.20/0000=action=accept dsthost=a.org" in keys
        assert (await keeper.effective(A))[0][0].inert
        # What it would do is known once somebody has answered.
        answer.set()
        async with asyncio.timeout(10):
            while (await keeper.effective(A))[0][0].inert:
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(story())


def test_unknown_name_in_a_dropping_rule_closes(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.apply(target(), False)
        await keeper.set_rules(A, "q20", ["action=drop dsthost=evil.org", "action=accept"])
        assert world.chain()[0] == 'counter reject with icmpx admin-prohibited comment "r0"'

    run(story())


def test_strict_names_block_the_whole_qube(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.set_rules(A, "q20", ["action=accept dsthost=late.org", "action=accept"])
        await keeper.apply(target(), True)
        assert world.chain() == (REJECT,)
        world.names["late.org"] = ("192.0.2.7",)
        await keeper.reload(A, "q20")
        assert len(world.chain()) == 3

    run(story())


def test_chain_follows_an_answer_that_changes(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        await keeper.apply(target(), False)
        task = asyncio.create_task(keeper.run_names())
        world.names["a.org"] = ("192.0.2.7",)
        await keeper.set_rules(A, "q20", ["action=accept dsthost=a.org"])
        world.names["a.org"] = ("192.0.2.8",)
        await keeper.reload(A, "q20")
        await until(lambda: "192.0.2.7, 192.0.2.8" in world.chain()[0])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(story())


# ---- messages


def test_handlers_convert_both_ways(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        handlers = FirewallHandlers(keeper)
        call = Call("lifecycle")
        found = firewall_pb2.FirewallTarget(
            uuid=A, qube="work", boot_id="b", netvm_uuid=NET, namespace="bh-net-6"
        )
        found.interface, found.ip = "bh20", "10.137.0.20"
        reply = await handlers.apply(firewall_pb2.ApplyRequest(target=found), call)
        assert reply.rules == 1 and not reply.guest_keys
        set_call = Call("adminapi")
        done = await handlers.set_rules(
            firewall_pb2.SetRulesRequest(uuid=A, qube="work", untrusted_rules=["action=drop"]),
            set_call,
        )
        assert done.applied and (set_call.revision, set_call.seq) == (1, 101)
        got = await handlers.get_rules(firewall_pb2.GetRulesRequest(uuid=A), call)
        assert list(got.rules) == ["action=drop"] and got.digest == done.digest
        items = (await handlers.inventory(firewall_pb2.FirewallInventoryRequest(), call)).items
        assert [(i.uuid, i.boot_id, i.interface, i.rules_file, i.chain) for i in items] == [
            (A, "b", "bh20", True, True)
        ]
        effective = await handlers.effective_rules(firewall_pb2.EffectiveRulesRequest(uuid=A), call)
        assert effective.enforced and effective.rules[0].rule == "action=drop"
        assert not (await handlers.sweep(control_pb2.SweepRequest(), call)).findings
        await handlers.withdraw(firewall_pb2.WithdrawRequest(uuid=A, boot_id="b"), call)
        with pytest.raises(Refusal):
            await handlers.get_rules(firewall_pb2.GetRulesRequest(uuid="../x"), call)

    run(story())


def test_caller_that_gives_up_does_not_stop_a_change_half_way(world: World) -> None:
    async def story() -> None:
        keeper = await started(world)
        handlers = FirewallHandlers(keeper)
        await keeper.apply(target(), False)
        task = asyncio.create_task(
            handlers.set_rules(
                firewall_pb2.SetRulesRequest(uuid=A, qube="q", untrusted_rules=["action=drop"]),
                Call("adminapi"),
            )
        )
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await handlers.settle()
        lines, _, value = await keeper.lines(A)
        assert lines == ("action=drop",) and world.chain() != ACCEPT_ALL
        assert world.announced[-1][2] == value

    run(story())


def test_names_in_a_table_of_reasons_are_complete() -> None:
    source = Path(keeper_module.__file__).read_text()
    used: Mapping[str, bool] = {name: f'"{name}"' in source for name in REASONS}
    assert all(used.values()), used
