"""lifecycle: executes operations that cross services. Wiring only."""

from __future__ import annotations

from pathlib import Path

from bulkhead.bus.confine import Confinement
from bulkhead.bus.runtime import ServiceContext, serve
from bulkhead.config import Settings
from clients.bus import (
    FirewallClient,
    HostdClient,
    RegistryClient,
    StorageClient,
)
from services.lifecycle.executor import Executor
from services.lifecycle.handlers import LifecycleHandlers
from services.lifecycle.key_turns import DomainsInTurns
from services.lifecycle.participants import Participants
from services.lifecycle.patience import Patience
from services.lifecycle.steps.table import STEPS
from services.lifecycle.watcher import Watcher


async def build(context: ServiceContext) -> LifecycleHandlers:
    """Connect, take an epoch, adopt what is unfinished."""
    with_hostd = context.settings.isolated
    participants = Participants(
        registry=RegistryClient(context.channel("registry")),
        storage=StorageClient(context.channel("storage")),
        domains=DomainsInTurns(context.channel("domains")),
        firewall=FirewallClient(context.channel("firewall")),
        hostd=HostdClient(context.channel("hostd")) if with_hostd else None,
    )
    replica = context.replica(with_hidden=True)
    executor = Executor(
        participants,
        replica,
        STEPS,
        uplink_namespace=context.settings.uplink_namespace,
        console_dir=context.settings.log_dir / "console",
    )
    watcher = Watcher(executor)
    patience = Patience(participants.registry, replica)
    replica.subscribe(patience.follow)

    async def run() -> None:
        await replica.ready()
        await executor.start()
        patience.start(executor.epoch)
        watcher.start()
        context.spawn(patience.run(), "patience")
        context.spawn(watcher.run_stops(), "stops")
        context.spawn(watcher.run_unaccounted(), "unaccounted")
        context.spawn(watcher.run_pools(), "pools")
        context.spawn(watcher.run_imports(), "imports")

    context.spawn(run(), "start")
    context.on_stop(executor.stop)
    return LifecycleHandlers(executor, watcher)


def confinement(_settings: Settings) -> Confinement:
    """The host's time zone, for the guests; nothing is written."""
    return Confinement(
        read=tuple(
            p
            for p in map(Path, ("/etc/timezone", "/etc/localtime", "/usr/share/zoneinfo"))
            if p.exists()
        )
    )


if __name__ == "__main__":
    serve("lifecycle", build, ["bulkhead.api.Lifecycle"], confinement=confinement)
