"""Guest keys: in QubesDB where it is installed, else in a file per qube.

Owns run/bulkhead/domains/guest-keys/UUID.json and the QubesDB connections. Must not
know limits (core.guest_keys) or the bus. Invariant: a file is the whole old or the whole
new set of one boot; keys of another boot are never shown. Nothing is forced to the disk:
a power cut ends every boot.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bulkhead import durable, failpoints
from services.domains import failpoint_table as _failpoint_table  # noqa: F401  (declares)
from services.domains.core import guest_keys
from services.domains.core.reasons import DomainsError

from .threads import AbandonableCalls, TooManyCalls

STRIPES = 64
QUBESDB_S = 10.0


@dataclass(frozen=True, slots=True)
class Boot:
    """Whose keys: QubesDB knows a guest by name, files by uuid and boot."""

    uuid: str
    boot_id: str
    name: str = ""


class GuestKeys(Protocol):
    """Where guests' keys are."""

    async def write(
        self,
        boot: Boot,
        written: list[tuple[str, str]],
        removed: list[str],
        replace_all: bool,
        *,
        changed_only: bool = False,
        removed_of: guest_keys.KeysOf | None = None,
    ) -> None:
        """Change the keys of a boot. DomainsError on a limit; nothing is then changed.

        changed_only: what has its value already is not written again, but for news.
        """

    async def read(self, boot: Boot, prefix: str) -> dict[str, str]:
        """The keys at or below prefix; the guest may have written them."""

    async def drop(self, uuid: str, boot_id: str) -> None:
        """The boot ended: forget its keys, not those of another boot."""

    async def kept(self) -> dict[str, str]:
        """uuid -> boot id of all that is kept; boot id "" = unreadable."""


class FileKeys:
    """GuestKeys in one JSON file per qube: {"boot_id": ..., "keys": {...}}."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._locks = [asyncio.Lock() for _ in range(STRIPES)]

    def _lock(self, uuid: str) -> asyncio.Lock:
        return self._locks[hash(uuid) % STRIPES]

    def _file(self, uuid: str) -> Path:
        return self._directory / f"{uuid}.json"

    def _content(self, uuid: str) -> tuple[str, dict[str, str]] | None:
        """(boot id, keys) of the file; ("", {}) when it is no file of ours."""
        try:
            content = json.loads(self._file(uuid).read_text())
            return str(content["boot_id"]), dict(content["keys"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return "", {}

    def _keys(self, boot: Boot) -> dict[str, str]:
        return self._of(boot, self._content(boot.uuid))

    @staticmethod
    def _of(boot: Boot, content: tuple[str, dict[str, str]] | None) -> dict[str, str]:
        return content[1] if content is not None and content[0] == boot.boot_id else {}

    def _store(self, boot: Boot, keys: dict[str, str]) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = json.dumps({"boot_id": boot.boot_id, "keys": keys}, sort_keys=True)
        failpoints.hit("domains.keys.before")
        durable.write_file(self._file(boot.uuid), text.encode(), 0o600, forced=False)
        failpoints.hit("domains.keys.after")

    async def write(
        self,
        boot: Boot,
        written: list[tuple[str, str]],
        removed: list[str],
        replace_all: bool,
        *,
        changed_only: bool = False,  # noqa: ARG002 - nobody watches a file
        removed_of: guest_keys.KeysOf | None = None,
    ) -> None:
        async with self._lock(boot.uuid):
            content = await asyncio.to_thread(self._content, boot.uuid)
            present = self._of(boot, content)
            keys = guest_keys.apply(present, written, removed, replace_all, removed_of)
            if content != (boot.boot_id, keys):  # most changes of a qube leave others' as they are
                await asyncio.to_thread(self._store, boot, keys)

    async def read(self, boot: Boot, prefix: str) -> dict[str, str]:
        return guest_keys.select(await asyncio.to_thread(self._keys, boot), prefix)

    async def drop(self, uuid: str, boot_id: str) -> None:
        async with self._lock(uuid):
            content = await asyncio.to_thread(self._content, uuid)
            if content is not None and content[0] == boot_id:
                await asyncio.to_thread(self._file(uuid).unlink, missing_ok=True)

    async def kept(self) -> dict[str, str]:
        return await asyncio.to_thread(self._kept)

    def _kept(self) -> dict[str, str]:
        found = {}
        for path in sorted(self._directory.glob("*.json")):
            content = self._content(path.stem)
            if content is not None:
                found[path.stem] = content[0]
        return found


class QubesDbKeys:
    """GuestKeys in the guests' own QubesDB; connect is qubesdb.QubesDB.

    Every call may hang on a hostile guest's daemon: each runs in a thread that can be
    given up, and opens a connection of its own.
    """

    def __init__(self, connect: Callable[[str], Any]) -> None:
        self._connect = connect
        self._calls = AbandonableCalls(32, "QubesDB")

    async def _run(self, boot: Boot, work: Callable[[Any], dict[str, str]]) -> dict[str, str]:
        def call() -> dict[str, str]:
            database = self._connect(boot.name)
            try:
                return work(database)
            finally:
                database.close()

        try:
            return await self._calls.run(call, QUBESDB_S)
        except (TimeoutError, TooManyCalls, OSError) as error:
            raise DomainsError(
                "GUEST_DAEMON_FAILED",
                f"QubesDB of {boot.name} does not answer: {error or 'no answer in time'}.",
                qube=boot.name,
            ) from error
        except Exception as error:
            # qubesdb.Error cannot be named here: the module is not installed everywhere.
            raise DomainsError(
                "GUEST_DAEMON_FAILED", f"QubesDB of {boot.name} refused: {error}.", qube=boot.name
            ) from error

    async def write(
        self,
        boot: Boot,
        written: list[tuple[str, str]],
        removed: list[str],
        replace_all: bool,
        *,
        changed_only: bool = False,
        removed_of: guest_keys.KeysOf | None = None,
    ) -> None:
        # The limits, before any effect.
        guest_keys.apply({}, written, removed, replace_all, removed_of)

        def work(database: Any) -> dict[str, str]:
            failpoints.hit("domains.keys.before")
            if replace_all:
                database.rm("/")
            kept = {path for path, _ in written}
            for path in removed:
                # What is written again never disappears in between: guests watch.
                below = [path] if not path.endswith("/") else map(str, database.multiread(path))
                for key in below:
                    if key not in kept:
                        with contextlib.suppress(KeyError):
                            database.rm(key)
            gone = {} if removed_of is None else self._of(database, removed_of, kept)
            for path, emptied in gone.items():
                # Found again, should the news not be written any more.
                database.write(path, emptied.encode())
            for path, value in written:
                if not changed_only or database.read(path) != value.encode():
                    database.write(path, value.encode())
            if removed_of is not None and gone:
                if removed_of.news not in written:
                    database.write(removed_of.news[0], removed_of.news[1].encode())
                for path in gone:
                    with contextlib.suppress(KeyError):
                        database.rm(path)
            failpoints.hit("domains.keys.after")
            return {}

        await self._run(boot, work)

    async def read(self, boot: Boot, prefix: str) -> dict[str, str]:
        def work(database: Any) -> dict[str, str]:
            return self._below(database, prefix or "/")

        return guest_keys.select(await self._run(boot, work), prefix)

    @staticmethod
    def _below(database: Any, prefix: str) -> dict[str, str]:
        return {
            str(path): bytes(untrusted_value).decode("utf-8", "replace")
            for path, untrusted_value in database.multiread(prefix).items()
        }

    def _of(self, database: Any, removed_of: guest_keys.KeysOf, kept: set[str]) -> dict[str, str]:
        found = removed_of.found(self._below(database, removed_of.below))
        return {path: emptied for path, emptied in found.items() if path not in kept}

    async def drop(self, uuid: str, boot_id: str) -> None:
        """The database ends with its daemon."""

    async def kept(self) -> dict[str, str]:
        return {}
