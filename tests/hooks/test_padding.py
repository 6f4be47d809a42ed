"""Padding is left out of what is read off a backward, wherever it is zero, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from gradent.kernels.common.numerics import Factors
from gradent.kernels.dispatch import reduce_group
from gradent.kernels.strategy import Product, Strategy, decide
from gradent.model.parameters import trainable
from tests.batches import ragged
from tests.hooks.piggyback.watching import WAYS, error, set_up, watch
from tests.trainer_steps import through_logits


class Looking(nn.Module):
    """Every position sees the mean of all, those after it and the padding's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(99, 6), nn.Linear(6, 6), nn.Linear(6, 99)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> SimpleNamespace:
        hidden = self.mix(self.embed(input_ids)).tanh()
        return SimpleNamespace(logits=self.head(hidden + hidden.mean(1, keepdim=True)))


def pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have matrices reduced as large ones are, however small they are."""

    def group_by_group(product: Product, budget: int) -> Strategy:
        return decide(replace(product, has_factors=True, is_complete=False), budget)

    monkeypatch.setattr("gradent.hooks.reduction.collector.decide", group_by_group)


def test_padding_that_gets_a_gradient_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pair_by_pair(monkeypatch)
    batch = ragged()
    torch.manual_seed(0)
    model = Looking().double()
    parameters = list(trainable(model).values())
    logits = model(batch.input_ids).logits[:, :-1].log_softmax(-1)
    logps = (logits.gather(-1, batch.input_ids[:, 1:, None])[..., 0] * batch.completion_mask[:, 1:]).sum(1)
    rows = [torch.autograd.grad(logp, parameters, retain_graph=True) for logp in logps]
    flat = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
    chosen, rejected = flat[:3], flat[3:]
    want = torch.stack([(chosen**2).sum(1), (rejected**2).sum(1), (chosen * rejected).sum(1)], 1)
    (passed,) = watch(model, lambda: through_logits(model, batch))
    assert passed.no_entries_reason is None
    torch.testing.assert_close(sum(passed.pair_entries().values()), want, rtol=1e-9, atol=0)
    # Where one does not wait for the answer, it is found out at the end, and there are no entries.
    monkeypatch.setattr("gradent.hooks.piggyback.forward.is_synchronous", lambda device: False)
    (passed,) = watch(model, lambda: through_logits(model, batch))
    assert "padding" in (passed.no_entries_reason or "")


@pytest.mark.parametrize("is_synchronous", [True, False])
def test_a_shared_weight_gradient_leaves_nothing_out_that_is_not_zero(
    is_synchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradent.hooks.piggyback.forward.is_synchronous", lambda device: is_synchronous)
    monkeypatch.setattr("gradent.kernels.with_weight_grad.batch_room", lambda *args: 0)
    gradients = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, batch = Looking().double(), ragged()
        if watched:
            assert watch(model, lambda: through_logits(model, batch), should_share=True)[0].shared == 2  # noqa: B023
        else:
            through_logits(model, batch).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, shared in zip(*gradients, strict=True):
        torch.testing.assert_close(shared, plain, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("is_synchronous", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_padding_takes_no_part(way: str, lora: bool, is_synchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the head the responses alone, of other matrices the rows up to their ends."""
    monkeypatch.setattr("gradent.hooks.piggyback.forward.is_synchronous", lambda device: is_synchronous)
    reduced: list[tuple[int, int]] = []

    def reduce(factors: Factors, **options: object) -> Tensor:
        reduced.append((len(factors[0][0]), len(factors[1][0])))
        return reduce_group(factors, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("gradent.hooks.reduction.merge.reduce_group", reduce)
    pair_by_pair(monkeypatch)
    model, batch, true, limit = set_up("llama", lora=lora, way=way, checkpointing="kept")
    batch = ragged()
    (passed,) = watch(model, lambda: WAYS[way](model, batch))
    assert error(passed, true) <= limit
    ends = batch.attention_mask.sum(1)
    whole = {(int(ends[pair]), int(ends[pair + 3])) for pair in range(3)}
    answers = batch.completion_mask.sum(1)
    last = 1 if way == "logits" else 0  # with the position after the last token that is predicted
    heads = {(int(answers[pair]) + last, int(answers[pair + 3]) + last) for pair in range(3)}
    assert set(reduced) <= whole | heads
    assert whole <= set(reduced)
    assert lora or heads <= set(reduced)
