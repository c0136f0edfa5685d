"""Sockets on which the source is fixed and policy is asked for every call.

Owns which qubes have such a socket now. Must not know what calls mean. Invariant: a
socket belongs to one uuid; when that qube goes, socket, streams and note go with it.
"""

from __future__ import annotations

import logging

from bulkhead.bus.events import Entry, ReplicaRunner
from bulkhead.model.records import ADMINVM_NAME, Qube, QubeRemoved
from bulkhead.model.refusal import Refusal
from services.adminapi.adapters.callers import CallerSockets
from services.adminapi.adapters.gateway import Gateway
from services.adminapi.core.exceptions import WireRefusal

log = logging.getLogger("bulkhead.adminapi")

PREFIX = "caller:"
LIMIT = 256


class Callers:
    """The callers' sockets of this process."""

    def __init__(self, sockets: CallerSockets, replica: ReplicaRunner) -> None:
        self._sockets = sockets
        self._replica = replica
        self._gateway: Gateway | None = None
        self._names: dict[str, str] = {}  # uuid -> name of the socket's file
        replica.subscribe(self._entry)

    async def serve_with(self, gateway: Gateway) -> None:
        """Open again what was open before this process started."""
        self._gateway = gateway
        await self._replica.ready()
        for name, uuid in sorted(self._sockets.noted().items()):
            qube = self._replica.view.by_uuid(uuid)
            if qube is None or qube.hidden or qube.name != name:
                self._sockets.forget(name)
                continue
            try:
                await self._listen(qube)
            except OSError as error:
                log.error("the socket of caller %s cannot be opened: %s", name, error)

    def qube(self, socket_name: str) -> Qube | None:
        """The caller that a socket of the gateway stands for, None = no such qube any more."""
        qube = self._replica.view.by_uuid(socket_name.removeprefix(PREFIX))
        return None if qube is None or qube.hidden or qube.name == ADMINVM_NAME else qube

    def paths(self) -> list[tuple[str, str]]:
        """Name and socket path of every caller."""
        return [(name, str(self._sockets.path(name))) for name in sorted(self._names.values())]

    async def open(self, qube: Qube) -> str:
        """The path of the qube's socket, made where it is not there yet."""
        if qube.name == ADMINVM_NAME:
            raise Refusal("PROTOCOL", "dom0 has the socket qubesd.sock")
        if qube.uuid not in self._names:
            if len(self._names) >= LIMIT:
                raise Refusal("LIMIT_REACHED", f"{LIMIT} callers have sockets already")
            try:
                await self._listen(qube)
            except OSError as error:
                self._sockets.forget(qube.name)
                log.error("the socket of caller %s cannot be opened: %s", qube.name, error)
                raise WireRefusal("CALL_DENIED", f"the socket cannot be made: {error}") from error
        return str(self._sockets.path(qube.name))

    async def _listen(self, qube: Qube) -> None:
        gateway = self._gateway
        if gateway is None:
            raise WireRefusal("NOT_READY", "the sockets are not served yet; try again")
        await gateway.listen({PREFIX + qube.uuid: self._sockets.open(qube.name, qube.uuid)})
        self._names[qube.uuid] = qube.name

    def close(self, uuid: str) -> None:
        """Take the qube's socket away and end its connections; nothing without one."""
        name = self._names.pop(uuid, None)
        if name is None:
            return
        self._sockets.forget(name)
        if self._gateway is not None:
            self._gateway.stop_listening(PREFIX + uuid)

    def _entry(self, entry: Entry) -> None:
        if entry.resync:
            view = self._replica.view
            for uuid in [u for u in self._names if view.by_uuid(u) is None]:
                self.close(uuid)
        for change in entry.changes:
            if isinstance(change, QubeRemoved):
                self.close(change.uuid)
