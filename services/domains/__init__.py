"""The domains service: the hypervisor of this host, real or simulated, behind one interface."""
