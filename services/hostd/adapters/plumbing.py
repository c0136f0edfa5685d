"""Namespaces, taps and uplinks through iproute2.

Owns calls of `ip`, always as an argument list, and the network settings of a namespace.
Must not know services or rules. Invariants: every method says "ensure" and may be
repeated after a kill anywhere; only names of this instance are made, moved or deleted.
All methods block: call them in a thread, one at a time.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

from bulkhead import failpoints
from services.hostd import failpoint_table  # noqa: F401  (declares the rows)
from services.hostd.core.verbs import INNER_UPLINK, Link, Names

NAMESPACES = Path("/run/netns")
TOOL_S = 5.0
_CLONE_NEWNET = 0x40000000
# Forwarding is not here: the enforce worker turns it on once its rules are loaded.
_SETTINGS = {
    "net/ipv4/conf/all/rp_filter": "1",
    "net/ipv4/conf/default/rp_filter": "1",
    "net/ipv4/conf/all/accept_redirects": "0",
    "net/ipv4/conf/default/accept_redirects": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
    "net/ipv4/conf/all/accept_source_route": "0",
    "net/ipv6/conf/all/accept_ra": "0",
    "net/ipv6/conf/default/accept_ra": "0",
    "net/ipv6/conf/all/accept_redirects": "0",
    "net/ipv6/conf/default/accept_redirects": "0",
}


class ToolError(OSError):
    """`ip` refused; the message is its own."""


class NamespaceMissing(LookupError):
    """There is no such namespace."""


class TapMissing(LookupError):
    """The qube has no tap."""


def in_namespace(name: str, work: Any) -> None:
    """Run work() inside the namespace, in a thread of its own that ends with it."""
    failed: list[BaseException] = []

    def enter() -> None:
        try:
            fd = os.open(NAMESPACES / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(fd, _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
            finally:
                os.close(fd)
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


class Plumbing:
    """One instance's network objects."""

    def __init__(self, names: Names) -> None:
        self._names = names

    # ---- the tool

    def _ip(self, *words: str, namespace: str = "") -> str:
        command = ["ip", *(["-n", namespace] if namespace else []), *words]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TOOL_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ToolError(f"{' '.join(command)}: no end within {TOOL_S} s") from error
        if done.returncode:
            raise ToolError(f"{' '.join(command)}: {done.stderr.strip()[:300]}")
        return done.stdout

    def _links(self, namespace: str = "") -> dict[str, dict[str, Any]]:
        text = self._ip("-j", "link", "show", namespace=namespace)
        return {item["ifname"]: item for item in json.loads(text or "[]")}

    def namespace_exists(self, name: str) -> bool:
        """The name stands for a namespace, not for the rest of one: a name that a killed
        `ip netns add` left is a plain file."""
        try:
            return os.stat(NAMESPACES / name).st_dev == os.stat("/proc/self/ns/net").st_dev
        except FileNotFoundError:
            return False

    def _own_namespaces(self) -> list[str]:
        try:
            found = sorted(path.name for path in NAMESPACES.iterdir())
        except FileNotFoundError:
            return []
        return [name for name in found if self._names.qid_of_namespace(name)]

    # ---- namespaces

    def ensure_namespace(self, qid: int) -> str:
        """The network qube's namespace, with lo up and nothing forwarded yet."""
        name = self._names.namespace(qid)
        if not self.namespace_exists(name):
            (NAMESPACES / name).unlink(missing_ok=True)
            self._ip("netns", "add", name)
        failpoints.hit("hostd.namespace.after_add")
        self._ip("link", "set", "lo", "up", namespace=name)
        in_namespace(name, _apply_settings)
        return name

    def delete_namespace(self, qid: int) -> None:
        """Taps move out first: a tap dies with the namespace that it is in."""
        name = self._names.namespace(qid)
        if self.namespace_exists(name):
            for link in self._links(name):
                if self._names.qid_of_tap(link):
                    self._move_out(link, name)
            failpoints.hit("hostd.namespace.before_delete")
            self._ip("netns", "del", name)
        else:
            (NAMESPACES / name).unlink(missing_ok=True)

    def _move_out(self, link: str, namespace: str) -> None:
        self._ip("link", "set", link, "down", namespace=namespace)
        self._ip("link", "set", link, "netns", str(os.getpid()), namespace=namespace)

    # ---- uplinks

    def ensure_uplink(self, qid: int, other: str, link: Link) -> tuple[str, str]:
        """(interface in the qube's namespace, its peer in the other namespace)."""
        own = self.ensure_namespace(qid)
        if not self.namespace_exists(other):
            raise NamespaceMissing(other)
        peer = self._names.uplink(qid)
        if INNER_UPLINK not in self._links(own) or peer not in self._links(other):
            self._remove_uplink(qid, own, other)
            # Made where nobody listens, moved, and only then renamed.
            inner = f"{peer}i"[-15:]
            self._ip("link", "add", inner, "type", "veth", "peer", "name", peer)
            failpoints.hit("hostd.uplink.after_pair")
            self._ip("link", "set", inner, "netns", own, "name", INNER_UPLINK)
            self._ip("link", "set", peer, "netns", other)
        failpoints.hit("hostd.uplink.after_move")
        self._point_to_point(other, peer, link.gateway, link.ip)
        self._point_to_point(own, INNER_UPLINK, link.ip, link.gateway)
        self._ip("route", "replace", "default", "via", link.gateway, namespace=own)
        return INNER_UPLINK, peer

    def _remove_uplink(self, qid: int, own: str, other: str) -> None:
        peer = self._names.uplink(qid)
        for namespace, link in (
            (own, INNER_UPLINK),
            (other, peer),
            ("", peer),
            ("", f"{peer}i"[-15:]),
        ):
            if link in self._links(namespace):
                self._ip("link", "del", link, namespace=namespace)

    def delete_uplink(self, qid: int) -> None:
        """Deleting one end deletes both."""
        own = self._names.namespace(qid)
        if self.namespace_exists(own) and INNER_UPLINK in self._links(own):
            self._ip("link", "del", INNER_UPLINK, namespace=own)
        for link in (self._names.uplink(qid), f"{self._names.uplink(qid)}i"[-15:]):
            if link in self._links():
                self._ip("link", "del", link)

    def _point_to_point(self, namespace: str, link: str, own: str, other: str) -> None:
        length = "128" if ":" in own else "32"
        family = ("-6",) if ":" in own else ()
        # Without "nodad" an IPv6 address cannot be used for its first second.
        extra = ("nodad",) if ":" in own else ()
        self._ip(
            *family, "addr", "replace", f"{own}/{length}", "dev", link, *extra, namespace=namespace
        )
        self._ip("link", "set", link, "up", namespace=namespace)
        self._ip(*family, "route", "replace", f"{other}/{length}", "dev", link, namespace=namespace)

    def _keep_addresses(self, namespace: str, link: str, kept: set[str]) -> None:
        """Remove what an earlier plug with other addresses left."""
        text = self._ip("-j", "addr", "show", "dev", link, "scope", "global", namespace=namespace)
        for item in json.loads(text or "[]"):
            for address in item.get("addr_info", ()):
                if address["local"] not in kept:
                    place = f"{address['local']}/{address['prefixlen']}"
                    self._ip("addr", "del", place, "dev", link, namespace=namespace)

    # ---- taps

    def ensure_tap(self, qid: int, owner_uid: int) -> str:
        """The qube's tap, wherever it is; made in hostd's own namespace when nowhere."""
        tap = self._names.tap(qid)
        if self._find_tap(tap) is None:
            self._ip("tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr", "user", str(owner_uid))
            failpoints.hit("hostd.tap.after_add")
        return tap

    def _find_tap(self, tap: str) -> str | None:
        """The namespace that holds the tap ("" = hostd's own); None when nowhere."""
        for namespace in ("", *self.namespaces()):
            if tap in self._links(namespace):
                return namespace
        return None

    def plug(self, qid: int, netvm_qid: int, link: Link) -> tuple[str, str]:
        """(tap, namespace): the tap is in the netvm's namespace, routed point to point."""
        tap, namespace = self._names.tap(qid), self._names.namespace(netvm_qid)
        if not self.namespace_exists(namespace):
            raise NamespaceMissing(namespace)
        where = self._find_tap(tap)
        if where is None:
            raise TapMissing(tap)
        if where != namespace:
            if where:
                self._ip("link", "set", tap, "down", namespace=where)
            self._ip("link", "set", tap, "netns", namespace, namespace=where)
        failpoints.hit("hostd.plug.after_move")
        self._keep_addresses(namespace, tap, {link.gateway, link.gateway6})
        self._point_to_point(namespace, tap, link.gateway, link.ip)
        pairs = [(link.ip, "-4")]
        if link.ip6:
            self._point_to_point(namespace, tap, link.gateway6, link.ip6)
            pairs.append((link.ip6, "-6"))
        if link.mac:
            for address, family in pairs:
                words = ("neigh", "replace", address, "lladdr", link.mac, "nud", "permanent")
                self._ip(family, *words, "dev", tap, namespace=namespace)
        return tap, namespace

    def unplug(self, qid: int, delete_tap: bool) -> None:
        """The tap is in no netvm's namespace; gone altogether with delete_tap."""
        tap = self._names.tap(qid)
        where = self._find_tap(tap)
        if where:
            self._move_out(tap, where)
            where = ""
        failpoints.hit("hostd.unplug.after_move")
        if delete_tap and where is not None:
            try:
                self._ip("link", "del", tap)
            except ToolError:
                # A tap that its guest made goes by itself when the guest does.
                if tap in self._links():
                    raise

    # ---- looking

    def namespaces(self) -> list[str]:
        """Our namespaces."""
        return [name for name in self._own_namespaces() if self.namespace_exists(name)]

    def taps(self) -> list[str]:
        """Our taps, in hostd's own namespace and in ours."""
        found: set[str] = set()
        for namespace in ("", *self.namespaces()):
            found.update(name for name in self._links(namespace) if self._names.qid_of_tap(name))
        return sorted(found)


def _apply_settings() -> None:
    for name, value in _SETTINGS.items():
        path = Path("/proc/sys") / name
        if path.exists():
            path.write_text(value)
