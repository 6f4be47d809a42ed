"""The table of rules and what a rule is handed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradent.errors import InputError
from gradent.hooks.uses.layout import Layout
from gradent.hooks.uses.parameter_views import View
from gradent.hooks.uses.uses import Use

__all__ = ["RULES", "Call", "Rule", "register_rule"]


@dataclass(frozen=True)
class Call:
    """One call of a torch function with a trainable operand.

    Attributes:
        args: positional arguments, as called.
        kwargs: keyword arguments, as called.
        out: what the function returned.
        layout: the forward's rows.
        find: tensor -> its view of a trainable parameter, or None.
        ordered: flattened operand `[R L, features]` -> whether its tokens are in the batch's order.
        rows: operand whose tokens were picked `[..., features]` -> the row of each, int64 `[n]`, or None.
        moved: operand -> whether its tokens were picked.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor
    layout: Layout
    find: Callable[[Any], View | None]
    ordered: Callable[[Tensor], bool]
    rows: Callable[[Tensor], Tensor | None] = lambda operand: None
    moved: Callable[[Tensor], bool] = lambda operand: False

    def splits(self, operand: Tensor) -> bool:
        """Whether the rows of an operand and of the output, with features on the last axis, can be told apart.

        Args:
            operand: activations that the parameter meets.

        Returns:
            The answer; no where they are flattened and their tokens were picked in another order.
        """
        if not self.layout.splits(operand, 1) or not self.layout.splits(self.out, 1):
            return False
        if self.layout.rows == 1:
            return True
        return not self.moved(operand) and (operand.dim() > 2 or self.ordered(operand))

    def bind(self, *names: str, **defaults: Any) -> dict[str, Any] | None:
        """Arguments by name.

        Args:
            *names: parameter names in positional order.
            **defaults: values of those that were not passed.

        Returns:
            `{name: value}`, or None where the call has an argument beyond these names (the rule then declines).
        """
        if len(self.args) > len(names) or any(name not in names for name in self.kwargs):
            return None
        return defaults | dict(zip(names, self.args, strict=False)) | self.kwargs


Rule = Callable[[Call], list[Use]]

RULES: dict[Any, Rule] = {}
"""Torch function -> its rule."""


def register_rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Decorator: `rule` accounts for trainable operands of these torch functions.

    Args:
        *functions: torch functions, spelled as `torch.overrides` reports them (`torch.nn.functional.linear`,
            `torch.Tensor.matmul`).

    Returns:
        The decorator, which returns the rule unchanged.

    Raises:
        InputError: a function has a rule already. Rules are never replaced silently: delete `RULES[function]` first.

    Example:
        >>> from gradent.hooks.rules import RULES, register_rule
        >>> len({torch_function.__name__ for torch_function in RULES if torch_function.__name__ == "linear"})
        1
    """

    def add(rule: Rule) -> Rule:
        for function in functions:
            if function in RULES:
                raise InputError(
                    f"register_rule: {function} already has the rule {RULES[function].__module__}."
                    f"{RULES[function].__qualname__}. Delete gradent.hooks.rules.RULES[function] first if you mean "
                    "to replace it."
                )
            RULES[function] = rule
        return rule

    return add
