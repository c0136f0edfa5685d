"""The memory of given replies: bounded, and faithful within its bounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bulkhead.bus.dedup import MemoryReplyStore, StoredReply


def reply(size: int, method: str = "m") -> StoredReply:
    return StoredReply(method, b"h", b"x" * (size - 1))


def test_a_reply_is_found_by_caller_and_id() -> None:
    store = MemoryReplyStore()
    store.put("lifecycle", b"1", reply(5))
    assert store.get("lifecycle", b"1") == reply(5)
    assert store.get("adminapi", b"1") is None
    assert store.get("lifecycle", b"2") is None


def test_the_first_answer_stays() -> None:
    store = MemoryReplyStore()
    store.put("a", b"1", reply(5))
    store.put("a", b"1", reply(9))
    assert store.get("a", b"1") == reply(5)


def test_age() -> None:
    now = [0.0]
    store = MemoryReplyStore(age=10, clock=lambda: now[0])
    store.put("a", b"1", reply(5))
    now[0] = 10
    assert store.get("a", b"1") == reply(5)
    now[0] = 10.1
    assert store.get("a", b"1") is None
    store.put("a", b"1", reply(9))
    assert store.get("a", b"1") == reply(9)
    now[0] = 30
    store.put("a", b"2", reply(1))
    assert len(store) == 1 and store.size == 1


def test_a_reply_larger_than_the_store_is_not_kept() -> None:
    store = MemoryReplyStore(size=10)
    store.put("a", b"1", reply(11))
    assert len(store) == 0 and store.size == 0


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30)), max_size=80))
def test_bounds_hold_and_the_newest_stay(puts: list[tuple[int, int]]) -> None:
    store = MemoryReplyStore(count=5, size=60, clock=lambda: 0.0)
    for number, size in puts:
        store.put("a", bytes([number]), reply(size))
        assert len(store) <= 5 and store.size <= 60
        held = [store.get("a", bytes([n])) for n in range(21)]
        assert store.size == sum(len(r.header) + len(r.body) for r in held if r is not None)
        assert store.get("a", bytes([number])) is not None
