"""Keeps files, kernel tables and announcements of all qubes' rules in agreement.

Owns the order of effects of every firewall call, the applied targets, and the timers.
Must not know the bus, sockets or nftables: what is outside comes as ports. Invariants:
a rules file never holds what did not parse; the kernel's chain of an applied qube is
made from its file, or refuses everything; an interface without an applied qube is
dropped; whatever dies in between, adopt() makes it so again.

Order of Set: note "unannounced" - durable file - kernel - announce - forget the note.
Order of Apply: note "applied" - kernel. Order of Withdraw: kernel - forget the note.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from bulkhead import failpoints
from bulkhead.bus.errors import BusError
from bulkhead.model.firewall_rules import (
    DEFAULT_RULES,
    RULES_LIMIT,
    Rule,
    api_lines,
    digest,
    parse_lines,
)
from services.firewall import failpoint_table  # noqa: F401  (declares the rows)
from services.firewall.adapters.rules_files import RulesFiles
from services.firewall.adapters.state_files import StateFiles
from services.firewall.core import flows, guest_keys, iptables, rules_file, ruleset
from services.firewall.core.enforcement import (
    Enforcer,
    EnforcerGone,
    KernelRefusal,
    NamespaceGone,
)
from services.firewall.core.expiry import next_expiry, without_expired
from services.firewall.core.flows import Flow
from services.firewall.core.names import NameTable
from services.firewall.core.reasons import REASONS
from services.firewall.core.ruleset import Compiled, Target, Transaction

# A name that a new rule speaks of is waited for at most this long; then it is unresolved.
NAME_WAIT_S = 2.0
# Wall clocks jump: look at expiry at least this often.
CLOCK_CHECK_S = 30.0
# Wait before an announcement is tried again.
ANNOUNCE_RETRY_S = 1.0
# Names asked about at once.
QUESTIONS_AT_ONCE = 8


class Resolver(Protocol):
    """Answers host names."""

    async def resolve(self, name: str) -> tuple[tuple[str, ...], float]:
        """(addresses of both families, time to live in seconds). OSError, TimeoutError."""


# (uuid, with the event, digest or None) -> (revision, seq); BusError
Announce = Callable[[str, bool, str | None], Awaitable[tuple[int, int]]]
# namespace -> an enforcer for it; EnforcerGone
OpenEnforcer = Callable[[str], Awaitable[Enforcer]]


@dataclass(frozen=True, slots=True)
class Applied:
    """A qube whose rules are in a table. strict: unresolved names block it whole.

    addresses: what its host names meant when the chain was made.
    """

    target: Target
    strict: bool
    addresses: Mapping[str, tuple[str, ...]]


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


@dataclass(frozen=True, slots=True)
class Stored:
    """A qube's rules as read. rules None: the file does not validate, why says how."""

    rules: tuple[Rule, ...] | None
    is_default: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class EffectiveRule:
    """One rule with what it does. packets, bytes: 0 where nothing counts."""

    line: str
    packets: int
    bytes: int
    inert: bool
    why: str


def failure(reason: str, message: str, **metadata: str) -> BusError:
    """A BusError with a reason of this service."""
    error = BusError(REASONS[reason].code, reason, message)
    error.metadata.update(metadata)
    return error


class _Locks:
    """One lock per name; kept only while somebody holds or waits for it."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @contextlib.asynccontextmanager
    async def hold(self, name: str) -> Any:
        lock, users = self._locks.get(name, (asyncio.Lock(), 0))
        self._locks[name] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks.pop(name)
            if users > 1:
                self._locks[name] = (lock, users - 1)


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
        self._files = files
        self._state = state
        self._announce = announce
        self._open_enforcer = open_enforcer
        self._resolver = resolver
        self._resolvers = tuple(resolvers)
        self._now = now
        self._log = log or logging.getLogger("firewall")
        self._locks = _Locks()
        self._applied: dict[str, Applied] = {}
        # What the kernel has of each qube, as far as this process knows.
        self._in_kernel: dict[str, tuple[Compiled, ...]] = {}
        self._netvms: dict[str, Netvm] = {}
        self._names = NameTable()
        self._qubes: dict[str, str] = {}
        self._unannounced: dict[str, dict[str, Any]] = {}
        self._expiry: dict[str, float] = {}
        self._wake_expiry = asyncio.Event()
        self._wake_names = asyncio.Event()
        self._wake_announce = asyncio.Event()

    # ---- rules

    async def rules(self, uuid: str) -> Stored:
        """The stored rules, expired ones included. BusError RULES_NOT_SAVED on a read error."""
        uuid = _uuid(uuid)
        try:
            data = await asyncio.to_thread(self._files.read, uuid)
        except OSError as error:
            return Stored(None, False, f"the rules file cannot be read: {error}")
        return _parse(data)

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
            raise failure(
                "RULES_UNREADABLE",
                f"the stored firewall rules of {self._qubes.get(uuid, uuid)} cannot be used "
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
        uuid = _uuid(uuid)
        rules = parse_lines(untrusted_lines)
        if validate_only:
            return digest(rules), False, 0, 0
        async with self._locks.hold(uuid):
            self._qubes[uuid] = qube
            rules = without_expired(rules, self._now())
            before = await self._note_pending(uuid, qube)
            old = await self._save(uuid, rules, before)
            applied = False
            try:
                applied = await self._enforce(uuid, Stored(rules, False))
            except (KernelRefusal, EnforcerGone) as error:
                await self._take_back(uuid, qube, old, error)
            self._watch(uuid, rules)
            revision, seq = await self._tell(uuid)
            return digest(rules), applied, revision, seq

    async def _note_pending(self, uuid: str, qube: str) -> dict[str, Any] | None:
        """Remember that the registry will have to hear of this; the earlier note, if any."""
        before = self._unannounced.get(uuid)
        note = {"qube": qube, "event": True}
        try:
            await asyncio.to_thread(self._state.save, "pending", uuid, note)
        except OSError as error:
            raise failure(
                "RULES_NOT_SAVED", f"firewall save error: {error}", uuid=uuid, why=str(error)
            ) from error
        failpoints.hit("firewall.pending.after_mark")
        return before

    async def _drop_note(self, uuid: str, before: Mapping[str, Any] | None) -> None:
        if before is None:
            await asyncio.to_thread(self._state.delete, "pending", uuid)

    async def _save(
        self, uuid: str, rules: Sequence[Rule], before: Mapping[str, Any] | None
    ) -> bytes | None:
        """Write the file; what was there before."""
        try:
            old = await asyncio.to_thread(self._files.read, uuid)
            data = rules_file.render(rules, self._now())
            await asyncio.to_thread(self._files.write, uuid, data)
        except OSError as error:
            await self._drop_note(uuid, before)
            raise failure(
                "RULES_NOT_SAVED",
                f"firewall save error: {error}; the rules are unchanged",
                uuid=uuid,
                why=str(error),
            ) from error
        return old

    async def _take_back(
        self, uuid: str, qube: str, old: bytes | None, error: KernelRefusal | EnforcerGone
    ) -> None:
        """After a failed change of the kernel: chain to drop, old file back; raises."""
        refused = isinstance(error, KernelRefusal)
        if refused:
            with contextlib.suppress(KernelRefusal, EnforcerGone):
                await self._block(uuid)
        try:
            await asyncio.to_thread(self._files.restore, uuid, old)
        except OSError as failed:
            # The new rules are stored after all: say so, so that nobody believes otherwise.
            raise failure(
                "RULES_NOT_SAVED",
                f"the kernel did not take the rules of {qube} ({error}) and the old file could "
                f"not be brought back ({failed}); set the rules again",
                uuid=uuid,
                why=str(failed),
            ) from failed
        if uuid not in self._unannounced:
            await asyncio.to_thread(self._state.delete, "pending", uuid)
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
        uuid = _uuid(uuid)
        async with self._locks.hold(uuid):
            self._qubes[uuid] = qube
            stored = await self.rules(uuid)
            if uuid in self._applied and stored.rules is not None:
                await self._ask_names(ruleset.host_names(stored.rules), again=True)
            try:
                applied = await self._enforce(uuid, stored)
            except (KernelRefusal, EnforcerGone) as error:
                await self._fail_apply(uuid, qube, error)
            await self._note_pending(uuid, qube)
            revision, seq = await self._tell(uuid)
            return applied, revision, seq

    async def copy(self, source: str, target: str, qube: str) -> str:
        """The target gets the source's rules; their digest, "" = defaults. Repeatable."""
        source, target = _uuid(source), _uuid(target)
        async with self._locks.hold(target):
            self._qubes[target] = qube
            stored = await self.rules(source)
            rules = without_expired(self._readable(source, stored), self._now())
            try:
                if stored.is_default:
                    await asyncio.to_thread(self._files.delete, target)
                    return ""
                data = rules_file.render(rules, self._now())
                await asyncio.to_thread(self._files.write, target, data)
            except OSError as error:
                raise failure(
                    "RULES_NOT_SAVED",
                    f"firewall save error: {error}",
                    uuid=target,
                    why=str(error),
                ) from error
            self._watch(target, rules)
            return digest(rules)

    async def delete(self, uuid: str) -> None:
        """The qube is gone: no chain of any boot is left, then no file. Repeatable."""
        uuid = _uuid(uuid)
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
            self._unannounced.pop(uuid, None)
            self._qubes.pop(uuid, None)
            self._watch(uuid, ())

    def _delete_files(self, uuid: str) -> None:
        """In a thread."""
        self._files.delete(uuid)
        self._state.delete("pending", uuid)

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
            self._qubes[uuid] = target.qube
            stored = await self.rules(uuid)
            count = 0 if stored.rules is None else len(stored.rules)
            if not target.netvm_uuid:
                await self._forget(uuid)
                return count, ()
            if target.namespace and target.netvm_uuid not in self._netvms:
                raise failure(
                    "NETVM_NOT_UP",
                    f"the network qube of {target.qube} has no base rules yet; start it first",
                    qube=target.qube,
                    netvm=target.netvm_uuid,
                )
            failpoints.hit("firewall.apply.before_state")
            former = self._applied.get(uuid)
            if former is not None and former.target.netvm_uuid != target.netvm_uuid:
                await self._forget(uuid)
                former = None
            try:
                await self._enforce(uuid, stored, Applied(target, strict, {}))
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
            await self._block(uuid)
        raise failure(
            "KERNEL_REFUSED",
            f"the kernel refused the rules of {qube}: {error}; all its traffic is refused",
            uuid=uuid,
            why=str(error),
        ) from error

    async def withdraw(self, uuid: str, boot_id: str) -> None:
        """No chain of that boot is left; "" = of any. Repeatable, also after a crash."""
        uuid = _uuid(uuid)
        async with self._locks.hold(uuid):
            await self._withdraw(uuid, boot_id)

    async def _withdraw(self, uuid: str, boot_id: str) -> None:
        """The caller holds the qube's lock."""
        found = self._applied.get(uuid)
        if found is None or (boot_id and found.target.boot_id != boot_id):
            return
        try:
            await self._forget(uuid)
        except EnforcerGone as error:
            raise failure(
                "ENFORCER_UNAVAILABLE",
                f"the rules of {found.target.qube} cannot be withdrawn now: {error}",
                uuid=uuid,
                why=str(error),
            ) from error

    async def _forget(self, uuid: str) -> None:
        """Take an applied qube out of its table and the notes. EnforcerGone."""
        found = self._applied.get(uuid)
        if found is None:
            return
        async with self._locks.hold(_table_lock(found.target.netvm_uuid)):
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
            await self._cut(enforcer, target, None)
        except KernelRefusal:
            # The table is not what was last made: make it again without the qube.
            applied = self._applied.pop(target.uuid)
            try:
                await self._define(netvm)
            except (EnforcerGone, KernelRefusal) as error:
                self._applied[target.uuid] = applied
                raise EnforcerGone(str(error)) from error

    async def _change(self, netvm: Netvm, enforcer: Enforcer, what: Transaction) -> None:
        """One transaction; an answer that stays out makes the table suspect."""
        try:
            await enforcer.change(what)
        except EnforcerGone:
            netvm.suspect = True
            raise

    async def _enforce(self, uuid: str, stored: Stored, wanted: Applied | None = None) -> bool:
        """Make the chain from the rules; True when a real kernel has it.

        wanted: a target to apply; None: the one that is applied, if any. KernelRefusal
        (the chain is what it was), EnforcerGone.
        """
        former = self._applied.get(uuid)
        current = wanted or former
        if current is None:
            return False
        names = ruleset.host_names(stored.rules or ())
        await self._ask_names(names)
        target = current.target
        async with self._locks.hold(_table_lock(target.netvm_uuid)):
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
                await asyncio.to_thread(self._state.save, "applied", uuid, _note(current))
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
                await asyncio.to_thread(self._state.save, "applied", uuid, _note(current))
            if before is None or places or not flows.only_loosened(before, compiled):
                await self._cut(enforcer, target, stored.rules, current)
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

    async def _block(self, uuid: str) -> None:
        """The chain of an applied qube refuses everything. KernelRefusal, EnforcerGone."""
        found = self._applied.get(uuid)
        if found is None:
            return
        async with self._locks.hold(_table_lock(found.target.netvm_uuid)):
            netvm = self._netvms.get(found.target.netvm_uuid)
            if netvm is None:
                return
            enforcer = await self._enforcer(netvm)
            self._in_kernel.pop(uuid, None)
            await self._change(netvm, enforcer, ruleset.block(found.target))
            await self._cut(enforcer, found.target, None)

    async def _cut(
        self,
        enforcer: Enforcer,
        target: Target,
        rules: Sequence[Rule] | None,
        applied: Applied | None = None,
    ) -> None:
        """End the flows that the rules forbid; rules None: all flows from or to the qube."""
        own = tuple(text for text in (target.ip, target.ip6) if text)
        if not own or not enforcer.real:
            return
        try:
            found = await enforcer.flows(own)
            if rules is None or applied is None:
                await enforcer.cut(found)
                return
            from_it = tuple(flow for flow in found if flow.source in own)
            await enforcer.cut(self._forbidden(from_it, rules, applied))
        except KernelRefusal as error:
            self._log.error("flows of %s cannot be cut: %s", target.qube, error)

    def _forbidden(
        self, found: Sequence[Flow], rules: Sequence[Rule], applied: Applied
    ) -> tuple[Flow, ...]:
        names = ruleset.host_names(rules)
        if applied.strict and not all(applied.addresses.get(name) for name in names):
            return tuple(found)
        rules = without_expired(rules, self._now())
        dns = (*self._resolvers, *ruleset.VIRTUAL_RESOLVERS)
        return flows.forbidden(found, rules, applied.addresses, dns)

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
            stored = more[uuid][1] if more and uuid in more else await self.rules(uuid)
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
        uuid = _uuid(uuid)
        if uplink:
            ruleset.check_interface(uplink)
        async with self._locks.hold(_table_lock(uuid)):
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
        uuid = _uuid(uuid)
        async with self._locks.hold(_table_lock(uuid)):
            netvm = self._netvms.get(uuid)
            if netvm is None or (boot_id and netvm.boot_id not in ("", boot_id)):
                return
            await asyncio.to_thread(self._state.delete, "netvms", uuid)
            del self._netvms[uuid]
            if netvm.enforcer is not None:
                await netvm.enforcer.close()

    async def adopt(self) -> None:
        """After a start: take up what is noted, and make kernels agree with the files."""
        for uuid, note in self._state.load("netvms").items():
            self._netvms[uuid] = Netvm(
                uuid, note["boot_id"], note["namespace"], note["uplink"], self._resolvers
            )
        now = time.monotonic()
        for uuid, note in self._state.load("applied").items():
            applied = _from_note(note)
            self._applied[uuid] = applied
            self._qubes[uuid] = applied.target.qube
            netvm_uuid = applied.target.netvm_uuid
            if not applied.target.namespace and netvm_uuid not in self._netvms:
                self._netvms[netvm_uuid] = Netvm(netvm_uuid, "", "", "", self._resolvers)
            for name, addresses in applied.addresses.items():
                self._names.seed(name, addresses, now)
        for uuid in await asyncio.to_thread(self._files.uuids):
            stored = await self.rules(uuid)
            self._watch(uuid, stored.rules or ())
        self._names.want(await self._all_names())
        for netvm in tuple(self._netvms.values()):
            try:
                await self._adopt_netvm(netvm)
            except (EnforcerGone, KernelRefusal) as error:
                # Its table stays as it was, which lets nothing new in.
                self._log.error("namespace %s is not taken up: %s", netvm.namespace, error)
        await self._owe_announcements()

    async def _adopt_netvm(self, netvm: Netvm) -> bool:
        """True when the table had to be made anew."""
        async with self._locks.hold(_table_lock(netvm.uuid)):
            enforcer = await self._enforcer(netvm)
            status = await enforcer.status()
            wanted: dict[str, str] = {}
            for uuid, applied in self._clients(netvm.uuid, {}).items():
                compiled = self._compile(await self.rules(uuid), applied)
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
                rules = (await self.rules(uuid)).rules
                await enforcer.cut(self._forbidden(own, rules or (), applied))

    async def check_netvms(self) -> tuple[str, ...]:
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

    # ---- announcements

    async def _owe_announcements(self) -> None:
        """What the registry may not have heard: changes cut short, and all digests once
        per boot of the host, because a note does not outlive the host."""
        for uuid, note in self._state.load("pending").items():
            self._qubes.setdefault(uuid, str(note.get("qube", "")))
            self._unannounced[uuid] = note
        if not self._state.started():
            for uuid in await asyncio.to_thread(self._files.uuids):
                self._unannounced.setdefault(uuid, {"qube": "", "event": False})
        self._wake_announce.set()

    async def _tell(self, uuid: str, event: bool = True) -> tuple[int, int]:
        """Announce the stored digest, and the event: (revision, seq).

        The caller holds the qube's lock and has left the note. BusError when the registry
        does not answer: the note stays, and the announcement is made later.
        """
        stored = await self.rules(uuid)
        value = "" if stored.is_default else None
        if stored.rules is not None and not stored.is_default:
            value = digest(stored.rules)
        failpoints.hit("firewall.announce.before")
        try:
            revision, seq = await self._announce(uuid, event, value)
        except BusError:
            self._unannounced[uuid] = {"qube": self._qubes.get(uuid, ""), "event": event}
            self._wake_announce.set()
            raise
        failpoints.hit("firewall.announce.after")
        self._unannounced.pop(uuid, None)
        await asyncio.to_thread(self._state.delete, "pending", uuid)
        return revision, seq

    async def run_announcements(self) -> None:
        """Background task: announce what is owed until the registry has taken it."""
        while True:
            await self._wake_announce.wait()
            self._wake_announce.clear()
            while self._unannounced:
                failed = False
                for uuid, note in tuple(self._unannounced.items()):
                    async with self._locks.hold(uuid):
                        if uuid not in self._unannounced:
                            continue
                        if note.get("qube"):
                            self._qubes.setdefault(uuid, str(note["qube"]))
                        try:
                            await self._tell(uuid, bool(note.get("event", True)))
                        except BusError as error:
                            if error.reason in ("QUBE_NOT_FOUND", "INVALID_UUID"):
                                # A file of a qube that is gone owes nothing.
                                self._unannounced.pop(uuid, None)
                                await asyncio.to_thread(self._state.delete, "pending", uuid)
                                continue
                            failed = True
                if failed:
                    await asyncio.sleep(ANNOUNCE_RETRY_S)
            self._wake_announce.clear()
            if not self._state.started():
                await asyncio.to_thread(self._state.mark_started)

    # ---- time

    def _watch(self, uuid: str, rules: Sequence[Rule]) -> None:
        end = next_expiry(rules, self._now())
        if end is None:
            self._expiry.pop(uuid, None)
        else:
            self._expiry[uuid] = end
            self._wake_expiry.set()

    async def run_expiry(self) -> None:
        """Background task: a rule past its end leaves file and kernel."""
        while True:
            await self.expire_due()
            wait = CLOCK_CHECK_S
            if self._expiry:
                wait = min(wait, max(0.01, min(self._expiry.values()) + 0.01 - self._now()))
            self._wake_expiry.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake_expiry.wait()

    async def expire_due(self) -> None:
        """Drop the rules that have ended from files and kernels, and announce it."""
        now = self._now()
        for uuid in [uuid for uuid, end in self._expiry.items() if end < now]:
            async with self._locks.hold(uuid):
                try:
                    await self._expire(uuid)
                except (BusError, KernelRefusal, EnforcerGone) as error:
                    self._log.error("rules of %s that have ended: %s", uuid, error)
                    # Tried again at the next look at the clock.
                    self._expiry[uuid] = now + CLOCK_CHECK_S

    async def _expire(self, uuid: str) -> None:
        stored = await self.rules(uuid)
        if stored.rules is None or stored.is_default:
            self._watch(uuid, ())
            return
        rules = without_expired(stored.rules, self._now())
        # The kernel first: a full disk must not keep a door open.
        await self._enforce(uuid, Stored(rules, False))
        before = await self._note_pending(uuid, self._qubes.get(uuid, ""))
        await self._save(uuid, rules, before)
        self._watch(uuid, rules)
        await self._tell(uuid)

    # ---- host names

    async def _all_names(self) -> set[str]:
        names: set[str] = set()
        for uuid in self._applied:
            stored = await self.rules(uuid)
            names.update(ruleset.host_names(stored.rules or ()))
        return names

    def _followed(self) -> set[str]:
        return {name for applied in self._applied.values() for name in applied.addresses}

    async def _ask_names(self, names: Sequence[str], again: bool = False) -> None:
        """Wait a little until names that are new (again: all of them) are answered."""
        if not names:
            return
        known = self._names.addresses(names)
        self._names.want(names)
        asked = [name for name in names if again or name not in known]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NAME_WAIT_S):
                await self._questions(asked)
        self._wake_names.set()

    async def _questions(self, names: Sequence[str]) -> set[str]:
        """Ask about the names, a few at once; those whose addresses changed."""
        gate = asyncio.Semaphore(QUESTIONS_AT_ONCE)

        async def one(name: str) -> str:
            async with gate:
                try:
                    addresses, ttl = await self._resolver.resolve(name)
                except (OSError, TimeoutError) as error:
                    self._names.failed(name, str(error) or "no answer", time.monotonic())
                    return ""
                changed = self._names.answer(name, addresses, ttl, time.monotonic())
                return name if changed else ""

        return {name for name in await asyncio.gather(*map(one, names)) if name}

    async def run_names(self) -> None:
        """Background task: ask again when answers age; chains follow the answers."""
        while True:
            self._wake_names.clear()
            due = self._names.due(time.monotonic())
            if due:
                await self._refresh(await self._questions(due))
            end = self._names.next_due()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(
                    None if end is None else max(0.05, end - time.monotonic())
                ):
                    await self._wake_names.wait()

    async def _refresh(self, changed: set[str]) -> None:
        """Make the chains again that speak of the names."""
        if not changed:
            return
        for uuid in tuple(self._applied):
            async with self._locks.hold(uuid):
                if uuid not in self._applied:
                    continue
                stored = await self.rules(uuid)
                if not changed & set(ruleset.host_names(stored.rules or ())):
                    continue
                try:
                    await self._enforce(uuid, stored)
                except (KernelRefusal, EnforcerGone) as error:
                    self._log.error("new addresses for %s are not applied: %s", uuid, error)

    # ---- looking

    async def effective(self, uuid: str) -> tuple[tuple[EffectiveRule, ...], bool, str]:
        """(rules with counters, enforced by a kernel, the chain as text)."""
        uuid = _uuid(uuid)
        stored = await self.rules(uuid)
        applied = self._applied.get(uuid)
        rules = without_expired(self._readable(uuid, stored), self._now())
        if applied is None:
            names = self._names.addresses(ruleset.host_names(rules))
            compiled = ruleset.compile_rules(rules, names)
            return _effective(compiled, {}), False, ""
        compiled = ruleset.compile_rules(rules, applied.addresses, applied.strict)
        netvm = self._netvms.get(applied.target.netvm_uuid)
        if netvm is None or netvm.enforcer is None:
            return _effective(compiled, {}), False, ""
        try:
            counters = await netvm.enforcer.rule_counters(ruleset.tag(uuid))
            text = await netvm.enforcer.listing(ruleset.tag(uuid))
        except EnforcerGone as error:
            raise failure(
                "ENFORCER_UNAVAILABLE",
                f"the counters cannot be read now: {error}",
                uuid=uuid,
                why=str(error),
            ) from error
        return _effective(compiled, counters), netvm.enforcer.real, text

    async def inventory(self) -> tuple[tuple[str, str, str, str, bool, bool], ...]:
        """(uuid, boot id, namespace, interface, rules file, chain) of every qube known."""
        files = set(await asyncio.to_thread(self._files.uuids))
        marks: dict[str, Mapping[str, str]] = {}
        for netvm in tuple(self._netvms.values()):
            if netvm.enforcer is not None:
                with contextlib.suppress(EnforcerGone):
                    marks[netvm.uuid] = (await netvm.enforcer.status()).marks
        items = []
        for uuid in sorted(files | set(self._applied)):
            applied = self._applied.get(uuid)
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
        for netvm in self._netvms.values():
            if netvm.enforcer is not None:
                await netvm.enforcer.close()


# ---- small conversions


def _uuid(untrusted_uuid: str) -> str:
    tag = ruleset.tag(untrusted_uuid)
    return f"{tag[:8]}-{tag[8:12]}-{tag[12:16]}-{tag[16:20]}-{tag[20:]}"


def _parse(data: bytes | None) -> Stored:
    if data is None:
        return Stored(DEFAULT_RULES, True)
    try:
        rules = rules_file.parse(data)
    except rules_file.RulesFileError as error:
        return Stored(None, False, str(error))
    if len(rules) > RULES_LIMIT:
        return Stored(None, False, f"more than {RULES_LIMIT} rules")
    return Stored(rules, False)


def _table_lock(netvm_uuid: str) -> str:
    """Name of the lock on a netvm's table; a netvm may be a client itself."""
    return f"table/{netvm_uuid}"


def _effective(
    compiled: Sequence[Compiled], counters: Mapping[str, tuple[int, int]]
) -> tuple[EffectiveRule, ...]:
    result: list[EffectiveRule] = []
    for number, (line, inert, why) in enumerate(ruleset.describe(compiled)):
        packets, size = counters.get(f"r{number}", (0, 0))
        result.append(EffectiveRule(line, packets, size, inert, why))
    return tuple(result)


def _note(applied: Applied) -> dict[str, Any]:
    return {
        "target": asdict(applied.target),
        "strict": applied.strict,
        "addresses": {name: list(texts) for name, texts in applied.addresses.items()},
    }


def _from_note(note: Mapping[str, Any]) -> Applied:
    return Applied(
        Target(**note["target"]),
        bool(note["strict"]),
        {name: tuple(texts) for name, texts in note["addresses"].items()},
    )
