"""Many responses in one row of the batch are told apart by what the trainer passes, and measured one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradent import attach, measure
from gradent.hooks.piggyback.packed import PackedCall
from gradent.hooks.uses.packed_rows import find_packed_rows
from gradent.pairs.batch import PairBatch
from tests.adapters import build_adapted, lora_everywhere
from tests.batches import ragged
from tests.hooks.piggyback.watching import error, prepare, watch
from tests.trainer_steps import dpo, with_fused_head
from tests.truth import TOLERANCE, scaled_error, truth
from tests.zoo import build


class Pack:
    """The rows of a batch, one behind the other in `rows` rows of equal length, padded at the end."""

    def __init__(self, batch: PairBatch, order: list[int] | None = None, rows: int = 1, pad: int = 0) -> None:
        self.order = list(range(len(batch.input_ids))) if order is None else order
        keep = batch.attention_mask.bool()
        parts = [(batch.input_ids[n][keep[n]], batch.completion_mask[n][keep[n]]) for n in self.order]
        share = len(parts) // rows
        lines = [parts[start : start + share] for start in range(0, len(parts), share)]
        longest = max(sum(len(ids) for ids, _ in line) for line in lines) + pad

        def line_up(pick: Callable[[Tensor, Tensor], Tensor], fill: int = 0) -> Tensor:
            joined = [torch.cat([pick(ids, marks) for ids, marks in line]) for line in lines]
            return torch.stack([nn.functional.pad(line, (0, longest - len(line)), value=fill) for line in joined])

        self.ids, self.marks = line_up(lambda ids, marks: ids), line_up(lambda ids, marks: marks.long())
        self.positions = line_up(lambda ids, marks: torch.arange(len(ids)))
        numbers = count(1)
        self.numbers = line_up(lambda ids, marks: torch.full_like(ids, next(numbers)))
        self.ends = torch.tensor([0, *[len(ids) for ids, _ in parts]]).cumsum(0).int()

    def blocks(self, dtype: torch.dtype) -> Tensor:
        """A block-diagonal causal mask `[B, 1, T, T]`, added to the scores."""
        alike = self.numbers[:, :, None] == self.numbers[:, None, :]
        return torch.zeros(alike.shape, dtype=dtype).masked_fill_(~alike.tril(), torch.finfo(dtype).min)[:, None]

    def loss(self, logits: Tensor) -> Tensor:
        """DPO of rows in the batch's order, as a trainer sums their log-probs."""
        logps = logits[:, :-1].log_softmax(-1).gather(-1, self.ids[:, 1:, None])[..., 0] * self.marks[:, 1:]
        sums = torch.stack([logps[self.numbers[:, 1:] == one].sum() for one in range(1, len(self.order) + 1)])
        batch_order = torch.empty(len(self.order), dtype=sums.dtype)
        return dpo(*batch_order.index_copy(0, torch.tensor(self.order), sums).chunk(2))


WAYS: dict[str, Callable[[Pack, torch.dtype], dict[str, Any]]] = {
    "position_ids": lambda pack, dtype: {"position_ids": pack.positions},
    "position_ids and ends": lambda pack, dtype: {"position_ids": pack.positions, "cu_seq_lens_q": pack.ends},
    "a block-diagonal mask": lambda pack, dtype: {"attention_mask": pack.blocks(dtype), "position_ids": pack.positions},
    "a block-diagonal mask alone": lambda pack, dtype: {"attention_mask": pack.blocks(dtype)},
}


def through(model: nn.Module, pack: Pack, way: str) -> Tensor:
    dtype = next(model.parameters()).dtype
    return pack.loss(model(input_ids=pack.ids, use_cache=False, **WAYS[way](pack, dtype)).logits)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("way", [*WAYS][:3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama, biases, tied", "qwen3"])
def test_entries_are_those_of_autograd(name: str, way: str, lora: bool) -> None:
    batch, model = ragged(), lora_everywhere(name) if lora else build(name)
    true = truth(model, batch)
    (passed,) = watch(prepare(model), lambda: through(model, Pack(batch), way))
    assert error(passed, true) <= TOLERANCE[true.arithmetic]
    torch.testing.assert_close(passed.logps, torch.cat([true.chosen_logp, true.rejected_logp]), rtol=1e-6, atol=1e-5)


def test_a_mask_alone() -> None:
    """Positions run on: a rotary model does not mind, but for rounding."""
    batch, model = ragged(), build("llama")
    true = truth(model, batch)
    (passed,) = watch(prepare(model), lambda: through(model, Pack(batch), "a block-diagonal mask alone"))
    assert error(passed, true) <= 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    batch, model = ragged(), build("llama")
    true = truth(model, batch)
    prepare(model, reentrant)
    (passed,) = watch(model, lambda: through(model, Pack(batch), "position_ids"))
    assert error(passed, true) <= TOLERANCE[true.arithmetic]


@pytest.mark.parametrize("name", ["DoRA", "LoRA on embeddings", "saved embeddings of a tied model", "IA3"])
def test_adapters(name: str) -> None:
    model, batch = build_adapted(name), ragged()
    true = truth(model, batch)
    (passed,) = watch(prepare(model), lambda: through(model, Pack(batch), "position_ids"))
    if passed.no_entries_reason is None:
        assert error(passed, true) <= TOLERANCE[true.arithmetic]
    else:
        assert name == "LoRA on embeddings" and "no rule can tell the rows apart" in passed.no_entries_reason


def test_several_packed_rows_padded_at_the_end() -> None:
    batch, model = ragged(), build("llama")
    true = truth(model, batch)
    pack = Pack(batch, rows=2, pad=3)
    (passed,) = watch(prepare(model), lambda: through(model, pack, "position_ids"))
    assert error(passed, true) <= TOLERANCE[true.arithmetic]


def test_pair_by_pair() -> None:
    batch, model = ragged(), build("llama")
    true = truth(model, batch)
    pack = Pack(batch, order=[0, 3, 1, 4, 2, 5])
    (passed,) = watch(prepare(model), lambda: through(model, pack, "position_ids"), pairing="signs")
    assert error(passed, true) <= TOLERANCE[true.arithmetic]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_fused_head(lora: bool) -> None:
    batch = ragged()
    model = lora_everywhere("llama") if lora else build("llama")
    true, pack = truth(model, batch), Pack(batch)
    with_fused_head(prepare(model))
    labels = pack.ids.masked_fill(pack.marks == 0, -100)

    def step() -> Tensor:
        output = model(
            input_ids=pack.ids, position_ids=pack.positions, use_cache=False, labels=labels, fused_lm_head=True
        )
        sums = [output.log_probs[pack.numbers[:, 1:] == one].sum() for one in range(1, 7)]
        return dpo(*torch.stack(sums).chunk(2))

    (passed,) = watch(model, step)
    assert error(passed, true) <= 1e-6


def test_a_loss_over_the_borders_is_noticed() -> None:
    """The last position of a row predicts the first token of the next: a loss may forget that."""
    batch, model = ragged(), build("llama")
    pack = Pack(batch)
    prepare(model)

    def step() -> Tensor:
        logits = model(input_ids=pack.ids, position_ids=pack.positions, use_cache=False).logits
        logps = logits[:, :-1].log_softmax(-1).gather(-1, pack.ids[:, 1:, None])[..., 0]
        return pack.loss(logits) - 0.1 * logps.mean()

    (passed,) = watch(model, step)
    assert "weighs the tokens" in (passed.no_entries_reason or "")
    assert not passed.is_of_tokens


def recorded(model: nn.Module, step: Callable[[], Tensor], **options: Any) -> Any:
    with attach(model, **options) as recorder:
        step().backward()
        return recorder.harvest()


def test_in_a_loop(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = prepare(build("llama")), ragged()
    true, pack = truth(model, batch), Pack(batch)
    found = recorded(model, lambda: through(model, pack, "position_ids"))
    assert found.source == "piggyback" and scaled_error(found.gram, true) <= TOLERANCE[true.arithmetic]
    again = measure(model, found.batch)
    torch.testing.assert_close(again.inner, found.gram.inner, rtol=1e-5, atol=1e-6)
    model.zero_grad()
    own = recorded(model, lambda: through(model, pack, "position_ids"), mode="measure")
    assert own.source == "measure" and scaled_error(own.gram, true) <= TOLERANCE[true.arithmetic]


def test_attention_over_the_borders_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """With a 2-D mask beside them, positions that restart leave the attention as it is."""
    model, pack = prepare(build("llama")), Pack(ragged())
    before = [parameter.clone() for parameter in model.parameters()]

    def step() -> Tensor:
        mask = torch.ones_like(pack.ids)
        return pack.loss(model(input_ids=pack.ids, attention_mask=mask, position_ids=pack.positions).logits)

    with caplog.at_level(logging.WARNING):
        assert recorded(model, step) is None
    assert "reaches over their borders" in caplog.text
    assert model.training and all(torch.equal(*two) for two in zip(model.parameters(), before, strict=True))


def test_what_says_where_rows_begin() -> None:
    ids = torch.arange(1, 8)[None]
    rows = ((0, 3), (3, 7))
    for kwargs in (
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])},
        {"position_ids": torch.tensor([[[0, 1, 2, 0, 1, 2, 3]]] * 4)},
        {"cu_seqlens": torch.tensor([0, 3, 7])},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1]])},
        {"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2, 2]])},
    ):
        packed = find_packed_rows(ids, kwargs)
        assert packed is not None and packed.spans == rows, kwargs
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    for kwargs in (
        {},
        {"position_ids": torch.arange(7)[None]},
        {"attention_mask": padded, "position_ids": torch.tensor([[0, 0, 0, 1, 2, 3, 4]])},
        {"attention_mask": padded, "position_ids": torch.tensor([[1, 1, 0, 1, 2, 3, 4]])},
        {"attention_mask": padded.flip(1), "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 0]])},
        {"cu_seqlens": torch.tensor([0, 7])},
    ):
        assert find_packed_rows(ids, kwargs) is None, kwargs


class Leaky(torch.nn.Module):
    """Logits that hang on all tokens before, whatever row they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(31, 31)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids).cumsum(1))


@pytest.mark.parametrize(
    ("positions", "has_neighbours"),
    [
        ([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]], True),  # the last row stands alone in its row of the batch
        ([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]], True),
        ([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]], False),
    ],
)
def test_attention_over_borders_is_tried_where_there_is_one(positions: list[list[int]], has_neighbours: bool) -> None:
    input_ids = torch.randint(1, 31, (2, 6), generator=torch.Generator().manual_seed(0))
    kwargs = {"position_ids": torch.tensor(positions)}
    rows = find_packed_rows(input_ids, kwargs)
    if not has_neighbours and rows is None:
        return
    assert rows is not None
    call = PackedCall(Leaky(), (), {"input_ids": input_ids, **kwargs}, input_ids, rows)
    assert call.has_neighbours is has_neighbours
    assert not has_neighbours or (call.reaches_over() or 0.0) > 0.01
