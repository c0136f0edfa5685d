"""Payloads, volume and statistics texts, and what guests may bring about."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.model import specs
from bulkhead.model.records import Phase, Pool, PoolFact, QubePut, Run, Volume
from bulkhead.model.refusal import Refusal
from services.adminapi.core import payloads, requests, stats, volumes
from services.adminapi.core.exceptions import class_of, message_for
from tests.fakes.adminapi import GIB, app, start_view, template


def reason(function: object, *arguments: object, **more: object) -> str:
    assert callable(function)
    with pytest.raises(Refusal) as caught:
        result = function(*arguments, **more)
        list(result)
    return caught.value.reason


# ---- payloads


def test_create() -> None:
    text = payloads.parse_create(b"label=red name=work", pools_allowed=False)
    assert text == payloads.CreateText("work", "red")
    text = payloads.parse_create(b"name=w label=red pool:root=a pool:private=b", pools_allowed=True)
    assert text.pools == {"root": "a", "private": "b"}
    text = payloads.parse_create(
        b"name=w class=StandaloneVM pool=p", pools_allowed=True, clone=True
    )
    assert (text.klass, text.pool, text.label) == ("StandaloneVM", "p", "")


@pytest.mark.parametrize(
    ("payload", "wanted"),
    [
        (b"", "PROTOCOL"),
        (b"name=w", "PROTOCOL"),
        (b"name=w label=red ", "PROTOCOL"),
        (b"name=w label=red x=1", "PROTOCOL"),
        (b"name=w name=w label=red", "PROTOCOL"),
        (b"name=w label=red pool=a pool:root=b", "PROTOCOL"),
        (b"name=w label=red pool:root=a pool:root=b", "PROTOCOL"),
        (b"name=w label=red pool:x=a", "PROTOCOL"),
        (b"name=w label=red pool=a/b", "POOL_NOT_FOUND"),
        (b"name=1 label=red", "INVALID_NAME"),
        (b"name=w label=7", "INVALID_LABEL"),
        ("name=ż label=red".encode(), "PROTOCOL"),
    ],
)
def test_create_refused(payload: bytes, wanted: str) -> None:
    assert reason(payloads.parse_create, payload, pools_allowed=True) == wanted


def test_pools_only_where_they_are_allowed() -> None:
    assert reason(payloads.parse_create, b"name=w label=red pool=a", pools_allowed=False) == (
        "PROTOCOL"
    )


@given(st.binary(max_size=200))
def test_payload_parsers_end_in_a_value_or_a_refusal(data: bytes) -> None:
    for parse in (
        lambda: payloads.parse_create(data, pools_allowed=True),
        lambda: payloads.parse_pool(data, "file", frozenset({"dir_path"})),
        lambda: payloads.parse_denied(data),
        lambda: payloads.parse_kernel(data),
        lambda: payloads.parse_import_size(data),
        lambda: list(requests.updates(start_view(), template(), data, 1, outdated=False)),
    ):
        try:
            parse()
        except Refusal as refusal:
            assert refusal.message


@pytest.mark.parametrize(
    ("arg", "wanted"),
    [("", (False, False)), ("wait", (False, True)), ("wait+force", (True, True))],
)
def test_shutdown_words(arg: str, wanted: tuple[bool, bool]) -> None:
    assert payloads.parse_shutdown(arg) == wanted


@pytest.mark.parametrize("arg", ["now", "force+force+x", "+force", "force+"])
def test_shutdown_words_refused(arg: str) -> None:
    assert reason(payloads.parse_shutdown, arg) == "PROTOCOL"


def test_kernel_files_are_absolute() -> None:
    assert payloads.parse_kernel(b"vmlinuz=/a\nmodules=/b\n") == {"vmlinuz": "/a", "modules": "/b"}
    assert reason(payloads.parse_kernel, b"vmlinuz=a\n") == "PROTOCOL"
    assert reason(payloads.parse_kernel, b"initramfs=/a\n") == "PROTOCOL"


# ---- volumes


def test_volume_info_of_what_storage_says_and_of_what_is_declared() -> None:
    pool = Pool("p", "file-reflink", {"ephemeral_volatile": "True"})
    volume = Volume("volatile", "p", "appvms/w/volatile", 5 * GIB, 1, rw=True)
    live = volumes.Live(6 * GIB, 4096, "/x", False)
    assert volumes.info(pool, volume, live) == (
        f"pool=p\nvid=appvms/w/volatile\nsize={6 * GIB}\nusage=4096\nrw=True\nsource=\npath=/x\n"
        "save_on_stop=False\nsnap_on_start=False\nrevisions_to_keep=1\nephemeral=True\n"
        "is_outdated=False\n"
    )
    declared = volumes.info(pool, replace(volume, save_on_stop=True), None)
    assert f"size={5 * GIB}\nusage=0\n" in declared
    assert "ephemeral=False\n" in declared and "is_outdated" not in declared


def test_pool_texts() -> None:
    pool = Pool("p", "file", {"dir_path": "/x"})
    fact = PoolFact("p", size=10, usage=3, usage_details={"data_usage": 3, "data_size": 10})
    assert volumes.pool_info(pool, {"revisions_to_keep": "1"}, fact) == (
        "dir_path=/x\ndriver=file\nname=p\nrevisions_to_keep=1\nsize=10\nusage=3\n"
    )
    assert volumes.usage_details(fact) == "data_size=10\ndata_usage=3\n"
    assert volumes.usage_details(None) == ""


def test_tokens_are_used_up_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes, "_TOKEN_LIMIT", 2)
    tokens = volumes.CopyTokens()
    source = volumes.CopySource("u", "private", "p", "v")
    for letter in "abc":
        tokens.add(letter * 32, source)
    assert tokens.take("a" * 32) is None
    assert tokens.take(" " + "b" * 32 + "\n") == source
    assert tokens.take("b" * 32) is None
    assert tokens.take("nonsense") is None


# ---- statistics


@pytest.mark.parametrize(
    ("interval", "wanted"), [(None, 3), (5, 5), (0, 1), (-1, 1), (10**25, 3600)]
)
def test_statistics_neither_spin_nor_sleep_for_ever(interval: int | None, wanted: int) -> None:
    assert stats.pause_s(interval) == wanted


def test_usage_is_the_average_over_vcpus() -> None:
    first = stats.Sample(0, 1000, 2000, 0, 2)
    second = stats.Sample(10**9, 1000, 2000, 10**9, 2, 50, 10**9, 1)
    assert dict(stats.pairs(first, None))["cpu_usage"] == "0"
    found = dict(stats.pairs(second, replace(first, stubdom_cpu_time_ns=0)))
    assert found["cpu_usage"] == "50" and found["cpu_time"] == "1000"
    assert found["cpu_usage_internal"] == "100.0" and found["memory_with_swap_used"] == "1050"
    assert list(found)[7:] == [
        "swap_used",
        "cpu_time_internal",
        "cpu_usage_internal",
        "online_vcpus_internal",
    ]


# ---- guests


def wishes(asked: dict[str, str], **more: object) -> list[specs.Command]:
    view = start_view()
    qube = replace(template(), **more)  # type: ignore[arg-type]
    view.apply(QubePut(qube))
    checked = requests.check_features({f"/features-request/{k}": v for k, v in asked.items()})
    return list(requests.wishes(view, qube, checked))


def test_first_words_of_a_template() -> None:
    found = wishes({"qrexec": "1", "gui": "0", "os": "Linux", "os-eol": "2030-13-01", "x": "1"})
    assert found == [
        specs.SetFeature("tmpl", "qrexec", "1"),
        specs.SetFeature("tmpl", "gui", ""),
        specs.SetFeature("tmpl", "os", "Linux"),
    ]
    assert wishes({"qrexec": "1"}, features={"qrexec": ""}) == []


def test_supported_sets_replace_each_other() -> None:
    have = {"supported-service.old": "1", "supported-rpc.old": "1", "apparmor": "1"}
    found = wishes({"supported-service.new": "1"}, features=have)
    assert found == [
        specs.SetFeature("tmpl", "supported-service.new", "1"),
        specs.RemoveFeature("tmpl", "supported-service.old"),
    ]


def test_boot_modes_replace_each_other() -> None:
    have = {"boot-mode.kernelopts.old": "x"}
    wanted = {"boot-mode.kernelopts.new": "y", "boot-mode.active": "new"}
    assert wishes({**wanted, "boot-mode.appvm-default": "nosuch"}, features=have) == [
        specs.RemoveFeature("tmpl", "boot-mode.kernelopts.old"),
        specs.SetFeature("tmpl", "boot-mode.active", "new"),
        specs.SetFeature("tmpl", "boot-mode.kernelopts.new", "y"),
    ]
    assert wishes({**wanted, "boot-mode.kernelopts.default": "z"}) == []
    assert wishes({"boot-mode.name.a": "n", "boot-mode.name.b": "n"}) == []


def test_a_qube_with_a_template_reports_little() -> None:
    view = start_view()
    view.apply(QubePut(app()))
    found = list(requests.wishes(view, app(), {"qrexec": "1", "supported-rpc.x": "1"}))
    assert found == [specs.SetFeature("work", "supported-rpc.x", "1")]


@pytest.mark.parametrize("keys", [{"a b": "1"}, {"a": "\n"}, {"a": "ż"}, {"": "1"}])
def test_hostile_keys_refuse_the_whole_request(keys: dict[str, str]) -> None:
    assert reason(requests.check_features, keys) == "PROTOCOL"


def test_updates_of_a_qube_go_to_its_halted_template() -> None:
    view = start_view()
    view.apply(QubePut(app()))
    found = list(requests.updates(view, app(), b"2\n", 86400, outdated=False))
    assert found == [
        specs.SetFeature("tmpl", "updates-available", "1"),
        specs.SetFeature("tmpl", "last-updates-check", "1970-01-02 00:00:00"),
    ]
    assert list(requests.updates(view, app(), b"0", 0, outdated=False)) == []
    assert list(requests.updates(view, app(), b"2", 0, outdated=True)) == []
    view.apply(QubePut(replace(template(), run=Run(Phase.UP, "b"))))
    assert list(requests.updates(view, app(), b"2", 0, outdated=False)) == []


# ---- exceptions


def test_classes_by_call_and_messages_for_restricted_callers() -> None:
    assert class_of("NOT_DISPOSABLE_TEMPLATE", "admin.vm.Create.DispVM") == "QubesValueError"
    assert class_of("NOT_DISPOSABLE_TEMPLATE", "admin.vm.CreateDisposable") == "QubesException"
    assert class_of("NEVER_HEARD_OF") == "QubesException"
    assert message_for("QUBE_IN_USE", "used by secret", restricted=False) == "used by secret"
    for row in ("QUBE_IN_USE", "NO_SPACE", "NEVER_HEARD_OF"):
        assert "secret" not in message_for(row, "used by secret", restricted=True)
