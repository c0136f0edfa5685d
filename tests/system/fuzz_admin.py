"""Hostile and odd frames over the real sockets of a real instance.

    python -m tests.system.fuzz_admin --frames 200000

Owns the frames and what must hold for every answer. Must not know how a call is carried
out. Invariant: the same seed sends the same frames; everything that it finds it names
with a frame that can be sent again.

Checked for each frame: an answer within the limit of time; no silence for a well-formed
frame; a reply that is laid out as one; no traceback, no class name of Python and no
"internal error" in it. At the end: every service is the process that it was, no log has
a traceback, and what was only refused or only read has not changed the store.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bulkhead.config import SERVICES, Settings
from clients.admin import AdminClient, AdminError
from clients.cli.instance import kernels, operator
from services.adminapi.core import calls
from services.domains.simhv.client import SimControl
from tests.fakes import admin_replay
from tests.instance import Instance, running

T = TypeVar("T")

FRAMES = 1_000_000
CONNECTIONS = 24
# Seconds that one answer may take: 60 in the queue of a qube, then a call of its own, by
# docs/operations.md. The timeouts of the guests are short here, so that few wait at all.
CALL_LIMIT_S = 150.0
GUEST_TIMEOUT_S = 3
# Frames after which the world is mended: many of them destroy what others need.
BATCH = 4_000
# A stream has no end: its first bytes are looked at, then it is left.
STREAM_S = 0.05
KERNEL = "lab"
HOST = "00000000-0000-0000-0000-000000000000"
QUBES = ("tmpl", "net", "work", "vault", "dvm")
# Names that frames may create, so that the world stays small.
SPARE = ("spare1", "spare2", "spare3")
# The names of exceptions that clients know.
_CLASS = re.compile(rb"(Qubes[A-Za-z]*|PermissionDenied|ProtocolError|DeviceAlready[A-Za-z]*"
                    rb"|DeviceNot[A-Za-z]*|UnrecognizedDevice|UnexpectedDeviceProperty"
                    rb"|StoragePoolException|BackupCancelledError|PolicyError)\Z")  # fmt: skip
_TRACES = (b"Traceback (most", b'File "/', b", line ", b"object at 0x", b"internal error")
# What a frame says for words that only answers can tell: the newest of their kind is sent.
TOKEN = b"TOKEN-OF-A-COPY"
OPERATION = b"ID-OF-AN-OPERATION"
DIRECTORY = b"DIRECTORY-FOR-A-POOL"
# Streams, and what waits for other calls as long as they like.
_ENDLESS = frozenset(call.name for call in calls.all_calls() if call.stream)


@dataclass(frozen=True, slots=True)
class Frame:
    """Bytes for one socket. quiet: it must be refused or only read."""

    socket: str
    data: bytes
    quiet: bool = False


@dataclass
class Findings:
    """What was seen. problems: texts with the frame, at most 50 kept; sockets: frames sent
    to each; done: calls of the table that were carried out, how often."""

    sent: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    sockets: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    learned: dict[bytes, bytes] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    slowest: tuple[float, bytes] = (0.0, b"")
    memory_before: dict[str, float] = field(default_factory=dict)
    memory_after: dict[str, float] = field(default_factory=dict)

    def filled(self, data: bytes) -> bytes:
        """A frame's bytes with what was learned by now."""
        for word, known in self.learned.items():
            data = data.replace(word, known)
        return data

    def learn(self, frame: Frame, reply: bytes) -> None:
        match method_of(frame.data):
            case "admin.vm.volume.CloneFrom":
                self.learned[TOKEN] = reply[2:]
            case "bulkhead.op.List" if newest := re.findall(rb'"id": "([^"]+)"', reply):
                self.learned[OPERATION] = newest[-1]

    def add(self, what: str, frame: Frame, reply: bytes = b"") -> None:
        if len(self.problems) < 50:
            self.problems.append(f"{what}: {frame.socket} {frame.data[:300]!r} -> {reply[:3000]!r}")


def well_formed(data: bytes) -> bool:
    """Whether a frame deserves an answer, by the rules of the wire alone."""
    header, nul, _ = data.partition(b"\0")
    words = header.split(b" ", 3)
    # A header is ASCII: release 4.4 gives up on any other without an answer, too.
    if not nul or len(data) > 65536 or len(words) != 4 or not header.isascii():
        return False
    return words[2] == b"name" or words[2:] == [b"keyword", b"adminvm"]


def method_of(data: bytes) -> str:
    return data.split(b"\0", 1)[0].split(b" ", 1)[0].split(b"+", 1)[0].decode("latin-1")


# ---- frames


class Deck:
    """An endless supply of frames from one seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._recorded = [step.frame for step in admin_replay.steps()]
        self._calls = list(calls.all_calls())
        # What seldom finds the world as it needs it.
        self._often = [call for call in self._calls if any(part in call.name for part in _OFTEN)]

    def any(self) -> Frame:
        """Whatever comes: most of it is refused, some of it works."""
        pick = self._random.random()
        if pick < 0.35:
            return self._of(self._mutated(self._pick(self._recorded)))
        if pick < 0.40:
            return self._of(self._random.randbytes(self._random.choice((0, 1, 7, 40, 300, 3000))))
        frame = self._likely() if self._random.random() < 0.6 else self._structured()
        if pick < 0.55:
            return Frame(frame.socket, self._mutated(frame.data))
        return frame

    def still(self) -> Frame:
        """What can change nothing: a read, or a call that must be refused."""
        while True:
            call = self._pick(self._calls)
            arg, dest, payload = self._arg(), self._dest(), self._payload()
            if call.stream or call.socket == "exec":
                continue
            if call.effect == "ro" and self._random.random() < 0.5:
                # Often enough as it should be, so that reads do read.
                if call.arg == "-":
                    arg = b""
                payload = b""
                dest = b"dom0" if call.dest == "0" else self._pick(QUBES).encode()
            if call.effect != "ro":
                wrong = []
                if call.arg == "!":
                    wrong.append("no argument")
                if call.arg == "-":
                    wrong.append("an argument")
                if call.payload == "!":
                    wrong.append("no payload")
                if call.payload == "-":
                    wrong.append("a payload")
                wrong.append("an unknown qube")
                wrong.append("another socket")
                match self._pick(wrong):
                    case "no argument":
                        arg = b""
                    case "an argument":
                        arg = arg or b"x"
                    case "no payload":
                        payload = b""
                    case "a payload":
                        payload = payload or b"x"
                    case "an unknown qube":
                        dest = b"no-such-qube"
                        if call.dest == "0":
                            dest = b"work"
                    case _:
                        others = [s for s in ("admin", "internal", "misc") if s != call.socket]
                        return Frame(
                            self._pick(others),
                            self._join(call.name.encode(), arg, b"dom0", dest, payload),
                            quiet=True,
                        )
            data = self._join(call.name.encode(), arg, b"dom0", dest, payload)
            return Frame(call.socket, data, quiet=call.effect != "ro")

    def _pick(self, choices: Sequence[T]) -> T:
        return choices[self._random.randrange(len(choices))]

    def _of(self, data: bytes) -> Frame:
        return Frame(self._random.choices(("admin", "internal", "misc"), (8, 1, 1))[0], data)

    def _structured(self) -> Frame:
        call = self._pick(self._calls)
        source = self._pick((b"dom0", b"dom0", b"dom0", b"work", b"nobody", b"", b"a/b"))
        if call.socket == "misc":
            source = self._pick((b"work", b"tmpl", b"dom0", b"nobody"))
        data = self._join(call.name.encode(), self._arg(), source, self._dest(), self._payload())
        socket = call.socket if call.socket != "exec" else "admin"
        return Frame(socket, data)

    def _likely(self) -> Frame:
        """A call as its row of the table wants it, with words that fit it."""
        call = self._pick(self._often if self._random.random() < 0.3 else self._calls)
        name = call.name
        arg, payload = b"", b""
        if call.arg != "-":
            arg = self._pick(
                next((words for part, words in _FITTING_ARGS if part in name), (b"", b"tmpl"))
            )
        if call.payload != "-":
            payload = self._pick(
                next((words for part, words in _FITTING_PAYLOADS if part in name), _PAYLOADS)
            )
        # What takes a qube away from all others is done to the spare ones, mostly.
        share = 0.05 if any(part in name for part in _HEAVY) else 0.85
        names = QUBES if self._random.random() < share else SPARE
        dest = b"dom0" if call.dest == "0" else self._pick(names).encode()
        source = b"dom0" if call.socket != "misc" else self._pick(QUBES).encode()
        socket = call.socket if call.socket != "exec" else "admin"
        return Frame(socket, self._join(name.encode(), arg, source, dest, payload))

    @staticmethod
    def _join(method: bytes, arg: bytes, source: bytes, dest: bytes, payload: bytes) -> bytes:
        return method + b"+" + arg + b" " + source + b" name " + dest + b"\0" + payload

    def _dest(self) -> bytes:
        return self._pick(_DESTS) if self._random.random() < 0.95 else self._noise(20)

    def _arg(self) -> bytes:
        return self._pick(_ARGS) if self._random.random() < 0.85 else self._noise(40)

    def _payload(self) -> bytes:
        pick = self._random.random()
        if pick < 0.75:
            return self._pick(_PAYLOADS)
        if pick < 0.99:
            return self._random.randbytes(self._random.randrange(80))
        return self._pick((b"9" * 5000, b"a=b " * 2000, b"\xff" * 65000, b"\n" * 9000))

    def _noise(self, most: int) -> bytes:
        data = self._random.randbytes(self._random.randrange(1, most))
        return data.replace(b" ", b"_").replace(b"\0", b"-")

    def _mutated(self, data: bytes) -> bytes:
        for _ in range(self._random.choice((0, 1, 1, 2, 3, 8))):
            at = self._random.randrange(len(data) + 1)
            match self._random.randrange(7):
                case 0:
                    data = data[:at] + self._random.randbytes(1) + data[at + 1 :]
                case 1:
                    data = data[:at] + data[at + 1 :]
                case 2:
                    data = data[:at] + self._random.randbytes(self._random.randrange(9)) + data[at:]
                case 3:
                    data = data[:at]
                case 4:
                    end = at + self._random.randrange(1, 30)
                    data = data[:at] + data[at:end] * 2 + data[end:]
                case 5:
                    word = self._pick((*_ARGS, *_DESTS))
                    data = data[:at] + word + data[at:]
                case _:
                    other = self._pick(self._recorded)
                    data = data[:at] + other[self._random.randrange(len(other) + 1) :]
        return data


_DESTS = tuple(
    name.encode() for name in ("dom0", "dom0", *QUBES, *QUBES, *SPARE, "disp1", "no-such-qube",
                               "", "@adminvm", "uuid:00000000-0000-0000-0000-000000000000",
                               "uuid:x", "Domain-0", "work/..", "a" * 40)
)  # fmt: skip
_ARGS = tuple(
    name.encode() for name in (
        "", "", "", "private", "root", "volatile", "kernel", "nope", "label", "name", "netvm",
        "memory", "maxmem", "vcpus", "template", "kernel", "provides_network", "autostart",
        "default_netvm", "default_template", "clockvm", "xid", "uuid", "ip", "qid", "red",
        "lab", "purple", "varlibqubes", "file", "lvm_thin", "linux-kernel", "dom0+sda",
        "work+1-1", "_+_+_", "dom0+00_1f.2:0x8086:0xa123::p060000", "force", "wait",
        "force+wait", "service.x", "updates-available", "tmpl", "work", "preload", "..",
        "a/b", "%s%n", "%", "x" * 300, "created-by-dom0", "net", "spare1", "dispvm_user",
    )
)  # fmt: skip
_PAYLOADS = (
    b"", b"", b"0", b"1", b"-1", b"4096", b"1048576", b"9" * 30, b"yes", b"True", b"False",
    b"None", b"work", b"net", b"tmpl", b"lab", b"red", b"0x00ff00", b"300", b"\xff\xfe",
    b"name=spare1 label=red", b"name=spare2 label=blue", b"name=spare3 label=green",
    b"name=spare1", b"label=red", b"name=spare1 label=nope", b"name=dom0 label=red",
    b"name=spare1 label=red pool=varlibqubes", b"name=spare1 label=red pool:private=varlibqubes",
    b"name=../x label=red", b"name=x\n", b"mode='required'", b"mode='manual' _b='c'",
    b"_read-only='yes'", b"mode='a' _b='c=' d='e'", b"ok", b"fail\nx", b"fail", b"all",
    b"u08****", b"u08****p060000", b"action=accept\n", b"action=drop\n",
    b"action=accept dst4=1.2.3.4 proto=tcp dstports=80-443\n", b"action=accept dst4=1.2.3.4/99\n",
    b"action=accept dsthost=a.example expire=99999999999\n", b"action=\n", b"\n" * 50,
    b"dir_path=/nowhere\n", b"name=more\ndir_path=/nowhere\n", b"name=varlibqubes\n",
    "n\u00f6tes \u2603\n".encode(), b"a\0b", b"%s %d %", b"{}", b"[]", b"{\"name\": \"copy\"}",
    b"12\n", b" 3 ", b"preload", b"uuid",
)  # fmt: skip


def _words(text: str) -> tuple[bytes, ...]:
    return tuple(word.encode() for word in text.split())


_OFTEN = (
    "pause", "Resume", "Kill", "Start", "Disposable", "volume.Clone", "Revert", "ImportEnd",
    "block.", "op.", "kernel.", "pool.Add", "pool.Remove", "Snapshots",
)  # fmt: skip
# What dom0 offers.
_DEVICES = (
    {"devclass": "block", "port": "sda", "device_id": "1:2", "interfaces": "b******",
     "data": {"device_node": "/dev/sda"}},
    {"devclass": "block", "port": "sdb", "device_id": "1:3", "interfaces": "b******",
     "data": {"device_node": "/dev/sdb"}},
    {"devclass": "pci", "port": "00_1f.2", "device_id": "8086:1234::p028000",
     "interfaces": "p028000"},
)  # fmt: skip
_HEAVY = ("admin.vm.Remove", "ImportBegin", "volume.Import")
# Part of a method's name -> words that fit it; the first that is found counts.
_FITTING_ARGS = (
    (".property.", _words("label memory maxmem vcpus netvm template kernel autostart kernelopts "
                          "default_netvm default_template clockvm provides_network name debug "
                          "include_in_backups virt_mode default_dispvm template_for_dispvms")),
    (".feature.", _words("service.x updates-available gui preload-dispvm-max a.b internal")),
    (".tag.", _words("mine created-by-dom0 other")),
    ("label.", _words("red purple mine other")),
    ("Create.", _words("tmpl")),
    ("CreateInPool.", _words("tmpl")),
    ("CreateDisposable", (b"", b"preload")),
    ("bulkhead.op", (OPERATION, OPERATION, b"x", b"00000000-0000-0000-0000-000000000000")),
    ("kernel.", _words("lab other")),
    (".volume.", _words("private root volatile kernel private")),
    ("pool.", _words("varlibqubes linux-kernel file file-reflink more")),
    (".device.block", _words("dom0+sda dom0+sdb dom0+sda:*")),
    (".device.", _words("dom0+sda work+1-1 dom0+00_1f.2 dom0+sda:0123::b000000 dom0+*")),
    ("Shutdown", _words("force wait force+wait")),
)  # fmt: skip
_FITTING_PAYLOADS = (
    (".property.", (b"", *_words("red blue 300 400 2 True False net tmpl lab dvm pvh work quiet"))),
    (".feature.", (b"", *_words("1 0 text"))),
    ("label.", _words("0x00ff00 0x123456")),
    ("Create.", (b"name=spare1 label=red", b"name=spare2 label=blue", b"name=spare3 label=green")),
    ("CreateInPool.", (b"name=spare1 label=red pool=varlibqubes",
                       b"name=spare2 label=red pool:private=varlibqubes")),
    (".Resize", _words("1048576 3000000000 4096 2147483648")),
    (".Revert", _words("1 2")),
    ("revisions_to_keep", _words("0 1 5")),
    (".Set.rw", _words("True False")),
    ("ephemeral", _words("True False False False")),
    ("firewall.Set", (b"action=accept\n", b"action=drop\n",
                      b"action=accept dst4=1.2.3.4/32 proto=tcp dstports=80-443\naction=drop\n")),
    ("ImportBegin", (b"", b"4096", b"1048576")),
    ("ImportEnd", (b"ok", b"fail\nx")),
    ("CreateDisposable", (b"", b"uuid")),
    ("volume.CloneTo", (TOKEN,)),
    ("vm.Clone", (b'{"name": "spare1"}', b"name=spare2", b"spare3")),
    ("Set.assignment", _words("required auto-attach ask-to-attach manual")),
    (".device.", (b"mode='manual'", b"mode='manual'", b"mode='ask-to-attach'", b"mode='required'",
                  b"_read-only='yes'", b"", b"")),
    ("denied", (b"u08****", b"all", b"")),
    ("pool.Add", (b"name=more\ndir_path=" + DIRECTORY + b"\n", b"name=more\ndir_path=/nowhere\n",
                  b"name=more\nx=y\n")),
)  # fmt: skip


# ---- one frame


async def send(path: Path, frame: Frame, findings: Findings) -> None:
    """One connection: the frame, its answer, and what must hold for both."""
    began = time.monotonic()
    stream = method_of(frame.data) in _ENDLESS
    reply = b""
    hung = False
    try:
        async with asyncio.timeout(CALL_LIMIT_S):
            reader, writer = await asyncio.open_unix_connection(str(path))
            try:
                with contextlib.suppress(ConnectionError):
                    writer.write(findings.filled(frame.data))
                    await writer.drain()
                    writer.write_eof()
                with contextlib.suppress(ConnectionError):
                    reply = await (_first(reader) if stream else reader.read())
            finally:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
    except TimeoutError:
        hung = True
        findings.add(f"no answer within {CALL_LIMIT_S:.0f} s", frame, await _under_way(path))
        findings.kinds["hang"] += 1
    took = time.monotonic() - began
    if took > findings.slowest[0]:
        findings.slowest = (took, frame.data[:200])
    findings.sent += 1
    findings.sockets[frame.socket] += 1
    judge(frame, reply, findings, stream=stream, hung=hung)


async def _under_way(path: Path) -> bytes:
    """What the daemon is at: who a call without an answer may be waiting for."""
    reply = b""
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_unix_connection(str(path.with_name("qubesd.sock")))
            writer.write(b"bulkhead.op.List+ dom0 name dom0\0")
            writer.write_eof()
            reply = await reader.read()
            writer.close()
    keep = [line for line in reply.splitlines() if b'"finished": false' in line]
    return b" | ".join(keep)


async def _first(reader: asyncio.StreamReader) -> bytes:
    data = await reader.read(65536)
    if data.startswith(b"1"):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STREAM_S):
                await reader.read(65536)
    return data


def judge(frame: Frame, reply: bytes, findings: Findings, *, stream: bool, hung: bool) -> None:
    """Look at one answer. stream: of an endless method; hung: it did not come in time."""
    if not reply:
        findings.kinds["silence"] += 1
        if well_formed(frame.data) and not hung:
            findings.add("silence for a well-formed frame", frame)
        return
    if reply[:2] == b"0\0":
        findings.kinds["ok"] += 1
        findings.done[method_of(frame.data)] += 1
        findings.learn(frame, reply)
        if frame.quiet:
            findings.add("accepted what must be refused", frame, reply)
        # A reply may repeat what a frame has stored before; the next check is for
        # texts that the daemon makes.
        return
    if reply[:2] == b"1\0" and stream:
        findings.kinds["stream"] += 1
        return
    if reply[:2] != b"2\0":
        findings.add("neither reply nor exception", frame, reply)
        return
    findings.kinds["refused"] += 1
    fields = reply.split(b"\0")
    if len(fields) != 5 or fields[4]:
        findings.add("an exception that is not laid out as one", frame, reply)
        return
    if not _CLASS.match(fields[1]):
        findings.add("an exception class that clients do not know", frame, reply)
    if fields[2] or any(trace in fields[3] for trace in _TRACES):
        findings.add("the daemon's inside on the wire", frame, reply)
    if not fields[3].strip():
        findings.add("a refusal without a reason", frame, reply)


# ---- the run


def prepare(instance: Instance) -> None:
    """A kernel and a handful of qubes, some of them running, some with guests that do not
    do as they are told; what waits for a guest waits for a short time."""
    kernel = instance.root / "kernel"
    kernel.write_bytes(b"k" * 4096)
    kernels.add(
        Settings.load(instance.root), KERNEL, vmlinuz=kernel, initramfs=kernel, modules=None
    )
    api = AdminClient.local(instance.root, timeout=120)
    api.set("", "default_shutdown_timeout", str(GUEST_TIMEOUT_S))
    api.set("", "default_qrexec_timeout", str(GUEST_TIMEOUT_S))
    with SimControl.of(instance.root) as sim:
        sim.devices(HOST, *_DEVICES)
        sim.nature("*", agent="connect")
        sim.nature("vault", agent="connect", shutdown="ignore")
        sim.nature("spare1", agent="never")
        sim.nature("spare2", agent="connect", pm_suspend="unsupported")
    _mend(api)


def _mend(api: AdminClient) -> None:
    """The qubes that frames are about are as at the start, those that they made are gone."""

    def tried(act: Callable[[], object]) -> None:
        with contextlib.suppress(*AdminError):
            act()

    for line in api.lines("bulkhead.op.List"):
        record = json.loads(line)
        if not record["finished"]:
            tried(lambda: api.call("bulkhead.op.Cancel", arg=str(record["id"])))  # noqa: B023
    # What they have become is forgotten: a required device, say, that no frame offers.
    for _ in range(3):  # references go with those who refer
        for qube in api.qubes():
            if qube.klass != "AdminVM":
                tried(lambda: api.call("admin.vm.Kill", qube.name))  # noqa: B023
                tried(lambda: api.call("admin.vm.Remove", qube.name))  # noqa: B023
    api.set("", "default_kernel", KERNEL)
    tried(lambda: api.call("admin.pool.Remove", arg="more"))
    for pool in ("varlibqubes", "linux-kernel"):
        tried(lambda: api.call("admin.pool.Set.ephemeral_volatile", arg=pool, payload=b"False"))  # noqa: B023
    tried(lambda: api.call("admin.vm.Create.TemplateVM", payload=b"name=tmpl label=black"))
    for name in QUBES[1:]:
        payload = f"name={name} label=red".encode()
        tried(lambda: api.call("admin.vm.Create.AppVM", "dom0", "tmpl", payload))  # noqa: B023
    tried(lambda: api.set("net", "provides_network", "True"))
    tried(lambda: api.set("net", "netvm", ""))
    tried(lambda: api.set("work", "netvm", "net"))
    tried(lambda: api.set("dvm", "template_for_dispvms", "True"))
    tried(lambda: api.call("admin.vm.Start", "work"))


async def pump(
    root: Path, frames: Iterator[Frame], count: int, findings: Findings, until: float
) -> None:
    """Send count frames, or as many as there is time for, over many connections."""
    paths = Settings(root=root).admin_sockets()
    left = count

    async def one() -> None:
        nonlocal left
        while left > 0 and time.monotonic() < until:
            left -= 1
            frame = next(frames)
            await send(paths[frame.socket], frame, findings)

    await asyncio.gather(*(one() for _ in range(CONNECTIONS)))


def _endless(make: Callable[[], Frame]) -> Iterator[Frame]:
    while True:
        yield make()


def settled(instance: Instance) -> str:
    """The dump once no operation is under way: a client that left does not end its call."""
    api = AdminClient.local(instance.root, timeout=120)

    def quiet() -> bool:
        return all(json.loads(line)["finished"] for line in api.lines("bulkhead.op.List"))

    instance.until(quiet, 120, "no operation is under way")
    return instance.dump()


def fuzz(instance: Instance, frames: int, seed: int, seconds: float = float("inf")) -> Findings:
    """Send that many frames, a fifth of them such as can change nothing."""
    findings = Findings()
    deck = Deck(seed)
    began = time.monotonic()
    pids = _all_up(instance)
    prepare(instance)
    api = AdminClient.local(instance.root, timeout=180)
    findings.memory_before = memory_of(pids)
    place = instance.root / "more"
    place.mkdir()
    place.chmod(0o777)
    findings.learned[DIRECTORY] = str(place).encode()

    still = frames // 5
    before = settled(instance)
    asyncio.run(pump(instance.root, _endless(deck.still), still, findings, began + seconds * 0.2))
    after = settled(instance)
    if before != after:
        findings.problems.append(
            "refused calls and reads changed the store:\n" + _diff(before, after)
        )

    rest = frames - still
    while rest > 0 and time.monotonic() < began + seconds:
        asyncio.run(
            pump(instance.root, _endless(deck.any), min(BATCH, rest), findings, began + seconds)
        )
        rest -= BATCH
        _mend(api)
        if _pids(instance) != pids:
            break
        if findings.sent % (5 * BATCH) < BATCH:
            memory = sum(memory_of(pids).values())
            print(f"{findings.sent} frames, {dict(findings.kinds)}, "
                  f"{len(findings.problems)} problem(s), {memory:.0f} MiB", flush=True)  # fmt: skip

    settled(instance)
    now = _pids(instance)
    findings.memory_after = memory_of(now)
    for service, pid in pids.items():
        if now.get(service) != pid:
            findings.problems.append(f"{service} was restarted: {pid} -> {now.get(service)}")
    findings.problems += list(_traces(instance))
    return findings


def memory_of(pids: Mapping[str, int]) -> dict[str, float]:
    """Proportional share of memory (PSS) of each process, in MiB."""
    found = {}
    for service, pid in pids.items():
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            kib = re.search(r"^Pss:\s+(\d+) kB", rollup, re.M)
            found[service] = round(int(kib[1]) / 1024, 1) if kib else 0.0
    return found


def _pids(instance: Instance) -> dict[str, int]:
    data = json.loads((instance.root / "run/bulkhead/launcher.json").read_text())
    return {service: int(child["pid"]) for service, child in data["children"].items()}


def _all_up(instance: Instance) -> dict[str, int]:
    """Process ids once every service answers: what starts later is no restart."""

    def ready() -> bool:
        data = json.loads((instance.root / "run/bulkhead/launcher.json").read_text())
        rows = operator.health_of_all(instance.settings, data)
        return len(rows) == len(SERVICES) and all(row["ready"] for row in rows)

    instance.until(ready, 60, "every service is ready")
    return _pids(instance)


def _traces(instance: Instance) -> Iterator[str]:
    """Each different traceback of the logs, once."""
    seen = set()
    for path in sorted((instance.root / "var/log/qubes").glob("*.log")):
        text = path.read_text(errors="replace")
        for match in re.finditer(r"Traceback \(most recent.*?\n(?=\S)[^\n]*", text, re.S):
            key = re.sub(r"0x[0-9a-f]+|\d+|'[^']*'", "*", match[0][-400:])
            if key not in seen:
                seen.add(key)
                yield f"{path.name}: {match[0][-1500:]}"


def _diff(before: str, after: str) -> str:
    import difflib

    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=1)
    return "\n".join(list(lines)[:40])


def main() -> int:
    """Exit status 0 when nothing was found."""
    parser = argparse.ArgumentParser(prog="fuzz_admin", description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=FRAMES, metavar="N")
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="S")
    parser.add_argument("--seed", type=int, default=int(time.time()), metavar="N")
    args = parser.parse_args()
    began = time.monotonic()
    print(f"seed {args.seed}", flush=True)
    with running() as instance:
        findings = fuzz(instance, args.frames, args.seed, args.seconds)
    took = time.monotonic() - began
    print(f"{findings.sent} frames in {took:.0f} s: {dict(findings.kinds)}")
    print(f"sockets {dict(findings.sockets)}; slowest answer {findings.slowest[0]:.2f} s: "
          f"{findings.slowest[1]!r}")  # fmt: skip
    never = [
        call.name for call in calls.all_calls() if not (call.stream or findings.done[call.name])
    ]
    print(f"{len(findings.done)} calls of the table were carried out, never: {' '.join(never)}")
    print(f"memory, MiB PSS: before {findings.memory_before}, after {findings.memory_after}")
    for problem in findings.problems:
        print(f"problem: {problem}")
    print(f"{len(findings.problems)} problem(s)")
    return 1 if findings.problems else 0


if __name__ == "__main__":
    sys.exit(main())
