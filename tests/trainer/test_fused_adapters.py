"""Adapters inside one autograd function, as unsloth fuses them, which may overwrite what it saved: no wrong numbers."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradent import attach
from tests.batches import ragged
from tests.trainer.runs import llama, with_lora
from tests.trainer_steps import dpo, through_logits
from tests.truth import scaled_error, truth


class FusedAdapter(torch.autograd.Function):
    """`x Wᵀ + s (x Aᵀ) Bᵀ`, whose backward may write the input's gradient where the input was."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, overwrites: bool) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.weight, ctx.scale, ctx.overwrites = weight, scale, overwrites
        return x @ weight.T + (x @ a.T) @ b.T * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, a, b = ctx.saved_tensors
        g, flat = grads[0].flatten(0, -2), x.flatten(0, -2)
        grad_a, grad_b = (g @ b).T @ flat * ctx.scale, g.T @ (flat @ a.T) * ctx.scale
        grad_x = g @ ctx.weight + (g @ b) @ a * ctx.scale
        if ctx.overwrites:
            grad_x = flat.detach().copy_(grad_x)
        return grad_x.view(x.shape), None, grad_a, grad_b, None, None


def fuse(model: nn.Module, names: tuple[str, ...], *, overwrites: bool) -> nn.Module:
    """The model with the adapters of these projections in one function each."""

    def fused(layer: Any) -> Any:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            return FusedAdapter.apply(x, layer.base_layer.weight, a, b, layer.scaling["default"], overwrites)

        return forward

    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and name.endswith(names):
            module.forward = fused(module)
    return model


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("names", [("down_proj",), ("q_proj", "v_proj", "down_proj")], ids=["the MLP's", "all"])
def test_fused_adapters(names: tuple[str, ...], overwrites: bool, caplog: pytest.LogCaptureFixture) -> None:
    if overwrites and len(names) > 1:
        names = ("down_proj",)  # whose input nobody else reads, as unsloth takes care of
    model, batch = fuse(with_lora(llama()), names, overwrites=overwrites), ragged()
    plain = with_lora(llama())
    for name, part in plain.named_parameters():  # norms are read off beside what the function hides
        if "norm" in name:
            part.requires_grad_(True)
            model.get_parameter(name).requires_grad_(True)
    expected = truth(plain, batch)
    through_logits(plain, batch, dpo).backward()
    with caplog.at_level(logging.WARNING), attach(model) as recorder:
        through_logits(model, batch, dpo).backward()
        gradients = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
        found = recorder.harvest()
    assert found is not None
    assert found.source == "measure"
    assert scaled_error(found.gram, expected) <= 5e-6
    assert caplog.text.count("no rule can tell the rows apart where the model uses") == 1
    for name, part in plain.named_parameters():
        if part.grad is not None:
            torch.testing.assert_close(gradients[name], part.grad, rtol=1e-4, atol=1e-6)
    with attach(model, mode="piggyback") as recorder:
        through_logits(model, batch, dpo).backward()
        with pytest.raises(Exception, match="Use mode='auto' or 'measure'"):
            recorder.harvest()
