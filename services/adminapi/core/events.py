"""Who gets which event: the open streams and what is written to each.

Owns the list of streams and the filter of each. Must not know sockets or the bus.
Invariant: every stream starts with connection-established, gets what concerns it in the
order of the registry's sequence, and is never told of what policy hides from its source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bulkhead.model.records import ADMINVM_NAME, Qube, WireEvent
from bulkhead.model.view import View
from services.adminapi.core.exceptions import WireRefusal
from services.adminapi.core.frame import CONNECTION_ESTABLISHED, format_event
from services.adminapi.core.permission import Policy, may_see_event
from services.adminapi.core.policy_filter import confined_event

STREAM_LIMIT = 512
# Comes after the qube is gone from every list: only a stream of that one qube gets it.
_SINGLE_ONLY = frozenset({"domain-remove-from-disk"})
_NOBODY: Mapping[str, Qube] = {}


class Sink(Protocol):
    """Where a stream's bytes go."""

    def push(self, data: bytes) -> None:
        """Queue bytes; the sink itself ends a stream whose reader is too slow."""

    def end(self, data: bytes = b"") -> None:
        """Queue the last bytes and close when they are out."""


@dataclass(frozen=True, slots=True)
class Stream:
    """An open stream. qube_uuid "" = everything; source = name of the subscriber.

    confined: the subscriber came through a socket of its own.
    """

    number: int
    source: str
    qube_uuid: str
    sink: Sink
    confined: bool = False


class Streams:
    """The open admin.Events streams."""

    def __init__(self) -> None:
        self._streams: dict[int, Stream] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, source: str, qube_uuid: str, sink: Sink, *, confined: bool = False) -> Stream:
        """A new stream, begun with connection-established. WireRefusal TOO_MANY_STREAMS."""
        if len(self._streams) >= STREAM_LIMIT:
            raise WireRefusal(
                "TOO_MANY_STREAMS", f"{STREAM_LIMIT} event streams are open already; close some"
            )
        stream = Stream(self._next, source, qube_uuid, sink, confined)
        self._next += 1
        self._streams[stream.number] = stream
        sink.push(CONNECTION_ESTABLISHED)
        return stream

    def close(self, number: int) -> None:
        """The reader is gone."""
        self._streams.pop(number, None)

    def publish(
        self,
        policy: Policy,
        view: View,
        events: Sequence[WireEvent],
        gone: Mapping[str, Qube] = _NOBODY,
    ) -> None:
        """Write the events of one entry to every stream that they concern.

        gone: the last records of qubes that were removed lately.
        """
        if not self._streams or not events:
            return
        encoded = [(e, format_event(e.subject, e.name, e.pairs)) for e in events]
        whole = b"".join(data for event, data in encoded if event.name not in _SINGLE_ONLY)
        for stream in list(self._streams.values()):
            if stream.source == ADMINVM_NAME and not stream.qube_uuid:
                data = whole
            elif stream.confined:
                seen = (
                    confined_event(policy, view, stream.source, event, gone)
                    for event in events
                    if _concerns(view, stream, event)
                )
                data = b"".join(format_event(e.subject, e.name, e.pairs) for e in seen if e)
            else:
                data = b"".join(
                    data
                    for event, data in encoded
                    if _concerns(view, stream, event)
                    and may_see_event(policy, view, stream.source, event)
                )
            if data:
                stream.sink.push(data)

    def end_all(self, last: bytes) -> None:
        """End every stream with the same message."""
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.sink.end(last)


def _concerns(view: View, stream: Stream, event: WireEvent) -> bool:
    if not stream.qube_uuid:
        return event.name not in _SINGLE_ONLY
    if not event.subject:
        return False
    if event.subject_uuid:
        return event.subject_uuid == stream.qube_uuid
    qube = view.by_uuid(stream.qube_uuid)
    return qube is not None and qube.name == event.subject


def operation_events(
    records: Iterable[dict[str, object]],
) -> Iterator[WireEvent]:
    """What bulkhead.op.Watch sends for operations that moved."""
    for record in records:
        pairs = tuple(
            (key, _text(record.get(key, "")))
            for key in ("id", "kind", "state", "qubes", "progress", "step", "text", "error")
        )
        yield WireEvent("", "bulkhead-operation", pairs)


def _text(value: object) -> str:
    return " ".join(str(v) for v in value) if isinstance(value, list) else str(value)
