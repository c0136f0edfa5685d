"""What a new installation holds, and which volumes each class of qube has.

Owns the start state and the table of volumes. Must not know drivers beyond how they
name a volume. Invariant: pure data; nothing here touches a disk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bulkhead.model.evaluate import evaluate
from bulkhead.model.labels import BUILTIN
from bulkhead.model.properties import ADMIN, APP, DISP, QUBES_VM, TEMPLATE
from bulkhead.model.records import (
    ADMINVM_NAME,
    ADMINVM_UUID,
    REVISIONS_LIMIT,
    Change,
    LabelPut,
    Pool,
    PoolPut,
    Qube,
    QubePut,
    SystemPut,
    Volume,
)
from bulkhead.model.view import View

GIB = 1024**3
PRIVATE_SIZE = 2 * GIB
ROOT_SIZE = 10 * GIB
VOLATILE_SIZE = 10 * GIB
DISPOSABLE_VOLATILE_SIZE = ROOT_SIZE + PRIVATE_SIZE

FILES_POOL = "varlibqubes"
KERNELS_POOL = "linux-kernel"
_NUMBER = re.compile(r"-?[0-9]{1,10}")


# ---- start state


def admin_qube() -> Qube:
    """dom0 as a new installation has it."""
    return Qube(
        uuid=ADMINVM_UUID, name=ADMINVM_NAME, qid=0, klass=ADMIN, properties={"label": "black"}
    )


def new_store(pool_dir: str, reflink: bool) -> list[Change]:
    """The changes that make an empty store a new installation.

    pool_dir is the folder of the first pool; reflink: its file system can share blocks.
    """
    folder = pool_dir.rstrip("/") or "/"
    files = Pool(
        FILES_POOL,
        "file-reflink" if reflink else "file",
        {"dir_path": folder, "revisions_to_keep": "1", "ephemeral_volatile": "False"},
    )
    kernels = Pool(KERNELS_POOL, "linux-kernel", {"dir_path": f"{folder.rstrip('/')}/vm-kernels"})
    return [
        *(LabelPut(label) for label in BUILTIN),
        PoolPut(files),
        PoolPut(kernels),
        SystemPut("default_pool_kernel", KERNELS_POOL),
        QubePut(admin_qube()),
    ]


# ---- volumes


@dataclass(frozen=True, slots=True)
class ClassVolume:
    """One volume that every qube of a class has.

    size in bytes; 0 for a snapshot, which has its source's, and for the kernel.
    """

    name: str
    size: int
    rw: bool = True
    save_on_stop: bool = False
    snap_on_start: bool = False


_KERNEL = ClassVolume("kernel", 0, rw=False)
_OWN_ROOT = ClassVolume("root", ROOT_SIZE, save_on_stop=True)
_TEMPLATE_ROOT = ClassVolume("root", 0, snap_on_start=True)
_OWN_PRIVATE = ClassVolume("private", PRIVATE_SIZE, save_on_stop=True)
_VOLATILE = ClassVolume("volatile", VOLATILE_SIZE)

_WITH_ROOT = (_OWN_ROOT, _OWN_PRIVATE, _VOLATILE, _KERNEL)
_VOLUMES = {
    APP: (_TEMPLATE_ROOT, _OWN_PRIVATE, _VOLATILE, _KERNEL),
    DISP: (
        _TEMPLATE_ROOT,
        ClassVolume("private", 0, snap_on_start=True),
        ClassVolume("volatile", DISPOSABLE_VOLATILE_SIZE),
        _KERNEL,
    ),
}


def class_volumes(klass: str) -> tuple[ClassVolume, ...]:
    """The volumes of a class in wire order; none for AdminVM and RemoteVM."""
    if klass not in QUBES_VM:
        return ()
    return _VOLUMES.get(klass, _WITH_ROOT)


def folder_of(klass: str) -> str:
    """The folder of a class's qubes below a pool or the state directory."""
    return "vm-templates" if klass == TEMPLATE else "appvms"


def new_vid(pool: Pool, klass: str, qube_name: str, volume: str) -> str:
    """The id that a new volume gets in that pool; stored, never computed again."""
    match pool.driver:
        case "lvm_thin":
            return f"{pool.options.get('volume_group', '')}/vm-{qube_name}-{volume}"
        case "zfs":
            return f"{pool.options.get('container', '')}/{qube_name}/{volume}"
        case _:
            return f"{folder_of(klass)}/{qube_name}/{volume}"


def default_pool_of(view: View, volume: str) -> str:
    """The pool of a new volume for which none is given; "" where the system has none."""
    name = f"default_pool_{volume}"
    if volume not in ("kernel", "private", "root", "volatile"):
        name = "default_pool"
    value = evaluate(view, None, name)
    return value if isinstance(value, str) else ""


def default_revisions(pool: Pool, *, lasts: bool = True) -> int:
    """Revisions that a new volume keeps in that pool; lasts: it keeps its data at a stop."""
    if pool.driver == "linux-kernel" or (pool.driver == "file" and not lasts):
        return 0
    text = pool.options.get("revisions_to_keep", "1")
    number = int(text) if _NUMBER.fullmatch(text) else 1
    return number if number <= REVISIONS_LIMIT else 1


def new_volume(view: View, qube: Qube, spec: ClassVolume) -> Volume:
    """A volume of the class where nothing else was asked for.

    A snapshot has its template's pool, size and vid as source. The pool and the vid are
    "" where the system has no pool for it.
    """
    pool_name = default_pool_of(view, spec.name)
    size, source = spec.size, ""
    if spec.snap_on_start:
        origin = source_volume(view, qube, spec.name)
        if origin is not None:
            pool_name, size, source = origin.pool, origin.size, origin.vid
    pool = view.pools.get(pool_name)
    if spec.name == "kernel":
        vid = kernel_vid(view, qube)
    else:
        vid = new_vid(pool, qube.klass, qube.name, spec.name) if pool is not None else ""
    return Volume(
        name=spec.name,
        pool=pool_name,
        vid=vid,
        size=size,
        revisions_to_keep=(
            default_revisions(pool, lasts=spec.save_on_stop) if pool is not None else 0
        ),
        rw=spec.rw,
        save_on_stop=spec.save_on_stop,
        snap_on_start=spec.snap_on_start,
        source=source,
    )


def source_volume(view: View, qube: Qube, name: str) -> Volume | None:
    """The volume that a snapshot starts from: up the templates while that is one itself.

    None where a template lacks it.
    """
    found: Volume | None = None
    current = qube
    for _ in range(8):  # longer chains cannot be made
        template_name = current.properties.get("template")
        template = view.qube(template_name) if template_name else None
        if template is None:
            return found
        volume = template.volume(name)
        if volume is None:
            return found
        found, current = volume, template
        if not volume.source:
            return found
    return found


def kernel_vid(view: View, qube: Qube) -> str:
    """The id of the kernel volume now: the kernel's name, "" without one."""
    value = evaluate(view, qube, "kernel")
    return value if isinstance(value, str) else ""


def wants_kernel_volume(view: View, qube: Qube) -> bool:
    """True when the kernel volume gives the guest a disk: its modules image exists."""
    kernel = view.kernel(kernel_vid(view, qube))
    return kernel is not None and kernel.has_modules
