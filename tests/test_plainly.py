"""Rows with a forward of their own, and little that is trainable: autograd's own gradients, and when not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from gradent import PairBatch, measure
from gradent.errors import ModelError
from gradent.hooks.passes import batching, driver
from tests.batches import ragged
from tests.truth import assert_exact, truth


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every micro-batch, whether it went the plain way."""
    seen: list[bool] = []

    def watch(name: str) -> None:
        way = getattr(driver, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.append(name == "run_plainly")
            return way(*args, **kwargs)

        monkeypatch.setattr(driver, name, watched)

    watch("run")
    watch("run_plainly")
    return seen


def one_pair() -> PairBatch:
    """Of rows too different in length to share a forward."""
    return PairBatch.from_tokens([([1, 5, 9], [7, 3, 8, 11, 2, 4, 6, 9, 3, 12, 5, 2], [4, 2])])


def adapted(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Only a projection of the last layer and the last norm can be trained."""
    model.requires_grad_(False)
    model.model.layers[-1].self_attn.k_proj.requires_grad_(True)
    model.model.norm.requires_grad_(True)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_entries_are_autograds(tiny_llama: LlamaForCausalLM, dtype: torch.dtype, ways: list[bool]) -> None:
    model, batch = adapted(tiny_llama), one_pair()
    true = truth(model.double(), batch)
    model.to(dtype)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for _ in range(2):  # the first one finds out how rows are batched
        gram = measure(model, batch, by_module=True)
        assert_exact(gram, true, batch, 1e-10 if dtype == torch.float64 else 1e-6)
    assert ways[0] and ways[-1] and gram.coverage == 1
    assert all(torch.equal(before[name], now) and now.grad is None for name, now in model.named_parameters())


def test_it_gives_what_the_rules_give(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = adapted(tiny_llama).double(), one_pair()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    model(input_ids=batch.input_ids).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    plain = measure(model, batch, by_module=True, metric=optimizer)
    monkeypatch.setattr(driver, "plain_rows", lambda *args: 0)
    ruled = measure(model, batch, by_module=True, metric=optimizer)
    torch.testing.assert_close(plain.inner, ruled.inner, rtol=1e-10, atol=1e-14)
    assert plain.modules.keys() == ruled.modules.keys()


def test_rows_that_share_a_forward_do_not(tiny_llama: LlamaForCausalLM, ways: list[bool]) -> None:
    measure(adapted(tiny_llama), ragged())
    assert ways[0] and not ways[-1]


def test_long_rows_share_no_forward(
    tiny_llama: LlamaForCausalLM, ways: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny_llama).double()
    ruled = measure(model, ragged())
    monkeypatch.setitem(batching.FILLS, "cpu", 1)
    plain = measure(model, ragged())
    assert not ways[-2] and ways[-1]
    assert_exact(plain, truth(model, ragged()), ragged(), 1e-10)
    assert_exact(ruled, truth(model, ragged()), ragged(), 1e-10)
    model.requires_grad_(True)
    measure(model, ragged())
    assert not ways[-1]  # too much to hold: forwards are shared as ever


@pytest.mark.parametrize(
    "why", ["everything is trainable", "the budget", "bfloat16", "narrow scales", "autocast", "a hook"]
)
def test_when_not(tiny_llama: LlamaForCausalLM, why: str, ways: list[bool]) -> None:
    model, called = adapted(tiny_llama), []
    if why == "everything is trainable":
        model.requires_grad_(True)
    if why == "bfloat16":
        model.model.embed_tokens.to(torch.bfloat16)
        model.model.embed_tokens.register_forward_hook(lambda module, args, out: out.float())
    if why == "narrow scales":  # as a quantised model holds them
        model.register_buffer("scales", torch.ones(3, dtype=torch.float16))
    if why == "a hook":
        model.model.norm.weight.register_hook(called.append)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        measure(model, one_pair(), memory_budget=512 if why == "the budget" else None)
    assert ways and not any(ways) and not called


class Opaque(torch.autograd.Function):
    """A use that no rule knows."""

    @staticmethod
    def forward(ctx: object, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)  # type: ignore[attr-defined]
        return x * scale

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * scale, (grad * x).sum((0, 1))


class Odd(nn.Module):
    """Few trainable numbers: a scale that is used where no rule sees it, and an embedding of sparse gradients."""

    def __init__(self, *, reentrant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.embed, self.head = nn.Embedding(30, 64), nn.Linear(64, 30)
        self.marks = nn.Embedding(30, 64, sparse=True)
        self.scale = nn.Parameter(torch.rand(64))
        self.mix = nn.Linear(64, 64)
        for module in (self.embed, self.head):
            module.requires_grad_(False)
        self.wide = nn.Parameter(torch.zeros(64, 512), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = Opaque.apply(self.embed(input_ids) + self.marks(input_ids), self.scale)  # type: ignore[no-untyped-call]
        x = checkpoint(self.mix, x, use_reentrant=True) if self.reentrant else self.mix(x)
        logits: Tensor = self.head(x.tanh())
        return logits


def test_uses_without_a_rule_and_sparse_gradients(ways: list[bool]) -> None:
    model, batch = Odd().double(), one_pair()
    true = truth(model, batch)
    assert_exact(measure(model, batch), true, batch)
    assert ways[0]


def test_reentrant_regions_are_named() -> None:
    with pytest.raises(ModelError, match="use_reentrant"):
        measure(Odd(reentrant=True), one_pair())
