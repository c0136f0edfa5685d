"""A running instance in the state that the recordings start from.

Owns the start state and how events are read. Must not know what is tested. Invariant:
one kernel, one template, the file system below can share extents.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bulkhead.config import Settings
from clients.admin import AdminClient, wire
from clients.cli.instance import kernels
from tests.fakes import loopfs
from tests.instance import Instance, running

KERNEL = "6.12.1-lab"
MIB = 1 << 20


class Listener:
    """Events of one stream, collected until a name has come."""

    def __init__(self, client: AdminClient, dest: str = "dom0") -> None:
        self._peer = socket.socket(socket.AF_UNIX)
        self._peer.settimeout(20)
        self._peer.connect(str(client.path))
        self._peer.sendall(wire.request("admin.Events", dest, source=client.source))
        self._peer.shutdown(socket.SHUT_WR)
        self._parser = wire.EventParser()
        assert self.until("connection-established")[-1].name == "connection-established"

    def until(self, name: str, subject: str | None = None) -> list[wire.Event]:
        """Events up to and with the first of that name."""
        found: list[wire.Event] = []
        while True:
            data = self._peer.recv(65536)
            assert data, f"the stream ended before {name}, after {found}"
            found += self._parser.feed(data)
            if any(e.name == name and subject in (None, e.subject) for e in found):
                return found

    def close(self) -> None:
        self._peer.close()


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
