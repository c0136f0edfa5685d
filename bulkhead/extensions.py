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

PREFIX = "ext-"
LIMIT = 32
_NAME = re.compile(r"[a-z][a-z0-9_]{0,15}")
_EVENT = re.compile(r"[a-z]+(-[a-z]+)*-pre-[a-z]+(:([A-Za-z0-9_.-]+|\*))?")
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
        if not _EVENT.fullmatch(veto):
            raise SettingsError(f"{where}: {veto} is no pre-event, such as property-pre-set:netvm")
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
