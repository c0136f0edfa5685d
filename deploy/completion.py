"""Bash completion of the tools, made from their own parsers.

Owns the shape of the scripts. Must not know any option by itself. Invariant: what a
script offers, its tool's parser accepts.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable
from unittest import mock

_TEMPLATE = """\
# {name}: made from its parser; do not edit.
_{function}() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" word verb="" words
    COMPREPLY=()
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$word" in
        {verbs}) verb="$word"; break ;;
        esac
    done
    case "$verb" in
{cases}    *) words="{words}" ;;
    esac
    case "$cur" in
    -*) ;;
    *) {operands} ;;
    esac
    COMPREPLY=( $(compgen -W "$words" -- "$cur") )
}}
complete -o default -F _{function} {name}
"""
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*|--?[A-Za-z0-9][A-Za-z0-9-]*")


class _Found(Exception):
    """Carries the parser out of a tool's entry point."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(entry: str) -> argparse.ArgumentParser:
    """The parser that the entry point "module:function" works with. LookupError."""

    def found(parser: argparse.ArgumentParser, *_args: object, **_more: object) -> None:
        raise _Found(parser)

    module, _, function = entry.partition(":")
    main: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", found),
        mock.patch.object(argparse.ArgumentParser, "parse_intermixed_args", found),
    ):
        try:
            main([])
        except _Found as caught:
            return caught.parser
    raise LookupError(f"{entry} parses no arguments")


def script(name: str, parser: argparse.ArgumentParser) -> str:
    """The completion script of a tool."""
    verbs = _verbs(parser)
    cases = "".join(
        f'    {verb}) words="{" ".join(_options(sub))}" ;;\n' for verb, sub in sorted(verbs.items())
    )
    return _TEMPLATE.format(
        name=name,
        function=re.sub(r"\W", "_", name),
        verbs="|".join(sorted(verbs)) or '""',
        cases=cases,
        words=" ".join((*_options(parser), *sorted(verbs))),
        # Names of qubes come from the running system; without one there are none.
        operands='words="$words $(qvm-ls --raw-list 2>/dev/null)"' if _asks_qube(parser) else ":",
    )


def _verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update({n: p for n, p in action.choices.items() if _PLAIN.fullmatch(n)})
    return found


def _options(parser: argparse.ArgumentParser) -> list[str]:
    words = {option for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if not action.option_strings and action.choices and not isinstance(action.choices, dict):
            words.update(str(choice) for choice in action.choices)
    return sorted(word for word in words if _PLAIN.fullmatch(word))


def _asks_qube(parser: argparse.ArgumentParser) -> bool:
    parsers = (parser, *_verbs(parser).values())
    return any("VMNAME" in str(action.metavar) for each in parsers for action in each._actions)
