"""Reasons that only lifecycle gives."""

from __future__ import annotations

from collections.abc import Mapping

from bulkhead.model.refusal import Reason, table

_ROWS = (
    Reason("IMPORT_FAILED", "ABORTED", "the writer of an import's data reported a failure"),
    Reason("CANCELLED", "CANCELLED", "the operation was cancelled before its pivot"),
)

REASONS: Mapping[str, Reason] = table(_ROWS)
