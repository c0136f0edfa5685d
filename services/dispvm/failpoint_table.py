"""Failpoints of dispvm."""

from __future__ import annotations

from bulkhead import failpoints

FAILPOINTS = {
    "dispvm.boot_marker.before": "stale disposables are removed, the marker is not written",
    "dispvm.boot_marker.after": "the marker of this host boot is durable",
    "dispvm.create.before": "before the operation that makes a disposable is submitted",
    "dispvm.create.after": "the disposable's operation is durable, the caller has no answer",
    "dispvm.make.before_create": "a place is free, nothing is begun",
    "dispvm.make.after_create": "a preloaded disposable is on the list, not started",
    "dispvm.make.after_start": "it runs, its services are not waited for",
    "dispvm.make.after_pause": "it is paused, not marked as complete",
    "dispvm.make.after_complete": "it is ready",
    "dispvm.claim.before": "one is chosen for a request, nothing is marked",
    "dispvm.claim.after": "it is off the list and carries the request's key",
    "dispvm.use.before": "it runs again, still marked as being handed out",
    "dispvm.use.after": "it is the requester's, who has no answer yet",
    "dispvm.discard.before": "one is to be removed, nothing is marked",
    "dispvm.discard.after": "it is off the list, still there",
}

failpoints.register("dispvm", FAILPOINTS)
