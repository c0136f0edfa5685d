"""Setting and removing tags, and what created-by-X causes.

Owns who may change which tag and what a creator hands on to what it creates. Must not
know properties other than guivm. Invariant: created-by tags are changed by dom0 alone.
"""

from __future__ import annotations

from bulkhead.model.grammar import check_tag
from bulkhead.model.plan.base import Draft, need_qube
from bulkhead.model.plan.marks import add_tag, delete_tag
from bulkhead.model.plan.properties import store_property
from bulkhead.model.properties import REMOTE, find_row, has_property
from bulkhead.model.records import ADMINVM_NAME, Qube
from bulkhead.model.refusal import Refusal
from bulkhead.model.setters import parse_property
from bulkhead.model.specs import RemoveTag, SetTag

CREATED_BY = "created-by"


def command_set(draft: Draft, command: SetTag) -> None:
    """Add a tag over the Admin API; nothing where it is there."""
    qube = need_qube(draft.view, command.qube)
    tag = check_tag(command.tag)
    _permitted(draft, qube, tag)
    if tag in qube.tags:
        return
    if tag.startswith(f"{CREATED_BY}-") and qube.klass != REMOTE:
        creator = draft.view.qube(tag.removeprefix(f"{CREATED_BY}-"))
        if creator is None:
            raise Refusal(
                "QUBE_NOT_FOUND",
                f"Tag {tag} names no qube; use the name of an existing one",
                tag=tag,
            )
        add_created_by(draft, qube, creator)
    else:
        add_tag(draft, qube, tag)


def command_remove(draft: Draft, command: RemoveTag) -> None:
    """Remove a tag over the Admin API."""
    qube = need_qube(draft.view, command.qube)
    tag = check_tag(command.tag)
    _permitted(draft, qube, tag)
    if tag not in qube.tags:
        raise Refusal(
            "TAG_NOT_FOUND", f"Tag not set for domain {qube.name}: {tag}", qube=qube.name, tag=tag
        )
    delete_tag(draft, qube, tag)


def _permitted(draft: Draft, qube: Qube, tag: str) -> None:
    if tag.startswith(f"{CREATED_BY}-") and draft.source != ADMINVM_NAME:
        raise Refusal("TAG_PROTECTED", f"Only dom0 may change tag {tag}", qube=qube.name, tag=tag)


def add_created_by(draft: Draft, qube: Qube, creator: Qube) -> None:
    """Tag created-by-CREATOR, with what the creator wants its creations to have.

    A remote qube gets the tag alone, as in release 4.4.
    """
    add_tag(draft, qube, f"{CREATED_BY}-{creator.name}", lambda: _handed_on(draft, qube, creator))


def _handed_on(draft: Draft, qube: Qube, creator: Qube) -> None:
    if qube.klass == REMOTE:
        return
    for tag in creator.features.get("tag-created-vm-with", "").split():
        # Written by whoever may set the creator's features: one that is no tag, or that
        # would claim another creator, is left out.
        try:
            check_tag(tag)
        except Refusal:
            continue
        if not tag.startswith(f"{CREATED_BY}-"):
            add_tag(draft, qube, tag)
    guivm = creator.features.get("set-created-guivm")
    if guivm and has_property(qube.klass, "guivm"):
        row = find_row(qube.klass, "guivm")
        try:
            text = parse_property(draft.view, draft.qube(qube.uuid), row, guivm)
        except Refusal:
            return  # names no usable qube: the creation itself is in order
        store_property(draft, qube, row, text)
