"""Decisions about preloaded disposables, from the view alone.

Owns how many there are to be, which are ready, outdated or left over, and which news ask
for more or for fewer. Must not begin operations, read clocks or files. Invariants: what a
requester has is never left over; what was started ahead and is not ready is never ready.

The marks, all features: the template's "preload-dispvm" lists the names; on a disposable
"preload-dispvm-in-progress" is "1" from its creation until it waits, "" while it waits,
the requester's key while it is handed out, and gone when it is used.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

from bulkhead.model.evaluate import evaluate, power_state, template_for_dispvms, truthy
from bulkhead.model.plan.features import PRELOAD_LIST, preload_maximum
from bulkhead.model.properties import has_property, rows_for
from bulkhead.model.records import OperationState, Phase, Qube, WireEvent
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View

LIST = PRELOAD_LIST
IN_PROGRESS = "preload-dispvm-in-progress"
COMPLETED = "preload-dispvm-completed"
MAXIMUM = "preload-dispvm-max"
DELAY = "preload-dispvm-delay"
THRESHOLD = "preload-dispvm-threshold"
INTERNAL = "internal"

DEFAULT_DELAY_S = 3.0
GAP_DELAY_S = 5
SHUTDOWN_DELAY_S = 4
PROPERTY_DELAY_S = 30

RUNNING_SERVICE = "qubes.WaitForRunningSystem"
SESSION_SERVICE = "qubes.WaitForSession"

MIB = 1 << 20

# Differences that do not make a preloaded disposable unlike its template.
IGNORED = frozenset(
    {
        "autostart",
        "backup_timestamp",
        "default_dispvm",
        "dispid",
        "gateway",
        "gateway6",
        "icon",
        "include_in_backups",
        "installed_by_rpm",
        "ip",
        "ip6",
        "klass",
        "name",
        "qid",
        "start_time",
        "stubdom_uuid",
        "stubdom_xid",
        "template",
        "template_for_dispvms",
        "updateable",
        "uuid",
        "visible_gateway",
        "visible_gateway6",
        "visible_ip",
        "visible_ip6",
        "xid",
    }
)
# Ends of operations after which a qube's volumes are not what they were.
_COMMITS = frozenset({"STOPPED", "IMPORT", "REVERT", "CLEAR", "CLONE_VOLUME"})


# ---- how many


def maximum(view: View, template: Qube) -> int:
    """How many disposables of the template are to wait."""
    if template.hidden or not template_for_dispvms(template):
        return 0
    return preload_maximum(view, template)


def listed(view: View, template: Qube) -> tuple[Qube, ...]:
    """The preloaded disposables of the template, in the order they are handed out."""
    names = template.features.get(LIST, "").split()
    found = (view.qube(name) for name in names)
    return tuple(q for q in found if q is not None and q.klass == "DispVM")


def vacancy(view: View, template: Qube) -> bool:
    """True when another one may be made."""
    return len(listed(view, template)) < maximum(view, template)


def excess(view: View, template: Qube) -> tuple[Qube, ...]:
    """Those beyond the maximum."""
    return listed(view, template)[maximum(view, template) :]


def delay_of(view: View, template: Qube) -> float:
    """Seconds from a use to its replacement; negative = only when none is left."""
    for holder in (template, view.adminvm):
        text = holder.features.get(DELAY)
        if text is not None:
            try:
                seconds = float(text or "0")
            except ValueError:  # an old file's; nobody can set such a value
                continue
            if math.isfinite(seconds):
                return seconds
    return DEFAULT_DELAY_S


def refills(view: View, template: Qube) -> bool:
    """True when a place that became free is filled: not with a negative delay while some
    are left."""
    return not (delay_of(view, template) < 0 and listed(view, template))


@dataclass(frozen=True, slots=True)
class Share:
    """want: free places; can: as many of them as memory allows."""

    want: int
    can: int


def share(view: View, template: Qube, available: int | None) -> Share:
    """What to make now. available: bytes of host memory; None = not known, no limit."""
    want = max(0, maximum(view, template) - len(listed(view, template)))
    if available is None:
        return Share(want, want)
    text = view.adminvm.features.get(THRESHOLD, "")
    spare = max(0, available - (int(text) if text.isdecimal() else 0) * MIB)
    memory = evaluate(view, template, "memory")
    each = (memory if isinstance(memory, int) and memory > 0 else 1) * MIB
    return Share(want, min(want, spare // each))


def check_supported(view: View, template: Qube) -> None:
    """Refusal INVALID_VALUE where the guest cannot tell that it is ready."""
    for service in (RUNNING_SERVICE, SESSION_SERVICE):
        if not truthy(view, template, f"supported-rpc.{service}", "template"):
            raise Refusal(
                "INVALID_VALUE",
                f"Preloading needs the service {service} in '{template.name}'",
                qube=template.name,
            )


def templates(view: View) -> Iterator[Qube]:
    """Disposable templates of which some are to be preloaded, or are."""
    for qube in view.qubes():
        if qube.features.get(LIST) or (qube.klass == "AppVM" and maximum(view, qube)):
            yield qube


def settle_services(view: View, disposable: Qube) -> tuple[str, ...]:
    """Services of the guest that end when it is ready."""
    late = "supported-feature.late-gui-daemon"
    session = (
        evaluate(view, disposable, "guivm")
        and truthy(view, disposable, "gui", "template")
        and truthy(view, disposable, late, "template")
    )
    return (RUNNING_SERVICE, SESSION_SERVICE) if session else (RUNNING_SERVICE,)


# ---- what each of them is


class Fate(enum.Enum):
    """What becomes of a disposable that nobody works on."""

    ORDINARY = "in use, or never preloaded"
    READY = "waits to be handed out"
    LEFT_OVER = "to be removed"
    TAKEN = "somebody unpaused it"


def fate(view: View, qube: Qube, mine: Container[str] = ()) -> Fate:
    """What becomes of the disposable. mine: uuids that this process is making or handing
    out; they are READY or ORDINARY."""
    mark = qube.features.get(IN_PROGRESS)
    if qube.klass != "DispVM" or mark is None or qube.hidden:
        return Fate.ORDINARY
    if mark:
        return Fate.ORDINARY if qube.uuid in mine else Fate.LEFT_OVER
    template = view.qube(qube.properties.get("template", ""))
    if template is None:
        return Fate.LEFT_OVER if power_state(view, qube) == "Paused" else Fate.ORDINARY
    if qube.name not in template.features.get(LIST, "").split():
        return Fate.ORDINARY
    if qube.run.phase is Phase.HALTED:
        return Fate.LEFT_OVER
    if qube.run.phase is not Phase.UP:
        return Fate.ORDINARY
    # The power of a boot arrives after its record when a view is loaded anew.
    power = view.power(qube.uuid)
    if power is None or power.boot_id != qube.run.boot_id:
        return Fate.ORDINARY
    if power.power == "paused":
        return Fate.READY if qube.features.get(COMPLETED) else Fate.LEFT_OVER
    return Fate.TAKEN if power.power == "running" else Fate.ORDINARY


def handed_out(view: View, template: Qube, key: str) -> Qube | None:
    """The disposable that the request of that key has got."""
    for qube in view.referrers("template", template.name):
        if (
            not qube.hidden
            and qube.features.get(COMPLETED) == key
            and IN_PROGRESS not in (qube.features)
        ):
            return qube
    return None


def outdated(view: View, template: Qube, disposable: Qube) -> str:
    """Why the disposable is no longer what the template would give; "" when it is."""
    private, present = template.volume("private"), disposable.volume("private")
    if private is not None and present is not None and private.size != present.size:
        return "volumes_size"
    if _committed_since(view, template, disposable):
        return "volumes_outdated"
    different = sorted(
        row.name
        for row in rows_for(disposable.klass)
        if row.name not in IGNORED
        and has_property(template.klass, row.name)
        and evaluate(view, template, row.name) != evaluate(view, disposable, row.name)
    )
    return " ".join(different)


def _committed_since(view: View, template: Qube, disposable: Qube) -> bool:
    power = view.power(disposable.uuid)
    if power is None or power.start_time is None:
        return False
    base = view.qube(template.properties.get("template", ""))
    sources = {template.uuid} | ({base.uuid} if base is not None else set())
    return any(
        operation.kind in _COMMITS
        and operation.state is OperationState.SUCCEEDED
        and operation.finished > power.start_time
        and not sources.isdisjoint(operation.subjects)
        for operation in view.operations.values()
    )


# ---- which news matter


@dataclass(frozen=True, slots=True)
class Trigger:
    """Fill the template's list in delay seconds. refresh: remove outdated ones at once;
    anew: remove all of them at once."""

    template: str
    reason: str
    delay: float = 0
    refresh: bool = False
    anew: bool = False


def triggers(view: View, events: Iterable[WireEvent]) -> list[Trigger]:
    """What finished wire events ask for; the view holds what they tell."""
    found: list[Trigger] = []
    for event in events:
        found += _of_event(view, event)
    return [t for t in found if view.qube(t.template) is not None]


def _of_event(view: View, event: WireEvent) -> Iterator[Trigger]:
    kind, _, detail = event.name.partition(":")
    pairs = dict(event.pairs)
    default = view.properties.get("default_dispvm", "")
    if kind in ("domain-feature-set", "domain-feature-delete") and detail == MAXIMUM:
        if kind == "domain-feature-set" and pairs.get("value") == pairs.get("oldvalue"):
            return
        if event.subject == "dom0":
            if default:
                yield Trigger(default, "the global maximum changed")
        elif not (event.subject == default and MAXIMUM in view.adminvm.features):
            yield Trigger(event.subject, "the maximum changed")
    elif kind == "domain-shutdown":
        yield from _of_shutdown(view, event.subject)
    elif kind in ("property-set", "property-reset", "property-del") and event.subject:
        yield from _of_property(view, event.subject, kind, detail, pairs)
    elif event.name in ("property-set:default_dispvm", "property-reset:default_dispvm"):
        for name in dict.fromkeys((pairs.get("oldvalue", ""), default)):
            if name and _differs_from_global(view, name):
                yield Trigger(name, "the system's default_dispvm changed")


def _of_shutdown(view: View, name: str) -> Iterator[Trigger]:
    qube = view.qube(name)
    if qube is None:
        return
    based = [qube] if template_for_dispvms(qube) else []
    if qube.klass == "TemplateVM":
        based += [q for q in view.referrers("template", name) if template_for_dispvms(q)]
    for template in based:
        if maximum(view, template) or listed(view, template):
            yield Trigger(template.name, f"{name} was shut down", SHUTDOWN_DELAY_S, refresh=True)


def _of_property(
    view: View, subject: str, kind: str, name: str, pairs: Mapping[str, str]
) -> Iterator[Trigger]:
    qube = view.qube(subject)
    if qube is None or qube.klass not in ("AppVM", "StandaloneVM"):
        return
    if name == "template_for_dispvms":
        if template_for_dispvms(qube) and maximum(view, qube):
            yield Trigger(subject, "it became a disposable template")
        elif listed(view, qube):
            yield Trigger(subject, "it is no disposable template any more")
    elif name == "template" and listed(view, qube):
        if kind == "property-set" and pairs.get("newvalue") != pairs.get("oldvalue"):
            yield Trigger(subject, "its template changed", anew=True)
    elif name not in IGNORED and listed(view, qube):
        yield Trigger(subject, f"property {name} changed", PROPERTY_DELAY_S, refresh=True)


def _differs_from_global(view: View, name: str) -> bool:
    overall = view.adminvm.features.get(MAXIMUM)
    qube = view.qube(name)
    return qube is not None and overall is not None and qube.features.get(MAXIMUM) != overall
