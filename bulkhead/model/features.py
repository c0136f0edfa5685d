"""Features: look-ups along template and netvm chains, name and value rules, guest keys.

Owns what a feature's name means to the core. Must not know who may set one over which
call, nor events. Invariant: a look-up stops at the first qube where the feature is
present, even with an empty value.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from bulkhead.model.properties import (
    ADMIN,
    DISPOSABLE_TEMPLATES,
    REMOTE,
    TEMPLATE,
    TEMPLATE_BASED,
    has_property,
)
from bulkhead.model.records import ADMINVM_UUID, Qube
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View

LOOKUPS: tuple[str, ...] = ("plain", "template", "netvm", "adminvm", "template+adminvm")

# Written by the system alone; Set and Remove over the Admin API are denied to everyone.
PROTECTED = frozenset(
    {
        "deferred-netvm-original",
        "preload-dispvm",
        "preload-dispvm-completed",
        "preload-dispvm-in-progress",
    }
)


# ---- chains


def template_of(view: View, qube: Qube) -> Qube | None:
    """The qube's template, or None; a missing one counts as none."""
    if qube.klass not in TEMPLATE_BASED:
        return None
    name = qube.properties.get("template")
    return view.qube(name) if name else None


def template_chain(view: View, qube: Qube) -> Iterator[Qube]:
    """The template, its template and so on; ends at a repetition."""
    seen = {qube.uuid}
    current = template_of(view, qube)
    while current is not None and current.uuid not in seen:
        seen.add(current.uuid)
        yield current
        current = template_of(view, current)


def netvm_name(view: View, qube: Qube) -> str | None:
    """Name of the qube's netvm, set or default, or None."""
    name = qube.properties.get("netvm")
    if name is None:
        if qube.klass == TEMPLATE or not has_property(qube.klass, "netvm"):
            return None
        name = view.properties.get("default_netvm")
    return name or None


def netvm_of(view: View, qube: Qube) -> Qube | None:
    """The qube's netvm, set or default, or None; a missing one counts as none."""
    name = netvm_name(view, qube)
    return view.qube(name) if name is not None else None


def netvm_chain(view: View, qube: Qube) -> Iterator[Qube]:
    """The netvm, its netvm and so on; ends at a repetition."""
    seen = {qube.uuid}
    current = netvm_of(view, qube)
    while current is not None and current.uuid not in seen:
        seen.add(current.uuid)
        yield current
        current = netvm_of(view, current)


# ---- look-up


def feature(view: View, qube: Qube, name: str, how: str = "plain") -> str | None:
    """Value of a feature, None where it is not set; how is one of LOOKUPS."""
    value = qube.features.get(name)
    if value is not None or how == "plain":
        return value
    if how in ("template", "template+adminvm"):
        for other in template_chain(view, qube):
            value = other.features.get(name)
            if value is not None:
                return value
        if how == "template":
            return None
    elif how == "netvm":
        for other in netvm_chain(view, qube):
            value = other.features.get(name)
            if value is not None:
                return value
        return None
    elif how != "adminvm":
        raise ValueError(f"no such look-up: {how}")
    admin = view.by_uuid_any(ADMINVM_UUID)
    return admin.features.get(name) if admin is not None else None


def truthy(view: View, qube: Qube, name: str, how: str = "plain", *, default: bool = False) -> bool:
    """True when the feature is found and not empty; default where it is not set."""
    value = feature(view, qube, name, how)
    return default if value is None else bool(value)


# ---- rules of particular names, checked before the value is stored

_SERVICE_LIMIT = 48
_CONFIG_LIMIT = 52
_PERSIST_LIMIT = 54
_APP_DISPVM = "app-dispvm."
_PERSIST_VALUE = re.compile(r"(?:(?:file|dir):[^:/\s]+:[^:/\s]+:0*[0-7]{1,4}:)?/[^\0]*\Z")
_PRELOAD_CLASSES = DISPOSABLE_TEMPLATES | {ADMIN}
_PRELOAD_RPCS = ("qubes.WaitForRunningSystem", "qubes.WaitForSession")
_INTEGER = re.compile(r"[0-9]{1,9}\Z")
# What reads as a number of seconds; not a number and infinity are none.
_FLOAT = re.compile(
    r"\s*[+-]?(?:[0-9]{1,9}\.?[0-9]{0,9}|\.[0-9]{1,9})(?:[eE][+-]?[0-9]{1,2})?\s*\Z"
)


def check_feature(view: View, qube: Qube, name: str, value: str) -> None:
    """Refuse a value that the feature's name does not allow; name and value are well formed.

    What a name means depends on the qube's class: a remote qube's features are exported
    nowhere, and preloading is a matter of disposable templates and of dom0. Refusal
    INVALID_VALUE.
    """
    if qube.klass == REMOTE:
        return
    prefix, dot, rest = name.partition(".")
    if dot and prefix == "service":
        if not rest or "/" in rest or rest in (".", ".."):
            raise _refusal(qube, name, f"'{rest}' cannot be a service's name")
        if not rest.startswith(_APP_DISPVM) and len(rest.encode()) > _SERVICE_LIMIT:
            raise _refusal(qube, name, f"a service's name has at most {_SERVICE_LIMIT} bytes")
    elif dot and prefix == "vm-config":
        if not rest or len(rest.encode()) > _CONFIG_LIMIT:
            raise _refusal(qube, name, f"the name needs 1 to {_CONFIG_LIMIT} bytes")
        if not (rest[0].isascii() and rest[0].isalpha()):
            raise _refusal(qube, name, "the name must start with a letter")
    elif dot and prefix == "custom-persist":
        if not 1 <= len(rest.encode()) <= _PERSIST_LIMIT:
            raise _refusal(qube, name, f"the name needs 1 to {_PERSIST_LIMIT} bytes")
        if not _PERSIST_VALUE.match(value):
            raise _refusal(
                qube, name, "the value must be an absolute path or TYPE:OWNER:GROUP:MODE:/PATH"
            )
    elif name == "preload-dispvm-max":
        _check_preload_max(view, qube, value)
    elif name == "preload-dispvm-threshold" and qube.klass == ADMIN:
        if value and not _INTEGER.match(value):
            raise _refusal(qube, name, "the value must be a whole number of MiB, not negative")
    elif (
        name == "preload-dispvm-delay"
        and qube.klass in _PRELOAD_CLASSES
        and value
        and not _FLOAT.match(value)
    ):
        raise _refusal(qube, name, "the value must be a number of seconds")


def _check_preload_max(view: View, qube: Qube, value: str) -> None:
    name = "preload-dispvm-max"
    template: Qube | None = qube if qube.klass in DISPOSABLE_TEMPLATES else None
    if qube.klass == ADMIN and qube.features.get(name) != value:
        # dom0's number counts for the system's default disposable template; without one
        # there is nothing yet that it could be wrong for.
        default = view.properties.get("default_dispvm")
        template = view.qube(default) if default else None
    if template is None:
        return
    if not truthy(view, template, "qrexec", "template"):
        raise _refusal(qube, name, f"preloading needs the feature qrexec on {template.name}")
    for rpc in _PRELOAD_RPCS:
        if not truthy(view, template, f"supported-rpc.{rpc}", "template"):
            raise _refusal(qube, name, f"preloading needs the service {rpc} in {template.name}")
    if value and not _INTEGER.match(value):
        raise _refusal(qube, name, "the value must be a whole number, not negative")


def _refusal(qube: Qube, name: str, problem: str) -> Refusal:
    return Refusal(
        "INVALID_VALUE",
        f"Invalid feature '{name}' on qube '{qube.name}': {problem}",
        feature=name,
        qube=qube.name,
    )


# ---- what a guest sees of them


@dataclass(frozen=True, slots=True)
class GuestKey:
    """One key of the guest's database; value None = remove it."""

    path: str
    value: str | None


def guest_keys_of(name: str, value: str | None) -> tuple[GuestKey, ...]:
    """The keys that a feature is exported as; value None = the feature was removed.

    Names that could not be stored today (from an older file) are left out.
    """
    prefix, dot, rest = name.partition(".")
    if not dot or not rest:
        return ()
    if prefix == "service":
        keys = []
        if len(rest.encode()) <= _SERVICE_LIMIT and "/" not in rest and rest not in (".", ".."):
            text = None if value is None else ("1" if value else "0")
            keys.append(GuestKey(f"/qubes-service/{rest}", text))
        if rest.startswith(_APP_DISPVM) and len(rest) > len(_APP_DISPVM):
            app = rest.removeprefix(_APP_DISPVM)
            digest = hashlib.sha256(app.encode()).digest()
            name64 = base64.urlsafe_b64encode(digest).decode().rstrip("=")
            keys.append(GuestKey(f"/hash-app-dispvm/{name64}", app if value else None))
        return tuple(keys)
    if prefix == "vm-config" and len(rest.encode()) <= _CONFIG_LIMIT and rest[0].isalpha():
        return (GuestKey(f"/vm-config/{rest}", value),)
    persists = prefix == "custom-persist" and len(rest.encode()) <= _PERSIST_LIMIT
    if persists and (value is None or _PERSIST_VALUE.match(value)):
        return (GuestKey(f"/persist/{rest}", value),)
    return ()


def exported_keys(qube: Qube, *, balanced: bool) -> dict[str, str]:
    """All guest keys that come from the qube's own features, in their order.

    balanced: the qube's maxmem is not 0, so the guest reports its memory.
    """
    keys: dict[str, str] = {}
    for name, value in qube.features.items():
        for key in guest_keys_of(name, value):
            if key.value is not None:
                keys[key.path] = key.value
    keys["/qubes-service/meminfo-writer"] = "1" if balanced else "0"
    return keys


def is_exported(name: str) -> bool:
    """True when setting the feature on a running qube must reach the guest."""
    return name.startswith(("service.", "vm-config.", "custom-persist."))
