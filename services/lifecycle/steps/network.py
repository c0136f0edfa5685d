"""A qube's way into the network: tap and namespace, rules, what a guest netvm is told.

Owns the calls to hostd, firewall and domains that open and close this way; START, STOPPED
and APPLY go through them. Must not know which operation it is, nor decide the order: rules
before the plug, that is the steps'. Invariant: each of these may be repeated, and reads what
to bring from the view of that moment.
"""

from __future__ import annotations

import asyncio
import logging

from bulkhead.api import domains_pb2, firewall_pb2, hostd_pb2
from bulkhead.bus.errors import BusError
from bulkhead.model.evaluate import provides_network
from bulkhead.model.records import Phase, Qube
from services.lifecycle.core import boot, guest_keys
from services.lifecycle.executor import StepContext
from services.lifecycle.steps.subject import CALL_TIMEOUT_S, boot_id, running_boot

log = logging.getLogger("bulkhead.lifecycle")

# How long a stop waits for network qubes that are not the qube's own.
FORGET_S = 5.0


async def raise_netvm(context: StepContext, qube: Qube) -> str:
    """The namespace has its enforce worker and base drop before any client arrives.

    Returns the interface that it is in its own netvm's namespace, "" without an uplink.
    """
    hostd = context.participants.hostd
    assert hostd is not None  # a namespace exists only where hostd runs
    uplink = hostd_pb2.EnsureUplinkRequest(qid=qube.qid)
    link = boot.link(context.view, qube)
    if link is not None:
        uplink.uplink_qid = link.netvm.qid
        uplink.ip, uplink.gateway = link.ip, link.gateway
    else:
        uplink.uplink_namespace = context.executor.uplink_namespace
    if link is not None or context.executor.uplink_namespace:
        reply = await hostd.ensure_uplink(
            uplink, timeout=CALL_TIMEOUT_S, context=context.call("uplink")
        )
        interface, peer = reply.interface, reply.peer
    else:
        interface = peer = ""
    await context.participants.firewall.netvm_up(
        firewall_pb2.NetvmUpRequest(
            uuid=qube.uuid,
            boot_id=boot_id(context),
            namespace=await namespace_of(context, qube),
            uplink=interface,
        ),
        timeout=CALL_TIMEOUT_S,
        context=context.call("netvm"),
    )
    return peer


async def namespace_of(context: StepContext, qube: Qube) -> str:
    """Name of a network qube's namespace, which hostd makes when it is not there."""
    hostd = context.participants.hostd
    if hostd is None or not boot.is_namespace_netvm(context.view, qube):
        return ""
    reply = await hostd.ensure_namespace(
        hostd_pb2.EnsureNamespaceRequest(qid=qube.qid),
        timeout=CALL_TIMEOUT_S,
        context=context.call(f"namespace/{qube.qid}"),
    )
    return reply.namespace


async def end_namespace(context: StepContext, qube: Qube) -> None:
    """The network qube's namespace is gone; its clients' taps, which would die, were moved out."""
    hostd = context.participants.hostd
    if hostd is None:
        return
    for client in guest_keys.clients_of(context.view, qube):
        if client.run.phase is not Phase.HALTED:
            await hostd.unplug(
                hostd_pb2.UnplugRequest(qid=client.qid),
                timeout=CALL_TIMEOUT_S,
                context=context.call(f"out/{client.qid}"),
            )
    await hostd.delete_uplink(
        hostd_pb2.DeleteUplinkRequest(qid=qube.qid),
        timeout=CALL_TIMEOUT_S,
        context=context.call("uplink-gone"),
    )
    await hostd.delete_namespace(
        hostd_pb2.DeleteNamespaceRequest(qid=qube.qid),
        timeout=CALL_TIMEOUT_S,
        context=context.call("namespace-gone"),
    )


async def plug(context: StepContext, qube: Qube, link: boot.Link) -> None:
    """The tap is in the netvm's namespace, with routes for the qube's address alone."""
    hostd = context.participants.hostd
    assert hostd is not None
    await hostd.plug(
        hostd_pb2.PlugRequest(
            qid=qube.qid,
            netvm_qid=link.netvm.qid,
            ip=link.ip,
            gateway=link.gateway,
            ip6=link.ip6,
            gateway6=link.gateway6,
            mac=link.mac,
        ),
        timeout=CALL_TIMEOUT_S,
        context=context.call("plug"),
    )


async def unplug(context: StepContext, qube: Qube) -> None:
    """Take the tap away, wherever it is."""
    hostd = context.participants.hostd
    if hostd is None or not boot.namespaces_in_use(context.view):
        return
    await hostd.unplug(
        hostd_pb2.UnplugRequest(qid=qube.qid, delete_tap=True),
        timeout=CALL_TIMEOUT_S,
        context=context.call("unplug"),
    )


async def apply_rules(
    context: StepContext, qube: Qube, link: boot.Link, interface: str = ""
) -> None:
    """The qube's rules are in the kernel, or in the guest netvm's keys.

    interface: its name in the netvm's namespace; "" = the qube's tap.
    """
    interface = interface or context.operation.data.get("tap", "")
    hostd = context.participants.hostd
    if not interface and hostd is not None and boot.is_namespace_netvm(context.view, link.netvm):
        # An operation that made no tap: the one that the qube runs with.
        tap = await hostd.ensure_tap(
            hostd_pb2.EnsureTapRequest(qid=qube.qid),
            timeout=CALL_TIMEOUT_S,
            context=context.call("tap"),
        )
        interface = tap.tap
    texts = texts_of(context, link.netvm, qube)
    reply = await context.participants.firewall.apply(
        firewall_pb2.ApplyRequest(
            target=firewall_pb2.FirewallTarget(
                uuid=qube.uuid,
                qube=qube.name,
                boot_id=boot_id(context),
                netvm_uuid=link.netvm.uuid,
                namespace=await namespace_of(context, link.netvm),
                interface=interface,
                ip=link.ip,
                ip6=link.ip6,
            ),
            iptables_xid=_xid(context, qube) if texts is not None else 0,
        ),
        timeout=CALL_TIMEOUT_S,
        context=context.call("apply"),
    )
    if reply.guest_keys and has_guest_keys(context, link.netvm):
        for address in guest_keys.own_addresses(context.view, qube):
            if address not in (link.ip, link.ip6):
                # It had an address of this family until the network above has none.
                await close(context, link.netvm, address)
        await context.participants.domains.write_guest_keys(
            domains_pb2.WriteGuestKeysRequest(
                boot=running_boot(link.netvm),
                removed=[f"/qubes-firewall/{ip}/" for ip in (link.ip, link.ip6) if ip],
                keys=[
                    domains_pb2.GuestKey(path=path, value=value)
                    for path, _, value in (key.partition("=") for key in reply.guest_keys)
                ],
                # Those of an earlier boot would be asked before the one of this.
                removed_of=texts,
            ),
            timeout=CALL_TIMEOUT_S,
            context=context.call("rules"),
        )


def _xid(context: StepContext, qube: Qube) -> int:
    """Of the qube's present boot; 0 where it is not known: then nothing of it may pass."""
    kept = context.operation.data.get("xid", "")
    xid = int(kept) if kept else guest_keys.running_xid(context.view, qube)
    return max(xid or 0, 0)


async def withdraw(context: StepContext, qube: Qube) -> None:
    """No rules of this boot are left in the kernel; a namespace netvm's worker ends."""
    await context.participants.firewall.withdraw(
        firewall_pb2.WithdrawRequest(uuid=qube.uuid, boot_id=boot_id(context)),
        timeout=CALL_TIMEOUT_S,
        context=context.call("withdraw"),
    )
    if boot.is_namespace_netvm(context.view, qube):
        await context.participants.firewall.netvm_down(
            firewall_pb2.NetvmDownRequest(uuid=qube.uuid, boot_id=boot_id(context)),
            timeout=CALL_TIMEOUT_S,
            context=context.call("netvm-down"),
        )


def texts_of(context: StepContext, netvm: Qube, qube: Qube) -> domains_pb2.GuestKeysOf | None:
    """The qube's iptables-save texts in a guest netvm; None where that one reads none."""
    view = context.view
    if boot.is_namespace_netvm(view, netvm) or not guest_keys.reads_iptables(view, netvm):
        return None
    texts = guest_keys.iptables_texts(view, qube)
    path, value = texts.news
    return domains_pb2.GuestKeysOf(
        below=texts.below,
        lines=texts.lines,
        news=domains_pb2.GuestKey(path=path, value=value),
    )


async def forget_texts(context: StepContext, qube: Qube, but: Qube | None = None) -> None:
    """No guest netvm, `but` apart, keeps an iptables-save text of the qube, which has no
    boot any more. One that does not answer keeps a text that the next start takes away."""
    await asyncio.gather(
        *(
            _forget_texts(context, netvm, texts)
            for netvm in guest_netvms(context)
            if netvm is not but and (texts := texts_of(context, netvm, qube)) is not None
        )
    )


async def _forget_texts(context: StepContext, netvm: Qube, texts: domains_pb2.GuestKeysOf) -> None:
    try:
        await context.participants.domains.write_guest_keys(
            domains_pb2.WriteGuestKeysRequest(boot=running_boot(netvm), removed_of=texts),
            timeout=FORGET_S,
            context=context.call(f"texts/{netvm.uuid}"),
        )
    except BusError as error:
        log.warning("%s keeps rules of a client that is gone: %s", netvm.name, error.message)


def guest_netvms(context: StepContext) -> list[Qube]:
    """Network qubes that run as guests and have guest keys."""
    return [
        qube
        for qube in context.view.qubes()
        if qube.klass != "AdminVM"
        and qube.run.phase is Phase.UP
        and provides_network(qube)
        and not boot.is_namespace_netvm(context.view, qube)
    ]


def has_guest_keys(context: StepContext, backend: Qube) -> bool:
    """The netvm has guest keys: it is neither dom0 nor a namespace."""
    return backend.klass != "AdminVM" and not boot.is_namespace_netvm(context.view, backend)


async def close(context: StepContext, netvm: Qube, address: str) -> None:
    """A guest netvm lets nothing of the address through, if it knows it at all.

    Taking the whole tree away would be news of a tree without a policy, which the agent
    there reports to its user as a mistake.
    """
    base = f"/qubes-firewall/{address}"
    reply = await context.participants.domains.read_guest_keys(
        domains_pb2.ReadGuestKeysRequest(boot=running_boot(netvm), prefix=f"{base}/"),
        timeout=CALL_TIMEOUT_S,
        context=context.call(f"rules-of/{netvm.uuid}/{address}"),
    )
    if {key.path for key in reply.untrusted_keys} <= {f"{base}/policy"}:
        return
    await context.participants.domains.write_guest_keys(
        domains_pb2.WriteGuestKeysRequest(
            boot=running_boot(netvm),
            removed=[f"{base}/"],
            keys=[
                domains_pb2.GuestKey(path=f"{base}/policy", value="drop"),
                domains_pb2.GuestKey(path=base, value=""),
            ],
        ),
        timeout=CALL_TIMEOUT_S,
        context=context.call(f"close/{netvm.uuid}/{address}"),
    )
