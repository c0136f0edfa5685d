"""A service process for bus tests: python -m tests.fakes.bus_service SERVICE --root DIR.

Serves as SERVICE. Its effect is a line in DIR/effects; the reply is stored in the same
durable file as the effect, as the registry does it. Dies by SIGKILL where the environment
says so: BUS_TEST_DIE=before (the effect) or after (it, before the reply leaves), once.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from bulkhead.bus.confine import Confinement
from bulkhead.bus.dedup import StoredReply
from bulkhead.bus.runtime import ServiceContext, serve
from bulkhead.bus.server import Call
from bulkhead.config import Settings
from bulkhead.durable import write_file
from tests.fakes.bus import Answers

PROTO = {"registry": "Registry", "domains": "Domains", "storage": "Storage"}
_NAMED = ("take_epoch", "mutate")


class FileStore:
    """Effects and replies in one file, replaced atomically."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.effects: list[str] = []
        self.replies: dict[str, str] = {}
        if path.exists():
            data = json.loads(path.read_text())
            self.effects, self.replies = data["effects"], data["replies"]

    def commit(self, effect: str, key: str, blob: bytes) -> None:
        self.effects.append(effect)
        self.replies[key] = base64.b64encode(blob).decode()
        data = {"effects": self.effects, "replies": self.replies}
        write_file(self._path, json.dumps(data).encode())

    def get(self, caller: str, request_id: bytes) -> StoredReply | None:
        blob = self.replies.get(f"{caller}/{request_id.hex()}")
        return None if blob is None else StoredReply.from_bytes(base64.b64decode(blob))

    def put(self, caller: str, request_id: bytes, reply: StoredReply) -> None:
        raise AssertionError("every handler here stores its reply itself")


def _die(root: Path, where: str) -> None:
    marker = root / "died"
    if os.environ.get("BUS_TEST_DIE") == where and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


async def _build(context: ServiceContext) -> object:
    root = context.settings.root
    store = FileStore(root / "effects")

    async def act(request: Any, call: Call) -> Any:
        from bulkhead.bus.methods import METHODS

        _die(root, "before")
        call.revision = len(store.effects) + 1
        reply = METHODS[call.method].reply_type()
        store.commit(
            call.method, f"{call.caller}/{call.request_id.hex()}", call.freeze_reply(reply)
        )
        call.reply_stored = True
        _die(root, "after")
        return reply

    handlers = Answers(PROTO[context.service], own=dict.fromkeys(_NAMED, act))
    if context.service == "registry":
        handlers.reply_store = store  # type: ignore[attr-defined]
    if os.environ.get("BUS_TEST_CRASH"):

        async def crash() -> None:
            raise RuntimeError("background work failed")

        context.spawn(crash(), "crash")
    return handlers


def _needs(settings: Settings) -> Confinement:
    return Confinement(write=(settings.root,))


if __name__ == "__main__":
    name = sys.argv[1]
    serve(name, _build, [PROTO[name]], arguments=sys.argv[2:], confinement=_needs)
