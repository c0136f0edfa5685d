"""The convenience calls that both clients have, as requests and parsers.

Owns which call answers what. Must not do I/O. Invariant: each row is used by AdminClient and
AsyncAdminClient alike, so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from clients.admin import wire

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """One call and the reader of its reply."""

    method: str
    dest: str
    arg: str
    payload: bytes
    read: Callable[[bytes], T]


def _nothing(content: bytes) -> None:
    del content


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def _holder(dest: str) -> str:
    return "admin.vm.property" if dest else "admin.property"


def qubes(dest: str = "dom0") -> Question[list[wire.QubeLine]]:
    """Every qube, or the one that dest names."""
    return Question("admin.vm.List", dest, "", b"", wire.parse_qubes)


def get_property(dest: str, name: str) -> Question[wire.PropertyValue]:
    """A property; dest "" = the system's."""
    return Question(
        f"{_holder(dest)}.Get",
        dest or "dom0",
        name,
        b"",
        lambda content: wire.parse_property(name, _text(content)),
    )


def get_default(dest: str, name: str) -> Question[wire.PropertyValue | None]:
    """A property's default, None where there is none."""
    return Question(
        f"{_holder(dest)}.GetDefault",
        dest or "dom0",
        name,
        b"",
        lambda content: wire.parse_default(name, _text(content)),
    )


def get_all(dest: str) -> Question[dict[str, wire.PropertyValue]]:
    """All properties in one call."""
    return Question(f"{_holder(dest)}.GetAll", dest or "dom0", "", b"", wire.parse_properties)


def property_help(dest: str, name: str) -> Question[str]:
    """The property's help text."""
    return Question(f"{_holder(dest)}.Help", dest or "dom0", name, b"", _text)


def set_property(dest: str, name: str, value: str) -> Question[None]:
    """Set a property to a text; a reference to no qube is empty."""
    return Question(f"{_holder(dest)}.Set", dest or "dom0", name, value.encode(), _nothing)


def reset_property(dest: str, name: str) -> Question[None]:
    """A property back to its default."""
    return Question(f"{_holder(dest)}.Reset", dest or "dom0", name, b"", _nothing)


def listing(method: str, dest: str = "dom0", arg: str = "") -> Question[list[str]]:
    """Any call that answers one word per line."""
    return Question(method, dest, arg, b"", wire.lines)


def info(method: str, dest: str = "dom0", arg: str = "") -> Question[dict[str, str]]:
    """Any call that answers key=value lines."""
    return Question(method, dest, arg, b"", wire.parse_info)


def text(method: str, dest: str = "dom0", arg: str = "", payload: bytes = b"") -> Question[str]:
    """Any call that answers plain text."""
    return Question(method, dest, arg, payload, _text)
