"""What the files of one volume mean together.

Owns the reading of a set of file names: what runs, what is committed, what came of a
crash, which of it holds data, and what must not be done with a volume in that state. Must
not touch files: a Path here is a name. Invariant: every file that is named like one of
the volume's is in exactly one place of Present, so nothing of it escapes a removal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bulkhead.model.records import Volume
from services.storage.core.names import Role, classify, file_name
from services.storage.core.reasons import StorageRefusal
from services.storage.core.revisions import Revision
from services.storage.core.volumes import Vid

# Files whose tag says whose volume it is. BASE and the 4.4 files may be second names of
# another qube's commit, so their tags mean nothing.
OWNED = (Role.CLEAN, Role.DIRTY, Role.OVERLAY, Role.IMPORT, Role.PRECACHE)
RUNNING = (Role.OVERLAY, Role.DIRTY)
# Running data and all that only it needs.
OF_A_RUN = (Role.OVERLAY, Role.DIRTY, Role.BASE, Role.PRECACHE)
# Who owns a volume, by the first tag there is. Running data first: beside it, CLEAN may be
# a second name of the source's. The newest revision comes after them all.
_TELLING = (*RUNNING, Role.CLEAN, Role.IMPORT, Role.PRECACHE)
# What holds data comes last, running and current data at the end.
_BY_WORTH = (Role.PRECACHE, Role.IMPORT, Role.BASE, Role.OVERLAY, Role.DIRTY, Role.CLEAN)


@dataclass(slots=True)
class Present:
    """What exists of one volume."""

    vid: Vid
    directory: Path
    roles: dict[Role, Path] = field(default_factory=dict)
    revisions: dict[Revision, Path] = field(default_factory=dict)
    temporaries: list[Path] = field(default_factory=list)
    legacy: list[Path] = field(default_factory=list)

    def path(self, role: Role) -> Path:
        """Where a file of that role is or would be."""
        return self.directory / file_name(self.vid.name, role)

    @property
    def running(self) -> Path | None:
        """The file with running data."""
        return next((self.roles[r] for r in RUNNING if r in self.roles), None)

    @property
    def everything(self) -> list[Path]:
        """Every file, in the order of a removal: a crash in it leaves what is worth most."""
        return [
            *self.temporaries,
            *self.legacy,
            *(self.revisions[r] for r in sorted(self.revisions)),
            *(self.roles[r] for r in _BY_WORTH if r in self.roles),
        ]

    @property
    def telling(self) -> list[Path]:
        """The files whose tags say who owns it, the one that counts most first."""
        return [
            *(self.roles[r] for r in _TELLING if r in self.roles),
            *(self.revisions[r] for r in sorted(self.revisions, reverse=True)),
        ]

    @property
    def state(self) -> tuple[str, Path] | None:
        """What is left of the volume, as Found.kind says it, and the file that shows it."""
        if Role.CLEAN in self.roles:
            return "committed", self.roles[Role.CLEAN]
        if self.running is not None:
            return "running", self.running
        if Role.IMPORT in self.roles:
            return "import", self.roles[Role.IMPORT]
        if self.revisions:
            return "revisions", self.revisions[max(self.revisions)]
        everything = self.everything
        return ("temporary", everything[0]) if everything else None

    def forget(self) -> None:
        """All of it was moved away."""
        self.roles.clear()
        self.revisions.clear()
        self.temporaries.clear()
        self.legacy.clear()


def gather(vid: Vid, directory: Path, names: Iterable[str]) -> Present:
    """What the names of a directory's files say of one of its volumes."""
    present = Present(vid, directory)
    for text in names:
        name = classify(text)
        if name is None or name.volume != vid.name:
            continue
        path = directory / text
        if name.temporary:
            present.temporaries.append(path)
        elif name.role is Role.LEGACY:
            present.legacy.append(path)
        elif name.revision is not None:
            present.revisions[name.revision] = path
        else:
            present.roles[name.role] = path
    return present


def require_quiet(present: Present, volume: Volume, what: str) -> None:
    """Refuse while it runs, was not cleanly stopped, or is imported into."""
    if present.running is not None:
        raise StorageRefusal(
            "VOLUME_DIRTY",
            f"cannot {what} volume {volume.vid}: it is running or was not cleanly stopped; "
            "stop its qube first",
            volume=volume.vid,
        )
    if Role.IMPORT in present.roles:
        raise StorageRefusal(
            "VOLUME_IMPORTING",
            f"cannot {what} volume {volume.vid}: an import into it is under way",
            volume=volume.vid,
        )


def require_committed(present: Present, volume: Volume, pool: str) -> Path:
    """The file of the current state. SOURCE_RUNNING, VOLUME_NOT_FOUND."""
    path = present.roles.get(Role.CLEAN)
    if path is not None:
        return path
    if present.running is not None:
        raise StorageRefusal(
            "SOURCE_RUNNING",
            f"volume {volume.vid} runs with snapshots disabled: it has no committed state; "
            "stop its qube first",
            volume=volume.vid,
        )
    raise StorageRefusal(
        "VOLUME_NOT_FOUND",
        f"volume {volume.vid} has no data in pool {pool}",
        volume=volume.vid,
        pool=pool,
    )
