"""Names, character sets and small languages that come from outside.

Owns what a well-formed name, number, word or device text is. Must not know whether
what is named exists. Invariant: a check returns the value itself, cleaned where the
rules allow surrounding space, or raises Refusal; it never repairs.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field

from bulkhead.model.refusal import Refusal

QUBE_NAME_LIMIT = 31
NOTES_LIMIT = 256_000  # bytes
UNKNOWN_DEVICE_ID = "0000:0000::?******"
UNKNOWN_INTERFACE = "?******"
ANY = "*"
ASSIGNABLE_MODES: tuple[str, ...] = ("required", "ask-to-attach", "auto-attach")
MODES: tuple[str, ...] = ("manual", "ask-to-attach", "auto-attach", "required")

_LETTERS = frozenset(string.ascii_letters)
_DIGITS = frozenset(string.digits)
_WORD = _LETTERS | _DIGITS | frozenset("_.-")
_TAG = _LETTERS | _DIGITS | frozenset("_-")
_REVISION = _WORD | {":"}
_PRINTABLE = frozenset(string.printable)
_VALUE = frozenset(chr(code) for code in range(0x20, 0x7F))
_KEY = _VALUE - frozenset("\"'=` ")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)\Z")
_COLOR = re.compile(r"0x[0-9a-fA-F]{6}\Z")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_INTERFACE = re.compile(r"[bump*][0-9a-f*]{6}\Z")
_NOTE_CATEGORIES_BAD = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")

FALSE_WORDS = frozenset({"0", "no", "false", "off"})
TRUE_WORDS = frozenset({"1", "yes", "true", "on"})


def _shown(untrusted_text: str, limit: int = 64) -> str:
    """Text made safe for a message: printable ASCII, not too long."""
    text = ascii(untrusted_text)[1:-1]
    return text if len(text) <= limit else text[:limit] + "..."


shown = _shown


def printable_ascii(untrusted_text: str) -> bool:
    """True when every character is in 0x20..0x7e."""
    return untrusted_text.isascii() and untrusted_text.isprintable()


def python_printable(untrusted_text: str) -> bool:
    """True when every character is in Python's string.printable."""
    return printable_ascii(untrusted_text) or _PRINTABLE.issuperset(untrusted_text)


# ---- names


def qube_name_problem(untrusted_name: str) -> str:
    """What is wrong with a qube's name, "" if nothing."""
    if len(untrusted_name) > QUBE_NAME_LIMIT:
        return "must be shorter than 32 characters"
    if not untrusted_name:
        return "must not be empty"
    if untrusted_name[0] in "0123456789_.-":
        return "cannot start with hyphen, underscore, dot or numbers"
    if untrusted_name[0] not in _LETTERS or not _WORD.issuperset(untrusted_name):
        return "contains illegal characters"
    if untrusted_name == "Domain-0":
        return "cannot be 'Domain-0'"
    if untrusted_name in ("none", "default"):
        return "cannot be 'none' nor 'default'"
    if untrusted_name.endswith("-dm"):
        return "cannot end with -dm"
    return ""


def check_qube_name(untrusted_name: str) -> str:
    """A well-formed qube name; Refusal INVALID_NAME."""
    problem = qube_name_problem(untrusted_name)
    if problem:
        raise Refusal(
            "INVALID_NAME",
            f"VM name {problem}: '{_shown(untrusted_name)}'",
            name=_shown(untrusted_name),
        )
    return untrusted_name


def is_uuid(untrusted_text: str) -> bool:
    """True for 36 characters of lower-case uuid."""
    return _UUID.match(untrusted_text) is not None


def check_uuid(untrusted_uuid: str) -> str:
    """A uuid as 36 lower-case characters; Refusal INVALID_UUID."""
    if not _UUID.match(untrusted_uuid):
        raise Refusal(
            "INVALID_UUID",
            f"VM UUID is not valid: '{_shown(untrusted_uuid)}'",
            uuid=_shown(untrusted_uuid),
        )
    return untrusted_uuid


def check_tag(untrusted_tag: str) -> str:
    """A tag: letters, digits, _ and -, not empty; Refusal INVALID_TAG."""
    if not untrusted_tag or not _TAG.issuperset(untrusted_tag):
        raise Refusal(
            "INVALID_TAG",
            f"Invalid tag '{_shown(untrusted_tag)}': use letters, digits, '_' and '-'",
            tag=_shown(untrusted_tag),
        )
    return untrusted_tag


def check_label_name(untrusted_name: str, *, new: bool = False) -> str:
    """A label's name: letters, digits, _ . -; a new one not all digits; INVALID_LABEL."""
    if (
        not untrusted_name
        or not _WORD.issuperset(untrusted_name)
        or (new and _DIGITS.issuperset(untrusted_name))
    ):
        raise Refusal(
            "INVALID_LABEL",
            f"Invalid label name '{_shown(untrusted_name)}': use letters, digits, '_', '-' and"
            " '.', not digits alone",
            label=_shown(untrusted_name),
        )
    return untrusted_name


def check_label_color(untrusted_color: str) -> str:
    """A colour 0xRRGGBB, surrounding space dropped; Refusal INVALID_LABEL_COLOR."""
    color = untrusted_color.strip()
    if not color.isascii() or not _COLOR.match(color):
        raise Refusal(
            "INVALID_LABEL_COLOR",
            f"Invalid label colour '{_shown(untrusted_color)}': it must be 0x and six hex digits",
            color=_shown(untrusted_color),
        )
    return color


def check_feature_name(untrusted_name: str) -> str:
    """A feature's name: letters, digits, _ . -, not empty; Refusal INVALID_FEATURE."""
    if not untrusted_name or not _WORD.issuperset(untrusted_name):
        raise Refusal(
            "INVALID_FEATURE",
            f"Invalid feature name '{_shown(untrusted_name)}': use letters, digits, '_', '-'"
            " and '.'",
            feature=_shown(untrusted_name),
        )
    return untrusted_name


def check_feature_value(untrusted_value: str) -> str:
    """A feature's value: printable ASCII, may be empty; Refusal INVALID_FEATURE."""
    if not printable_ascii(untrusted_value):
        raise Refusal(
            "INVALID_FEATURE",
            "Invalid feature value: use printable ASCII characters",
            value=_shown(untrusted_value),
        )
    return untrusted_value


def check_pool_name(untrusted_name: str) -> str:
    """A pool's name: letters, digits, _ . -, not empty; Refusal INVALID_POOL."""
    if not untrusted_name or not _WORD.issuperset(untrusted_name):
        raise Refusal(
            "INVALID_POOL",
            f"Invalid pool name '{_shown(untrusted_name)}': use letters, digits, '_', '-' and '.'",
            pool=_shown(untrusted_name),
        )
    return untrusted_name


def check_volume_name(untrusted_name: str) -> str:
    """A volume's name as it may stand in a vid and a path; Refusal VOLUME_NOT_FOUND."""
    if not untrusted_name or not _WORD.issuperset(untrusted_name) or untrusted_name[0] in ".-":
        raise Refusal(
            "VOLUME_NOT_FOUND",
            f"No volume can be called '{_shown(untrusted_name)}'",
            volume=_shown(untrusted_name),
        )
    return untrusted_name


def check_revision(untrusted_revision: str) -> str:
    """A revision id, surrounding space dropped; Refusal PROTOCOL."""
    revision = untrusted_revision.strip()
    if not _REVISION.issuperset(revision):
        raise Refusal("PROTOCOL", f"Malformed revision id '{_shown(untrusted_revision)}'")
    return revision


def check_backup_profile(untrusted_name: str) -> str:
    """A backup profile's name, never a path; Refusal PROTOCOL."""
    if not untrusted_name or "/" in untrusted_name or untrusted_name in (".", ".."):
        raise Refusal("PROTOCOL", f"Malformed backup profile name '{_shown(untrusted_name)}'")
    return untrusted_name


def check_service_name(untrusted_name: str, *, limit: int = 48) -> str:
    """A service's name as part of a guest key; Refusal INVALID_VALUE."""
    if (
        not untrusted_name
        or "/" in untrusted_name
        or untrusted_name in (".", "..")
        or len(untrusted_name) > limit
    ):
        raise Refusal(
            "INVALID_VALUE",
            f"Invalid service name '{_shown(untrusted_name)}': at most {limit} characters and"
            " no '/'",
            service=_shown(untrusted_name),
        )
    return untrusted_name


# ---- numbers and words


def check_number(untrusted_text: str, *, minimum: int = 0, maximum: int | None = None) -> int:
    """A decimal number: at most 19 digits, no leading zero; Refusal PROTOCOL."""
    if not _NUMBER.match(untrusted_text) or len(untrusted_text.lstrip("-")) > 19:
        raise Refusal("PROTOCOL", f"Malformed number '{_shown(untrusted_text)}'")
    number = int(untrusted_text)
    if untrusted_text == "-0" or (untrusted_text.startswith("-") and minimum >= 0):
        raise Refusal("PROTOCOL", f"Malformed number '{_shown(untrusted_text)}'")
    if number < minimum or (maximum is not None and number > maximum):
        raise Refusal("PROTOCOL", f"The number {number} is out of range", number=str(number))
    return number


def parse_bool(untrusted_text: str) -> bool | None:
    """True or False for the boolean words in any case, None for anything else."""
    word = untrusted_text.lower()
    if word in TRUE_WORDS:
        return True
    return False if word in FALSE_WORDS else None


def check_bool(untrusted_text: str, *, reason: str = "PROTOCOL") -> bool:
    """A boolean word; Refusal with that reason."""
    value = parse_bool(untrusted_text)
    if value is None:
        raise Refusal(
            reason,
            f"Invalid literal for boolean value: '{_shown(untrusted_text)}'; use yes or no",
        )
    return value


def check_notes(untrusted_notes: bytes) -> str:
    """Notes as text: characters unsafe to show become "_"; Refusal INVALID_NOTES."""
    import unicodedata

    if len(untrusted_notes) > NOTES_LIMIT:
        raise Refusal(
            "INVALID_NOTES", f"Notes are longer than {NOTES_LIMIT} bytes", limit=str(NOTES_LIMIT)
        )
    try:
        text = untrusted_notes.decode("utf-8")
    except UnicodeDecodeError:
        raise Refusal("INVALID_NOTES", "Notes must be UTF-8 text") from None
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(
        char if char in "\t\n" or unicodedata.category(char) not in _NOTE_CATEGORIES_BAD else "_"
        for char in text
    )


# ---- denied device interfaces


def check_interfaces(untrusted_text: str) -> tuple[str, ...]:
    """Concatenated seven-character interface patterns, in the order given.

    Refusal INVALID_VALUE on a wrong length, INVALID_PROPERTY_VALUE on a bad pattern.
    """
    if len(untrusted_text) % 7:
        raise Refusal(
            "INVALID_VALUE",
            "Device interfaces must be a multiple of 7 characters long",
            property="devices_denied",
            value=_shown(untrusted_text),
        )
    codes = tuple(untrusted_text[at : at + 7] for at in range(0, len(untrusted_text), 7))
    for code in codes:
        if not _INTERFACE.match(code):
            raise Refusal(
                "INVALID_PROPERTY_VALUE",
                f"Invalid device interface '{_shown(code)}': it must be one of b, u, m, p, * and"
                " six of 0-9, a-f, *",
                property="devices_denied",
                value=_shown(code),
            )
    return codes


# ---- devices


@dataclass(frozen=True, slots=True)
class DeviceName:
    """What a device argument names; "*" stands for any backend, port or device id."""

    backend: str
    port: str = ANY
    device_id: str = ANY

    def argument(self) -> str:
        """The argument of a device call."""
        parts = [_argument_part(self.backend), _argument_part(self.port)]
        if self.device_id != ANY:
            parts.append(_argument_part(self.device_id))
        return "+".join(parts).replace(":", "+")

    def identity(self) -> str:
        """The form in events: backend:port:device_id."""
        return f"{self.backend}:{self.port}:{self.device_id}"


def _argument_part(text: str) -> str:
    return text.replace(UNKNOWN_INTERFACE, "_______").replace("*", "_")


def parse_device_argument(untrusted_argument: str) -> DeviceName:
    """ "<backend>+<port>[+<device id with + for :>]"; Refusal INVALID_DEVICE.

    Only the form is checked, not whether the backend exists. "_" alone is any.
    """
    if not printable_ascii(untrusted_argument):
        raise Refusal("INVALID_DEVICE", "A device argument must be printable ASCII")
    backend, plus, rest = untrusted_argument.partition("+")
    if not plus or not backend or not rest:
        raise Refusal(
            "INVALID_DEVICE",
            f"Device '{_shown(untrusted_argument)}' must be given as BACKEND+PORT",
            device=_shown(untrusted_argument),
        )
    if backend == "_":
        backend = ANY
    else:
        check_qube_name(backend)
    port, _, device_id = rest.replace("+", ":").partition(":")
    if not port:
        raise Refusal(
            "INVALID_DEVICE",
            f"Device '{_shown(untrusted_argument)}' has an empty port",
            device=_shown(untrusted_argument),
        )
    if port == "_":
        port = ANY
    if device_id in ("", "_"):
        device_id = ANY
    device_id = device_id.replace("_______", UNKNOWN_INTERFACE)
    return DeviceName(backend, port, device_id)


def parse_pairs(untrusted_text: str) -> dict[str, str]:
    """Device serialisation "key='value' key='value'" as a mapping; Refusal INVALID_DEVICE.

    Read as release 4.4 reads it: of a key given twice the last value counts, and the
    last value loses its last character, which is its quote in well-formed text. A value
    before another that is not closed, or a character outside the sets, is refused.
    """
    pairs: dict[str, str] = {}
    text = untrusted_text.strip()
    if not text:
        return pairs
    key, found, rest = text.partition("='")
    if not found:
        raise Refusal("INVALID_DEVICE", "Device text must be key='value' pairs")
    while True:
        head, found, tail = rest.partition("='")
        if found:
            value, separator, next_key = head.rpartition("' ")
            if not separator:
                raise Refusal("INVALID_DEVICE", "A device value is not closed by a quote")
        else:
            value, next_key = head[:-1], ""
        _keep_pair(pairs, key.strip(), value)
        if not found:
            return pairs
        key, rest = next_key, tail


def _keep_pair(pairs: dict[str, str], untrusted_key: str, untrusted_value: str) -> None:
    if not untrusted_key or not _KEY.issuperset(untrusted_key):
        raise Refusal("INVALID_DEVICE", f"Invalid key '{_shown(untrusted_key)}' in device text")
    if not printable_ascii(untrusted_value):
        raise Refusal(
            "INVALID_DEVICE",
            f"Invalid characters in the value of '{_shown(untrusted_key)}' in device text",
        )
    pairs[untrusted_key] = untrusted_value.replace("\\'", "'")


def format_pairs(pairs: Mapping[str, str] | list[tuple[str, str]]) -> str:
    """The serialisation of pairs in their order; Refusal INVALID_DEVICE on what cannot be."""
    items = pairs.items() if isinstance(pairs, Mapping) else pairs
    parts = []
    for key, value in items:
        # The reader looks for =' and so would take the end of such a value for a key.
        unreadable = "='" in value or value.endswith("=")
        if not key or not _KEY.issuperset(key) or not printable_ascii(value) or unreadable:
            raise Refusal("INVALID_DEVICE", f"'{_shown(key)}' cannot be written as device text")
        escaped = value.replace("'", "\\'")
        parts.append(f"{key}='{escaped}'")
    return " ".join(parts)


_ASSIGNMENT_KEYS = frozenset(
    {"device_id", "port_id", "devclass", "backend_domain", "frontend_domain", "mode"}
)


@dataclass(frozen=True, slots=True)
class AssignmentText:
    """A parsed payload of Assign or Attach; "" or ANY where a field was not given."""

    device: DeviceName
    mode: str = "manual"
    frontend: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


def parse_assignment(
    untrusted_payload: str, devclass: str, device: DeviceName, frontend: str = ""
) -> AssignmentText:
    """The payload of Assign or Attach; missing fields come from the argument.

    Refusal INVALID_DEVICE on unknown keys, fields that contradict the argument and on a
    bad mode.
    """
    pairs = parse_pairs(untrusted_payload)
    options: dict[str, str] = {}
    for key, value in pairs.items():
        if key.startswith("_"):
            options[key[1:]] = value
        elif key not in _ASSIGNMENT_KEYS:
            raise Refusal("INVALID_DEVICE", f"Unknown key '{_shown(key)}' in assignment")
    # An empty id is any id, as in the argument: no argument could name it otherwise.
    device_id = pairs.get("device_id", device.device_id) or ANY
    if "device_id" in pairs:
        pairs["device_id"] = device_id
    if device.device_id == ANY:
        device = DeviceName(device.backend, device.port, device_id)
    expected = (
        ("device_id", device.device_id),
        ("port_id", device.port),
        ("devclass", devclass),
        ("backend_domain", device.backend),
        ("frontend_domain", frontend),
    )
    for key, wanted in expected:
        given = pairs.get(key, wanted)
        if wanted and given != wanted:
            raise Refusal(
                "INVALID_DEVICE",
                f"'{key}' in the assignment contradicts the argument",
                key=key,
                value=_shown(given),
            )
    mode = pairs.get("mode", "manual")
    if mode not in MODES:
        raise Refusal(
            "INVALID_DEVICE",
            f"Invalid assignment mode '{_shown(mode)}': use {', '.join(MODES)}",
            mode=_shown(mode),
        )
    return AssignmentText(device, mode, pairs.get("frontend_domain", ""), options)


def format_assignment(
    devclass: str,
    device: DeviceName,
    mode: str,
    options: Mapping[str, str],
    frontend: str = "",
) -> str:
    """The serialisation of an assignment, in wire order."""
    pairs = [
        ("device_id", device.device_id),
        ("port_id", device.port),
        ("devclass", devclass),
        ("backend_domain", device.backend),
        ("mode", mode),
    ]
    if frontend:
        pairs.append(("frontend_domain", frontend))
    pairs.extend((f"_{key}", value) for key, value in options.items())
    return format_pairs(pairs)


_DESCRIPTIONS = ("vendor", "product", "manufacturer", "name", "serial")


def format_device(
    devclass: str,
    device: DeviceName,
    *,
    descriptions: Mapping[str, str] = {},  # noqa: B006 - read only
    attachment: str = "",
    interfaces: str = "",
    parent_port: str = "",
    parent_devclass: str = "",
    data: Mapping[str, str] = {},  # noqa: B006 - read only
) -> str:
    """The serialisation of a device, in wire order.

    descriptions: vendor, product, manufacturer, name, serial where known; what cannot be
    written is made printable, since it comes from a guest. Where none is known the space
    that would part them stays, as in release 4.4.
    """
    named = [
        ("device_id", device.device_id),
        ("port_id", device.port),
        ("devclass", devclass),
        ("backend_domain", device.backend),
    ]
    described = [
        (key, _harmless(descriptions[key]))
        for key in _DESCRIPTIONS
        if descriptions.get(key, "unknown") != "unknown"
    ]
    pairs: list[tuple[str, str]] = []
    if attachment:
        pairs.append(("attachment", attachment))
    if interfaces:
        pairs.append(("interfaces", interfaces))
    if parent_port:
        pairs.append(("parent_port_id", parent_port))
        pairs.append(("parent_devclass", parent_devclass))
    pairs.extend((f"_{key}", _harmless(value)) for key, value in data.items())
    head = f"{format_pairs(named)} {format_pairs(described)}"
    return f"{head} {format_pairs(pairs)}" if pairs else head


def _harmless(untrusted_value: str) -> str:
    text = "".join(char if char in _VALUE else "_" for char in untrusted_value)
    text = text.replace("='", "_'")
    return text[:-1] + "_" if text.endswith("=") else text
