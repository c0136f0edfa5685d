"""A view in the state of a new installation, for tests of what reads it."""

from __future__ import annotations

from bulkhead.model.labels import BUILTIN
from bulkhead.model.records import (
    ADMINVM_NAME,
    ADMINVM_UUID,
    FactPut,
    HostFact,
    KernelFact,
    LabelPut,
    Pool,
    PoolPut,
    Qube,
    QubePut,
    SystemPut,
    Volume,
)
from bulkhead.model.view import View

GIB = 1 << 30
TMPL_UUID = "11111111-1111-4111-8111-111111111111"
WORK_UUID = "22222222-2222-4222-8222-222222222222"
DIRECTORY = "/srv/pool"
KERNEL = "6.12.1-lab"


def _volumes(name: str, template: str = "") -> tuple[Volume, ...]:
    base = f"appvms/{name}" if template else f"vm-templates/{name}"
    source = f"vm-templates/{template}/root" if template else ""
    return (
        Volume(
            "root", "varlibqubes", f"{base}/root", 10 * GIB, 1, rw=True,
            save_on_stop=not template, snap_on_start=bool(template), source=source,
        ),
        Volume("private", "varlibqubes", f"{base}/private", 2 * GIB, 1, rw=True, save_on_stop=True),
        Volume("volatile", "varlibqubes", f"{base}/volatile", 10 * GIB, 1, rw=True),
        Volume("kernel", "linux-kernel", KERNEL),
    )  # fmt: skip


def template(name: str = "tmpl", uuid: str = TMPL_UUID, qid: int = 1) -> Qube:
    """A TemplateVM as admin.vm.Create makes it."""
    return Qube(
        uuid, name, qid, "TemplateVM",
        properties={"label": "black"},
        tags=frozenset({"created-by-dom0", "guivm-dom0", "audiovm-dom0"}),
        volumes=_volumes(name),
    )  # fmt: skip


def app(name: str = "work", uuid: str = WORK_UUID, qid: int = 2, template: str = "tmpl") -> Qube:
    """An AppVM as admin.vm.Create makes it."""
    return Qube(
        uuid, name, qid, "AppVM",
        properties={"label": "red", "template": template},
        tags=frozenset({"created-by-dom0", "guivm-dom0", "audiovm-dom0"}),
        volumes=_volumes(name, template),
    )  # fmt: skip


def start_view() -> View:
    """dom0, eight labels, two pools, one kernel, the template tmpl."""
    view = View()
    view.apply_all(LabelPut(label) for label in BUILTIN)
    view.apply(
        PoolPut(
            Pool(
                "varlibqubes", "file-reflink",
                {"dir_path": DIRECTORY, "revisions_to_keep": "1", "ephemeral_volatile": "False"},
            )
        )
    )  # fmt: skip
    view.apply(
        PoolPut(Pool("linux-kernel", "linux-kernel", {"dir_path": f"{DIRECTORY}/vm-kernels"}))
    )
    view.apply(
        QubePut(
            Qube(ADMINVM_UUID, ADMINVM_NAME, 0, "AdminVM", properties={"label": "black"})
        )
    )  # fmt: skip
    view.apply(QubePut(template()))
    for name, value in (
        ("default_kernel", KERNEL),
        ("default_template", "tmpl"),
        ("default_pool_kernel", "linux-kernel"),
    ):
        view.apply(SystemPut(name, value))
    view.apply(FactPut(HostFact("sim", memory_kib=16384 * 1024, cpus=4, dom0_maxmem_mib=4096)))
    view.apply(FactPut(KernelFact(KERNEL, has_initramfs=True, has_modules=True)))
    return view
