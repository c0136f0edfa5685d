"""Setting and resetting properties, of qubes and of the system, with all they cause.

Owns the order of events and the consequences for other properties, tags, features,
volumes and qubes. Must not know how a value is checked (setters) or computed
(evaluate). Invariant: what a setter refuses makes no event; what a guard refuses was
announced by its pre-event; setting the same value again fires all events.
"""

from __future__ import annotations

from collections.abc import Iterator

from bulkhead.model import events
from bulkhead.model.evaluate import (
    NO_DEFAULT,
    Value,
    default_of,
    evaluate,
    is_default,
    is_preload,
    is_running,
    power_state,
    provides_network,
)
from bulkhead.model.events import ABSENT, OldValue
from bulkhead.model.plan.base import Draft, by_name
from bulkhead.model.plan.marks import delete_feature, keep_one_tag, set_feature
from bulkhead.model.plan.volumes import follow_template
from bulkhead.model.properties import (
    DISP,
    TEMPLATE,
    PropertyRow,
    find_row,
    has_property,
)
from bulkhead.model.records import Phase, Qube
from bulkhead.model.setters import check_guards, check_reset, parse_property
from bulkhead.model.specs import APPLY_CLIENTS, APPLY_KEYS
from bulkhead.model.view import View
from bulkhead.model.xmlstore import mended

# Properties whose value is repeated as tag PREFIX-NAME.
_TAGGED = ("guivm", "audiovm", "relayvm")
# Guards that are part of the setter in 4.4: they refuse before anything is announced.
_SILENT_GUARDS = frozenset({"provides_network"})
# What else changes is told when they are set, and is not when they are reset, as in 4.4.
_ALONE_WHEN_RESET = frozenset({"ip6"})
DEFERRED_NETVM = "deferred-netvm-original"
CLOCK_FEATURE = "service.clocksync"


# ---- qubes


def set_property(draft: Draft, qube: Qube, name: str, untrusted_value: str) -> None:
    """Set a qube's property from the wire. Refusals of setters, NO_SUCH_PROPERTY."""
    row = find_row(qube.klass, name)
    text = parse_property(draft.view, qube, row, untrusted_value, guards=False)
    store_property(draft, qube, row, text)


def store_property(draft: Draft, qube: Qube, row: PropertyRow, text: str) -> None:
    """Set a qube's property to text that its setter has accepted."""
    view, name = draft.view, row.name
    qube = draft.qube(qube.uuid)
    new = value_of(row, text)
    old = _old(view, qube, name)
    if name in _SILENT_GUARDS:
        check_guards(view, qube, row, text)
    draft.emit(events.property_pre_set(qube, name, new, old))
    check_guards(view, qube, row, text)
    if name == "netvm":
        _before_netvm(draft, qube)
    qube = draft.set_stored(qube, name, text)
    _consequences(draft, qube, row, new, old)
    if row.propagates and qube.klass == TEMPLATE and new != old:
        _inherited(draft, qube, name)
    draft.emit(events.property_set_only(qube, name, new, old))
    _mark_live(draft, qube, row)
    _requalify(draft, qube, name)


def reset_property(draft: Draft, qube: Qube, name: str) -> None:
    """Back to the default. Refusals NO_SUCH_PROPERTY and those of check_reset."""
    clear_property(draft, qube, find_row(qube.klass, name))


def clear_property(draft: Draft, qube: Qube, row: PropertyRow) -> None:
    """Back to the default; the four events come also where it is the default."""
    view, name = draft.view, row.name
    qube = draft.qube(qube.uuid)
    old = _old(view, qube, name)
    default = default_of(view, qube, name)
    new: Value = None if default is NO_DEFAULT else default
    pre_reset, pre_del, *after = events.property_reset(qube, name, old)
    if row.write_once or name in _SILENT_GUARDS:
        check_reset(view, qube, row)
    draft.emit(pre_reset)
    check_reset(view, qube, row)
    # Another netvm is told, checked and connected as by a Set, the same one is not touched.
    is_netvm = name == "netvm"
    if is_netvm and new != old:
        draft.emit(events.property_pre_set(qube, name, new, old))
        check_guards(view, qube, row, str(new or ""))
        _before_netvm(draft, qube)
    draft.emit(pre_del)
    if row.stored:
        qube = draft.set_stored(qube, name, None)
        if name not in _ALONE_WHEN_RESET and not (is_netvm and new == old):
            _consequences(draft, qube, row, new, old)
    if is_netvm and new != old:
        draft.emit(events.property_set_only(qube, name, new, old))
    draft.emit(*after)
    _mark_live(draft, qube, row)
    _requalify(draft, qube, name)


def value_of(row: PropertyRow, text: str) -> Value:
    """The value that a stored text means."""
    match row.type:
        case "int":
            return int(text)
        case "bool":
            return text == "True"
        case "qube" | "label" | "pool":
            return text or None
        case _:
            return text


def _old(view: View, qube: Qube | None, name: str) -> OldValue:
    if is_default(view, qube, name):
        default = default_of(view, qube, name)
        return ABSENT if default is NO_DEFAULT else default
    return evaluate(view, qube, name)


def _mark_live(draft: Draft, qube: Qube, row: PropertyRow) -> None:
    # What a paused qube gets for its netvm waits until it runs again.
    if row.live and not (row.name == "netvm" and _paused(draft.view, qube)):
        draft.live(qube, *row.parts)


# ---- consequences


def _consequences(draft: Draft, qube: Qube, row: PropertyRow, new: Value, old: OldValue) -> None:
    view, name = draft.view, row.name
    match name:
        case "label" | "template_for_dispvms":
            draft.emit(events.value_changed(qube, "icon"))
        case "provides_network":
            # 4.4: extensions belong to all local qubes, a base of what has a network.
            _servicevm(draft, qube, bool(new))
            draft.emit(*events.values_changed(qube, ("gateway", "gateway6", "icon")))
        case "template":
            follow_template(draft, qube)
        case "guivm" | "audiovm" | "relayvm":
            keep_one_tag(draft, qube, name, str(new or ""))
            if name == "relayvm":
                _relays_changed(draft, new, old)
        case "remote_name":
            _relays_changed(draft, qube.properties.get("relayvm", ""))
        case "netvm":
            _connected(draft, qube, new)
            # Its own APPLY tells them where it runs; one of a boot that ends does nothing.
            if new != old and (qube.run.phase is not Phase.UP or _paused(view, qube)):
                _clients_changed(draft, new, old)
        case "ip" | "ip6":
            _address_changed(draft, qube, name)
        case "keyboard_layout":
            _layout_changed(draft, qube, {qube.uuid})
        case "appvm_default_bootmode":
            for child in children(view, qube):
                if is_default(view, child, "bootmode"):
                    draft.emit(events.value_changed(child, "bootmode"))


def _inherited(draft: Draft, template: Qube, name: str) -> None:
    """Qubes directly based on the template that have the property from it. Clients are told
    of a Set on a TemplateVM and of nothing else, as in 4.4."""
    for child in children(draft.view, template):
        if has_property(child.klass, name) and is_default(draft.view, child, name):
            draft.emit(events.value_changed(child, name))


def _layout_changed(draft: Draft, guivm: Qube, seen: set[str]) -> None:
    """Who has the keyboard layout from a guivm, who shows others itself after those."""
    for other in by_name(shown_by(draft.view, guivm)):
        if other.uuid in seen or not is_default(draft.view, other, "keyboard_layout"):
            continue
        seen.add(other.uuid)
        _layout_changed(draft, other, seen)
        draft.emit(events.value_changed(other, "keyboard_layout"))
        draft.live(other, APPLY_KEYS)


def _relays_changed(draft: Draft, *relays: OldValue) -> None:
    """Both relays learn which remote qubes they carry calls for now."""
    for name in relays:
        relay = draft.view.qube(name) if isinstance(name, str) and name else None
        if relay is not None:
            draft.live(relay, APPLY_KEYS)


def _clients_changed(draft: Draft, *netvms: OldValue) -> None:
    """Netvms know all their clients, also those that do not run or sleep; nobody waits for
    a netvm because of one that has no use for it now."""
    for name in netvms:
        netvm = draft.view.qube(name) if isinstance(name, str) and name else None
        if netvm is not None:
            draft.live(netvm, APPLY_CLIENTS, awaited=False)


def qube_is_forgotten(draft: Draft, qube: Qube) -> None:
    """A qube is being removed: neither its relay nor its netvm know it from now on."""
    _relays_changed(draft, qube.properties.get("relayvm", ""))
    if _has(qube, "netvm"):
        _clients_changed(draft, evaluate(draft.view, qube, "netvm"))


def children(view: View, template: Qube) -> Iterator[Qube]:
    """ACTIVE qubes directly based on a template, by name."""
    return by_name(q for q in view.referrers("template", template.name) if not q.hidden)


def _servicevm(draft: Draft, qube: Qube, provides: bool) -> None:
    if provides:
        set_feature(draft, qube, "servicevm", "1")
    elif "servicevm" in draft.qube(qube.uuid).features:
        delete_feature(draft, qube, "servicevm")


def _address_changed(draft: Draft, qube: Qube, name: str) -> None:
    six = "6" if name == "ip6" else ""
    if provides_network(qube):
        draft.emit(events.value_changed(qube, f"gateway{six}"))
    draft.emit(events.value_changed(qube, f"visible_ip{six}"))
    for client in by_name(clients_of(draft.view, qube)):
        draft.emit(events.value_changed(client, f"visible_gateway{six}"))


def clients_of(view: View, netvm: Qube) -> Iterator[Qube]:
    """ACTIVE qubes whose netvm it is, set or by default."""
    for qube in view.referrers("netvm", netvm.name):
        if not qube.hidden and has_property(qube.klass, "netvm"):
            yield qube
    if view.properties.get("default_netvm") == netvm.name:
        yield from uses_default_netvm(view)


def uses_default_netvm(view: View) -> Iterator[Qube]:
    """ACTIVE qubes whose netvm is the system's default."""
    return (q for q in view.without("netvm") if q.klass != TEMPLATE and _has(q, "netvm"))


def shown_by(view: View, guivm: Qube) -> Iterator[Qube]:
    """ACTIVE qubes whose guivm it is, set or by default."""
    for qube in view.referrers("guivm", guivm.name):
        if not qube.hidden and _has(qube, "guivm"):
            yield qube
    if evaluate(view, None, "default_guivm") == guivm.name:
        yield from (q for q in view.without("guivm") if _has(q, "guivm"))


def _has(qube: Qube, name: str) -> bool:
    return has_property(qube.klass, name)


# ---- netvm of a qube that runs


def _paused(view: View, qube: Qube) -> bool:
    return qube.run.phase is Phase.UP and power_state(view, qube) == "Paused"


def _before_netvm(draft: Draft, qube: Qube) -> None:
    """A paused qube keeps the name of the netvm that it is really connected to."""
    if _paused(draft.view, qube) and DEFERRED_NETVM not in draft.qube(qube.uuid).features:
        original = evaluate(draft.view, qube, "netvm")
        set_feature(draft, qube, DEFERRED_NETVM, str(original or ""))


def _connected(draft: Draft, qube: Qube, new: Value) -> None:
    """Told to the netvm at once, also where a paused client gets its interface later."""
    view = draft.view
    netvm = view.qube(str(new)) if new else None
    if netvm is None or qube.run.phase is not Phase.UP:
        return
    if is_running(view, netvm):
        draft.emit(events.net_domain_connect(netvm, qube))


def apply_deferred_netvm(draft: Draft, qube: Qube) -> None:
    """A qube that was paused when its netvm changed gets it now; nothing where none waits.

    A preloaded disposable that nobody uses yet keeps waiting.
    """
    view = draft.view
    qube = draft.qube(qube.uuid)
    original = qube.features.get(DEFERRED_NETVM)
    if original is None or not _has(qube, "netvm") or is_preload(view, qube):
        return
    old: Value = original if original and view.qube(original) is not None else None
    new = evaluate(view, qube, "netvm")
    netvm = view.qube(str(new)) if new else None
    # As this plan has it: it may be its start that ends here.
    if netvm is not None and not is_running(view, draft.qube(netvm.uuid)):
        return
    draft.emit(events.property_pre_set(qube, "netvm", new, old))
    if netvm is not None:
        draft.emit(events.net_domain_connect(netvm, qube))
    draft.emit(events.property_set_only(qube, "netvm", new, old))
    delete_feature(draft, qube, DEFERRED_NETVM)
    draft.live(qube)


# ---- the system


def set_system(draft: Draft, name: str, untrusted_value: str) -> None:
    """Set a system property from the wire."""
    view = draft.view
    row = find_row(None, name)
    text = parse_property(view, None, row, untrusted_value, guards=False)
    new, old = value_of(row, text), _old(view, None, name)
    draft.emit(events.property_pre_set(None, name, new, old))
    check_guards(view, None, row, text)
    _before_system(draft, name, new, old)
    draft.set_system(name, text)
    _after_system(draft, name, new, old)
    draft.emit(events.property_set_only(None, name, new, old))


def reset_system(draft: Draft, name: str) -> None:
    """Back to the default."""
    view = draft.view
    row = find_row(None, name)
    check_reset(view, None, row)
    old = _old(view, None, name)
    default = default_of(view, None, name)
    new: Value = None if default is NO_DEFAULT else default
    burst = events.property_reset(None, name, old)
    draft.emit(*burst[:2])
    match name:
        case "clockvm":
            draft.set_system(name, None)  # who was it keeps the feature
        case "default_netvm":
            _default_netvm_reset(draft, old)
        case _ if row.stored:
            draft.set_system(name, None)
            _after_system(draft, name, new, old)
    draft.emit(*burst[2:])


def _default_netvm_reset(draft: Draft, old: OldValue) -> None:
    """Qubes that use it lose their network, and no event tells of them."""
    for qube in by_name(uses_default_netvm(draft.view)):
        _before_netvm(draft, qube)
    draft.set_system("default_netvm", None)
    _clients_changed(draft, old)
    for qube in by_name(uses_default_netvm(draft.view)):
        _mark_live(draft, qube, find_row(qube.klass, "netvm"))


def _before_system(draft: Draft, name: str, new: Value, old: OldValue) -> None:
    view = draft.view
    if name == "default_netvm":
        row = find_row("AppVM", "netvm")
        for qube in by_name(uses_default_netvm(view)):
            draft.emit(events.property_pre_set(qube, "netvm", new, old))
            check_guards(view, qube, row, str(new or ""))
        for qube in by_name(uses_default_netvm(view)):
            _before_netvm(draft, qube)
    elif name == "clockvm":
        clock = view.qube(str(new)) if new else None
        if clock is not None and CLOCK_FEATURE not in clock.features:
            set_feature(draft, clock, CLOCK_FEATURE, "1")
            draft.live(clock, APPLY_KEYS)


def _after_system(draft: Draft, name: str, new: Value, old: OldValue) -> None:
    view = draft.view
    match name:
        case "default_netvm":
            _clients_changed(draft, new, old)
            for qube in by_name(uses_default_netvm(view)):
                if new != old:
                    _connected(draft, qube, new)
                    draft.emit(events.property_set_only(qube, "netvm", new, old))
                # With the former value: who hears of the reset has no other way to know it.
                draft.emit(events.value_changed(qube, "netvm", old))
                _mark_live(draft, qube, find_row(qube.klass, "netvm"))
        case "default_guivm" | "default_audiovm":
            own = name.removeprefix("default_")
            for qube in by_name(q for q in view.without(own) if _has(q, own)):
                keep_one_tag(draft, qube, own, str(new or ""))
                draft.emit(events.property_set_only(qube, own, new, old))
                draft.live(qube, APPLY_KEYS)
        case "default_dispvm":
            for qube in by_name(view.without(name)):
                if qube.klass != DISP and _has(qube, name):
                    draft.emit(events.value_changed(qube, name))
        case "clockvm":
            former = view.qube(str(old)) if isinstance(old, str) and old != new else None
            if former is not None and CLOCK_FEATURE in draft.qube(former.uuid).features:
                delete_feature(draft, former, CLOCK_FEATURE)
                draft.live(former, APPLY_KEYS)


# ---- quarantine


def _requalify(draft: Draft, qube: Qube, name: str) -> None:
    """A property that was set or reset has no bad stored value any more."""
    qube = draft.qube(qube.uuid)
    if qube.quarantine:
        draft.put(mended(qube, name))


def tagged_properties(klass: str) -> tuple[str, ...]:
    """Properties of a class whose value is repeated as a tag."""
    return tuple(name for name in _TAGGED if has_property(klass, name))
