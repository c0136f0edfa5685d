"""Why the firewall refuses, beyond the reasons that all services share.

Owns the rows; must not know who maps them. Invariant: a reason is used only if it is
a row here or in bulkhead.model.refusal.
"""

from __future__ import annotations

from collections.abc import Mapping

from bulkhead.model.refusal import Reason, table

_ROWS: tuple[Reason, ...] = (
    Reason("RULES_UNREADABLE", "FAILED_PRECONDITION", "a stored rules file does not validate"),
    Reason("RULES_NOT_SAVED", "RESOURCE_EXHAUSTED", "the rules file could not be written"),
    Reason("KERNEL_REFUSED", "INTERNAL", "the kernel refused the qube's rules"),
    Reason("ENFORCER_UNAVAILABLE", "UNAVAILABLE", "the enforce worker does not answer"),
    Reason("NETVM_NOT_UP", "FAILED_PRECONDITION", "the network qube has no base rules yet"),
)

REASONS: Mapping[str, Reason] = table(_ROWS)
