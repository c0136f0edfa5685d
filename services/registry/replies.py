"""Replies that outlive the process: answers to repeated request ids.

Owns the bounded memory of finished replies, filled at start from the journal. Must not
know how a reply is made. Invariant: a reply in here that says "done" is durable in the
journal; refusals are kept in memory only, they changed nothing.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from bulkhead.api import envelope_pb2
from bulkhead.bus.dedup import Key, StoredReply
from services.registry.adapters.journal import REPLY_ROWS, REPLY_SECONDS, ReplyRow

_BYTES = 64 * 1024 * 1024


class DurableReplies:
    """A bulkhead.bus.dedup.ReplyStore.

    seq: the present one; a reply of an earlier start of the registry is answered with
    it, because its own counted from another zero.
    """

    def __init__(self, seq: Callable[[], int], *, clock: Callable[[], float] = time.time) -> None:
        self._seq = seq
        self._clock = clock
        self._bytes = 0
        # key -> (time, reply, of this start)
        self._replies: OrderedDict[Key, tuple[float, StoredReply, bool]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replies)

    def load(self, rows: Iterable[ReplyRow]) -> None:
        """Take in what the journal kept, oldest first. Damaged ones are left out: asked
        again they run again."""
        for row in rows:
            try:
                reply = StoredReply.from_bytes(row.body)
            except ValueError:
                continue
            self._keep((row.caller, row.request_id), row.time, reply, False)

    def get(self, caller: str, request_id: bytes) -> StoredReply | None:
        """The reply given before, or None."""
        held = self._replies.get((caller, request_id))
        if held is None or held[0] + REPLY_SECONDS < self._clock():
            return None
        _, reply, of_this_start = held
        if of_this_start:
            return reply
        header = envelope_pb2.ReplyHeader.FromString(reply.header)
        header.seq = self._seq()
        return StoredReply(reply.method, header.SerializeToString(), reply.body)

    def put(self, caller: str, request_id: bytes, reply: StoredReply) -> None:
        """Keep a reply of this start; the first one for a key counts."""
        if self.get(caller, request_id) is None:
            self._keep((caller, request_id), self._clock(), reply, True)

    def _keep(self, key: Key, at: float, reply: StoredReply, of_this_start: bool) -> None:
        self._drop(key)
        self._replies[key] = (at, reply, of_this_start)
        self._bytes += len(reply.header) + len(reply.body)
        while self._replies:
            oldest, (stored, _, _) = next(iter(self._replies.items()))
            if (
                len(self._replies) <= REPLY_ROWS
                and self._bytes <= _BYTES
                and stored + REPLY_SECONDS >= self._clock()
            ):
                break
            self._drop(oldest)

    def _drop(self, key: Key) -> None:
        held = self._replies.pop(key, None)
        if held is not None:
            self._bytes -= len(held[1].header) + len(held[1].body)
