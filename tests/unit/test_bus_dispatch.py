"""The server order, with handlers that this test ends by hand."""

from __future__ import annotations

from typing import Any

import pytest

from bulkhead.api import domains_pb2, envelope_pb2
from bulkhead.bus import deadline as clock
from bulkhead.bus.deadline import Deadline
from bulkhead.bus.dedup import MemoryReplyStore, StoredReply
from bulkhead.bus.dispatch import JOIN_LIMIT, Bounds, Call, Dispatcher, Work
from bulkhead.bus.errors import CODES, REASONS, BusError, bus_error, from_status, to_status
from bulkhead.bus.frames import BODY_LIMIT, PREFIX
from bulkhead.bus.methods import Lane
from bulkhead.model.refusal import Refusal
from tests.fakes.bus import Answers

PAUSE = "bulkhead.api.Domains.Pause"
STATS = "bulkhead.api.Domains.Stats"
DESTROY = "bulkhead.api.Domains.Destroy"


class Bench:
    """A dispatcher whose started work waits in `started`."""

    def __init__(self, **options: Any) -> None:
        self.sent: list[tuple[Any, envelope_pb2.ReplyHeader, bytes]] = []
        self.started: list[Work] = []
        self.now = 1_000_000_000
        self.dispatcher = Dispatcher(
            "domains",
            {"bulkhead.api.Domains": Answers("Domains")},
            send=self._send,
            start=self.started.append,
            **options,
        )

    def _send(self, peer: Any, header: bytes, body: bytes) -> None:
        self.sent.append((peer, envelope_pb2.ReplyHeader.FromString(header), body))

    def ask(
        self,
        number: int = 1,
        method: str = PAUSE,
        *,
        caller: str | None = "lifecycle",
        lane: Lane = Lane.WORK,
        peer: str = "peer",
        body: bytes = b"",
        **header: Any,
    ) -> None:
        fields = {"request_id": number.to_bytes(16, "big"), "method": method, **header}
        data = envelope_pb2.RequestHeader(**fields).SerializeToString()
        self.dispatcher.receive(lane, caller, peer, [PREFIX, data, body])

    def reason(self, at: int = -1) -> str:
        return self.sent[at][1].status.reason


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench()
    monkeypatch.setattr(clock, "monotonic_ns", lambda: made.now)
    return made


def done(bench: Bench, at: int = 0, reply: Any = None) -> None:
    bench.dispatcher.complete(bench.started[at], reply or domains_pb2.PauseDomainReply())


def test_a_call_reaches_its_handler_with_everything(bench: Bench) -> None:
    body = domains_pb2.PauseDomainRequest(boot={"uuid": "u"}).SerializeToString()
    bench.ask(
        7, body=body, on_behalf_of="work", operation="op", step="st", epoch=3, etag=4, min_seq=5,
        trace_id=b"t", deadline_ns=bench.now + 5,
    )  # fmt: skip
    (work,) = bench.started
    call = work.call
    assert work.untrusted_request == domains_pb2.PauseDomainRequest(boot={"uuid": "u"})
    assert (call.caller, call.source, call.operation, call.step) == (
        "lifecycle",
        "work",
        "op",
        "st",
    )
    assert (call.epoch, call.etag, call.min_seq, call.trace_id) == (3, 4, 5, b"t")
    assert call.deadline.ns == bench.now + 5
    call.revision, call.seq = 11, 12
    done(bench)
    ((peer, header, _),) = bench.sent
    assert (peer, header.revision, header.seq, header.status.code) == ("peer", 11, 12, 0)
    assert bench.dispatcher.in_flight == 0


def test_strangers_are_dropped_and_counted(bench: Bench) -> None:
    bench.ask(caller=None)
    assert not bench.sent and not bench.started
    assert bench.dispatcher.counters["strangers"] == 1


def test_refusals_come_in_the_fixed_order(bench: Bench) -> None:
    late = bench.now - 1
    bench.ask(method="bulkhead.api.Domains.Nothing")
    assert bench.reason() == "NO_SUCH_METHOD"
    bench.ask(method="bulkhead.api.Storage.Ensure")
    assert bench.reason() == "NO_SUCH_METHOD"
    bench.ask(caller="storage", lane=Lane.CONTROL, deadline_ns=late, body=b"\xff")
    assert bench.reason() == "CALLER_NOT_ALLOWED"
    bench.ask(lane=Lane.CONTROL, deadline_ns=late, body=b"\xff")
    assert bench.reason() == "WRONG_LANE"
    bench.ask(deadline_ns=late, body=b"\xff")
    assert bench.reason() == "DEADLINE_EXCEEDED"
    bench.ask(body=b"\xff")
    assert bench.reason() == "MALFORMED_BODY"
    assert not bench.started and len(bench.sent) == 6
    assert bench.dispatcher.counters["refused"] == 6


def test_only_some_services_speak_for_a_qube() -> None:
    bench = Bench()
    bench.ask(method="bulkhead.api.Domains.Inventory", caller="operator", on_behalf_of="work")
    assert bench.reason() == "SOURCE_NOT_ALLOWED"
    bench.ask(method=STATS, caller="adminapi", on_behalf_of="work")
    assert bench.started[0].call.source == "work"


def test_the_deadline_is_never_later_than_the_methods_limit(bench: Bench) -> None:
    limit = bench.now + 30_000_000_000
    bench.ask(1)
    bench.ask(2, deadline_ns=limit + 1)
    bench.ask(3, deadline_ns=limit - 1)
    assert [w.call.deadline.ns for w in bench.started] == [limit, limit, limit - 1]


def test_a_repeat_joins_what_runs(bench: Bench) -> None:
    bench.ask(1, peer="a")
    bench.ask(1, peer="b")
    bench.ask(1, peer="c", caller="operator", method="bulkhead.api.Domains.Inventory")
    assert len(bench.started) == 2  # another caller's id is another key
    done(bench)
    assert [(peer, h.status.code) for peer, h, _ in bench.sent] == [("a", 0), ("b", 0)]
    assert bench.dispatcher.counters["joined"] == 1


def test_askers_of_one_request_are_bounded(bench: Bench) -> None:
    for number in range(JOIN_LIMIT + 5):
        bench.ask(1, peer=str(number))
    done(bench)
    assert [p for p, _, _ in bench.sent] == [str(n) for n in range(5, JOIN_LIMIT + 5)]


def test_a_repeat_after_the_end_gets_the_same_bytes(bench: Bench) -> None:
    bench.ask(1)
    bench.started[0].call.revision = 9
    done(bench, reply=domains_pb2.PauseDomainReply(state={"epoch": "x"}))
    bench.ask(1)
    assert len(bench.started) == 1
    assert bench.sent[0][1:] == bench.sent[1][1:]
    assert bench.dispatcher.counters["from_store"] == 1


def test_a_stored_failure_is_repeated_too(bench: Bench) -> None:
    bench.ask(1)
    bench.dispatcher.fail(bench.started[0], Refusal("QUBE_NOT_FOUND", "no qube x", qube="x"))
    bench.ask(1)
    assert len(bench.started) == 1
    for _, header, _ in bench.sent:
        assert header.status.code == envelope_pb2.CODE_NOT_FOUND
        assert (header.status.reason, dict(header.status.metadata)) == (
            "QUBE_NOT_FOUND",
            {"qube": "x"},
        )


@pytest.mark.parametrize(
    "error", [bus_error("STARTING", "not yet"), RuntimeError("a bug"), OSError(5, "EIO")]
)
def test_what_may_be_asked_again_runs_again(bench: Bench, error: Exception) -> None:
    bench.ask(1)
    bench.dispatcher.fail(bench.started[0], error)
    bench.ask(1)
    assert len(bench.started) == 2


def test_reads_and_dry_runs_are_not_stored(bench: Bench) -> None:
    bench.ask(1, STATS)
    done(bench, 0, domains_pb2.StatsReply())
    bench.ask(1, STATS)
    bench.ask(2, validate_only=True)
    done(bench, 2)
    bench.ask(2)
    assert len(bench.started) == 4


def test_an_id_belongs_to_one_method(bench: Bench) -> None:
    bench.ask(1, PAUSE)
    bench.ask(1, "bulkhead.api.Domains.Wake")
    assert bench.reason() == "REQUEST_ID_REUSED"
    done(bench)
    bench.ask(1, "bulkhead.api.Domains.Wake")
    assert bench.reason() == "REQUEST_ID_REUSED"


def test_an_unexpected_error_shows_neither_class_nor_text(bench: Bench) -> None:
    bench.ask(1)
    bench.dispatcher.fail(bench.started[0], ZeroDivisionError("secret /path"))
    status = bench.sent[0][1].status
    assert status.reason == "INTERNAL" and status.log_ref
    assert "ZeroDivision" not in status.message and "secret" not in status.message


def test_a_wrong_reply_type_is_an_internal_error(bench: Bench) -> None:
    bench.ask(1)
    bench.dispatcher.complete(bench.started[0], domains_pb2.StatsReply())
    assert bench.reason() == "INTERNAL"


def test_a_reply_above_the_limit_is_refused(bench: Bench) -> None:
    bench.ask(1, "bulkhead.api.Domains.ReadGuestKeys")
    key = domains_pb2.GuestKey(path="x" * BODY_LIMIT)
    reply = domains_pb2.ReadGuestKeysReply(untrusted_keys=[key])
    bench.dispatcher.complete(bench.started[0], reply)
    assert bench.reason() == "TOO_LARGE"


def test_bounds_then_queue_then_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(work_bounds=Bounds(in_flight=2, queued=3, queued_bytes=100))
    for number in range(6):
        bench.ask(number)
    assert len(bench.started) == 2 and bench.dispatcher.pending(Lane.WORK) == 5
    assert [bench.reason(), len(bench.sent)] == ["BUSY", 1]
    assert bench.sent[0][1].status.retry_after_ms > 0
    # The control lane does not wait behind that.
    bench.ask(99, DESTROY, lane=Lane.CONTROL)
    assert bench.started[-1].method.full_name == DESTROY
    for at in (0, 1, 3, 4, 5):
        done(bench, at)
    assert [w.key[1][-1] for w in bench.started] == [0, 1, 99, 2, 3, 4]
    assert bench.dispatcher.pending(Lane.WORK) == 0
    # The one refused as busy was not stored: it may come again.
    bench.ask(5)
    assert bench.started[-1].key[1][-1] == 5


def test_the_queue_is_bounded_in_bytes(bench: Bench) -> None:
    bench = Bench(work_bounds=Bounds(in_flight=1, queued=100, queued_bytes=100))
    body = domains_pb2.PauseDomainRequest(boot={"uuid": "u" * 60}).SerializeToString()
    for number in range(3):
        bench.ask(number, body=body)
    assert bench.reason() == "BUSY"
    assert bench.dispatcher.pending(Lane.WORK) == 2


def test_what_is_late_in_the_queue_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(work_bounds=Bounds(in_flight=1))
    monkeypatch.setattr(clock, "monotonic_ns", lambda: bench.now)
    bench.ask(1)
    bench.ask(2, deadline_ns=bench.now + 100)
    bench.ask(3)
    bench.now += 200
    done(bench)
    assert [w.key[1][-1] for w in bench.started] == [1, 3]
    assert [h.status.reason for _, h, _ in bench.sent] == ["DEADLINE_EXCEEDED", ""] or [
        h.status.reason for _, h, _ in bench.sent
    ] == ["", "DEADLINE_EXCEEDED"]


def test_cancel_is_for_the_callers_own_request(bench: Bench) -> None:
    bench.ask(1)
    key = (1).to_bytes(16, "big")
    assert not bench.dispatcher.cancel("operator", key)
    assert not bench.started[0].call.cancelled
    assert bench.dispatcher.cancel("lifecycle", key)
    call = bench.started[0].call
    assert call.cancelled
    with pytest.raises(BusError) as caught:
        call.check()
    assert caught.value.reason == "CANCELLED"
    done(bench)
    assert not bench.dispatcher.cancel("lifecycle", key)


def test_cancel_interrupts_only_at_a_cancel_point(bench: Bench) -> None:
    cancels: list[str] = []
    key = (1).to_bytes(16, "big")
    bench.ask(1)
    bench.started[0].cancel = lambda: cancels.append("x")
    bench.dispatcher.cancel("lifecycle", key)
    assert cancels == []
    bench.started[0].call.cancelled = False
    with bench.started[0].call.cancel_point():
        bench.dispatcher.cancel("lifecycle", key)
    assert cancels == ["x"]
    assert not bench.started[0].call.at_cancel_point
    with pytest.raises(BusError), bench.started[0].call.cancel_point():
        raise AssertionError("entered although cancelled")


def test_cancel_in_the_queue_answers_at_once() -> None:
    bench = Bench(work_bounds=Bounds(in_flight=1))
    bench.ask(1)
    bench.ask(2)
    assert bench.dispatcher.cancel("lifecycle", (2).to_bytes(16, "big"))
    assert bench.reason() == "CANCELLED"
    done(bench)
    assert len(bench.started) == 1 and bench.dispatcher.in_flight == 0


def test_draining_refuses_new_work_and_answers_repeats(bench: Bench) -> None:
    bench.ask(1)
    bench.ask(2)
    done(bench, 1)
    bench.dispatcher.draining = True
    idle: list[int] = []
    bench.dispatcher.when_idle(lambda: idle.append(1))
    bench.ask(3)
    assert bench.reason() == "DRAINING"
    bench.ask(2)
    assert bench.reason() == ""
    bench.ask(1, peer="again")
    done(bench, 0)
    assert [p for p, _, _ in bench.sent[-2:]] == ["peer", "again"] and idle == [1]


class Broken(MemoryReplyStore):
    """A store on a full disk."""

    def put(self, caller: str, request_id: bytes, reply: StoredReply) -> None:
        raise OSError(28, "ENOSPC")


def test_an_answer_that_could_not_be_kept_is_not_given() -> None:
    bench = Bench(store=Broken())
    bench.ask(1)
    done(bench)
    assert bench.reason() == "INTERNAL"
    assert bench.dispatcher.in_flight == 0


def test_a_handler_that_stored_its_reply_is_not_stored_twice() -> None:
    store = MemoryReplyStore()
    bench = Bench(store=store)
    bench.ask(1)
    call = bench.started[0].call
    call.revision = 3
    reply = domains_pb2.PauseDomainReply(state={"epoch": "e"})
    stored = StoredReply.from_bytes(call.freeze_reply(reply))
    call.reply_stored = True
    done(bench, 0, reply)
    assert len(store) == 0
    assert (stored.method, stored.body) == (PAUSE, reply.SerializeToString())
    assert envelope_pb2.ReplyHeader.FromString(stored.header) == bench.sent[0][1]


def test_a_missing_handler_stops_the_start() -> None:
    with pytest.raises(TypeError, match="create_paused"):
        Dispatcher(
            "domains",
            {"bulkhead.api.Domains": object()},
            send=lambda *_: None,
            start=lambda _: None,
        )


def test_errors_survive_the_wire() -> None:
    inner = BusError("UNAVAILABLE", "BUSY", "later", retry_after_ms=5)
    error = BusError("ABORTED", "QUBE_BUSY", "busy with x", cause=[inner], qube="x")
    back = from_status(envelope_pb2.Status.FromString(to_status(error).SerializeToString()))
    assert (back.code, back.reason, back.message, back.metadata) == (
        "ABORTED",
        "QUBE_BUSY",
        "busy with x",
        {"qube": "x"},
    )
    assert (back.cause[0].reason, back.cause[0].retry_after_ms) == ("BUSY", 5)
    assert from_status(envelope_pb2.Status(code=99)).code == "UNKNOWN"  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        BusError("NO_CODE", "X", "x")


def test_the_bus_reasons_have_canonical_codes() -> None:
    assert len(CODES) == 16
    for reason in REASONS.values():
        assert reason.code in CODES and reason.when
        assert reason.name == reason.name.upper()


def test_deadline() -> None:
    assert Deadline.after(5).remaining() == pytest.approx(5, abs=0.5)
    past = Deadline(clock.monotonic_ns() - 1)
    assert past.passed and past.remaining() == 0
    with pytest.raises(BusError) as caught:
        past.check()
    assert caught.value.code == "DEADLINE_EXCEEDED"
    Call(deadline=Deadline.after(5)).check()
