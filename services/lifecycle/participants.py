"""The services that lifecycle works with, as typed clients, and its messages to them.

Owns the conversion of core's specs into protobuf messages. Must not decide anything.
Invariant: every call carries the operation, the step, the epoch and the source, so that
participants can tag, de-duplicate and refuse a stale executor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import Message

from bulkhead import codec
from bulkhead.api import domains_pb2, storage_pb2
from clients.bus import (
    DomainsClient,
    FirewallClient,
    HostdClient,
    RegistryClient,
    StorageClient,
)
from services.lifecycle.core.boot import BlockDevice, Domain, VolumeSpec

_M = TypeVar("_M", bound=Message)


@dataclass(frozen=True, slots=True)
class Participants:
    """One typed client each; hostd is None where it does not run (no root)."""

    registry: RegistryClient
    storage: StorageClient
    domains: DomainsClient
    firewall: FirewallClient
    hostd: HostdClient | None


def fill(message: _M, value: Any) -> _M:
    """Copy a dataclass with the same field names into a message, nested ones too."""
    fields = message.DESCRIPTOR.fields_by_name
    for field in dataclasses.fields(value):
        if field.name not in fields:
            raise TypeError(f"{message.DESCRIPTOR.full_name} has no field {field.name}")
        content = getattr(value, field.name)
        target = getattr(message, field.name)
        if content is None:
            continue
        if dataclasses.is_dataclass(content):
            target.SetInParent()
            fill(target, content)
        elif isinstance(content, tuple | list):
            for item in content:
                if dataclasses.is_dataclass(item):
                    fill(target.add(), item)
                else:
                    target.append(item)
        else:
            setattr(message, field.name, content)
    return message


def domain_message(domain: Domain) -> domains_pb2.DomainSpec:
    """The message of a domain spec."""
    return fill(domains_pb2.DomainSpec(), domain)


def volume_message(spec: VolumeSpec) -> storage_pb2.VolumeSpec:
    """The message of a volume spec."""
    return storage_pb2.VolumeSpec(
        declared=codec.volume_to_proto(spec.declared), pool=codec.pool_to_proto(spec.pool)
    )


def volume_messages(specs: Iterable[VolumeSpec]) -> list[storage_pb2.VolumeSpec]:
    """Messages of several volume specs, in order."""
    return [volume_message(spec) for spec in specs]


def block_device(message: storage_pb2.BlockDevice) -> BlockDevice:
    """What storage handed out, as core's value."""
    return BlockDevice(
        name=message.name,
        path=message.path,
        rw=message.rw,
        devtype=message.devtype or "disk",
        format=message.format or "raw",
        block=message.block,
    )
