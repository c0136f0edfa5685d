"""Payloads of changing calls as checked values.

Owns the small languages that payloads are written in. Must not know records beyond
names. Invariant: what is returned has passed the character rules; whether it may be done
is for the registry to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bulkhead.model.grammar import (
    check_interfaces,
    check_label_name,
    check_number,
    check_pool_name,
    check_qube_name,
    shown,
)
from bulkhead.model.refusal import Refusal

_VOLUMES = frozenset({"root", "private", "volatile", "kernel"})
_SHUTDOWN_WORDS = frozenset({"force", "wait"})


def ascii_text(untrusted_payload: bytes, *, reason: str = "PROTOCOL") -> str:
    """The payload as text. Refusal with that reason where it is not ASCII."""
    try:
        return untrusted_payload.decode("ascii")
    except UnicodeDecodeError as error:
        raise Refusal(reason, "the payload is not ASCII") from error


@dataclass(frozen=True, slots=True)
class CreateText:
    """What Create* and Clone payloads say; "" = not given."""

    name: str
    label: str
    klass: str = ""
    pool: str = ""
    pools: Mapping[str, str] = field(default_factory=dict)


def parse_create(
    untrusted_payload: bytes, *, pools_allowed: bool, clone: bool = False
) -> CreateText:
    """`name=N label=L [pool=P | pool:VOLUME=P ...]`, separated by single spaces.

    clone: no label, and class= is allowed. Refusal PROTOCOL for the form, INVALID_NAME,
    INVALID_LABEL or INVALID_POOL for a word.
    """
    untrusted_text = ascii_text(untrusted_payload)
    untrusted_items: dict[str, str] = {}
    pools: dict[str, str] = {}
    known = {"name", "class" if clone else "label"}
    for untrusted_item in untrusted_text.split(" "):
        untrusted_key, equals, untrusted_value = untrusted_item.partition("=")
        if not equals:
            raise Refusal("PROTOCOL", "the payload must be key=value items and single spaces")
        if untrusted_key.startswith("pool:") and pools_allowed:
            volume = untrusted_key.removeprefix("pool:")
            if volume not in _VOLUMES:
                raise Refusal("PROTOCOL", f"there is no volume {shown(volume)} to place")
            if volume in pools:
                raise Refusal("PROTOCOL", f"the pool of {volume} is given twice")
            pools[volume] = untrusted_value
            continue
        if untrusted_key not in known and not (untrusted_key == "pool" and pools_allowed):
            raise Refusal("PROTOCOL", f"the payload has an unknown key {shown(untrusted_key)}")
        if untrusted_key in untrusted_items:
            raise Refusal("PROTOCOL", f"{untrusted_key} is given twice in the payload")
        untrusted_items[untrusted_key] = untrusted_value
    missing = ({"name"} if clone else {"name", "label"}) - untrusted_items.keys()
    if missing:
        raise Refusal("PROTOCOL", f"the payload lacks {' and '.join(sorted(missing))}")
    if "pool" in untrusted_items and pools:
        raise Refusal("PROTOCOL", "pool= and pool:VOLUME= exclude each other")
    return CreateText(
        check_qube_name(untrusted_items["name"]),
        "" if clone else check_label_name(untrusted_items["label"], new=True),
        untrusted_items.get("class", ""),
        _pool(untrusted_items["pool"]) if "pool" in untrusted_items else "",
        {volume: _pool(untrusted_pool) for volume, untrusted_pool in pools.items()},
    )


def _pool(untrusted_name: str) -> str:
    try:
        return check_pool_name(untrusted_name)
    except Refusal as error:
        # A name that no pool can have is a pool that is not there.
        raise Refusal("POOL_NOT_FOUND", error.message, **error.metadata) from error


def parse_shutdown(untrusted_arg: str) -> tuple[bool, bool]:
    """Words "force" and "wait" joined by "+", any order, as (force, wait); PROTOCOL."""
    words = untrusted_arg.split("+") if untrusted_arg else []
    unknown = [word for word in words if word not in _SHUTDOWN_WORDS]
    if unknown:
        raise Refusal("PROTOCOL", "Shutdown takes the words force and wait")
    return "force" in words, "wait" in words


@dataclass(frozen=True, slots=True)
class PoolText:
    """What a pool Add payload says."""

    name: str
    options: Mapping[str, str]


def parse_pool(untrusted_payload: bytes, driver: str, parameters: frozenset[str]) -> PoolText:
    """Lines `key=value` with name= and the driver's parameters; Refusal PROTOCOL."""
    untrusted_text = ascii_text(untrusted_payload)
    pairs: dict[str, str] = {}
    for untrusted_line in untrusted_text.splitlines():
        key, equals, value = untrusted_line.partition("=")
        if not equals:
            raise Refusal("PROTOCOL", "the payload must be lines of key=value")
        if key in pairs:
            raise Refusal("PROTOCOL", f"{shown(key)} is given twice in the payload")
        if key != "name" and key not in parameters:
            raise Refusal("PROTOCOL", f"driver {driver} has no parameter {shown(key)}")
        if not value.isprintable():
            raise Refusal("PROTOCOL", f"the value of {shown(key)} has forbidden characters")
        pairs[key] = value
    if "name" not in pairs:
        raise Refusal("PROTOCOL", "the payload lacks name")
    try:
        name = check_pool_name(pairs.pop("name"))
    except Refusal as error:
        raise Refusal("PROTOCOL", error.message) from error
    return PoolText(name, pairs)


def parse_denied(untrusted_payload: bytes) -> tuple[str, ...]:
    """Concatenated interface patterns, each once; PROTOCOL, INVALID_VALUE or
    INVALID_PROPERTY_VALUE."""
    patterns = check_interfaces(ascii_text(untrusted_payload))
    if len(set(patterns)) != len(patterns):
        raise Refusal("PROTOCOL", "a device interface is given twice")
    return patterns


def parse_kernel(untrusted_payload: bytes) -> dict[str, str]:
    """Lines `key=value` with vmlinuz= (required), initramfs=, modules=, pool=; PROTOCOL.

    The files are absolute paths on this host, to be read by storage.
    """
    pairs: dict[str, str] = {}
    for untrusted_line in ascii_text(untrusted_payload).splitlines():
        key, equals, value = untrusted_line.partition("=")
        if not equals or key not in ("vmlinuz", "initramfs", "modules", "pool") or key in pairs:
            raise Refusal("PROTOCOL", "a kernel is given as lines vmlinuz= initramfs= modules=")
        if key != "pool" and not (value.startswith("/") and value.isprintable()):
            raise Refusal("PROTOCOL", f"{key} must be an absolute path")
        pairs[key] = value
    if "vmlinuz" not in pairs:
        raise Refusal("PROTOCOL", "the payload lacks vmlinuz")
    return pairs


def parse_import_size(untrusted_payload: bytes) -> int:
    """The size of ImportWithSize in bytes, one line; PROTOCOL."""
    return check_number(ascii_text(untrusted_payload).strip())
