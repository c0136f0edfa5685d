"""The data socket: both ends on the one format, and peers that do not keep to it."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bulkhead import transfer
from bulkhead.transfer import TransferError
from clients.bus.data import export_file, import_file
from services.storage.adapters import data_socket
from services.storage.adapters.data_socket import DataSocket
from services.storage.core.reasons import StorageRefusal


@pytest.fixture
def data(tmp_path: Path) -> Iterator[DataSocket]:
    found = DataSocket(tmp_path / "data.sock")
    found.start()
    yield found
    found.stop()
    assert not found.path.exists()


def new_file(path: Path, size: int = 0, content: bytes = b"") -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, content, 0)
    os.ftruncate(fd, size or len(content))
    return fd


def raw(data: DataSocket, ticket: str, sent: bytes) -> bytes:
    """What comes back for raw bytes, until the server closes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(data.path))
        connection.sendall(ticket.encode() + b"\n" + sent)
        connection.shutdown(socket.SHUT_WR)
        parts = b""
        while chunk := connection.recv(65536):
            parts += chunk
        return parts


def frame(letter: bytes, number: int, content: bytes = b"") -> bytes:
    return struct.pack("!cQ", letter, number) + content


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.tuples(st.booleans(), st.integers(1, 200_000)), max_size=6))
def test_any_mixture_of_data_and_holes_arrives(
    tmp_path: Path, pieces: list[tuple[bool, int]]
) -> None:
    one, other = socket.socketpair()
    size = sum(length for _, length in pieces)
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        for is_data, length in pieces:
            if is_data:
                file.write(os.urandom(length))
            else:
                file.seek(length, os.SEEK_CUR)
        file.truncate(size)
    with one, other, source.open("rb") as reading, target.open("wb+") as writing:
        one.settimeout(20)
        other.settimeout(20)
        sender = threading.Thread(target=transfer.send_file, args=(one, reading.fileno(), size))
        sender.start()
        got = transfer.receive(other, size, transfer.sparse_writer(writing.fileno()))
        sender.join()
        writing.truncate(got)
    assert target.read_bytes() == source.read_bytes()


def test_import_and_export_through_the_socket(data: DataSocket, tmp_path: Path) -> None:
    arrived = threading.Event()
    target = new_file(tmp_path / "target", 300_000)
    ticket = data.issue("p:v", target, 300_000, True, arrived.set)
    content = b"x" * 1000 + bytes(299_000)
    source = new_file(tmp_path / "source", content=content)
    import_file(data.path, ticket, source, 300_000)
    assert arrived.is_set()
    assert (tmp_path / "target").read_bytes() == content
    ticket = data.issue("e", new_file(tmp_path / "target", 300_000), 300_000, False)
    out = new_file(tmp_path / "out")
    assert export_file(data.path, ticket, out) == 300_000
    assert (tmp_path / "out").read_bytes() == content
    os.close(source)
    os.close(out)


def test_what_arrived_is_told_only_after_arrived(data: DataSocket, tmp_path: Path) -> None:
    def arrived() -> None:
        raise StorageRefusal("VOLUME_NOT_IMPORTING", "the operation has ended")

    ticket = data.issue("p:v", new_file(tmp_path / "t", 10), 10, True, arrived)
    source = new_file(tmp_path / "s", content=b"0123456789")
    with pytest.raises(TransferError, match="the operation has ended"):
        import_file(data.path, ticket, source, 10)
    os.close(source)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        frame(b"D", 4, b"12"),
        frame(b"D", 11, b"12345678901"),
        frame(b"D", 1 << 40, b"1"),
        frame(b"D", 0),
        frame(b"H", 11),
        frame(b"H", (1 << 64) - 1),
        frame(b"D", 4, b"1234") + frame(b"E", 4),
        frame(b"H", 10) + frame(b"E", 9),
        frame(b"Z", 1, b"1"),
        frame(b"X", 1 << 50),
        frame(b"X", 3, b"\xff\xfe\xfd"),
    ],
)
def test_a_malformed_import_is_refused(data: DataSocket, tmp_path: Path, sent: bytes) -> None:
    arrived = threading.Event()
    ticket = data.issue("p:v", new_file(tmp_path / "t", 10), 10, True, arrived.set)
    answer = raw(data, ticket, sent)
    assert answer[:1] == b"X"
    assert not arrived.is_set()
    assert raw(data, ticket, b"")[:1] == b"X"  # the ticket is used up


@pytest.mark.parametrize("ticket", ["0" * 64, "\0" * 64, "\xff" * 32, "short", ""])
def test_without_a_ticket_nothing_is_learned(data: DataSocket, ticket: str) -> None:
    assert raw(data, ticket, b"")[:1] == b"X"


def test_a_new_import_of_a_subject_replaces_the_ticket(data: DataSocket, tmp_path: Path) -> None:
    first = data.issue("p:v", new_file(tmp_path / "t", 10), 10, True)
    second = data.issue("p:v", new_file(tmp_path / "t", 10), 10, True)
    assert b"no such ticket" in raw(data, first, b"")
    assert data.revoke_ticket(second)
    assert not data.revoke_ticket(second)
    assert b"no such ticket" in raw(data, second, b"")


def test_revoking_ends_a_transfer_under_way(data: DataSocket, tmp_path: Path) -> None:
    arrived = threading.Event()
    ticket = data.issue("p:v", new_file(tmp_path / "t", 10), 10, True, arrived.set)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(data.path))
        connection.sendall(ticket.encode() + b"\n" + frame(b"D", 4, b"1234"))
        while ticket in data._tickets:  # until the server has taken it
            pass
        while not data._active:
            pass
        data.revoke("p:v")
        while connection.recv(65536):
            pass
    assert not arrived.is_set()


def test_tickets_are_bounded_and_expire(
    data: DataSocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_socket, "TICKETS", 2)
    for number in range(2):
        data.issue(f"e{number}", new_file(tmp_path / "t", 1), 1, False)
    with pytest.raises(StorageRefusal) as caught:
        data.issue("e3", new_file(tmp_path / "t", 1), 1, False)
    assert caught.value.reason == "LIMIT_REACHED"
    for ticket in data._tickets.values():
        ticket.expires = 0.0
    data.issue("e4", new_file(tmp_path / "t", 1), 1, False)
    assert [t.subject for t in data._tickets.values()] == ["e4"]


def test_connections_are_bounded(data: DataSocket, tmp_path: Path) -> None:
    opened = []
    try:
        for _ in range(data_socket.CONNECTIONS):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(data.path))
            opened.append(connection)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(str(data.path))
            assert b"too many transfers" in connection.recv(4096)
    finally:
        for connection in opened:
            connection.close()
