"""Any bytes give a message or a counted drop, never anything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.api import envelope_pb2, records_pb2
from bulkhead.bus import frames
from bulkhead.bus.dedup import StoredReply
from bulkhead.bus.dispatch import Dispatcher, Work
from bulkhead.bus.methods import Lane
from tests.fakes.bus import Answers

ID = bytes(range(16))


def good_header(**fields: object) -> bytes:
    values = {"request_id": ID, "method": "bulkhead.api.Domains.Stats", **fields}
    return envelope_pb2.RequestHeader(**values).SerializeToString()  # type: ignore[arg-type]


@given(st.lists(st.binary(max_size=200), max_size=6))
def test_any_frames_as_request(parts: list[bytes]) -> None:
    try:
        header, body = frames.decode_request(parts)
    except frames.FrameError as error:
        assert error.counter in frames.COUNTERS
    else:
        assert len(header.request_id) == 16 and body == parts[2]


@given(st.binary(max_size=300), st.binary(max_size=50))
def test_any_header_behind_the_right_prefix(header: bytes, body: bytes) -> None:
    for decode in (frames.decode_request, frames.decode_reply):
        try:
            decode([frames.PREFIX, header, body])
        except frames.FrameError as error:
            assert error.counter in ("dropped_header", "dropped_request_id")


@given(st.binary(max_size=300))
def test_any_stream_entry(data: bytes) -> None:
    try:
        entry = frames.decode_entry([frames.TOPIC_VISIBLE, data])
    except frames.FrameError as error:
        assert error.counter == "dropped_header"
    else:
        assert isinstance(entry, records_pb2.StreamEntry)


@given(st.data())
def test_mutated_good_message_never_breaks_the_dispatcher(data: st.DataObject) -> None:
    parts = [frames.PREFIX, good_header(on_behalf_of="work", epoch=7), b"\x0a\x04abcd"]
    frame = data.draw(st.integers(0, 2))
    damaged = bytearray(parts[frame])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    parts[frame] = bytes(damaged)
    sent: list[bytes] = []
    started: list[Work] = []
    dispatcher = Dispatcher(
        "domains",
        {"bulkhead.api.Domains": Answers("Domains")},
        send=lambda peer, header, body: sent.append(header),
        start=started.append,
    )
    dispatcher.receive(Lane.WORK, "lifecycle", None, parts)
    counted = sum(dispatcher.counters[name] for name in frames.COUNTERS)
    assert counted + len(sent) + len(started) == 1
    for header in sent:
        assert envelope_pb2.ReplyHeader.FromString(header).status.reason


@pytest.mark.parametrize(
    ("parts", "counter"),
    [
        ([], "dropped_frame_count"),
        ([frames.PREFIX, good_header()], "dropped_frame_count"),
        ([frames.PREFIX, good_header(), b"", b""], "dropped_frame_count"),
        ([b"", good_header(), b""], "dropped_magic"),
        ([b"BKH", good_header(), b""], "dropped_magic"),
        ([b"XXX\x01", good_header(), b""], "dropped_magic"),
        ([b"BKH\x02", good_header(), b""], "dropped_version"),
        ([frames.PREFIX, b"\xff\xff", b""], "dropped_header"),
        ([frames.PREFIX, good_header(step="x" * frames.HEADER_LIMIT), b""], "dropped_header"),
        ([frames.PREFIX, good_header(request_id=b""), b""], "dropped_request_id"),
        ([frames.PREFIX, good_header(request_id=ID + b"x"), b""], "dropped_request_id"),
    ],
)
def test_what_is_dropped_is_counted_by_kind(parts: list[bytes], counter: str) -> None:
    with pytest.raises(frames.FrameError) as caught:
        frames.decode_request(parts)
    assert caught.value.counter == counter


def test_round_trip() -> None:
    header, body = frames.decode_request([frames.PREFIX, good_header(step="s"), b"body"])
    assert (header.method, header.step, body) == ("bulkhead.api.Domains.Stats", "s", b"body")
    reply = frames.encode_reply_header(ID, revision=5, seq=6, partial=True)
    decoded, body = frames.decode_reply([frames.PREFIX, reply, b"x"])
    assert (decoded.request_id, decoded.revision, decoded.seq) == (ID, 5, 6)
    assert decoded.partial and decoded.status.code == envelope_pb2.CODE_OK


@given(st.binary(max_size=60))
def test_a_damaged_stored_reply_is_a_value_error(blob: bytes) -> None:
    try:
        StoredReply.from_bytes(blob)
    except ValueError:
        pass


@given(st.text(max_size=40), st.binary(max_size=100))
def test_a_stored_reply_survives(method: str, body: bytes) -> None:
    reply = StoredReply(method, frames.encode_reply_header(ID, seq=3), body)
    assert StoredReply.from_bytes(reply.to_bytes()) == reply
