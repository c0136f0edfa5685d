"""An extension: qubes with the tag `offline` get no netvm.

Owns one rule. Must not keep state: it is asked with all that it needs to know.
Invariant: what is not about a netvm is allowed.

    deny_netvm.py --root DIR
"""

from __future__ import annotations

import os
import sys

from bulkhead.api import extension_pb2
from bulkhead.bus.confine import Confinement
from bulkhead.bus.runtime import ServiceContext, serve
from bulkhead.bus.server import Call
from bulkhead.config import Settings

NAME = "ext-deny_netvm"
TAG = "offline"


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


async def build(context: ServiceContext) -> DenyNetvm:
    """Nothing to prepare."""
    context.log.info("pid %d refuses netvms of qubes with the tag %s", os.getpid(), TAG)
    return DenyNetvm()


def confinement(settings: Settings) -> Confinement:
    """No file, no capability, no network."""
    del settings
    return Confinement()


if __name__ == "__main__":
    serve(NAME, build, ["Extension"], confinement=confinement, arguments=sys.argv[1:])
