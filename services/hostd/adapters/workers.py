"""Enforce workers: one process per network qube's namespace.

Owns their listening sockets and processes. Must not know rules. Invariants: the socket
lives in hostd's own directory and only the firewall's user can connect to it; a worker
starts inside its namespace with CAP_NET_ADMIN and nothing else; while hostd lives a
worker that dies is started again on the same socket, so that no connection is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pwd
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bulkhead import failpoints
from services.hostd import failpoint_table  # noqa: F401  (declares the rows)

RESTART_S = 0.1
RESTART_MOST_S = 5.0
# A worker that lived this long starts again at once.
STEADY_S = 10.0
STOP_S = 3.0
_BACKLOG = 16
# What a worker's environment keeps: nothing of hostd's but the tests' failpoints.
_KEPT = ("BULKHEAD_FAILPOINTS", "BULKHEAD_FAILPOINTS_FILE", "BULKHEAD_FAILPOINTS_TRACE")


@dataclass(slots=True)
class _Worker:
    namespace: str
    listener: socket.socket
    path: Path
    process: asyncio.subprocess.Process | None = None
    keeper: asyncio.Task[None] | None = None


def worker_command(namespace: str, uid: int, gid: int, fd: int, parent: int) -> list[str]:
    """The worker's argument list: into the namespace, down to one capability, run."""
    only = "-all,+net_admin"
    return [
        "ip",
        "netns",
        "exec",
        namespace,
        "setpriv",
        f"--reuid={uid}",
        f"--regid={gid}",
        "--clear-groups",
        f"--inh-caps={only}",
        f"--ambient-caps={only}",
        f"--bounding-set={only}",
        "--no-new-privs",
        sys.executable,
        "-m",
        "services.firewall.enforce",
        "--listen-fd",
        str(fd),
        "--parent",
        str(parent),
    ]


def worker_environment() -> dict[str, str]:
    """A clean environment."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **kept}


class Workers:
    """The workers of one hostd."""

    def __init__(self, directory: Path, uid: int, log: logging.Logger) -> None:
        """directory: hostd's socket directory. uid: the firewall's user."""
        self._directory = directory
        self._uid = uid
        try:
            self._gid = pwd.getpwuid(uid).pw_gid
        except KeyError:
            self._gid = uid
        self._log = log
        self._workers: dict[int, _Worker] = {}
        self._lock = asyncio.Lock()

    def _listen(self, qid: int) -> tuple[socket.socket, Path]:
        path = self._directory / f"e{qid}.sock"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(path))
            path.chmod(0o600)
            os.chown(path, self._uid, self._gid)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
        return listener, path

    async def ensure(self, qid: int, namespace: str) -> tuple[int, Path]:
        """(pid, socket) of a worker that runs in the namespace. OSError."""
        async with self._lock:
            worker = self._workers.get(qid)
            if worker is not None and (worker.keeper is None or worker.keeper.done()):
                await self._stop(qid)
                worker = None
            if worker is None:
                listener, path = self._listen(qid)
                worker = _Worker(namespace, listener, path)
                self._workers[qid] = worker
                await self._spawn(worker)
                worker.keeper = asyncio.get_running_loop().create_task(self._keep(worker))
            failpoints.hit("hostd.enforcer.after_spawn")
            assert worker.process is not None
            return worker.process.pid, worker.path

    async def _spawn(self, worker: _Worker) -> None:
        fd = worker.listener.fileno()
        worker.process = await asyncio.create_subprocess_exec(
            *worker_command(worker.namespace, self._uid, self._gid, fd, os.getpid()),
            pass_fds=(fd,),
            stdin=asyncio.subprocess.DEVNULL,
            env=worker_environment(),
            cwd="/",
        )

    async def _keep(self, worker: _Worker) -> None:
        """Start the worker again whenever it ends; the kernel keeps its tables meanwhile."""
        loop = asyncio.get_running_loop()
        pause = RESTART_S
        while True:
            started = loop.time()
            assert worker.process is not None
            code = await worker.process.wait()
            if loop.time() - started > STEADY_S:
                pause = RESTART_S
            self._log.warning("the enforce worker of %s ended with %s", worker.namespace, code)
            await asyncio.sleep(pause)
            pause = min(pause * 2, RESTART_MOST_S)
            try:
                await self._spawn(worker)
            except OSError as error:
                self._log.error("no enforce worker in %s: %s", worker.namespace, error)
                return

    async def stop(self, qid: int) -> None:
        """The worker and its socket are gone; repeatable."""
        async with self._lock:
            await self._stop(qid)

    async def _stop(self, qid: int) -> None:
        worker = self._workers.pop(qid, None)
        if worker is None:
            (self._directory / f"e{qid}.sock").unlink(missing_ok=True)
            return
        if worker.keeper is not None:
            worker.keeper.cancel()
            await asyncio.gather(worker.keeper, return_exceptions=True)
        if worker.process is not None and worker.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                worker.process.terminate()
            try:
                async with asyncio.timeout(STOP_S):
                    await worker.process.wait()
            except TimeoutError:
                worker.process.kill()
                await worker.process.wait()
        worker.listener.close()
        worker.path.unlink(missing_ok=True)

    def qids(self) -> Mapping[int, str]:
        """qid -> namespace of every worker."""
        return {qid: worker.namespace for qid, worker in self._workers.items()}

    def running(self) -> list[int]:
        """qids whose worker runs now."""
        return sorted(
            qid
            for qid, worker in self._workers.items()
            if worker.process is not None and worker.process.returncode is None
        )

    async def close(self) -> None:
        """Stop all; their tables stay."""
        for qid in tuple(self._workers):
            await self.stop(qid)
