"""The trainable head inside TRL's fused log-prob function, which shows no logits.

`log_probs` come out of one autograd function over (hidden, weight, bias, targets). Its weight's gradient is the head's
usual one, `Σ_t b_t h_tᵀ` with `b_t = c (onehot(y_t) - softmax(z_t)) dz_t`; b is formed again from what the function
saved, one pair at a time, when the head is reduced.

Letters: N rows, K predicted tokens a row, T of them marked, V vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from gradent.hooks.capture.capture import Tap
from gradent.hooks.uses.formats import Factored, Form, LazyFactored, Materialized
from gradent.hooks.uses.layout import Layout
from gradent.hooks.uses.parameter_views import View
from gradent.kernels.common.numerics import accumulator

__all__ = ["FusedHeadUse", "find_fused_head", "tap_fused_head"]

_NAME = "ChunkedLogProbFunctionBackward"
_KNOWN = {"logit_scale", "softcap", "inv_t", "HAS_SOFTCAP"}


def find_fused_head(root: Tensor) -> Node | None:
    """The fused function's node behind `log_probs`; None where they come from something else."""
    pending, seen = [root.grad_fn], 0
    while pending and seen < 8:
        node = pending.pop()
        seen += 1
        if node is None:
            continue
        if node.name() == _NAME:
            arguments = getattr(node, "kernel_args", None)
            return node if isinstance(arguments, dict) and set(arguments) >= _KNOWN else None
        pending.extend(child for child, _ in node.next_functions)
    return None


def tap_fused_head(node: Node, mask: Tensor, leaves: Mapping[Node, int], parameters: Sequence[Tensor]) -> list[Tap]:
    """Taps for the function's trainable weight and bias, with the marked tokens' mask `[N, K]`."""
    taps = []
    for place, (child, _) in enumerate(node.next_functions[:3]):  # hidden states, weight, bias
        if place > 0 and child is not None and child in leaves:
            number = leaves[child]
            view = View(number, (), tuple(parameters[number].shape))
            taps.append(Tap(FusedHeadUse(view, node, mask.bool(), place == 2), node, frozenset({(node, place)})))
    return taps


@dataclass(frozen=True)
class FusedHeadUse:
    """The weight (or the bias) of the fused function; `mask` is bool `[N, K]`."""

    view: View
    node: Node
    mask: Tensor
    bias: bool = False
    depth: int = 0

    @property
    def without_activations(self) -> FusedHeadUse:
        """See `Use`."""
        return self

    def forms(self, grad_output: Tensor, layout: Layout, budget: int) -> Iterator[tuple[int, tuple[int, ...], Form]]:
        """See `Use.forms`; `grad_output` is that of the log-probs that the function returned, `[N·K]` or `[marked]`."""
        saved: Any = self.node
        hidden, weight, bias, targets, log_z = saved.saved_tensors[:5]
        scored = torch.arange(self.mask.numel(), device=hidden.device)
        if len(grad_output) != self.mask.numel():  # on a GPU only marked tokens are scored, in the order of the rows
            scored = self.mask.flatten().cumsum(0) - 1
        numbers = scored.view(self.mask.shape)
        rows = zip(numbers, self.mask, strict=True)
        if layout.packed is not None:
            rows = zip(layout.packed.cut(numbers), layout.packed.cut(self.mask), strict=True)
        for row, (places, marked) in enumerate(rows):
            at = places[marked]
            parts = hidden[at], weight, bias, targets[at], log_z[at], grad_output[at]
            tokens = _Tokens(*parts, saved.compute_dtype, saved.kernel_args)
            if self.bias:
                yield row, (), Materialized(tokens.grad_logits().sum(0))
            else:
                yield row, (), LazyFactored(tokens.dense)


@dataclass(frozen=True)
class _Tokens:
    """The T marked tokens of one row, and what their logits' gradient is formed from."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    log_z: Tensor
    scale: Tensor
    dtype: torch.dtype
    arguments: dict[str, Any]

    def dense(self) -> Factored:
        return Factored(self.grad_logits(), self.hidden.to(accumulator(self.hidden.dtype)))

    @torch.no_grad()
    def grad_logits(self) -> Tensor:
        """Gradient at the logits, `[T, V]`: the same steps, in the same types, as the function's own backward."""
        arguments = self.arguments
        tile = self.hidden.to(self.dtype) @ self.weight.to(self.dtype).T
        if self.bias is not None:
            tile += self.bias.to(self.dtype)
        z = tile.to(accumulator(tile.dtype)) * arguments["logit_scale"]
        slope: Tensor | float = 1.0
        if arguments["HAS_SOFTCAP"]:
            capped = torch.tanh(z / arguments["softcap"])
            z, slope = arguments["softcap"] * capped, 1 - capped.square()
        grad: Tensor = (z * arguments["inv_t"] - self.log_z[:, None]).exp_().neg_()
        grad[torch.arange(len(grad), device=grad.device), self.targets] += 1
        grad *= slope
        grad *= (self.scale[:, None] * arguments["inv_t"] * arguments["logit_scale"]).to(grad.dtype)
        return grad
