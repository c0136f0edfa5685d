"""The registry's records as frozen values.

Owns the shape of what the registry stores and streams. Must not know how it is
stored, sent or evaluated. Invariant: a record is never changed in place; a change is
a new record, so a reader can keep what it holds.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

ADMINVM_UUID = "00000000-0000-0000-0000-000000000000"
ADMINVM_NAME = "dom0"
# The largest revisions_to_keep of a volume or pool.
REVISIONS_LIMIT = 2**31 - 1

_NOTHING: Mapping[str, str] = MappingProxyType({})


def _nothing() -> Mapping[str, str]:
    return _NOTHING


class RecordState(enum.Enum):
    """Visibility of a qube's record; only ACTIVE is listed, looked up and saved."""

    ACTIVE = "active"
    CREATING = "creating"
    DELETING = "deleting"


class Phase(enum.Enum):
    """Durable run phase, changed only by the begin and end of operations."""

    HALTED = "halted"
    STARTING = "starting"
    UP = "up"
    STOPPING = "stopping"


class OperationState(enum.Enum):
    """State of a persisted operation; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING_DATA = "waiting-data"
    COMPENSATING = "compensating"
    STUCK = "stuck"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """True when nothing more will happen to the operation."""
        return self in _TERMINAL


_TERMINAL = frozenset({OperationState.SUCCEEDED, OperationState.FAILED, OperationState.CANCELLED})


@dataclass(frozen=True, slots=True)
class Label:
    """A colour label; color is "0xrrggbb"."""

    index: int
    name: str
    color: str


@dataclass(frozen=True, slots=True)
class Pool:
    """A storage pool; options are the driver's parameters as in qubes.xml (text)."""

    name: str
    driver: str
    options: Mapping[str, str] = field(default_factory=_nothing)


@dataclass(frozen=True, slots=True)
class Volume:
    """Declared state of one volume (volume-config). size in bytes, 0 = not stored."""

    name: str
    pool: str
    vid: str
    size: int = 0
    revisions_to_keep: int = 0
    rw: bool = False
    save_on_stop: bool = False
    snap_on_start: bool = False
    source: str = ""
    ephemeral: bool | None = None

    @property
    def snapshots_disabled(self) -> bool:
        """The guest works on the committed data itself (revisions_to_keep -1)."""
        return self.revisions_to_keep == -1 and self.save_on_stop and not self.snap_on_start


@dataclass(frozen=True, slots=True)
class Assignment:
    """A device assignment of a frontend qube; "*" stands for any.

    frontend_told: who assigned it said which qube uses it, or it was loaded. Without that
    its text leaves the qube out, as in release 4.4; qubes.xml does not keep it, so it
    makes no record another one.
    """

    devclass: str
    backend: str
    port: str
    identity: str = "*"
    mode: str = "required"
    options: Mapping[str, str] = field(default_factory=_nothing)
    frontend_told: bool = field(default=True, compare=False)


@dataclass(frozen=True, slots=True)
class Run:
    """Durable run state; boot_id is "" when HALTED."""

    phase: Phase = Phase.HALTED
    boot_id: str = ""


HALTED = Run()


@dataclass(frozen=True, slots=True)
class Qube:
    """One qube of any class, dom0 included.

    properties holds what is explicitly set, as the text of qubes.xml, without name,
    qid and uuid; a qube reference is a name, "" = none. quarantine says why the record
    cannot be used, raw is then its original XML fragment.
    """

    uuid: str
    name: str
    qid: int
    klass: str
    state: RecordState = RecordState.ACTIVE
    properties: Mapping[str, str] = field(default_factory=_nothing)
    features: Mapping[str, str] = field(default_factory=_nothing)
    tags: frozenset[str] = frozenset()
    devices: tuple[Assignment, ...] = ()
    volumes: tuple[Volume, ...] = ()
    notes: str = ""
    rules_digest: str = ""
    quarantine: str = ""
    raw: bytes = b""
    run: Run = HALTED
    revision: int = 0

    @property
    def hidden(self) -> bool:
        """Not ACTIVE: absent from lists, look-ups and qubes.xml; its names stay reserved."""
        return self.state is not RecordState.ACTIVE

    def volume(self, name: str) -> Volume | None:
        """The volume called name, or None."""
        return next((v for v in self.volumes if v.name == name), None)

    def with_volume(self, volume: Volume) -> Qube:
        """This record with the same-named volume replaced, or appended."""
        if self.volume(volume.name) is None:
            return replace(self, volumes=(*self.volumes, volume))
        return replace(
            self, volumes=tuple(volume if v.name == volume.name else v for v in self.volumes)
        )


@dataclass(frozen=True, slots=True)
class WireEvent:
    """A finished Admin API event: subject "" = system-wide; pairs in wire order."""

    subject: str
    name: str
    pairs: tuple[tuple[str, str], ...] = ()
    subject_uuid: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """A stored error: code is the canonical code's name without CODE_."""

    code: str
    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=_nothing)


@dataclass(frozen=True, slots=True)
class Operation:
    """A persisted operation. spec is the kind's arguments (see bulkhead.model.specs)."""

    id: str
    kind: str
    spec: object
    subjects: tuple[str, ...] = ()
    state: OperationState = OperationState.QUEUED
    cursor: str = ""
    epoch: int = 0
    progress: float = 0.0
    progress_text: str = ""
    error: Problem | None = None
    source: str = ADMINVM_NAME
    request_id: bytes = b""
    result: Mapping[str, str] = field(default_factory=_nothing)
    data: Mapping[str, str] = field(default_factory=_nothing)
    cancel_requested: bool = False
    created: float = 0.0
    finished: float = 0.0
    pivoted: bool = False
    waits_for: str = ""


# ---- facts: in memory only, each written by one owner, never stored


@dataclass(frozen=True, slots=True)
class HostFact:
    """The host and its hypervisor. Owner: domains."""

    hypervisor: str
    uri: str = ""
    memory_kib: int = 0
    cpus: int = 0
    dom0_maxmem_mib: int = 4096
    has_iommu: bool = False
    cpu_family_model: str = ""


@dataclass(frozen=True, slots=True)
class KernelFact:
    """One installed kernel; the kernelopts_* are file contents or None. Owner: storage."""

    name: str
    pool: str = "linux-kernel"
    directory: str = ""
    has_vmlinuz: bool = True
    has_initramfs: bool = False
    has_modules: bool = False
    memory_hotplug: bool = False
    kernelopts_common: str | None = None
    kernelopts_pci: str | None = None
    kernelopts_nopci: str | None = None


@dataclass(frozen=True, slots=True)
class PoolFact:
    """A pool as storage sees it; size and usage in bytes. Owner: storage."""

    name: str
    usable: bool = True
    problem: str = ""
    size: int | None = None
    usage: int | None = None
    usage_details: Mapping[str, int] = field(default_factory=dict)
    included_in: str = ""


@dataclass(frozen=True, slots=True)
class PowerFact:
    """What the hypervisor says of one boot of a qube. Owner: domains.

    power: halted running paused shutdown shutoff crashed pmsuspended.
    """

    uuid: str
    boot_id: str
    number: int
    power: str
    xid: int = -1
    stubdom_xid: int = -1
    stubdom_uuid: str = ""
    start_time: float | None = None
    agent: bool = False
    stop_reason: str = ""


@dataclass(frozen=True, slots=True)
class DeviceFact:
    """A device that a backend qube offers now. Owner: domains."""

    backend_uuid: str
    devclass: str
    port: str
    device_id: str = "0000:0000::?******"
    fields: Mapping[str, str] = field(default_factory=_nothing)
    interfaces: str = ""
    data: Mapping[str, str] = field(default_factory=_nothing)
    parent_port: str = ""
    parent_devclass: str = ""
    attached_to: str = ""
    attach_options: Mapping[str, str] = field(default_factory=_nothing)


Fact = HostFact | KernelFact | PoolFact | PowerFact | DeviceFact


def fact_key(fact: Fact) -> str:
    """The key of a fact in the stream: "host", "kernel/NAME", "pool/NAME",
    "power/UUID", "device/BACKEND_UUID/CLASS/PORT"."""
    match fact:
        case HostFact():
            return "host"
        case KernelFact():
            return f"kernel/{fact.name}"
        case PoolFact():
            return f"pool/{fact.name}"
        case PowerFact():
            return f"power/{fact.uuid}"
        case DeviceFact():
            return f"device/{fact.backend_uuid}/{fact.devclass}/{fact.port}"


# ---- changes: what a mutation puts or removes


@dataclass(frozen=True, slots=True)
class QubePut:
    qube: Qube


@dataclass(frozen=True, slots=True)
class QubeRemoved:
    uuid: str


@dataclass(frozen=True, slots=True)
class SystemPut:
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class SystemRemoved:
    name: str


@dataclass(frozen=True, slots=True)
class LabelPut:
    label: Label


@dataclass(frozen=True, slots=True)
class LabelRemoved:
    name: str


@dataclass(frozen=True, slots=True)
class PoolPut:
    pool: Pool


@dataclass(frozen=True, slots=True)
class PoolRemoved:
    name: str


@dataclass(frozen=True, slots=True)
class OperationPut:
    operation: Operation


@dataclass(frozen=True, slots=True)
class OperationRemoved:
    id: str


@dataclass(frozen=True, slots=True)
class FactPut:
    fact: Fact


@dataclass(frozen=True, slots=True)
class FactRemoved:
    key: str


Change = (
    QubePut
    | QubeRemoved
    | SystemPut
    | SystemRemoved
    | LabelPut
    | LabelRemoved
    | PoolPut
    | PoolRemoved
    | OperationPut
    | OperationRemoved
    | FactPut
    | FactRemoved
)
