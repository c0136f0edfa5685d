"""Decisions about disposables, from the view alone.

Owns who may be a disposable's template and which disposables are stale. Must not begin
operations. Invariant: a disposable that runs, or that an operation holds, is never stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bulkhead.model.evaluate import evaluate, is_leftover
from bulkhead.model.records import Qube, WireEvent
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View
from services.dispvm.core.preload import IN_PROGRESS


def disposable_template(view: View, name: str) -> Qube:
    """The qube of that name if disposables may be made from it; Refusal otherwise."""
    qube = view.qube(name)
    if qube is None:
        raise Refusal(
            "NOT_DISPOSABLE_TEMPLATE",
            f"there is no disposable template {name or '(none set)'}; set default_dispvm or "
            "name one",
            qube=name,
        )
    allowed = qube.klass in ("AppVM", "StandaloneVM") and evaluate(
        view, qube, "template_for_dispvms"
    )
    if not allowed:
        raise Refusal(
            "NOT_DISPOSABLE_TEMPLATE",
            f"{qube.name} is no disposable template; set its template_for_dispvms first",
            qube=qube.name,
        )
    return qube


def stale_after_boot(view: View) -> Iterator[Qube]:
    """Unnamed disposables that the host's last boot left behind: halted, held by nothing."""
    for qube in view.qubes():
        if is_leftover(view, qube):
            yield qube


def refused_to_start(view: View, events: Iterable[WireEvent]) -> Iterator[Qube]:
    """Unnamed disposables whose start was refused before it began; one that failed later
    is removed by its operation, and one made ahead by who made it."""
    for event in events:
        if event.name == "domain-start-failed":
            qube = view.qube(event.subject)
            if qube is not None and IN_PROGRESS not in qube.features and is_leftover(view, qube):
                yield qube
