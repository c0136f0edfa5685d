"""Tells the registry of changed rules, until it has heard.

Owns the notes of what the registry may not have heard, and the names of qubes that go with
them. Must not know kernels. Invariants: a note is durable before the change that it is
about, and goes only when the registry knows, or when the change came to nothing; what is
told is what is stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from bulkhead import failpoints
from bulkhead.bus.errors import BusError
from bulkhead.model.firewall_rules import digest
from services.firewall import failpoint_table  # noqa: F401  (declares the rows)
from services.firewall.adapters.state_files import StateFiles
from services.firewall.failures import failure
from services.firewall.named_locks import NamedLocks
from services.firewall.stored_rules import StoredRules

# Wait before an announcement is tried again.
ANNOUNCE_RETRY_S = 1.0

# (uuid, with the event, digest or None) -> (revision, seq); BusError
Announce = Callable[[str, bool, str | None], Awaitable[tuple[int, int]]]


class Announcements:
    """What the registry is owed. Who notes, tells or drops holds the qube's lock."""

    def __init__(
        self, state: StateFiles, announce: Announce, rules: StoredRules, locks: NamedLocks
    ) -> None:
        self._state = state
        self._announce = announce
        self._rules = rules
        self._locks = locks
        self._qubes: dict[str, str] = {}
        self._unannounced: dict[str, dict[str, Any]] = {}
        self._wake_announce = asyncio.Event()

    def called(self, uuid: str, qube: str) -> None:
        """The qube's name, for notes and messages."""
        self._qubes[uuid] = qube

    def name(self, uuid: str, otherwise: str = "") -> str:
        """The qube's name as far as it is known."""
        return self._qubes.get(uuid, otherwise)

    async def note(self, uuid: str, qube: str) -> dict[str, Any] | None:
        """Remember that the registry will have to hear of this; the earlier note, if any."""
        before = self._unannounced.get(uuid)
        note = {"qube": qube, "event": True}
        try:
            await asyncio.to_thread(self._state.save, "pending", uuid, note)
        except OSError as error:
            raise failure(
                "RULES_NOT_SAVED", f"firewall save error: {error}", uuid=uuid, why=str(error)
            ) from error
        failpoints.hit("firewall.pending.after_mark")
        return before

    async def drop_note(self, uuid: str, before: Mapping[str, Any] | None) -> None:
        """Nothing came of it: only the earlier note stays, if there was one."""
        if before is None:
            await asyncio.to_thread(self._state.delete, "pending", uuid)

    async def take_back(self, uuid: str) -> None:
        """The change was undone: nothing is owed for it."""
        if uuid not in self._unannounced:
            await asyncio.to_thread(self._state.delete, "pending", uuid)

    def delete_note(self, uuid: str) -> None:
        """The qube is gone. Blocks: for a thread; then forget."""
        self._state.delete("pending", uuid)

    def forget(self, uuid: str) -> None:
        """The qube is gone, and its note with it."""
        self._unannounced.pop(uuid, None)
        self._qubes.pop(uuid, None)

    async def owe(self) -> None:
        """What the registry may not have heard: changes cut short, and all digests once
        per boot of the host, because a note does not outlive the host."""
        for uuid, note in self._state.load("pending").items():
            self._qubes.setdefault(uuid, str(note.get("qube", "")))
            self._unannounced[uuid] = note
        if not self._state.started():
            for uuid in await self._rules.uuids():
                self._unannounced.setdefault(uuid, {"qube": "", "event": False})
        self._wake_announce.set()

    async def tell(self, uuid: str, event: bool = True) -> tuple[int, int]:
        """Announce the stored digest, and the event: (revision, seq).

        The caller holds the qube's lock and has left the note. BusError when the registry
        does not answer: the note stays, and the announcement is made later.
        """
        stored = await self._rules.read(uuid)
        value = "" if stored.is_default else None
        if stored.rules is not None and not stored.is_default:
            value = digest(stored.rules)
        failpoints.hit("firewall.announce.before")
        try:
            revision, seq = await self._announce(uuid, event, value)
        except BusError:
            self._unannounced[uuid] = {"qube": self._qubes.get(uuid, ""), "event": event}
            self._wake_announce.set()
            raise
        failpoints.hit("firewall.announce.after")
        self._unannounced.pop(uuid, None)
        await asyncio.to_thread(self._state.delete, "pending", uuid)
        return revision, seq

    async def run(self) -> None:
        """Background task: announce what is owed until the registry has taken it."""
        while True:
            await self._wake_announce.wait()
            self._wake_announce.clear()
            while self._unannounced:
                failed = False
                for uuid, note in tuple(self._unannounced.items()):
                    async with self._locks.hold(uuid):
                        if uuid not in self._unannounced:
                            continue
                        if note.get("qube"):
                            self._qubes.setdefault(uuid, str(note["qube"]))
                        try:
                            await self.tell(uuid, bool(note.get("event", True)))
                        except BusError as error:
                            if error.reason in ("QUBE_NOT_FOUND", "INVALID_UUID"):
                                # A file of a qube that is gone owes nothing.
                                self._unannounced.pop(uuid, None)
                                await asyncio.to_thread(self._state.delete, "pending", uuid)
                                continue
                            failed = True
                if failed:
                    await asyncio.sleep(ANNOUNCE_RETRY_S)
            self._wake_announce.clear()
            if not self._state.started():
                await asyncio.to_thread(self._state.mark_started)
