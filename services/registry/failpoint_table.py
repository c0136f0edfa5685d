"""The registry's failpoints: one row on each side of every durable step.

Owns the names. Must not know how they are armed. Invariant: a hit() in this service
names a row here, and tests/fault/test_registry_store.py kills at every row.
"""

from __future__ import annotations

from bulkhead import failpoints

ROWS: dict[str, str] = {
    "registry.commit.before_begin": "a batch is planned, its transaction is not begun",
    "registry.commit.before_commit": "rows, replies and operations are written, not committed",
    "registry.commit.after_commit": "the batch is durable, nothing is published or answered",
    "registry.publish.before": "a durable change is about to go out on the stream",
    "registry.reply.before": "the change is published, its caller not yet answered",
    "registry.checkpoint.before_intend": "the document is made, its row not written",
    "registry.checkpoint.after_intend": "the row says intended, the file is the old one",
    "registry.checkpoint.before_fsync": "the temporary is written, not yet durable",
    "registry.checkpoint.before_rename": "the temporary is durable, the file is the old one",
    "registry.checkpoint.after_rename": "the file is the new one, the directory not synced",
    "registry.checkpoint.before_done": "the file is durable, its row still says intended",
    "registry.checkpoint.after_done": "the row says done, older checkpoints are dropped",
    "registry.notes.before_write": "a notes file is about to be replaced",
    "registry.notes.after_write": "a notes file was replaced",
    "registry.notes.before_remove": "the notes file of a removed qube is about to go",
    "registry.notes.after_remove": "the notes file of a removed qube is gone",
    "registry.load.before_keep": "a torn qubes.xml is about to be renamed beside",
    "registry.load.after_keep": "a torn qubes.xml was renamed, the good one is not back",
    "registry.load.before_set_aside": "an unreadable journal is about to be renamed beside",
    "registry.load.during_set_aside": "the journal was renamed, its log not yet",
    "registry.load.after_set_aside": "an unreadable journal was renamed, none is in its place",
    "registry.load.before_new_journal": "no journal; the new one is not committed",
    "registry.load.after_new_journal": "the new journal holds the loaded state",
    "registry.resolve.before_keep": "a foreign qubes.xml is about to be copied beside",
    "registry.resolve.after_keep": "a foreign qubes.xml was copied beside, still in place",
    "registry.init.before_folders": "a new store: nothing exists",
    "registry.init.before_store": "a new store: folders exist, qubes.xml does not",
    "registry.init.after_store": "a new store: qubes.xml exists, the journal does not",
}

failpoints.register("registry", ROWS)
