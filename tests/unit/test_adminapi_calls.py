"""The call table against the names of release 4.4, and every reason against a class."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

import services
from bulkhead.bus.errors import REASONS as BUS_REASONS
from bulkhead.model.refusal import REASONS as MODEL_REASONS
from services.adminapi import reference
from services.adminapi.core import calls
from services.adminapi.core.exceptions import CLASSES
from services.adminapi.core.reads import READS
from services.adminapi.core.reasons import REASONS
from services.adminapi.core.writes import WRITES

METHODS = Path(__file__).parents[1] / "golden" / "admin_api" / "methods.txt"
_SCOPES = {"G": "global", "L": "local", "-": ""}
# docs/deviations.md: what has another rule here than in 4.4, on purpose.
_DEVIATING = {"admin.vm.notes.Set": ("V", "-", "?")}


def _golden() -> list[list[str]]:
    lines = METHODS.read_text().splitlines()
    return [line.split() for line in lines if not line.startswith("#")]


def test_every_method_of_the_release_is_here_with_its_rules() -> None:
    table = {call.name: call for call in calls.all_calls()}
    for name, dest, arg, payload, scope, effect in _golden():
        call = table[name]
        wanted = _DEVIATING.get(name, (dest, arg, payload))
        assert (call.dest, call.arg, call.payload) == wanted, name
        assert call.scope == _SCOPES[scope], name
        if effect != "-":
            assert call.effect == effect, name


def test_nothing_is_here_that_the_release_does_not_have_except_our_own_prefix() -> None:
    golden = {row[0] for row in _golden()}
    for call in calls.all_calls():
        assert call.name in golden or call.name.startswith("bulkhead."), call.name


def test_a_name_is_known_on_its_own_socket_only() -> None:
    assert calls.find("admin", "internal.GetSystemInfo") is None
    assert calls.find("internal", "admin.vm.List") is None
    assert calls.find("admin", "admin.vm.volume.Import") is None
    assert calls.find("misc", "qubes.NotifyUpdates") is not None
    for name in calls.NEVER_SERVED:
        assert all(calls.find(socket, name) is None for socket in calls.CALLS)


def test_reads_and_writes_are_named_by_the_table_and_agree_with_its_effect() -> None:
    handlers = {call.handler: call for call in calls.all_calls()}
    assert not READS.keys() & WRITES.keys()
    for name in (*READS, *WRITES):
        assert name in handlers
    for name in WRITES:
        assert handlers[name].effect == "rwx", name


def _service_tables() -> list[tuple[str, dict[str, object]]]:
    tables: list[tuple[str, dict[str, object]]] = []
    for module in pkgutil.iter_modules(services.__path__):
        path = f"services.{module.name}.core.reasons"
        if importlib.util.find_spec(f"services.{module.name}.core") and importlib.util.find_spec(
            path
        ):
            tables.append((path, importlib.import_module(path).REASONS))
    return tables


@pytest.mark.parametrize(
    ("where", "reasons"),
    [("bulkhead.model", MODEL_REASONS), ("bulkhead.bus", BUS_REASONS), *_service_tables()],
)
def test_every_reason_has_an_exception_class(where: str, reasons: dict[str, object]) -> None:
    assert sorted(reasons.keys() - CLASSES.keys()) == []


def test_no_class_is_mapped_for_a_reason_that_nobody_has() -> None:
    known = set(MODEL_REASONS) | set(BUS_REASONS)
    for _, reasons in _service_tables():
        known |= reasons.keys()
    assert sorted(CLASSES.keys() - known) == []


def test_own_reasons_are_nobody_elses() -> None:
    assert not REASONS.keys() & (MODEL_REASONS.keys() | BUS_REASONS.keys())


def test_the_reference_page_is_up_to_date() -> None:
    page = METHODS.parents[3] / "docs" / "admin-api.md"
    assert page.read_text() == reference.page(), (
        "run: python -m services.adminapi.reference > docs/admin-api.md"
    )
