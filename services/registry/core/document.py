"""qubes.xml as a whole: the state's picture to bytes and back.

Owns the cache of fragments and the instruction at the top. Must not know files. The
form of the elements is bulkhead.model.xmlstore's. Invariant: rendering reads nothing but
the picture, so it can run in a thread while the view goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bulkhead.model import xmlstore
from bulkhead.model.records import HALTED, Change, Label, Pool, Qube
from bulkhead.model.view import View
from services.registry.core.foreign import Instruction


class Unreadable(ValueError):
    """The bytes are no qubes.xml."""


@dataclass(frozen=True, slots=True)
class Picture:
    """What the file shows, at one moment."""

    labels: tuple[Label, ...]
    pools: tuple[Pool, ...]
    properties: dict[str, str]
    qubes: tuple[Qube, ...]

    @classmethod
    def of(cls, view: View) -> Picture:
        """The present state; cheap, records are shared."""
        return cls(
            tuple(view.labels.values()),
            tuple(view.pools.values()),
            dict(view.properties),
            tuple(view.qubes()),
        )


class Documents:
    """Renders pictures, keeping each qube's fragment. One thread at a time."""

    def __init__(self) -> None:
        self._fragments: dict[str, tuple[Qube, bytes]] = {}

    def render(self, picture: Picture, instruction: Instruction) -> bytes:
        """The whole file. Only fragments of records that changed are made anew."""
        known = self._fragments
        fresh: dict[str, tuple[Qube, bytes]] = {}
        for qube in picture.qubes:
            held = known.get(qube.uuid)
            if held is None or (held[0] is not qube and _shown(held[0]) != _shown(qube)):
                fresh[qube.uuid] = (qube, xmlstore.fragment(qube))
            else:
                fresh[qube.uuid] = (qube, held[1])
        self._fragments = fresh
        return xmlstore.document(
            instruction.store_id,
            instruction.revision,
            picture.labels,
            picture.pools,
            picture.properties,
            (fragment for _, fragment in fresh.values()),
        )

    def parse(self, document: bytes) -> tuple[list[Change], list[str]]:
        """Changes that fill an empty view, and warnings. Unreadable."""
        try:
            parsed = xmlstore.parse(document)
        except xmlstore.StoreUnreadable as error:
            raise Unreadable(str(error)) from error
        return list(parsed.changes), list(parsed.warnings)


def _shown(qube: Qube) -> Qube:
    """The record without what the file has no place for."""
    return replace(qube, run=HALTED, rules_digest="", revision=0, notes="")
