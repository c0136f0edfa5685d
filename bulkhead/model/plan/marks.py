"""Features and tags as plain effects: stored, announced, nothing else.

Owns the store-and-announce of one feature or tag. Must not know what a feature or tag
means (plan.features, plan.tags). Invariant: a tag that is there is not added again, one
that is not there is not deleted; neither makes an event then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bulkhead.model import events
from bulkhead.model.plan.base import Draft
from bulkhead.model.records import Qube
from bulkhead.model.refusal import Refusal

Effect = Callable[[], None]


def announce_feature(draft: Draft, qube: Qube, name: str, value: str) -> None:
    """The pre-event of a feature's new value."""
    draft.emit(events.feature_set(qube, name, value, qube.features.get(name))[0])


def store_feature(
    draft: Draft, qube: Qube, name: str, value: str, caused: Effect | None = None
) -> None:
    """Keep the value, do what it causes, send the post-event."""
    qube = draft.qube(qube.uuid)
    post = events.feature_set(qube, name, value, qube.features.get(name))[-1]
    draft.put(replace(qube, features={**qube.features, name: value}))
    if caused is not None:
        caused()
    draft.emit(post)


def set_feature(
    draft: Draft, qube: Qube, name: str, value: str, caused: Effect | None = None
) -> None:
    """Set a feature, without any check."""
    qube = draft.qube(qube.uuid)
    announce_feature(draft, qube, name, value)
    store_feature(draft, qube, name, value, caused)


def delete_feature(draft: Draft, qube: Qube, name: str, caused: Effect | None = None) -> None:
    """Remove a feature. FEATURE_NOT_FOUND, after its pre-event, where it is not set."""
    qube = draft.qube(qube.uuid)
    pre, post = events.feature_delete(qube, name)
    draft.emit(pre)
    if name not in qube.features:
        raise Refusal(
            "FEATURE_NOT_FOUND",
            f"Feature not set for domain {qube.name}: {name}",
            qube=qube.name,
            feature=name,
        )
    draft.put(replace(qube, features={k: v for k, v in qube.features.items() if k != name}))
    if caused is not None:
        caused()
    draft.emit(post)


def add_tag(draft: Draft, qube: Qube, tag: str, caused: Effect | None = None) -> None:
    """Add a tag, do what it causes, announce it; nothing where it is there."""
    qube = draft.qube(qube.uuid)
    if tag in qube.tags:
        return
    draft.put(replace(qube, tags=qube.tags | {tag}))
    if caused is not None:
        caused()
    draft.emit(events.tag_add(qube, tag))


def delete_tag(draft: Draft, qube: Qube, tag: str) -> None:
    """Remove a tag and announce it; nothing where it is not there."""
    qube = draft.qube(qube.uuid)
    if tag not in qube.tags:
        return
    draft.put(replace(qube, tags=qube.tags - {tag}))
    draft.emit(events.tag_delete(qube, tag))


def owner_tag(prefix: str, target: str) -> str:
    """The tag prefix-TARGET; "" where the name cannot be part of a tag (it has a dot)."""
    return f"{prefix}-{target}" if target and "." not in target else ""


def keep_one_tag(draft: Draft, qube: Qube, prefix: str, target: str) -> None:
    """Of the tags prefix-NAME keep exactly prefix-TARGET; target "" = none."""
    qube = draft.qube(qube.uuid)
    wanted = owner_tag(prefix, target)
    for tag in sorted(qube.tags):
        if tag.startswith(f"{prefix}-") and tag != wanted:
            delete_tag(draft, qube, tag)
    if wanted:
        add_tag(draft, qube, wanted)
