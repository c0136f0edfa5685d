"""The rpc methods of bulkhead.api.Domains, and Control's Sweep, on any hypervisor.

Owns the order of effects around one call: admission, the qube's turn, deadlines, the
answer. Must not know libvirt or the simulation, nor how news of domains and devices
becomes facts. Invariants: every method is idempotent by (uuid, boot id); no call of one
qube waits for another's; Destroy waits for nothing; a destroyed boot never comes back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from bulkhead import failpoints
from bulkhead.api import control_pb2, domains_pb2
from bulkhead.bus.dispatch import Call
from bulkhead.model.epoch import EpochGuard
from bulkhead.model.records import ADMINVM_UUID

from . import failpoint_table as _failpoint_table  # noqa: F401  (declares the failpoints)
from . import messages
from .adapters.guest_daemons import GuestDaemons
from .adapters.guest_keys import Boot, GuestKeys
from .adapters.hypervisor import Failure, HostInfo, Hypervisor, HypervisorError
from .adapters.qmemman import MemoryManager
from .answers import answers
from .background import Background
from .boot_calls import BootCalls
from .boot_cleanup import BootCleanup
from .boot_memory import BootMemory
from .boots import Boots
from .core import spec as specs
from .core.devices import BLOCK_KEYS
from .core.guest_keys import check_subtree
from .core.interfaces import InterfaceBook
from .core.power import PAUSED, PMSUSPENDED, RUNNING
from .core.reasons import DomainsError
from .core.xml import Flavour, flavour_named, render
from .device_watch import DeviceWatch
from .domain_watch import DESCRIBE_S, DomainWatch, report_base
from .guest_agent import PATIENCE_S, GuestAgent
from .hypervisor_news import HypervisorNews
from .live_devices import LiveDevices
from .qube_queue import QubeQueue
from .reporter import Reporter


class DomainsHandlers:
    """One per process; what it is given is outside of the service."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        keys: GuestKeys,
        daemons: GuestDaemons,
        memory_manager: MemoryManager,
        reporter: Reporter,
        guard: EpochGuard,
        *,
        flavour: Callable[[HostInfo | None], Flavour],
        uri: str = "",
        network: bool = True,
        log: logging.Logger | None = None,
        base: Callable[[], int] = report_base,
    ) -> None:
        self._hypervisor = hypervisor
        self._keys = keys
        self._daemons = daemons
        self._guard = guard
        self._flavour = flavour
        self._uri = uri
        self._network = network
        self._log = log = log or logging.getLogger("domains")
        self._background = background = Background(log)
        self._queue = QubeQueue()
        self._domains = DomainWatch(hypervisor, reporter, background, log, base)
        self._calls = BootCalls(guard, self._domains, reporter)
        self._devices = DeviceWatch(
            hypervisor, keys, reporter, self._domains, self._queue, background, log
        )
        interfaces = InterfaceBook(self._domains.current)
        self._live = LiveDevices(hypervisor, interfaces)
        self._memory = BootMemory(hypervisor, memory_manager)
        self._domains.follow(
            self._devices, BootCleanup(self._memory, interfaces, daemons, keys, background)
        )
        self._news = HypervisorNews(
            hypervisor, keys, reporter, self._domains, self._devices, background, log, uri
        )
        self._boots = Boots(hypervisor, self._domains, interfaces, self._memory)
        self._agent = GuestAgent(hypervisor, daemons, self._domains)

    # ---- life of the service

    @property
    def ready(self) -> bool:
        """The epoch is known; a hypervisor that is away is said call by call."""
        return self._guard.current is not None

    @property
    def not_ready_reason(self) -> str:
        """Why ready is False."""
        return "" if self.ready else "waiting for the registry's epoch"

    async def start(self) -> None:
        """Begin to listen to the hypervisor."""
        await self._news.start()

    async def stop(self) -> None:
        """Stop listening; domains go on."""
        await self._news.stop()
        await self._memory.close()

    async def watch_block(self) -> None:
        """Where guests write keys themselves: look again every few seconds. Never ends."""
        await self._devices.run()

    # ---- power

    @answers
    async def create_paused(
        self, request: domains_pb2.CreatePausedRequest, call: Call
    ) -> domains_pb2.CreatePausedReply:
        """Start a boot with its CPUs stopped; a boot that exists is answered as it is."""
        self._calls.admit(call)
        spec = specs.check(messages.spec_from(request.spec))
        if spec.interfaces and not self._network:
            raise DomainsError(
                "NETWORK_UNAVAILABLE",
                f"{spec.name} has a netvm, but {self._uri} without root has no enforced network; "
                "clear its netvm, or run as root.",
                qube=spec.name,
            )
        self._boots.refuse_buried(spec)
        async with self._queue.turn(spec.uuid):
            domain = await self._domains.refresh(spec.uuid, min(DESCRIBE_S, self._calls.left(call)))
            if domain is None and not call.validate_only:
                domain = await self._boots.make(spec, self._calls.clock(call))
            if domain is None:
                return domains_pb2.CreatePausedReply()
            if domain.boot_id != spec.boot_id:
                raise DomainsError(
                    "DOMAIN_EXISTS",
                    f"The qube {spec.name} has a domain of boot {domain.boot_id or 'unknown'}; "
                    "it must end before another boot.",
                    qube=spec.name,
                    boot_id=domain.boot_id,
                )
            return domains_pb2.CreatePausedReply(state=self._calls.state(domain))

    @answers
    async def resume(
        self, request: domains_pb2.ResumeDomainRequest, call: Call
    ) -> domains_pb2.ResumeDomainReply:
        """Let the guest run; one that runs is left alone."""
        self._calls.admit(call)
        async with self._queue.turn(request.boot.uuid):
            domain = await self._calls.bound(request.boot, call)
            if domain.sighting.power != RUNNING and not call.validate_only:
                failpoints.hit("domains.resume.before")
                await self._hypervisor.resume(domain.uuid, self._calls.left(call))
                failpoints.hit("domains.resume.after")
            return domains_pb2.ResumeDomainReply(
                state=await self._calls.after(domain.uuid, domain.boot_id, call)
            )

    @answers
    async def pause(
        self, request: domains_pb2.PauseDomainRequest, call: Call
    ) -> domains_pb2.PauseDomainReply:
        """Stop the guest's CPUs; one that is paused is left alone."""
        self._calls.admit(call)
        async with self._queue.turn(request.boot.uuid):
            domain = await self._calls.bound(request.boot, call)
            if domain.sighting.power != PAUSED and not call.validate_only:
                failpoints.hit("domains.pause.before")
                await self._hypervisor.pause(domain.uuid, self._calls.left(call))
                failpoints.hit("domains.pause.after")
            return domains_pb2.PauseDomainReply(
                state=await self._calls.after(domain.uuid, domain.boot_id, call)
            )

    @answers
    async def suspend(
        self, request: domains_pb2.SuspendDomainRequest, call: Call
    ) -> domains_pb2.SuspendDomainReply:
        """Suspend to memory by the guest; where that is not possible, pause."""
        self._calls.admit(call)
        async with self._queue.turn(request.boot.uuid):
            domain = await self._calls.bound(request.boot, call)
            paused_instead = domain.sighting.power == PAUSED
            if domain.sighting.power not in (PAUSED, PMSUSPENDED) and not call.validate_only:
                failpoints.hit("domains.pause.before")
                try:
                    await self._hypervisor.pm_suspend(domain.uuid, self._calls.left(call))
                except HypervisorError as error:
                    if error.failure is not Failure.UNSUPPORTED:
                        raise
                    await self._hypervisor.pause(domain.uuid, self._calls.left(call))
                    paused_instead = True
                failpoints.hit("domains.pause.after")
            return domains_pb2.SuspendDomainReply(
                state=await self._calls.after(domain.uuid, domain.boot_id, call),
                paused_instead=paused_instead,
            )

    @answers
    async def wake(
        self, request: domains_pb2.WakeDomainRequest, call: Call
    ) -> domains_pb2.WakeDomainReply:
        """Wake a guest that suspended itself; one that runs is left alone."""
        self._calls.admit(call)
        async with self._queue.turn(request.boot.uuid):
            domain = await self._calls.bound(request.boot, call)
            if domain.sighting.power != RUNNING and not call.validate_only:
                failpoints.hit("domains.resume.before")
                await self._hypervisor.wake(domain.uuid, self._calls.left(call))
                failpoints.hit("domains.resume.after")
            return domains_pb2.WakeDomainReply(
                state=await self._calls.after(domain.uuid, domain.boot_id, call)
            )

    @answers
    async def shutdown(
        self, request: domains_pb2.ShutdownDomainRequest, call: Call
    ) -> domains_pb2.ShutdownDomainReply:
        """Ask the guest to power off. A boot that is gone has done so already."""
        self._calls.admit(call)
        async with self._queue.turn(request.boot.uuid):
            domain = await self._calls.bound_or_gone(request.boot, call)
            if domain is None:
                return domains_pb2.ShutdownDomainReply()
            if domain.sighting.power == PAUSED and not request.force:
                raise DomainsError(
                    "DOMAIN_WRONG_STATE",
                    f"The domain of {domain.name} is paused and cannot shut down; unpause it, "
                    "or use force.",
                    qube=domain.name,
                )
            if call.validate_only:
                return domains_pb2.ShutdownDomainReply()
            await self._boots.shutdown(domain, self._calls.clock(call))
            return domains_pb2.ShutdownDomainReply()

    @answers
    async def destroy(
        self, request: domains_pb2.DestroyDomainRequest, call: Call
    ) -> domains_pb2.DestroyDomainReply:
        """End the boot now, on a lane of its own; a boot that is gone is success."""
        self._calls.admit(call)
        boot = request.boot
        specs.check_uuid(boot.uuid)
        boot_id = boot.boot_id
        if boot_id:
            specs.check_boot_id(boot_id)
        else:
            known = self._domains.current(boot.uuid)
            boot_id = "" if known is None else known.boot_id
        if call.validate_only:
            return domains_pb2.DestroyDomainReply(was_running=bool(boot_id))
        ended = await self._boots.destroy(boot.uuid, boot_id, self._calls.clock(call))
        return domains_pb2.DestroyDomainReply(was_running=ended)

    @answers
    async def undefine(
        self, request: domains_pb2.UndefineDomainRequest, call: Call
    ) -> domains_pb2.UndefineDomainReply:
        """The qube is removed: nothing of it stays, here or in the registry's facts."""
        self._calls.admit(call)
        specs.check_uuid(request.uuid)
        async with self._queue.turn(request.uuid):
            if not call.validate_only:
                await self._hypervisor.undefine(request.uuid, self._calls.left(call))
                self._domains.removed(request.uuid)
        return domains_pb2.UndefineDomainReply()

    # ---- reading

    @answers
    async def describe(
        self, request: domains_pb2.DescribeDomainRequest, call: Call
    ) -> domains_pb2.DescribeDomainReply:
        """The boot as it is now; found False when it is gone."""
        domain = await self._calls.bound_or_gone(request.boot, call)
        if domain is None:
            return domains_pb2.DescribeDomainReply(found=False)
        return domains_pb2.DescribeDomainReply(
            found=True,
            state=self._calls.state(domain),
            memory_kib=domain.memory_kib,
            memory_max_kib=domain.memory_max_kib,
            cpu_time_ns=domain.cpu_time_ns,
        )

    @answers
    async def inventory(
        self,
        request: domains_pb2.InventoryDomainsRequest,  # noqa: ARG002
        call: Call,
    ) -> domains_pb2.InventoryDomainsReply:
        """Every domain that carries a boot id of ours."""
        domains = await self._hypervisor.inventory(self._calls.left(call))
        return domains_pb2.InventoryDomainsReply(
            domains=[self._calls.state(domain) for domain in domains if domain.boot_id]
        )

    @answers
    async def stats(self, request: domains_pb2.StatsRequest, call: Call) -> domains_pb2.StatsReply:
        """Memory and CPU of the named qubes, or of all; those without a domain are left out.

        dom0 is named by its uuid, and one of all.
        """
        wanted = {specs.check_uuid(uuid) for uuid in request.uuids}
        reply = domains_pb2.StatsReply()
        if not wanted or ADMINVM_UUID in wanted:
            try:
                usage = await self._hypervisor.admin_usage(self._calls.left(call))
            except HypervisorError as error:
                self._log.warning("dom0 cannot be measured: %s", error)
            else:
                reply.domains.add(
                    uuid=ADMINVM_UUID,
                    memory_kib=usage.memory_kib,
                    memory_assigned_kib=usage.memory_max_kib,
                    cpu_time_ns=usage.cpu_time_ns,
                    online_vcpus=usage.vcpus,
                )
        guests = wanted != {ADMINVM_UUID}
        for domain in await self._hypervisor.inventory(self._calls.left(call)) if guests else ():
            if not domain.boot_id or (wanted and domain.uuid not in wanted):
                continue
            row = reply.domains.add(
                uuid=domain.uuid,
                memory_kib=domain.memory_kib,
                memory_assigned_kib=domain.memory_max_kib,
                cpu_time_ns=domain.cpu_time_ns,
                online_vcpus=domain.vcpus,
            )
            if domain.stubdom_cpu_time_ns is not None:
                row.stubdom_cpu_time_ns = domain.stubdom_cpu_time_ns
            if domain.stubdom_vcpus is not None:
                row.stubdom_vcpus = domain.stubdom_vcpus
        return reply

    @answers
    async def render_xml(
        self, request: domains_pb2.RenderXmlRequest, call: Call
    ) -> domains_pb2.RenderXmlReply:
        """The XML that CreatePaused would use; hypervisor "" = this host's."""
        call.check()
        flavour = (
            flavour_named(request.hypervisor)
            if request.hypervisor
            else self._flavour(self._news.host)
        )
        return domains_pb2.RenderXmlReply(
            xml=render(specs.check(messages.spec_from(request.spec)), flavour)
        )

    # ---- devices and memory

    @answers
    async def attach_interface(
        self, request: domains_pb2.AttachInterfaceRequest, call: Call
    ) -> domains_pb2.AttachInterfaceReply:
        """Plug an interface into the running guest."""
        self._calls.admit(call)
        interface = specs.check_interface(messages.interface_from(request.interface))
        async with self._queue.turn(request.boot.uuid):
            domain = await self._calls.bound(request.boot, call)
            if not call.validate_only:
                await self._live.attach_interface(domain, interface, self._calls.clock(call))
        return domains_pb2.AttachInterfaceReply()

    @answers
    async def detach_interface(
        self, request: domains_pb2.DetachInterfaceRequest, call: Call
    ) -> domains_pb2.DetachInterfaceReply:
        """Unplug interfaces, with a backend only those at it; a boot that is gone has none."""
        self._calls.admit(call)
        backend = specs.check_backend(request.interface.backend)
        async with self._queue.turn(request.boot.uuid):
            domain = await self._calls.bound_or_gone(request.boot, call)
            if domain is not None and not call.validate_only:
                await self._live.detach_interface(domain, backend, self._calls.clock(call))
        return domains_pb2.DetachInterfaceReply()

    @answers
    async def attach_disk(
        self, request: domains_pb2.AttachDiskRequest, call: Call
    ) -> domains_pb2.AttachDiskReply:
        """Plug a disk into the running guest."""
        self._calls.admit(call)
        disk = specs.check_disk(messages.disk_from(request.disk))
        async with self._queue.turn(request.boot.uuid):
            domain = await self._calls.bound(request.boot, call)
            if not call.validate_only:
                await self._live.attach_disk(domain, disk, self._calls.clock(call))
                await self._calls.after(domain.uuid, domain.boot_id, call)
        return domains_pb2.AttachDiskReply()

    @answers
    async def detach_disk(
        self, request: domains_pb2.DetachDiskRequest, call: Call
    ) -> domains_pb2.DetachDiskReply:
        """Unplug a disk; a boot that is gone has none."""
        self._calls.admit(call)
        disk = messages.disk_from(request.disk)
        specs.check_target(disk.target)
        async with self._queue.turn(request.boot.uuid):
            domain = await self._calls.bound_or_gone(request.boot, call)
            if domain is not None and not call.validate_only:
                await self._live.detach_disk(domain, disk, self._calls.clock(call))
                await self._calls.after(domain.uuid, domain.boot_id, call)
        return domains_pb2.DetachDiskReply()

    @answers
    async def resize_disk(
        self, request: domains_pb2.ResizeDiskRequest, call: Call
    ) -> domains_pb2.ResizeDiskReply:
        """Tell the guest that a disk has size bytes now."""
        self._calls.admit(call)
        target = specs.check_target(request.target)
        if not request.size:
            raise DomainsError("INVALID_DOMAIN_SPEC", f"The size of {target} may not be 0.")
        async with self._queue.turn(request.boot.uuid):
            domain = await self._calls.bound(request.boot, call)
            if not call.validate_only:
                await self._live.resize_disk(domain, target, request.size, self._calls.clock(call))
        return domains_pb2.ResizeDiskReply()

    @answers
    async def set_maxmem(
        self, request: domains_pb2.SetMaxmemRequest, call: Call
    ) -> domains_pb2.SetMaxmemReply:
        """How much memory the running guest may be given."""
        self._calls.admit(call)
        if request.maxmem_mib > specs.MIB_LIMIT:
            raise DomainsError(
                "INVALID_DOMAIN_SPEC",
                f"{request.maxmem_mib} MiB is more than any guest can have ({specs.MIB_LIMIT}).",
            )
        async with self._queue.turn(request.boot.uuid):
            domain = await self._calls.bound(request.boot, call)
            if not call.validate_only:
                await self._hypervisor.set_maxmem(
                    domain.uuid, request.maxmem_mib, self._calls.left(call)
                )
        return domains_pb2.SetMaxmemReply()

    @answers
    async def reserve_memory(
        self, request: domains_pb2.ReserveMemoryRequest, call: Call
    ) -> domains_pb2.ReserveMemoryReply:
        """Set bytes aside for a boot, or release them; both may be repeated."""
        self._calls.admit(call)
        boot_id = specs.check_boot_id(request.boot_id)
        if request.release:
            await self._memory.release(boot_id)
        elif not call.validate_only:
            await self._memory.reserve(boot_id, request.bytes, self._calls.clock(call))
        return domains_pb2.ReserveMemoryReply()

    # ---- the guest itself

    @answers
    async def write_guest_keys(
        self, request: domains_pb2.WriteGuestKeysRequest, call: Call
    ) -> domains_pb2.WriteGuestKeysReply:
        """Change the guest's keys: removals first, then values."""
        self._calls.admit(call)
        async with self._queue.turn(request.boot.uuid):
            domain = await self._calls.bound(request.boot, call)
            if not call.validate_only:
                await self._daemons.start_keys(domain)
                await self._keys.write(
                    Boot(domain.uuid, domain.boot_id, domain.name),
                    [(key.path, key.value) for key in request.keys],
                    list(request.removed),
                    request.replace_all,
                    changed_only=request.changed_only,
                    removed_of=messages.keys_of_from(request),
                )
                if any(key.path.startswith(BLOCK_KEYS) for key in request.keys) or any(
                    BLOCK_KEYS.startswith(path) or path.startswith(BLOCK_KEYS)
                    for path in request.removed
                ):
                    await self._devices.look_at_guest(
                        Boot(domain.uuid, domain.boot_id, domain.name)
                    )
        return domains_pb2.WriteGuestKeysReply()

    @answers
    async def read_guest_keys(
        self, request: domains_pb2.ReadGuestKeysRequest, call: Call
    ) -> domains_pb2.ReadGuestKeysReply:
        """Keys at prefix, or below it when it ends with "/"; "" = all. Written by the guest."""
        prefix = check_subtree(request.prefix) if request.prefix else ""
        domain = await self._calls.bound(request.boot, call)
        keys = await self._keys.read(Boot(domain.uuid, domain.boot_id, domain.name), prefix)
        return domains_pb2.ReadGuestKeysReply(
            untrusted_keys=[
                domains_pb2.GuestKey(path=path, value=value) for path, value in keys.items()
            ]
        )

    @answers
    async def start_guest_daemons(
        self, request: domains_pb2.StartGuestDaemonsRequest, call: Call
    ) -> domains_pb2.StartGuestDaemonsReply:
        """Start what serves the running guest, and wait for its agent where it has one."""
        self._calls.admit(call)
        domain = await self._calls.bound(request.boot, call)
        if call.validate_only:
            return domains_pb2.StartGuestDaemonsReply()
        agent = await self._agent.start(
            domain,
            self._calls.clock(call),
            qrexec=request.qrexec,
            timeout_s=request.qrexec_timeout_s,
            default_user=request.default_user,
            debug=request.debug,
            stubdom_qrexec=request.stubdom_qrexec,
        )
        return domains_pb2.StartGuestDaemonsReply(agent=agent)

    @answers
    async def run_service(
        self, request: domains_pb2.RunServiceRequest, call: Call
    ) -> domains_pb2.RunServiceReply:
        """Run a service in the guest. AGENT_NOT_CONNECTED where there is no agent."""
        self._calls.admit(call)
        domain = await self._calls.bound(request.boot, call)
        if call.validate_only:
            return domains_pb2.RunServiceReply()
        timeout = min(request.timeout_s or PATIENCE_S, self._calls.left(call))
        exit_code, output = await self._agent.run(
            domain, request.service, request.user, request.input, timeout
        )
        return domains_pb2.RunServiceReply(exit_code=exit_code, output=output)

    # ---- control

    @answers
    async def sweep(
        self,
        request: control_pb2.SweepRequest,  # noqa: ARG002
        call: Call,
    ) -> control_pb2.SweepReply:
        """Take inventory again and say what is strange; nothing is ended."""
        domains = await self._hypervisor.inventory(self._calls.left(call))
        findings = [
            f"domain {domain.name} ({domain.uuid}) carries no boot id and is left alone"
            for domain in domains
            if not domain.boot_id
        ]
        for domain in domains:
            self._domains.look_soon(domain.uuid)
        for fact in self._domains.facts():
            if fact.uuid not in {domain.uuid for domain in domains}:
                findings.append(f"boot {fact.boot_id} of {fact.uuid} ended unnoticed")
                self._domains.look_soon(fact.uuid)
        return control_pb2.SweepReply(findings=findings)
