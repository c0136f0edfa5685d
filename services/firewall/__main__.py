"""python -m services.firewall --root DIR: wires the firewall service.

Owns what is built from what. Invariant: the resolve worker's supervisor is started before this
process gives up INET sockets, because a child could never have more than its parent.
"""

from __future__ import annotations

import re
import socket

from bulkhead.api import hostd_pb2, records_pb2, registry_pb2
from bulkhead.bus.client import CallContext
from bulkhead.bus.confine import Confinement
from bulkhead.bus.errors import BusError
from bulkhead.bus.runtime import ServiceContext, serve
from bulkhead.config import Settings
from services.firewall import failpoint_table
from services.firewall.adapters.enforcer_client import EnforcerClient
from services.firewall.adapters.planned_enforcer import PlannedEnforcer
from services.firewall.adapters.resolver_client import ResolverClient, start_worker
from services.firewall.adapters.rules_files import RulesFiles
from services.firewall.adapters.state_files import StateFiles
from services.firewall.core.enforcement import Enforcer, EnforcerGone, NamespaceGone
from services.firewall.core.resolv_conf import name_servers
from services.firewall.handlers import FirewallHandlers
from services.firewall.keeper import RuleKeeper

_NAMESPACE = re.compile(r"bh[0-9a-f]{0,4}-net-([0-9]{1,5})\Z")
_CALL_S = 8.0
# Where clients' DNS queries go, in the format of resolv.conf; absent: on to the uplink.
RESOLVERS_FILE = "firewall-resolvers.conf"


def read_resolvers(settings: Settings) -> tuple[str, ...]:
    """Addresses in etc/qubes/firewall-resolvers.conf; none when it is absent."""
    try:
        return name_servers((settings.etc_dir / RESOLVERS_FILE).read_text(errors="replace"))
    except OSError:
        return ()


async def build(context: ServiceContext, resolver_socket: socket.socket) -> FirewallHandlers:
    """The service's handlers, with everything noted before taken up again."""
    settings = context.settings

    async def announce(uuid: str, event: bool, digest: str | None) -> tuple[int, int]:
        request = registry_pb2.AnnounceRequest(uuid=uuid)
        if event:
            # The registry names the subject: rules are kept by uuid, and names change.
            request.events.append(records_pb2.WireEvent(name="firewall-changed", subject_uuid=uuid))
        if digest is not None:
            request.rules_digest = digest
        header, _ = await context.channel("registry").call_with_header(
            "bulkhead.api.Registry.Announce",
            request,
            registry_pb2.AnnounceReply,
            timeout=_CALL_S,
            context=CallContext(),
        )
        return header.revision, header.seq

    async def open_enforcer(namespace: str) -> Enforcer:
        if not namespace:
            return PlannedEnforcer()
        found = _NAMESPACE.match(namespace)
        if found is None:
            raise NamespaceGone(f"{namespace} is no network qube's namespace")
        qid = int(found[1])

        async def spawn() -> str:
            try:
                reply = await context.channel("hostd").call(
                    "bulkhead.api.Hostd.SpawnEnforcer",
                    hostd_pb2.SpawnEnforcerRequest(qid=qid),
                    hostd_pb2.SpawnEnforcerReply,
                    timeout=_CALL_S,
                )
            except BusError as error:
                if error.reason == "NAMESPACE_MISSING":
                    raise NamespaceGone(error.message) from error
                raise EnforcerGone(error.message) from error
            return reply.socket

        return EnforcerClient(spawn)

    resolver = ResolverClient(resolver_socket)
    keeper = RuleKeeper(
        RulesFiles(settings.rules_dir),
        StateFiles(settings.service_dir("firewall")),
        announce,
        open_enforcer,
        resolver,
        resolvers=read_resolvers(settings),
        log=context.log,
    )
    await keeper.adopt()
    handlers = FirewallHandlers(keeper)
    context.spawn(keeper.run_expiry(), "expiry")
    context.spawn(keeper.run_names(), "names")
    context.spawn(keeper.run_announcements(), "announcements")

    async def stop() -> None:
        await handlers.settle()
        await keeper.close()
        resolver.close()

    context.on_stop(stop)
    return handlers


def confinement(settings: Settings) -> Confinement:
    """Its own files and nothing else; no capability, no INET."""
    settings.rules_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Confinement(
        read=(settings.bus_dir, settings.etc_dir),
        write=(settings.rules_dir, *failpoint_table.directories()),
    )


def main() -> None:
    """Run until SIGTERM."""
    resolver_socket, _ = start_worker()

    async def built(context: ServiceContext) -> FirewallHandlers:
        return await build(context, resolver_socket)

    serve("firewall", built, ["Firewall"], confinement=confinement)


if __name__ == "__main__":
    main()
