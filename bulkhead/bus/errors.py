"""How a bus call fails: canonical code, reason, sentence, metadata.

Owns the reasons of the bus itself and the conversion between exceptions and the wire's
Status. Must not know sockets or any service's reasons. Invariant: what reaches the wire
never holds a class name or a traceback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bulkhead.api import envelope_pb2
from bulkhead.model.refusal import Reason, TypedRefusal, table

# Canonical code name -> number, as in envelope.proto without "CODE_" and without OK.
CODES: Mapping[str, int] = {
    name.removeprefix("CODE_"): number
    for name, number in envelope_pb2.Code.items()
    if name != "CODE_OK"
}
_CODE_NAMES: Mapping[int, str] = {number: name for name, number in CODES.items()}

_ROWS: tuple[Reason, ...] = (
    Reason("NO_SUCH_METHOD", "UNIMPLEMENTED", "this service does not serve that method"),
    Reason("NOT_OFFERED", "UNIMPLEMENTED", "the service has nothing to do for that method"),
    Reason("CALLER_NOT_ALLOWED", "PERMISSION_DENIED", "the options do not list the caller"),
    Reason("SOURCE_NOT_ALLOWED", "PERMISSION_DENIED", "the caller may not act for a qube"),
    Reason("WRONG_LANE", "INVALID_ARGUMENT", "the method belongs to the other lane"),
    Reason("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "the deadline passed before or in the work"),
    Reason("NO_REPLY", "DEADLINE_EXCEEDED", "sent, but no answer came in time"),
    Reason("NOT_CONNECTED", "UNAVAILABLE", "never sent: the service does not run or refuses us"),
    Reason("CONNECTION_LOST", "UNKNOWN", "sent, not repeatable, and the connection broke"),
    Reason("REQUEST_ID_REUSED", "INVALID_ARGUMENT", "the id was used for another method"),
    Reason("MALFORMED_BODY", "INVALID_ARGUMENT", "the body is no message of the method's type"),
    Reason("MALFORMED_REPLY", "INTERNAL", "the server's answer is no message of its type"),
    Reason("BUSY", "UNAVAILABLE", "the bounded queue is full"),
    Reason("DRAINING", "UNAVAILABLE", "the service is about to stop"),
    Reason("STARTING", "UNAVAILABLE", "the service is not ready yet"),
    Reason("TOO_MANY_CALLS", "RESOURCE_EXHAUSTED", "this process has too many calls waiting"),
    Reason("TOO_LARGE", "RESOURCE_EXHAUSTED", "a message above the size limit"),
    Reason("CANCELLED", "CANCELLED", "its caller cancelled the call"),
    Reason("UNTRUSTED_SERVER", "PERMISSION_DENIED", "the socket's directory is not the service's"),
    Reason("INTERNAL", "INTERNAL", "an unexpected error; the service's log says more"),
    Reason("REPLICA_BEHIND", "UNAVAILABLE", "the replica did not reach that point in time"),
)

# The reasons of the bus; a service adds its own in services/<service>/core/reasons.py.
REASONS: Mapping[str, Reason] = table(_ROWS)


class BusError(Exception):
    """A call failed.

    code: canonical code name ("NOT_FOUND"); reason: UPPER_SNAKE; message: one sentence
    for a person; metadata: every dynamic part as text; retry_after_ms: 0 = no advice;
    cause: errors that led to this one; log_ref: where the server's log says more.
    """

    def __init__(
        self,
        code: str,
        reason: str,
        message: str,
        *,
        retry_after_ms: int = 0,
        cause: Sequence[BusError] = (),
        log_ref: str = "",
        **metadata: str,
    ) -> None:
        if code not in CODES:
            raise KeyError(f"{code} is no canonical code")
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata: dict[str, str] = metadata
        self.retry_after_ms = retry_after_ms
        self.cause: tuple[BusError, ...] = tuple(cause)
        self.log_ref = log_ref

    def __str__(self) -> str:
        return f"{self.code}/{self.reason}: {self.message}"

    @property
    def outcome_unknown(self) -> bool:
        """True when the request left this process and no answer came: it may have been done."""
        return self.reason in ("NO_REPLY", "CONNECTION_LOST")


def bus_error(reason: str, message: str, *, retry_after_ms: int = 0, **metadata: str) -> BusError:
    """A BusError of the bus's own table. KeyError for a reason that is not in it."""
    error = BusError(REASONS[reason].code, reason, message, retry_after_ms=retry_after_ms)
    error.metadata = metadata
    return error


def from_refusal(refusal: TypedRefusal) -> BusError:
    """The no of the pure model or of a service, as a bus error."""
    error = BusError(refusal.code, refusal.reason, refusal.message)
    error.metadata = dict(refusal.metadata)
    return error


def to_status(error: BusError) -> envelope_pb2.Status:
    """The wire form; causes are kept four levels deep."""
    return _to_status(error, 4)


def _to_status(error: BusError, depth: int) -> envelope_pb2.Status:
    return envelope_pb2.Status(
        code=envelope_pb2.Code.Name(CODES[error.code]),
        reason=error.reason,
        message=error.message,
        metadata=error.metadata,
        cause=[_to_status(c, depth - 1) for c in error.cause] if depth else (),
        retry_after_ms=error.retry_after_ms,
        log_ref=error.log_ref,
    )


def from_status(status: envelope_pb2.Status) -> BusError:
    """A received Status that is not OK; an unknown code number becomes UNKNOWN."""
    return _from_status(status, 4)


def _from_status(status: envelope_pb2.Status, depth: int) -> BusError:
    error = BusError(
        _CODE_NAMES.get(status.code, "UNKNOWN"),
        status.reason,
        status.message,
        retry_after_ms=status.retry_after_ms,
        cause=[_from_status(c, depth - 1) for c in status.cause] if depth else (),
        log_ref=status.log_ref,
    )
    error.metadata = dict(status.metadata)
    return error
