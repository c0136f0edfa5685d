"""The policy in force: rules from files, kept up to date.

Owns when files are read anew. Must not know their syntax. Invariant: what cannot be
read allows nothing, as does what is not there.
"""

from __future__ import annotations

import asyncio
import logging

from bulkhead.model.policy import Decision, Evaluator, PolicyError, parse
from bulkhead.policy_files import PolicyFiles, Stamp

log = logging.getLogger("bulkhead.adminapi")

PERIOD_S = 1.0


class PolicyKeeper:
    """A permission.Policy and a policy_filter.Judge that follow the files."""

    def __init__(self, files: PolicyFiles, evaluator: Evaluator) -> None:
        self._files = files
        self._evaluator = evaluator
        self._stamp: Stamp | None = None

    def allows(self, service: str, argument: str, source: str, target: str) -> bool:
        """See permission.Policy."""
        return self._evaluator.allows(service, argument, source, target)

    def decide(self, service: str, argument: str, source: str, target: str) -> Decision:
        """See policy_filter.Judge."""
        return self._evaluator.decide(service, argument, source, target)

    def load(self) -> None:
        """Read the files if they have changed."""
        try:
            stamp = self._files.stamp()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            tree, legacy = self._files.read()
            rules = parse(tree, legacy)
        except (OSError, ValueError) as error:
            # PolicyError is a ValueError.
            kind = "policy" if isinstance(error, PolicyError) else "policy file"
            log.error("%s: %s; nothing is allowed until it is mended", kind, error)
            rules = ()
        self._evaluator.replace(rules)

    async def follow(self) -> None:
        """Look at the files again and again."""
        while True:
            await asyncio.sleep(PERIOD_S)
            await asyncio.to_thread(self.load)
