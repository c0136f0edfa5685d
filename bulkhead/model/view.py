"""The whole state as one object with indexes: what plans read and changes alter.

Owns look-up and application of changes. Must not know rules, events or storage.
Invariant: apply(change) costs the same whatever the number of qubes, and returns the
change that undoes it, so a batch that cannot be committed is taken back exactly.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

from bulkhead.model.records import (
    ADMINVM_NAME,
    ADMINVM_UUID,
    Change,
    DeviceFact,
    Fact,
    FactPut,
    FactRemoved,
    HostFact,
    KernelFact,
    Label,
    LabelPut,
    LabelRemoved,
    Operation,
    OperationPut,
    OperationRemoved,
    Pool,
    PoolFact,
    PoolPut,
    PoolRemoved,
    PowerFact,
    Qube,
    QubePut,
    QubeRemoved,
    SystemPut,
    SystemRemoved,
    fact_key,
)

_K = TypeVar("_K", bound=Hashable)

# Properties whose stored value is a qube's name; indexed so that "who refers to X"
# needs no walk. The property table's completeness test checks this set.
REFERENCE_PROPERTIES = frozenset(
    {
        "template",
        "netvm",
        "guivm",
        "audiovm",
        "default_dispvm",
        "management_dispvm",
        "relayvm",
    }
)


class View:
    """Labels, pools, system properties, qubes, operations and facts.

    qube(name) and qubes() show ACTIVE records only; the *_any variants show hidden
    ones too. Mutable by apply() alone.
    """

    def __init__(self) -> None:
        self.labels: dict[int, Label] = {}
        self.pools: dict[str, Pool] = {}
        self.properties: dict[str, str] = {}
        self.operations: dict[str, Operation] = {}
        self._by_uuid: dict[str, Qube] = {}
        self._by_name: dict[str, str] = {}  # hidden ones too: names are reserved
        self._by_qid: dict[int, str] = {}
        self._by_dispid: dict[int, str] = {}
        self._names: list[str] = []  # ACTIVE, sorted, without dom0
        self._referrers: dict[tuple[str, str], dict[str, None]] = {}
        self._unset: dict[str, dict[str, None]] = {p: {} for p in REFERENCE_PROPERTIES}
        self._label_users: dict[str, dict[str, None]] = {}
        self._pool_users: dict[str, dict[str, None]] = {}
        self._vids: dict[tuple[str, str], str] = {}
        self._backends: dict[str, dict[str, None]] = {}
        self._label_names: dict[str, int] = {}
        self._facts: dict[str, Fact] = {}
        self._devices_of: dict[str, dict[str, DeviceFact]] = {}
        self._attached_to: dict[str, dict[str, DeviceFact]] = {}
        self._locks: dict[str, dict[str, None]] = {}  # subject uuid -> unfinished operations

    # ---- look-up

    def qube(self, name: str) -> Qube | None:
        """The ACTIVE qube of that name."""
        qube = self.qube_any(name)
        return qube if qube is not None and not qube.hidden else None

    def qube_any(self, name: str) -> Qube | None:
        """The qube of that name, hidden ones included."""
        uuid = self._by_name.get(name)
        return self._by_uuid[uuid] if uuid is not None else None

    def by_uuid(self, uuid: str) -> Qube | None:
        """The ACTIVE qube of that uuid (lower-case text)."""
        qube = self._by_uuid.get(uuid)
        return qube if qube is not None and not qube.hidden else None

    def by_uuid_any(self, uuid: str) -> Qube | None:
        """The qube of that uuid, hidden ones included."""
        return self._by_uuid.get(uuid)

    def by_qid(self, qid: int) -> Qube | None:
        """The qube with that qid, hidden ones included."""
        uuid = self._by_qid.get(qid)
        return self._by_uuid[uuid] if uuid is not None else None

    def by_dispid(self, dispid: int) -> Qube | None:
        """The qube with that dispid, hidden ones included."""
        uuid = self._by_dispid.get(dispid)
        return self._by_uuid[uuid] if uuid is not None else None

    def qubes(self) -> Iterator[Qube]:
        """ACTIVE qubes: dom0 first, then by name in code-point order."""
        admin = self._by_uuid.get(ADMINVM_UUID)
        if admin is not None:
            yield admin
        for name in self._names:
            yield self._by_uuid[self._by_name[name]]

    def qubes_any(self) -> Iterator[Qube]:
        """Every record, in no order."""
        return iter(self._by_uuid.values())

    def __len__(self) -> int:
        return len(self._by_uuid)

    @property
    def adminvm(self) -> Qube:
        """dom0's record."""
        return self._by_uuid[ADMINVM_UUID]

    def referrers(self, prop: str, name: str) -> Iterator[Qube]:
        """Qubes (hidden ones too) whose *explicitly set* reference property names `name`."""
        for uuid in self._referrers.get((prop, name), ()):
            yield self._by_uuid[uuid]

    def without(self, prop: str) -> Iterator[Qube]:
        """ACTIVE qubes on which the reference property is not explicitly set."""
        for uuid in self._unset[prop]:
            qube = self._by_uuid[uuid]
            if not qube.hidden:
                yield qube

    def label_users(self, label: str) -> Iterator[Qube]:
        """Qubes whose label property is that name."""
        for uuid in self._label_users.get(label, ()):
            yield self._by_uuid[uuid]

    def pool_users(self, pool: str) -> Iterator[Qube]:
        """Qubes with a volume in that pool."""
        for uuid in self._pool_users.get(pool, ()):
            yield self._by_uuid[uuid]

    def vid_owner(self, pool: str, vid: str) -> Qube | None:
        """The qube whose volume has that vid in that pool."""
        uuid = self._vids.get((pool, vid))
        return self._by_uuid.get(uuid) if uuid is not None else None

    def backend_users(self, backend: str) -> Iterator[Qube]:
        """Qubes with a device assigned from that backend name."""
        for uuid in self._backends.get(backend, ()):
            yield self._by_uuid[uuid]

    def label_by_name(self, name: str) -> Label | None:
        """The label of that name."""
        index = self._label_names.get(name)
        return self.labels[index] if index is not None else None

    # ---- facts

    @property
    def host(self) -> HostFact | None:
        """The host's fact, None until domains has reported it."""
        fact = self._facts.get("host")
        return fact if isinstance(fact, HostFact) else None

    def kernel(self, name: str) -> KernelFact | None:
        """An installed kernel."""
        fact = self._facts.get(f"kernel/{name}")
        return fact if isinstance(fact, KernelFact) else None

    def kernels(self) -> Iterator[KernelFact]:
        """Every installed kernel."""
        return (f for f in list(self._facts.values()) if isinstance(f, KernelFact))

    def pool_fact(self, name: str) -> PoolFact | None:
        """What storage last said of a pool."""
        fact = self._facts.get(f"pool/{name}")
        return fact if isinstance(fact, PoolFact) else None

    @property
    def storage_reported(self) -> bool:
        """storage has told what there is since the registry started: what is missing is
        not there. One report tells of all pools and kernels."""
        return any(self.pool_fact(name) is not None for name in self.pools) or any(self.kernels())

    def power(self, uuid: str) -> PowerFact | None:
        """What the hypervisor last said of a qube, whichever boot it was."""
        fact = self._facts.get(f"power/{uuid}")
        return fact if isinstance(fact, PowerFact) else None

    def devices_of(self, backend_uuid: str) -> Iterable[DeviceFact]:
        """Devices that a backend offers now."""
        return list(self._devices_of.get(backend_uuid, {}).values())

    def devices_attached_to(self, uuid: str) -> Iterable[DeviceFact]:
        """Devices attached to a frontend now."""
        return list(self._attached_to.get(uuid, {}).values())

    def facts(self) -> Mapping[str, Fact]:
        """All facts by key."""
        return self._facts

    # ---- operations

    def operations_on(self, uuid: str) -> Iterator[Operation]:
        """Unfinished operations that hold or wait for the qube."""
        for op_id in self._locks.get(uuid, ()):
            yield self.operations[op_id]

    # ---- change

    def apply(self, change: Change) -> Change | None:
        """Apply one change; returns its inverse, or None where nothing was altered."""
        match change:
            case QubePut(qube):
                old = self._by_uuid.get(qube.uuid)
                if old is not None:
                    self._unindex(old)
                self._index(qube)
                return QubePut(old) if old is not None else QubeRemoved(qube.uuid)
            case QubeRemoved(uuid):
                old = self._by_uuid.get(uuid)
                if old is None:
                    return None
                self._unindex(old)
                return QubePut(old)
            case SystemPut(name, value):
                before = self.properties.get(name)
                self.properties[name] = value
                return SystemPut(name, before) if before is not None else SystemRemoved(name)
            case SystemRemoved(name):
                before = self.properties.pop(name, None)
                return SystemPut(name, before) if before is not None else None
            case LabelPut(label):
                old_label = self.labels.get(label.index)
                if old_label is not None:
                    self._label_names.pop(old_label.name, None)
                self.labels[label.index] = label
                self._label_names[label.name] = label.index
                return LabelPut(old_label) if old_label is not None else LabelRemoved(label.name)
            case LabelRemoved(name):
                index = self._label_names.pop(name, None)
                return LabelPut(self.labels.pop(index)) if index is not None else None
            case PoolPut(pool):
                old_pool = self.pools.get(pool.name)
                self.pools[pool.name] = pool
                return PoolPut(old_pool) if old_pool is not None else PoolRemoved(pool.name)
            case PoolRemoved(name):
                old_pool = self.pools.pop(name, None)
                return PoolPut(old_pool) if old_pool is not None else None
            case OperationPut(operation):
                old_op = self.operations.get(operation.id)
                if old_op is not None:
                    self._unlock(old_op)
                self.operations[operation.id] = operation
                if not operation.state.terminal:
                    for subject in operation.subjects:
                        self._locks.setdefault(subject, {})[operation.id] = None
                return (
                    OperationPut(old_op) if old_op is not None else OperationRemoved(operation.id)
                )
            case OperationRemoved(op_id):
                old_op = self.operations.pop(op_id, None)
                if old_op is None:
                    return None
                self._unlock(old_op)
                return OperationPut(old_op)
            case FactPut(fact):
                key = fact_key(fact)
                inverse = self._drop_fact(key)
                self._facts[key] = fact
                if isinstance(fact, DeviceFact):
                    self._devices_of.setdefault(fact.backend_uuid, {})[key] = fact
                    if fact.attached_to:
                        self._attached_to.setdefault(fact.attached_to, {})[key] = fact
                return inverse if inverse is not None else FactRemoved(key)
            case FactRemoved(key):
                return self._drop_fact(key)

    def apply_all(self, changes: Iterable[Change]) -> list[Change]:
        """Apply in order; returns the inverses, already in the order that undoes them."""
        undo = [inverse for c in changes if (inverse := self.apply(c)) is not None]
        undo.reverse()
        return undo

    # ---- indexes

    def _drop_fact(self, key: str) -> Change | None:
        fact = self._facts.pop(key, None)
        if fact is None:
            return None
        if isinstance(fact, DeviceFact):
            self._devices_of.get(fact.backend_uuid, {}).pop(key, None)
            self._attached_to.get(fact.attached_to, {}).pop(key, None)
        return FactPut(fact)

    def _unlock(self, operation: Operation) -> None:
        for subject in operation.subjects:
            held = self._locks.get(subject)
            if held is not None:
                held.pop(operation.id, None)
                if not held:
                    del self._locks[subject]

    def _index(self, qube: Qube) -> None:
        uuid = qube.uuid
        self._by_uuid[uuid] = qube
        self._by_name[qube.name] = uuid
        self._by_qid[qube.qid] = uuid
        dispid = qube.properties.get("dispid", "")
        if dispid.isdigit():
            self._by_dispid[int(dispid)] = uuid
        if not qube.hidden and qube.name != ADMINVM_NAME:
            insort(self._names, qube.name)
        for prop in REFERENCE_PROPERTIES:
            target = qube.properties.get(prop)
            if target is None:
                self._unset[prop][uuid] = None
            else:
                self._referrers.setdefault((prop, target), {})[uuid] = None
        label = qube.properties.get("label")
        if label is not None:
            self._label_users.setdefault(label, {})[uuid] = None
        for volume in qube.volumes:
            self._pool_users.setdefault(volume.pool, {})[uuid] = None
            if volume.vid:
                self._vids.setdefault((volume.pool, volume.vid), uuid)
        for device in qube.devices:
            self._backends.setdefault(device.backend, {})[uuid] = None

    def _unindex(self, qube: Qube) -> None:
        uuid = qube.uuid
        del self._by_uuid[uuid]
        if self._by_name.get(qube.name) == uuid:
            del self._by_name[qube.name]
        if self._by_qid.get(qube.qid) == uuid:
            del self._by_qid[qube.qid]
        dispid = qube.properties.get("dispid", "")
        if dispid.isdigit() and self._by_dispid.get(int(dispid)) == uuid:
            del self._by_dispid[int(dispid)]
        if not qube.hidden and qube.name != ADMINVM_NAME:
            at = bisect_left(self._names, qube.name)
            if at < len(self._names) and self._names[at] == qube.name:
                del self._names[at]
        for prop in REFERENCE_PROPERTIES:
            target = qube.properties.get(prop)
            if target is None:
                self._unset[prop].pop(uuid, None)
            else:
                _drop(self._referrers, (prop, target), uuid)
        label = qube.properties.get("label")
        if label is not None:
            _drop(self._label_users, label, uuid)
        for volume in qube.volumes:
            _drop(self._pool_users, volume.pool, uuid)
            if self._vids.get((volume.pool, volume.vid)) == uuid:
                del self._vids[(volume.pool, volume.vid)]
        for device in qube.devices:
            _drop(self._backends, device.backend, uuid)


def _drop(index: dict[_K, dict[str, None]], key: _K, uuid: str) -> None:
    users = index.get(key)
    if users is not None:
        users.pop(uuid, None)
        if not users:
            del index[key]
