"""CHES is its published definition, and the head's block what `measure` gives for the head, whatever the model does."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from gradent import PairBatch, measure, proxies
from gradent.errors import ModelError, NonFiniteError
from tests.batches import left_padded, ragged
from tests.zoo import build


def definition(model: nn.Module, batch: PairBatch, *, mean: bool = False) -> torch.Tensor:
    """CHES as Razin et al. write it: the hidden state of every proper prefix of a response, a forward each."""

    def prefixes(row: int) -> list[torch.Tensor]:
        ids, marks = batch.row(row)
        first = int(marks.nonzero()[0])
        states = []
        for end in range(first, len(ids)):  # the prompt and y_<k, k = 1 .. |y|
            output = model(input_ids=ids[None, :end], output_hidden_states=True)
            states.append(output.hidden_states[-1][0, -1].double())
        return states

    scores = []
    with torch.no_grad():
        for pair in range(len(batch)):
            chosen, rejected = prefixes(pair), prefixes(len(batch) + pair)
            w, other = sum(chosen), sum(rejected)
            if mean:
                w, other = w / len(chosen), other / len(rejected)
            scores.append(w @ other - w @ w)
    return torch.stack(scores)


def assert_close(found: torch.Tensor, true: torch.Tensor, tolerance: float) -> None:
    assert float(((found - true).abs() / true.abs().clamp_min(1e-9)).max()) <= tolerance


# transformers' Llama has float32 islands in float64; GPT-2 has none.
@pytest.mark.parametrize(("family", "tolerance"), [("gpt2", 1e-12), ("llama", 1e-6), ("gemma2", 1e-6)])
def test_ches_is_its_definition(family, tolerance):
    model, batch = build(family), ragged()
    assert_close(proxies.ches(model, batch), definition(model, batch), tolerance)
    normalized = proxies.ches(model, batch, length_normalized=True)
    assert_close(normalized, definition(model, batch, mean=True), tolerance)


def test_padding_is_ignored_on_either_side():
    model, batch = build("gpt2"), ragged()
    found = proxies.measure_proxies(model, batch)
    other = proxies.measure_proxies(model, left_padded(batch))
    alone = [proxies.measure_proxies(model, batch.select([pair])) for pair in range(3)]
    for name in ("ches", "ches_normalized", "chosen_logp", "rejected_logp"):
        assert torch.equal(getattr(found, name), getattr(other, name))
        assert_close(torch.cat([getattr(each, name) for each in alone]), getattr(found, name), 1e-11)
    for name in ("chosen_sq", "rejected_sq", "inner"):
        assert torch.equal(getattr(found.head, name), getattr(other.head, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_at_4096_tokens(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("llama", dtype=torch.float32)
        model.config.max_position_embeddings = 4200
        with torch.no_grad():
            model.model.norm.weight.fill_(4.0)  # as large as those of trained models: a hidden state's norm is 23
        ids = torch.randint(3, 97, (2, 4096)).tolist()
    batch = PairBatch.from_tokens([([1, 2], *ids)])
    wide, narrow = proxies.ches(model, batch), proxies.ches(model.to(dtype), batch)
    assert float(wide.abs()) > 65504  # what float16 cannot hold
    assert bool(narrow.isfinite().all())
    assert_close(narrow, wide, 0.2)
    assert bool(proxies.head_gram(model, batch).inner.isfinite().all())


def head_of(model: nn.Module, batch: PairBatch, name: str = "lm_head") -> torch.Tensor:
    """What `measure` gives for the module of the head, `[3, B]`."""
    modules = measure(model, batch, by_module=True).modules
    assert modules is not None
    return torch.stack(modules[name])


# Gemma 2 caps its logits, Cohere and Granite multiply or divide them.
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "qwen2"])
def test_the_heads_block_is_that_of_measure(family):
    model, batch = build(family), ragged()
    with torch.no_grad():  # untied, whatever the family's config says
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone() * 1.5)
        if hasattr(model, "logit_scale"):
            model.logit_scale = 0.25
        if hasattr(model.config, "logits_scaling"):
            model.config.logits_scaling = 3.0
        if family == "gemma2":
            model.config.final_logit_softcapping = 2.0
    found = proxies.head_gram(model, batch)
    entries = torch.stack([found.chosen_sq, found.rejected_sq, found.inner])
    true = head_of(model, batch)
    scale = torch.stack([true[0], true[1], (true[0] * true[1]).sqrt()])
    assert float(((entries - true) / scale).abs().max()) <= 1e-6
    gram = measure(model, batch)
    assert torch.allclose(found.chosen_logp, gram.chosen_logp, rtol=1e-6, atol=0)
    assert torch.equal(found.chosen_len, gram.chosen_len)


def test_under_tied_weights_it_is_the_use_in_the_head_alone():
    model, batch = build("gpt2"), ragged()
    assert model.lm_head.weight is model.transformer.wte.weight
    found = proxies.head_gram(model, batch)
    untied = build("gpt2")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    assert torch.allclose(found.inner, head_of(untied, batch)[2], rtol=1e-9)
    tied = measure(model, batch, by_module=True).modules
    assert not torch.allclose(found.inner, tied["transformer.wte"][2], rtol=1e-2)


def test_nothing_need_be_trainable_and_an_adapter_counts():
    model, batch = build("llama"), ragged()
    before = proxies.measure_proxies(model, batch)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.requires_grad_(False)
    after = proxies.measure_proxies(adapted, batch)
    assert not torch.allclose(before.ches, after.ches)
    with adapted.disable_adapter():
        assert_close(proxies.ches(adapted, batch), before.ches, 1e-9)
    assert_close(after.ches, definition(adapted, batch), 1e-6)


def test_one_forward_a_response(monkeypatch):
    model, batch = build("llama"), ragged()
    proxies.measure_proxies(model, batch)  # what is found out once a model
    rows, forward = [], model.forward

    def counted(*args, **kwargs):
        rows.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    proxies.measure_proxies(model, batch)
    assert sum(rows) == 6


def test_what_is_done_to_the_logits_unseen_is_refused():
    model, batch = build("llama"), ragged()
    forward = model.forward

    def other(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits + output.logits.square()
        return output

    model.forward = other
    with pytest.raises(ModelError, match="changes what its head puts out"):
        proxies.head_gram(model, batch)
    assert len(proxies.ches(model, batch)) == 3


def test_a_model_without_a_head_and_nan_are_refused():
    class Bare(nn.Module):
        def forward(self, input_ids):
            return torch.nn.functional.one_hot(input_ids, 97).float()

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    with pytest.raises(ModelError, match="does not show what enters its head"):
        proxies.ches(Bare(), ragged())
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(NonFiniteError, match="pair 0"):
        proxies.head_gram(model, ragged())
