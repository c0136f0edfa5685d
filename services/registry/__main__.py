"""Runs the registry: python -m services.registry --root DIR.

Owns the wiring. Must not hold any rule of its own. Invariant: the lock on the state
directory is taken before anything in it is read, and nothing is served before the store
is whole.
"""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from bulkhead.bus.confine import Confinement
from bulkhead.bus.runtime import ServiceContext, serve
from bulkhead.config import Settings
from services.registry import failpoint_table as _rows  # noqa: F401  (declares the names)
from services.registry.adapters.journal import REPLY_SECONDS
from services.registry.adapters.statelock import AlreadyLocked, StateLock
from services.registry.checkpointer import Checkpointer
from services.registry.core.group import Accepted
from services.registry.engine import Engine
from services.registry.handlers import RegistryHandlers
from services.registry.numbers import RecentNumbers
from services.registry.replies import DurableReplies
from services.registry.store import StoreError, open_store

_EXIT_CONFIG = 78


async def build(context: ServiceContext) -> object:
    """The handlers of Registry, over the store of the instance."""
    settings, log = context.settings, context.log
    loop = asyncio.get_running_loop()
    try:
        lock = StateLock.take(settings.state_dir)
        started = time.monotonic()
        store = await loop.run_in_executor(None, open_store, settings.state_dir)
    except (AlreadyLocked, StoreError, OSError) as error:
        log.critical("the registry cannot start: %s", error)
        sys.exit(_EXIT_CONFIG)
    log.info(
        "%s: %d qubes at revision %d in %.2f s",
        store.start.value,
        len(store.view),
        store.journal.revision,
        time.monotonic() - started,
    )
    for warning in store.warnings:
        log.warning("%s", warning)

    boot = str(uuid.uuid4())
    publisher = context.publisher
    publisher.start(
        settings.socket("registry", "stream"), store.journal.store_id, boot, store.journal.revision
    )
    broken: asyncio.Future[None] = loop.create_future()
    checkpointers: list[Checkpointer] = []

    dispids = RecentNumbers()

    def committed(pieces: Sequence[Accepted]) -> None:
        dispids.changed(pieces)
        for checkpointer in checkpointers:
            checkpointer.changed(pieces)

    def fatal(error: BaseException) -> None:
        if not broken.done():
            broken.set_exception(error)

    engine = Engine(store.view, store.journal, publisher, committed=committed, fatal=fatal, log=log)
    checkpointer = Checkpointer(store, engine, log=log)
    checkpointers.append(checkpointer)
    replies = DurableReplies(lambda: engine.seq)
    replies.load(store.journal.replies(time.time() - REPLY_SECONDS))

    async def watch() -> None:
        """Ends the process when the journal is broken: only a start tells what is in it."""
        await broken

    async def stop() -> None:
        if not broken.done():
            await checkpointer.close()
        await engine.close()
        store.journal.close()
        lock.release()

    context.spawn(watch(), "journal")
    context.on_stop(stop)
    return RegistryHandlers(
        store,
        engine,
        checkpointer,
        replies,
        registry_boot=boot,
        subscribers=lambda: publisher.subscribers,
        recent_dispids=dispids,
        log=log,
    )


def confinement(settings: Settings) -> Confinement:
    """Its own directory, and the names of groups."""
    return Confinement(
        read=tuple(p for p in map(Path, ("/etc/group", "/etc/nsswitch.conf")) if p.exists()),
        write=(settings.state_dir,),
    )


def main() -> None:
    """Serve until SIGTERM."""
    serve("registry", build, ("Registry",), confinement=confinement)


if __name__ == "__main__":
    main()
