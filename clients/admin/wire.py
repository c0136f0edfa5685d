"""The client's half of the Admin API's bytes: requests out, replies and events in.

Owns framing and the text formats of replies. Must not do I/O. Invariant: a reply is
parsed whole or refused with QubesDaemonCommunicationError, never guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from clients.admin.exceptions import (
    QubesDaemonAccessError,
    QubesDaemonCommunicationError,
    from_wire,
    is_formatted,
)

REQUEST_LIMIT = 65536


@dataclass(frozen=True, slots=True)
class Event:
    """One event: subject "" = system-wide; values in wire order."""

    subject: str
    name: str
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class QubeLine:
    """One line of admin.vm.List."""

    name: str
    klass: str
    state: str
    uuid: str


@dataclass(frozen=True, slots=True)
class PropertyValue:
    """A property's reply. type: str int bool vm label; value is the wire's text."""

    name: str
    is_default: bool
    type: str
    value: str

    @property
    def python(self) -> str | int | bool | None:
        """int and bool as such, an empty one None; a reference to no qube is None."""
        if self.type == "bool":
            return self.value == "True" if self.value else None
        if self.type == "int":
            return int(self.value) if self.value else None
        if self.type in ("vm", "label"):
            return self.value or None
        return self.value


def request(
    method: str, dest: str, arg: str = "", payload: bytes = b"", source: str = "dom0"
) -> bytes:
    """A request's bytes. ValueError for a word that would break the frame or its size."""
    for word in (method, arg, source, dest):
        if "\0" in word or " " in word or not word.isascii():
            raise ValueError(f"{word!r} cannot stand in an Admin API request")
    frame = f"{method}+{arg} {source} name {dest}\0".encode() + payload
    if len(frame) > REQUEST_LIMIT:
        raise ValueError(f"the request has {len(frame)} bytes, {REQUEST_LIMIT} are allowed")
    return frame


def events_call(method: str, resume: str | None) -> tuple[str, str]:
    """Name and argument of a call that opens a stream; method may carry "+ARG"."""
    if resume is not None:
        return "bulkhead.Events", resume
    name, _, arg = method.partition("+")
    return name, arg


def parse_reply(data: bytes) -> bytes:
    """The content of an OK reply; raises what an exception reply stands for.

    QubesDaemonAccessError for no bytes, QubesDaemonCommunicationError for others.
    """
    if not data:
        raise QubesDaemonAccessError(
            "no answer: the policy does not permit the call, or its arguments are unusable"
        )
    if data[:2] == b"0\0":
        return data[2:]
    if data[:2] == b"2\0":
        raise parse_exception(data)
    raise QubesDaemonCommunicationError(f"not a reply: {data[:20]!r}")


def parse_exception(data: bytes) -> Exception:
    """The exception of a reply that starts with "2"."""
    fields = data.split(b"\0", 4)
    if len(fields) != 5:
        return QubesDaemonCommunicationError("a cut off exception")
    class_name = fields[1].decode("ascii", "replace")
    message = fields[3].decode("utf-8", "replace")
    arguments = [a.decode("utf-8", "replace") for a in fields[4].split(b"\0")[:-1]]
    if is_formatted(class_name):
        try:
            message %= tuple(int(a) if a.isdigit() else a for a in arguments)
        except (TypeError, ValueError):
            pass  # the sender did not double its "%": the text is readable as it is
    return from_wire(class_name, message)


class EventParser:
    """Bytes of a stream, as they come, to events."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that are complete now. Raises what an exception message stands for."""
        self._buffer += data
        while self._buffer:
            head = self._buffer[:2]
            if head == b"1\0":
                event = self._event()
                if event is None:
                    return
                yield event
            elif head == b"2\0":
                if self._buffer.count(b"\0") < 4:
                    return
                raise parse_exception(self._buffer)
            elif head == b"1" or head == b"2":
                return
            else:
                raise QubesDaemonCommunicationError(f"not an event: {self._buffer[:20]!r}")

    def _event(self) -> Event | None:
        fields: list[bytes] = []
        at = 2
        while True:
            end = self._buffer.find(b"\0", at)
            if end < 0:
                return None
            field, at = self._buffer[at:end], end + 1
            if not field and len(fields) >= 2 and len(fields) % 2 == 0:
                break
            fields.append(field)
        self._buffer = self._buffer[at:]
        texts = [field.decode("utf-8", "replace") for field in fields]
        return Event(texts[0], texts[1], dict(zip(texts[2::2], texts[3::2], strict=True)))


# ---- texts of replies


def lines(content: bytes) -> list[str]:
    """A list reply."""
    return content.decode("utf-8", "replace").splitlines()


def parse_qubes(content: bytes) -> list[QubeLine]:
    """The reply of admin.vm.List."""
    found = []
    for line in lines(content):
        name, *words = line.split(" ")
        values = dict(word.split("=", 1) for word in words if "=" in word)
        found.append(
            QubeLine(name, values.get("class", ""), values.get("state", ""), values.get("uuid", ""))
        )
    return found


def parse_property(name: str, text: str) -> PropertyValue:
    """The reply of property Get."""
    parts = text.split(" ", 2)
    if len(parts) != 3 or not parts[0].startswith("default=") or not parts[1].startswith("type="):
        raise QubesDaemonCommunicationError(f"not a property: {text[:60]!r}")
    return PropertyValue(name, parts[0] == "default=True", parts[1][5:], parts[2])


def parse_default(name: str, text: str) -> PropertyValue | None:
    """The reply of property GetDefault, None where there is no default."""
    if not text:
        return None
    head, _, value = text.partition(" ")
    if not head.startswith("type="):
        raise QubesDaemonCommunicationError(f"not a default: {text[:60]!r}")
    return PropertyValue(name, True, head[5:], value)


def parse_properties(content: bytes) -> dict[str, PropertyValue]:
    """The reply of property GetAll."""
    found = {}
    for line in content.decode("utf-8", "replace").split("\n"):
        if line:
            name, _, text = line.partition(" ")
            found[name] = parse_property(name, _unescape(text))
    return found


def _unescape(text: str) -> str:
    if "\\" not in text:
        return text
    parts = []
    characters = iter(text)
    for character in characters:
        if character != "\\":
            parts.append(character)
            continue
        escaped = next(characters, "")
        if escaped not in ("n", "\\"):
            raise QubesDaemonCommunicationError("an unknown escape in a property's value")
        parts.append("\n" if escaped == "n" else "\\")
    return "".join(parts)


def parse_info(content: bytes) -> dict[str, str]:
    """key=value lines, such as of volume.Info and pool.Info."""
    return dict(line.split("=", 1) for line in lines(content) if "=" in line)
