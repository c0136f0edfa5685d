"""Starts the services, keeps them running, stops them.

Owns the child processes, the admin sockets (held open across a restart of adminapi)
and run/bulkhead/launcher.json. Must not speak for any service. Invariant: every child
runs as its own user or the launcher says that isolation is off; a child that dies is
started again with a growing delay; after stop() no child is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bulkhead import extensions
from bulkhead.config import SERVICES, Settings
from bulkhead.durable import write_file
from clients.cli.instance import operator
from clients.cli.instance.accounts import Account, client_gid

log = logging.getLogger("bulkhead.run")

RESTART_DELAYS = (0.02, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
# Environment: longest delay in seconds; tests that kill children many times lower it.
RESTART_DELAY_LIMIT = "BULKHEAD_RESTART_DELAY_LIMIT_S"
STOP_GRACE_S = 10.0
FIRST = ("registry", "adminapi")
HEAD_START_S = 1.0
# Short: a stop waits for a question that is under way.
HEALTH_TIMEOUT_S = 0.5
# A child that ran this long starts again without delay.
SETTLED_S = 1.0


class LaunchError(RuntimeError):
    """The instance could not be brought up; the message says what to do."""


@dataclass(slots=True)
class Child:
    """One supervised process."""

    name: str
    argv: Sequence[str]
    account: Account | None
    fds: tuple[int, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    started: float = 0.0
    last_exit: int | None = None

    def described(self) -> dict[str, int | None]:
        """What launcher.json says of it."""
        return {
            "pid": self.process.pid if self.process is not None else None,
            "restarts": self.restarts,
            "last_exit": self.last_exit,
        }


class Supervisor:
    """Children of one instance; start() then wait() then stop()."""

    def __init__(
        self, settings: Settings, accounts: Mapping[str, Account], *, own_libvirtd: bool
    ) -> None:
        self.settings = settings
        self.accounts = accounts
        self.own_libvirtd = own_libvirtd
        self.children: dict[str, Child] = {}
        self._stopping = False
        self._sockets: dict[str, socket.socket] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._secret_fd: int | None = None

    # ---- sockets and secret

    def bind_extension_sockets(self) -> None:
        """run/bulkhead/ext-NAME/admin.sock, where the extension finds the calls it was granted."""
        for extension in extensions.load(self.settings.root):
            if not extension.grants:
                continue
            path = self.settings.service_dir(extension.service) / "admin.sock"
            path.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            old = os.umask(0o177)
            try:
                listener.bind(str(path))
            finally:
                os.umask(old)
            account = self.accounts.get(extension.service)
            if account is not None:
                os.chown(path, account.uid, account.gid)
            listener.listen(64)
            listener.set_inheritable(True)
            self._sockets[extension.service] = listener

    def bind_admin_sockets(self) -> None:
        """Bind qubesd.sock and its siblings, mode 0770, group qubes where it exists.

        Raises LaunchError when another daemon answers on one of them.
        """
        for name, path in self.settings.admin_sockets().items():
            if path.exists():
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                    try:
                        probe.connect(str(path))
                    except (ConnectionRefusedError, FileNotFoundError):
                        path.unlink(missing_ok=True)
                    else:
                        raise LaunchError(
                            f"{path} is served by another daemon: stop it first "
                            f"(bulkhead stop --root {self.settings.root})"
                        )
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            old = os.umask(0o007)
            try:
                listener.bind(str(path))
            finally:
                os.umask(old)
            gid = client_gid()
            if gid is not None and os.getuid() == 0:
                os.chown(path, 0, gid)
            listener.listen(1024)
            listener.set_inheritable(True)
            self._sockets[name] = listener

    def _make_secret(self) -> None:
        """The per-start secret of an instance whose services share one user."""
        path = self.settings.bus_dir / "secret"
        write_file(path, secrets.token_hex(32).encode(), 0o600)
        self._secret_fd = os.open(path, os.O_RDONLY)

    # ---- children

    def _plan(self) -> list[Child]:
        root = str(self.settings.root)
        plan: list[Child] = []
        if self.settings.hypervisor.startswith("sim:"):
            plan.append(self._child("simhv", "services.domains.simhv", "domains"))
        if self.own_libvirtd:
            argv = [sys.executable, "-m", "services.domains.libvirtd", "--root", root]
            if "session" in self.settings.hypervisor:
                argv.append("--session")
            plan.append(Child("libvirtd", argv, None))
        for service in SERVICES:
            if service == "hostd" and os.getuid() != 0:
                continue  # without root there is nothing that it could do
            plan.append(self._child(service, f"services.{service}", service))
        for extension in extensions.load(self.settings.root):
            argv = [*extension.command, "--root", root]
            plan.append(self._child(extension.service, "", extension.service, argv))
        return plan

    def _child(
        self, name: str, module: str, account: str, argv: Sequence[str] | None = None
    ) -> Child:
        child = Child(
            name,
            argv or [sys.executable, "-m", module, "--root", str(self.settings.root)],
            self.accounts.get(account),
        )
        environment: dict[str, str] = {}
        fds: list[int] = []
        if self._secret_fd is not None:
            environment["BULKHEAD_SECRET_FD"] = str(self._secret_fd)
            fds.append(self._secret_fd)
        if name == "adminapi":
            listening = {key: sock.fileno() for key, sock in self._sockets.items()}
            environment["BULKHEAD_LISTEN_FDS"] = ",".join(f"{k}:{v}" for k, v in listening.items())
            fds.extend(listening.values())
        child.environment = environment
        child.fds = tuple(fds)
        return child

    def _spawn(self, child: Child) -> None:
        log_path = self.settings.log_dir / f"{child.name}.log"
        environment = {
            key: value
            for key, value in os.environ.items()
            if key in ("PATH", "LANG", "HOME", "XDG_RUNTIME_DIR") or key.startswith("BULKHEAD_")
        }
        environment.update(child.environment)
        environment["PYTHONUNBUFFERED"] = "1"
        # Their threads share one interpreter lock: a heap for each only takes memory.
        environment["MALLOC_ARENA_MAX"] = "1"
        account = child.account
        fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        try:
            if account is not None:
                os.chown(log_path, account.uid, account.gid)
            child.process = subprocess.Popen(
                list(child.argv),
                stdin=subprocess.DEVNULL,
                stdout=fd,
                stderr=fd,
                cwd="/",
                env=environment,
                pass_fds=child.fds,
                start_new_session=True,
                user=account.uid if account is not None else None,
                group=account.gid if account is not None else None,
                extra_groups=list(account.groups) if account is not None else None,
                umask=0o027,
            )
        finally:
            os.close(fd)
        child.started = time.monotonic()
        self._report()

    def _described(self) -> dict[str, object]:
        return {
            "pid": os.getpid(),
            "hypervisor": self.settings.hypervisor,
            "isolated": self.settings.isolated,
            "children": {name: child.described() for name, child in self.children.items()},
        }

    def _report(self) -> None:
        """launcher.json: what `bulkhead status` and `stop` need to know."""
        data = json.dumps(self._described(), indent=1).encode()
        write_file(self.settings.bus_dir / "launcher.json", data, 0o644)

    async def start(self) -> None:
        """Spawn every child; returns when all processes exist (not yet: answer)."""
        if not self.settings.isolated:
            self._make_secret()
        self.bind_admin_sockets()
        self.bind_extension_sockets()
        self.settings.save()
        plan = self._plan()
        # Reads need these two alone: they get the processors to themselves for a moment.
        first = [child for child in plan if child.name in FIRST]
        for child in first:
            self._begin(child)
        with contextlib.suppress(LaunchError):
            await self.wait_ready(HEAD_START_S)
        for child in plan:
            if child not in first:
                self._begin(child)

    def _begin(self, child: Child) -> None:
        self.children[child.name] = child
        self._spawn(child)
        self._tasks.append(asyncio.create_task(self._watch(child), name=f"watch {child.name}"))

    async def _watch(self, child: Child) -> None:
        """Wait for the child's death and start it again, for as long as the instance runs."""
        failures = 0
        while True:
            assert child.process is not None
            child.last_exit = await _wait(child.process)
            if self._stopping:
                return
            lived = time.monotonic() - child.started
            failures = 0 if lived > SETTLED_S else failures + 1
            delay = restart_delay(failures)
            log.warning(
                "%s ended (%s) after %.1f s: starting it again in %.2f s; its log: %s",
                child.name,
                _exit_text(child.last_exit),
                lived,
                delay,
                self.settings.log_dir / f"{child.name}.log",
            )
            await asyncio.sleep(delay)
            child.restarts += 1
            self._spawn(child)

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until qubesd.sock answers a read. LaunchError when it does not in time."""
        path = self.settings.admin_sockets()["admin"]
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                reply = await asyncio.wait_for(_ask(path), max(0.1, deadline - time.monotonic()))
                if reply.startswith(b"0\0"):
                    return
            if time.monotonic() > deadline:
                dead = [n for n, c in self.children.items() if c.restarts > 0]
                raise LaunchError(
                    f"{path} did not answer within {timeout_s:.0f} s"
                    + (f"; these keep dying: {', '.join(dead)}" if dead else "")
                    + f"; see {self.settings.log_dir}"
                )
            await asyncio.sleep(0.05)

    async def wait_all(self, timeout_s: float) -> None:
        """Wait until every service says that it is ready. LaunchError names those that do not."""
        deadline = time.monotonic() + timeout_s
        for name, child in self.children.items():
            if name not in SERVICES:
                continue
            while True:
                row = await asyncio.to_thread(
                    operator.health, self.settings, name, child.described(), HEALTH_TIMEOUT_S
                )
                if row["ready"]:
                    break
                if time.monotonic() > deadline:
                    raise LaunchError(
                        f"{name} is not ready: {row['reason']}; see {self.settings.log_dir}"
                    )
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """SIGTERM in reverse order, SIGKILL after a grace period, sockets removed."""
        self._stopping = True
        for child in reversed(list(self.children.values())):
            process = child.process
            if process is None or process.poll() is not None:
                continue
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(_wait(process), STOP_GRACE_S)
            except TimeoutError:
                log.warning("%s did not stop within %.0f s: killed", child.name, STOP_GRACE_S)
                process.kill()
                await _wait(process)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for name, listener in self._sockets.items():
            listener.close()
            path = self.settings.admin_sockets().get(
                name, self.settings.service_dir(name) / "admin.sock"
            )
            path.unlink(missing_ok=True)
        if self._secret_fd is not None:
            os.close(self._secret_fd)
            (self.settings.bus_dir / "secret").unlink(missing_ok=True)
        (self.settings.bus_dir / "launcher.json").unlink(missing_ok=True)


def restart_delay(failures: int) -> float:
    """Seconds before a child starts again that has died young so many times in a row."""
    limit = float(os.environ.get(RESTART_DELAY_LIMIT) or RESTART_DELAYS[-1])
    return min(RESTART_DELAYS[min(failures, len(RESTART_DELAYS) - 1)], limit)


async def _wait(process: subprocess.Popen[bytes]) -> int:
    """Exit status of the process, without blocking the loop: a pidfd becomes readable."""
    loop = asyncio.get_running_loop()
    code = process.poll()
    if code is not None:
        return code
    ended = loop.create_future()
    pidfd = os.pidfd_open(process.pid)

    def readable() -> None:
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(pidfd, readable)
    try:
        await ended
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return process.wait()


async def _ask(path: Path) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        writer.write(b"admin.label.List+ dom0 name dom0\0")
        writer.write_eof()
        return await reader.read(65536)
    finally:
        writer.close()


def _exit_text(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit status {code}"
