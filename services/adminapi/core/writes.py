"""Changing calls as one command for the registry or one operation for lifecycle.

Owns what a call's argument and payload ask for. Must not know the bus, nor whether the
registry will agree. Invariant: a function here is pure; it returns exactly one command
or operation, or None where there is nothing to do and the answer is OK.
"""

from __future__ import annotations

from collections.abc import Callable

from bulkhead.model import specs
from bulkhead.model.evaluate import power_state
from bulkhead.model.grammar import (
    check_bool,
    check_feature_name,
    check_feature_value,
    check_label_color,
    check_label_name,
    check_notes,
    check_number,
    check_revision,
    check_tag,
    shown,
)
from bulkhead.model.properties import find_row
from bulkhead.model.records import REVISIONS_LIMIT, Assignment, Phase, Pool, Qube
from bulkhead.model.refusal import Refusal
from services.adminapi.core import devices
from services.adminapi.core.checks import Checked
from services.adminapi.core.exceptions import WireRefusal
from services.adminapi.core.payloads import (
    ascii_text,
    parse_create,
    parse_denied,
    parse_kernel,
    parse_shutdown,
)
from services.adminapi.core.reads import ReadContext, find_pool, find_volume, has_notes

Wanted = specs.Command | specs.OperationSpec | None
Write = Callable[[ReadContext, Checked], Wanted]
WRITES: dict[str, Write] = {}

_KEEP_ALL = -1  # revisions_to_keep that turns snapshots off
_TEMPLATED = ("AppVM", "DispVM")


def _write(name: str) -> Callable[[Write], Write]:
    def register(function: Write) -> Write:
        if name in WRITES:
            raise KeyError(f"write {name} is registered twice")
        WRITES[name] = function
        return function

    return register


# ---- properties, features, tags, labels, notes


def _property_text(untrusted_payload: bytes) -> str:
    return ascii_text(untrusted_payload, reason="INVALID_VALUE")


@_write("property_set")
def property_set(_context: ReadContext, request: Checked) -> Wanted:
    """Set a property; the registry parses the value."""
    find_row(request.dest.klass, request.arg)
    text = _property_text(request.untrusted_payload)
    return specs.SetProperty(request.dest.name, request.arg, text)


@_write("property_reset")
def property_reset(_context: ReadContext, request: Checked) -> Wanted:
    """Back to the default."""
    find_row(request.dest.klass, request.arg)
    return specs.ResetProperty(request.dest.name, request.arg)


@_write("system_property_set")
def system_property_set(_context: ReadContext, request: Checked) -> Wanted:
    """Set a property of the system."""
    find_row(None, request.arg)
    return specs.SetProperty("", request.arg, _property_text(request.untrusted_payload))


@_write("system_property_reset")
def system_property_reset(_context: ReadContext, request: Checked) -> Wanted:
    """A property of the system back to its default."""
    find_row(None, request.arg)
    return specs.ResetProperty("", request.arg)


@_write("feature_set")
def feature_set(_context: ReadContext, request: Checked) -> Wanted:
    """Set a feature; INVALID_FEATURE."""
    name = check_feature_name(request.arg)
    value = check_feature_value(ascii_text(request.untrusted_payload))
    return specs.SetFeature(request.dest.name, name, value)


@_write("feature_remove")
def feature_remove(_context: ReadContext, request: Checked) -> Wanted:
    """Remove a feature."""
    return specs.RemoveFeature(request.dest.name, request.arg)


@_write("tag_set")
def tag_set(_context: ReadContext, request: Checked) -> Wanted:
    """Add a tag; INVALID_TAG."""
    return specs.SetTag(request.dest.name, check_tag(request.arg))


@_write("tag_remove")
def tag_remove(_context: ReadContext, request: Checked) -> Wanted:
    """Remove a tag; INVALID_TAG."""
    return specs.RemoveTag(request.dest.name, check_tag(request.arg))


@_write("label_create")
def label_create(_context: ReadContext, request: Checked) -> Wanted:
    """A new label; INVALID_LABEL, INVALID_LABEL_COLOR."""
    name = check_label_name(request.arg, new=True)
    text = ascii_text(request.untrusted_payload, reason="INVALID_LABEL_COLOR")
    return specs.CreateLabel(name, check_label_color(text))


@_write("label_remove")
def label_remove(_context: ReadContext, request: Checked) -> Wanted:
    """Remove a custom label; INVALID_LABEL."""
    return specs.RemoveLabel(check_label_name(request.arg))


@_write("notes_set")
def notes_set(_context: ReadContext, request: Checked) -> Wanted:
    """Replace the notes; an empty payload removes them."""
    has_notes(request.dest)
    return specs.SetNotes(request.dest.name, check_notes(request.untrusted_payload))


# ---- power


@_write("start")
def start(context: ReadContext, request: Checked) -> Wanted:
    """Start, or nothing where the qube is in any state but Halted."""
    qube = request.dest
    if qube.klass in ("AdminVM", "RemoteVM"):
        raise Refusal("QUBE_NOT_HALTED", f"{qube.name} always runs", qube=qube.name)
    if qube.run.phase is Phase.UP and power_state(context.view, qube) != "Halted":
        return None
    return specs.StartSpec(qube.name)


def _no_power(qube: Qube) -> None:
    if qube.klass in ("AdminVM", "RemoteVM"):
        raise Refusal("QUBE_ERROR", f"{qube.name} has no power control here", qube=qube.name)


@_write("shutdown")
def shutdown(_context: ReadContext, request: Checked) -> Wanted:
    """Ask to power off; argument words force and wait."""
    force, wait = parse_shutdown(request.arg)
    _no_power(request.dest)
    return specs.ShutdownSpec(request.dest.name, force, wait)


@_write("kill")
def kill(_context: ReadContext, request: Checked) -> Wanted:
    """Power off at once."""
    _no_power(request.dest)
    return specs.KillSpec(request.dest.name, request.dest.run.boot_id)


@_write("pause")
def pause(_context: ReadContext, request: Checked) -> Wanted:
    """Pause."""
    _no_power(request.dest)
    return specs.PauseSpec(request.dest.name)


@_write("unpause")
def unpause(_context: ReadContext, request: Checked) -> Wanted:
    """Undo a pause."""
    _no_power(request.dest)
    return specs.UnpauseSpec(request.dest.name)


@_write("suspend")
def suspend(_context: ReadContext, request: Checked) -> Wanted:
    """Suspend, or pause where the guest cannot."""
    _no_power(request.dest)
    return specs.SuspendSpec(request.dest.name)


@_write("resume")
def resume(_context: ReadContext, request: Checked) -> Wanted:
    """Wake up from suspend or pause."""
    _no_power(request.dest)
    return specs.ResumeSpec(request.dest.name)


# ---- create and remove


def _create(request: Checked, *, pools_allowed: bool) -> Wanted:
    klass = request.call.param
    text = parse_create(request.untrusted_payload, pools_allowed=pools_allowed)
    if request.arg and klass not in _TEMPLATED:
        raise Refusal("PROTOCOL", f"{klass} takes no template")
    if klass == "AdminVM":
        raise WireRefusal("CREATE_REFUSED", "there is one AdminVM and no other can be made")
    return specs.CreateSpec(
        name=text.name,
        klass=klass,
        label=text.label,
        template=request.arg,
        template_given=bool(request.arg),
        pool=text.pool,
        pools=text.pools,
    )


@_write("create")
def create(_context: ReadContext, request: Checked) -> Wanted:
    """A new qube; argument = template."""
    return _create(request, pools_allowed=False)


@_write("create_in_pool")
def create_in_pool(_context: ReadContext, request: Checked) -> Wanted:
    """A new qube with a choice of pools."""
    return _create(request, pools_allowed=True)


@_write("clone")
def clone(_context: ReadContext, request: Checked) -> Wanted:
    """A copy of the destination, `name=N [class=C] [pool=P | pool:VOLUME=P ...]`."""
    text = parse_create(request.untrusted_payload, pools_allowed=True, clone=True)
    return specs.CloneSpec(request.dest.name, text.name, text.klass, text.pool, text.pools)


@_write("remove")
def remove(_context: ReadContext, request: Checked) -> Wanted:
    """Remove a halted qube with its data."""
    qube = request.dest
    if qube.klass == "AdminVM":
        raise Refusal("QUBE_IN_USE", f"{qube.name} cannot be removed", qube=qube.name)
    return specs.RemoveSpec(qube.name)


# ---- volumes and pools


@_write("volume_revert")
def volume_revert(_context: ReadContext, request: Checked) -> Wanted:
    """Back to a revision."""
    volume = find_volume(request.dest, request.arg)
    revision = check_revision(ascii_text(request.untrusted_payload))
    if not revision:  # to storage that is the newest one, which nobody has asked for
        raise Refusal("REVISION_NOT_FOUND", f"volume {volume.name} has no revision without a name")
    return specs.RevertSpec(request.dest.name, volume.name, revision)


@_write("volume_resize")
def volume_resize(_context: ReadContext, request: Checked) -> Wanted:
    """A new size in bytes."""
    volume = find_volume(request.dest, request.arg)
    size = check_number(ascii_text(request.untrusted_payload).strip())
    return specs.ResizeSpec(request.dest.name, volume.name, size)


@_write("volume_clear")
def volume_clear(_context: ReadContext, request: Checked) -> Wanted:
    """Empty data of the same size."""
    return specs.ClearSpec(request.dest.name, find_volume(request.dest, request.arg).name)


@_write("volume_set_revisions_to_keep")
def volume_set_revisions_to_keep(_context: ReadContext, request: Checked) -> Wanted:
    """How many revisions stay; -1 = no snapshots."""
    volume = find_volume(request.dest, request.arg)
    text = ascii_text(request.untrusted_payload)
    number = check_number(text, minimum=-(10**19))
    if number < _KEEP_ALL:
        raise Refusal("INVALID_VALUE", "revisions_to_keep is -1 or more", value=shown(text))
    return specs.SetVolume(request.dest.name, volume.name, revisions_to_keep=_int32(number))


@_write("volume_set_rw")
def volume_set_rw(_context: ReadContext, request: Checked) -> Wanted:
    """Whether the guest may write."""
    volume = find_volume(request.dest, request.arg)
    value = check_bool(ascii_text(request.untrusted_payload))
    return specs.SetVolume(request.dest.name, volume.name, rw=value)


@_write("volume_set_ephemeral")
def volume_set_ephemeral(_context: ReadContext, request: Checked) -> Wanted:
    """Whether the data are encrypted with a key that dies with the qube's boot."""
    volume = find_volume(request.dest, request.arg)
    value = check_bool(ascii_text(request.untrusted_payload))
    return specs.SetVolume(request.dest.name, volume.name, ephemeral=value)


@_write("pool_remove")
def pool_remove(context: ReadContext, request: Checked) -> Wanted:
    """Forget a pool without users."""
    return specs.PoolRemoveSpec(find_pool(context.view, request.arg).name)


@_write("pool_set_revisions_to_keep")
def pool_set_revisions_to_keep(context: ReadContext, request: Checked) -> Wanted:
    """Default for new volumes of the pool; PROTOCOL below -1."""
    pool = find_pool(context.view, request.arg)
    number = check_number(ascii_text(request.untrusted_payload), minimum=_KEEP_ALL)
    return specs.SetPool(pool.name, revisions_to_keep=_int32(number))


@_write("pool_set_ephemeral_volatile")
def pool_set_ephemeral_volatile(context: ReadContext, request: Checked) -> Wanted:
    """Whether volatile volumes of the pool are ephemeral."""
    pool = find_pool(context.view, request.arg)
    value = check_bool(ascii_text(request.untrusted_payload))
    return specs.SetPool(pool.name, ephemeral_volatile=value)


def _int32(number: int) -> int:
    if number > REVISIONS_LIMIT:
        raise Refusal("INVALID_VALUE", "the number is too large", value=str(number))
    return number


@_write("kernel_add")
def kernel_add(context: ReadContext, request: Checked) -> Wanted:
    """Install a kernel from files of this host; dom0 only."""
    _dom0_only(request)
    files = parse_kernel(request.untrusted_payload)
    pool = files.get("pool", "") or _kernel_pool(context).name
    return specs.KernelAddSpec(
        _kernel_name(request.arg),
        files["vmlinuz"],
        files.get("initramfs", ""),
        files.get("modules", ""),
        find_pool(context.view, pool).name,
    )


@_write("kernel_remove")
def kernel_remove(context: ReadContext, request: Checked) -> Wanted:
    """Remove an installed kernel that nothing uses; dom0 only."""
    _dom0_only(request)
    name = _kernel_name(request.arg)
    fact = context.view.kernel(name)
    if fact is None:
        raise Refusal("KERNEL_NOT_INSTALLED", f"kernel {name} is not installed", kernel=name)
    return specs.KernelRemoveSpec(name, fact.pool)


def _dom0_only(request: Checked) -> None:
    if request.restricted:
        raise WireRefusal("CALL_DENIED", "files of this host are named by dom0 only")


def _kernel_name(untrusted_name: str) -> str:
    name = check_label_name(untrusted_name)  # the same characters: letters, digits, _ . -
    if name.startswith("."):
        raise Refusal("PROTOCOL", "a kernel's name does not start with a dot")
    return name


def _kernel_pool(context: ReadContext) -> Pool:
    name = context.view.properties.get("default_pool_kernel", "")
    pool = context.view.pools.get(name)
    if pool is None:
        pool = next((p for p in context.view.pools.values() if p.driver == "linux-kernel"), None)
    if pool is None:
        raise Refusal("POOL_NOT_FOUND", "there is no pool of kernels")
    return pool


# ---- devices


def _identity(context: ReadContext, request: Checked) -> Assignment:
    return devices.parse_argument(context.view, request.call.param, request.arg)


@_write("device_assign")
def device_assign(context: ReadContext, request: Checked) -> Wanted:
    """Assign a device to the destination."""
    identity = _identity(context, request)
    device = devices.parse_assignment(identity, request.dest, request.untrusted_payload)
    return specs.AssignDevice(request.dest.name, device)


@_write("device_unassign")
def device_unassign(context: ReadContext, request: Checked) -> Wanted:
    """Take an assignment back; it must be the very same."""
    return specs.UnassignDevice(request.dest.name, _identity(context, request))


@_write("device_set_assignment")
def device_set_assignment(context: ReadContext, request: Checked) -> Wanted:
    """Change an assignment's mode."""
    mode = ascii_text(request.untrusted_payload)
    return specs.SetAssignment(request.dest.name, _identity(context, request), mode)


@_write("device_attach")
def device_attach(context: ReadContext, request: Checked) -> Wanted:
    """Attach a device to the running destination."""
    identity = _identity(context, request)
    device = devices.parse_assignment(identity, request.dest, request.untrusted_payload)
    return specs.AttachSpec(request.dest.name, device)


@_write("device_detach")
def device_detach(context: ReadContext, request: Checked) -> Wanted:
    """Detach a device from the running destination."""
    return specs.DetachSpec(request.dest.name, _identity(context, request))


@_write("denied_add")
def denied_add(_context: ReadContext, request: Checked) -> Wanted:
    """Deny device interfaces."""
    return specs.DenyDevices(request.dest.name, parse_denied(request.untrusted_payload))


@_write("denied_remove")
def denied_remove(_context: ReadContext, request: Checked) -> Wanted:
    """Allow device interfaces again; payload "all" = every one."""
    if request.untrusted_payload == b"all":
        return specs.AllowDevices(request.dest.name, all=True)
    return specs.AllowDevices(request.dest.name, parse_denied(request.untrusted_payload))
