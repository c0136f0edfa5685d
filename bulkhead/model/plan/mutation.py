"""One mutation command: its plan.

Owns the table command -> plan and what the audit row tells. Must not know operations.
Invariant: every command of specs.COMMANDS has one row; a refusal after an event was
announced carries the events (PlanRefused).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from bulkhead.model.grammar import check_label_color, check_label_name, check_notes
from bulkhead.model.labels import BUILTIN_LIMIT, find_label, next_index
from bulkhead.model.plan import devices, features, properties, tags, volumes
from bulkhead.model.plan.base import Draft, Plan, PlanRefused, need_qube
from bulkhead.model.properties import QUBES_VM
from bulkhead.model.records import Label, LabelPut, LabelRemoved
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import (
    AllowDevices,
    AssignDevice,
    Command,
    CreateLabel,
    DenyDevices,
    PreloadMarks,
    RemoveFeature,
    RemoveLabel,
    RemoveTag,
    ResetProperty,
    SetAssignment,
    SetFeature,
    SetNotes,
    SetPool,
    SetProperty,
    SetTag,
    SetVolume,
    UnassignDevice,
    command_field,
)
from bulkhead.model.view import View

_C = TypeVar("_C")


def plan_mutation(view: View, command: Command, source: str, *, now: float = 0.0) -> Plan:
    """The plan of a command. source: Admin API name of who asks; now: epoch seconds.

    Raises Refusal, or PlanRefused where events were announced before.
    """
    draft = Draft(view, source=source, now=now)
    draft.audit["command"] = command_field(command)
    draft.audit.update(_told(command))
    return _run(draft, _PLANS[type(command)], command)


def plan_preload(view: View, marks: PreloadMarks, source: str, *, now: float = 0.0) -> Plan:
    """The plan of dispvm's marks. Refusals NOT_YOURS, INVALID_VALUE, QUBE_NOT_FOUND."""
    draft = Draft(view, source=source, now=now)
    draft.audit["command"] = "preload"
    draft.audit["qube"] = marks.qube
    return _run(draft, features.mark_preload, marks)


def _run(draft: Draft, make: Callable[[Draft, _C], None], command: _C) -> Plan:
    try:
        make(draft, command)
    except Refusal as refusal:
        if draft.events and not isinstance(refusal, PlanRefused):
            raise PlanRefused(refusal, draft.events) from refusal
        raise
    return draft.plan()


# ---- commands without a module of their own


def _set_property(draft: Draft, command: SetProperty) -> None:
    if not command.qube:
        properties.set_system(draft, command.name, command.untrusted_value)
        return
    qube = need_qube(draft.view, command.qube)
    properties.set_property(draft, qube, command.name, command.untrusted_value)


def _reset_property(draft: Draft, command: ResetProperty) -> None:
    if not command.qube:
        properties.reset_system(draft, command.name)
        return
    properties.reset_property(draft, need_qube(draft.view, command.qube), command.name)


def _create_label(draft: Draft, command: CreateLabel) -> None:
    view = draft.view
    name = check_label_name(command.name, new=True)
    color = check_label_color(command.color)
    if view.label_by_name(name) is not None:
        raise Refusal("LABEL_IN_USE", f"Label exists already: {name}", label=name)
    draft.put_change(LabelPut(Label(next_index(view), name, color)))


def _remove_label(draft: Draft, command: RemoveLabel) -> None:
    view = draft.view
    label = find_label(view, check_label_name(command.name))
    if label.index <= BUILTIN_LIMIT:
        raise Refusal(
            "LABEL_BUILTIN",
            f"Only custom labels can be removed, not {label.name}",
            label=label.name,
        )
    user = next(view.label_users(label.name), None)
    if user is not None:
        raise Refusal(
            "LABEL_IN_USE",
            f"Label is still in use: {label.name}, by '{user.name}'",
            label=label.name,
            user=user.name,
        )
    draft.put_change(LabelRemoved(label.name))


def _set_notes(draft: Draft, command: SetNotes) -> None:
    qube = need_qube(draft.view, command.qube)
    if qube.klass not in QUBES_VM:
        raise Refusal("QUBE_ERROR", f"'{qube.name}' has no notes", qube=qube.name)
    draft.put(replace(qube, notes=check_notes(command.notes.encode("utf-8", "surrogateescape"))))


_PLANS: Mapping[type[Any], Callable[[Draft, Any], None]] = {
    SetProperty: _set_property,
    ResetProperty: _reset_property,
    SetFeature: features.command_set,
    RemoveFeature: features.command_remove,
    SetTag: tags.command_set,
    RemoveTag: tags.command_remove,
    CreateLabel: _create_label,
    RemoveLabel: _remove_label,
    SetNotes: _set_notes,
    SetVolume: volumes.set_volume,
    SetPool: volumes.set_pool,
    AssignDevice: devices.assign,
    UnassignDevice: devices.unassign,
    SetAssignment: devices.set_assignment,
    DenyDevices: devices.deny,
    AllowDevices: devices.allow,
}


# Names whose values no audit row may hold.
_SECRET = re.compile(r"passw|passphrase|secret|token|credential|private[-_.]?key", re.IGNORECASE)


def _told(command: Command) -> dict[str, str]:
    """What the audit row says of a command: no content of notes, no secret."""
    match command:
        case SetNotes(qube, notes):
            digest = hashlib.sha256(notes.encode("utf-8", "surrogateescape")).hexdigest()
            return {"qube": qube, "notes": f"sha256:{digest}"}
        case AssignDevice(qube, device) | UnassignDevice(qube, device):
            return {"qube": qube, "device": devices.identity(device)}
        case SetAssignment(qube, device, mode):
            return {"qube": qube, "device": devices.identity(device), "mode": mode}
        case SetProperty(name=name) | SetFeature(name=name) if _SECRET.search(name):
            return {"qube": command.qube, "name": name, "value": "(left out)"}
        case _:
            return {
                name.removeprefix("untrusted_"): str(value)
                for name in type(command).__dataclass_fields__
                if (value := getattr(command, name)) is not None
            }
