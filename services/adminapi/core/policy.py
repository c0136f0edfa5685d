"""qrexec policy as far as the Admin API asks it: rules of the 5.0 format, first match.

Owns the syntax of rules and their evaluation. Must not know where files are. Invariant:
any error anywhere means that no rule holds, and then nothing is allowed; "ask" counts
as no.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from bulkhead.model.evaluate import evaluate, power_state, template_for_dispvms
from bulkhead.model.properties import CLASSES, has_property
from bulkhead.model.records import ADMINVM_NAME, ADMINVM_UUID, Qube
from bulkhead.model.view import View

_SERVICE = re.compile(r"[A-Za-z0-9._-]+")
_ARGUMENT = re.compile(r"\+[A-Za-z0-9_.+-]*")
_UUID = re.compile(r"uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_DEPTH = 16
_RULE_LIMIT = 100_000
_PICKED_LIMIT = 100
_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "target": ("allow", "ask"),
    "default_target": ("ask",),
    "user": ("allow", "ask"),
    "notify": ("allow", "ask", "deny"),
    "autostart": ("allow", "ask"),
}


class PolicyError(ValueError):
    """A file cannot be understood; the text names file and line."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; argument "*" or "+text"; redirect "" = none."""

    service: str
    argument: str
    source: str
    target: str
    action: str
    redirect: str = ""
    autostart: bool = True
    where: str = ""


# ---- syntax


def _parameters(words: list[str], action: str, where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key in found or action not in _PARAMETERS.get(key, ()):
            raise PolicyError(f"{where}: parameter {word!r} is not possible here")
        if key in ("notify", "autostart") and value not in ("yes", "no"):
            raise PolicyError(f"{where}: {key} is yes or no")
        if key in ("target", "default_target"):
            _check_token(value, "redirect", where)
        found[key] = value
    return found


def _check_token(token: str, column: str, where: str) -> None:
    """column: "source", "target" or "redirect"."""
    if not _token_fits(token, column):
        raise PolicyError(f"{where}: {token!r} cannot be a {column}")


def _token_fits(token: str, column: str) -> bool:
    redirect = column == "redirect"
    if not token.startswith("@"):
        if token == "*":
            return not redirect
        return bool(token) and (not token.startswith("uuid:") or bool(_UUID.fullmatch(token)))
    if token == "@adminvm":
        return True
    if token == "@anyvm":
        return not redirect
    if token in ("@default", "@dispvm"):
        return column == "target" or (redirect and token == "@dispvm")
    if token.startswith("@type:"):
        return not redirect and token[6:] in CLASSES
    if token.startswith("@tag:"):
        return not redirect and bool(token[5:])
    if token.startswith("@dispvm:@tag:"):
        return not redirect and bool(token[13:])
    return token.startswith("@dispvm:") and bool(token[8:]) and not token[8:].startswith("@")


def _rule(service: str, argument: str, words: list[str], where: str) -> Rule:
    if service != "*" and not _SERVICE.fullmatch(service):
        raise PolicyError(f"{where}: {service!r} is no service")
    if argument != "*" and not _ARGUMENT.fullmatch(argument):
        raise PolicyError(f"{where}: {argument!r} is no argument")
    if service == "*" and argument != "*":
        raise PolicyError(f"{where}: service * needs argument *")
    if len(words) < 3:
        raise PolicyError(f"{where}: a rule is SERVICE ARGUMENT SOURCE TARGET ACTION")
    source, target, action, *rest = words
    _check_token(source, "source", where)
    _check_token(target, "target", where)
    if action not in ("allow", "ask", "deny"):
        raise PolicyError(f"{where}: {action!r} is not allow, ask or deny")
    found = _parameters(rest, action, where)
    if action == "allow" and target == "@default" and "target" not in found:
        raise PolicyError(f"{where}: allow for @default needs target=")
    return Rule(
        service,
        argument,
        source,
        target,
        action,
        found.get("target", ""),
        found.get("autostart", "yes") == "yes",
        where,
    )


class _Reader:
    """Expands includes; files maps paths relative to the policy directory to texts."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = files
        self._count = 0

    def _text(self, path: str, where: str) -> str:
        text = self._files.get(path)
        if text is None:
            raise PolicyError(f"{where}: there is no file {path}")
        return text

    def _counted(self, rule: Rule) -> Rule:
        self._count += 1
        if self._count > _RULE_LIMIT:
            raise PolicyError(f"more than {_RULE_LIMIT} rules")
        return rule

    def read(self, path: str, where: str = "", depth: int = 0) -> Iterator[Rule]:
        """The rules of a file of the 5.0 format."""
        if depth > _DEPTH:
            raise PolicyError(f"{where}: includes are nested too deep")
        for number, line in enumerate(self._text(path, where or path).splitlines(), 1):
            at = f"{path}:{number}"
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if words[0].startswith("!"):
                yield from self._directive(words, at, depth)
            elif len(words) < 2:
                raise PolicyError(f"{at}: a rule is SERVICE ARGUMENT SOURCE TARGET ACTION")
            else:
                yield self._counted(_rule(words[0], words[1], words[2:], at))

    def _directive(self, words: list[str], at: str, depth: int) -> Iterator[Rule]:
        match words:
            case ["!include", path]:
                yield from self.read(path, at, depth + 1)
            case ["!include-dir", directory]:
                prefix = directory.rstrip("/") + "/"
                for path in sorted(p for p in self._files if p.startswith(prefix)):
                    if "/" not in path[len(prefix) :] and path.endswith(".policy"):
                        yield from self.read(path, at, depth + 1)
            case ["!include-service", service, argument, path]:
                yield from self._old(service, argument, path, at, depth + 1)
            case ["!compat-4.0"]:
                return  # the directory of release 4.0 has no rules for admin.* to add
            case _:
                raise PolicyError(f"{at}: {words[0]} is not understood")

    def _old(self, service: str, argument: str, path: str, at: str, depth: int) -> Iterator[Rule]:
        """The rules of a file of the older form, for one service."""
        if depth > _DEPTH:
            raise PolicyError(f"{at}: includes are nested too deep")
        for number, line in enumerate(self._text(path, at).splitlines(), 1):
            here = f"{path}:{number}"
            stripped = line.strip()
            if not stripped or stripped.startswith("#"):
                continue
            if stripped.startswith(("$include:", "!include ")):
                other = stripped.removeprefix("$include:").removeprefix("!include ").strip()
                yield from self._old(service, argument, other, here, depth + 1)
                continue
            if stripped.startswith("!"):
                raise PolicyError(f"{here}: {stripped.split()[0]} is not possible here")
            words = stripped.replace("$", "@").replace(",", " ").split()
            yield self._counted(_rule(service, argument, words, here))


def parse(files: Mapping[str, str]) -> tuple[Rule, ...]:
    """All rules in order. PolicyError on any error in any file.

    files: path relative to the policy directory -> text. The *.policy files at the top
    are read by name; what they include lies in the same mapping.
    """
    reader = _Reader(files)
    tops = sorted(
        path
        for path in files
        if "/" not in path and path.endswith(".policy") and not path.startswith(".")
    )
    for path in tops:
        if not re.fullmatch(r"[0-9a-z_.-]+", path):
            raise PolicyError(f"{path}: the name of a policy file has forbidden characters")
    return tuple(rule for path in tops for rule in reader.read(path))


# ---- evaluation


class Evaluator:
    """Answers allow or not, for the present rules and the present qubes.

    view: the present view. last_known: the record of a qube that has just gone.
    """

    def __init__(self, view: Callable[[], View], last_known: Callable[[str], Qube | None]) -> None:
        self._view = view
        self._last_known = last_known
        # Rules and what was picked from them, replaced together: replace() may run in
        # another thread than allows().
        self._rules: tuple[tuple[Rule, ...], dict[str, tuple[Rule, ...]]] = ((), {})

    def replace(self, rules: tuple[Rule, ...]) -> None:
        """Use these rules from now on; none = nothing is allowed."""
        self._rules = (rules, {})

    def allows(self, service: str, argument: str, source: str, target: str) -> bool:
        """Whether the first matching rule allows the call; see permission.Policy."""
        if source == ADMINVM_NAME:
            return True
        caller = self._find(source)
        if caller is None:
            return False
        wanted = self._normalised(target)
        if wanted is None:
            return False
        for rule in self._rules_of(service):
            if (
                rule.argument in ("*", argument)
                and self._matches_source(rule.source, caller)
                and self._matches_target(rule.target, wanted, caller)
            ):
                return rule.action == "allow" and self._reaches(rule, wanted, caller)
        return False

    def _rules_of(self, service: str) -> tuple[Rule, ...]:
        rules, picked = self._rules
        found = picked.get(service)
        if found is None:
            found = tuple(r for r in rules if r.service in ("*", service))
            if len(picked) < _PICKED_LIMIT:
                picked[service] = found
        return found

    def _find(self, name: str) -> Qube | None:
        view = self._view()
        if name.startswith("uuid:"):
            return view.by_uuid(name[5:])
        return view.qube(name) or self._last_known(name)

    def _normalised(self, target: str) -> str | Qube | None:
        """A qube, a token that stays one, or None: refused."""
        if target in ("", "@default"):
            return "@default"
        if target == "@adminvm":
            return self._find(ADMINVM_NAME)
        if target == "@dispvm":
            return target
        if target.startswith("@dispvm:"):
            base = self._find(target[8:])
            return target if base is not None and template_for_dispvms(base) else None
        return self._find(target) or "@default"

    def _same(self, token: str, qube: Qube) -> bool:
        if qube.uuid == ADMINVM_UUID:
            return token in (ADMINVM_NAME, "@adminvm", f"uuid:{ADMINVM_UUID}")
        return token in (qube.name, f"uuid:{qube.uuid}")

    def _matches_qube(self, token: str, qube: Qube) -> bool:
        if token == "*":
            return True
        if token == "@anyvm":
            return qube.uuid != ADMINVM_UUID
        if token.startswith("@type:"):
            return qube.klass == token[6:]
        if token.startswith("@tag:"):
            return token[5:] in qube.tags
        return self._same(token, qube)

    def _matches_source(self, token: str, qube: Qube) -> bool:
        return not token.startswith("@dispvm") and self._matches_qube(token, qube)

    def _matches_target(self, token: str, wanted: str | Qube, caller: Qube) -> bool:
        if isinstance(wanted, Qube):
            return not token.startswith("@dispvm") and self._matches_qube(token, wanted)
        if token in ("*", "@anyvm", wanted):
            return True
        if not token.startswith("@dispvm:") or not wanted.startswith("@dispvm"):
            return False
        base = self._base_of(wanted, caller)
        if base is None:
            return False
        if token.startswith("@dispvm:@tag:"):
            return template_for_dispvms(base) and token[13:] in base.tags
        return self._same(token[8:], base)

    def _base_of(self, wanted: str, caller: Qube) -> Qube | None:
        """The disposable template that @dispvm or @dispvm:NAME stands for."""
        name = wanted[8:]
        if not name and has_property(caller.klass, "default_dispvm"):
            value = evaluate(self._view(), caller, "default_dispvm")
            name = str(value or "")
        return self._find(name) if name else None

    def _reaches(self, rule: Rule, wanted: str | Qube, caller: Qube) -> bool:
        """Whether an allowed call has somewhere to go."""
        actual = self._normalised(rule.redirect) if rule.redirect else wanted
        if actual is None or actual == "@default":
            return False
        if isinstance(actual, str):
            return self._base_of(actual, caller) is not None
        if actual.uuid == caller.uuid:
            return False
        running = power_state(self._view(), actual) == "Running"
        return rule.autostart or actual.uuid == ADMINVM_UUID or running
