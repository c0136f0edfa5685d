"""The steps of CREATE, CLONE and REMOVE.

Owns what storage and firewall do when a qube comes or goes. Must not touch records: the
registry's begin and end do. Invariant: undo removes what carries the new qube's uuid and
nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

from bulkhead.api import domains_pb2, firewall_pb2, storage_pb2
from bulkhead.bus.errors import BusError
from bulkhead.model.plan.volumes import volumes_of_template
from bulkhead.model.records import Qube, Volume
from bulkhead.model.specs import CloneSpec, CreateSpec
from services.lifecycle.core import boot
from services.lifecycle.executor import Outcome, StepContext
from services.lifecycle.participants import volume_message, volume_messages
from services.lifecycle.steps.subject import CALL_TIMEOUT_S, STORAGE_TIMEOUT_S, subject

CLONE_TIMEOUT_S = 3600.0
# Refusals of a pool that could not be used when the volumes were to be made, either.
_TAKES_NOTHING = frozenset({"INVALID_POOL", "POOL_UNUSABLE"})


def stored(context: StepContext, qube: Qube) -> list[storage_pb2.VolumeSpec]:
    """The qube's volumes without the kernel, which no qube owns."""
    return [
        volume_message(spec)
        for spec in boot.volume_specs(context.view, qube)
        if spec.declared.name != "kernel"
    ]


class Ensure:
    """The volumes of a new qube exist, tagged with its uuid; those that begin as their
    template's are copied from it."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        template = _source(context)
        copied = volumes_of_template(template, qube.klass)
        if copied:
            await _ensure_cloned(context, qube, {volume.name: volume for volume in copied})
        elif volumes := stored(context, qube):
            await context.participants.storage.ensure(
                storage_pb2.EnsureRequest(owner=qube.uuid, qube=qube.name, volumes=volumes),
                timeout=STORAGE_TIMEOUT_S,
                context=context.call(),
            )
        return Outcome(result={"name": qube.name, "uuid": qube.uuid})

    async def undo(self, context: StepContext) -> None:
        await _discard_new(context, subject(context))


async def remove_volumes(context: StepContext, qube: Qube) -> None:
    """Nothing in any pool carries the qube's uuid any more."""
    volumes = stored(context, qube)
    if volumes:
        await _remove(context, qube, volumes, "remove")


async def _discard_new(context: StepContext, qube: Qube) -> None:
    """What was made for the new qube is gone.

    A pool whose driver or options this build cannot use has taken nothing: asked to remove,
    it would refuse for ever.
    """
    pools: dict[str, list[storage_pb2.VolumeSpec]] = {}
    for volume in stored(context, qube):
        pools.setdefault(volume.pool.name, []).append(volume)
    for name, volumes in pools.items():
        try:
            await _remove(context, qube, volumes, f"remove/{name}")
        except BusError as error:
            if error.reason not in _TAKES_NOTHING:
                raise


async def _remove(
    context: StepContext, qube: Qube, volumes: list[storage_pb2.VolumeSpec], part: str
) -> None:
    await context.participants.storage.remove(
        storage_pb2.RemoveRequest(owner=qube.uuid, volumes=volumes),
        timeout=STORAGE_TIMEOUT_S,
        context=context.call(part),
    )


class EnsureCloned:
    """The volumes of a clone exist: persistent ones copied, the others fresh."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        source = _source(context)
        volumes = source.volumes if source is not None else ()
        await _ensure_cloned(context, qube, {v.name: v for v in volumes if v.save_on_stop})
        return Outcome(result={"name": qube.name, "uuid": qube.uuid})

    async def undo(self, context: StepContext) -> None:
        await _discard_new(context, subject(context))


async def _ensure_cloned(context: StepContext, qube: Qube, origins: Mapping[str, Volume]) -> None:
    """The qube's persistent volumes begin as those of the same name in origins."""
    request = storage_pb2.EnsureClonedRequest(owner=qube.uuid, qube=qube.name)
    for spec in boot.volume_specs(context.view, qube):
        if spec.declared.name == "kernel":
            continue
        origin = origins.get(spec.declared.name)
        if spec.declared.save_on_stop and origin is not None:
            source = boot.VolumeSpec(origin, boot.pool_of(context.view, origin))
            request.items.add(source=volume_message(source), target=volume_message(spec))
        else:
            request.fresh.append(volume_message(spec))
    await context.participants.storage.ensure_cloned(
        request, timeout=CLONE_TIMEOUT_S, context=context.call()
    )


def _source(context: StepContext) -> Qube | None:
    spec = context.operation.spec
    if isinstance(spec, CloneSpec):
        return context.view.qube(spec.source)
    if isinstance(spec, CreateSpec):
        name = subject(context).properties.get("template", "")
        return context.view.qube(name) if name else None
    return None


class CopyRules:
    """A clone or a disposable keeps the rules of what it comes from, on disk."""

    async def forward(self, context: StepContext) -> Outcome:
        qube = subject(context)
        source = _source(context)
        if source is None or not source.rules_digest or not _inherits(context, qube):
            return Outcome()
        reply = await context.participants.firewall.copy_rules(
            firewall_pb2.CopyRulesRequest(
                source_uuid=source.uuid, target_uuid=qube.uuid, target_qube=qube.name
            ),
            timeout=CALL_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome(data={"rules_digest": reply.digest})

    async def undo(self, context: StepContext) -> None:
        await delete_rules(context, subject(context))


def _inherits(context: StepContext, qube: Qube) -> bool:
    return isinstance(context.operation.spec, CloneSpec) or qube.klass == "DispVM"


async def delete_rules(context: StepContext, qube: Qube) -> None:
    """No rule of the qube is left, in the kernel or on disk."""
    await context.participants.firewall.delete_rules(
        firewall_pb2.DeleteRulesRequest(uuid=qube.uuid),
        timeout=CALL_TIMEOUT_S,
        context=context.call("delete-rules"),
    )


class DeleteRules:
    """REMOVE: the firewall does not know the qube."""

    async def forward(self, context: StepContext) -> Outcome:
        await delete_rules(context, subject(context))
        return Outcome()

    async def undo(self, context: StepContext) -> None:
        """REMOVE has no way back after its begin."""


class Undefine:
    """REMOVE: the hypervisor does not know the qube."""

    async def forward(self, context: StepContext) -> Outcome:
        await context.participants.domains.undefine(
            domains_pb2.UndefineDomainRequest(uuid=subject(context).uuid),
            timeout=CALL_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome()

    async def undo(self, context: StepContext) -> None:
        """REMOVE has no way back after its begin."""


class RemoveVolumes:
    """REMOVE: nothing of the qube is left in any pool."""

    async def forward(self, context: StepContext) -> Outcome:
        await remove_volumes(context, subject(context))
        return Outcome()

    async def undo(self, context: StepContext) -> None:
        """REMOVE has no way back after its begin."""


def all_volumes(context: StepContext, qube: Qube) -> list[storage_pb2.VolumeSpec]:
    """Every volume of the qube, the kernel's too."""
    return volume_messages(boot.volume_specs(context.view, qube))
