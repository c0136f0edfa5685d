"""Runs storage: python -m services.storage --root DIR. Wiring only."""

from __future__ import annotations

from pathlib import Path

from bulkhead.bus.confine import Confinement
from bulkhead.bus.runtime import ServiceContext, serve
from bulkhead.config import Settings
from bulkhead.model.epoch import EpochGuard
from services.storage.adapters.data_socket import DataSocket
from services.storage.core.reasons import StorageRefusal
from services.storage.facts import BusRegistryLink, PoolWatch
from services.storage.handlers import StorageHandlers
from services.storage.workers import Workers


async def build(context: ServiceContext) -> StorageHandlers:
    """Open the data socket, find the registry, watch the pools known before."""
    directory = context.settings.service_dir("storage")
    guard = EpochGuard("storage", StorageRefusal)
    workers = Workers()
    watch = PoolWatch(
        BusRegistryLink(context.channel("registry")), workers, directory / "pools.json", guard.learn
    )
    data = DataSocket(directory / "data.sock")
    data.start()
    handlers = StorageHandlers(guard, workers, watch, data)
    context.on_stop(handlers.stop_transfers)
    context.on_stop(watch.close)
    context.spawn(watch.run(), "facts")
    return handlers


def confinement(settings: Settings) -> Confinement:
    """No network and no capability but the right to give images to the disk group.

    Landlock stays off: an administrator may add a pool in any directory at any time, and
    the service's own user can write only where it was given the right.
    """
    return Confinement(
        keep_caps=() if settings.isolated else ("chown", "fowner"),
        execute=(Path("/usr/bin"), Path("/usr/local/bin"), Path("/bin")),
        landlock=False,
    )


def main() -> None:
    """Serve until SIGTERM."""
    serve("storage", build, ["Storage"], confinement=confinement)


if __name__ == "__main__":
    main()
