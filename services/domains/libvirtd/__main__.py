"""Runs a private libvirtd: python -m services.domains.libvirtd --root DIR [--session].

Owns its settings and its state below DIR/run/bulkhead/libvirt. This process stays as
libvirtd's parent: to end it, or to kill it, ends or kills libvirtd. Must not be a child
of domains. Invariants: the machine's files and namespaces stay as
they are; guests survive the death of this libvirtd and are found by the next one.

As root (qemu:///system) it lives in a mount namespace with its own /dev without kvm.
--session (qemu:///session) is for one without privileges; started by root it needs
--uid, and gets the same namespace before the privileges are gone.
"""

from __future__ import annotations

import argparse
import grp
import os
import pwd
import shutil
import sys
from pathlib import Path

from bulkhead.config import QEMU_UID, QEMU_USER, SOCKET_PATH_LIMIT

from . import reaper, rooms

# Names below the state directory. Short: sockets of guests lie below them in a session.
SOCKET = "libvirt-sock"
SEARCH = "/usr/sbin:/usr/bin:/sbin:/bin"
# QEMU's user is in it; known inside the namespace only, where the host has no such user.
DISK_GROUP = "bulkhead-disk"

_DAEMON = """unix_sock_dir = "{directory}"
unix_sock_rw_perms = "0777"
unix_sock_ro_perms = "0777"
auth_unix_rw = "none"
auth_unix_ro = "none"
max_workers = 40
prio_workers = 10
max_client_requests = 20
log_level = 3
log_outputs = "3:file:{log}"
"""
_QEMU_ROOT = """stdio_handler = "file"
namespaces = []
security_driver = "none"
cgroup_controllers = []
dynamic_ownership = 0
remember_owner = 0
user = "{user}"
group = "{group}"
"""
_QEMU_SESSION = """stdio_handler = "file"
security_driver = "none"
"""


class LaunchError(Exception):
    """libvirtd cannot be started; the message says why and what to do."""


def directory_of(root: Path) -> Path:
    """Where the private libvirtd's socket is."""
    return root / "run/bulkhead/libvirt"


def _program() -> str:
    program = shutil.which("libvirtd", path=SEARCH)
    if program is None:
        raise LaunchError("libvirtd is not installed: install libvirt-daemon with its QEMU driver")
    return program


def _prepare(directory: Path, owner: int) -> Path:
    """The state directory, with the settings of libvirtd in it."""
    socket = directory / SOCKET
    if len(str(socket).encode()) > SOCKET_PATH_LIMIT:
        raise LaunchError(f"{socket} is too long for a unix socket; use a shorter --root")
    state = directory / "state"
    for name in ("", "run", "etc", "lib", "cache", "log", "home"):
        path = state / name
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        os.chown(path, owner, -1)
    (state / "libvirtd.conf").write_text(
        _DAEMON.format(directory=directory, log=state / "log/libvirtd.log")
    )
    return state


def qemu_account() -> tuple[str, str]:
    """(user, group) of QEMU: root only where the services have no users of their own."""
    try:
        grp.getgrnam(DISK_GROUP)
    except KeyError:
        return "root", "root"
    return QEMU_USER, DISK_GROUP


def _accounts(state: Path, uid: int) -> None:
    """Copies of passwd and group in which the users that libvirt looks up exist."""
    users, groups = Path("/etc/passwd").read_text(), Path("/etc/group").read_text()
    if f"\n{QEMU_USER}:" not in users:
        users += f"{QEMU_USER}:x:{QEMU_UID}:{QEMU_UID}::/var/lib/libvirt:/usr/sbin/nologin\n"
        groups += f"{QEMU_USER}:x:{QEMU_UID}:\n"
    try:
        pwd.getpwuid(uid)
    except KeyError:
        users += f"bh-session:x:{uid}:{uid}::{state / 'home'}:/usr/sbin/nologin\n"
    for name, text in (("passwd", users), ("group", groups)):
        (state / name).write_text(text)
        rooms.bind(state / name, Path("/etc") / name)


def _room(state: Path, root: Path, uid: int) -> None:
    """Enter the namespace. RoomError when this is not root's to do."""
    rooms.leave()
    settings = state / "etc"
    shutil.rmtree(settings)
    if Path("/etc/libvirt").is_dir():
        shutil.copytree("/etc/libvirt", settings)
    settings.mkdir(exist_ok=True)
    # A network of the machine's own libvirtd would be started a second time.
    shutil.rmtree(settings / "qemu/networks/autostart", ignore_errors=True)
    rooms.bind(settings, rooms.with_child(Path("/etc"), "libvirt"))
    for kept, parent in (("lib", "/var/lib"), ("cache", "/var/cache"), ("log", "/var/log")):
        rooms.bind(state / kept, rooms.with_child(Path(parent), "libvirt"))
    _accounts(state, uid)
    rooms.own_dev()
    rooms.own_run(state / "run", root)


def launch(root: Path, *, session: bool, uid: int, user: str, group: str) -> int:
    """Run libvirtd until it ends; its exit status. LaunchError when it cannot start."""
    program = _program()
    # QEMU's user passes through libvirt's folders, whatever mask we were started with.
    os.umask(0o022)
    directory = directory_of(root)
    directory.mkdir(parents=True, exist_ok=True)
    privileged = os.getuid() == 0
    if session and privileged and not uid:
        raise LaunchError("--session is for one without privileges: give --uid as root")
    if not session and not privileged:
        raise LaunchError("only root can run the private libvirtd of qemu:///system")
    state = _prepare(directory, uid if session and privileged else os.getuid())
    environment = {"PATH": SEARCH, "LANG": "C.UTF-8"}
    if privileged:
        _room(state, root, uid)
    if session:
        home = state / "home"
        environment |= {
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(state / "run"),
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_CACHE_HOME": str(state / "cache"),
            "XDG_DATA_HOME": str(home / "data"),
        }
        settings = home / "config/libvirt"
        settings.mkdir(parents=True, exist_ok=True)
        (settings / "qemu.conf").write_text(_QEMU_SESSION)
        if privileged:
            for path in (directory, home / "config", settings):
                os.chown(path, uid, uid)
    else:
        environment["HOME"] = "/root"
        (state / "etc/qemu.conf").write_text(_QEMU_ROOT.format(user=user, group=group))
    # A group of its own: what is sent to the launcher's group does not reach guests.
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    os.chdir("/")
    parent = os.getpid()
    command = [program, "-f", str(state / "libvirtd.conf"), "-p", str(state / "run/libvirtd.pid")]

    def become() -> None:
        if session and privileged:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
        reaper.die_with(parent)
        os.execve(program, command, environment)

    return reaper.run(become)


def main(argv: list[str] | None = None) -> int:
    """Start it; 2 with a sentence when that cannot be done."""
    parser = argparse.ArgumentParser(prog="bulkhead-libvirtd", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="directory of the instance")
    parser.add_argument("--session", action="store_true", help="serve qemu:///session")
    parser.add_argument("--uid", type=int, default=0, help="whom a session belongs to")
    parser.add_argument("--qemu-user", help="who runs QEMU (system only)")
    parser.add_argument("--qemu-group", help="QEMU's group (system only)")
    options = parser.parse_args(argv)
    user, group = qemu_account()
    try:
        return launch(
            options.root.absolute(),
            session=options.session,
            uid=options.uid,
            user=options.qemu_user or user,
            group=options.qemu_group or group,
        )
    except (LaunchError, OSError) as error:
        print(f"libvirtd cannot be started: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
