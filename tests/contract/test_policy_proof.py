"""The proof that policy confines: nothing tells a caller of a qube outside its set.

Each case draws a policy, a caller, and two systems that differ only in qubes on which
the policy grants that caller nothing: absent here, there; running, tagged or set
otherwise. Then every call, list, error and event has to be the same byte for byte in
both, and must not contain the name or the uuid of such a qube.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import Phase as Phases
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkhead.bus.errors import BusError
from bulkhead.model import specs
from bulkhead.model.policy import (
    Decision,
    Directory,
    Evaluator,
    PolicyError,
    Rule,
    ViewWorld,
    parse,
)
from bulkhead.model.records import (
    DeviceFact,
    FactPut,
    Operation,
    OperationPut,
    OperationState,
    Phase,
    Problem,
    Qube,
    QubePut,
    Run,
    WireEvent,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View
from services.adminapi.actions import Actions
from services.adminapi.adapters.paused_list import PausedList
from services.adminapi.backend import Backend
from services.adminapi.callers import PREFIX
from services.adminapi.core import answer as answer_module
from services.adminapi.core import policy_filter, reads
from services.adminapi.core.answer import begin_confined, refuse
from services.adminapi.core.checks import designate
from services.adminapi.core.events import Streams
from services.adminapi.core.exceptions import WireRefusal
from services.adminapi.core.frame import CONNECTION_ESTABLISHED, Drop
from services.adminapi.core.reads import ReadContext
from services.adminapi.core.writes import WRITES
from services.adminapi.handlers import AdminApi
from tests.contract.test_adminapi_gateway import FakeReplica
from tests.fakes.adminapi import app, start_view

PURE_CASES = 10_000
SERVED_CASES = 400
SEARCHED_CASES = 3_000

CALLER = "mgmt-caller"
OTHERS = ("qube-alpha", "qube-beta", "qube-gamma", "qube-delta")
NETVM = "net-omega"
UUIDS = {
    name: f"{n}{n}{n}{n}{n}{n}{n}{n}-0000-4000-8000-00000000000{n}"
    for n, name in enumerate((CALLER, *OTHERS, NETVM), 3)
}
VARIANTS = ("plain", "absent", "absent", "running", "tagged", "changed")
NOBODY = "qube-nobody"

# ---- systems


def _qube(name: str, variant: str) -> Qube:
    number = list(UUIDS).index(name)
    qube = app(name, UUIDS[name], number + 3)
    tags = {"created-by-mgmt-caller"} if number % 2 else {"other"}
    properties = {**qube.properties, "netvm": NETVM} if name == OTHERS[0] else qube.properties
    if name == NETVM:
        properties = {**properties, "provides_network": "True"}
    if variant == "running":
        qube = replace(qube, run=Run(Phase.UP, f"boot-{number}"))
    if variant == "tagged":
        tags = {"other", "created-by-mgmt-caller", "third"}
    if variant == "changed":
        properties = {**properties, "vcpus": "7", "label": "blue"}
        qube = replace(qube, features={"service.x": "1"}, notes="changed")
    return replace(qube, properties=properties, tags=frozenset(tags))


def _operations() -> Iterator[Operation]:
    """What the caller and others have asked for, on qubes of which some may be hidden."""
    for number, (source, name) in enumerate(
        (s, n) for s in (CALLER, "dom0") for n in (*OTHERS, NETVM)
    ):
        yield Operation(
            f"op-{number}",
            "START",
            specs.StartSpec(name),
            (UUIDS[name],),
            OperationState.FAILED,
            progress_text=f"waits for {name}",
            error=Problem("FAILED_PRECONDITION", "QUBE_BUSY", f"{name} is busy"),
            source=source,
            waits_for=name,
            result={"qube": name},
        )


@cache
def system(variants: tuple[str, ...]) -> View:
    """A view; variants in the order of OTHERS and NETVM."""
    view = start_view()
    view.apply(QubePut(_qube(CALLER, "plain")))
    for name, variant in zip((*OTHERS, NETVM), variants, strict=True):
        if variant != "absent":
            view.apply(QubePut(_qube(name, variant)))
    for backend, frontend in zip(OTHERS, (*OTHERS[1:], OTHERS[0]), strict=True):
        if view.qube(backend) is not None:
            # What an absent qube had attached is attached to nothing.
            there = UUIDS[frontend] if view.qube(frontend) is not None else ""
            view.apply(FactPut(DeviceFact(UUIDS[backend], "block", "sda", attached_to=there)))
    view.apply_all(OperationPut(o) for o in _operations())
    return view


PLAIN = ("plain",) * (len(OTHERS) + 1)


@lru_cache(maxsize=16)
def rules_of(text: str) -> tuple[Rule, ...]:
    try:
        return parse([Directory("p", {"30-user.policy": text})])
    except PolicyError:
        return ()


class _Judge:
    """An evaluator over one system, with the interface of the policy keeper."""

    def __init__(self, text: str, view: View) -> None:
        self._evaluator = Evaluator(ViewWorld(lambda: view))
        self._evaluator.replace(rules_of(text))

    def allows(self, service: str, argument: str, source: str, target: str) -> bool:
        return self._evaluator.allows(service, argument, source, target)

    def decide(self, service: str, argument: str, source: str, target: str) -> Decision:
        return self._evaluator.decide(service, argument, source, target)


# ---- policies and requests

REFERENCES = ("netvm", "default_dispvm", "default_netvm")
LIST, EVENTS, GET_ALL = "admin.vm.List", "admin.Events", "bulkhead.vm.GetAll"
# method, its arguments, its payloads; %s = any name.
METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    LIST: (("",), ("",)),
    GET_ALL: (("",), ("",)),
    "bulkhead.op.List": (("",), ("",)),
    "bulkhead.op.Get": (("op-0", "op-7", "nosuch"), ("",)),
    "admin.vm.property.Get": (("netvm", "vcpus", "nosuch"), ("",)),
    "admin.vm.property.Set": (("netvm", "default_dispvm", "vcpus"), ("%s", "3")),
    "admin.property.Set": (("default_netvm",), ("%s",)),
    "admin.vm.tag.List": (("",), ("",)),
    "admin.vm.feature.Get": (("service.x",), ("",)),
    "admin.vm.notes.Get": (("",), ("",)),
    "admin.vm.Start": (("",), ("",)),
    "admin.vm.Remove": (("",), ("",)),
    "admin.vm.CurrentState": (("",), ("",)),
    "admin.vm.CreateDisposable": (("",), ("", "uuid")),
    "admin.vm.Create.AppVM": (("tmpl", "%s"), ("name=%s label=red",)),
    "admin.pool.volume.List": (("varlibqubes",), ("",)),
    "admin.vm.device.block.Available": (("", "sda"), ("",)),
    "admin.vm.device.block.Attach": (("%s+sda+x", "_+sda"), ("",)),
    "admin.vm.device.block.Detach": (("%s+sda+x",), ("",)),
    "no.such.Method": (("",), ("",)),
}
SERVICES = (*METHODS, EVENTS)
# Calls that can name other qubes than their destination.
TALKING = (
    "bulkhead.op.List", "admin.vm.property.Set", "admin.property.Set", "admin.pool.volume.List",
    "admin.vm.device.block.Available", "admin.vm.device.block.Attach", "admin.vm.Create.AppVM",
    GET_ALL, "admin.vm.Start",
)  # fmt: skip
_NAMES = (*OTHERS, NETVM)
SOURCES = (
    *([CALLER] * 4), "@anyvm", "*", "@tag:other", "@type:AppVM", f"uuid:{UUIDS[CALLER]}",
)  # fmt: skip
TARGETS = (
    *_NAMES, *_NAMES, *(["@adminvm"] * 5), "dom0", "dom0", f"uuid:{UUIDS[OTHERS[1]]}",
    "@tag:created-by-mgmt-caller", "@tag:third", "@tag:other", "@type:AppVM", "@anyvm", "*",
    "@default", "@dispvm", NOBODY,
)  # fmt: skip
ACTIONS = (*(["allow target=dom0"] * 8), "allow", "deny", "deny", "ask")
ARGUMENTS = (*("*" * 9), "+", "+netvm", "+domain-start", f"+{OTHERS[2]}", f"+{OTHERS[0]}+sda+x")
WANTED = (
    *_NAMES, *_NAMES, "dom0", "dom0", "dom0", CALLER, NOBODY, "@adminvm", "@dispvm", "",
    f"uuid:{UUIDS[OTHERS[0]]}", f"uuid:{UUIDS[OTHERS[2]]}", "@default", "tmpl",
)  # fmt: skip

any_rule = st.tuples(
    st.sampled_from((*SERVICES, LIST, LIST, EVENTS, "*")),
    st.sampled_from(ARGUMENTS),
    st.sampled_from(SOURCES),
    st.sampled_from(TARGETS),
    st.sampled_from(ACTIONS),
)
# What is granted in earnest, so that there are answers that could tell something.
useful_rule = st.tuples(
    st.sampled_from((*TALKING, EVENTS, LIST)),
    st.just("*"),
    st.just(CALLER),
    st.sampled_from((*_NAMES, *(["@adminvm"] * 4))),
    st.just("allow target=dom0"),
)
rules = st.lists(st.one_of(any_rule, useful_rule, useful_rule), min_size=1, max_size=7)
variants = st.tuples(*(st.sampled_from(VARIANTS) for _ in _NAMES))
requests = st.lists(
    st.tuples(
        st.sampled_from((*METHODS, *TALKING, *([""] * 40))),
        st.integers(0, 20),
        st.integers(0, 1),
        st.sampled_from((*WANTED, *([""] * 20))),
        st.sampled_from((*_NAMES, NOBODY)),
    ),
    min_size=2,
    max_size=4,
)

Drawn = list[tuple[str, str, str, str, str]]
Asked = list[tuple[str, int, int, str, str]]


def policy_text(drawn: Drawn) -> str:
    """The rules as a file; argument * where the service is *, target= where @default needs it."""
    lines = []
    for service, argument, source, target, action in drawn:
        if service == "*":
            argument = "*"
        if target == "@default" and action == "allow":
            action = "allow target=dom0"
        lines.append(f"{service} {argument} {source} {target} {action}\n")
    return "".join(lines)


def frame_of(drawn: Drawn, method: str, which: int, payload: int, target: str, name: str) -> bytes:
    """A request; a method or target of "" is what one of the rules speaks of."""
    service, _, _, granted, _ = drawn[which % len(drawn)]
    method = method or (service if service in METHODS else TALKING[which % len(TALKING)])
    if not target:
        target = granted if granted in (*_NAMES, NOBODY) else "dom0"
    args, payloads = METHODS[method]
    arg = args[which % len(args)].replace("%s", name)
    text = payloads[payload % len(payloads)].replace("%s", name)
    return f"{method}+{arg} dom0 name {target}\0{text}".encode()


# ---- the caller's set


def outside(drawn: Drawn, view: View, judge: _Judge, name: str) -> bool:
    """No rule grants the caller anything on that qube, in this system.

    Rules can tell apart only the services and arguments that they name, so those and one
    other of each are all that has to be asked.
    """
    services = {s for s, *_ in drawn if s != "*"} | {"some.Other"}
    arguments = {a for _, a, *_ in drawn if a != "*"} | {"+some-other"}
    if any(action != "deny" and argument == f"+{name}" for _, argument, *_, action in drawn):
        return False  # an argument that a rule grants by name
    if any(action != "deny" and argument == f"+{name}+sda+x" for _, argument, *_, action in drawn):
        return False
    if view.qube(name) is None:
        return True
    return not any(judge.allows(s, a, CALLER, name) for s in services for a in arguments)


def pair(drawn: Drawn, chosen: tuple[str, ...]) -> tuple[View, View, frozenset[str]]:
    """Two systems and the qubes in which they may differ: those outside in both."""
    text = policy_text(drawn)
    one, other = system(PLAIN), system(chosen)
    judges = (_Judge(text, one), _Judge(text, other))
    hidden = frozenset(
        name
        for name in _NAMES
        if outside(drawn, one, judges[0], name) and outside(drawn, other, judges[1], name)
    )
    kept = [v if name in hidden else "plain" for name, v in zip(_NAMES, chosen, strict=True)]
    # A visible qube's own netvm is a value of its own: it exists wherever that qube does.
    if OTHERS[0] not in hidden and kept[-1] == "absent":
        kept[-1] = "changed"
    return one, system(tuple(kept)), hidden


def clean(data: bytes, hidden: frozenset[str], asked: bytes = b"", granted: bytes = b"") -> None:
    """No name and no uuid of a hidden qube but those that the caller itself has written."""
    for name in hidden:
        for word in (name.encode(), UUIDS[name].encode()):
            assert word not in data or word in asked or word in granted, (name, data)


# ---- calls, lists and errors, without any service


def outcome(view: View, text: str, frame: bytes) -> bytes:
    """The bytes of the answer, b"" for silence, or what would be asked of other services.

    Of the registry it is assumed that it answers otherwise where a named qube is missing.
    """
    judge = _Judge(text, view)
    caller = view.qube(CALLER)
    assert caller is not None
    context = ReadContext(view, judge)
    try:
        answer = begin_confined(context, judge, caller, frame)
    except Drop:
        return b""
    if isinstance(answer, bytes):
        return answer
    write = WRITES.get(answer.call.handler)
    if write is None:
        return f"action {answer.call.name} {answer.dest.uuid} {answer.arg}".encode()
    try:
        wanted = write(context, answer)
    except (Refusal, WireRefusal) as error:
        return refuse(error.reason, error.message, restricted=True)
    name = ""
    if isinstance(wanted, specs.SetProperty) and wanted.name in REFERENCES:
        name = wanted.untrusted_value
    elif isinstance(wanted, specs.CreateSpec):
        name = wanted.template
    return f"wanted {wanted!r} {view.qube(name) is not None}".encode()


class _Sink:
    def __init__(self) -> None:
        self.data = b""

    def push(self, data: bytes) -> None:
        self.data += data

    def end(self, data: bytes = b"") -> None:
        self.data += data


def about(name: str) -> list[WireEvent]:
    """Events that tell of a qube, as its own, the system's and other qubes' events."""
    uuid = UUIDS[name]
    return [
        WireEvent("", "domain-add", (("vm", name),)),
        WireEvent(name, "domain-start", (("start_guid", "True"),), uuid),
        WireEvent(name, "property-set:vcpus", (("name", "vcpus"), ("newvalue", "3")), uuid),
        WireEvent(name, "device-attach:block", (("device", "dom0:sda:x"), ("options", "{}")), uuid),
        WireEvent(NETVM, "net-domain-connect", (("vm", name),), UUIDS[NETVM]),
        WireEvent(OTHERS[0], "domain-preload-dispvm-used", (("dispvm", name),), UUIDS[OTHERS[0]]),
        WireEvent("", "domain-delete", (("vm", name),)),
        WireEvent(name, "domain-start-failed", (("reason", " ".join(_NAMES)),), uuid),
    ]


def told(view: View, text: str, events: list[WireEvent]) -> bytes:
    """What a subscriber of everything gets of these events."""
    streams, sink = Streams(), _Sink()
    streams.open(CALLER, "", sink, confined=True)
    streams.publish(_Judge(text, view), view, events)
    return sink.data


@settings(max_examples=PURE_CASES)
@given(rules, variants, requests)
def test_no_call_list_error_or_event_tells_of_a_qube_outside(
    drawn: Drawn, chosen: tuple[str, ...], asked: Asked
) -> None:
    hold(drawn, chosen, asked)


def hold(drawn: Drawn, chosen: tuple[str, ...], asked: Asked) -> None:
    """One case; AssertionError where anything is told."""
    text = policy_text(drawn)
    one, other, hidden = pair(drawn, chosen)
    for words in asked:
        frame = frame_of(drawn, *words)
        first, second = outcome(one, text, frame), outcome(other, text, frame)
        assert first == second, (frame, text, hidden)
        # The netvm of a visible qube is a value of that qube.
        clean(first, hidden, frame, NETVM.encode() if OTHERS[0] not in hidden else b"")
    shown = [e for name in _NAMES if name not in hidden for e in about(name)]
    everything = [e for name in _NAMES for e in about(name)]
    first = told(one, text, everything)
    visible = [e for e in shown if not {e.subject, *(v for _, v in e.pairs)} & hidden]
    assert first == told(other, text, visible), (text, hidden)
    clean(first, hidden)
    assert first.startswith(CONNECTION_ESTABLISHED)


# ---- the real way of a request, with services behind it that name names


class _Peer:
    def __init__(self) -> None:
        self.data = b""
        self.on_gone: Callable[[], None] | None = None
        self.done = asyncio.Event()

    def reply(self, data: bytes) -> None:
        self.data += data
        self.done.set()

    def drop(self) -> None:
        self.done.set()

    def push(self, data: bytes) -> None:
        self.data += data

    def end(self, data: bytes = b"") -> None:
        self.reply(data)

    def begin_stream(self) -> None:
        self.done.set()


class _Talkative:
    """A channel to services that refuse everything and tell who is to blame."""

    async def call_with_header(self, method: str, *_: Any, **__: Any) -> Any:
        raise BusError(
            "FAILED_PRECONDITION", "QUBE_IN_USE", f"{method}: used by {' '.join(_NAMES)}"
        )

    async def call(self, method: str, *_: Any, **__: Any) -> Any:
        await self.call_with_header(method)


class _Served:
    """The Admin API over one system, without sockets."""

    def __init__(self, view: View, text: str, directory: Path) -> None:
        self.replica = FakeReplica(view)
        context = SimpleNamespace(
            replica=lambda with_hidden: self.replica,
            channel=lambda service: _Talkative(),
            log=logging.getLogger("test.policy"),
        )
        judge = _Judge(text, view)
        backend = Backend(context)  # type: ignore[arg-type]
        self.api = AdminApi(backend, Actions(backend, judge, PausedList(directory / "p")), judge)
        callers = SimpleNamespace(qube=lambda name: view.by_uuid(name.removeprefix(PREFIX)))
        gone = SimpleNamespace(records={})
        self.api.confine(callers, judge, gone)  # type: ignore[arg-type]

    async def ask(self, frame: bytes) -> bytes:
        peer = _Peer()
        self.api.serve(PREFIX + UUIDS[CALLER], frame, peer)  # type: ignore[arg-type]
        await asyncio.wait_for(peer.done.wait(), 10)
        return peer.data


@settings(max_examples=SERVED_CASES)
@given(rules, variants, requests)
def test_nor_does_the_whole_way_of_a_request(
    drawn: Drawn, chosen: tuple[str, ...], asked: Asked
) -> None:
    hold_served(drawn, chosen, asked)


def hold_served(drawn: Drawn, chosen: tuple[str, ...], asked: Asked) -> None:
    """One case through the service; AssertionError where anything is told."""
    text = policy_text(drawn)
    one, other, hidden = pair(drawn, chosen)
    logging.getLogger("test.policy").setLevel(logging.CRITICAL)

    async def both() -> None:
        with tempfile.TemporaryDirectory() as directory:
            served = [_Served(view, text, Path(directory)) for view in (one, other)]
            for words in asked:
                frame = frame_of(drawn, *words)
                first, second = [await s.ask(frame) for s in served]
                assert first == second, (frame, text, hidden)
                clean(first, hidden, frame, NETVM.encode() if OTHERS[0] not in hidden else b"")
            for stream in (b"admin.Events+ x name dom0\0", b"bulkhead.op.Watch+ x name dom0\0"):
                first, second = [await s.ask(stream) for s in served]
                assert first == second and first in (b"", CONNECTION_ESTABLISHED)
            for s in served:
                await s.api.stop()

    asyncio.run(both())


# ---- the proof proves something


def test_the_drawn_policies_allow_enough_to_be_a_proof() -> None:
    """A policy as the manual gives it: calls answered, lists and events not empty."""
    drawn: Drawn = [
        (LIST, "*", CALLER, "@adminvm", "allow target=dom0"),
        (LIST, "*", CALLER, "@tag:created-by-mgmt-caller", "allow target=dom0"),
        (EVENTS, "*", CALLER, "@adminvm", "allow target=dom0"),
        (EVENTS, "*", CALLER, "@tag:created-by-mgmt-caller", "allow target=dom0"),
        ("bulkhead.op.List", "*", CALLER, "@adminvm", "allow target=dom0"),
    ]
    text = policy_text(drawn)
    view, _, hidden = pair(drawn, PLAIN)
    tagged = {n for n in _NAMES if "created-by-mgmt-caller" in _qube(n, "plain").tags}
    assert tagged and hidden == set(_NAMES) - tagged
    listed = outcome(view, text, b"admin.vm.List+ dom0 name dom0\0")
    assert {line.split()[0] for line in listed[2:].decode().splitlines()} == {"dom0", *tagged}
    operations = outcome(view, text, b"bulkhead.op.List+ dom0 name dom0\0")
    assert operations.count(b'"id"') == len(_NAMES)  # its own, on whatever qube
    clean(operations, hidden)
    for name in _NAMES:
        data = told(view, text, about(name))
        assert (name.encode() in data) is (name in tagged), name


def _existence_first(view: View, judge: Any, caller: Qube, request: Any) -> Any:
    """The gate as it would be if the target were looked up before policy is asked."""
    designate(view, request.untrusted_dest)
    return policy_filter.gate(view, judge, caller, request)


Hold = Callable[[Drawn, tuple[str, ...], Asked], None]


def test_positions_which_count_the_events_of_all_are_not_given() -> None:
    text = "* * * * allow target=dom0\n"
    assert outcome(system(PLAIN), text, b"bulkhead.Events+ dom0 name dom0\0") == b""
    assert outcome(system(PLAIN), text, b"admin.Events+ dom0 name dom0\0") != b""


def test_an_event_of_an_earlier_qube_of_the_name_is_not_given() -> None:
    text = f"{EVENTS} * {CALLER} {OTHERS[0]} allow target=dom0\n"
    for uuid, seen in ((UUIDS[OTHERS[0]], True), (UUIDS[OTHERS[1]], False)):
        data = told(system(PLAIN), text, [WireEvent(OTHERS[0], "domain-start", (), uuid)])
        assert (OTHERS[0].encode() in data) is seen


# A check that is taken away: where, its name, what stands there instead, which proof fails.
LEAKS: dict[str, tuple[object, str, object, Hold]] = {
    "a qube named in argument or payload": (
        policy_filter, "references", lambda request, **more: (), hold
    ),
    "operations as they are": (
        reads, "shown_operation", lambda view, policy, request, operation, record: record, hold
    ),
    "every qube is listed": (reads, "may_list", lambda policy, source, target: True, hold),
    "every event is delivered": (
        policy_filter, "may_see_event", lambda policy, view, source, event: True, hold
    ),
    "sentences in events": (policy_filter, "_SENTENCES", frozenset(), hold),
    "other qubes in events": (policy_filter, "_OTHER_QUBE", frozenset(), hold),
    "existence before policy": (answer_module, "gate", _existence_first, hold),
    "messages with their details": (
        answer_module, "message_for", lambda reason, message, *, restricted: message, hold_served
    ),
}  # fmt: skip


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_would_be_found(leak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof fails as soon as one of the checks that it proves is taken away."""
    module, name, replacement, proof = LEAKS[leak]
    monkeypatch.setattr(module, name, replacement)
    search = settings(
        max_examples=SEARCHED_CASES, phases=[Phases.generate], database=None,
        report_multiple_bugs=False,
    )(given(rules, variants, requests)(proof))  # fmt: skip
    with pytest.raises(AssertionError):
        search()
