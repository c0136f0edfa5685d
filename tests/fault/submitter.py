"""A client of the bus under adminapi's user: for sending one request twice.

python -m tests.fault.submitter ROOT

Reads one JSON object per line, {"method", "body", "request_id", "timeout"} with body and
id in hexadecimal digits, and answers {"body"} or {"code", "reason", "message"}. Owns
nothing. Must not know what the requests do. Invariant: the id on the bus is the given one.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import Message

from bulkhead.api import lifecycle_pb2, registry_pb2
from bulkhead.bus.client import CallContext, Connections
from bulkhead.bus.errors import BusError
from bulkhead.config import Settings

REPLIES: dict[str, type[Message]] = {
    "bulkhead.api.Lifecycle.Submit": lifecycle_pb2.SubmitReply,
    "bulkhead.api.Registry.Mutate": registry_pb2.MutateReply,
}
REQUESTS: dict[str, type[Message]] = {
    "bulkhead.api.Lifecycle.Submit": lifecycle_pb2.SubmitRequest,
    "bulkhead.api.Registry.Mutate": registry_pb2.MutateRequest,
}


async def answer(connections: Connections, asked: Mapping[str, str]) -> dict[str, str]:
    """Send one request; its reply or its error."""
    method = asked["method"]
    request: Message = REQUESTS[method]()
    request.ParseFromString(bytes.fromhex(asked["body"]))
    service = method.split(".")[-2].lower()
    context = CallContext(request_id=bytes.fromhex(asked["request_id"]), on_behalf_of="dom0")
    try:
        reply: Message = await connections.channel(service).call(
            method, request, REPLIES[method], timeout=float(asked["timeout"]), context=context
        )
    except BusError as error:
        return {"code": error.code, "reason": error.reason, "message": error.message}
    return {"body": reply.SerializeToString().hex()}


async def main(root: Path) -> None:
    """Answer lines until they end."""
    connections = Connections(Settings.load(root), "adminapi")
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await answer(connections, json.loads(line))), flush=True)
    finally:
        connections.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
