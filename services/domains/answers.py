"""What a caller is told when core refuses or the hypervisor fails.

Owns the reason of every kind of failure of a hypervisor. Must not know any method.
Invariant: every Failure has a reason, so that no exception of ours or of the hypervisor
leaves a bus method as something else than a bus error.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from bulkhead.bus.errors import from_refusal

from .adapters.hypervisor import Failure, HypervisorError
from .core.reasons import DomainsError

_REASON_OF: dict[Failure, str] = {
    Failure.NOT_FOUND: "DOMAIN_NOT_FOUND",
    Failure.EXISTS: "DOMAIN_EXISTS",
    Failure.WRONG_STATE: "DOMAIN_WRONG_STATE",
    Failure.INVALID: "INVALID_DOMAIN_SPEC",
    Failure.UNSUPPORTED: "HYPERVISOR_UNSUPPORTED",
    Failure.UNAVAILABLE: "HYPERVISOR_UNAVAILABLE",
    Failure.TIMEOUT: "HYPERVISOR_TIMEOUT",
    Failure.ABANDONED: "BOOT_ABANDONED",
    Failure.BUSY: "DOMAIN_BUSY",
    Failure.NO_MEMORY: "NOT_ENOUGH_MEMORY",
    Failure.FAILED: "HYPERVISOR_REFUSED",
}

_S = TypeVar("_S")
_P = ParamSpec("_P")
_R = TypeVar("_R")


def answers(
    method: Callable[Concatenate[_S, _P], Awaitable[_R]],
) -> Callable[Concatenate[_S, _P], Coroutine[Any, Any, _R]]:
    """Turn refusals of core and failures of the hypervisor into bus errors."""

    async def answering(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return await method(self, *args, **kwargs)
        except DomainsError as error:
            raise from_refusal(error) from error
        except HypervisorError as error:
            raise from_refusal(
                DomainsError(
                    _REASON_OF[error.failure],
                    f"The hypervisor: {error.message}.",
                    detail=error.message,
                )
            ) from error

    answering.__name__ = getattr(method, "__name__", "answering")
    answering.__doc__ = method.__doc__
    return answering
