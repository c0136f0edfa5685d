"""An extension: qubes with the tag `offline` have no netvm.

Owns one rule, as a veto and as what it does about qubes that get the tag while they have a
netvm. Must not keep state: after a restart it looks at everything again. Invariants: what
is not about a netvm is allowed; nothing blocks the loop, on which it must answer within 2 s.

    deny_netvm.py --root DIR
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from bulkhead.api import extension_pb2
from bulkhead.bus.confine import Confinement
from bulkhead.bus.runtime import ServiceContext, serve
from bulkhead.bus.server import Call
from bulkhead.config import Settings
from clients.admin import AsyncAdminClient, exceptions

NAME = "ext-deny_netvm"
TAG = "offline"
RETRY_S = 1.0


def verdict(event: str, pairs: dict[str, str], tags: set[str]) -> str:
    """Why the event is refused, "" where it is not."""
    if event != "property-pre-set:netvm" or TAG not in tags:
        return ""
    netvm = pairs.get("newvalue", "")
    return f"the qube has the tag {TAG}" if netvm not in ("", "None") else ""


class DenyNetvm:
    """The service Extension."""

    async def ask(self, request: extension_pb2.AskRequest, call: Call) -> extension_pb2.AskReply:
        """Refuse a netvm for a qube with the tag."""
        del call
        pairs = {pair.key: pair.value for pair in request.pairs}
        reason = verdict(request.event, pairs, set(request.tags))
        return extension_pb2.AskReply(allow=not reason, reason=reason)


class Follower:
    """Takes the netvm of qubes that have the tag."""

    def __init__(self, client: AsyncAdminClient, log: logging.Logger) -> None:
        self._client = client
        self._log = log

    async def run(self) -> None:
        """Follow the events for ever, also over restarts of the service that sends them."""
        position = ""
        while True:
            try:
                async for event in self._client.events(resume=position):
                    # What has happened before the first event, or in a gap, nobody tells.
                    if event.name == "events-lost" or not position:
                        await self._look_at_all()
                    position = event.values["position"]
                    if event.name == f"domain-tag-add:{TAG}":
                        await self._look_at(event.subject)
            except exceptions.QubesException as error:
                self._log.info("no events now: %s", error)
            await asyncio.sleep(RETRY_S)

    async def _look_at_all(self) -> None:
        listed = (await self._client.call("admin.vm.List")).decode()
        for line in listed.splitlines():
            await self._look_at(line.split(" ")[0])

    async def _look_at(self, qube: str) -> None:
        try:
            if await self._client.call("admin.vm.tag.Get", qube, TAG) != b"1":
                return
            netvm = (await self._client.call("admin.vm.property.Get", qube, "netvm")).decode()
            if not netvm.endswith(" "):
                await self._client.call("admin.vm.property.Set", qube, "netvm", b"")
                self._log.info("%s has no netvm any more", qube)
        except exceptions.QubesDaemonCommunicationError:
            raise
        except exceptions.QubesException as error:
            # It has no netvm to take, or is not there any more.
            self._log.info("%s is left alone: %s", qube, error)


async def build(context: ServiceContext) -> DenyNetvm:
    """Begin to follow; what is returned answers."""
    socket = context.settings.service_dir(context.service) / "admin.sock"
    client = AsyncAdminClient(socket, timeout=30)
    context.spawn(Follower(client, context.log).run(), "follower")
    context.log.info("pid %d refuses netvms of qubes with the tag %s", os.getpid(), TAG)
    return DenyNetvm()


def confinement(settings: Settings) -> Confinement:
    """No file, no capability, no network; sockets of this host alone."""
    del settings
    return Confinement()


if __name__ == "__main__":
    serve(NAME, build, ["Extension"], confinement=confinement, arguments=sys.argv[1:])
