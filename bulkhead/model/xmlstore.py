"""qubes.xml: bytes to records and back, in the format that release 4.4 reads and writes.

Owns the file's grammar, the migrations of older files, and quarantine of what does not
validate. Must not know files, journals or clocks. Invariants: what document() writes,
parse() reads back equal; writing it again gives the same bytes; one bad object never
keeps the others from loading, and what was not understood is written back.
"""

from __future__ import annotations

import re
import uuid as uuids
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from xml.etree import ElementTree
from xml.parsers import expat

from bulkhead.model import grammar
from bulkhead.model.defaults import admin_qube, class_volumes, new_volume
from bulkhead.model.evaluate import netvm_chain, netvm_name, template_for_dispvms
from bulkhead.model.labels import migrate_color
from bulkhead.model.properties import (
    ADMIN,
    CLASSES,
    LOCAL_VM,
    QUBES_VM,
    find_row,
    has_property,
    rows_for,
)
from bulkhead.model.records import (
    ADMINVM_NAME,
    ADMINVM_UUID,
    Assignment,
    Change,
    Label,
    LabelPut,
    Pool,
    PoolPut,
    Qube,
    QubePut,
    SystemPut,
    Volume,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.setters import parse_stored
from bulkhead.model.view import View

# A system property whose stored value does not validate is kept under this prefix, so
# that it is written back under its own name while no valid value takes its place.
INVALID_PREFIX = "!"

_Element = ElementTree.Element

_MEMINFO = "service.meminfo-writer"
_REQUIRED = {
    klass: tuple(row for row in rows_for(klass) if row.type == "qube" and not row.none_allowed)
    for klass in CLASSES
}


class StoreUnreadable(ValueError):
    """The bytes are no qubes.xml at all: torn, not XML, or with a document type."""


@dataclass(frozen=True, slots=True)
class ParsedStore:
    """What a file holds: changes that fill an empty view, in an order that may be applied.

    store_id and revision come from the processing instruction, None without one.
    warnings are sentences for the log; quarantined are names.
    """

    changes: tuple[Change, ...]
    store_id: str | None = None
    revision: int | None = None
    warnings: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()

    def view(self) -> View:
        """A view filled with the changes."""
        view = View()
        view.apply_all(self.changes)
        return view


# ---- reading


def parse(data: bytes) -> ParsedStore:
    """The content of a qubes.xml; StoreUnreadable where it is none.

    A qube that does not validate is quarantined: its record has the valid part, the
    reasons one per line, and its original bytes.
    """
    store_id, revision = _prolog(data)
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise StoreUnreadable(f"The store is no well-formed XML: {error}") from error
    if root.tag != "qubes":
        raise StoreUnreadable(f"The store's outermost element is '{root.tag}', not 'qubes'")
    loader = _Loader(data)
    loader.load(root)
    return ParsedStore(
        changes=tuple(loader.changes()),
        store_id=store_id,
        revision=revision,
        warnings=tuple(loader.warnings),
        quarantined=tuple(q.name for q in loader.view.qubes() if q.quarantine),
    )


_INSTRUCTION = re.compile(rb'bulkhead\s+store="([0-9a-f-]{36})"\s+revision="([0-9]{1,18})"\s*\Z')
_ENCODING = re.compile(rb"encoding\s*=\s*['\"]([A-Za-z0-9._-]*)['\"]")


def _prolog(data: bytes) -> tuple[str | None, int | None]:
    """What stands before the outermost element; no document type may."""
    store_id: str | None = None
    revision: int | None = None
    at = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    while True:
        while data[at : at + 1] in (b" ", b"\t", b"\r", b"\n"):
            at += 1
        if data.startswith(b"<!--", at):
            end, skip = data.find(b"-->", at + 4), 3
        elif data.startswith(b"<?", at):
            end, skip = data.find(b"?>", at + 2), 2
            body = data[at + 2 : end] if end > 0 else b""
            if body.startswith(b"xml") and body[3:4].isspace():
                declared = _ENCODING.search(body)
                if declared and declared.group(1).lower() not in (b"utf-8", b"utf8", b"us-ascii"):
                    raise StoreUnreadable("The store must be encoded as UTF-8")
            found = _INSTRUCTION.match(body)
            if found:
                store_id, revision = found.group(1).decode(), int(found.group(2))
        elif data.startswith(b"<!", at):
            raise StoreUnreadable("The store must not declare a document type")
        elif data.startswith(b"<", at):
            return store_id, revision
        else:
            raise StoreUnreadable("The store is empty or no XML")
        if end < 0:
            raise StoreUnreadable("The store ends inside its first lines")
        at = end + skip


def _domain_bytes(data: bytes) -> list[bytes]:
    """The bytes of each <domain> of the file, in document order."""
    spans: list[bytes] = []
    depth = 0
    path: list[str] = []
    start = 0
    parser = expat.ParserCreate()

    def opened(name: str, _attributes: dict[str, str]) -> None:
        nonlocal depth, start
        depth += 1
        path.append(name)
        if depth == 3 and path[1:] == ["domains", "domain"]:
            start = parser.CurrentByteIndex

    def closed(_name: str) -> None:
        nonlocal depth
        if depth == 3 and path[1:] == ["domains", "domain"]:
            at = parser.CurrentByteIndex
            if not data.startswith(b"</", at):
                at = start
            spans.append(data[start : _tag_end(data, at)])
        depth -= 1
        path.pop()

    parser.StartElementHandler = opened
    parser.EndElementHandler = closed
    parser.Parse(data, True)
    return spans


def _tag_end(data: bytes, at: int) -> int:
    """The position after the tag that begins there; ">" inside quotes does not end it."""
    quote = b""
    while True:
        char = data[at : at + 1]
        at += 1
        if quote:
            if char == quote:
                quote = b""
        elif char in (b'"', b"'"):
            quote = char
        elif char in (b">", b""):
            return at


@dataclass(slots=True)
class _Domain:
    """One <domain> on its way to a record."""

    element: _Element
    index: int
    qube: Qube
    texts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class _Loader:
    """Loads in the stages of 4.4: labels and pools; all qubes with what needs no other
    qube; system properties; then what refers to qubes."""

    def __init__(self, data: bytes) -> None:
        self.view = View()
        self.warnings: list[str] = []
        self._data = data
        self._spans: list[bytes] | None = None
        self._domains: list[_Domain] = []
        self._system: dict[str, str] = {}

    def changes(self) -> Iterable[Change]:
        """Everything loaded, as changes."""
        view = self.view
        for index in sorted(view.labels):
            yield LabelPut(view.labels[index])
        for pool in view.pools.values():
            yield PoolPut(pool)
        for name in sorted(view.properties):
            yield SystemPut(name, view.properties[name])
        for qube in view.qubes():
            yield QubePut(qube)

    def load(self, root: _Element) -> None:
        self._labels(root.find("labels"))
        self._pools(root.find("pools"))
        domains = root.find("domains")
        for index, element in enumerate(domains.findall("domain") if domains is not None else ()):
            self._first_stage(index, element)
        if self.view.by_uuid_any(ADMINVM_UUID) is None:
            self.warnings.append("The store has no dom0; it was added")
            self.view.apply(QubePut(admin_qube()))
        properties = root.find("properties")
        for element in properties.findall("property") if properties is not None else ():
            name = element.get("name")
            if name:
                self._system[name] = _text(element)
        self._migrate()
        self._system_properties()
        for domain in sorted(
            self._domains, key=lambda d: (d.qube.uuid != ADMINVM_UUID, d.qube.name)
        ):
            self._second_stage(domain)
        self._break_loops()

    # ---- stage 1

    def _labels(self, container: _Element | None) -> None:
        for element in container if container is not None else ():
            name = (element.text or "").strip()
            digits = element.get("id", "").removeprefix("label-")
            if element.tag != "label" or not name or not digits.isdigit() or len(digits) > 9:
                self.warnings.append(f"A label without a name or a number was left out: {name!r}")
                continue
            index = int(digits)
            if index in self.view.labels or self.view.label_by_name(name) is not None:
                self.warnings.append(f"The label '{name}' is there twice; the first one counts")
                continue
            color = migrate_color(element.get("color", "0x000000"))
            self.view.apply(LabelPut(Label(index, name, color)))

    def _pools(self, container: _Element | None) -> None:
        for element in container if container is not None else ():
            name, driver = element.get("name", ""), element.get("driver", "")
            if element.tag != "pool" or not name or not driver:
                self.warnings.append(f"A pool without a name or a driver was left out: {name!r}")
                continue
            if name in self.view.pools:
                self.warnings.append(f"The pool '{name}' is there twice; the first one counts")
                continue
            options = {k: v for k, v in element.attrib.items() if k not in ("name", "driver")}
            self.view.apply(PoolPut(Pool(name, driver, options)))

    # ---- stage 2: each qube with what needs no other qube

    def _first_stage(self, index: int, element: _Element) -> None:
        klass = element.get("class", "")
        texts: dict[str, str] = {}
        problems: list[str] = []
        container = element.find("properties")
        for child in container if container is not None else ():
            name = child.get("name")
            if name:
                texts[name] = _text(child)
        if klass not in CLASSES:
            problems.append(f"class {klass}: this release does not know it")
        _migrate_texts(klass, texts)
        if klass == ADMIN:
            if self.view.by_uuid_any(ADMINVM_UUID) is not None:
                self.warnings.append("The store has dom0 twice; the first one counts")
                return
            qube = Qube(uuid=ADMINVM_UUID, name=ADMINVM_NAME, qid=0, klass=ADMIN)
            for name in ("name", "qid", "uuid"):
                texts.pop(name, None)
        else:
            qube = Qube(
                uuid=self._uuid(index, texts, problems),
                name=self._name(index, texts, problems),
                qid=self._qid(texts, problems),
                klass=klass,
            )
        domain = _Domain(element, index, qube, texts, problems)
        domain.qube = replace(qube, properties=self._stage(domain, early=True))
        self._domains.append(domain)
        self.view.apply(QubePut(domain.qube))

    def _name(self, index: int, texts: dict[str, str], problems: list[str]) -> str:
        name = texts.pop("name", "")
        problem = grammar.qube_name_problem(name)
        if problem:
            problems.append(f"property name: '{grammar.shown(name)}' {problem}")
            name = f"unnamed-{index}"
        elif name == ADMINVM_NAME or self.view.qube_any(name) is not None:
            problems.append(f"property name: another qube is called '{name}' too")
            name = f"{name[:20]}-again"
        else:
            return name
        number = 0
        candidate = name
        while self.view.qube_any(candidate) is not None:
            number += 1
            candidate = f"{name}-{number}"
        return candidate

    def _qid(self, texts: dict[str, str], problems: list[str]) -> int:
        text = texts.pop("qid", "")
        if not text.isascii() or not text.isdigit() or not 0 < int(text[:6]) <= 10000:
            problems.append(f"property qid: '{grammar.shown(text)}' is no number from 1 to 10000")
        elif self.view.by_qid(int(text)) is not None:
            problems.append(f"property qid: another qube has the number {int(text)} too")
        else:
            return int(text)
        return next(n for n in range(10000, 0, -1) if self.view.by_qid(n) is None)

    def _uuid(self, index: int, texts: dict[str, str], problems: list[str]) -> str:
        text = texts.pop("uuid", None)
        name = texts.get("name", "")

        def substitute() -> str:
            # Derived from the name, so that the same file gives the same one again.
            return str(uuids.uuid5(uuids.NAMESPACE_OID, f"qube/{name}/{index}"))

        if text is None:
            self.warnings.append(f"The qube '{grammar.shown(name)}' had no uuid; it was given one")
            return substitute()
        if grammar.is_uuid(text) and self.view.by_uuid_any(text) is None:
            return text
        try:
            value = str(uuids.UUID(text))
        except ValueError:
            problems.append(f"property uuid: '{grammar.shown(text)}' is no uuid")
            return substitute()
        if self.view.by_uuid_any(value) is not None:
            problems.append(f"property uuid: another qube has {value} too")
            return substitute()
        return value

    def _stage(self, domain: _Domain, *, early: bool) -> dict[str, str]:
        """Properties that validate, of stage 2 where early, else all; notes the others."""
        qube = domain.qube
        values = dict(qube.properties)
        for name, text in domain.texts.items():
            if not has_property(qube.klass, name):
                if early:
                    domain.problems.append(
                        f"property {_key(name)}: the class has none of that name"
                    )
                continue
            row = find_row(qube.klass, name)
            if (row.stage == 2) is not early:
                continue
            if row.type == "bool" and text in ("True", "False") and row.settable:
                values[name] = text
                continue
            try:
                values[name] = parse_stored(self.view, qube, row, text)
            except Refusal as refusal:
                reason = refusal.message.replace("\n", " ")
                domain.problems.append(f"property {_key(name)}: {reason}")
        return values

    # ---- migrations and stage 3

    def _migrate(self) -> None:
        old = self._system.pop("default_fw_netvm", None)
        if old is not None and old != self._system.get("default_netvm", ""):
            for domain in self._domains:
                if domain.qube.properties.get("provides_network") == "True" and has_property(
                    domain.qube.klass, "netvm"
                ):
                    domain.texts.setdefault("netvm", old)
        for texts, holder in (
            (self._system, "the system"),
            *((domain.texts, f"'{domain.qube.name}'") for domain in self._domains),
        ):
            for name in ("default_dispvm", "management_dispvm"):
                target = self.view.qube(texts.get(name, ""))
                if target is not None and not template_for_dispvms(target):
                    self.warnings.append(
                        f"{name} of {holder} was '{target.name}', which is no disposable"
                        " template; it is none now"
                    )
                    texts[name] = ""

    def _system_properties(self) -> None:
        for name, text in self._system.items():
            if not has_property(None, name):
                self.view.apply(SystemPut(name, text))
                self.warnings.append(f"The system property '{grammar.shown(name)}' is unknown")
                continue
            try:
                value = parse_stored(self.view, None, find_row(None, name), text)
            except Refusal as refusal:
                self.warnings.append(f"The system property '{name}' is not used: {refusal.message}")
                self.view.apply(SystemPut(INVALID_PREFIX + name, text))
            else:
                self.view.apply(SystemPut(name, value))

    # ---- stage 4

    def _second_stage(self, domain: _Domain) -> None:
        first = domain.qube
        klass = first.klass
        known = klass in CLASSES
        properties = self._stage(domain, early=False)
        for row in _REQUIRED.get(klass, ()):
            if row.name not in properties and row.name not in domain.texts:
                domain.problems.append(f"property {row.name}: it is missing")
        features = _features(domain.element)
        if not features.get(_MEMINFO, "1") and has_property(klass, "vcpus"):
            # The old way to switch memory balancing off.
            del features[_MEMINFO]
            properties["maxmem"] = "0"
        volumes: tuple[Volume, ...] = ()
        if klass in QUBES_VM or not known:
            volumes = self._volumes(domain, replace(first, properties=properties))
        qube = Qube(
            uuid=first.uuid,
            name=first.name,
            qid=first.qid,
            klass=klass,
            properties=properties,
            features=features,
            tags=_tags(domain.element),
            devices=self._devices(domain) if klass in LOCAL_VM or not known else (),
            volumes=volumes,
        )
        if domain.problems:
            qube = replace(qube, quarantine="\n".join(domain.problems), raw=self._raw(domain))
        domain.qube = qube
        self.view.apply(QubePut(qube))

    def _raw(self, domain: _Domain) -> bytes:
        if self._spans is None:
            self._spans = _domain_bytes(self._data)
        return self._spans[domain.index]

    def _devices(self, domain: _Domain) -> tuple[Assignment, ...]:
        found: list[Assignment] = []
        for devclass, element in _device_elements(domain.element):
            try:
                assignment = _assignment(devclass, element)
            except ValueError as error:
                domain.problems.append(f"device {devclass}: {error}")
                continue
            backend = assignment.backend
            if backend != grammar.ANY and self.view.qube(backend) is None:
                self.warnings.append(
                    f"'{domain.qube.name}' has a {devclass} device assigned from"
                    f" '{grammar.shown(backend)}', which does not exist"
                )
            found.append(assignment)
        return tuple(found)

    def _volumes(self, domain: _Domain, qube: Qube) -> tuple[Volume, ...]:
        volumes: dict[str, Volume] = {}
        bad: set[str] = set()
        defaults = {spec.name: spec for spec in class_volumes(qube.klass)}
        for element in _volume_elements(domain.element):
            name = element.get("name", "")
            try:
                volume = _volume(element, defaults.get(name))
            except ValueError as error:
                domain.problems.append(f"volume {grammar.shown(name)}: {error}")
                bad.add(name)
                continue
            if volume.pool not in self.view.pools:
                domain.problems.append(
                    f"volume {volume.name}: no pool is called '{grammar.shown(volume.pool)}'"
                )
            elif volume.vid and self.view.vid_owner(volume.pool, volume.vid) is not None:
                owner = self.view.vid_owner(volume.pool, volume.vid)
                driver = self.view.pools[volume.pool].driver
                if driver != "linux-kernel" and owner is not None and owner.uuid != qube.uuid:
                    domain.problems.append(
                        f"volume {volume.name}: '{owner.name}' has the volume"
                        f" '{grammar.shown(volume.vid)}' too"
                    )
            volumes[volume.name] = volume
        for name, spec in defaults.items():
            if name not in volumes and name not in bad:
                added = new_volume(self.view, qube, spec)
                self.warnings.append(f"'{qube.name}' had no volume '{name}'; it was added")
                if not added.pool:
                    domain.problems.append(f"volume {name}: the system has no pool for it")
                    continue
                volumes[name] = added
        ordered = [name for name in defaults if name in volumes]
        ordered.extend(name for name in volumes if name not in defaults)
        return tuple(volumes[name] for name in ordered)

    # ---- stage 5

    def _break_loops(self) -> None:
        for qube in list(self.view.qubes()):
            if not has_property(qube.klass, "netvm"):
                continue
            chain = list(netvm_chain(self.view, qube))
            # The chain ends before a repetition: a loop through this qube is where the
            # last one's netvm is this qube again.
            last = chain[-1] if chain else qube
            if netvm_name(self.view, last) == qube.name:
                self.warnings.append(f"The network loop at '{qube.name}' was cut there")
                fixed = {**qube.properties, "netvm": ""}
                self.view.apply(QubePut(replace(qube, properties=fixed)))


def _migrate_texts(klass: str, texts: dict[str, str]) -> None:
    """Names of older releases."""
    old = texts.pop("hvm", None)
    if old is not None and "virt_mode" not in texts and has_property(klass, "virt_mode"):
        texts["virt_mode"] = "hvm" if grammar.parse_bool(old) else "pv"
    old = texts.pop("dispvm_allowed", None)
    if old is not None and has_property(klass, "template_for_dispvms"):
        texts.setdefault("template_for_dispvms", old)


_BUS_ADDRESS = re.compile(r"([0-9a-f]{2})_([0-9a-f]{2}\.[0-7])\Z")


def resolved_pci_ports(view: View) -> list[Change]:
    """Assignments of older files that name a PCI device by its bus address, by path now.

    Needs the devices that dom0 reports, so it is no part of parse(); call it when they
    are known. What no device answers to stays as it is.
    """
    paths = {
        fact.data["sbdf"]: fact.port
        for fact in view.devices_of(ADMINVM_UUID)
        if fact.devclass == "pci" and "sbdf" in fact.data
    }
    ports = set(paths.values())
    changes: list[Change] = []
    for qube in list(view.backend_users(ADMINVM_NAME)):
        devices = []
        for device in qube.devices:
            found = _BUS_ADDRESS.match(device.port) if device.devclass == "pci" else None
            # A device of the first bus has the same text for both; one that is there wins.
            if found and device.backend == ADMINVM_NAME and device.port not in ports:
                path = paths.get(f"0000:{found.group(1)}:{found.group(2)}")
                device = replace(device, port=path) if path is not None else device
            devices.append(device)
        if tuple(devices) != qube.devices:
            changes.append(QubePut(replace(qube, devices=tuple(devices))))
    return changes


# ---- elements to values; these need no view


def _text(element: _Element) -> str:
    return element.get("ref") or element.text or ""


def _features(domain: _Element) -> dict[str, str]:
    container = domain.find("features")
    return {
        element.get("name", ""): element.text or ""
        for element in (container if container is not None else ())
        if element.get("name")
    }


def _tags(domain: _Element) -> frozenset[str]:
    container = domain.find("tags")
    return frozenset(
        element.get("name", "")
        for element in (container if container is not None else ())
        if element.get("name")
    )


def _device_elements(domain: _Element) -> Iterable[tuple[str, _Element]]:
    for container in domain.findall("devices"):
        for element in container.findall("device"):
            yield container.get("class", ""), element


def _assignment(devclass: str, element: _Element) -> Assignment:
    options: dict[str, str] = {
        option.get("name", ""): option.text or "" for option in element.findall("option")
    }
    identity = options.pop("identity", "") or element.get("identity") or grammar.ANY
    mode = element.get("mode")
    if mode is None:
        required = element.get("required")
        value = grammar.parse_bool(required) if required is not None else True
        mode = "required" if value else "auto-attach"
    backend, port = element.get("backend-domain", ""), element.get("id", "")
    if mode not in grammar.ASSIGNABLE_MODES:
        raise ValueError(f"'{grammar.shown(mode)}' is no assignment mode")
    if not devclass or not backend or not port:
        raise ValueError("its class, backend or port is missing")
    return Assignment(devclass, backend, port, identity, mode, options)


def _volume_elements(domain: _Element) -> Iterable[_Element]:
    container = domain.find("volume-config")
    return container.findall("volume") if container is not None else ()


def _volume(element: _Element, default: object) -> Volume:
    name = element.get("name", "")
    try:
        grammar.check_volume_name(name)
    except Refusal as refusal:
        raise ValueError(refusal.message) from None
    return Volume(
        name=name,
        pool=element.get("pool", ""),
        vid=element.get("vid", ""),
        size=_whole(element, "size", 0),
        revisions_to_keep=_whole(element, "revisions_to_keep", 0, minimum=-1),
        rw=_flag(element, "rw", default),
        save_on_stop=_flag(element, "save_on_stop", default),
        snap_on_start=_flag(element, "snap_on_start", default),
        source=element.get("source", ""),
        ephemeral=_flag(element, "ephemeral", None) if "ephemeral" in element.attrib else None,
    )


def _whole(element: _Element, name: str, default: int, *, minimum: int = 0) -> int:
    text = element.get(name)
    if text is None:
        return default
    if len(text) <= 12 and text.isascii() and text.isdigit() and (text[0] != "0" or text == "0"):
        return int(text)  # nearly always; the general check below is slower
    try:
        return grammar.check_number(text, minimum=minimum)
    except Refusal:
        raise ValueError(f"{name} is '{grammar.shown(text)}', no usable number") from None


def _flag(element: _Element, name: str, default: object) -> bool:
    text = element.get(name)
    if text == "True":
        return True
    if text == "False":
        return False
    if text is None:
        return bool(getattr(default, name, False))
    value = grammar.parse_bool(text)
    if value is None:
        raise ValueError(f"{name} is '{grammar.shown(text)}', neither True nor False")
    return value


# ---- quarantine


def problems_of(qube: Qube) -> tuple[str, ...]:
    """Why the qube is quarantined: "property NAME: why", "volume NAME: why" ..."""
    return tuple(qube.quarantine.split("\n")) if qube.quarantine else ()


def _key(prop: str) -> str:
    """A property's name as it stands in a problem: without the colon that ends it."""
    return ascii(prop)[1:-1].replace(":", "\\x3a")


def bad_properties(qube: Qube) -> frozenset[str]:
    """Properties whose stored values are not used; odd names in escaped form."""
    return frozenset(
        line.split(":", 1)[0].removeprefix("property ")
        for line in problems_of(qube)
        if line.startswith("property ")
    )


def mended(qube: Qube, prop: str) -> Qube:
    """The record after that property was set or reset: its bad stored value is gone.

    Out of quarantine once nothing else is wrong.
    """
    lines = [line for line in problems_of(qube) if not line.startswith(f"property {_key(prop)}:")]
    if len(lines) == len(problems_of(qube)):
        return qube
    raw = _raw_without(qube.raw, prop) if lines else b""
    return replace(qube, quarantine="\n".join(lines), raw=raw)


def _raw_without(raw: bytes, prop: str) -> bytes:
    element = ElementTree.fromstring(raw)
    container = element.find("properties")
    for child in list(container) if container is not None else ():
        if container is not None and child.get("name") == prop:
            container.remove(child)
    return ElementTree.tostring(element, encoding="unicode").encode()


# ---- writing

_TEXT = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;", ord("\r"): "&#13;"}
_ATTRIBUTE = {**_TEXT, ord('"'): "&quot;", ord("\t"): "&#9;", ord("\n"): "&#10;"}
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")


def _escaped(text: str) -> str:
    # Characters that XML cannot hold are refused on the way in; a file must be written
    # whatever happens, so one that came through becomes a space.
    return _FORBIDDEN.sub(" ", text).translate(_TEXT)


def _quoted(text: str) -> str:
    return _FORBIDDEN.sub(" ", text).translate(_ATTRIBUTE)


def _tag(tag: str, attributes: Iterable[tuple[str, str]], text: str = "") -> str:
    head = tag + "".join(f' {name}="{_quoted(value)}"' for name, value in attributes)
    return f"<{head}>{_escaped(text)}</{tag}>" if text else f"<{head}/>"


def _container(indent: str, head: str, tag: str, children: list[str]) -> list[str]:
    if not children:
        return [f"{indent}<{head}/>"]
    return [
        f"{indent}<{head}>",
        *(f"{indent}  {child}" for child in children),
        f"{indent}</{tag}>",
    ]


def fragment(qube: Qube) -> bytes:
    """The <domain> of a qube as it stands in the file, without the indent before it.

    A function of the record alone, so it can be kept while the record stays. For a
    quarantined qube the original bytes, or once its record was changed, the record with
    the bad parts of the original.
    """
    if qube.quarantine and qube.raw:
        original = ElementTree.fromstring(qube.raw)
        if _unchanged(qube, original):
            return qube.raw
        return _format_domain(qube, original)
    return _format_domain(qube, None)


def _stored_properties(qube: Qube) -> dict[str, str]:
    values = dict(qube.properties)
    if qube.klass != ADMIN:
        values.update(name=qube.name, qid=str(qube.qid), uuid=qube.uuid)
    return values


_ORDER: Mapping[str, Mapping[str, tuple[int, str]]] = {
    klass: {row.name: (row.stage, row.name) for row in rows_for(klass)} for klass in CLASSES
}
_NO_ORDER: Mapping[str, tuple[int, str]] = {}


def _format_domain(qube: Qube, original: _Element | None) -> bytes:
    order = _ORDER.get(qube.klass, _NO_ORDER)
    values = _stored_properties(qube)
    if original is not None:
        values.update(_bad_texts(qube, original))
    properties = [
        _tag("property", (("name", name),), values[name])
        for name in sorted(values, key=lambda name: order.get(name, (9, name)))
    ]
    features = [_tag("feature", (("name", n),), v) for n, v in qube.features.items()]
    tags = [_tag("tag", (("name", name),)) for name in sorted(qube.tags)]
    lines = [
        f'<domain id="domain-{qube.qid}" class="{_quoted(qube.klass)}">',
        *_container("      ", "properties", "properties", properties),
        *_container("      ", "features", "features", features),
        *_container("      ", "tags", "tags", tags),
    ]
    known = qube.klass in CLASSES
    if qube.klass in LOCAL_VM or not known:
        bad_devices = _bad_devices(original) if original is not None else []
        lines.extend(_format_devices(qube, bad_devices))
    if qube.klass in QUBES_VM or (not known and qube.volumes):
        volumes = [_format_volume(volume) for volume in qube.volumes]
        if original is not None:
            volumes.extend(_bad_volumes(qube, original))
        lines.extend(_container("      ", "volume-config", "volume-config", volumes))
    lines.append("    </domain>")
    return "\n".join(lines).encode()


def _format_devices(qube: Qube, bad: list[tuple[str, str]]) -> list[str]:
    by_class: dict[str, list[str]] = {}
    for device in qube.devices:
        attributes = (
            ("backend-domain", device.backend),
            ("id", device.port),
            ("mode", device.mode),
            ("identity", device.identity),
        )
        options = [
            _tag("option", (("name", name),), value) for name, value in device.options.items()
        ]
        head = _tag("device", attributes)
        if options:
            inner = "".join(f"\n          {option}" for option in options)
            head = f"{head[:-2]}>{inner}\n        </device>"
        by_class.setdefault(device.devclass, []).append(head)
    for devclass, text in bad:
        by_class.setdefault(devclass, []).append(text)
    lines: list[str] = []
    for devclass, devices in by_class.items():
        head = f'devices class="{_quoted(devclass)}"'
        lines.extend(_container("      ", head, "devices", devices))
    return lines


def _format_volume(volume: Volume) -> str:
    attributes = [
        ("name", volume.name),
        ("pool", volume.pool),
        ("vid", volume.vid),
        ("revisions_to_keep", str(volume.revisions_to_keep)),
        ("rw", str(volume.rw)),
        ("save_on_stop", str(volume.save_on_stop)),
        ("snap_on_start", str(volume.snap_on_start)),
    ]
    if volume.ephemeral is not None:
        attributes.append(("ephemeral", str(volume.ephemeral)))
    if volume.size:
        attributes.append(("size", str(volume.size)))
    if volume.source:
        attributes.append(("source", volume.source))
    return _tag("volume", attributes)


def document(
    store_id: str,
    revision: int,
    labels: Iterable[Label],
    pools: Iterable[Pool],
    properties: Mapping[str, str],
    fragments: Iterable[bytes],
) -> bytes:
    """The whole file. fragments: dom0's first, then by name, as View.qubes() gives them.

    store_id "" leaves the processing instruction out.
    """
    label_lines = [
        _tag("label", (("id", f"label-{label.index}"), ("color", label.color)), label.name)
        for label in sorted(labels, key=lambda label: label.index)
    ]
    pool_lines = [
        _tag("pool", (("name", pool.name), ("driver", pool.driver), *pool.options.items()))
        for pool in pools
    ]
    values = {
        name.removeprefix(INVALID_PREFIX): value
        for name, value in properties.items()
        if name.startswith(INVALID_PREFIX)
    }
    values.update((n, v) for n, v in properties.items() if not n.startswith(INVALID_PREFIX))
    property_lines = [_tag("property", (("name", name),), values[name]) for name in sorted(values)]
    head: list[str] = []
    if store_id:
        head.append(f'<?bulkhead store="{store_id}" revision="{revision}"?>')
    head.append("<qubes>")
    head.extend(_container("  ", "labels", "labels", label_lines))
    head.extend(_container("  ", "pools", "pools", pool_lines))
    head.extend(_container("  ", "properties", "properties", property_lines))
    parts = ["\n".join(head).encode()]
    domains = list(fragments)
    if domains:
        parts.append(b"  <domains>")
        parts.extend(b"    " + domain for domain in domains)
        parts.append(b"  </domains>")
    else:
        parts.append(b"  <domains/>")
    parts.append(b"</qubes>\n")
    return b"\n".join(parts)


def document_of(view: View, store_id: str, revision: int) -> bytes:
    """The whole file of a view."""
    return document(
        store_id,
        revision,
        view.labels.values(),
        view.pools.values(),
        view.properties,
        (fragment(qube) for qube in view.qubes()),
    )


# ---- a quarantined record against its original


def _raw_texts(original: _Element) -> dict[str, str]:
    container = original.find("properties")
    return {
        child.get("name", ""): _text(child)
        for child in (container if container is not None else ())
        if child.get("name")
    }


def _bad_texts(qube: Qube, original: _Element) -> dict[str, str]:
    """Bad property values of the original, without those set since, or ours to replace."""
    bad = bad_properties(qube) - {"name", "qid", "uuid"} - set(qube.properties)
    return {name: text for name, text in _raw_texts(original).items() if _key(name) in bad}


def _bad_devices(original: _Element) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for devclass, element in _device_elements(original):
        try:
            _assignment(devclass, element)
        except ValueError:
            found.append((devclass, _verbatim(element)))
    return found


def _bad_volumes(qube: Qube, original: _Element) -> list[str]:
    found: list[str] = []
    for element in _volume_elements(original):
        try:
            _volume(element, None)
        except ValueError:
            if qube.volume(element.get("name", "")) is None:
                found.append(_verbatim(element))
    return found


def _verbatim(element: _Element) -> str:
    return ElementTree.tostring(element, encoding="unicode").strip()


def _unchanged(qube: Qube, original: _Element) -> bool:
    """True when the good parts of the record are what the original gave."""
    raw = _raw_texts(original)
    _migrate_texts(qube.klass, raw)
    bad = bad_properties(qube)
    ours = {name: text for name, text in _stored_properties(qube).items() if _key(name) not in bad}
    theirs = {name: text for name, text in raw.items() if _key(name) not in bad}
    if qube.klass == ADMIN:
        for name in ("name", "qid", "uuid"):
            theirs.pop(name, None)
    if "uuid" not in raw:
        ours.pop("uuid", None)  # it was given one at load
    if set(ours) != set(theirs) or any(
        not _same_text(qube.klass, name, ours[name], theirs[name]) for name in ours
    ):
        return False
    if qube.features != _features(original) or qube.tags != _tags(original):
        return False
    devices: list[Assignment] = []
    for devclass, element in _device_elements(original):
        try:
            devices.append(_assignment(devclass, element))
        except ValueError:
            continue
    if qube.devices != tuple(devices):
        return False
    volumes: set[Volume] = set()
    defaults = {spec.name: spec for spec in class_volumes(qube.klass)}
    for element in _volume_elements(original):
        try:
            volumes.add(_volume(element, defaults.get(element.get("name", ""))))
        except ValueError:
            continue
    return volumes == set(qube.volumes)


def _same_text(klass: str, name: str, ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    if not has_property(klass, name):
        return False
    kind = find_row(klass, name).type
    if kind == "bool":
        return str(grammar.parse_bool(theirs)) == ours
    if kind == "int":
        return theirs.strip().isdigit() and int(theirs) == int(ours)
    return kind == "uuid" and theirs.lower() == ours
