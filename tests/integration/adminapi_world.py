"""A running instance in the state that the recordings start from.

Owns the start state. Must not know what is tested. Invariant: one kernel, one template,
the file system below can share extents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bulkhead.config import Settings
from clients.admin import AdminClient
from clients.cli.instance import kernels
from tests.fakes import loopfs
from tests.instance import Instance, running

KERNEL = "6.12.1-lab"
MIB = 1 << 20


def add_kernel(instance: Instance) -> None:
    """Install a kernel of zeros: 4 KiB vmlinuz and initramfs, 1 MiB of modules."""
    files = {}
    for name, size in (("vmlinuz", 4096), ("initramfs", 4096), ("modules", MIB)):
        files[name] = instance.root / f"kernel-{name}"
        files[name].write_bytes(bytes(size))
    kernels.add(Settings.load(instance.root), KERNEL, **files)


@contextmanager
def started() -> Iterator[tuple[Instance, AdminClient, Path]]:
    """The instance, a client of it, and the directory of its first pool."""
    with loopfs.mounted("xfs", 4096) as place:
        place.parent.chmod(0o755)  # services have users of their own
        pool = place / "pool"
        pool.mkdir(mode=0o755)
        with running(pool_dir=pool) as instance:
            add_kernel(instance)
            client = AdminClient.local(instance.root, timeout=60)
            client.set("", "default_kernel", KERNEL)
            client.call("admin.vm.Create.TemplateVM", payload=b"name=tmpl label=black")
            client.set("", "default_template", "tmpl")
            yield instance, client, pool
