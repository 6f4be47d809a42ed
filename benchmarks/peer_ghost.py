"""A ghost product in the gram form alone, as the peers of its kind have it: `Σ_{t,s} (a_t·a_s)(b_t·b_s)` at any shape.

Hooks on modules keep what each linear layer and embedding takes, the backward brings its cotangents, and a layer's
share of the entries is formed from two Grams of tokens. Weights are frozen meanwhile, so that no weight gradient is
computed. Letters: k pairs, rows 0..k-1 chosen and k..2k-1 rejected, T padded tokens, I inputs and O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["GhostProduct"]

Sides = tuple[Tensor, Tensor]


class GhostProduct:
    """Gram entries of k pairs, by hooks on the modules that own trainable parameters.

    Args:
        model: of `nn.Linear`, transformers' `Conv1D`, `nn.Embedding` and normalisation layers.
        pairs: k.

    Attributes:
        entries: float64 `[k, 3]`.
    """

    def __init__(self, model: nn.Module, pairs: int) -> None:
        self.entries = torch.zeros(pairs, 3, dtype=torch.float64)
        self._pairs = pairs
        self._model = model
        self._handles: list[Any] = []
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._leaves: list[Tensor] = []
        self._lookups: dict[int, Tensor] = {}
        self._heads: dict[int, Sides] = {}

    def __enter__(self) -> GhostProduct:
        """Put the hooks on."""
        owners = [
            (module, frozenset(name for name, p in module.named_parameters(recurse=False) if p.requires_grad))
            for module in self._model.modules()
        ]
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        embedding = self._model.get_input_embeddings()  # type: ignore[operator]
        self._handles.append(embedding.register_forward_hook(self._begin))
        for module, names in owners:
            if names:
                self._handles.append(module.register_forward_hook(lambda m, x, y, n=names: self._see(m, x[0], y, n)))
        return self

    def __exit__(self, *error: object) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self._lookups.clear()
        self._heads.clear()
        self._leaves.clear()

    def backward(self, loss: Tensor) -> None:
        """Run the backward that brings the cotangents: of activations alone."""
        torch.autograd.grad(loss, self._leaves)

    def _begin(self, module: nn.Module, args: Any, out: Tensor) -> None:
        """An embedding's output is where the backward ends."""
        self._leaves.append(out.requires_grad_())

    def _see(self, module: nn.Module, x: Tensor, y: Tensor, names: frozenset[str]) -> None:
        if isinstance(module, nn.Embedding):
            self._lookups[id(module.weight)] = x
            if not y.requires_grad:
                self._begin(module, (), y)
        elif not isinstance(module, (nn.Linear, Conv1D)) and "Norm" not in type(module).__name__:
            raise NotImplementedError(f"the ghost product has no rule for {type(module).__name__}")
        x = x.detach()
        y.register_hook(lambda b: self._take(module, x, b, names))

    def _take(self, module: nn.Module, x: Tensor, b: Tensor, names: frozenset[str]) -> None:
        with torch.no_grad():
            if isinstance(module, nn.Embedding):
                self._add_lookup(module.weight, x, b)
            elif isinstance(module, (nn.Linear, Conv1D)):
                if "weight" in names:
                    self._add(x, b)
                    if id(module.weight) in self._lookups:
                        self._heads[id(module.weight)] = (x, b)
            elif "weight" in names:
                self._add_sum(b * _normalized(module, x))
            if "bias" in names:
                self._add_sum(b)

    def _add(self, a: Tensor, b: Tensor) -> None:
        """A linear layer, `a [2k, T, I]`, `b [2k, T, O]`."""
        for column, (one, other) in enumerate(self._sides()):
            grams = [torch.bmm(part[one], part[other].mT) for part in (a, b)]
            self.entries[:, column] += (grams[0] * grams[1]).sum((1, 2)).double()

    def _add_lookup(self, weight: Tensor, ids: Tensor, b: Tensor) -> None:
        """An embedding; tied to the head, the products of the two uses as well."""
        head = self._heads.get(id(weight))
        for column, (one, other) in enumerate(self._sides()):
            same = ids[one][:, :, None] == ids[other][:, None]
            self.entries[:, column] += (torch.bmm(b[one], b[other].mT) * same).sum((1, 2)).double()
            if head is not None:
                for left, right in ((one, other), (other, one)):
                    hidden, cotangent = (part[left] for part in head)
                    index = ids[right][:, None].expand(-1, cotangent.shape[1], -1)
                    cross = torch.bmm(hidden, b[right].mT) * cotangent.gather(2, index)
                    self.entries[:, column] += cross.sum((1, 2)).double()

    def _add_sum(self, products: Tensor) -> None:
        """A bias or a gain: the gradient itself, `[2k, T, O]` summed over tokens."""
        grads = products.sum(1)
        for column, (one, other) in enumerate(self._sides()):
            self.entries[:, column] += (grads[one] * grads[other]).sum(1).double()

    def _sides(self) -> tuple[tuple[slice, slice], ...]:
        chosen, rejected = slice(0, self._pairs), slice(self._pairs, None)
        return (chosen, chosen), (rejected, rejected), (chosen, rejected)


def _normalized(module: nn.Module, x: Tensor) -> Tensor:
    """What a normalisation layer multiplies by its weight."""
    if isinstance(module, nn.LayerNorm):
        return nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    return nn.functional.rms_norm(x, x.shape[-1:], eps=module.variance_epsilon)  # type: ignore[arg-type]
