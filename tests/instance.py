"""A whole instance as a test sees it: init, run, calls, kills, failpoints, stop.

Owns the processes that it starts and a directory with a short path (socket paths are
limited to 107 bytes). Invariant: close() leaves no process and no directory behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bulkhead.api import firewall_pb2
from bulkhead.bus.client import operator_call
from bulkhead.bus.errors import BusError
from bulkhead.config import Settings
from bulkhead.model import xmlstore
from clients.cli.instance import operator
from services.domains.simhv.client import SimControl
from services.registry.core import canonical

PYTHON = sys.executable
START_TIMEOUT_S = 60.0
# What the records hold beside qubes.xml: the phase, and what files of their own hold.
NOT_IN_XML = frozenset({"run", "state", "notes", "rules_digest", "raw", "revision"})


@dataclass(frozen=True)
class Reply:
    """An Admin API reply: kind "ok", "exc", "none" or "events"."""

    kind: str
    body: bytes = b""
    exception: str = ""
    message: str = ""

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")


def exchange(path: Path, frame: bytes, timeout: float = 60.0) -> bytes:
    """Send a frame, half-close, return all bytes of the answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(str(path))
        connection.sendall(frame)
        connection.shutdown(socket.SHUT_WR)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


def parse(raw: bytes) -> Reply:
    """One reply from its bytes."""
    if not raw:
        return Reply("none")
    if raw[:2] == b"0\0":
        return Reply("ok", raw[2:])
    if raw[:2] == b"2\0":
        name, _, message = raw[2:].split(b"\0")[:3]
        return Reply("exc", b"", name.decode(), message.decode("utf-8", "replace"))
    return Reply("events", raw)


def digest(path: Path) -> str:
    """Size and hash of a file's data; holes are not read: images are sparse and large."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            try:
                begin = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but a hole up to the end
                break
            at = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            file.seek(begin)
            data = file.read(at - begin)
            if data.strip(b"\0"):
                total.update(b"%d:" % begin + data)
    return f"{size} {total.hexdigest()}"


class Instance:
    """One `bulkhead run` below a temporary root."""

    def __init__(self, *, hypervisor: str = "sim:", pool_dir: Path | None = None) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="bh", dir="/tmp"))
        self.root.chmod(0o755)
        self.hypervisor = hypervisor
        # Every service may disarm what it fired.
        (self.root / "fp").mkdir()
        (self.root / "fp").chmod(0o777)
        self.failpoints = self.root / "fp" / "armed"
        self.process: subprocess.Popen[bytes] | None = None
        self.log = self.root / "launcher.log"
        command = [PYTHON, "-m", "clients.cli.bulkhead", "init", "--root", str(self.root)]
        if pool_dir is not None:
            command += ["--pool-dir", str(pool_dir)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode != 0:
            raise AssertionError(f"bulkhead init: {done.stderr}")

    # ---- life

    def start(self, *, wait: bool = True, environment: Mapping[str, str] | None = None) -> None:
        """bulkhead run; returns when qubesd.sock answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [PYTHON, "-m", "clients.cli.bulkhead", "run", "--root", str(self.root),
                 "--hypervisor", self.hypervisor],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env={**os.environ, "BULKHEAD_FAILPOINTS_FILE": str(self.failpoints),
                     **(environment or {})},
            )  # fmt: skip
        if wait:
            self.wait_ready()

    def wait_ready(self, timeout: float = START_TIMEOUT_S) -> None:
        """Wait for the first answer of the Admin API."""
        self.until(self._answers, timeout, "qubesd.sock answers")

    def _answers(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            raise AssertionError(f"bulkhead run ended: {self.logs()}")
        try:
            return self.call("admin.label.List", timeout=5.0).kind == "ok"
        except OSError:
            return False

    def stop(self) -> int:
        """SIGTERM and wait; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process = None

    def close(self) -> None:
        """Stop whatever runs and remove the directory."""
        try:
            if self.process is not None and self.process.poll() is None:
                self.stop()
        finally:
            self._kill_left_overs()
            shutil.rmtree(self.root, ignore_errors=True)

    def _kill_left_overs(self) -> None:
        needle = f"--root\0{self.root}\0".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if needle in (entry / "cmdline").read_bytes() + b"\0":
                        os.kill(int(entry.name), signal.SIGKILL)

    # ---- services

    def pid(self, service: str) -> int:
        """Process id of a service now."""
        data = json.loads((self.root / "run/bulkhead/launcher.json").read_text())
        return int(data["children"][service]["pid"])

    def kill(self, service: str) -> int:
        """SIGKILL a service; returns the pid that died."""
        pid = self.pid(service)
        os.kill(pid, signal.SIGKILL)
        return pid

    def freeze(self, service: str) -> None:
        """SIGSTOP a service: it hears and says nothing until it is killed or continued."""
        os.kill(self.pid(service), signal.SIGSTOP)

    def wait_restarted(self, service: str, old_pid: int, timeout: float = 30.0) -> None:
        """Wait until the launcher has started it again."""
        self.until(lambda: self.pid(service) != old_pid, timeout, f"{service} runs again")

    def arm(self, *stages: str) -> None:
        """Arm failpoints: each stage "name=kill:2" fires once, in order."""
        temporary = self.failpoints.with_suffix(".new")
        temporary.write_text("|".join(stages))
        temporary.chmod(0o666)
        fired = self.failpoints.with_name(self.failpoints.name + ".fired")
        fired.write_text("")
        fired.chmod(0o666)
        temporary.rename(self.failpoints)

    def fired(self) -> list[str]:
        """Failpoints that have fired since arm()."""
        path = self.failpoints.with_name(self.failpoints.name + ".fired")
        return path.read_text().split() if path.exists() else []

    def disarm(self) -> None:
        """No failpoint is armed any more."""
        self.failpoints.unlink(missing_ok=True)

    # ---- calls

    @property
    def socket(self) -> Path:
        return self.root / "run/qubesd.sock"

    def call(
        self,
        method: str,
        dest: str = "dom0",
        arg: str = "",
        payload: bytes = b"",
        *,
        source: str = "dom0",
        timeout: float = 60.0,
        socket_path: Path | None = None,
    ) -> Reply:
        """One Admin API call."""
        head = f"{method}+{arg} {source} name {dest}".encode() + b"\0"
        return parse(exchange(socket_path or self.socket, head + payload, timeout))

    def ok(self, method: str, dest: str = "dom0", arg: str = "", payload: bytes = b"") -> str:
        """A call that must succeed; its text."""
        reply = self.call(method, dest, arg, payload)
        if reply.kind != "ok":
            raise AssertionError(f"{method}+{arg} on {dest}: {reply.exception} {reply.message}")
        return reply.text

    def state(self, qube: str) -> str:
        """Power state of a qube."""
        return self.ok("admin.vm.CurrentState", qube).rpartition("power_state=")[2]

    # ---- waiting and looking

    def until(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """Poll a condition; AssertionError with the logs when it does not come true."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout} s: {what}\n{self.logs()}")
            time.sleep(0.02)

    def logs(self) -> str:
        """The end of every log."""
        parts = [self.log.read_text(errors="replace")[-2000:]]
        for path in sorted((self.root / "var/log/qubes").glob("*.log")):
            parts.append(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}")
        return "\n".join(parts)

    def domains(self) -> dict[str, str]:
        """uuid -> boot id of every domain of the simulated hypervisor."""
        with SimControl.of(self.root) as control:
            return {str(d["uuid"]): str(d["boot_id"]) for d in control.domains()}

    @property
    def settings(self) -> Settings:
        """The instance's settings as they are on disk now."""
        return Settings.load(self.root)

    def dump(self) -> str:
        """Canonical dump of the state."""
        try:
            return operator.dump(self.settings)
        except BusError as error:
            raise AssertionError(f"no dump: {error.message}") from error

    def unstored(self) -> list[str]:
        """Sentences about records of qubes.xml, read back, that differ from the dump's;
        empty once the newest checkpoint is written."""
        view = xmlstore.parse(self.settings.store_file.read_bytes()).view()
        stored, live = (
            {
                (row["kind"], row["key"]): {
                    key: value for key, value in row["value"].items() if key not in NOT_IN_XML
                }
                for row in map(json.loads, lines)
                if row["kind"] != "operation"
            }
            for lines in (canonical.lines(view), self.dump().splitlines())
        )
        return [
            f"{key[0]} {key[1]} is {stored.get(key)} in qubes.xml, {live.get(key)} in the registry"
            for key in sorted(stored.keys() | live.keys())
            if stored.get(key) != live.get(key)
        ]

    def firewall(self) -> list[firewall_pb2.FirewallInventoryItem]:
        """What firewall holds: a row for each qube with a rules file or rules in force."""
        try:
            reply = operator_call(
                self.settings,
                "firewall",
                "bulkhead.api.Firewall.Inventory",
                firewall_pb2.FirewallInventoryRequest(),
                firewall_pb2.FirewallInventoryReply,
                5.0,
            )
        except BusError as error:
            raise AssertionError(f"no inventory of firewall: {error.message}") from error
        return list(reply.items)

    def still(self, pool: Path) -> dict[str, object]:
        """Everything that "nothing changed" compares, once the checkpoint is written:
        the bytes of qubes.xml, the dump, files and hashes of the pool, rules files, notes,
        the firewall's inventory and the domains."""
        self.until(lambda: not self.unstored(), 20.0, "the checkpoint is written")
        settings = self.settings
        found: dict[str, object] = {
            "qubes.xml": settings.store_file.read_bytes(),
            "dump": self.dump(),
            "firewall": sorted(item.SerializeToString() for item in self.firewall()),
            "domains": self.domains(),
        }
        for root in (pool, settings.rules_dir, settings.state_dir / "notes"):
            for path in sorted(root.rglob("*")):
                if path.is_file():
                    found[str(path)] = digest(path)
        return found


@contextlib.contextmanager
def running(*, hypervisor: str = "sim:", pool_dir: Path | None = None) -> Iterator[Instance]:
    """An instance that answers; gone afterwards."""
    instance = Instance(hypervisor=hypervisor, pool_dir=pool_dir)
    try:
        instance.start()
        yield instance
    finally:
        instance.close()
