"""Vectors of rows' gradients against autograd's gradients in the same sketch: tied heads, adapters, tiles, dtypes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gradent.auditing.measuring.steps import measure_along, measure_vectors, sample_gradient
from gradent.kernels.common.sketch import GradientSketch
from gradent.loading.preferences import AuditPair
from gradent.model.parameters import trainable

VOCAB, PAIRS = 40, 5
EXACT = 1e-6  # Llama's norms are float32 even in a float64 model


def llama(
    *, tied: bool, dtype: torch.dtype = torch.float64, kind: type[LlamaForCausalLM] = LlamaForCausalLM
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return kind(config).to(dtype).eval()


def adapted(**options: object) -> nn.Module:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], **options)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = get_peft_model(llama(tied=False), config)
        for part in trainable(model).values():
            part.data = torch.randn_like(part) / 4
    return model.double().eval()


class RowByRow(LlamaForCausalLM):
    """Another model in a batch than row by row."""

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        out = super().forward(input_ids, **options)
        return replace(out, logits=out.logits * (1.0 if len(input_ids) == 1 else 1.1))


def made_pairs() -> list[AuditPair]:
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return [int(number) for number in torch.randint(3, VOCAB, (length,), generator=draw)]

    return [
        AuditPair(
            row=row, where=f"row {row}", prompt_ids=ids(3 + row), chosen_ids=ids(2 + 2 * row),
            rejected_ids=ids(9 - row), chosen_text="", rejected_text="",
        )
        for row in range(PAIRS)
    ]  # fmt: skip


def by_autograd(model: nn.Module, pairs: list[AuditPair]) -> torch.Tensor:
    """Every row's gradient, `[2, P, n]`."""
    found = []
    for answers in ([pair.chosen_ids for pair in pairs], [pair.rejected_ids for pair in pairs]):
        for pair, answer in zip(pairs, answers, strict=True):
            ids = torch.tensor([*pair.prompt_ids, *answer])
            logits = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            logp = logits.gather(-1, ids[1:, None])[len(pair.prompt_ids) - 1 :].sum()
            grads = torch.autograd.grad(logp, list(trainable(model).values()))
            found.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(found).view(2, len(pairs), -1)


MODELS = {
    "tied": lambda: llama(tied=True),
    "tied, row by row": lambda: llama(tied=True, kind=RowByRow),
    "untied": lambda: llama(tied=False),
    "LoRA": adapted,
    "DoRA": lambda: adapted(use_dora=True),
    "rsLoRA with a head": lambda: adapted(use_rslora=True, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("budget", [None, 30_000])
@pytest.mark.parametrize("width", [64, 1000, 10**6])
@pytest.mark.parametrize("name", MODELS)
def test_vectors_are_autograds(name, width, budget) -> None:
    model, pairs = MODELS[name](), made_pairs()
    truth = by_autograd(model, pairs)
    sketch = GradientSketch([part.shape for part in trainable(model).values()], width)
    expected = torch.zeros(2 * PAIRS, sketch.width, dtype=torch.float64)
    if sketch.is_exact:
        expected = truth.view(2 * PAIRS, -1)
    else:
        sketch.add(expected, torch.arange(truth.shape[-1]), truth.view(2 * PAIRS, -1))
    blocks = measure_vectors(model, pairs, [[0, 1, 2], [3, 4]], width=width, memory_budget=budget)
    found = torch.cat([torch.from_numpy(vectors) for vectors, _ in blocks], 1)
    assert float((found - expected.view(2, PAIRS, -1)).abs().max()) <= EXACT * float(truth.norm(dim=-1).max())


@pytest.mark.parametrize("name", MODELS)
def test_along_directions_as_autograd(name) -> None:
    model, pairs = MODELS[name](), made_pairs()
    truth = by_autograd(model, pairs)
    weights = torch.randn(PAIRS, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    batches = [[0, 1, 2], [3, 4]]
    sample = sample_gradient(model, pairs, batches, weights.numpy())
    whole = torch.cat([part.flatten() for part in sample.values()])
    assert torch.allclose(whole, (truth * weights.T[..., None]).sum((0, 1)), rtol=0, atol=EXACT * float(truth.norm()))
    directions = {
        "sample": sample, "one": {key: torch.ones_like(part) for key, part in sample.items()},
        "none": {key: torch.zeros_like(part) for key, part in sample.items()},
    }  # fmt: skip
    for place, found in enumerate(measure_along(model, pairs, batches, directions, memory_budget=30_000)):
        for key, direction in directions.items():
            expected = truth[:, batches[place]] @ torch.cat([part.flatten() for part in direction.values()])
            assert torch.allclose(
                torch.tensor(found[key]["along"], dtype=torch.float64),
                expected,
                rtol=0,
                atol=EXACT * float(truth.norm() * 100),
            ), key


def test_half_precision_does_not_lose_small_weights() -> None:
    model, pairs = llama(tied=True, dtype=torch.float16), made_pairs()
    weights = torch.full((PAIRS, 2), 3e-7, dtype=torch.float64)
    found = sample_gradient(model, pairs, [list(range(PAIRS))], weights.numpy())
    truth = by_autograd(llama(tied=True), pairs).sum((0, 1)) * 3e-7
    whole = torch.cat([part.flatten() for part in found.values()]).double()
    assert float((whole - truth).norm() / truth.norm()) < 0.01
