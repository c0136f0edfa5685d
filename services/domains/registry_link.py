"""The registry over the bus, as the reporter needs it.

Owns the calls and their timeouts. Must not know what facts mean. Invariant: instance()
changes whenever the registry's process does.
"""

from __future__ import annotations

from bulkhead import codec
from bulkhead.api import control_pb2, registry_pb2
from bulkhead.bus.client import Channel
from bulkhead.model.records import Fact, fact_key
from clients.bus import ControlClient, RegistryClient

TIMEOUT_S = 5.0
# Two readings of one process's start differ by less than this.
SAME_START_S = 0.5


class BusRegistryLink:
    """RegistryLink over a channel to the registry."""

    def __init__(self, channel: Channel) -> None:
        self._registry = RegistryClient(channel)
        self._control = ControlClient(channel)
        self._pid = 0
        self._uptime = 0.0
        self._runs = 0

    async def facts(self, put: list[Fact], removed: list[str], complete: bool) -> None:
        """Registry.Facts. BusError when it was not told."""
        await self._registry.facts(
            registry_pb2.FactsRequest(
                put=[codec.fact_to_proto(fact, fact_key(fact)) for fact in put],
                removed=removed,
                complete=complete,
            ),
            timeout=TIMEOUT_S,
        )

    async def instance(self) -> str:
        """Counts the registry's runs, seen by process id and a clock that went back."""
        health = await self._control.health(control_pb2.HealthRequest(), timeout=2.0)
        if health.pid != self._pid or health.uptime_s + SAME_START_S < self._uptime:
            self._runs += 1
        self._pid, self._uptime = health.pid, health.uptime_s
        return f"run {self._runs}"

    async def epoch(self) -> int:
        """Registry.GetEpoch."""
        reply = await self._registry.get_epoch(registry_pb2.GetEpochRequest(), timeout=TIMEOUT_S)
        return reply.epoch
