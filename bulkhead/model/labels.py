"""Colour labels: the built-in ones, look-up by what a client may write, new indexes.

Owns label identity. Must not know qubes. Invariant: the built-in labels have the
indexes 1 to 8 and are never removed.
"""

from __future__ import annotations

import contextlib

from bulkhead.model.grammar import shown
from bulkhead.model.records import Label
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View

BUILTIN_LIMIT = 8  # highest index of a built-in label

BUILTIN: tuple[Label, ...] = (
    Label(1, "red", "0xcc0000"),
    Label(2, "orange", "0xf57900"),
    Label(3, "yellow", "0xedd400"),
    Label(4, "green", "0x73d216"),
    Label(5, "gray", "0x555555"),
    Label(6, "blue", "0x3465a4"),
    Label(7, "purple", "0x75507b"),
    Label(8, "black", "0x000000"),
)

_OLD_GRAY, _GRAY = "0x555753", "0x555555"


def migrate_color(color: str) -> str:
    """The colour to use for a stored one: an old gray is replaced."""
    return _GRAY if color == _OLD_GRAY else color


_INDEX_PREFIX = "label-"


def find_label(view: View, untrusted_text: str) -> Label:
    """The label of that name or decimal index; Refusal LABEL_NOT_FOUND."""
    label = view.label_by_name(untrusted_text) or _by_index(view, untrusted_text)
    if label is None:
        raise _not_found(untrusted_text)
    return label


def label_of_value(view: View, untrusted_text: str) -> Label:
    """The label that a property's new value names: "label-INDEX" comes before a name.

    LABEL_NOT_FOUND.
    """
    if untrusted_text.startswith(_INDEX_PREFIX):
        digits = untrusted_text.removeprefix(_INDEX_PREFIX)
        if digits.isdigit():
            label = _by_index(view, digits)
            if label is None:
                raise _not_found(untrusted_text)
            return label
    return find_label(view, untrusted_text)


def label_of_stored(view: View, text: str) -> Label:
    """The label that a store names: the name first, since names are what is written.

    LABEL_NOT_FOUND.
    """
    return view.label_by_name(text) or label_of_value(view, text)


def _by_index(view: View, untrusted_text: str) -> Label | None:
    with contextlib.suppress(ValueError):  # whatever int() takes is a number
        return view.labels.get(int(untrusted_text))
    return None


def _not_found(untrusted_text: str) -> Refusal:
    return Refusal(
        "LABEL_NOT_FOUND",
        f"Label does not exist: {shown(untrusted_text)}",
        label=shown(untrusted_text),
    )


def next_index(view: View) -> int:
    """The index of a new label."""
    return max(BUILTIN_LIMIT, *view.labels) + 1 if view.labels else BUILTIN_LIMIT + 1


def html_color(label: Label) -> str:
    """The colour as #rrggbb."""
    return "#" + label.color.removeprefix("0x")


def icon(label: Label) -> str:
    """Name of the label's plain icon, as in the policy's system information."""
    return f"appvm-{label.name}"
