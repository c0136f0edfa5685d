"""What a caller is told when storage refuses or the system fails.

Owns the way from refusals and OSErrors to bus errors. Must not know any method.
Invariant: an error of the system reaches no caller as it is, and is in the log as it was.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from bulkhead.bus.errors import BusError, from_refusal
from services.storage.core.reasons import StorageRefusal, from_os_error

_LOG = logging.getLogger("bulkhead.storage")

_S = TypeVar("_S")
_P = ParamSpec("_P")
_T = TypeVar("_T")


def answers(
    method: Callable[Concatenate[_S, _P], Awaitable[_T]],
) -> Callable[Concatenate[_S, _P], Coroutine[Any, Any, _T]]:
    """Turn refusals and the system's errors into bus errors."""

    @functools.wraps(method)
    async def answering(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return await method(self, *args, **kwargs)
        except StorageRefusal as refusal:
            raise bus_error(refusal) from refusal
        except OSError as error:
            _LOG.exception("%s failed", getattr(method, "__name__", "a call"))
            raise bus_error(from_os_error(error, "a file operation")) from error

    return answering


def bus_error(refusal: StorageRefusal) -> BusError:
    """The wire form of a refusal."""
    error = from_refusal(refusal)
    if refusal.reason in ("POOL_BUSY", "EPOCH_UNKNOWN"):
        error.retry_after_ms = 200
    return error
