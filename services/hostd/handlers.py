"""hostd's bus methods: check the arguments, then one verb at a time.

Owns conversion and order. Must not know how a verb is done. Invariant: nothing reaches
an adapter that services.hostd.core.verbs has not checked, and no two verbs run at once.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TypeVar

from bulkhead.api import hostd_pb2
from bulkhead.bus.dispatch import Call
from bulkhead.bus.errors import BusError
from services.hostd.adapters.autostart import Autostart
from services.hostd.adapters.pci import DeviceMissing, PciBinding
from services.hostd.adapters.plumbing import NamespaceMissing, Plumbing, TapMissing
from services.hostd.adapters.workers import Workers
from services.hostd.core import verbs
from services.hostd.core.reasons import REASONS
from services.hostd.core.verbs import Names

T = TypeVar("T")


def failure(reason: str, message: str, **metadata: str) -> BusError:
    """A BusError with a reason of this service."""
    error = BusError(REASONS[reason].code, reason, message)
    error.metadata.update(metadata)
    return error


class HostdHandlers:
    """service Hostd."""

    def __init__(
        self,
        names: Names,
        plumbing: Plumbing,
        workers: Workers,
        autostart: Autostart,
        pci: PciBinding,
        *,
        default_owner: int = 0,
        is_root: Callable[[], bool] = lambda: os.geteuid() == 0,
    ) -> None:
        """default_owner: uid of a tap's owner where the request names none (0)."""
        self._names = names
        self._plumbing = plumbing
        self._workers = workers
        self._autostart = autostart
        self._pci = pci
        self._default_owner = default_owner
        self._is_root = is_root
        self._turn = asyncio.Lock()

    async def _do(self, work: Callable[[], T]) -> T:
        """Run in a thread, after whatever runs now; errors become refusals."""
        if not self._is_root():
            raise failure(
                "NOT_ROOT", "hostd has no root, so networks and devices cannot be set up here"
            )
        return await asyncio.shield(asyncio.get_running_loop().create_task(self._one(work)))

    async def _one(self, work: Callable[[], T]) -> T:
        async with self._turn:
            try:
                return await asyncio.to_thread(work)
            except NamespaceMissing as error:
                raise failure(
                    "NAMESPACE_MISSING",
                    f"there is no network namespace {error}; start its network qube first",
                    namespace=str(error),
                ) from error
            except TapMissing as error:
                raise failure(
                    "TAP_MISSING", f"there is no interface {error} to plug", tap=str(error)
                ) from error
            except DeviceMissing as error:
                raise failure(
                    "DEVICE_MISSING", f"there is no PCI device {error}", address=str(error)
                ) from error
            except OSError as error:
                raise failure("HOST_REFUSED", f"refused: {error}", why=str(error)) from error

    # ---- namespaces and uplinks

    async def ensure_namespace(
        self, request: hostd_pb2.EnsureNamespaceRequest, call: Call
    ) -> hostd_pb2.EnsureNamespaceReply:
        """A network qube's namespace; it forwards nothing until its rules are loaded."""
        del call
        qid = verbs.check_qid(request.qid)
        name = await self._do(lambda: self._plumbing.ensure_namespace(qid))
        return hostd_pb2.EnsureNamespaceReply(namespace=name)

    async def delete_namespace(
        self, request: hostd_pb2.DeleteNamespaceRequest, call: Call
    ) -> hostd_pb2.DeleteNamespaceReply:
        """Its worker ends, its taps move out, then it goes."""
        del call
        qid = verbs.check_qid(request.qid)
        await self._workers.stop(qid)
        await self._do(lambda: self._plumbing.delete_namespace(qid))
        return hostd_pb2.DeleteNamespaceReply()

    async def ensure_uplink(
        self, request: hostd_pb2.EnsureUplinkRequest, call: Call
    ) -> hostd_pb2.EnsureUplinkReply:
        """A pair between the qube's namespace and another one."""
        del call
        qid = verbs.check_qid(request.qid)
        if request.HasField("uplink_qid") and request.uplink_qid:
            other = self._names.namespace(verbs.check_qid(request.uplink_qid, "uplink_qid"))
            if request.uplink_qid == qid:
                raise failure("HOST_REFUSED", "a network qube cannot be its own uplink")
        else:
            other = verbs.check_namespace(request.uplink_namespace)
            if not other:
                raise failure(
                    "NAMESPACE_MISSING", "neither uplink_qid nor uplink_namespace is given"
                )
        link = verbs.uplink_link(qid, request.ip, request.gateway)
        inner, peer = await self._do(lambda: self._plumbing.ensure_uplink(qid, other, link))
        return hostd_pb2.EnsureUplinkReply(interface=inner, peer=peer, peer_namespace=other)

    async def delete_uplink(
        self, request: hostd_pb2.DeleteUplinkRequest, call: Call
    ) -> hostd_pb2.DeleteUplinkReply:
        """Both ends of the pair go."""
        del call
        qid = verbs.check_qid(request.qid)
        await self._do(lambda: self._plumbing.delete_uplink(qid))
        return hostd_pb2.DeleteUplinkReply()

    # ---- taps

    async def ensure_tap(
        self, request: hostd_pb2.EnsureTapRequest, call: Call
    ) -> hostd_pb2.EnsureTapReply:
        """The qube's tap, in hostd's own namespace unless it is plugged already."""
        del call
        qid = verbs.check_qid(request.qid)
        owner = verbs.check_uid(request.owner_uid or self._default_owner)
        tap = await self._do(lambda: self._plumbing.ensure_tap(qid, owner))
        return hostd_pb2.EnsureTapReply(tap=tap)

    async def plug(self, request: hostd_pb2.PlugRequest, call: Call) -> hostd_pb2.PlugReply:
        """Move the tap into the netvm's namespace and route the qube's addresses to it."""
        del call
        qid = verbs.check_qid(request.qid)
        netvm_qid = verbs.check_qid(request.netvm_qid, "netvm_qid")
        link = verbs.check_link(
            request.ip, request.gateway, request.ip6, request.gateway6, request.mac
        )
        tap, namespace = await self._do(lambda: self._plumbing.plug(qid, netvm_qid, link))
        return hostd_pb2.PlugReply(tap=tap, namespace=namespace)

    async def unplug(self, request: hostd_pb2.UnplugRequest, call: Call) -> hostd_pb2.UnplugReply:
        """Take the tap out of any netvm's namespace."""
        del call
        qid = verbs.check_qid(request.qid)
        await self._do(lambda: self._plumbing.unplug(qid, request.delete_tap))
        return hostd_pb2.UnplugReply()

    # ---- workers

    async def spawn_enforcer(
        self, request: hostd_pb2.SpawnEnforcerRequest, call: Call
    ) -> hostd_pb2.SpawnEnforcerReply:
        """The worker in the network qube's namespace; one that runs is answered again."""
        del call
        qid = verbs.check_qid(request.qid)
        name = self._names.namespace(qid)
        if not await self._do(lambda: self._plumbing.namespace_exists(name)):
            await self._workers.stop(qid)
            raise failure(
                "NAMESPACE_MISSING",
                f"there is no network namespace {name}; start its network qube first",
                namespace=name,
            )
        try:
            pid, path = await self._workers.ensure(qid, name)
        except OSError as error:
            raise failure("HOST_REFUSED", f"no enforce worker: {error}", why=str(error)) from error
        return hostd_pb2.SpawnEnforcerReply(pid=pid, socket=str(path))

    # ---- the rest of the table

    async def set_autostart(
        self, request: hostd_pb2.SetAutostartRequest, call: Call
    ) -> hostd_pb2.SetAutostartReply:
        """Whether the qube starts with the machine."""
        del call
        qube = verbs.check_qube(request.qube)
        try:
            await asyncio.to_thread(self._autostart.set, qube, request.enabled)
        except OSError as error:
            raise failure("HOST_REFUSED", f"refused: {error}", why=str(error)) from error
        return hostd_pb2.SetAutostartReply()

    async def bind_pci(
        self, request: hostd_pb2.BindPciRequest, call: Call
    ) -> hostd_pb2.BindPciReply:
        """Keep a device for guests, or give it back."""
        del call
        address = verbs.check_pci(request.address)
        await self._do(lambda: self._pci.bind(address, request.stub))
        return hostd_pb2.BindPciReply()

    async def inventory(
        self, request: hostd_pb2.HostInventoryRequest, call: Call
    ) -> hostd_pb2.HostInventoryReply:
        """What is there now; empty without root."""
        del request, call
        if not self._is_root():
            return hostd_pb2.HostInventoryReply()
        namespaces, taps = await self._do(
            lambda: (self._plumbing.namespaces(), self._plumbing.taps())
        )
        return hostd_pb2.HostInventoryReply(
            namespaces=namespaces, taps=taps, enforcers=self._workers.running()
        )
