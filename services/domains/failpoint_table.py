"""Failpoints of domains: both sides of each effect on the hypervisor and on guest keys."""

from __future__ import annotations

from bulkhead import failpoints

FAILPOINTS = {
    "domains.create.before": "nothing of the boot exists",
    "domains.create.after": "the domain exists, paused, nobody was told",
    "domains.resume.before": "the domain is paused",
    "domains.resume.after": "the guest runs, nobody was told",
    "domains.destroy.before": "the domain exists",
    "domains.destroy.after": "the domain is gone, nobody was told",
    "domains.shutdown.before": "the guest was not asked",
    "domains.shutdown.after": "the guest was asked, nobody was told",
    "domains.pause.before": "the guest runs",
    "domains.pause.after": "the guest is paused, nobody was told",
    "domains.attach.before": "the device is not attached",
    "domains.attach.after": "the device is attached, nobody was told",
    "domains.detach.before": "the device is attached",
    "domains.detach.after": "the device is detached, nobody was told",
    "domains.resize.before": "the guest has the old size",
    "domains.resize.after": "the guest has the new size, nobody was told",
    "domains.keys.before": "the guest keys are the old ones",
    "domains.keys.after": "the guest keys are written, nobody was told",
    "domains.facts.before": "the registry was not told of a change",
    "domains.facts.after": "the registry was told, the queue still holds it",
}

failpoints.register("domains", FAILPOINTS)
