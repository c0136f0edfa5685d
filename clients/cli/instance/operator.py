"""What the operator (uid 0, or the instance's own user) asks the services directly.

Owns the operator's bus calls and how their answers are printed. Must not change
anything but by ResolveForeignEdit and Sweep. Invariant: a service that does not answer
is a row that says so, not a failure of the whole command.
"""

from __future__ import annotations

import pwd
from collections.abc import Mapping, Sequence
from typing import Any

from bulkhead.api import control_pb2, registry_pb2
from bulkhead.bus.client import operator_call
from bulkhead.bus.errors import BusError
from bulkhead.config import SERVICES, Settings, SettingsError
from bulkhead.extensions import PREFIX as extension_prefix

Row = dict[str, Any]
TIMEOUT_S = 3.0
DUMP_TIMEOUT_S = 30.0


def health_of_all(settings: Settings, launcher: Mapping[str, object]) -> list[Row]:
    """One row a service, in start order, then extensions; rows of silent ones have ready
    False and a reason."""
    children = launcher.get("children")
    assert isinstance(children, dict)
    extensions = sorted(name for name in children if name.startswith(extension_prefix))
    return [
        health(settings, service, children[service])
        for service in (*SERVICES, *extensions)
        if service in children
    ]


def health(
    settings: Settings, service: str, child: Mapping[str, Any], timeout: float = TIMEOUT_S
) -> Row:
    """One service's row; ready False with a reason when it does not answer in time."""
    row: Row = {"service": service, "pid": child.get("pid"), "restarts": child["restarts"]}
    try:
        health = _ask_health(settings, service, timeout)
        row.update(
            user=_user(health.uid),
            ready=health.ready,
            reason=health.not_ready_reason,
            revision=health.revision,
            seq=health.seq,
            lag_s=round(health.lag_s, 3),
            uptime_s=round(health.uptime_s, 1),
            in_flight=health.in_flight,
            privileges=dict(sorted(health.privileges.items())),
            counters=dict(sorted(health.counters.items())),
        )
    except (BusError, SettingsError, OSError) as error:
        row.update(
            user="?",
            ready=False,
            reason=str(error),
            revision=0,
            seq=0,
            lag_s=0.0,
            uptime_s=0.0,
            in_flight=0,
            privileges={},
            counters={},
        )
    return row


def counters(settings: Settings, service: str) -> dict[str, int]:
    """A service's counters. BusError where it does not answer in time."""
    return dict(_ask_health(settings, service, TIMEOUT_S).counters)


def _ask_health(settings: Settings, service: str, timeout: float) -> control_pb2.HealthReply:
    return operator_call(
        settings,
        service,
        "bulkhead.api.Control.Health",
        control_pb2.HealthRequest(),
        control_pb2.HealthReply,
        timeout,
    )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def print_status(settings: Settings, rows: Sequence[Row]) -> None:
    """The table of `bulkhead status`."""
    print(
        f"root {settings.root}   hypervisor {settings.hypervisor}   "
        f"isolation {'on' if settings.isolated else 'OFF: all services share one user'}"
    )
    print(
        f"{'SERVICE':<20} {'PID':>7} {'USER':<20} {'STATE':<10} {'REVISION':>8} {'LAG':>7} "
        f"{'RESTARTS':>8}  PRIVILEGES"
    )
    for row in rows:
        state = "ready" if row["ready"] else "not ready"
        privileges = " ".join(f"{key}={value}" for key, value in row["privileges"].items())
        print(
            f"{row['service']:<20} {row['pid'] or '-':>7} {row['user']:<20} {state:<10} "
            f"{row['revision']:>8} {row['lag_s']:>6.2f}s {row['restarts']:>8}  {privileges}"
        )
        if row["reason"]:
            print(f"{'':20} {row['reason']}")


def history(settings: Settings, *, qube: str, limit: int) -> list[Row]:
    """Audit entries, newest first."""
    reply = operator_call(
        settings,
        "registry",
        "bulkhead.api.Registry.History",
        registry_pb2.HistoryRequest(limit=limit, qube=qube, reverse=True),
        registry_pb2.HistoryReply,
        DUMP_TIMEOUT_S,
    )
    return [
        {
            "revision": entry.revision,
            "caller": entry.caller,
            "source": entry.source,
            "method": entry.method,
            "time": entry.time,
            "before": entry.before,
            "after": entry.after,
            "result": entry.result,
            "hash": entry.hash.hex(),
        }
        for entry in reply.entries
    ]


def dump(settings: Settings) -> str:
    """The canonical dump, all pages."""
    pages = []
    page = 0
    while True:
        reply = operator_call(
            settings,
            "registry",
            "bulkhead.api.Registry.Dump",
            registry_pb2.DumpRequest(page=page),
            registry_pb2.DumpReply,
            DUMP_TIMEOUT_S,
        )
        pages.append(reply.canonical_json)
        if reply.last:
            return "".join(pages)
        page += 1


def resolve(settings: Settings, *, adopt: bool) -> int:
    """Adopt or discard a foreign edit; the new revision."""
    reply = operator_call(
        settings,
        "registry",
        "bulkhead.api.Registry.ResolveForeignEdit",
        registry_pb2.ResolveForeignEditRequest(adopt=adopt),
        registry_pb2.ResolveForeignEditReply,
        DUMP_TIMEOUT_S,
    )
    return int(reply.revision)


def store_status(settings: Settings) -> registry_pb2.StoreStatusReply:
    """What the registry says of its store."""
    return operator_call(
        settings,
        "registry",
        "bulkhead.api.Registry.StoreStatus",
        registry_pb2.StoreStatusRequest(),
        registry_pb2.StoreStatusReply,
        TIMEOUT_S,
    )


def sweep(settings: Settings) -> list[str]:
    """Findings of a comparison of all inventories with the records."""
    reply = operator_call(
        settings,
        "lifecycle",
        "bulkhead.api.Control.Sweep",
        control_pb2.SweepRequest(),
        control_pb2.SweepReply,
        60.0,
    )
    return list(reply.findings)
