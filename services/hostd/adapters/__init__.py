"""One outside thing each: iproute2, sysfs, links, worker processes."""
