"""adminapi: the sockets that tools and qrexec talk to. Wiring only."""

from __future__ import annotations

import os
from pathlib import Path

from bulkhead import extensions
from bulkhead.bus.confine import Confinement
from bulkhead.bus.runtime import ServiceContext, serve
from bulkhead.config import Settings
from bulkhead.model.policy import Evaluator, ViewWorld
from bulkhead.policy_files import PolicyFiles
from services.adminapi.actions import Actions
from services.adminapi.adapters.callers import CallerSockets
from services.adminapi.adapters.gateway import (
    LISTEN_FDS_VARIABLE,
    Gateway,
    bind_socket,
    inherited_sockets,
    room_for_connections,
)
from services.adminapi.adapters.paused_list import PausedList
from services.adminapi.audit_exporter import AuditExporter
from services.adminapi.backend import Backend
from services.adminapi.callers import Callers
from services.adminapi.handlers import AdminApi, RecentlyGone
from services.adminapi.policy_keeper import PolicyKeeper
from services.adminapi.vetoes import Vetoes


async def build(context: ServiceContext) -> AdminApi:
    """Follow the registry, then take connections."""
    backend = Backend(context)
    declared = extensions.load(context.settings.root)
    backend.vetoes = Vetoes(declared, context.channel)
    paused = PausedList(context.settings.service_dir("adminapi") / "previously-paused.list")
    gone = RecentlyGone(backend.replica)
    policy = PolicyKeeper(
        PolicyFiles.of(context.settings),
        Evaluator(ViewWorld(lambda: backend.view, gone.find)),
    )
    policy.load()
    context.spawn(policy.follow(), "policy")
    exporter = AuditExporter(
        _audit_directory(context.settings),
        lambda: context.channel("registry"),
        backend.replica,
        context.counters,
    )
    context.spawn(exporter.run(), "audit")
    actions = Actions(backend, policy, paused)
    api = AdminApi(backend, actions, policy, exporter)
    api.extensions = {extension.service: extension for extension in declared}
    callers = Callers(CallerSockets(context.settings.callers_dir), backend.replica)
    actions.callers = callers
    api.confine(callers, policy, gone)
    gateway = Gateway(api, limit=room_for_connections(), counters=api.counters)
    inherited = os.environ.get(LISTEN_FDS_VARIABLE, "")
    if inherited:
        sockets = inherited_sockets(inherited)
    else:
        sockets = {
            name: bind_socket(path) for name, path in context.settings.admin_sockets().items()
        }
    await gateway.listen(sockets)
    context.spawn(callers.serve_with(gateway), "callers")

    async def stop() -> None:
        gateway.close_listeners()
        await api.stop()
        await exporter.close()
        gateway.close()

    context.on_stop(stop)
    return api


def _audit_directory(settings: Settings) -> Path:
    """Made by the launcher, which alone may write its parent."""
    return settings.log_dir / "audit"


def confinement(settings: Settings) -> Confinement:
    """Reads policy; binds the sockets itself only where nobody hands them in."""
    own = not os.environ.get(LISTEN_FDS_VARIABLE, "")
    audit = _audit_directory(settings)
    policy = (settings.etc_dir, settings.etc_dir.parent / "qubes-rpc", settings.run_dir / "qubes")
    written = (audit, settings.callers_dir)
    read = (*policy, settings.root / "etc/bulkhead")
    return Confinement(
        read=tuple(d for d in read if d.exists()),
        write=((settings.run_dir,) if own else ()) + tuple(d for d in written if d.exists()),
    )


if __name__ == "__main__":
    serve("adminapi", build, [], confinement=confinement)
