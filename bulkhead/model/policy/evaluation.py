"""First match: which rule decides a call, what it decides and why.

Owns evaluation. Must not know files or sockets. Invariant: without a rule that allows,
and without a target that the call can go to, a call is denied; "ask" is never an allow.
"""

from __future__ import annotations

from dataclasses import dataclass

from bulkhead.model.policy.syntax import Rule
from bulkhead.model.policy.world import Subject, World
from bulkhead.model.records import ADMINVM_NAME, ADMINVM_UUID

_PICKED_LIMIT = 100
_DEFAULT = "@default"
_DISPVM = "@dispvm"
_ADMINVM = "@adminvm"


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a call.

    outcome: "allow", "ask" or "deny". why: one sentence. rule: what decided, None = no
    rule matched or the caller or target is none. target: where an allowed call goes, a
    qube's name or "@dispvm:NAME". requested: the target asked for after normalisation: what
    names an existing qube stays as it was written, what names none is "@default".
    """

    outcome: str
    why: str
    rule: Rule | None = None
    target: str = ""
    requested: str = ""

    @property
    def allowed(self) -> bool:
        """The call may be made without asking anybody."""
        return self.outcome == "allow"


def _deny(why: str, rule: Rule | None = None, requested: str = "") -> Decision:
    return Decision("deny", why, rule, "", requested)


class Evaluator:
    """Decides calls for the present rules and the present qubes."""

    def __init__(self, world: World) -> None:
        self._world = world
        # Rules and what was picked from them, replaced together: replace() may run in
        # another thread than decide().
        self._rules: tuple[tuple[Rule, ...], dict[str, tuple[Rule, ...]]] = ((), {})

    def replace(self, rules: tuple[Rule, ...]) -> None:
        """Use these rules from now on; none = nothing is allowed."""
        self._rules = (rules, {})

    def allows(self, service: str, argument: str, source: str, target: str) -> bool:
        """Whether the call is allowed; dom0 is, as it is not subject to policy."""
        return source == ADMINVM_NAME or self.decide(service, argument, source, target).allowed

    def decide(self, service: str, argument: str, source: str, target: str) -> Decision:
        """The decision about one call.

        argument: "+text", "+" = none. source: a name or "uuid:UUID". target: a name, a
        uuid, "@adminvm", "@default", "@dispvm", "@dispvm:NAME" or "" for "@default".
        """
        caller = self._world.find(source)
        if caller is None:
            return _deny(f"there is no qube {source}")
        wanted = self._normalised(target)
        if wanted is None:
            return _deny(f"{target} is no possible target")
        requested = wanted if isinstance(wanted, str) else target
        for rule in self._rules_of(service):
            if (
                rule.argument in ("*", argument)
                and self._matches_source(rule.source, caller)
                and self._matches_target(rule.target, wanted, caller)
            ):
                return self._judged(rule, wanted, requested, caller)
        return _deny("no rule matches", None, requested)

    def _rules_of(self, service: str) -> tuple[Rule, ...]:
        rules, picked = self._rules
        found = picked.get(service)
        if found is None:
            found = tuple(r for r in rules if r.service in ("*", service))
            if len(picked) < _PICKED_LIMIT:
                picked[service] = found
        return found

    # ---- matching

    def _normalised(self, target: str) -> str | Subject | None:
        """A qube, a token that stays one, or None: refused."""
        if target in ("", _DEFAULT):
            return _DEFAULT
        if target == _ADMINVM:
            return self._world.find(ADMINVM_NAME)
        if target == _DISPVM:
            return target
        if target.startswith("@dispvm:"):
            base = self._world.find(target[8:])
            return target if base is not None and base.disposable_template else None
        if target.startswith("@"):
            return None
        return self._world.find(target) or _DEFAULT

    @staticmethod
    def _same(token: str, qube: Subject) -> bool:
        if qube.is_adminvm:
            return token in (ADMINVM_NAME, _ADMINVM, f"uuid:{ADMINVM_UUID}")
        return token in (qube.name, f"uuid:{qube.uuid}")

    def _matches_qube(self, token: str, qube: Subject) -> bool:
        if token == "*":
            return True
        if token == "@anyvm":
            return not qube.is_adminvm
        if token.startswith("@type:"):
            return qube.klass == token[6:]
        if token.startswith("@tag:"):
            return token[5:] in qube.tags
        return self._same(token, qube)

    def _matches_source(self, token: str, qube: Subject) -> bool:
        return not token.startswith(_DISPVM) and self._matches_qube(token, qube)

    def _matches_target(self, token: str, wanted: str | Subject, caller: Subject) -> bool:
        if isinstance(wanted, Subject):
            return not token.startswith(_DISPVM) and self._matches_qube(token, wanted)
        if token in ("*", "@anyvm", wanted):
            return True
        if not token.startswith("@dispvm:") or not wanted.startswith(_DISPVM):
            return False
        base = self._base_of(wanted, caller)
        if base is None:
            return False
        if token.startswith("@dispvm:@tag:"):
            return base.disposable_template and token[13:] in base.tags
        return self._same(token[8:], base)

    def _base_of(self, wanted: str, caller: Subject) -> Subject | None:
        """The disposable template that @dispvm or @dispvm:NAME stands for."""
        name = wanted[8:] or self._world.default_dispvm(caller)
        return self._world.find(name) if name else None

    # ---- where an allowed call goes

    def _judged(
        self, rule: Rule, wanted: str | Subject, requested: str, caller: Subject
    ) -> Decision:
        if rule.action == "deny":
            return _deny("the rule denies", rule, requested)
        if rule.action == "ask":
            return Decision("ask", "the rule asks, and nobody can be asked", rule, "", requested)
        actual = self._normalised(rule.redirect) if rule.redirect else wanted
        if actual is None or actual == _DEFAULT:
            return _deny("the rule allows, but names no qube that exists", rule, requested)
        if isinstance(actual, str):
            base = self._base_of(actual, caller)
            if base is None:
                return _deny(f"{caller.name} has no default_dispvm", rule, requested)
            if not rule.autostart:
                return _deny("a disposable would be started and autostart=no", rule, requested)
            target = f"@dispvm:{base.name}"
            return Decision("allow", "the rule allows", rule, target, requested)
        if actual.uuid == caller.uuid:
            return _deny("a qube cannot call itself", rule, requested)
        if not (rule.autostart or actual.is_adminvm or self._world.running(actual)):
            return _deny(f"{actual.name} does not run and autostart=no", rule, requested)
        return Decision("allow", "the rule allows", rule, actual.name, requested)
