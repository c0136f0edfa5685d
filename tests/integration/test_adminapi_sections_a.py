"""Properties, features, tags, labels, firewall and notes, call by call.

Owns what every call answers, written from the documented interface: classes and bodies.
Must not know how the services do it. Invariant: one instance, one order of rows.
"""
# ruff: noqa: E501 - a table reads better one call a line

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clients.admin import exceptions, wire
from tests.instance import exchange, parse
from tests.integration.adminapi_world import Listener, started

Want = str | tuple[str, str | None] | None
Row = tuple[str, str, str, str, Want]


def rows() -> Iterator[Row]:
    """Method, destination, argument, payload, and what it answers; None is any refusal."""
    G, S, R = "admin.vm.property.Get", "admin.vm.property.Set", "admin.vm.property.Reset"
    AG, AS, AR = "admin.property.Get", "admin.property.Set", "admin.property.Reset"
    F = "admin.vm.feature."
    T = "admin.vm.tag."
    L = "admin.label."
    W = "admin.vm.firewall."
    N = "admin.vm.notes."
    V = "QubesValueError"
    P = "QubesPropertyValueError"
    X = "ProtocolError"

    def ok(b: str | None = None) -> tuple[str, str | None]:
        return ("ok", b)

    C = "admin.vm.Create.AppVM"
    for n in ("work", "net", "net2", "dvm"):
        yield (C, "dom0", "tmpl", f"name={n} label=red", ok(""))
    table1: list[tuple[str, str, str, Want]] = [
        ("work", "memory", "500", ok()),
        ("work", "memory", "500", ok()),
        ("work", "memory", "0", P),
        ("work", "memory", "-1", P),
        ("work", "memory", "abc", V),
        ("work", "memory", " 12 ", ok()),
        ("work", "memory", "1_000", ok()),
        ("work", "memory", "", V),
        ("work", "memory", "0x10", V),
        ("work", "memory", "5.0", V),
        ("work", "memory", "9" * 25, ok()),
        ("work", "memory", "9" * 5000, V),
        ("work", "memory", "+5", ok()),
        ("work", "stubdom_mem", "9" * 25, ok()),
        ("work", "backup_timestamp", "-1", ok()),
        ("work", "maxmem", "0", ok()),
        ("work", "maxmem", "-1", P),
        ("work", "vcpus", "0", P),
        ("work", "vcpus", "2", ok()),
        ("work", "debug", "", V),
        ("work", "debug", "YES", ok()),
        ("work", "debug", "2", V),
        ("work", "debug", "off", ok()),
        ("work", "label", "2", ok()),
        ("work", "label", " +3 ", ok()),
        ("work", "label", "label-3", ok()),
        ("work", "label", "", "QubesLabelNotFoundError"),
        ("work", "label", "label-x", "QubesLabelNotFoundError"),
        ("work", "label", "r\xe9d", V),
        ("work", "label", "nolabel", "QubesLabelNotFoundError"),
        ("work", "label", "99", "QubesLabelNotFoundError"),
        ("work", "netvm", "net", V),
        ("net", "provides_network", "True", ok()),
        ("net2", "provides_network", "True", ok()),
        ("work", "netvm", "net", ok()),
        ("net", "netvm", "net2", ok()),
        ("net2", "netvm", "net", V),
        ("net", "netvm", "net", V),
        ("net", "provides_network", "False", V),
        ("work", "netvm", "nosuch", P),
        ("work", "netvm", "a/b", V),
        ("work", "netvm", "", ok()),
        ("work", "netvm", "t\xe9", V),
        ("work", "default_dispvm", "net", P),
        ("dvm", "template_for_dispvms", "True", ok()),
        ("work", "default_dispvm", "dvm", ok()),
        ("work", "default_dispvm", "", ok()),
        ("work", "management_dispvm", "net", P),
        ("work", "management_dispvm", "dvm", ok()),
        ("work", "kernelopts", "x" * 512, ok()),
        ("work", "kernelopts", "x" * 513, V + "|" + P),
        ("work", "kernel", "nosuch", P),
        ("work", "kernel", "a/b", P + "|" + V),
        ("work", "kernel", "", ok()),
        ("work", "template", "", P),
        ("work", "template", "net", P),
        ("work", "template", "tmpl", ok()),
        ("work", "name", "x", None),
        ("work", "qid", "3", None),
        ("work", "klass", "x", P),
        ("work", "icon", "x", P),
        ("work", "xid", "1", P),
        ("work", "xid", "x", V),
        ("work", "visible_ip6", "x", P),
        ("work", "gateway6", "1.2.3.4", P),
        ("work", "dns", "x", P),
        ("work", "updateable", "x", V),
        ("work", "uuid", "x", V),
        ("work", "nosuch", "x", "QubesNoSuchPropertyError"),
        ("work", "ip", "10.1.2.3", ok()),
        ("work", "ip", "abc", V),
        ("work", "ip6", "fd00::1", ok()),
        ("work", "ip6", "1.2.3.4", V),
        ("work", "mac", "00:16:3E:00:00:01", ok()),
        ("work", "mac", "zz", None),
        ("work", "virt_mode", "PV", ok()),
        ("work", "virt_mode", "foo", P + "|" + V),
        ("work", "virt_mode", "a\x0b", P),
        ("work", "kernelopts", "a\x0b", None),
        ("work", "kernelopts", "a\x00", V),
        ("work", "guivm", "net", ok()),
        ("work", "audiovm", "", ok()),
        ("work", "default_user", "a b", P + "|" + V),
        ("work", "default_user", "bob", ok()),
        ("work", "qrexec_timeout", "0", P),
        ("work", "shutdown_timeout", "5", ok()),
        ("work", "stubdom_mem", "0", P),
        ("work", "backup_timestamp", "123", ok()),
        ("work", "devices_denied", "u080650b******", ok()),
        ("work", "devices_denied", "zz", P + "|" + V),
        ("work", "keyboard_layout", "de++", ok()),
        ("work", "keyboard_layout", "de", P + "|" + V),
        ("work", "bootmode", "x", ok()),
        ("tmpl", "appvm_default_bootmode", "x", ok()),
        ("dom0", "netvm", "net", "QubesNoSuchPropertyError"),
        ("work", "include_in_backups", "maybe", V),
        ("work", "autostart", "True", ok()),
    ]
    for q, p, v, e in table1:
        yield (S, q, p, v, e)
    table2: list[tuple[str, Want]] = [
        ("memory", ok()),
        ("nosuch", "QubesNoSuchPropertyError"),
        ("name", None),
        ("template", V),
        ("label", None),
        ("kernel", ok()),
        ("ip", ok()),
        ("mac", ok()),
        ("netvm", ok()),
    ]
    for p, e in table2:
        yield (R, "work", p, "", e)
    for p, e in [
        ("memory", "default=True type=int 400"),
        ("ip", "default=True type=str "),
        ("mac", "default=True type=str 00:16:3e:5e:6c:00"),
        ("icon", "default=True type=str appvm-yellow"),
        ("debug", "default=False type=bool False"),
        ("label", "default=False type=label yellow"),
        ("guivm", "default=False type=vm net"),
        ("virt_mode", "default=False type=str pv"),
    ]:
        yield (G, "work", p, "", ok(e))
    table3: list[tuple[str, str, Want]] = [
        ("clockvm", "net", ok()),
        ("clockvm", "", ok()),
        ("clockvm", "nosuch", P),
        ("updatevm", "net", ok()),
        ("default_netvm", "net2", P),
        ("default_netvm", "", ok()),
        ("default_dispvm", "work", P),
        ("default_dispvm", "dvm", ok()),
        ("default_netvm", "dom0", ok()),
        ("default_netvm", "tmpl", ok()),
        ("default_netvm", "", ok()),
        ("default_kernel", "nosuch", P),
        ("default_kernel", "a/b", P),
        ("default_kernel", "", ok()),
        ("default_kernel", "6.12.1-lab", ok()),
        ("default_template", "work", P),
        ("default_template", "", ok()),
        ("default_template", "tmpl", ok()),
        ("default_pool", "nosuch", P),
        ("default_pool", "varlibqubes", ok()),
        ("default_pool", "", P),
        ("default_qrexec_timeout", "0", ok()),
        ("default_qrexec_timeout", "-1", ok()),
        ("default_shutdown_timeout", "9" * 25, ok()),
        ("stats_interval", "0", ok()),
        ("default_qrexec_timeout", "61", ok()),
        ("stats_interval", "5", ok()),
        ("stats_interval", "x", V),
        ("maxmem", "5", P),
        ("check_updates_vm", "no", ok()),
        ("check_updates_vm", "", V),
        ("nosuch", "1", "QubesNoSuchPropertyError"),
        ("default_guivm", "net", ok()),
        ("default_audiovm", "", ok()),
    ]
    for p, v, e in table3:
        yield (AS, "dom0", p, v, e)
    table4: list[tuple[str, Want]] = [
        ("clockvm", ok()),
        ("nosuch", "QubesNoSuchPropertyError"),
        ("default_guivm", ok()),
        ("stats_interval", ok()),
        ("default_shutdown_timeout", ok()),
        ("default_kernel", None),
        ("maxmem", ok()),
    ]
    for p, e in table4:
        yield (AR, "dom0", p, "", e)
    yield (AS, "work", "clockvm", "net", X)
    yield (AG, "dom0", "", "", X)
    yield (G, "work", "nosuch", "", "QubesNoSuchPropertyError")
    yield (G, "tmpl", "template", "", "QubesNoSuchPropertyError")
    table5: list[tuple[str, str, str, str, Want]] = [
        ("Set", "work", "a", "1", ok()),
        ("Get", "work", "a", "", ok("1")),
        ("Get", "work", "b", "", "QubesFeatureNotFoundError"),
        ("Set", "work", "a", "", ok()),
        ("Get", "work", "a", "", ok("")),
        ("Set", "work", "a/b", "1", X),
        ("Set", "work", "a", "\xe9", None),
        ("Set", "work", "a", "x\ny", X),
        ("Set", "tmpl", "t", "T", ok()),
        ("CheckWithTemplate", "work", "t", "", ok("T")),
        ("CheckWithNetvm", "work", "t", "", "QubesFeatureNotFoundError"),
        ("CheckWithAdminVM", "work", "t", "", "QubesFeatureNotFoundError"),
        ("Set", "dom0", "d", "D", ok()),
        ("CheckWithAdminVM", "work", "d", "", ok("D")),
        ("CheckWithTemplateAndAdminVM", "work", "d", "", ok("D")),
        ("CheckWithTemplateAndAdminVM", "work", "t", "", ok("T")),
        ("Set", "work", "service.", "1", V),
        ("Set", "work", "service." + "n" * 48, "1", ok()),
        ("Set", "work", "service." + "n" * 49, "1", V),
        ("Set", "work", "service..", "1", V),
        ("Set", "work", "vm-config.", "1", V),
        ("Set", "work", "vm-config.1a", "1", V),
        ("Set", "work", "vm-config.ab", "1", ok()),
        ("Set", "work", "preload-dispvm", "x", "PermissionDenied"),
        ("Set", "work", "deferred-netvm-original", "x", "PermissionDenied"),
        ("Remove", "work", "deferred-netvm-original", "", "PermissionDenied"),
        ("Set", "dvm", "preload-dispvm-max", "x", V),
        ("Remove", "work", "nope", "", "QubesFeatureNotFoundError"),
        ("Remove", "work", "a", "", ok()),
        ("Get", "work", "", "", X),
        ("Set", "work", "", "1", X),
        ("Remove", "work", "", "", X),
    ]
    for m, q, a, v, e in table5:
        yield (F + m, q, a, v, e)
    table6: list[tuple[str, str, str, Want]] = [
        ("Set", "work", "t1", ok()),
        ("Set", "work", "t1", ok()),
        ("Get", "work", "t1", ok("1")),
        ("Get", "work", "t2", ok("0")),
        ("Get", "work", "a.b", "QubesInvalidTagError"),
        ("Set", "work", "a.b", "QubesInvalidTagError"),
        ("Remove", "work", "t1", ok()),
        ("Remove", "work", "t1", "QubesTagNotFoundError"),
        ("Set", "work", "", "ProtocolError"),
        ("Set", "work", "created-by-net", ok()),
        ("Set", "work", "created-by-nosuch", None),
        ("Set", "dom0", "t", ok()),
        ("Remove", "work", "a.b", "QubesTagNotFoundError|QubesInvalidTagError"),
    ]
    for m, q, a, e in table6:
        yield (T + m, q, a, "", e)
    table7: list[tuple[str, str, str, Want]] = [
        ("Create", "cy", "0x00ffff", ok()),
        ("Get", "cy", "", ok("0x00ffff")),
        ("Index", "cy", "", ok("9")),
        ("Create", "cy", "0x00ffff", "QubesLabelInUseError"),
        ("Create", "12", "0x00ffff", "QubesInvalidLabelError"),
        ("Create", "a+b", "0x00ffff", "QubesInvalidLabelError"),
        ("Create", "bb", "red", "QubesInvalidLabelValueError"),
        ("Create", "bb", " 0x00fff0 ", ok()),
        ("Create", "bc", "", X),
        ("Index", "bb", "", ok("10")),
        ("Get", "9", "", ok("0x00ffff")),
        ("Get", "77", "", "QubesLabelNotFoundError"),
        ("Get", "no", "", "QubesLabelNotFoundError"),
        ("Get", "a+b", "", "QubesInvalidLabelError"),
        ("Remove", "red", "", X),
        ("Remove", "bb", "", ok()),
        ("Remove", "bb", "", "QubesLabelNotFoundError"),
        ("Remove", "a+b", "", "QubesInvalidLabelError"),
    ]
    for m, a, v, e in table7:
        yield (L + m, "dom0", a, v, e)
    yield (S, "work", "label", "cy", ok())
    yield (L + "Remove", "dom0", "cy", "", "QubesLabelInUseError")
    yield (S, "work", "label", "red", ok())
    yield (L + "Remove", "dom0", "9", "", ok())
    table8: list[tuple[str, Want, str | None]] = [
        ("action=accept", ok(), "action=accept\n"),
        (
            "action=drop dst4=1.2.3.4 proto=tcp dstports=80\n",
            ok(),
            "action=drop dst4=1.2.3.4/32 proto=tcp dstports=80-80\n",
        ),
        (
            "proto=udp action=accept dsthost=a.example dstports=53-54 comment=hi there",
            ok(),
            "action=accept dsthost=a.example proto=udp dstports=53-54 comment=hi there\n",
        ),
        (
            "action=accept expire=4000000000 dst6=fd00::1",
            ok(),
            "action=accept expire=4000000000 dst6=fd00::1/128\n",
        ),
        ("action=accept proto=icmp icmptype=8", ok(), "action=accept proto=icmp icmptype=8\n"),
        ("action=accept specialtarget=dns", ok(), "action=accept specialtarget=dns\n"),
        ("action=accept expire=1", ok(), ""),
        ("", X, None),
        ("\xe9", X, None),
        ("proto=tcp", None, None),
        ("action=accept  proto=tcp", None, None),
        ("action=accept dstports=80", None, None),
        ("action=foo", None, None),
    ]
    for p, e, g in table8:
        yield (W + "Set", "work", "", p, e)
        if g is not None:
            yield (W + "Get", "work", "", "", ok(g))
    yield (W + "Reload", "work", "", "", ok(""))
    yield (W + "Get", "dom0", "", "", X)
    yield (W + "Set", "work", "a", "action=drop", X)
    yield (W + "Reload", "dom0", "", "", X)
    table9: list[tuple[str, str, str, str, Want]] = [
        ("Set", "work", "", "caf\xe9\n\ttab\x01", ok("")),
        ("Get", "work", "", "", ok("caf\xe9\n\ttab_")),
        ("Set", "dom0", "", "x", X),
        ("Get", "dom0", "", "", X),
        ("Set", "work", "x", "x", X),
        ("Get", "work", "", "x", X),
    ]
    for m, q, a, v, e in table9:
        yield (N + m, q, a, v, e)


@pytest.mark.integration
def test_every_row() -> None:
    wrong = []
    with started() as (instance, _, _):
        for method, qube, argument, payload, want in rows():
            frame = f"{method}+{argument} dom0 name {qube}\0".encode() + payload.encode()
            reply = parse(exchange(instance.socket, frame))
            if want is None:
                good = reply.kind == "exc"
            elif isinstance(want, tuple):
                good = reply.kind == "ok" and want[1] in (None, reply.text)
            else:
                good = reply.kind == "exc" and reply.exception in want.split("|")
            if not good:
                wrong.append(f"{method}+{argument} {qube} {payload[:40]!r}: {want} -> {reply}")
    assert not wrong, "\n".join(wrong)


# One call each, and the events that it makes: subject, name, old and new value. "-" is the
# system; a key that is not there is not written.
SETS: list[tuple[str, str, str, str | None, list[str]]] = [
    ("", "work", "memory", " 0500 ", ["work pre-set:memory 400>500", "work set:memory 400>500"]),
    ("", "work", "memory", "500", ["work pre-set:memory 500>500", "work set:memory 500>500"]),
    ("", "work", "memory", None, [
        "work pre-reset:memory 500>", "work pre-del:memory 500>",
        "work reset:memory 500>", "work del:memory 500>",
    ]),
    ("", "work", "stubdom_mem", "64", [
        "work pre-set:stubdom_mem None>64", "work set:stubdom_mem None>64",
    ]),
    ("", "work", "label", "2", [
        "work pre-set:label red>orange", "work reset:icon", "work set:label red>orange",
    ]),
    ("QubesValueError", "work", "template", None, ["work pre-reset:template tmpl>"]),
    ("QubesPropertyValueError", "work", "kernel", "no", ["work pre-set:kernel 6.12.1-lab>no"]),
    ("QubesPropertyValueError", "work", "kernel", "a/b", []),
    ("QubesPropertyValueError", "work", "memory", "0", []),
    # A template's own users are told of a Set, and of nothing else.
    ("", "tmpl", "vcpus", "3", [
        "tmpl pre-set:vcpus 2>3", "dvm reset:vcpus", "net reset:vcpus", "work reset:vcpus",
        "tmpl set:vcpus 2>3",
    ]),
    ("", "tmpl", "vcpus", None, [
        "tmpl pre-reset:vcpus 3>", "tmpl pre-del:vcpus 3>", "tmpl reset:vcpus 3>", "tmpl del:vcpus 3>",
    ]),
    ("", "dvm", "vcpus", "1", ["dvm pre-set:vcpus 2>1", "dvm set:vcpus 2>1"]),
    # Addresses of a netvm.
    ("", "net", "ip6", "FD00::1", [
        "net pre-set:ip6 None>fd00::1", "net reset:gateway6", "net reset:visible_ip6",
        "net set:ip6 None>fd00::1",
    ]),
    ("", "net", "ip6", None, [
        "net pre-reset:ip6 fd00::1>", "net pre-del:ip6 fd00::1>", "net reset:ip6 fd00::1>",
        "net del:ip6 fd00::1>",
    ]),
    # The system.
    ("", "", "clockvm", "net", [
        "- pre-set:clockvm None>net", "net domain-feature-pre-set:service.clocksync",
        "net domain-feature-set:service.clocksync", "- set:clockvm None>net",
    ]),
    ("", "", "clockvm", None, [
        "- pre-reset:clockvm net>", "- pre-del:clockvm net>", "- reset:clockvm net>",
        "- del:clockvm net>",
    ]),
    # net uses the default itself.
    ("QubesPropertyValueError", "", "default_netvm", "net", []),
    ("", "net", "netvm", "", ["net pre-set:netvm None>None", "net set:netvm None>None"]),
    ("", "", "default_netvm", "net", [
        "- pre-set:default_netvm None>net",
        *(f"{name} pre-set:netvm None>net" for name in ("d1", "dvm", "work")),
        *(f"{name} {what}" for name in ("d1", "dvm", "work")
          for what in ("set:netvm None>net", "reset:netvm None>")),
        "- set:default_netvm None>net",
    ]),
    ("", "", "default_netvm", "net", [
        "- pre-set:default_netvm net>net",
        *(f"{name} pre-set:netvm net>net" for name in ("d1", "dvm", "work")),
        *(f"{name} reset:netvm net>" for name in ("d1", "dvm", "work")),
        "- set:default_netvm net>net",
    ]),
    ("", "", "default_netvm", None, [
        "- pre-reset:default_netvm net>", "- pre-del:default_netvm net>",
        "- reset:default_netvm net>", "- del:default_netvm net>",
    ]),
    ("", "", "default_template", None, [
        "- pre-reset:default_template tmpl>", "- pre-del:default_template tmpl>",
        "- reset:default_template tmpl>", "- del:default_template tmpl>",
    ]),
    ("", "", "default_template", "tmpl", [
        "- pre-set:default_template >tmpl", "- set:default_template >tmpl",
    ]),
    ("QubesValueError", "", "default_kernel", None, []),
    ("", "", "stats_interval", "-1", [
        "- pre-set:stats_interval 3>-1", "- set:stats_interval 3>-1",
    ]),
]  # fmt: skip


def _told(event: wire.Event) -> str:
    pairs = event.values
    text = f"{event.subject or '-'} {event.name.removeprefix('property-')}"
    if "oldvalue" in pairs or "newvalue" in pairs:
        text += f" {pairs.get('oldvalue', '')}>{pairs.get('newvalue', '')}"
    return text


@pytest.mark.integration
def test_what_property_changes_tell_and_leave() -> None:
    with started() as (instance, client, _):
        for name in ("work", "net", "dvm"):
            payload = f"name={name} label=red".encode()
            client.call("admin.vm.Create.AppVM", arg="tmpl", payload=payload)
        client.set("net", "provides_network", "True")
        client.set("dvm", "template_for_dispvms", "True")
        client.call("admin.vm.Create.DispVM", arg="dvm", payload=b"name=d1 label=red")
        everything, one = Listener(client), Listener(client, "work")
        wanted: list[str] = []
        told: list[wire.Event] = []
        own: list[wire.Event] = []
        for number, (refusal, qube, name, value, events) in enumerate(SETS):
            scope = "vm.property" if qube else "property"
            method = f"admin.{scope}.{'Reset' if value is None else 'Set'}"
            try:
                client.call(method, qube or "dom0", name, (value or "").encode())
                raised = ""
            except exceptions.QubesException as error:
                raised = type(error).__name__
            assert raised == refusal, (qube, name, value)
            for mark in ("dom0", "work"):
                client.call("admin.vm.tag.Set", mark, f"mark{number}")
            told += everything.until(f"domain-tag-add:mark{number}", "work")
            own += one.until(f"domain-tag-add:mark{number}")
            wanted += events
        assert [_told(e) for e in told if "tag-add" not in e.name] == wanted
        # The stream of one qube has its events alone.
        mine = [_told(e) for e in own if "tag-add" not in e.name]
        assert mine == [text for text in wanted if text.startswith("work ")]
        everything.close()
        one.close()
        # All of it, and what the host is, is there for the first reader after a start.
        client.set("work", "vcpus", "9" * 25)
        client.set("work", "kernelopts", "  a\r\nb\t ")
        client.set("", "default_netvm", "dom0")

        def everything_read() -> list[str]:
            return [
                client.text("admin.property.GetAll"),
                client.text("admin.vm.property.GetAll", "work"),
            ]

        before = everything_read()
        assert "\nmaxmem default=True type=int 16384\n" in before[0]
        instance.stop()
        instance.start()
        assert everything_read() == before
