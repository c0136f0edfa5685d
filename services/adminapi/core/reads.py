"""Replies of every call that is answered from the replica alone.

Owns the text of those replies. Must not know the bus, sockets or clocks. Invariant: a
read changes nothing and costs no more than what it lists; one function per handler
name of the call table, all in READS.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from bulkhead.model.evaluate import (
    NO_DEFAULT,
    default_of,
    evaluate,
    get_all_lines,
    get_reply,
    is_default,
    power_state,
    to_wire,
)
from bulkhead.model.features import feature
from bulkhead.model.grammar import check_backup_profile, check_label_name, check_tag
from bulkhead.model.labels import find_label, icon
from bulkhead.model.properties import find_row, has_property, rows_for
from bulkhead.model.records import ADMINVM_NAME, Label, Operation, Pool, Qube, Volume
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View
from services.adminapi.core import devices
from services.adminapi.core.calls import DEVICE_CLASSES, QUBE_CLASSES
from services.adminapi.core.checks import Checked
from services.adminapi.core.exceptions import WireRefusal
from services.adminapi.core.permission import Policy, may_list
from services.adminapi.core.policy_filter import shown_operation


@dataclass(frozen=True, slots=True)
class ReadContext:
    """What a read may look at."""

    view: View
    policy: Policy


Read = Callable[[ReadContext, Checked], str]
READS: dict[str, Read] = {}


def _read(name: str) -> Callable[[Read], Read]:
    def register(function: Read) -> Read:
        if name in READS:
            raise KeyError(f"read {name} is registered twice")
        READS[name] = function
        return function

    return register


def _lines(words: Iterable[str]) -> str:
    return "".join(f"{word}\n" for word in words)


# ---- listing


@_read("vmclass_list")
def vmclass_list(_context: ReadContext, _request: Checked) -> str:
    """Every qube class, one per line."""
    return _lines(QUBE_CLASSES)


@_read("deviceclass_list")
def deviceclass_list(_context: ReadContext, _request: Checked) -> str:
    """Every device class, one per line."""
    return _lines(DEVICE_CLASSES)


def listed(context: ReadContext, request: Checked) -> Iterator[Qube]:
    """Qubes that a listing call on this destination shows to this source."""
    whole = request.dest.name == ADMINVM_NAME
    qubes: Iterable[Qube] = context.view.qubes() if whole else (request.dest,)
    if not request.restricted:
        yield from qubes
        return
    for qube in qubes:
        if may_list(context.policy, request.source, qube):
            yield qube


@_read("vm_list")
def vm_list(context: ReadContext, request: Checked) -> str:
    """One line per qube: name, class, state, uuid."""
    view = context.view
    return "".join(
        f"{q.name} class={q.klass} state={power_state(view, q)} uuid={q.uuid}\n"
        for q in listed(context, request)
    )


def qube_record(view: View, qube: Qube) -> str:
    """A qube as a line of JSON: everything that a table of qubes shows.

    Keys: name class state uuid properties{name: {value type default}} features tags.
    """
    properties = {}
    for row in rows_for(qube.klass):
        properties[row.name] = {
            "value": to_wire(row, evaluate(view, qube, row.name)),
            "type": row.wire_type,
            "default": is_default(view, qube, row.name),
        }
    record = {
        "name": qube.name,
        "class": qube.klass,
        "state": power_state(view, qube),
        "uuid": qube.uuid,
        "properties": properties,
        "features": dict(qube.features),
        "tags": sorted(qube.tags),
    }
    return json.dumps(record, separators=(",", ":")) + "\n"


# ---- properties


def _get(view: View, holder: Qube | None, name: str) -> str:
    return get_reply(view, holder, find_row(holder.klass if holder is not None else None, name))


def _get_default(view: View, holder: Qube | None, name: str) -> str:
    row = find_row(holder.klass if holder is not None else None, name)
    value = default_of(view, holder, name)
    if value is NO_DEFAULT:
        return ""
    return f"type={row.wire_type} {to_wire(row, value)}"


@_read("property_list")
def property_list(_context: ReadContext, request: Checked) -> str:
    """Names of the destination's properties by load stage, then name."""
    return _lines(row.name for row in rows_for(request.dest.klass))


@_read("property_get")
def property_get(context: ReadContext, request: Checked) -> str:
    """`default=BOOL type=T VALUE`; NO_SUCH_PROPERTY."""
    return _get(context.view, request.dest, request.arg)


@_read("property_get_all")
def property_get_all(context: ReadContext, request: Checked) -> str:
    """One line per property: name and the reply of Get, escaped."""
    return get_all_lines(context.view, request.dest)


@_read("property_get_default")
def property_get_default(context: ReadContext, request: Checked) -> str:
    """`type=T VALUE`, empty where there is no default; NO_SUCH_PROPERTY."""
    return _get_default(context.view, request.dest, request.arg)


@_read("property_help")
def property_help(_context: ReadContext, request: Checked) -> str:
    """The property's help text; NO_SUCH_PROPERTY."""
    return find_row(request.dest.klass, request.arg).help


@_read("system_property_list")
def system_property_list(_context: ReadContext, _request: Checked) -> str:
    """Names of the system's properties."""
    return _lines(row.name for row in rows_for(None))


@_read("system_property_get")
def system_property_get(context: ReadContext, request: Checked) -> str:
    """As property_get, of the system."""
    return _get(context.view, None, request.arg)


@_read("system_property_get_all")
def system_property_get_all(context: ReadContext, _request: Checked) -> str:
    """As property_get_all, of the system."""
    return get_all_lines(context.view, None)


@_read("system_property_get_default")
def system_property_get_default(context: ReadContext, request: Checked) -> str:
    """As property_get_default, of the system."""
    return _get_default(context.view, None, request.arg)


@_read("system_property_help")
def system_property_help(_context: ReadContext, request: Checked) -> str:
    """As property_help, of the system."""
    return find_row(None, request.arg).help


# ---- features and tags


@_read("feature_list")
def feature_list(_context: ReadContext, request: Checked) -> str:
    """Names of the features that are set, in the order of setting."""
    return _lines(request.dest.features)


def _feature(context: ReadContext, request: Checked, how: str) -> str:
    value = feature(context.view, request.dest, request.arg, how)
    if value is None:
        raise Refusal(
            "FEATURE_NOT_FOUND",
            f"{request.dest.name} has no feature {request.arg}",
            qube=request.dest.name,
            feature=request.arg,
        )
    return value


@_read("feature_get")
def feature_get(context: ReadContext, request: Checked) -> str:
    """The feature's own value; FEATURE_NOT_FOUND."""
    return _feature(context, request, "plain")


@_read("feature_check_template")
def feature_check_template(context: ReadContext, request: Checked) -> str:
    """Own value, else along the templates; FEATURE_NOT_FOUND."""
    return _feature(context, request, "template")


@_read("feature_check_netvm")
def feature_check_netvm(context: ReadContext, request: Checked) -> str:
    """Own value, else along the netvms; FEATURE_NOT_FOUND."""
    return _feature(context, request, "netvm")


@_read("feature_check_adminvm")
def feature_check_adminvm(context: ReadContext, request: Checked) -> str:
    """Own value, else dom0's; FEATURE_NOT_FOUND."""
    return _feature(context, request, "adminvm")


@_read("feature_check_template_adminvm")
def feature_check_template_adminvm(context: ReadContext, request: Checked) -> str:
    """Own value, else along the templates, else dom0's; FEATURE_NOT_FOUND."""
    return _feature(context, request, "template+adminvm")


@_read("tag_list")
def tag_list(_context: ReadContext, request: Checked) -> str:
    """The tags, sorted."""
    return _lines(sorted(request.dest.tags))


@_read("tag_get")
def tag_get(_context: ReadContext, request: Checked) -> str:
    """ "1" or "0"; INVALID_TAG."""
    check_tag(request.arg)
    return "1" if request.arg in request.dest.tags else "0"


# ---- labels


def _label(view: View, untrusted_name: str) -> Label:
    """A label by name or index; INVALID_LABEL or LABEL_NOT_FOUND."""
    check_label_name(untrusted_name)
    return find_label(view, untrusted_name)


@_read("label_list")
def label_list(context: ReadContext, _request: Checked) -> str:
    """Label names by index."""
    return _lines(context.view.labels[i].name for i in sorted(context.view.labels))


@_read("label_get")
def label_get(context: ReadContext, request: Checked) -> str:
    """The colour, 0xrrggbb."""
    return _label(context.view, request.arg).color


@_read("label_index")
def label_index(context: ReadContext, request: Checked) -> str:
    """The index, decimal."""
    return str(_label(context.view, request.arg).index)


# ---- volumes and pools


def find_volume(qube: Qube, name: str) -> Volume:
    """A volume of a qube; unknown names are answered as permission denied."""
    volume = qube.volume(name)
    if volume is None:
        raise WireRefusal("NAME_NOT_KNOWN", f"{qube.name} has no volume {name}", qube=qube.name)
    return volume


def find_pool(view: View, name: str) -> Pool:
    """A pool by name; unknown names are answered as permission denied."""
    pool = view.pools.get(name)
    if pool is None:
        raise WireRefusal("NAME_NOT_KNOWN", f"there is no pool {name}", pool=name)
    return pool


@_read("volume_list")
def volume_list(_context: ReadContext, request: Checked) -> str:
    """Names of the qube's volumes."""
    return _lines(volume.name for volume in request.dest.volumes)


@_read("pool_list")
def pool_list(context: ReadContext, _request: Checked) -> str:
    """Pool names in the order of creation."""
    return _lines(context.view.pools)


@_read("pool_volume_list")
def pool_volume_list(context: ReadContext, request: Checked) -> str:
    """Ids of the pool's volumes: of a kernel pool its kernels, else what qubes have there."""
    view = context.view
    pool = find_pool(view, request.arg)
    if pool.driver == "linux-kernel":
        return _lines(sorted(k.name for k in view.kernels() if k.pool == pool.name))
    vids = {
        volume.vid
        for qube in view.pool_users(pool.name)
        if not qube.hidden
        and (not request.confined or may_list(context.policy, request.source, qube))
        for volume in qube.volumes
        if volume.pool == pool.name and volume.vid
    }
    return _lines(sorted(vids))


# ---- devices


@_read("device_available")
def device_available(context: ReadContext, request: Checked) -> str:
    """What the destination offers now."""

    def shown(frontend: Qube) -> bool:
        return not request.confined or may_list(context.policy, request.source, frontend)

    return devices.available(context.view, request.dest, request.call.param, request.arg, shown)


@_read("device_assigned")
def device_assigned(_context: ReadContext, request: Checked) -> str:
    """What is assigned to the destination."""
    only = devices.split_port_argument(request.arg)
    return devices.assigned(request.dest, request.call.param, only)


@_read("device_attached")
def device_attached(context: ReadContext, request: Checked) -> str:
    """What is attached to the destination now."""
    only = devices.split_port_argument(request.arg)
    return devices.attached(context.view, request.dest, request.call.param, only)


def denied_patterns(qube: Qube) -> list[str]:
    """The 7-character interface patterns of the denied list, sorted."""
    text = qube.properties.get("devices_denied", "")
    return sorted(text[i : i + 7] for i in range(0, len(text), 7))


@_read("denied_list")
def denied_list(_context: ReadContext, request: Checked) -> str:
    """The denied patterns joined by newlines, without a final one."""
    find_row(request.dest.klass, "devices_denied")
    return "\n".join(denied_patterns(request.dest))


# ---- the rest


def has_notes(qube: Qube) -> None:
    """Refusal QUBE_ERROR for a qube that lives elsewhere."""
    if qube.klass == "RemoteVM":
        raise Refusal("QUBE_ERROR", f"{qube.name} has no notes here", qube=qube.name)


@_read("notes_get")
def notes_get(_context: ReadContext, request: Checked) -> str:
    """The notes, as they were set."""
    has_notes(request.dest)
    return request.dest.notes


@_read("get_system_info")
def get_system_info(context: ReadContext, _request: Checked) -> str:
    """What the qrexec policy daemon knows of every qube, as one JSON object."""
    view = context.view
    domains: dict[str, dict[str, object]] = {}
    for qube in view.qubes():
        label = view.label_by_name(qube.properties.get("label", "black"))
        domains[qube.name] = {
            "internal": qube.features.get("internal"),
            "tags": sorted(qube.tags),
            "type": qube.klass,
            "template_for_dispvms": _bool(view, qube, "template_for_dispvms"),
            "default_dispvm": _name(view, qube, "default_dispvm"),
            "icon": icon(label) if label is not None else "appvm-black",
            "label": label.color if label is not None else "0x000000",
            "guivm": _name(view, qube, "guivm"),
            "relayvm": _name(view, qube, "relayvm"),
            "transport_rpc": _name(view, qube, "transport_rpc"),
            "power_state": power_state(view, qube),
            "uuid": qube.uuid,
        }
    return json.dumps({"domains": domains})


def _bool(view: View, qube: Qube, name: str) -> bool:
    return has_property(qube.klass, name) and bool(evaluate(view, qube, name))


def _name(view: View, qube: Qube, name: str) -> str | None:
    if not has_property(qube.klass, name):
        return None
    value = evaluate(view, qube, name)
    return str(value) if value else None


@_read("kernel_list")
def kernel_list(context: ReadContext, _request: Checked) -> str:
    """One JSON object per installed kernel and line."""
    return "".join(
        json.dumps(
            {
                "name": k.name,
                "pool": k.pool,
                "vmlinuz": k.has_vmlinuz,
                "initramfs": k.has_initramfs,
                "modules": k.has_modules,
            }
        )
        + "\n"
        for k in sorted(context.view.kernels(), key=lambda k: k.name)
    )


def operation_record(view: View, operation: Operation) -> dict[str, object]:
    """An operation as the JSON object that bulkhead.op.* show."""
    names = []
    for uuid in operation.subjects:
        qube = view.by_uuid(uuid)
        names.append(qube.name if qube is not None else uuid)
    record: dict[str, object] = {
        "id": operation.id,
        "kind": operation.kind,
        "state": operation.state.value,
        "qubes": names,
        "progress": round(operation.progress, 4),
        "text": operation.progress_text,
        "step": operation.cursor,
        "source": operation.source,
        "created": operation.created,
        "finished": operation.finished,
        "cancel_requested": operation.cancel_requested,
        "waits_for": operation.waits_for,
        "result": dict(operation.result),
    }
    if operation.error is not None:
        record["reason"] = operation.error.reason
        record["error"] = operation.error.message
    return record


def may_see_operation(request: Checked, operation: Operation) -> bool:
    """dom0 sees all; others what they asked for; a qube as destination narrows to itself."""
    if request.restricted and operation.source != request.source.name:
        return False
    return request.dest.name == ADMINVM_NAME or request.dest.uuid in operation.subjects


@_read("op_list")
def op_list(context: ReadContext, request: Checked) -> str:
    """One JSON object per operation and line, oldest first."""
    operations = [o for o in context.view.operations.values() if may_see_operation(request, o)]
    operations.sort(key=lambda o: (o.created, o.id))
    return "".join(json.dumps(_operation(context, request, o)) + "\n" for o in operations)


def _operation(context: ReadContext, request: Checked, operation: Operation) -> dict[str, object]:
    record = operation_record(context.view, operation)
    return shown_operation(context.view, context.policy, request, operation, record)


def find_operation(view: View, request: Checked) -> Operation:
    """The operation that the argument names; OPERATION_NOT_FOUND."""
    operation = view.operations.get(request.arg)
    if operation is None or not may_see_operation(request, operation):
        raise Refusal("OPERATION_NOT_FOUND", f"there is no operation {request.arg}")
    return operation


@_read("op_get")
def op_get(context: ReadContext, request: Checked) -> str:
    """One operation as a JSON object."""
    return json.dumps(_operation(context, request, find_operation(context.view, request)))


# ---- backup: profiles are the business of a service that is not there yet, and a
# profile that nobody can have made is one that is not found


def _no_profile(_context: ReadContext, request: Checked) -> str:
    check_backup_profile(request.arg)
    raise WireRefusal(
        "BACKUP_PROFILE_NOT_FOUND", f"there is no backup profile {request.arg}", profile=request.arg
    )


@_read("backup_info")
def backup_info(context: ReadContext, request: Checked) -> str:
    """Refused: no profile exists."""
    return _no_profile(context, request)


@_read("backup_execute")
def backup_execute(context: ReadContext, request: Checked) -> str:
    """Refused: no profile exists."""
    return _no_profile(context, request)


@_read("backup_cancel")
def backup_cancel(_context: ReadContext, request: Checked) -> str:
    """Refused: no backup runs."""
    check_backup_profile(request.arg)
    raise WireRefusal(
        "BACKUP_NOT_RUNNING", f"no backup of profile {request.arg} runs", profile=request.arg
    )
