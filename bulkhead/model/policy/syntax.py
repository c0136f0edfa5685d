"""Texts of policy files to rules, in the order in which they are asked.

Owns the syntax of the 5.0 format and of the older form that it includes. Must not know
where files are nor which qubes there are. Invariant: any error in any file means that
there are no rules at all, and every rule and every error names its file and line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

_SERVICE = re.compile(r"[A-Za-z0-9._-]+")
_ARGUMENT = re.compile(r"\+[A-Za-z0-9_.+-]*")
_UUID = re.compile(r"uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_FILE_NAME = re.compile(r"[0-9a-z_.-]+")
_DEPTH = 16
_RULE_LIMIT = 100_000
_INCLUDE_LIMIT = 10_000
_PROBLEM_LIMIT = 100
_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "target": ("allow", "ask"),
    "default_target": ("ask",),
    "user": ("allow", "ask"),
    "notify": ("allow", "ask", "deny"),
    "autostart": ("allow", "ask"),
}
_SHAPE = "a rule is SERVICE ARGUMENT SOURCE TARGET ACTION"


class PolicyError(ValueError):
    """A file cannot be understood; the text names file and line."""


@dataclass(frozen=True, slots=True)
class Directory:
    """One policy directory.

    label: how it is called in messages. files: path below it -> text, what rules may
    include among them.
    """

    label: str
    files: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; argument "*" or "+text"; redirect "" = none.

    where: FILE:LINE. via: the lines that included that file, the innermost first.
    text: the line as it is written.
    """

    service: str
    argument: str
    source: str
    target: str
    action: str
    redirect: str = ""
    autostart: bool = True
    where: str = ""
    via: tuple[str, ...] = ()
    text: str = ""


# ---- tokens


def token_fits(token: str, column: str) -> bool:
    """Whether a word may stand in a column: "source", "target" or "redirect"."""
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
        return not redirect and bool(token[6:])
    if token.startswith("@tag:"):
        return not redirect and bool(token[5:])
    if token.startswith("@dispvm:@tag:"):
        return not redirect and bool(token[13:])
    return token.startswith("@dispvm:") and bool(token[8:]) and not token[8:].startswith("@")


def _check_token(token: str, column: str, where: str) -> None:
    if not token_fits(token, column):
        raise PolicyError(f"{where}: {token!r} cannot be a {column}")


# ---- rules


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


def _check_service(service: str, argument: str, where: str) -> None:
    if service != "*" and not _SERVICE.fullmatch(service):
        raise PolicyError(f"{where}: {service!r} is no service")
    if argument != "*" and not _ARGUMENT.fullmatch(argument):
        raise PolicyError(f"{where}: {argument!r} is no argument")
    if service == "*" and argument != "*":
        raise PolicyError(f"{where}: service * needs argument *")


def _rule(
    service: str, argument: str, words: list[str], where: str, via: tuple[str, ...], text: str
) -> Rule:
    _check_service(service, argument, where)
    if len(words) < 3:
        raise PolicyError(f"{where}: {_SHAPE}")
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
        via,
        text,
    )


# ---- files


@dataclass(frozen=True, slots=True)
class _Place:
    """A file that is being read, and how it came to be read."""

    directory: Directory
    path: str
    via: tuple[str, ...] = ()
    stack: tuple[str, ...] = ()

    def at(self, number: int) -> str:
        return f"{self.directory.label}/{self.path}:{number}"


@dataclass(slots=True)
class _Reader:
    """Expands includes. errors: None = raise the first, a list = collect them."""

    legacy: Directory
    errors: list[str] | None = None
    rules: int = 0
    includes: int = 0
    seen: set[str] = field(default_factory=set)

    def _failed(self, error: PolicyError) -> None:
        if self.errors is None or len(self.errors) >= _PROBLEM_LIMIT:
            raise error
        if str(error) not in self.seen:  # a file that is included twice is wrong once
            self.seen.add(str(error))
            self.errors.append(str(error))

    def _lines(self, place: _Place) -> Iterator[tuple[int, str]]:
        # A line ends at a newline alone: what else text may be broken at could bring a rule
        # out of a comment.
        for number, line in enumerate(place.directory.files[place.path].split("\n"), 1):
            stripped = line.strip()
            if stripped and not stripped.startswith("#"):
                yield number, stripped

    def _inner(self, place: _Place, path: str, at: str) -> _Place:
        """The included file; PolicyError where it is missing or includes itself."""
        self.includes += 1
        if self.includes > _INCLUDE_LIMIT or len(place.stack) >= _DEPTH:
            raise PolicyError(f"{at}: includes are nested too deep")
        if path == place.path or path in place.stack:
            raise PolicyError(f"{at}: {path} includes itself")
        if path not in place.directory.files:
            raise PolicyError(f"{at}: there is no file {path} in {place.directory.label}")
        return _Place(place.directory, path, (at, *place.via), (*place.stack, place.path))

    def _counted(self, rule: Rule) -> Rule:
        self.rules += 1
        if self.rules > _RULE_LIMIT:
            raise PolicyError(f"{rule.where}: more than {_RULE_LIMIT} rules")
        return rule

    def read(self, place: _Place) -> Iterator[Rule]:
        """The rules of a file of the 5.0 format."""
        for number, text in self._lines(place):
            at = place.at(number)
            words = text.split()
            try:
                if words[0].startswith("!"):
                    yield from self._directive(place, words, at)
                elif len(words) < 2:
                    raise PolicyError(f"{at}: {_SHAPE}")
                else:
                    yield self._counted(_rule(words[0], words[1], words[2:], at, place.via, text))
            except PolicyError as error:
                self._failed(error)

    def _directive(self, place: _Place, words: list[str], at: str) -> Iterator[Rule]:
        match words:
            case ["!include", path]:
                yield from self.read(self._inner(place, path, at))
            case ["!include-dir", directory]:
                prefix = directory.rstrip("/") + "/"
                inside = (p for p in place.directory.files if p.startswith(prefix))
                for path in sorted(inside, key=str.encode):
                    if _is_policy(path[len(prefix) :]):
                        _check_file_name(place.directory, path, path[len(prefix) :])
                        yield from self.read(self._inner(place, path, at))
            case ["!include-service", service, argument, path]:
                _check_service(service, argument, at)
                yield from self._old(service, argument, self._inner(place, path, at))
            case ["!compat-4.0"]:
                yield from self._compat(at)
            case _:
                raise PolicyError(f"{at}: {' '.join(words)} is not understood")

    def _old(self, service: str, argument: str, place: _Place) -> Iterator[Rule]:
        """The rules of a file of the older form, for one service."""
        for number, text in self._lines(place):
            at = place.at(number)
            try:
                if text.startswith("$include:") or text.split()[0] == "!include":
                    path = text.removeprefix("$include:").removeprefix("!include").strip()
                    yield from self._old(service, argument, self._inner(place, path, at))
                    continue
                if text.startswith("!"):
                    raise PolicyError(f"{at}: {text.split()[0]} is not possible here")
                words = text.replace("$", "@").replace(",", " ").split()
                yield self._counted(_rule(service, argument, words, at, place.via, text))
            except PolicyError as error:
                self._failed(error)

    def _compat(self, at: str) -> Iterator[Rule]:
        """The directory of release 4.0: one file per service or service+argument.

        A file for one argument decides alone: what it does not mention is denied.
        """
        names = [n for n in self.legacy.files if "/" not in n and not n.startswith(".")]
        for name in sorted(names, key=lambda n: ("+" not in n, n)):
            service, plus, argument = name.partition("+")
            place = _Place(self.legacy, name, (at,))
            yield from self._old(service, plus + argument if plus else "*", place)
            if plus:
                for target in ("@anyvm", "@adminvm"):
                    words = ["*", target, "deny"]
                    text = "(nothing else is allowed by this file)"
                    yield _rule(service, plus + argument, words, place.at(0), (at,), text)


def _is_policy(name: str) -> bool:
    return "/" not in name and name.endswith(".policy") and not name.startswith(".")


def _check_file_name(directory: Directory, path: str, name: str) -> None:
    if not _FILE_NAME.fullmatch(name):
        raise PolicyError(
            f"{directory.label}/{path}: the name of a policy file has only "
            "digits, lower-case letters, _ . and -"
        )


def _tops(tree: Sequence[Directory]) -> list[_Place]:
    """The files that are read by themselves: the first directory hides names of later ones."""
    found: dict[str, _Place] = {}
    for directory in tree:
        for path in directory.files:
            if _is_policy(path):
                found.setdefault(path, _Place(directory, path))
    return [found[name] for name in sorted(found, key=str.encode)]


_NO_LEGACY = Directory("/etc/qubes-rpc/policy", {})


def _read(tree: Sequence[Directory], reader: _Reader) -> Iterator[Rule]:
    for place in _tops(tree):
        try:
            _check_file_name(place.directory, place.path, place.path)
        except PolicyError as error:
            reader._failed(error)
        else:
            yield from reader.read(place)


def parse(tree: Iterable[Directory], legacy: Directory = _NO_LEGACY) -> tuple[Rule, ...]:
    """All rules in order. PolicyError on any error in any file.

    tree: the directories, those that hide others first. legacy: what !compat-4.0 adds.
    """
    return tuple(_read(tuple(tree), _Reader(legacy)))


def problems(tree: Iterable[Directory], legacy: Directory = _NO_LEGACY) -> list[str]:
    """Every error of every file, at most 100; empty = parse() succeeds."""
    reader = _Reader(legacy, [])
    assert reader.errors is not None
    try:
        for _ in _read(tuple(tree), reader):
            pass
    except PolicyError as error:
        reader.errors.append(str(error))
    return reader.errors
