"""What the hypervisor contract runs on: the simulation, libvirt's test driver, QEMU, Xen.

Owns starting and ending each, and what a test may do to a guest there. Must not hold
any expectation: those are in the contract.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from services.domains.adapters.hypervisor import Hypervisor
from services.domains.adapters.libvirt_adapter import LibvirtHypervisor
from services.domains.adapters.sim_adapter import SimHypervisor
from services.domains.core.spec import DiskSpec, DomainSpec
from services.domains.simhv.client import SimControl

PROJECT = Path(__file__).resolve().parents[2]
KERNEL = PROJECT / ".cache/kernel"
UUID = "11111111-1111-4111-8111-1111111111{:02x}"


class Bench(Protocol):
    """One hypervisor under the contract."""

    # start_paused, hotplug, resize, pm_suspend, agent, shutdown, memory, service
    abilities: frozenset[str]
    # Longest that an ordinary call may take, in seconds.
    patience: float

    def connect(self) -> Hypervisor:
        """A new adapter, not open."""

    def spec(self, number: int, boot_id: str = "b1") -> DomainSpec:
        """A domain that can be created here; another one for each number."""

    def disk(self) -> DiskSpec:
        """A disk that can be attached."""

    def crash(self, uuid: str) -> None:
        """The guest dies without being asked."""

    def running(self, uuid: str) -> None:
        """Wait until the guest can be asked to shut down."""


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose path leaves room for socket names."""
    path = Path(tempfile.mkdtemp(prefix="bh-", dir="/tmp"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def wait_until(check: Callable[[], bool], seconds: float, what: str) -> None:
    """Look again every 20 ms. TimeoutError that says what never came."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come within {seconds} s")
        time.sleep(0.02)


@contextlib.contextmanager
def process(*arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a session of its own, ended with SIGTERM, then SIGKILL."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=PROJECT,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(10)


# ---- the simulation


@dataclass
class SimBench:
    """A simulated hypervisor process below root."""

    root: Path
    control: SimControl
    abilities: frozenset[str] = frozenset(
        {"start_paused", "hotplug", "resize", "pm_suspend", "agent", "shutdown", "memory"}
    )
    patience: float = 5.0

    def connect(self) -> Hypervisor:
        return SimHypervisor(self.root / "run/bulkhead/simhv/hv.sock")

    def spec(self, number: int, boot_id: str = "b1") -> DomainSpec:
        return DomainSpec(
            uuid=UUID.format(number),
            name=f"qube-{number}",
            boot_id=boot_id,
            epoch=7,
            memory_mib=400,
            maxmem_mib=4000,
            vcpus=2,
            kernel="/k/vmlinuz",
            disks=(DiskSpec("xvda", "/pool/root.img", serial="root"),),
        )

    def disk(self) -> DiskSpec:
        return DiskSpec("xvdi", "/pool/more.img", rw=True)

    def crash(self, uuid: str) -> None:
        self.control.crash(uuid)

    def running(self, uuid: str) -> None:
        """Simulated guests are there at once."""


@contextlib.contextmanager
def simulation() -> Iterator[SimBench]:
    """A simulated hypervisor and its control."""
    with (
        short_directory() as root,
        process("services.domains.simhv", "--root", str(root), log=root / "log"),
        SimControl.of(root) as control,
    ):
        yield SimBench(root, control)


# ---- libvirt's test driver


@dataclass
class TestDriverBench:
    """test:///default: everything in this process; guests do nothing."""

    __test__ = False
    abilities: frozenset[str] = frozenset({"shutdown", "memory"})
    patience: float = 10.0

    def connect(self) -> Hypervisor:
        return LibvirtHypervisor("test:///default")

    def spec(self, number: int, boot_id: str = "b1") -> DomainSpec:
        return DomainSpec(
            uuid=UUID.format(number),
            name=f"qube-{number}",
            boot_id=boot_id,
            epoch=7,
            memory_mib=128,
            vcpus=1,
            kernel="/k/vmlinuz",
        )

    def disk(self) -> DiskSpec:
        return DiskSpec("xvdi", "/pool/more.img", rw=True)

    def crash(self, uuid: str) -> None:
        import libvirt

        connection = libvirt.open("test:///default")
        try:
            connection.lookupByUUIDString(uuid).destroy()
        finally:
            connection.close()

    def running(self, uuid: str) -> None:
        """Its guests are there at once."""


# ---- QEMU behind a private libvirtd


@dataclass
class QemuBench:
    """Real guests, emulated, behind a private libvirtd; user 0 or one without privileges."""

    root: Path
    uri: str
    kernel: Path
    initramfs: Path
    arguments: tuple[str, ...]
    daemon: subprocess.Popen[bytes] | None = None
    disks: int = 0
    names: dict[str, str] = field(default_factory=dict)
    abilities: frozenset[str] = frozenset({"start_paused", "hotplug", "resize", "shutdown"})
    patience: float = 30.0

    @property
    def socket(self) -> Path:
        return self.root / "run/bulkhead/libvirt/libvirt-sock"

    def start_daemon(self) -> None:
        """Start libvirtd, again after it was killed, and wait for its socket."""
        with (self.root / "libvirtd.log").open("ab") as output:
            self.daemon = subprocess.Popen(
                [sys.executable, "-m", "services.domains.libvirtd", "--root", str(self.root),
                 *self.arguments],
                cwd=PROJECT, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        log = self.root / "libvirtd.log"
        wait_until(
            lambda: self.daemon is not None and (self.daemon.poll() is not None or self._answers()),
            30.0,
            f"libvirtd's socket ({log.read_text()})",
        )
        assert self.daemon.poll() is None, log.read_text()

    def _answers(self) -> bool:
        import socket

        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.socket))
            except OSError:
                return False
        return True

    def kill_daemon(self) -> None:
        """SIGKILL libvirtd; guests live on."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait(10)

    def connect(self) -> Hypervisor:
        return LibvirtHypervisor(self.uri)

    def spec(self, number: int, boot_id: str = "b1") -> DomainSpec:
        uuid = UUID.format(number)
        self.names[uuid] = f"qube-{number}"
        return DomainSpec(
            uuid=uuid,
            name=f"qube-{number}",
            boot_id=boot_id,
            epoch=7,
            memory_mib=96,
            vcpus=1,
            kernel=str(self.kernel),
            initramfs=str(self.initramfs),
            cmdline="console=ttyS0 quiet panic=-1",
            console_log=str(self.root / f"images/console-{number}.log"),
        )

    def disk(self) -> DiskSpec:
        self.disks += 1
        path = self.root / f"images/disk-{self.disks}.img"
        with path.open("wb") as file:
            file.truncate(8 << 20)
        path.chmod(0o666)
        return DiskSpec("xvdi", str(path), rw=True, serial="more")

    def qemu_pid(self, uuid: str) -> int:
        """The process of the guest."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if b"qemu-system" in command[0] and uuid.encode() in command:
                    return int(entry.name)
        raise LookupError(f"no QEMU runs for {uuid}")

    def crash(self, uuid: str) -> None:
        os.kill(self.qemu_pid(uuid), signal.SIGKILL)

    def console(self, uuid: str) -> str:
        """What the guest has said."""
        number = self.names[uuid].removeprefix("qube-")
        path = self.root / f"images/console-{number}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def running(self, uuid: str) -> None:
        wait_until(lambda: "BULKHEAD ready" in self.console(uuid), 60.0, "the guest's greeting")


@contextlib.contextmanager
def qemu(session_uid: int = 0) -> Iterator[QemuBench]:
    """A private libvirtd with QEMU; session_uid: the unprivileged variant."""
    with short_directory() as root:
        images = root / "images"
        images.mkdir(mode=0o777)
        images.chmod(0o777)
        vmlinuz = next(KERNEL.glob("vmlinuz-*"), None)
        assert vmlinuz is not None, "there is no guest kernel: run make kernel"
        kernel, initramfs = images / "vmlinuz", images / "initramfs.gz"
        shutil.copy(vmlinuz, kernel)
        subprocess.run(
            [sys.executable, PROJECT / "deploy/guest/make_initramfs.py", KERNEL, initramfs],
            check=True,
        )
        for path in (kernel, initramfs):
            path.chmod(0o644)
        socket = root / "run/bulkhead/libvirt/libvirt-sock"
        arguments: tuple[str, ...] = ()
        mode = "system"
        if session_uid:
            arguments, mode = ("--session", "--uid", str(session_uid)), "session"
        bench = QemuBench(root, f"qemu:///{mode}?socket={socket}", kernel, initramfs, arguments)
        bench.start_daemon()
        try:
            yield bench
        finally:
            for uuid in bench.names:
                with contextlib.suppress(LookupError, ProcessLookupError):
                    os.kill(bench.qemu_pid(uuid), signal.SIGKILL)
            if bench.daemon is not None:
                bench.daemon.terminate()
                bench.daemon.wait(20)


# ---- Xen, where this runs in its domain 0


@dataclass
class XenBench:
    """Real guests of the Xen that this runs under; folder holds their kernel and initramfs."""

    folder: Path
    virt_mode: str = "pv"
    disks: int = 0
    names: dict[str, str] = field(default_factory=dict)
    abilities: frozenset[str] = frozenset({"start_paused", "hotplug", "shutdown", "pm_suspend"})
    patience: float = 60.0
    uri: str = "xen:///system"

    def connect(self) -> Hypervisor:
        return LibvirtHypervisor(self.uri)

    def spec(self, number: int, boot_id: str = "b1") -> DomainSpec:
        uuid = UUID.format(number)
        self.names[uuid] = f"qube-{number}"
        return DomainSpec(
            uuid=uuid,
            name=f"qube-{number}",
            boot_id=boot_id,
            epoch=7,
            virt_mode=self.virt_mode,
            memory_mib=128,
            vcpus=1,
            kernel=str(self.folder / "vmlinux"),
            initramfs=str(self.folder / "initramfs.gz"),
            cmdline="console=hvc0 quiet panic=-1",
        )

    def disk(self) -> DiskSpec:
        """A block device: libxl's backend for files is slow to come and go."""
        self.disks += 1
        path = self.folder / f"disk-{self.disks}.img"
        with path.open("wb") as file:
            file.truncate(8 << 20)
        made = subprocess.run(
            ["losetup", "--find", "--show", path], check=True, capture_output=True, text=True
        )
        return DiskSpec("xvdi", made.stdout.strip(), rw=True, block=True)

    def crash(self, uuid: str) -> None:
        subprocess.run(["xl", "destroy", self.names[uuid]], check=True, timeout=60)

    def running(self, uuid: str) -> None:
        """Its console is a terminal of this domain that keeps what nobody has read."""
        import libvirt

        connection = libvirt.open(self.uri)
        try:
            console = ET.fromstring(connection.lookupByUUIDString(uuid).XMLDesc()).find(
                "devices/console[@tty]"
            )
        finally:
            connection.close()
        assert console is not None, f"{uuid} has no console"
        said = b""
        terminal = os.open(console.get("tty") or "", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)

        def ready() -> bool:
            nonlocal said
            with contextlib.suppress(BlockingIOError):
                said += os.read(terminal, 65536)
            return b"BULKHEAD ready" in said

        try:
            wait_until(ready, 100.0, f"the guest's greeting ({said!r})")
        finally:
            os.close(terminal)


@contextlib.contextmanager
def xen(guest: Path, virt_mode: str) -> Iterator[XenBench]:
    """The Xen of this machine; guest: a folder with vmlinux and initramfs.gz."""
    with short_directory() as folder:
        for name in ("vmlinux", "initramfs.gz"):
            (folder / name).symlink_to(guest / name)
        try:
            yield XenBench(folder, virt_mode)
        finally:
            for path in folder.glob("disk-*.img"):
                used = subprocess.run(
                    ["losetup", "--noheadings", "--output", "NAME", "--associated", path],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                for device in used.stdout.split():
                    subprocess.run(["losetup", "--detach", device], check=True)


async def until(check: Callable[[], bool], seconds: float, what: str) -> None:
    """Let the loop turn until check() holds. TimeoutError that says what never came."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come within {seconds} s")
        await asyncio.sleep(0.01)


__all__ = ["Bench", "QemuBench", "SimBench", "TestDriverBench", "process", "qemu", "replace",
           "XenBench", "short_directory", "simulation", "until", "wait_until", "xen"]  # fmt: skip
