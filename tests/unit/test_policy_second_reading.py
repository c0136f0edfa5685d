"""Policy, read a second time from its documented rules and compared on random rules.

Owns that second reading: the syntax of the 5.0 form and the steps of a decision, written
for clearness alone. Must not use a line of
bulkhead.model.policy for it. Invariant: both readings agree on every text and request.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass

import pytest

from bulkhead.model.policy import Directory, Evaluator, PolicyError, ViewWorld, parse
from tests.unit.test_policy_rules import V1_UUID, world

CASES = 4000
ZERO = "00000000-0000-0000-0000-000000000000"
DVM_UUID = "44444444-4444-4444-8444-444444444444"
DISPOSABLE_TEMPLATES = frozenset({"dvm"})
DEFAULT_DISPVM = {"mgmt": "dvm"}
ACTIONS = ("allow", "ask", "deny")
# Parameter -> actions that may have it.
PARAMETERS = {
    "target": ("allow", "ask"),
    "default_target": ("ask",),
    "user": ("allow", "ask"),
    "notify": ACTIONS,
    "autostart": ("allow", "ask"),
}


class SyntaxFault(Exception):
    """The text is no policy."""


@dataclass(frozen=True)
class Line:
    """One rule."""

    service: str
    argument: str
    source: str
    target: str
    action: str
    parameters: dict[str, str]


class SecondReading:
    """The documented meaning of a policy over the world of the other policy tests."""

    def __init__(self) -> None:
        qubes = {qube.name: qube for qube in world().qubes()}
        self._names = {f"uuid:{qube.uuid}": name for name, qube in qubes.items()}
        self._names |= {"@adminvm": "dom0", f"uuid:{ZERO}": "dom0"}
        self._classes = {name: qube.klass for name, qube in qubes.items()} | {"dom0": "AdminVM"}
        self._tags = {name: qube.tags for name, qube in qubes.items()}

    # ---- syntax

    @staticmethod
    def _token(token: str, column: str) -> None:
        wide = column in ("source", "target")
        word, _, rest = token.partition(":")
        good = {
            "*": wide,
            "@anyvm": wide,
            "@adminvm": True,
            "@default": column == "target",
            "@dispvm": column != "source",
        }
        if token in good:
            fine = good[token]
        elif word in ("@type", "@tag"):
            fine = wide and bool(rest)
        elif token.startswith("@dispvm:@tag:"):
            fine = wide and token != "@dispvm:@tag:"
        elif word == "@dispvm":
            fine = bool(rest) and not rest.startswith("@")
        elif word == "uuid":
            fine = bool(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", rest))
        else:
            fine = not token.startswith("@")
        if not fine:
            raise SyntaxFault(f"{token} as {column}")

    def lines(self, text: str) -> list[Line]:
        """SyntaxFault for a text that refuses every request."""
        found = []
        for row in text.split("\n"):
            if len(row.split()) < 5:
                raise SyntaxFault(row)
            service, argument, source, target, action, *words = row.split()
            if service == "*" and argument != "*":
                raise SyntaxFault(row)
            self._token(source, "source")
            self._token(target, "target")
            parameters: dict[str, str] = {}
            for word in words:
                key, _, value = word.partition("=")
                if action not in PARAMETERS.get(key, ()) or key in parameters:
                    raise SyntaxFault(word)
                if key in ("target", "default_target"):
                    self._token(value, "redirect")
                elif key in ("notify", "autostart") and value not in ("yes", "no"):
                    raise SyntaxFault(word)
                parameters[key] = value
            if action == "allow" and target == "@default" and "target" not in parameters:
                raise SyntaxFault(row)
            found.append(Line(service, argument, source, target, action, parameters))
        return found

    # ---- decision

    def _canonical(self, token: str) -> str:
        return self._names.get(token, token)

    def _is_qube(self, token: str, qube: str) -> bool | None:
        """Whether a token that is good in either column means the qube; None for others."""
        word, _, rest = token.partition(":")
        match word:
            case "*":
                return True
            case "@anyvm":
                return qube != "dom0"
            case "@type":
                return self._classes.get(qube) == rest
            case "@tag":
                return rest in self._tags.get(qube, ())
        return None

    def _source(self, token: str, source: str) -> bool:
        known = self._is_qube(token, self._canonical(source))
        return self._canonical(token) == self._canonical(source) if known is None else known

    def _target(self, token: str, target: str, source: str) -> bool:
        known = self._is_qube(token, self._canonical(target))
        if known is not None:
            return known
        if not token.startswith("@dispvm:"):
            return self._canonical(token) == self._canonical(target)
        if target == "@dispvm":
            target = f"@dispvm:{DEFAULT_DISPVM.get(source, '')}"
        if not target.startswith("@dispvm:"):
            return False
        base, wanted = self._canonical(target[8:]), token[8:]
        if wanted.startswith("@tag:"):
            return base in DISPOSABLE_TEMPLATES and wanted[5:] in self._tags[base]
        return self._canonical(wanted) == base

    def _normalised(self, target: str) -> str:
        """ "" for a disposable of what is no template of such."""
        if target.startswith("@dispvm:"):
            return target if self._canonical(target[8:]) in DISPOSABLE_TEMPLATES else ""
        known = target in ("@default", "@dispvm") or self._canonical(target) in self._classes
        return target if known else "@default"

    def decide(self, rules: list[Line], argument: str, source: str, target: str) -> tuple[str, str]:
        """Outcome and actual target of a request for service S."""
        target = self._normalised(target)
        for rule in rules if target else ():
            if (
                rule.service in ("*", "S")
                and rule.argument in ("*", argument)
                and self._source(rule.source, source)
                and self._target(rule.target, target, source)
            ):
                if rule.action != "allow":
                    return rule.action, ""
                return self._allowed(rule, source, target)
        return "deny", ""

    def _allowed(self, rule: Line, source: str, target: str) -> tuple[str, str]:
        actual = rule.parameters.get("target", target)
        if actual == "@dispvm":
            actual = f"@dispvm:{DEFAULT_DISPVM.get(source, '')}"
        still = rule.parameters.get("autostart") == "no"
        if actual.startswith("@dispvm:"):
            base = self._canonical(actual[8:])
            good = base in DISPOSABLE_TEMPLATES and not still
            return ("allow", f"@dispvm:{base}") if good else ("deny", "")
        actual = self._canonical(actual)
        # Nothing but dom0 runs in this world.
        if actual not in self._classes or actual == source or (still and actual != "dom0"):
            return "deny", ""
        return "allow", actual


QUBES = (
    "mgmt", "v1", "v2", "tmpl", "dvm", "dom0", "nosuch", f"uuid:{V1_UUID}", f"uuid:{ZERO}",
    "uuid:12345678-1234-1234-1234-123456789abc",
)  # fmt: skip
TOKENS = (
    *QUBES, "*", "@anyvm", "@adminvm", "@default", "@type:AppVM", "@type:TemplateVM",
    "@type:AdminVM", "@type:", "@tag:created-by-mgmt", "@tag:dtag", "@tag:", "@dispvm",
    "@dispvm:", "@dispvm:dvm", "@dispvm:v1", f"@dispvm:uuid:{DVM_UUID}", "@dispvm:@tag:dtag",
    "@dispvm:@tag:", "@dispvm:@anyvm", "@foo", "$anyvm", "uuid:x",
)  # fmt: skip
WORDS = (
    "target=dom0", "target=v1", "target=@dispvm", "target=@adminvm", "target=@dispvm:dvm",
    "target=@default", f"target=uuid:{V1_UUID}", "default_target=v1", "user=root", "notify=yes",
    "notify=no", "notify=maybe", "autostart=no", "autostart=yes", "foo=1", "#",
)  # fmt: skip
MEANT = ("*", "@anyvm", "v1", "dvm", "@tag:created-by-mgmt", "@dispvm", "@dispvm:dvm")
REQUESTS = (*QUBES, "@default", "@adminvm", "@dispvm", "@dispvm:dvm", "@dispvm:v1")


def _text(draw: random.Random) -> str:
    rows = []
    for _ in range(draw.randint(1, 3)):
        source = draw.choice(TOKENS) if draw.random() < 0.4 else "mgmt"
        target = draw.choice(TOKENS) if draw.random() < 0.5 else draw.choice(MEANT)
        words = [draw.choice(WORDS) for _ in range(draw.choice((0, 0, 1, 2)))]
        head = (draw.choice("SSST*"), draw.choice(("*", "*", "+x", "+")), source, target)
        rows.append(" ".join((*head, draw.choice(("allow", *ACTIONS)), *words)))
    return "\n".join(rows)


@pytest.mark.parametrize("seed", range(3))
def test_two_readings_agree(seed: int) -> None:
    draw, second, view = random.Random(seed), SecondReading(), world()
    seen: Counter[str] = Counter()
    for _ in range(CASES):
        text = _text(draw)
        evaluator = Evaluator(ViewWorld(lambda: view))
        try:
            lines = second.lines(text)
        except SyntaxFault:
            seen["no policy"] += 1
            with pytest.raises(PolicyError):
                parse([Directory("etc", {"a.policy": text})])
            continue
        evaluator.replace(parse([Directory("etc", {"a.policy": text})]))
        for _ in range(4):
            source, target = draw.choice(("mgmt", "mgmt", "v1", "dvm")), draw.choice(REQUESTS)
            argument = draw.choice(("+x", "+"))
            found = evaluator.decide("S", argument, source, target)
            wanted = second.decide(lines, argument, source, target)
            assert (found.outcome, found.target) == wanted, (text, source, target, argument)
            seen[wanted[0]] += 1
    assert min(seen[word] for word in ("no policy", "allow", "ask", "deny")) > CASES / 50, seen
