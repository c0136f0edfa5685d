"""Where everything is, and who runs as whom: one file written by the launcher.

Owns paths below --root, the user of each service and the choices of `bulkhead run`.
Must not open sockets or change anything but its own file. Invariant: every process of
one instance reads the same settings, and paths are computed here only.
"""

from __future__ import annotations

import json
import pwd
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bulkhead.durable import write_file

# Services in start order; simhv runs only with the simulated hypervisor.
SERVICES: tuple[str, ...] = (
    "registry",
    "hostd",
    "storage",
    "domains",
    "firewall",
    "lifecycle",
    "dispvm",
    "adminapi",
)
# Who runs QEMU under a private libvirtd, and its uid there where the host has no such user
# (the one that Debian reserves for the name).
QEMU_USER = "libvirt-qemu"
QEMU_UID = 64055
# Longest path that fits sockaddr_un with its NUL.
SOCKET_PATH_LIMIT = 107


class SettingsError(ValueError):
    """Settings are missing or unusable; the message says which file and what to do."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one running instance.

    users: service -> uid; empty when isolated is False (all run as one user).
    hypervisor: "xen:///system", "qemu:///system", "qemu:///session" (also with
    ?socket=) or "sim:". uplink_namespace: through which the outermost network qubes
    reach the world. qemu_user: who runs QEMU, "" where that is not ours to say.
    libvirt_socket: of a private libvirtd, "" = where libvirt looks by itself.
    """

    root: Path
    hypervisor: str = "sim:"
    isolated: bool = False
    users: dict[str, int] = field(default_factory=dict)
    uplink_namespace: str = ""
    qemu_user: str = ""
    libvirt_socket: str = ""

    @property
    def connect_uri(self) -> str:
        """What libvirt is opened with: the hypervisor, at the private socket if there is one."""
        if not self.libvirt_socket or not self.hypervisor.startswith("qemu:///"):
            return self.hypervisor
        path = self.hypervisor.removeprefix("qemu://").split("?", 1)[0]
        return f"qemu+unix://{path}?socket={self.libvirt_socket}"

    @property
    def qemu_uid(self) -> int | None:
        """uid of qemu_user, None without one."""
        if not self.qemu_user:
            return None
        try:
            return pwd.getpwnam(self.qemu_user).pw_uid
        except KeyError:
            return QEMU_UID

    # ---- paths

    @property
    def state_dir(self) -> Path:
        """/var/lib/qubes: the registry's directory, pools below it."""
        return self.root / "var/lib/qubes"

    @property
    def store_file(self) -> Path:
        return self.state_dir / "qubes.xml"

    @property
    def journal_file(self) -> Path:
        return self.state_dir / "journal.sqlite"

    @property
    def rules_dir(self) -> Path:
        """firewall/UUID.xml, owned by firewall."""
        return self.state_dir / "firewall"

    @property
    def kernels_dir(self) -> Path:
        return self.state_dir / "vm-kernels"

    @property
    def run_dir(self) -> Path:
        return self.root / "run"

    @property
    def bus_dir(self) -> Path:
        return self.root / "run/bulkhead"

    @property
    def log_dir(self) -> Path:
        return self.root / "var/log/qubes"

    @property
    def etc_dir(self) -> Path:
        return self.root / "etc/qubes"

    def service_dir(self, service: str) -> Path:
        """run/bulkhead/SERVICE, mode 2710: its sockets (work, control, stream, data) and lock."""
        return self.bus_dir / service

    def socket(self, service: str, name: str) -> str:
        """Endpoint of a service's socket: name is "work", "control", "stream" or "data"."""
        return f"ipc://{self.service_dir(service) / (name + '.sock')}"

    def admin_sockets(self) -> dict[str, Path]:
        """The wire sockets that adminapi inherits open: {"admin"|"internal"|"misc": path}."""
        return {
            "admin": self.run_dir / "qubesd.sock",
            "internal": self.run_dir / "qubesd.internal.sock",
            "misc": self.run_dir / "qubesd.misc.sock",
        }

    @property
    def callers_dir(self) -> Path:
        """run/bulkhead/callers/QUBE.sock: sockets on which policy is asked for every call."""
        return self.bus_dir / "callers"

    @property
    def file(self) -> Path:
        return self.bus_dir / "settings.json"

    # ---- reading and writing

    def check(self) -> None:
        """Raise SettingsError when a socket path would not fit."""
        longest = max(
            (str(self.service_dir(s) / "control.sock") for s in (*SERVICES, "simhv")), key=len
        )
        if len(longest.encode()) > SOCKET_PATH_LIMIT:
            raise SettingsError(
                f"--root {self.root} is too long: {longest} has {len(longest.encode())} bytes "
                f"and a unix socket path at most {SOCKET_PATH_LIMIT}; use a shorter directory"
            )

    def save(self) -> None:
        """Write settings.json (0644) durably."""
        data = asdict(self)
        data["root"] = str(self.root)
        write_file(self.file, json.dumps(data, indent=1).encode() + b"\n", 0o644)

    @classmethod
    def load(cls, root: Path) -> Settings:
        """Read the settings of the instance below root. SettingsError when there is none."""
        path = root / "run/bulkhead/settings.json"
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise SettingsError(
                f"{path} does not exist: no instance was started here; use bulkhead run"
            ) from error
        except (OSError, ValueError) as error:
            raise SettingsError(f"{path} cannot be read: {error}") from error
        data["root"] = Path(data["root"])
        return cls(**data)
