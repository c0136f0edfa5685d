"""CREATE, CLONE and REMOVE: the record that comes or goes, and who may.

Owns what a new record holds and the guards of a removal. Must not know storage.
Invariant: a hidden record reserves its name, qid, dispid and volume ids; a creation that
fails leaves nothing and was never announced.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace

from bulkhead.model import events
from bulkhead.model.defaults import class_volumes
from bulkhead.model.evaluate import evaluate, is_preload, template_for_dispvms
from bulkhead.model.grammar import check_label_name, check_qube_name, shown
from bulkhead.model.plan.base import Draft, need_qube
from bulkhead.model.plan.features import (
    DISP_CREATED_BY,
    PRELOAD_LIST,
    leave_list,
    preload_maximum,
)
from bulkhead.model.plan.marks import add_tag, owner_tag, set_feature
from bulkhead.model.plan.properties import (
    DEFERRED_NETVM,
    qube_is_forgotten,
    tagged_properties,
)
from bulkhead.model.plan.tags import CREATED_BY, add_created_by
from bulkhead.model.plan.volumes import (
    inherited_volume,
    need_halted,
    need_pool,
    new_volumes,
    volumes_of_template,
)
from bulkhead.model.properties import (
    ADMIN,
    APP,
    CLASSES,
    DISP,
    QUBES_VM,
    STANDALONE,
    SYSTEM_ROWS,
    TEMPLATE,
    TEMPLATE_BASED,
    find_row,
    has_property,
)
from bulkhead.model.records import (
    ADMINVM_NAME,
    Operation,
    OperationState,
    Qube,
    RecordState,
    Volume,
    WireEvent,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.setters import parse_property
from bulkhead.model.specs import CloneSpec, CreateSpec, RemoveSpec
from bulkhead.model.view import REFERENCE_PROPERTIES, View

_QID_LIMIT = 10000  # first number that no new qube gets
DISPID_LIMIT = 10000
_DISPID_TRIES = 100
# Copied neither to a clone nor to a disposable: it would make the copy irremovable.
_NEVER_COPIED = frozenset({"installed_by_rpm"})
_PRELOAD = "preload-dispvm"


def _no_random(limit: int) -> int:
    raise RuntimeError(f"this begin was given no source of numbers below {limit}")


@dataclass(frozen=True, slots=True)
class Fresh:
    """What a begin needs from outside: new ids, and a random number below a limit.

    recent_dispids: numbers that were given up not long ago.
    """

    operation_id: str
    boot_id: str = ""
    new_uuid: str = ""
    random: Callable[[int], int] = _no_random
    recent_dispids: Container[int] = ()


# ---- numbers


def free_qid(view: View) -> int:
    """The lowest free qid; Refusal LIMIT_REACHED."""
    for qid in range(1, _QID_LIMIT):
        if view.by_qid(qid) is None:
            return qid
    raise Refusal("LIMIT_REACHED", "No free qube number is left; remove a qube first")


def free_dispid(view: View, fresh: Fresh, *, named: bool) -> int:
    """A random free dispid; not named: disp<dispid> must be free too. LIMIT_REACHED."""
    for _ in range(_DISPID_TRIES):
        dispid = fresh.random(DISPID_LIMIT)
        if view.by_dispid(dispid) is not None or dispid in fresh.recent_dispids:
            continue
        if named or view.qube_any(f"disp{dispid}") is None:
            return dispid
    raise Refusal("LIMIT_REACHED", "No free number for a disposable was found; try again")


# ---- CREATE


def begin_create(draft: Draft, operation: Operation, spec: CreateSpec, fresh: Fresh) -> Operation:
    """The hidden record. Guards in the order of the API."""
    view = draft.view
    if spec.klass not in CLASSES:
        raise Refusal("PROTOCOL", f"There is no qube class '{shown(spec.klass)}'")
    if not (spec.disposable and not spec.name):
        check_free_name(view, spec.name)
    if spec.klass == ADMIN:
        raise Refusal(
            "INVALID_PROPERTY_VALUE",
            "There is one AdminVM only, and it exists",
            property="qid",
            value="",
        )
    template = _template(draft, spec)
    label = _label(view, spec, template)
    if spec.pool and spec.pools:
        raise Refusal("PROTOCOL", "A pool for all volumes and pools for single ones exclude")
    for pool in filter(None, (spec.pool, *spec.pools.values())):
        need_pool(view, pool)  # also of a class that has no volumes to put there
    if spec.preload and template is not None:
        _check_vacancy(view, template)
    record = _new_record(draft, spec, template, label, fresh)
    volumes = new_volumes(
        view,
        record,
        template,
        pool=spec.pool,
        pools=spec.pools,
        sizes={v.name: v.size for v in volumes_of_template(template, spec.klass)},
    )
    draft.put(replace(record, volumes=volumes))
    return replace(
        operation,
        data={**operation.data, "uuid": record.uuid, "name": record.name},
    )


def check_free_name(view: View, untrusted_name: str) -> str:
    """A well-formed name that no record has, hidden ones included; INVALID_NAME, QUBE_EXISTS.

    NAME_IN_REMOVAL: it will be free soon; for those who remove it, it is free already.
    Where its removal is stuck, QUBE_EXISTS says so: nobody knows when.
    """
    name = check_qube_name(untrusted_name)
    taken = view.qube_any(name)
    if taken is not None and taken.state is RecordState.DELETING:
        for operation in view.operations_on(taken.uuid):
            if operation.state is OperationState.STUCK:
                why = operation.error.message if operation.error is not None else "unknown"
                raise Refusal(
                    "QUBE_EXISTS",
                    f"The removal of a VM named {name} is stuck: {why}",
                    qube=name,
                )
        raise Refusal("NAME_IN_REMOVAL", f"A VM named {name} is still being removed", qube=name)
    if taken is not None:
        state = " (it is being made)" if taken.state is RecordState.CREATING else ""
        raise Refusal("QUBE_EXISTS", f"A VM named {name} already exists{state}", qube=name)
    return name


def _template(draft: Draft, spec: CreateSpec) -> Qube | None:
    view = draft.view
    if spec.klass not in TEMPLATE_BASED:
        if spec.template or spec.template_given:
            raise Refusal("PROTOCOL", f"A qube of class {spec.klass} has no template")
        return None
    name: object = spec.template
    if not spec.template and not spec.template_given:
        if spec.klass == APP:
            name = evaluate(view, None, "default_template")
        elif spec.disposable:
            source = need_qube(view, draft.source)
            known = has_property(source.klass, "default_dispvm")
            name = evaluate(view, source, "default_dispvm") if known else None
        else:
            name = evaluate(view, None, "default_dispvm")
    if not name:
        what = "default_template" if spec.klass == APP else "default_dispvm"
        raise Refusal("NO_TEMPLATE", f"No template was given, and there is no {what}")
    template = need_qube(view, str(name))
    if template.quarantine:
        raise Refusal(
            "QUBE_QUARANTINED",
            f"'{template.name}' is quarantined: {template.quarantine}; repair it first",
            qube=template.name,
        )
    if spec.klass == DISP and not template_for_dispvms(template):
        raise Refusal(
            "NOT_DISPOSABLE_TEMPLATE",
            f"'{template.name}' is no disposable template; set its template_for_dispvms",
            qube=template.name,
        )
    stand_in = Qube(uuid="", name=spec.name, qid=0, klass=spec.klass)
    row = find_row(spec.klass, "template")
    parse_property(view, stand_in, row, template.name, guards=False)
    return template


def _label(view: View, spec: CreateSpec, template: Qube | None) -> str:
    if spec.disposable and not spec.label and template is not None:
        return template.properties.get("label", "red")
    name = check_label_name(spec.label, new=True)
    if view.label_by_name(name) is None:
        # By its own class: qvm-backup-restore then tries again with red.
        raise Refusal("LABEL_NOT_FOUND", f"Label does not exist: {name}", label=name)
    return name


def _check_vacancy(view: View, template: Qube) -> None:
    """A place on the template's preload list, counting those that are being made."""
    listed = template.features.get(PRELOAD_LIST, "").split()
    pending = sum(
        1
        for other in view.referrers("template", template.name)
        if other.state is RecordState.CREATING
        and any(
            isinstance(o.spec, CreateSpec) and o.spec.preload
            for o in view.operations_on(other.uuid)
        )
    )
    if len(listed) + pending >= preload_maximum(view, template):
        raise Refusal(
            "LIMIT_REACHED",
            f"'{template.name}' has all its preloaded disposables",
            qube=template.name,
        )


def _new_record(
    draft: Draft, spec: CreateSpec, template: Qube | None, label: str, fresh: Fresh
) -> Qube:
    view = draft.view
    name = spec.name
    properties: dict[str, str] = {"label": label}
    features: dict[str, str] = {}
    tags: frozenset[str] = frozenset()
    if template is not None:
        properties["template"] = template.name
    if spec.klass == DISP and template is not None:
        dispid = free_dispid(view, fresh, named=bool(name))
        name = name or f"disp{dispid}"
        properties["dispid"] = str(dispid)
        if spec.disposable:
            properties["auto_cleanup"] = "True"
        copied = copied_properties(template, DISP, without={"template"})
        properties = {**copied, **properties}
        features = copied_features(template, keep_max=False)
        tags = template.tags
    if evaluate(view, None, "check_updates_vm") is False:
        features["check-updates"] = ""
    record = Qube(
        uuid=fresh.new_uuid,
        name=name,
        qid=free_qid(view),
        klass=spec.klass,
        state=RecordState.CREATING,
        properties=properties,
        features=features,
        tags=tags,
    )
    return replace(record, tags=with_owner_tags(view, record))


def with_owner_tags(view: View, record: Qube) -> frozenset[str]:
    """The record's tags with exactly one guivm-, audiovm- and relayvm- each."""
    tags = record.tags
    for name in tagged_properties(record.klass):
        wanted = owner_tag(name, str(evaluate(view, record, name) or ""))
        tags = frozenset(t for t in tags if not t.startswith(f"{name}-"))
        if wanted:
            tags |= {wanted}
    return tags


def copied_properties(source: Qube, klass: str, *, without: Container[str] = ()) -> dict[str, str]:
    """Set properties that a copy of that class gets too."""
    copied: dict[str, str] = {}
    for name, text in source.properties.items():
        if name in without or name in _NEVER_COPIED or not has_property(klass, name):
            continue
        row = find_row(klass, name)
        if row.stored and row.clone and not row.write_once:
            copied[name] = text
    return copied


def copied_features(source: Qube, *, keep_max: bool) -> dict[str, str]:
    """Features that a copy gets: not what marks this very qube."""
    return {
        name: value
        for name, value in source.features.items()
        if name != DEFERRED_NETVM
        and (not name.startswith(_PRELOAD) or (keep_max and name == "preload-dispvm-max"))
    }


def end_create(
    draft: Draft, operation: Operation, outcome: OperationState, result: Mapping[str, str]
) -> dict[str, str]:
    """The record becomes visible with its whole burst of events, or goes without any."""
    spec = operation.spec
    assert isinstance(spec, CreateSpec)
    record = _finish_record(draft, operation, outcome, result)
    if record is None:
        return {}
    draft.emit(about(events.domain_add(record), record))
    if spec.preload:
        _mark_preload(draft, record)
        draft.emit(events.domain_create_on_disk(draft.qube(record.uuid)))
    elif spec.disposable:
        draft.emit(events.domain_create_on_disk(record))
        tag_creator(draft, record, operation.source)
        disposable_tag = owner_tag(DISP_CREATED_BY, operation.source)
        if disposable_tag:
            add_tag(draft, record, disposable_tag)
    else:
        tag_creator(draft, record, operation.source)
        draft.emit(events.domain_create_on_disk(record))
    return {"name": record.name, "uuid": record.uuid}


def _finish_record(
    draft: Draft, operation: Operation, outcome: OperationState, result: Mapping[str, str]
) -> Qube | None:
    record = draft.find(operation.subjects[0])
    if record is None or record.state is not RecordState.CREATING:
        return None
    if outcome is not OperationState.SUCCEEDED:
        draft.remove(record.uuid)
        return None
    digest = result.get("rules_digest", operation.data.get("rules_digest", ""))
    return draft.put(
        replace(record, state=RecordState.ACTIVE, rules_digest=digest or record.rules_digest)
    )


def tag_creator(draft: Draft, record: Qube, source: str) -> None:
    """Tag created-by-SOURCE, with what it causes where the source still exists."""
    tag = owner_tag(CREATED_BY, source)
    creator = draft.view.qube(source)
    if creator is not None and tag:
        add_created_by(draft, record, creator)
    elif tag:
        add_tag(draft, record, tag)


def _mark_preload(draft: Draft, record: Qube) -> None:
    set_feature(draft, record, "preload-dispvm-in-progress", "1")
    template = draft.view.qube(record.properties.get("template", ""))
    if template is not None:
        template = draft.qube(template.uuid)
        names = [*template.features.get(PRELOAD_LIST, "").split(), record.name]
        set_feature(
            draft,
            template,
            PRELOAD_LIST,
            " ".join(names),
            lambda: draft.emit(events.value_changed(record, "is_preload")),
        )
    set_feature(draft, record, "internal", "1")


def about(event: WireEvent, qube: Qube) -> WireEvent:
    """A system event with the uuid of the qube in "vm": policy judges by it."""
    return replace(event, subject_uuid=qube.uuid)


# ---- CLONE


def begin_clone(draft: Draft, operation: Operation, spec: CloneSpec, fresh: Fresh) -> Operation:
    """The hidden record with all that is copied."""
    view = draft.view
    name = check_free_name(view, spec.name)
    source = need_qube(view, spec.source)
    klass = _clone_class(source, spec.klass)
    if spec.pool and spec.pools:
        raise Refusal("PROTOCOL", "A pool for all volumes and pools for single ones exclude")
    properties = copied_properties(source, klass)
    if klass == DISP:
        properties["dispid"] = str(free_dispid(view, fresh, named=True))
    record = Qube(
        uuid=operation.subjects[0],
        name=name,
        qid=free_qid(view),
        klass=klass,
        state=RecordState.CREATING,
        properties=properties,
        features=copied_features(source, keep_max=True),
        tags=frozenset(
            t for t in source.tags if not t.startswith((f"{CREATED_BY}-", f"{DISP_CREATED_BY}-"))
        ),
        devices=source.devices,
        notes=source.notes,
    )
    record = replace(record, tags=with_owner_tags(view, record))
    volumes = _clone_volumes(view, record, source, spec)
    draft.put(replace(record, volumes=volumes))
    return replace(
        operation,
        data={**operation.data, "uuid": record.uuid, "name": name, "source_uuid": source.uuid},
    )


def _clone_class(source: Qube, wanted: str) -> str:
    klass = wanted or source.klass
    if source.quarantine:
        raise Refusal(
            "QUBE_QUARANTINED",
            f"'{source.name}' is quarantined: {source.quarantine}; repair it first",
            qube=source.name,
        )
    if source.klass == ADMIN or klass == ADMIN:
        raise Refusal("QUBE_ERROR", "dom0 cannot be cloned", qube=source.name)
    if klass not in CLASSES:
        raise Refusal("PROTOCOL", f"There is no qube class '{shown(klass)}'")
    # Whoever has an own root volume can become whatever has one.
    if klass != source.klass and not {klass, source.klass} <= {STANDALONE, TEMPLATE}:
        raise Refusal(
            "INVALID_VALUE",
            f"A qube of class {source.klass} cannot be cloned as {klass}",
            qube=source.name,
            klass=klass,
        )
    return klass


def _clone_volumes(view: View, record: Qube, source: Qube, spec: CloneSpec) -> tuple[Volume, ...]:
    parent = view.qube(record.properties.get("template", ""))
    pools = dict(spec.pools)
    # A copy stays in its original's pool unless asked otherwise.
    for own in class_volumes(record.klass):
        original = source.volume(own.name)
        if original is not None and not own.snap_on_start and not (spec.pool and own.rw):
            pools.setdefault(own.name, original.pool)
    volumes = []
    for volume in new_volumes(view, record, parent, pool=spec.pool, pools=pools):
        original = source.volume(volume.name)
        if original is not None:
            volume = replace(
                volume,
                size=original.size if not volume.snap_on_start else volume.size,
                revisions_to_keep=original.revisions_to_keep,
                rw=original.rw,
                ephemeral=original.ephemeral,
            )
        volumes.append(volume)
    known = {volume.name for volume in volumes}
    for extra in source.volumes:
        if extra.name not in known:
            volumes.append(inherited_volume(view, record, extra, pools.get(extra.name, "")))
    return tuple(volumes)


def end_clone(
    draft: Draft, operation: Operation, outcome: OperationState, result: Mapping[str, str]
) -> dict[str, str]:
    """The clone becomes visible, or goes without any event."""
    record = _finish_record(draft, operation, outcome, result)
    if record is None:
        return {}
    spec = operation.spec
    assert isinstance(spec, CloneSpec)
    draft.emit(about(events.domain_add(record), record))
    tag_creator(draft, record, operation.source)
    source = draft.view.by_uuid_any(operation.data.get("source_uuid", ""))
    if source is not None:
        draft.emit(events.domain_clone_files(record, source))
    return {"name": record.name, "uuid": record.uuid}


# ---- REMOVE


def begin_remove(draft: Draft, operation: Operation, spec: RemoveSpec, fresh: Fresh) -> Operation:
    """The record disappears from every list; from here on there is no way back."""
    del spec, fresh
    view = draft.view
    qube = draft.qube(operation.subjects[0])
    check_removable(view, qube)
    draft.emit(about(events.domain_pre_delete(qube), qube))
    check_unused(view, qube)
    if qube.klass == DISP:
        leave_list(draft, qube)
    qube_is_forgotten(draft, qube)
    draft.put(replace(qube, state=RecordState.DELETING))
    draft.emit(about(events.domain_delete(qube), qube))
    return replace(operation, data={**operation.data, "name": qube.name, "uuid": qube.uuid})


def check_removable(view: View, qube: Qube) -> None:
    """Refusals QUBE_IN_USE and QUBE_NOT_HALTED of the qube itself."""
    if qube.name == ADMINVM_NAME:
        raise Refusal("QUBE_IN_USE", "'dom0' cannot be removed", qube=qube.name)
    if qube.properties.get("installed_by_rpm") == "True":
        raise Refusal(
            "QUBE_IN_USE", f"VM installed by package manager: {qube.name}", qube=qube.name
        )
    if qube.klass in QUBES_VM:
        need_halted(view, qube, "remove it")


def check_unused(view: View, qube: Qube) -> None:
    """Refusal QUBE_IN_USE where something refers to the qube explicitly."""
    for row in SYSTEM_ROWS:
        if row.type == "qube" and evaluate(view, None, row.name) == qube.name:
            raise _in_use(qube, f"the system's {row.name}", row.name)
    for name in sorted(REFERENCE_PROPERTIES):
        for other in view.referrers(name, qube.name):
            if other.uuid == qube.uuid or _own_preload(view, other, qube):
                continue
            raise _in_use(qube, f"{name} of '{other.name}'", other.name)
    for other in view.backend_users(qube.name):
        if other.uuid != qube.uuid:
            raise Refusal(
                "QUBE_IN_USE",
                f"VM has devices assigned to other VMs: '{qube.name}', to '{other.name}'",
                qube=qube.name,
                user=other.name,
            )


def _own_preload(view: View, other: Qube, qube: Qube) -> bool:
    return (
        other.klass == DISP
        and other.properties.get("template") == qube.name
        and is_preload(view, other)
    )


def _in_use(qube: Qube, what: str, user: str) -> Refusal:
    return Refusal(
        "QUBE_IN_USE",
        f"Domain is in use: '{qube.name}' is {what}; change that first",
        qube=qube.name,
        user=user,
    )


def end_remove(
    draft: Draft, operation: Operation, outcome: OperationState, result: Mapping[str, str]
) -> dict[str, str]:
    """The record is gone."""
    del result
    record = draft.find(operation.subjects[0])
    if record is None or outcome is not OperationState.SUCCEEDED:
        return {}
    draft.remove(record.uuid)
    draft.emit(events.domain_remove_from_disk(record))
    return {}
