"""Guest keys (QubesDB) of a qube, as the core writes them at start and on change.

Owns the content of the tree (domain-model section 8). Must not write it anywhere.
Invariant: a key or value that QubesDB would refuse is never produced silently; it is
left out and named in `refused`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bulkhead.model import addresses
from bulkhead.model.evaluate import effective_default_user, evaluate, is_running, provides_network
from bulkhead.model.features import exported_keys, feature, truthy
from bulkhead.model.firewall_rules import iptables_owner
from bulkhead.model.power import current_power
from bulkhead.model.records import Phase, Qube
from bulkhead.model.view import View
from services.lifecycle.core.boot import netvm, text

KEY_LIMIT = 63
VALUE_LIMIT = 3072
_KEY = re.compile(r"/[a-zA-Z0-9_.:/-]+")
# Keys of display and sound that may be there or not.
_GUI = (
    "/qubes-gui-videoram-overhead",
    "/qubes-gui-videoram-min",
    "/keyboard-layout",
    "/qubes-gui-domain-xid",
    "/guivm-windows-prefix",
    "/qubes-audio-domain-xid",
)


@dataclass(frozen=True, slots=True)
class Tree:
    """Keys to write in order, keys or subtrees ("/x/") to remove first, and what was refused."""

    write: tuple[tuple[str, str], ...]
    remove: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def boot_tree(view: View, qube: Qube, *, timezone: str, seed: bytes) -> Tree:
    """Everything written at start. timezone: Olson name or ""; seed: 64 random bytes."""
    keys: list[tuple[str, str]] = []
    keys.extend(_identity(view, qube))
    keys.append(("/qubes-random-seed", base64.b64encode(hashlib.sha512(seed).digest()).decode()))
    keys.extend(_provider(view, qube))
    keys.extend(_client(view, qube))
    keys.extend(_timezone(view, qube, timezone))
    keys.append(("/qubes-block-devices", ""))
    keys.append(("/qubes-usb-devices", ""))
    keys.extend(_kind(view, qube))
    keys.extend(_exported(view, qube))
    keys.extend(_gui(view, qube))
    keys.extend(_relayed(view, qube))
    if provides_network(qube):
        keys.extend(connected(view, qube))
    return _checked(keys)


def core_tree(view: View, qube: Qube, *, timezone: str) -> Tree:
    """What the core itself writes, again: when the netvm of a running qube changes. Not the
    seed nor the lists, which are the guest's by now."""
    remove = (
        "/qubes-timezone",
        "/qubes-mac",
        "/qubes-ip",
        "/qubes-netmask",
        "/qubes-gateway",
        "/qubes-primary-dns",
        "/qubes-secondary-dns",
        "/qubes-ip6",
        "/qubes-gateway6",
    )
    tree = _checked(
        [
            *_identity(view, qube),
            *_provider(view, qube),
            *_client(view, qube),
            *_timezone(view, qube, timezone),
            *(connected(view, qube) if provides_network(qube) else ()),
        ]
    )
    written = {key for key, _ in tree.write}
    return Tree(tree.write, tuple(key for key in remove if key not in written), tree.refused)


def exported_tree(view: View, qube: Qube) -> Tree:
    """Services, vm-config, persist, GUI, audio and relay keys: rewritten when they change."""
    tree = _checked([*_exported(view, qube), *_gui(view, qube), *_relayed(view, qube)])
    written = {key for key, _ in tree.write}
    remove = (
        "/qubes-service/",
        "/hash-app-dispvm/",
        "/vm-config/",
        "/persist/",
        "/remote/",
        *(key for key in _GUI if key not in written),
    )
    return Tree(tree.write, remove, tree.refused)


def connected_tree(view: View, provider: Qube) -> Tree:
    """/connected-ips of a netvm after a client came, left or changed its address."""
    return _checked(list(connected(view, provider)))


def mapped_tree(view: View, qube: Qube) -> Tree:
    """/mapped-ip of one client on its netvm: the addresses that the client is shown."""
    ip = text(evaluate(view, qube, "ip"))
    if not ip:
        return Tree(())
    base = f"/mapped-ip/{ip}"
    write: list[tuple[str, str]] = []
    remove: list[str] = []
    for key, prop in (("visible-ip", "visible_ip"), ("visible-gateway", "visible_gateway")):
        value = text(evaluate(view, qube, prop))
        if value:
            write.append((f"{base}/{key}", value))
        else:
            remove.append(f"{base}/{key}")
    return Tree(_checked(write).write, tuple(remove))


def own_addresses(view: View, qube: Qube) -> tuple[str, str]:
    """IPv4 and IPv6 that the qube has with a netvm, whether or not it has one now."""
    disposable = qube.klass == "DispVM"
    number = int(qube.properties.get("dispid", "0")) if disposable else qube.qid
    return (
        text(evaluate(view, qube, "ip")) or addresses.ipv4(number, disposable=disposable),
        text(evaluate(view, qube, "ip6")) or addresses.ipv6(number, disposable=disposable),
    )


def reads_iptables(view: View, provider: Qube) -> bool:
    """The network qube, a guest, does not say that it knows /qubes-firewall: it is given
    iptables-save text too."""
    return provider.klass != "AdminVM" and not truthy(view, provider, "qubes-firewall", "template")


@dataclass(frozen=True, slots=True)
class Texts:
    """iptables-save texts of a client: those below a path that have one of the lines, and
    the key that says that they have changed."""

    below: str
    lines: tuple[str, ...]
    news: tuple[str, str]


def iptables_texts(view: View, qube: Qube) -> Texts:
    """All of the qube, and of its address, whichever boot left them."""
    return Texts(
        "/qubes-iptables-domainrules/",
        iptables_owner(qube.uuid, own_addresses(view, qube)[0]),
        ("/qubes-iptables", "reload"),
    )


def _exported(view: View, qube: Qube) -> Iterator[tuple[str, str]]:
    # Services under their names of long ago, where a feature of today has another name.
    for name, source in (
        ("ntpd", "service.ntpd"),
        ("qubes-update-check", "check-updates"),
        ("qubes-dvm", "dvm"),
        ("yum-proxy-setup", "updates-proxy-setup"),
    ):
        value = feature(view, qube, source)
        if value is not None:
            yield f"/qubes-service/{name}", "1" if value else "0"
    balanced = text(evaluate(view, qube, "maxmem")) not in ("", "0")
    yield from exported_keys(qube, balanced=balanced).items()


def _relayed(view: View, qube: Qube) -> Iterator[tuple[str, str]]:
    """The names that remote qubes behind this relay have over there."""
    remotes = [remote for remote in view.referrers("relayvm", qube.name) if not remote.hidden]
    for remote in sorted(remotes, key=lambda q: q.name):
        yield f"/remote/{remote.name}", text(evaluate(view, remote, "remote_name")) or remote.name


def connected(view: View, provider: Qube) -> Iterator[tuple[str, str]]:
    """/connected-ips and /connected-ips6: shown addresses of all configured clients."""
    clients = sorted(clients_of(view, provider), key=lambda q: q.name)
    yield "/connected-ips", " ".join(_present(view, clients, "visible_ip"))
    yield "/connected-ips6", " ".join(_present(view, clients, "visible_ip6"))


def shown_or_heard_by(view: View, server: Qube) -> list[Qube]:
    """Running qubes whose guivm or audiovm it is: they are told its xid when it starts."""
    return [
        qube
        for qube in view.qubes()
        if qube.run.phase is Phase.UP
        and qube.uuid != server.uuid
        and server.name
        in (text(evaluate(view, qube, "guivm")), text(evaluate(view, qube, "audiovm")))
    ]


def clients_of(view: View, provider: Qube) -> list[Qube]:
    """Qubes whose netvm is the provider, by explicit value or by the system's default."""
    found = [q for q in view.referrers("netvm", provider.name) if not q.hidden]
    if view.properties.get("default_netvm") == provider.name:
        found.extend(
            q for q in view.without("netvm") if q.klass not in ("AdminVM", "RemoteVM", "TemplateVM")
        )
    return found


def _present(view: View, qubes: list[Qube], prop: str) -> Iterator[str]:
    for qube in qubes:
        value = text(evaluate(view, qube, prop))
        if value:
            yield value


def _identity(view: View, qube: Qube) -> Iterator[tuple[str, str]]:
    updateable = bool(evaluate(view, qube, "updateable"))
    persistence = "full" if updateable else "rw-only"
    if qube.klass == "DispVM":
        persistence = "none"
    yield "/name", qube.name
    yield "/type", qube.klass
    yield "/default-user", effective_default_user(view, qube)
    yield "/qubes-vm-updateable", str(updateable)
    yield "/qubes-vm-persistence", persistence
    yield "/qubes-debug-mode", "1" if evaluate(view, qube, "debug") else "0"
    has_template = qube.klass in ("AppVM", "DispVM")
    yield "/qubes-base-template", text(evaluate(view, qube, "template")) if has_template else ""


def _timezone(view: View, qube: Qube, timezone: str) -> Iterator[tuple[str, str]]:
    if timezone and not truthy(view, qube, "anon-timezone", "template"):
        yield "/qubes-timezone", timezone


def _provider(view: View, qube: Qube) -> Iterator[tuple[str, str]]:
    if not provides_network(qube):
        return
    gateway = text(evaluate(view, qube, "gateway"))
    yield "/qubes-netvm-network", gateway
    yield "/qubes-netvm-gateway", gateway
    gateway6 = text(evaluate(view, qube, "gateway6"))
    if gateway6:
        yield "/qubes-netvm-gateway6", gateway6
    yield "/qubes-netvm-netmask", "255.255.255.255"
    yield from _dns(view, qube, "/qubes-netvm-")


def _client(view: View, qube: Qube) -> Iterator[tuple[str, str]]:
    if netvm(view, qube) is None:
        return
    yield "/qubes-mac", text(evaluate(view, qube, "mac"))
    yield "/qubes-ip", text(evaluate(view, qube, "visible_ip"))
    yield "/qubes-netmask", text(evaluate(view, qube, "visible_netmask"))
    yield "/qubes-gateway", text(evaluate(view, qube, "visible_gateway"))
    yield from _dns(view, qube, "/qubes-")
    for key, prop in (("/qubes-ip6", "visible_ip6"), ("/qubes-gateway6", "visible_gateway6")):
        value = text(evaluate(view, qube, prop))
        if value:
            yield key, value


def _dns(view: View, qube: Qube, prefix: str) -> Iterator[tuple[str, str]]:
    for key, server in zip(
        ("primary-dns", "secondary-dns"), text(evaluate(view, qube, "dns")).split()
    ):
        yield prefix + key, server


def _kind(view: View, qube: Qube) -> Iterator[tuple[str, str]]:
    kind = "AppVM"
    if qube.klass == "TemplateVM":
        kind = "TemplateVM"
    elif provides_network(qube):
        kind = "ProxyVM" if netvm(view, qube) is not None else "NetVM"
    yield "/qubes-vm-type", kind
    yield "/qubes-iptables-error", ""


def _gui(view: View, qube: Qube) -> Iterator[tuple[str, str]]:
    for name in ("overhead", "min"):
        value = feature(view, qube, f"gui-videoram-{name}", "template+adminvm")
        if value is not None:
            yield f"/qubes-gui-videoram-{name}", value
    guivm = view.qube(text(evaluate(view, qube, "guivm")))
    enabled = guivm is not None and truthy(view, qube, "gui", default=True)
    yield "/qubes-gui-enabled", str(enabled)
    if guivm is not None and guivm.uuid != qube.uuid:
        yield "/keyboard-layout", text(evaluate(view, qube, "keyboard_layout"))
        xid = running_xid(view, guivm)
        if xid is not None:
            yield "/qubes-gui-domain-xid", str(xid)
    if truthy(view, qube, "service.guivm"):
        yield "/guivm-windows-prefix", feature(view, qube, "guivm-windows-prefix") or "GuiVM"
    audiovm = view.qube(text(evaluate(view, qube, "audiovm")))
    if audiovm is not None and audiovm.uuid != qube.uuid:
        xid = running_xid(view, audiovm)
        if xid is not None:
            yield "/qubes-audio-domain-xid", str(xid)


def running_xid(view: View, qube: Qube) -> int | None:
    """xid of a running qube (dom0: 0), None when it does not run."""
    if qube.klass == "AdminVM":
        return 0
    power = current_power(view, qube)
    if power is None or power.xid < 0 or not is_running(view, qube):
        return None
    return power.xid


def _checked(keys: list[tuple[str, str]]) -> Tree:
    fits: Callable[[str, str], bool] = lambda key, value: (  # noqa: E731 - one use, one line
        len(key) <= KEY_LIMIT
        and _KEY.fullmatch(key) is not None
        and not key.endswith("/")
        and len(value.encode()) <= VALUE_LIMIT
        and "\0" not in value
    )
    good: dict[str, str] = {}
    bad: list[str] = []
    for key, value in keys:
        if fits(key, value):
            good[key] = value
        else:
            bad.append(key)
    return Tree(tuple(good.items()), (), tuple(bad))
