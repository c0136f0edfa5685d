"""The table as a value: what the kernel would hold after the same commands.

Owns a model of one nftables table, narrow enough to say no where the kernel does:
objects that are missing, in use, or there with another content. Must not know who
asks. Invariant: execute() changes all or nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.firewall.core.enforcement import KernelRefusal
from services.firewall.core.ruleset import check_command

_REFERENCE = re.compile(r"@([a-z0-9_]+)")
_COUNTER = re.compile(r"counter name ([a-z_]+)")
_JUMP = re.compile(r"(?:goto|jump) ([a-z0-9_]+)")
_VMAP = re.compile(r"vmap @([a-z0-9_]+)")
_COMMENT = re.compile(r'comment "([^"]*)"')
_ELEMENTS = re.compile(r"([a-z0-9_]+) \{ (.*) \}\Z")


@dataclass(slots=True)
class _State:
    """chains: name -> rules. sets: name -> element -> verdict ("" in a plain set)."""

    present: bool = False
    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)
    sets: dict[str, dict[str, str]] = field(default_factory=dict)
    counters: set[str] = field(default_factory=set)

    def copy(self) -> _State:
        return _State(
            self.present,
            dict(self.chains),
            dict(self.bases),
            {name: dict(elements) for name, elements in self.sets.items()},
            set(self.counters),
        )


class PlannedTable:
    """One table that no kernel holds."""

    def __init__(self) -> None:
        self._state = _State()

    @property
    def present(self) -> bool:
        return self._state.present

    @property
    def chains(self) -> dict[str, tuple[str, ...]]:
        """Name -> rules without the leading "add rule TABLE CHAIN"."""
        return dict(self._state.chains)

    def elements(self, name: str) -> dict[str, str]:
        """Element -> verdict ("" in a plain set); KeyError when there is no such set."""
        return dict(self._state.sets[name])

    def mark(self, tag: str) -> str:
        """The digest that the qube's g_ chain shows; "" when absent."""
        for rule in self._state.chains.get(f"g_{tag}", ()):
            if found := _COMMENT.search(rule):
                return found[1]
        return ""

    def comments(self, chain: str) -> tuple[str, ...]:
        """The comments of a chain's rules, in order."""
        found = (_COMMENT.search(rule) for rule in self._state.chains.get(chain, ()))
        return tuple(match[1] for match in found if match)

    def text(self, chain: str) -> str:
        """The chain, readable; "" when absent."""
        if chain not in self._state.chains:
            return ""
        rules = "".join(f"\t{rule}\n" for rule in self._state.chains[chain])
        return f"chain {chain} {{\n{rules}}}\n"

    def execute(self, commands: Sequence[str]) -> None:
        """All commands or, with KernelRefusal, none."""
        state = self._state.copy()
        for command in commands:
            check_command(command)
            verb, kind, _, _, *rest = command.split(" ", 4)
            self._one(state, verb, kind, rest[0] if rest else "", command)
        self._state = state

    def _one(self, state: _State, verb: str, kind: str, rest: str, command: str) -> None:
        if kind == "table":
            if verb == "add":
                state.present = True
            elif not state.present:
                raise KernelRefusal(f"no such table: {command}")
            else:
                fresh = _State()
                state.present, state.chains, state.bases = False, fresh.chains, fresh.bases
                state.sets, state.counters = fresh.sets, fresh.counters
            return
        if not state.present:
            raise KernelRefusal(f"no such table: {command}")
        if kind == "chain":
            self._chain(state, verb, rest, command)
        elif kind == "element":
            self._element(state, verb, rest, command)
        elif kind == "counter":
            state.counters.add(rest)
        elif kind == "rule":
            self._rule(state, rest, command)
        else:
            state.sets.setdefault(rest.partition(" ")[0], {})

    def _chain(self, state: _State, verb: str, rest: str, command: str) -> None:
        name, _, base = rest.partition(" ")
        if verb == "add":
            state.chains.setdefault(name, ())
            if base:
                state.bases[name] = base
            return
        if name not in state.chains:
            raise KernelRefusal(f"no such chain: {command}")
        if verb == "flush":
            state.chains[name] = ()
            return
        used = any(f"goto {name}" == v for e in state.sets.values() for v in e.values())
        used = used or any(
            name in _JUMP.findall(rule) for rules in state.chains.values() for rule in rules
        )
        if used or state.chains[name]:
            raise KernelRefusal(f"chain is in use: {command}")
        del state.chains[name]

    def _element(self, state: _State, verb: str, rest: str, command: str) -> None:
        found = _ELEMENTS.match(rest)
        if not found or found[1] not in state.sets:
            raise KernelRefusal(f"no such set: {command}")
        elements = state.sets[found[1]]
        for item in found[2].split(", "):
            key, _, verdict = item.partition(" : ")
            for chain in _JUMP.findall(verdict):
                if chain not in state.chains:
                    raise KernelRefusal(f"no such chain: {command}")
            if verb == "add":
                if elements.get(key, verdict) != verdict:
                    raise KernelRefusal(f"element exists with another verdict: {command}")
                elements[key] = verdict
            elif elements.pop(key, None) is None:
                raise KernelRefusal(f"no such element: {command}")

    def _rule(self, state: _State, rest: str, command: str) -> None:
        name, _, text = rest.partition(" ")
        if name not in state.chains:
            raise KernelRefusal(f"no such chain: {command}")
        plain = _COMMENT.sub("", text)
        for reference in (*_REFERENCE.findall(plain), *_VMAP.findall(plain)):
            if reference not in state.sets:
                raise KernelRefusal(f"no such set: {command}")
        for counter in _COUNTER.findall(plain):
            if counter not in state.counters:
                raise KernelRefusal(f"no such counter: {command}")
        for chain in _JUMP.findall(plain):
            if chain not in state.chains:
                raise KernelRefusal(f"no such chain: {command}")
        state.chains[name] = (*state.chains[name], text)
