"""The client library against the server's own formats, and its exceptions' parents."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.admin import exceptions, paths, wire
from clients.admin.paths import socket_path
from services.adminapi.core import frame
from services.adminapi.core.exceptions import CLASSES

_word = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)


@given(_word.filter(lambda w: "+" not in w), _word, _word, st.binary(max_size=50))
def test_requests_are_read_as_they_were_meant(
    method: str, dest: str, arg: str, payload: bytes
) -> None:
    parsed = frame.parse_request(wire.request(method, dest, arg, payload))
    assert parsed == frame.Request(method.encode(), arg.encode(), b"dom0", dest.encode(), payload)


@pytest.mark.parametrize("word", ["a b", "a\0b", "ż"])
def test_words_that_would_break_a_frame_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match="cannot stand"):
        wire.request("admin.vm.List", word)


def test_too_large_requests_are_refused_here() -> None:
    with pytest.raises(ValueError, match="bytes"):
        wire.request("admin.vm.notes.Set", "work", "", b"x" * 65536)


@given(st.text(max_size=60))
def test_messages_arrive_as_they_were_written(message: str) -> None:
    sent = message.replace("\0", " ").encode("utf-8", "replace").decode()
    with pytest.raises(exceptions.QubesValueError) as caught:
        wire.parse_reply(frame.format_exception("QubesValueError", message))
    assert caught.value.args == (sent,)


def test_replies() -> None:
    assert wire.parse_reply(frame.format_ok("text")) == b"text"
    with pytest.raises(exceptions.QubesDaemonAccessError):
        wire.parse_reply(b"")
    with pytest.raises(exceptions.QubesDaemonCommunicationError):
        wire.parse_reply(b"nonsense")
    with pytest.raises(AssertionError):
        wire.parse_reply(frame.format_exception("ProtocolError", "100%"))
    with pytest.raises(ZeroDivisionError):
        wire.parse_reply(frame.format_exception("ZeroDivisionError", "x"))
    with pytest.raises(exceptions.QubesException, match=r"^a 100% b$"):
        wire.parse_reply(frame.format_exception("QubesSomethingNew", "a 100% b"))


def test_every_class_that_the_server_sends_is_known_here() -> None:
    for name in set(CLASSES.values()):
        assert type(exceptions.from_wire(name, "m")).__name__ == name
        assert frame.is_formatted(name) == exceptions.is_formatted(name)
        assert str(exceptions.from_wire(name, "a sentence")) == "a sentence"


@pytest.mark.parametrize(
    ("name", "parents"),
    [
        ("QubesVMNotFoundError", (exceptions.QubesException, KeyError)),
        ("QubesNoSuchPropertyError", (exceptions.QubesException, AttributeError)),
        ("QubesPropertyValueError", (exceptions.QubesValueError, ValueError)),
        ("QubesMemoryError", (exceptions.QubesVMError, MemoryError)),
        ("QubesVMNotPausedError", (exceptions.QubesVMNotStartedError,)),
        ("DeviceNotAssigned", (exceptions.QubesException, KeyError)),
        ("QubesVMInUseError", (exceptions.QubesVMError,)),
    ],
)
def test_parents(name: str, parents: tuple[type[Exception], ...]) -> None:
    for parent in parents:
        assert isinstance(exceptions.from_wire(name, ""), parent)


_events = st.lists(
    st.tuples(
        _word,
        _word.filter(bool),
        st.lists(st.tuples(_word.filter(bool), _word), max_size=3, unique_by=lambda p: p[0]),
    ),
    max_size=5,
)


@given(_events, st.integers(1, 40))
def test_streams_are_read_in_any_pieces(
    events: list[tuple[str, str, list[tuple[str, str]]]], size: int
) -> None:
    data = b"".join(frame.format_event(*event) for event in events)
    parser = wire.EventParser()
    found = [
        event for at in range(0, len(data), size) for event in parser.feed(data[at : at + size])
    ]
    assert found == [wire.Event(s, n, dict(pairs)) for s, n, pairs in events]


def test_a_stream_may_end_with_an_exception() -> None:
    parser = wire.EventParser()
    data = frame.CONNECTION_ESTABLISHED + frame.format_exception("QubesVMNotRunningError", "no")
    got = []
    with pytest.raises(exceptions.QubesVMNotRunningError):
        for event in parser.feed(data):
            got.append(event.name)
    assert got == ["connection-established"]


def test_texts() -> None:
    line = b"work class=AppVM state=Halted uuid=u new=1\n"
    assert wire.parse_qubes(line) == [wire.QubeLine("work", "AppVM", "Halted", "u")]
    found = wire.parse_properties(
        b"a default=True type=str x\\ny\\\\z\nb default=False type=int 5\n"
        b"c default=True type=vm \nd default=True type=bool True\n"
    )
    assert [found[n].python for n in "abcd"] == ["x\ny\\z", 5, None, True]
    assert not found["b"].is_default
    assert wire.parse_default("x", "") is None
    assert wire.parse_info(b"a=1\nb=c=d\n") == {"a": "1", "b": "c=d"}


def test_socket_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BULKHEAD_ROOT", raising=False)
    assert socket_path() == Path("/var/run/qubesd.sock")
    assert socket_path("/x", "misc") == Path("/x/run/qubesd.misc.sock")
    monkeypatch.setenv("BULKHEAD_ROOT", "/y")
    assert socket_path() == Path("/y/run/qubesd.sock")


def test_the_other_sockets_are_where_a_link_leads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("BULKHEAD_ROOT", raising=False)
    monkeypatch.setattr(paths, "SYSTEM", tmp_path)
    (tmp_path / "run").mkdir()
    link = tmp_path / "run/qubesd.sock"
    assert socket_path(None, "internal") == link.with_name("qubesd.internal.sock")
    link.symlink_to("/i/run/qubesd.sock")
    assert socket_path() == link
    assert socket_path(None, "internal") == Path("/i/run/qubesd.internal.sock")
    assert socket_path(None, "misc") == Path("/i/run/qubesd.misc.sock")
