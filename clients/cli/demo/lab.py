"""The surroundings of the demo: a reflink file system, a namespace that stands for the
world, servers in it, guest images.

Owns what it makes and takes all of it away again. Must not know the story. Invariant:
close() may be called at any time, twice, and after a crash of a step.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
POOL_BYTES = 8 << 30
SERVER_ADDRESS = "192.0.2.2"
OPEN_PORT = 8080
CLOSED_PORT = 9090

SERVER = """
import selectors, socket, sys
chosen = selectors.DefaultSelector()
for port in map(int, sys.argv[2:]):
    listener = socket.create_server((sys.argv[1], port))
    chosen.register(listener, selectors.EVENT_READ)
print("listening", flush=True)
while True:
    for key, _ in chosen.select():
        connection, peer = key.fileobj.accept()
        connection.sendall(b"hello " + peer[0].encode() + b"\\n")
        connection.close()
"""


class LabError(RuntimeError):
    """A tool of the lab failed; the message carries its words."""


def command(*argv: str, timeout: float = 120.0, check: bool = True) -> str:
    """Run a tool; its stdout. LabError with its stderr when it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=timeout)
    if check and done.returncode != 0:
        raise LabError(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


class Lab:
    """Everything around one instance, below one temporary directory."""

    def __init__(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="bhdemo", dir="/tmp"))
        self.base.chmod(0o755)
        self.root = self.base / "r"
        self.pool = self.base / "pool"
        self.world = f"bhw{os.getpid()}"
        self._mounted = False
        self._server: subprocess.Popen[str] | None = None

    def make_pool(self) -> None:
        """An XFS with reflink on a sparse file."""
        image = self.base / "pool.xfs"
        with image.open("wb") as file:
            os.truncate(file.fileno(), POOL_BYTES)
        command("mkfs.xfs", "-q", "-m", "reflink=1", str(image))
        self.pool.mkdir()
        command("mount", "-o", "loop", str(image), str(self.pool))
        self._mounted = True

    def make_world(self) -> None:
        """A namespace with the server's address on its loopback, and two listening ports."""
        command("ip", "netns", "add", self.world)
        self._in_world("ip", "link", "set", "lo", "up")
        self._in_world("ip", "addr", "add", f"{SERVER_ADDRESS}/32", "dev", "lo")
        self._in_world("sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        self._server = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                self.world,
                sys.executable,
                "-c",
                SERVER,
                SERVER_ADDRESS,
                str(OPEN_PORT),
                str(CLOSED_PORT),
            ],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._server.stdout is not None
        if "listening" not in self._server.stdout.readline():
            raise LabError("the server in the demo's world did not start")

    def _in_world(self, *argv: str) -> None:
        command("ip", "netns", "exec", self.world, *argv)

    def image(self, version: str) -> Path:
        """A guest's root image that says its version."""
        path = self.base / f"root-{version}.img"
        command(
            sys.executable,
            str(PROJECT / "deploy/guest/make_root.py"),
            str(path),
            "--version",
            version,
        )
        return path

    def initramfs(self, kernel_dir: Path) -> Path:
        """An initramfs that mounts the root image and hands over."""
        path = self.base / "initramfs.gz"
        command(
            sys.executable,
            str(PROJECT / "deploy/guest/make_initramfs.py"),
            str(kernel_dir),
            str(path),
        )
        return path

    def used_bytes(self) -> int:
        """Bytes in use on the pool's file system."""
        usage = os.statvfs(self.pool)
        return (usage.f_blocks - usage.f_bfree) * usage.f_frsize

    def files(self) -> set[str]:
        """Every file of the pool, kernels left out."""
        return {
            str(path.relative_to(self.pool))
            for path in self.pool.rglob("*")
            if path.is_file() and "vm-kernels" not in path.parts
        }

    def close(self) -> None:
        """Take everything away again."""
        if self._server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            if self._server.stdout is not None:
                self._server.stdout.close()
            self._server = None
        command("ip", "netns", "del", self.world, check=False)
        if self._mounted:
            command("umount", str(self.pool), check=False)
            self._mounted = os.path.ismount(self.pool)
        if not self._mounted:
            shutil.rmtree(self.base, ignore_errors=True)


def tool(name: str) -> str:
    """Path of an installed console script of this environment."""
    return str(Path(sys.executable).parent / name)


def tools_missing(names: Sequence[str]) -> list[str]:
    """Console scripts that are not installed."""
    return [name for name in names if not Path(tool(name)).exists()]
