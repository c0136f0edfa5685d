"""A registry without the bus, driven over standard input: for killing it.

python -m tests.fault.registry_driver STATE_DIR

Reads one JSON object per line, answers one per line. It runs the service's own store,
engine, checkpointer and handlers; only sockets are missing. Requests go the way that the
dispatcher takes them: first the stored replies, then the handler.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bulkhead.api import records_pb2, registry_pb2
from bulkhead.bus.dedup import StoredReply
from bulkhead.bus.dispatch import Call
from bulkhead.bus.errors import BusError
from bulkhead.model.refusal import Refusal
from services.registry.adapters.journal import REPLY_SECONDS
from services.registry.adapters.statelock import AlreadyLocked, StateLock
from services.registry.checkpointer import Checkpointer
from services.registry.core.group import Accepted
from services.registry.engine import Engine
from services.registry.handlers import RegistryHandlers
from services.registry.initialise import StoreExists, initialise
from services.registry.numbers import RecentNumbers
from services.registry.replies import DurableReplies
from services.registry.store import StoreError, open_store

METHODS: dict[str, tuple[str, Any, str]] = {
    "mutate": ("Mutate", registry_pb2.MutateRequest, "adminapi"),
    "begin": ("Begin", registry_pb2.BeginRequest, "lifecycle"),
    "end": ("End", registry_pb2.EndRequest, "lifecycle"),
    "take_epoch": ("TakeEpoch", registry_pb2.TakeEpochRequest, "lifecycle"),
    "announce": ("Announce", registry_pb2.AnnounceRequest, "firewall"),
    "resolve_foreign_edit": (
        "ResolveForeignEdit",
        registry_pb2.ResolveForeignEditRequest,
        "operator",
    ),
    "store_status": ("StoreStatus", registry_pb2.StoreStatusRequest, "operator"),
}


class Sink:
    """Keeps the numbers of what would have been published."""

    def __init__(self) -> None:
        self.last = 0

    def publish(
        self, entry: records_pb2.StreamEntry, public: records_pb2.StreamEntry | None = None
    ) -> None:
        assert entry.seq == self.last + 1 and (public is None or public.seq == entry.seq)
        self.last = entry.seq

    def skip(self, seq: int, revision: int) -> None:
        assert seq == self.last + 1 and revision >= 0
        self.last = seq


class Driver:
    """The service's parts, wired as __main__ does."""

    def __init__(self, state_dir: Path) -> None:
        log = logging.getLogger("driver")
        self.store = open_store(state_dir)
        self.broken: BaseException | None = None
        checkpointers: list[Checkpointer] = []
        dispids = RecentNumbers()

        def committed(pieces: Sequence[Accepted]) -> None:
            dispids.changed(pieces)
            for checkpointer in checkpointers:
                checkpointer.changed(pieces)

        def fatal(error: BaseException) -> None:
            self.broken = error

        self.engine = Engine(
            self.store.view, self.store.journal, Sink(), committed=committed, fatal=fatal, log=log
        )
        self.checkpointer = Checkpointer(self.store, self.engine, log=log, delay=0.02)
        checkpointers.append(self.checkpointer)
        self.replies = DurableReplies(lambda: self.engine.seq)
        self.replies.load(self.store.journal.replies(time.time() - REPLY_SECONDS))
        self.handlers = RegistryHandlers(
            self.store,
            self.engine,
            self.checkpointer,
            self.replies,
            registry_boot=str(uuid.uuid4()),
            subscribers=lambda: 0,
            recent_dispids=dispids,
            log=log,
        )

    async def request(self, asked: dict[str, Any]) -> dict[str, Any]:
        name, kind, caller = METHODS[asked["do"]]
        request_id = bytes.fromhex(asked["id"])
        stored = self.replies.get(caller, request_id)
        if stored is not None:
            return {"reply": stored.body.hex(), "repeated": True}
        call = Call(caller, request_id=request_id, method=f"bulkhead.api.Registry.{name}")
        message = kind.FromString(bytes.fromhex(asked["message"]))
        try:
            reply = await getattr(self.handlers, asked["do"])(message, call)
        except (BusError, Refusal) as error:
            return {"refused": error.reason, "message": error.message}
        body: bytes = reply.SerializeToString()
        self.replies.put(caller, request_id, StoredReply(call.method, b"", body))
        return {"reply": body.hex(), "repeated": False, "revision": call.revision}

    async def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        match asked["do"]:
            case "dump":
                return {"dump": await self.dump()}
            case "settle":
                # A checkpoint now instead of in a moment.
                await self.checkpointer._round()
                return {"covers": self.checkpointer.current.covers}
            case "stop":
                await self.checkpointer.close()
                await self.engine.close()
                self.store.journal.close()
                return {"stopped": True}
            case _:
                return await self.request(asked)

    async def dump(self) -> str:
        page, text = 0, ""
        while True:
            reply = await self.handlers.dump(registry_pb2.DumpRequest(page=page), Call())
            text += reply.canonical_json
            if reply.last:
                return text
            page += 1


async def serve(state_dir: Path) -> None:
    driver = Driver(state_dir)
    say(
        {
            "start": driver.store.start.name,
            "revision": driver.engine.revision,
            "warnings": driver.store.warnings,
            "foreign": driver.store.foreign,
            "store_id": driver.store.journal.store_id,
        }
    )
    loop = asyncio.get_running_loop()
    while True:
        line = await loop.run_in_executor(None, sys.stdin.readline)
        if not line:
            return
        asked = json.loads(line)
        if asked["do"] == "many":
            answers = await asyncio.gather(*(driver.answer(one) for one in asked["all"]))
            say({"all": answers})
        else:
            try:
                answer = await driver.answer(asked)
            except OSError as error:
                answer = {"failed": str(error)}
            say(answer)
        if asked["do"] == "stop":
            return


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    logging.basicConfig(level=logging.CRITICAL)
    state_dir = Path(sys.argv[1])
    if sys.argv[2:] == ["init"]:
        try:
            say({"store_id": initialise(state_dir, state_dir, reflink=False)})
        except StoreExists as error:
            say({"refused": str(error)})
        return
    try:
        lock = StateLock.take(state_dir)
        asyncio.run(serve(state_dir))
        lock.release()
    except (AlreadyLocked, StoreError) as error:
        say({"refused": str(error)})


if __name__ == "__main__":
    main()
