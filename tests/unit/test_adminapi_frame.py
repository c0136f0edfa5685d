"""Frames: any bytes become a request or a drop, replies end where clients expect it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.adminapi.core.frame import (
    CONNECTION_ESTABLISHED,
    REQUEST_LIMIT,
    Drop,
    Request,
    format_event,
    format_exception,
    format_ok,
    parse_request,
)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_request_or_a_drop(data: bytes) -> None:
    try:
        assert isinstance(parse_request(data), Request)
    except Drop:
        pass


_field = st.binary(max_size=40).filter(lambda b: b"\0" not in b and b" " not in b)


@given(_field.filter(lambda b: b"+" not in b), _field, _field, _field, st.binary(max_size=100))
def test_what_a_client_writes_is_what_the_server_reads(
    method: bytes, arg: bytes, source: bytes, dest: bytes, payload: bytes
) -> None:
    frame = method + b"+" + arg + b" " + source + b" name " + dest + b"\0" + payload
    assert parse_request(frame) == Request(method, arg, source, dest, payload)


def test_size_limit_counts_header_and_payload_together() -> None:
    head = b"admin.vm.notes.Set+ dom0 name work\0"
    assert parse_request(head + b"A" * (REQUEST_LIMIT - len(head)))
    with pytest.raises(Drop):
        parse_request(head + b"A" * (REQUEST_LIMIT - len(head) + 1))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\0",
        b"m+ dom0 dom0\0",
        b"m+ dom0 name dom0",
        b"m+ dom0 keyword default\0",
        b"m+ dom0 uuid dom0\0",
        b"m+ dom0  dom0\0",
        b"m+a b dom0 name dom0\0",
    ],
)
def test_drops(frame: bytes) -> None:
    with pytest.raises(Drop):
        parse_request(frame)


def test_dest_keeps_spaces_and_keyword_adminvm_is_dom0() -> None:
    assert parse_request(b"m dom0 name a b\0").untrusted_dest == b"a b"
    assert parse_request(b"m dom0 keyword adminvm\0").untrusted_dest == b"dom0"
    assert parse_request(b"m+a+b dom0 name x\0\0y").untrusted_payload == b"\0y"
    assert parse_request(b"m+a+b dom0 name x\0").untrusted_arg == b"a+b"


def test_replies() -> None:
    assert format_ok() == b"0\0"
    assert format_ok("a\n") == b"0\0a\n"
    assert CONNECTION_ESTABLISHED == b"1\0\0connection-established\0\0"
    event = format_event("work", "property-set:vcpus", [("name", "vcpus"), ("newvalue", "3")])
    assert event == b"1\0work\0property-set:vcpus\0name\0vcpus\0newvalue\x003\0\0"


@pytest.mark.parametrize(
    ("class_name", "doubled"),
    [
        ("QubesException", True),
        ("QubesInvalidTagError", True),
        ("ProtocolError", False),
        ("PermissionDenied", False),
        ("ValueError", False),
    ],
)
def test_percent_is_doubled_where_clients_format(class_name: str, doubled: bool) -> None:
    wanted = b"100%% of it" if doubled else b"100% of it"
    assert format_exception(class_name, "100% of it") == (
        b"2\0" + class_name.encode() + b"\0\0" + wanted + b"\0"
    )


@given(st.text(max_size=40))
def test_an_exception_has_exactly_its_fields(message: str) -> None:
    reply = format_exception("QubesException", message)
    assert reply.endswith(b"\0") and reply.count(b"\0") == 4


@given(
    st.text(max_size=10),
    st.text(min_size=1, max_size=10),
    st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=4),
)
def test_an_event_ends_once_and_at_its_end(
    subject: str, name: str, pairs: list[tuple[str, str]]
) -> None:
    parts = format_event(subject, name, pairs).split(b"\0")
    assert parts[0] == b"1" and parts[-2:] == [b"", b""]
    keys = parts[3:-2:2]
    assert all(keys)
    assert len(parts[3:-2]) % 2 == 0
    b"".join(parts).decode("ascii")
