"""The rules: torch function -> how its trainable operands' gradients follow from its output's gradient.

A rule sees one call with a trainable operand; what it does not account for, `capture/coverage.py` finds in the graph.
"""

from gradent.hooks.rules import elementwise, embedding, matmul, norm  # noqa: F401  (importing registers the rules)
from gradent.hooks.rules.registry import RULES, Call, register_rule

__all__ = ["RULES", "Call", "register_rule"]
