"""The simulated hypervisor as a Hypervisor.

Owns two connections to its socket: work with news, and destroy alone. Must not know
the bus or the registry. Invariant: a lost connection ends every waiting call with
UNAVAILABLE, and is opened again as long as the adapter is.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bulkhead.model.records import DeviceFact
from services.domains.core.spec import DiskSpec, DomainSpec, InterfaceSpec
from services.domains.core.tracker import Sighting

from .abandonment import CallsUnderWay
from .hypervisor import AdminUsage, Domain, Event, Failure, HostInfo, HypervisorError, News

LINE = 1 << 20
RECONNECT_S = 0.05
WAITING = 1024

_log = logging.getLogger("domains.sim")


class _Link:
    """One connection: calls by number, news to a callback."""

    def __init__(self, path: Path, listener: Callable[[Event], None] | None) -> None:
        self._path = path
        self._listener = listener
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count(1)
        self._writer: asyncio.StreamWriter | None = None
        self._up = asyncio.Event()
        self._task = asyncio.ensure_future(self._keep())

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _keep(self) -> None:
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(
                    str(self._path), limit=LINE
                )
            except OSError:
                await asyncio.sleep(RECONNECT_S)
                continue
            try:
                if self._listener is not None:
                    self._write(0, "listen", {})
                self._up.set()
                if self._listener is not None:
                    self._listener(Event(News.CONNECTED))
                await self._read(reader)
            except (OSError, EOFError, ValueError) as error:
                _log.warning("the simulated hypervisor is gone: %s", error)
            finally:
                self._drop()
            if self._listener is not None:
                self._listener(Event(News.DISCONNECTED))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            message = json.loads(await reader.readuntil(b"\n"))
            if "event" in message:
                event = message["event"]
                if self._listener is not None:
                    self._listener(
                        Event(
                            News(event["news"]),
                            event["uuid"],
                            event["boot_id"],
                            event.get("reason", ""),
                        )
                    )
                continue
            future = self._waiting.pop(message["id"], None)
            if future is None or future.done():
                continue
            if "error" in message:
                error = message["error"]
                try:
                    failure = Failure(error["kind"])
                except ValueError:
                    failure = Failure.FAILED
                future.set_exception(HypervisorError(failure, error["message"]))
            else:
                future.set_result(message["result"])

    def _drop(self) -> None:
        self._up.clear()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(
                    HypervisorError(
                        Failure.UNAVAILABLE, "the simulated hypervisor closed the connection"
                    )
                )

    def _write(self, number: int, call: str, args: dict[str, Any]) -> None:
        if self._writer is None:
            raise HypervisorError(
                Failure.UNAVAILABLE, "there is no connection to the simulated hypervisor"
            )
        line = json.dumps({"id": number, "call": call, "args": args}).encode() + b"\n"
        if len(line) > LINE:
            raise HypervisorError(Failure.INVALID, f"the call {call} has {len(line)} bytes")
        self._writer.write(line)

    async def call(self, call: str, timeout: float, args: dict[str, Any]) -> Any:
        if len(self._waiting) >= WAITING:
            raise HypervisorError(Failure.BUSY, "too many calls wait for the hypervisor")
        number = next(self._numbers)
        try:
            async with asyncio.timeout(timeout):
                await self._up.wait()
                future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                self._waiting[number] = future
                self._write(number, call, args)
                return await future
        except TimeoutError:
            if not self._up.is_set():
                raise HypervisorError(
                    Failure.UNAVAILABLE, f"nothing listens on {self._path}"
                ) from None
            raise HypervisorError(
                Failure.TIMEOUT, f"{call} was not answered within {timeout:.1f} s"
            ) from None
        finally:
            self._waiting.pop(number, None)


def _domain(shown: dict[str, Any]) -> Domain:
    return Domain(
        sighting=Sighting(
            uuid=shown["uuid"],
            boot_id=shown["boot_id"],
            power=shown["power"],
            xid=shown["xid"],
            stubdom_xid=shown["stubdom_xid"],
            start_time=shown["start_time"],
            agent=shown["agent"],
        ),
        name=shown["name"],
        epoch=shown["epoch"],
        console=shown["console"],
        memory_kib=shown["memory_kib"],
        memory_max_kib=shown["memory_max_kib"],
        cpu_time_ns=shown["cpu_time_ns"],
        vcpus=shown["vcpus"],
        disks=tuple(_disk(row) for row in shown["disks"]),
        pci=tuple(
            f"{row['domain']:04x}:{row['bus']:02x}:{row['slot']:02x}.{row['function']}"
            for row in shown["hostdevs"]
        ),
    )


def _disk(row: dict[str, Any]) -> DiskSpec:
    return DiskSpec(**{field.name: row[field.name] for field in fields(DiskSpec)})


class SimHypervisor:
    """Hypervisor over the simulated one's socket."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._work: _Link | None = None
        self._lane: _Link | None = None
        self._under_way = CallsUnderWay()
        self._listener: Callable[[Event], None] = lambda _: None
        self._agent_changed: dict[str, asyncio.Event] = {}

    async def open(self, listener: Callable[[Event], None]) -> None:
        self._listener = listener
        self._work = _Link(self._path, self._heard)
        self._lane = _Link(self._path, None)

    async def close(self) -> None:
        for link in (self._work, self._lane):
            if link is not None:
                await link.close()

    def _heard(self, event: Event) -> None:
        changed = self._agent_changed.get(event.uuid)
        if changed is not None:
            changed.set()
        self._listener(event)

    async def _call(self, call: str, timeout: float, **args: Any) -> Any:
        """A call that destroy() of the same uuid abandons."""
        assert self._work is not None, "open() comes first"
        uuid = str(args.get("uuid", "")) or str(args.get("spec", {}).get("uuid", ""))
        return await self._under_way.run(uuid, self._work.call(call, timeout, args), call)

    async def host(self, timeout: float) -> HostInfo:
        shown = await self._call("host", timeout)
        return HostInfo(
            kind="sim",
            memory_kib=shown["memory_kib"],
            cpus=shown["cpus"],
            dom0_maxmem_mib=shown["dom0_maxmem_mib"],
            free_kib=shown["free_kib"],
        )

    async def admin_usage(self, timeout: float) -> AdminUsage:
        return AdminUsage(**await self._call("admin_usage", timeout))

    async def existing(self, timeout: float) -> frozenset[str]:
        return frozenset(await self._call("existing", timeout))

    async def inventory(self, timeout: float) -> tuple[Domain, ...]:
        return tuple(_domain(shown) for shown in await self._call("inventory", timeout))

    async def describe(self, uuid: str, timeout: float) -> Domain | None:
        shown = await self._call("describe", timeout, uuid=uuid)
        return None if shown is None else _domain(shown)

    async def devices(self, timeout: float) -> tuple[DeviceFact, ...]:
        return tuple(DeviceFact(**row) for row in await self._call("devices", timeout))

    async def create_paused(self, spec: DomainSpec, timeout: float) -> Domain:
        return _domain(await self._call("create_paused", timeout, spec=asdict(spec)))

    async def resume(self, uuid: str, timeout: float) -> None:
        await self._call("resume", timeout, uuid=uuid)

    async def pause(self, uuid: str, timeout: float) -> None:
        await self._call("pause", timeout, uuid=uuid)

    async def pm_suspend(self, uuid: str, timeout: float) -> None:
        await self._call("pm_suspend", timeout, uuid=uuid)

    async def wake(self, uuid: str, timeout: float) -> None:
        await self._call("wake", timeout, uuid=uuid)

    async def shutdown(self, uuid: str, timeout: float) -> None:
        await self._call("shutdown", timeout, uuid=uuid)

    async def destroy(self, uuid: str, boot_id: str, timeout: float) -> bool:
        assert self._lane is not None, "open() comes first"
        self._under_way.abandon(uuid)
        return bool(await self._lane.call("destroy", timeout, {"uuid": uuid, "boot_id": boot_id}))

    async def undefine(self, uuid: str, timeout: float) -> None:
        await self._call("undefine", timeout, uuid=uuid)

    async def attach_interface(
        self, uuid: str, interface: InterfaceSpec, timeout: float, *, anew: bool = False
    ) -> None:
        await self._call(
            "attach_interface", timeout, uuid=uuid, interface=asdict(interface), anew=anew
        )

    async def detach_interface(self, uuid: str, backend: str, timeout: float) -> None:
        await self._call("detach_interface", timeout, uuid=uuid, backend=backend)

    async def attach_disk(self, uuid: str, disk: DiskSpec, timeout: float) -> None:
        await self._call("attach_disk", timeout, uuid=uuid, disk=asdict(disk))

    async def detach_disk(self, uuid: str, disk: DiskSpec, timeout: float) -> None:
        await self._call("detach_disk", timeout, uuid=uuid, disk=asdict(disk))

    async def resize_disk(self, uuid: str, target: str, size: int, timeout: float) -> None:
        await self._call("resize_disk", timeout, uuid=uuid, target=target, size=size)

    async def set_maxmem(self, uuid: str, maxmem_mib: int, timeout: float) -> None:
        await self._call("set_maxmem", timeout, uuid=uuid, maxmem_mib=maxmem_mib)

    async def run_service(
        self, uuid: str, service: str, user: str, data: bytes, timeout: float
    ) -> tuple[int, bytes] | None:
        answer = await self._call(
            "run_service",
            timeout,
            uuid=uuid,
            service=service,
            user=user,
            data=base64.b64encode(data).decode(),
        )
        if answer is None:
            return None
        return int(answer["exit_code"]), str(answer["output"]).encode()

    async def wait_agent(self, uuid: str, timeout: float) -> bool | None:
        changed = self._agent_changed.setdefault(uuid, asyncio.Event())
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        try:
            while True:
                changed.clear()
                connected = await self._call("agent", max(0.1, deadline - loop.time()), uuid=uuid)
                if connected is not False:
                    return None if connected is None else True
                left = deadline - loop.time()
                if left <= 0:
                    return False
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), left)
        finally:
            self._agent_changed.pop(uuid, None)
