"""Resumable streams: positions, the ring, and what is said when events are lost."""

from __future__ import annotations

import pytest

from bulkhead.model.records import WireEvent
from bulkhead.model.refusal import Refusal
from clients.admin.wire import Event, EventParser
from services.adminapi.core.events import Stream, Streams
from services.adminapi.core.permission import DenyAll
from services.adminapi.core.ring import Position, Ring, parse_position
from tests.fakes.adminapi import start_view

BOOT = "b00t-1"


class Sink:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.data = b""
        self.ended = False

    def push(self, data: bytes) -> None:
        self.data += data

    def end(self, data: bytes = b"") -> None:
        self.push(data)
        self.ended = True

    def events(self) -> list[Event]:
        return list(EventParser().feed(self.data))


def _event(number: int) -> WireEvent:
    return WireEvent("", f"event-{number}", (("vm", "tmpl"),))


def _names(ring: Ring, position: str) -> list[str] | None:
    found = ring.after(parse_position(position))
    return None if found is None else [event.name for _, event in found]


def test_positions() -> None:
    assert parse_position(f"{BOOT}.17.3") == Position(BOOT, 17, 3)
    for position in (Position(BOOT, 17, 3), Position(BOOT, 17)):
        assert parse_position(str(position)) == position
    for bad in ("", "17", f"{BOOT}.", f"{BOOT}.-1", f"{BOOT}.1.2.3", "a b.1", "x" * 65 + ".1"):
        with pytest.raises(Refusal):
            parse_position(bad)


def test_the_ring_gives_what_is_behind_a_position_or_nothing() -> None:
    ring = Ring()
    ring.restart(BOOT, 10)
    ring.add(11, [_event(1), _event(2), _event(3)])
    ring.add(12, [])
    ring.add(13, [_event(4)])
    assert _names(ring, f"{BOOT}.10") == ["event-1", "event-2", "event-3", "event-4"]
    assert _names(ring, f"{BOOT}.11.1") == ["event-2", "event-3", "event-4"]
    assert _names(ring, f"{BOOT}.11") == ["event-4"]
    assert _names(ring, f"{BOOT}.12") == ["event-4"]
    assert _names(ring, f"{BOOT}.13") == []
    for unknown in (f"{BOOT}.9", f"{BOOT}.14", "other.12", f"{BOOT}.10.1", f"{BOOT}.11.9"):
        assert _names(ring, unknown) is None


def test_the_ring_is_bounded_and_knows_what_it_dropped() -> None:
    ring = Ring(limit=2000)
    ring.restart(BOOT, 0)
    for number in range(1, 1001):
        ring.add(number, [_event(number)])
    kept = [n for n in range(1001) if _names(ring, f"{BOOT}.{n}") is not None]
    assert 5 < len(kept) < 40
    assert kept == list(range(kept[0], 1001))
    assert len(_names(ring, f"{BOOT}.{kept[0]}") or ()) == 1000 - kept[0]


def _resumed(streams: Streams, position: str, *, source: str = "dom0") -> Sink:
    sink = Sink()
    streams.resume(DenyAll(), start_view(), Stream(0, source, "", sink), position)
    return sink


def test_every_cut_of_a_stream_can_be_resumed_without_hole_or_repeat() -> None:
    streams, view = Streams(), start_view()
    streams.restart(BOOT, 5, b"")
    whole = _resumed(streams, "")
    for seq in range(6, 12):
        events = [_event(seq * 10 + i) for i in range(seq % 4)]
        streams.publish(DenyAll(), view, events, {}, seq)
    seen = whole.events()
    assert seen[0].name == "connection-established"
    names = [event.name for event in seen[1:]]
    assert names
    for cut, event in enumerate(seen):
        again = _resumed(streams, event.values["position"]).events()
        assert again[0].name == "connection-established"
        assert again[0].values["position"] == event.values["position"]
        assert names[:cut] + [e.name for e in again[1:]] == names


def test_a_lost_past_is_said_and_the_stream_goes_on() -> None:
    streams, view = Streams(), start_view()
    streams.restart(BOOT, 5, b"")
    for position in ("other.5", f"{BOOT}.3", f"{BOOT}.99"):
        sink = _resumed(streams, position)
        streams.publish(DenyAll(), view, [_event(1)], {}, 6)
        names = [event.name for event in sink.events()]
        assert names == ["connection-established", "events-lost", "event-1"]
        streams.restart(BOOT, 5, b"")


def test_a_new_start_of_the_registry_is_said_to_both_kinds_of_stream() -> None:
    streams = Streams()
    streams.restart(BOOT, 5, b"")
    plain, resumable = Sink(), _resumed(streams, "")
    streams.open("dom0", "", plain)
    streams.restart("b00t-2", 2, b"2\0E\0\0lost\0")
    assert plain.ended and plain.data.endswith(b"lost\0")
    assert not resumable.ended
    last = resumable.events()[-1]
    assert (last.name, last.values["position"]) == ("events-lost", "b00t-2.2")


def test_policy_holds_for_the_past_too() -> None:
    streams, view = Streams(), start_view()
    streams.restart(BOOT, 5, b"")
    streams.publish(DenyAll(), view, [_event(1)], {}, 6)
    names = [e.name for e in _resumed(streams, f"{BOOT}.5", source="work").events()]
    assert names == ["connection-established"]


def test_plain_streams_have_no_position() -> None:
    streams, view, sink = Streams(), start_view(), Sink()
    streams.restart(BOOT, 5, b"")
    streams.open("dom0", "", sink)
    streams.publish(DenyAll(), view, [_event(1)], {}, 6)
    assert sink.data == b"1\0\0connection-established\0\0" + b"1\0\0event-1\0vm\0tmpl\0\0"
