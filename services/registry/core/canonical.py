"""The state as one canonical text, for "nothing changed" and for people.

Owns the form of `bulkhead dump`. Must not know files or messages. Invariant: two
stores that hold the same records give the same bytes; revisions, facts and finished
operations are no records and are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from bulkhead.model.view import View
from services.registry.core.audit import plain


def _line(kind: str, key: str, value: object) -> str:
    return json.dumps(
        {"kind": kind, "key": key, "value": plain(value)},
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
    )


def lines(view: View) -> Iterator[str]:
    """One JSON object per line: labels, pools, properties, qubes (hidden ones too),
    unfinished operations; each kind in the order of its key."""
    for index in sorted(view.labels):
        yield _line("label", view.labels[index].name, view.labels[index])
    for name in sorted(view.pools):
        yield _line("pool", name, view.pools[name])
    for name in sorted(view.properties):
        yield _line("property", name, {name: view.properties[name]})
    for qube in sorted(view.qubes_any(), key=lambda q: q.uuid):
        value = plain(qube)
        del value["revision"]
        yield _line("qube", qube.uuid, value)
    for op_id in sorted(view.operations):
        operation = view.operations[op_id]
        if not operation.state.terminal:
            yield _line("operation", op_id, operation)


def pages(view: View, limit: int) -> list[str]:
    """The lines in pages of about `limit` bytes, at least one page."""
    out: list[str] = []
    page: list[str] = []
    size = 0
    for line in lines(view):
        length = len(line.encode()) + 1
        if page and size + length > limit:
            out.append("".join(page))
            page, size = [], 0
        page.append(line + "\n")
        size += length
    out.append("".join(page))
    return out
