"""Reads every event of an instance from outside, and judges the stream as a whole.

Owns the connection and what the events say of qubes: which exist, which run. Must not
know what was done to the instance. Invariant: an event is taken in once, in the order of
its position; after "events-lost" what the events say is read anew from the state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from clients.admin import AdminClient
from clients.admin.exceptions import QubesException
from clients.admin.wire import Event
from tests.instance import Instance

RECONNECT_S = 0.05
# An entry's last event has no number within the entry.
LAST = 1 << 30


def _place(position: str) -> tuple[str, int, int]:
    """Boot, sequence number and number within the entry of a position."""
    boot, seq, *number = position.split(".")
    return boot, int(seq), int(number[0]) if number else LAST


@dataclass
class Fold:
    """What the events say: names of qubes, those that run, those that are paused."""

    qubes: set[str] = field(default_factory=set)
    running: set[str] = field(default_factory=set)
    paused: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def take(self, event: Event) -> None:
        """One event; problems grows by what does not follow from those before it."""
        name, subject = event.name, event.subject
        if name == "domain-add":
            self._expect(event.values["vm"] not in self.qubes, event)
            self.qubes.add(event.values["vm"])
        elif name == "domain-delete":
            self._expect(event.values["vm"] in self.qubes, event)
            self.qubes.discard(event.values["vm"])
            self.running.discard(event.values["vm"])
        elif name == "domain-start":
            self._expect(subject in self.qubes and subject not in self.running, event)
            self.running.add(subject)
        elif name == "domain-shutdown":
            self.running.discard(subject)
            self.paused.discard(subject)
        elif name == "domain-paused":
            self._expect(subject not in self.paused, event)
            self.paused.add(subject)
        elif name == "domain-unpaused":
            self.paused.discard(subject)

    def _expect(self, holds: bool, event: Event) -> None:
        if not holds:
            self.problems.append(f"{event.name} of {event.subject} {dict(event.values)} again")


class Follower:
    """A client that reads all events from now on, over every break of its connection."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        # How often events were said to be lost, and how often the connection broke.
        self.lost = 0
        self._news = threading.Condition()
        self._awaited = ""
        self._seen = False
        self._fold = Fold()
        self._anew = True
        self._position = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="follower", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Read no further; to be called once the instance has stopped."""
        self._stopped.set()
        self._thread.join(10.0)

    def _read(self) -> None:
        client = AdminClient(self.instance.socket, timeout=10.0)
        while not self._stopped.is_set():
            try:
                for event in client.events(resume=self._position):
                    self._take(event)
            except (QubesException, OSError):
                pass  # adminapi is gone for a moment: where we were, we go on
            self._stopped.wait(RECONNECT_S)

    def _take(self, event: Event) -> None:
        with self._news:
            position = event.values["position"]
            if event.name == "events-lost":
                self.lost += 1
                self._anew = True
            elif event.name != "connection-established":
                before, now = _place(self._position or position), _place(position)
                if self._position and before[0] == now[0] and now <= before:
                    self._fold.problems.append(f"{event.name} at {position} after {before}")
                if not self._anew:
                    self._fold.take(event)
                if event.name == self._awaited:
                    self._seen = True
                    self._news.notify_all()
            self._position = position

    def wait_seen(self, name: str, act: Callable[[], object], timeout: float) -> bool:
        """Do what causes an event of that name, and wait until it, hence all before it, was
        taken in. False where it does not come in time."""
        with self._news:
            self._awaited = name
            self._seen = False
        act()
        with self._news:
            return self._news.wait_for(lambda: self._seen, timeout)

    def problems(self, states: Mapping[str, str]) -> list[str]:
        """What the events so far say that is not so, given the power state of each qube,
        of which nothing changes meanwhile; after lost events they say what is so."""
        running = {name for name, state in states.items() if state != "Halted"}
        paused = {name for name, state in states.items() if state == "Paused"}
        with self._news:
            fold = self._fold
            if self._anew:
                self._fold = Fold(set(states), running, paused)
                self._anew = False
                return []
            found = list(fold.problems)
            fold.problems.clear()
            for what, said, true in (
                ("exist", fold.qubes, set(states)),
                ("run", fold.running, running),
                ("are paused", fold.paused, paused),
            ):
                if said != true:
                    found.append(f"by the events {sorted(said)} {what}, in truth {sorted(true)}")
            # Said once: what follows is judged from here on.
            fold.qubes, fold.running, fold.paused = set(states), running, paused
            return found
