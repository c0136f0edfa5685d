"""Plans: what a mutation or an operation's begin and end change, and the events it makes.

Owns every guard and the order of events. Must not know how a plan is made durable or
sent. Invariant: a plan is a pure function of the view and its arguments; planning twice
gives the same plan, and a refused plan changes nothing.

plan_mutation(view, command, source, *, now)      one command of specs.COMMANDS
plan_preload(view, marks, source, *, now)         dispvm's marks
plan_begin(view, spec, *, operation_id, source, now, boot_id, new_uuid, random, ...)
plan_advance(view, operation, *, now, events, ...)
plan_end(view, operation, outcome, *, now, error, result, events, follow_up, ...)
plan_promote(view, *, now, ...)
plan_cancel(view, operation_id, *, now)
"""

from bulkhead.model.plan.base import BeginPlan, EndPlan, Plan, PlanRefused
from bulkhead.model.plan.mutation import plan_mutation, plan_preload
from bulkhead.model.plan.operations import (
    plan_advance,
    plan_begin,
    plan_cancel,
    plan_end,
    plan_promote,
)

__all__ = [
    "BeginPlan",
    "EndPlan",
    "Plan",
    "PlanRefused",
    "plan_advance",
    "plan_begin",
    "plan_cancel",
    "plan_end",
    "plan_mutation",
    "plan_preload",
    "plan_promote",
]
