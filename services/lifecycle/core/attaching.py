"""Which devices attach themselves: to a qube that has started, and when they appear.

Owns the choice. Must not begin anything. Invariant: a device that two running qubes claim
goes to neither, since nobody here can be asked; what a user detached stays detached.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bulkhead.model.devices import PLUGGABLE, is_known, matches, matching, specificity
from bulkhead.model.records import Assignment, DeviceFact, Phase, Qube
from bulkhead.model.specs import AttachSpec
from bulkhead.model.view import View

AUTO = "auto-attach"


def _wishes(qube: Qube) -> list[Assignment]:
    """The qube's assignments that attach by themselves, the best claim first."""
    wishes = [a for a in qube.devices if a.mode == AUTO and a.devclass == PLUGGABLE]
    return sorted(wishes, key=specificity, reverse=True)


def _spec(qube: Qube, wish: Assignment, fact: DeviceFact, backend: Qube) -> AttachSpec:
    device = replace(wish, backend=backend.name, port=fact.port, identity=fact.device_id)
    return AttachSpec(qube.name, device)


def _free(fact: DeviceFact, backend: Qube, qube: Qube) -> bool:
    return is_known(fact) and not fact.attached_to and backend.uuid != qube.uuid


def at_start(view: View, qube: Qube) -> Iterator[AttachSpec]:
    """What a qube that has just started gets: the free devices that it is to have."""
    given: set[tuple[str, str]] = set()
    for wish in _wishes(qube):
        for fact, backend in matching(view, wish):
            place = (backend.uuid, fact.port)
            if _free(fact, backend, qube) and place not in given:
                given.add(place)
                yield _spec(qube, wish, fact, backend)


def at_appearance(view: View, fact: DeviceFact) -> tuple[AttachSpec | None, tuple[str, ...]]:
    """Who gets a device that has just appeared, and the names of all that claim it."""
    backend = view.by_uuid(fact.backend_uuid)
    if backend is None or fact.devclass != PLUGGABLE:
        return None, ()
    claims: dict[str, AttachSpec] = {}
    for qube in view.qubes():
        if qube.run.phase is not Phase.UP or not qube.devices:
            continue
        for wish in _wishes(qube):
            if matches(wish, fact, backend) and _free(fact, backend, qube):
                claims.setdefault(qube.name, _spec(qube, wish, fact, backend))
    only = next(iter(claims.values())) if len(claims) == 1 else None
    return only, tuple(sorted(claims))
