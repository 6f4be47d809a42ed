"""Logits of responses alone, where the model offers it; of everything where what it offers is not that."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from gradent import GradentWarning, PairBatch, measure
from gradent.measurement import sequence_logps
from tests.batches import ragged
from tests.truth import assert_exact, truth

VOCABULARY = 259
"""Of the tiny models."""


def late_answers() -> PairBatch:
    """Two pairs of 20 prompt tokens and 3 response tokens, which share a forward."""
    prompt = list(range(30, 50))
    return PairBatch.from_tokens([(prompt, [5, 61, 9], [17, 33, 70]), (prompt[::-1], [12, 88, 4], [23, 42, 8])])


@contextmanager
def head_inputs(model: nn.Module) -> Iterator[list[int]]:
    """Positions of every call of the head."""
    seen: list[int] = []
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    yield seen
    handle.remove()


def test_the_head_sees_responses_alone(tiny_gpt2: GPT2LMHeadModel) -> None:
    batch = late_answers()
    true = truth(tiny_gpt2, batch)
    measure(tiny_gpt2, batch)  # finds out how this model is to be measured
    with head_inputs(tiny_gpt2) as seen:
        assert_exact(measure(tiny_gpt2, batch, by_module=True), true, batch)
    assert set(seen) == {4}  # the prompt's last token, and the response


def test_behind_an_adapter_too(tiny_llama: LlamaForCausalLM) -> None:
    model = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    batch = late_answers()
    true = truth(model, batch)
    measure(model, batch)
    with head_inputs(model) as seen:
        assert_exact(measure(model, batch), true, batch)
    assert set(seen) == {4}


class Products(TorchDispatchMode):
    """Counts products with the head that are formed a row at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.batched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.batched += func is torch.ops.aten.bmm.default and VOCABULARY in (*args[0].shape, *args[1].shape)
        return func(*args, **(kwargs or {}))


def test_a_frozen_head_takes_all_rows_in_one_product(tiny_llama: LlamaForCausalLM) -> None:
    model = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    assert model.get_output_embeddings().weight.shape[0] == VOCABULARY
    batch = late_answers()
    measure(model, batch)
    with Products() as seen:
        model(input_ids=batch.input_ids[:, :20], logits_to_keep=4)
    assert seen.batched  # what a row at a time looks like
    with Products() as seen:
        measure(model, batch)
        sequence_logps(model, batch)
    assert not seen.batched


def _shifted(out: Tensor, keep: int) -> Tensor:
    """The logits of other positions than were asked for."""
    return out[:, :keep] if keep else out


def _heedless(out: Tensor, keep: int) -> Tensor:
    return out


def _short(out: Tensor, keep: int) -> Tensor:
    """One position too few."""
    return out[:, 1 - keep :] if keep else out


def _broken(out: Tensor, keep: int) -> Tensor:
    if keep:
        raise RuntimeError("logits_to_keep is not for you")
    return out


class Odd(nn.Module):
    """A model with a `logits_to_keep` of its own understanding."""

    def __init__(self, inner: GPT2LMHeadModel, cut: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.inner, self.cut = inner, cut

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0) -> Any:
        return self.cut(self.inner(input_ids=input_ids).logits, logits_to_keep)


@pytest.mark.parametrize(
    ("cut", "said"),
    [(_shifted, "other logits"), (_short, "ModelError"), (_broken, "not for you"), (_heedless, "positions")],
)
def test_what_a_model_understands_otherwise_is_left_alone(
    tiny_gpt2: GPT2LMHeadModel, cut: Callable[[Tensor, int], Tensor], said: str
) -> None:
    model, batch = Odd(tiny_gpt2, cut).eval(), late_answers()
    true = truth(model, batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GradentWarning)
        for _ in range(2):
            assert_exact(measure(model, batch), true, batch)
    told = [str(each.message) for each in caught if issubclass(each.category, GradentWarning)]
    assert len(told) == 1  # once a model
    assert said in told[0] and "Odd" in told[0] and "logits_to_keep" in told[0]


def test_a_first_pair_without_a_prompt_to_leave_out_vouches_for_none(tiny_gpt2: GPT2LMHeadModel) -> None:
    model, batch = Odd(tiny_gpt2, _shifted).eval(), late_answers()
    true = truth(model, batch)
    with pytest.warns(GradentWarning, match="logits_to_keep"):
        measure(model, PairBatch.from_tokens([([7], [5, 61, 9], [17, 33])]))
    assert_exact(measure(model, batch), true, batch)


def test_rows_as_long_as_the_model_takes(tiny_gpt2: GPT2LMHeadModel) -> None:
    """No further position can be tried, to see what padding does."""
    room = tiny_gpt2.config.n_positions
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 90, (3, room), generator=draw).tolist()
    batch = PairBatch.from_tokens([(ids[0][: room // 2], ids[1][: room // 2], ids[2][: room // 2])])
    true = truth(tiny_gpt2, batch)
    assert_exact(measure(tiny_gpt2, batch), true, batch)
    logps = sequence_logps(tiny_gpt2, batch)
    torch.testing.assert_close(logps[0], true.chosen_logp, rtol=1e-5, atol=1e-4)


def test_rows_whose_prompts_differ(tiny_gpt2: GPT2LMHeadModel) -> None:
    batch = ragged()
    true = truth(tiny_gpt2, batch)
    for _ in range(2):
        assert_exact(measure(tiny_gpt2, batch), true, batch)
    assert torch.equal(measure(tiny_gpt2, batch).inner, measure(tiny_gpt2, batch).inner)
