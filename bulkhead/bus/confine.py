"""Giving up what a service does not need: capabilities, system calls, files.

Owns no_new_privs, capability sets, a seccomp filter and Landlock, through prctl and
ctypes. Must not know which service it is. Invariants: apply() runs while the process has
one thread, as Landlock and capabilities bind threads; what in_force() reports comes from
the kernel, but for Landlock, which the kernel does not show.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import platform
import struct
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bulkhead import failpoints

_log = logging.getLogger("bulkhead.confine")
_libc = ctypes.CDLL(None, use_errno=True)

# prctl
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_SECCOMP_MODE_FILTER = 2

CAPABILITIES = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid",
    "setpcap", "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw",
    "ipc_lock", "ipc_owner", "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct",
    "sys_admin", "sys_boot", "sys_nice", "sys_resource", "sys_time", "sys_tty_config", "mknod",
    "lease", "audit_write", "audit_control", "setfcap", "mac_override", "mac_admin", "syslog",
    "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf", "checkpoint_restore",
)  # fmt: skip


class ConfineError(RuntimeError):
    """A restriction that was asked for could not be put in force."""


@dataclass(frozen=True, slots=True)
class Confinement:
    """What a service needs; everything else is given up.

    read, write: files and directories (with all below). keep_caps: lower-case names
    without "cap_". inet: AF_INET and AF_INET6 sockets; netlink: AF_NETLINK sockets; unix:
    AF_UNIX sockets (False for a worker whose sockets are all inherited).
    execute: may start programs below these directories. keep_calls: system calls of the
    refused list that it needs after all ("setns", "mount"). landlock False leaves files
    to their permissions.
    """

    read: tuple[Path, ...] = ()
    write: tuple[Path, ...] = ()
    keep_caps: tuple[str, ...] = ()
    inet: bool = False
    netlink: bool = False
    unix: bool = True
    execute: tuple[Path, ...] = ()
    keep_calls: tuple[str, ...] = ()
    landlock: bool = True

    def with_socket_directory(self, directory: Path) -> Confinement:
        """The same, allowed to bind in its own socket directory and to note failpoints."""
        return replace(self, write=(*self.write, directory, *failpoints.directories()))


def confine(
    read: Sequence[Path] = (),
    write: Sequence[Path] = (),
    keep_caps: Sequence[str] = (),
    inet: bool = False,
) -> dict[str, str]:
    """Restrict this process for good; see Confinement. Returns in_force().

    Call with one thread only, after everything is imported. ConfineError when the kernel
    refuses; a kernel without Landlock or seccomp is reported, not refused.
    """
    return apply(Confinement(tuple(read), tuple(write), tuple(keep_caps), inet))


def apply(needs: Confinement) -> dict[str, str]:
    """As confine(), with every choice."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise ConfineError(f"{threads} threads run already: restrictions would not hold for all")
    _drop_capabilities(needs.keep_caps)
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise ConfineError(f"no_new_privs: {os.strerror(ctypes.get_errno())}")
    if needs.landlock:
        _restrict_files(needs)
    _filter_calls(needs)
    return in_force()


# ---- what the kernel says

_landlock = "off"


def in_force() -> dict[str, str]:
    """The restrictions of this process: capabilities, no_new_privs, seccomp, landlock, uid."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = value.strip()
    effective = int(fields.get("CapEff", "0"), 16)
    return {
        "uid": str(os.geteuid()),
        "capabilities": _cap_names(effective),
        "no_new_privs": "on" if fields.get("NoNewPrivs") == "1" else "off",
        "seccomp": "filter" if fields.get("Seccomp") == "2" else "off",
        "landlock": _landlock,
    }


def _cap_names(bits: int) -> str:
    names = [n for at, n in enumerate(CAPABILITIES) if bits >> at & 1]
    return "all" if len(names) == len(CAPABILITIES) else " ".join(names) or "none"


# ---- capabilities


class _CapHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _CapData(ctypes.Structure):
    _fields_ = [
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    ]


_CAP_VERSION = 0x20080522


def _drop_capabilities(keep: Iterable[str]) -> None:
    try:
        wanted = sum(1 << CAPABILITIES.index(name) for name in keep)
    except ValueError as error:
        raise ConfineError(f"unknown capability: {error}") from None
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for number in range(64):
        present = _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0)
        if present < 0:
            break
        if present and not wanted >> number & 1:
            # Without CAP_SETPCAP it cannot be dropped; no_new_privs makes it useless.
            _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    header = _CapHeader(_CAP_VERSION, 0)
    data = (_CapData * 2)()
    if _libc.capget(ctypes.byref(header), data):
        raise ConfineError(f"capget: {os.strerror(ctypes.get_errno())}")
    for at in range(2):
        kept = data[at].permitted & (wanted >> 32 * at & 0xFFFFFFFF)
        data[at].permitted = data[at].effective = kept
        data[at].inheritable = 0
    if _libc.capset(ctypes.byref(header), data):
        raise ConfineError(f"capset: {os.strerror(ctypes.get_errno())}")


# ---- Landlock

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_RULE_PATH_BENEATH = 1
_FS_EXECUTE = 1 << 0
_FS_WRITE_FILE = 1 << 1
_FS_READ_FILE = 1 << 2
_FS_READ_DIR = 1 << 3
_FS_REFER = 1 << 13
_FS_TRUNCATE = 1 << 14
_FS_IOCTL_DEV = 1 << 15
_FS_READ = _FS_READ_FILE | _FS_READ_DIR
_FS_FILE_ONLY = _FS_EXECUTE | _FS_WRITE_FILE | _FS_READ_FILE | _FS_TRUNCATE | _FS_IOCTL_DEV
# Number of file access bits known to ABI 1, 2, 3, 4, and 5 on.
_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
_FS_BITS_NEWEST = 16
_NET_TCP = 0b11
_SCOPE_ALL = 0b11  # abstract sockets, signals


def _code_paths() -> list[Path]:
    """Where Python and its libraries are: readable, as modules may be imported late."""
    found = {Path(sys.prefix), Path(sys.base_prefix) / "lib", Path(__file__).resolve().parents[2]}
    found.update(Path(p) for p in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")))
    found.update(Path(p) for p in ("/usr/lib", "/lib", "/lib64", "/usr/share/zoneinfo"))
    found.update(Path(p) for p in ("/etc/localtime", "/etc/ld.so.cache", "/proc", "/dev/urandom"))
    return sorted(found)


def landlock_abi() -> int:
    """The kernel's Landlock ABI, 0 when it has none."""
    abi = _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return max(0, int(abi))


def _restrict_files(needs: Confinement) -> None:
    global _landlock
    abi = landlock_abi()
    if not abi:
        _landlock = "unavailable"
        _log.warning("this kernel has no Landlock: files are guarded by permissions only")
        return
    handled = (1 << _FS_BITS.get(abi, _FS_BITS_NEWEST)) - 1
    network = 0 if needs.inet or abi < 4 else _NET_TCP
    scoped = _SCOPE_ALL if abi >= 6 else 0
    attribute = struct.pack("=QQQ", handled, network, scoped)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = _libc.syscall(_LANDLOCK_CREATE, attribute, ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        raise ConfineError(f"landlock ruleset: {os.strerror(ctypes.get_errno())}")
    try:
        for path in (*_code_paths(), *needs.read):
            _allow(ruleset, path, _FS_READ & handled, must_exist=False)
        _allow(ruleset, Path("/dev/null"), (_FS_READ_FILE | _FS_WRITE_FILE) & handled, False)
        for path in needs.execute:
            _allow(ruleset, path, (_FS_READ | _FS_EXECUTE) & handled, must_exist=False)
        for path in needs.write:
            _allow(ruleset, path, handled & ~_FS_EXECUTE, must_exist=True)
        if _libc.syscall(_LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0)):
            raise ConfineError(f"landlock: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(ruleset)
    _landlock = f"abi {abi}"


def _allow(ruleset: int, path: Path, access: int, must_exist: bool) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if must_exist:
            raise ConfineError(f"{path} must exist before the restriction: {error}") from error
        return
    try:
        if not Path(f"/proc/self/fd/{fd}").is_dir():
            access &= _FS_FILE_ONLY
        rule = struct.pack("=Qi", access, fd)
        if _libc.syscall(
            _LANDLOCK_ADD,
            ctypes.c_int(ruleset),
            ctypes.c_int(_RULE_PATH_BENEATH),
            rule,
            ctypes.c_uint32(0),
        ):
            raise ConfineError(f"landlock rule {path}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)


# ---- seccomp

# System calls that no service needs: name -> (x86_64, aarch64), None where it has none.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_by_handle_at": (304, 265),
    "perf_event_open": (298, 241),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "pidfd_getfd": (438, 438),
    "mount_setattr": (442, 442),
    "personality": (135, 92),
}
_PROGRAMS = {"execve": (59, 221), "execveat": (322, 281)}
_CLONE, _CLONE3, _SOCKET = (56, 220), (435, 435), (41, 198)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32_BIT = 0x40000000
_CLONE_NEW = 0x7E020080  # every CLONE_NEW* flag

_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_LD_W, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW = 0x7FFF0000
_KILL = 0x80000000


def _refuse_with(number: int) -> int:
    return 0x00050000 | number


class _Filter(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_uint16), ("filter", ctypes.POINTER(_Filter))]


def _program(needs: Confinement, column: int, audit: int) -> list[tuple[int, int, int, int]]:
    """The filter as (code, jump if true, jump if false, value); data: nr, arch, ip, args."""
    unknown = set(needs.keep_calls) - set(_REFUSED)
    if unknown:
        raise ConfineError(f"not in the list of refused system calls: {', '.join(sorted(unknown))}")
    families = [_AF_UNIX] if needs.unix else []
    if needs.inet:
        families += [_AF_INET, _AF_INET6]
    if needs.inet or needs.netlink:
        families.append(_AF_NETLINK)
    rules = [
        (_LD_W, 0, 0, 4),
        (_JEQ, 1, 0, audit),
        (_RET, 0, 0, _KILL),
        (_LD_W, 0, 0, 0),
    ]
    if column == 0:
        rules += [(_JGE, 0, 1, _X32_BIT), (_RET, 0, 0, _refuse_with(errno.EPERM))]
    refused = [calls for name, calls in _REFUSED.items() if name not in needs.keep_calls]
    if not needs.execute:
        refused += _PROGRAMS.values()
    for calls in refused:
        number = calls[column]
        if number is not None:
            rules += [(_JEQ, 0, 1, number), (_RET, 0, 0, _refuse_with(errno.EPERM))]
    # clone3 hides its flags behind a pointer: libc falls back to clone.
    rules += [(_JEQ, 0, 1, _CLONE3[column]), (_RET, 0, 0, _refuse_with(errno.ENOSYS))]
    if "unshare" not in needs.keep_calls:
        rules += [
            (_JEQ, 0, 4, _CLONE[column]),
            (_LD_W, 0, 0, 16),
            (_JSET, 0, 1, _CLONE_NEW),
            (_RET, 0, 0, _refuse_with(errno.EPERM)),
            (_RET, 0, 0, _ALLOW),
        ]
    rules += [(_JEQ, 0, len(families) + 2, _SOCKET[column]), (_LD_W, 0, 0, 16)]
    for at, family in enumerate(families):
        rules.append((_JEQ, len(families) - at, 0, family))
    rules += [(_RET, 0, 0, _refuse_with(errno.EAFNOSUPPORT)), (_RET, 0, 0, _ALLOW)]
    return rules


def _filter_calls(needs: Confinement) -> None:
    row = _ARCHITECTURES.get(platform.machine())
    if row is None:
        _log.warning("no system call filter for %s", platform.machine())
        return
    rules = _program(needs, *row)
    array = (_Filter * len(rules))(*(_Filter(*rule) for rule in rules))
    program = _Program(len(rules), array)
    if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        raise ConfineError(f"seccomp: {os.strerror(ctypes.get_errno())}")
