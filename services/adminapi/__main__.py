"""adminapi: the sockets that tools and qrexec talk to. Wiring only."""

from __future__ import annotations

import os
from pathlib import Path

from bulkhead.bus.confine import Confinement
from bulkhead.bus.runtime import ServiceContext, serve
from bulkhead.config import Settings
from services.adminapi.actions import Actions
from services.adminapi.adapters.gateway import (
    LISTEN_FDS_VARIABLE,
    Gateway,
    bind_socket,
    inherited_sockets,
)
from services.adminapi.adapters.paused_list import PausedList
from services.adminapi.adapters.policy_files import PolicyFiles
from services.adminapi.audit_exporter import AuditExporter
from services.adminapi.backend import Backend
from services.adminapi.core.policy import Evaluator
from services.adminapi.handlers import AdminApi, RecentlyGone
from services.adminapi.policy_keeper import PolicyKeeper


async def build(context: ServiceContext) -> AdminApi:
    """Follow the registry, then take connections."""
    backend = Backend(context)
    paused = PausedList(context.settings.service_dir("adminapi") / "previously-paused.list")
    gone = RecentlyGone(backend.replica)
    policy = PolicyKeeper(
        PolicyFiles(_policy_directories(context.settings)),
        Evaluator(lambda: backend.view, gone.find),
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
    api = AdminApi(backend, Actions(backend, policy, paused), policy, exporter)
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
        await exporter.close()
        gateway.close()

    context.on_stop(stop)
    return api


def _audit_directory(settings: Settings) -> Path:
    """Made by the launcher, which alone may write its parent."""
    return settings.log_dir / "audit"


def _policy_directories(settings: Settings) -> tuple[Path, Path]:
    """What is in run/ hides what has the same name in etc/."""
    return settings.run_dir / "qubes/policy.d", settings.etc_dir / "policy.d"


def confinement(settings: Settings) -> Confinement:
    """Reads policy; binds the sockets itself only where nobody hands them in."""
    own = not os.environ.get(LISTEN_FDS_VARIABLE, "")
    audit = _audit_directory(settings)
    return Confinement(
        read=tuple(d for d in (settings.etc_dir, settings.run_dir / "qubes") if d.exists()),
        write=((settings.run_dir,) if own else ()) + ((audit,) if audit.exists() else ()),
    )


if __name__ == "__main__":
    serve("adminapi", build, [], confinement=confinement)
