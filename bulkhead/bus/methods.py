"""Every bus method, read from the descriptors: who may call it, and how it is treated.

Owns the one table that dispatch, clients, the access matrix and the attack tests read.
Must not know handlers or sockets. Invariant: a method whose options are missing or
unreadable stops the program at import; nothing is callable by default.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from bulkhead.api import (
    control_pb2,
    dispvm_pb2,
    domains_pb2,
    extension_pb2,
    firewall_pb2,
    hostd_pb2,
    lifecycle_pb2,
    options_pb2,
    registry_pb2,
    storage_pb2,
)

_FILES: tuple[FileDescriptor, ...] = (
    control_pb2.DESCRIPTOR,
    registry_pb2.DESCRIPTOR,
    lifecycle_pb2.DESCRIPTOR,
    storage_pb2.DESCRIPTOR,
    domains_pb2.DESCRIPTOR,
    firewall_pb2.DESCRIPTOR,
    dispvm_pb2.DESCRIPTOR,
    hostd_pb2.DESCRIPTOR,
    extension_pb2.DESCRIPTOR,
)
OPERATOR = "operator"
CONTROL_SERVICE = "bulkhead.api.Control"
# Processes that may appear as a caller in the options.
CALLERS = frozenset(
    {
        OPERATOR, "registry", "hostd", "storage", "domains", "firewall", "lifecycle", "dispvm",
        "adminapi", "backup",
    }
)  # fmt: skip


class Lane(enum.Enum):
    """Which ROUTER socket a method is served on."""

    WORK = "work"
    CONTROL = "control"

    # Members are singletons; Enum's own hash is Python code and is asked twice per message.
    __hash__ = object.__hash__


class Effect(enum.Enum):
    """What a method may change."""

    READ = "read"
    WRITE = "write"
    EXECUTE = "execute"


@dataclass(frozen=True, slots=True)
class Method:
    """One rpc: full_name "bulkhead.api.Storage.Ensure", handler "ensure"."""

    full_name: str
    service: str
    name: str
    handler: str
    request_type: type[Message]
    reply_type: type[Message]
    callers: frozenset[str]
    idempotent: bool
    time_limit_ns: int
    lane: Lane
    effect: Effect


def snake(name: str) -> str:
    """CreatePaused -> create_paused."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _message_class(descriptor: Any) -> type[Message]:
    # The only spelling that every runtime from 4.21 on has.
    found = descriptor._concrete_class
    assert isinstance(found, type) and issubclass(found, Message)
    return found


def _read(service: ServiceDescriptor) -> list[Method]:
    found = []
    for row in service.methods:
        options = row.GetOptions()
        # The stubs of generated extensions are too coarse for a checker.
        extension: Any = options_pb2.access
        if not options.HasExtension(extension):
            raise RuntimeError(
                f"{row.full_name} has no readable access option: the protobuf runtime is older "
                "than 4.21 or the option is missing"
            )
        access: options_pb2.Access = options.Extensions[extension]
        callers = frozenset(access.callers)
        if (
            not callers
            or not callers <= CALLERS
            or not access.time_limit_ms
            or access.lane not in (options_pb2.LANE_WORK, options_pb2.LANE_CONTROL)
            or not access.effect
        ):
            raise RuntimeError(f"the access option of {row.full_name} is incomplete or unknown")
        found.append(
            Method(
                full_name=row.full_name,
                service=service.full_name,
                name=row.name,
                handler=snake(row.name),
                request_type=_message_class(row.input_type),
                reply_type=_message_class(row.output_type),
                callers=callers,
                idempotent=access.idempotent,
                time_limit_ns=access.time_limit_ms * 1_000_000,
                lane=Lane.WORK if access.lane == options_pb2.LANE_WORK else Lane.CONTROL,
                effect={
                    options_pb2.EFFECT_READ: Effect.READ,
                    options_pb2.EFFECT_WRITE: Effect.WRITE,
                    options_pb2.EFFECT_EXECUTE: Effect.EXECUTE,
                }[access.effect],
            )
        )
    return found


METHODS: Mapping[str, Method] = {
    method.full_name: method
    for file in _FILES
    for service in file.services_by_name.values()
    for method in _read(service)
}
SERVICES: tuple[str, ...] = tuple(dict.fromkeys(m.service for m in METHODS.values()))


def full_service_name(name: str) -> str:
    """ "Storage" or "bulkhead.api.Storage" -> the latter. KeyError for no service."""
    full = name if "." in name else f"bulkhead.api.{name}"
    if full not in SERVICES:
        raise KeyError(f"{name} is no bus service")
    return full


def methods_of(service: str) -> dict[str, Method]:
    """The methods of a full service name, by full method name."""
    return {name: method for name, method in METHODS.items() if method.service == service}


def stream_readers() -> frozenset[str]:
    """Who may subscribe to the registry's stream: those who may take its snapshot."""
    return METHODS["bulkhead.api.Registry.Snapshot"].callers
