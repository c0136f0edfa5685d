"""Why domains refuses, as one table.

Owns the reasons of this service and the exception that carries one. Must not know the
bus: handlers turn a DomainsError into its error. Invariant: a DomainsError has a row.
"""

from __future__ import annotations

from collections.abc import Mapping

from bulkhead.model.refusal import Reason, TypedRefusal, table

_ROWS: tuple[Reason, ...] = (
    Reason("DOMAIN_NOT_FOUND", "NOT_FOUND", "no domain with that uuid and boot id exists"),
    Reason("DOMAIN_EXISTS", "FAILED_PRECONDITION", "another boot of the qube still exists"),
    Reason("BOOT_ABANDONED", "ABORTED", "this boot id was destroyed and cannot come back"),
    Reason("DOMAIN_WRONG_STATE", "FAILED_PRECONDITION", "the domain's power state forbids it"),
    Reason("INVALID_DOMAIN_SPEC", "INVALID_ARGUMENT", "the domain spec breaks a rule"),
    Reason("INVALID_GUEST_KEY", "INVALID_ARGUMENT", "a guest key or value breaks the limits"),
    Reason("GUEST_KEYS_FULL", "RESOURCE_EXHAUSTED", "the guest's key store is at its bound"),
    Reason("HYPERVISOR_UNAVAILABLE", "UNAVAILABLE", "no connection to the hypervisor"),
    Reason("HYPERVISOR_REFUSED", "FAILED_PRECONDITION", "the hypervisor refused the call"),
    Reason("HYPERVISOR_TIMEOUT", "DEADLINE_EXCEEDED", "the hypervisor did not answer in time"),
    Reason("HYPERVISOR_UNSUPPORTED", "UNIMPLEMENTED", "this hypervisor cannot do that"),
    Reason("NETWORK_UNAVAILABLE", "FAILED_PRECONDITION", "no enforced network on this host"),
    Reason("NOT_ENOUGH_MEMORY", "RESOURCE_EXHAUSTED", "host memory does not suffice"),
    Reason("MEMORY_MANAGER_FAILED", "UNAVAILABLE", "qmemman does not answer"),
    Reason("DOMAIN_BUSY", "RESOURCE_EXHAUSTED", "too many calls wait for the domain"),
    Reason("AGENT_TIMEOUT", "DEADLINE_EXCEEDED", "the guest's agent did not connect in time"),
    Reason("AGENT_NOT_CONNECTED", "FAILED_PRECONDITION", "the guest has no connected agent"),
    Reason("GUEST_DAEMON_FAILED", "FAILED_PRECONDITION", "a per-guest daemon did not start"),
    Reason("STALE_EPOCH", "ABORTED", "a newer lifecycle took over"),
    Reason("EPOCH_UNKNOWN", "UNAVAILABLE", "the epoch was not yet learned from the registry"),
)

REASONS: Mapping[str, Reason] = table(_ROWS)


class DomainsError(TypedRefusal):
    """domains refuses or failed; reason is a row of REASONS."""

    TABLE = REASONS
