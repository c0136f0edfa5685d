"""A libvirtd of our own, where the machine runs none."""
