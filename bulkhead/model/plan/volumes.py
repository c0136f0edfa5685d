"""The volumes of a new qube, and what a change of template does to snapshots.

Owns pool choice, inheritance from templates and the declared settings of volumes and
pools. Must not know drivers beyond what defaults says. Invariant: a snapshot is in the
pool of what it starts from, and no two volumes of one pool have the same id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from bulkhead.model.defaults import (
    ClassVolume,
    class_volumes,
    default_pool_of,
    default_revisions,
    kernel_vid,
    new_vid,
    source_volume,
)
from bulkhead.model.evaluate import is_halted
from bulkhead.model.plan.base import Draft, need_qube
from bulkhead.model.properties import APP, DISP
from bulkhead.model.records import REVISIONS_LIMIT, Phase, Pool, PoolPut, Qube, Volume
from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import SetPool, SetVolume
from bulkhead.model.view import View

KERNEL_DRIVER = "linux-kernel"
FILE_DRIVER = "file"
_POOL_REMOVALS = frozenset({"POOL_REMOVE"})


# ---- a new qube


def new_volumes(
    view: View,
    qube: Qube,
    template: Qube | None,
    *,
    pool: str = "",
    pools: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> tuple[Volume, ...]:
    """The volumes of a new record, pool choices applied. sizes: bytes that replace the
    class's default. Refusal VOLUME_CREATE_REFUSED where the choice does not fit."""
    chosen = dict(pools or {})
    specs = class_volumes(qube.klass)
    names = {spec.name for spec in specs}
    volumes = [
        _new_volume(view, qube, template, spec, pool, chosen.pop(spec.name, ""), sizes or {})
        for spec in specs
    ]
    if specs and template is not None:
        for extra in template.volumes:
            if extra.name not in names:
                volumes.append(inherited_volume(view, qube, extra, chosen.pop(extra.name, "")))
    if chosen:
        raise Refusal(
            "VOLUME_CREATE_REFUSED",
            f"A qube of class {qube.klass} has no volume '{next(iter(chosen))}'",
            volume=next(iter(chosen)),
            klass=qube.klass,
        )
    for volume in volumes:
        if volume.name != "kernel" and view.vid_owner(volume.pool, volume.vid) is not None:
            raise Refusal(
                "VOLUME_CREATE_REFUSED",
                f"Pool {volume.pool} has a volume '{volume.vid}' already; choose another name"
                " or pool",
                pool=volume.pool,
                vid=volume.vid,
            )
    return tuple(volumes)


def _new_volume(
    view: View,
    qube: Qube,
    template: Qube | None,
    spec: ClassVolume,
    pool: str,
    own_pool: str,
    sizes: Mapping[str, int],
) -> Volume:
    like = template.volume(spec.name) if template is not None and qube.klass == DISP else None
    rw = like.rw if like is not None else spec.rw
    source: Volume | None = None
    if spec.snap_on_start:
        if own_pool:
            raise Refusal(
                "VOLUME_CREATE_REFUSED",
                f"Volume {spec.name} is a snapshot of the template's and must stay in its pool",
                volume=spec.name,
                pool=own_pool,
            )
        source = source_volume(view, qube, spec.name)
        if source is None:
            raise Refusal(
                "VOLUME_CREATE_REFUSED",
                f"The template has no volume {spec.name} to start from",
                volume=spec.name,
            )
        where = source.pool
    elif own_pool:
        where = own_pool
    elif pool and spec.rw:
        where = pool
    else:
        where = (like.pool if like is not None else "") or default_pool_of(view, spec.name)
    record = _usable_pool(view, where, spec.name)
    kernel = record.driver == KERNEL_DRIVER
    return Volume(
        name=spec.name,
        pool=record.name,
        vid=kernel_vid(view, qube) if kernel else new_vid(record, qube.klass, qube.name, spec.name),
        size=source.size if source is not None else sizes.get(spec.name, spec.size),
        revisions_to_keep=default_revisions(record, lasts=spec.save_on_stop),
        rw=rw,
        save_on_stop=spec.save_on_stop,
        snap_on_start=spec.snap_on_start,
        source=source.vid if source is not None else "",
        ephemeral=like.ephemeral if like is not None else None,
    )


def volumes_of_template(template: Qube | None, klass: str) -> tuple[Volume, ...]:
    """The template's volumes whose last commit is copied into a new qube of that class.

    A Windows template keeps a prepared file system in its private volume, which every
    qube based on it begins with.
    """
    if template is None or klass != APP or template.features.get("os") != "Windows":
        return ()
    return tuple(v for v in template.volumes if v.name == "private" and v.save_on_stop)


def inherited_volume(view: View, qube: Qube, extra: Volume, own_pool: str) -> Volume:
    """A volume of the template that the class does not know: its settings, a new id."""
    if own_pool and extra.snap_on_start:
        raise Refusal(
            "VOLUME_CREATE_REFUSED",
            f"Volume {extra.name} is a snapshot and must stay in its pool",
            volume=extra.name,
            pool=own_pool,
        )
    record = _usable_pool(view, own_pool or extra.pool, extra.name)
    return replace(
        extra,
        pool=record.name,
        vid=new_vid(record, qube.klass, qube.name, extra.name),
    )


def _usable_pool(view: View, name: str, volume: str) -> Pool:
    """The pool for a volume. Refusal VOLUME_CREATE_REFUSED."""
    pool = view.pools.get(name)
    going = any(o.kind in _POOL_REMOVALS for o in view.operations_on(f"pool/{name}"))
    if pool is None or going:
        what = f"No such pool: '{name}'" if name else f"There is no pool for volume {volume}"
        raise Refusal("VOLUME_CREATE_REFUSED", what, pool=name, volume=volume)
    if pool.driver == KERNEL_DRIVER and volume != "kernel":
        raise Refusal(
            "VOLUME_CREATE_REFUSED",
            f"Pool {name} holds kernels only, not volume {volume}",
            pool=name,
            volume=volume,
        )
    return pool


# ---- another template


def follow_template(draft: Draft, qube: Qube) -> None:
    """Start the qube's snapshots, and those of its disposables, from the new template."""
    qube = draft.qube(qube.uuid)
    parent = draft.view.qube(qube.properties.get("template", ""))
    if parent is None:
        return
    changed = draft.put(replace(qube, volumes=tuple(_resourced(draft, qube, parent))))
    if changed.klass != APP:
        return
    for child in draft.view.referrers("template", changed.name):
        # A running one keeps its start state; only preloaded ones can run here, and they
        # are replaced.
        if child.klass == DISP and child.run.phase is Phase.HALTED:
            child = draft.qube(child.uuid)
            draft.put(replace(child, volumes=tuple(_resourced(draft, child, changed))))


def _resourced(draft: Draft, qube: Qube, parent: Qube) -> Iterator[Volume]:
    view = draft.view
    for volume in qube.volumes:
        origin = parent.volume(volume.name) if volume.snap_on_start else None
        if origin is None:
            yield volume
            continue
        if origin.source:
            source, size, where = origin.source, origin.size, origin.pool
        else:
            source, size, where = origin.vid, origin.size, origin.pool
        vid = volume.vid
        if where != volume.pool and where in view.pools:
            vid = new_vid(view.pools[where], qube.klass, qube.name, volume.name)
        yield replace(volume, pool=where, vid=vid, size=size, source=source)


# ---- declared settings


def need_volume(qube: Qube, name: str) -> Volume:
    """The qube's volume; Refusal VOLUME_NOT_FOUND."""
    volume = qube.volume(name)
    if volume is None:
        raise Refusal(
            "VOLUME_NOT_FOUND",
            f"Qube '{qube.name}' has no volume '{name}'",
            qube=qube.name,
            volume=name,
        )
    return volume


def is_kernel_volume(view: View, volume: Volume) -> bool:
    """True for a volume whose content is an installed kernel."""
    pool = view.pools.get(volume.pool)
    return pool is not None and pool.driver == KERNEL_DRIVER


def need_halted(view: View, qube: Qube, what: str) -> None:
    """Refusal QUBE_NOT_HALTED unless nothing of the qube runs, starts or stops."""
    if not is_halted(view, qube):
        raise Refusal(
            "QUBE_NOT_HALTED",
            f"Domain is not powered off: '{qube.name}'; shut it down to {what}",
            qube=qube.name,
        )


def set_volume(draft: Draft, command: SetVolume) -> None:
    """Change one declared setting of a volume."""
    view = draft.view
    qube = need_qube(view, command.qube)
    volume = need_volume(qube, command.volume)
    given = (command.revisions_to_keep, command.rw, command.ephemeral)
    if sum(value is not None for value in given) != 1:
        raise Refusal("PROTOCOL", "Exactly one setting of a volume can be changed at a time")
    if command.revisions_to_keep is not None:
        volume = _with_revisions(view, qube, volume, command.revisions_to_keep)
    elif command.rw is not None:
        need_halted(view, qube, f"change volume {volume.name}")
        if command.rw and is_kernel_volume(view, volume):
            raise _value_refused(qube, volume, "a kernel is never writable")
        volume = replace(volume, rw=command.rw)
    else:
        if command.ephemeral and (volume.snap_on_start or volume.save_on_stop or not volume.rw):
            raise _value_refused(
                qube, volume, "only a writable volume whose data do not last can be ephemeral"
            )
        volume = replace(volume, ephemeral=command.ephemeral)
    draft.put(qube.with_volume(volume))


def _with_revisions(view: View, qube: Qube, volume: Volume, number: int) -> Volume:
    if number < -1:
        raise _value_refused(qube, volume, "revisions_to_keep must be -1 or more")
    pool = view.pools.get(volume.pool)
    if is_kernel_volume(view, volume) and number != volume.revisions_to_keep:
        raise Refusal(
            "VOLUME_REFUSED",
            f"Volume {volume.name} of '{qube.name}' keeps no revisions",
            qube=qube.name,
            volume=volume.name,
        )
    if pool is not None and number > revisions_limit(pool):
        raise Refusal(
            "VOLUME_REFUSED",
            f"Pool {pool.name} keeps one revision at most",
            pool=pool.name,
            volume=volume.name,
        )
    if (number == -1) != (volume.revisions_to_keep == -1):
        need_halted(view, qube, f"change whether volume {volume.name} has revisions")
        for other in view.referrers("template", qube.name):
            if other.klass == DISP and other.run.phase is not Phase.HALTED:
                need_halted(view, other, f"change volume {volume.name} of its template")
    return replace(volume, revisions_to_keep=number)


def _value_refused(qube: Qube, volume: Volume, problem: str) -> Refusal:
    return Refusal(
        "INVALID_VALUE",
        f"Invalid setting of volume {volume.name} of '{qube.name}': {problem}",
        qube=qube.name,
        volume=volume.name,
    )


def need_pool(view: View, name: str) -> Pool:
    """The pool of that name; Refusal POOL_NOT_FOUND."""
    pool = view.pools.get(name)
    if pool is None:
        raise Refusal("POOL_NOT_FOUND", f"No such pool: '{name}'", pool=name)
    return pool


def revisions_limit(pool: Pool) -> int:
    """How many revisions the pool's driver keeps at most."""
    return 1 if pool.driver == FILE_DRIVER else REVISIONS_LIMIT


def set_pool(draft: Draft, command: SetPool) -> None:
    """Change one setting of a pool; existing volumes keep their own."""
    pool = need_pool(draft.view, command.pool)
    given = (command.revisions_to_keep, command.ephemeral_volatile)
    if sum(value is not None for value in given) != 1:
        raise Refusal("PROTOCOL", "Exactly one setting of a pool can be changed at a time")
    if pool.driver == KERNEL_DRIVER:
        if command.ephemeral_volatile is not None:
            return  # nothing in such a pool is volatile: either word is true of it already
        raise Refusal(
            "VOLUME_REFUSED", f"Pool {pool.name} holds kernels without revisions", pool=pool.name
        )
    options = dict(pool.options)
    number = command.revisions_to_keep
    if number is not None:
        if not -1 <= number <= revisions_limit(pool):
            raise Refusal(
                "INVALID_POOL",
                f"Pool {pool.name} cannot keep {number} revisions",
                pool=pool.name,
                value=str(number),
            )
        options["revisions_to_keep"] = str(number)
    else:
        options["ephemeral_volatile"] = str(command.ephemeral_volatile)
    draft.put_change(PoolPut(replace(pool, options=options)))
