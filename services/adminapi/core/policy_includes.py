"""The default policy files of the Admin API, made from the call table.

Owns which call belongs to which include file. Must not know where the files go.
Invariant: what reads is in a -ro file, what writes or executes in a -rwx file, and each
-ro file begins with its -rwx sibling, so that who may change something may also read it.
"""

from __future__ import annotations

from collections.abc import Iterator

from services.adminapi.core.calls import DEVICE_CLASSES, Call, all_calls

# Device classes of add-on packages: named by policy, whether they are served or not.
POLICY_DEVICE_CLASSES = (*DEVICE_CLASSES, "usb", "mic")
# Classes that are made through qubesd.sock alone.
_LOCAL_CLASSES = ("RemoteVM",)
_SCOPES = ("global", "local")
_MARK = "# Made by `bulkhead policy includes`; it is written again. Rules go elsewhere.\n"
# What a qube that restores backups may do: target, calls, argument.
_RESTORING = "@tag:backup-restore-mgmt"
_IN_PROGRESS = (
    "feature.Set",
    "firewall.Set",
    "property.Set",
    "tag.Set",
    "volume.Import",
    "volume.ImportWithSize",
    "volume.Info",
    "volume.List",
    "volume.Set.revisions_to_keep",
)
_RESTORE: tuple[tuple[str, str, str], ...] = (
    *((f"Create.{c}", "*", "dom0") for c in ("AppVM", "StandaloneVM", "TemplateVM")),
    ("List", "*", "dom0"),
    ("List", "*", "@anyvm"),
    ("property.Get", "+provides_network", "@anyvm"),
    ("property.Get", "+template_for_dispvms", "@anyvm"),
    *((name, "*", "@tag:backup-restore-in-progress") for name in _IN_PROGRESS),
)
_DENIED_QUIETLY = ("admin.vm.property.GetAll", "admin.property.GetAll")


def include_of(call: Call) -> str:
    """The include file of a call's rules, "" for calls without policy."""
    if not call.scope or call.param in _LOCAL_CLASSES:
        return ""
    return f"include/admin-{call.scope}-{call.effect}"


def assignment() -> dict[str, list[str]]:
    """Include file -> names of its calls, sorted."""
    found: dict[str, set[str]] = {
        f"include/admin-{scope}-{effect}": set() for scope in _SCOPES for effect in ("ro", "rwx")
    }
    for call in all_calls():
        path = include_of(call)
        if not path:
            continue
        found[path].add(call.name)
        if call.param in DEVICE_CLASSES:
            for devclass in POLICY_DEVICE_CLASSES:
                name = call.name.replace(f".device.{call.param}.", f".device.{devclass}.")
                found[path].add(name)
    return {path: sorted(names) for path, names in found.items()}


def _include_lines(prefix: str) -> Iterator[str]:
    for path, names in sorted(assignment().items()):
        lines = [f"!include-service {n} * {path}\n" for n in names if n.startswith(prefix)]
        if lines:
            yield "\n"
            yield from lines


def generated_files() -> dict[str, str]:
    """Path -> text of the files that may be written over."""
    quiet = "".join(
        f"{name} * @anyvm {target} deny notify=no\n"
        for name in _DENIED_QUIETLY
        for target in ("@anyvm", "@adminvm")
    )
    restore = "".join(
        f"admin.vm.{name} {argument} {_RESTORING} {target} allow target=dom0\n"
        for name, argument, target in _RESTORE
    )
    return {
        "85-admin-backup-restore.policy": _MARK
        + "# What the qube that restores a backup may do, to nothing but what it restores.\n"
        + restore
        + f"qubes.RestoreById * {_RESTORING} @tag:backup-restore-storage allow\n",
        "90-admin-default.policy": _MARK + "".join(_include_lines("admin.")),
        "90-bulkhead-default.policy": _MARK + "".join(_include_lines("bulkhead.")),
        "91-admin-default-deny.policy": _MARK
        + "# No notification where clients only try whether they may.\n"
        + quiet,
    }


def include_files() -> dict[str, str]:
    """Path -> first text of the files that take rules; never written over."""
    texts = {}
    for scope in _SCOPES:
        for effect, what in (("ro", "reading"), ("rwx", "changing or executing")):
            path = f"include/admin-{scope}-{effect}"
            text = (
                f"# Who may make {scope} Admin API calls that are {what}.\n"
                "# One rule per line, first match: SOURCE TARGET allow target=dom0\n"
            )
            if effect == "ro":
                text += f"\n!include include/admin-{scope}-rwx\n"
            texts[path] = text
    return texts


def is_generated(text: str) -> bool:
    """Whether an existing file is one of generated_files() and may be written over."""
    return text.startswith(_MARK)
