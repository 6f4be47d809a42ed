"""Read off a trainer's own backward, the entries are those of plain autograd, whatever the trainer did around it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradent.hooks.piggyback.config import WatchConfig
from gradent.hooks.piggyback.watcher import Piggyback
from gradent.model.parameters import trainable
from gradent.pairs.batch import PairBatch
from tests.adapters import build_adapted, lora_everywhere
from tests.batches import ragged
from tests.covering import cross
from tests.hooks.piggyback.watching import CHECKPOINTING, WAYS, error, prepare, set_up, watch
from tests.trainer_steps import dpo, through_logits
from tests.truth import TOLERANCE, Truth, truth
from tests.zoo import build


@cross(
    "name, lora, way, checkpointing",
    ["gpt2", "llama", "llama, biases, tied"],
    [False, True],
    WAYS,
    CHECKPOINTING,
    ids=[None, ["full", "LoRA"]],
)
def test_entries_are_those_of_autograd(name: str, lora: bool, way: str, checkpointing: str) -> None:
    model, batch, true, limit = set_up(name, lora=lora, way=way, checkpointing=checkpointing)
    (passed,) = watch(model, lambda: WAYS[way](model, batch))
    assert error(passed, true) <= limit
    torch.testing.assert_close(passed.logps, torch.cat([true.chosen_logp, true.rejected_logp]), rtol=1e-6, atol=1e-5)
    c = coefficients(true, dpo)
    torch.testing.assert_close(passed.c, c, rtol=1e-5, atol=1e-9)


def coefficients(true: Truth, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    chosen, rejected = (part.clone().requires_grad_() for part in (true.chosen_logp, true.rejected_logp))
    return torch.cat(torch.autograd.grad(loss(chosen, rejected), (chosen, rejected)))


ADAPTED = ["DoRA", "LoRA on embeddings", "saved head", "saved embeddings of a tied model", "IA3", "LoRA on Conv1D"]


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters(name: str) -> None:
    model, batch = build_adapted(name), ragged()
    true = truth(model, batch)
    prepare(model)
    (passed,) = watch(model, lambda: through_logits(model, batch))
    if passed.no_entries_reason is None:
        assert error(passed, true) <= TOLERANCE[true.arithmetic]
    else:  # what cannot be read off a batched backward is said, and measured in another way
        assert "no rule can tell the rows apart" in passed.no_entries_reason
        assert name == "LoRA on embeddings"


@pytest.mark.parametrize("family", ["phi", "opt", "qwen2", "qwen3", "gemma", "olmo2", "stablelm", "gpt_neox", "falcon"])
def test_families(family: str) -> None:
    model, batch = build(family, dtype=torch.float32), ragged()
    true = truth(model, batch)
    prepare(model, reentrant=False)
    (passed,) = watch(model, lambda: through_logits(model, batch))
    assert error(passed, true) <= TOLERANCE["float32"]


@pytest.mark.parametrize("scale", [1e-4, 2.0**16, 1e-17, 1e-28])
def test_coefficients_of_any_size_are_divided_out(scale: float) -> None:
    """A gradient scaler, a mean over a large batch, a pair that the model has learnt by heart."""
    model, batch = build("llama", dtype=torch.float32), ragged()
    true = truth(model, batch)
    prepare(model)
    (passed,) = watch(
        model, lambda: scale * (through_logits(model, batch, lambda chosen, rejected: (rejected - chosen).sum()))
    )
    assert error(passed, true) <= TOLERANCE["float32"]
    torch.testing.assert_close(passed.c / scale, torch.tensor([-1.0] * 3 + [1.0] * 3).double(), rtol=1e-4, atol=0)


def test_autocast() -> None:
    model, batch = build("llama", dtype=torch.float32), ragged()
    with torch.autocast("cpu", torch.bfloat16):
        true = truth(model, batch)
        prepare(model)
        (passed,) = watch(model, lambda: through_logits(model, batch))
    assert error(passed, true) <= 2e-2


def hinged(margin: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    return F.relu(margin - (chosen - rejected)).sum()


def test_offloaded_activations() -> None:
    model, batch = build("llama"), ragged()
    true = truth(model, batch)
    prepare(model)

    def step() -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return through_logits(model, batch)

    (passed,) = watch(model, step)
    assert error(passed, true) <= TOLERANCE[true.arithmetic]


def test_pairs_that_the_loss_does_not_move() -> None:
    model, batch = prepare(build("gpt2")), ragged()
    true = truth(model, batch)
    margin = float((true.chosen_logp - true.rejected_logp).sort().values[1])
    hinge = partial(hinged, margin - 1e-3)
    (passed,) = watch(model, lambda: through_logits(model, batch, hinge))
    still = (true.chosen_logp - true.rejected_logp) >= margin - 1e-3
    assert still.sum() == 2
    assert ((passed.c[:3] == 0) == still).all()
    moved = int((~still).nonzero())
    got = sum(passed.pair_entries().values())[moved]
    want = torch.stack([true.chosen_sq, true.rejected_sq, true.inner])[:, moved]
    assert ((got - want).abs() / want.abs()).max() < 1e-9


def test_chosen_and_rejected_in_two_forwards() -> None:
    model, batch = build("llama"), ragged()
    true = truth(model, batch)
    prepare(model)

    def step() -> Tensor:
        sides = []
        for rows in (slice(0, 3), slice(3, 6)):
            logits = model(input_ids=batch.input_ids[rows], attention_mask=batch.attention_mask[rows]).logits
            logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[rows, 1:, None])[..., 0]
            sides.append((logps * batch.completion_mask[rows, 1:]).sum(1))
        return dpo(*sides)

    (passed,) = watch(model, step)
    assert error(passed, true) <= TOLERANCE[true.arithmetic]


def test_rows_in_any_order_are_told_by_the_sign() -> None:
    model, batch = build("llama"), ragged()
    order = [4, 0, 2, 3, 1, 5]
    true = truth(model, PairBatch.from_rows([batch.row(row) for row in (0, 2, 1, 4, 3, 5)]))
    prepare(model)
    signs = torch.tensor([1.0 if row >= 3 else -1.0 for row in order])

    def step() -> Tensor:
        ids, mask = batch.input_ids[order], batch.attention_mask[order]
        logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        logps = logps.gather(-1, ids[:, 1:, None])[..., 0] * batch.completion_mask[order, 1:]
        return (signs * logps.sum(1)).mean()

    (passed,) = watch(model, step, pairing="signs")
    assert error(passed, true) <= TOLERANCE[true.arithmetic]


def test_a_third_block_belongs_to_no_pair() -> None:
    model, batch = build("llama"), ragged()
    true = truth(model, batch)
    prepare(model)

    def step() -> Tensor:
        three = PairBatch.from_rows([batch.row(row) for row in (0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2)][:6])
        ids = torch.cat([three.input_ids, three.input_ids[:3]])
        marks = torch.cat([three.completion_mask, three.completion_mask[:3]])
        mask = torch.cat([three.attention_mask, three.attention_mask[:3]])
        logits = model(input_ids=ids, attention_mask=mask).logits
        logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        sums = (logps * marks[:, 1:]).sum(1)
        return dpo(sums[:3], sums[3:6]) - sums[6:].mean()

    (passed,) = watch(model, step, pairing="thirds")
    assert passed.unpaired == 3
    assert error(passed, true) <= TOLERANCE[true.arithmetic]


def test_a_pass_without_gradient_is_no_step() -> None:
    model, batch = prepare(build("gpt2")), ragged()

    def step() -> Tensor:
        with torch.no_grad():
            reference = through_logits(model, batch)
        return through_logits(model, batch) + 0 * reference

    assert len(watch(model, step)) == 1


def test_accumulated_batches_are_kept_apart() -> None:
    model = prepare(build("gpt2"))
    batches = (ragged().select([0, 1]), ragged().select([2]))
    trues = [truth(model, batch) for batch in batches]
    watcher = Piggyback(WatchConfig(model=model, parameters=trainable(model), budget=2**24))
    watcher.arm()
    for batch in batches:
        (through_logits(model, batch) / 2).backward()
    passed = watcher.take()
    watcher.disarm()
    assert [error(one, true) <= 1e-9 for one, true in zip(passed, trues, strict=True)] == [True, True]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_trainers_gradients_are_the_same_to_the_bit(reentrant: bool | None) -> None:
    def gradients(watched: bool) -> list[Tensor]:
        model, batch = prepare(build("llama", dtype=torch.float32), reentrant), ragged()
        torch.manual_seed(1)
        if watched:
            watch(model, lambda: through_logits(model, batch))
        else:
            through_logits(model, batch).backward()
        return [*(p.grad for p in model.parameters() if p.grad is not None), torch.rand(3)]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


def test_an_error_of_its_own_does_not_reach_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("out of order")

    model, batch = prepare(build("gpt2")), ragged()
    monkeypatch.setattr("gradent.hooks.capture.capture.Capture._record", broken)
    (passed,) = watch(model, lambda: through_logits(model, batch))
    assert "out of order" in (passed.no_entries_reason or "")
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_check_can_fail() -> None:
    model, batch = prepare(build("gpt2")), ragged()
    true = truth(model, batch)
    swapped = PairBatch.from_rows([batch.row(row) for row in (1, 0, 2, 3, 4, 5)])
    (passed,) = watch(model, lambda: through_logits(model, swapped))
    assert error(passed, true) > 1e-2


def test_a_batch_that_the_loop_changes_afterwards() -> None:
    model, batch = prepare(lora_everywhere("llama")), ragged()
    ids = batch.input_ids.clone()

    def step() -> Tensor:
        logits = model(input_ids=ids, attention_mask=batch.attention_mask).logits
        ids[:, 0] = 1
        logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        return dpo(*(logps * batch.completion_mask[:, 1:]).sum(1).chunk(2))

    model.get_input_embeddings().weight.requires_grad_(False)
    (passed,) = watch(model, step)
    for row, (kept, _) in enumerate(passed.rows):
        assert torch.equal(kept, batch.row(row)[0])


def test_logits_are_let_go_of_once_they_are_read() -> None:
    model, batch = prepare(build("llama")), ragged()
    watcher = Piggyback(WatchConfig(model=model, parameters=trainable(model), budget=2**24))
    watcher.arm()
    roots = []
    for _ in range(3):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        roots.append(weakref.ref(logits))
        logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        loss = dpo(*(logps * batch.completion_mask[:, 1:]).sum(1).chunk(2))
        del logits, logps
        gc.collect()
        assert roots[-1]() is not None, "they are still to be read"
        loss.backward()
        del loss
    gc.collect()
    assert [root() for root in roots] == [None] * 3
    assert [one.no_entries_reason for one in watcher.take()] == [None] * 3
    watcher.disarm()
