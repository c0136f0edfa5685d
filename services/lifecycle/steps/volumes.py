"""The steps of REVERT, RESIZE, CLEAR, CLONE_VOLUME, IMPORT, pools and kernels.

Owns the one call to storage (and, on a running qube, to domains) of each. Must not know
the rules of volumes: the begin plan has checked them. Invariant: an import's data shows
only after its end, and a repeated call has no second effect.
"""

from __future__ import annotations

import json

from bulkhead import codec
from bulkhead.api import domains_pb2, storage_pb2
from bulkhead.bus.errors import BusError
from bulkhead.model.evaluate import is_running
from bulkhead.model.plan.storage import NOTHING_COPIED, SOURCE_QUBE
from bulkhead.model.records import Problem, Qube
from bulkhead.model.specs import (
    ClearSpec,
    CloneVolumeSpec,
    ImportSpec,
    KernelAddSpec,
    KernelRemoveSpec,
    PoolAddSpec,
    PoolRemoveSpec,
    ResizeSpec,
    RevertSpec,
)
from services.lifecycle.core import boot
from services.lifecycle.executor import Outcome, StepContext, StepFailed
from services.lifecycle.participants import volume_message
from services.lifecycle.steps.subject import CALL_TIMEOUT_S, STORAGE_TIMEOUT_S

CLONE_TIMEOUT_S = 3600.0
RESIZE_SERVICE_TIMEOUT_S = 60


class _Once:
    """One call whose undo is nothing, because it either happened whole or not at all."""

    async def undo(self, context: StepContext) -> None:
        """The call is atomic in storage."""


def _volume(context: StepContext, name: str, volume: str) -> tuple[Qube, boot.VolumeSpec]:
    qube = context.view.qube(name)
    declared = qube.volume(volume) if qube is not None else None
    if qube is None or declared is None:
        raise StepFailed(
            Problem(
                "NOT_FOUND",
                "VOLUME_NOT_FOUND",
                f"volume {volume} of {name} is gone",
                {"qube": name, "volume": volume},
            )
        )
    spec = boot.VolumeSpec(
        boot.live_volume(context.view, qube, declared), boot.pool_of(context.view, declared)
    )
    return qube, spec


class Revert(_Once):
    async def forward(self, context: StepContext) -> Outcome:
        spec = context.operation.spec
        assert isinstance(spec, RevertSpec)
        qube, volume = _volume(context, spec.qube, spec.volume)
        await context.participants.storage.revert(
            storage_pb2.RevertRequest(
                owner=qube.uuid, volume=volume_message(volume), revision=spec.revision
            ),
            timeout=STORAGE_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome()


class Resize(_Once):
    """Storage first; a running guest sees the new size through the hypervisor."""

    async def forward(self, context: StepContext) -> Outcome:
        spec = context.operation.spec
        assert isinstance(spec, ResizeSpec)
        qube, volume = _volume(context, spec.qube, spec.volume)
        reply = await context.participants.storage.resize(
            storage_pb2.ResizeRequest(
                owner=qube.uuid, volume=volume_message(volume), size=spec.size
            ),
            timeout=STORAGE_TIMEOUT_S,
            context=context.call(),
        )
        if is_running(context.view, qube) and spec.volume in boot.FIXED_TARGETS:
            await context.participants.domains.resize_disk(
                domains_pb2.ResizeDiskRequest(
                    boot=domains_pb2.BootRef(uuid=qube.uuid, boot_id=qube.run.boot_id),
                    target=boot.FIXED_TARGETS[spec.volume],
                    size=reply.size,
                ),
                timeout=CALL_TIMEOUT_S,
                context=context.call("disk"),
            )
        return Outcome(data={"size": str(reply.size)})


class TellGuest(_Once):
    """The file system in a running guest follows its disk; the disk has its new size
    whether or not the guest does."""

    async def forward(self, context: StepContext) -> Outcome:
        spec = context.operation.spec
        assert isinstance(spec, ResizeSpec)
        qube, _ = _volume(context, spec.qube, spec.volume)
        if not is_running(context.view, qube):
            return Outcome()
        try:
            reply = await context.participants.domains.run_service(
                domains_pb2.RunServiceRequest(
                    boot=domains_pb2.BootRef(uuid=qube.uuid, boot_id=qube.run.boot_id),
                    service="qubes.ResizeDisk",
                    user="root",
                    timeout_s=RESIZE_SERVICE_TIMEOUT_S,
                    input=spec.volume.encode(),
                ),
                timeout=RESIZE_SERVICE_TIMEOUT_S + 5.0,
                context=context.call("guest"),
            )
        except BusError as error:
            raise StepFailed(_not_followed(qube, spec.volume, error.message)) from error
        if reply.exit_code:
            why = f"qubes.ResizeDisk ended with {reply.exit_code}"
            raise StepFailed(_not_followed(qube, spec.volume, why))
        return Outcome()


def _not_followed(qube: Qube, volume: str, why: str) -> Problem:
    return Problem(
        "FAILED_PRECONDITION",
        "VOLUME_REFUSED",
        f"volume {volume} of {qube.name} has its new size, but the file system in the guest "
        f"was not resized: {why}; resize it there, or restart the qube",
        {"qube": qube.name, "volume": volume},
    )


class Clear(_Once):
    async def forward(self, context: StepContext) -> Outcome:
        spec = context.operation.spec
        assert isinstance(spec, ClearSpec)
        qube, volume = _volume(context, spec.qube, spec.volume)
        await context.participants.storage.clear(
            storage_pb2.ClearRequest(owner=qube.uuid, volume=volume_message(volume)),
            timeout=STORAGE_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome()


class CloneVolume(_Once):
    async def forward(self, context: StepContext) -> Outcome:
        spec = context.operation.spec
        assert isinstance(spec, CloneVolumeSpec)
        if NOTHING_COPIED in context.operation.data:
            return Outcome()
        keeper = context.operation.data.get(SOURCE_QUBE, spec.source_qube)
        _, source = _volume(context, keeper, spec.source_volume)
        qube, target = _volume(context, spec.qube, spec.volume)
        await context.participants.storage.clone_volume(
            storage_pb2.CloneVolumeRequest(
                owner=qube.uuid, source=volume_message(source), target=volume_message(target)
            ),
            timeout=CLONE_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome()


class ImportBegin:
    """The place for the data exists; the operation then waits for its caller."""

    async def forward(self, context: StepContext) -> Outcome:
        spec = context.operation.spec
        assert isinstance(spec, ImportSpec)
        qube, volume = _volume(context, spec.qube, spec.volume)
        reply = await context.participants.storage.import_begin(
            storage_pb2.ImportBeginRequest(
                owner=qube.uuid, volume=volume_message(volume), size=spec.size
            ),
            timeout=CALL_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome(
            data={"path": reply.path, "size": str(reply.size)},
            result={"path": reply.path, "size": str(reply.size)},
            waits=True,
        )

    async def undo(self, context: StepContext) -> None:
        spec = context.operation.spec
        assert isinstance(spec, ImportSpec)
        qube, volume = _volume(context, spec.qube, spec.volume)
        await context.participants.storage.import_end(
            storage_pb2.ImportEndRequest(
                owner=qube.uuid,
                volume=volume_message(volume),
                success=False,
                import_path=context.operation.data.get("path", ""),
            ),
            timeout=STORAGE_TIMEOUT_S,
            context=context.call("discard"),
        )


class ImportEnd(_Once):
    """The data that the caller wrote becomes the volume."""

    async def forward(self, context: StepContext) -> Outcome:
        spec = context.operation.spec
        assert isinstance(spec, ImportSpec)
        qube, volume = _volume(context, spec.qube, spec.volume)
        await context.participants.storage.import_end(
            storage_pb2.ImportEndRequest(
                owner=qube.uuid,
                volume=volume_message(volume),
                success=True,
                import_path=context.operation.data.get("path", ""),
            ),
            timeout=STORAGE_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome()


class PoolSetup:
    async def forward(self, context: StepContext) -> Outcome:
        spec = context.operation.spec
        assert isinstance(spec, PoolAddSpec)
        await context.participants.storage.pool_setup(
            storage_pb2.PoolSetupRequest(pool=codec.pool_to_proto(spec.pool)),
            timeout=60.0,
            context=context.call(),
        )
        return Outcome()

    async def undo(self, context: StepContext) -> None:
        spec = context.operation.spec
        assert isinstance(spec, PoolAddSpec)
        await context.participants.storage.pool_teardown(
            storage_pb2.PoolTeardownRequest(pool=codec.pool_to_proto(spec.pool)),
            timeout=60.0,
            context=context.call("teardown"),
        )


class PoolTeardown(_Once):
    async def forward(self, context: StepContext) -> Outcome:
        spec = context.operation.spec
        assert isinstance(spec, PoolRemoveSpec)
        pool = context.view.pools.get(spec.pool)
        kept = context.operation.data.get("pool", "")
        message = storage_pb2.PoolTeardownRequest()
        if pool is not None:
            message.pool.CopyFrom(codec.pool_to_proto(pool))
        elif kept:
            data = json.loads(kept)
            message.pool.name, message.pool.driver = data["name"], data["driver"]
            message.pool.options.update(data["options"])
        else:
            return Outcome()
        await context.participants.storage.pool_teardown(
            message, timeout=60.0, context=context.call()
        )
        return Outcome()


def _kernel_pool(context: StepContext, name: str) -> str:
    """The pool named, or the one whose driver holds kernels."""
    if name:
        return name
    default = context.view.properties.get("default_pool_kernel", "")
    if default:
        return default
    for pool in context.view.pools.values():
        if pool.driver == "linux-kernel":
            return pool.name
    raise StepFailed(
        Problem("NOT_FOUND", "POOL_NOT_FOUND", "no pool with driver linux-kernel exists; add one")
    )


class KernelAdd:
    async def forward(self, context: StepContext) -> Outcome:
        spec = context.operation.spec
        assert isinstance(spec, KernelAddSpec)
        pool = context.view.pools[_kernel_pool(context, spec.pool)]
        await context.participants.storage.kernel_add(
            storage_pb2.KernelAddRequest(
                pool=codec.pool_to_proto(pool),
                name=spec.name,
                vmlinuz=spec.vmlinuz,
                initramfs=spec.initramfs,
                modules=spec.modules,
            ),
            timeout=STORAGE_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome(result={"name": spec.name})

    async def undo(self, context: StepContext) -> None:
        """kernel_add renames a complete directory into place, or leaves nothing."""


class KernelRemove(_Once):
    async def forward(self, context: StepContext) -> Outcome:
        spec = context.operation.spec
        assert isinstance(spec, KernelRemoveSpec)
        pool = context.view.pools[_kernel_pool(context, spec.pool)]
        await context.participants.storage.kernel_remove(
            storage_pb2.KernelRemoveRequest(pool=codec.pool_to_proto(pool), name=spec.name),
            timeout=CALL_TIMEOUT_S,
            context=context.call(),
        )
        return Outcome()
