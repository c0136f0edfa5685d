"""Kernel command line: defaults, common options, boot modes, order of the parts.

Owns the texts and their composition from plain values. Must not know records or where
a value comes from (evaluate wires it). Invariant: parts are joined without separators;
the common options end with a space where another part follows.
"""

from __future__ import annotations

from bulkhead.model.records import KernelFact

LIMIT = 512  # characters of the property kernelopts
NOPCI_DEFAULT = "swiotlb=2048"
COMMON_DEFAULT = (
    "root=/dev/mapper/dmroot ro nomodeset console=hvc0 rd_NO_PLYMOUTH rd.plymouth.enable=0"
    " plymouth.enable=0 xen_privcmd.unrestricted "
)
_S0IX = " qubes_exp_pm_use_suspend=1"
_DISPLAY_CLASSES = ("0300", "0380")


def default_with_pci(kernel: KernelFact | None, *, s0ix: bool) -> str:
    """Default kernelopts of a qube with PCI devices; s0ix: dom0's feature suspend-s0ix."""
    text = kernel.kernelopts_pci if kernel is not None else None
    return (text or "").strip() + (_S0IX if s0ix else "")


def default_without_pci(kernel: KernelFact | None) -> str:
    """Default kernelopts of a qube with neither PCI devices nor a template."""
    text = kernel.kernelopts_nopci if kernel is not None else None
    return NOPCI_DEFAULT if text is None else text.strip()


def common_options(
    kernel_name: str,
    kernel: KernelFact | None,
    *,
    uuid: str,
    linux: bool,
    drop_nomodeset: bool,
) -> str:
    """Options that come first; "" without a dom0 kernel. linux: feature os is Linux."""
    if not kernel_name:
        return ""
    text = kernel.kernelopts_common if kernel is not None else None
    text = COMMON_DEFAULT if text is None else text.rstrip("\r\n")
    if drop_nomodeset:
        text = " ".join(word for word in text.split(" ") if word != "nomodeset")
    if linux:
        text = f"systemd.machine_id={uuid.replace('-', '')} {text}"
    return text


def command_line(
    common: str, kernelopts: str, bootmode_options: str, *, bare: bool, apparmor: str, selinux: str
) -> str:
    """The whole command line.

    bare: feature no-default-kernelopts. apparmor, selinux: those features' values, only
    "1" counts. bootmode_options: "" or the mode's options, appended after one space.
    """
    tail = f" {bootmode_options}" if bootmode_options else ""
    if bare:
        return f"{kernelopts}{tail}"
    security = ""
    if apparmor == "1":
        security = " apparmor=1 security=apparmor"
    elif selinux == "1":
        security = " selinux=1 security=selinux"
    return f"{common}{kernelopts}{security}{tail}"


def is_display_interface(code: str) -> bool:
    """True for the seven-character interface of a PCI graphics controller."""
    return code[:1] == "p" and code[1:5] in _DISPLAY_CLASSES
