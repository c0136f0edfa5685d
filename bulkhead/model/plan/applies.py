"""What an APPLY left undone in a running qube.

Owns how that is known later: by an APPLY of the same boot that did not succeed, were it
only for want of a place in the queue. Must not know what an APPLY does. Invariant: while
a boot lasts, one such operation of it is found, so that the next APPLY brings all and not
only its own parts.
"""

from __future__ import annotations

from collections.abc import Iterable

from bulkhead.model.plan.base import problem_of
from bulkhead.model.records import Operation, OperationState
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import ApplySpec

_UNDONE = (OperationState.FAILED, OperationState.CANCELLED)


def boot_left_undone(operation: Operation) -> str:
    """The boot in which it left something undone, "" where it did not."""
    spec = operation.spec
    undone = operation.state in _UNDONE and isinstance(spec, ApplySpec)
    return spec.boot_id if undone and isinstance(spec, ApplySpec) else ""


def left_undone(operations: Iterable[Operation], boot_id: str) -> bool:
    """One of them left something undone in that boot."""
    return any(boot_left_undone(operation) == boot_id for operation in operations)


def not_begun(
    spec: ApplySpec, refusal: Refusal, *, operation_id: str, source: str, now: float
) -> Operation:
    """The APPLY that was refused, for the record."""
    return Operation(
        id=operation_id,
        kind="APPLY",
        spec=spec,
        subjects=(spec.uuid,),
        state=OperationState.FAILED,
        error=problem_of(refusal),
        source=source,
        created=now,
        finished=now,
    )
