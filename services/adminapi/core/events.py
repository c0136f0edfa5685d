"""Who gets which event: the open streams and what is written to each.

Owns the list of streams and the filter of each. Must not know sockets or the bus.
Invariant: every stream starts with connection-established, gets what concerns it in the
order of the registry's sequence, and is never told of what policy hides from its source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from bulkhead.model.records import ADMINVM_NAME, Qube, WireEvent
from bulkhead.model.view import View
from services.adminapi.core.exceptions import WireRefusal
from services.adminapi.core.frame import CONNECTION_ESTABLISHED, format_event
from services.adminapi.core.permission import Policy, may_see_event
from services.adminapi.core.policy_filter import confined_event
from services.adminapi.core.ring import Position, Ring, numbered, parse_position

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

    confined: the subscriber came through a socket of its own. resumable: each event says
    its position.
    """

    number: int
    source: str
    qube_uuid: str
    sink: Sink
    confined: bool = False
    resumable: bool = False


class Streams:
    """The open streams of admin.Events and bulkhead.Events."""

    def __init__(self) -> None:
        self._ring = Ring()
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
        stream = self._opened(Stream(self._next, source, qube_uuid, sink, confined))
        sink.push(CONNECTION_ESTABLISHED)
        return stream

    def _opened(self, stream: Stream) -> Stream:
        self._next += 1
        self._streams[stream.number] = stream
        return stream

    def resume(
        self,
        policy: Policy,
        view: View,
        stream: Stream,
        untrusted_position: str,
        gone: Mapping[str, Qube] = _NOBODY,
    ) -> Stream:
        """A resumable stream; number is given here. untrusted_position "" = from now on.

        connection-established and every event carry the pair position. Events behind the
        given position come first; where they are not all known any more, events-lost.
        Refusal PROTOCOL; WireRefusal TOO_MANY_STREAMS.
        """
        asked = parse_position(untrusted_position) if untrusted_position else self._ring.position
        if len(self._streams) >= STREAM_LIMIT:
            raise WireRefusal(
                "TOO_MANY_STREAMS", f"{STREAM_LIMIT} event streams are open already; close some"
            )
        stream = self._opened(replace(stream, number=self._next, resumable=True))
        past = self._ring.after(asked)
        if past is None:
            data = _positioned("connection-established", self._ring.position)
            data += _positioned("events-lost", self._ring.position)
        else:
            data = _positioned("connection-established", asked)
            data += _with_positions(policy, view, stream, past, gone)
        stream.sink.push(data)
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
        seq: int = 0,
    ) -> None:
        """Write the events of one entry to every stream that they concern.

        gone: the last records of qubes that were removed lately. seq: of the entry.
        """
        self._ring.add(seq, events)
        if not self._streams or not events:
            return
        encoded = [(e, format_event(e.subject, e.name, e.pairs)) for e in events]
        whole = b"".join(data for event, data in encoded if event.name not in _SINGLE_ONLY)
        behind = numbered(self._ring.position.boot, seq, events)
        for stream in list(self._streams.values()):
            if stream.resumable:
                data = _with_positions(policy, view, stream, behind, gone)
            elif stream.source == ADMINVM_NAME and not stream.qube_uuid:
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

    def restart(self, boot: str, seq: int, last: bytes) -> None:
        """Events before that point may have been missed: tell every stream.

        Streams that can be resumed go on with events-lost; the others end with `last`.
        """
        known = bool(self._ring.position.boot)
        self._ring.restart(boot, seq)
        if not known:
            return
        lost = _positioned("events-lost", self._ring.position)
        for stream in list(self._streams.values()):
            if stream.resumable:
                stream.sink.push(lost)
            else:
                self.close(stream.number)
                stream.sink.end(last)

    def end_all(self, last: bytes) -> None:
        """End every stream with the same message."""
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.sink.end(last)


def _positioned(name: str, position: Position) -> bytes:
    return format_event("", name, (("position", str(position)),))


def _with_positions(
    policy: Policy,
    view: View,
    stream: Stream,
    events: Iterable[tuple[Position, WireEvent]],
    gone: Mapping[str, Qube],
) -> bytes:
    """The events that the stream may have, each with the position behind it."""
    parts = []
    for position, event in events:
        if not _concerns(view, stream, event):
            continue
        shown: WireEvent | None = event
        if stream.confined:
            shown = confined_event(policy, view, stream.source, event, gone)
        elif not may_see_event(policy, view, stream.source, event):
            shown = None
        if shown is not None:
            pairs = (*shown.pairs, ("position", str(position)))
            parts.append(format_event(shown.subject, shown.name, pairs))
    return b"".join(parts)


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
