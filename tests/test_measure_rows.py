"""`measure_rows` against float64 autograd, one unpadded row at a time: groups, metric, directions, budgets."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from gradent import PairBatch, RowBatch, RowGram, measure, measure_rows
from gradent.errors import InputError, PairError
from tests.adapters import lora_everywhere
from tests.batches import ragged
from tests.zoo import build

# Groups of 1, 2, 3 and 5 rows, of 4 to 14 tokens; several completions of a single token, two equal rows.
GROUPS = (
    ([5, 17, 42, 8], [[61, 9, 33, 70, 12, 88], [23], [23], [44, 15, 52, 29], [90]]),
    ([31, 3], [[44, 96, 7]]),
    ([77, 0, 26, 50, 13, 91], [[0, 68, 19, 35], [83, 57]]),
    ([64, 2, 18], [[23, 35, 45, 9, 33, 12, 12, 8, 51, 4, 1], [21], [60, 3]]),
)
MODELS = {
    "gpt2, tied": lambda: build("gpt2"),
    "gpt2, untied": lambda: build("gpt2, untied"),
    "llama, LoRA": lambda: lora_everywhere("llama"),
    "llama, full": lambda: build("llama"),
}


def rows() -> RowBatch:
    return RowBatch.from_tokens(GROUPS)


def gradients(model: nn.Module, batch: RowBatch | PairBatch) -> tuple[dict[str, Tensor], Tensor]:
    """Every row's gradient by parameter, float64 `[N, numbers]`, and the log-probs `[N]`."""
    model.eval()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads, logps = [], []
    for row in range(len(batch.input_ids)):
        ids, marks = batch.row(row)
        out = model(input_ids=ids[None])
        logits = (out.logits if hasattr(out, "logits") else out)[0].double().log_softmax(-1)
        logp = (logits[:-1].gather(1, ids[1:, None])[:, 0] * marks[1:]).sum()
        found = torch.autograd.grad(logp, list(named.values()), allow_unused=True)
        grads.append([torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), found, strict=True)])
        logps.append(logp.detach())
    flat = {
        name: torch.stack([g.flatten() for g in part])
        for name, part in zip(named, zip(*grads, strict=True), strict=True)
    }
    return flat, torch.stack(logps)


def wanted(group: Tensor, among: str) -> Tensor:
    return torch.ones(len(group), len(group), dtype=torch.bool) if among == "all" else group[:, None] == group[None]


def error(gram: RowGram, grads: Mapping[str, Tensor], among: str, roots: Mapping[str, Tensor] | None = None) -> float:
    """The largest scaled error; inf where a product is missing, or is there though nobody asked for it."""
    scaled = [grad if roots is None else grad * roots[name] for name, grad in grads.items()]
    true = sum(grad @ grad.T for grad in scaled)
    norms = true.diagonal().sqrt()
    asked = wanted(gram.group, among)
    if not torch.equal(gram.products.isnan(), ~asked):
        return float("inf")
    return float(((gram.products - true).abs() / torch.outer(norms, norms))[asked].max())


@pytest.mark.parametrize("among", ["groups", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_autograd(name: str, among: str) -> None:
    model, batch = MODELS[name](), rows()
    grads, logps = gradients(model, batch)
    gram = measure_rows(model, batch, among, by_module=True)
    assert error(gram, grads, among) <= 1e-9
    torch.testing.assert_close(gram.logp, logps, rtol=1e-9, atol=1e-9)
    assert gram.group.tolist() == [0] * 5 + [1] + [2] * 2 + [3] * 3
    assert gram.length.tolist() == [6, 1, 1, 4, 1, 3, 4, 2, 11, 1, 2]
    total = sum(part.nan_to_num() for part in gram.modules.values())
    torch.testing.assert_close(total, gram.products.nan_to_num(), rtol=1e-9, atol=1e-9)
    again = measure_rows(model, batch, among)
    assert torch.equal(again.products.nan_to_num(), measure_rows(model, batch, among).products.nan_to_num())


@pytest.mark.parametrize("budget", ["2KiB", "64KiB"])
@pytest.mark.parametrize("name", ["gpt2, tied", "llama, LoRA"])
def test_a_tiny_budget_gives_the_same(name: str, budget: str) -> None:
    model, batch = MODELS[name](), rows()
    grads, _ = gradients(model, batch)
    for among in ("groups", "all"):
        assert error(measure_rows(model, batch, among, memory_budget=budget), grads, among) <= 1e-9


@pytest.mark.parametrize("among", ["groups", "all"])
@pytest.mark.parametrize("budget", [None, "4KiB"])
@pytest.mark.parametrize("name", ["gpt2, tied", "llama, LoRA"])
def test_metric_and_directions(name: str, budget: str | None, among: str) -> None:
    model, batch = MODELS[name](), rows()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values())
    model(input_ids=batch.input_ids).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    grads, _ = gradients(model, batch)
    draw = torch.Generator().manual_seed(0)
    directions = [
        {name: torch.randn(p.shape, generator=draw, dtype=p.dtype) for name, p in trained.items()} for _ in range(2)
    ]
    roots = {}
    for key, parameter in trained.items():
        state = optimizer.state[parameter]
        second = state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))
        roots[key] = (second.sqrt() + 1e-8).rsqrt().flatten()
    for metric, root in ((None, None), (optimizer, roots)):
        gram = measure_rows(model, batch, among, metric, directions=directions, memory_budget=budget)
        assert error(gram, grads, among, root) <= 1e-9
        weight = {name: torch.ones(()) if root is None else root[name].square() for name in grads}
        along = torch.stack(
            [sum(grad @ (weight[name] * part[name].flatten()) for name, grad in grads.items()) for part in directions],
            1,
        )
        norms = gram.products.diagonal().sqrt()[:, None] * along.abs().max()
        assert float(((gram.along - along).abs() / norms.clamp_min(1e-300)).max()) <= 1e-9
        torch.testing.assert_close(gram.along, along, rtol=1e-7, atol=1e-7 * float(along.abs().max()))


@pytest.mark.parametrize("name", ["gpt2, tied", "llama, LoRA"])
def test_pairs_are_what_measure_gives(name: str) -> None:
    model, batch = MODELS[name](), ragged()
    pairs, gram = measure(model, batch), measure_rows(model, batch, "pairs")
    assert gram.group.tolist() == [0, 1, 2, 0, 1, 2]
    squares = gram.products.diagonal()
    inner = gram.products[[0, 1, 2], [3, 4, 5]]
    assert torch.equal(squares, torch.cat([pairs.chosen_sq, pairs.rejected_sq])) and torch.equal(inner, pairs.inner)
    assert torch.equal(gram.logp, torch.cat([pairs.chosen_logp, pairs.rejected_logp]))
    torch.testing.assert_close(gram.cosine[[0, 1, 2], [3, 4, 5]], pairs.cosine)


@pytest.mark.parametrize("among", ["groups", "all"])
def test_the_second_opinion(among: str) -> None:
    model, batch = build("llama"), rows()
    grads, _ = gradients(model, batch)
    assert error(measure_rows(model, batch, among, engine="func"), grads, among) <= 1e-9


def test_float32_and_rows_one_by_one() -> None:
    model, batch = build("jetmoe", dtype=torch.float32), rows()
    with pytest.warns(Warning, match="one row a forward"):
        gram = measure_rows(model, batch, "all")
    grads, _ = gradients(model.double(), batch)
    assert error(gram, grads, "all") <= 5e-6


def test_a_single_row_and_interleaved_groups() -> None:
    model, whole = build("gpt2"), rows()
    alone = RowBatch(whole.input_ids[:1], whole.attention_mask[:1], whole.completion_mask[:1], whole.group[:1])
    grads, _ = gradients(model, alone)
    assert error(measure_rows(model, alone, "all"), grads, "all") <= 1e-9
    mixed = RowBatch(whole.input_ids, whole.attention_mask, whole.completion_mask, torch.arange(11) % 4)
    grads, _ = gradients(model, mixed)
    assert error(measure_rows(model, mixed), grads, "groups") <= 1e-9


def test_the_checker_can_fail() -> None:
    model, batch = build("gpt2"), rows()
    grads, _ = gradients(model, batch)
    swapped = list(range(11))
    swapped[0], swapped[8] = 8, 0
    assert error(measure_rows(model, batch, "all"), {n: g[swapped] for n, g in grads.items()}, "all") > 1e-3
    assert error(measure_rows(model, batch), grads, "all") == float("inf"), "products that are missing"


def test_refusals() -> None:
    model, batch = build("gpt2"), rows()
    with pytest.raises(InputError, match=r"exactly two rows; group 0 has 5.*among='groups'"):
        measure_rows(model, batch, "pairs")
    with pytest.raises(InputError, match="accepted are 'pairs', 'groups' and 'all'"):
        measure_rows(model, batch, "rows")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has nothing for"):
        measure_rows(model, batch, directions=[{}])
    with pytest.raises(InputError, match="engine='slow'"):
        measure_rows(model, batch, engine="slow")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one is needed"):
        RowBatch.from_tokens([])
    with pytest.raises(InputError, match="a single completion is a list of one"):
        RowBatch.from_tokens([([1, 2], [3, 4])])  # type: ignore[list-item]
    for prompt, completions in (([], [[1]]), ([1], []), ([1], [[2], []])):
        with pytest.raises(PairError, match="group 0"):
            RowBatch.from_tokens([(prompt, completions)])
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(InputError, match="group"):
        RowBatch(ids, ids, ids, torch.zeros(3))
    for attention, completion, said in (
        ([[0, 0, 0]], [[0, 0, 0]], "no real token"),
        ([[1, 0, 1]], [[0, 0, 1]], "hole"),
        ([[1, 1, 0]], [[0, 0, 1]], "marks padding"),
        ([[1, 1, 1]], [[0, 0, 0]], "completion is empty"),
        ([[1, 1, 1]], [[1, 1, 1]], "nothing predicts it"),
    ):
        with pytest.raises(PairError, match=said):
            RowBatch(ids[:1], torch.tensor(attention), torch.tensor(completion), torch.zeros(1, dtype=torch.int64))


class Tokenizer:
    """Characters are tokens."""

    pad_token_id = None
    eos_token = "."

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 90 for letter in text]}


def test_text() -> None:
    batch = RowBatch.from_text(Tokenizer(), ["ab", "c"], [["d", "ef", "gh"], ["i"]], add_eos=True)  # type: ignore[arg-type]
    assert batch.group.tolist() == [0, 0, 0, 1] and batch.completion_mask.sum(1).tolist() == [2, 3, 3, 2]
    cut = RowBatch.from_text(Tokenizer(), ["ab"], [["defg", "h"]], max_length=4)  # type: ignore[arg-type]
    assert cut.completion_mask.sum(1).tolist() == [2, 1]
    with pytest.raises(PairError, match="group 0: completion 1 is empty"):
        RowBatch.from_text(Tokenizer(), ["ab"], [["c", ""]])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one of each a group"):
        RowBatch.from_text(Tokenizer(), ["ab"], [])  # type: ignore[arg-type]
