"""qrexec policy: the 5.0 format, its evaluation, and who the qubes are that it speaks of.

    tree = [Directory("/etc/qubes/policy.d", {"30-user.policy": "..."})]
    evaluator = Evaluator(world)
    evaluator.replace(parse(tree))
    evaluator.decide("admin.vm.Start", "+", "mgmt", "work").allowed

Pure: files come in as texts, qubes through a World.
"""

from bulkhead.model.policy.evaluation import Decision, Evaluator
from bulkhead.model.policy.syntax import Directory, PolicyError, Rule, parse, problems
from bulkhead.model.policy.world import InfoWorld, Subject, ViewWorld, World

__all__ = [
    "Decision",
    "Directory",
    "Evaluator",
    "InfoWorld",
    "PolicyError",
    "Rule",
    "Subject",
    "ViewWorld",
    "World",
    "parse",
    "problems",
]
