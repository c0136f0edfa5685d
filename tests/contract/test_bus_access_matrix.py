"""Every method for every caller: allowed exactly as the options in the protos say.

The expectation is read from the descriptors here, not from the table that the dispatcher
uses.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from bulkhead.api import envelope_pb2, options_pb2
from bulkhead.bus import matrix
from bulkhead.bus.dispatch import Dispatcher, Work
from bulkhead.bus.frames import PREFIX
from bulkhead.bus.methods import CALLERS, METHODS, Lane
from tests.fakes.bus import Answers

ROOT = Path(__file__).parents[2]
ACCESS: Any = options_pb2.access


def _rows() -> list[tuple[str, str, set[str], Lane]]:
    rows = []
    for proto in sorted((ROOT / "proto/bulkhead/api").glob("*.proto")):
        module = importlib.import_module(f"bulkhead.api.{proto.stem}_pb2")
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                access = method.GetOptions().Extensions[ACCESS]
                lane = Lane.CONTROL if access.lane == options_pb2.LANE_CONTROL else Lane.WORK
                rows.append((service.full_name, method.full_name, set(access.callers), lane))
    return rows


ROWS = _rows()
EVERYBODY = sorted(CALLERS | {"stranger", "simhv", "root", ""})


def test_no_method_was_left_out() -> None:
    assert {row[1] for row in ROWS} == set(METHODS)
    assert len(ROWS) > 70


@pytest.mark.parametrize(("service", "method", "callers", "lane"), ROWS, ids=[r[1] for r in ROWS])
def test_exactly_the_listed_callers_get_in(
    service: str, method: str, callers: set[str], lane: Lane
) -> None:
    for caller in EVERYBODY:
        for used in Lane:
            sent: list[envelope_pb2.ReplyHeader] = []
            started: list[Work] = []

            def send(
                peer: object,
                header: bytes,
                body: bytes,
                sent: list[envelope_pb2.ReplyHeader] = sent,
            ) -> None:
                sent.append(envelope_pb2.ReplyHeader.FromString(header))

            handlers = Answers(service)
            dispatcher = Dispatcher("x", {service: handlers}, send=send, start=started.append)
            header = envelope_pb2.RequestHeader(request_id=bytes(16), method=method)
            parts = [PREFIX, header.SerializeToString(), b""]
            dispatcher.receive(used, caller, None, parts)
            if caller in callers and used is lane:
                assert [w.method.full_name for w in started] == [method] and not sent
            else:
                assert not started and not handlers.calls
                (reply,) = sent
                expected = "WRONG_LANE" if caller in callers else "CALLER_NOT_ALLOWED"
                assert reply.status.reason == expected


def test_callers_only_look_down_the_order_of_calls() -> None:
    """Participants are never called by their peers; only facts go to the registry."""
    for _, method, callers, _ in ROWS:
        service = method.split(".")[2]
        if service in ("Storage", "Domains", "Firewall"):
            assert not callers & {"storage", "domains", "firewall", "hostd", "registry"}, method
        if service == "Hostd":
            assert callers <= {"domains", "storage", "firewall", "lifecycle", "operator"}, method
        if service != "Control":
            assert "registry" not in callers and "hostd" not in callers, method


def test_the_operator_gets_only_what_the_design_lists() -> None:
    """Health, status, drain, sweep, adopt, and reading; nothing that changes a qube."""
    writes = {
        row[1].removeprefix("bulkhead.api.")
        for row in ROWS
        if "operator" in row[2] and METHODS[row[1]].effect.value != "read"
    }
    assert writes == {
        "Control.Cancel",
        "Control.Drain",
        "Control.Sweep",
        "Registry.ResolveForeignEdit",
    }


def test_the_page_in_the_docs_is_up_to_date() -> None:
    page = (ROOT / "docs/access-matrix.md").read_text()
    assert page == matrix.render(), "run: python -m bulkhead.bus.matrix > docs/access-matrix.md"
