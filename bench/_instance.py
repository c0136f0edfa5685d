"""Whole instances with the simulated hypervisor, for benches that look from outside.

Owns the launcher's process and a directory with a short path. Must not know what is
measured. Invariant: after close() no process and no directory is left.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clients.admin import AdminClient

COMMAND = [sys.executable, "-m", "clients.cli.bulkhead"]
PREFIX = "bench-"
LIST = b"admin.vm.List+ dom0 name dom0\0"
START_TIMEOUT_S = 60.0


def ask(path: Path, frame: bytes) -> bytes:
    """One frame to an Admin API socket and all bytes of the answer. OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(START_TIMEOUT_S)
        peer.connect(str(path))
        peer.sendall(frame)
        peer.shutdown(socket.SHUT_WR)
        parts = []
        while part := peer.recv(1 << 16):
            parts.append(part)
        return b"".join(parts)


class Instance:
    """`bulkhead run` below a directory of its own, with a template and a kernel."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="bhb", dir="/tmp"))
        self.root.chmod(0o755)
        self.socket = self.root / "run/qubesd.sock"
        self._launcher: subprocess.Popen[str] | None = None
        try:
            self._command("init")
            self.start()
            self._base()
        except BaseException:
            self.close()
            raise

    @property
    def client(self) -> AdminClient:
        """A client of qubesd.sock."""
        return AdminClient(self.socket, timeout=120)

    def _command(self, *words: str) -> None:
        subprocess.run(
            [*COMMAND, *words, "--root", str(self.root)], check=True, stdout=subprocess.DEVNULL
        )

    def start(self) -> float:
        """Start it; seconds to the first answer. Returns when every service is ready."""
        began = time.perf_counter()
        launcher = subprocess.Popen(
            [*COMMAND, "run", "--root", str(self.root), "--hypervisor", "sim:"],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._launcher = launcher
        while True:
            with contextlib.suppress(OSError):
                if ask(self.socket, LIST).startswith(b"0\0"):
                    break
            if launcher.poll() is not None or time.perf_counter() - began > START_TIMEOUT_S:
                raise RuntimeError("the instance did not come up")
            time.sleep(0.005)
        took = time.perf_counter() - began
        assert launcher.stdout is not None
        if not any(line.startswith("ready") for line in launcher.stdout):
            raise RuntimeError("not every service came up")
        return took

    def stop(self) -> None:
        """End all its processes."""
        if self._launcher is None:
            return
        self._launcher.terminate()
        self._launcher.wait(timeout=60)
        if self._launcher.stdout is not None:
            self._launcher.stdout.close()
        self._launcher = None

    def close(self) -> None:
        """Stop and remove everything."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self.root, ignore_errors=True)

    def _base(self) -> None:
        kernel = self.root / "kernel"
        kernel.write_bytes(bytes(4096))
        self._command("kernel", "add", "bench", "--vmlinuz", str(kernel))
        client = self.client
        client.call("admin.property.Set", arg="default_kernel", payload=b"bench")
        client.call("admin.vm.Create.TemplateVM", payload=b"name=tmpl label=black")
        client.call("admin.property.Set", arg="default_template", payload=b"tmpl")

    def grow(self, count: int) -> None:
        """Make that many qubes, bench-0 and so on."""
        client = self.client
        for number in range(count):
            payload = f"name={PREFIX}{number} label=red".encode()
            client.call("admin.vm.Create.AppVM", payload=payload)

    def pss(self) -> dict[str, float]:
        """MiB of each process below the launcher and the launcher: its proportional share."""
        assert self._launcher is not None
        launcher = json.loads((self.root / "run/bulkhead/launcher.json").read_text())
        pids = {"launcher": int(launcher["pid"])}
        pids.update({name: int(child["pid"]) for name, child in launcher["children"].items()})
        found: dict[str, float] = {}
        for name, pid in pids.items():
            family = [pid, *_descendants(pid)] if name != "launcher" else [pid]
            found[name] = sum(_pss(member) for member in family)
        return found


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _pss(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0
