"""Bus services inside the test's own process, over real ipc sockets.

Owns a throw-away instance directory, handler objects that answer every method of a proto
service, and the start and end of services on them. Must not know any real service.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bulkhead.bus.client import Connections
from bulkhead.bus.dispatch import Bounds
from bulkhead.bus.methods import full_service_name, methods_of
from bulkhead.bus.runtime import ServiceContext, start_service, take_lock
from bulkhead.bus.secret import make_secret, read_secret
from bulkhead.bus.server import Call, Server, ZapHandler
from bulkhead.config import Settings


class Answers:
    """A handler object for every method of the services: an empty reply, or your own.

    own: handler name -> coroutine function (request, call). calls: what ran, in order.
    """

    def __init__(
        self, *services: str, own: dict[str, Callable[[Any, Call], Awaitable[Any]]] | None = None
    ) -> None:
        self.calls: list[tuple[str, Call]] = []
        for service in services:
            for method in methods_of(full_service_name(service)).values():
                self._add(method.handler, method.reply_type, (own or {}).get(method.handler))

    def _add(self, name: str, reply_type: type, own: Any) -> None:
        async def handler(request: Any, call: Call) -> Any:
            self.calls.append((name, call))
            return reply_type() if own is None else await own(request, call)

        setattr(self, name, handler)


class Instance:
    """A directory with settings and secret, and the services started on it."""

    def __init__(self, *, isolated: bool = False, users: dict[str, int] | None = None) -> None:
        # Short: a unix socket path has at most 107 bytes.
        self.root = Path(tempfile.mkdtemp(prefix="bh-"))
        self.settings = Settings(self.root, isolated=isolated, users=users or {})
        self.settings.bus_dir.mkdir(parents=True)
        self.settings.save()
        if not isolated:
            make_secret(self.settings)
        self._opened: list[Connections] = []
        self._running: list[tuple[ServiceContext, ZapHandler, Server, Any]] = []

    async def serve(
        self,
        service: str,
        handlers: object | Callable[[ServiceContext], Awaitable[object]],
        proto_services: Sequence[str],
        bounds: Bounds | None = None,
    ) -> tuple[ServiceContext, Server]:
        """Start a service; handlers is the object or an async build(context)."""
        lock = take_lock(self.settings, service)
        context = ServiceContext(self.settings, service, read_secret(self.settings))
        zap = ZapHandler(context.zmq, context.identities, context.log)

        async def build(context: ServiceContext) -> object:
            return await handlers(context) if callable(handlers) else handlers

        names = [full_service_name(name) for name in proto_services]
        server = await start_service(context, build, names, bounds)
        self._running.append((context, zap, server, lock))
        return context, server

    def zap(self, server: Server) -> ZapHandler:
        """The handler that lets connections in to that server."""
        return next(row[1] for row in self._running if row[2] is server)

    async def stop(self, server: Server) -> None:
        """End one service."""
        for row in [r for r in self._running if r[2] is server]:
            self._running.remove(row)
            context, zap, _, lock = row
            await context.close()
            server.close()
            zap.close()
            context.zmq.destroy(linger=0)
            lock.__enter__()
            lock.__exit__(None, None, None)

    def connections(self, me: str, secret: bytes | None = None) -> Connections:
        """A client's connections, closed with the instance."""
        opened = Connections(self.settings, me, secret=secret)
        self._opened.append(opened)
        return opened

    def with_settings(self, **changes: Any) -> Settings:
        """The settings with some fields changed (not saved)."""
        return replace(self.settings, **changes)

    async def __aenter__(self) -> Instance:
        logging.getLogger("bulkhead").setLevel(logging.CRITICAL)
        return self

    async def __aexit__(self, *_exception: object) -> None:
        for opened in self._opened:
            opened.close()
        for _, _, server, _ in list(self._running):
            await self.stop(server)
        shutil.rmtree(self.root)
