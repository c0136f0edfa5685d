"""Messages to work, and answers to messages.

Owns the mapping between registry.proto and core.works, the audit origin of each call
and the freezing of its reply. Must not know SQLite or files. Invariant: every call that
changes something goes through the engine, and its reply is stored with the change.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import Callable, Container
from typing import Any, TypeVar

from google.protobuf.message import Message

from bulkhead import codec
from bulkhead.api import control_pb2, registry_pb2
from bulkhead.bus.errors import BusError
from bulkhead.bus.events import HIDDEN_READERS
from bulkhead.bus.server import Call
from bulkhead.model.records import ADMINVM_NAME, Operation, OperationState, WireEvent
from bulkhead.model.refusal import Refusal
from services.registry.adapters.journal import JournalError, history
from services.registry.checkpointer import Checkpointer
from services.registry.core import canonical, works
from services.registry.core.adopt import Blocked
from services.registry.core.document import Unreadable
from services.registry.core.group import Accepted, Work
from services.registry.core.reasons import REASONS
from services.registry.engine import Engine, Origin
from services.registry.replies import DurableReplies
from services.registry.snapshots import Snapshots
from services.registry.store import Store

_M = TypeVar("_M", bound=Message)

HISTORY_LIMIT = 200
HISTORY_BYTES = 512 * 1024
DUMP_PAGE = 256 * 1024
DUMPS = 4


class RegistryHandlers:
    """The Registry service. ready, revision, seq, counters: for Health."""

    ready = True
    not_ready_reason = ""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        checkpointer: Checkpointer,
        replies: DurableReplies,
        *,
        registry_boot: str,
        subscribers: Callable[[], int],
        recent_dispids: Container[int],
        log: logging.Logger,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.reply_store = replies
        self._store = store
        self._engine = engine
        self._checkpointer = checkpointer
        self._boot = registry_boot
        self._subscribers = subscribers
        self._log = log
        self._clock = clock
        self._outside = works.Outside(_new_id, secrets.randbelow, recent_dispids)
        self._snapshots = Snapshots()
        self._dumps: dict[str, list[str]] = {}
        self._resolving = asyncio.Lock()

    @property
    def revision(self) -> int:
        return self._engine.revision

    @property
    def seq(self) -> int:
        return self._engine.seq

    @property
    def counters(self) -> dict[str, int]:
        """Shown by Health."""
        counters = self._engine.counters
        return {
            "commits": counters.commits,
            "committed_changes": counters.committed,
            "largest_batch": counters.largest_batch,
            "refused_changes": counters.refused,
            "failed_commits": counters.failed_commits,
            "skipped_entries": counters.skipped_entries,
            "checkpoints": self._checkpointer.written,
            "stored_replies": len(self.reply_store),
            "snapshots": len(self._snapshots),
        }

    # ---- mutations

    async def mutate(
        self, request: registry_pb2.MutateRequest, call: Call
    ) -> registry_pb2.MutateReply:
        """One command of an Admin API source."""
        work = works.Mutation(
            codec.command_from_proto(request),
            call.source or ADMINVM_NAME,
            self._clock(),
            call.etag,
            call.validate_only,
            self._outside,
        )

        def reply(accepted: Accepted) -> registry_pb2.MutateReply:
            answer = accepted.planned.answer
            assert isinstance(answer, works.MutationAnswer)
            applies = [operation.id for operation in answer.applies]
            return registry_pb2.MutateReply(
                result=answer.result,
                apply_operation=applies[0] if applies else "",
                apply_operations=applies,
            )

        return await self._do(work, call, f"Mutate.{request.WhichOneof('command')}", reply)

    async def mutate_preload(
        self, request: registry_pb2.PreloadRequest, call: Call
    ) -> registry_pb2.PreloadReply:
        """dispvm's marks."""
        work = works.Preload(
            codec.preload_from_proto(request),
            call.source or ADMINVM_NAME,
            self._clock(),
            call.validate_only,
        )
        return await self._do(work, call, "MutatePreload", lambda _: registry_pb2.PreloadReply())

    # ---- operations

    async def begin(
        self, request: registry_pb2.BeginRequest, call: Call
    ) -> registry_pb2.BeginReply:
        """Lock and begin an operation."""
        work = works.Begin(
            codec.spec_from_proto(request.spec),
            call.source or ADMINVM_NAME,
            request.operation_id or _new_id(),
            call.request_id,
            self._clock(),
            call.validate_only,
            self._outside,
        )

        def reply(accepted: Accepted) -> registry_pb2.BeginReply:
            answer = accepted.planned.answer
            assert isinstance(answer, works.BeginAnswer)
            return registry_pb2.BeginReply(
                operation=codec.operation_to_proto(answer.operation), joined=answer.joined
            )

        return await self._do(work, call, f"Begin.{request.spec.WhichOneof('kind')}", reply)

    async def advance(
        self, request: registry_pb2.AdvanceRequest, call: Call
    ) -> registry_pb2.AdvanceReply:
        """One step on."""
        work = works.Advance(
            request.operation_id,
            request.epoch,
            request.cursor,
            codec.operation_state_from_proto(request.state),
            request.progress,
            request.progress_text,
            dict(request.data),
            request.pivoted,
            codec.problem_from_proto(request.error) if request.HasField("error") else None,
            _events(request.events),
            self._clock(),
            call.caller,
            self._outside,
        )
        return await self._do(
            work,
            call,
            "Advance",
            lambda accepted: registry_pb2.AdvanceReply(
                operation=codec.operation_to_proto(_operation(accepted))
            ),
        )

    async def end(self, request: registry_pb2.EndRequest, call: Call) -> registry_pb2.EndReply:
        """Finish and publish."""
        work = works.End(
            request.operation_id,
            request.epoch,
            codec.operation_state_from_proto(request.outcome),
            request.only_queued,
            codec.problem_from_proto(request.error) if request.HasField("error") else None,
            dict(request.result),
            _events(request.events),
            codec.spec_from_proto(request.follow_up) if request.HasField("follow_up") else None,
            _new_id(),
            self._clock(),
            call.caller,
            self._outside,
        )

        def reply(accepted: Accepted) -> registry_pb2.EndReply:
            answer = accepted.planned.answer
            assert isinstance(answer, works.EndAnswer)
            out = registry_pb2.EndReply(operation=codec.operation_to_proto(answer.operation))
            if answer.follow_up is not None:
                out.follow_up.CopyFrom(codec.operation_to_proto(answer.follow_up))
            return out

        return await self._do(work, call, "End", reply)

    async def cancel_operation(
        self, request: registry_pb2.CancelOperationRequest, call: Call
    ) -> registry_pb2.CancelOperationReply:
        """Ask an operation to stop."""
        return await self._do(
            works.Cancel(request.operation_id, self._clock(), self._outside),
            call,
            "CancelOperation",
            lambda accepted: registry_pb2.CancelOperationReply(
                operation=codec.operation_to_proto(_operation(accepted))
            ),
        )

    async def take_epoch(
        self, request: registry_pb2.TakeEpochRequest, call: Call
    ) -> registry_pb2.TakeEpochReply:
        """A new lifecycle takes over; what an older one still sends is refused."""

        def reply(accepted: Accepted) -> registry_pb2.TakeEpochReply:
            answer = accepted.planned.answer
            assert isinstance(answer, works.EpochAnswer)
            return registry_pb2.TakeEpochReply(
                epoch=answer.epoch,
                unfinished=[codec.operation_to_proto(o) for o in answer.unfinished],
            )

        return await self._do(works.TakeEpoch(), call, "TakeEpoch", reply)

    async def get_epoch(
        self, request: registry_pb2.GetEpochRequest, call: Call
    ) -> registry_pb2.GetEpochReply:
        """The newest epoch, for participants after their own start."""
        return registry_pb2.GetEpochReply(epoch=self._engine.numbers.epoch)

    # ---- what is no record

    async def facts(
        self, request: registry_pb2.FactsRequest, call: Call
    ) -> registry_pb2.FactsReply:
        """A report of the owner of a namespace; streamed, not stored."""
        work = works.Facts(
            call.caller,
            [codec.fact_from_proto(fact) for fact in request.put],
            list(request.removed),
            request.complete,
        )
        reply = await self._do(work, call, "Facts", lambda _: registry_pb2.FactsReply())
        if any(o.state is OperationState.QUEUED for o in self._engine.view.operations.values()):
            await self._promote(call.caller)
        return reply

    async def _promote(self, caller: str) -> None:
        """The turn of operations that could not be planned without the report.

        Not part of the report: a store that is full must not keep facts out. Killed before
        it, the registry starts without facts, and the next report leads here again.
        """
        origin = Origin(caller, ADMINVM_NAME, "Promote")
        try:
            await self._engine.submit(works.Promote(self._clock(), self._outside), origin)
        except (BusError, Refusal) as error:
            self._log.warning("operations that waited for a report wait on: %s", error.message)

    async def announce(
        self, request: registry_pb2.AnnounceRequest, call: Call
    ) -> registry_pb2.AnnounceReply:
        """Events without a record change."""
        work = works.Announce(
            call.caller,
            request.uuid,
            request.boot_id,
            _events(request.events),
            request.rules_digest if request.HasField("rules_digest") else None,
            self._clock(),
            self._outside,
        )
        return await self._do(work, call, "Announce", lambda _: registry_pb2.AnnounceReply())

    # ---- reading

    async def snapshot(
        self, request: registry_pb2.SnapshotRequest, call: Call
    ) -> registry_pb2.SnapshotReply:
        """One page of the state at one seq."""
        if request.with_hidden and call.caller not in HIDDEN_READERS:
            raise _error(
                "HIDDEN_REFUSED", f"{call.caller} may not see hidden records", caller=call.caller
            )
        if request.snapshot_id:
            snapshot = self._snapshots.find(call.caller, request.snapshot_id, request.page)
        else:
            snapshot = await self._engine.quiet(
                lambda: self._snapshots.take(
                    call.caller,
                    self._engine.view,
                    self._engine.seq,
                    self._engine.revision,
                    with_hidden=request.with_hidden,
                )
            )
        page = await self._snapshots.page(snapshot, request.page if request.snapshot_id else 0)
        call.revision, call.seq = snapshot.revision, snapshot.seq
        call.partial = not page.last
        return registry_pb2.SnapshotReply(
            snapshot_id=snapshot.id,
            store_id=self._store.journal.store_id,
            registry_boot=self._boot,
            seq=snapshot.seq,
            revision=snapshot.revision,
            changes=page.changes,
            last=page.last,
        )

    async def history(
        self, request: registry_pb2.HistoryRequest, call: Call
    ) -> registry_pb2.HistoryReply:
        """Change rows, for audit; with qube, those that tell of it by uuid or name."""
        limit = min(request.limit or HISTORY_LIMIT, HISTORY_LIMIT)
        mention = request.qube
        if mention:
            qube = self._engine.view.qube_any(mention) or self._engine.view.by_uuid_any(mention)
            mention = f"qube/{qube.uuid}" if qube is not None else f'"name":"{mention}"'
        try:
            rows, more = await asyncio.to_thread(
                history,
                self._store.journal.path,
                request.after_revision,
                limit,
                mention,
                request.reverse,
            )
        except JournalError as error:
            raise _error("STORE_FAILED", str(error)) from error
        reply = registry_pb2.HistoryReply()
        size = 0
        for hashed in rows:
            row = hashed.row
            size += len(row.before) + len(row.after) + len(row.result) + 256
            if reply.entries and size > HISTORY_BYTES:
                more = True
                break
            reply.entries.append(
                registry_pb2.HistoryEntry(
                    revision=row.revision,
                    caller=row.caller,
                    source=row.source,
                    method=row.method,
                    time=row.time,
                    before=_bounded(row.before),
                    after=_bounded(row.after),
                    result=_bounded(row.result),
                    hash=hashed.hash,
                    previous_hash=hashed.previous_hash,
                )
            )
        reply.more = more
        return reply

    async def store_status(
        self, request: registry_pb2.StoreStatusRequest, call: Call
    ) -> registry_pb2.StoreStatusReply:
        """How the store is, for status and doctor."""
        try:
            shown = await self._checkpointer.foreign_difference()
        except OSError as error:
            shown = f"qubes.xml cannot be read: {error}"
        warnings = list(self._store.warnings)
        if self._checkpointer.problem:
            warnings.append(self._checkpointer.problem)
        if self._checkpointer.foreign:
            warnings.append(
                "qubes.xml was changed by another program; decide with 'bulkhead resolve'"
            )
        quarantined = [
            f"{qube.name}: {'; '.join(qube.quarantine.splitlines())}"
            for qube in self._engine.view.qubes()
            if qube.quarantine
        ]
        return registry_pb2.StoreStatusReply(
            store_id=self._store.journal.store_id,
            revision=self._engine.revision,
            checkpoint_revision=self._checkpointer.current.covers,
            foreign_edit=self._checkpointer.foreign,
            foreign_difference=shown,
            quarantined=quarantined[:1000],
            warnings=warnings[:100],
            seq=self._engine.seq,
            subscribers=self._subscribers(),
        )

    async def dump(self, request: registry_pb2.DumpRequest, call: Call) -> registry_pb2.DumpReply:
        """The canonical dump, page by page; page 0 takes a new one."""
        if request.page == 0:
            pages = await self._engine.quiet(lambda: canonical.pages(self._engine.view, DUMP_PAGE))
            self._dumps.pop(call.caller, None)
            while len(self._dumps) >= DUMPS:
                del self._dumps[next(iter(self._dumps))]
            if len(pages) > 1:
                self._dumps[call.caller] = pages
        else:
            pages = self._dumps.get(call.caller, [])
        if request.page >= len(pages):
            raise _error("SNAPSHOT_GONE", "the dump is not held any more; begin at page 0")
        last = request.page == len(pages) - 1
        if last:
            self._dumps.pop(call.caller, None)
        return registry_pb2.DumpReply(canonical_json=pages[request.page], last=last)

    async def resolve_foreign_edit(
        self, request: registry_pb2.ResolveForeignEditRequest, call: Call
    ) -> registry_pb2.ResolveForeignEditReply:
        """adopt takes the edited file in as one audited change; discard keeps it beside
        and writes the registry's own state."""
        async with self._resolving:
            try:
                await self._checkpointer.look()
                if not self._checkpointer.foreign:
                    raise _error("NO_FOREIGN_EDIT", "qubes.xml is the registry's own file")
                edited, digest = await self._checkpointer.read_foreign()
                if request.adopt:
                    await self._adopt(edited, digest, call)
                await self._checkpointer.overwrite_foreign(edited, digest)
            except OSError as error:
                raise _error("STORE_FAILED", f"{error}; qubes.xml is as it was") from error
        call.revision, call.seq = self._engine.revision, self._engine.seq
        return registry_pb2.ResolveForeignEditReply(revision=self._engine.revision)

    async def _adopt(self, edited: bytes, digest: str, call: Call) -> None:
        try:
            changes, warnings = await asyncio.to_thread(self._parse, edited)
            self._log.info("adopting an edited qubes.xml: %s", "; ".join(warnings) or "clean")
            origin = Origin(call.caller, ADMINVM_NAME, "ResolveForeignEdit")
            await self._engine.submit(works.Adopt(changes, digest), origin)
        except Unreadable as error:
            raise _error("FOREIGN_EDIT_UNREADABLE", f"{error}; repair or discard it") from error
        except Blocked as error:
            raise _error(
                "FOREIGN_EDIT_BLOCKED",
                f"{error}; shut them down first",
                qubes=",".join(error.names),
            ) from error

    def _parse(self, edited: bytes) -> tuple[list[Any], list[str]]:
        return self._store.documents.parse(edited)

    async def sweep(self, request: control_pb2.SweepRequest, call: Call) -> control_pb2.SweepReply:
        """Look at the files once more: was qubes.xml changed by somebody else?"""
        del request, call
        await self._checkpointer.look()
        return control_pb2.SweepReply()

    # ----

    async def _do(self, work: Work, call: Call, method: str, reply: Callable[[Accepted], _M]) -> _M:
        """Submit, with the reply frozen into the same transaction."""
        made: list[_M] = []

        def number(revision: int, seq: int) -> None:
            call.revision, call.seq = revision, seq

        def freeze(accepted: Accepted) -> tuple[str, bytes, bytes] | None:
            made.append(reply(accepted))
            if not call.request_id:
                return None
            return call.caller, call.request_id, call.freeze_reply(made[0])

        origin = Origin(call.caller, call.source or ADMINVM_NAME, method)
        accepted = await self._engine.submit(work, origin, freeze, number, call.check)
        return made[0] if made else reply(accepted)


def _new_id() -> str:
    return str(uuid.uuid4())


def _operation(accepted: Accepted) -> Operation:
    operation = accepted.planned.answer
    assert isinstance(operation, Operation)
    return operation


def _events(events: Any) -> tuple[WireEvent, ...]:
    return tuple(codec.event_from_proto(event) for event in events)


def _bounded(text: str) -> str:
    """An audit column that fits a message."""
    limit = HISTORY_BYTES // 4
    return text if len(text) <= limit else text[:limit] + "... (longer)"


def _error(reason: str, message: str, **metadata: str) -> BusError:
    error = BusError(REASONS[reason].code, reason, message)
    error.metadata = dict(metadata)
    return error
