"""What domains touches besides hypervisors: namespaces, XenStore, QubesDB, daemons."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.domains.adapters.guest_daemons import GuestDaemons, Programs
from services.domains.adapters.guest_keys import Boot, FileKeys, QubesDbKeys
from services.domains.adapters.hypervisor import (
    Domain,
    Event,
    Failure,
    HypervisorError,
    News,
)
from services.domains.adapters.namespaces import XID_BASE, WithNamespaces
from services.domains.adapters.sim_adapter import SimHypervisor
from services.domains.adapters.xenstore import Xenstore
from services.domains.core.guest_keys import KeysOf
from services.domains.core.reasons import DomainsError
from services.domains.core.spec import DiskSpec, DomainSpec
from services.domains.core.tracker import Sighting

UUID = "11111111-1111-4111-8111-111111111101"
NETVM = DomainSpec(
    uuid=UUID, name="sys-net", boot_id="b1", epoch=3, memory_mib=1, qid=7, network_namespace=True
)
DOMAIN = Domain(Sighting(UUID, "b1", "running", xid=12, stubdom_xid=13, stubdom_uuid="s"), "work")


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await body()

    asyncio.run(asyncio.wait_for(whole(), 30))


# ---- network qubes as namespaces


class _Namespaces:
    """WithNamespaces before a hypervisor that is not there."""

    def __init__(self, tmp_path: Path) -> None:
        self.boot_file = tmp_path / "kernel-boot"
        if not self.boot_file.exists():
            self.boot_file.write_text("kernel-1\n")
        self.directory = tmp_path / "namespaces"
        self.events: list[Event] = []
        self.hypervisor = WithNamespaces(
            SimHypervisor(tmp_path / "none.sock"), self.directory, self.boot_file
        )

    async def __aenter__(self) -> _Namespaces:
        await self.hypervisor.open(self.events.append)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.hypervisor.close()

    def powers(self) -> dict[str, str]:
        return {
            path.stem: json.loads(path.read_text())["power"]
            for path in self.directory.glob("*.json")
        }


def test_a_namespace_has_a_power_state_that_survives_domains(tmp_path: Path) -> None:
    async def body() -> None:
        async with _Namespaces(tmp_path) as first:
            made = await first.hypervisor.create_paused(NETVM, 5)
            assert made.sighting.power == "paused"
            assert made.sighting.xid == XID_BASE + 7
            assert (made.boot_id, made.epoch, made.name) == ("b1", 3, "sys-net")
            assert first.powers() == {UUID: "paused"}
            for _ in range(2):
                await first.hypervisor.resume(UUID, 5)
            assert first.powers() == {UUID: "running"}
            assert [event.news for event in first.events] == [News.CHANGED, News.CHANGED]
            with pytest.raises(HypervisorError) as caught:
                await first.hypervisor.create_paused(NETVM, 5)
            assert caught.value.failure is Failure.EXISTS
        async with _Namespaces(tmp_path) as second:
            found = await second.hypervisor.describe(UUID, 5)
            assert found is not None
            assert found.sighting.power == "running"
            assert found.sighting.start_time == made.sighting.start_time
            assert await second.hypervisor.destroy(UUID, "b1", 5)
            assert second.powers() == {}
            assert second.events[-1] == Event(News.STOPPED, UUID, "b1", "destroyed")

    run(body)


def test_nothing_runs_across_a_boot_of_the_host(tmp_path: Path) -> None:
    async def body() -> None:
        async with _Namespaces(tmp_path) as first:
            await first.hypervisor.create_paused(NETVM, 5)
        (tmp_path / "kernel-boot").write_text("kernel-2\n")
        (tmp_path / "namespaces/torn.json").write_text('{"kernel": "kern')
        async with _Namespaces(tmp_path) as second:
            assert second.powers() == {}
            assert (await second.hypervisor.create_paused(NETVM, 5)).boot_id == "b1"

    run(body)


def test_a_namespace_ends_only_by_its_own_boot(tmp_path: Path) -> None:
    async def body() -> None:
        async with _Namespaces(tmp_path) as lab:
            await lab.hypervisor.create_paused(NETVM, 5)
            with pytest.raises(HypervisorError) as caught:
                # Not ours: handed on to the hypervisor, which is away.
                await lab.hypervisor.destroy(UUID, "other", 0.1)
            assert caught.value.failure is Failure.UNAVAILABLE
            assert lab.powers() == {UUID: "paused"}
            await lab.hypervisor.shutdown(UUID, 5)
            assert lab.events[-1].reason == "shutdown"

    run(body)


def test_what_a_namespace_cannot_do_is_said(tmp_path: Path) -> None:
    disk = DiskSpec("xvdi", "/x")

    async def body() -> None:
        async with _Namespaces(tmp_path) as lab:
            await lab.hypervisor.create_paused(NETVM, 5)
            for call in (
                lab.hypervisor.pm_suspend(UUID, 5),
                lab.hypervisor.attach_disk(UUID, disk, 5),
                lab.hypervisor.detach_disk(UUID, disk, 5),
            ):
                with pytest.raises(HypervisorError) as caught:
                    await call
                assert caught.value.failure is Failure.UNSUPPORTED
            assert await lab.hypervisor.wait_agent(UUID, 5) is None
            assert await lab.hypervisor.run_service(UUID, "s", "u", b"", 5) is None
            await lab.hypervisor.set_maxmem(UUID, 100, 5)
            await lab.hypervisor.resize_disk(UUID, "xvda", 1, 5)

    run(body)


# ---- XenStore


class FakeStore:
    """XenStore's client interface over a dictionary."""

    nodes: dict[str, str] = {}
    owners: dict[str, int] = {}
    commits = True

    def __init__(self) -> None:
        self.pending: dict[str, str] = {}

    def transaction_start(self) -> str:
        return "t"

    def read(self, _transaction: str, path: str) -> bytes | None:
        value = self.nodes.get(path)
        return None if value is None else value.encode()

    def write(self, transaction: str, path: str, value: str) -> None:
        assert transaction == "t"
        self.pending[path] = value

    def set_permissions(self, _transaction: str, path: str, rows: list[dict[str, Any]]) -> None:
        self.owners[path] = rows[0]["dom"]

    def transaction_end(self, _transaction: str) -> bool:
        if self.commits:
            self.nodes.update(self.pending)
        return self.commits

    def close(self) -> None:
        self.pending.clear()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> type[FakeStore]:
    monkeypatch.setattr(FakeStore, "nodes", {})
    monkeypatch.setattr(FakeStore, "owners", {})
    monkeypatch.setattr(FakeStore, "commits", True)
    return FakeStore


def test_memory_nodes_are_written_whole_and_owned_by_the_guest(store: type[FakeStore]) -> None:
    xenstore = Xenstore(store)
    xenstore.prepare_memory(12, 0)
    base = "/local/domain/12/memory"
    assert store.nodes == {f"{base}/meminfo": "", f"{base}/swapinfo": ""}
    assert store.owners == {f"{base}/meminfo": 12, f"{base}/swapinfo": 12}
    xenstore.prepare_memory(12, 4000)
    assert store.nodes[f"{base}/hotplug-max"] == str(4000 * 1024)
    xenstore.set_hotplug_max(12, 6000)
    assert store.nodes[f"{base}/hotplug-max"] == str(6000 * 1024)
    Xenstore(None).set_hotplug_max(12, 6000)  # nothing to write to here
    store.commits = False
    with pytest.raises(OSError, match="domain 13"):
        xenstore.prepare_memory(13, 0)
    with pytest.raises(OSError, match="12"):
        xenstore.set_hotplug_max(12, 1)
    assert not any("/13/" in path for path in store.nodes)


class RefusedError(RuntimeError):
    """As xen.lowlevel.xs.Error, which is no OSError."""


def test_a_xenstore_that_refuses_is_not_known_and_takes_nothing(store: type[FakeStore]) -> None:
    def closed() -> FakeStore:
        raise RefusedError(13, "Permission denied")

    xenstore = Xenstore(closed)
    assert xenstore.stubdom(3) == (-1, "")
    assert xenstore.start_time("u") is None
    with pytest.raises(OSError, match="Permission denied"):
        xenstore.prepare_memory(3, 0)
    with pytest.raises(OSError, match="Permission denied"):
        xenstore.set_hotplug_max(3, 100)

    class Gone(FakeStore):
        def set_permissions(self, *_: object) -> None:
            raise RefusedError(2, "No such file or directory")

    with pytest.raises(OSError, match="No such file"):
        Xenstore(Gone).prepare_memory(3, 0)
    assert store.nodes == {}


def test_stubdomain_and_start_time_are_read(store: type[FakeStore]) -> None:
    store.nodes.update(
        {
            "/local/domain/12/image/device-model-domid": "13",
            "/local/domain/13/vm": "/vm/stub-uuid",
            "/local/domain/14/image/device-model-domid": "0",
            "/local/domain/15/image/device-model-domid": "x",
            f"/vm/{UUID}/start_time": "1700000000.50",
        }
    )
    xenstore = Xenstore(store)
    assert xenstore.present
    assert xenstore.stubdom(12) == (13, "stub-uuid")
    for xid in (14, 15, 16):
        assert xenstore.stubdom(xid) == (-1, "")
    assert xenstore.start_time(UUID) == 1700000000.5
    assert xenstore.start_time("none") is None


# ---- guest keys


class FakeQubesDb:
    """QubesDB's client: one dictionary per guest."""

    guests: dict[str, dict[str, bytes]] = {}
    removed: list[str] = []
    written: list[str] = []

    def __init__(self, name: str) -> None:
        if name == "gone":
            raise OSError("no such socket")
        self.keys = self.guests.setdefault(name, {})

    def write(self, path: str, value: bytes) -> None:
        if path == "/refused":
            raise RuntimeError("not allowed")
        self.written.append(path)
        self.keys[path] = value

    def read(self, path: str) -> bytes | None:
        return self.keys.get(path)

    def rm(self, path: str) -> None:
        self.removed.append(path)
        gone = [key for key in self.keys if key.startswith(path) and path.endswith("/")]
        for key in gone or [path]:
            del self.keys[key]

    def multiread(self, prefix: str) -> dict[str, bytes]:
        return {key: value for key, value in self.keys.items() if key.startswith(prefix)}

    def close(self) -> None:
        pass


def test_qubesdb_is_written_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeQubesDb, "guests", {})
    boot = Boot(UUID, "b1", "work")

    async def body() -> None:
        keys = QubesDbKeys(FakeQubesDb)
        await keys.write(boot, [("/a", "1"), ("/s/x", "ü")], ["/none"], False)
        assert await keys.read(boot, "") == {"/a": "1", "/s/x": "ü"}
        assert await keys.read(boot, "/s/") == {"/s/x": "ü"}
        FakeQubesDb.guests["work"]["/qubes-tools"] = b"\xff\xfe"  # a guest writes what it likes
        assert (await keys.read(boot, "/qubes-tools"))["/qubes-tools"] == "\ufffd\ufffd"
        await keys.write(boot, [("/b", "2")], [], True)
        assert FakeQubesDb.guests == {"work": {"/b": b"2"}}
        for call in (
            keys.read(Boot(UUID, "b1", "gone"), ""),
            keys.write(boot, [("/refused", "")], [], False),
        ):
            with pytest.raises(DomainsError) as caught:
                await call
            assert caught.value.reason == "GUEST_DAEMON_FAILED"
        with pytest.raises(DomainsError) as caught:
            await keys.write(boot, [("bad", "")], [], False)
        assert caught.value.reason == "INVALID_GUEST_KEY"
        assert await keys.kept() == {}

    run(body)


def test_what_is_written_again_never_disappears_in_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A guest that watches its services must not see one stop and start."""
    monkeypatch.setattr(FakeQubesDb, "guests", {"work": {"/s/a": b"1", "/s/b": b"1", "/t": b""}})
    monkeypatch.setattr(FakeQubesDb, "removed", [])

    async def body() -> None:
        keys = QubesDbKeys(FakeQubesDb)
        await keys.write(Boot(UUID, "b1", "work"), [("/s/a", "0"), ("/s/c", "1")], ["/s/"], False)
        assert FakeQubesDb.removed == ["/s/b"]
        assert FakeQubesDb.guests["work"] == {"/s/a": b"0", "/s/c": b"1", "/t": b""}

    run(body)


def test_nobody_is_woken_for_what_has_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One service is switched: the guest's network is not set up anew."""
    monkeypatch.setattr(FakeQubesDb, "guests", {"work": {"/s/a": b"1", "/ip": b"1.2.3.4"}})
    monkeypatch.setattr(FakeQubesDb, "written", [])
    wanted = [("/ip", "1.2.3.4"), ("/s/a", "0"), ("/s/b", "")]

    async def body() -> None:
        keys, boot = QubesDbKeys(FakeQubesDb), Boot(UUID, "b1", "work")
        await keys.write(boot, wanted, ["/s/"], False, changed_only=True)
        assert FakeQubesDb.written == ["/s/a", "/s/b"]
        # Where writing is the news, as of rules, everything is written.
        await keys.write(boot, wanted, [], False)
        assert FakeQubesDb.written[2:] == [path for path, _ in wanted]

    run(body)


def test_key_files_wait_for_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They mean nothing after what only a disk survives."""

    def forced(_fd: int) -> None:
        raise AssertionError("forced to the disk")

    monkeypatch.setattr(os, "fsync", forced)
    keys = FileKeys(tmp_path)

    async def body() -> None:
        await keys.write(Boot(UUID, "b1", "work"), [("/a", "1")], [], False)
        assert await keys.kept() == {UUID: "b1"}
        await keys.drop(UUID, "b1")
        assert await keys.kept() == {}

    run(body)


TEXTS = KeysOf("/texts/", frozenset({"# me", "# 10.0.0.1"}), ("/texts-news", "reload"))
MINE, ALSO_MINE, OTHERS = "# me\n# x\nrule", "# you\n# 10.0.0.1\nrule", "# you\n# me too\nrule"


def test_keys_of_somebody_go_and_it_is_told_where_any_went(tmp_path: Path) -> None:
    boot, keys = Boot(UUID, "b1", "work"), FileKeys(tmp_path)
    there = [("/texts/1", MINE), ("/texts/2", ALSO_MINE), ("/texts/3", OTHERS), ("/text", MINE)]

    async def body() -> None:
        await keys.write(boot, there, [], False)
        await keys.write(boot, [("/texts/2", "new")], [], False, removed_of=TEXTS)
        left = {"/texts/2": "new", "/texts/3": OTHERS, "/text": MINE, "/texts-news": "reload"}
        assert await keys.read(boot, "") == left
        await keys.write(boot, [("/texts-news", "")], [], False)
        await keys.write(boot, [], [], False, removed_of=TEXTS)
        assert await keys.read(boot, "") == {**left, "/texts-news": ""}
        for wrong in (replace(TEXTS, below="/texts"), replace(TEXTS, news=("x", ""))):
            with pytest.raises(DomainsError):
                await keys.write(boot, [], [], False, removed_of=wrong)

    run(body)


@pytest.mark.parametrize("dies_at", [None, *range(4)])
def test_keys_of_somebody_are_empty_until_it_is_told(
    monkeypatch: pytest.MonkeyPatch, dies_at: int | None
) -> None:
    """Killed at any moment and repeated: whoever reads after the news finds none of it."""
    there = {"/texts/1": MINE.encode(), "/texts/3": OTHERS.encode(), "/texts-news": b"reload"}
    monkeypatch.setattr(FakeQubesDb, "guests", {"work": dict(there)})
    effects: list[str] = []
    read: list[dict[str, bytes]] = []

    class Dying(FakeQubesDb):
        def write(self, path: str, value: bytes) -> None:
            self._effect(path)
            super().write(path, value)
            if path == "/texts-news":
                read.append({k: v for k, v in self.keys.items() if k.startswith("/texts/")})

        def rm(self, path: str) -> None:
            self._effect(f"-{path}")
            super().rm(path)

        @staticmethod
        def _effect(what: str) -> None:
            if len(effects) == dies_at:
                effects.append("died")
                raise OSError("killed")
            effects.append(what)

    async def body() -> None:
        keys, boot = QubesDbKeys(Dying), Boot(UUID, "b1", "work")
        with contextlib.suppress(DomainsError):
            await keys.write(boot, [], [], False, changed_only=True, removed_of=TEXTS)
        await keys.write(boot, [], [], False, changed_only=True, removed_of=TEXTS)
        assert FakeQubesDb.guests["work"] == {k: v for k, v in there.items() if k != "/texts/1"}
        assert read
        assert all(b"rule" not in keys.get("/texts/1", b"") for keys in read)
        assert ("died" in effects) is (dies_at in (0, 1, 2))

    run(body)


def test_key_files_that_are_damaged_are_as_none(tmp_path: Path) -> None:
    boot = Boot(UUID, "b1", "work")

    async def body() -> None:
        keys = FileKeys(tmp_path)
        await keys.write(boot, [("/a", "1")], [], False)
        assert await keys.kept() == {UUID: "b1"}
        await keys.drop(UUID, "b0")
        assert await keys.read(boot, "") == {"/a": "1"}
        (tmp_path / f"{UUID}.json").write_text("{")
        assert await keys.kept() == {UUID: ""}
        assert await keys.read(boot, "") == {}
        await keys.drop(UUID, "")
        assert await keys.kept() == {}

    run(body)


def test_a_key_file_is_written_where_it_changes(tmp_path: Path) -> None:
    boot, file = Boot(UUID, "b1", "work"), tmp_path / f"{UUID}.json"
    keys = FileKeys(tmp_path)

    def written(
        changed: list[tuple[str, str]], removed: list[str], *, anew: bool = False, of: str = "b1"
    ) -> bool:
        before = file.stat().st_ino
        with file.open():  # so that its number is not given again
            asyncio.run(keys.write(Boot(UUID, of, "work"), changed, removed, anew))
        return file.stat().st_ino != before

    asyncio.run(keys.write(boot, [], [], True))
    assert json.loads(file.read_text()) == {"boot_id": "b1", "keys": {}}
    assert written([("/a", "1"), ("/b", "2")], [])
    assert not written([("/a", "1")], ["/c/"])
    assert not written([("/b", "2")], ["/b"])
    assert not written([("/b", "2"), ("/a", "1")], [], anew=True)
    assert written([("/a", "2")], [])
    assert written([], ["/b"])
    assert written([("/a", "2")], [], of="b2")  # another boot has the same
    assert asyncio.run(keys.kept()) == {UUID: "b2"}


# ---- daemons


def programs(tmp_path: Path, **scripts: str) -> Programs:
    """Programs that write down how they were called, then do what the script says."""
    paths = {}
    for name in ("qubesdb_daemon", "qrexec_daemon", "qrexec_client"):
        path = tmp_path / name
        paths[name] = path
        if name in scripts:
            path.write_text(
                "#!/bin/sh\n"
                f'echo "{name} $QREXEC_STARTUP_TIMEOUT/$QREXEC_STARTUP_NOWAIT $*" '
                f">>{tmp_path}/log\n"
                f"{scripts[name]}\n"
            )
            path.chmod(0o755)
    return Programs(**paths, sockets=tmp_path)


def agents(daemons: GuestDaemons, qrexec: bool = True) -> Awaitable[bool | None]:
    return daemons.start_agents(
        DOMAIN, qrexec=qrexec, timeout_s=30, default_user="user", debug=False, stubdom_qrexec=True
    )


def test_without_the_programs_nothing_is_started(tmp_path: Path) -> None:
    async def body() -> None:
        daemons = GuestDaemons(programs(tmp_path))
        await daemons.start_keys(DOMAIN)
        assert await agents(daemons) is None
        assert await daemons.run_service(DOMAIN, "s", "u", b"", 5) is None

    run(body)


def test_daemons_get_the_arguments_that_they_expect(tmp_path: Path) -> None:
    made = programs(tmp_path, qubesdb_daemon="exit 0", qrexec_daemon="exit 0")

    async def body() -> None:
        daemons = GuestDaemons(made)
        await daemons.start_keys(DOMAIN)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "qubesdb.work.sock"))
            listener.listen()
            await daemons.start_keys(DOMAIN)  # it serves already
        await daemons.start_keys(DOMAIN)  # it was killed, and its socket is still there
        assert await agents(daemons) is True
        assert await agents(daemons, qrexec=False) is False
        assert (tmp_path / "log").read_text().splitlines() == [
            "qubesdb_daemon / 12 work",
            "qubesdb_daemon / 12 work",
            "qrexec_daemon 30/ -q -u s -- 13 work-dm root",
            f"qrexec_daemon 30/ -q -u {UUID} -- 12 work user",
            "qrexec_daemon 30/ -q -u s -- 13 work-dm root",
            f"qrexec_daemon /1 -q -u {UUID} -- 12 work user",
        ]

    run(body)


@pytest.mark.parametrize(
    ("script", "reason"), [("exit 3", "AGENT_TIMEOUT"), ("echo no; exit 1", "GUEST_DAEMON_FAILED")]
)
def test_a_daemon_that_fails_is_said(tmp_path: Path, script: str, reason: str) -> None:
    async def body() -> None:
        with pytest.raises(DomainsError) as caught:
            await agents(GuestDaemons(programs(tmp_path, qrexec_daemon=script)))
        assert caught.value.reason == reason

    run(body)


def test_a_service_gets_its_input_and_its_output_is_bounded(tmp_path: Path) -> None:
    made = programs(tmp_path, qrexec_client="cat; head -c 3000000 /dev/zero; exit 4")

    async def body() -> None:
        daemons = GuestDaemons(made)
        assert await daemons.run_service(DOMAIN, "s", "u", b"", 5) is None  # not connected
        (tmp_path / "qrexec.work").touch()
        answer = await daemons.run_service(DOMAIN, "qubes.X", "root", b"hello", 20)
        assert answer is not None
        code, output = answer
        assert code == 4
        assert output.startswith(b"hello\0") and len(output) == 1 << 20
        assert "-d work -w 20 root:QUBESRPC qubes.X dom0" in (tmp_path / "log").read_text()

    run(body)


def test_a_program_that_hangs_is_killed(tmp_path: Path) -> None:
    made = programs(tmp_path, qrexec_client="exec sleep 600")
    (tmp_path / "qrexec.work").touch()

    async def body() -> None:
        with pytest.raises(DomainsError) as caught:
            await GuestDaemons(made).run_service(DOMAIN, "s", "u", b"", 0.3)
        assert caught.value.reason == "GUEST_DAEMON_FAILED"

    run(body)
