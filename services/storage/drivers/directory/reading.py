"""Reading a volume while others may change it.

Owns what is told of a volume and the opening of a committed state. Must not change a
file. Invariant: it takes no lock, so whatever it saw may be renamed before it is opened;
then it looks again, and what it answers was true at one instant.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from bulkhead.model.records import Volume
from services.storage.core.names import Role
from services.storage.core.present import Present
from services.storage.core.reasons import StorageRefusal
from services.storage.core.revisions import with_id
from services.storage.core.states import RevisionState, VolumeState
from services.storage.core.volumes import Kind, kind_of, parse_vid, require_origin, source_of
from services.storage.drivers import files
from services.storage.drivers.directory.tree import Tree
from services.storage.drivers.files import get_tag, opened
from services.storage.drivers.interface import Committed

_T = TypeVar("_T")

# How often it looks at most.
_LOOKS = 5


class Reading:
    """committed() and describe() of interface.Driver."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    @contextlib.contextmanager
    def committed(self, volume: Volume, revision: str = "") -> Iterator[Committed]:
        """As in interface.Driver."""
        require_origin(volume, "read")
        fd = _again(lambda: self._open(volume, revision))
        try:
            yield Committed(fd, os.fstat(fd).st_size, files.identity(fd))
        finally:
            os.close(fd)

    def _open(self, volume: Volume, revision: str) -> int:
        present = self._tree.scan(parse_vid(volume.vid))
        if revision:
            found = with_id(present.revisions, revision)
            path = present.revisions[found] if found is not None else None
        else:
            path = self._tree.committed(present, volume)
        if path is None:
            raise StorageRefusal(
                "REVISION_NOT_FOUND",
                f"volume {volume.vid} has no revision {revision}",
                volume=volume.vid,
                revision=revision,
            )
        with opened(path) as fd:
            return os.dup(fd)

    def describe(self, volume: Volume, source: Volume | None) -> VolumeState:
        """As in interface.Driver."""
        return _again(lambda: self._describe(volume, source))

    def _describe(self, volume: Volume, source: Volume | None) -> VolumeState:
        kind = kind_of(volume)
        present = self._tree.scan(parse_vid(volume.vid))
        running = present.running
        shown = running or (present.roles.get(Role.CLEAN) if kind is Kind.ORIGIN else None)
        size, usage = volume.size, 0
        if shown is not None:
            size = files.image_size(shown)
            usage = files.used(shown)
        return VolumeState(
            size=size,
            usage=usage,
            path=str(running or present.path(Role.DIRTY)),
            is_outdated=self._is_outdated(volume, source, running, kind),
            is_dirty=kind is Kind.ORIGIN and running is not None,
            revisions=tuple(RevisionState(r.id, float(r.time)) for r in sorted(present.revisions)),
            problem=self._problem(volume, source, present, kind),
            importing=Role.IMPORT in present.roles,
        )

    def _problem(self, volume: Volume, source: Volume | None, present: Present, kind: Kind) -> str:
        try:
            self._tree.check()
            if kind is Kind.ORIGIN and present.running is None:
                self._tree.committed(present, volume)
            elif kind is Kind.SNAPSHOT:
                origin = source_of(volume, source)
                self._tree.committed(self._tree.scan(parse_vid(origin.vid)), origin)
        except StorageRefusal as refusal:
            return refusal.message
        return ""

    def _is_outdated(
        self, volume: Volume, source: Volume | None, running: Path | None, kind: Kind
    ) -> bool:
        if kind is not Kind.SNAPSHOT or running is None:
            return False
        base = get_tag(running, "base")
        try:
            with self.committed(source_of(volume, source)) as current:
                return bool(base) and base != current.identity
        except (StorageRefusal, FileNotFoundError):
            return False


def _again(look: Callable[[], _T]) -> _T:
    for _ in range(_LOOKS - 1):
        with contextlib.suppress(FileNotFoundError):
            return look()
    return look()
