"""The one table of every property of every qube class and of the system.

Owns name, classes, types, load stage, storage, who may set it, when a change takes
effect, the default rule, what the rule reads and the help text. Must not know how a
value is computed (evaluate) or checked (setters): both are keyed by these rows.
Invariant: for each class and name at most one row; lists are ordered by (stage, name).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bulkhead.model.refusal import Refusal
from bulkhead.model.specs import APPLY_KEYS

ADMIN = "AdminVM"
APP = "AppVM"
DISP = "DispVM"
REMOTE = "RemoteVM"
STANDALONE = "StandaloneVM"
TEMPLATE = "TemplateVM"

CLASSES: tuple[str, ...] = (ADMIN, APP, DISP, REMOTE, STANDALONE, TEMPLATE)
QUBES_VM = frozenset({APP, DISP, STANDALONE, TEMPLATE})  # boot, have volumes and a network
LOCAL_VM = QUBES_VM | {ADMIN}  # everything but RemoteVM
TEMPLATE_BASED = frozenset({APP, DISP})
DISPOSABLE_TEMPLATES = frozenset({APP, STANDALONE})  # may have template_for_dispvms
_ALL = frozenset(CLASSES)


# ---- default rules; evaluate turns each into a function of (view, qube)


@dataclass(frozen=True, slots=True)
class Nothing:
    """No default: reading while unset gives nothing, GetDefault is empty."""


@dataclass(frozen=True, slots=True)
class Constant:
    """Always this value."""

    value: str | int | bool | None


@dataclass(frozen=True, slots=True)
class FromSystem:
    """The value of that system property."""

    name: str


@dataclass(frozen=True, slots=True)
class FromTemplate:
    """The template's value of the same property, or without a template the other rule."""

    otherwise: Constant | FromSystem


@dataclass(frozen=True, slots=True)
class Computed:
    """A function of the holder in evaluate.COMPUTED, by this name."""

    name: str


Rule = Nothing | Constant | FromSystem | FromTemplate | Computed


@dataclass(frozen=True, slots=True)
class PropertyRow:
    """One property of one or more classes.

    classes     qube classes that have it; empty for a system property
    type        kind of value: str int bool float list qube label pool uuid ipv4 ipv6
    wire_type   type= of the Admin API: str int bool vm label
    stage       load stage, 2 to 4
    default     default rule
    settable    False: computed, never stored, Set refuses
    write_once  fixed at creation: Set and Reset refuse
    stored      written to qubes.xml when set
    clone       copied when a qube is cloned
    when_running  what a change does while the qube runs: live, next (start), deny, fixed
    live        a change while it runs needs work in the guest or the hypervisor (APPLY)
    parts       of that work, as in specs.ApplySpec; none = all of it
    reads_facts   facts its value depends on: host kernel power device
    checks_facts  facts its setter depends on
    reference   what a named qube must be: LocalVM, TemplateVM, "netvm" (provides a
                network), "default-netvm" (no loop), "disposable-template"; "" = not a
                reference
    none_allowed  a reference may be set to no qube
    resettable  False: Reset refuses
    propagates  setting it on a template signals property-reset on qubes based on it
    help        one paragraph for a person
    """

    name: str
    classes: frozenset[str]
    type: str
    default: Rule
    help: str
    stage: int = 2
    settable: bool = True
    write_once: bool = False
    clone: bool = True
    when_running: str = "next"
    live: bool = False
    parts: tuple[str, ...] = ()
    reads_facts: frozenset[str] = frozenset()
    checks_facts: frozenset[str] = frozenset()
    reference: str = ""
    none_allowed: bool = True
    resettable: bool = True
    propagates: bool = False

    @property
    def stored(self) -> bool:
        """Written to qubes.xml when set."""
        return self.settable

    @property
    def wire_type(self) -> str:
        """The Admin API's name of the type."""
        return _WIRE_TYPES.get(self.type, "str")

    @property
    def system(self) -> bool:
        """A property of the system, not of a qube."""
        return not self.classes


_WIRE_TYPES: Mapping[str, str] = {
    "int": "int",
    "bool": "bool",
    "qube": "vm",
    "label": "label",
}


def _row(
    name: str, classes: frozenset[str] | str, kind: str, default: Rule, help_: str, **more: object
) -> PropertyRow:
    if isinstance(classes, str):
        classes = frozenset({classes})
    return PropertyRow(name, classes, kind, default, help_, **more)  # type: ignore[arg-type]


def _computed(
    name: str, classes: frozenset[str] | str, kind: str, help_: str, *facts: str, rule: str = ""
) -> PropertyRow:
    return _row(
        name,
        classes,
        kind,
        Computed(rule or name),
        help_,
        settable=False,
        when_running="fixed",
        reads_facts=frozenset(facts),
    )


_KERNEL = frozenset({"kernel"})
_NOT_ADMIN = _ALL - {ADMIN}

_QUBE_ROWS: tuple[PropertyRow, ...] = (
    # ---- identity
    _row(
        "name", _NOT_ADMIN, "str", Nothing(),
        "Name of the qube, unique on this system. It is fixed when the qube is created; to"
        " rename a qube, clone it under the new name and remove the old one.",
        write_once=True, clone=False, when_running="fixed",
    ),
    _row(
        "name", ADMIN, "str", Constant("dom0"), "Name of the administrative domain, always dom0.",
        settable=False, clone=False, when_running="fixed",
    ),
    _row(
        "qid", _NOT_ADMIN, "int", Nothing(),
        "Number of the qube on this system. Default network addresses are derived from it.",
        write_once=True, clone=False, when_running="fixed",
    ),
    _row(
        "qid", ADMIN, "int", Constant(0), "Number of the administrative domain, always 0.",
        settable=False, clone=False, when_running="fixed",
    ),
    _row(
        "uuid", _NOT_ADMIN, "uuid", Nothing(),
        "Identifier of the qube that is never given to another one; the hypervisor knows the"
        " qube by it.",
        write_once=True, clone=False, when_running="fixed",
    ),
    _row(
        "uuid", ADMIN, "uuid", Constant("00000000-0000-0000-0000-000000000000"),
        "Identifier of the administrative domain, always all zeros.",
        settable=False, clone=False, when_running="fixed",
    ),
    _row(
        "dispid", DISP, "int", Nothing(),
        "Random number of the disposable; its default name and addresses are derived from it.",
        write_once=True, clone=False, when_running="fixed",
    ),
    _row(
        "label", _ALL, "label", Nothing(),
        "Colour label that tells how much the qube is trusted.",
        when_running="live", resettable=False,
    ),
    _computed("klass", _ALL, "str", "Class of the qube."),
    _computed("icon", _ALL, "str", "Name of the icon, made of the kind of qube and its label."),
    # ---- memory, processors, boot
    _row(
        "virt_mode", QUBES_VM, "str", Computed("virt_mode"),
        "How the qube is virtualised: pvh, hvm or pv. A qube with PCI devices needs hvm.",
        reads_facts=frozenset(),
    ),
    _row(
        "memory", QUBES_VM, "int", FromTemplate(Constant(400)),
        "Memory at start, in MiB.", propagates=True,
    ),
    _row(
        "maxmem", QUBES_VM, "int", Computed("maxmem"),
        "Most memory that balancing may give to the qube, in MiB; 0 means that its memory stays"
        " fixed.",
        when_running="deny", live=True, reads_facts=frozenset({"host"}),
        checks_facts=frozenset({"host", "kernel"}), propagates=True,
    ),
    _computed("maxmem", ADMIN, "int", "Most memory of dom0, in MiB.", "host", rule="dom0_maxmem"),
    _row(
        "stubdom_mem", QUBES_VM, "int", Constant(None),
        "Memory of the device-model stub domain in MiB; only with virt_mode hvm.",
    ),
    _row(
        "vcpus", QUBES_VM, "int", FromTemplate(Constant(2)),
        "Number of virtual processors.", propagates=True,
    ),
    _row(
        "kernel", QUBES_VM, "str", FromTemplate(FromSystem("default_kernel")),
        "Installed kernel that the qube boots; empty boots the kernel from inside the qube.",
        checks_facts=_KERNEL, propagates=True,
    ),
    _row(
        "kernelopts", QUBES_VM, "str", Computed("kernelopts"),
        "Kernel command line options, added to the common ones.",
        stage=4, reads_facts=_KERNEL, propagates=True,
    ),
    _row(
        "bootmode", QUBES_VM, "str", Computed("bootmode"),
        "Boot mode, one of those that the qube or its template announced.", stage=4,
    ),
    _row(
        "appvm_default_bootmode", TEMPLATE, "str", Computed("appvm_default_bootmode"),
        "Boot mode of app qubes based on this template that have chosen none.",
        stage=4, when_running="live",
    ),
    _row(
        "debug", QUBES_VM, "bool", Constant(False),
        "Start the qube with verbose logs and a visible firmware screen.",
    ),
    _row(
        "default_user", QUBES_VM, "str", FromTemplate(Constant("user")),
        "User inside the qube that programs run as.", propagates=True,
    ),
    _row(
        "qrexec_timeout", QUBES_VM, "int", FromTemplate(FromSystem("default_qrexec_timeout")),
        "Seconds to wait for the agent when the qube starts.", propagates=True,
    ),
    _row(
        "shutdown_timeout", QUBES_VM, "int", FromTemplate(FromSystem("default_shutdown_timeout")),
        "Seconds to wait for the qube to power off.", when_running="live", propagates=True,
    ),
    _row(
        "autostart", QUBES_VM, "bool", Constant(False),
        "Start the qube when the system starts.", when_running="live",
    ),
    _row(
        "installed_by_rpm", QUBES_VM, "bool", Constant(False),
        "The package manager installed the qube, so only it may remove it.", when_running="live",
    ),
    _row(
        "include_in_backups", QUBES_VM - {DISP} | {ADMIN}, "bool", Constant(True),
        "Select the qube for a backup unless asked otherwise.", when_running="live",
    ),
    _row(
        "include_in_backups", DISP, "bool", Computed("disposable_in_backups"),
        "Select the qube for a backup unless asked otherwise; by default only when the"
        " disposable is not removed after it stops.",
        when_running="live",
    ),
    _row(
        "include_in_backups", REMOTE, "bool", Constant(False),
        "Select the qube for a backup unless asked otherwise.", when_running="live",
    ),
    _row(
        "backup_timestamp", QUBES_VM, "int", Constant(None),
        "Time of the last backup of the qube, in seconds since 1970.", when_running="live",
    ),
    # ---- other qubes
    _row(
        "template", APP, "qube", Nothing(),
        "Template whose system the qube boots from.",
        stage=4, when_running="deny", reference="TemplateVM", none_allowed=False,
        resettable=False,
    ),
    _row(
        "template", DISP, "qube", Nothing(),
        "Disposable template that the disposable is made from.",
        stage=4, when_running="deny", reference="disposable-template", none_allowed=False,
        resettable=False,
    ),
    _row(
        "default_dispvm", LOCAL_VM - {DISP}, "qube", FromSystem("default_dispvm"),
        "Disposable template for disposables that this qube asks for; empty allows none.",
        stage=4, when_running="live", reference="disposable-template",
    ),
    _row(
        "default_dispvm", DISP, "qube", Computed("own_template"),
        "Disposable template for disposables that this qube asks for; empty allows none.",
        stage=4, when_running="live", reference="disposable-template",
    ),
    _row(
        "management_dispvm", QUBES_VM, "qube", FromTemplate(FromSystem("management_dispvm")),
        "Disposable template for disposables that manage this qube.",
        stage=4, when_running="live", reference="disposable-template", propagates=True,
    ),
    _row(
        "guivm", QUBES_VM, "qube", FromSystem("default_guivm"),
        "Qube that shows the windows of this one.",
        stage=4, when_running="live", live=True, parts=(APPLY_KEYS,), reference="LocalVM",
    ),
    _row(
        "audiovm", QUBES_VM, "qube", FromSystem("default_audiovm"),
        "Qube that plays the sound of this one.",
        stage=4, when_running="live", live=True, parts=(APPLY_KEYS,), reference="LocalVM",
    ),
    _row(
        "netvm", QUBES_VM - {TEMPLATE}, "qube", FromSystem("default_netvm"),
        "Qube that gives this one its network; empty means no network.",
        stage=4, when_running="live", live=True, reference="netvm",
    ),
    _row(
        "netvm", TEMPLATE, "qube", Constant(None),
        "Qube that gives this template its network; none by default.",
        stage=4, when_running="live", live=True, reference="netvm",
    ),
    _row(
        "relayvm", REMOTE, "qube", Constant(None),
        "Local qube that carries the calls to this remote one.",
        stage=4, when_running="live", live=True, reference="LocalVM",
    ),
    # ---- disposables
    _row(
        "template_for_dispvms", DISPOSABLE_TEMPLATES, "bool", Constant(False),
        "Disposables may be made from this qube.", when_running="live",
    ),
    _row(
        "auto_cleanup", DISP, "bool", Constant(False),
        "Remove the disposable after it stops.", when_running="live",
    ),
    _computed("is_preload", DISP, "bool", "The disposable was made ahead and waits to be used."),
    # ---- network
    _row(
        "provides_network", QUBES_VM, "bool", Constant(False),
        "Other qubes may use this one as their netvm.", when_running="live",
    ),
    _row(
        "mac", QUBES_VM, "str", Constant("00:16:3e:5e:6c:00"),
        "Hardware address of the qube's network interface.",
    ),
    _row(
        "ip", QUBES_VM, "ipv4", Computed("ip"),
        "IPv4 address of the qube; derived from its number unless set.",
    ),
    _row(
        "ip6", QUBES_VM, "ipv6", Computed("ip6"),
        "IPv6 address of the qube; by default only where the feature ipv6 is on.",
    ),
    _computed("visible_ip", QUBES_VM, "str", "IPv4 address that the qube itself sees."),
    _computed("visible_ip6", QUBES_VM, "str", "IPv6 address that the qube itself sees."),
    _computed("visible_gateway", QUBES_VM, "str", "IPv4 gateway that the qube itself sees."),
    _computed("visible_gateway6", QUBES_VM, "str", "IPv6 gateway that the qube itself sees."),
    _computed("visible_netmask", QUBES_VM, "str", "Network mask that the qube itself sees."),
    _computed("gateway", QUBES_VM, "str", "IPv4 gateway that the qube is for its clients."),
    _computed("gateway6", QUBES_VM, "str", "IPv6 gateway that the qube is for its clients."),
    _computed("dns", QUBES_VM, "list", "Addresses of the name servers that the qube uses."),
    # ---- devices and input
    _row(
        "devices_denied", LOCAL_VM, "str", Constant(""),
        "Device interfaces that may not be attached to the qube by hand: patterns of seven"
        " characters, one after another.",
        when_running="live",
    ),
    _row(
        "keyboard_layout", QUBES_VM, "str", Computed("keyboard_layout"),
        "Keyboard layout, variant and options, joined by plus signs.",
        when_running="live", live=True, parts=(APPLY_KEYS,),
    ),
    _row(
        "keyboard_layout", ADMIN, "str", Constant("us++"),
        "Keyboard layout, variant and options, joined by plus signs.",
        when_running="live", live=True, parts=(APPLY_KEYS,),
    ),
    # ---- state
    _computed("updateable", LOCAL_VM, "bool", "System updates are installed inside this qube."),
    _computed(
        "xid", QUBES_VM, "int", "Number of the running domain, -1 while it is off.", "power"
    ),
    _computed(
        "stubdom_xid", QUBES_VM, "int", "Number of the device-model stub domain, -1 without one.",
        "power",
    ),
    _computed(
        "stubdom_uuid", QUBES_VM, "str", "Identifier of the device-model stub domain.", "power"
    ),
    _computed(
        "start_time", QUBES_VM, "float", "Time when the qube was started, in seconds since 1970.",
        "power",
    ),
    # ---- remote
    _row(
        "transport_rpc", REMOTE, "str", Constant(None),
        "Service in the relay qube that carries calls to this remote one.", when_running="live",
    ),
    _row(
        "remote_name", REMOTE, "str", Constant(None),
        "Name of the qube on the remote system, where it differs from the local one.",
        when_running="live",
    ),
)  # fmt: skip


def _system(name: str, kind: str, default: Rule, help_: str, **more: object) -> PropertyRow:
    return _row(name, frozenset(), kind, default, help_, stage=3, when_running="live", **more)


_SYSTEM: tuple[PropertyRow, ...] = (
    _system(
        "default_guivm", "qube", Constant("dom0"),
        "Qube that shows the windows of qubes that have chosen none.",
        live=True, reference="LocalVM",
    ),
    _system(
        "default_audiovm", "qube", Constant("dom0"),
        "Qube that plays the sound of qubes that have chosen none.",
        live=True, reference="LocalVM",
    ),
    _system(
        "default_netvm", "qube", Constant(None),
        "Network qube of qubes that have chosen none.",
        live=True, reference="default-netvm",
    ),
    _system(
        "default_template", "qube", Nothing(),
        "Template of new app qubes for which none is given.", reference="TemplateVM",
    ),
    _system(
        "updatevm", "qube", Constant(None),
        "Qube through which dom0 downloads its updates.", reference="LocalVM",
    ),
    _system(
        "clockvm", "qube", Constant(None),
        "Qube whose clock the others follow.", reference="LocalVM",
    ),
    _system(
        "default_kernel", "str", Nothing(),
        "Installed kernel of qubes that have chosen none.", checks_facts=_KERNEL,
        resettable=False,
    ),
    _system(
        "default_dispvm", "qube", Constant(None),
        "Disposable template for qubes that have chosen none.", reference="disposable-template",
    ),
    _system(
        "management_dispvm", "qube", Constant(None),
        "Disposable template for managing qubes that have chosen none.",
        reference="disposable-template",
    ),
    _system(
        "default_pool", "pool", Computed("default_pool"),
        "Storage pool of new volumes for which none is given.",
    ),
    _system(
        "default_pool_kernel", "pool", FromSystem("default_pool"), "Storage pool of kernels.",
    ),
    _system(
        "default_pool_private", "pool", FromSystem("default_pool"),
        "Storage pool of new private volumes.",
    ),
    _system(
        "default_pool_root", "pool", FromSystem("default_pool"),
        "Storage pool of new root volumes.",
    ),
    _system(
        "default_pool_volatile", "pool", FromSystem("default_pool"),
        "Storage pool of new volatile volumes.",
    ),
    _system(
        "default_qrexec_timeout", "int", Constant(60),
        "Seconds to wait for the agent of a starting qube that has chosen nothing else.",
    ),
    _system(
        "default_shutdown_timeout", "int", Constant(60),
        "Seconds to wait for a stopping qube that has chosen nothing else.",
    ),
    _system(
        "stats_interval", "int", Constant(3), "Seconds between two rounds of statistics.",
    ),
    _system(
        "check_updates_vm", "bool", Constant(True), "New qubes look for updates by themselves.",
    ),
    _system(
        "maxmem", "int", Computed("host_memory"), "Memory of the whole host, in MiB.",
        settable=False, reads_facts=frozenset({"host"}),
    ),
    _system(
        "no_cpus", "int", Computed("host_cpus"), "Number of processors of the host.",
        settable=False, reads_facts=frozenset({"host"}),
    ),
)  # fmt: skip


def _ordered(rows: tuple[PropertyRow, ...]) -> tuple[PropertyRow, ...]:
    return tuple(sorted(rows, key=lambda row: (row.stage, row.name)))


SYSTEM_ROWS: tuple[PropertyRow, ...] = _ordered(_SYSTEM)
_BY_CLASS: Mapping[str, tuple[PropertyRow, ...]] = {
    klass: _ordered(tuple(row for row in _QUBE_ROWS if klass in row.classes)) for klass in CLASSES
}
_INDEX: Mapping[str | None, Mapping[str, PropertyRow]] = {
    None: {row.name: row for row in SYSTEM_ROWS},
    **{klass: {row.name: row for row in rows} for klass, rows in _BY_CLASS.items()},
}
# A class that this release does not know (from a file of another one): its qubes are
# quarantined, but listed, so what all classes have is answered.
UNKNOWN_CLASS = ""
_COMMON = tuple(
    row
    for row in _BY_CLASS[REMOTE]
    if row.name in {"name", "qid", "uuid", "label", "klass", "icon"}
)
_COMMON_INDEX: Mapping[str, PropertyRow] = {row.name: row for row in _COMMON}
ALL_ROWS: tuple[PropertyRow, ...] = _QUBE_ROWS + SYSTEM_ROWS


def rows_for(klass: str | None) -> tuple[PropertyRow, ...]:
    """Rows of a class, or with None of the system, in wire and storage order."""
    return SYSTEM_ROWS if klass is None else _BY_CLASS.get(klass, _COMMON)


def has_property(klass: str | None, name: str) -> bool:
    """True when holders of that class (None: the system) have the property."""
    return name in _INDEX.get(klass, _COMMON_INDEX)


def find_row(klass: str | None, name: str) -> PropertyRow:
    """The row of a class (None: of the system); Refusal NO_SUCH_PROPERTY."""
    row = _INDEX.get(klass, _COMMON_INDEX).get(name)
    if row is None:
        shown = name if name.isascii() and name.isprintable() else ascii(name)
        holder = "the system" if klass is None else f"qubes of class {klass}"
        raise Refusal(
            "NO_SUCH_PROPERTY",
            f"Invalid property '{shown}': {holder} has none of that name"
            if klass is None
            else f"Invalid property '{shown}': {holder} have none of that name",
            property=shown,
            klass=klass or "",
        )
    return row
