"""The steps of APPLY, ATTACH and DETACH: changes that reach a running qube.

Owns what participants do when a running qube's record changed. Must not compare old and
new: APPLY brings everything that is derived to what the record says now, so several of
them merge. Invariant: an APPLY of an older boot does nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from bulkhead.api import domains_pb2, hostd_pb2
from bulkhead.bus.errors import BusError
from bulkhead.model.evaluate import evaluate, is_running, provides_network
from bulkhead.model.plan.applies import left_undone
from bulkhead.model.plan.storage import attached_device
from bulkhead.model.power import current_power
from bulkhead.model.records import Assignment, Phase, Problem, Qube
from bulkhead.model.specs import (
    APPLY_CLIENTS,
    APPLY_KEYS,
    APPLY_RULES,
    ApplySpec,
    AttachSpec,
    DetachSpec,
)
from services.lifecycle.core import boot, guest_keys
from services.lifecycle.executor import Outcome, StepContext, StepFailed
from services.lifecycle.participants import fill
from services.lifecycle.steps.network import (
    apply_rules,
    close,
    forget_texts,
    guest_netvms,
    plug,
    texts_of,
    withdraw,
)
from services.lifecycle.steps.start import host_timezone, tell_refused
from services.lifecycle.steps.subject import CALL_TIMEOUT_S, running_boot, subject

log = logging.getLogger("bulkhead.lifecycle")

Part = Callable[[StepContext, Qube], Awaitable[None]]


class Apply:
    """Network, guest keys and memory of a running qube are as the record says, or the parts
    of these that the operation names."""

    async def forward(self, context: StepContext) -> Outcome:
        spec = context.operation.spec
        assert isinstance(spec, ApplySpec)
        qube = subject(context)
        if _ended(context, spec):
            await _overtaken(context, spec, qube)
            return Outcome()
        try:
            for part in _parts(context, spec):
                await part(context, qube)
        except (BusError, StepFailed):
            if not _ended(context, spec):
                raise
        if _ended(context, spec) and not boot.is_namespace_netvm(context.view, qube):
            # A stop waits for nobody: it may have withdrawn the rules before they came.
            await withdraw(context, qube)
            await forget_texts(context, qube)
            await _overtaken(context, spec, qube)
        return Outcome()

    async def undo(self, context: StepContext) -> None:
        """What is derived is brought forward only: the next APPLY or start mends it."""


def _parts(context: StepContext, spec: ApplySpec) -> tuple[Part, ...]:
    """What is to be done. All of it where an earlier APPLY of the boot did not succeed: what
    that one left undone nobody else would mend."""
    undone = left_undone(context.view.operations.values(), spec.boot_id)
    if undone or not spec.parts or not PARTS.keys() >= set(spec.parts):
        return _network, _memory
    return tuple(PARTS[part] for part in spec.parts)


def _ended(context: StepContext, spec: ApplySpec) -> bool:
    """The boot that the change was for is over, or about to be."""
    qube = context.view.by_uuid_any(spec.uuid)
    return qube is None or qube.run.boot_id != spec.boot_id or qube.run.phase is not Phase.UP


async def _overtaken(context: StepContext, spec: ApplySpec, qube: Qube) -> None:
    """The boot ended first. The netvm that its qube was to leave knew of it all the same, and
    neither that end nor the next start look at more netvms than the record's."""
    if spec.parts or boot.is_namespace_netvm(context.view, qube):
        return
    link = boot.link(context.view, qube)
    await _forget(context, qube, link.netvm if link is not None else None)


async def _network(context: StepContext, qube: Qube) -> None:
    """The interface hangs at the netvm that the record names, under the qube's rules; the
    guest's keys are there before it is plugged anew."""
    view = context.view
    if boot.is_namespace_netvm(view, qube):
        await _keys(context, qube)
        return
    link = boot.link(view, qube)
    there = link if link is not None and is_running(view, link.netvm) else None
    power = current_power(view, qube)
    if power is not None and power.power == "paused":
        # Its interface stays as it is; the rules are there before it wakes.
        await _together(_keys(context, qube), _rules(context, qube))
        return
    others = _forget(context, qube, link.netvm if link is not None else None)
    if there is None:
        await _together(_keys(context, qube), others, _unplugged(context, qube))
        return
    await _together(
        _keys(context, qube),
        others,
        apply_rules(context, qube, there),
        _introduce(context, qube, there.netvm),
    )
    if boot.is_namespace_netvm(view, there.netvm):
        # The same tap moves; the guest notices nothing.
        hostd = context.participants.hostd
        assert hostd is not None
        await hostd.unplug(
            hostd_pb2.UnplugRequest(qid=qube.qid),
            timeout=CALL_TIMEOUT_S,
            context=context.call("unplug"),
        )
        await plug(context, qube, there)
        return
    for interface in boot.interfaces(view, qube, ""):
        message = fill(domains_pb2.InterfaceSpec(), interface)
        await context.participants.domains.attach_interface(
            domains_pb2.AttachInterfaceRequest(boot=running_boot(qube), interface=message),
            timeout=CALL_TIMEOUT_S,
            context=context.call("attach"),
        )


async def _together(*work: Coroutine[Any, Any, None]) -> None:
    """Beside each other; all have ended when this does, whatever fails."""
    for end in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(end, BaseException):
            raise end


async def _rules(context: StepContext, qube: Qube) -> None:
    """A guest netvm that runs has the qube's rules."""
    view = context.view
    link = boot.link(view, qube)
    if (
        link is not None
        and is_running(view, link.netvm)
        and not boot.is_namespace_netvm(view, link.netvm)
    ):
        await apply_rules(context, qube, link)


async def _introduce(context: StepContext, qube: Qube, netvm: Qube) -> None:
    """A guest netvm knows the addresses of its client before that one is plugged."""
    if netvm.klass == "AdminVM" or boot.is_namespace_netvm(context.view, netvm):
        return
    connected = guest_keys.connected_tree(context.view, netvm)
    mapped = guest_keys.mapped_tree(context.view, qube)
    await _write(context, "introduce", netvm, (*connected.write, *mapped.write), mapped.remove)


async def _clients(context: StepContext, qube: Qube) -> None:
    """A netvm knows who its clients are."""
    if provides_network(qube):
        keys = guest_keys.connected_tree(context.view, qube).write
        await _write(context, "clients", qube, keys, ())


async def _forget(context: StepContext, qube: Qube, netvm: Qube | None) -> None:
    """Netvms that are guests, other than the qube's, hold nothing of its address: which one
    it had before is not known, and need not be."""
    view = context.view
    # Without a netvm it has no address any more: the ones that it would have.
    addresses = [address for address in guest_keys.own_addresses(view, qube) if address]
    own = {qube.uuid, netvm.uuid if netvm is not None else ""}
    others = [other for other in guest_netvms(context) if other.uuid not in own]
    await _together(*(_forget_in(context, other, qube, addresses) for other in others))


async def _forget_in(context: StepContext, netvm: Qube, qube: Qube, addresses: list[str]) -> None:
    connected = guest_keys.connected_tree(context.view, netvm).write
    removed = tuple(f"/mapped-ip/{address}/" for address in addresses)
    texts = texts_of(context, netvm, qube)
    await _write(context, "forget", netvm, connected, removed, texts)
    for address in addresses:
        await close(context, netvm, address)


async def _unplugged(context: StepContext, qube: Qube) -> None:
    await _detach(context, qube)
    await withdraw(context, qube)


async def _detach(context: StepContext, qube: Qube) -> None:
    if boot.namespaces_in_use(context.view):
        if context.participants.hostd is not None:
            await context.participants.hostd.unplug(
                hostd_pb2.UnplugRequest(qid=qube.qid),
                timeout=CALL_TIMEOUT_S,
                context=context.call("unplug"),
            )
        return
    await context.participants.domains.detach_interface(
        domains_pb2.DetachInterfaceRequest(boot=running_boot(qube)),
        timeout=CALL_TIMEOUT_S,
        context=context.call("detach"),
    )


async def _keys(context: StepContext, qube: Qube) -> None:
    core = guest_keys.core_tree(context.view, qube, timezone=host_timezone())
    exported = guest_keys.exported_tree(context.view, qube)
    tell_refused(qube, (*core.refused, *exported.refused))
    removed = (*core.remove, *exported.remove)
    await _write(context, "keys", qube, (*core.write, *exported.write), removed)


async def _write(
    context: StepContext,
    what: str,
    qube: Qube,
    keys: tuple[tuple[str, str], ...],
    removed: tuple[str, ...],
    removed_of: domains_pb2.GuestKeysOf | None = None,
) -> None:
    await context.participants.domains.write_guest_keys(
        domains_pb2.WriteGuestKeysRequest(
            boot=running_boot(qube),
            keys=[domains_pb2.GuestKey(path=path, value=value) for path, value in keys],
            removed=list(removed),
            # Everything is brought to what the record says; guests watch some of it.
            changed_only=True,
            removed_of=removed_of,
        ),
        timeout=CALL_TIMEOUT_S,
        # Two writes to one guest are two calls, or the second would have the answer of the first.
        context=context.call(f"{what}/{qube.uuid}"),
    )


async def _memory(context: StepContext, qube: Qube) -> None:
    """maxmem changes a running qube only where its memory can grow; what it has now is the
    balancer's."""
    if boot.is_namespace_netvm(context.view, qube) or not boot.hotplug(context.view, qube):
        return
    try:
        await context.participants.domains.set_maxmem(
            domains_pb2.SetMaxmemRequest(
                boot=running_boot(qube),
                maxmem_mib=boot.number(evaluate(context.view, qube, "maxmem")),
            ),
            timeout=CALL_TIMEOUT_S,
            context=context.call("memory"),
        )
    except BusError as error:
        if error.reason != "HYPERVISOR_UNSUPPORTED":
            raise
        log.warning("maxmem of %s counts from its next start: %s", qube.name, error.message)


PARTS: Mapping[str, Part] = {APPLY_CLIENTS: _clients, APPLY_RULES: _rules, APPLY_KEYS: _keys}


def _disk(context: StepContext, asked: Assignment) -> domains_pb2.DiskSpec:
    """The disk of the block device that the operation found. StepFailed for another class."""
    device = attached_device(context.operation, asked)
    if device.devclass != "block":
        raise StepFailed(
            Problem(
                "FAILED_PRECONDITION",
                "INVALID_DEVICE",
                f"{device.devclass} devices cannot be attached to a running qube here",
                {"class": device.devclass},
            )
        )
    return fill(
        domains_pb2.DiskSpec(),
        boot.block_disk(context.view, device, device.options.get("frontend-dev", "")),
    )


class Attach:
    async def forward(self, context: StepContext) -> Outcome:
        spec = context.operation.spec
        assert isinstance(spec, AttachSpec)
        qube = subject(context)
        await context.participants.domains.attach_disk(
            domains_pb2.AttachDiskRequest(
                boot=running_boot(qube), disk=_disk(context, spec.device)
            ),
            timeout=CALL_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome()

    async def undo(self, context: StepContext) -> None:
        spec = context.operation.spec
        assert isinstance(spec, AttachSpec)
        if spec.device.devclass == "block":
            await _detach_disk(context, spec.device)


async def _detach_disk(context: StepContext, device: Assignment) -> None:
    await context.participants.domains.detach_disk(
        domains_pb2.DetachDiskRequest(
            boot=running_boot(subject(context)), disk=_disk(context, device)
        ),
        timeout=CALL_TIMEOUT_S,
        context=context.call("detach"),
    )


class Detach:
    async def forward(self, context: StepContext) -> Outcome:
        spec = context.operation.spec
        assert isinstance(spec, DetachSpec)
        await _detach_disk(context, spec.device)
        return Outcome()

    async def undo(self, context: StepContext) -> None:
        """A detach that may have happened is not attached again behind the user's back."""
