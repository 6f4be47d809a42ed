"""The account of a step whose rows are groups, in loops written by hand, against float64 autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradent import RowBatch, attach, measure_rows
from gradent.errors import InputError
from gradent.recorder import RowRecording
from tests.adapters import lora_everywhere
from tests.attribution.brute_force import Frozen
from tests.attribution.test_step import SMALL, TOLERANCE, split_groups
from tests.batches import ragged, uneven
from tests.zoo import build

MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": lambda: build("gpt2"), "untied": lambda: build("llama"), "LoRA": lambda: lora_everywhere("llama"),
}  # fmt: skip
ADVANTAGES = torch.tensor([0.7, -0.2, -0.5, 0.4, 0.0, -0.4, 1.0])


def rollouts() -> RowBatch:
    """Seven rows in two groups, whose prompts and responses the warming batches hold."""
    rows = [ragged(3).row(row) for row in range(6)] + [ragged(3).row(0)]
    prompts = [ids[~marks] for ids, marks in (rows[0], rows[1])]
    made = []
    for number, (ids, marks) in enumerate(rows):
        prompt, response = prompts[number % 2], ids[marks]
        ids = torch.cat([prompt, response, response[: number // 3]])
        made.append((ids, torch.arange(len(ids)) >= len(prompt)))
    return RowBatch.from_rows(made, torch.arange(7) % 2)


def warm(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Some steps, after which every element that the rollouts move has a second moment."""
    for scale in (1.0, 3.0, 2.0):
        loss_of(model, rollouts(), scale * torch.arange(1.0, 8.0)).backward()
        optimizer.step()
        optimizer.zero_grad()


def logps_of(model: nn.Module, batch: RowBatch) -> Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return (logps * batch.completion_mask[:, 1:]).sum(1)


def loss_of(model: nn.Module, batch: RowBatch, advantages: Tensor) -> Tensor:
    return -(logps_of(model, batch) * advantages).sum() / 10


def want(frozen: Frozen, batch: RowBatch, advantages: Tensor, kept: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of the rows that are moved `[N, parameters]`, and what each source does to each."""
    active = advantages.nonzero()[:, 0]
    parts = [dict(frozen.model.named_parameters())[name] for name in frozen.names]
    logps = logps_of(frozen.model, batch)[active]
    rows = []
    for logp in logps:
        grads = torch.autograd.grad(logp, parts, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([
            (torch.zeros_like(part) if grad is None else grad).flatten()
            for grad, part in zip(grads, parts, strict=True)
        ]))  # fmt: skip
    g, weight, group = torch.stack(rows), advantages[active].double() / 10, batch.group[active]
    pushes = ((g * (frozen.lr * frozen.metric * frozen.fresh * kept)) @ g.T) * weight
    same, own = group[:, None] == group, torch.eye(len(g), dtype=torch.bool)
    raised = (weight > 0).expand_as(same)
    moved = {
        source: (pushes * part).sum(1)
        for source, part in {
            "own": own, "positives": same & ~own & raised, "negatives": same & ~own & ~raised, "other_groups": ~same,
        }.items()
    }  # fmt: skip
    moved["momentum"] = -g @ (frozen.lr * frozen.metric * frozen.carried * frozen.moment)
    shrinking = torch.ones_like(frozen.lr) if frozen.is_decoupled else frozen.metric * frozen.fresh
    moved["weight_decay"] = -g @ (frozen.lr * shrinking * frozen.decay * frozen.theta)
    return g, moved


def run(
    model: nn.Module, optimizer: Any, parts: Sequence[tuple[RowBatch, Tensor]], **options: Any
) -> tuple[RowRecording, float]:
    with attach(model, optimizer=optimizer, pairing="rows", accumulation=len(parts), **options) as recorder:
        for batch, advantages in parts:
            loss_of(model, batch, advantages).backward()
            recorder.collect()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        found = recorder.harvest()
    assert isinstance(found, RowRecording)
    return found, min(1.0, 0.5 / (norm + 1e-6))


def halves(batch: RowBatch) -> list[tuple[RowBatch, Tensor]]:
    """Two micro-batches, with both groups in both."""
    rows = [batch.row(row) for row in range(len(batch))]
    return [
        (RowBatch.from_rows([rows[row] for row in numbers], batch.group[numbers]), ADVANTAGES[numbers])
        for numbers in ([0, 1, 2, 3], [4, 5, 6])
    ]


@pytest.mark.parametrize("is_split", [False, True], ids=["one backward", "two backwards"])
@pytest.mark.parametrize("budget", [None, SMALL], ids=["kept", "as they come"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_source_is_what_autograd_says(kind: str, budget: int | None, is_split: bool) -> None:
    model, batch = MODELS[kind](), rollouts()
    optimizer = torch.optim.AdamW(split_groups(model), lr=1e-3, weight_decay=0.1)
    warm(model, optimizer)
    frozen = Frozen(model, optimizer)
    parts = halves(batch) if is_split else [(batch, ADVANTAGES)]
    found, kept = run(model, optimizer, parts, memory_budget=budget)
    g, moved = want(frozen, batch, ADVANTAGES, kept)
    rows = found.rows
    assert (found.inactive, found.groups, found.flat_groups) == (1, 2, 0)
    assert rows.group.tolist() == [0, 1, 0, 1, 1, 0]
    torch.testing.assert_close(rows.weight, ADVANTAGES[ADVANTAGES != 0].double() / 10, rtol=1e-5, atol=0)
    norms = g.norm(dim=1)
    error = ((rows.products - g @ g.T) / torch.outer(norms, norms)).abs()
    has_met = budget is None or not is_split
    assert bool(error.isnan().any()) is not has_met
    assert float(error.nan_to_num().max()) <= TOLERANCE
    assert rows.moved is not None
    largest = torch.stack([part.abs() for part in moved.values()]).max()
    if has_met:
        for source, values in moved.items():
            assert float((rows.moved[source] - values).abs().max() / largest) <= TOLERANCE, source
        assert float(rows.moved["earlier_batches"].abs().max() / largest) <= TOLERANCE
    else:  # what came before is one source, what comes later is missing
        assert found.attribution is not None and not found.attribution.is_whole
        before = sum(moved[source] - rows.moved[source] for source in ("positives", "negatives", "other_groups"))
        assert float((rows.moved["earlier_batches"] - before)[4:].abs().max() / largest) <= TOLERANCE


def test_sketches_split_what_came_before_into_groups() -> None:
    model, batch = build("llama"), rollouts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warm(model, optimizer)
    frozen = Frozen(model, optimizer)
    found, kept = run(model, optimizer, halves(batch), memory_budget=1_000_000)
    account = found.attribution
    assert account is not None and account.is_whole and account.sketch_error is not None
    _, moved = want(frozen, batch, ADVANTAGES, kept)
    total = torch.stack(list(moved.values())).sum(0)
    largest = torch.stack([part.abs() for part in moved.values()]).max()
    assert float((account.total - total).abs().max() / largest) <= 10 * account.sketch_error
    for source, values in moved.items():
        assert float((account.moved[source] - values).abs().max() / largest) <= 10 * account.sketch_error, source


@pytest.mark.parametrize(
    "groups",
    ["prompts", [0, 1] * 4, lambda ids: [row % 2 for row in range(len(ids))]],
    ids=["prompts", "list", "function"],
)
def test_groups_are_what_one_says(groups: Any) -> None:
    model, batch = build("llama"), rollouts()
    with attach(model, groups=groups) as recorder:
        loss_of(model, batch, ADVANTAGES).backward()
        found = recorder.harvest()
    assert isinstance(found, RowRecording)
    assert found.rows.group.tolist() == [0, 1, 0, 1, 1, 0]
    products = measure_rows(model, batch, "all").products
    active = ADVANTAGES.nonzero()[:, 0]
    torch.testing.assert_close(found.rows.products, products[active][:, active], rtol=1e-4, atol=1e-4)


def test_groups_by_size_and_of_the_whole_batch() -> None:
    model, batch = build("llama"), rollouts()
    for groups, numbers in ((4, [0, 0, 0, 0, 1, 1]), ("batch", [0] * 6)):
        with attach(model, groups=groups) as recorder:
            loss_of(model, batch, ADVANTAGES).backward()
            found = recorder.harvest()
        assert isinstance(found, RowRecording)
        assert found.rows.group.tolist() == numbers


def test_what_a_group_says_of_itself() -> None:
    model, batch = build("llama"), rollouts()
    with attach(model, pairing="rows") as recorder:
        loss_of(model, batch, ADVANTAGES).backward()
        found = recorder.harvest()
    assert isinstance(found, RowRecording)
    rows, weight = found.rows, found.rows.weight
    assert weight is not None
    gradient = weight @ rows.products @ weight
    torch.testing.assert_close(rows.share, weight * (rows.products @ weight) / gradient)
    one = rows.group == 0
    pulls = weight[one] @ rows.products[one][:, one] @ weight[one]
    sizes = (weight[one].abs() * rows.products.diagonal()[one].sqrt()).sum()
    torch.testing.assert_close(rows.cancellation[0], pulls.sqrt() / sizes)
    cosines = [rows.cosine[i, j] for i in (0, 5) for j in (2,)]
    torch.testing.assert_close(rows.opposition[0], torch.stack(cosines).mean())


@pytest.mark.parametrize("groups", [0, True, "rows", 1.5, [0, 1]])
def test_groups_that_cannot_be(groups: Any) -> None:
    if groups != [0, 1]:
        with pytest.raises(InputError, match="groups"):
            attach(build("llama"), groups=groups)
        return
    model = build("llama")
    with attach(model, groups=groups) as recorder:
        loss_of(model, rollouts(), ADVANTAGES).backward()
        assert recorder.harvest() is None  # said in the log: a backward must not be broken


def test_groups_beside_pairs_and_a_temperature_of_zero() -> None:
    with pytest.raises(InputError, match="pairing='halves'"):
        attach(build("llama"), groups="prompts", pairing="halves")
    with pytest.raises(InputError, match="temperature"):
        attach(build("llama"), temperature=0)


def test_other_batches_than_pairs_do_not_matter() -> None:
    model = build("llama")
    assert len(uneven()) and len(rollouts()) == 7
    with attach(model) as recorder:  # by the data: rows of signs in any order are no pairs
        loss_of(model, rollouts(), ADVANTAGES).backward()
        assert isinstance(recorder.harvest(), RowRecording)
    with attach(model) as recorder:  # and rows that are all raised are nothing
        loss_of(model, rollouts(), ADVANTAGES.abs() + 0.1).backward()
        assert recorder.harvest() is None
