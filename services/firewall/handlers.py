"""The firewall's bus methods: messages in and out of the keeper.

Owns conversion only. Must not know files, kernels or timers. Invariant: an effect that
has begun is finished even when its caller gives up, so that file, kernel and registry
never stop half way because of a deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from bulkhead.api import control_pb2, firewall_pb2
from bulkhead.bus.dispatch import Call
from services.firewall.core.ruleset import make_target
from services.firewall.keeper import RuleKeeper

T = TypeVar("T")


class FirewallHandlers:
    """service Firewall."""

    def __init__(self, keeper: RuleKeeper) -> None:
        self._keeper = keeper
        self._running: set[asyncio.Task[Any]] = set()

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def settle(self) -> None:
        """Wait for the work whose callers have gone."""
        if self._running:
            await asyncio.wait(tuple(self._running))

    async def apply(
        self, request: firewall_pb2.ApplyRequest, call: Call
    ) -> firewall_pb2.ApplyReply:
        """Enforce the qube's stored rules from now on."""
        del call
        found = request.target
        target = make_target(
            found.uuid,
            found.qube,
            found.boot_id,
            found.netvm_uuid,
            found.namespace,
            found.interface,
            found.ip,
            found.ip6,
        )
        count, keys = await self._finish(
            self._keeper.apply(target, found.strict_names, request.iptables_xid)
        )
        return firewall_pb2.ApplyReply(rules=count, guest_keys=keys)

    async def withdraw(
        self, request: firewall_pb2.WithdrawRequest, call: Call
    ) -> firewall_pb2.WithdrawReply:
        """Take the qube of that boot out of its table."""
        del call
        await self._finish(self._keeper.withdraw(request.uuid, request.boot_id))
        return firewall_pb2.WithdrawReply()

    async def set_rules(
        self, request: firewall_pb2.SetRulesRequest, call: Call
    ) -> firewall_pb2.SetRulesReply:
        """Replace all rules of a qube."""
        digest, applied, revision, seq = await self._finish(
            self._keeper.set_rules(
                request.uuid, request.qube, request.untrusted_rules, call.validate_only
            )
        )
        call.revision, call.seq = revision, seq
        return firewall_pb2.SetRulesReply(digest=digest, applied=applied)

    async def get_rules(
        self, request: firewall_pb2.GetRulesRequest, call: Call
    ) -> firewall_pb2.GetRulesReply:
        """The stored rules that have not expired."""
        del call
        lines, is_default, digest = await self._keeper.lines(request.uuid)
        return firewall_pb2.GetRulesReply(rules=lines, is_default=is_default, digest=digest)

    async def reload_rules(
        self, request: firewall_pb2.ReloadRulesRequest, call: Call
    ) -> firewall_pb2.ReloadRulesReply:
        """Resolve names again and make the chain from the file."""
        applied, revision, seq = await self._finish(self._keeper.reload(request.uuid, request.qube))
        call.revision, call.seq = revision, seq
        return firewall_pb2.ReloadRulesReply(applied=applied)

    async def copy_rules(
        self, request: firewall_pb2.CopyRulesRequest, call: Call
    ) -> firewall_pb2.CopyRulesReply:
        """A clone or a disposable gets its source's rules."""
        del call
        digest = await self._finish(
            self._keeper.copy(request.source_uuid, request.target_uuid, request.target_qube)
        )
        return firewall_pb2.CopyRulesReply(digest=digest)

    async def delete_rules(
        self, request: firewall_pb2.DeleteRulesRequest, call: Call
    ) -> firewall_pb2.DeleteRulesReply:
        """Take the qube out of its table, then remove its file."""
        del call
        await self._finish(self._keeper.delete(request.uuid))
        return firewall_pb2.DeleteRulesReply()

    async def netvm_up(
        self, request: firewall_pb2.NetvmUpRequest, call: Call
    ) -> firewall_pb2.NetvmUpReply:
        """Base rules before any client's interface arrives."""
        del call
        await self._finish(
            self._keeper.netvm_up(request.uuid, request.boot_id, request.namespace, request.uplink)
        )
        return firewall_pb2.NetvmUpReply()

    async def netvm_down(
        self, request: firewall_pb2.NetvmDownRequest, call: Call
    ) -> firewall_pb2.NetvmDownReply:
        """Let go of a network qube; what its kernel holds stays closed."""
        del call
        await self._finish(self._keeper.netvm_down(request.uuid, request.boot_id))
        return firewall_pb2.NetvmDownReply()

    async def inventory(
        self, request: firewall_pb2.FirewallInventoryRequest, call: Call
    ) -> firewall_pb2.FirewallInventoryReply:
        """Every qube with a file or an applied target."""
        del request, call
        reply = firewall_pb2.FirewallInventoryReply()
        for (
            uuid,
            boot_id,
            namespace,
            interface,
            rules_file,
            chain,
        ) in await self._keeper.inventory():
            reply.items.add(
                uuid=uuid,
                boot_id=boot_id,
                namespace=namespace,
                interface=interface,
                rules_file=rules_file,
                chain=chain,
            )
        return reply

    async def effective_rules(
        self, request: firewall_pb2.EffectiveRulesRequest, call: Call
    ) -> firewall_pb2.EffectiveRulesReply:
        """What each rule does now, with counters."""
        del call
        rules, enforced, text = await self._keeper.effective(request.uuid)
        return firewall_pb2.EffectiveRulesReply(
            rules=[
                firewall_pb2.EffectiveRule(
                    rule=rule.line,
                    packets=rule.packets,
                    bytes=rule.bytes,
                    inert=rule.inert,
                    why=rule.why,
                )
                for rule in rules
            ],
            enforced=enforced,
            ruleset=text,
        )

    async def sweep(self, request: control_pb2.SweepRequest, call: Call) -> control_pb2.SweepReply:
        """Compare every table with what it should be, and repair it."""
        del request, call
        return control_pb2.SweepReply(findings=await self._finish(self._keeper.check_netvms()))
