"""Setting and removing features, and what single features cause.

Owns the rules of features that change other things: meminfo-writer, boot modes, the
preload list. Must not know which guest keys a feature becomes. Invariant: a feature that
only the system manages is changed by MutatePreload and by plans, never by a command.
"""

from __future__ import annotations

from functools import partial

from bulkhead.model import events
from bulkhead.model.evaluate import template_for_dispvms
from bulkhead.model.features import PROTECTED, check_feature, is_exported
from bulkhead.model.grammar import (
    check_feature_name,
    check_feature_value,
    printable_ascii,
    shown,
)
from bulkhead.model.plan.base import Draft, need_qube
from bulkhead.model.plan.marks import (
    add_tag,
    announce_feature,
    delete_feature,
    owner_tag,
    set_feature,
    store_feature,
)
from bulkhead.model.plan.properties import (
    DEFERRED_NETVM,
    apply_deferred_netvm,
    clear_property,
    store_property,
)
from bulkhead.model.plan.tags import CREATED_BY, add_created_by
from bulkhead.model.properties import DISP, find_row, has_property
from bulkhead.model.records import Qube
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import APPLY_KEYS, PreloadMarks, RemoveFeature, SetFeature
from bulkhead.model.view import View

MEMINFO_WRITER = "service.meminfo-writer"
PRELOAD_LIST = "preload-dispvm"
PRELOAD_PROGRESS = "preload-dispvm-in-progress"
DISP_CREATED_BY = "disp-created-by"
_DIGITS_LIMIT = 9
# What dispvm may mark: nothing that anybody else relies on to be his.
PRELOAD_MARKS = PROTECTED | {"internal"}


def command_set(draft: Draft, command: SetFeature) -> None:
    """Set a feature over the Admin API."""
    qube = need_qube(draft.view, command.qube)
    name = check_feature_name(command.name)
    value = check_feature_value(command.value)
    _unprotected(qube, name)
    announce_feature(draft, qube, name, value)
    check_feature(draft.view, qube, name, value)
    store_feature(draft, qube, name, value, lambda: _caused_by_set(draft, qube, name, value))
    if is_exported(name):
        draft.live(qube, *_parts(name))


def command_remove(draft: Draft, command: RemoveFeature) -> None:
    """Remove a feature over the Admin API."""
    qube = need_qube(draft.view, command.qube)
    # An old file may hold names that could not be set today; they can be removed.
    name = command.name
    if not name or not printable_ascii(name):
        raise Refusal(
            "FEATURE_NOT_FOUND",
            f"Feature not set: {shown(name)}",
            qube=qube.name,
            feature=shown(name),
        )
    _unprotected(qube, name)
    delete_feature(draft, qube, name, lambda: _caused_by_delete(draft, qube, name))
    if is_exported(name):
        draft.live(qube, *_parts(name))


def _parts(name: str) -> tuple[str, ...]:
    """What of a running qube an exported feature is about: this one changes maxmem too."""
    return () if name == MEMINFO_WRITER else (APPLY_KEYS,)


def _unprotected(qube: Qube, name: str) -> None:
    if name in PROTECTED:
        raise Refusal(
            "FEATURE_PROTECTED",
            f"Feature {name} is managed by the system alone",
            qube=qube.name,
            feature=name,
        )


def _caused_by_set(draft: Draft, qube: Qube, name: str, value: str) -> None:
    if name == MEMINFO_WRITER and has_property(qube.klass, "maxmem"):
        row = find_row(qube.klass, "maxmem")
        if row.settable:
            if value:
                clear_property(draft, qube, row)
            else:
                store_property(draft, qube, row, "0")
            delete_feature(draft, qube, name)
    _boot_mode(draft, qube, name)


def _caused_by_delete(draft: Draft, qube: Qube, name: str) -> None:
    _boot_mode(draft, qube, name)


def _boot_mode(draft: Draft, qube: Qube, name: str) -> None:
    if name == "boot-mode.active" and has_property(qube.klass, "bootmode"):
        draft.emit(events.value_changed(qube, "bootmode"))


# ---- dispvm's marks


def mark_preload(draft: Draft, marks: PreloadMarks) -> None:
    """Set and remove the marks of preloading on a disposable or its template.

    On a disposable, removing the list takes it off its template's list in the same
    transaction, and removing in-progress gives it to the source, who becomes its creator.
    """
    view = draft.view
    qube = need_qube(view, marks.qube)
    for name in (*(name for name, _ in marks.features), *marks.features_removed):
        if name not in PRELOAD_MARKS:
            raise Refusal("NOT_YOURS", f"Feature {name} is no mark of preloading", feature=name)
    for name, value in marks.features:
        check_feature_value(value)
        if name == PRELOAD_LIST:
            _check_list(view, qube, value)
            before = _names(qube.features.get(name, ""))
            after = _names(value)
            set_feature(draft, qube, name, value, partial(_list_changed, draft, before, after))
        else:
            set_feature(draft, qube, name, value)
    for name in marks.features_removed:
        if name == DEFERRED_NETVM:
            apply_deferred_netvm(draft, qube)
            continue
        if name == PRELOAD_LIST and qube.klass == DISP:
            leave_list(draft, qube)
        current = draft.qube(qube.uuid)
        if name not in current.features:
            continue
        if name == PRELOAD_LIST:
            before = _names(current.features[name])
            delete_feature(draft, current, name, partial(_list_changed, draft, before, ()))
        else:
            delete_feature(draft, current, name)
            if name == PRELOAD_PROGRESS and qube.klass == DISP:
                _handed_out(draft, current)


def leave_list(draft: Draft, disposable: Qube) -> None:
    """Take the disposable off its template's list of preloaded ones, if it is on it."""
    template = draft.view.qube(disposable.properties.get("template", ""))
    if template is None:
        return
    template = draft.qube(template.uuid)
    before = _names(template.features.get(PRELOAD_LIST, ""))
    if disposable.name in before:
        after = tuple(name for name in before if name != disposable.name)
        changed = partial(_list_changed, draft, before, after)
        set_feature(draft, template, PRELOAD_LIST, " ".join(after), changed)


def _handed_out(draft: Draft, disposable: Qube) -> None:
    """Who asked for it has made it, as far as tags say so."""
    creator = draft.view.qube(draft.source)
    if creator is not None and owner_tag(CREATED_BY, creator.name):
        add_created_by(draft, disposable, creator)
        add_tag(draft, disposable, owner_tag(DISP_CREATED_BY, creator.name))


def _names(value: str) -> tuple[str, ...]:
    return tuple(value.split())


def _check_list(view: View, template: Qube, value: str) -> None:
    before, after = _names(template.features.get(PRELOAD_LIST, "")), _names(value)
    if not after or set(before) == set(after):
        return

    def refuse(problem: str) -> Refusal:
        return Refusal(
            "INVALID_VALUE",
            f"Invalid list of preloaded disposables of '{template.name}': {problem}",
            qube=template.name,
        )

    if not template_for_dispvms(template):
        raise refuse("it is no disposable template")
    if len(after) > max(preload_maximum(view, template), len(before)):
        raise refuse("too many")
    if len(set(after)) != len(after):
        raise refuse("one is named twice")
    for name in set(after) - set(before):
        disposable = view.qube(name)
        if disposable is None:
            raise refuse(f"'{shown(name)}' does not exist")
        if disposable.klass != DISP or disposable.properties.get("template") != template.name:
            raise refuse(f"'{name}' is not made from it")


def preload_maximum(view: View, template: Qube) -> int:
    """How many disposables of a template are to be preloaded: dom0's number where the
    template is the system's default and dom0 has one, else its own."""
    name = "preload-dispvm-max"
    value = template.features.get(name)
    if view.properties.get("default_dispvm") == template.name:
        value = view.adminvm.features.get(name, value)
    if not value or not (value.isascii() and value.isdigit()):
        return 0
    # dom0's is not checked before there is a template that it counts for.
    return int(value.lstrip("0")[:_DIGITS_LIMIT] or "0")


def _list_changed(draft: Draft, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    for name in sorted(set(before) ^ set(after)):
        disposable = draft.view.qube(name)
        if disposable is not None and has_property(disposable.klass, "is_preload"):
            draft.emit(events.value_changed(disposable, "is_preload"))
