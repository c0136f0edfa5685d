"""What only XenStore tells of a Xen guest, and the memory nodes that balancing reads.

Owns a few paths below /local/domain. Must not know libvirt or the bus. Invariant:
without XenStore (another hypervisor, a host without its Python module) everything is
answered with "not known" and nothing is written; one that refuses is "not known" too, and
a write then raises OSError. Blocking; for worker threads.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

NO_XID = -1
_log = logging.getLogger("domains.xenstore")


def _connector() -> Callable[[], Any] | None:
    try:
        module = importlib.import_module("xen.lowlevel.xs")
    except ImportError:
        return None
    connect: Callable[[], Any] = module.xs
    return connect


class Xenstore:
    """XenStore through connect() ("xen.lowlevel.xs.xs" where None is given)."""

    def __init__(self, connect: Callable[[], Any] | None = None) -> None:
        self._connect = connect or _connector()
        self._refused = False

    @property
    def present(self) -> bool:
        """There is something to ask."""
        return self._connect is not None

    @contextlib.contextmanager
    def _opened(self, connect: Callable[[], Any]) -> Iterator[Any]:
        """A connection; what its module raises is a RuntimeError of its own, here OSError."""
        try:
            store = connect()
            try:
                yield store
            finally:
                store.close()
        except RuntimeError as error:
            raise OSError(f"XenStore refused: {error}") from error

    def _read(self, path: str) -> str:
        if self._connect is None:
            return ""
        try:
            with self._opened(self._connect) as store:
                untrusted_value = store.read("", path)
        except OSError as error:
            # /dev/xen/xenbus may be closed to this user: guests are seen all the same.
            if not self._refused:
                _log.warning("%s; start times and stubdomains are not known", error)
            self._refused = True
            return ""
        if isinstance(untrusted_value, bytes):
            untrusted_value = untrusted_value.decode("ascii", "replace")
        return untrusted_value or ""

    def stubdom(self, xid: int) -> tuple[int, str]:
        """(xid, uuid) of the guest's stubdomain; (-1, "") when it has none."""
        untrusted_number = self._read(f"/local/domain/{xid}/image/device-model-domid")
        if not untrusted_number.isdecimal() or untrusted_number == "0":
            return NO_XID, ""  # domain 0: the device model runs in dom0
        number = int(untrusted_number)
        return number, self._read(f"/local/domain/{number}/vm").removeprefix("/vm/")

    def start_time(self, uuid: str) -> float | None:
        """Epoch seconds at which the guest was created, None when not known."""
        try:
            return float(self._read(f"/vm/{uuid}/start_time"))
        except ValueError:
            return None

    def set_hotplug_max(self, xid: int, maxmem_mib: int) -> None:
        """What the balancer may add up to while the guest runs. OSError when it is not taken."""
        if self._connect is None:
            return
        with self._opened(self._connect) as store:
            transaction = store.transaction_start()
            path = f"/local/domain/{xid}/memory/hotplug-max"
            store.write(transaction, path, str(maxmem_mib * 1024))
            if not store.transaction_end(transaction):
                raise OSError(f"XenStore did not take the new maximum of domain {xid}")

    def prepare_memory(self, xid: int, hotplug_max_mib: int) -> None:
        """The nodes in which the guest reports its memory; the guest owns them.

        hotplug_max_mib 0 = memory cannot be added. One transaction: all or nothing.
        """
        if self._connect is None:
            return
        base = f"/local/domain/{xid}/memory"
        with self._opened(self._connect) as store:
            transaction = store.transaction_start()
            for name in ("meminfo", "swapinfo"):
                store.write(transaction, f"{base}/{name}", "")
                store.set_permissions(transaction, f"{base}/{name}", [{"dom": xid}])
            if hotplug_max_mib:
                store.write(transaction, f"{base}/hotplug-max", str(hotplug_max_mib * 1024))
            if not store.transaction_end(transaction):
                raise OSError(f"XenStore did not take the memory nodes of domain {xid}")
