"""The rules: torch function -> how its trainable operands' gradients follow from its output's gradient.

A rule sees one call of one torch function with at least one trainable operand, and returns the uses that it can
account for. What no rule accounts for is not lost: the coverage check finds the parameter in the autograd graph, and
it is then measured explicitly, one row at a time.
"""

from gradent.hooks.rules import elementwise, embedding, matmul, norm  # noqa: F401  (importing registers the rules)
from gradent.hooks.rules.registry import RULES, Call, register_rule

__all__ = ["RULES", "Call", "register_rule"]
