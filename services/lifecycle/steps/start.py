"""The steps of START, in the order of the operation table.

Owns which participant does what when a qube starts. Must not decide order, retries or
undo. Invariant: nothing of the guest runs before its rules are in place, and every
forward() and undo() may be repeated.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from bulkhead.api import domains_pb2, firewall_pb2, hostd_pb2, storage_pb2
from bulkhead.bus.errors import BusError
from bulkhead.model.evaluate import (
    effective_default_user,
    evaluate,
    is_running,
    provides_network,
)
from bulkhead.model.features import truthy
from bulkhead.model.plan.devices import identity
from bulkhead.model.records import Operation, OperationState, Phase, Problem, Qube
from bulkhead.model.specs import StartSpec
from services.lifecycle.core import boot, guest_keys
from services.lifecycle.executor import Outcome, Step, StepContext, StepFailed
from services.lifecycle.participants import block_device, domain_message, volume_messages

log = logging.getLogger("bulkhead.lifecycle")

NETVM_TIMEOUT_S = 3600.0
CALL_TIMEOUT_S = 30.0
STORAGE_TIMEOUT_S = 120.0
DOMAIN_TIMEOUT_S = 120.0
# How long a stop waits for network qubes that are not the qube's own.
FORGET_S = 5.0


def cancel_asked(context: StepContext) -> bool:
    """Somebody wants the operation to end: a step that only waits gives up."""
    latest = context.view.operations.get(context.operation.id)
    return latest is not None and latest.cancel_requested


def subject(context: StepContext) -> Qube:
    """The qube that the operation works for. StepFailed when its record is gone."""
    qube = context.view.by_uuid_any(context.operation.subjects[0])
    if qube is None:
        raise StepFailed(
            Problem(
                "NOT_FOUND",
                "QUBE_NOT_FOUND",
                "the qube's record is gone",
                {"uuid": context.operation.subjects[0]},
            )
        )
    return qube


def boot_id(context: StepContext) -> str:
    """Boot id of the operation: kept in its data, since the record's may be newer."""
    kept = context.operation.data.get("boot_id", "")
    return kept or subject(context).run.boot_id


def boot_ref(context: StepContext) -> domains_pb2.BootRef:
    """This boot, for domains."""
    return domains_pb2.BootRef(uuid=context.operation.subjects[0], boot_id=boot_id(context))


def running_boot(qube: Qube) -> domains_pb2.BootRef:
    """Another qube's present boot, for domains."""
    return domains_pb2.BootRef(uuid=qube.uuid, boot_id=qube.run.boot_id)


class Verify:
    """Volumes exist and are sound."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        await context.participants.storage.verify(
            storage_pb2.VerifyRequest(
                owner=qube.uuid, volumes=volume_messages(boot.volume_specs(context.view, qube))
            ),
            timeout=CALL_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome()

    async def undo(self, context: StepContext) -> None:
        """Nothing was changed."""


class Devices:
    """Required devices are present, PCI functions away from the host's drivers."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        for assignment in boot.missing_devices(context.view, qube):
            device = identity(assignment)
            raise StepFailed(
                Problem(
                    "NOT_FOUND",
                    "DEVICE_UNKNOWN",
                    f"{assignment.devclass.capitalize()} device {device} not available",
                    {"qube": qube.name, "device": device},
                )
            )
        await _keep_for_guests(context, qube)
        return Outcome()

    async def undo(self, context: StepContext) -> None:
        """PCI functions stay with the stub driver, as long as they are assigned."""


async def _keep_for_guests(context: StepContext, qube: Qube) -> None:
    """The host's drivers let go of the assigned PCI functions."""
    hostd, host = context.participants.hostd, context.view.host
    if hostd is None or host is None or host.hypervisor == "sim":
        return
    for address, needed in boot.stub_addresses(context.view, qube):
        try:
            await hostd.bind_pci(
                hostd_pb2.BindPciRequest(address=address, stub=True),
                timeout=CALL_TIMEOUT_S,
                context=context.call(f"bind/{address}"),
            )
        except BusError as error:
            if needed:
                raise
            log.warning("%s of %s was not kept for guests: %s", address, qube.name, error.message)


class Netvm:
    """The netvm runs: started by an operation of its own, which this one waits for, for as
    long as it is the netvm and nobody wants this start to end.

    So two starts never wait for each other: records refuse loops, and who waits for a qube
    that is the netvm no more goes on.
    """

    async def forward(self, context: StepContext) -> Outcome:
        while True:
            qube = subject(context)
            backend = boot.netvm(context.view, qube)
            if backend is None or is_running(context.view, backend) or cancel_asked(context):
                return Outcome()
            if backend.run.phase is Phase.STOPPING:
                await context.executor.changed(1.0)
                continue
            call = context.call(f"netvm/{backend.uuid}")
            operation, _, _ = await context.executor.begin(StartSpec(backend.name), call)
            ended = await self._started(context, backend, operation)
            if ended is None:
                continue
            if ended.state is not OperationState.SUCCEEDED:
                if ended.error is None:
                    raise StepFailed(_netvm_problem(qube, backend, ended.state.value))
                # The very refusal that the netvm's own start gives.
                raise StepFailed(ended.error)
            if not is_running(context.view, context.view.by_uuid_any(backend.uuid) or backend):
                await context.executor.changed(1.0)
                context.attempt += 1

    @staticmethod
    async def _started(
        context: StepContext, backend: Qube, operation: Operation
    ) -> Operation | None:
        """The netvm's start when it has ended; None where it is not waited for any more."""
        executor = context.executor
        ended = asyncio.ensure_future(executor.finished(operation, NETVM_TIMEOUT_S))
        try:
            while not ended.done():
                wanted = boot.netvm(context.view, subject(context))
                if wanted is None or wanted.uuid != backend.uuid or cancel_asked(context):
                    return None
                changed = asyncio.ensure_future(executor.changed(1.0))
                try:
                    await asyncio.wait({ended, changed}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
            return ended.result()
        except TimeoutError as error:
            problem = _netvm_problem(subject(context), backend, "it takes too long")
            raise StepFailed(problem) from error
        finally:
            ended.cancel()

    async def undo(self, context: StepContext) -> None:
        """A netvm that was started for this stays: others may use it by now."""


def _netvm_problem(qube: Qube, backend: Qube, why: str) -> Problem:
    return Problem(
        "FAILED_PRECONDITION",
        "QUBE_ERROR",
        f"netvm {backend.name} of {qube.name} did not start: {why}",
        {"qube": qube.name, "netvm": backend.name},
    )


class Memory:
    """Host memory is set aside under the boot id."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        if boot.is_namespace_netvm(context.view, qube):
            return Outcome()
        try:
            await context.participants.domains.reserve_memory(
                domains_pb2.ReserveMemoryRequest(
                    boot_id=boot_id(context), bytes=boot.memory_bytes(context.view, qube)
                ),
                timeout=60.0,
                context=context.call(),
            )
        except BusError as error:
            if error.reason != "NOT_ENOUGH_MEMORY":
                raise
            raise StepFailed(
                Problem(
                    error.code,
                    error.reason,
                    f"Not enough memory to start domain '{qube.name}'",
                    {**error.metadata, "qube": qube.name, "detail": error.message},
                )
            ) from error
        return Outcome()

    async def undo(self, context: StepContext) -> None:
        await context.participants.domains.reserve_memory(
            domains_pb2.ReserveMemoryRequest(boot_id=boot_id(context), release=True),
            timeout=CALL_TIMEOUT_S,
            context=context.call("release"),
        )


class Storage:
    """Volumes are made ready for this boot."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        _refuse_shared_sources(context, qube)
        reply = await context.participants.storage.start(
            storage_pb2.StartVolumesRequest(
                owner=qube.uuid,
                boot_id=boot_id(context),
                qube=qube.name,
                volumes=volume_messages(boot.volume_specs(context.view, qube)),
                sources=volume_messages(boot.source_specs(context.view, qube)),
            ),
            timeout=STORAGE_TIMEOUT_S,
            context=context.call(),
        )
        devices = [asdict(block_device(device)) for device in reply.devices]
        return Outcome(data={"devices": json.dumps(devices)})

    async def undo(self, context: StepContext) -> None:
        await stop_volumes(context, subject(context))


def _refuse_shared_sources(context: StepContext, qube: Qube) -> None:
    """A source without snapshots cannot be in use by its own qube at the same time."""
    for volume in qube.volumes:
        if not volume.snap_on_start or not volume.source:
            continue
        owner = context.view.vid_owner(volume.pool, volume.source)
        if owner is None or owner.run.phase is Phase.HALTED:
            continue
        source = next((v for v in owner.volumes if v.vid == volume.source), None)
        if source is not None and source.snapshots_disabled:
            raise StepFailed(
                Problem(
                    "FAILED_PRECONDITION",
                    "QUBE_ERROR",
                    f"volume {volume.name} of {qube.name} starts from {volume.source}, which "
                    f"keeps no snapshots and is in use by {owner.name}; stop {owner.name} first",
                    {"qube": qube.name, "volume": volume.name, "source": owner.name},
                )
            )


async def stop_volumes(context: StepContext, qube: Qube) -> None:
    """Commit or discard the volumes of this boot."""
    await context.participants.storage.stop(
        storage_pb2.StopVolumesRequest(
            owner=qube.uuid,
            boot_id=boot_id(context),
            qube=qube.name,
            volumes=volume_messages(boot.volume_specs(context.view, qube)),
        ),
        timeout=STORAGE_TIMEOUT_S,
        context=context.call("stop"),
    )


class Plug:
    """The tap exists; it moves into the netvm's namespace once the rules are there."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        if not boot.namespaces_in_use(context.view):
            return Outcome()
        hostd = context.participants.hostd
        if boot.is_namespace_netvm(context.view, qube):
            return Outcome()
        if boot.netvm(context.view, qube) is None:
            return Outcome()
        if hostd is None:
            raise StepFailed(
                Problem(
                    "FAILED_PRECONDITION",
                    "QUBE_ERROR",
                    f"{qube.name} has a netvm, and without root no network can be enforced here; "
                    "set its netvm to none",
                    {"qube": qube.name},
                )
            )
        reply = await hostd.ensure_tap(
            hostd_pb2.EnsureTapRequest(qid=qube.qid),
            timeout=CALL_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome(data={"tap": reply.tap})

    async def undo(self, context: StepContext) -> None:
        qube = subject(context)
        if boot.is_namespace_netvm(context.view, qube):
            await end_namespace(context, qube)
        else:
            await unplug(context, qube)


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


class PreSpawn:
    """The netvm that is a guest learns of its new client before the client exists."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        backend = boot.netvm(context.view, qube)
        if backend is None or not _is_guest(context, backend):
            return Outcome()
        connected = guest_keys.connected_tree(context.view, backend)
        mapped = guest_keys.mapped_tree(context.view, qube)
        await context.participants.domains.write_guest_keys(
            domains_pb2.WriteGuestKeysRequest(
                boot=running_boot(backend),
                keys=[
                    domains_pb2.GuestKey(path=path, value=value)
                    for path, value in (*connected.write, *mapped.write)
                ],
                removed=list(mapped.remove),
            ),
            timeout=CALL_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome()

    async def undo(self, context: StepContext) -> None:
        """connected-ips names all configured clients, running or not: nothing to take back."""


def _is_guest(context: StepContext, backend: Qube) -> bool:
    """The netvm has guest keys: it is neither dom0 nor a namespace."""
    return backend.klass != "AdminVM" and not boot.is_namespace_netvm(context.view, backend)


class CreatePaused:
    """The domain exists, paused."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        devices = [
            boot.BlockDevice(**device)
            for device in json.loads(context.operation.data.get("devices", "[]"))
        ]
        domain = boot.domain(
            context.view,
            qube,
            epoch=context.epoch,
            devices=devices,
            tap=context.operation.data.get("tap", ""),
            console_log=_console_log(context, qube),
        )
        reply = await context.participants.domains.create_paused(
            domains_pb2.CreatePausedRequest(spec=domain_message(domain)),
            timeout=DOMAIN_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome(data={"spawned": "1", "xid": str(reply.state.power.xid)})

    async def undo(self, context: StepContext) -> None:
        await context.participants.domains.destroy(
            domains_pb2.DestroyDomainRequest(boot=boot_ref(context)),
            timeout=CALL_TIMEOUT_S,
            context=context.call("destroy"),
        )


def _console_log(context: StepContext, qube: Qube) -> str:
    """File for the serial console; Xen logs consoles itself."""
    directory = context.executor.console_dir
    if directory is None or not boot.namespaces_in_use(context.view):
        return ""
    return str(directory / f"guest-{qube.name}.log")


class GuestKeys:
    """The guest's keys are written before it runs."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        tree = guest_keys.boot_tree(
            context.view, qube, timezone=host_timezone(), seed=os.urandom(64)
        )
        tell_refused(qube, tree.refused)
        await context.participants.domains.write_guest_keys(
            domains_pb2.WriteGuestKeysRequest(
                boot=boot_ref(context),
                replace_all=True,
                keys=[domains_pb2.GuestKey(path=path, value=value) for path, value in tree.write],
            ),
            timeout=CALL_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome()

    async def undo(self, context: StepContext) -> None:
        """The keys end with the domain."""


def tell_refused(qube: Qube, keys: tuple[str, ...]) -> None:
    """Keys that QubesDB would not take are left out, and named."""
    if keys:
        log.warning(
            "guest keys of %s are too long or malformed and left out: %s",
            qube.name,
            ", ".join(keys),
        )


def host_timezone() -> str:
    """Olson name of the host's zone, "" when it cannot be told."""
    try:
        name = Path("/etc/timezone").read_text().strip()
        if name:
            return name
    except OSError:
        pass
    target = os.path.realpath("/etc/localtime")
    return target.split("/zoneinfo/", 1)[1] if "/zoneinfo/" in target else ""


class Firewall:
    """Rules first, then the tap into the netvm's namespace."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        view = context.view
        peer = ""
        if boot.is_namespace_netvm(view, qube):
            peer = await _raise_netvm(context, qube)
        link = boot.link(view, qube)
        if link is None:
            return Outcome()
        await apply_rules(context, qube, link, peer)
        if boot.is_namespace_netvm(view, link.netvm) and not boot.is_namespace_netvm(view, qube):
            await plug(context, qube, link)
        return Outcome()

    async def undo(self, context: StepContext) -> None:
        qube = subject(context)
        await withdraw(context, qube)
        await forget_texts(context, qube)


async def _raise_netvm(context: StepContext, qube: Qube) -> str:
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
    if reply.guest_keys and _is_guest(context, link.netvm):
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


class Resume:
    """The pivot: from here on the guest runs."""

    async def forward(self, context: StepContext) -> Outcome:
        await context.participants.domains.resume(
            domains_pb2.ResumeDomainRequest(boot=boot_ref(context), spawn=True),
            timeout=CALL_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome()

    async def undo(self, context: StepContext) -> None:
        """Only reached before the guest ran: create_paused's undo destroys the domain."""


class Daemons:
    """QubesDB and qrexec daemons, where the host has them."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        view = context.view
        timeout_s = boot.seconds(evaluate(view, qube, "qrexec_timeout"))
        virt_mode = boot.text(evaluate(view, qube, "virt_mode"))
        stubdom = truthy(view, qube, "stubdom-qrexec", "template")
        reply = await context.participants.domains.start_guest_daemons(
            domains_pb2.StartGuestDaemonsRequest(
                boot=boot_ref(context),
                name=qube.name,
                qrexec=truthy(view, qube, "qrexec", "template"),
                qrexec_timeout_s=timeout_s,
                default_user=effective_default_user(view, qube),
                debug=bool(evaluate(view, qube, "debug")),
                stubdom_qrexec=virt_mode == "hvm" and stubdom,
            ),
            timeout=timeout_s + 30.0,
            context=context.call(),
        )
        return Outcome(data={"agent": "1" if reply.agent else ""})

    async def undo(self, context: StepContext) -> None:
        """After the pivot nothing is undone."""


class Agent:
    """The guest is still there when its start is called done."""

    async def forward(self, context: StepContext) -> Outcome:
        reply = await context.participants.domains.describe(
            domains_pb2.DescribeDomainRequest(boot=boot_ref(context)),
            timeout=5.0,
            context=context.call(),
        )
        if not reply.found or reply.state.power.power in ("halted", "crashed"):
            qube = subject(context)
            raise StepFailed(
                Problem(
                    "FAILED_PRECONDITION",
                    "QUBE_ERROR",
                    f"{qube.name} ended while it was starting; see its console log",
                    {"qube": qube.name},
                )
            )
        return Outcome()

    async def undo(self, context: StepContext) -> None:
        """After the pivot nothing is undone."""


STEPS: Mapping[str, Step] = {
    "verify": Verify(),
    "devices": Devices(),
    "netvm": Netvm(),
    "memory": Memory(),
    "storage": Storage(),
    "plug": Plug(),
    "pre_spawn": PreSpawn(),
    "create_paused": CreatePaused(),
    "guest_keys": GuestKeys(),
    "firewall": Firewall(),
    "resume": Resume(),
    "daemons": Daemons(),
    "agent": Agent(),
}
