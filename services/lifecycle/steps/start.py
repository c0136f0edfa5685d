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

from bulkhead.api import domains_pb2, hostd_pb2, storage_pb2
from bulkhead.bus.errors import BusError
from bulkhead.model.evaluate import (
    effective_default_user,
    evaluate,
    is_running,
)
from bulkhead.model.features import truthy
from bulkhead.model.plan.devices import identity
from bulkhead.model.records import Operation, OperationState, Phase, Problem, Qube
from bulkhead.model.specs import StartSpec
from services.lifecycle.core import boot, guest_keys
from services.lifecycle.executor import Outcome, Step, StepContext, StepFailed
from services.lifecycle.participants import block_device, domain_message, volume_messages
from services.lifecycle.steps.network import (
    apply_rules,
    end_namespace,
    forget_texts,
    has_guest_keys,
    plug,
    raise_netvm,
    unplug,
    withdraw,
)
from services.lifecycle.steps.subject import (
    CALL_TIMEOUT_S,
    STORAGE_TIMEOUT_S,
    boot_id,
    boot_ref,
    cancel_asked,
    running_boot,
    subject,
)

log = logging.getLogger("bulkhead.lifecycle")

NETVM_TIMEOUT_S = 3600.0
DOMAIN_TIMEOUT_S = 120.0


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


class PreSpawn:
    """The netvm that is a guest learns of its new client before the client exists."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        backend = boot.netvm(context.view, qube)
        if backend is None or not has_guest_keys(context, backend):
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
            peer = await raise_netvm(context, qube)
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
