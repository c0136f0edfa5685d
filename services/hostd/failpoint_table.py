"""hostd's failpoints: between the steps of every verb that has several.

Owns the names. Invariant: a hit() in this service names a row here; every verb may be
repeated after a kill at any of them.
"""

from __future__ import annotations

from bulkhead import failpoints

ROWS: dict[str, str] = {
    "hostd.namespace.after_add": "the namespace exists, its settings are the kernel's",
    "hostd.namespace.before_delete": "taps are out, the namespace is still there",
    "hostd.uplink.after_pair": "the pair exists, both ends are in hostd's namespace",
    "hostd.uplink.after_move": "the ends are in place, without addresses",
    "hostd.tap.after_add": "the tap exists",
    "hostd.plug.after_move": "the tap is in the netvm's namespace, down and without address",
    "hostd.unplug.after_move": "the tap is back, not deleted",
    "hostd.enforcer.after_spawn": "the worker runs, nobody has been told its socket",
    "hostd.autostart.before_link": "the link is as it was",
    "hostd.autostart.after_link": "the link is as it should be",
    "hostd.pci.after_override": "the device's driver is chosen, not yet bound",
    "hostd.pci.after_unbind": "the device has no driver",
}

failpoints.register("hostd", ROWS)
