"""What a guest tells about itself: feature requests, tools, updates.

Owns which of a guest's wishes become features. Must not know the bus or QubesDB.
Invariant: everything that comes in is hostile; only the rows here become commands, and
a value outside the character set refuses the whole request.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterator, Mapping

from bulkhead.model import specs
from bulkhead.model.evaluate import evaluate, is_halted
from bulkhead.model.features import template_chain, template_of
from bulkhead.model.grammar import check_number
from bulkhead.model.properties import has_property
from bulkhead.model.records import Qube
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View

FEATURES_PREFIX = "/features-request/"
TOOLS_PREFIX = "/qubes-tools/"

_VALUE = re.compile(r"[A-Za-z0-9.,_= -]*")
_TOOL_VALUE = re.compile(r"[A-Za-z0-9]*")
_TOOLS = ("qrexec", "gui", "gui-emulated", "default-user", "os")
_SUPPORTED = ("supported-service.", "supported-feature.", "supported-rpc.")
_NAME = re.compile(r"[a-zA-Z0-9_.-]+")


def _version(text: str) -> bool:
    return re.fullmatch(r"[0-9][0-9.-]*", text) is not None


def _date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _agent(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}", text) is not None


def _flag(text: str) -> bool:
    return text in ("0", "1")


# Copied when well-formed.
_COPIED: Mapping[str, Callable[[str], bool]] = {
    "os-distribution": bool,
    "os-distribution-like": bool,
    "os-version": _version,
    "os-eol": _date,
    "qubes-agent-version": _agent,
}
_ONCE = ("qrexec", "gui", "gui-emulated")
_ALWAYS = ("qubes-firewall", "vmexec")
_WINDOWS_FEATURES = {
    "stubdom-qrexec": "1",
    "audio-model": "ich6",
    "timezone": "localtime",
    "no-monitor-layout": "1",
}
_BOOT_MODE_KEYS = ("kernelopts", "name", "default-user")
_BOOT_MODE_CHOICES = (
    "boot-mode.active",
    "boot-mode.appvm-default",
    "boot-mode.standalone-default",
)
_BOOT_MODE_LIMIT = 64
_WINDOWS_PROPERTIES = {"qrexec_timeout": "6000", "maxmem": "0"}


def check_features(untrusted_keys: Mapping[str, str]) -> dict[str, str]:
    """Feature names and values from guest keys below FEATURES_PREFIX.

    Refusal PROTOCOL when any name or value has other characters.
    """
    found: dict[str, str] = {}
    for untrusted_path, untrusted_value in untrusted_keys.items():
        untrusted_name = untrusted_path.removeprefix(FEATURES_PREFIX)
        if not _NAME.fullmatch(untrusted_name) or not _VALUE.fullmatch(untrusted_value):
            raise Refusal("PROTOCOL", "a requested feature has forbidden characters")
        found[untrusted_name] = untrusted_value
    return found


def check_tools(untrusted_keys: Mapping[str, str]) -> dict[str, str]:
    """Tools and values from guest keys below TOOLS_PREFIX; Refusal PROTOCOL."""
    found: dict[str, str] = {}
    for tool in _TOOLS:
        untrusted_value = untrusted_keys.get(TOOLS_PREFIX + tool)
        if untrusted_value is None:
            continue
        if not _TOOL_VALUE.fullmatch(untrusted_value):
            raise Refusal("PROTOCOL", "a value of the tools' report is not alphanumeric")
        found[tool] = untrusted_value
    return found


def wishes(view: View, qube: Qube, features: Mapping[str, str]) -> Iterator[specs.Command]:
    """The commands that a checked request leads to.

    A qube based on a template may only report supported-rpc.*.
    """
    based = template_of(view, qube) is not None
    kinds = ("supported-rpc.",) if based else _SUPPORTED
    for prefix in kinds:
        yield from _supported(qube, features, prefix)
    if based:
        return
    for name in _ONCE:
        if _flag(features.get(name, "")) and name not in qube.features:
            yield specs.SetFeature(qube.name, name, "1" if features[name] == "1" else "")
    for name in _ALWAYS:
        if _flag(features.get(name, "")):
            yield specs.SetFeature(qube.name, name, "1" if features[name] == "1" else "")
    for name, good in _COPIED.items():
        value = features.get(name, "")
        if value and good(value):
            yield specs.SetFeature(qube.name, name, value)
    if features.get("anon-timezone") == "1":
        yield specs.SetFeature(qube.name, "anon-timezone", "1")
    yield from boot_modes(qube, features)
    if features.get("os") in ("Windows", "Linux"):
        yield specs.SetFeature(qube.name, "os", features["os"])
        if features["os"] == "Windows" and features.get("qrexec") == "1":
            yield from _windows(qube)


def boot_modes(qube: Qube, features: Mapping[str, str]) -> Iterator[specs.Command]:
    """The boot modes that a template offers; one bad entry drops the whole set."""
    wanted: dict[str, str] = {}
    modes = {"default"}
    seen: set[tuple[str, str]] = set()
    for name, value in features.items():
        parts = name.split(".")
        if parts[0] != "boot-mode" or len(parts) < 2 or parts[1] not in _BOOT_MODE_KEYS:
            continue
        if len(parts) != 3 or not parts[2]:
            return
        if parts[2] == "default" and parts[1] != "name":
            return
        if parts[1] != "kernelopts" and (parts[1], value) in seen:
            return
        seen.add((parts[1], value))
        if parts[1] == "kernelopts":
            modes.add(parts[2])
        wanted[name] = value
    if not 1 <= len(wanted) <= _BOOT_MODE_LIMIT:
        return
    for choice in _BOOT_MODE_CHOICES:
        if features.get(choice) in modes:
            wanted[choice] = features[choice]
    have = {name: v for name, v in qube.features.items() if name.startswith("boot-mode.")}
    for name in sorted(have.keys() - wanted.keys()):
        yield specs.RemoveFeature(qube.name, name)
    for name in sorted(wanted):
        if have.get(name) != wanted[name]:
            yield specs.SetFeature(qube.name, name, wanted[name])


def _windows(qube: Qube) -> Iterator[specs.Command]:
    yield specs.SetFeature(qube.name, "rpc-clipboard", "1")
    for name, value in _WINDOWS_FEATURES.items():
        if name not in qube.features:
            yield specs.SetFeature(qube.name, name, value)
    # Last: a memory limit may be refused while the qube runs.
    for name, value in _WINDOWS_PROPERTIES.items():
        yield specs.SetProperty(qube.name, name, value)


def may_be_refused(command: specs.Command, reason: str) -> bool:
    """A wish that waits for a halted qube must not take the others with it."""
    return (
        isinstance(command, specs.SetProperty)
        and command.name == "maxmem"
        and reason == "QUBE_NOT_HALTED"
    )


def _supported(qube: Qube, features: Mapping[str, str], prefix: str) -> Iterator[specs.Command]:
    wanted = {n for n, value in features.items() if n.startswith(prefix) and value == "1"}
    if not wanted:
        return
    have = {name for name in qube.features if name.startswith(prefix)}
    for name in sorted(wanted - have):
        yield specs.SetFeature(qube.name, name, "1")
    for name in sorted(have - wanted):
        yield specs.RemoveFeature(qube.name, name)
    armour = "supported-service.apparmor"
    if prefix == "supported-service.":
        if armour in wanted and "apparmor" not in qube.features:
            yield specs.SetFeature(qube.name, "apparmor", "1")
        elif armour not in wanted and armour in have and "apparmor" in qube.features:
            yield specs.RemoveFeature(qube.name, "apparmor")


def updates(
    view: View, qube: Qube, untrusted_payload: bytes, now: int, *, outdated: bool
) -> Iterator[specs.Command]:
    """The commands of qubes.NotifyUpdates; now = epoch seconds. Refusal PROTOCOL.

    An updateable qube reports for itself; another one only that there are updates, for
    its template, while that is halted and the qube itself is up to date.
    """
    try:
        count = check_number(untrusted_payload.decode("ascii").strip())
    except UnicodeDecodeError as error:
        raise Refusal("PROTOCOL", "the number of updates is not ASCII") from error
    if _updateable(view, qube):
        yield from _updates_of(qube, count, now)
        return
    if count == 0 or outdated:
        return
    for template in template_chain(view, qube):
        if _updateable(view, template):
            if is_halted(view, template):
                yield from _updates_of(template, count, now)
            return


def _updateable(view: View, qube: Qube) -> bool:
    return has_property(qube.klass, "updateable") and bool(evaluate(view, qube, "updateable"))


def _updates_of(qube: Qube, count: int, now: int) -> Iterator[specs.Command]:
    stamp = datetime.datetime.fromtimestamp(now, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    if count == 0 and qube.features.get("updates-available"):
        yield specs.SetFeature(qube.name, "last-update", stamp)
    yield specs.SetFeature(qube.name, "updates-available", "1" if count else "")
    yield specs.SetFeature(qube.name, "last-updates-check", stamp)
