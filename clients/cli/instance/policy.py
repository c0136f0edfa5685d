"""`bulkhead policy`: what policy says of a call, what is wrong with it, who has a socket.

Owns the sentences. Must not evaluate by itself: the same evaluator decides here and in
the service. Invariant: explain names the file and the line that decided, or says that
no rule did.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bulkhead.config import Settings
from bulkhead.model.policy import Decision, Evaluator, InfoWorld, parse, problems
from bulkhead.policy_files import PolicyFiles
from clients.admin import AdminClient, AdminError

REMEDY = "until it is mended, every call that policy decides is denied"


class PolicyCommandError(Exception):
    """Why the command could not be carried out, one sentence."""


def _client(settings: Settings, socket: str) -> AdminClient:
    return AdminClient(settings.admin_sockets()[socket])


def lint(settings: Settings) -> list[str]:
    """Every problem of the policy files below the root; empty = policy is in force."""
    try:
        tree, legacy = PolicyFiles.of(settings).read()
    except (OSError, ValueError) as error:
        return [str(error)]
    return problems(tree, legacy)


def explain(settings: Settings, caller: str, call: str, target: str) -> tuple[bool, list[str]]:
    """Whether the call is allowed, and the lines that say why.

    call: METHOD or METHOD+ARGUMENT. PolicyCommandError when the instance does not answer.
    """
    if caller in ("dom0", "@adminvm"):
        return True, ["allow: dom0 is not subject to policy"]
    broken = lint(settings)
    if broken:
        return False, ["deny: the policy has errors, and then everything is denied", *broken]
    try:
        reply = _client(settings, "internal").call("internal.GetSystemInfo", timeout=30.0)
    except (OSError, *AdminError) as error:
        raise PolicyCommandError(
            f"the instance does not say which qubes there are: {error}"
        ) from error
    tree, legacy = PolicyFiles.of(settings).read()
    evaluator = Evaluator(InfoWorld(json.loads(reply)))
    evaluator.replace(parse(tree, legacy))
    method, _, argument = call.partition("+")
    decision = evaluator.decide(method, "+" + argument, caller, target)
    return decision.allowed, describe(decision, caller, method, argument, target)


def describe(decision: Decision, caller: str, method: str, argument: str, target: str) -> list[str]:
    """The decision for a person."""
    lines = [f"{decision.outcome}: {caller} -> {target}, {method}+{argument}: {decision.why}"]
    rule = decision.rule
    if rule is not None:
        lines.append(f"{rule.where}: {rule.text}")
        lines += [f"    included from {where}" for where in rule.via]
    if decision.requested and decision.requested != target:
        lines.append(f"the requested target counts as {decision.requested}")
    if decision.allowed:
        lines.append(f"the call goes to {decision.target}")
        if decision.target != "dom0" and method.startswith(("admin.", "bulkhead.")):
            lines.append(
                "note: an Admin API call has to go to dom0; without target=dom0 in the rule "
                "it reaches the qube, and a caller's own socket refuses it"
            )
    return lines


def includes(directory: Path | None) -> int:
    """Print which call belongs to which include file, or write the files."""
    argv = [sys.executable, "-m", "services.adminapi.includes"]
    if directory is not None:
        argv += ["--write", str(directory.absolute())]
    return subprocess.run(argv, check=False, cwd="/", timeout=120).returncode


def open_socket(settings: Settings, qube: str) -> str:
    """Path of the qube's own socket, made where it is not there."""
    return _client(settings, "admin").call("bulkhead.caller.Open", qube, timeout=30.0).decode()


def close_socket(settings: Settings, qube: str) -> None:
    """Take the qube's own socket away."""
    _client(settings, "admin").call("bulkhead.caller.Close", qube, timeout=30.0)


def sockets(settings: Settings) -> list[str]:
    """`NAME PATH` of every qube that has a socket of its own."""
    return (
        _client(settings, "admin").call("bulkhead.caller.List", timeout=30.0).decode().splitlines()
    )
