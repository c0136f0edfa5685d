"""The firewall's failpoints: one row on each side of every durable step and transaction.

Owns the names. Must not know how they are armed. Invariant: a hit() in this service
names a row here.
"""

from __future__ import annotations

import os
from pathlib import Path

from bulkhead import failpoints

ROWS: dict[str, str] = {
    "firewall.rules.before_write": "the new rules are parsed, the file is the old one",
    "firewall.rules.after_write": "the file is the new one, the kernel has the old rules",
    "firewall.rules.before_delete": "the rules file is about to go",
    "firewall.rules.after_delete": "the rules file is gone",
    "firewall.pending.after_mark": "a change is noted as not announced, nothing is changed yet",
    "firewall.apply.before_state": "an apply is checked, nothing is noted",
    "firewall.apply.before_kernel": "the target is noted, the kernel has not been asked",
    "firewall.apply.after_kernel": "the kernel has the rules, nothing is answered",
    "firewall.withdraw.before_kernel": "the kernel still has the chain",
    "firewall.withdraw.after_kernel": "the chain is gone, the target is still noted",
    "firewall.restore.before_write": "the kernel refused, the chain drops, the file is the new one",
    "firewall.restore.after_write": "the kernel refused, the old file is back",
    "firewall.announce.before": "file and kernel agree, the registry does not know",
    "firewall.announce.after": "the registry knows, the note is still there",
    "firewall.netvm.before_define": "the netvm is noted, its table is not defined",
    "firewall.netvm.after_define": "the netvm's table is defined, nothing is answered",
    "firewall.enforce.before_commit": "the worker has the transaction, the kernel not",
    "firewall.enforce.after_commit": "the kernel has the transaction, the worker did not answer",
}

failpoints.register("firewall", ROWS)


def directories() -> tuple[Path, ...]:
    """Where armed failpoints are read and noted; none outside tests."""
    names = ("BULKHEAD_FAILPOINTS_FILE", "BULKHEAD_FAILPOINTS_TRACE")
    return tuple(Path(os.environ[name]).parent for name in names if os.environ.get(name))
