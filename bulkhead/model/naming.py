"""Messages in the words of whoever reads them: qubes by name.

Owns the step from uuids, which services and hypervisors speak of, to names. Must not
know who reads the text. Invariant: only whole uuids of known qubes are replaced.
"""

from __future__ import annotations

import re

from bulkhead.model.view import View

_UUID = re.compile(r"(?<!uuid:)\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")


def with_names(view: View, message: str) -> str:
    """The message with the name of each qube in place of its uuid; other uuids stay."""

    def name(found: re.Match[str]) -> str:
        qube = view.by_uuid_any(found[0])
        return found[0] if qube is None else qube.name

    return _UUID.sub(name, message)
