"""qvm-start, qvm-shutdown, qvm-kill, qvm-pause, qvm-unpause: the power of qubes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from clients.admin import AdminClient, QubeLine, exceptions
from clients.cli import qvm_device, tool

POLL_S = 0.05
DEFAULT_TIMEOUT_S = 60.0


# ---- qvm-start


def start_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Start every qube named, or those that start with the system."""
    lines = api.qubes()
    names = tool.selected(args, lines, lambda line: api.get(line.name, "autostart").value == "True")
    drive = _drive(args)
    if drive is not None and len(names) != 1:
        raise tool.UsageError("a drive goes to one qube")
    states = {line.name: line.state for line in lines}

    def act(name: str) -> None:
        # Start of a qube that runs is a silent success of the daemon.
        if states.get(name) not in (None, "Halted"):
            if args.skip_if_running or args.all:
                return
            raise tool.ToolError(f"{name} is {states[name]} already")
        with tool.progress(api, f"starting {name}", kind="START", qube=name, quiet=args.quiet):
            if drive is None:
                api.call("admin.vm.Start", name)
            else:
                _start_with(api, name, *drive)

    return tool.each(names, act, "started")


def _drive(args: argparse.Namespace) -> tuple[str, str] | None:
    """("disk" or "cdrom", BACKEND:PORT) of the drive options."""
    if args.hddisk:
        return "disk", args.hddisk
    if args.cdrom:
        return "cdrom", args.cdrom
    if not args.drive:
        return None
    kind, _, device = args.drive.partition(":")
    if kind == "hd":
        return "disk", device
    return "cdrom", device if kind == "cdrom" else args.drive


def _start_with(api: AdminClient, name: str, kind: str, text: str) -> None:
    """Start with a block device that is assigned for this start only."""
    found = qvm_device.find(api, "block", text)
    options = {"devtype": kind, "read-only": "yes" if kind == "cdrom" else "no"}
    argument = qvm_device.argument(found.ident)
    payload = qvm_device.assignment(found, "required", options)
    api.call("admin.vm.device.block.Assign", name, argument, payload)
    try:
        api.call("admin.vm.Start", name)
    finally:
        api.call("admin.vm.device.block.Unassign", name, argument)


# ---- qvm-shutdown


def shutdown_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Ask each to shut down; with --wait until all are halted, and kill what is too slow."""
    names = tool.selected(args, api.qubes(), lambda line: line.state != "Halted")
    known = {line.name for line in api.qubes()}
    failures = 0
    pending = []
    for name in names:
        if name in known:
            pending.append(name)
        else:
            failures += 1
            tool.complain(f"{name} was not shut down: there is no such qube")
    if args.dry_run:
        for name in pending:
            print(name)
        return 1 if failures else 0
    rounds = _Shutdown(api, pending, force=args.force, wait=args.wait, patient=args.all)
    deadline = time.monotonic() + args.timeout
    while rounds.go() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    failures += rounds.failures
    for name in rounds.pending:
        if name in rounds.asked:
            tool.complain(f"{name} did not stop within {args.timeout:.0f} s: it is killed")
            failures += _kill_late(api, name)
        else:
            failures += 1
            tool.complain(f"{name} was not shut down: others still use it")
    return 1 if failures else 0


class _Shutdown:
    """The qubes that are not down yet, and who has been asked."""

    def __init__(
        self, api: AdminClient, names: Sequence[str], *, force: bool, wait: bool, patient: bool
    ) -> None:
        self._api = api
        self._words = "force" if force else ""
        self._wait = wait
        # Whoever is used by others may be asked once those are down.
        self._patient = patient or wait
        self.pending = list(names)
        self.asked: set[str] = set()
        self.failures = 0

    def go(self) -> bool:
        """One round; whether anything is left to wait for."""
        states = {line.name: line.state for line in self._api.qubes()}
        self.pending = [
            # A disposable that has stopped is gone.
            name
            for name in self.pending
            if states.get(name, "Halted") != "Halted" and self._keep(name)
        ]
        return bool(self.pending)

    def _keep(self, name: str) -> bool:
        if name not in self.asked:
            try:
                self._api.call("admin.vm.Shutdown", name, self._words)
            except exceptions.QubesVMInUseError as error:
                if self._patient:
                    return True
                return self._failed(name, error)
            except (exceptions.QubesVMNotStartedError, exceptions.QubesVMNotFoundError) as error:
                # It stopped meanwhile; a paused one is of the same family of refusals.
                if isinstance(error, exceptions.QubesVMNotRunningError):
                    return self._failed(name, error)
                return False
            except tool.FAILURES as error:
                return self._failed(name, error)
            self.asked.add(name)
        return self._wait

    def _failed(self, name: str, error: BaseException) -> bool:
        self.failures += 1
        tool.complain(f"{name} was not shut down: {tool.sentence(error)}")
        return False


def _kill_late(api: AdminClient, name: str) -> int:
    try:
        api.call("admin.vm.Kill", name)
    except (exceptions.QubesVMNotStartedError, exceptions.QubesVMNotFoundError):
        return 0
    except tool.FAILURES as error:
        tool.complain(f"{name} was not killed: {tool.sentence(error)}")
        return 1
    return 0


# ---- the others


def kill_work(args: argparse.Namespace, api: AdminClient) -> int:
    """End each at once."""
    names = tool.selected(args, api.qubes(), lambda line: line.state != "Halted")
    return tool.each(names, lambda name: api.call("admin.vm.Kill", name), "killed")


def pause_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Stop the clock of each."""
    names = tool.selected(args, api.qubes(), _running)
    method = "admin.vm.Suspend" if args.suspend else "admin.vm.Pause"
    return tool.each(names, lambda name: api.call(method, name), "paused")


def _running(line: QubeLine) -> bool:
    return line.state in ("Running", "Transient")


def unpause_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Let each go on."""
    names = tool.selected(args, api.qubes(), lambda line: line.state in ("Paused", "Suspended"))

    def act(name: str) -> None:
        words = dict(
            word.partition("=")[::2] for word in api.text("admin.vm.CurrentState", name).split()
        )
        asleep = words.get("power_state") == "Suspended"
        api.call("admin.vm.Resume" if asleep else "admin.vm.Unpause", name)

    return tool.each(names, act, "unpaused")


# ---- entry points


def start(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvm-start."""
    made = tool.parser("qvm-start", "Start qubes.")
    tool.selection(made, "those whose autostart is set")
    made.add_argument("--skip-if-running", action="store_true", help="a running one is no error")
    drive = made.add_mutually_exclusive_group()
    drive.add_argument(
        "--drive",
        metavar="[hd:|cdrom:]BACKEND:PORT",
        help="with this block device for this start only; a CD-ROM unless it says hd:",
    )
    drive.add_argument("--hddisk", metavar="BACKEND:PORT", help="the same as --drive hd:...")
    drive.add_argument("--cdrom", metavar="BACKEND:PORT", help="the same as --drive cdrom:...")
    return tool.run(made, start_work, argv)


def shutdown(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvm-shutdown."""
    made = tool.parser("qvm-shutdown", "Shut qubes down.")
    tool.selection(made, "every qube that runs")
    made.add_argument("--wait", action="store_true", help="until they are halted")
    made.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help="with --wait: kill what runs after that time (60)",
    )
    made.add_argument("--force", action="store_true", help="even if others use it")
    made.add_argument("--dry-run", action="store_true", help="only print who would be asked")
    return tool.run(made, shutdown_work, argv)


def kill(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvm-kill."""
    made = tool.parser("qvm-kill", "End qubes at once.")
    tool.selection(made, "every qube that runs")
    return tool.run(made, kill_work, argv)


def pause(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvm-pause."""
    made = tool.parser("qvm-pause", "Pause qubes.")
    tool.selection(made, "every qube that runs")
    made.add_argument("--suspend", "-S", action="store_true", help="let the guest sleep instead")
    return tool.run(made, pause_work, argv)


def unpause(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvm-unpause."""
    made = tool.parser("qvm-unpause", "Let paused or sleeping qubes go on.")
    tool.selection(made, "every paused qube")
    return tool.run(made, unpause_work, argv)
