"""What cannot be read off a trainer's own backward is said, and why."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trl.trainer.utils import add_fused_lm_head

from gradent.hooks.piggyback.config import WatchConfig
from gradent.hooks.piggyback.watcher import Piggyback
from gradent.model.parameters import trainable
from gradent.pairs.batch import PairBatch
from tests.adapters import adapt, lora
from tests.batches import ragged, square
from tests.hooks.piggyback.watching import error, prepare, watch
from tests.odd_models import build_odd
from tests.trainer_steps import dpo, labels_of, through_logits
from tests.truth import truth
from tests.zoo import build


def weighted_tokens(model: nn.Module, batch: PairBatch) -> Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    weights = torch.linspace(0.5, 1.5, logps.shape[1]) * batch.completion_mask[:, 1:]
    return dpo(*(logps * weights).sum(1).chunk(2))


def extra(kind: str) -> Callable[[nn.Module, PairBatch], Tensor]:
    """DPO with a term on the logits that is no log-prob of the responses."""

    def step(model: nn.Module, batch: PairBatch) -> Tensor:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        marks = batch.completion_mask[:, 1:].bool()
        scores = logits[:, :-1].log_softmax(-1)
        logps = scores.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        loss = dpo(*(logps * marks).sum(1).chunk(2))
        terms = {
            "z-loss": lambda: logits[:, :-1].logsumexp(-1)[marks].square().mean(),
            "entropy": lambda: (scores.exp() * scores).sum(-1)[marks].mean(),
            "label smoothing": lambda: -scores.mean(-1)[marks].mean(),
        }
        return loss + 0.01 * terms[kind]()

    return step


def entropy_of_the_fused_head(model: nn.Module, batch: PairBatch) -> Tensor:
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    output = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels_of(batch), fused_lm_head=True
    )
    return dpo(*output.log_probs.sum(1).chunk(2)) + 0.01 * output.entropy.mean()


def with_logits(change: Callable[[Tensor], Tensor], **options: bool) -> Callable[[nn.Module, PairBatch], Tensor]:
    """DPO on logits that something is done to, or beside other outputs."""

    def step(model: nn.Module, batch: PairBatch) -> Tensor:
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
        logps = change(output.logits)[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        loss = dpo(*(logps * batch.completion_mask[:, 1:]).sum(1).chunk(2))
        return loss + (0.1 * output.hidden_states[-1].square().mean() if options else 0.0)

    return step


def rare_token_penalised(model: nn.Module, batch: PairBatch) -> Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return dpo(*(logps * batch.completion_mask[:, 1:]).sum(1).chunk(2)) + 0.01 * logits[:, :-1, 95].square().mean()


REFUSED = {
    "hidden states": (lambda: build("llama"), with_logits(lambda x: x, output_hidden_states=True), "hidden_states"),
    "rare token": (lambda: build("llama"), rare_token_penalised, "weighs the tokens"),
    "z-loss": (lambda: build("llama"), extra("z-loss"), "weighs the tokens"),
    "entropy bonus": (lambda: build("llama"), extra("entropy"), "weighs the tokens"),
    "label smoothing": (lambda: build("llama"), extra("label smoothing"), "weighs the tokens"),
    "entropy of the fused head": (lambda: build("llama"), entropy_of_the_fused_head, "passes the log-probs by"),
    "tokens weighed differently": (lambda: build("llama"), weighted_tokens, "weighs the tokens"),
    "einsum": (lambda: build_odd("einsum projections"), None, "no rule can tell the rows apart"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_off_is_said(name: str) -> None:
    make, way, reason = REFUSED[name]
    model, batch = prepare(make()), ragged()

    def bare_logits() -> Tensor:
        logps = model(batch.input_ids)[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        return dpo(*(logps * batch.completion_mask[:, 1:]).sum(1).chunk(2))

    (passed,) = watch(model, bare_logits if way is None else lambda: way(model, batch))
    assert passed.unusable_reason is None
    assert reason in (passed.no_entries_reason or "")
    assert len(passed.rows) == 6


def test_an_auxiliary_loss_is_noticed() -> None:
    model = adapt(build("mixtral", dtype=torch.float32), lora(target_modules=["q_proj", "v_proj"]))
    batch = ragged()
    prepare(model)

    def step() -> Tensor:
        output = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, output_router_logits=True
        )
        logps = output.logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        return dpo(*(logps * batch.completion_mask[:, 1:]).sum(1).chunk(2)) + 0.01 * output.aux_loss

    watcher = Piggyback(
        WatchConfig(model=model, parameters=trainable(model), budget=2**24)
    )  # transformers puts hooks of its own on the routers
    watcher.arm()
    step().backward()
    (passed,) = watcher.take()
    watcher.disarm()
    assert "auxiliary loss" in (passed.no_entries_reason or "")
    assert passed.unusable_reason is None


def test_logits_changed_in_place_are_not_read() -> None:
    model, batch = prepare(build("llama")), ragged()
    (passed,) = watch(model, lambda: with_logits(lambda logits: logits.div_(0.7))(model, batch))
    assert "changed in place" in (passed.unusable_reason or "")


def test_two_batches_below_one_backward_are_not_taken_for_two_sides() -> None:
    model, batch = prepare(build("llama")), ragged()
    (passed,) = watch(model, lambda: through_logits(model, batch) + through_logits(model, batch))
    assert "two forwards" in (passed.unusable_reason or "")


def test_parameters_that_become_trainable_are_noticed() -> None:
    model, batch = prepare(build("llama")), ragged()
    model.lm_head.weight.requires_grad_(False)
    watcher = Piggyback(WatchConfig(model=model, parameters=trainable(model), budget=2**24))
    watcher.arm()
    model.lm_head.weight.requires_grad_(True)
    through_logits(model, batch).backward()
    (passed,) = watcher.take()
    watcher.disarm()
    assert "other parameters are trainable" in (passed.unusable_reason or "")


class Picking(nn.Module):
    """Two experts, each of which gets every token, in an order of its own; or the tokens as they are."""

    def __init__(self, *, picks: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(99, 6), nn.Linear(6, 99)
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.picks = picks

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> SimpleNamespace:
        hidden = self.embed(input_ids).tanh()
        flat = hidden.view(-1, 6)
        count = len(flat)
        orders = [torch.arange(count).flip(0), torch.arange(count).roll(3)]
        total = torch.zeros_like(flat)
        for expert, order in zip(self.experts, orders, strict=True):
            if self.picks:
                total = total.index_add(0, order, expert(flat[order]).tanh())
            else:
                total = total + expert(flat).tanh()
        return SimpleNamespace(logits=self.head(total.view(hidden.shape)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("picks", [False, True])
def test_tokens_that_an_expert_gets_in_another_order(picks: bool, frozen: bool) -> None:
    """As many as there are in the batch, and yet not row after row; with and without a graph behind them."""
    torch.manual_seed(0)
    model, batch = Picking(picks=picks).double(), ragged()
    model.embed.requires_grad_(not frozen)
    true = truth(model, batch)
    (passed,) = watch(model, lambda: through_logits(model, batch))
    assert error(passed, true) <= 1e-9


class Reentered(nn.Module):
    """A weight that is used in two ways, one of which no rule knows, behind reentrant checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.block = nn.Embedding(99, 6), nn.Linear(6, 99), Twice()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> SimpleNamespace:
        hidden = checkpoint(self.block, self.embed(input_ids), use_reentrant=True)
        return SimpleNamespace(logits=self.head(hidden))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight).tanh() + torch.einsum("rti,oi->rto", hidden, self.weight).tanh()


def test_a_use_that_a_reentrant_region_hides() -> None:
    torch.manual_seed(0)
    model, batch = Reentered().double().train(), ragged()
    (passed,) = watch(model, lambda: through_logits(model, batch))
    assert "no rule can tell the rows apart where the model uses block.weight" in (passed.no_entries_reason or "")


class TokensFirst(nn.Module):
    """Activations `[L, R, ...]`, as some models written by hand have them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(99, 6), nn.Linear(6, 6), nn.Linear(6, 99)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> SimpleNamespace:
        hidden = self.mix(self.embed(input_ids).transpose(0, 1)).tanh()
        return SimpleNamespace(logits=self.head(hidden).transpose(0, 1))


def test_as_many_rows_as_tokens() -> None:
    """No matter where rows are known to come first; else nothing tells the axes apart."""
    batch = PairBatch.from_rows([square().row(row) for row in (0, 1, 2, 4, 5, 6)])
    assert batch.input_ids.shape == (6, 6)
    model = build("gpt2")
    true = truth(model, batch)
    prepare(model)
    (passed,) = watch(model, lambda: through_logits(model, batch))
    assert error(passed, true) <= 1e-9
    torch.manual_seed(0)
    other = TokensFirst().double()
    (passed,) = watch(other, lambda: through_logits(other, batch))
    assert "as many rows as tokens" in (passed.no_entries_reason or "")
