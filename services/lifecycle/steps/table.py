"""Which object does which step of which kind of operation.

Owns the table (kind, step) -> Step. Invariant: it has exactly the steps of
bulkhead.model.plan.operation_table, which a test compares.
"""

from __future__ import annotations

from collections.abc import Mapping

from services.lifecycle.executor import Step
from services.lifecycle.steps import creation, live, power, start, volumes

STEPS: Mapping[tuple[str, str], Step] = {
    **{("START", name): step for name, step in start.STEPS.items()},
    ("CREATE", "ensure"): creation.Ensure(),
    ("CREATE", "copy_rules"): creation.CopyRules(),
    ("CLONE", "ensure_cloned"): creation.EnsureCloned(),
    ("CLONE", "copy_rules"): creation.CopyRules(),
    ("REMOVE", "withdraw_rules"): creation.DeleteRules(),
    ("REMOVE", "undefine"): creation.Undefine(),
    ("REMOVE", "remove_volumes"): creation.RemoveVolumes(),
    ("STOPPED", "withdraw_rules"): power.WithdrawRules(),
    ("STOPPED", "unplug"): power.Unplug(),
    ("STOPPED", "stop_volumes"): power.StopVolumes(),
    ("SHUTDOWN", "shutdown"): power.Shutdown(),
    ("SHUTDOWN", "stopped"): power.Stopped(),
    ("KILL", "destroy"): power.Destroy(),
    ("KILL", "stopped"): power.Stopped(),
    ("PAUSE", "pause"): power.Pause(),
    ("UNPAUSE", "unpause"): power.Unpause(),
    ("SUSPEND", "suspend"): power.Suspend(),
    ("RESUME", "wake"): power.Wake(),
    ("REVERT", "revert"): volumes.Revert(),
    ("RESIZE", "resize"): volumes.Resize(),
    ("RESIZE", "tell_guest"): volumes.TellGuest(),
    ("CLEAR", "clear"): volumes.Clear(),
    ("CLONE_VOLUME", "clone_volume"): volumes.CloneVolume(),
    ("IMPORT", "import_begin"): volumes.ImportBegin(),
    ("IMPORT", "import_end"): volumes.ImportEnd(),
    ("APPLY", "apply"): live.Apply(),
    ("ATTACH", "attach"): live.Attach(),
    ("DETACH", "detach"): live.Detach(),
    ("POOL_ADD", "pool_setup"): volumes.PoolSetup(),
    ("POOL_REMOVE", "pool_teardown"): volumes.PoolTeardown(),
    ("KERNEL_ADD", "kernel_add"): volumes.KernelAdd(),
    ("KERNEL_REMOVE", "kernel_remove"): volumes.KernelRemove(),
}
