"""Finished Admin API events: names, keys and their order, values as clients see them.

Owns the rendering and the bursts that belong to one change. Must not know when a plan
emits them. Invariant: what a maker returns is sent as it is; a pre-event comes before
what it announces, and events that a change causes come before the change's own post-event.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bulkhead.model.evaluate import Value
from bulkhead.model.records import Assignment, Qube, WireEvent

Subject = Qube | None  # None: the system
Events = tuple[WireEvent, ...]


class _Absent:
    """Type of ABSENT."""


ABSENT = _Absent()  # no oldvalue key at all; None is rendered as "None"
OldValue = Value | _Absent


def render(value: Value | Mapping[str, str] | list[str]) -> str:
    """A value as event text: names as they are, None, True and False, literals for maps."""
    if isinstance(value, tuple):
        return " ".join(value)
    if isinstance(value, Mapping):
        return repr(dict(value))
    return str(value)


def make(
    subject: Subject, event: str, /, **pairs: Value | Mapping[str, str] | list[str]
) -> WireEvent:
    """An event with keys in the order given."""
    return WireEvent(
        subject=subject.name if subject is not None else "",
        name=event,
        pairs=tuple((key, render(value)) for key, value in pairs.items()),
        subject_uuid=subject.uuid if subject is not None else "",
    )


def _old(oldvalue: OldValue) -> dict[str, Value]:
    return {} if isinstance(oldvalue, _Absent) else {"oldvalue": oldvalue}


# ---- properties


def property_pre_set(subject: Subject, name: str, newvalue: Value, oldvalue: OldValue) -> WireEvent:
    """Announces a new value; oldvalue ABSENT where there was neither value nor default."""
    return make(subject, f"property-pre-set:{name}", name=name, newvalue=newvalue, **_old(oldvalue))


def property_set_only(
    subject: Subject, name: str, newvalue: Value, oldvalue: OldValue
) -> WireEvent:
    """The post-event of a new value alone."""
    return make(subject, f"property-set:{name}", name=name, newvalue=newvalue, **_old(oldvalue))


def property_set(
    subject: Subject,
    name: str,
    newvalue: Value,
    oldvalue: OldValue = ABSENT,
    caused: Iterable[WireEvent] = (),
) -> Events:
    """pre-set, what the change causes, set."""
    return (
        property_pre_set(subject, name, newvalue, oldvalue),
        *caused,
        property_set_only(subject, name, newvalue, oldvalue),
    )


def property_reset(
    subject: Subject,
    name: str,
    oldvalue: OldValue = ABSENT,
    caused: Iterable[WireEvent] = (),
) -> Events:
    """pre-reset, pre-del, what the reset causes, reset, del; also when already default."""
    old = _old(oldvalue)
    return (
        make(subject, f"property-pre-reset:{name}", name=name, **old),
        make(subject, f"property-pre-del:{name}", name=name, **old),
        *caused,
        make(subject, f"property-reset:{name}", name=name, **old),
        make(subject, f"property-del:{name}", name=name, **old),
    )


def value_changed(subject: Subject, name: str, oldvalue: OldValue = ABSENT) -> WireEvent:
    """property-reset alone: a computed or default value is another one now."""
    return make(subject, f"property-reset:{name}", name=name, **_old(oldvalue))


def values_changed(subject: Subject, names: Iterable[str]) -> Events:
    """value_changed for several names, in their order."""
    return tuple(value_changed(subject, name) for name in names)


# ---- features and tags


def feature_set(
    qube: Qube,
    name: str,
    value: str,
    oldvalue: str | None = None,
    caused: Iterable[WireEvent] = (),
) -> Events:
    """pre-set, what the change causes, set; oldvalue None = it was not set."""
    old: dict[str, Value] = {} if oldvalue is None else {"oldvalue": oldvalue}
    return (
        make(qube, f"domain-feature-pre-set:{name}", feature=name, value=value, **old),
        *caused,
        make(qube, f"domain-feature-set:{name}", feature=name, value=value, **old),
    )


def feature_pre_delete(qube: Qube, name: str) -> WireEvent:
    """Announces a removal; sent also when the feature turns out not to be set."""
    return make(qube, f"domain-feature-pre-delete:{name}", feature=name)


def feature_delete(qube: Qube, name: str, caused: Iterable[WireEvent] = ()) -> Events:
    """pre-delete, what the removal causes, delete."""
    return (
        feature_pre_delete(qube, name),
        *caused,
        make(qube, f"domain-feature-delete:{name}", feature=name),
    )


def tag_add(qube: Qube, tag: str) -> WireEvent:
    """The qube got a tag that it had not."""
    return make(qube, f"domain-tag-add:{tag}", tag=tag)


def tag_delete(qube: Qube, tag: str) -> WireEvent:
    """The qube lost a tag."""
    return make(qube, f"domain-tag-delete:{tag}", tag=tag)


# ---- existence


def domain_add(qube: Qube) -> WireEvent:
    """The qube is listed from now on."""
    return make(None, "domain-add", vm=qube.name)


def domain_pre_delete(qube: Qube) -> WireEvent:
    """The qube is about to go."""
    return make(None, "domain-pre-delete", vm=qube.name)


def domain_delete(qube: Qube) -> WireEvent:
    """The qube is not listed any more."""
    return make(None, "domain-delete", vm=qube.name)


def domain_create_on_disk(qube: Qube) -> WireEvent:
    """The qube's volumes exist."""
    return make(qube, "domain-create-on-disk")


def domain_remove_from_disk(qube: Qube) -> WireEvent:
    """The qube's data are gone."""
    return make(qube, "domain-remove-from-disk")


def domain_clone_files(qube: Qube, src: Qube) -> WireEvent:
    """The qube's volumes were copied from another one."""
    return make(qube, "domain-clone-files", src=src.name)


# ---- running

BOOT_VALUES: tuple[str, ...] = ("xid", "stubdom_xid", "start_time")


def boot_values_changed(qube: Qube) -> Events:
    """The burst when the domain appears and when it is gone."""
    return values_changed(qube, BOOT_VALUES)


def domain_pre_start(qube: Qube, start_guid: bool, mem_required: int) -> WireEvent:
    """Start was accepted; mem_required in bytes."""
    return make(qube, "domain-pre-start", start_guid=start_guid, mem_required=mem_required)


def domain_verify_files(qube: Qube) -> WireEvent:
    """The volumes were found to be usable."""
    return make(qube, "domain-verify-files")


def domain_pre_spawn(qube: Qube, start_guid: bool) -> WireEvent:
    """The hypervisor is about to be asked for the domain."""
    return make(qube, "domain-pre-spawn", start_guid=start_guid)


def domain_spawned(qube: Qube, start_guid: bool) -> Events:
    """The domain exists, still paused."""
    return (
        *boot_values_changed(qube),
        make(qube, "domain-spawn", start_guid=start_guid),
    )


def domain_qdb_create(qube: Qube) -> WireEvent:
    """The guest's keys are in place."""
    return make(qube, "domain-qdb-create")


def domain_pre_unpaused(qube: Qube) -> WireEvent:
    """The domain is about to run."""
    return make(qube, "domain-pre-unpaused")


def domain_unpaused(qube: Qube) -> WireEvent:
    """The domain runs."""
    return make(qube, "domain-unpaused")


def domain_start(qube: Qube, start_guid: bool) -> WireEvent:
    """The qube is fully up."""
    return make(qube, "domain-start", start_guid=start_guid)


def domain_start_failed(qube: Qube, reason: str) -> WireEvent:
    """The start did not succeed."""
    return make(qube, "domain-start-failed", reason=reason)


def domain_pre_shutdown(qube: Qube, force: bool) -> WireEvent:
    """The guest is about to be asked to power off."""
    return make(qube, "domain-pre-shutdown", force=force)


def domain_shutdown_failed(qube: Qube, reason: str) -> WireEvent:
    """The shutdown was refused or did not end in time."""
    return make(qube, "domain-shutdown-failed", reason=reason)


def domain_stopped(qube: Qube) -> Events:
    """The domain is gone, its clean-up begins."""
    return (make(qube, "domain-stopped"), *boot_values_changed(qube))


def domain_shutdown(qube: Qube) -> WireEvent:
    """The qube is halted and cleaned up."""
    return make(qube, "domain-shutdown")


def domain_pre_paused(qube: Qube) -> WireEvent:
    """The domain is about to be paused."""
    return make(qube, "domain-pre-paused")


def domain_paused(qube: Qube) -> WireEvent:
    """The domain is paused."""
    return make(qube, "domain-paused")


def domain_resumed(qube: Qube) -> WireEvent:
    """The guest woke from suspend."""
    return make(qube, "domain-resumed")


# ---- volumes, pools, firewall


def volume_import_begin(qube: Qube, volume: str, size: int | None) -> WireEvent:
    """New content of a volume is being written; volume is its name."""
    return make(qube, "domain-volume-import-begin", volume=volume, size=size)


def volume_import_end(qube: Qube, volume: str, success: bool) -> WireEvent:
    """The import of a volume was committed or given up."""
    return make(qube, "domain-volume-import-end", volume=volume, success=success)


def import_volume(qube: Qube, name: str, source_vid: str) -> WireEvent:
    """A volume was replaced by a copy of another one."""
    return make(qube, "domain-import-volume", name=name, source=source_vid)


def pool_add(pool: str) -> WireEvent:
    """A pool was added."""
    return make(None, "pool-add", pool=pool)


def pool_pre_delete(pool: str) -> WireEvent:
    """A pool is about to be forgotten."""
    return make(None, "pool-pre-delete", pool=pool)


def pool_delete(pool: str) -> WireEvent:
    """A pool was forgotten."""
    return make(None, "pool-delete", pool=pool)


def firewall_changed(qube: Qube) -> WireEvent:
    """The qube's rules were saved."""
    return make(qube, "firewall-changed")


def net_domain_connect(netvm: Qube, client: Qube) -> WireEvent:
    """A client was connected to its netvm; the subject is the netvm."""
    return make(netvm, "net-domain-connect", vm=client.name)


# ---- disposables and guests


def preload_start(qube: Qube, reason: str, delay: float | None = None) -> WireEvent:
    """The disposable template is asked to fill its queue."""
    extra: dict[str, Value] = {} if delay is None else {"delay": delay}
    return make(qube, "domain-preload-dispvm-start", reason=reason, **extra)


def preload_used(qube: Qube, dispvm: str, delay: float) -> WireEvent:
    """A preloaded disposable was handed out."""
    return make(qube, "domain-preload-dispvm-used", dispvm=dispvm, delay=delay)


def features_request(qube: Qube, untrusted_features: Mapping[str, str]) -> WireEvent:
    """The guest announced features; the values are its own words."""
    return make(qube, "features-request", untrusted_features=untrusted_features)


def template_postinstall(qube: Qube) -> WireEvent:
    """A template or standalone reported qrexec for the first time."""
    return make(qube, "template-postinstall")


def qdb_change(qube: Qube, path: str) -> WireEvent:
    """A watched key of the guest changed."""
    return make(qube, f"domain-qdb-change:{path}", path=path)


# ---- devices


def _device(assignment: Assignment) -> str:
    return f"{assignment.backend}:{assignment.port}:{assignment.identity}"


def device_assign(qube: Qube, assignment: Assignment) -> Events:
    """pre-assign, assign; subject is the frontend."""
    device, options = _device(assignment), assignment.options
    return (
        make(qube, f"device-pre-assign:{assignment.devclass}", device=device, options=options),
        make(qube, f"device-assign:{assignment.devclass}", device=device, options=options),
    )


def device_assignment_changed(qube: Qube, assignment: Assignment) -> Events:
    """pre-assign, assignment-changed: another mode."""
    device = _device(assignment)
    return (
        make(
            qube,
            f"device-pre-assign:{assignment.devclass}",
            device=device,
            options=assignment.options,
        ),
        make(qube, f"device-assignment-changed:{assignment.devclass}", device=device),
    )


def device_unassign(qube: Qube, assignment: Assignment) -> WireEvent:
    """The assignment is gone."""
    return make(qube, f"device-unassign:{assignment.devclass}", device=_device(assignment))


def device_pre_attach(qube: Qube, attachment: Assignment) -> WireEvent:
    """A device is about to be attached to a running frontend."""
    return make(
        qube,
        f"device-pre-attach:{attachment.devclass}",
        device=_device(attachment),
        options=attachment.options,
    )


def device_attach(qube: Qube, attachment: Assignment) -> WireEvent:
    """A device was attached."""
    return make(
        qube,
        f"device-attach:{attachment.devclass}",
        device=_device(attachment),
        options=attachment.options,
    )


def device_pre_detach(qube: Qube, devclass: str, backend: str, port: str) -> WireEvent:
    """A device is about to be detached."""
    return make(qube, f"device-pre-detach:{devclass}", port=f"{backend}:{port}")


def device_detach(qube: Qube, devclass: str, backend: str, port: str) -> WireEvent:
    """A device was detached."""
    return make(qube, f"device-detach:{devclass}", port=f"{backend}:{port}")


def device_list_change(backend: Qube, devclass: str) -> WireEvent:
    """The backend offers other devices than before."""
    return make(backend, f"device-list-change:{devclass}")


def device_added(backend: Qube, devclass: str, port: str, device_id: str) -> WireEvent:
    """The backend offers a new device."""
    return make(backend, f"device-added:{devclass}", device=f"{backend.name}:{port}:{device_id}")


def device_removed(backend: Qube, devclass: str, port: str) -> WireEvent:
    """The backend does not offer the device any more."""
    return make(backend, f"device-removed:{devclass}", port=f"{backend.name}:{port}")
