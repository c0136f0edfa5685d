"""The public client library's reading of the Admin API, and no more forgiving than it.

Owns the reading of every reply and event as docs/wire.md has it; written from the
documented interface alone, without a line of clients/admin. Must not know what is tested.
Invariant: what that client would stumble over is a Choke, never a value.
"""

from __future__ import annotations

import builtins
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATES = frozenset(
    {"Halted", "Transient", "Running", "Paused", "Suspended", "Halting", "Dying", "Crashed"}
)
NOT_RUNNING = frozenset({"Halted", "NA"})
ASSIGNMENT_MODES = frozenset({"manual", "ask-to-attach", "auto-attach", "required"})
_LIMIT = 65536

Value = str | int | bool | None


class Choke(AssertionError):
    """The public client cannot read that; the message has the bytes."""


class StreamBroken(Exception):
    """An event stream ended or said something that is no event: the client reconnects."""


# ---- exceptions: name, then the parents that the client's class has

_CLASSES = """
ProtocolError AssertionError
PermissionDenied Exception
QubesException Exception
QubesVMNotFoundError QubesException KeyError
QubesVMInvalidUUIDError QubesException
QubesVMError QubesException
QubesVMInUseError QubesVMError
QubesVMNotStartedError QubesVMError
QubesVMNotRunningError QubesVMNotStartedError
QubesVMNotPausedError QubesVMNotStartedError
QubesVMNotSuspendedError QubesVMError
QubesVMNotHaltedError QubesVMError
QubesVMShutdownTimeoutError QubesVMError
QubesNoTemplateError QubesVMError
QubesMemoryError QubesVMError MemoryError
QubesPoolInUseError QubesException
QubesValueError QubesException ValueError
QubesPropertyValueError QubesValueError
QubesNoSuchPropertyError QubesException AttributeError
QubesNotImplementedError QubesException NotImplementedError
BackupCancelledError QubesException
BackupAlreadyRunningError QubesException
QubesFeatureNotFoundError QubesException KeyError
QubesTagNotFoundError QubesException KeyError
QubesLabelNotFoundError QubesException KeyError
DeviceNotAssigned QubesException KeyError
DeviceAlreadyAttached QubesException KeyError
DeviceAlreadyAssigned QubesException KeyError
UnrecognizedDevice QubesException ValueError
UnexpectedDeviceProperty QubesException ValueError
StoragePoolException QubesException
QubesDaemonCommunicationError QubesException
QubesDaemonAccessError QubesDaemonCommunicationError
QubesPropertyAccessError QubesDaemonAccessError AttributeError
"""
CLASSES: dict[str, type[Exception]] = {}
for _line in _CLASSES.split("\n"):
    if _line:
        _name, *_parents = _line.split()
        _bases = tuple(CLASSES.get(p) or getattr(builtins, p) for p in _parents)
        CLASSES[_name] = type(_name, _bases, {})
QubesException = CLASSES["QubesException"]
AccessError = CLASSES["QubesDaemonAccessError"]
PropertyAccessError = CLASSES["QubesPropertyAccessError"]


def exception_class(name: str) -> type[Exception]:
    """The class that the client makes of a name on the wire."""
    if name in CLASSES:
        return CLASSES[name]
    if name.endswith("Error"):
        builtin = getattr(builtins, name, None)
        if isinstance(builtin, type) and issubclass(builtin, Exception):
            return builtin
    return QubesException


def exception_of(reply: bytes) -> Exception:
    """The exception in a reply; its attribute wire_name is the name that was sent."""
    fields = reply.split(b"\0", 4)
    if len(fields) != 5:
        raise Choke(f"an exception needs four NULs: {reply!r}")
    _type, untrusted_name, _traceback, untrusted_format, rest = fields
    if rest and not rest.endswith(b"\0"):
        raise Choke(f"the last argument has no NUL: {reply!r}")
    name, message = untrusted_name.decode("ascii"), untrusted_format.decode("utf-8")
    arguments = tuple(
        int(text) if text.isdigit() else text
        for text in (part.decode("utf-8") for part in rest.split(b"\0")[:-1])
    )
    made = exception_class(name)
    if issubclass(made, QubesException):
        try:
            message = message % arguments
        except (TypeError, ValueError) as error:
            raise Choke(f"the message cannot be formatted: {reply!r}") from error
    if not message:
        raise Choke(f"an exception that says nothing: {reply!r}")
    refusal = made(message)
    refusal.wire_name = name  # type: ignore[attr-defined]
    return refusal


# ---- texts of replies


def lines(text: str, *, filled: bool = False) -> list[str]:
    """A list: every line ended. filled: the client looks at its last byte, so one is there."""
    if filled and not text:
        raise Choke("an empty list, whose last byte the client would look at")
    if text and not text.endswith("\n"):
        raise Choke(f"the last line has no end: {text!r}")
    found = text.split("\n")[:-1]
    if not all(found):
        raise Choke(f"an empty line: {text!r}")
    return found


def pairs(text: str) -> dict[str, str]:
    """Lines KEY=VALUE."""
    found: dict[str, str] = {}
    for line in lines(text):
        key, sign, value = line.partition("=")
        if not sign or not key or key in found:
            raise Choke(f"not KEY=VALUE, or twice: {line!r}")
        found[key] = value
    return found


def whole_number(text: str) -> int:
    """What int() takes, as the daemon writes it."""
    try:
        return int(text)
    except ValueError as error:
        raise Choke(f"int({text!r})") from error


def truth(text: str) -> bool:
    """True for exactly "True"; anything else that is not "False" is a mistake."""
    if text not in ("True", "False"):
        raise Choke(f"neither True nor False: {text!r}")
    return text == "True"


@dataclass(frozen=True)
class Property:
    """A property as Get tells it. kind: str int bool vm label."""

    is_default: bool
    kind: str
    text: str

    @property
    def value(self) -> Value:
        """The client's value. AttributeError where there is none: int and bool only."""
        if self.kind in ("vm", "label"):
            return self.text or None
        if self.kind == "str":
            return self.text
        if not self.text:
            raise AttributeError(f"the property has no value (type {self.kind})")
        return truth(self.text) if self.kind == "bool" else whole_number(self.text)


def typed(text: str) -> tuple[str, str]:
    """ "type=T VALUE" in two."""
    head, space, value = text.partition(" ")
    kind = head.removeprefix("type=")
    if not space or kind == head or kind not in ("str", "int", "bool", "vm", "label"):
        raise Choke(f"not type=T VALUE: {text!r}")
    return kind, value


def property_of(text: str) -> Property:
    """A Get reply."""
    head, space, rest = text.partition(" ")
    if head not in ("default=True", "default=False") or not space:
        raise Choke(f"not default=B type=T VALUE: {text!r}")
    found = Property(head == "default=True", *typed(rest))
    if found.text and found.kind in ("int", "bool"):
        assert found.value is not None
    return found


def unescaped(text: str) -> str:
    r"""A GetAll value: \\ and \n are the only escapes."""
    if re.search(r"\\(?![\\n])", text.replace("\\\\", "")):
        raise Choke(f"an escape that the client does not know: {text!r}")
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else "\\", text)


def properties_of(text: str) -> dict[str, Property]:
    """A GetAll reply."""
    found: dict[str, Property] = {}
    for line in lines(text, filled=True):
        name, _, rest = line.partition(" ")
        if name in found:
            raise Choke(f"twice: {name}")
        found[name] = property_of(unescaped(rest))
    return found


@dataclass(frozen=True)
class Listed:
    """A line of admin.vm.List."""

    name: str
    klass: str
    state: str
    uuid: str


def listed(text: str) -> dict[str, Listed]:
    """An admin.vm.List reply."""
    found: dict[str, Listed] = {}
    for line in lines(text):
        name, *words = line.split(" ")
        values: dict[str, str] = {}
        for word in words:
            key, sign, value = word.partition("=")
            if not sign:
                raise Choke(f"a word that is no KEY=VALUE: {line!r}")
            values[key] = value
        if "class" not in values or values.get("state") not in STATES or name in found:
            raise Choke(f"no class, no such state, or twice: {line!r}")
        if not re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", values.get("uuid", "")):
            raise Choke(f"no uuid: {line!r}")
        found[name] = Listed(name, values["class"], values["state"], values["uuid"])
    return found


@dataclass(frozen=True)
class CurrentState:
    """An admin.vm.CurrentState reply: KiB, KiB, ns."""

    mem: int
    mem_static_max: int
    cputime: int
    power_state: str


def current_state(text: str) -> CurrentState:
    """Exactly one line without its end."""
    values = dict(word.split("=", 1) for word in text.split(" "))
    if "\n" in text or list(values) != ["mem", "mem_static_max", "cputime", "power_state"]:
        raise Choke(f"not a state: {text!r}")
    state = values.pop("power_state")
    if state not in STATES:
        raise Choke(f"no such state: {text!r}")
    mem, mem_static_max, cputime = (whole_number(value) for value in values.values())
    return CurrentState(mem, mem_static_max, cputime, state)


VOLUME_KEYS = (
    "pool", "vid", "size", "usage", "rw", "source", "path", "save_on_stop", "snap_on_start",
    "revisions_to_keep", "ephemeral", "is_outdated",
)  # fmt: skip


def volume_info(text: str) -> dict[str, Value]:
    """A volume's Info, its values as the client has them."""
    found: dict[str, Value] = {}
    given = pairs(text)
    if tuple(given) not in (VOLUME_KEYS, VOLUME_KEYS[:-1]):
        raise Choke(f"keys of a volume: {list(given)}")
    for key, value in given.items():
        if key in ("size", "usage", "revisions_to_keep"):
            found[key] = whole_number(value)
        elif key in ("rw", "save_on_stop", "snap_on_start", "ephemeral", "is_outdated"):
            found[key] = truth(value)
        else:
            found[key] = value
    # The kernel's bears the name of the kernel; one that comes from inside has none.
    if not found["pool"] or (not found["vid"] and found["size"]):
        raise Choke(f"a volume without pool or vid: {text!r}")
    return found


def pool_info(text: str) -> dict[str, str]:
    """A pool's Info."""
    found = pairs(text)
    if not found.get("driver"):
        raise Choke(f"a pool without driver=: {text!r}")
    for key in ("size", "usage", "revisions_to_keep"):
        if key in found:
            whole_number(found[key])
    if "ephemeral_volatile" in found:
        truth(found["ephemeral_volatile"])
    tail = [key for key in found if key in ("size", "usage", "included_in")]
    head = [key for key in found if key not in tail]
    if head != sorted(head) or list(found) != head + tail:
        raise Choke(f"order of a pool's keys: {list(found)}")
    return found


# ---- devices

_PRINTABLE = re.compile(r"[ -~]*")
_INTERFACES = re.compile(r"(?:[bump?][0-9a-f*]{6})+")
UNKNOWN_DEVICE = "0000:0000::?******"


def serialised(text: str) -> dict[str, str]:
    """The pairs key='value', by the reader's documented steps."""
    text = text.strip()
    if not _PRINTABLE.fullmatch(text):
        raise Choke(f"not printable ASCII: {text!r}")
    key, mark, rest = text.partition("='")
    if not mark or not rest.endswith("'"):
        raise Choke(f"not key='value' ...: {text!r}")
    found: dict[str, str] = {}
    while True:
        before, mark, after = rest.partition("='")
        if not mark:
            value = rest[:-1]
        else:
            value, split, following = before.rpartition("' ")
            if not split:
                raise Choke(f"a value that holds =' : {text!r}")
        key = key.strip()
        if not key or " " in key or key in found:
            raise Choke(f"key {key!r} of {text!r}")
        if re.search(r"(?<!\\)'", value):
            raise Choke(f"a quote that is not escaped: {text!r}")
        found[key] = value.replace("\\'", "'")
        if not mark:
            return found
        key, rest = following, after


def _same(fields: Mapping[str, str], line: str, **wanted: str) -> None:
    """The client takes a record that contradicts its head for an unknown device."""
    for key, value in wanted.items():
        if fields.get(key) != value:
            raise Choke(f"{key} is not {value!r}: {line!r}")


def devices(text: str, devclass: str, backend: str) -> dict[str, dict[str, str]]:
    """An Available reply: port -> fields."""
    found: dict[str, dict[str, str]] = {}
    rows = lines(text)
    for line in rows:
        head, _, rest = line.partition(" ")
        port, colon, device_id = head.partition(":")
        fields = serialised(rest)
        if not colon or not port or not device_id:
            raise Choke(f"not PORT:DEVICE: {line!r}")
        _same(
            fields, line,
            port_id=port, device_id=device_id, devclass=devclass, backend_domain=backend,
        )  # fmt: skip
        if not _INTERFACES.fullmatch(fields.get("interfaces", "")):
            raise Choke(f"no interfaces: {line!r}")
        if ("parent_port_id" in fields) != ("parent_devclass" in fields):
            raise Choke(f"half a parent: {line!r}")
        found[port] = fields
    if [r.split(" ")[0] for r in rows] != sorted(r.split(" ")[0] for r in rows):
        raise Choke(f"not in order: {text!r}")
    return found


def assignments(text: str, devclass: str, qube: str) -> dict[str, dict[str, str]]:
    """An Assigned or Attached reply: "BACKEND+PORT:DEVICE" -> fields."""
    found: dict[str, dict[str, str]] = {}
    rows = lines(text)
    for line in rows:
        head, _, rest = line.partition(" ")
        backend, plus, place = head.partition("+")
        port, colon, device_id = place.partition(":")
        fields = serialised(rest)
        if not plus or not colon:
            raise Choke(f"not BACKEND+PORT:DEVICE: {line!r}")
        _same(
            fields, line,
            port_id=port, device_id=device_id, devclass=devclass, backend_domain=backend,
        )  # fmt: skip
        if fields.get("mode") not in ASSIGNMENT_MODES:
            raise Choke(f"no such mode: {line!r}")
        if fields.get("frontend_domain", qube) != qube:
            raise Choke(f"another qube's: {line!r}")
        found[head] = fields
    if [r.split(" ")[0] for r in rows] != sorted(r.split(" ")[0] for r in rows):
        raise Choke(f"not in order: {text!r}")
    return found


def device_argument(head: str) -> str:
    """BACKEND+PORT:DEVICE as the client writes it into a call's argument."""
    return head.replace(":", "+").replace("?******", "_______").replace("*", "_")


# ---- firewall

RULE_KEYS = (
    "action", "expire", "dst4", "dst6", "dsthost", "proto", "specialtarget", "dstports",
    "icmptype", "comment",
)  # fmt: skip
_RULE_VALUES = {
    "action": r"accept|drop",
    "expire": r"\d+",
    "dst4": r"\d+\.\d+\.\d+\.\d+/\d+",
    "dst6": r"[0-9A-Fa-f:.]+/\d+",
    "dsthost": r"[A-Za-z0-9._-]+",
    "proto": r"tcp|udp|icmp",
    "specialtarget": r"dns",
    "dstports": r"\d+-\d+",
    "icmptype": r"\d+",
    "comment": r".*",
}


def rules_of(text: str) -> list[dict[str, str]]:
    """A firewall.Get reply."""
    found = []
    for line in lines(text, filled=True):
        head, mark, comment = line.partition("comment=")
        rule: dict[str, str] = {}
        for word in head.split(" ")[:-1] if mark else head.split(" "):
            key, sign, value = word.partition("=")
            if not sign or not re.fullmatch(_RULE_VALUES.get(key, "(?!)"), value):
                raise Choke(f"a word that is no part of a rule: {line!r}")
            rule[key] = value
        if mark:
            rule["comment"] = comment
        if "action" not in rule or list(rule) != [k for k in RULE_KEYS if k in rule]:
            raise Choke(f"no action, or another order: {line!r}")
        found.append(rule)
    return found


# ---- events


@dataclass(frozen=True)
class Event:
    """One event; subject "" = of the whole system."""

    subject: str
    name: str
    values: Mapping[str, str]


def checked(event: Event) -> Event:
    """What the client looks up in an event without asking is there."""
    name, _, what = event.name.partition(":")
    if name in ("property-set", "property-reset", "property-pre-set", "property-pre-reset"):
        if event.values.get("name") != what:
            raise Choke(f"no name: {event}")
    elif name in ("domain-add", "domain-delete", "domain-pre-delete"):
        if event.subject or not event.values.get("vm"):
            raise Choke(f"no vm, or a subject: {event}")
    elif name.startswith(("domain-", "device-")) and not event.subject:
        raise Choke(f"no subject: {event}")
    if name in ("device-attach", "device-assign", "device-added") and not event.values.get(
        "device"
    ):
        raise Choke(f"no device: {event}")
    if name in ("device-detach", "device-removed") and not event.values.get("port"):
        raise Choke(f"no port: {event}")
    return event


class Stream:
    """admin.Events or admin.vm.Stats as the client's dispatcher reads it."""

    def __init__(
        self, path: Path, method: str = "admin.Events", dest: str = "dom0", timeout: float = 30.0
    ) -> None:
        self._peer = socket.socket(socket.AF_UNIX)
        self._peer.settimeout(timeout)
        self._buffer = b""
        try:
            self._peer.connect(str(path))
            self._peer.sendall(f"{method}+ dom0 name {dest}\0".encode())
            self._peer.shutdown(socket.SHUT_WR)
        except OSError:
            self._peer.close()
            raise

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """No more of it."""
        self._peer.close()

    def _until_nul(self) -> bytes:
        while b"\0" not in self._buffer:
            try:
                more = self._peer.recv(65536)
            except ConnectionResetError:
                more = b""
            if not more:
                raise StreamBroken(f"the stream ended, behind it {self._buffer!r}")
            self._buffer += more
        field, _, self._buffer = self._buffer.partition(b"\0")
        return field

    def next(self) -> Event:
        """The next event. StreamBroken; TimeoutError where none comes."""
        kind = self._until_nul()
        if kind != b"1":
            # The client does not read on, but what comes must still be an exception.
            if kind == b"2":
                fields = [self._until_nul() for _ in range(3)]
                raise StreamBroken(str(exception_of(b"2\0" + b"\0".join(fields) + b"\0")))
            raise Choke(f"neither an event nor an exception: {kind!r}")
        subject, name = self._until_nul().decode("ascii"), self._until_nul().decode("ascii")
        values: dict[str, str] = {}
        while key := self._until_nul().decode("ascii"):
            values[key] = self._until_nul().decode("ascii")
        return checked(Event(subject, name, values))

    def until(self, wanted: Callable[[Event], bool]) -> list[Event]:
        """Events up to and with the first that is wanted."""
        found = [self.next()]
        while not wanted(found[-1]):
            found.append(self.next())
        return found


# Events that tell a power state, as the client's cache takes them.
POWER_EVENTS = {
    "domain-pre-start": "Transient",
    "domain-start": "Running",
    "domain-shutdown": "Halted",
    "domain-start-failed": "Halted",
    "domain-paused": "Paused",
    "domain-unpaused": "Running",
}


# ---- calls


class StrictClient:
    """Calls over one unix socket; replies are read as above or raised."""

    def __init__(self, path: Path, *, timeout: float = 60.0) -> None:
        self.path = path
        self._timeout = timeout
        self.calls: list[str] = []

    def reply(self, method: str, dest: str, arg: str, payload: bytes) -> bytes:
        """All bytes of an answer."""
        frame = f"{method}+{arg} dom0 name {dest}\0".encode("ascii") + payload
        assert len(frame) <= _LIMIT
        self.calls.append(f"{method}{'+' if arg else ''}{arg} {dest}")
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(self._timeout)
            peer.connect(str(self.path))
            try:
                peer.sendall(frame)
                peer.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass
            parts = []
            try:
                while part := peer.recv(65536):
                    parts.append(part)
            except ConnectionResetError:
                pass
        return b"".join(parts)

    def call(self, method: str, dest: str = "dom0", arg: str = "", payload: bytes = b"") -> str:
        """An answered call's text; what it was refused with is raised."""
        return self.read(self.reply(method, dest, arg, payload))

    @staticmethod
    def read(answer: bytes) -> str:
        """The text of an OK reply; raises what another one stands for."""
        if not answer:
            raise AccessError("no answer")
        if answer[:2] == b"0\0":
            try:
                return answer[2:].decode("utf-8")
            except UnicodeDecodeError as error:
                raise Choke(f"not UTF-8: {answer[:200]!r}") from error
        if answer[:2] == b"2\0":
            raise exception_of(answer)
        raise Choke(f"not a reply: {answer[:200]!r}")

    def do(self, method: str, dest: str = "dom0", arg: str = "", payload: bytes = b"") -> None:
        """A call without a result: exactly the two bytes."""
        text = self.call(method, dest, arg, payload)
        if text:
            raise Choke(f"{method} answers {text!r}, it has no result")

    @contextmanager
    def refused(self, name: str) -> Iterator[None]:
        """The block is refused with exactly that name on the wire."""
        try:
            yield
        except Exception as error:
            got = getattr(error, "wire_name", type(error).__name__)
            assert got == name, f"refused with {got} ({error}), not {name}"
            return
        raise AssertionError(f"not refused; {name} was to come")

    # ---- reads that several tools have

    def vm_list(self) -> dict[str, Listed]:
        """Every qube; dom0 leads, names ascend."""
        found = listed(self.call("admin.vm.List"))
        names = list(found)
        if names[0] != "dom0" or names[1:] != sorted(names[1:]):
            raise Choke(f"order of qubes: {names}")
        return found

    def klass(self, qube: str) -> str:
        """By a list of one qube: exactly one line, of that name."""
        found = listed(self.call("admin.vm.List", qube))
        if list(found) != [qube]:
            raise Choke(f"not one line of {qube}: {found}")
        return found[qube].klass

    def state(self, qube: str) -> str:
        """The power state; NA where the call is not answered at all."""
        try:
            return current_state(self.call("admin.vm.CurrentState", qube)).power_state
        except AccessError:
            return "NA"

    def running(self, qube: str) -> bool:
        """The client's is_running()."""
        return self.state(qube) not in NOT_RUNNING

    @staticmethod
    def _holder(qube: str) -> tuple[str, str]:
        return ("admin.vm.property", qube) if qube else ("admin.property", "dom0")

    def get_property(self, qube: str, name: str) -> Property:
        """Get; qube "" = the system. No answer is an AttributeError, too."""
        prefix, dest = self._holder(qube)
        try:
            return property_of(self.call(f"{prefix}.Get", dest, name))
        except AccessError as error:
            raise PropertyAccessError(str(error)) from error

    def get(self, qube: str, name: str) -> Value:
        """A property's value."""
        return self.get_property(qube, name).value

    def get_default(self, qube: str, name: str) -> tuple[str, str] | None:
        """GetDefault: (type, text), None without one."""
        prefix, dest = self._holder(qube)
        text = self.call(f"{prefix}.GetDefault", dest, name)
        return typed(text) if text else None

    def set(self, qube: str, name: str, value: str) -> None:
        """Set."""
        prefix, dest = self._holder(qube)
        self.do(f"{prefix}.Set", dest, name, value.encode("ascii"))

    def reset(self, qube: str, name: str) -> None:
        """Reset."""
        prefix, dest = self._holder(qube)
        self.do(f"{prefix}.Reset", dest, name)

    def property_list(self, qube: str) -> list[str]:
        """List."""
        prefix, dest = self._holder(qube)
        return lines(self.call(f"{prefix}.List", dest), filled=True)

    def get_all(self, qube: str) -> dict[str, Property]:
        """GetAll; where it is not answered, one Get after the other."""
        prefix, dest = self._holder(qube)
        try:
            return properties_of(self.call(f"{prefix}.GetAll", dest))
        except AccessError:
            found: dict[str, Property] = {}
            try:
                names = self.property_list(qube)
            except AccessError:
                return found
            for name in names:
                try:
                    found[name] = self.get_property(qube, name)
                except PropertyAccessError:
                    continue
            return found

    def feature(self, qube: str, name: str, how: str = "Get") -> str | None:
        """A feature's value, None without it."""
        try:
            return self.call(f"admin.vm.feature.{how}", qube, name)
        except KeyError as error:
            if getattr(error, "wire_name", "") != "QubesFeatureNotFoundError":
                raise
            return None

    def features(self, qube: str) -> dict[str, str]:
        """List and Get each."""
        names = lines(self.call("admin.vm.feature.List", qube))
        return {name: self.call("admin.vm.feature.Get", qube, name) for name in names}

    def tags(self, qube: str) -> list[str]:
        """In order."""
        found = lines(self.call("admin.vm.tag.List", qube))
        if found != sorted(found):
            raise Choke(f"order of tags: {found}")
        return found

    def has_tag(self, qube: str, tag: str) -> bool:
        """By tag.Get."""
        text = self.call("admin.vm.tag.Get", qube, tag)
        if text not in ("0", "1"):
            raise Choke(f"tag.Get: {text!r}")
        return text == "1"

    def volumes(self, qube: str) -> list[str]:
        """Names."""
        return lines(self.call("admin.vm.volume.List", qube))

    def volume(self, qube: str, name: str) -> dict[str, Value]:
        """Info."""
        return volume_info(self.call("admin.vm.volume.Info", qube, name))

    def revisions(self, qube: str, name: str) -> list[str]:
        """Oldest first."""
        return lines(self.call("admin.vm.volume.ListSnapshots", qube, name))

    def labels(self) -> list[str]:
        """In the order of their numbers."""
        return lines(self.call("admin.label.List"), filled=True)

    def pools(self) -> list[str]:
        """In the order of their making."""
        return lines(self.call("admin.pool.List"), filled=True)

    def drivers(self) -> dict[str, list[str]]:
        """Driver -> its parameters, at least one each."""
        found = {}
        for line in lines(self.call("admin.pool.ListDrivers"), filled=True):
            name, space, rest = line.partition(" ")
            if not space or not rest:
                raise Choke(f"a driver without parameters: {line!r}")
            found[name] = rest.split(" ")
        return found

    def available(self, devclass: str, backend: str, port: str = "") -> dict[str, dict[str, str]]:
        """What a backend offers."""
        text = self.call(f"admin.vm.device.{devclass}.Available", backend, port)
        return devices(text, devclass, backend)

    def held(self, devclass: str, how: str, qube: str) -> dict[str, dict[str, str]]:
        """how: Assigned or Attached."""
        text = self.call(f"admin.vm.device.{devclass}.{how}", qube)
        return assignments(text, devclass, qube)

    def rules(self, qube: str) -> list[dict[str, str]]:
        """Firewall rules."""
        return rules_of(self.call("admin.vm.firewall.Get", qube))


class Qube:
    """A qube whose properties are attributes, for hasattr() and getattr() with a default."""

    def __init__(self, api: StrictClient, name: str) -> None:
        self._api = api
        self._name = name

    def __getattr__(self, name: str) -> Value:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._api.get(self._name, name)


class Cache:
    """The state of all qubes as a long-lived client keeps it: read once, then by events.

    A value that an event makes void is read again when it is asked for; the others are
    believed, so one that changed without an event is wrong here.
    """

    def __init__(self, api: StrictClient) -> None:
        self._api = api
        self.states: dict[str, str] = {}
        self.values: dict[str, dict[str, Property]] = {}
        self.reloads = 0

    def load(self) -> None:
        """Everything anew, as behind connection-established."""
        self.reloads += 1
        self.states, self.values = {}, {}
        for name in self._api.vm_list():
            self._add(name)

    def _add(self, name: str) -> None:
        try:
            self.states[name] = self._api.state(name)
            self.values[name] = self._api.get_all(name)
        except KeyError:
            # Gone again before it was looked at: its domain-delete is on the way.
            self._remove(name)

    def _remove(self, name: str) -> None:
        self.states.pop(name, None)
        self.values.pop(name, None)

    def take(self, event: Event) -> None:
        """One event."""
        kind = event.name.partition(":")[0]
        if event.name == "connection-established":
            self.load()
        elif kind == "domain-add":
            self._add(event.values["vm"])
        elif kind == "domain-delete":
            self._remove(event.values["vm"])
        elif event.subject in self.states:
            if kind in POWER_EVENTS:
                self.states[event.subject] = POWER_EVENTS[kind]
            elif kind in ("property-set", "property-reset"):
                self.values[event.subject].pop(event.values["name"], None)
