"""The Admin API as a whole: frames from the gateway to answers, the stream to readers.

Owns calls under way and open streams. Must not know how a socket works nor how a reply
is written. Invariant: every well-formed frame is answered, whatever goes wrong behind
it, and a client that goes away changes nothing of what it has asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from bulkhead.api import domains_pb2
from bulkhead.bus.errors import BusError
from bulkhead.bus.events import Entry, ReplicaRunner
from bulkhead.extensions import Extension
from bulkhead.model import specs
from bulkhead.model.evaluate import evaluate, is_leftover
from bulkhead.model.naming import with_names
from bulkhead.model.properties import DISP
from bulkhead.model.records import (
    ADMINVM_NAME,
    Operation,
    OperationPut,
    OperationState,
    Phase,
    Qube,
    QubePut,
    QubeRemoved,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View
from services.adminapi.actions import Actions
from services.adminapi.adapters.gateway import Peer
from services.adminapi.audit_exporter import AuditExporter, begin_call, has_row
from services.adminapi.backend import Backend, OperationFailed
from services.adminapi.callers import PREFIX, Callers
from services.adminapi.core import audit, stats
from services.adminapi.core.answer import begin, begin_confined, refuse
from services.adminapi.core.checks import Checked
from services.adminapi.core.events import Stream, Streams, operation_events
from services.adminapi.core.exceptions import WireRefusal
from services.adminapi.core.frame import (
    CONNECTION_ESTABLISHED,
    Drop,
    format_event,
    format_exception,
    format_ok,
    parse_request,
)
from services.adminapi.core.permission import Policy
from services.adminapi.core.policy_filter import (
    Judge,
    confined_reason,
    may_have_stats,
    shown_operation,
)
from services.adminapi.core.reads import (
    ReadContext,
    find_operation,
    may_see_operation,
    operation_record,
)
from services.adminapi.core.writes import WRITES

log = logging.getLogger("bulkhead.adminapi")

# How long a call waits for the first complete view after a start.
READY_S = 10.0
# New event streams wait so long at most for what is known of running guests.
FACTS_S = 10.0
# Calls that read what depends on the host: memory, processors, what runs. The first ones after
# a start wait so long at most for the host to be known; nothing ever waits for it again.
HOST_S = 3.0
_OF_THE_HOST = (b"admin.property.Get", b"admin.vm.property.Get", b"bulkhead.vm.GetAll")
# How long the removal of a disposable that was refused its start is waited for, and how
# long the end of one that goes with its stop.
LEFTOVER_S = 2.0
REMOVAL_S = 10.0
# How long calls under way may go on when the service stops.
DRAIN_S = 5.0
_STATS_LIMIT = 64
_WATCH_LIMIT = 256
_GONE_LIMIT = 256


class RecentlyGone:
    """The last records of qubes that were removed, so that policy can judge their events."""

    def __init__(self, replica: ReplicaRunner) -> None:
        self._replica = replica
        self._known: dict[str, Qube] = {}
        self._gone: dict[str, Qube] = {}
        replica.subscribe(self._entry)

    @property
    def records(self) -> Mapping[str, Qube]:
        """The last records of qubes that are gone, by name."""
        return self._gone

    def find(self, name: str) -> Qube | None:
        """The last record of a qube of that name that is gone."""
        return self._gone.get(name)

    def _entry(self, entry: Entry) -> None:
        if entry.resync:
            self._known = {q.uuid: q for q in self._replica.view.qubes()}
        for change in entry.changes:
            if isinstance(change, QubePut):
                self._known[change.qube.uuid] = change.qube
                self._gone.pop(change.qube.name, None)
            elif isinstance(change, QubeRemoved):
                old = self._known.pop(change.uuid, None)
                if old is not None:
                    while len(self._gone) >= _GONE_LIMIT:
                        del self._gone[next(iter(self._gone))]
                    self._gone[old.name] = old


class AdminApi:
    """The gateway's application, and what Health shows of it."""

    def __init__(
        self,
        backend: Backend,
        actions: Actions,
        policy: Policy,
        exporter: AuditExporter | None = None,
    ) -> None:
        self._backend = backend
        self._audit = exporter
        self._actions = actions
        self._policy = policy
        self._callers: Callers | None = None
        self._judge: Judge | None = None
        self._gone: Mapping[str, Qube] = {}
        self._streams = Streams()
        self._held: list[tuple[Checked, Peer]] = []
        # The host has been known, or was waited for in vain.
        self._host_settled = asyncio.Event()
        self._watches: dict[Peer, Checked] = {}
        # Who brings data -> the import that waits for them.
        self._holds: dict[Peer, str] = {}
        self._stats: dict[Peer, Checked] = {}
        self._sampler: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._context: ReadContext | None = None
        self.counters: dict[str, int] = {"calls": 0, "drops": 0, "refused": 0, "errors": 0}
        # Those that have a socket of their own, by its name.
        self.extensions: Mapping[str, Extension] = {}
        backend.replica.subscribe(self._entry)

    def confine(self, callers: Callers, judge: Judge, gone: RecentlyGone) -> None:
        """Serve callers' sockets too, on which `judge` is asked for every call."""
        self._callers, self._judge, self._gone = callers, judge, gone.records

    # ---- Health

    @property
    def ready(self) -> bool:
        """The records are complete."""
        return self._backend.replica.is_ready

    @property
    def not_ready_reason(self) -> str:
        """Why not ready."""
        return "" if self.ready else "the registry's state has not arrived yet"

    @property
    def revision(self) -> int:
        """Of the replica."""
        return self._backend.replica.revision

    @property
    def seq(self) -> int:
        """Of the replica."""
        return self._backend.replica.seq

    @property
    def lag_s(self) -> float:
        """Seconds since the stream was last heard."""
        return self._backend.replica.lag_s

    # ---- the gateway's application

    def serve(self, socket_name: str, untrusted_frame: bytes, peer: Peer) -> None:
        """Answer a frame; reads at once, all else in a task of its own."""
        self.counters["calls"] += 1
        if self._backend.replica.is_ready and not self._lacks_host(untrusted_frame):
            self._serve(socket_name, untrusted_frame, peer)
        else:
            self._spawn(self._serve_when_ready(socket_name, untrusted_frame, peer))

    async def _serve_when_ready(self, socket_name: str, frame: bytes, peer: Peer) -> None:
        try:
            await asyncio.wait_for(self._backend.replica.ready(), READY_S)
        except TimeoutError:
            peer.reply(
                refuse("NOT_READY", "the system's records are not loaded yet; try again shortly")
            )
            return
        if self._lacks_host(frame):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._host_settled.wait(), HOST_S)
            self._host_settled.set()
        self._serve(socket_name, frame, peer)

    def _lacks_host(self, untrusted_frame: bytes) -> bool:
        return (
            not self._host_settled.is_set()
            and untrusted_frame.startswith(_OF_THE_HOST)
            and self._backend.view.host is None
        )

    def _serve(self, socket_name: str, untrusted_frame: bytes, peer: Peer) -> None:
        try:
            if socket_name.startswith(PREFIX):
                answer = self._begin_confined(socket_name, untrusted_frame)
            elif socket_name in self.extensions:
                answer = self._begin_granted(socket_name, untrusted_frame)
            else:
                answer = begin(self._read_context(), socket_name, untrusted_frame)
        except Drop as drop:
            self.counters["drops"] += 1
            log.debug("dropped: %s", drop)
            if socket_name.startswith(PREFIX):
                self._note_frame(socket_name, untrusted_frame, f"2\0Refused\0\0{drop}\0".encode())
            self._once_recorded(peer.drop)
            return
        except Exception:
            peer.reply(self._unexpected("a read"))
            return
        if isinstance(answer, bytes):
            if answer.startswith(b"2"):
                self.counters["refused"] += 1
                self._note_frame(socket_name, untrusted_frame, answer)
                self._once_recorded(lambda: peer.reply(answer))
            else:
                peer.reply(answer)  # a read leaves no record
        elif answer.call.stream:
            self._open_stream(answer, peer)
        else:
            self._spawn(self._answer(answer, peer))

    def _once_recorded(self, act: Callable[[], None]) -> None:
        """Act when what the audit was told is in its file; a kill then loses no record that
        anybody has an answer to."""
        if self._audit is None or not self._audit.waiting:
            act()
        else:
            self._spawn(self._act_once_recorded(self._audit, act))

    @staticmethod
    async def _act_once_recorded(exporter: AuditExporter, act: Callable[[], None]) -> None:
        try:
            await exporter.written()
        finally:
            act()

    def _begin_confined(self, socket_name: str, untrusted_frame: bytes) -> bytes | Checked:
        if self._callers is None or self._judge is None:
            raise Drop("nothing is served on the sockets of callers")
        caller = self._callers.qube(socket_name)
        if caller is None:
            raise Drop("the caller is gone")
        return begin_confined(self._read_context(), self._judge, caller, untrusted_frame)

    def _begin_granted(self, socket_name: str, untrusted_frame: bytes) -> bytes | Checked:
        """The call of an extension: what it was granted, in the name of dom0; Drop else."""
        extension = self.extensions[socket_name]
        untrusted = parse_request(untrusted_frame)
        words = (untrusted.untrusted_method, untrusted.untrusted_arg, untrusted.untrusted_dest)
        method, arg, dest = (word.decode("ascii", "backslashreplace") for word in words)
        if not extension.may_call(method, arg, dest):
            raise Drop(f"extension {extension.name} was not granted {method}")
        head, nul, payload = untrusted_frame.partition(b"\0")
        call, _, destination = head.split(b" ", 2)
        stated = b" ".join((call, ADMINVM_NAME.encode(), destination)) + nul + payload
        answer = begin(self._read_context(), "admin", stated)
        if not isinstance(answer, bytes) and answer.call.effect != "ro" and self._audit is not None:
            record = audit.of_call(answer, "call", "granted to an extension")
            self._audit.note({**record, "source": socket_name})
        return answer

    def too_many(self) -> bytes:
        """For a connection above the limit."""
        return refuse("TOO_MANY_CONNECTIONS", "too many calls are under way; try again")

    def too_slow(self) -> bytes:
        """For a stream that is not read."""
        return refuse(
            "READER_TOO_SLOW", "events were not read in time and some are lost; subscribe anew"
        )

    # ---- calls

    def _read_context(self) -> ReadContext:
        view = self._backend.view
        context = self._context
        if context is None or context.view is not view:
            context = self._context = ReadContext(view, self._policy)
        return context

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: Checked, peer: Peer) -> None:
        method = request.call.name
        done = begin_call()
        result = "done"
        try:
            data = format_ok(await self._run(request))
        except (Refusal, WireRefusal, OperationFailed, BusError) as error:
            self.counters["refused"] += 1
            reason = confined_reason(self._backend.view, self._policy, request, error.reason)
            message = with_names(self._backend.view, error.message)
            data = refuse(reason, message, method=method, restricted=request.restricted)
            result = f"{error.reason}: {message}"
        except asyncio.CancelledError:
            self._note_call(request, "refused", "OUTCOME_UNKNOWN: the service stopped")
            peer.reply(
                refuse(
                    "OUTCOME_UNKNOWN",
                    f"the service stopped while {method} was under way; outcome unknown",
                )
            )
            raise
        except Exception:
            data = self._unexpected(method)
            result = "UNEXPECTED: an internal error"
        if not has_row(done):
            self._note_call(request, "call" if data.startswith(b"0") else "refused", result)
        self._once_recorded(lambda: peer.reply(data))

    def _note_call(self, request: Checked, kind: str, result: str) -> None:
        """Audit what could change something and left no change row."""
        if self._audit is not None and request.call.effect != "ro":
            self._audit.note(audit.of_call(request, kind, result))

    def _note_frame(self, socket_name: str, untrusted_frame: bytes, answer: bytes) -> None:
        if self._audit is None:
            return
        result = b": ".join(answer.split(b"\0")[1:4:2]).decode("utf-8", "replace")
        caller = None
        if socket_name.startswith(PREFIX):
            caller = self._callers.qube(socket_name) if self._callers is not None else None
            socket_name = "admin"
        record = audit.of_frame(socket_name, untrusted_frame, result)
        if record is not None:
            if caller is not None:
                record["source"] = caller.name  # what the frame states does not count
            self._audit.note(record)

    async def _run(self, request: Checked) -> str:
        write = WRITES.get(request.call.handler)
        if write is None:
            action = getattr(self._actions, request.call.handler or "-", None)
            if action is None:
                raise WireRefusal("METHOD_NOT_SERVED", f"{request.call.name} is not served here")
            return str(await action(request))
        wanted = write(self._read_context(), request)
        if wanted is None:
            return ""
        if isinstance(wanted, specs.Command):
            await self._backend.mutate(wanted, request.source.name)
        else:
            try:
                await self._backend.operate(wanted, request.source.name)
            except (Refusal, WireRefusal, OperationFailed, BusError):
                if isinstance(wanted, specs.StartSpec):
                    await self._leftover_gone(request.dest.uuid)
                raise
            ends = isinstance(wanted, specs.KillSpec | specs.ShutdownSpec)
            if ends and request.dest.klass == DISP:
                await self._removal_done(request.dest.uuid)
        return ""

    async def _leftover_gone(self, identity: str) -> None:
        """Who is told that a disposable did not start finds it gone, as after its end."""

        def gone(view: View) -> bool:
            qube = view.by_uuid(identity)
            return qube is None or not is_leftover(view, qube)

        await self._backend.operations.until(gone, LEFTOVER_S)
        await self._removal_done(identity)

    async def _removal_done(self, identity: str) -> None:
        """Who is told that a disposable ended may change or remove what it was made from.

        Its removal begins with the end that we have seen; one that is stuck is not waited for.
        """

        def done(view: View) -> bool:
            return all(
                o.kind != "REMOVE" or o.state is OperationState.STUCK
                for o in view.operations_on(identity)
            )

        await self._backend.operations.until(done, REMOVAL_S)

    def _unexpected(self, what: str) -> bytes:
        self.counters["errors"] += 1
        log.exception("%s failed by an error of ours", what)
        return refuse("UNEXPECTED", f"{what} failed by an internal error; the log says more")

    # ---- the stream

    def _entry(self, entry: Entry) -> None:
        """One entry that the view holds now: events first, then who waits for operations."""
        view = self._backend.view
        if entry.resync:
            self._streams.restart(
                self._backend.replica.registry_boot,
                entry.seq,
                refuse("STREAM_LOST", "events may have been missed; subscribe anew"),
            )
        else:
            try:
                self._streams.publish(self._policy, view, entry.events, self._gone, entry.seq)
            except Exception:
                log.exception("events of entry %d could not be written", entry.seq)
        if view.host is not None:
            self._host_settled.set()
            self._release(*self._held)
        if self._watches:
            self._tell_watches(entry)
        self._backend.operations.on_entry(entry)

    # ---- streams of clients

    def _open_stream(self, request: Checked, peer: Peer) -> None:
        of_events = request.call.handler in ("events", "events_resumable")
        if of_events and self._backend.view.host is None:
            self._hold_stream(request, peer)
        else:
            self._begin_stream(request, peer)

    def _hold_stream(self, request: Checked, peer: Peer) -> None:
        """A registry that has just started knows nothing of guests until domains reports.

        Whoever subscribes reads everything then, and no event would correct it later.
        """
        held = (request, peer)
        self._held.append(held)
        peer.on_gone = lambda: self._held.remove(held) if held in self._held else None
        asyncio.get_running_loop().call_later(FACTS_S, self._release, held)

    def _release(self, *streams: tuple[Checked, Peer]) -> None:
        for held in streams:
            if held in self._held:
                self._held.remove(held)
                self._begin_stream(*held)

    def _begin_stream(self, request: Checked, peer: Peer) -> None:
        try:
            match request.call.handler:
                case "events":
                    self._open_events(request, peer)
                case "events_resumable":
                    self._open_resumable(request, peer)
                case "stats":
                    self._open_stats(request, peer)
                case "import_hold":
                    self._open_hold(request, peer)
                case _:
                    self._open_watch(request, peer)
        except (Refusal, WireRefusal) as error:
            peer.end(
                refuse(
                    error.reason,
                    error.message,
                    method=request.call.name,
                    restricted=request.restricted,
                )
            )

    def _open_events(self, request: Checked, peer: Peer) -> None:
        uuid = "" if request.dest.name == ADMINVM_NAME else request.dest.uuid
        stream = self._streams.open(request.source.name, uuid, peer, confined=request.confined)
        peer.on_gone = lambda: self._streams.close(stream.number)
        peer.begin_stream()

    def _open_resumable(self, request: Checked, peer: Peer) -> None:
        uuid = "" if request.dest.name == ADMINVM_NAME else request.dest.uuid
        wanted = Stream(0, request.source.name, uuid, peer, request.confined)
        stream = self._streams.resume(
            self._policy, self._backend.view, wanted, request.arg, self._gone
        )
        peer.on_gone = lambda: self._streams.close(stream.number)
        peer.begin_stream()

    # ---- bulkhead.vm.volume.ImportHold

    def _open_hold(self, request: Checked, peer: Peer) -> None:
        operation = self._actions.waiting_import(request)
        self._holds[peer] = operation.id
        peer.on_gone = lambda: self._let_go(request, peer)
        peer.push(CONNECTION_ESTABLISHED)
        peer.begin_stream()

    def _let_go(self, request: Checked, peer: Peer) -> None:
        """Who brings an import's data is gone. Ours are closed for other reasons, too: none
        is in the table by then."""
        operation_id = self._holds.pop(peer, "")
        if operation_id:
            self._spawn(self._actions.give_up_import(request, operation_id))

    # ---- bulkhead.op.Watch

    def _open_watch(self, request: Checked, peer: Peer) -> None:
        if len(self._watches) >= _WATCH_LIMIT:
            raise WireRefusal("TOO_MANY_STREAMS", f"{_WATCH_LIMIT} watches are open already")
        view = self._backend.view
        wanted = [find_operation(view, request)] if request.arg else []
        peer.push(CONNECTION_ESTABLISHED)
        for operation in wanted:
            peer.push(self._moved(request, operation))
        if wanted and wanted[0].state.terminal:
            peer.end()
            return
        self._watches[peer] = request
        peer.on_gone = lambda: self._forget(self._watches, peer)
        peer.begin_stream()

    def _tell_watches(self, entry: Entry) -> None:
        view = self._backend.view
        if entry.resync:
            moved = list(view.operations.values())
        else:
            moved = [c.operation for c in entry.changes if isinstance(c, OperationPut)]
        for operation in moved:
            for peer, request in list(self._watches.items()):
                if request.arg not in ("", operation.id):
                    continue
                if not may_see_operation(request, operation):
                    continue
                peer.push(self._moved(request, operation))
                if request.arg and operation.state.terminal:
                    peer.end()

    def _moved(self, request: Checked, operation: Operation) -> bytes:
        view = self._backend.view
        record = operation_record(view, operation)
        shown = shown_operation(view, self._policy, request, operation, record)
        return b"".join(format_event(e.subject, e.name, e.pairs) for e in operation_events([shown]))

    @staticmethod
    def _forget(streams: dict[Peer, Checked], peer: Peer) -> None:
        streams.pop(peer, None)

    # ---- admin.vm.Stats

    def _open_stats(self, request: Checked, peer: Peer) -> None:
        if len(self._stats) >= _STATS_LIMIT:
            raise WireRefusal("TOO_MANY_STREAMS", f"{_STATS_LIMIT} statistics are read already")
        peer.push(CONNECTION_ESTABLISHED)
        qube = request.dest
        if not self._always_on(qube) and not self._measurable(qube):
            raise Refusal("QUBE_NOT_RUNNING", f"{qube.name} is not running", qube=qube.name)
        self._stats[peer] = request
        peer.on_gone = lambda: self._forget(self._stats, peer)
        peer.begin_stream()
        if self._sampler is None or self._sampler.done():
            self._sampler = asyncio.get_running_loop().create_task(self._sample())

    def _always_on(self, qube: Qube) -> bool:
        """dom0 stands for all; a remote qube counts as running, and is not measured."""
        return qube.klass in ("AdminVM", "RemoteVM")

    def _measurable(self, qube: Qube) -> bool:
        return qube.klass == "AdminVM" or (not self._always_on(qube) and qube.run.phase is Phase.UP)

    async def _sample(self) -> None:
        """One round for all readers each stats_interval, while there are readers."""
        before: dict[str, stats.Sample] = {}
        while self._stats:
            view = self._backend.view
            for peer, request in list(self._stats.items()):
                qube = request.dest
                now = view.by_uuid(qube.uuid)
                if now is None or not (self._always_on(now) or self._measurable(now)):
                    peer.end(refuse("QUBE_NOT_RUNNING", f"{qube.name} is not running any more"))
            running = {q.uuid: q for q in view.qubes() if self._measurable(q)}
            before = await self._sample_once(running, before)
            await asyncio.sleep(stats.pause_s(evaluate(view, None, "stats_interval")))

    async def _sample_once(
        self, running: dict[str, Qube], before: dict[str, stats.Sample]
    ) -> dict[str, stats.Sample]:
        reply = await self._backend.read(
            "Domains.Stats",
            domains_pb2.StatsRequest(uuids=list(running)),
            domains_pb2.StatsReply,
        )
        samples: dict[str, stats.Sample] = {}
        now = time.monotonic_ns()
        for domain in reply.domains if reply is not None else ():
            qube = running.get(domain.uuid)
            if qube is None:
                continue
            inner = domain.HasField("stubdom_cpu_time_ns")
            sample = samples[domain.uuid] = stats.Sample(
                now,
                domain.memory_kib,
                domain.memory_assigned_kib,
                domain.cpu_time_ns,
                domain.online_vcpus,
                domain.swap_used_kib if domain.HasField("swap_used_kib") else None,
                domain.stubdom_cpu_time_ns if inner else None,
                domain.stubdom_vcpus if domain.HasField("stubdom_vcpus") else None,
            )
            data = format_event(qube.name, "vm-stats", stats.pairs(sample, before.get(qube.uuid)))
            for peer, request in list(self._stats.items()):
                wanted = request.dest.name == ADMINVM_NAME or request.dest.uuid == qube.uuid
                if wanted and may_have_stats(self._policy, request, qube):
                    peer.push(data)
        return samples

    # ---- stop

    async def stop(self) -> None:
        """Let calls under way finish for a while, then tell the rest; end all streams."""
        if self._sampler is not None:
            self._sampler.cancel()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks), timeout=DRAIN_S)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._holds.clear()  # whoever brings data ends the import with our successor
        last = format_exception("QubesException", "the service stops; subscribe anew")
        self._streams.end_all(last)
        for peer in (*self._watches, *self._stats, *(peer for _, peer in self._held)):
            peer.end(last)
