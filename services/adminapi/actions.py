"""Calls that need more than one answer from elsewhere, or more than one step.

Owns how those calls use the other services. Must not know sockets or frames. Invariant:
an action returns the reply's text or raises; one method per handler name of the call
table that is neither a read nor a plain write.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time

from bulkhead import codec
from bulkhead.api import (
    dispvm_pb2,
    domains_pb2,
    firewall_pb2,
    lifecycle_pb2,
    storage_pb2,
)
from bulkhead.bus.errors import BusError
from bulkhead.model import specs
from bulkhead.model.evaluate import evaluate, power_state
from bulkhead.model.features import template_of
from bulkhead.model.properties import has_property
from bulkhead.model.records import (
    ADMINVM_NAME,
    Operation,
    OperationState,
    Phase,
    Pool,
    PoolFact,
    Qube,
    Volume,
    WireEvent,
)
from bulkhead.model.refusal import Refusal
from services.adminapi.adapters.paused_list import PausedList
from services.adminapi.backend import Backend
from services.adminapi.callers import Callers
from services.adminapi.core import requests, volumes
from services.adminapi.core.checks import Checked
from services.adminapi.core.exceptions import WireRefusal
from services.adminapi.core.payloads import ascii_text, parse_import_size, parse_pool
from services.adminapi.core.permission import Policy
from services.adminapi.core.reads import (
    ReadContext,
    find_operation,
    find_pool,
    find_volume,
    listed,
    qube_record,
)
from services.adminapi.host_suspend import HostSuspend

log = logging.getLogger("bulkhead.adminapi")

# A disposable may have to be started before it is handed out.
DISPOSABLE_S = 300.0
FIREWALL_S = 30.0
IMPORT_END_S = 14.0
# Qubes that are described before other calls get their turn.
_AT_ONCE = 8
_RUNNING = ("Running", "Transient", "Paused", "Suspended")


class Actions:
    """One coroutine per handler name."""

    def __init__(self, backend: Backend, policy: Policy, paused: PausedList) -> None:
        self._backend = backend
        self._policy = policy
        self._host_suspend = HostSuspend(backend, paused)
        self._tokens = volumes.CopyTokens()
        self.callers: Callers | None = None

    # ---- state

    async def current_state(self, request: Checked) -> str:
        """Memory, processor time and power state; zeros while halted."""
        qube = request.dest
        view = self._backend.view
        state = power_state(view, qube)
        memory = maximum = cpu = 0
        if qube.klass == "AdminVM":
            maximum = memory = view.host.dom0_maxmem_mib * 1024 if view.host is not None else 0
            usage = await self._backend.read(
                "Domains.Stats",
                domains_pb2.StatsRequest(uuids=[qube.uuid]),
                domains_pb2.StatsReply,
            )
            for row in usage.domains if usage is not None else ():
                memory, cpu = row.memory_kib, row.cpu_time_ns
        elif qube.klass != "RemoteVM" and qube.run.phase is not Phase.HALTED:
            found = await self._backend.read(
                "Domains.Describe",
                domains_pb2.DescribeDomainRequest(boot=_boot(qube)),
                domains_pb2.DescribeDomainReply,
            )
            if found is not None and found.found:
                memory, maximum = found.memory_kib, found.memory_max_kib
                cpu = found.cpu_time_ns
        return f"mem={memory} mem_static_max={maximum} cputime={cpu} power_state={state}"

    async def console(self, request: Checked) -> str:
        """Path of the console's tty; empty for dom0."""
        qube = request.dest
        if qube.klass == "AdminVM":
            return ""
        if power_state(self._backend.view, qube) not in _RUNNING:
            raise Refusal("QUBE_NOT_RUNNING", f"{qube.name} is not running", qube=qube.name)
        if qube.klass == "RemoteVM":
            raise Refusal("QUBE_ERROR", f"{qube.name} has no console here", qube=qube.name)
        found = await self._backend.call(
            "Domains.Describe",
            domains_pb2.DescribeDomainRequest(boot=_boot(qube)),
            domains_pb2.DescribeDomainReply,
        )
        if not found.found:
            raise Refusal("QUBE_NOT_RUNNING", f"{qube.name} is not running", qube=qube.name)
        return found.state.console

    async def vm_get_all(self, request: Checked) -> str:
        """One JSON object per listed qube and line: class, state, properties, features, tags.

        Lets other calls pass in between.
        """
        view = self._backend.view
        parts = []
        shown = list(listed(ReadContext(view, self._policy), request))
        if request.restricted:
            # Listing a qube gives its line only; properties and tags are a grant of their own.
            name, source = request.call.name, request.source.name
            shown = [q for q in shown if self._policy.allows(name, "+", source, q.name)]
        for number, qube in enumerate(shown):
            parts.append(qube_record(view, qube))
            if number % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)
        return "".join(parts)

    # ---- disposables

    async def create_disposable(self, request: Checked) -> str:
        """A new disposable's name, or `uuid:UUID` for the payload "uuid"."""
        if request.arg not in ("", "preload"):
            raise WireRefusal("CALL_DENIED", "CreateDisposable takes no argument but preload")
        if request.untrusted_payload not in (b"", b"uuid"):
            raise Refusal("PROTOCOL", "the payload of CreateDisposable is empty or uuid")
        template = request.dest.name
        if request.dest.klass == "AdminVM":
            source = request.source
            value = (
                evaluate(self._backend.view, source, "default_dispvm")
                if has_property(source.klass, "default_dispvm")
                else None
            )
            template = str(value or "")
        if not template:
            raise Refusal(
                "NOT_DISPOSABLE_TEMPLATE",
                f"{request.source.name} has no default_dispvm: set it or name a template",
            )
        if request.arg == "preload":
            await self._backend.call(
                "Dispvm.RequestPreload",
                dispvm_pb2.RequestPreloadRequest(
                    template=template, reason="autostart was requested"
                ),
                dispvm_pb2.RequestPreloadReply,
                source=request.source.name,
                timeout=DISPOSABLE_S,
            )
            return ""
        reply = await self._backend.call(
            "Dispvm.CreateDisposable",
            dispvm_pb2.CreateDisposableRequest(template=template),
            dispvm_pb2.CreateDisposableReply,
            source=request.source.name,
            timeout=DISPOSABLE_S,
        )
        await self._backend.follow(reply.revision, 0)
        return f"uuid:{reply.uuid}" if request.untrusted_payload else reply.name

    # ---- volumes

    def _volume_spec(self, volume: Volume) -> storage_pb2.VolumeSpec:
        pool = self._backend.view.pools.get(volume.pool)
        return storage_pb2.VolumeSpec(
            declared=codec.volume_to_proto(volume),
            pool=codec.pool_to_proto(pool) if pool is not None else None,
        )

    async def _describe(self, wanted: list[Volume]) -> list[storage_pb2.VolumeState]:
        view = self._backend.view
        sources = [s for v in wanted if (s := volumes.source_of(view, v)) is not None]
        reply = await self._backend.read(
            "Storage.Describe",
            storage_pb2.DescribeRequest(
                volumes=[self._volume_spec(v) for v in wanted],
                sources=[self._volume_spec(s) for s in sources],
            ),
            storage_pb2.DescribeReply,
        )
        return list(reply.volumes) if reply is not None else []

    async def volume_info(self, request: Checked) -> str:
        """Declared and live facts of a volume."""
        view = self._backend.view
        volume = volumes.effective(view, request.dest, find_volume(request.dest, request.arg))
        states = await self._describe([volume])
        live = None
        if states:
            state = states[0]
            outdated = state.is_outdated if state.HasField("is_outdated") else None
            live = volumes.Live(state.size, state.usage, state.path, outdated)
        return volumes.info(view.pools.get(volume.pool), volume, live)

    async def volume_list_snapshots(self, request: Checked) -> str:
        """Revision ids, oldest first."""
        volume = find_volume(request.dest, request.arg)
        view = self._backend.view
        states = await self._describe([volumes.effective(view, request.dest, volume)])
        return "".join(f"{r.id}\n" for r in states[0].revisions) if states else ""

    async def volume_clone_from(self, request: Checked) -> str:
        """A token that stands for the volume."""
        volume = find_volume(request.dest, request.arg)
        token = "".join(
            secrets.choice(volumes.TOKEN_CHARACTERS) for _ in range(volumes.TOKEN_LENGTH)
        )
        source = volumes.CopySource(request.dest.uuid, volume.name, volume.pool, volume.vid)
        self._tokens.add(token, source)
        return token

    async def volume_clone_to(self, request: Checked) -> str:
        """Replace the volume's data by those of the volume that the token stands for."""
        source = self._tokens.take(request.untrusted_payload.decode("ascii", "replace"))
        if source is None:
            raise WireRefusal("COPY_TOKEN_NOT_FOUND", "no such token, or it was used already")
        target = find_volume(request.dest, request.arg)
        owner = self._backend.view.by_uuid(source.qube_uuid)
        volume = owner.volume(source.volume) if owner is not None else None
        if (
            owner is None
            or volume is None
            or (volume.pool, volume.vid)
            != (
                source.pool,
                source.vid,
            )
        ):
            raise Refusal("VOLUME_NOT_FOUND", "the volume to copy is not there any more")
        spec = specs.CloneVolumeSpec(owner.name, volume.name, request.dest.name, target.name)
        await self._backend.operate(spec, request.source.name)
        return ""

    async def import_begin(self, request: Checked) -> str:
        """`SIZE PATH` of the place that takes the data."""
        volume = request.dest.volume(request.arg)
        if volume is None:
            raise Refusal("PROTOCOL", f"{request.dest.name} has no volume {request.arg}")
        waiting = self._find_import(request)
        if waiting is not None:
            # It would wait behind the other one, for as long as that one's writer likes.
            raise Refusal(
                "VOLUME_REFUSED",
                f"an import into {request.arg} of {request.dest.name} ({waiting.id}) waits for its"
                " data; let it end or cancel it, then try again",
                qube=request.dest.name,
            )
        resize = bool(request.untrusted_payload)
        size = parse_import_size(request.untrusted_payload) if resize else 0
        operation = await self._backend.operate(
            specs.ImportSpec(request.dest.name, volume.name, size, resize),
            request.source.name,
            lambda o: o.state.terminal or o.state is OperationState.WAITING_DATA,
        )
        path = operation.data.get("path", "")
        if not path or " " in path:
            raise WireRefusal("UNEXPECTED", f"operation {operation.id} gave no usable path")
        return f"{operation.data.get('size', size)} {path}"

    def _find_import(self, request: Checked) -> Operation | None:
        for operation in self._backend.view.operations_on(request.dest.uuid):
            spec = operation.spec
            if (
                isinstance(spec, specs.ImportSpec)
                and spec.volume == request.arg
                and operation.state is OperationState.WAITING_DATA
            ):
                return operation
        return None

    def waiting_import(self, request: Checked) -> Operation:
        """The import into a volume that waits for data. Refusals PROTOCOL, IMPORT_NOT_RUNNING."""
        if request.dest.volume(request.arg) is None:
            raise Refusal("PROTOCOL", f"{request.dest.name} has no volume {request.arg}")
        operation = self._find_import(request)
        if operation is None:
            raise WireRefusal(
                "IMPORT_NOT_RUNNING",
                f"no import of {request.arg} of {request.dest.name} waits for data",
                qube=request.dest.name,
            )
        return operation

    async def give_up_import(self, request: Checked, operation_id: str) -> None:
        """End an import as failed whose writer is gone, unless it has ended."""
        operation = self._find_import(request)
        if operation is None or operation.id != operation_id:
            return
        try:
            await self._finish_import(request, operation_id, "", "who brought the data is gone")
        except (Refusal, WireRefusal, BusError) as error:
            log.warning("import %s still waits for its data: %s", operation_id, error)

    async def _finish_import(
        self, request: Checked, operation_id: str, word: str, untrusted_reason: str
    ) -> None:
        await self._backend.call(
            "Lifecycle.FinishImport",
            lifecycle_pb2.FinishImportRequest(
                operation_id=operation_id,
                success=word == "ok",
                untrusted_reason=untrusted_reason.strip(),
            ),
            lifecycle_pb2.FinishImportReply,
            source=request.source.name,
            timeout=IMPORT_END_S,
        )

    async def import_end(self, request: Checked) -> str:
        """`ok` keeps the data, `fail\\nREASON` discards them."""
        word, _, untrusted_reason = ascii_text(request.untrusted_payload).partition("\n")
        if word not in ("ok", "fail"):
            raise Refusal("PROTOCOL", "the payload of ImportEnd is ok or fail and a reason")
        operation = self.waiting_import(request)
        try:
            await self._finish_import(request, operation.id, word, untrusted_reason)
        except WireRefusal as refusal:
            if refusal.reason != "OUTCOME_UNKNOWN":
                raise  # the end of a long commit is seen in the stream below
        await self._backend.succeeded(operation.id)
        return ""

    # ---- pools

    async def _pool_described(self, pool: Pool) -> tuple[dict[str, str], PoolFact | None]:
        view = self._backend.view
        reply = await self._backend.read(
            "Storage.PoolDescribe",
            storage_pb2.PoolDescribeRequest(
                pool=codec.pool_to_proto(pool),
                others=[codec.pool_to_proto(p) for p in view.pools.values() if p != pool],
            ),
            storage_pb2.PoolDescribeReply,
        )
        if reply is None:
            return {}, view.pool_fact(pool.name)
        fact = reply.fact
        return dict(reply.config), PoolFact(
            pool.name,
            fact.usable,
            fact.problem,
            fact.size if fact.HasField("size") else None,
            fact.usage if fact.HasField("usage") else None,
            dict(fact.usage_details),
            fact.included_in,
        )

    async def pool_info(self, request: Checked) -> str:
        """Configuration, size and usage of a pool."""
        pool = find_pool(self._backend.view, request.arg)
        config, fact = await self._pool_described(pool)
        return volumes.pool_info(pool, config, fact)

    async def pool_usage_details(self, request: Checked) -> str:
        """What the driver knows of data and metadata usage."""
        _, fact = await self._pool_described(find_pool(self._backend.view, request.arg))
        return volumes.usage_details(fact)

    async def _drivers(self) -> list[storage_pb2.DriverInfo]:
        reply = await self._backend.call(
            "Storage.ListDrivers", storage_pb2.ListDriversRequest(), storage_pb2.ListDriversReply
        )
        return list(reply.drivers)

    async def pool_list_drivers(self, request: Checked) -> str:
        """Drivers with their parameters."""
        del request
        return volumes.drivers((d.name, d.parameters) for d in await self._drivers())

    async def pool_add(self, request: Checked) -> str:
        """A new pool of the driver that the argument names."""
        driver = next((d for d in await self._drivers() if d.name == request.arg), None)
        if driver is None:
            raise WireRefusal("NAME_NOT_KNOWN", f"there is no storage driver {request.arg}")
        text = parse_pool(request.untrusted_payload, driver.name, frozenset(driver.parameters))
        missing = sorted(set(driver.required) - text.options.keys())
        if missing:
            raise WireRefusal(
                "POOL_OPTION_MISSING", f"driver {driver.name} needs {' and '.join(missing)}"
            )
        spec = specs.PoolAddSpec(Pool(text.name, driver.name, text.options))
        await self._backend.operate(spec, request.source.name)
        return ""

    # ---- firewall

    async def firewall_get(self, request: Checked) -> str:
        """The rules that have not expired, one per line."""
        _networked(request.dest)
        reply = await self._backend.call(
            "Firewall.GetRules",
            firewall_pb2.GetRulesRequest(uuid=request.dest.uuid),
            firewall_pb2.GetRulesReply,
        )
        return "".join(f"{rule}\n" for rule in reply.rules)

    async def firewall_set(self, request: Checked) -> str:
        """Replace all rules."""
        _networked(request.dest)
        untrusted_rules = ascii_text(request.untrusted_payload).splitlines()
        await self._backend.call(
            "Firewall.SetRules",
            firewall_pb2.SetRulesRequest(
                uuid=request.dest.uuid, qube=request.dest.name, untrusted_rules=untrusted_rules
            ),
            firewall_pb2.SetRulesReply,
            source=request.source.name,
            timeout=FIREWALL_S,
        )
        await self._backend.reached(request.dest.uuid)
        return ""

    async def firewall_reload(self, request: Checked) -> str:
        """Apply the stored rules anew."""
        _networked(request.dest)
        await self._backend.call(
            "Firewall.ReloadRules",
            firewall_pb2.ReloadRulesRequest(uuid=request.dest.uuid, qube=request.dest.name),
            firewall_pb2.ReloadRulesReply,
            source=request.source.name,
            timeout=FIREWALL_S,
        )
        await self._backend.reached(request.dest.uuid)
        return ""

    async def firewall_effective(self, request: Checked) -> str:
        """JSON: what the kernel enforces now, with counters."""
        _networked(request.dest)
        reply = await self._backend.call(
            "Firewall.EffectiveRules",
            firewall_pb2.EffectiveRulesRequest(uuid=request.dest.uuid),
            firewall_pb2.EffectiveRulesReply,
        )
        rules = [
            {
                "rule": r.rule,
                "packets": r.packets,
                "bytes": r.bytes,
                "inert": r.inert,
                "why": r.why,
            }
            for r in reply.rules
        ]
        return json.dumps({"enforced": reply.enforced, "rules": rules, "ruleset": reply.ruleset})

    # ---- operations

    async def op_cancel(self, request: Checked) -> str:
        """Ask an operation to stop at its next cancel point."""
        operation = find_operation(self._backend.view, request)
        if operation.state.terminal:
            raise Refusal("WRONG_OPERATION_STATE", f"operation {operation.id} is over")
        await self._backend.call(
            "Lifecycle.CancelSubmitted",
            lifecycle_pb2.CancelSubmittedRequest(operation_id=operation.id),
            lifecycle_pb2.CancelSubmittedReply,
            source=request.source.name,
        )
        return ""

    # ---- sockets of callers

    def _callers_for(self, request: Checked) -> Callers:
        if request.restricted or self.callers is None:
            raise WireRefusal("CALL_DENIED", "sockets of callers are dom0's to give")
        return self.callers

    async def caller_open(self, request: Checked) -> str:
        """Path of the destination's own socket, made where it is not there; dom0 only."""
        return await self._callers_for(request).open(request.dest)

    async def caller_close(self, request: Checked) -> str:
        """Take the destination's own socket away; dom0 only."""
        self._callers_for(request).close(request.dest.uuid)
        return ""

    async def caller_list(self, request: Checked) -> str:
        """`NAME PATH` of every caller's own socket, one per line; dom0 only."""
        return "".join(f"{n} {path}\n" for n, path in self._callers_for(request).paths())

    # ---- suspend of the host

    async def suspend_pre(self, request: Checked) -> str:
        """Drop what is preloaded, tell the guests, suspend every running qube."""
        await self._host_suspend.before(request.source.name)
        return ""

    async def suspend_post(self, request: Checked) -> str:
        """Wake up what suspend_pre suspended, tell the guests, preload again."""
        await self._host_suspend.after(request.source.name)
        return ""

    # ---- what guests report

    async def _guest_keys(self, qube: Qube, prefix: str) -> dict[str, str]:
        if qube.klass == "AdminVM" or power_state(self._backend.view, qube) not in _RUNNING:
            raise Refusal("QUBE_NOT_RUNNING", f"{qube.name} is not running", qube=qube.name)
        reply = await self._backend.call(
            "Domains.ReadGuestKeys",
            domains_pb2.ReadGuestKeysRequest(boot=_boot(qube), prefix=prefix),
            domains_pb2.ReadGuestKeysReply,
        )
        return {key.path: key.value for key in reply.untrusted_keys}

    async def _grant(self, qube: Qube, features: dict[str, str]) -> None:
        """Announce the request, then carry out what it may bring about."""
        view = self._backend.view
        event = WireEvent(
            qube.name, "features-request", (("untrusted_features", repr(features)),), qube.uuid
        )
        await self._backend.announce(qube.uuid, qube.run.boot_id, (event,))
        for command in list(requests.wishes(view, qube, features)):
            try:
                await self._backend.mutate(command, qube.name)
            except BusError as error:
                if not requests.may_be_refused(command, error.reason):
                    raise
        installed = features.get("qrexec") == "1" and "qrexec" not in qube.features
        if installed and template_of(view, qube) is None:
            done = WireEvent(qube.name, "template-postinstall", (), qube.uuid)
            await self._backend.announce(qube.uuid, qube.run.boot_id, (done,))

    async def features_request(self, request: Checked) -> str:
        """The source qube tells which features it supports."""
        untrusted = await self._guest_keys(request.source, requests.FEATURES_PREFIX)
        await self._grant(request.source, requests.check_features(untrusted))
        return ""

    async def notify_tools(self, request: Checked) -> str:
        """The source qube tells which tools it has; the older form of FeaturesRequest."""
        untrusted = await self._guest_keys(request.source, requests.TOOLS_PREFIX)
        await self._grant(request.source, requests.check_tools(untrusted))
        return ""

    async def notify_updates(self, request: Checked) -> str:
        """The source qube tells how many updates there are for it."""
        source = request.source
        view = self._backend.view
        snapshots = [v for v in source.volumes if v.snap_on_start]
        states = await self._describe(snapshots) if snapshots else []
        commands = requests.updates(
            view,
            source,
            request.untrusted_payload,
            int(time.time()),
            # Where storage does not say, the template may be newer than what reports.
            outdated=len(states) < len(snapshots) or any(state.is_outdated for state in states),
        )
        for command in list(commands):
            await self._backend.mutate(command, ADMINVM_NAME)
        return ""


def _boot(qube: Qube) -> domains_pb2.BootRef:
    return domains_pb2.BootRef(uuid=qube.uuid, boot_id=qube.run.boot_id)


def _networked(qube: Qube) -> None:
    if qube.klass == "RemoteVM":
        raise Refusal("QUBE_ERROR", f"{qube.name} has no firewall here", qube=qube.name)
