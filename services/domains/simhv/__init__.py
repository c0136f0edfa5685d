"""The simulated hypervisor: a process of its own, which outlives domains."""
