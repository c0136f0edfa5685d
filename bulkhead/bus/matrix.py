"""Prints docs/access-matrix.md: python -m bulkhead.bus.matrix > docs/access-matrix.md.

Owns its layout only; the content is the options of the protos. Invariant: the same
protos give the same bytes, and a test compares them with the committed file.
"""

from __future__ import annotations

import sys

from bulkhead.bus.methods import CALLERS, METHODS, SERVICES

_INTRODUCTION = """\
# Who may call what

Made by `python -m bulkhead.bus.matrix` from the method options in `proto/`; a test fails
when it is not up to date. What is not marked is refused with `CALLER_NOT_ALLOWED`, before
the request's body is looked at. `operator` is root, or without isolation the instance's
user. `repeat` says whether the same request may be sent again; methods without it leave
the caller at most once.
"""


def render() -> str:
    """The whole page."""
    callers = sorted(CALLERS)
    lines = [_INTRODUCTION]
    for service in SERVICES:
        methods = [m for m in METHODS.values() if m.service == service]
        used = [c for c in callers if any(c in m.callers for m in methods)]
        lines.append(f"## {service.rpartition('.')[2]}\n")
        lines.append("| Method | " + " | ".join(used) + " | effect | lane | time limit | repeat |")
        lines.append("|---" * (len(used) + 5) + "|")
        for method in methods:
            marks = [" x " if caller in method.callers else "   " for caller in used]
            lines.append(
                f"| {method.name} |"
                + "|".join(marks)
                + f"| {method.effect.value} | {method.lane.value} "
                + f"| {method.time_limit_ns / 1e9:g} s | {'yes' if method.idempotent else 'no'} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(render())
