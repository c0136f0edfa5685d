"""The only evaluator of properties: stored values, defaults and what is computed.

Owns every default rule of the property table, the rendering of values, the wire state
and the kernel command line. Must not know who asks, nor change anything. Invariant:
pure functions of the view, at a cost that does not depend on the number of qubes; a
default is computed on every read and never stored.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from bulkhead.model import addresses, kernelopts
from bulkhead.model.devices import matching
from bulkhead.model.features import (
    feature,
    netvm_chain,
    netvm_name,
    netvm_of,
    template_chain,
    template_of,
    truthy,
)
from bulkhead.model.power import current_power, state_of
from bulkhead.model.properties import (
    ADMIN,
    APP,
    CLASSES,
    DISP,
    QUBES_VM,
    REMOTE,
    STANDALONE,
    TEMPLATE,
    TEMPLATE_BASED,
    UNKNOWN_CLASS,
    Computed,
    Constant,
    FromSystem,
    FromTemplate,
    Nothing,
    PropertyRow,
    Rule,
    find_row,
    has_property,
    rows_for,
)
from bulkhead.model.records import ADMINVM_UUID, Phase, Qube
from bulkhead.model.view import View

__all__ = [
    "COMPUTED",
    "NO_DEFAULT",
    "Missing",
    "Value",
    "common_options",
    "default_of",
    "effective_default_user",
    "evaluate",
    "feature",
    "get_all_lines",
    "get_reply",
    "guest_reads_rules",
    "has_pci",
    "is_default",
    "is_halted",
    "is_namespace_netvm",
    "is_preload",
    "is_running",
    "kernel_command_line",
    "netvm_chain",
    "netvm_name",
    "netvm_of",
    "power_state",
    "provides_network",
    "template_chain",
    "template_for_dispvms",
    "template_of",
    "to_wire",
    "truthy",
]

Value = str | int | float | bool | tuple[str, ...] | None
"""A property's value: a reference, label or pool is a name; None = none."""


class Missing(enum.Enum):
    """What default_of gives where there is no default."""

    NO_DEFAULT = "no default"


NO_DEFAULT: Final = Missing.NO_DEFAULT

_Default = Callable[[View, Qube], Value | Missing]
_SystemDefault = Callable[[View], Value | Missing]

_BASE_DIR = "/var/lib/qubes"


# ---- entry points


def evaluate(view: View, qube: Qube | None, name: str) -> Value:
    """The value that readers get; qube None = system property.

    None where there is neither a value nor a default. Refusal NO_SUCH_PROPERTY.
    """
    if qube is None:
        system = _SYSTEM.get(name)
        if system is None:
            find_row(None, name)
            raise AssertionError(name)
        text = view.properties.get(name)
        if text is not None and system.decode is not None:
            return system.decode(text)
        value = system.default(view)
    else:
        reader = _READERS.get(qube.klass, _UNKNOWN).get(name)
        if reader is None:
            find_row(qube.klass, name)
            raise AssertionError(name)
        if reader.own is not None:
            return reader.own(qube)
        if reader.decode is not None:
            text = qube.properties.get(name)
            if text is not None:
                return reader.decode(text)
        value = reader.default(view, qube)
    return None if value is NO_DEFAULT else value


def default_of(view: View, qube: Qube | None, name: str) -> Value | Missing:
    """The value that the property has, or would have, unset; NO_DEFAULT where none."""
    if qube is None:
        find_row(None, name)
        return _SYSTEM[name].default(view)
    find_row(qube.klass, name)
    return _READERS.get(qube.klass, _UNKNOWN)[name].default(view, qube)


def is_default(view: View, qube: Qube | None, name: str) -> bool:
    """True when no value is stored, whatever the values are."""
    if qube is None:
        return not (find_row(None, name).stored and name in view.properties)
    row = find_row(qube.klass, name)
    if not row.stored:
        return True
    if _READERS.get(qube.klass, _UNKNOWN)[name].own is not None:
        return False
    return name not in qube.properties


def to_wire(row: PropertyRow, value: Value) -> str:
    """A value as the Admin API writes it; None is the empty string."""
    del row  # the text depends on the value alone; the row keeps the call self-describing
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " ".join(value)
    return str(value)


def get_reply(view: View, qube: Qube | None, row: PropertyRow) -> str:
    """The reply of property Get: "default=True type=int 400"."""
    value = evaluate(view, qube, row.name)
    return f"default={is_default(view, qube, row.name)} type={row.wire_type} {to_wire(row, value)}"


def get_all_lines(view: View, qube: Qube | None, rows: Iterable[PropertyRow] | None = None) -> str:
    """The reply of property GetAll, for these rows or all of the holder."""
    if rows is None:
        rows = rows_for(None if qube is None else qube.klass)
    lines = []
    for row in rows:
        text = get_reply(view, qube, row)
        if "\\" in text or "\n" in text:
            text = text.replace("\\", "\\\\").replace("\n", "\\n")
        lines.append(f"{row.name} {text}\n")
    return "".join(lines)


# ---- state


def power_state(view: View, qube: Qube) -> str:
    """The state that clients see; dom0 and remote qubes always run."""
    if qube.klass in (ADMIN, REMOTE):
        return "Running"
    power = current_power(view, qube)
    waits = power is not None and not power.agent and truthy(view, qube, "qrexec", "template")
    return state_of(qube.run.phase, power, waits_for_agent=waits)


def is_halted(view: View, qube: Qube) -> bool:
    """True when nothing of the qube runs, starts or stops: what guards must ask."""
    del view
    return qube.klass not in (ADMIN, REMOTE) and qube.run.phase is Phase.HALTED


def is_leftover(view: View, qube: Qube) -> bool:
    """True for an unnamed disposable that is halted and that no operation holds."""
    return (
        qube.klass == DISP
        and qube.run.phase is Phase.HALTED
        and bool(evaluate(view, qube, "auto_cleanup"))
        and not any(True for _ in view.operations_on(qube.uuid))
    )


def is_running(view: View, qube: Qube) -> bool:
    """True when the qube can serve others now: started and not stopping."""
    del view
    return qube.klass in (ADMIN, REMOTE) or qube.run.phase is Phase.UP


# ---- typed helpers over evaluate


def has_pci(qube: Qube) -> bool:
    """True when a PCI device is assigned, in any mode."""
    return any(device.devclass == "pci" for device in qube.devices)


def provides_network(qube: Qube) -> bool:
    """The property provides_network, False for classes without it."""
    return qube.properties.get("provides_network") == "True" and has_property(
        qube.klass, "provides_network"
    )


def is_namespace_netvm(view: View, qube: Qube) -> bool:
    """True where the qube runs as a network namespace instead of a guest (no Xen)."""
    host = view.host
    if host is None or host.hypervisor in ("xen", "sim"):
        return False
    return provides_network(qube)


def guest_reads_rules(view: View, client: Qube) -> bool:
    """True where the client runs, or is about to, behind a netvm that is a guest: that one
    enforces what its keys say, so new rules have to be written there."""
    if client.klass not in QUBES_VM or client.run.phase is Phase.HALTED:
        return False
    netvm = netvm_of(view, client)
    return (
        netvm is not None
        and netvm.uuid != ADMINVM_UUID
        and netvm.run.phase is not Phase.HALTED
        and not is_namespace_netvm(view, netvm)
    )


def template_for_dispvms(qube: Qube) -> bool:
    """The property template_for_dispvms, False for classes without it."""
    return qube.properties.get("template_for_dispvms") == "True" and has_property(
        qube.klass, "template_for_dispvms"
    )


def is_preload(view: View, qube: Qube) -> bool:
    """True when the disposable is on its template's list of preloaded ones."""
    template = template_of(view, qube) if qube.klass == DISP else None
    if template is None:
        return False
    names = template.features.get("preload-dispvm")
    return names is not None and qube.name in names.split()


def effective_default_user(view: View, qube: Qube) -> str:
    """The user that programs run as: the boot mode's, else default_user."""
    mode = _text(view, qube, "bootmode")
    if mode != "default":
        user = feature(view, qube, f"boot-mode.default-user.{mode}", "template")
        if user:
            return user
    return _text(view, qube, "default_user")


def common_options(view: View, qube: Qube) -> str:
    """Kernel options put before kernelopts; "" without a dom0 kernel."""
    kernel = _text(view, qube, "kernel")
    wanted = feature(view, qube, "no-nomodeset", "template")
    return kernelopts.common_options(
        kernel,
        view.kernel(kernel),
        uuid=qube.uuid,
        linux=feature(view, qube, "os", "template") == "Linux",
        drop_nomodeset=bool(wanted) if wanted is not None else _has_display(view, qube),
    )


def kernel_command_line(view: View, qube: Qube) -> str:
    """The kernel command line that the qube is started with."""
    return kernelopts.command_line(
        common_options(view, qube),
        _text(view, qube, "kernelopts"),
        _bootmode_options(view, qube),
        bare=truthy(view, qube, "no-default-kernelopts", "template"),
        apparmor=feature(view, qube, "apparmor", "template") or "",
        selinux=feature(view, qube, "selinux", "template") or "",
    )


def _text(view: View, qube: Qube, name: str) -> str:
    value = evaluate(view, qube, name)
    return value if isinstance(value, str) else ""


def _number(view: View, qube: Qube, name: str) -> int:
    value = evaluate(view, qube, name)
    return value if isinstance(value, int) else 0


def _has_display(view: View, qube: Qube) -> bool:
    return any(
        kernelopts.is_display_interface(fact.interfaces[at : at + 7])
        for device in qube.devices
        if device.devclass == "pci"
        for fact, _backend in matching(view, device)
        for at in range(0, len(fact.interfaces), 7)
    )


# ---- computed defaults, by the names of the property table


def _own_name(_view: View, qube: Qube) -> Value:
    return qube.klass


def _icon(_view: View, qube: Qube) -> Value:
    if qube.klass == ADMIN:
        return "adminvm-black"
    label = qube.properties.get("label")
    if not label:
        return None
    if qube.klass == TEMPLATE or (qube.klass == APP and template_for_dispvms(qube)):
        kind = "templatevm"
    elif qube.features.get("servicevm"):
        kind = "servicevm"
    else:
        kind = _ICON_KINDS.get(qube.klass, "appvm")
    return f"{kind}-{label}"


_ICON_KINDS = {DISP: "dispvm", STANDALONE: "standalonevm", REMOTE: "remotevm"}


def _virt_mode(view: View, qube: Qube) -> Value:
    if has_pci(qube):
        return "hvm"
    template = template_of(view, qube)
    return evaluate(view, template, "virt_mode") if _has(template, "virt_mode") else "pvh"


def _maxmem(view: View, qube: Qube) -> Value:
    host = view.host
    if host is not None and host.hypervisor not in ("xen", "sim"):
        return 0
    if has_pci(qube):
        return 0
    if _text(view, qube, "virt_mode") == "hvm":
        if not truthy(view, qube, "qrexec", "template"):
            return 0
        if not truthy(view, qube, "supported-service.meminfo-writer", "template") and any(
            name.startswith("supported-service.")
            for holder in (qube, *template_chain(view, qube))
            for name in holder.features
        ):
            return 0
    template = template_of(view, qube)
    if _has(template, "maxmem"):
        return evaluate(view, template, "maxmem")
    ceiling = _number(view, qube, "memory") * 10 if qube.features.get("os") == "Linux" else 4000
    if host is not None and host.memory_kib:
        ceiling = min(ceiling, host.memory_kib // 1024 // 2)
    return ceiling


def _dom0_maxmem(view: View, _qube: Qube) -> Value:
    host = view.host
    return host.dom0_maxmem_mib if host is not None else 4096


def _kernelopts(view: View, qube: Qube) -> Value:
    name = _text(view, qube, "kernel")
    if not name:
        return ""
    if has_pci(qube):
        admin = view.by_uuid_any(ADMINVM_UUID)
        s0ix = admin is not None and bool(admin.features.get("suspend-s0ix"))
        return kernelopts.default_with_pci(view.kernel(name), s0ix=s0ix)
    template = template_of(view, qube)
    if _has(template, "kernelopts"):
        return evaluate(view, template, "kernelopts")
    return kernelopts.default_without_pci(view.kernel(name))


def _bootmode_exists(view: View, qube: Qube, mode: str) -> bool:
    return mode == "default" or (
        feature(view, qube, f"boot-mode.kernelopts.{mode}", "template") is not None
    )


def _bootmode(view: View, qube: Qube) -> Value:
    active = qube.features.get("boot-mode.active")
    if active is not None and _bootmode_exists(view, qube, active):
        return active
    for template in template_chain(view, qube):
        if template.klass == TEMPLATE:
            mode = _text(view, template, "appvm_default_bootmode")
            if _bootmode_exists(view, qube, mode):
                return mode
    return "default"


def _appvm_default_bootmode(_view: View, qube: Qube) -> Value:
    return qube.features.get("boot-mode.appvm-default") or "default"


def _bootmode_options(view: View, qube: Qube) -> str:
    mode = _text(view, qube, "bootmode")
    for candidate in (mode, _bootmode(view, qube)):
        if candidate == "default":
            return ""
        options = feature(view, qube, f"boot-mode.kernelopts.{candidate}", "template")
        if options is not None:
            return options
    return ""


def _disposable_in_backups(_view: View, qube: Qube) -> Value:
    return qube.properties.get("auto_cleanup") != "True"


def _own_template(_view: View, qube: Qube) -> Value:
    return qube.properties.get("template") or None


def _keyboard_layout(view: View, qube: Qube) -> Value:
    # Follows guivm to guivm; they may form a circle, where the last resort ends it.
    seen = {qube.uuid}
    current = qube
    while has_property(current.klass, "guivm"):
        name = current.properties.get("guivm")
        if name is None:
            name = view.properties.get("default_guivm", "dom0")
        following = view.qube(name) if name else None
        if following is None or following.uuid in seen:
            break
        layout = following.properties.get("keyboard_layout")
        if layout is not None:
            return layout
        seen.add(following.uuid)
        current = following
    return "us++"


def _updateable(_view: View, qube: Qube) -> Value:
    return qube.klass not in TEMPLATE_BASED


def _xid(view: View, qube: Qube) -> Value:
    power = current_power(view, qube)
    return power.xid if power is not None and power.power != "halted" else -1


def _stubdom_xid(view: View, qube: Qube) -> Value:
    power = current_power(view, qube)
    if power is None or power.power == "halted" or _text(view, qube, "virt_mode") != "hvm":
        return -1
    return power.stubdom_xid


def _stubdom_uuid(view: View, qube: Qube) -> Value:
    if _stubdom_xid(view, qube) == -1:
        return ""
    power = current_power(view, qube)
    return power.stubdom_uuid if power is not None else ""


def _start_time(view: View, qube: Qube) -> Value:
    power = current_power(view, qube)
    return power.start_time if power is not None and power.power != "halted" else None


# network


def _networked(view: View, qube: Qube) -> bool:
    return provides_network(qube) or netvm_of(view, qube) is not None


def _wants_ipv6(view: View, qube: Qube) -> bool:
    return truthy(view, qube, "ipv6", "netvm")


def _address_number(qube: Qube) -> tuple[int, bool]:
    if qube.klass == DISP:
        dispid = qube.properties.get("dispid")
        return (int(dispid) if dispid is not None else 0), True
    return qube.qid, False


def _ip(view: View, qube: Qube) -> Value:
    if not _networked(view, qube):
        return None
    number, disposable = _address_number(qube)
    return addresses.ipv4(number, disposable=disposable)


def _ip6(view: View, qube: Qube) -> Value:
    if not _networked(view, qube) or not _wants_ipv6(view, qube):
        return None
    number, disposable = _address_number(qube)
    return addresses.ipv6(number, disposable=disposable)


def _visible_ip(view: View, qube: Qube) -> Value:
    return feature(view, qube, "net.fake-ip", "template") or evaluate(view, qube, "ip")


def _visible_ip6(view: View, qube: Qube) -> Value:
    return evaluate(view, qube, "ip6")


def _gateway(view: View, qube: Qube) -> Value:
    return _visible_ip(view, qube) if provides_network(qube) else None


def _gateway6(view: View, qube: Qube) -> Value:
    if not provides_network(qube) or not _wants_ipv6(view, qube):
        return None
    return _visible_ip6(view, qube)


def _visible_gateway(view: View, qube: Qube) -> Value:
    fake = feature(view, qube, "net.fake-gateway", "template")
    if fake:
        return fake
    netvm = netvm_of(view, qube)
    return evaluate(view, netvm, "gateway") if _has(netvm, "gateway") else None


def _visible_gateway6(view: View, qube: Qube) -> Value:
    if not _wants_ipv6(view, qube):
        return None
    netvm = netvm_of(view, qube)
    return evaluate(view, netvm, "gateway6") if _has(netvm, "gateway6") else None


def _visible_netmask(view: View, qube: Qube) -> Value:
    fake = feature(view, qube, "net.fake-netmask", "template")
    if fake:
        return fake
    netvm = netvm_of(view, qube)
    return addresses.NETMASK if netvm is not None and _networked(view, netvm) else None


def _dns(view: View, qube: Qube) -> Value:
    return addresses.DNS if _networked(view, qube) else None


def _has(qube: Qube | None, name: str) -> bool:
    return qube is not None and has_property(qube.klass, name)


# system


def _default_pool(view: View) -> Value | Missing:
    """The pool called default, else the one of files that holds the installation.

    That is the pool whose folder is the standard one, or has the kernels' pool in it.
    """
    if "default" in view.pools:
        return "default"
    homes = {_BASE_DIR}
    for pool in view.pools.values():
        if pool.driver == "linux-kernel":
            homes.add(pool.options.get("dir_path", "").rstrip("/").rpartition("/")[0])
    for pool in view.pools.values():
        folder = pool.options.get("dir_path", "").rstrip("/")
        if pool.driver in ("file", "file-reflink") and folder in homes:
            return pool.name
    return NO_DEFAULT


def _host_memory(view: View) -> Value:
    host = view.host
    return host.memory_kib // 1024 if host is not None else None


def _host_cpus(view: View) -> Value:
    host = view.host
    return host.cpus if host is not None else None


COMPUTED: Mapping[str, _Default] = {
    "klass": _own_name,
    "icon": _icon,
    "virt_mode": _virt_mode,
    "maxmem": _maxmem,
    "dom0_maxmem": _dom0_maxmem,
    "kernelopts": _kernelopts,
    "bootmode": _bootmode,
    "appvm_default_bootmode": _appvm_default_bootmode,
    "disposable_in_backups": _disposable_in_backups,
    "own_template": _own_template,
    "is_preload": is_preload,
    "keyboard_layout": _keyboard_layout,
    "updateable": _updateable,
    "xid": _xid,
    "stubdom_xid": _stubdom_xid,
    "stubdom_uuid": _stubdom_uuid,
    "start_time": _start_time,
    "ip": _ip,
    "ip6": _ip6,
    "visible_ip": _visible_ip,
    "visible_ip6": _visible_ip6,
    "visible_gateway": _visible_gateway,
    "visible_gateway6": _visible_gateway6,
    "visible_netmask": _visible_netmask,
    "gateway": _gateway,
    "gateway6": _gateway6,
    "dns": _dns,
}
COMPUTED_SYSTEM: Mapping[str, _SystemDefault] = {
    "default_pool": _default_pool,
    "host_memory": _host_memory,
    "host_cpus": _host_cpus,
}


# ---- readers: each row turned into functions once, at import


def _as_bool(text: str) -> Value:
    return text == "True"


def _as_reference(text: str) -> Value:
    return text or None


def _as_text(text: str) -> Value:
    return text


def _decoder(row: PropertyRow) -> Callable[[str], Value] | None:
    if not row.stored:
        return None
    match row.type:
        case "int":
            return int
        case "bool":
            return _as_bool
        case "qube" | "label" | "pool":
            return _as_reference
        case _:
            return _as_text


class _Reader:
    __slots__ = ("decode", "default", "own")

    def __init__(self, row: PropertyRow, klass: str) -> None:
        self.own: Callable[[Qube], Value] | None = None
        if row.name in ("name", "qid", "uuid") and klass != ADMIN:
            self.own = _OWN[row.name]
        self.decode = _decoder(row)
        self.default = _qube_rule(row.default, row.name)


class _SystemReader:
    __slots__ = ("decode", "default")

    def __init__(self, row: PropertyRow) -> None:
        self.decode = _decoder(row)
        self.default = _system_rule(row.default)


_OWN: Mapping[str, Callable[[Qube], Value]] = {
    "name": lambda qube: qube.name,
    "qid": lambda qube: qube.qid,
    "uuid": lambda qube: qube.uuid,
}


def _qube_rule(rule: Rule, name: str) -> _Default:
    match rule:
        case Nothing():
            return lambda _view, _qube: NO_DEFAULT
        case Constant(value):
            return lambda _view, _qube: value
        case FromSystem(system):
            return lambda view, _qube: _system_value(view, system)
        case FromTemplate(otherwise):
            fallback = _qube_rule(otherwise, name)

            def from_template(view: View, qube: Qube) -> Value | Missing:
                template = template_of(view, qube)
                if template is None or not has_property(template.klass, name):
                    return fallback(view, qube)
                reader = _READERS[template.klass][name]
                text = template.properties.get(name)
                if text is not None and reader.decode is not None:
                    return reader.decode(text)
                return reader.default(view, template)

            return from_template
        case Computed(function):
            return COMPUTED[function]


def _system_rule(rule: Rule) -> _SystemDefault:
    match rule:
        case Nothing():
            return lambda _view: NO_DEFAULT
        case Constant(value):
            return lambda _view: value
        case FromSystem(system):
            return lambda view: _system_value(view, system)
        case Computed(function):
            return COMPUTED_SYSTEM[function]
        case FromTemplate():
            raise AssertionError("the system has no template")


def _system_value(view: View, name: str) -> Value | Missing:
    reader = _SYSTEM[name]
    text = view.properties.get(name)
    if text is not None and reader.decode is not None:
        return reader.decode(text)
    return reader.default(view)


_SYSTEM: Mapping[str, _SystemReader] = {row.name: _SystemReader(row) for row in rows_for(None)}
_READERS: Mapping[str, Mapping[str, _Reader]] = {
    klass: {row.name: _Reader(row, klass) for row in rows_for(klass)} for klass in CLASSES
}
_UNKNOWN: Mapping[str, _Reader] = {
    row.name: _Reader(row, UNKNOWN_CLASS) for row in rows_for(UNKNOWN_CLASS)
}
