"""The firewall's end of an enforce worker.

Owns the connection to the worker's socket. Must not know rules. Invariant: a
transaction whose answer did not come is sent again as a whole, which is safe because
every transaction may be repeated; only when that fails too is the worker "gone".
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from services.firewall.core.enforcement import (
    EnforcerGone,
    KernelRefusal,
    TableStatus,
)
from services.firewall.core.flows import Flow
from services.firewall.core.ruleset import Transaction
from services.firewall.core.wire import LIMIT, Frames, WireError, pack

ANSWER_S = 15.0
CONNECT_S = 3.0
ATTEMPTS = 3
_PAUSE_S = 0.05

# Makes sure that a worker runs; its socket's path. EnforcerGone.
Spawn = Callable[[], Awaitable[str]]


class EnforcerClient:
    """An Enforcer in another process and namespace."""

    def __init__(self, spawn: Spawn) -> None:
        self._spawn = spawn
        self._lock = asyncio.Lock()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    @property
    def real(self) -> bool:
        return True

    async def _connect(self) -> None:
        path = await self._spawn()
        try:
            async with asyncio.timeout(CONNECT_S):
                self._reader, self._writer = await asyncio.open_unix_connection(path)
        except (OSError, TimeoutError) as error:
            raise EnforcerGone(f"the enforce worker at {path} does not accept: {error}") from error

    def _disconnect(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    async def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._writer is None:
            await self._connect()
        assert self._reader is not None and self._writer is not None
        frames = Frames()
        async with asyncio.timeout(ANSWER_S):
            self._writer.write(pack(request))
            await self._writer.drain()
            while True:
                data = await self._reader.read(1 << 18)
                if not data:
                    raise ConnectionResetError("the enforce worker went")
                answers = frames.feed(data)
                if answers:
                    return answers[0]

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One answer. KernelRefusal where it says no, EnforcerGone where none comes."""
        async with self._lock:
            why: Exception | None = None
            for attempt in range(ATTEMPTS):
                if attempt:
                    await asyncio.sleep(_PAUSE_S * attempt)
                try:
                    answer = await self._exchange(request)
                except (OSError, WireError, TimeoutError) as error:
                    self._disconnect()
                    why = error
                    continue
                except BaseException:
                    # A half read answer must not be taken for the next request's.
                    self._disconnect()
                    raise
                if answer.get("ok") is True:
                    return answer
                raise KernelRefusal(str(answer.get("error", "no reason given")))
            raise EnforcerGone(f"the enforce worker does not answer: {why}")

    async def change(self, transaction: Transaction) -> None:
        request = {
            "op": "change",
            "commands": list(transaction.commands),
            "marks": dict(transaction.marks),
        }
        if sum(len(command) + 3 for command in transaction.commands) > LIMIT // 2:
            raise KernelRefusal("the rules are too many for one transaction")
        await self._ask(request)

    async def status(self) -> TableStatus:
        answer = await self._ask({"op": "status"})
        return TableStatus(
            bool(answer["present"]), dict(answer["marks"]), _pairs(answer["counters"])
        )

    async def rule_counters(self, tag: str) -> Mapping[str, tuple[int, int]]:
        return _pairs((await self._ask({"op": "rule_counters", "tag": tag}))["counters"])

    async def listing(self, tag: str) -> str:
        return str((await self._ask({"op": "listing", "tag": tag}))["text"])

    async def flows(self, addresses: Sequence[str]) -> tuple[Flow, ...]:
        answer = await self._ask({"op": "flows", "addresses": list(addresses)})
        return tuple(Flow(**flow) for flow in answer["flows"])

    async def cut(self, flows: Sequence[Flow]) -> None:
        if flows:
            await self._ask({"op": "cut", "flows": [asdict(flow) for flow in flows]})

    async def close(self) -> None:
        async with self._lock:
            self._disconnect()


def _pairs(values: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    return {name: (int(pair[0]), int(pair[1])) for name, pair in values.items()}
