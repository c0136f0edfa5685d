"""Failpoints of dispvm."""

from __future__ import annotations

from bulkhead import failpoints

FAILPOINTS = {
    "dispvm.boot_marker.before": "stale disposables are removed, the marker is not written",
    "dispvm.boot_marker.after": "the marker of this host boot is durable",
    "dispvm.create.before": "before the operation that makes a disposable is submitted",
    "dispvm.create.after": "the disposable's operation is durable, the caller has no answer",
}

failpoints.register("dispvm", FAILPOINTS)
