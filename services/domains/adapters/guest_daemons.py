"""The per-guest daemons of a Qubes host, where they are installed.

Owns starting qubesdb-daemon and qrexec-daemon and calling qrexec-client. Must not know
the bus. Invariant: programs get argument lists, never a shell; where a program is not
installed, that is said with None and nothing is started.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from services.domains.core.reasons import DomainsError

from .hypervisor import Domain

OUTPUT_BYTES = 1 << 20
# Exit status of qrexec-daemon when the agent did not connect in time.
NO_AGENT = 3
CONNECT_S = 2.0


async def _serves(path: Path) -> bool:
    """Somebody listens there; a daemon that was killed leaves its socket behind."""
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_unix_connection(path)
    except TimeoutError:
        return True  # it is there, and busy: it is asked in its own time
    except OSError:
        return False
    writer.close()
    return True


@dataclass(frozen=True, slots=True)
class Programs:
    """Where the programs and their sockets are."""

    qubesdb_daemon: Path = Path("/usr/bin/qubesdb-daemon")
    qrexec_daemon: Path = Path("/usr/bin/qrexec-daemon")
    qrexec_client: Path = Path("/usr/bin/qrexec-client")
    sockets: Path = Path("/var/run/qubes")


class GuestDaemons:
    """Starts what serves one guest. All raise DomainsError GUEST_DAEMON_FAILED."""

    def __init__(self, programs: Programs | None = None) -> None:
        self._programs = programs or Programs()

    async def start_keys(self, domain: Domain) -> None:
        """QubesDB of the guest; a daemon that serves it already is left alone."""
        programs = self._programs
        if not programs.qubesdb_daemon.exists():
            return
        if await _serves(programs.sockets / f"qubesdb.{domain.name}.sock"):
            return
        code, output = await self._run(
            [str(programs.qubesdb_daemon), str(domain.sighting.xid), domain.name], {}, 60.0
        )
        if code:
            raise DomainsError(
                "GUEST_DAEMON_FAILED",
                f"Cannot execute qubesdb-daemon for {domain.name}: it ended with {code}: "
                f"{output.decode('utf-8', 'replace')[-500:]}",
                qube=domain.name,
                exit_code=str(code),
            )

    async def start_agents(
        self,
        domain: Domain,
        *,
        qrexec: bool,
        timeout_s: int,
        default_user: str,
        debug: bool,
        stubdom_qrexec: bool,
    ) -> bool | None:
        """qrexec of the stubdomain and of the guest; True when the guest's agent is there.

        None where qrexec-daemon is not installed. False when the guest need not have an
        agent. DomainsError AGENT_TIMEOUT when the agent did not connect in timeout_s.
        """
        programs = self._programs
        if not programs.qrexec_daemon.exists():
            return None
        quiet = [] if debug else ["-q"]
        sighting = domain.sighting
        if stubdom_qrexec and sighting.stubdom_xid >= 0:
            await self._qrexec(
                [*quiet, "-u", sighting.stubdom_uuid, "--", str(sighting.stubdom_xid),
                 f"{domain.name}-dm", "root"],
                domain, True, timeout_s,
            )  # fmt: skip
        await self._qrexec(
            [*quiet, "-u", domain.uuid, "--", str(sighting.xid), domain.name, default_user],
            domain,
            qrexec,
            timeout_s,
        )
        return qrexec

    async def _qrexec(
        self, arguments: list[str], domain: Domain, wait: bool, timeout_s: int
    ) -> None:
        environment = (
            {"QREXEC_STARTUP_TIMEOUT": str(timeout_s)} if wait else {"QREXEC_STARTUP_NOWAIT": "1"}
        )
        code, output = await self._run(
            [str(self._programs.qrexec_daemon), *arguments], environment, timeout_s + 20.0
        )
        if code == NO_AGENT:
            raise DomainsError(
                "AGENT_TIMEOUT",
                f"Cannot connect to qrexec agent for {timeout_s} seconds, see "
                f"/var/log/xen/console/guest-{domain.name}.log for details",
                qube=domain.name,
                seconds=str(timeout_s),
            )
        if code:
            raise DomainsError(
                "GUEST_DAEMON_FAILED",
                f"qrexec-daemon startup failed: {output.decode('utf-8', 'replace')[-500:]}",
                qube=domain.name,
                exit_code=str(code),
            )

    async def run_service(
        self, domain: Domain, service: str, user: str, data: bytes, timeout: float
    ) -> tuple[int, bytes] | None:
        """(exit code, output) of a service in the guest; None without qrexec-client."""
        programs = self._programs
        connected = (programs.sockets / f"qrexec.{domain.name}").exists()
        if not programs.qrexec_client.exists() or not connected:
            return None
        return await self._run(
            [
                str(programs.qrexec_client),
                "-d",
                domain.name,
                "-w",
                str(max(1, int(timeout))),
                f"{user}:QUBESRPC {service} dom0",
            ],
            {},
            timeout,
            data,
        )

    async def stop(self, uuid: str, boot_id: str) -> None:
        """The daemons end by themselves when their domain does."""

    @staticmethod
    async def _run(
        command: list[str], environment: dict[str, str], timeout: float, data: bytes = b""
    ) -> tuple[int, bytes]:
        """(exit status, at most 1 MiB of output); killed at the timeout."""
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, **environment},
            )
        except OSError as error:
            raise DomainsError(
                "GUEST_DAEMON_FAILED", f"Cannot execute {command[0]}: {error}"
            ) from error
        assert process.stdin is not None and process.stdout is not None
        try:
            async with asyncio.timeout(timeout):
                process.stdin.write(data)
                process.stdin.close()
                untrusted_output = await process.stdout.read(OUTPUT_BYTES)
                while more := await process.stdout.read(OUTPUT_BYTES):
                    # Beyond the bound nothing is kept, but the writer must not block.
                    untrusted_output = (untrusted_output + more)[:OUTPUT_BYTES]
                return await process.wait(), untrusted_output
        except TimeoutError as error:
            raise DomainsError(
                "GUEST_DAEMON_FAILED", f"{command[0]} did not end within {timeout:.0f} s"
            ) from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
