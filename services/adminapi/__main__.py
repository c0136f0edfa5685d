"""adminapi: the sockets that tools and qrexec talk to. Wiring only."""

from __future__ import annotations

import os

from bulkhead.bus.runtime import ServiceContext, serve
from services.adminapi.actions import Actions
from services.adminapi.adapters.gateway import (
    LISTEN_FDS_VARIABLE,
    Gateway,
    bind_socket,
    inherited_sockets,
)
from services.adminapi.adapters.paused_list import PausedList
from services.adminapi.backend import Backend
from services.adminapi.core.permission import DenyAll
from services.adminapi.handlers import AdminApi


async def build(context: ServiceContext) -> AdminApi:
    """Follow the registry, then take connections."""
    backend = Backend(context)
    paused = PausedList(context.settings.run_dir / "qubes/previously-paused.list")
    api = AdminApi(backend, Actions(backend, paused), DenyAll())
    gateway = Gateway(api)
    inherited = os.environ.get(LISTEN_FDS_VARIABLE, "")
    if inherited:
        sockets = inherited_sockets(inherited)
    else:
        sockets = {
            name: bind_socket(path) for name, path in context.settings.admin_sockets().items()
        }
    await gateway.listen(sockets)

    async def stop() -> None:
        gateway.close_listeners()
        await api.stop()
        gateway.close()

    context.on_stop(stop)
    return api


if __name__ == "__main__":
    serve("adminapi", build, [])
