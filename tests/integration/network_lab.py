"""A network qube with clients and a server, in namespaces of this machine.

Owns namespaces, interfaces and sockets whose names carry the tag of a temporary root.
Invariant: close() leaves none of them behind, whatever the test did.

    client CID            netvm (qid 6)                      server
    eth0 10.137.0.CID -- bhTAG-CID 10.137.0.6 ; up0 -- buTAG-6 169.254.1.1 ; 192.0.2.x
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from services.firewall.adapters.enforcer_client import EnforcerClient
from services.firewall.adapters.rules_files import RulesFiles
from services.firewall.adapters.state_files import StateFiles
from services.firewall.core import ruleset
from services.firewall.core.enforcement import Enforcer
from services.firewall.keeper import RuleKeeper
from services.hostd.adapters.plumbing import NAMESPACES, Plumbing, in_namespace
from services.hostd.adapters.workers import Workers
from services.hostd.core.verbs import Link, Names, uplink_link

T = TypeVar("T")
NETVM_QID = 6
NETVM_IP = "10.137.0.6"
SERVER = "192.0.2.1"
SERVER2 = "192.0.2.2"
SERVER6 = "2001:db8::1"
NETVM = "99999999-9999-4999-8999-999999999999"
# How long an answer may take: one that is expected not to come, and one that must come on
# a machine that is busy.
ANSWER_S = 0.6
PATIENCE_S = 10.0


def uuid_of(qid: int) -> str:
    """A qube's uuid in these tests."""
    return f"11111111-1111-4111-8111-{qid:012d}"


def ip(*words: str, namespace: str = "") -> str:
    """Run iproute2; CalledProcessError."""
    command = ["ip", *(["-n", namespace] if namespace else []), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def inside(namespace: str, work: Callable[[], T]) -> T:
    """Run work() in a namespace and give its result."""
    result: list[T] = []
    in_namespace(namespace, lambda: result.append(work()))
    return result[0]


@dataclass
class Lab:
    """The namespaces and what serves in them."""

    root: Path
    names: Names
    plumbing: Plumbing
    server: str
    clients: dict[int, str] = field(default_factory=dict)
    heard: list[tuple[str, bytes]] = field(default_factory=list)
    _closing: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _sockets: list[socket.socket] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return self.names.namespace(NETVM_QID)

    # ---- topology

    def add_client(self, qid: int, ip6: str = "") -> str:
        """A namespace with eth0, whose other end waits to be plugged; the end's name."""
        name = f"{self.names.namespace(qid)}c"
        self.clients[qid] = name
        tap = self.names.tap(qid)
        ip("netns", "add", name)
        ip("link", "add", tap, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", "lo", "up", namespace=name)
        ip("link", "set", "eth0", "up", namespace=name)
        ip("addr", "add", f"10.137.0.{qid}/32", "dev", "eth0", namespace=name)
        ip("route", "add", NETVM_IP, "dev", "eth0", namespace=name)
        ip("route", "add", "default", "via", NETVM_IP, "dev", "eth0", namespace=name)
        if ip6:
            ip("-6", "addr", "add", f"{ip6}/128", "dev", "eth0", "nodad", namespace=name)
            ip("-6", "route", "add", "fd09::6", "dev", "eth0", namespace=name)
            ip("-6", "route", "add", "default", "via", "fd09::6", "dev", "eth0", namespace=name)
        return tap

    def plug(self, qid: int, ip6: str = "") -> None:
        """Move the client's interface into the netvm."""
        link = Link(f"10.137.0.{qid}", NETVM_IP, ip6, "fd09::6" if ip6 else "")
        self.plumbing.plug(qid, NETVM_QID, link)

    # ---- traffic

    def serve(self, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
        """Answer on a port in the server's namespace; datagrams are noted in heard."""
        if kind == socket.SOCK_STREAM:
            self._serve("::", port, kind)
            return
        for address in (SERVER, SERVER2):
            # One socket each, so that an answer comes from the address that was asked.
            self._serve(address, port, kind)

    def _serve(self, address: str, port: int, kind: socket.SocketKind) -> None:
        def listen() -> socket.socket:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            made = socket.socket(family, kind)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((address, port))
            if kind == socket.SOCK_STREAM:
                made.listen(1024)
            made.settimeout(0.1)
            return made

        made = inside(self.server, listen)
        self._sockets.append(made)

        def run() -> None:
            kept: list[socket.socket] = []
            while not self._closing.is_set():
                with contextlib.suppress(TimeoutError, OSError):
                    if kind == socket.SOCK_STREAM:
                        connection, _ = made.accept()
                        connection.sendall(b"hello")
                        kept.append(connection)
                        if len(kept) > 64:
                            kept.pop(0).close()
                    else:
                        data, source = made.recvfrom(2048)
                        self.heard.append((source[0], data))
                        made.sendto(data, source)
            for connection in kept:
                connection.close()

        thread = threading.Thread(target=run)
        thread.start()
        self._threads.append(thread)

    def connect(
        self, qid: int, port: int, host: str = SERVER, patience: float = PATIENCE_S
    ) -> socket.socket:
        """A TCP connection from a client; OSError (EHOSTUNREACH = rejected), TimeoutError."""

        def work() -> socket.socket:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            made = socket.socket(family, socket.SOCK_STREAM)
            made.settimeout(patience)
            try:
                made.connect((host, port))
                assert made.recv(5) == b"hello"
            except BaseException:
                made.close()
                raise
            return made

        return inside(self.clients[qid], work)

    def reach(self, qid: int, port: int, host: str = SERVER, patience: float = ANSWER_S) -> str:
        """ "yes", "rejected" or "silent" for a TCP connection, which gets patience seconds."""
        try:
            self.connect(qid, port, host, patience).close()
        except TimeoutError:
            return "silent"
        except OSError:
            return "rejected"
        return "yes"

    def ask_udp(self, qid: int, port: int, host: str = SERVER, source: str = "") -> str:
        """ "yes", "rejected" or "silent" for one datagram and its echo."""

        def work() -> str:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as made:
                made.settimeout(ANSWER_S)
                if source:
                    made.bind((source, 0))
                made.connect((host, port))
                try:
                    made.send(b"ping")
                    made.recv(100)
                except TimeoutError:
                    return "silent"
                except OSError:
                    return "rejected"
                return "yes"

        return inside(self.clients[qid], work)

    def ping(self, qid: int, host: str = SERVER, flow: int = 0x1234) -> bool:
        """An echo request from the client is answered. flow: as long as it is the same,
        rules see one flow."""

        def work() -> bool:
            with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as made:
                made.settimeout(ANSWER_S)
                body = b"\x08\x00\x00\x00" + flow.to_bytes(2, "big") + b"\x00\x01"
                total = sum(int.from_bytes(body[i : i + 2], "big") for i in range(0, 8, 2))
                total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
                made.sendto(body[:2] + total.to_bytes(2, "big") + body[4:], (host, 0))
                end = time.monotonic() + ANSWER_S
                while time.monotonic() < end:
                    try:
                        data, source = made.recvfrom(2048)
                    except (TimeoutError, OSError):
                        return False
                    if source[0] == host and data[20] == 0:
                        return True
                return False

        return inside(self.clients[qid], work)

    # ---- the end

    def close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join()
        for made in self._sockets:
            made.close()
        for path in sorted(NAMESPACES.iterdir()):
            if path.name.startswith(f"bh{self.names.tag}-"):
                subprocess.run(["ip", "netns", "del", path.name], check=False)
        for line in ip("-o", "link", "show").splitlines():
            name = line.split(": ")[1].partition("@")[0]
            if name.startswith((f"bh{self.names.tag}-", f"bu{self.names.tag}-")):
                subprocess.run(["ip", "link", "del", name], check=False)


@contextlib.contextmanager
def lab(root: Path | None = None) -> Iterator[Lab]:
    """A netvm's namespace with an uplink to a server's, and no rules yet.

    root: the instance whose names are used; None: a directory that goes with the lab.
    """
    own_root = root is None
    root = root or Path(tempfile.mkdtemp(prefix="bhfw", dir="/tmp"))
    names = Names.of_root(str(root))
    plumbing = Plumbing(names)
    server = f"bh{names.tag}-srv"
    made = Lab(root, names, plumbing, server)
    try:
        ip("netns", "add", server)
        ip("link", "set", "lo", "up", namespace=server)
        for address in (SERVER, SERVER2):
            ip("addr", "add", f"{address}/32", "dev", "lo", namespace=server)
        ip("-6", "addr", "add", f"{SERVER6}/128", "dev", "lo", "nodad", namespace=server)
        plumbing.ensure_namespace(NETVM_QID)
        _, peer = plumbing.ensure_uplink(NETVM_QID, server, uplink_link(NETVM_QID, "", ""))
        own = made.namespace
        ip("-6", "addr", "add", "fd08::1/64", "dev", peer, "nodad", namespace=server)
        ip("-6", "addr", "add", "fd08::2/64", "dev", "up0", "nodad", namespace=own)
        ip("-6", "route", "add", "default", "via", "fd08::1", namespace=own)
        yield made
    finally:
        made.close()
        if own_root:
            shutil.rmtree(root, ignore_errors=True)


class Place:
    """The firewall's keeper with real workers, in the test's own loop."""

    def __init__(self, one: Lab) -> None:
        self.lab = one
        (one.root / "rules").mkdir(exist_ok=True)
        (one.root / "sockets").mkdir(exist_ok=True)
        log = logging.getLogger("lab")
        self.workers = Workers(one.root / "sockets", os.getuid(), log)
        self.announced: list[tuple[str, str | None]] = []
        self.names: dict[str, tuple[str, ...]] = {}
        self.keeper = self.new_keeper()

    async def announce(self, uuid: str, event: bool, value: str | None) -> tuple[int, int]:
        self.announced.append((uuid, value))
        return 1, 1

    async def open_enforcer(self, namespace: str) -> Enforcer:
        async def spawn() -> str:
            _, path = await self.workers.ensure(NETVM_QID, namespace)
            return str(path)

        return EnforcerClient(spawn)

    async def resolve(self, name: str) -> tuple[tuple[str, ...], float]:
        if name not in self.names:
            raise OSError("no such name")
        return self.names[name], 60.0

    def new_keeper(self, resolvers: tuple[str, ...] = ()) -> RuleKeeper:
        return RuleKeeper(
            RulesFiles(self.lab.root / "rules"),
            StateFiles(self.lab.root / "run"),
            self.announce,
            self.open_enforcer,
            self,
            resolvers=resolvers,
        )

    async def up(self) -> None:
        await self.keeper.netvm_up(NETVM, "netboot", self.lab.namespace, "up0")

    def target(self, qid: int, ip6: str = "") -> ruleset.Target:
        return ruleset.make_target(
            uuid_of(qid),
            f"q{qid}",
            "boot",
            NETVM,
            self.lab.namespace,
            self.lab.names.tap(qid),
            f"10.137.0.{qid}",
            ip6,
        )

    async def start_client(self, qid: int, *lines: str, ip6: str = "") -> None:
        """As START does: rules first, then the interface."""
        await asyncio.to_thread(self.lab.add_client, qid, ip6)
        if lines:
            await self.keeper.set_rules(uuid_of(qid), f"q{qid}", lines)
        await self.keeper.apply(self.target(qid, ip6), False)
        await asyncio.to_thread(self.lab.plug, qid, ip6)

    async def set(self, qid: int, *lines: str) -> None:
        await self.keeper.set_rules(uuid_of(qid), f"q{qid}", lines)

    async def counters(self) -> dict[str, int]:
        enforcer = await self.open_enforcer(self.lab.namespace)
        status = await enforcer.status()
        await enforcer.close()
        return {name: pair[0] for name, pair in status.counters.items()}

    async def close(self) -> None:
        await self.keeper.close()
        await self.workers.close()


@contextlib.asynccontextmanager
async def place(one: Lab) -> AsyncIterator[Place]:
    """A keeper on the lab, with the netvm up."""
    made = Place(one)
    try:
        await made.up()
        yield made
    finally:
        await made.close()
