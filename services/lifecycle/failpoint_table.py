"""Failpoints of lifecycle: both sides of each durable step and of each participant call."""

from __future__ import annotations

from bulkhead import failpoints

FAILPOINTS = {
    "lifecycle.begin.before": "before an operation is begun in the registry",
    "lifecycle.begin.after": "the operation is durable, the caller has no answer yet",
    "lifecycle.advance.before": "before the cursor is made durable",
    "lifecycle.advance.after": "the cursor is durable, its step was not sent",
    "lifecycle.step.before": "before a participant is asked",
    "lifecycle.step.after": "the participant has answered, the next cursor is not durable",
    "lifecycle.undo.before": "before a step is undone",
    "lifecycle.undo.after": "the step is undone, the next cursor is not durable",
    "lifecycle.carried_out": "the end is on its way, whoever waits for the steps was not told",
    "lifecycle.end.before": "all steps done, the end is not durable",
    "lifecycle.end.after": "the end is durable, nobody was told",
}

failpoints.register("lifecycle", FAILPOINTS)
