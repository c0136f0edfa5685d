"""The `bulkhead` command: one instance from its birth to its stop.

Owns argument parsing and printing. Must not import services: they are processes of
their own, reached by the Admin API, by the operator's bus calls, or started by name.
Invariant: every failure ends in one sentence on stderr and a non-zero exit status.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path

from bulkhead import extensions
from bulkhead.config import QEMU_USER, Settings, SettingsError
from bulkhead.reflink import can_share_blocks
from clients.cli.instance import accounts as account_table
from clients.cli.instance import layout
from clients.cli.instance.hypervisor import HypervisorError, choose
from clients.cli.instance.supervisor import LaunchError, Supervisor

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0


class CommandError(Exception):
    """Something that the person at the keyboard has to know or to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except (CommandError, LaunchError, SettingsError, HypervisorError) as error:
        print(f"bulkhead: {error}", file=sys.stderr)
        return 1
    except account_table.AccountError as error:
        print(f"bulkhead: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bulkhead", description="The management core of a Qubes-style system."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument(
            "--root",
            type=Path,
            default=Path("/"),
            metavar="DIR",
            help="everything lives below DIR (default: /)",
        )
        sub.set_defaults(run=run)
        return sub

    init = command("init", cmd_init, "make a new, empty store")
    init.add_argument(
        "--pool-dir",
        type=Path,
        metavar="DIR",
        help="where the pool varlibqubes keeps its files; a file system with "
        "reflink makes clones instant",
    )

    init.add_argument(
        "--adopt",
        action="store_true",
        help="take over the store of release 4.4 that is there, instead of making a new one",
    )

    start = command("run", cmd_run, "start all services and stay in the foreground")
    start.add_argument(
        "--hypervisor",
        metavar="URI",
        help="xen:///system, qemu:///system, qemu:///session or sim: "
        "(default: what this machine has)",
    )
    start.add_argument(
        "--uplink-namespace",
        default="",
        metavar="NAME",
        help="network namespace that the outermost network qubes reach the "
        "world through (default: none)",
    )

    status = command("status", cmd_status, "show each service: pid, user, privileges, lag")
    status.add_argument("--json", action="store_true", help="machine-readable")

    command("doctor", cmd_doctor, "look for what is wrong and say how to mend it")

    history = command("history", cmd_history, "list the changes of the store, newest first")
    history.add_argument("--qube", default="", help="only changes of this qube")
    history.add_argument("--limit", type=int, default=20, metavar="N")
    history.add_argument("--json", action="store_true", help="machine-readable")

    audit = command("audit", cmd_audit, "read the audit log and verify its chain")
    audit.add_argument("--verify", action="store_true", help="check every byte, print no records")
    audit.add_argument("--qube", default="", metavar="NAME", help="only what tells of this qube")
    audit.add_argument(
        "--since",
        default="",
        metavar="WHEN",
        help="a date or time (2026-01-31, 2026-01-31T12:00), or how long ago (90s, 10m, 2h, 3d)",
    )
    audit.add_argument("--json", action="store_true", help="machine-readable, one record a line")
    audit.add_argument("--follow", action="store_true", help="go on with what is written later")

    command("dump", cmd_dump, "print the whole state in a canonical form")
    foreign = command("resolve", cmd_resolve, "decide about a qubes.xml that was edited by hand")
    decision = foreign.add_mutually_exclusive_group(required=True)
    decision.add_argument("--adopt", action="store_true", help="take the edited file over")
    decision.add_argument("--discard", action="store_true", help="write the store's state over it")

    command("stop", cmd_stop, "stop the instance; qubes go on running")

    kernel = command("kernel", cmd_kernel_usage, "manage kernels for qubes")
    verbs = kernel.add_subparsers(dest="verb", required=True, metavar="VERB")
    add = verbs.add_parser("add", help="install a kernel under a name")
    add.add_argument("name")
    add.add_argument("--vmlinuz", type=Path, required=True, metavar="FILE")
    add.add_argument("--initramfs", type=Path, metavar="FILE")
    add.add_argument(
        "--modules", type=Path, metavar="FILE", help="modules.img, a file system image"
    )
    remove = verbs.add_parser("remove", help="remove a kernel")
    remove.add_argument("name")
    listing = verbs.add_parser("list", help="list installed kernels")
    for sub, function in (
        (add, cmd_kernel_add),
        (remove, cmd_kernel_remove),
        (listing, cmd_kernel_list),
    ):
        sub.add_argument("--root", type=Path, default=Path("/"), metavar="DIR")
        sub.set_defaults(run=function)
    _policy_parser(command)
    return parser


def _policy_parser(command: Callable[..., argparse.ArgumentParser]) -> None:
    policy = command("policy", cmd_policy, "explain, check and prepare policy; callers' sockets")
    verbs = policy.add_subparsers(dest="verb", required=True, metavar="VERB")
    explain = verbs.add_parser("explain", help="say which file and line decides a call")
    explain.add_argument("caller", metavar="CALLER")
    explain.add_argument("call", metavar="METHOD[+ARGUMENT]")
    explain.add_argument("target", metavar="TARGET")
    lint = verbs.add_parser("lint", help="list every error of the policy files")
    includes = verbs.add_parser("includes", help="the default policy files of the Admin API")
    includes.add_argument(
        "--write", type=Path, metavar="DIR", help="write them into a policy.d directory"
    )
    opening = verbs.add_parser("open", help="give a qube a socket on which policy decides")
    closing = verbs.add_parser("close", help="take a qube's socket away")
    for sub in (opening, closing):
        sub.add_argument("qube", metavar="QUBE")
    listing = verbs.add_parser("callers", help="list the qubes with a socket of their own")
    for sub in (explain, lint, includes, opening, closing, listing):
        # A default here would hide the one given before the verb.
        sub.add_argument("--root", type=Path, default=argparse.SUPPRESS, metavar="DIR")


# ---- init and run


def _absolute(root: Path) -> Path:
    return root.absolute()


def cmd_init(args: argparse.Namespace) -> int:
    """Make directories, accounts (as root) and the store; refuses an existing one."""
    settings = Settings(root=_absolute(args.root))
    settings.check()
    if args.adopt:
        return _adopt(settings, args.pool_dir)
    if settings.store_file.exists() or settings.journal_file.exists():
        raise CommandError(
            f"{settings.store_file} exists already: nothing was changed; "
            f"start it with: bulkhead run --root {settings.root}"
        )
    pool_dir = _absolute(args.pool_dir) if args.pool_dir else None
    accounts = account_table.ensure_accounts() if os.getuid() == 0 else {}
    layout.ensure(settings, accounts, pool_dir)
    if accounts:
        _refuse_closed(pool_dir or settings.state_dir)
    registry = accounts.get("registry")
    argv = [sys.executable, "-m", "services.registry.initialise", "--root", str(settings.root)]
    if pool_dir is not None:
        argv += ["--pool-dir", str(pool_dir)]
    argv += ["--reflink", "yes" if can_share_blocks(pool_dir or settings.state_dir) else "no"]
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        timeout=120,
        user=registry.uid if registry else None,
        group=registry.gid if registry else None,
        extra_groups=list(registry.groups) if registry else None,
    )
    if done.returncode != 0:
        raise CommandError(f"the store could not be made: {done.stderr.strip()}")
    print(
        f"made {settings.store_file}; pool varlibqubes keeps its files in "
        f"{pool_dir or settings.state_dir}"
    )
    return 0


def _adopt(settings: Settings, pool_dir: Path | None) -> int:
    """A store of release 4.4, as it stands there, becomes this instance's."""
    from clients.cli.instance import adoption

    if pool_dir is not None:
        raise CommandError("--adopt keeps the pools that the store names: leave --pool-dir out")
    try:
        parsed = adoption.examine(settings)
        accounts = account_table.ensure_accounts() if os.getuid() == 0 else {}
        layout.ensure(settings, accounts, None)
        report = adoption.adopt(settings, parsed, accounts)
    except (adoption.AdoptionError, OSError) as error:
        raise CommandError(str(error)) from error
    for warning in report.warnings:
        print(warning)
    print(
        f"{settings.store_file} is adopted, {report.copied} file(s) of its qubes were moved; "
        f"start it with: bulkhead run --root {settings.root}"
    )
    return 0


def _refuse_closed(directory: Path) -> None:
    """Services have users of their own: each folder on the way must let them through."""
    for parent in directory.parents:
        if not parent.stat().st_mode & 0o001:
            raise CommandError(
                f"{parent} is closed to other users, and {directory} is below it: choose another "
                f"place, or open it with: chmod o+x {parent}"
            )


def _pool_dir(settings: Settings) -> Path | None:
    """dir_path of the pool varlibqubes as the store says, None when it cannot be read."""
    import xml.etree.ElementTree as ElementTree

    try:
        tree = ElementTree.parse(settings.store_file)
    except (OSError, ElementTree.ParseError):
        return None
    for pool in tree.iterfind("./pools/pool"):
        if pool.get("name") == "varlibqubes" and pool.get("dir_path"):
            return Path(str(pool.get("dir_path")))
    return None


def cmd_run(args: argparse.Namespace) -> int:
    """Start everything, stay until SIGTERM or SIGINT, stop cleanly."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    root = _absolute(args.root)
    probe = Settings(root=root)
    if not probe.store_file.exists() and not probe.journal_file.exists():
        raise CommandError(
            f"there is no store below {root}: make one with: bulkhead init --root {root}"
        )
    choice = choose(args.hypervisor, uid=os.getuid())
    print(f"hypervisor {choice.uri}: {choice.why}", flush=True)
    isolated = os.getuid() == 0
    declared = [extension.service for extension in extensions.load(root)]
    accounts = account_table.ensure_accounts(declared) if isolated else {}
    uri = choice.uri
    if choice.own_libvirtd:
        # Its socket is below the root: libvirt's own default is the machine's libvirtd.
        private = probe.service_dir("libvirt") / "libvirt-sock"
        uri = f"{uri}?socket={urllib.parse.quote(str(private))}"
    settings = Settings(
        root=root,
        hypervisor=uri,
        isolated=isolated,
        users={name: account.uid for name, account in accounts.items()},
        uplink_namespace=args.uplink_namespace,
        qemu_user=QEMU_USER if choice.own_libvirtd and isolated else "",
        libvirt_socket=str(probe.bus_dir / "libvirt/libvirt-sock") if choice.own_libvirtd else "",
    )
    settings.check()
    layout.ensure(settings, accounts, _pool_dir(settings))
    if not isolated:
        print(
            "isolation is off: all services run as one user, because this is not root", flush=True
        )
    return asyncio.run(_run(Supervisor(settings, accounts, own_libvirtd=choice.own_libvirtd)))


async def _run(supervisor: Supervisor) -> int:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    began = time.monotonic()
    await supervisor.start()
    try:
        ready = asyncio.create_task(_ready(supervisor))
        stop = asyncio.create_task(ended.wait())
        await asyncio.wait({ready, stop}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            ready.result()
            path = supervisor.settings.admin_sockets()["admin"]
            print(f"ready after {time.monotonic() - began:.2f} s: {path}", flush=True)
            _notify_systemd()
        else:
            ready.cancel()
        await stop
    finally:
        await supervisor.stop()
    return 0


async def _ready(supervisor: Supervisor) -> None:
    """The Admin API answers, and no service is still on its way."""
    await supervisor.wait_ready(READY_TIMEOUT_S)
    await supervisor.wait_all(READY_TIMEOUT_S)


def _notify_systemd() -> None:
    """READY=1 where systemd started us (Type=notify)."""
    import socket

    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(address)
        notify.sendall(b"READY=1")


def _launcher(settings: Settings) -> dict[str, object]:
    path = settings.bus_dir / "launcher.json"
    try:
        data: dict[str, object] = json.loads(path.read_text())
    except FileNotFoundError:
        raise CommandError(f"nothing runs below {settings.root}: {path} is not there") from None
    return data


def cmd_stop(args: argparse.Namespace) -> int:
    """SIGTERM to the launcher, wait for its end."""
    settings = Settings.load(_absolute(args.root))
    pid = _launcher(settings)["pid"]
    assert isinstance(pid, int)
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        (settings.bus_dir / "launcher.json").unlink(missing_ok=True)
        print("the launcher was dead already; its note was removed")
        return 0
    import select

    os.kill(pid, signal.SIGTERM)
    readable, _, _ = select.select([handle], [], [], STOP_TIMEOUT_S)
    os.close(handle)
    if not readable:
        raise CommandError(f"process {pid} did not stop within {STOP_TIMEOUT_S:.0f} s")
    print("stopped")
    return 0


# ---- looking


def cmd_status(args: argparse.Namespace) -> int:
    """One line per service; exit status 1 when one does not answer."""
    from clients.cli.instance import operator

    settings = Settings.load(_absolute(args.root))
    rows = operator.health_of_all(settings, _launcher(settings))
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        operator.print_status(settings, rows)
    return 0 if all(row["ready"] for row in rows) else 1


def cmd_doctor(args: argparse.Namespace) -> int:
    """Findings with remedies; exit status 1 when there is one."""
    from clients.cli.instance import doctor

    findings = doctor.examine(_absolute(args.root))
    for finding in findings:
        print(f"{finding.object}: {finding.problem}\n    remedy: {finding.remedy}")
    print(f"{len(findings)} finding(s)" if findings else "nothing is wrong")
    return 1 if findings else 0


def cmd_history(args: argparse.Namespace) -> int:
    """The audit records of the registry, newest first."""
    from clients.cli.instance import operator

    settings = Settings.load(_absolute(args.root))
    entries = operator.history(settings, qube=args.qube, limit=args.limit)
    if args.json:
        print(json.dumps(entries, indent=1))
        return 0
    for entry in entries:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(str(entry["time"]))))
        print(
            f"{entry['revision']:>8}  {stamp}  {entry['source'] or entry['caller']:<16} "
            f"{entry['method']}  {entry['result']}"
        )
    return 0


def cmd_audit(args: argparse.Namespace) -> int:
    """Records of the audit log, oldest first; exit status 1 when the chain is broken."""
    from clients.cli.instance import audit

    settings = Settings(root=_absolute(args.root))
    try:
        return audit.show(
            settings,
            verify=args.verify,
            qube=args.qube,
            since=args.since,
            as_json=args.json,
            follow=args.follow,
        )
    except audit.AuditError as error:
        raise CommandError(str(error)) from None


def cmd_policy(args: argparse.Namespace) -> int:
    """The verbs of `bulkhead policy`; explain: exit status 1 where the call is refused."""
    from clients.admin import AdminError
    from clients.cli.instance import policy

    settings = Settings(root=_absolute(args.root))
    try:
        match args.verb:
            case "explain":
                allowed, lines = policy.explain(settings, args.caller, args.call, args.target)
                print("\n".join(lines))
                return 0 if allowed else 1
            case "lint":
                found = policy.lint(settings)
                print("\n".join([*found, policy.REMEDY]) if found else "no errors")
                return 1 if found else 0
            case "includes":
                return policy.includes(args.write)
            case "open":
                print(policy.open_socket(settings, args.qube))
            case "close":
                policy.close_socket(settings, args.qube)
            case _:
                print("\n".join(policy.sockets(settings)) or "no qube has a socket of its own")
    except (policy.PolicyCommandError, *AdminError) as error:
        raise CommandError(str(error)) from None
    return 0


def cmd_dump(args: argparse.Namespace) -> int:
    """Canonical dump to stdout."""
    from clients.cli.instance import operator

    sys.stdout.write(operator.dump(Settings.load(_absolute(args.root))))
    return 0


def cmd_resolve(args: argparse.Namespace) -> int:
    """Adopt or discard a foreign edit."""
    from clients.cli.instance import operator

    revision = operator.resolve(Settings.load(_absolute(args.root)), adopt=args.adopt)
    print(f"{'adopted' if args.adopt else 'discarded'}; the store is at revision {revision}")
    return 0


# ---- kernels


def cmd_kernel_usage(args: argparse.Namespace) -> int:  # noqa: ARG001 - argparse demands a verb
    """Never reached: the verb is required."""
    raise CommandError("say add, remove or list")


def cmd_kernel_add(args: argparse.Namespace) -> int:
    """Spool the files where storage can read them, then bulkhead.kernel.Add."""
    from clients.cli.instance import kernels

    kernels.add(
        Settings.load(_absolute(args.root)),
        args.name,
        vmlinuz=args.vmlinuz,
        initramfs=args.initramfs,
        modules=args.modules,
    )
    print(f"kernel {args.name} installed")
    return 0


def cmd_kernel_remove(args: argparse.Namespace) -> int:
    """bulkhead.kernel.Remove."""
    from clients.cli.instance import kernels

    kernels.remove(Settings.load(_absolute(args.root)), args.name)
    print(f"kernel {args.name} removed")
    return 0


def cmd_kernel_list(args: argparse.Namespace) -> int:
    """bulkhead.kernel.List."""
    from clients.cli.instance import kernels

    for line in kernels.listing(Settings.load(_absolute(args.root))):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
