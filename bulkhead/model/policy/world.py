"""The qubes as policy sees them: from a view, or from the JSON of GetSystemInfo.

Owns the few facts that rules can ask for. Must not know rules. Invariant: a name and a
uuid of one qube give the same Subject, and an absent qube gives None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from bulkhead.model.evaluate import evaluate, power_state, template_for_dispvms
from bulkhead.model.properties import has_property
from bulkhead.model.records import ADMINVM_UUID, Qube
from bulkhead.model.view import View

UUID_PREFIX = "uuid:"


@dataclass(frozen=True, slots=True)
class Subject:
    """One qube."""

    name: str
    uuid: str
    klass: str
    tags: frozenset[str]
    disposable_template: bool = False

    @property
    def is_adminvm(self) -> bool:
        """dom0."""
        return self.uuid == ADMINVM_UUID


class World(Protocol):
    """What evaluation asks of the system."""

    def find(self, name: str) -> Subject | None:
        """The qube of a name or of `uuid:UUID`."""

    def default_dispvm(self, subject: Subject) -> str:
        """Name of the qube's default disposable template, "" = none."""

    def running(self, subject: Subject) -> bool:
        """Whether its power state is Running."""


class ViewWorld:
    """The qubes of the present view.

    last_known: the record of a qube that has just gone, by name, so that the event of
    its removal can still be judged.
    """

    def __init__(
        self,
        view: Callable[[], View],
        last_known: Callable[[str], Qube | None] = lambda _name: None,
    ) -> None:
        self._view = view
        self._last_known = last_known

    def find(self, name: str) -> Subject | None:
        """See World."""
        view = self._view()
        if name.startswith(UUID_PREFIX):
            qube = view.by_uuid(name[len(UUID_PREFIX) :])
            if qube is not None and qube.hidden:
                qube = None
        else:
            qube = view.qube(name) or self._last_known(name)
        if qube is None:
            return None
        return Subject(qube.name, qube.uuid, qube.klass, qube.tags, template_for_dispvms(qube))

    def default_dispvm(self, subject: Subject) -> str:
        """See World."""
        view = self._view()
        qube = view.by_uuid(subject.uuid)
        if qube is None or not has_property(qube.klass, "default_dispvm"):
            return ""
        return str(evaluate(view, qube, "default_dispvm") or "")

    def running(self, subject: Subject) -> bool:
        """See World."""
        view = self._view()
        qube = view.by_uuid(subject.uuid)
        return qube is not None and power_state(view, qube) == "Running"


class InfoWorld:
    """The qubes of internal.GetSystemInfo's reply."""

    def __init__(self, info: Mapping[str, Any]) -> None:
        self._domains: dict[str, Mapping[str, Any]] = dict(info["domains"])
        self._names = {str(d["uuid"]): name for name, d in self._domains.items()}

    def find(self, name: str) -> Subject | None:
        """See World."""
        if name.startswith(UUID_PREFIX):
            name = self._names.get(name[len(UUID_PREFIX) :], "")
        data = self._domains.get(name)
        if data is None:
            return None
        return Subject(
            name,
            str(data["uuid"]),
            str(data["type"]),
            frozenset(str(tag) for tag in data["tags"]),
            bool(data["template_for_dispvms"]),
        )

    def default_dispvm(self, subject: Subject) -> str:
        """See World."""
        return str(self._domains[subject.name]["default_dispvm"] or "")

    def running(self, subject: Subject) -> bool:
        """See World."""
        return bool(self._domains[subject.name]["power_state"] == "Running")
