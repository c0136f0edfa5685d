"""The unix socket through which a volume's bytes come and go.

Owns tickets, connections and their bounds. Must not know pools or the bus. Invariants: a
ticket works once and for a minute; whoever holds none learns nothing; no connection
outlives its time limit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bulkhead import transfer
from bulkhead.transfer import TransferError
from services.storage.core.reasons import StorageRefusal

_LOG = logging.getLogger("bulkhead.storage")

CONNECTIONS = 8
TICKETS = 64
TICKET_S = 60.0
IDLE_S = 30.0
WHOLE_S = 4 * 3600.0
_GREETING_S = 5.0
_PART_S = 1.0
_TICKET_BYTES = 32


@dataclass(slots=True, eq=False)
class Ticket:
    """What a connection may do. fd is owned by the ticket. importing: bytes come in.

    arrived() runs in the connection's thread after the last byte is durable; what it
    raises goes to the client. subject: a second ticket for it replaces the first.
    """

    subject: str
    fd: int
    size: int
    importing: bool
    arrived: Callable[[], None]
    expires: float = 0.0
    revoked: bool = False

    def check(self) -> None:
        """TransferError once the ticket was revoked or its time is over."""
        if self.revoked:
            raise TransferError("the transfer was ended by its operation")
        if time.monotonic() > self.expires:
            raise TransferError("the transfer took too long")


class DataSocket:
    """Listens on a path; everything happens in threads of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._tickets: dict[str, Ticket] = {}
        self._active: dict[Ticket, socket.socket] = {}
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        self._listener: socket.socket | None = None
        self.counters: dict[str, int] = {"transfers": 0, "transfers_failed": 0}

    def start(self) -> None:
        """Bind and accept. OSError when the path is not usable."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.path))
        self.path.chmod(0o660)
        listener.listen(CONNECTIONS)
        self._listener = listener
        threading.Thread(
            target=self._accept, args=(listener,), name="data-accept", daemon=True
        ).start()

    def stop(self) -> None:
        """Close everything; transfers under way fail."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        with self._lock:
            waiting, self._tickets = list(self._tickets.values()), {}
            for ticket, connection in self._active.items():
                ticket.revoked = True
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for ticket in waiting:
            os.close(ticket.fd)

    # ---- tickets

    def issue(
        self,
        subject: str,
        fd: int,
        size: int,
        importing: bool,
        arrived: Callable[[], None] = lambda: None,
    ) -> str:
        """A ticket's text; takes over fd, also when it refuses. LIMIT_REACHED."""
        text = secrets.token_hex(_TICKET_BYTES)
        ticket = Ticket(subject, fd, size, importing, arrived, expires=time.monotonic() + TICKET_S)
        if importing:
            self.revoke(subject)
        self._drop_expired()
        with self._lock:
            if len(self._tickets) >= TICKETS:
                os.close(fd)
                raise StorageRefusal(
                    "LIMIT_REACHED",
                    f"{TICKETS} transfers wait for their data already; try again later",
                )
            self._tickets[text] = ticket
        return text

    def revoke(self, subject: str) -> None:
        """No transfer about the subject goes on."""
        with self._lock:
            gone = [t for t, ticket in self._tickets.items() if ticket.subject == subject]
            dropped = [self._tickets.pop(text) for text in gone]
            for ticket, connection in self._active.items():
                if ticket.subject == subject:
                    ticket.revoked = True
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
        for ticket in dropped:
            os.close(ticket.fd)

    def revoke_ticket(self, text: str) -> bool:
        """Take one unused ticket back; False when it was used or never was."""
        with self._lock:
            ticket = self._tickets.pop(text, None)
        if ticket is None:
            return False
        os.close(ticket.fd)
        return True

    def _drop_expired(self) -> None:
        now = time.monotonic()
        with self._lock:
            old = [t for t, ticket in self._tickets.items() if ticket.expires < now]
            dropped = [self._tickets.pop(text) for text in old]
        for ticket in dropped:
            os.close(ticket.fd)

    def _take(self, untrusted_text: str, connection: socket.socket) -> Ticket:
        self._drop_expired()
        with self._lock:
            ticket = self._tickets.pop(untrusted_text, None)
            if ticket is None:
                raise TransferError("no such ticket, or it was used up or has expired")
            ticket.expires = time.monotonic() + WHOLE_S
            self._active[ticket] = connection
        return ticket

    # ---- connections

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # closed by stop()
            if not self._free.acquire(blocking=False):
                with contextlib.suppress(OSError):
                    connection.settimeout(_GREETING_S)
                    transfer.send_failure(connection, "too many transfers at once; try again later")
                connection.close()
                continue
            threading.Thread(
                target=self._serve, args=(connection,), name="data", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._answer(connection)
        finally:
            self._free.release()

    def _answer(self, connection: socket.socket) -> None:
        ticket: Ticket | None = None
        try:
            connection.settimeout(_GREETING_S)
            untrusted = transfer.receive_exactly(connection, 2 * _TICKET_BYTES + 1)
            ticket = self._take(untrusted[:-1].decode("ascii", "replace"), connection)
            connection.settimeout(IDLE_S)
            if ticket.importing:
                self._import(connection, ticket)
            else:
                transfer.send_file(connection, ticket.fd, ticket.size, ticket.check)
            self.counters["transfers"] += 1
        except (TransferError, StorageRefusal, OSError) as error:
            self.counters["transfers_failed"] += 1
            text = getattr(error, "message", "") or str(error) or "the transfer failed"
            _LOG.warning("a transfer failed: %s", text)
            with contextlib.suppress(OSError):
                transfer.send_failure(connection, text)
                _part(connection)
        finally:
            if ticket is not None:
                with self._lock:
                    self._active.pop(ticket, None)
                os.close(ticket.fd)

    def _import(self, connection: socket.socket, ticket: Ticket) -> None:
        transfer.receive(
            connection, ticket.size, transfer.sparse_writer(ticket.fd), check=ticket.check
        )
        connection.settimeout(IDLE_S)
        os.fsync(ticket.fd)
        ticket.check()
        ticket.arrived()
        transfer.send_end(connection, 0)


def _part(connection: socket.socket) -> None:
    """Read what the peer still sends, for a moment: closing on it could take the reason
    away from the peer."""
    connection.shutdown(socket.SHUT_WR)
    connection.settimeout(_PART_S)
    end = time.monotonic() + _PART_S
    while time.monotonic() < end and connection.recv(transfer.DATA_LIMIT):
        pass
