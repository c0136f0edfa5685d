"""Clients that do not behave: idle, slow, half-closed, gone, and readers that never read.

Whatever they do, others are answered, nothing is restarted, memory stays bounded, and who
loses a connection for it is told the reason where the wire allows it.
"""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients.cli.instance import operator
from services.adminapi.adapters import gateway
from tests.instance import Instance, running
from tests.system.fuzz_admin import memory_of

pytestmark = pytest.mark.integration

LIMIT_S = 60.0
EVENT = b"admin.Events+ dom0 name dom0\0"
# Far more than what is bounded at 64 MiB may take, far less than what the clients ask for.
MEMORY_MIB = 160.0


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # As a service manager starts it: the soft limit is for programs that use select().
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        with running() as started:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 16384)), hard))
            yield started
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(autouse=True)
def unharmed(instance: Instance) -> Iterator[None]:
    """Afterwards the same process has let every connection go and answers."""
    pid = instance.pid("adminapi")
    yield
    instance.until(lambda: counter(instance, "connections") == 0, LIMIT_S, "all connections end")
    assert instance.pid("adminapi") == pid
    assert instance.call("admin.label.List", timeout=LIMIT_S).kind == "ok"
    logs = (instance.root / "var/log/qubes/adminapi.log").read_text()
    assert "Traceback" not in logs


def counter(instance: Instance, name: str) -> int:
    data = json.loads((instance.root / "run/bulkhead/launcher.json").read_text())
    row = operator.health(instance.settings, "adminapi", data["children"]["adminapi"])
    return int(row["counters"].get(name, -1))


def memory(instance: Instance) -> float:
    return memory_of({"adminapi": instance.pid("adminapi")})["adminapi"]


def connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # A socket with Python's timeout does not wait for a place in a full queue of connections.
    limit = struct.pack("@ll", int(LIMIT_S), 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    connection.settimeout(LIMIT_S)
    return connection


def everything(connection: socket.socket) -> bytes:
    """All bytes up to the end; a reset is an end, too."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def ended(connection: socket.socket) -> bool:
    """The other side has closed, and nothing was sent."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    finally:
        connection.settimeout(LIMIT_S)


def test_thousands_of_idle_connections_leave_room_for_calls(instance: Instance) -> None:
    before = memory(instance)
    more = 500
    with contextlib.ExitStack() as stack:
        idle = [
            stack.enter_context(connected(instance.socket))
            for _ in range(gateway.CONNECTION_LIMIT + more)
        ]
        assert instance.call("admin.label.List", timeout=LIMIT_S).kind == "ok"
        assert counter(instance, "connections") <= gateway.CONNECTION_LIMIT
        # The oldest made room, the newest are still there.
        instance.until(lambda: all(map(ended, idle[:more])), LIMIT_S, "the oldest are closed")
        assert not any(map(ended, idle[-more:]))
        newest = idle[-1]
        newest.sendall(b"admin.label.List+ dom0 name dom0\0")
        newest.shutdown(socket.SHUT_WR)
        assert everything(newest).startswith(b"0\0")
        assert memory(instance) - before < MEMORY_MIB


def test_requests_that_never_end_do_not_fill_the_memory(instance: Instance) -> None:
    before = memory(instance)
    part = b"admin.vm.notes.Set+ dom0 name dom0\0" + b"x" * 60_000
    with contextlib.ExitStack() as stack:
        half: list[socket.socket] = []
        for _ in range(2 * gateway.INCOMPLETE_BYTES // len(part)):
            connection = stack.enter_context(connected(instance.socket))
            with contextlib.suppress(ConnectionError):
                connection.sendall(part)
            half.append(connection)
        assert instance.call("admin.label.List", timeout=LIMIT_S).kind == "ok"
        assert memory(instance) - before < MEMORY_MIB
        instance.until(lambda: ended(half[0]), LIMIT_S, "the oldest is closed")
        newest = half[-1]
        newest.shutdown(socket.SHUT_WR)
        assert everything(newest).startswith(b"2\0")


def test_slow_and_broken_clients_hold_up_nobody(instance: Instance) -> None:
    frame = b"admin.label.List+ dom0 name dom0\0"
    paths = instance.settings.admin_sockets()
    for name in ("admin", "internal", "misc"):
        for cut in (0, 1, 10, len(frame) - 1):
            # Half a frame, then the end: no answer is due.
            with connected(paths[name]) as connection:
                connection.sendall(frame[:cut])
                connection.shutdown(socket.SHUT_WR)
                assert everything(connection) == b""
            # Half a frame, then a reset.
            with connected(paths[name]) as connection:
                connection.sendall(frame[:cut])
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    with connected(paths["admin"]) as slow:
        for at in range(len(frame)):
            slow.sendall(frame[at : at + 1])
            assert instance.call("admin.label.List", timeout=LIMIT_S).kind == "ok"
        slow.shutdown(socket.SHUT_WR)
        assert everything(slow).startswith(b"0\0")
    # A whole frame whose sender leaves at once.
    for _ in range(200):
        with connected(paths["admin"]) as gone:
            gone.sendall(frame)
            gone.shutdown(socket.SHUT_WR)


def test_event_readers_that_never_read_are_told_and_cost_little(instance: Instance) -> None:
    before = memory(instance)
    slow = counter(instance, "slow_readers")
    instance.ok("admin.vm.Create.RemoteVM", payload=b"name=talker label=red")
    text = b"x" * 60_000
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(connected(instance.socket)) for _ in range(400)]
        for number, reader in enumerate(readers):
            # Each with a form of its own, so that their bytes are not shared.
            resumable = b"bulkhead.Events+ dom0 name dom0\0"
            reader.sendall(resumable if number % 2 else EVENT)
            reader.shutdown(socket.SHUT_WR)
        instance.until(
            lambda: counter(instance, "connections") >= len(readers), LIMIT_S, "all are readers"
        )
        peak = 0.0
        for number in range(60):
            value = b"%d " % number + text
            instance.ok("admin.vm.feature.Set", "talker", f"f{number % 2}", value)
            peak = max(peak, memory(instance))
        assert counter(instance, "slow_readers") - slow == len(readers)
        assert peak - before < MEMORY_MIB, (before, peak)
        # Those whose bytes were kept get the reason at their end, when they read at last.
        last = [everything(reader)[-400:] for reader in readers]
        told = [data for data in last if b"events were not read in time" in data]
        assert told
        assert all(b"2\0QubesException\0\0" in data for data in told)
    instance.ok("admin.vm.Remove", "talker")


def test_replies_that_nobody_reads_do_not_fill_the_memory(instance: Instance) -> None:
    instance.ok("admin.vm.Create.RemoteVM", payload=b"name=wordy label=red")
    for number in range(30):
        instance.ok("admin.vm.feature.Set", "wordy", f"f{number}", b"y" * 60_000)
    before = memory(instance)
    frame = b"bulkhead.vm.GetAll+ dom0 name dom0\0"
    with contextlib.ExitStack() as stack:
        peak = 0.0
        for number in range(200):
            reader = stack.enter_context(connected(instance.socket))
            reader.sendall(frame)
            reader.shutdown(socket.SHUT_WR)
            if number % 20 == 0:
                peak = max(peak, memory(instance))
        assert instance.call("admin.label.List", timeout=LIMIT_S).kind == "ok"
        peak = max(peak, memory(instance))
        assert peak - before < MEMORY_MIB, (before, peak)
        assert everything(reader).startswith(b"0\0")
    instance.ok("admin.vm.Remove", "wordy")
