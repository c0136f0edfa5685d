"""What domains touches outside itself: libvirt, the simulated hypervisor, guest keys, daemons."""
