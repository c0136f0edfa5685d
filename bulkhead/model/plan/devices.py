"""Device assignments and the list of denied interfaces.

Owns the guards of both. Must not know what is attached (lifecycle) nor how an argument
is parsed (grammar). Invariant: a qube has at most one assignment of the same class,
backend, port and identity.
"""

from __future__ import annotations

from dataclasses import replace

from bulkhead.model import events
from bulkhead.model.grammar import check_interfaces, parse_bool, shown
from bulkhead.model.plan.base import Draft, need_qube
from bulkhead.model.plan.properties import store_property
from bulkhead.model.properties import LOCAL_VM, find_row
from bulkhead.model.records import Assignment, Qube
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import (
    AllowDevices,
    AssignDevice,
    DenyDevices,
    SetAssignment,
    UnassignDevice,
)
from bulkhead.model.view import View

MODES = ("required", "auto-attach", "ask-to-attach")
PATTERN = 7  # characters of one interface pattern
_OLD_IDENTITY = "identity"


def assign(draft: Draft, command: AssignDevice) -> None:
    """Add an assignment."""
    view, device = draft.view, command.device
    qube = frontend(view, command.qube)
    _check_mode(device.mode)
    check_backend(view, device)
    _check_storable(device)
    if find(qube, device) is not None:
        raise Refusal(
            "DEVICE_ALREADY_ASSIGNED",
            f"Device {identity(device)} is assigned to '{qube.name}' already",
            qube=qube.name,
            device=identity(device),
        )
    draft.emit(*events.device_assign(qube, device))
    draft.put(replace(qube, devices=(*qube.devices, device)))


def unassign(draft: Draft, command: UnassignDevice) -> None:
    """Drop an assignment; class, backend, port and identity must all be the same."""
    qube = frontend(draft.view, command.qube)
    kept = find(qube, command.device)
    if kept is None:
        raise Refusal(
            "DEVICE_NOT_ASSIGNED",
            f"Device {identity(command.device)} is not assigned to '{qube.name}'",
            qube=qube.name,
            device=identity(command.device),
        )
    draft.put(replace(qube, devices=tuple(d for d in qube.devices if d is not kept)))
    draft.emit(events.device_unassign(qube, kept))


def set_assignment(draft: Draft, command: SetAssignment) -> None:
    """Change the mode of an assignment; the same mode again makes no event."""
    _check_mode(command.mode)
    qube = frontend(draft.view, command.qube)
    kept = find(qube, command.device)
    if kept is None:
        raise Refusal(
            "INVALID_VALUE",
            f"Device {identity(command.device)} is not assigned to '{qube.name}'",
            qube=qube.name,
            device=identity(command.device),
        )
    if kept.mode == command.mode:
        return
    changed = replace(kept, mode=command.mode)
    devices = tuple(changed if d is kept else d for d in qube.devices)
    draft.put(replace(qube, devices=devices))
    draft.emit(*events.device_assignment_changed(qube, changed))


def deny(draft: Draft, command: DenyDevices) -> None:
    """Add interface patterns to the denied list; the property's events come in any case."""
    qube, patterns = _denied_request(draft.view, command.qube, command.patterns)
    _store_denied(draft, qube, _denied(qube) | set(patterns))


def allow(draft: Draft, command: AllowDevices) -> None:
    """Take patterns off the denied list; those that are not on it are ignored."""
    qube, patterns = _denied_request(draft.view, command.qube, command.patterns)
    _store_denied(draft, qube, set() if command.all else _denied(qube) - set(patterns))


def _denied_request(
    view: View, name: str, untrusted_patterns: tuple[str, ...]
) -> tuple[Qube, tuple[str, ...]]:
    qube = need_qube(view, name)
    if qube.klass not in LOCAL_VM:
        raise Refusal("QUBE_ERROR", f"'{name}' is remote and has no devices", qube=name)
    patterns = check_interfaces("".join(untrusted_patterns))
    if len(set(patterns)) != len(patterns):
        raise Refusal("PROTOCOL", "A device interface is named twice")
    return qube, patterns


def _denied(qube: Qube) -> set[str]:
    text = qube.properties.get("devices_denied", "")
    return {text[at : at + PATTERN] for at in range(0, len(text), PATTERN)}


def _store_denied(draft: Draft, qube: Qube, patterns: set[str]) -> None:
    row = find_row(qube.klass, "devices_denied")
    store_property(draft, qube, row, "".join(sorted(patterns)))


# ---- shared with attaching


def frontend(view: View, name: str) -> Qube:
    """The qube that uses the device; Refusal QUBE_NOT_FOUND, QUBE_ERROR.

    dom0 may hold assignments as any local qube; it never boots, so they have no effect.
    """
    qube = need_qube(view, name)
    if qube.klass not in LOCAL_VM:
        raise Refusal("QUBE_ERROR", f"'{name}' cannot be given devices", qube=name)
    return qube


def check_backend(view: View, device: Assignment) -> Qube | None:
    """The qube that offers the device, None for any; Refusal QUBE_NOT_FOUND, INVALID_DEVICE.

    A remote qube offers nothing. As in 4.4 that is said where one certain device of it is
    named; what leaves the device open is merely never there.
    """
    if device.backend == "*":
        return None
    backend = need_qube(view, device.backend)
    if backend.klass not in LOCAL_VM and "*" not in (device.port, device.identity):
        raise Refusal(
            "INVALID_DEVICE", f"'{backend.name}' is remote and offers no devices", qube=backend.name
        )
    return backend


def _check_storable(device: Assignment) -> None:
    # Read back, an option of this name would be the device's identity (the older format).
    if _OLD_IDENTITY in device.options:
        raise Refusal("INVALID_DEVICE", f"'{_OLD_IDENTITY}' is no option: it belongs in device_id")


def checked_options(device: Assignment) -> dict[str, str]:
    """The options in their stored form: a block device's read-only is "yes" or "no".

    Refusal INVALID_VALUE for an option that the device class does not know. Assigning
    checks nothing, as in 4.4: options are looked at when the device is used.
    """
    if device.devclass != "block":
        return dict(device.options)
    checked = {}
    for name, value in device.options.items():
        read_only = parse_bool(value) if name == "read-only" else None
        good = (
            (name == "frontend-dev" and value.startswith(("xvd", "sd")) and value.isalnum())
            or read_only is not None
            or (name == "devtype" and value in ("disk", "cdrom"))
        )
        if not good:
            raise Refusal(
                "INVALID_VALUE",
                f"Invalid option of a block device: {shown(name)}={shown(value)}",
                option=shown(name),
                value=shown(value),
            )
        checked[name] = value if read_only is None else ("yes" if read_only else "no")
    return checked


def find(qube: Qube, device: Assignment) -> Assignment | None:
    """The assignment of the very same class, backend, port and identity."""
    for kept in qube.devices:
        if (kept.devclass, kept.backend, kept.port, kept.identity) == (
            device.devclass,
            device.backend,
            device.port,
            device.identity,
        ):
            return kept
    return None


def identity(device: Assignment) -> str:
    """backend:port:identity, as in events."""
    return f"{device.backend}:{device.port}:{device.identity}"


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise Refusal(
            "INVALID_ASSIGNMENT_MODE",
            f"Invalid assignment mode '{shown(mode)}': use {', '.join(MODES)}",
            mode=shown(mode),
        )
