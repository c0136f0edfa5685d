"""Hostile frames: whatever comes in, an answer, a checked call or a drop comes out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bulkhead.model.records import QubePut
from bulkhead.model.refusal import Refusal
from services.adminapi.core import calls
from services.adminapi.core.answer import begin
from services.adminapi.core.checks import Checked
from services.adminapi.core.exceptions import WireRefusal
from services.adminapi.core.frame import Drop
from services.adminapi.core.permission import DenyAll
from services.adminapi.core.reads import ReadContext
from services.adminapi.core.writes import WRITES
from tests.fakes.adminapi import app, start_view

_VIEW = start_view()
_VIEW.apply(QubePut(app()))
CONTEXT = ReadContext(_VIEW, DenyAll())
_SOCKETS = st.sampled_from(["admin", "internal", "misc"])
_NAMES = st.sampled_from([call.name for call in calls.all_calls()])
_QUBES = st.sampled_from([b"dom0", b"tmpl", b"work"])
_WORDS = st.one_of(
    st.sampled_from(
        [
            b"",
            b"private",
            b"kernel",
            b"label",
            b"netvm",
            b"red",
            b"varlibqubes",
            b"dom0+sda1",
            b"_+_+_",
            b"force+wait",
            b"preload",
            b"..",
            b"%s",
        ]
    ),
    st.binary(max_size=30).filter(lambda b: b"\0" not in b and b" " not in b),
)
_PAYLOADS = st.one_of(
    st.sampled_from(
        [
            b"",
            b"0",
            b"-1",
            b"9" * 30,
            b"yes",
            b"name=x label=red",
            b"name=x\n",
            b"mode='required'",
            b"mode='a' _b='c=' d='e'",
            b"ok",
            b"fail\nx",
            b"all",
            b"u08****" * 2,
            b"\xff" * 7,
        ]
    ),
    st.binary(max_size=60),
)


def answered(socket: str, frame: bytes) -> None:
    try:
        answer = begin(CONTEXT, socket, frame)
    except Drop:
        return
    if isinstance(answer, bytes):
        assert answer[:2] in (b"0\0", b"2\0")
        if answer[:1] == b"2":
            assert answer.count(b"\0") == 4 and answer.endswith(b"\0")
        return
    assert isinstance(answer, Checked)
    write = WRITES.get(answer.call.handler)
    if write is None:
        return
    try:
        write(CONTEXT, answer)
    except (Refusal, WireRefusal) as refusal:
        assert refusal.message


@given(_SOCKETS, st.binary(max_size=200))
def test_any_bytes(socket: str, frame: bytes) -> None:
    answered(socket, frame)


@given(_SOCKETS, _NAMES, _WORDS, _QUBES, _QUBES, _PAYLOADS)
def test_any_call(
    socket: str, name: str, arg: bytes, source: bytes, dest: bytes, payload: bytes
) -> None:
    answered(
        socket, name.encode() + b"+" + arg + b" " + source + b" name " + dest + b"\0" + payload
    )


def test_every_call_with_every_plain_word() -> None:
    words = [b"", b"private", b"label", b"red", b"varlibqubes", b"dom0+sda1", b"x", b"a/b"]
    payloads = [b"", b"1", b"name=x label=red", b"mode='required'", b"\xff"]
    for call in calls.all_calls():
        for word in words:
            for dest in (b"dom0", b"tmpl", b"work"):
                for payload in payloads:
                    frame = call.name.encode() + b"+" + word + b" dom0 name " + dest + b"\0"
                    answered("admin", frame + payload)
