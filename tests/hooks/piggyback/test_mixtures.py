"""Mixtures of experts with trainable experts: each token is known by the row that the dispatch picked it from."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from gradent import measure
from gradent.errors import GradentWarning
from tests.adapters import ATTENTION, FUSED, adapt, lora
from tests.batches import left_padded, ragged
from tests.hooks.piggyback.test_packed import Pack, through
from tests.hooks.piggyback.watching import CHECKPOINTING, error, prepare, watch
from tests.trainer_steps import through_logits
from tests.truth import TOLERANCE, scaled_error, truth
from tests.zoo import build

ROUTERS = {"qwen3_moe": "gate", "gpt_oss": "router"}
FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe", "llama4_text"]
EXPERTS = {"eager": None, "grouped_mm": torch.float32, "batched_mm": torch.float32}  # in float64, eager alone runs


def make(family: str, experts: str) -> nn.Module:
    return build(family, dtype=EXPERTS[experts], experts="eager" if family == "llama4_text" else experts)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_entries_are_those_of_autograd(family: str, experts: str) -> None:
    model, batch = make(family, experts), ragged()
    true = truth(model, batch)
    (passed,) = watch(prepare(model), lambda: through_logits(model, batch))
    assert error(passed, true) <= min(1e-6, TOLERANCE[true.arithmetic])


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("error::gradent.errors.GradentWarning")
def test_measured_in_batches(family: str, experts: str) -> None:
    model, batch = make(family, experts), ragged()
    assert scaled_error(measure(model, batch), truth(model, batch)) <= 1e-6


@pytest.mark.parametrize("checkpointing", list(CHECKPOINTING)[1:])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_checkpointing(family: str, checkpointing: str) -> None:
    model, batch = make(family, "grouped_mm"), ragged()
    true = truth(model, batch)
    prepare(model, CHECKPOINTING[checkpointing])
    (passed,) = watch(model, lambda: through_logits(model, batch))
    assert error(passed, true) <= 1e-6


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_as_many_rows_as_experts(family: str) -> None:
    model, batch = make(family, "eager"), left_padded(ragged(2))  # 4 of both
    true = truth(model, batch)
    (passed,) = watch(prepare(model), lambda: through_logits(model, batch))
    assert error(passed, true) <= 1e-6


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_packed_rows(experts: str) -> None:
    model, batch = make("qwen3_moe", experts), ragged()
    true = truth(model, batch)
    (passed,) = watch(prepare(model), lambda: through(model, Pack(batch), "position_ids"))
    assert error(passed, true) <= 1e-6


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_the_run_stays_the_same_to_the_bit(experts: str) -> None:
    model, batch = prepare(make("qwen3_moe", experts)), ragged()
    bare = copy.deepcopy(model)
    through_logits(bare, batch).backward()
    watch(model, lambda: through_logits(model, batch))
    pairs = zip(model.parameters(), bare.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("targets", ["experts", "experts and attention", "all-linear", "a router"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_lora_on_experts(family: str, targets: str, experts: str) -> None:
    config = {
        "experts": lora(target_parameters=FUSED),
        "experts and attention": lora(target_modules=ATTENTION, target_parameters=FUSED),
        "all-linear": lora(target_modules="all-linear"),
        "a router": lora(target_modules=["q_proj"], target_parameters=[f"mlp.{ROUTERS[family]}.weight"]),
    }[targets]
    model, batch = adapt(make(family, experts), config), ragged()
    true = truth(model, batch)
    limit = 1e-6 if experts == "eager" else TOLERANCE["float32"]
    (passed,) = watch(prepare(model), lambda: through_logits(model, batch))
    assert error(passed, true) <= limit
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradentWarning)
        assert scaled_error(measure(model, batch), true) <= limit


def test_lora_on_experts_behind_checkpoints() -> None:
    model, batch = adapt(make("qwen3_moe", "grouped_mm"), lora(target_parameters=FUSED)), ragged()
    true = truth(model, batch)
    prepare(model, reentrant=False)
    (passed,) = watch(model, lambda: through_logits(model, batch))
    assert error(passed, true) <= TOLERANCE["float32"]
