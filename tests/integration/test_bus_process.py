"""Service processes: start, lock, confinement, kill -9, retry, orderly end."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from bulkhead.api import control_pb2, registry_pb2
from bulkhead.bus import confine
from bulkhead.bus.client import CallContext, operator_call
from bulkhead.bus.errors import BusError
from tests.fakes.bus import Instance

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
MUTATE = "bulkhead.api.Registry.Mutate"


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await work()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(limited())


class Process:
    """A service process that is started again whenever it dies of SIGKILL."""

    def __init__(self, instance: Instance, service: str, **environment: str) -> None:
        self._instance = instance
        self._service = service
        self._environment = {**os.environ, **environment}
        self._popen = self._start()
        self.deaths = 0

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.fakes.bus_service",
                self._service,
                "--root",
                str(self._instance.root),
            ],
            cwd=ROOT,
            env=self._environment,
            stderr=subprocess.PIPE,
        )

    async def keep(self) -> None:
        """Start again after each SIGKILL, until cancelled."""
        while True:
            status = await asyncio.to_thread(self._popen.wait)
            self._close()
            if status != -signal.SIGKILL:
                return
            self.deaths += 1
            self._popen = self._start()

    def kill(self) -> None:
        self._popen.kill()

    async def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit status and what it wrote to stderr."""
        self._popen.send_signal(number)
        _, errors = await asyncio.to_thread(self._popen.communicate, None, 20)
        return self._popen.returncode, errors.decode()

    async def wait(self) -> tuple[int, str]:
        _, errors = await asyncio.to_thread(self._popen.communicate, None, 20)
        return self._popen.returncode, errors.decode()

    def _close(self) -> None:
        if self._popen.stderr is not None:
            self._popen.stderr.close()

    def clean(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self._close()


async def health(instance: Instance, service: str) -> control_pb2.HealthReply:
    return await asyncio.to_thread(
        operator_call,
        instance.settings,
        service,
        "bulkhead.api.Control.Health",
        control_pb2.HealthRequest(),
        control_pb2.HealthReply,
        10.0,
    )


def effects(instance: Instance) -> list[str]:
    path = instance.root / "effects"
    return json.loads(path.read_text())["effects"] if path.exists() else []


async def mutate(instance: Instance, request_id: bytes, timeout: float = 20.0) -> Any:
    channel = instance.connections("adminapi").channel("registry")
    header, _ = await channel.call_with_header(
        MUTATE,
        registry_pb2.MutateRequest(),
        registry_pb2.MutateReply,
        timeout=timeout,
        context=CallContext(request_id=request_id),
    )
    return header


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_call_survives_kill_9_with_one_effect_and_one_answer(where: str) -> None:
    async def work() -> None:
        async with Instance() as instance:
            process = Process(instance, "registry", BUS_TEST_DIE=where)
            keeper = asyncio.create_task(process.keep())
            try:
                request_id = secrets.token_bytes(16)
                header = await mutate(instance, request_id)
                assert process.deaths == 1
                assert effects(instance) == [MUTATE] and header.revision == 1
                process.kill()
                again = await mutate(instance, request_id)
                assert again == header and effects(instance) == [MUTATE]
                other = await mutate(instance, secrets.token_bytes(16))
                assert other.revision == 2
            finally:
                keeper.cancel()
                process.clean()

    run(work)


@pytest.mark.parametrize(("where", "count"), [("before", 0), ("after", 1)])
def test_what_is_not_idempotent_is_never_sent_twice(where: str, count: int) -> None:
    async def work() -> None:
        async with Instance() as instance:
            process = Process(instance, "registry", BUS_TEST_DIE=where)
            keeper = asyncio.create_task(process.keep())
            try:
                channel = instance.connections("lifecycle").channel("registry")
                with pytest.raises(BusError) as caught:
                    await channel.call(
                        "bulkhead.api.Registry.TakeEpoch",
                        registry_pb2.TakeEpochRequest(),
                        registry_pb2.TakeEpochReply,
                        timeout=20,
                    )
                assert caught.value.reason == "CONNECTION_LOST"
                assert caught.value.outcome_unknown
                await health(instance, "registry")  # it is back
                assert process.deaths == 1 and len(effects(instance)) == count
            finally:
                keeper.cancel()
                process.clean()

    run(work)


def test_calls_in_flight_when_the_server_is_stopped_and_continued() -> None:
    async def work() -> None:
        async with Instance() as instance:
            process = Process(instance, "registry")
            try:
                await health(instance, "registry")
                process._popen.send_signal(signal.SIGSTOP)
                call = asyncio.create_task(mutate(instance, secrets.token_bytes(16)))
                await asyncio.wait([call], timeout=0.2)
                assert not call.done()
                process._popen.send_signal(signal.SIGCONT)
                assert (await call).revision == 1
                assert len(effects(instance)) == 1
            finally:
                process.clean()

    run(work)


def test_what_the_process_gave_up() -> None:
    async def work() -> None:
        async with Instance() as instance:
            process = Process(instance, "registry")
            try:
                found = dict((await health(instance, "registry")).privileges)
                assert found["capabilities"] == "none"
                assert found["no_new_privs"] == "on"
                assert found["seccomp"] == "filter"
                assert found["isolation"] == "off"
                abi = confine.landlock_abi()
                assert found["landlock"] == (f"abi {abi}" if abi else "unavailable")
            finally:
                status, errors = await process.end()
                process.clean()
            assert status == 0, errors
            assert "isolation is off" in errors

    run(work)


def test_a_second_process_and_a_crash_and_no_instance() -> None:
    async def work() -> None:
        async with Instance() as instance:
            first = Process(instance, "registry")
            try:
                await health(instance, "registry")
                second = Process(instance, "registry")
                status, errors = await second.wait()
                assert status == 78 and "runs already" in errors
            finally:
                first.clean()
            crashing = Process(instance, "storage", BUS_TEST_CRASH="1")
            status, errors = await crashing.wait()
            assert status == 70 and "background work failed" in errors
            instance.settings.file.unlink()
            third = Process(instance, "registry")
            status, errors = await third.wait()
            assert status == 78 and "no instance was started here" in errors

    run(work)


def test_the_secret_by_descriptor() -> None:
    async def work() -> None:
        async with Instance() as instance:
            path = instance.settings.bus_dir / "secret"
            hidden = path.with_name("elsewhere")
            fd = os.open(path, os.O_RDONLY)
            path.rename(hidden)
            processes = []
            try:
                # Two services share one open file.
                for service in ("registry", "storage"):
                    processes.append(
                        subprocess.Popen(
                            [
                                sys.executable,
                                "-m",
                                "tests.fakes.bus_service",
                                service,
                                "--root",
                                str(instance.root),
                            ],
                            cwd=ROOT,
                            env={**os.environ, "BULKHEAD_SECRET_FD": str(fd)},
                            pass_fds=[fd],
                            stderr=subprocess.DEVNULL,
                        )
                    )
                hidden.rename(path)
                for service in ("registry", "storage"):
                    assert (await health(instance, service)).ready
            finally:
                os.close(fd)
                for process in processes:
                    process.kill()
                    process.wait()

    run(work)


def test_the_operator_without_a_service() -> None:
    async def work() -> None:
        async with Instance() as instance:
            with pytest.raises(BusError) as caught:
                await asyncio.to_thread(
                    operator_call,
                    instance.settings,
                    "registry",
                    "bulkhead.api.Control.Health",
                    control_pb2.HealthRequest(),
                    control_pb2.HealthReply,
                    0.2,
                )
            assert caught.value.reason == "NOT_CONNECTED"

    run(work)


# ---- confine itself, in a process of its own

_TRY = """
import ctypes, json, os, socket, subprocess, sys, threading
from pathlib import Path
from bulkhead.bus import confine
allowed, other = Path(sys.argv[1]), Path(sys.argv[2])
inet, execute, keep = (json.loads(a) for a in sys.argv[3:6])
report = confine.apply(confine.Confinement(
    write=(allowed,), inet=inet, execute=tuple(map(Path, execute)), keep_caps=tuple(keep)))

def attempt(act):
    try:
        act()
        return "ok"
    except OSError as error:
        return error.strerror

libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

found = {
    "write allowed": attempt(lambda: (allowed / "f").write_text("x")),
    "rename allowed": attempt(lambda: (allowed / "f").rename(allowed / "g")),
    "write other": attempt(lambda: (other / "f").write_text("x")),
    "read other": attempt(lambda: (other / "secret").read_text()),
    "unix": attempt(lambda: socket.socket(socket.AF_UNIX).close()),
    "inet": attempt(lambda: socket.socket(socket.AF_INET).close()),
    "inet6": attempt(lambda: socket.socket(socket.AF_INET6).close()),
    "netlink": attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()),
    "packet": attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()),
    "execute": attempt(lambda: subprocess.run(["/bin/true"], check=True)),
    "unshare": attempt(lambda: call("unshare", 0x10000000)),
    "mount": attempt(lambda: call("mount", b"x", b"/", b"tmpfs", 0, None)),
    "chown": attempt(lambda: os.chown(allowed / "g", 12345, 12345)),
    "kill parent": attempt(lambda: os.kill(os.getppid(), 0)),
}
thread = threading.Thread(target=lambda: found.update(
    {"write other in a thread": attempt(lambda: (other / "f").write_text("x"))}))
thread.start()
thread.join()
print(json.dumps([report, found]))
"""


def _confined(
    tmp_path: Path, inet: bool = False, execute: tuple[str, ...] = (), keep: tuple[str, ...] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    for directory in (allowed, other):
        directory.mkdir(exist_ok=True)
    (other / "secret").write_text("x")
    arguments = [json.dumps(inet), json.dumps(execute), json.dumps(keep)]
    done = subprocess.run(
        [sys.executable, "-c", _TRY, str(allowed), str(other), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    report, found = json.loads(done.stdout)
    return report, found


DENIED, NOT_PERMITTED = "Permission denied", "Operation not permitted"
NO_FAMILY = "Address family not supported by protocol"


def test_confined_to_nothing(tmp_path: Path) -> None:
    report, found = _confined(tmp_path)
    assert report["capabilities"] == "none" and report["seccomp"] == "filter"
    assert found["write allowed"] == found["rename allowed"] == found["unix"] == "ok"
    for family in ("inet", "inet6", "netlink", "packet"):
        assert found[family] == NO_FAMILY, family
    assert found["execute"] == found["unshare"] == found["mount"] == NOT_PERMITTED
    assert found["chown"] == NOT_PERMITTED
    if confine.landlock_abi():
        assert found["write other"] == found["read other"] == DENIED
        assert found["write other in a thread"] == DENIED
    if confine.landlock_abi() >= 6:
        assert found["kill parent"] == NOT_PERMITTED


def test_confined_with_network_programs_and_a_capability(tmp_path: Path) -> None:
    report, found = _confined(tmp_path, inet=True, execute=("/bin", "/usr"), keep=("chown",))
    assert found["inet"] == found["inet6"] == found["netlink"] == found["execute"] == "ok"
    assert found["packet"] == NO_FAMILY
    if os.geteuid() == 0:
        assert report["capabilities"] == "chown" and found["chown"] == "ok"


def test_confine_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    needs = confine.Confinement(keep_calls=("no_such_call",))
    with pytest.raises(confine.ConfineError, match="no_such_call"):
        confine._program(needs, 0, 0)
    code = (
        "import threading, time\n"
        "from bulkhead.bus import confine\n"
        "ready = threading.Event()\n"
        "threading.Thread(target=ready.wait, daemon=True).start()\n"
        "try:\n    confine.confine()\n"
        "except confine.ConfineError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert "2 threads run already" in done.stdout, done.stderr
