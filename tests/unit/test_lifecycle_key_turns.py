"""Many clients write to the keys of one network qube; its queue in domains stays short."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bulkhead.api import domains_pb2
from bulkhead.bus.errors import BusError
from services.domains.qube_queue import WAITERS
from services.lifecycle.key_turns import WRITES, DomainsInTurns


class Channel:
    """Counts what is under way for each qube; answers when it is let go."""

    def __init__(self) -> None:
        self.under_way: dict[str, int] = {}
        self.most = 0
        self.done = 0
        self.timeouts: list[float] = []
        self.go = asyncio.Event()

    async def call(self, _method: str, request: Any, _reply: Any, **how: Any) -> Any:
        uuid = request.boot.uuid
        self.under_way[uuid] = self.under_way.get(uuid, 0) + 1
        self.most = max(self.most, self.under_way[uuid])
        self.timeouts.append(how["timeout"])
        try:
            await self.go.wait()
            await asyncio.sleep(0)
        finally:
            self.under_way[uuid] -= 1
        self.done += 1
        return domains_pb2.WriteGuestKeysReply()


def _request(uuid: str) -> domains_pb2.WriteGuestKeysRequest:
    return domains_pb2.WriteGuestKeysRequest(boot=domains_pb2.BootRef(uuid=uuid, boot_id="b"))


def _made() -> tuple[Any, DomainsInTurns]:
    channel: Any = Channel()
    return channel, DomainsInTurns(channel)


def test_many_writes_to_one_guest_come_one_after_the_other() -> None:
    async def body() -> None:
        channel, domains = _made()
        writes = [
            asyncio.create_task(domains.write_guest_keys(_request(uuid)))
            for uuid in ("net", "other")
            for _ in range(5 * WAITERS)
        ]
        for _ in writes:  # turns of the loop, not time: each has come to where it waits
            await asyncio.sleep(0)
        assert channel.under_way == {"net": WRITES, "other": WRITES}
        channel.go.set()
        await asyncio.gather(*writes)
        assert channel.most == WRITES < WAITERS
        assert channel.done == 10 * WAITERS
        assert domains._turns == {}

    asyncio.run(body())


def test_a_wait_is_part_of_the_calls_time() -> None:
    async def body() -> None:
        channel, domains = _made()
        held = [
            asyncio.create_task(domains.write_guest_keys(_request("net"))) for _ in range(WRITES)
        ]
        await asyncio.sleep(0)
        with pytest.raises(BusError) as refused:
            await domains.write_guest_keys(_request("net"), timeout=0.05)
        assert refused.value.code == "DEADLINE_EXCEEDED"
        late = asyncio.create_task(domains.write_guest_keys(_request("net"), timeout=5.0))
        gone = asyncio.create_task(domains.write_guest_keys(_request("net")))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        channel.go.set()
        await asyncio.gather(*held, late)
        assert 4.0 < channel.timeouts[-1] < 4.97
        assert domains._turns == {}

    asyncio.run(body())
