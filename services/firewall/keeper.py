"""Keeps files, kernel tables and announcements of all qubes' rules in agreement.

Owns the order of effects of every firewall call: what holds the qube's lock, and what
comes back when an effect fails. Must not know the bus, sockets or nftables, nor how a
table, a file or an announcement is made. Invariants: whoever is told that rules hold can
rely on file and kernel; when one of them fails, the other is what it was, or the qube is
refused everything; whatever dies in between, adopt() makes it so again.

Order of Set: note "unannounced" - durable file - kernel - announce - forget the note.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bulkhead import failpoints
from bulkhead.bus.errors import BusError
from bulkhead.model.firewall_rules import Rule, api_lines, digest, parse_lines
from services.firewall import failpoint_table  # noqa: F401  (declares the rows)
from services.firewall.adapters.rules_files import RulesFiles
from services.firewall.adapters.state_files import StateFiles
from services.firewall.announcements import Announce, Announcements
from services.firewall.applied import Applied
from services.firewall.core import guest_keys, iptables, ruleset
from services.firewall.core.enforcement import EnforcerGone, KernelRefusal
from services.firewall.core.expiry import without_expired
from services.firewall.core.ruleset import Compiled, Target
from services.firewall.expiry_clock import ExpiryClock
from services.firewall.failures import failure
from services.firewall.flow_cutter import FlowCutter
from services.firewall.host_names import HostNames, Resolver
from services.firewall.named_locks import NamedLocks
from services.firewall.stored_rules import Stored, StoredRules, canonical
from services.firewall.tables import OpenEnforcer, Tables


@dataclass(frozen=True, slots=True)
class EffectiveRule:
    """One rule with what it does. packets, bytes: 0 where nothing counts."""

    line: str
    packets: int
    bytes: int
    inert: bool
    why: str


class RuleKeeper:
    """All of the firewall's work but the messages."""

    def __init__(
        self,
        files: RulesFiles,
        state: StateFiles,
        announce: Announce,
        open_enforcer: OpenEnforcer,
        resolver: Resolver,
        *,
        resolvers: Sequence[str] = (),
        now: Callable[[], float] = time.time,
        log: logging.Logger | None = None,
    ) -> None:
        """resolvers: addresses to which clients' DNS queries are redirected."""
        self._now = now
        self._log = log = log or logging.getLogger("firewall")
        self._locks = NamedLocks()
        self._rules = StoredRules(files, now)
        self._announcements = Announcements(state, announce, self._rules, self._locks)
        self._expiry = ExpiryClock(now)
        self._names = HostNames(resolver)
        self._tables = Tables(
            self._rules,
            state,
            self._names,
            self._locks,
            open_enforcer,
            FlowCutter(tuple(resolvers), now, log),
            resolvers=tuple(resolvers),
            now=now,
            log=log,
        )

    # ---- rules

    async def rules(self, uuid: str) -> Stored:
        """The stored rules, expired ones included."""
        return await self._rules.read(uuid)

    async def lines(self, uuid: str) -> tuple[tuple[str, ...], bool, str]:
        """(API lines that have not expired, is default, digest). BusError RULES_UNREADABLE."""
        stored = await self.rules(uuid)
        rules = self._readable(uuid, stored)
        return (
            api_lines(rules, self._now()),
            stored.is_default,
            "" if stored.is_default else digest(rules),
        )

    def _readable(self, uuid: str, stored: Stored) -> tuple[Rule, ...]:
        if stored.rules is None:
            qube = self._announcements.name(uuid, uuid)
            raise failure(
                "RULES_UNREADABLE",
                f"the stored firewall rules of {qube} cannot be used "
                f"({stored.why}); all its traffic is refused; set its rules again",
                uuid=uuid,
                why=stored.why,
            )
        return stored.rules

    async def set_rules(
        self, uuid: str, qube: str, untrusted_lines: Sequence[str], validate_only: bool = False
    ) -> tuple[str, bool, int, int]:
        """Replace the rules: (digest, enforced by a kernel, revision, seq).

        Refusal INVALID_RULE; BusError RULES_NOT_SAVED (nothing changed), KERNEL_REFUSED
        (the old rules are stored, the qube's traffic refused), ENFORCER_UNAVAILABLE
        (nothing changed). validate_only: parsed, and nothing else.
        """
        uuid = canonical(uuid)
        rules = parse_lines(untrusted_lines)
        if validate_only:
            return digest(rules), False, 0, 0
        async with self._locks.hold(uuid):
            self._announcements.called(uuid, qube)
            rules = without_expired(rules, self._now())
            before = await self._announcements.note(uuid, qube)
            old = await self._save(uuid, rules, before)
            applied = False
            try:
                applied = await self._tables.enforce(uuid, Stored(rules, False))
            except (KernelRefusal, EnforcerGone) as error:
                await self._take_back(uuid, qube, old, error)
            self._expiry.watch(uuid, rules)
            revision, seq = await self._announcements.tell(uuid)
            return digest(rules), applied, revision, seq

    async def _save(
        self, uuid: str, rules: Sequence[Rule], before: Mapping[str, Any] | None
    ) -> bytes | None:
        """Write the file; what was there before."""
        try:
            return await self._rules.replace(uuid, rules)
        except OSError as error:
            await self._announcements.drop_note(uuid, before)
            raise failure(
                "RULES_NOT_SAVED",
                f"firewall save error: {error}; the rules are unchanged",
                uuid=uuid,
                why=str(error),
            ) from error

    async def _take_back(
        self, uuid: str, qube: str, old: bytes | None, error: KernelRefusal | EnforcerGone
    ) -> None:
        """After a failed change of the kernel: chain to drop, old file back; raises."""
        refused = isinstance(error, KernelRefusal)
        if refused:
            with contextlib.suppress(KernelRefusal, EnforcerGone):
                await self._tables.block(uuid)
        try:
            await self._rules.restore(uuid, old)
        except OSError as failed:
            # The new rules are stored after all: say so, so that nobody believes otherwise.
            raise failure(
                "RULES_NOT_SAVED",
                f"the kernel did not take the rules of {qube} ({error}) and the old file could "
                f"not be brought back ({failed}); set the rules again",
                uuid=uuid,
                why=str(failed),
            ) from failed
        await self._announcements.take_back(uuid)
        if refused:
            raise failure(
                "KERNEL_REFUSED",
                f"the kernel refused the rules of {qube}: {error}; the old rules are stored "
                "and all traffic of the qube is refused until rules are set or reloaded",
                uuid=uuid,
                why=str(error),
            ) from error
        raise failure(
            "ENFORCER_UNAVAILABLE",
            f"the rules of {qube} cannot be changed now: {error}; the old rules stay",
            uuid=uuid,
            why=str(error),
        ) from error

    async def reload(self, uuid: str, qube: str) -> tuple[bool, int, int]:
        """Make the chain from the file again: (enforced by a kernel, revision, seq)."""
        uuid = canonical(uuid)
        async with self._locks.hold(uuid):
            self._announcements.called(uuid, qube)
            stored = await self.rules(uuid)
            here = self._tables.applied(uuid)
            if here is not None and here.target.namespace and stored.rules is not None:
                await self._names.ask(ruleset.host_names(stored.rules), again=True)
            try:
                applied = await self._tables.enforce(uuid, stored)
            except (KernelRefusal, EnforcerGone) as error:
                await self._fail_apply(uuid, qube, error)
            await self._announcements.note(uuid, qube)
            revision, seq = await self._announcements.tell(uuid)
            return applied, revision, seq

    async def copy(self, source: str, target: str, qube: str) -> str:
        """The target gets the source's rules; their digest, "" = defaults. Repeatable."""
        source, target = canonical(source), canonical(target)
        async with self._locks.hold(target):
            self._announcements.called(target, qube)
            stored = await self.rules(source)
            rules = without_expired(self._readable(source, stored), self._now())
            try:
                if stored.is_default:
                    await asyncio.to_thread(self._rules.delete, target)
                    return ""
                await self._rules.write(target, rules)
            except OSError as error:
                raise failure(
                    "RULES_NOT_SAVED",
                    f"firewall save error: {error}",
                    uuid=target,
                    why=str(error),
                ) from error
            self._expiry.watch(target, rules)
            return digest(rules)

    async def delete(self, uuid: str) -> None:
        """The qube is gone: no chain of any boot is left, then no file. Repeatable."""
        uuid = canonical(uuid)
        async with self._locks.hold(uuid):
            await self._withdraw(uuid, "")
            try:
                await asyncio.to_thread(self._delete_files, uuid)
            except OSError as error:
                raise failure(
                    "RULES_NOT_SAVED",
                    f"the rules file cannot be removed: {error}",
                    uuid=uuid,
                    why=str(error),
                ) from error
            self._announcements.forget(uuid)
            self._expiry.watch(uuid, ())

    def _delete_files(self, uuid: str) -> None:
        """In a thread."""
        self._rules.delete(uuid)
        self._announcements.delete_note(uuid)

    # ---- the kernel

    async def apply(
        self, target: Target, strict: bool, iptables_xid: int = 0
    ) -> tuple[int, tuple[str, ...]]:
        """The qube's rules are enforced from now on: (rules, guest keys for a guest netvm).

        iptables_xid: its xid where the guest netvm reads iptables-save text, 0 = none.
        BusError KERNEL_REFUSED (its traffic is refused), ENFORCER_UNAVAILABLE, NETVM_NOT_UP.
        """
        uuid = target.uuid
        async with self._locks.hold(uuid):
            self._announcements.called(uuid, target.qube)
            stored = await self.rules(uuid)
            count = 0 if stored.rules is None else len(stored.rules)
            if not target.netvm_uuid:
                await self._tables.forget(uuid)
                return count, ()
            if target.namespace and not self._tables.is_up(target.netvm_uuid):
                raise failure(
                    "NETVM_NOT_UP",
                    f"the network qube of {target.qube} has no base rules yet; start it first",
                    qube=target.qube,
                    netvm=target.netvm_uuid,
                )
            failpoints.hit("firewall.apply.before_state")
            former = self._tables.applied(uuid)
            if former is not None and former.target.netvm_uuid != target.netvm_uuid:
                await self._tables.forget(uuid)
                former = None
            try:
                await self._tables.enforce(uuid, stored, Applied(target, strict, {}))
            except (KernelRefusal, EnforcerGone) as error:
                await self._fail_apply(uuid, target.qube, error)
            return count, () if target.namespace else self._guest_keys(target, stored, iptables_xid)

    def _guest_keys(self, target: Target, stored: Stored, xid: int) -> tuple[str, ...]:
        """ "path=value" of all that the guest netvm is to know of the client's rules."""
        now = self._now()
        keys = guest_keys.trees(stored.rules, (target.ip, target.ip6), now)
        if not xid or not target.ip:
            return keys
        texts, whole = iptables.keys(stored.rules, target.uuid, target.ip, xid, now)
        if not whole:
            self._log.warning(
                "the netvm of %s takes its rules as one iptables text only, which cannot hold "
                "them%s: all its traffic is refused there",
                target.qube,
                f" ({stored.why})" if stored.why else "",
            )
        return *keys, *(f"{path}={value}" for path, value in texts)

    async def _fail_apply(self, uuid: str, qube: str, error: KernelRefusal | EnforcerGone) -> None:
        if isinstance(error, EnforcerGone):
            raise failure(
                "ENFORCER_UNAVAILABLE",
                f"the rules of {qube} cannot be applied now: {error}",
                uuid=uuid,
                why=str(error),
            ) from error
        with contextlib.suppress(KernelRefusal, EnforcerGone):
            await self._tables.block(uuid)
        raise failure(
            "KERNEL_REFUSED",
            f"the kernel refused the rules of {qube}: {error}; all its traffic is refused",
            uuid=uuid,
            why=str(error),
        ) from error

    async def withdraw(self, uuid: str, boot_id: str) -> None:
        """No chain of that boot is left; "" = of any. Repeatable, also after a crash."""
        uuid = canonical(uuid)
        async with self._locks.hold(uuid):
            await self._withdraw(uuid, boot_id)

    async def _withdraw(self, uuid: str, boot_id: str) -> None:
        """The caller holds the qube's lock."""
        found = self._tables.applied(uuid)
        if found is None or (boot_id and found.target.boot_id != boot_id):
            return
        try:
            await self._tables.forget(uuid)
        except EnforcerGone as error:
            raise failure(
                "ENFORCER_UNAVAILABLE",
                f"the rules of {found.target.qube} cannot be withdrawn now: {error}",
                uuid=uuid,
                why=str(error),
            ) from error

    # ---- network qubes

    async def netvm_up(self, uuid: str, boot_id: str, namespace: str, uplink: str) -> None:
        """The netvm's table is there, with the chains of all clients already applied.

        BusError ENFORCER_UNAVAILABLE, KERNEL_REFUSED; repeatable.
        """
        await self._tables.netvm_up(canonical(uuid), boot_id, namespace, uplink)

    async def netvm_down(self, uuid: str, boot_id: str) -> None:
        """Let go of the netvm. Its table stays until its namespace goes: stopping the
        firewall of a netvm never opens it."""
        await self._tables.netvm_down(canonical(uuid), boot_id)

    async def adopt(self) -> None:
        """After a start: take up what is noted, and make kernels agree with the files."""
        for uuid, applied in self._tables.load().items():
            self._announcements.called(uuid, applied.target.qube)
        for uuid in await self._rules.uuids():
            stored = await self.rules(uuid)
            self._expiry.watch(uuid, stored.rules or ())
        self._names.want(await self._tables.host_names())
        await self._tables.adopt()
        await self._announcements.owe()

    async def check_netvms(self) -> tuple[str, ...]:
        """Compare every table with what it should be and repair it; what was found."""
        return await self._tables.check()

    # ---- background tasks: none ends

    async def run_announcements(self) -> None:
        """Announce what is owed until the registry has taken it."""
        await self._announcements.run()

    async def run_expiry(self) -> None:
        """A rule past its end leaves file and kernel."""
        await self._expiry.run(self.expire_due)

    async def run_names(self) -> None:
        """Ask again when answers age; chains follow the answers."""
        await self._names.run(self._refresh)

    # ---- time

    async def expire_due(self) -> None:
        """Drop the rules that have ended from files and kernels, and announce it."""
        now = self._now()
        for uuid in self._expiry.due(now):
            async with self._locks.hold(uuid):
                try:
                    await self._expire(uuid)
                except (BusError, KernelRefusal, EnforcerGone) as error:
                    self._log.error("rules of %s that have ended: %s", uuid, error)
                    self._expiry.put_off(uuid, now)

    async def _expire(self, uuid: str) -> None:
        stored = await self.rules(uuid)
        if stored.rules is None or stored.is_default:
            self._expiry.watch(uuid, ())
            return
        rules = without_expired(stored.rules, self._now())
        # The kernel first: a full disk must not keep a door open.
        await self._tables.enforce(uuid, Stored(rules, False))
        before = await self._announcements.note(uuid, self._announcements.name(uuid))
        await self._save(uuid, rules, before)
        self._expiry.watch(uuid, rules)
        await self._announcements.tell(uuid)

    # ---- host names

    async def _refresh(self, changed: set[str]) -> None:
        """Make the chains again that speak of the names."""
        if not changed:
            return
        for uuid in self._tables.uuids():
            async with self._locks.hold(uuid):
                if self._tables.applied(uuid) is None:
                    continue
                stored = await self.rules(uuid)
                if not changed & set(ruleset.host_names(stored.rules or ())):
                    continue
                try:
                    await self._tables.enforce(uuid, stored)
                except (KernelRefusal, EnforcerGone) as error:
                    self._log.error("new addresses for %s are not applied: %s", uuid, error)

    # ---- looking

    async def effective(self, uuid: str) -> tuple[tuple[EffectiveRule, ...], bool, str]:
        """(rules with counters, enforced by a kernel, the chain as text)."""
        uuid = canonical(uuid)
        stored = await self.rules(uuid)
        applied = self._tables.applied(uuid)
        rules = without_expired(self._readable(uuid, stored), self._now())
        if applied is None:
            names = self._names.addresses(ruleset.host_names(rules))
            compiled = ruleset.compile_rules(rules, names)
            return _effective(compiled, {}), False, ""
        compiled = ruleset.compile_rules(rules, applied.addresses, applied.strict)
        enforcer = self._tables.enforcer_of(applied.target.netvm_uuid)
        if enforcer is None:
            return _effective(compiled, {}), False, ""
        try:
            counters = await enforcer.rule_counters(ruleset.tag(uuid))
            text = await enforcer.listing(ruleset.tag(uuid))
        except EnforcerGone as error:
            raise failure(
                "ENFORCER_UNAVAILABLE",
                f"the counters cannot be read now: {error}",
                uuid=uuid,
                why=str(error),
            ) from error
        return _effective(compiled, counters), enforcer.real, text

    async def inventory(self) -> tuple[tuple[str, str, str, str, bool, bool], ...]:
        """(uuid, boot id, namespace, interface, rules file, chain) of every qube known."""
        files = set(await self._rules.uuids())
        marks = await self._tables.marks()
        items = []
        for uuid in sorted(files.union(self._tables.uuids())):
            applied = self._tables.applied(uuid)
            if applied is None:
                items.append((uuid, "", "", "", True, False))
                continue
            target = applied.target
            chain = bool(marks.get(target.netvm_uuid, {}).get(ruleset.tag(uuid)))
            items.append(
                (uuid, target.boot_id, target.namespace, target.interface, uuid in files, chain)
            )
        return tuple(items)

    async def close(self) -> None:
        """Let go of every enforcer; the tables stay."""
        await self._tables.close()


def _effective(
    compiled: Sequence[Compiled], counters: Mapping[str, tuple[int, int]]
) -> tuple[EffectiveRule, ...]:
    result: list[EffectiveRule] = []
    for number, (line, inert, why) in enumerate(ruleset.describe(compiled)):
        packets, size = counters.get(f"r{number}", (0, 0))
        result.append(EffectiveRule(line, packets, size, inert, why))
    return tuple(result)
