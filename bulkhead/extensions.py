"""Declarations of extensions: etc/bulkhead/extensions/NAME.toml.

Owns their syntax. Must not start anything nor decide a call. Invariant: an extension can
ask for and veto only what its file, which the administrator owns, says.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bulkhead.config import SettingsError
from bulkhead.model.properties import ALL_ROWS

PREFIX = "ext-"
LIMIT = 32
_NAME = re.compile(r"[a-z][a-z0-9_]{0,15}")
_WORD = re.compile(r"[A-Za-z0-9_.-]+")
# Pre-events that extensions are asked about: those of a name alone, and those of a kind
# with what they are about behind a colon.
ALONE = (
    "domain-pre-start",
    "domain-pre-shutdown",
    "domain-pre-paused",
    "domain-pre-unpaused",
    "domain-pre-delete",
    "pool-pre-delete",
)
OF_PROPERTIES = ("property-pre-set", "property-pre-reset", "property-pre-del")
OF_OTHERS = (
    "domain-feature-pre-set",
    "domain-feature-pre-delete",
    "device-pre-attach",
    "device-pre-detach",
    "device-pre-assign",
)
_PROPERTIES = frozenset(row.name for row in ALL_ROWS)
_GRANT = re.compile(r"[A-Za-z0-9._-]+(\+[A-Za-z0-9_.+-]*)? ([A-Za-z0-9._-]+|\*)")
_KEYS = {"command", "vetoes", "grants"}


@dataclass(frozen=True, slots=True)
class Extension:
    """One declaration. vetoes: event names, "NAME:*" = any; grants: "METHOD[+ARG] QUBE",
    QUBE "*" = any."""

    name: str
    command: tuple[str, ...]
    vetoes: tuple[str, ...] = ()
    grants: tuple[str, ...] = ()

    @property
    def service(self) -> str:
        """Its name on the bus, which names its user and its socket directory too."""
        return PREFIX + self.name

    def vetoes_event(self, event: str) -> bool:
        """Whether it is asked about this event."""
        return any(
            event.startswith(row[:-1]) if row.endswith(":*") else event == row
            for row in self.vetoes
        )

    def may_call(self, method: str, arg: str, dest: str) -> bool:
        """Whether it was granted this Admin API call."""
        for grant in self.grants:
            call, _, qube = grant.partition(" ")
            if call in (method, f"{method}+{arg}") and qube in ("*", dest):
                return True
        return False


def _strings(data: dict[str, Any], key: str, where: Path) -> tuple[str, ...]:
    value = data.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise SettingsError(f"{where}: {key} is not a list of texts")
    return tuple(value)


def _check_veto(veto: str, where: Path) -> None:
    """A veto that would never be asked for is a mistake that lets everything pass."""
    kind, colon, about = veto.partition(":")
    if kind in OF_PROPERTIES + OF_OTHERS:
        if not colon or (about != "*" and not _WORD.fullmatch(about)):
            raise SettingsError(f"{where}: {kind} needs what it is about, such as {kind}:*")
        if kind in OF_PROPERTIES and about != "*" and about not in _PROPERTIES:
            raise SettingsError(f"{where}: {veto}: there is no property {about}")
    elif veto not in ALONE:
        known = ", ".join((*ALONE, *(f"{stem}:*" for stem in OF_PROPERTIES + OF_OTHERS)))
        raise SettingsError(f"{where}: nobody is asked about {veto}; there are {known}")


def parse(name: str, text: str, where: Path) -> Extension:
    """A declaration's content; SettingsError says what is wrong with it."""
    if not _NAME.fullmatch(name):
        raise SettingsError(f"{where}: an extension's name is at most 16 of a-z, 0-9 and _")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{where}: {error}") from error
    unknown = sorted(data.keys() - _KEYS)
    if unknown:
        raise SettingsError(f"{where}: unknown key {unknown[0]}")
    command = _strings(data, "command", where)
    if not command or not command[0].startswith("/"):
        raise SettingsError(f"{where}: command begins with the absolute path of a program")
    vetoes = _strings(data, "vetoes", where)
    for veto in vetoes:
        _check_veto(veto, where)
    grants = _strings(data, "grants", where)
    for grant in grants:
        if not _GRANT.fullmatch(grant):
            raise SettingsError(f'{where}: {grant} is not "METHOD QUBE" or "METHOD+ARG QUBE"')
    return Extension(name, command, vetoes, grants)


def load(root: Path) -> tuple[Extension, ...]:
    """All declarations below root, by name. SettingsError: one of them is unusable, and
    starting without it would drop a veto."""
    directory = root / "etc/bulkhead/extensions"
    paths = sorted(directory.glob("*.toml")) if directory.is_dir() else []
    if len(paths) > LIMIT:
        raise SettingsError(f"{directory} has more than {LIMIT} extensions")
    found = []
    for path in paths:
        try:
            found.append(parse(path.stem, path.read_text("utf-8"), path))
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{path} cannot be read: {error}") from error
    return tuple(found)
