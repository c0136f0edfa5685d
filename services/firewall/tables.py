"""The tables of network qubes: whose chain is in which, in the kernel and in the notes.

Owns the applied targets, the network qubes, what the kernel has of each, and the order of
note and kernel. Must not know the bus, sockets, nftables, nor who changes rules.
Invariants: a chain is made from the stored rules or refuses everything; an interface
without an applied qube is dropped; a table whose last answer stayed out is made anew
before anything else; whatever dies in between, adopt() makes it so again.

Order of applying: note "applied" - kernel. Order of forgetting: kernel - forget the note.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bulkhead import failpoints
from services.firewall import failpoint_table  # noqa: F401  (declares the rows)
from services.firewall.adapters.state_files import StateFiles
from services.firewall.applied import Applied, applied_from, applied_note
from services.firewall.core import flows, ruleset
from services.firewall.core.enforcement import (
    Enforcer,
    EnforcerGone,
    KernelRefusal,
    NamespaceGone,
)
from services.firewall.core.expiry import without_expired
from services.firewall.core.ruleset import Compiled, Target, Transaction
from services.firewall.failures import failure
from services.firewall.flow_cutter import FlowCutter
from services.firewall.host_names import HostNames
from services.firewall.named_locks import NamedLocks, table_lock
from services.firewall.stored_rules import Stored, StoredRules

# namespace -> an enforcer for it; EnforcerGone
OpenEnforcer = Callable[[str], Awaitable[Enforcer]]


@dataclass(slots=True)
class Netvm:
    """A network qube. namespace "": its table is planned only."""

    uuid: str
    boot_id: str
    namespace: str
    uplink: str
    resolvers: tuple[str, ...]
    enforcer: Enforcer | None = None
    # True after an answer stayed out: the table is made anew before anything else.
    suspect: bool = False


class Tables:
    """Every table. Who enforces, blocks or forgets a qube holds the qube's lock."""

    def __init__(
        self,
        rules: StoredRules,
        state: StateFiles,
        names: HostNames,
        locks: NamedLocks,
        open_enforcer: OpenEnforcer,
        cutter: FlowCutter,
        *,
        resolvers: tuple[str, ...],
        now: Callable[[], float],
        log: logging.Logger,
    ) -> None:
        self._rules = rules
        self._state = state
        self._names = names
        self._locks = locks
        self._open_enforcer = open_enforcer
        self._cutter = cutter
        self._resolvers = resolvers
        self._now = now
        self._log = log
        self._applied: dict[str, Applied] = {}
        # What the kernel has of each qube, as far as this process knows.
        self._in_kernel: dict[str, tuple[Compiled, ...]] = {}
        self._netvms: dict[str, Netvm] = {}

    # ---- what is applied

    def applied(self, uuid: str) -> Applied | None:
        """The qube as it is applied, None when it is not."""
        return self._applied.get(uuid)

    def uuids(self) -> tuple[str, ...]:
        """Qubes that are applied."""
        return tuple(self._applied)

    def is_up(self, netvm_uuid: str) -> bool:
        """The network qube has a table."""
        return netvm_uuid in self._netvms

    def enforcer_of(self, netvm_uuid: str) -> Enforcer | None:
        """Who looks after the network qube's table, where that was needed yet."""
        netvm = self._netvms.get(netvm_uuid)
        return None if netvm is None else netvm.enforcer

    async def marks(self) -> dict[str, Mapping[str, str]]:
        """Network qube -> what its kernel says of its chains; those that answer."""
        marks: dict[str, Mapping[str, str]] = {}
        for netvm in tuple(self._netvms.values()):
            if netvm.enforcer is not None:
                with contextlib.suppress(EnforcerGone):
                    marks[netvm.uuid] = (await netvm.enforcer.status()).marks
        return marks

    async def host_names(self) -> set[str]:
        """Names that the rules of applied qubes speak of."""
        names: set[str] = set()
        for uuid in self._applied:
            stored = await self._rules.read(uuid)
            names.update(ruleset.host_names(stored.rules or ()))
        return names

    def _followed(self) -> set[str]:
        return {name for applied in self._applied.values() for name in applied.addresses}

    # ---- chains of qubes

    async def enforce(self, uuid: str, stored: Stored, wanted: Applied | None = None) -> bool:
        """Make the chain from the rules; True when a real kernel has it.

        wanted: a target to apply; None: the one that is applied, if any. KernelRefusal
        (the chain is what it was), EnforcerGone.
        """
        former = self._applied.get(uuid)
        current = wanted or former
        if current is None:
            return False
        names = ruleset.host_names(stored.rules or ())
        target = current.target
        if target.namespace:
            await self._names.ask(names)
        else:
            self._names.follow(names)  # the netvm that is a guest resolves them itself
        async with self._locks.hold(table_lock(target.netvm_uuid)):
            netvm = self._netvms.get(target.netvm_uuid)
            if netvm is None:
                if target.namespace:
                    # Noted as applied, but its netvm went: it comes back with netvm_up.
                    return False
                netvm = Netvm(target.netvm_uuid, "", "", "", self._resolvers)
                self._netvms[target.netvm_uuid] = netvm
            known = self._names.addresses(names)
            current = replace(current, addresses={name: known.get(name, ()) for name in names})
            enforcer = await self._enforcer(netvm)
            places = self._displaced(target, former)
            if wanted is not None:
                # Before the kernel: a restart in between must find what may be there.
                await asyncio.to_thread(self._state.save, "applied", uuid, applied_note(current))
                self._applied[uuid] = current
            failpoints.hit("firewall.apply.before_kernel")
            compiled = self._compile(stored, current)
            before = self._in_kernel.pop(uuid, None)
            transaction = ruleset.apply(target, compiled, places)
            try:
                await self._change(netvm, enforcer, transaction)
            except KernelRefusal:
                if (await enforcer.status()).present:
                    raise
                # The namespace was made anew: it gets the whole table.
                await self._define(netvm, {uuid: (current, stored)})
            failpoints.hit("firewall.apply.after_kernel")
            self._applied[uuid] = current
            for old in places:
                if old.uuid != uuid:
                    self._log.warning("%s took over the place of %s", target.qube, old.qube)
                    self._applied.pop(old.uuid, None)
                    self._in_kernel.pop(old.uuid, None)
                    await asyncio.to_thread(self._state.delete, "applied", old.uuid)
            if wanted is None and former is not None and former.addresses != current.addresses:
                await asyncio.to_thread(self._state.save, "applied", uuid, applied_note(current))
            if before is None or places or not flows.only_loosened(before, compiled):
                await self._cutter.cut(enforcer, target, stored.rules, current)
            # Known only from here on: a kill before the cut must lead to another one.
            self._in_kernel[uuid] = compiled
            return enforcer.real

    def _displaced(self, target: Target, former: Applied | None) -> tuple[Target, ...]:
        """Targets in the same table whose interface or address the new one takes."""
        places: list[Target] = []
        if former is not None and former.target.netvm_uuid == target.netvm_uuid:
            old = former.target
            if (old.interface, old.ip, old.ip6) != (target.interface, target.ip, target.ip6):
                places.append(old)
        for uuid, other in self._applied.items():
            one = other.target
            if uuid == target.uuid or one.netvm_uuid != target.netvm_uuid:
                continue
            same_address = (one.ip and one.ip == target.ip) or (one.ip6 and one.ip6 == target.ip6)
            if same_address or one.interface == target.interface:
                places.append(one)
        return tuple(places)

    async def block(self, uuid: str) -> None:
        """The chain of an applied qube refuses everything. KernelRefusal, EnforcerGone."""
        found = self._applied.get(uuid)
        if found is None:
            return
        async with self._locks.hold(table_lock(found.target.netvm_uuid)):
            netvm = self._netvms.get(found.target.netvm_uuid)
            if netvm is None:
                return
            enforcer = await self._enforcer(netvm)
            self._in_kernel.pop(uuid, None)
            await self._change(netvm, enforcer, ruleset.block(found.target))
            await self._cutter.cut(enforcer, found.target, None)

    async def forget(self, uuid: str) -> None:
        """Take an applied qube out of its table and the notes. EnforcerGone."""
        found = self._applied.get(uuid)
        if found is None:
            return
        async with self._locks.hold(table_lock(found.target.netvm_uuid)):
            netvm = self._netvms.get(found.target.netvm_uuid)
            failpoints.hit("firewall.withdraw.before_kernel")
            if netvm is not None:
                try:
                    await self._leave(netvm, found.target)
                except NamespaceGone:
                    self._log.info("%s left with its namespace", found.target.qube)
            failpoints.hit("firewall.withdraw.after_kernel")
            self._applied.pop(uuid, None)
            self._in_kernel.pop(uuid, None)
            await asyncio.to_thread(self._state.delete, "applied", uuid)
        self._names.keep_only(self._followed())

    async def _leave(self, netvm: Netvm, target: Target) -> None:
        """The table is without the qube. EnforcerGone; the caller holds the table's lock."""
        enforcer = await self._enforcer(netvm)
        try:
            await self._change(netvm, enforcer, ruleset.withdraw(target))
            await self._cutter.cut(enforcer, target, None)
        except KernelRefusal:
            # The table is not what was last made: make it again without the qube.
            applied = self._applied.pop(target.uuid)
            try:
                await self._define(netvm)
            except (EnforcerGone, KernelRefusal) as error:
                self._applied[target.uuid] = applied
                raise EnforcerGone(str(error)) from error

    # ---- whole tables

    async def _change(self, netvm: Netvm, enforcer: Enforcer, what: Transaction) -> None:
        """One transaction; an answer that stays out makes the table suspect."""
        try:
            await enforcer.change(what)
        except EnforcerGone:
            netvm.suspect = True
            raise

    async def _enforcer(self, netvm: Netvm) -> Enforcer:
        if netvm.enforcer is None:
            netvm.enforcer = await self._open_enforcer(netvm.namespace)
            if not netvm.namespace:
                # A plan starts empty; nobody raises a netvm that is no namespace.
                await self._define(netvm)
        if netvm.suspect:
            await self._define(netvm)
        return netvm.enforcer

    async def _define(
        self, netvm: Netvm, more: Mapping[str, tuple[Applied, Stored]] | None = None
    ) -> None:
        """The whole table of a netvm anew, in one transaction."""
        if netvm.enforcer is None:
            netvm.enforcer = await self._open_enforcer(netvm.namespace)
        clients: list[tuple[Target, Sequence[Compiled]]] = []
        for uuid, applied in self._clients(netvm.uuid, more or {}).items():
            stored = more[uuid][1] if more and uuid in more else await self._rules.read(uuid)
            self._in_kernel.pop(uuid, None)
            clients.append((applied.target, self._compile(stored, applied)))
        whole = ruleset.define(netvm.uplink, netvm.resolvers, clients)
        await self._change(netvm, netvm.enforcer, whole)
        netvm.suspect = False

    def _compile(self, stored: Stored, applied: Applied) -> tuple[Compiled, ...]:
        """The chain's rules; none for rules that cannot be read, which refuses everything."""
        if stored.rules is None:
            return ()
        rules = without_expired(stored.rules, self._now())
        return ruleset.compile_rules(rules, applied.addresses, applied.strict)

    def _clients(
        self, netvm_uuid: str, more: Mapping[str, tuple[Applied, Stored]]
    ) -> dict[str, Applied]:
        clients = {
            uuid: applied
            for uuid, applied in self._applied.items()
            if applied.target.netvm_uuid == netvm_uuid
        }
        clients.update({uuid: pair[0] for uuid, pair in more.items()})
        return clients

    # ---- network qubes

    async def netvm_up(self, uuid: str, boot_id: str, namespace: str, uplink: str) -> None:
        """The netvm's table is there, with the chains of all clients already applied.

        BusError ENFORCER_UNAVAILABLE, KERNEL_REFUSED; repeatable.
        """
        if uplink:
            ruleset.check_interface(uplink)
        async with self._locks.hold(table_lock(uuid)):
            old = self._netvms.get(uuid)
            netvm = Netvm(uuid, boot_id, namespace, uplink, self._resolvers)
            if old is not None and old.namespace == namespace:
                netvm.enforcer = old.enforcer
            elif old is not None and old.enforcer is not None:
                await old.enforcer.close()
            note = {"boot_id": boot_id, "namespace": namespace, "uplink": uplink}
            await asyncio.to_thread(self._state.save, "netvms", uuid, note)
            failpoints.hit("firewall.netvm.before_define")
            try:
                await self._define(netvm)
            except (EnforcerGone, KernelRefusal) as error:
                gone = isinstance(error, EnforcerGone)
                raise failure(
                    "ENFORCER_UNAVAILABLE" if gone else "KERNEL_REFUSED",
                    f"the base rules of namespace {namespace or uuid} are not in place: {error}",
                    namespace=namespace,
                    why=str(error),
                ) from error
            failpoints.hit("firewall.netvm.after_define")
            self._netvms[uuid] = netvm

    async def netvm_down(self, uuid: str, boot_id: str) -> None:
        """Let go of the netvm. Its table stays until its namespace goes: stopping the
        firewall of a netvm never opens it."""
        async with self._locks.hold(table_lock(uuid)):
            netvm = self._netvms.get(uuid)
            if netvm is None or (boot_id and netvm.boot_id not in ("", boot_id)):
                return
            await asyncio.to_thread(self._state.delete, "netvms", uuid)
            del self._netvms[uuid]
            if netvm.enforcer is not None:
                await netvm.enforcer.close()

    def load(self) -> dict[str, Applied]:
        """Take up what an earlier run noted; the qubes that it had applied."""
        for uuid, note in self._state.load("netvms").items():
            self._netvms[uuid] = Netvm(
                uuid, note["boot_id"], note["namespace"], note["uplink"], self._resolvers
            )
        now = time.monotonic()
        for uuid, note in self._state.load("applied").items():
            applied = applied_from(note)
            self._applied[uuid] = applied
            netvm_uuid = applied.target.netvm_uuid
            if not applied.target.namespace and netvm_uuid not in self._netvms:
                self._netvms[netvm_uuid] = Netvm(netvm_uuid, "", "", "", self._resolvers)
            for name, addresses in applied.addresses.items():
                self._names.seed(name, addresses, now)
        return dict(self._applied)

    async def adopt(self) -> None:
        """After load: every table is what it should be, where it can be reached."""
        for netvm in tuple(self._netvms.values()):
            try:
                await self._adopt_netvm(netvm)
            except (EnforcerGone, KernelRefusal) as error:
                # Its table stays as it was, which lets nothing new in.
                self._log.error("namespace %s is not taken up: %s", netvm.namespace, error)

    async def _adopt_netvm(self, netvm: Netvm) -> bool:
        """True when the table had to be made anew."""
        async with self._locks.hold(table_lock(netvm.uuid)):
            enforcer = await self._enforcer(netvm)
            status = await enforcer.status()
            wanted: dict[str, str] = {}
            for uuid, applied in self._clients(netvm.uuid, {}).items():
                compiled = self._compile(await self._rules.read(uuid), applied)
                wanted[ruleset.tag(uuid)] = ruleset.mark_of(applied.target, compiled)
            repaired = not status.present or dict(status.marks) != wanted
            if repaired:
                await self._define(netvm)
                self._log.warning("the table of %s was made anew", netvm.namespace or netvm.uuid)
            await self._cut_all(netvm, enforcer)
            return repaired

    async def _cut_all(self, netvm: Netvm, enforcer: Enforcer) -> None:
        """End what the chains of all clients forbid: a kill may have come before the cut."""
        clients = self._clients(netvm.uuid, {})
        owners = {
            text: uuid
            for uuid, applied in clients.items()
            for text in (applied.target.ip, applied.target.ip6)
            if text
        }
        if not owners or not enforcer.real:
            return
        found = await enforcer.flows(tuple(owners))
        for uuid, applied in clients.items():
            own = tuple(flow for flow in found if owners.get(flow.source) == uuid)
            if own:
                rules = (await self._rules.read(uuid)).rules
                await enforcer.cut(self._cutter.forbidden(own, rules or (), applied))

    async def check(self) -> tuple[str, ...]:
        """Compare every table with what it should be and repair it; what was found."""
        found: list[str] = []
        for netvm in tuple(self._netvms.values()):
            name = netvm.namespace or netvm.uuid
            try:
                if await self._adopt_netvm(netvm):
                    found.append(f"the table of {name} was not what it should be; made anew")
            except (EnforcerGone, KernelRefusal) as error:
                found.append(f"the table of {name} cannot be checked: {error}")
        return tuple(found)

    async def close(self) -> None:
        """Let go of every enforcer; the tables stay."""
        for netvm in self._netvms.values():
            if netvm.enforcer is not None:
                await netvm.enforcer.close()
