"""What an operation is about: its qube, its boot, and whether it is still wanted.

Owns the reading of these from a step's context, and how long one call of a step may take.
Must not call anybody. Invariant: the boot id is the operation's own, whatever the record
says by now.
"""

from __future__ import annotations

from bulkhead.api import domains_pb2
from bulkhead.model.records import Problem, Qube
from services.lifecycle.executor import StepContext, StepFailed

CALL_TIMEOUT_S = 30.0
STORAGE_TIMEOUT_S = 120.0


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
