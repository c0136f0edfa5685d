"""START, STOPPED, SHUTDOWN, KILL, PAUSE and their relatives: phases, guards, events.

Owns the durable phase of a qube and who may change it. Must not know the hypervisor
beyond the facts in the view. Invariant: a boot id is made by one START and ended by one
STOPPED (or by the START itself where it never came to run); an operation of an older
boot changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from bulkhead.model import events
from bulkhead.model.evaluate import (
    evaluate,
    is_preload,
    power_state,
    provides_network,
    template_for_dispvms,
    template_of,
)
from bulkhead.model.plan.base import Draft, by_name
from bulkhead.model.plan.creation import Fresh
from bulkhead.model.plan.marks import delete_feature
from bulkhead.model.plan.operation_table import START_GUID
from bulkhead.model.plan.properties import (
    DEFERRED_NETVM,
    apply_deferred_netvm,
    clients_of,
    shown_by,
)
from bulkhead.model.properties import DISP, QUBES_VM, has_property
from bulkhead.model.records import HALTED, Operation, OperationState, Phase, Qube, Run
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import (
    APPLY_CLIENTS,
    ApplySpec,
    KillSpec,
    PauseSpec,
    ResumeSpec,
    ShutdownSpec,
    StartSpec,
    StoppedSpec,
    SuspendSpec,
    UnpauseSpec,
)
from bulkhead.model.view import View

RESTORE_TAG = "backup-restore-in-progress"


def booted(qube: Qube, boot_id: str) -> bool:
    """The record still is in that boot."""
    return qube.run.phase is not Phase.HALTED and qube.run.boot_id == boot_id


def boot_of(operation: Operation) -> str:
    """The boot that an operation works for, "" where it has none."""
    return operation.data.get("boot_id", "")


def _with_boot(operation: Operation, qube: Qube) -> Operation:
    return replace(operation, data={**operation.data, "boot_id": qube.run.boot_id})


def done(operation: Operation) -> Operation:
    """The operation has nothing to do: it succeeds at once."""
    return replace(operation, state=OperationState.SUCCEEDED)


def _phase(draft: Draft, qube: Qube, phase: Phase) -> Qube:
    run = HALTED if phase is Phase.HALTED else Run(phase, qube.run.boot_id)
    return draft.put(replace(draft.qube(qube.uuid), run=run))


def need_bootable(qube: Qube, reason: str, what: str) -> None:
    """Refusal with that reason for dom0 and remote qubes."""
    if qube.klass not in QUBES_VM:
        raise Refusal(reason, f"'{qube.name}' cannot be {what}", qube=qube.name)


# ---- START


def begin_start(draft: Draft, operation: Operation, spec: StartSpec, fresh: Fresh) -> Operation:
    """HALTED to STARTING under a new boot id; any other phase succeeds at once."""
    del spec
    view = draft.view
    qube = draft.qube(operation.subjects[0])
    need_bootable(qube, "QUBE_NOT_HALTED", "started: it always runs")
    if qube.run.phase is not Phase.HALTED:
        return done(operation)
    try:
        _check_may_start(qube)
        draft.emit(events.make(qube, "domain-pre-start", start_guid=START_GUID, mem_required=None))
        _check_start_vetoes(view, qube)
    except Refusal as refusal:
        draft.emit(events.domain_start_failed(qube, refusal.message))
        raise
    boot_id = boot_of(operation) or fresh.boot_id
    draft.put(replace(qube, run=Run(Phase.STARTING, boot_id)))
    return replace(operation, data={**operation.data, "boot_id": boot_id})


def _check_may_start(qube: Qube) -> None:
    if qube.quarantine:
        raise Refusal(
            "QUBE_QUARANTINED",
            f"'{qube.name}' is quarantined: {qube.quarantine}; repair it first",
            qube=qube.name,
        )
    reason = qube.features.get("prohibit-start")
    if reason:
        raise Refusal(
            "START_PROHIBITED",
            f"Qube start is prohibited. Rationale: {reason}",
            qube=qube.name,
            rationale=reason,
        )


def _check_start_vetoes(view: View, qube: Qube) -> None:
    if RESTORE_TAG in qube.tags:
        raise Refusal(
            "QUBE_ERROR",
            f"'{qube.name}' is being restored from a backup; wait for its end",
            qube=qube.name,
        )
    if qube.klass == DISP:
        template = template_of(view, qube)
        if template is None or not template_for_dispvms(template):
            raise Refusal(
                "NOT_DISPOSABLE_TEMPLATE",
                f"The template of '{qube.name}' is no disposable template",
                qube=qube.name,
            )
    if any(volume.snapshots_disabled for volume in qube.volumes):
        # Of disposables only, as in 4.4: what an app qube runs on is a copy, which is not reached.
        for other in by_name(view.referrers("template", qube.name)):
            if other.klass == DISP and other.run.phase is not Phase.HALTED:
                raise Refusal(
                    "QUBE_NOT_HALTED",
                    f"'{qube.name}' works on its data without snapshots; shut down"
                    f" the disposable '{other.name}', which is based on it, first",
                    qube=other.name,
                )
    for volume in qube.volumes:
        owner = view.vid_owner(volume.pool, volume.source) if volume.source else None
        if owner is None or owner.uuid == qube.uuid or owner.run.phase is Phase.HALTED:
            continue
        if any(v.vid == volume.source and v.snapshots_disabled for v in owner.volumes):
            raise Refusal(
                "QUBE_ERROR",
                f"Volume {volume.name} of '{qube.name}' starts from data that '{owner.name}'"
                " changes without snapshots; shut it down first",
                qube=qube.name,
                user=owner.name,
            )


def end_start(draft: Draft, operation: Operation, outcome: OperationState, reason: str) -> None:
    """UP, or back to HALTED; past the pivot the phase stays for the KILL that follows."""
    qube = draft.find(operation.subjects[0])
    if qube is None:
        return
    boot_id = boot_of(operation)
    mine = booted(qube, boot_id)
    if outcome is OperationState.SUCCEEDED:
        if mine and qube.run.phase is Phase.STARTING:
            qube = _phase(draft, qube, Phase.UP)
        else:
            # A kill came between; where that has failed by now, nobody else ends it.
            _back_to_up(draft, qube, operation)
        draft.emit(events.domain_start(qube, START_GUID))
        if mine and provides_network(qube):
            _connect_clients(draft, qube)
        return
    draft.emit(events.domain_start_failed(qube, reason))
    if not mine:
        return
    if operation.pivoted:
        if qube.run.phase is Phase.STARTING:
            _phase(draft, qube, Phase.UP)
        return
    if _was_spawned(draft.view, operation, qube):
        draft.emit(*events.domain_stopped(qube))
        halt(draft, qube)
        draft.emit(events.domain_shutdown(qube))
    else:
        halt(draft, qube)


def _was_spawned(view: View, operation: Operation, qube: Qube) -> bool:
    """The domain existed, so clients saw it and must see it go."""
    fact = view.power(qube.uuid)
    known = fact is not None and fact.boot_id == boot_of(operation)
    return known or bool(operation.data.get("spawned"))


def _connect_clients(draft: Draft, netvm: Qube) -> None:
    """Running clients get their interface and rules back, and what they could not get while
    this was off. Paused ones get the rules; the rest waits until they go on."""
    for client in by_name(clients_of(draft.view, netvm)):
        if client.run.phase is not Phase.UP:
            continue
        draft.live(draft.qube(client.uuid))
        if power_state(draft.view, client) != "Paused":
            apply_deferred_netvm(draft, client)


def halt(draft: Draft, qube: Qube) -> Qube:
    """The boot is over."""
    qube = _phase(draft, qube, Phase.HALTED)
    if DEFERRED_NETVM in qube.features:
        delete_feature(draft, qube, DEFERRED_NETVM)
    return draft.qube(qube.uuid)


# ---- STOPPED


def begin_stopped(draft: Draft, operation: Operation, spec: StoppedSpec, fresh: Fresh) -> Operation:
    """The domain is gone; another boot's or a repeated message changes nothing."""
    del fresh
    qube = draft.find(spec.uuid)
    if qube is None or not booted(qube, spec.boot_id):
        return done(operation)
    qube = _phase(draft, qube, Phase.STOPPING)
    draft.emit(*events.domain_stopped(qube))
    return _with_boot(operation, qube)


def end_stopped(draft: Draft, operation: Operation, outcome: OperationState) -> None:
    """HALTED."""
    qube = draft.find(operation.subjects[0])
    if qube is None or outcome is not OperationState.SUCCEEDED:
        return
    if booted(qube, boot_of(operation)):
        qube = halt(draft, qube)
        draft.emit(events.domain_shutdown(qube))


# ---- SHUTDOWN, KILL


def begin_shutdown(
    draft: Draft, operation: Operation, spec: ShutdownSpec, fresh: Fresh
) -> Operation:
    """STOPPING, unless others need the qube."""
    del fresh
    qube = draft.qube(operation.subjects[0])
    need_bootable(qube, "QUBE_ERROR", "shut down")
    if qube.run.phase is Phase.HALTED:
        if operation.data.get("place"):  # stopped while this waited for its turn
            return done(operation)
        raise Refusal("QUBE_NOT_STARTED", f"Domain is powered off: '{qube.name}'", qube=qube.name)
    draft.emit(events.domain_pre_shutdown(qube, spec.force))
    try:
        if not spec.force:
            _check_unneeded(draft.view, qube)
            if power_state(draft.view, qube) == "Paused" and not is_preload(draft.view, qube):
                raise Refusal(
                    "QUBE_NOT_RUNNING",
                    f"Domain not running (either powered off or paused): '{qube.name}'",
                    qube=qube.name,
                )
    except Refusal as refusal:
        draft.emit(events.domain_shutdown_failed(qube, refusal.message))
        raise
    qube = _phase(draft, qube, Phase.STOPPING)
    return _with_boot(operation, qube)


def _check_unneeded(view: View, qube: Qube) -> None:
    def needing(users: Iterator[Qube]) -> list[str]:
        return [
            user.name
            for user in by_name(users)
            if user.uuid != qube.uuid
            and user.run.phase is not Phase.HALTED
            and not is_preload(view, user)
        ]

    if provides_network(qube):
        clients = needing(clients_of(view, qube))
        if clients:
            raise Refusal(
                "QUBE_IN_USE",
                f"There are other VMs connected to this VM: {', '.join(clients)}",
                qube=qube.name,
                user=clients[0],
            )
    shown = needing(shown_by(view, qube))
    if shown:
        raise Refusal(
            "QUBE_ERROR",
            f"'{qube.name}' shows the windows of running qubes: {', '.join(shown)}",
            qube=qube.name,
            user=shown[0],
        )
    heard = needing(_heard_by(view, qube))
    if heard:
        raise Refusal(
            "QUBE_IN_USE",
            f"'{qube.name}' plays the sound of running qubes: {', '.join(heard)}",
            qube=qube.name,
            user=heard[0],
        )


def _heard_by(view: View, audiovm: Qube) -> Iterator[Qube]:
    for qube in view.referrers("audiovm", audiovm.name):
        if not qube.hidden and has_property(qube.klass, "audiovm"):
            yield qube
    if evaluate(view, None, "default_audiovm") == audiovm.name:
        yield from (q for q in view.without("audiovm") if has_property(q.klass, "audiovm"))


def end_shutdown(draft: Draft, operation: Operation, outcome: OperationState, reason: str) -> None:
    """A qube that has not stopped by now is up, whatever its guest is about to do."""
    qube = draft.find(operation.subjects[0])
    if qube is None:
        return
    _back_to_up(draft, qube, operation)
    if outcome is not OperationState.SUCCEEDED:
        draft.emit(events.domain_shutdown_failed(qube, reason))
        if draft.qube(qube.uuid).run.phase is Phase.UP:
            _catch_up(draft, draft.qube(qube.uuid))


def _back_to_up(draft: Draft, qube: Qube, operation: Operation) -> None:
    if not booted(qube, boot_of(operation)) or qube.run.phase is not Phase.STOPPING:
        return
    stopping = ("STOPPED", "KILL", "SHUTDOWN", "START")
    if not any(
        other.kind in stopping
        and other.id != operation.id
        and other.state is not OperationState.QUEUED
        for other in draft.operations_on(qube.uuid)
    ):
        _phase(draft, qube, Phase.UP)


def _catch_up(draft: Draft, qube: Qube) -> None:
    """What could not reach the qube while it was stopping or asleep does now: its netvm
    may have been restarted meanwhile, and connects those only that run then."""
    if not is_preload(draft.view, qube):
        draft.live(qube)


def begin_kill(draft: Draft, operation: Operation, spec: KillSpec, fresh: Fresh) -> Operation:
    """STOPPING, without asking anybody; a START under way is told to give up."""
    del fresh
    qube = draft.qube(operation.subjects[0])
    need_bootable(qube, "QUBE_ERROR", "killed")
    if qube.run.phase is Phase.HALTED or (spec.boot_id and qube.run.boot_id != spec.boot_id):
        if spec.boot_id:
            return done(operation)
        raise Refusal("QUBE_NOT_STARTED", f"Domain is powered off: '{qube.name}'", qube=qube.name)
    for other in draft.operations_on(qube.uuid):
        if other.kind == "START" and other.state is not OperationState.QUEUED:
            draft.put_operation(replace(other, cancel_requested=True))
    qube = _phase(draft, qube, Phase.STOPPING)
    return _with_boot(operation, qube)


def end_kill(draft: Draft, operation: Operation) -> None:
    """STOPPED has made it HALTED; where the kill failed the qube is up."""
    qube = draft.find(operation.subjects[0])
    if qube is not None:
        _back_to_up(draft, qube, operation)


# ---- PAUSE, UNPAUSE, SUSPEND, RESUME


def _need_running(qube: Qube) -> None:
    if qube.run.phase is Phase.HALTED:
        raise Refusal(
            "QUBE_NOT_RUNNING",
            f"Domain not running (either powered off or paused): '{qube.name}'",
            qube=qube.name,
        )


def _not_paused(qube: Qube) -> Refusal:
    return Refusal("QUBE_NOT_PAUSED", f"Domain is not paused: '{qube.name}'", qube=qube.name)


def begin_pause(draft: Draft, operation: Operation, spec: PauseSpec, fresh: Fresh) -> Operation:
    """Announced; pausing a paused qube is in order."""
    del spec, fresh
    qube = draft.qube(operation.subjects[0])
    need_bootable(qube, "QUBE_ERROR", "paused")
    _need_running(qube)
    draft.emit(events.domain_pre_paused(qube))
    state = power_state(draft.view, qube)
    return _with_boot(
        replace(operation, data={**operation.data, "was": state.lower()}),
        qube,
    )


def end_pause(draft: Draft, operation: Operation, outcome: OperationState) -> None:
    """Paused now, if it was not before."""
    qube = draft.find(operation.subjects[0])
    if qube is None or outcome is not OperationState.SUCCEEDED:
        return
    if booted(qube, boot_of(operation)) and operation.data.get("was") != "paused":
        draft.emit(events.domain_paused(qube))


def begin_unpause(draft: Draft, operation: Operation, spec: UnpauseSpec, fresh: Fresh) -> Operation:
    """Announced."""
    del spec, fresh
    qube = draft.qube(operation.subjects[0])
    need_bootable(qube, "QUBE_ERROR", "unpaused")
    if power_state(draft.view, qube) != "Paused":
        raise _not_paused(qube)
    draft.emit(events.domain_pre_unpaused(qube))
    return _with_boot(operation, qube)


def end_unpause(draft: Draft, operation: Operation, outcome: OperationState) -> None:
    """Runs again, with the netvm that it got while it was paused."""
    qube = draft.find(operation.subjects[0])
    if qube is None or outcome is not OperationState.SUCCEEDED:
        return
    if booted(qube, boot_of(operation)):
        draft.emit(events.domain_unpaused(qube))
        apply_deferred_netvm(draft, qube)
        _catch_up(draft, draft.qube(qube.uuid))


def begin_suspend(draft: Draft, operation: Operation, spec: SuspendSpec, fresh: Fresh) -> Operation:
    """Nothing is announced: only a guest that cannot suspend is paused."""
    del spec, fresh
    qube = draft.qube(operation.subjects[0])
    need_bootable(qube, "QUBE_ERROR", "suspended")
    _need_running(qube)
    state = power_state(draft.view, qube)
    return _with_boot(
        replace(operation, data={**operation.data, "was": state.lower()}),
        qube,
    )


def end_suspend(
    draft: Draft, operation: Operation, outcome: OperationState, result: Mapping[str, str]
) -> None:
    """result or data "paused_instead": the guest could not suspend."""
    qube = draft.find(operation.subjects[0])
    if qube is None or outcome is not OperationState.SUCCEEDED:
        return
    told = result.get("paused_instead") or operation.data.get("paused_instead")
    if booted(qube, boot_of(operation)) and (told or power_state(draft.view, qube) == "Paused"):
        draft.emit(events.domain_pre_paused(qube))
        if operation.data.get("was") != "paused":
            draft.emit(events.domain_paused(qube))


def begin_resume(draft: Draft, operation: Operation, spec: ResumeSpec, fresh: Fresh) -> Operation:
    """A suspended guest is woken, a paused one unpaused."""
    del spec, fresh
    qube = draft.qube(operation.subjects[0])
    need_bootable(qube, "QUBE_ERROR", "resumed")
    state = power_state(draft.view, qube)
    if state not in ("Paused", "Suspended"):
        raise _not_paused(qube)
    if state == "Paused":
        draft.emit(events.domain_pre_unpaused(qube))
    return _with_boot(
        replace(operation, data={**operation.data, "was": state.lower()}),
        qube,
    )


def end_resume(draft: Draft, operation: Operation, outcome: OperationState) -> None:
    """Awake again."""
    qube = draft.find(operation.subjects[0])
    if qube is None or outcome is not OperationState.SUCCEEDED:
        return
    if not booted(qube, boot_of(operation)):
        return
    if operation.data.get("was") == "paused":
        draft.emit(events.domain_unpaused(qube))
    else:
        draft.emit(events.domain_resumed(qube))
    apply_deferred_netvm(draft, qube)
    _catch_up(draft, draft.qube(qube.uuid))


# ---- APPLY


def begin_apply(draft: Draft, operation: Operation, spec: ApplySpec, fresh: Fresh) -> Operation:
    """Nothing to do for a qube that is not in that boot any more. Where it was about its
    network, the netvm that the qube has left may still count it among its clients."""
    del fresh
    qube = draft.find(spec.uuid)
    if qube is None or not booted(qube, spec.boot_id):
        for netvm in () if spec.parts else by_name(draft.view.qubes()):
            if provides_network(netvm) and netvm.run.phase is Phase.UP:
                draft.live(netvm, APPLY_CLIENTS, awaited=False)
        return done(operation)
    return _with_boot(operation, qube)
