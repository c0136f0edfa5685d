"""REVERT, RESIZE, CLEAR, CLONE_VOLUME, IMPORT, pools, kernels; ATTACH and DETACH.

Owns the guards and events of operations on data and devices. Must not know drivers.
Invariant: an operation that replaces data needs a halted qube and a volume that keeps
data; the declared size follows what storage has done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from bulkhead.model import events
from bulkhead.model.defaults import default_revisions
from bulkhead.model.devices import PLUGGABLE, UNKNOWN_INTERFACE, is_known, matching
from bulkhead.model.evaluate import evaluate, feature
from bulkhead.model.grammar import check_pool_name, check_revision, shown
from bulkhead.model.plan.base import Draft, need_qube
from bulkhead.model.plan.creation import Fresh
from bulkhead.model.plan.devices import (
    PATTERN,
    check_backend,
    checked_options,
    frontend,
    identity,
)
from bulkhead.model.plan.marks import set_feature
from bulkhead.model.plan.running import boot_of, booted
from bulkhead.model.plan.volumes import (
    KERNEL_DRIVER,
    is_kernel_volume,
    need_halted,
    need_pool,
    need_volume,
    revisions_limit,
)
from bulkhead.model.properties import STANDALONE, SYSTEM_ROWS
from bulkhead.model.records import (
    Assignment,
    DeviceFact,
    Operation,
    OperationState,
    Phase,
    PoolPut,
    PoolRemoved,
    Qube,
    Volume,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import (
    AttachSpec,
    ClearSpec,
    CloneVolumeSpec,
    DetachSpec,
    ImportSpec,
    KernelAddSpec,
    KernelRemoveSpec,
    PoolAddSpec,
    PoolRemoveSpec,
    ResizeSpec,
    RevertSpec,
)
from bulkhead.model.view import View

SIZE_LIMIT = 2**63 - 1
# In the data of a CLONE_VOLUME whose target keeps nothing: no step copies anything.
NOTHING_COPIED = "nothing_copied"
# In the data of a CLONE_VOLUME: who keeps what is copied.
SOURCE_QUBE = "source_qube"
# Booleans of a new pool; Set knows more words, and writes the first of these.
_POOL_WORDS = frozenset({"True", "1", "on", "False", "0", "off", ""})
_OPTION = "option/"  # of the disk, in the data of an operation


# ---- volumes


def _refused(qube: Qube, volume: Volume, problem: str) -> Refusal:
    return Refusal(
        "VOLUME_REFUSED",
        f"Volume {volume.name} of '{qube.name}' {problem}",
        qube=qube.name,
        volume=volume.name,
    )


def _lasting(view: View, qube: Qube, volume: Volume, what: str) -> None:
    if not volume.save_on_stop or volume.snap_on_start or is_kernel_volume(view, volume):
        raise _refused(qube, volume, f"keeps no data of its own, so it cannot be {what}")


def begin_revert(draft: Draft, operation: Operation, spec: RevertSpec, fresh: Fresh) -> Operation:
    """A lasting volume of a halted qube; the revision is storage's to know."""
    del fresh
    qube = draft.qube(operation.subjects[0])
    volume = need_volume(qube, spec.volume)
    check_revision(spec.revision)
    _lasting(draft.view, qube, volume, "reverted")
    if qube.run.phase is not Phase.HALTED:
        raise _refused(qube, volume, "is in use; shut the qube down first")
    return operation


def begin_resize(draft: Draft, operation: Operation, spec: ResizeSpec, fresh: Fresh) -> Operation:
    """A writable volume; the qube may run."""
    del fresh
    qube = draft.qube(operation.subjects[0])
    volume = need_volume(qube, spec.volume)
    if not 0 <= spec.size <= SIZE_LIMIT:
        raise Refusal(
            "INVALID_VALUE",
            f"A volume cannot have {spec.size} bytes",
            qube=qube.name,
            volume=volume.name,
        )
    if not volume.rw or is_kernel_volume(draft.view, volume):
        raise _refused(qube, volume, "is read-only and cannot be resized")
    return operation


def end_resize(
    draft: Draft, operation: Operation, outcome: OperationState, result: Mapping[str, str]
) -> None:
    """The declared size follows, also where only the guest's file system did not."""
    spec = operation.spec
    assert isinstance(spec, ResizeSpec)
    size = result.get("size") or operation.data.get("size")
    if outcome is OperationState.SUCCEEDED:
        size = size or str(spec.size)
    _declare_size(draft, operation, spec.volume, size)


def _declare_size(draft: Draft, operation: Operation, name: str, size: str | None) -> None:
    qube = draft.find(operation.subjects[0])
    volume = qube.volume(name) if qube is not None else None
    if qube is not None and volume is not None and size and size.isdigit():
        draft.put(qube.with_volume(replace(volume, size=int(size))))


def begin_clear(draft: Draft, operation: Operation, spec: ClearSpec, fresh: Fresh) -> Operation:
    """As an import of nothing at the present size."""
    del fresh
    qube = draft.qube(operation.subjects[0])
    volume = need_volume(qube, spec.volume)
    _lasting(draft.view, qube, volume, "cleared")
    need_halted(draft.view, qube, f"clear volume {volume.name}")
    draft.emit(events.volume_import_begin(qube, volume.name, volume.size))
    return operation


def begin_import(draft: Draft, operation: Operation, spec: ImportSpec, fresh: Fresh) -> Operation:
    """A lasting volume of a halted qube; the event comes when storage is ready."""
    del fresh
    qube = draft.qube(operation.subjects[0])
    volume = need_volume(qube, spec.volume)
    need_halted(draft.view, qube, f"import volume {volume.name}")
    _lasting(draft.view, qube, volume, "imported")
    if not 0 <= spec.size <= SIZE_LIMIT:
        raise Refusal("INVALID_VALUE", f"A volume cannot have {spec.size} bytes", qube=qube.name)
    return operation


def end_import(draft: Draft, operation: Operation, outcome: OperationState) -> None:
    """The post-event, where the pre-event was sent; the size that the data had."""
    spec = operation.spec
    assert isinstance(spec, ImportSpec | ClearSpec)
    qube = draft.find(operation.subjects[0])
    if qube is None:
        return
    good = outcome is OperationState.SUCCEEDED
    if isinstance(spec, ImportSpec):
        if not good and "path" not in operation.data:
            return  # storage never was ready, nothing was announced
        if good and spec.size:
            _declare_size(draft, operation, spec.volume, str(spec.size))
    draft.emit(events.volume_import_end(draft.qube(qube.uuid), spec.volume, good))


def begin_clone_volume(
    draft: Draft, operation: Operation, spec: CloneVolumeSpec, fresh: Fresh
) -> Operation:
    """A lasting volume of a halted qube becomes a copy of another one's last commit.

    A volume that starts anew each time takes nothing: clients clone every volume alike.
    """
    del fresh
    view = draft.view
    qube = draft.qube(operation.subjects[0])
    volume = need_volume(qube, spec.volume)
    source = need_qube(view, spec.source_qube)
    original = need_volume(source, spec.source_volume)
    _committed(source, original)
    kernel = is_kernel_volume(view, volume)
    takes_nothing = is_kernel_volume(view, original) if kernel else not volume.save_on_stop
    if takes_nothing:
        return replace(
            operation,
            data={**operation.data, "source_vid": original.vid, NOTHING_COPIED: "1"},
        )
    _lasting(view, qube, volume, "replaced by a copy")
    need_halted(view, qube, f"replace volume {volume.name}")
    source, original = kept_by(view, source, original)
    if is_kernel_volume(view, original) or not original.save_on_stop:
        raise _refused(source, original, "keeps no data of its own, so it cannot be copied")
    _committed(source, original)
    return replace(
        operation,
        data={
            **operation.data,
            "source_vid": original.vid,
            "source_size": str(original.size),
            SOURCE_QUBE: source.name,
        },
    )


def _committed(qube: Qube, volume: Volume) -> None:
    """Refusal VOLUME_REFUSED where the volume has no committed state to copy."""
    if volume.snapshots_disabled and qube.run.phase is not Phase.HALTED:
        raise _refused(qube, volume, "is changed without snapshots; shut the qube down first")


def kept_by(view: View, qube: Qube, volume: Volume) -> tuple[Qube, Volume]:
    """Who keeps the data that a copy of the volume takes: a snapshot that is made anew at
    each start has none of its own, so its template, or that one's."""
    for _ in range(8):  # longer chains cannot be made
        template = view.qube(qube.properties.get("template", ""))
        theirs = template.volume(volume.name) if template is not None else None
        if template is None or theirs is None or volume.save_on_stop or not volume.snap_on_start:
            break
        qube, volume = template, theirs
    return qube, volume


def end_clone_volume(
    draft: Draft, operation: Operation, outcome: OperationState, result: Mapping[str, str]
) -> None:
    """The event, the size of the copy, and the boot mode that a standalone asks for."""
    spec = operation.spec
    assert isinstance(spec, CloneVolumeSpec)
    qube = draft.find(operation.subjects[0])
    if qube is None or outcome is not OperationState.SUCCEEDED:
        return
    if NOTHING_COPIED not in operation.data:
        size = result.get("size") or operation.data.get("source_size")
        _declare_size(draft, operation, spec.volume, size)
    qube = draft.qube(qube.uuid)
    if qube.klass == STANDALONE and spec.volume == "root":
        mode = qube.features.get("boot-mode.standalone-default")
        if mode == "default" or (
            mode and feature(draft.view, qube, f"boot-mode.kernelopts.{mode}") is not None
        ):
            changed = events.value_changed(qube, "bootmode")
            set_feature(draft, qube, "boot-mode.active", mode, lambda: draft.emit(changed))
    draft.emit(events.import_volume(qube, spec.volume, operation.data.get("source_vid", "")))


# ---- pools


def begin_pool_add(
    draft: Draft, operation: Operation, spec: PoolAddSpec, fresh: Fresh
) -> Operation:
    """A name that no pool has; the driver's options are storage's to check."""
    del fresh
    name = check_pool_name(spec.pool.name)
    if name in draft.view.pools:
        raise Refusal("POOL_IN_USE", f"Pool exists already: {name}", pool=name)
    if default_revisions(spec.pool) > revisions_limit(spec.pool):
        number = spec.pool.options.get("revisions_to_keep", "")
        raise Refusal(
            "INVALID_POOL", f"Pool {name} cannot keep {number} revisions", pool=name, value=number
        )
    word = spec.pool.options.get("ephemeral_volatile", "")
    if word not in _POOL_WORDS:
        raise Refusal(
            "INVALID_POOL",
            f"Pool {name}: ephemeral_volatile is '{shown(word)}', use True or False",
            pool=name,
            value=shown(word),
        )
    return operation


def end_pool_add(
    draft: Draft, operation: Operation, outcome: OperationState, result: Mapping[str, str]
) -> None:
    """The pool exists. result "config": JSON of the options as the driver has them."""
    spec = operation.spec
    assert isinstance(spec, PoolAddSpec)
    if outcome is not OperationState.SUCCEEDED:
        return
    pool = spec.pool
    if result.get("config"):
        given = json.loads(result["config"])
        pool = replace(pool, options={str(k): str(v) for k, v in given.items()})
    draft.put_change(PoolPut(pool))
    draft.emit(events.pool_add(pool.name))


def begin_pool_remove(
    draft: Draft, operation: Operation, spec: PoolRemoveSpec, fresh: Fresh
) -> Operation:
    """Announced once it is known to be unused: nothing later can veto it."""
    del fresh
    pool = need_pool(draft.view, spec.pool)
    check_pool_unused(draft.view, pool.name)
    draft.emit(events.pool_pre_delete(pool.name))
    kept = {"name": pool.name, "driver": pool.driver, "options": dict(pool.options)}
    return replace(operation, data={**operation.data, "pool": json.dumps(kept, sort_keys=True)})


def check_pool_unused(view: View, name: str) -> None:
    """Refusal POOL_IN_USE where a volume is in it, or a default names it."""
    user = next(view.pool_users(name), None)
    if user is not None:
        raise Refusal(
            "POOL_IN_USE",
            f"Storage pool is in use: {name}, by '{user.name}'",
            pool=name,
            user=user.name,
        )
    for row in SYSTEM_ROWS:
        if row.type == "pool" and evaluate(view, None, row.name) == name:
            raise Refusal(
                "POOL_IN_USE",
                f"Storage pool is in use: {name} is {row.name}",
                pool=name,
                user=row.name,
            )


def end_pool_remove(draft: Draft, operation: Operation, outcome: OperationState) -> None:
    """The pool is gone. Refusal POOL_IN_USE where it came into use meanwhile."""
    spec = operation.spec
    assert isinstance(spec, PoolRemoveSpec)
    if outcome is not OperationState.SUCCEEDED or spec.pool not in draft.view.pools:
        return
    check_pool_unused(draft.view, spec.pool)
    draft.put_change(PoolRemoved(spec.pool))
    draft.emit(events.pool_delete(spec.pool))


# ---- kernels


def kernel_pool(view: View, name: str) -> str:
    """The pool that holds kernels: the one named, or the system's; POOL_NOT_FOUND."""
    if name:
        pool = need_pool(view, name)
        if pool.driver != KERNEL_DRIVER:
            raise Refusal("INVALID_POOL", f"Pool {name} holds no kernels", pool=name)
        return name
    default = view.properties.get("default_pool_kernel", "")
    if default in view.pools:
        return default
    for pool in view.pools.values():
        if pool.driver == KERNEL_DRIVER:
            return pool.name
    raise Refusal("POOL_NOT_FOUND", "No pool holds kernels; add one with driver linux-kernel")


def begin_kernel_add(
    draft: Draft, operation: Operation, spec: KernelAddSpec, fresh: Fresh
) -> Operation:
    """A name that no kernel has."""
    del fresh
    check_pool_name(spec.name)
    if spec.name in (".", ".."):
        raise Refusal("INVALID_VALUE", f"'{spec.name}' cannot be a kernel's name")
    kernel_pool(draft.view, spec.pool)
    if draft.view.kernel(spec.name) is not None:
        raise Refusal(
            "INVALID_VALUE", f"Kernel '{spec.name}' is installed already", kernel=spec.name
        )
    return operation


def begin_kernel_remove(
    draft: Draft, operation: Operation, spec: KernelRemoveSpec, fresh: Fresh
) -> Operation:
    """A kernel that nothing names explicitly."""
    del fresh
    view = draft.view
    kernel_pool(view, spec.pool)
    if view.kernel(spec.name) is None:
        raise Refusal(
            "KERNEL_NOT_INSTALLED", f"Kernel '{spec.name}' not installed", kernel=spec.name
        )
    user = ""
    if view.properties.get("default_kernel") == spec.name:
        user = "the system's default_kernel"
    # Rare, and kernels have no index: the one walk over all qubes.
    for qube in view.qubes_any():
        if qube.properties.get("kernel") == spec.name and not user:
            user = f"'{qube.name}'"
    if user:
        raise Refusal(
            "QUBE_IN_USE",
            f"Kernel '{spec.name}' is in use by {user}; choose another one there first",
            kernel=spec.name,
            user=user,
        )
    return operation


# ---- ATTACH, DETACH


def begin_attach(draft: Draft, operation: Operation, spec: AttachSpec, fresh: Fresh) -> Operation:
    """A present, free, permitted device for a running qube."""
    del fresh
    view = draft.view
    qube = frontend(view, spec.qube)
    device = spec.device
    # The caller's permission comes first: who is denied learns nothing of the qube's state.
    _check_permitted(view, qube, device)
    if qube.klass != "AdminVM" and qube.run.phase is Phase.HALTED:
        raise Refusal(
            "QUBE_NOT_RUNNING",
            f"Domain not running (either powered off or paused): '{qube.name}'",
            qube=qube.name,
        )
    fact, backend = _present(view, device)
    if qube.klass == "AdminVM":
        raise Refusal("QUBE_ERROR", f"'{qube.name}' offers devices and takes none", qube=qube.name)
    device = replace(device, backend=backend.name, port=fact.port, identity=fact.device_id)
    if fact.attached_to == qube.uuid:
        raise _taken(view, device, fact)
    draft.emit(events.device_pre_attach(qube, device))
    options = checked_options(device)
    if fact.attached_to:
        raise _taken(view, device, fact)
    if backend.klass != "AdminVM" and backend.run.phase is not Phase.UP:
        raise Refusal(
            "QUBE_NOT_RUNNING", f"Backend '{backend.name}' does not run", qube=backend.name
        )
    if device.devclass != PLUGGABLE:
        raise Refusal(
            "DEVICE_NOT_PLUGGABLE",
            f"A {device.devclass} device cannot be attached to the running '{qube.name}':"
            " assign it as required and start the qube anew",
            qube=qube.name,
        )
    options = _block_options(view, qube, device, fact, options)
    return replace(
        operation,
        data={
            **operation.data,
            "boot_id": qube.run.boot_id,
            "backend": device.backend,
            "port": device.port,
            "identity": device.identity,
            **{f"{_OPTION}{name}": value for name, value in options.items()},
        },
    )


def _taken(view: View, device: Assignment, fact: DeviceFact) -> Refusal:
    holder = view.by_uuid(fact.attached_to)
    return Refusal(
        "DEVICE_ALREADY_ATTACHED",
        f"Device {identity(device)} is attached to"
        f" '{holder.name if holder is not None else 'another qube'}' already",
        device=identity(device),
    )


def _present(view: View, device: Assignment) -> tuple[DeviceFact, Qube]:
    """The one device that is meant, and its backend; Refusal DEVICE_UNKNOWN."""
    check_backend(view, device)
    found = matching(view, device)
    if len(found) != 1:
        problem = "is not present" if not found else "is not the only one of that description"
        raise Refusal(
            "DEVICE_UNKNOWN",
            f"Device {identity(device)} ({device.devclass}) {problem}",
            device=identity(device),
        )
    if not is_known(found[0][0]):
        raise Refusal(
            "DEVICE_UNKNOWN", f"Device {identity(device)} is unknown", device=identity(device)
        )
    return found[0]


def _check_permitted(view: View, qube: Qube, device: Assignment) -> None:
    """Manual attachment only: no interface of the device may be on the denied list.

    A device whose interfaces are not known is denied as soon as anything is.
    """
    denied = qube.properties.get("devices_denied", "")
    if device.mode != "manual" or not denied:
        return
    patterns = [denied[at : at + PATTERN] for at in range(0, len(denied), PATTERN)]
    found = matching(view, device)
    text = found[0][0].interfaces if len(found) == 1 else ""
    codes = [text[at : at + PATTERN] for at in range(0, len(text), PATTERN)]
    if (
        not codes
        or UNKNOWN_INTERFACE in codes
        or any(_matches(pattern, code) for pattern in patterns for code in codes)
    ):
        raise Refusal(
            "DEVICE_DENIED",
            f"Device {identity(device)} has an interface that '{qube.name}' denies",
            qube=qube.name,
            device=identity(device),
        )


def _matches(pattern: str, code: str) -> bool:
    return all(p in ("*", c) for p, c in zip(pattern, code, strict=False))


def _block_options(
    view: View, qube: Qube, device: Assignment, fact: DeviceFact, options: dict[str, str]
) -> dict[str, str]:
    """What the disk is made from, each of them said: repeated, the same disk is meant."""
    read_only = options.get("read-only", "yes" if fact.data.get("mode") == "r" else "no")
    if fact.data.get("mode") == "r" and read_only == "no":
        raise Refusal(
            "INVALID_VALUE",
            f"Device {identity(device)} is read-only; attach it with read-only=yes",
            device=identity(device),
        )
    devtype = options.get("devtype", "disk")
    kernel = bool(evaluate(view, qube, "kernel"))
    taken = {"xvda", "xvdb", "xvdc"} | ({"xvdd"} if kernel else set())
    for other in view.devices_attached_to(qube.uuid):
        taken.add(other.attach_options.get("frontend-dev", ""))
    target = options.get("frontend-dev", "")
    if target in taken:
        raise Refusal(
            "INVALID_VALUE",
            f"'{qube.name}' has a disk {target} already; leave frontend-dev out",
            qube=qube.name,
            target=target,
        )
    target = target or _free_target(qube, taken, prefer_cdrom=devtype == "cdrom" and not kernel)
    return {"frontend-dev": target, "read-only": read_only, "devtype": devtype}


def _free_target(qube: Qube, taken: set[str], *, prefer_cdrom: bool) -> str:
    """The first name that no disk has; xvda to xvdh are left to volumes."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["xvdd"] if prefer_cdrom else []
    names += [f"xvd{letter}" for letter in letters[letters.index("i") :]]
    names += [f"xvd{first}{second}" for first in letters for second in letters]
    for name in names:
        if name not in taken:
            return name
    raise Refusal("QUBE_ERROR", f"'{qube.name}' has no free disk name left", qube=qube.name)


def attached_device(operation: Operation, device: Assignment) -> Assignment:
    """The very device that an ATTACH or DETACH is about, with the options of its disk."""
    data = operation.data
    options = {
        name.removeprefix(_OPTION): value
        for name, value in data.items()
        if name.startswith(_OPTION)
    }
    return replace(
        device,
        backend=data.get("backend", device.backend),
        port=data.get("port", device.port),
        identity=data.get("identity", device.identity),
        options=options,
    )


def end_attach(draft: Draft, operation: Operation, outcome: OperationState) -> None:
    """Attached."""
    spec = operation.spec
    assert isinstance(spec, AttachSpec)
    qube = draft.find(operation.subjects[0])
    if qube is None or outcome is not OperationState.SUCCEEDED:
        return
    if booted(qube, boot_of(operation)):
        device = replace(
            attached_device(operation, spec.device), options=checked_options(spec.device)
        )
        draft.emit(events.device_attach(qube, device))


def begin_detach(draft: Draft, operation: Operation, spec: DetachSpec, fresh: Fresh) -> Operation:
    """An attached device that the running qube does not require."""
    del fresh
    view = draft.view
    qube = frontend(view, spec.qube)
    device = spec.device
    fact = next(
        (
            f
            for f in view.devices_attached_to(qube.uuid)
            if f.devclass == device.devclass and device.port in ("*", f.port)
        ),
        None,
    )
    backend = view.by_uuid(fact.backend_uuid) if fact is not None else None
    if fact is None or backend is None:
        raise Refusal(
            "DEVICE_NOT_ASSIGNED",
            f"Device {identity(device)} is not attached to '{qube.name}'",
            qube=qube.name,
            device=identity(device),
        )
    for kept in qube.devices:
        if (
            kept.mode == "required"
            and kept.devclass == fact.devclass
            and kept.backend in ("*", backend.name)
            and kept.port in ("*", fact.port)
            and kept.identity in ("*", fact.device_id)
        ):
            need_halted(view, qube, "detach a device that it requires")
    if fact.devclass != PLUGGABLE:
        raise Refusal(
            "DEVICE_NOT_PLUGGABLE",
            f"A {fact.devclass} device cannot be taken from the running '{qube.name}':"
            " unassign it and shut the qube down",
            qube=qube.name,
        )
    draft.emit(events.device_pre_detach(qube, fact.devclass, backend.name, fact.port))
    return replace(
        operation,
        data={
            **operation.data,
            "boot_id": qube.run.boot_id,
            "backend": backend.name,
            "port": fact.port,
            "identity": fact.device_id,
            **{f"{_OPTION}{name}": value for name, value in fact.attach_options.items()},
        },
    )


def end_detach(draft: Draft, operation: Operation, outcome: OperationState) -> None:
    """Detached."""
    spec = operation.spec
    assert isinstance(spec, DetachSpec)
    qube = draft.find(operation.subjects[0])
    if qube is None or outcome is not OperationState.SUCCEEDED:
        return
    device = attached_device(operation, spec.device)
    draft.emit(events.device_detach(qube, device.devclass, device.backend, device.port))
