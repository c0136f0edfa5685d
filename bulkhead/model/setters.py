"""Checks of a value before it becomes a property: from hostile text to stored text.

Owns the coarse cleaning by type, every setter's rules and the guards that look at other
qubes, facts and the run state. Must not know events or how the change is stored.
Invariant: what parse_property returns is the text that qubes.xml gets, and parse_stored
of that text returns it unchanged.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from uuid import UUID

from bulkhead.model import grammar, kernelopts, labels
from bulkhead.model.evaluate import (
    evaluate,
    has_pci,
    is_halted,
    is_preload,
    is_running,
    netvm_chain,
    provides_network,
    template_for_dispvms,
)
from bulkhead.model.features import netvm_name
from bulkhead.model.grammar import shown
from bulkhead.model.memory import hotplug_usable
from bulkhead.model.properties import REMOTE, TEMPLATE, PropertyRow, has_property
from bulkhead.model.records import OperationState, Phase, Qube
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View

_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}\Z")
_USER = re.compile(r"[a-zA-Z0-9_+,.-]*\Z")
_KEYBOARD = re.compile(r"[A-Za-z]+\+[A-Za-z0-9_-]*\+[A-Za-z0-9_:,-]*\Z")
_VIRT_MODES = ("hvm", "pv", "pvh")

Holder = Qube | None  # None: the system

# Write-once, and still set by qvm-clone: it leaves out the other three by name, not this one.
_COPIED_BY_TOOLS = frozenset({"dispid"})


def parse_property(
    view: View, qube: Holder, row: PropertyRow, untrusted_value: str, *, guards: bool = True
) -> str:
    """The text to store for a value from the wire; qube None = system property.

    guards False leaves out what depends on the run state, installed kernels and users
    of the qube (see check_guards). Refusals: INVALID_VALUE and INVALID_NAME for text
    that is no value of the type, PROPERTY_READ_ONLY, PROPERTY_FIXED, LABEL_NOT_FOUND,
    INVALID_PROPERTY_VALUE, FACTS_MISSING, and those of check_guards.
    """
    if not untrusted_value.isascii():
        raise _invalid(qube, row, untrusted_value, "Non-ASCII bytes in property value")
    text = _PARSERS.get(row.type, _parse_text)(view, qube, row, untrusted_value)
    if not row.settable:
        raise Refusal(
            "PROPERTY_READ_ONLY",
            f"property '{row.name}' on {_holder(qube)} cannot be set: it is computed",
            property=row.name,
            qube=_name(qube),
        )
    if row.write_once:
        raise _write_once(qube, row)
    text = _check(view, qube, row, text)
    if "\x0b" in text or "\x0c" in text:
        raise _invalid(qube, row, text, "vertical tabs and form feeds cannot be stored")
    if row.name in _KERNELS and text and not view.storage_reported:
        # Before anything is announced: the same call comes again and finds it known.
        raise Refusal(
            "FACTS_MISSING",
            f"storage has not told yet which kernels are installed: {row.name} cannot be checked",
            property=row.name,
        )
    if guards:
        check_guards(view, qube, row, text)
    return text


def parse_stored(view: View, qube: Holder, row: PropertyRow, text: str) -> str:
    """The text to keep for a value from qubes.xml, in the form that is written today.

    Other qubes must be in the view already. No guards and no search for network loops:
    the loader breaks those once all qubes are there. Refusals as parse_property.
    """
    if not row.settable:
        raise _refused(qube, row, text, "it is computed and cannot be stored")
    if row.type == "bool":
        value = grammar.parse_bool(text)
        if value is None:
            raise _invalid(qube, row, text, "it must be True or False")
        return str(value)
    if not grammar.printable_ascii(text) and not grammar.python_printable(text):
        raise _invalid(qube, row, text, "unprintable characters")
    if row.type == "label":
        return labels.label_of_stored(view, text).name
    parsed = _PARSERS.get(row.type, _parse_text)(view, qube, row, text)
    return _check(view, qube, row, parsed, loops=False)


def check_guards(view: View, qube: Holder, row: PropertyRow, text: str) -> None:
    """Refuse a valid value that may not be set now; text is what would be stored.

    Refusals: INVALID_PROPERTY_VALUE, QUBE_NOT_HALTED, QUBE_NOT_STARTED, QUBE_IN_USE,
    INVALID_VALUE.
    """
    if qube is None:
        if row.name == "default_kernel":
            _guard_kernel(view, None, text)
        return
    guard = _GUARDS.get(row.name)
    if guard is not None:
        guard(view, qube, text)


def check_reset(view: View, qube: Holder, row: PropertyRow) -> None:
    """Refuse a reset that may not happen.

    What another netvm needs of a running qube is check_guards' work. Refusals:
    PROPERTY_READ_ONLY and PROPERTY_FIXED (write-once), INVALID_VALUE (template, label,
    default_kernel, netvm loop), QUBE_IN_USE.
    """
    if row.write_once:
        raise _write_once(qube, row)
    if not row.resettable:
        raise Refusal(
            "INVALID_VALUE",
            f"Cannot unset {row.name} of {_holder(qube)}: it has no default",
            property=row.name,
            qube=_name(qube),
        )
    if qube is None or not row.settable:
        return  # a computed property is at its default already
    if row.name in ("provides_network", "template_for_dispvms"):
        _GUARDS[row.name](view, qube, "False")
    elif row.name == "netvm" and qube.klass != TEMPLATE:
        _check_loop(view, qube, row, view.properties.get("default_netvm") or "")


# ---- text to typed text


def _parse_text(view: View, qube: Holder, row: PropertyRow, untrusted_value: str) -> str:
    del view
    if not grammar.python_printable(untrusted_value):
        raise _invalid(qube, row, untrusted_value, "unprintable characters")
    return untrusted_value


def _parse_int(view: View, qube: Holder, row: PropertyRow, untrusted_value: str) -> str:
    del view
    try:
        number = int(untrusted_value)
    except ValueError:
        raise _invalid(qube, row, untrusted_value, "it must be a number") from None
    return str(number)


def _parse_float(view: View, qube: Holder, row: PropertyRow, untrusted_value: str) -> str:
    del view
    try:
        return str(float(untrusted_value))
    except ValueError:
        raise _invalid(qube, row, untrusted_value, "it must be a number") from None


def _parse_bool(view: View, qube: Holder, row: PropertyRow, untrusted_value: str) -> str:
    del view
    value = grammar.parse_bool(untrusted_value)
    if value is None:
        raise _invalid(qube, row, untrusted_value, "it must be True or False")
    return str(value)


def _parse_qube(view: View, qube: Holder, row: PropertyRow, untrusted_value: str) -> str:
    del view, qube, row
    return grammar.check_qube_name(untrusted_value) if untrusted_value else ""


def _parse_label(view: View, qube: Holder, row: PropertyRow, untrusted_value: str) -> str:
    del qube, row
    return labels.label_of_value(view, untrusted_value).name


def _parse_uuid(view: View, qube: Holder, row: PropertyRow, untrusted_value: str) -> str:
    del view
    try:
        return str(UUID(untrusted_value))
    except ValueError:
        raise _invalid(qube, row, untrusted_value, "it must be a UUID") from None


def _parse_ipv4(view: View, qube: Holder, row: PropertyRow, untrusted_value: str) -> str:
    del view
    try:
        return str(ipaddress.IPv4Address(untrusted_value))
    except ValueError:
        raise _invalid(qube, row, untrusted_value, "it must be an IPv4 address") from None


def _parse_ipv6(view: View, qube: Holder, row: PropertyRow, untrusted_value: str) -> str:
    del view
    try:
        address = ipaddress.IPv6Address(untrusted_value)
    except ValueError:
        raise _invalid(qube, row, untrusted_value, "it must be an IPv6 address") from None
    if address.scope_id is not None:
        raise _invalid(qube, row, untrusted_value, "an address with a zone is not usable")
    return str(address)


_Parser = Callable[[View, Holder, PropertyRow, str], str]

_PARSERS: Mapping[str, _Parser] = {
    "int": _parse_int,
    "float": _parse_float,
    "bool": _parse_bool,
    "qube": _parse_qube,
    "label": _parse_label,
    "uuid": _parse_uuid,
    "ipv4": _parse_ipv4,
    "ipv6": _parse_ipv6,
}


# ---- setters: typed text to stored text


def _check(view: View, qube: Holder, row: PropertyRow, text: str, *, loops: bool = True) -> str:
    if row.type == "qube":
        return _check_reference(view, qube, row, text, loops)
    if row.type == "pool":
        if text not in view.pools:
            raise _refused(qube, row, text, "No such storage pool")
        return text
    setter = (_SYSTEM_SETTERS if qube is None and row.system else _SETTERS).get(row.name)
    return text if setter is None else setter(qube, row, text)


def _check_reference(view: View, qube: Holder, row: PropertyRow, text: str, loops: bool) -> str:
    if not text:
        if not row.none_allowed:
            raise _refused(qube, row, text, "a qube must be given")
        return ""
    target = view.qube(text)
    if target is None:
        raise _refused(qube, row, text, f"Can't set {row.name} to non-existing qube {shown(text)}")
    if row.reference == "TemplateVM":
        if target.klass != TEMPLATE:
            raise _wrong_class(qube, row, target, TEMPLATE)
        return text
    if target.klass == REMOTE:
        raise _wrong_class(qube, row, target, "LocalVM")
    if row.reference == "disposable-template":
        if not template_for_dispvms(target):
            if row.name == "template":
                problem = "template for disposable must have template_for_dispvms=True"
            else:
                problem = f"'{text}' has template_for_dispvms set to False"
            raise _refused(qube, row, text, problem)
    elif row.reference == "default-netvm":
        if loops:
            _check_default_loop(view, row, target)
    elif row.reference == "netvm":
        if not provides_network(target):
            raise Refusal(
                "INVALID_VALUE",
                f"The {text} qube does not provide network",
                property=row.name,
                value=text,
                qube=_name(qube),
            )
        if loops and qube is not None:
            _check_loop(view, qube, row, text)
    return text


def _check_default_loop(view: View, row: PropertyRow, target: Qube) -> None:
    """Every qube whose netvm is the default would get the target, which must not come to such
    a qube on its own way out."""
    for hop in (target, *_explicit_chain(view, target)):
        if (
            "netvm" not in hop.properties
            and hop.klass != TEMPLATE
            and has_property(hop.klass, "netvm")
        ):
            raise _refused(None, row, target.name, f"Network loop on '{hop.name}'")


def _check_loop(view: View, qube: Qube, row: PropertyRow, text: str) -> None:
    target = view.qube(text)
    if target is None:
        return
    if target.uuid == qube.uuid or any(hop.uuid == qube.uuid for hop in netvm_chain(view, target)):
        raise Refusal(
            "INVALID_VALUE",
            f"Loops in network are unsupported: '{qube.name}' is a netvm of '{text}'",
            property=row.name,
            value=text,
            qube=qube.name,
        )


def _explicit_chain(view: View, start: Qube) -> list[Qube]:
    chain: list[Qube] = []
    seen = {start.uuid}
    current: Qube | None = start
    while current is not None:
        name = current.properties.get("netvm")
        current = view.qube(name) if name else None
        if current is None or current.uuid in seen:
            break
        seen.add(current.uuid)
        chain.append(current)
    return chain


_Setter = Callable[[Holder, PropertyRow, str], str]


def _positive(qube: Holder, row: PropertyRow, text: str) -> str:
    if int(text) <= 0:
        raise _refused(qube, row, text, f"{row.name} must be positive")
    return text


def _not_negative(qube: Holder, row: PropertyRow, text: str) -> str:
    if int(text) < 0:
        raise _refused(qube, row, text, f"{row.name} must be positive or zero")
    return text


def _up_to_ten_thousand(qube: Holder, row: PropertyRow, text: str) -> str:
    if not 0 <= int(text) <= 10000:
        raise _refused(qube, row, text, f"{row.name} must be between 0 and 10000")
    return text


def _virt_mode(qube: Holder, row: PropertyRow, text: str) -> str:
    mode = text.lower()
    if mode not in _VIRT_MODES:
        raise _refused(qube, row, text, "use hvm, pv or pvh")
    if mode == "pvh" and qube is not None and has_pci(qube):
        raise _refused(qube, row, text, "PVH refused: the qube has PCI devices")
    return mode


def _kernel(qube: Holder, row: PropertyRow, text: str) -> str:
    if "/" in text or text in (".", ".."):
        raise _refused(qube, row, text, "Kernel name cannot contain '/'")
    return text


def _kernelopts(qube: Holder, row: PropertyRow, text: str) -> str:
    if len(text) > kernelopts.LIMIT:
        raise _refused(qube, row, text, f"Kernelopts value too long ({kernelopts.LIMIT} chars max)")
    return text


def _default_user(qube: Holder, row: PropertyRow, text: str) -> str:
    if not _USER.match(text):
        raise _refused(
            qube, row, text, "Username can contain only those characters: a-zA-Z0-9_-+,."
        )
    return text


def _mac(qube: Holder, row: PropertyRow, text: str) -> str:
    address = text.lower()
    if not _MAC.match(address):
        raise _refused(qube, row, text, "Invalid MAC address value")
    return address


def _keyboard_layout(qube: Holder, row: PropertyRow, text: str) -> str:
    if not _KEYBOARD.match(text):
        raise _refused(qube, row, text, "the layout must be LAYOUT+VARIANT+OPTIONS")
    return text


def _devices_denied(qube: Holder, row: PropertyRow, text: str) -> str:
    del qube, row
    return "".join(sorted(set(grammar.check_interfaces(text))))


_SETTERS: Mapping[str, _Setter] = {
    "qid": _up_to_ten_thousand,
    "dispid": _up_to_ten_thousand,
    "virt_mode": _virt_mode,
    "memory": _positive,
    "maxmem": _not_negative,
    "stubdom_mem": _positive,
    "vcpus": _positive,
    "qrexec_timeout": _positive,
    "shutdown_timeout": _positive,
    "kernel": _kernel,
    "kernelopts": _kernelopts,
    "default_user": _default_user,
    "mac": _mac,
    "keyboard_layout": _keyboard_layout,
    "devices_denied": _devices_denied,
}
_SYSTEM_SETTERS: Mapping[str, _Setter] = {
    "default_kernel": _kernel,
}


# ---- guards: what forbids a valid value now

_KERNELS = frozenset({"kernel", "default_kernel"})


def kernel_goes(view: View, name: str) -> bool:
    """The kernel's removal has begun: nothing uses it, and nothing may begin to."""
    return any(
        operation.kind == "KERNEL_REMOVE" and operation.state is not OperationState.QUEUED
        for operation in view.operations_on(f"kernel/{name}")
    )


def _guard_kernel(view: View, qube: Holder, text: str) -> None:
    if not text:
        return
    kernel = view.kernel(text)
    if kernel is None:
        problem = f"Kernel '{shown(text)}' not installed"
    elif kernel_goes(view, text):
        problem = f"Kernel '{shown(text)}' is being removed"
    elif not kernel.has_vmlinuz:
        problem = f"Kernel '{shown(text)}' not properly installed: missing 'vmlinuz' file"
    else:
        return
    raise Refusal(
        "INVALID_PROPERTY_VALUE",
        problem,
        property="default_kernel" if qube is None else "kernel",
        qube=_name(qube),
    )


def _guard_maxmem(view: View, qube: Qube, text: str) -> None:
    del text
    if not is_halted(view, qube) and not hotplug_usable(view, qube):
        raise Refusal(
            "QUBE_NOT_HALTED",
            f"Domain is not powered off: '{qube.name}'; maxmem of a running qube can change only"
            " with memory hotplug",
            qube=qube.name,
            property="maxmem",
        )


def _guard_template(view: View, qube: Qube, text: str) -> None:
    del text
    if not is_halted(view, qube):
        raise Refusal(
            "QUBE_NOT_HALTED",
            f"Cannot change template while qube is running: '{qube.name}'",
            qube=qube.name,
            property="template",
        )
    for disposable in view.referrers("template", qube.name):
        if disposable.run.phase is not Phase.HALTED and not is_preload(view, disposable):
            raise Refusal(
                "QUBE_IN_USE",
                f"Cannot change template of '{qube.name}' while its disposable"
                f" '{disposable.name}' runs",
                qube=qube.name,
                user=disposable.name,
                property="template",
            )


def _guard_netvm(view: View, qube: Qube, text: str) -> None:
    if not text or is_halted(view, qube) or qube.run.phase is Phase.STARTING:
        return
    netvm = view.qube(text)
    if netvm is not None and not is_running(view, netvm):
        raise Refusal(
            "QUBE_NOT_STARTED",
            f"Cannot dynamically attach to stopped qube {text}",
            qube=text,
            property="netvm",
        )


def _guard_provides_network(view: View, qube: Qube, text: str) -> None:
    if text != "False":
        return
    user = next(
        (other for other in view.referrers("netvm", qube.name) if other.uuid != qube.uuid), None
    )
    if user is None and view.properties.get("default_netvm") == qube.name:
        user = next(
            (other for other in view.without("netvm") if netvm_name(view, other) == qube.name),
            None,
        )
    if user is not None:
        raise Refusal(
            "INVALID_VALUE",
            f"The qube '{qube.name}' is still the netvm of other qubes: '{user.name}'",
            qube=qube.name,
            user=user.name,
            property="provides_network",
        )


def _guard_template_for_dispvms(view: View, qube: Qube, text: str) -> None:
    if text != "False" or not template_for_dispvms(qube):
        return
    user = ""
    for name in ("default_dispvm", "management_dispvm"):
        if view.properties.get(name) == qube.name:
            user = f"system property {name}"
    for name in ("template", "default_dispvm", "management_dispvm"):
        for other in view.referrers(name, qube.name):
            # Preloaded disposables go with the permission to make them.
            if not user and other.uuid != qube.uuid and not _preloaded_from(view, other, qube):
                user = f"{name} of '{other.name}'"
    if user:
        raise Refusal(
            "QUBE_IN_USE",
            f"Cannot stop '{qube.name}' being a disposable template: it is the {user}",
            qube=qube.name,
            user=user,
            property="template_for_dispvms",
        )


def _preloaded_from(view: View, other: Qube, template: Qube) -> bool:
    return other.properties.get("template") == template.name and is_preload(view, other)


_Guard = Callable[[View, Qube, str], None]

_GUARDS: Mapping[str, _Guard] = {
    "kernel": _guard_kernel,
    "maxmem": _guard_maxmem,
    "template": _guard_template,
    "netvm": _guard_netvm,
    "provides_network": _guard_provides_network,
    "template_for_dispvms": _guard_template_for_dispvms,
}


# ---- refusals


def _name(qube: Holder) -> str:
    return qube.name if qube is not None else ""


def _holder(qube: Holder) -> str:
    return f"qube '{qube.name}'" if qube is not None else "the system"


def _invalid(qube: Holder, row: PropertyRow, untrusted_value: str, problem: str) -> Refusal:
    return Refusal(
        "INVALID_VALUE",
        f"Invalid value '{shown(untrusted_value)}' for property '{row.name}' of"
        f" {_holder(qube)}: {problem}",
        property=row.name,
        value=shown(untrusted_value),
        qube=_name(qube),
    )


def _refused(qube: Holder, row: PropertyRow, untrusted_value: str, problem: str) -> Refusal:
    refusal = _invalid(qube, row, untrusted_value, problem)
    return Refusal("INVALID_PROPERTY_VALUE", refusal.message, **refusal.metadata)


def _wrong_class(qube: Holder, row: PropertyRow, target: Qube, wanted: str) -> Refusal:
    return _refused(
        qube,
        row,
        target.name,
        f"wrong VM class: '{target.name}' is of type {target.klass} and not {wanted}",
    )


def _write_once(qube: Holder, row: PropertyRow) -> Refusal:
    return Refusal(
        "PROPERTY_FIXED" if row.name in _COPIED_BY_TOOLS else "PROPERTY_READ_ONLY",
        f"property '{row.name}' of {_holder(qube)} is fixed when the qube is created",
        property=row.name,
        qube=_name(qube),
    )


def is_reference_to(row: PropertyRow, klass: str) -> bool:
    """True when the row is a qube reference that holders of that class have."""
    return row.type == "qube" and has_property(klass, row.name)


def current_text(view: View, qube: Holder, row: PropertyRow) -> str:
    """The value that holds now, as the text that setting it would store."""
    value = evaluate(view, qube, row.name)
    if value is None:
        return ""
    return " ".join(value) if isinstance(value, tuple) else str(value)
