"""Volumes, pools, devices, power, disposables, removal and event streams, call by call.

Owns what every call answers, written from the documented interface: exception classes,
bodies and the order and keys of events. Must not know how the services do it.
Invariant: one instance, one order; a row that does not hold is named with its line.
"""

from __future__ import annotations

import re
import select
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clients.admin import wire
from tests.instance import Instance, Reply, exchange, parse
from tests.integration.adminapi_world import started

pytestmark = pytest.mark.integration

REFUSED = "!"
"""Refused with some class: the release itself does not answer these at all."""
_SHORT = {
    "vol": "admin.vm.volume", "pool": "admin.pool", "dev": "admin.vm.device", "vm": "admin.vm",
    "feat": "admin.vm.feature", "tag": "admin.vm.tag", "prop": "admin.vm.property",
    "sys": "admin.property",
}  # fmt: skip
# Values that differ from run to run.
_MASKED = {"start_guid", "mem_required", "reason"}
_FENCE = "fence"


class Script:
    """Calls and streams of one run; what does not hold is collected."""

    def __init__(self, instance: Instance, pool: Path, file: str = __file__) -> None:
        """file: of the test, whose lines are named."""
        self._file = file
        self.instance = instance
        self.pool = pool
        self.wrong: list[str] = []
        self.names: dict[str, str] = {}
        self._streams: dict[str, Stream] = {}
        self._fences = 0

    def _where(self) -> str:
        frame = sys._getframe(2)
        while frame.f_code.co_filename != self._file or frame.f_code.co_name in ("c", "events"):
            assert frame.f_back is not None
            frame = frame.f_back
        return f"line {frame.f_lineno}"

    def text(self, value: str) -> str:
        """{name} replaced by what was saved under that name."""
        for key, saved in self.names.items():
            value = value.replace("{" + key + "}", saved)
        return value

    def c(
        self,
        method: str,
        dest: str = "dom0",
        arg: str = "",
        payload: str | bytes = "",
        want: str = "",
        *,
        save: str = "",
        src: str = "dom0",
        internal: bool = False,
    ) -> Reply:
        """One call. want: "" = OK without content, "=text" = that content, "~regex" =
        matching content, REFUSED = any exception, else the exception's class."""
        short, _, rest = method.partition(".")
        full = f"{_SHORT[short]}.{rest}" if short in _SHORT else method
        head = f"{full}+{self.text(arg)} {src} name {self.text(dest)}".encode() + b"\0"
        path = self.instance.socket
        if internal:
            path = path.with_name("qubesd.internal.sock")
        body = self.text(payload).encode() if isinstance(payload, str) else payload
        reply = parse(exchange(path, head + body))
        want = self.text(want)
        if reply.kind == "ok":
            good = reply.text == want[1:] if want.startswith("=") else False
            good = good or (want == "" and reply.text == "")
            good = good or (want[:1] == "~" and bool(re.fullmatch(want[1:], reply.text, re.S)))
            got = "=" + reply.text
        else:
            good = reply.kind == "exc" and want in (REFUSED, reply.exception)
            got = f"{reply.exception or reply.kind} ({reply.message})"
        if not good:
            call = f"{method}+{arg} {dest} {payload[:60]!r}"
            self.wrong.append(f"{self._where()}: {call}: want {want!r} got {got!r}")
        if save:
            self.names[save] = reply.text
        return reply

    def same(self, got: str, want: str) -> None:
        """A text that release 4.4 words in the same way."""
        if got != want:
            self.wrong.append(f"{self._where()}: want {want!r} got {got!r}")

    def subscribe(self, key: str, dest: str = "dom0", src: str = "dom0") -> None:
        """Open a stream under a name."""
        self._streams[key] = Stream(self.instance, self.text(dest), src)

    def silent(self, key: str) -> None:
        """Nothing has come: no fence reaches a stream whose source may see nothing."""
        got = self._streams[key].waiting()
        if got:
            self.wrong.append(f"{self._where()}: {key} was told {got!r}")

    def events(self, key: str, *want: str, until: str = "") -> None:
        """Everything since the last look; until: wait for this line first."""
        stream = self._streams[key]
        got: list[str] = []
        if until:
            until = self.text(until)
            got = stream.read(lambda line: line.split(" ")[0] == until)
        got += self._drain(stream)
        got = [line for line in got if f"-set:{_FENCE} " not in line]
        expected = [self.text(line) for line in want]
        if got != expected:
            rows = [
                f"   {'  ' if a == b else '!='} {b!r:<60} {'' if a == b else a!r}"
                for a, b in zip(
                    expected + [""] * max(0, len(got) - len(expected)),
                    got + [""] * max(0, len(expected) - len(got)),
                    strict=True,
                )
            ]
            self.wrong.append("\n".join([f"{self._where()}: events of {key} (got, want):", *rows]))

    def forget(self, key: str, until: str = "") -> None:
        """Drop what has come so far."""
        stream = self._streams[key]
        if until:
            until = self.text(until)
            stream.read(lambda line: line.split(" ")[0] == until)
        self._drain(stream)

    def _drain(self, stream: Stream) -> list[str]:
        """What came before a change that is made now; nothing where the qube is gone."""
        self._fences += 1
        mark = str(self._fences)
        head = f"admin.vm.feature.Set+{_FENCE} dom0 name {stream.dest}\0{mark}".encode()
        if parse(exchange(self.instance.socket, head)).kind != "ok":
            return []
        end = f"{stream.dest}:domain-feature-set:{_FENCE}"
        return stream.read(lambda line: line.startswith(end) and f"value={mark}" in line)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()


class Stream:
    """One subscription; events as lines "subject:event key=value ..."."""

    def __init__(self, instance: Instance, dest: str, src: str = "dom0") -> None:
        self.dest = dest
        self._parser = wire.EventParser()
        self._ready: list[str] = []
        self._peer = socket.socket(socket.AF_UNIX)
        self._peer.settimeout(15)
        self._peer.connect(str(instance.socket))
        self._peer.sendall(f"admin.Events+ {src} name {dest}".encode() + b"\0")
        self._peer.shutdown(socket.SHUT_WR)
        first = self.read(lambda line: True)
        assert first == [":connection-established"], first

    def read(self, last: Callable[[str], bool]) -> list[str]:
        """Lines up to and with the first for which last() holds; stops after 10 s."""
        found: list[str] = []
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            while self._ready:
                found.append(self._ready.pop(0))
                if last(found[-1]):
                    return found
            if select.select([self._peer], [], [], 0.5)[0]:
                data = self._peer.recv(65536)
                assert data, "the stream has ended"
                self._ready += [_line(event) for event in self._parser.feed(data)]
        return [*found, "(nothing came any more)"]

    def waiting(self) -> bytes:
        """What has come by now."""
        return self._peer.recv(65536) if select.select([self._peer], [], [], 0)[0] else b""

    def close(self) -> None:
        self._peer.close()


def _line(event: wire.Event) -> str:
    pairs = (f"{k}={'*' if k in _MASKED else v}" for k, v in event.values.items())
    return " ".join([f"{event.subject}:{event.name}", *pairs])


def create(r: Script, name: str, klass: str = "AppVM", template: str = "tmpl") -> None:
    arg = template if klass in ("AppVM", "DispVM") else ""
    r.c(f"vm.Create.{klass}", arg=arg, payload=f"name={name} label=red")


XID_BURST = ("property-reset:xid name=xid", "property-reset:stubdom_xid name=stubdom_xid",
             "property-reset:start_time name=start_time")  # fmt: skip


def start_of(name: str, *nested: str) -> list[str]:
    """Events of a start; nested: those of what must run first."""
    lines = [
        "domain-pre-spawn start_guid=*",
        *XID_BURST,
        "domain-spawn start_guid=*",
        "domain-qdb-create",
        "domain-pre-unpaused",
        "domain-unpaused",
        "domain-start start_guid=*",
    ]
    return [
        f"{name}:domain-pre-start start_guid=* mem_required=*",
        f"{name}:domain-verify-files",
        *nested,
        *(f"{name}:{line}" for line in lines),
    ]


def gone(name: str) -> list[str]:
    return [f"{name}:{line}" for line in ("domain-stopped", *XID_BURST, "domain-shutdown")]


def stop_of(name: str, force: bool = False) -> list[str]:
    return [f"{name}:domain-pre-shutdown force={force}", *gone(name)]


def volumes(r: Script) -> None:
    create(r, "vol")
    create(r, "vol2")
    create(r, "big", "StandaloneVM")
    r.subscribe("all")
    r.subscribe("vol", "vol")
    r.c("vol.List", "vol", want="=root\nprivate\nvolatile\nkernel\n")
    r.c("vol.List", "dom0")
    r.c("vol.List", "vol", "x", want="ProtocolError")
    r.c("vol.List", "vol", payload="x", want="ProtocolError")
    r.c("vol.Info", "vol", "", want="ProtocolError")
    r.c("vol.Info", "vol", "nosuch", want="PermissionDenied")
    r.c("vol.Info", "vol", "private", "x", want="ProtocolError")
    r.c(
        "vol.Info",
        "vol",
        "private",
        want="~pool=varlibqubes\nvid=appvms/vol/private\n"
        "size=2147483648\nusage=\\d+\nrw=True\nsource=\npath=.*\nsave_on_stop=True\n"
        "snap_on_start=False\nrevisions_to_keep=1\nephemeral=False\nis_outdated=False\n",
    )
    r.c("vol.ListSnapshots", "vol", "private")
    r.c("vol.ListSnapshots", "vol", "kernel")
    r.c("vol.ListSnapshots", "vol", "nosuch", want="PermissionDenied")
    r.c("vol.ListSnapshots", "dom0", "private", want="PermissionDenied")
    # Resize
    grow = str(3 << 30)
    r.c("vol.Resize", "vol", "private", grow)
    r.c("vol.Info", "vol", "private", want=f"~.*\nsize={grow}\n.*")
    r.c("vol.Resize", "vol", "private", grow)
    r.c("vol.Resize", "vol", "private", str(2 << 30))
    r.c("vol.Info", "vol", "private", want=f"~.*\nsize={2 << 30}\n.*")
    r.c("vol.Resize", "vol", "private", f" {grow}\n")
    for bad in (
        "",
        "x",
        "01",
        "00",
        "-1",
        "+5",
        "1.5",
        "1G",
        "0x10",
        "1 2",
        "12345678901234567890",
    ):
        r.c("vol.Resize", "vol", "private", bad, want="ProtocolError")
    r.c("vol.Resize", "vol", "", "4096", want="ProtocolError")
    r.c("vol.Resize", "vol", "nosuch", "4096", want="PermissionDenied")
    r.c("vol.Resize", "dom0", "private", "4096", want="PermissionDenied")
    r.c("vol.Resize", "nosuch", "private", "4096", want="QubesVMNotFoundError")
    r.c("vol.Resize", "vol", "root", str(11 << 30))
    r.c("vol.Resize", "vol", "volatile", str(11 << 30))
    r.c("vol.Info", "vol", "volatile", want=f"~.*\nsize={11 << 30}\n.*")
    r.c("vol.Resize", "vol", "kernel", "2097152", want=REFUSED)
    r.c("vol.Resize", "vol", "private", "1234567")
    r.c("vol.Info", "vol", "private", want="~.*\nsize=1234567\n.*")
    r.c("vol.Resize", "vol", "private", grow)
    r.c("vol.Resize", "big", "root", str(11 << 30))
    r.c("vol.Resize", "big", "private", "0")
    r.c("vol.Info", "big", "private", want="~.*\nsize=0\n.*")
    r.c("vol.Resize", "big", "private", str(2 << 30))
    r.events("all")
    r.events("vol")
    # Clear
    r.c("vol.Clear", "vol", "private")
    r.events(
        "vol",
        f"vol:domain-volume-import-begin volume=private size={grow}",
        "vol:domain-volume-import-end volume=private success=True",
    )
    r.c("vol.ListSnapshots", "vol", "private", want="=1\n")
    r.c("vol.Info", "vol", "private", want=f"~.*\nsize={grow}\n.*")
    r.c("vol.Clear", "vol", "root", want=REFUSED)
    r.c("vol.Clear", "vol", "volatile", want=REFUSED)
    r.c("vol.Clear", "vol", "nosuch", want="PermissionDenied")
    r.c("vol.Clear", "vol", "", want="ProtocolError")
    r.c("vol.Clear", "vol", "private", "x", want="ProtocolError")
    # Revert
    r.c("vol.Revert", "vol", "private", "1")
    r.c("vol.ListSnapshots", "vol", "private", want="=2\n")
    r.c("vol.Revert", "vol", "private", "1", want=REFUSED)
    r.c("vol.Revert", "vol", "private", "2\n")
    r.c("vol.ListSnapshots", "vol", "private", want="=3\n")
    r.c("vol.Revert", "vol", "private", "nosuch", want=REFUSED)
    r.c("vol.Revert", "vol", "private", "a/b", want="ProtocolError")
    r.c("vol.Revert", "vol", "private", "a b", want="ProtocolError")
    r.c("vol.Revert", "vol", "private", "\u00e9", want="!")
    r.c("vol.Revert", "vol", "private", "", want="ProtocolError")
    r.c("vol.Revert", "vol", "private", " \n", want=REFUSED)
    r.c("vol.ListSnapshots", "vol", "private", want="=3\n")
    r.c("vol.Revert", "vol", "root", "1", want=REFUSED)
    r.c("vol.Revert", "vol", "nosuch", "1", want="PermissionDenied")
    # Set.*
    revisions = "vol.Set.revisions_to_keep"
    for good in ("0", "3", "-1", "1"):
        r.c(revisions, "vol", "private", good)
        r.c("vol.Info", "vol", "private", want=f"~.*\nrevisions_to_keep={good}\n.*")
    r.c(revisions, "vol", "private", "-2", want="QubesValueError")
    for bad in ("", "x", "01", " 1", "1\n", "1.0", "--1", "-", "True", "12345678901234567890"):
        r.c(revisions, "vol", "private", bad, want="ProtocolError")
    r.c(revisions, "vol", "root", "1")
    r.c(revisions, "vol", "volatile", "1")
    r.c(revisions, "vol", "nosuch", "1", want="PermissionDenied")
    r.c(revisions, "dom0", "private", "1", want="PermissionDenied")
    for word in ("0", "no", "FALSE", "off", "1", "yes", "True", "ON"):
        r.c("vol.Set.rw", "vol", "private", word)
    for bad in ("", "2", " 1", "maybe", "1\n", "\u00e9"):
        r.c("vol.Set.rw", "vol", "private", bad, want="ProtocolError" if bad != "\u00e9" else "!")
    r.c("vol.Set.rw", "vol", "root", "0")
    r.c("vol.Info", "vol", "root", want="~.*\nrw=False\n.*")
    r.c("vol.Set.rw", "vol", "root", "1")
    r.c("vol.Set.rw", "vol", "nosuch", "1", want="PermissionDenied")
    for word, shown in (("1", "True"), ("0", "False"), ("yes", "True"), ("off", "False")):
        r.c("vol.Set.ephemeral", "vol", "volatile", word)
        r.c("vol.Info", "vol", "volatile", want=f"~.*\nephemeral={shown}\n.*")
    r.c("vol.Set.ephemeral", "vol", "volatile", "", want="ProtocolError")
    r.c("vol.Set.ephemeral", "vol", "volatile", "x", want="ProtocolError")
    r.c("vol.Set.ephemeral", "vol", "private", "1", want="QubesValueError")
    r.c("vol.Set.ephemeral", "vol", "root", "1", want="QubesValueError")
    r.c("vol.Set.ephemeral", "vol", "kernel", "1", want="QubesValueError")
    r.c("vol.Set.ephemeral", "vol", "private", "0")
    r.c("vol.Set.ephemeral", "vol", "nosuch", "0", want="PermissionDenied")
    # CloneFrom, CloneTo
    token = "~[A-Za-z0-9]{32}"
    r.c("vol.CloneFrom", "vol", "nosuch", want="PermissionDenied")
    r.c("vol.CloneFrom", "vol", "", want="ProtocolError")
    r.c("vol.CloneFrom", "vol", "private", "x", want="ProtocolError")
    r.c("vol.CloneTo", "vol2", "private", "", want="ProtocolError")
    r.c("vol.CloneTo", "vol2", "private", "nosuch", want="QubesVolumeCopyTokenNotFoundError")
    r.c("vol.CloneTo", "vol2", "private", "x" * 32, want="QubesVolumeCopyTokenNotFoundError")
    r.c("vol.CloneFrom", "vol", "private", want=token, save="t1")
    r.forget("all")
    r.subscribe("vol2", "vol2")
    r.c("vol.CloneTo", "vol2", "private", "{t1}")
    r.events("vol2", "vol2:domain-import-volume name=private source=appvms/vol/private")
    r.events("all", "vol2:domain-import-volume name=private source=appvms/vol/private")
    r.c("vol.Info", "vol2", "private", want=f"~.*\nsize={grow}\n.*")
    r.c("vol.CloneTo", "vol2", "private", "{t1}", want="QubesVolumeCopyTokenNotFoundError")
    r.c("vol.CloneFrom", "vol", "private", want=token, save="t2")
    r.c("vol.CloneTo", "vol2", "nosuch", "{t2}", want="PermissionDenied")
    r.c("vol.CloneFrom", "tmpl", "private", want=token, save="t3")
    r.c("vol.CloneTo", "vol2", "private", " {t3}\n")
    r.c("vol.CloneFrom", "tmpl", "root", want=token, save="t4")
    r.c("vol.CloneTo", "big", "root", "{t4}")
    r.events(
        "all",
        "vol2:domain-import-volume name=private source=vm-templates/tmpl/private",
        "big:domain-import-volume name=root source=vm-templates/tmpl/root",
    )
    # Onto itself: a commit of the same data
    r.c("vol.ListSnapshots", "vol2", "private", want="=2\n")
    r.c("vol.CloneFrom", "vol2", "private", want=token, save="t5")
    r.c("vol.CloneTo", "vol2", "private", "{t5}")
    r.c("vol.ListSnapshots", "vol2", "private", want="=3\n")
    r.forget("vol2")
    # What starts anew each time takes nothing, and says so like a copy
    for volume, source in (
        ("root", "root"),
        ("volatile", "private"),
        ("root", "private"),
        ("root", "kernel"),
        ("volatile", "kernel"),
    ):
        r.c("vol.CloneFrom", "tmpl", source, want=token, save="t6")
        r.c("vol.CloneTo", "vol2", volume, "{t6}")
        vid = "6.12.1-lab" if source == "kernel" else f"vm-templates/tmpl/{source}"
        copied = f"vol2:domain-import-volume name={volume} source={vid}"
        r.events("vol2", copied)
    r.c("vol.CloneFrom", "tmpl", "kernel", want=token, save="t7")
    r.c("vol.CloneTo", "vol2", "kernel", "{t7}")
    r.c("vol.CloneFrom", "tmpl", "kernel", want=token, save="t8")
    r.c("vol.CloneTo", "vol2", "private", "{t8}", want=REFUSED)
    r.c("vol.CloneFrom", "vol2", "volatile", want=token, save="t9")
    r.c("vol.CloneTo", "vol2", "private", "{t9}", want=REFUSED)
    r.c("prop.Set", "vol2", "kernel", "")
    r.c("vol.Info", "vol2", "kernel", want="~pool=linux-kernel\nvid=\nsize=0\n.*")
    # The internal pair
    begin, end = "internal.vm.volume.ImportBegin", "internal.vm.volume.ImportEnd"
    r.c(begin, "vol", "nosuch", want="ProtocolError", internal=True)
    r.c(begin, "vol", "private", "x", want="ProtocolError", internal=True)
    r.c(begin, "vol", "private", want="~3221225472 /[^ ]+", internal=True)
    r.events("vol", f"vol:domain-volume-import-begin volume=private size={grow}")
    r.c(end, "vol", "private", "fail\nno data", want="QubesException", internal=True)
    r.events("vol", "vol:domain-volume-import-end volume=private success=False")
    r.c(begin, "vol", "private", "4096", want="~4096 /[^ ]+", internal=True)
    r.c(end, "vol", "private", "ok", internal=True)
    r.events(
        "vol",
        "vol:domain-volume-import-begin volume=private size=4096",
        "vol:domain-volume-import-end volume=private success=True",
    )
    r.c("vol.Info", "vol", "private", want="~.*\nsize=4096\n.*")
    r.c(end, "vol", "private", "ok", want=REFUSED, internal=True)
    r.c(end, "vol", "nosuch", "ok", want="ProtocolError", internal=True)
    r.c(begin, "vol", "root", want=REFUSED, internal=True)
    # Running
    r.c("vm.Start", "vol")
    r.events("vol", *start_of("vol"), until="vol:domain-start")
    r.c("vol.Info", "vol", "private", want="~.*\nsize=4096\n.*is_outdated=False\n")
    r.c("vol.Resize", "vol", "private", grow, want="StoragePoolException")
    r.c("vol.Info", "vol", "private", want=f"~.*\nsize={grow}\n.*")
    r.c("vol.Set.rw", "vol", "private", "0", want="QubesVMNotHaltedError")
    r.c("vol.Set.rw", "vol", "private", "x", want="ProtocolError")
    r.c(revisions, "vol", "private", "2")
    r.c(revisions, "vol", "private", "-1", want="QubesVMNotHaltedError")
    r.c("vol.Set.ephemeral", "vol", "volatile", "0")
    r.c(begin, "vol", "private", want="QubesVMNotHaltedError", internal=True)
    r.c("vol.CloneFrom", "vol", "private", want=token, save="t5")
    r.c("vol.CloneTo", "vol2", "private", "{t5}")
    r.c("vol.Revert", "vol", "private", "3", want=REFUSED)
    r.c("vm.Kill", "vol")
    r.events("vol", *gone("vol"), until="vol:domain-shutdown")
    r.c("vol.ListSnapshots", "vol", "private", want="~\\d+\n\\d+\n")
    r.c("vm.Remove", "vol")
    r.events("vol", "vol:domain-remove-from-disk", until="vol:domain-remove-from-disk")


def pools(r: Script) -> None:
    base = str(r.pool)
    r.forget("all")
    add = "pool.Add"
    r.c("pool.ListDrivers", arg="x", want="ProtocolError")
    for bad in (
        "",
        "name=p1",
        "garbage\n",
        f"name=p1\ndir_path={base}/p1\nname=p1\n",
        f"dir_path={base}/p1\n",
        f"name=a/b\ndir_path={base}/p1\n",
        f"name=p1\ndir_path={base}/p1\nnosuch=1\n",
        f"name=p1\ndir_path={base}/p1\nephemeral_volatile=yes\n",
        f"name=p1\ndir_path={base}/p1\nrevisions_to_keep=x\n",
    ):
        want = "ProtocolError" if bad != "name=p1" else "QubesException"
        r.c(add, arg="file-reflink", payload=bad, want=want)
    many = f"name=p1\ndir_path={base}/p1\nrevisions_to_keep=2\n"
    r.c(add, arg="file", payload=many, want=REFUSED)
    r.c(add, arg="nosuch", payload="name=p1\n", want="PermissionDenied")
    r.c(add, arg="", payload="name=p1\n", want="ProtocolError")
    r.c(add, "tmpl", "file-reflink", "name=p1\n", want="ProtocolError")
    r.c(
        add,
        arg="file-reflink",
        payload="name=varlibqubes\ndir_path=/x\n",
        want="QubesPoolInUseError",
    )
    r.c(add, arg="lvm_thin", payload="name=p9\n", want="QubesException")
    r.events("all")
    r.c(add, arg="file-reflink", payload=f"name=p1\ndir_path={base}/p1\n")
    r.events("all", ":pool-add pool=p1")
    r.c(
        "pool.Info",
        arg="p1",
        want=f"~dir_path={base}/p1\ndriver=file-reflink\n"
        "ephemeral_volatile=False\nname=p1\nrevisions_to_keep=1\nsize=\\d+\nusage=\\d+\n"
        "included_in=varlibqubes\n",
    )
    r.c("pool.UsageDetails", arg="p1", want="~data_size=\\d+\ndata_usage=\\d+\n")
    r.c("pool.volume.List", arg="p1")
    r.c(
        add,
        arg="file-reflink",
        payload=f"name=p1\ndir_path={base}/p1\n",
        want="QubesPoolInUseError",
    )
    r.c(
        add,
        arg="file",
        payload=f"name=p2\ndir_path={base}/p2\nrevisions_to_keep=0\nephemeral_volatile=True\n",
    )
    r.events("all", ":pool-add pool=p2")
    r.c(
        "pool.Info",
        arg="p2",
        want=f"~dir_path={base}/p2\ndriver=file\nephemeral_volatile=True\n"
        "name=p2\nrevisions_to_keep=0\nsize=\\d+\nusage=\\d+\nincluded_in=varlibqubes\n",
    )
    r.c("pool.Set.revisions_to_keep", arg="p2", payload="2", want=REFUSED)
    r.c("pool.Set.revisions_to_keep", arg="p2", payload="1")
    # The plain file driver keeps revisions of what lasts only
    r.c("vm.CreateInPool.TemplateVM", payload="name=plain1 label=red pool=p2")
    r.c("vm.CreateInPool.AppVM", arg="plain1", payload="name=plain2 label=red pool=p2")
    for name, volume, number in (
        ("plain1", "root", 1),
        ("plain1", "private", 1),
        ("plain1", "volatile", 0),
        ("plain2", "root", 0),
        ("plain2", "private", 1),
        ("plain2", "volatile", 0),
    ):
        r.c("vol.Info", name, volume, want=f"~pool=p2\n.*\nrevisions_to_keep={number}\n.*")
    r.c("vm.Remove", "plain2")
    r.c("vm.Remove", "plain1")
    r.forget("all")
    r.c(add, arg="file-reflink", payload=f"name=p3\ndir_path={base}/p3\nsetup_check=False\n")
    shown = f"~dir_path={base}/p3\ndriver=file-reflink\nephemeral_volatile=False\nname=p3\n"
    r.c("pool.Info", arg="p3", want=shown + "revisions_to_keep=1\nsize=.*")
    r.c("pool.Remove", arg="p3")
    r.events("all", *[f":pool-{what} pool=p3" for what in ("add", "pre-delete", "delete")])
    for klass in ("AppVM", "StandaloneVM", "RemoteVM"):
        text = "name=x1 label=red pool=nosuch"
        r.c(f"vm.CreateInPool.{klass}", payload=text, want="QubesException")
    r.c("pool.List", want="=varlibqubes\nlinux-kernel\np1\np2\n")
    r.c("pool.Set.revisions_to_keep", arg="p1", payload="3")
    r.c("pool.Set.revisions_to_keep", arg="p1", payload="2147483647")
    r.c(
        "pool.Info",
        arg="p1",
        want="~.*\nephemeral_volatile=False\n.*\nrevisions_to_keep=2147483647\n.*",
    )
    r.c("pool.Set.revisions_to_keep", arg="p1", payload="-1")
    for bad in ("", "-2", "x", "01", " 1"):
        r.c("pool.Set.revisions_to_keep", arg="p1", payload=bad, want="ProtocolError")
    r.c("pool.Set.revisions_to_keep", arg="nosuch", payload="1", want="PermissionDenied")
    r.c("pool.Set.revisions_to_keep", arg="linux-kernel", payload="1", want=REFUSED)
    for word in ("True", "0"):
        r.c("pool.Set.ephemeral_volatile", arg="linux-kernel", payload=word)
    kernels = f"=dir_path={base}/vm-kernels\ndriver=linux-kernel\nname=linux-kernel\n"
    r.c("pool.Info", arg="linux-kernel", want=kernels + "included_in=varlibqubes\n")
    r.c("pool.Set.revisions_to_keep", "tmpl", "p1", "1", want="ProtocolError")
    for word in ("True", "0", "yes", "off"):
        r.c("pool.Set.ephemeral_volatile", arg="p1", payload=word)
    for bad in ("", "2", " 1"):
        r.c("pool.Set.ephemeral_volatile", arg="p1", payload=bad, want="ProtocolError")
    r.c("pool.Set.ephemeral_volatile", arg="nosuch", payload="1", want="PermissionDenied")
    r.c(
        "pool.Info",
        arg="p1",
        want="~.*\nephemeral_volatile=False\nname=p1\nrevisions_to_keep=-1\n.*",
    )
    r.c("pool.Set.revisions_to_keep", arg="p1", payload="2")
    r.c("vm.CreateInPool.AppVM", arg="tmpl", payload="name=pooled label=red pool=p1")
    r.c(
        "vol.Info",
        "pooled",
        "private",
        want="~pool=p1\nvid=appvms/pooled/private\n.*\nrevisions_to_keep=2\n.*",
    )
    r.c("pool.volume.List", arg="p1", want="~(?=.*appvms/pooled/private\n)(?=.*/volatile\n).*")
    r.c("pool.Remove", arg="p1", want="QubesPoolInUseError")
    r.c("vol.CloneFrom", "pooled", "private", want="~.{32}", save="gone")
    r.c("vm.Remove", "pooled")
    r.c("vol.CloneTo", "big", "private", "{gone}", want=REFUSED)
    r.events(
        "all",
        ":domain-add vm=pooled",
        "pooled:domain-tag-add:created-by-dom0 tag=created-by-dom0",
        "pooled:domain-create-on-disk",
        ":domain-pre-delete vm=pooled",
        ":domain-delete vm=pooled",
    )
    r.c("sys.Set", arg="default_pool_private", payload="p1")
    r.c("pool.Remove", arg="p1", want="QubesPoolInUseError")
    r.c("sys.Reset", arg="default_pool_private")
    r.c("pool.Remove", arg="varlibqubes", want="QubesPoolInUseError")
    r.c("pool.Remove", arg="linux-kernel", want="QubesPoolInUseError")
    r.c("pool.Remove", arg="nosuch", want="PermissionDenied")
    r.c("pool.Remove", arg="", want="ProtocolError")
    r.c("pool.Remove", arg="p1", payload="x", want="ProtocolError")
    r.c("pool.Remove", "tmpl", "p1", want="ProtocolError")
    values = "default_pool_private name=default_pool_private"
    r.events(
        "all",
        f":property-pre-set:{values} newvalue=p1 oldvalue=varlibqubes",
        f":property-set:{values} newvalue=p1 oldvalue=varlibqubes",
        ":property-pre-reset:default_pool_private name=default_pool_private oldvalue=p1",
        ":property-pre-del:default_pool_private name=default_pool_private oldvalue=p1",
        ":property-reset:default_pool_private name=default_pool_private oldvalue=p1",
        ":property-del:default_pool_private name=default_pool_private oldvalue=p1",
    )
    r.c("pool.Remove", arg="p1")
    r.c("pool.Remove", arg="p2")
    r.c("pool.Remove", arg="p2", want="PermissionDenied")
    r.events(
        "all",
        ":pool-pre-delete pool=p1",
        ":pool-delete pool=p1",
        ":pool-pre-delete pool=p2",
        ":pool-delete pool=p2",
    )
    r.c("pool.List", want="=varlibqubes\nlinux-kernel\n")


def state(r: Script, name: str, power: str) -> None:
    r.c(
        "vm.CurrentState",
        name,
        want=f"~mem=\\d+ mem_static_max=\\d+ cputime=\\d+ power_state={power}",
    )


def power(r: Script) -> None:
    create(r, "rem", "RemoteVM")
    create(r, "app")
    create(r, "net")
    create(r, "net2")
    create(r, "client")
    r.forget("all")
    for method in ("Start", "Shutdown", "Kill", "Pause", "Unpause", "Suspend", "Resume"):
        r.c(f"vm.{method}", "nosuch", want="QubesVMNotFoundError")
        r.c(f"vm.{method}", "app", payload="x", want="ProtocolError")
        r.c(f"vm.{method}", "app", "nosuch", want="ProtocolError")
    for name in ("dom0", "rem"):
        r.c("vm.Start", name, want="QubesVMNotHaltedError")
        r.c("vm.Shutdown", name, want=REFUSED)
        r.c("vm.Kill", name, want="QubesVMError")
        r.c("vm.Pause", name, want=REFUSED)
        r.c("vm.Unpause", name, want=REFUSED)
        r.c("vm.Suspend", name, want="QubesVMError")
        r.c("vm.Resume", name, want=REFUSED)
    r.events("all")
    # Halted
    r.c("vm.CurrentState", "app", want="=mem=0 mem_static_max=0 cputime=0 power_state=Halted")
    r.c("vm.CurrentState", "app", "x", want="ProtocolError")
    r.c("vm.Shutdown", "app", want="QubesVMNotStartedError")
    r.c("vm.Shutdown", "app", "force", want="QubesVMNotStartedError")
    r.c("vm.Shutdown", "app", "wait", want="QubesVMNotStartedError")
    r.c("vm.Kill", "app", want="QubesVMNotStartedError")
    r.c("vm.Pause", "app", want="QubesVMNotRunningError")
    r.c("vm.Unpause", "app", want="QubesVMNotPausedError")
    r.c("vm.Suspend", "app", want="QubesVMNotRunningError")
    r.c("vm.Resume", "app", want="QubesVMNotPausedError")
    r.c("vm.Console", "app", want="QubesVMNotRunningError")
    r.c("vm.Console", "app", "x", want="ProtocolError")
    r.events("all")
    # Running
    r.subscribe("app", "app")
    r.c("vm.Start", "app")
    r.events("all", *start_of("app"))
    r.events("app", *start_of("app"))
    state(r, "app", "Running")
    r.c("vm.List", "app", want="~app class=AppVM state=Running uuid=[0-9a-f-]{36}\n")
    r.c("prop.Get", "app", "xid", want="~default=True type=int [1-9]\\d*")
    r.c("prop.Get", "app", "start_time", want="~default=True type=str \\d+\\.\\d+")
    r.c("vm.Start", "app")
    r.c("vm.Unpause", "app", want="QubesVMNotPausedError")
    r.c("vm.Resume", "app", want="QubesVMNotPausedError")
    r.c("vm.Remove", "app", want="QubesVMNotHaltedError")
    r.c("prop.Set", "app", "template", "tmpl", want="QubesVMNotHaltedError")
    r.c("vm.Console", "app")  # a simulated guest has no tty
    r.forget("all")
    r.forget("app")
    # Paused
    r.c("vm.Pause", "app")
    r.events("all", "app:domain-pre-paused", "app:domain-paused", until="app:domain-paused")
    state(r, "app", "Paused")
    r.c("vm.Console", "app")  # a simulated guest has no tty
    r.c("vm.Start", "app")
    r.c("vm.Shutdown", "app", want="QubesVMNotRunningError")
    said = r.c("vm.Shutdown", "app", "wait", want="QubesVMNotRunningError").message
    r.same(said, "Domain not running (either powered off or paused): 'app'")
    r.events(
        "all",
        "app:domain-pre-shutdown force=False",
        "app:domain-shutdown-failed reason=*",
        "app:domain-pre-shutdown force=False",
        "app:domain-shutdown-failed reason=*",
    )
    r.c("vm.Pause", "app")
    r.forget("all")
    r.c("vm.Unpause", "app")
    r.events("all", "app:domain-pre-unpaused", "app:domain-unpaused", until="app:domain-unpaused")
    state(r, "app", "Running")
    r.c("vm.Pause", "app")
    r.c("vm.Resume", "app")
    r.events(
        "all",
        "app:domain-pre-paused",
        "app:domain-paused",
        "app:domain-pre-unpaused",
        "app:domain-unpaused",
        until="app:domain-unpaused",
    )
    r.forget("all")
    r.c("vm.Suspend", "app")
    state(r, "app", "Suspended")
    r.c("vm.Pause", "app", want=REFUSED)
    r.c("vm.Resume", "app")
    state(r, "app", "Running")
    # A guest that sleeps wakes up to stop.
    r.c("vm.Suspend", "app")
    r.c("vm.Start", "app")
    r.forget("all")
    r.c("vm.Shutdown", "app", "wait")
    r.events("all", *stop_of("app"), until="app:domain-shutdown")
    r.c("vm.Start", "app")
    r.forget("all")
    r.c("vm.Pause", "app")
    r.forget("all")
    r.c("vm.Suspend", "app")
    r.events("all", "app:domain-pre-paused")
    r.c("vm.Unpause", "app")
    r.forget("all")
    r.c("vm.Pause", "app")
    r.c("vm.Shutdown", "app", "force")
    r.events(
        "all",
        "app:domain-pre-paused",
        "app:domain-paused",
        *stop_of("app", True),
        until="app:domain-shutdown",
    )
    state(r, "app", "Halted")
    # Words of Shutdown, and Kill in each state
    for words, force in (
        ("", False),
        ("force", True),
        ("wait", False),
        ("force+wait", True),
        ("wait+force", True),
        ("wait+wait", False),
    ):
        r.c("vm.Start", "app")
        r.forget("all")
        r.c("vm.Shutdown", "app", words)
        state(r, "app", "Halted")  # these guests are gone at once
        r.c("vm.Shutdown", "app", want="QubesVMNotStartedError")
        r.events("all", *stop_of("app", force), until="app:domain-shutdown")
    r.c("vm.Start", "app")
    r.c("vm.Shutdown", "app", "force+nosuch", want="ProtocolError")
    r.c("vm.Shutdown", "app", "Force", want="ProtocolError")
    r.forget("all")
    r.c("vm.Kill", "app")
    r.events("all", *gone("app"), until="app:domain-shutdown")
    r.c("vm.Kill", "app", want="QubesVMNotStartedError")
    r.c("vm.Start", "app")
    r.c("vm.Pause", "app")
    r.forget("all")
    r.c("vm.Kill", "app")
    r.events("all", *gone("app"), until="app:domain-shutdown")
    r.forget("app")
    # Refused starts
    r.c("feat.Set", "app", "prohibit-start", "no")
    r.forget("all")
    r.c("vm.Start", "app", want="QubesException")
    r.events("all", "app:domain-start-failed reason=*")
    r.c("feat.Set", "app", "prohibit-start", "")
    r.c("tag.Set", "app", "backup-restore-in-progress")
    r.forget("all")
    r.c("vm.Start", "app", want="QubesVMError")
    r.events(
        "all",
        "app:domain-pre-start start_guid=* mem_required=*",
        "app:domain-start-failed reason=*",
    )
    r.c("tag.Remove", "app", "backup-restore-in-progress")
    r.c("prop.Set", "app", "memory", "900000")
    r.c("prop.Set", "app", "maxmem", "0")
    r.forget("all")
    said = r.c("vm.Start", "app", want="QubesMemoryError").message
    r.same(said, "Not enough memory to start domain 'app'")
    r.events(
        "all",
        "app:domain-pre-start start_guid=* mem_required=*",
        "app:domain-verify-files",
        "app:domain-start-failed reason=*",
    )
    r.c("prop.Reset", "app", "memory")
    r.c("prop.Reset", "app", "maxmem")
    # A guest whose agent never comes
    r.c("feat.Set", "app", "qrexec", "1")
    r.forget("all")
    r.c("vm.Start", "app")
    r.events("all", *start_of("app"))
    state(r, "app", "Transient")
    r.c("vm.Pause", "app")
    state(r, "app", "Paused")
    r.c("vm.Unpause", "app")
    state(r, "app", "Transient")
    r.c("vm.Shutdown", "app", "wait")
    r.c("feat.Remove", "app", "qrexec")
    # Templates
    r.forget("all")
    r.c("vm.Start", "tmpl")
    r.events("all", *start_of("tmpl"))
    r.c("vm.Start", "app")
    r.c("vm.Shutdown", "tmpl", "wait")
    r.c("vol.Info", "app", "root", want="~.*\nis_outdated=True\n")
    r.c("vm.Kill", "app")
    r.c("vol.Info", "app", "root", want="~.*\nis_outdated=False\n")
    # Networks
    r.c("prop.Set", "net", "provides_network", "True")
    r.c("prop.Set", "net2", "provides_network", "True")
    r.c("prop.Set", "net", "netvm", "net2")
    r.c("prop.Set", "client", "netvm", "net")
    r.forget("all")
    r.subscribe("net", "net")
    r.c("vm.Start", "client")
    r.events("all", *start_of("client", *start_of("net", *start_of("net2"))))
    r.events("net", *start_of("net"))
    r.c("vm.Shutdown", "net", want="QubesVMInUseError")
    r.c("vm.Shutdown", "net", "wait", want="QubesVMInUseError")
    r.c("vm.Shutdown", "net2", want="QubesVMInUseError")
    r.events(
        "all",
        *["net:domain-pre-shutdown force=False", "net:domain-shutdown-failed reason=*"] * 2,
        "net2:domain-pre-shutdown force=False",
        "net2:domain-shutdown-failed reason=*",
    )
    r.c("prop.Set", "client", "netvm", "client", want=REFUSED)
    r.forget("all")
    r.c("vm.Shutdown", "net", "force+wait")
    r.events("all", *stop_of("net", True))
    state(r, "client", "Running")
    r.c("vm.Start", "net")
    r.c("vm.Shutdown", "client", "wait")
    r.c("vm.Shutdown", "net", "wait")
    r.c("vm.Shutdown", "net2", "wait")
    r.forget("all")
    r.c("vm.Start", "client")
    r.forget("all")
    r.c("prop.Set", "client", "netvm", "")
    r.events(
        "all",
        "client:property-pre-set:netvm name=netvm newvalue=None oldvalue=net",
        "client:property-set:netvm name=netvm newvalue=None oldvalue=net",
    )
    r.c("vm.Kill", "net")
    r.c("prop.Set", "client", "netvm", "net", want="QubesVMNotStartedError")
    r.c("prop.Set", "client", "netvm", "net2")
    r.c("vm.Kill", "net2")
    r.c("vm.Kill", "client")
    r.c("prop.Set", "client", "netvm", "net")
    r.c("feat.Set", "net2", "prohibit-start", "1")
    r.forget("all")
    # One refusal goes through the chain, word for word.
    said = r.c("vm.Start", "client", want="QubesException").message
    r.same(said, "Qube start is prohibited. Rationale: 1")
    r.events(
        "all",
        "client:domain-pre-start start_guid=* mem_required=*",
        "client:domain-verify-files",
        "net:domain-pre-start start_guid=* mem_required=*",
        "net:domain-verify-files",
        "net2:domain-start-failed reason=*",
        "net:domain-start-failed reason=*",
        "client:domain-start-failed reason=*",
    )
    r.c("feat.Remove", "net2", "prohibit-start")


def devices(r: Script) -> None:
    create(r, "dev")
    create(r, "back")
    r.forget("all")
    r.subscribe("dev", "dev")
    r.c("admin.deviceclass.List", want="~.*block\\n.*")
    for kind in ("pci", "block"):
        for method in ("Available", "Assigned", "Attached"):
            r.c(f"dev.{kind}.{method}", "dev")
            r.c(f"dev.{kind}.{method}", "rem")
            r.c(f"dev.{kind}.{method}", "dev", payload="x", want="ProtocolError")
            r.c(f"dev.{kind}.{method}", "nosuch", want="QubesVMNotFoundError")
        r.c(f"dev.{kind}.Available", "dev", "nosuch")
        r.c(f"dev.{kind}.Assigned", "dev", "back+nosuch")
        r.c(f"dev.{kind}.Attached", "dev", "back+nosuch")
        r.c(f"dev.{kind}.Assigned", "dev", "nosuch", want=REFUSED)
        r.c(f"dev.{kind}.Attached", "dev", "nosuch", want=REFUSED)
    r.c("dev.nosuch.Available", "dev", want="ProtocolError")
    r.c("dev.usb.Available", "dev", want="ProtocolError")
    assign, unassign, change = "dev.block.Assign", "dev.block.Unassign", "dev.block.Set.assignment"
    mode = "mode='{}'".format
    r.c(assign, "dev", "", mode("required"), want="ProtocolError")
    r.c(assign, "dev", "back+sda", "", want="ProtocolError")
    r.c(assign, "dev", "back", mode("required"), want=REFUSED)
    r.c(assign, "dev", "nosuch+sda", mode("required"), want=REFUSED)
    r.c(assign, "dev", "back+sda", mode("manual"), want=REFUSED)
    r.c(assign, "dev", "back+sda", mode("nosuch"), want="ProtocolError")
    r.c(assign, "dev", "back+sda", "garbage", want="ProtocolError")
    r.c(assign, "dev", "back+sda", "mode='required' port_id='sdb'", want="ProtocolError")
    r.c(assign, "dev", "back+sda", "mode='required' backend_domain='dev'", want="ProtocolError")
    r.c(assign, "dev", "back+sda", "mode='required' devclass='pci'", want="ProtocolError")
    r.c(assign, "dev", "back+sda", "mode='required' nosuch='1'", want="ProtocolError")
    r.c(assign, "dev", "back+sda", "mode='required' _read-only='a\nb'", want="ProtocolError")
    r.c(assign, "dev", "back+sda", "mode='required", want="ProtocolError")
    r.c(assign, "dev", "*+sda", mode("required"), want=REFUSED)
    r.c(assign, "dev", "rem+sda+1+2", mode("required"), want=REFUSED)
    r.events("all")
    r.c(assign, "dev", "back+sda", "mode='auto-attach' _read-only='yes'")
    r.events(
        "all",
        "dev:device-pre-assign:block device=back:sda:* options={'read-only': 'yes'}",
        "dev:device-assign:block device=back:sda:* options={'read-only': 'yes'}",
    )
    line = (
        "back+sda:* device_id='*' port_id='sda' devclass='block' backend_domain='back'"
        " mode='{}' _read-only='yes'\n"
    ).format
    r.c("dev.block.Assigned", "dev", want="=" + line("auto-attach"))
    r.c("dev.block.Assigned", "dev", "back+sda", want="=" + line("auto-attach"))
    r.c("dev.block.Assigned", "dev", "back+sdb")
    r.c("dev.block.Attached", "dev")
    r.c(assign, "dev", "back+sda", mode("required"), want="DeviceAlreadyAssigned")
    r.c(assign, "dev", "back+sda+_", mode("required"), want="DeviceAlreadyAssigned")
    r.c(change, "dev", "back+sda", "nosuch", want="QubesUnrecognizedDeviceAssignmentMode")
    r.c(change, "dev", "back+sda", "manual", want="QubesUnrecognizedDeviceAssignmentMode")
    r.c(change, "dev", "back+sda", "", want="ProtocolError")
    r.c(change, "dev", "back+sdb", "required", want="QubesValueError")
    r.c(change, "dev", "back+sda", "auto-attach")
    r.forget("all")
    for new in ("ask-to-attach", "required", "auto-attach"):
        r.c(change, "dev", "back+sda", new)
        r.c("dev.block.Assigned", "dev", want="=" + line(new))
    r.events(
        "all",
        *[
            "dev:device-pre-assign:block device=back:sda:* options={'read-only': 'yes'}",
            "dev:device-assignment-changed:block device=back:sda:*",
        ]
        * 3,
    )
    # Who uses it is said where it was told, and what no quote closes is cut.
    told = "mode='auto-attach' frontend_domain='dev' device_id=''  _read-only='yes"
    r.c(assign, "dev", "rem+sdc", told)
    r.c(
        "dev.block.Assigned",
        "dev",
        "rem+sdc",
        want="=rem+sdc:* device_id='*' port_id='sdc' devclass='block' backend_domain='rem'"
        " mode='auto-attach' frontend_domain='dev' _read-only='ye'\n",
    )
    r.c("vm.Remove", "rem", want="QubesVMInUseError")
    r.c(unassign, "dev", "rem+sdc")
    r.c(assign, "dev", "back+sdb+dead+beef", mode("ask-to-attach"))
    r.c(assign, "dev", "back+_+dead+beef", mode("ask-to-attach"))
    r.c(assign, "dev", "dom0+00_1f.2", mode("required"), want="")
    r.c("dev.pci.Assign", "dev", "dom0+00_1f.2", "mode='required' _no-strict-reset='True'")
    r.forget("all")
    said = r.c("vm.Start", "dev", want="QubesException").message
    r.same(said, "Block device dom0:00_1f.2:* not available")
    r.events(
        "all",
        "dev:domain-pre-start start_guid=* mem_required=*",
        "dev:domain-start-failed reason=*",
    )
    r.c("vm.Remove", "back", want="QubesVMInUseError")
    r.c(unassign, "dev", "back+sdb", want="DeviceNotAssigned")
    r.c(unassign, "dev", "back+nosuch", want="DeviceNotAssigned")
    r.c(unassign, "dev", "nosuch+sda", want=REFUSED)
    r.c(unassign, "dev", "back", want=REFUSED)
    r.c(unassign, "dev", "", want="ProtocolError")
    r.c(unassign, "dev", "back+sda", "x", want="ProtocolError")
    r.forget("all")
    r.c(unassign, "dev", "back+sdb+dead+beef")
    r.c(unassign, "dev", "back+_+dead+beef")
    r.c(unassign, "dev", "dom0+00_1f.2")
    r.c("dev.pci.Unassign", "dev", "dom0+00_1f.2")
    r.c(unassign, "dev", "back+sda+_")
    r.events(
        "all",
        *(
            f"dev:device-unassign:{what}"
            for what in (
                "block device=back:sdb:dead:beef",
                "block device=back:*:dead:beef",
                "block device=dom0:00_1f.2:*",
                "pci device=dom0:00_1f.2:*",
                "block device=back:sda:*",
            )
        ),
    )
    r.c(unassign, "dev", "back+sda", want="DeviceNotAssigned")
    # Arguments as they are listed and told
    for arg, listed in (
        ("back+sdx+dead+beef++u080650", "back+sdx:dead:beef::u080650"),
        ("back+sdx+_", "back+sdx:*"),
        ("back+sdx+", "back+sdx:*"),
        ("back+sdx+_______", "back+sdx:?******"),
        ("back+sdx+0000+0000++_______", "back+sdx:0000:0000::?******"),
        ("back+sdx+_+_", "back+sdx:_:_"),
        ("_+_", "*+*:*"),
        ("_+sdx", "*+sdx:*"),
        ("back+_+dead+beef", "back+*:dead:beef"),
        ("dev+sdx", "dev+sdx:*"),
    ):
        backend, _, rest = listed.partition("+")
        port, _, devid = rest.partition(":")
        line_of = (
            f"{listed} device_id='{devid}' port_id='{port}' devclass='block'"
            f" backend_domain='{backend}' mode='ask-to-attach'\n"
        )
        r.c(assign, "dev", arg, mode("ask-to-attach"))
        r.c("dev.block.Assigned", "dev", want="=" + line_of)
        r.c("dev.block.Assigned", "dev", f"{backend}+{port}", want="=" + line_of)
        r.c(unassign, "dev", arg)
        told = f"device={backend}:{port}:{devid}"
        r.events(
            "all",
            f"dev:device-pre-assign:block {told} options={{}}",
            f"dev:device-assign:block {told} options={{}}",
            f"dev:device-unassign:block {told}",
        )
    # Payloads that are read as they are meant
    for extra, option in (
        ("", ""),
        ("  _x='O\\'Brien'", "_x='O\\'Brien'"),
        (" _x='a=b' ", "_x='a=b'"),
        (" __x='1' _='2'", "__x='1' _='2'"),
        (" _x='' mode='required'\n", "_x=''"),
        (" _x='a\\b'", "_x='a\\b'"),
    ):
        r.c(assign, "dev", "back+sda", mode("required") + extra)
        line_of = (
            "back+sda:* device_id='*' port_id='sda' devclass='block' backend_domain='back'"
            f" mode='required'{' ' if option else ''}{option}\n"
        )
        r.c("dev.block.Assigned", "dev", want="=" + line_of)
        r.c(unassign, "dev", "back+sda")
    for bad in (
        "mode='REQUIRED'", "mode=required", "Mode='required'", "mode=''", "'", "='x'",
        "mode='required'mode='required'", "mode='required'x", "mode='required'\t_x='1'",
        "mode='required' _x='a='b'", "mode='required' _x='\u00e9'",
        "mode='required' device='x'", "mode='required' vendor='x'", "mode='required' x='y'",
        "mode='required' port_id='*'", "mode='required' backend_domain=''",
        "mode='required' frontend_domain='back'",
    ):  # fmt: skip
        r.c(assign, "dev", "back+sda", bad, want="ProtocolError")
    r.c("dev.block.Assigned", "dev")
    # Attach and Detach
    attach, detach = "dev.block.Attach", "dev.block.Detach"
    r.c(attach, "dev", "back+sda", want="QubesVMNotRunningError")
    r.c(detach, "dev", "back+sda", want="DeviceNotAssigned")
    r.c("vm.Start", "dev")
    r.forget("all")
    r.c(attach, "dev", "back+sda", want="ProtocolError")
    r.c(attach, "dev", "back+_", want="ProtocolError")
    r.c(attach, "dev", "nosuch+sda", want=REFUSED)
    r.c(attach, "dev", "back+sda", "mode='nosuch'", want="ProtocolError")
    r.c(detach, "dev", "back+sda", want="DeviceNotAssigned")
    r.c(detach, "dev", "back+sda", "x", want="ProtocolError")
    r.c(assign, "dev", "back+sda", mode("auto-attach"))
    r.c(unassign, "dev", "back+sda")
    r.c("vm.Kill", "dev")
    # Denied interfaces
    denied = "dev.denied."
    r.forget("all")
    r.c(denied + "List", "dev")
    r.c(denied + "List", "dev", "x", want="ProtocolError")
    r.c(denied + "Add", "dev", "x", "b******", want="ProtocolError")
    r.c(denied + "Add", "dev", payload="u08****b******")
    r.c(denied + "List", "dev", want="=b******\nu08****")
    r.events(
        "all",
        "dev:property-pre-set:devices_denied name=devices_denied newvalue=b******u08**** oldvalue=",
        "dev:property-set:devices_denied name=devices_denied newvalue=b******u08**** oldvalue=",
    )
    r.c(denied + "Add", "dev", payload="b******")
    r.c(denied + "Add", "dev", payload="b*****", want="QubesValueError")
    r.c(denied + "Add", "dev", payload="m******m******", want="ProtocolError")
    r.c(denied + "Add", "dev", payload="z******", want="QubesPropertyValueError")
    r.c(denied + "Add", "dev", payload="m*****g", want="QubesPropertyValueError")
    r.c(denied + "Add", "dev", payload="\u00e9******", want="ProtocolError")
    r.c(denied + "Remove", "dev", payload="m******")
    r.c(denied + "Remove", "dev", payload="b*****", want="QubesValueError")
    r.c(denied + "Remove", "dev", payload="b******b******", want="ProtocolError")
    r.c(denied + "Remove", "dev", payload="u08****")
    r.c(denied + "List", "dev", want="=b******")
    r.c("prop.Get", "dev", "devices_denied", want="=default=False type=str b******")
    r.c(denied + "Remove", "dev", payload="all")
    r.c(denied + "List", "dev")
    r.c(denied + "Add", "dev")
    r.c(denied + "Remove", "dev")
    r.c(denied + "Add", "dom0", payload="b******")
    r.c(denied + "List", "dom0", want="=b******")
    r.c(denied + "Remove", "dom0", payload="all")
    r.c(denied + "List", "nosuch", want="QubesVMNotFoundError")


def disposables(r: Script) -> None:
    create(r, "dvm")
    create(r, "plain")
    r.forget("all")
    dispose, name = "vm.CreateDisposable", "~disp\\d{1,4}"
    r.c(dispose, want="QubesException")
    r.c(dispose, "plain", want="QubesException")
    r.c(dispose, "tmpl", want=REFUSED)
    r.c(dispose, "nosuch", want="QubesVMNotFoundError")
    r.c("prop.Set", "dvm", "template_for_dispvms", "maybe", want="QubesValueError")
    r.forget("all")
    r.c("prop.Set", "dvm", "template_for_dispvms", "True")
    values = "name=template_for_dispvms newvalue=True oldvalue=False"
    r.events(
        "all",
        f"dvm:property-pre-set:template_for_dispvms {values}",
        "dvm:property-reset:icon name=icon",
        f"dvm:property-set:template_for_dispvms {values}",
    )
    r.c("prop.Get", "dvm", "icon", want="=default=True type=str templatevm-red")
    for bad in ("nosuch", "uuid"):
        r.c(dispose, "dvm", bad, want="PermissionDenied")
    r.c(dispose, "dvm", "", "nosuch", want="ProtocolError")
    r.c(dispose, "dvm", "", "UUID", want="ProtocolError")
    r.c("sys.Set", arg="default_dispvm", payload="plain", want="QubesPropertyValueError")
    r.c("prop.Set", "dvm", "vcpus", "3")
    r.c("prop.Set", "dvm", "label", "green")
    r.c("feat.Set", "dvm", "service.x", "1")
    r.c("feat.Set", "dvm", "preload-dispvm-delay", "1")
    r.c("tag.Set", "dvm", "mytag")
    r.c("vm.firewall.Set", "dvm", payload="action=drop\n")
    r.forget("all")
    r.c(dispose, "dvm", want=name, save="d1")
    r.events(
        "all",
        ":domain-add vm={d1}",
        "{d1}:domain-create-on-disk",
        "{d1}:domain-tag-add:disp-created-by-dom0 tag=disp-created-by-dom0",
    )
    state(r, "{d1}", "Halted")
    r.c("vm.List", "{d1}", want="~{d1} class=DispVM state=Halted uuid=.*\n")
    for prop, want in (
        ("vcpus", "=default=False type=int 3"),
        ("label", "=default=False type=label green"),
        ("auto_cleanup", "=default=False type=bool True"),
        ("template", "=default=False type=vm dvm"),
        ("default_dispvm", "=default=True type=vm dvm"),
        ("include_in_backups", "=default=True type=bool False"),
        ("template_for_dispvms", "QubesNoSuchPropertyError"),
        ("is_preload", "=default=True type=bool False"),
        ("icon", "=default=True type=str dispvm-green"),
        ("dispid", "~default=False type=int \\d+"),
    ):
        r.c("prop.Get", "{d1}", prop, want=want)
    r.c(
        "tag.List",
        "{d1}",
        want="=audiovm-dom0\ncreated-by-dom0\ndisp-created-by-dom0\nguivm-dom0\nmytag\n",
    )
    r.c("feat.List", "{d1}", want="=service.x\n")
    r.c("vm.firewall.Get", "{d1}", want="=action=drop\n")
    r.c(
        "vol.Info",
        "{d1}",
        "private",
        want="~pool=varlibqubes\nvid=appvms/{d1}/private\n.*\n"
        "source=appvms/dvm/private\n.*\nsave_on_stop=False\nsnap_on_start=True\n.*",
    )
    r.c("vol.Info", "{d1}", "root", want="~.*\nsource=vm-templates/tmpl/root\n.*")
    r.c("vol.Info", "{d1}", "volatile", want="~.*\nsize=12884901888\n.*")
    r.c("vm.Remove", "dvm", want="QubesVMInUseError")
    r.c("prop.Set", "dvm", "template_for_dispvms", "False", want="QubesVMInUseError")
    r.subscribe("d1", "{d1}")
    r.forget("all")
    r.c("vm.Start", "{d1}")
    r.events("all", *start_of("{d1}"))
    r.c("prop.Set", "dvm", "template", "tmpl", want="QubesVMInUseError")
    r.forget("all")
    r.c("vm.Kill", "{d1}")
    ends = [":domain-pre-delete vm={d1}", ":domain-delete vm={d1}"]
    r.events("all", *gone("{d1}"), *ends, until=":domain-delete")
    r.events(
        "d1",
        *start_of("{d1}"),
        *gone("{d1}"),
        "{d1}:domain-remove-from-disk",
        until="{d1}:domain-remove-from-disk",
    )
    r.c("vm.List", "{d1}", want="QubesVMNotFoundError")
    r.c("pool.volume.List", arg="varlibqubes", want="~(?!.*{d1}/).*")
    # By uuid, by default, and what goes by itself
    r.c(dispose, "dvm", "", "uuid", want="~uuid:[0-9a-f-]{36}", save="u1")
    r.c("vm.Start", "{u1}")
    state(r, "{u1}", "Running")
    r.forget("all")
    r.c("vm.Shutdown", "{u1}")
    r.forget("all", until=":domain-delete")
    r.c("vm.List", "{u1}", want="QubesVMNotFoundError")
    r.c("sys.Set", arg="default_dispvm", payload="dvm")
    r.c(dispose, want=name, save="d2")
    r.c("vm.Remove", "{d2}")
    r.c(dispose, src="plain", want=name, save="d3")
    r.c(
        "tag.List",
        "{d3}",
        want="=audiovm-dom0\ncreated-by-dom0\ncreated-by-plain\n"
        "disp-created-by-plain\nguivm-dom0\nmytag\n",
    )
    r.c("vm.Remove", "{d3}")
    r.forget("all")
    r.c(dispose, "dvm", "preload", want="QubesValueError")  # no agent that could tell
    r.events("all", "dvm:domain-preload-dispvm-start reason=*")
    r.c("prop.Set", "dvm", "template_for_dispvms", "False", want="QubesVMInUseError")
    r.c("sys.Set", arg="default_dispvm", payload="")
    # One that may not start does not stay
    r.c(dispose, "dvm", want=name, save="d4")
    r.c("feat.Set", "{d4}", "prohibit-start", "1")
    r.forget("all")
    r.c("vm.Start", "{d4}", want="QubesException")
    r.c("vm.List", "{d4}", want="QubesVMNotFoundError")
    ends = [":domain-pre-delete vm={d4}", ":domain-delete vm={d4}"]
    r.events("all", "{d4}:domain-start-failed reason=*", *ends, until=":domain-delete")
    # Named
    r.forget("all")
    r.c("vm.Create.DispVM", arg="dvm", payload="name=named label=blue")
    r.events("all", ":domain-add vm=named", "named:domain-create-on-disk")
    r.c("prop.Get", "named", "auto_cleanup", want="=default=True type=bool False")
    r.c("prop.Get", "named", "label", want="=default=False type=label blue")
    r.c("prop.Get", "named", "vcpus", want="=default=False type=int 3")
    r.c("prop.Get", "named", "include_in_backups", want="=default=True type=bool True")
    r.c("prop.Get", "named", "dispid", want="~default=False type=int \\d+")
    r.c("prop.Set", "named", "dispid", "5", want=REFUSED)
    r.c("prop.Set", "named", "template", "plain", want="QubesPropertyValueError")
    r.c("prop.Reset", "named", "template", want="QubesValueError")
    r.c("vm.Create.DispVM", arg="plain", payload="name=x label=blue", want="QubesValueError")
    r.c("vm.Create.DispVM", payload="name=x label=blue", want="QubesValueError")
    r.c("vm.Create.DispVM", arg="named", payload="name=x label=blue", want="QubesValueError")
    r.c("vm.Start", "named")
    r.forget("all")
    r.c("vm.Shutdown", "named", "wait")
    r.events("all", *stop_of("named"))
    state(r, "named", "Halted")
    r.c("vm.Remove", "named")
    r.c("prop.Set", "dvm", "template_for_dispvms", "False")


def removal(r: Script) -> None:
    create(r, "gone")
    create(r, "user")
    r.forget("all")
    remove = "vm.Remove"
    r.c(remove, "dom0", want="QubesVMInUseError")
    r.c(remove, "nosuch", want="QubesVMNotFoundError")
    r.c(remove, "gone", "x", want="ProtocolError")
    r.c(remove, "gone", payload="x", want="ProtocolError")
    r.events("all")
    r.c("prop.Set", "gone", "installed_by_rpm", "True")
    r.forget("all")
    r.c(remove, "gone", want="QubesVMInUseError")
    r.c("vm.Start", "gone")
    r.forget("all")
    r.c(remove, "gone", want="QubesVMInUseError")
    r.c("prop.Set", "gone", "installed_by_rpm", "False")
    r.c("prop.Set", "gone", "provides_network", "True")
    r.c("prop.Set", "user", "netvm", "gone")
    r.forget("all")
    r.c(remove, "gone", want="QubesVMNotHaltedError")
    r.events("all")
    r.c("vm.Shutdown", "gone", "wait")
    r.forget("all")
    r.c(remove, "gone", want="QubesVMInUseError")
    r.events("all", ":domain-pre-delete vm=gone")
    r.c("prop.Reset", "user", "netvm")
    r.c("sys.Set", arg="clockvm", payload="gone")
    r.c(remove, "gone", want="QubesVMInUseError")
    r.c("sys.Reset", arg="clockvm")
    r.c("prop.Set", "user", "guivm", "gone")
    r.c(remove, "gone", want="QubesVMInUseError")
    r.c("prop.Reset", "user", "guivm")
    r.c(remove, "tmpl", want="QubesVMInUseError")
    r.c("dev.block.Assign", "user", "gone+sda", "mode='auto-attach'")
    r.c(remove, "gone", want="QubesVMInUseError")
    r.c("dev.block.Unassign", "user", "gone+sda")
    r.c("dev.block.Assign", "user", "_+sda", "mode='auto-attach'")  # no qube in particular
    # Every reference, one at a time: of qubes, dom0 among them, and of the system
    r.c("prop.Set", "gone", "template_for_dispvms", "True")
    r.c("prop.Set", "gone", "netvm", "")
    for holder, names in (
        ("user", "netvm guivm audiovm default_dispvm management_dispvm"),
        ("dom0", "default_dispvm"),
        ("rem", "relayvm"),
        ("", "default_netvm default_dispvm management_dispvm default_guivm default_audiovm"),
        ("", "clockvm updatevm"),
    ):
        method, dest = ("prop", holder) if holder else ("sys", "dom0")
        for name in names.split():
            r.c(f"{method}.Set", dest, name, "gone")
            r.forget("all")
            r.c(remove, "gone", want="QubesVMInUseError")
            r.events("all", ":domain-pre-delete vm=gone")
            r.c(f"{method}.Reset", dest, name)
    r.c("vm.Create.DispVM", arg="gone", payload="name=based label=red")
    r.c(remove, "gone", want="QubesVMInUseError")
    r.c(remove, "based")
    # What it says of itself holds nobody
    r.c("prop.Set", "gone", "guivm", "gone")
    r.c("prop.Set", "gone", "default_dispvm", "gone")
    r.c("dev.block.Assign", "gone", "gone+sda", "mode='auto-attach'")
    r.forget("all")
    r.subscribe("gone", "gone")
    r.c(remove, "gone")
    r.events("all", ":domain-pre-delete vm=gone", ":domain-delete vm=gone")
    r.events("gone", "gone:domain-remove-from-disk", until="gone:domain-remove-from-disk")
    r.c(remove, "gone", want="QubesVMNotFoundError")
    r.c("vm.Create.AppVM", arg="tmpl", payload="name=gone label=red")
    r.c(remove, "gone")
    r.c(remove, "rem")


def streams(r: Script) -> None:
    r.c("admin.Events", "dom0", "x", want="ProtocolError")
    r.c("admin.Events", "dom0", payload="x", want="ProtocolError")
    r.c("admin.Events", "nosuch", want="QubesVMNotFoundError")
    r.c("vm.Stats", "dom0", "x", want="ProtocolError")
    r.forget("all")
    create(r, "evt")
    r.subscribe("evt", "evt")
    r.subscribe("user", "user")
    # Other sources: policy grants them no event, not even of themselves.
    r.subscribe("by_user", src="user")
    r.subscribe("by_evt", "evt", src="evt")
    r.c("prop.Set", "evt", "label", "blue")
    r.c("feat.Set", "evt", "f", "1")
    r.c("feat.Set", "evt", "f", "")
    r.c("feat.Remove", "evt", "f")
    r.c("tag.Set", "evt", "t")
    r.c("tag.Set", "evt", "t")
    r.c("tag.Remove", "evt", "t")
    own = [
        "evt:property-pre-set:label name=label newvalue=blue oldvalue=red",
        "evt:property-reset:icon name=icon",
        "evt:property-set:label name=label newvalue=blue oldvalue=red",
        "evt:domain-feature-pre-set:f feature=f value=1",
        "evt:domain-feature-set:f feature=f value=1",
        "evt:domain-feature-pre-set:f feature=f value= oldvalue=1",
        "evt:domain-feature-set:f feature=f value= oldvalue=1",
        "evt:domain-feature-pre-delete:f feature=f",
        "evt:domain-feature-delete:f feature=f",
        "evt:domain-tag-add:t tag=t",
        "evt:domain-tag-delete:t tag=t",
    ]
    r.events(
        "all",
        ":domain-add vm=evt",
        "evt:domain-tag-add:created-by-dom0 tag=created-by-dom0",
        "evt:domain-create-on-disk",
        *own,
    )
    r.events("evt", *own)
    r.events("user")
    r.silent("by_user")
    r.silent("by_evt")
    r.c("admin.Events", "evt", src="nosuch", want="QubesVMNotFoundError")


SECTIONS = (volumes, pools, power, devices, disposables, removal, streams)


def test_every_call_and_event() -> None:
    with started() as (instance, _, pool):
        script = Script(instance, pool)
        try:
            for section in SECTIONS:
                section(script)
        finally:
            script.close()
        assert not script.wrong, "\n".join(script.wrong)
