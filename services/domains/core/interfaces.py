"""Which boot of its backend each plugged interface hangs at.

Owns that for every interface that was plugged by this run of the service. Must not know
hypervisors: the caller says what is plugged, and what is known of a qube. Invariant: an
interface is called dead only when its backend has begun anew since it was plugged.
"""

from __future__ import annotations

from collections.abc import Callable

from bulkhead.model.records import PowerFact

from .spec import InterfaceSpec
from .tracker import Sighting


class InterfaceBook:
    """Interfaces by the boot that has them. current: the last report on a qube."""

    def __init__(self, current: Callable[[str], PowerFact | None]) -> None:
        self._current = current
        # (qube, boot) -> boot of its network backend when the interface was plugged.
        self._plugged: dict[tuple[str, str], str] = {}

    def boot_behind(self, *interfaces: InterfaceSpec) -> str | None:
        """The boot of the backend that the one interface is about to be plugged into. Asked
        before: a backend that starts anew meanwhile must not be taken for the one plugged to."""
        for interface in interfaces:
            known = self._current(interface.backend_uuid)
            if known is not None:
                return known.boot_id
        return None

    def plugged(self, uuid: str, boot_id: str, backend: str | None) -> None:
        """The boot has its interface at that boot of a backend; a boot that ended has none."""
        now = self._current(uuid)
        if backend is not None and now is not None and now.boot_id == boot_id:
            self._plugged[uuid, boot_id] = backend

    def is_dead(self, sighting: Sighting, interface: InterfaceSpec) -> bool:
        """An interface that is there hangs at an earlier boot of its backend.

        The hypervisor does not tell: both have the backend's name. What another run of this
        service plugged is as old as the guest.
        """
        backend = self._current(interface.backend_uuid)
        if backend is None:
            return False
        plugged = self._plugged.get((sighting.uuid, sighting.boot_id))
        if plugged is not None:
            return plugged != backend.boot_id
        began, since = sighting.start_time, backend.start_time
        return began is not None and since is not None and since > began

    def ended(self, uuid: str, boot_id: str) -> None:
        """The boot is over, and its interface with it."""
        self._plugged.pop((uuid, boot_id), None)
