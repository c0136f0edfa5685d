"""qvm-start, qvm-shutdown, qvm-kill: the power of qubes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

from clients.admin import AdminClient, exceptions
from clients.cli import tool

RETRY_S = 0.5


def _each(names: Sequence[str], act: Callable[[str], None], verb: str) -> int:
    """Do it for every qube; failures are told, the others still get their turn."""
    failed = 0
    for name in names:
        try:
            act(name)
        except (exceptions.QubesException, exceptions.PermissionDenied, tool.ToolError) as error:
            failed += 1
            tool.complain(f"{name} was not {verb}: {error.args[0] if error.args else error}")
    return 1 if failed else 0


def _states(api: AdminClient) -> dict[str, str]:
    return {line.name: line.state for line in api.qubes()}


def start_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Start every qube named (or those that start by themselves)."""
    names = list(args.names)
    if args.all:
        names = [
            line.name
            for line in api.qubes()
            if line.klass not in ("AdminVM", "RemoteVM")
            and api.get(line.name, "autostart").value == "True"
        ]
    if not names:
        raise tool.UsageError("name a qube, or say --all")
    before = _states(api)

    def act(name: str) -> None:
        if before.get(name) not in (None, "Halted"):
            if args.skip_if_running:
                return
            raise tool.ToolError(f"{name} is {before[name]} already")
        with tool.progress(api, f"starting {name}", kind="START", qube=name, quiet=args.quiet):
            api.call("admin.vm.Start", name)

    return _each(names, act, "started")


def shutdown_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Shut down; with --wait until all are halted, then kill what is too slow."""
    names = list(args.names)
    if args.all:
        excluded = set(args.exclude)
        names = [
            line.name
            for line in api.qubes()
            if line.klass not in ("AdminVM", "RemoteVM")
            and line.state != "Halted"
            and line.name not in excluded
        ]
    elif not names:
        raise tool.UsageError("name a qube, or say --all")
    elif args.exclude:
        raise tool.UsageError("--exclude goes with --all")
    words = "+".join(word for word in ("force",) if args.force)
    pending = list(names)
    deadline = time.monotonic() + args.timeout
    failures = 0
    asked: set[str] = set()
    while pending:
        left: list[str] = []
        states = _states(api)
        for name in pending:
            if name not in states:
                if name not in asked:
                    failures += 1
                    tool.complain(f"no such qube: {name}")
                continue
            if states[name] == "Halted":
                continue
            if name not in asked:
                try:
                    api.call("admin.vm.Shutdown", name, words)
                    asked.add(name)
                except exceptions.QubesVMInUseError as error:
                    # Its clients may be on their way down: try again until the time is up.
                    if not (args.wait or args.all):
                        failures += 1
                        tool.complain(str(error.args[0]))
                        continue
                except exceptions.QubesVMNotStartedError:
                    continue
                except exceptions.QubesException as error:
                    failures += 1
                    tool.complain(f"{name} was not shut down: {error.args[0]}")
                    continue
            left.append(name)
        if not args.wait:
            left = [name for name in left if name not in asked]
        pending = left
        if pending and time.monotonic() > deadline:
            break
        if pending:
            time.sleep(RETRY_S if len(pending) > 1 else 0.05)
    for name in pending:
        if name in asked and args.wait:
            tool.complain(f"{name} did not stop within {args.timeout:.0f} s: killed")
            try:
                api.call("admin.vm.Kill", name)
            except exceptions.QubesVMNotStartedError:
                continue
        else:
            failures += 1
            tool.complain(f"{name} was not shut down in time")
    return 1 if failures else 0


def kill_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Kill every qube named."""
    return _each(args.names, lambda name: _kill(api, name), "killed")


def _kill(api: AdminClient, name: str) -> None:
    api.call("admin.vm.Kill", name)


def start(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvm-start."""
    made = tool.parser("qvm-start", "Start qubes.")
    made.add_argument("names", nargs="*", metavar="VMNAME")
    made.add_argument("--all", action="store_true", help="those whose autostart is set")
    made.add_argument("--skip-if-running", action="store_true", help="a running one is no error")
    return tool.run(made, start_work, argv)


def shutdown(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvm-shutdown."""
    made = tool.parser("qvm-shutdown", "Shut qubes down.")
    made.add_argument("names", nargs="*", metavar="VMNAME")
    made.add_argument("--all", action="store_true", help="every running qube")
    made.add_argument("--exclude", action="append", default=[], metavar="VMNAME")
    made.add_argument("--wait", action="store_true", help="wait until they are halted")
    made.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS")
    made.add_argument("--force", action="store_true", help="even if others need it")
    return tool.run(made, shutdown_work, argv)


def kill(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvm-kill."""
    made = tool.parser("qvm-kill", "End qubes at once.")
    made.add_argument("names", nargs="+", metavar="VMNAME")
    return tool.run(made, kill_work, argv)
