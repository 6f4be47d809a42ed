"""Watched, a checkpointed step keeps the memory that checkpointing saves, and leaves nothing behind."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gradent.hooks.capture.capture import Capture
from gradent.hooks.piggyback.config import WatchConfig
from gradent.hooks.piggyback.watcher import Piggyback
from gradent.model.parameters import trainable
from gradent.pairs.batch import PairBatch
from tests.live import LiveBytes
from tests.trainer_steps import through_logits


def make(reentrant: bool | None) -> LlamaForCausalLM:
    """Many thin layers, so that activations are most of what a step holds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=128, num_hidden_layers=12, num_attention_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model


def batch() -> PairBatch:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 32, (64,), generator=draw).tolist() for _ in range(6)]
    return PairBatch.from_tokens([(ids[0], ids[1] * 2, ids[2] * 2), (ids[3], ids[4] * 2, ids[5] * 2)])


def peak(reentrant: bool | None, *, watched: bool) -> int:
    """Most bytes alive in one step, parameters and their gradients apart."""
    model, pairs = make(reentrant), batch()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    watcher = Piggyback(WatchConfig(model=model, parameters=trainable(model), budget=2**18))
    if watched:
        watcher.arm()
    with LiveBytes() as live:
        through_logits(model, pairs).backward()
        if watched:
            (passed,) = watcher.take()
            assert passed.no_entries_reason is None
    watcher.disarm()
    return live.peak


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_saving_of_checkpointing_is_kept(reentrant: bool) -> None:
    everything = peak(None, watched=False)
    bare, watched = (peak(reentrant, watched=watched) for watched in (False, True))
    assert bare < 0.5 * everything
    assert watched < 1.25 * bare


def test_without_checkpointing_little_is_added() -> None:
    assert peak(None, watched=True) < 1.15 * peak(None, watched=False)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_nothing_stays_in_memory(reentrant: bool | None) -> None:
    def captures() -> int:
        return sum(type(thing) is Capture for thing in gc.get_objects())

    gc.collect()
    before = captures()
    peak(reentrant, watched=True)
    gc.collect()
    assert captures() == before
