"""What every test layer shares: hypothesis without wall-clock deadlines."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# The machine is shared: a slow example is not a failure. BULKHEAD_EXAMPLES raises the number.
settings.register_profile(
    "bulkhead", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("bulkhead")
