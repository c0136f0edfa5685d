"""The asyncio client.

Owns connections and child processes of calls under way. Must not know what calls mean.
Invariant: the same questions and the same answers as the blocking client.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

from clients.admin import calls, wire
from clients.admin.exceptions import QubesDaemonAccessError, QubesDaemonCommunicationError
from clients.admin.paths import QREXEC_CLIENT, socket_path

T = TypeVar("T")
_CHUNK = 65536


class AsyncAdminClient:
    """AdminClient's methods as coroutines; events() is an asynchronous iterator."""

    def __init__(
        self, path: Path | str | None, *, source: str = "dom0", timeout: float | None = None
    ) -> None:
        self.path = str(path) if path is not None else None
        self.source = source
        self.timeout = timeout

    @classmethod
    def local(cls, root: Path | str | None = None, **more: float | None) -> AsyncAdminClient:
        """The client of the instance below root; see clients.admin.paths."""
        return cls(socket_path(root), timeout=more.get("timeout"))

    # ---- calls

    async def call(
        self,
        method: str,
        dest: str = "dom0",
        arg: str = "",
        payload: bytes = b"",
        *,
        timeout: float | None = None,
    ) -> bytes:
        """Any call: the reply's content. Raises clients.admin.exceptions.

        timeout: seconds for this call alone, None = the client's.
        """
        try:
            async with asyncio.timeout(timeout if timeout is not None else self.timeout):
                if self.path is None:
                    data = await self._through_qrexec(method, dest, arg, payload)
                else:
                    data = await self._through_socket(method, dest, arg, payload)
        except TimeoutError as error:
            raise QubesDaemonCommunicationError("no answer in time") from error
        return wire.parse_reply(data)

    async def ask(self, question: calls.Question[T]) -> T:
        """A prepared call of clients.admin.calls."""
        return question.read(
            await self.call(question.method, question.dest, question.arg, question.payload)
        )

    async def events(
        self, dest: str = "dom0", method: str = "admin.Events", *, resume: str | None = None
    ) -> AsyncIterator[wire.Event]:
        """Events as they come, connection-established first; ends when the stream does.

        resume: as of AdminClient.events.
        """
        name, arg = wire.events_call(method, resume)
        parser = wire.EventParser()
        if self.path is None:
            process = await self._qrexec(name, dest, arg, stdin=asyncio.subprocess.DEVNULL)
            assert process.stdout is not None
            try:
                while chunk := await process.stdout.read(_CHUNK):
                    for event in parser.feed(chunk):
                        yield event
            finally:
                if process.returncode is None:
                    process.terminate()
                    await process.wait()
            return
        reader, writer = await self._connect(wire.request(name, dest, arg, b"", self.source))
        try:
            while chunk := await _receive(reader):
                for event in parser.feed(chunk):
                    yield event
        finally:
            writer.close()

    async def _connect(self, frame: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        assert self.path is not None
        try:
            reader, writer = await asyncio.open_unix_connection(self.path)
        except OSError as error:
            raise QubesDaemonCommunicationError(
                f"nobody answers at {self.path}: {error}; is the system running?"
            ) from error
        try:
            writer.write(frame)
            writer.write_eof()
        except OSError:
            pass  # dropped: reading says so
        return reader, writer

    async def _through_socket(self, method: str, dest: str, arg: str, payload: bytes) -> bytes:
        frame = wire.request(method, dest, arg, payload, self.source)
        reader, writer = await self._connect(frame)
        chunks = []
        try:
            while chunk := await _receive(reader):
                chunks.append(chunk)
        finally:
            writer.close()
        return b"".join(chunks)

    async def _qrexec(
        self, method: str, dest: str, arg: str, *, stdin: int
    ) -> asyncio.subprocess.Process:
        try:
            return await asyncio.create_subprocess_exec(
                QREXEC_CLIENT,
                dest,
                f"{method}+{arg}" if arg else method,
                stdin=stdin,
                stdout=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise QubesDaemonCommunicationError(f"{QREXEC_CLIENT}: {error}") from error

    async def _through_qrexec(self, method: str, dest: str, arg: str, payload: bytes) -> bytes:
        wire.request(method, dest, arg, payload)  # the same limits
        process = await self._qrexec(method, dest, arg, stdin=asyncio.subprocess.PIPE)
        data, _ = await process.communicate(payload)
        if process.returncode:
            raise QubesDaemonAccessError(f"{method} on {dest} was refused by policy")
        return data

    # ---- shorthands

    async def text(
        self, method: str, dest: str = "dom0", arg: str = "", payload: bytes = b""
    ) -> str:
        """A call's plain text."""
        return await self.ask(calls.text(method, dest, arg, payload))

    async def lines(self, method: str, dest: str = "dom0", arg: str = "") -> list[str]:
        """A call's lines."""
        return await self.ask(calls.listing(method, dest, arg))

    async def info(self, method: str, dest: str = "dom0", arg: str = "") -> dict[str, str]:
        """A call's key=value lines."""
        return await self.ask(calls.info(method, dest, arg))

    async def qubes(self, dest: str = "dom0") -> list[wire.QubeLine]:
        """Every qube, or one."""
        return await self.ask(calls.qubes(dest))

    async def get(self, dest: str, name: str) -> wire.PropertyValue:
        """A property; dest "" = the system's."""
        return await self.ask(calls.get_property(dest, name))

    async def get_default(self, dest: str, name: str) -> wire.PropertyValue | None:
        """A property's default."""
        return await self.ask(calls.get_default(dest, name))

    async def get_all(self, dest: str) -> dict[str, wire.PropertyValue]:
        """All properties of a qube, or of the system."""
        return await self.ask(calls.get_all(dest))

    async def set(self, dest: str, name: str, value: str) -> None:
        """Set a property."""
        await self.ask(calls.set_property(dest, name, value))

    async def reset(self, dest: str, name: str) -> None:
        """A property back to its default."""
        await self.ask(calls.reset_property(dest, name))


async def _receive(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(_CHUNK)
    except ConnectionError:
        return b""
