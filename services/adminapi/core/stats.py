"""admin.vm.Stats: from two samples of the hypervisor to the keys of one event.

Owns the arithmetic and the keys' order. Must not know clocks or who asks. Invariant: a
qube's first round says cpu_usage 0, and usage is the average over its vcpus in percent.
"""

from __future__ import annotations

from dataclasses import dataclass

_PAUSES_S = (1, 3600)  # shortest and longest


@dataclass(frozen=True, slots=True)
class Sample:
    """One domain at one time; sizes in KiB, times in ns. None = not known."""

    time_ns: int
    memory_kib: int
    assigned_kib: int
    cpu_time_ns: int
    vcpus: int
    swap_used_kib: int | None = None
    stubdom_cpu_time_ns: int | None = None
    stubdom_vcpus: int | None = None


def pause_s(stats_interval: object) -> int:
    """Seconds between two rounds, whatever the property says: it may be zero or huge."""
    shortest, longest = _PAUSES_S
    return max(shortest, min(stats_interval, longest)) if isinstance(stats_interval, int) else 3


def _share(cpu_ns: int, before_ns: int, elapsed_ns: int, vcpus: int) -> float:
    if elapsed_ns <= 0 or vcpus <= 0:
        return 0.0
    return max(0.0, 100.0 * (cpu_ns - before_ns) / elapsed_ns / vcpus)


def pairs(now: Sample, before: Sample | None) -> tuple[tuple[str, str], ...]:
    """Keys and values of a vm-stats event in wire order."""
    elapsed = now.time_ns - before.time_ns if before is not None else 0
    usage = _share(now.cpu_time_ns, before.cpu_time_ns, elapsed, now.vcpus) if before else 0.0
    found = [
        ("memory_kb", str(now.memory_kib)),
        ("memory_assigned_total", str(now.assigned_kib)),
        ("memory_assigned_usable", str(now.memory_kib)),
        ("memory_with_swap_used", str(now.memory_kib + (now.swap_used_kib or 0))),
        ("cpu_time", str(now.cpu_time_ns // 1_000_000)),
        ("cpu_usage", str(int(usage))),
        ("online_vcpus", str(now.vcpus)),
    ]
    if now.swap_used_kib is not None:
        found.append(("swap_used", str(now.swap_used_kib)))
    if now.stubdom_cpu_time_ns is not None:
        vcpus = now.stubdom_vcpus or 1
        inner = 0.0
        if before is not None and before.stubdom_cpu_time_ns is not None:
            inner = _share(now.stubdom_cpu_time_ns, before.stubdom_cpu_time_ns, elapsed, vcpus)
        found += [
            ("cpu_time_internal", str(now.stubdom_cpu_time_ns // 1_000_000)),
            ("cpu_usage_internal", f"{inner:.1f}"),
            ("online_vcpus_internal", str(vcpus)),
        ]
    return tuple(found)
