"""The steps of STOPPED, SHUTDOWN, KILL, PAUSE, UNPAUSE, SUSPEND and RESUME.

Owns what participants do when a qube stops or sleeps. Must not decide when. Invariant:
STOPPED leaves no rule, no tap, no reservation and no running marker of its boot id, and
may be repeated after any crash.
"""

from __future__ import annotations

import asyncio
import logging

from bulkhead.api import domains_pb2
from bulkhead.bus.errors import BusError
from bulkhead.model.evaluate import evaluate, is_running, power_state, provides_network
from bulkhead.model.features import truthy
from bulkhead.model.power import current_power
from bulkhead.model.records import OperationState, Phase, Problem, Qube
from bulkhead.model.specs import ShutdownSpec
from services.lifecycle.core import boot, guest_keys
from services.lifecycle.executor import Outcome, StepContext, StepFailed
from services.lifecycle.steps.network import end_namespace, forget_texts, texts_of, unplug, withdraw
from services.lifecycle.steps.start import stop_volumes
from services.lifecycle.steps.subject import (
    CALL_TIMEOUT_S,
    boot_id,
    boot_ref,
    cancel_asked,
    running_boot,
    subject,
)

log = logging.getLogger("bulkhead.lifecycle")

SERVICE_TIMEOUT_S = 60
# How long the stop of a netvm waits for clients to let go of it.
RELEASE_S = 5.0
# A shutdown without wait: how long a guest may take to count as gone at once, and how
# long the clean-up after such a one is waited for.
AT_ONCE_S = 0.1
CLEAN_UP_S = 10.0


class _Forward:
    """A step that is never undone."""

    async def undo(self, context: StepContext) -> None:
        """Only begun when there is no way back."""


class WithdrawRules(_Forward):
    """No rule of the ended boot is in force; its guest netvm forgets the address."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        await withdraw(context, qube)
        backend = boot.netvm(context.view, qube)
        # It may have been given this netvm after it began to stop.
        others = asyncio.ensure_future(forget_texts(context, qube, but=backend))
        try:
            await _tell_netvm(context, qube, backend)
        finally:
            await others
        return Outcome()


async def _tell_netvm(context: StepContext, qube: Qube, backend: Qube | None) -> None:
    if (
        backend is None
        or backend.klass == "AdminVM"
        or not is_running(context.view, backend)
        or boot.is_namespace_netvm(context.view, backend)
    ):
        return
    tree = guest_keys.connected_tree(context.view, backend)
    await context.participants.domains.write_guest_keys(
        domains_pb2.WriteGuestKeysRequest(
            boot=running_boot(backend),
            keys=[domains_pb2.GuestKey(path=p, value=v) for p, v in tree.write],
            removed_of=texts_of(context, backend, qube),
        ),
        timeout=CALL_TIMEOUT_S,
        context=context.call("connected"),
    )


class Unplug(_Forward):
    """The tap is gone; a namespace netvm lets its clients' taps out and ends; the clients of
    one that was a guest let go of interfaces that lead nowhere."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        if boot.is_namespace_netvm(context.view, qube):
            await end_namespace(context, qube)
        else:
            await unplug(context, qube)
            if provides_network(qube) and not boot.namespaces_in_use(context.view):
                await _release_clients(context, qube)
        return Outcome()


async def _release_clients(context: StepContext, netvm: Qube) -> None:
    """Clients of a netvm that is gone are unplugged from it, whether or not all let go.

    One that is paused cannot answer: it is looked at when it goes on.
    """
    view = context.view
    clients = [
        client
        for client in guest_keys.clients_of(view, netvm)
        if client.run.phase is Phase.UP and power_state(view, client) != "Paused"
    ]
    await asyncio.gather(*(_release(context, client, netvm) for client in clients))


async def _release(context: StepContext, client: Qube, netvm: Qube) -> None:
    try:
        await context.participants.domains.detach_interface(
            domains_pb2.DetachInterfaceRequest(
                boot=running_boot(client),
                # It may have been given another netvm meanwhile, and be plugged there.
                interface=domains_pb2.InterfaceSpec(backend=netvm.name),
            ),
            timeout=RELEASE_S,
            context=context.call(f"release/{client.uuid}"),
        )
    except BusError as error:
        log.warning("%s was not unplugged from %s: %s", client.name, netvm.name, error.message)


class StopVolumes(_Forward):
    """Volumes are committed or discarded, the memory reservation is released."""

    async def forward(self, context: StepContext) -> Outcome:
        await context.participants.domains.reserve_memory(
            domains_pb2.ReserveMemoryRequest(boot_id=boot_id(context), release=True),
            timeout=CALL_TIMEOUT_S,
            context=context.call("release"),
        )
        await stop_volumes(context, subject(context))
        return Outcome()


class Shutdown(_Forward):
    """The guest is asked to power off; a paused one with force is destroyed."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        spec = context.operation.spec
        force = isinstance(spec, ShutdownSpec) and spec.force
        power = context.view.power(qube.uuid)
        if power is not None and power.boot_id == boot_id(context) and power.power == "paused":
            await context.participants.domains.destroy(
                domains_pb2.DestroyDomainRequest(boot=boot_ref(context)),
                timeout=CALL_TIMEOUT_S,
                context=context.call("destroy"),
            )
            return Outcome()
        await context.participants.domains.shutdown(
            domains_pb2.ShutdownDomainRequest(boot=boot_ref(context), force=force),
            timeout=CALL_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome()


class Stopped(_Forward):
    """STOPPED of this boot has ended; a shutdown without wait does not wait for the guest."""

    async def forward(self, context: StepContext) -> Outcome:
        spec = context.operation.spec
        if isinstance(spec, ShutdownSpec) and not spec.wait:
            await _gone_at_once(context)
            return Outcome()
        qube = subject(context)
        limit = None
        if isinstance(spec, ShutdownSpec):
            seconds = boot.seconds(evaluate(context.view, qube, "shutdown_timeout"))
            limit = asyncio.get_running_loop().time() + seconds
        boot_of = boot_id(context)
        while True:
            if limit is not None and cancel_asked(context):
                raise StepFailed(
                    Problem(
                        "CANCELLED",
                        "CANCELLED",
                        f"waiting for {qube.name} to stop was cancelled; it was asked to stop",
                        {"qube": qube.name},
                    )
                )
            _check_stop(context, qube.uuid, boot_of)
            now = context.view.by_uuid_any(qube.uuid)
            if now is None or now.run.phase is Phase.HALTED or now.run.boot_id != boot_of:
                return Outcome()
            left = 1.0
            if limit is not None:
                left = min(left, limit - asyncio.get_running_loop().time())
                if left <= 0:
                    raise StepFailed(
                        Problem(
                            "FAILED_PRECONDITION",
                            "SHUTDOWN_TIMEOUT",
                            # In 4.4's words: event streams carry them as the reason.
                            f"Domain shutdown timed out: '{qube.name}'",
                            {"qube": qube.name},
                        )
                    )
            await context.executor.changed(left)


def _check_stop(context: StepContext, uuid: str, boot_of: str) -> None:
    """StepFailed where the stop that is waited for is stuck: whoever waits is told why."""
    for other in context.view.operations_on(uuid):
        if (
            other.kind == "STOPPED"
            and other.state is OperationState.STUCK
            and other.data.get("boot_id") == boot_of
            and other.error is not None
        ):
            raise StepFailed(other.error)


async def _gone_at_once(context: StepContext) -> None:
    """Where the guest is gone at once, its qube is halted for whoever calls next.

    Returns when it is, or when the guest takes its time; never waits for long.
    """
    loop = asyncio.get_running_loop()
    identity, boot_of, gone = subject(context).uuid, boot_id(context), False
    limit = loop.time() + AT_ONCE_S
    while True:
        now = context.view.by_uuid_any(identity)
        if now is None or now.run.phase is Phase.HALTED or now.run.boot_id != boot_of:
            return
        if not gone and power_state(context.view, now) == "Dying":
            gone, limit = True, loop.time() + CLEAN_UP_S
        left = limit - loop.time()
        if left <= 0:
            return
        await context.executor.changed(left)


class Destroy(_Forward):
    """The domain is gone now."""

    async def forward(self, context: StepContext) -> Outcome:
        await context.participants.domains.destroy(
            domains_pb2.DestroyDomainRequest(boot=boot_ref(context)),
            timeout=CALL_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome()


class Pause(_Forward):
    async def forward(self, context: StepContext) -> Outcome:
        await context.participants.domains.pause(
            domains_pb2.PauseDomainRequest(boot=boot_ref(context)),
            timeout=CALL_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome()


class Unpause(_Forward):
    async def forward(self, context: StepContext) -> Outcome:
        await context.participants.domains.resume(
            domains_pb2.ResumeDomainRequest(boot=boot_ref(context)),
            timeout=CALL_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome()


async def _notify(context: StepContext, service: str) -> None:
    """Tell the guest, where it has an agent; a guest that does not answer stops nothing."""
    qube = subject(context)
    power = current_power(context.view, qube)
    if power is None or not power.agent or not truthy(context.view, qube, "qrexec", "template"):
        return
    try:
        await context.participants.domains.run_service(
            domains_pb2.RunServiceRequest(
                boot=boot_ref(context), service=service, user="root", timeout_s=SERVICE_TIMEOUT_S
            ),
            timeout=SERVICE_TIMEOUT_S + 5.0,
            context=context.call(service),
        )
    except BusError as error:
        log.warning("%s in %s: %s", service, qube.name, error.message)


class Suspend(_Forward):
    """Suspend to memory; a guest that cannot is paused."""

    async def forward(self, context: StepContext) -> Outcome:
        await _notify(context, "qubes.SuspendPre")
        reply = await context.participants.domains.suspend(
            domains_pb2.SuspendDomainRequest(boot=boot_ref(context)),
            timeout=90.0,
            context=context.call(),
        )
        return Outcome(data={"paused_instead": "1" if reply.paused_instead else ""})


class Wake(_Forward):
    """Wake a suspended guest, resume a paused one."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        power = context.view.power(qube.uuid)
        suspended = power is not None and power.power == "pmsuspended"
        if suspended:
            await context.participants.domains.wake(
                domains_pb2.WakeDomainRequest(boot=boot_ref(context)),
                timeout=CALL_TIMEOUT_S,
                context=context.call(),
            )
            await _notify(context, "qubes.SuspendPost")
        else:
            await context.participants.domains.resume(
                domains_pb2.ResumeDomainRequest(boot=boot_ref(context)),
                timeout=CALL_TIMEOUT_S,
                context=context.call(),
            )
        return Outcome(data={"woken": "1" if suspended else ""})
