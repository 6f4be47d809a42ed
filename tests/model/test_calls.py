"""The model is left as it was found, and models that cannot be measured are refused in plain words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from gradent.errors import InputError, ModelError, NotCausalError, NothingTrainableError
from gradent.measurement import measure, sequence_logps
from gradent.model.observed import observed
from gradent.pairs.batch import PairBatch
from tests.batches import ragged

TINY_BERT = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model and the process that a measurement could disturb."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "versions": {name: p._version for name, p in model.named_parameters()},  # noqa: SLF001
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [len(vars(module)[kind]) for kind in vars(module) if kind.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "parameter hooks": {name: p._backward_hooks for name, p in model.named_parameters()},  # noqa: SLF001
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "autocast cache": torch.is_autocast_cache_enabled(),
    }


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    if isinstance(before, dict):
        if before.keys() != after.keys():
            return [f"{where}: keys"]
        return [line for key in before for line in differences(before[key], after[key], f"{where}/{key}")]
    same = torch.equal(before, after) if isinstance(before, Tensor) else before == after
    return [] if same else [where]


def disturb(model: nn.Module) -> None:
    """A model in the middle of a run: some modules in training mode, some not, gradients present, a part frozen."""
    model.train()
    next(model.children()).eval()
    for number, parameter in enumerate(model.parameters()):
        if number % 3 == 0:
            parameter.grad = torch.ones_like(parameter)
        parameter.requires_grad_(number % 4 != 1)


CALLS: dict[str, Callable[[nn.Module], object]] = {
    "hooks": lambda model: measure(model, ragged()),
    "func": lambda model: measure(model, ragged(), engine="func"),
    "by module": lambda model: measure(model, ragged(), by_module=True, memory_budget="64KiB"),
    "dropout": lambda model: measure(model, ragged(), dropout=True),
    "log-probs": lambda model: sequence_logps(model, ragged()),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_changes(tiny_gpt2: GPT2LMHeadModel, name: str) -> None:
    disturb(tiny_gpt2)
    before = state(tiny_gpt2)
    CALLS[name](tiny_gpt2)
    assert differences(before, state(tiny_gpt2)) == []


@pytest.mark.parametrize("name", CALLS)
def test_nothing_changes_after_an_exception(tiny_gpt2: GPT2LMHeadModel, name: str) -> None:
    disturb(tiny_gpt2)

    def fail(*args: object) -> None:
        raise RuntimeError("out of order")

    handle = tiny_gpt2.transformer.h[1].mlp.register_forward_hook(fail)
    before = state(tiny_gpt2)
    with pytest.raises(RuntimeError, match="out of order"):
        CALLS[name](tiny_gpt2)
    assert differences(before, state(tiny_gpt2)) == []
    handle.remove()


def test_the_check_above_can_fail(tiny_gpt2: GPT2LMHeadModel) -> None:
    before = state(tiny_gpt2)
    tiny_gpt2.transformer.h[0].train()
    torch.rand(1)
    found = differences(before, state(tiny_gpt2))
    assert "/training/transformer.h.0" in found and "/rng" in found


def test_training_goes_on_to_the_same_bits(tiny_gpt2: GPT2LMHeadModel) -> None:
    def train(model: nn.Module, watched: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            batch = ragged()
            loss = -model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1).mean()
            loss.backward()
            if watched:
                measure(model, batch)
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach().clone() for parameter in model.parameters()]

    other = copy.deepcopy(tiny_gpt2)
    for one, two in zip(train(tiny_gpt2, False), train(other, True), strict=True):
        assert torch.equal(one, two)


def test_checkpointing_behind_a_property_is_seen(tiny_gpt2: GPT2LMHeadModel) -> None:
    class Behind(GPT2LMHeadModel):
        @property
        def gradient_checkpointing(self) -> bool:
            return self.checkpointed

        @gradient_checkpointing.setter
        def gradient_checkpointing(self, value: bool) -> None:
            self.checkpointed = value

    tiny_gpt2.__class__ = Behind
    tiny_gpt2.checkpointed = True
    with observed(tiny_gpt2, dropout=True):
        assert not tiny_gpt2.checkpointed
    assert tiny_gpt2.checkpointed


def test_gradients_are_measured_under_no_grad_too(tiny_gpt2: GPT2LMHeadModel) -> None:
    expected = measure(tiny_gpt2, ragged()).inner
    with torch.no_grad():
        assert torch.equal(measure(tiny_gpt2, ragged()).inner, expected)


def test_dropout_is_off_unless_asked_for(tiny_gpt2: GPT2LMHeadModel) -> None:
    tiny_gpt2.train()
    assert torch.equal(measure(tiny_gpt2, ragged()).inner, measure(tiny_gpt2, ragged()).inner)
    torch.manual_seed(0)
    assert not torch.equal(measure(tiny_gpt2, ragged(), dropout=True).inner, measure(tiny_gpt2, ragged()).inner)


def test_nothing_trainable(tiny_gpt2: GPT2LMHeadModel) -> None:
    tiny_gpt2.requires_grad_(False)
    with pytest.raises(NothingTrainableError, match=r"is_trainable=True"):
        measure(tiny_gpt2, ragged())


def test_an_encoder_is_refused() -> None:
    with pytest.raises(ModelError, match="language-modelling head"):
        measure(BertModel(BertConfig(**TINY_BERT)), ragged())


def test_a_masked_language_model_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(NotCausalError, match="is_decoder=True"):
        measure(BertForMaskedLM(BertConfig(**TINY_BERT)), ragged())


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="encoder-decoder"):
        measure(T5ForConditionalGeneration(config), ragged())


@pytest.mark.parametrize("measured", [measure, sequence_logps])
def test_ids_beyond_the_vocabulary(tiny_gpt2: GPT2LMHeadModel, measured: Callable[..., object]) -> None:
    with pytest.raises(InputError, match=r"token id 259 .* 259 rows"):
        measured(tiny_gpt2, PairBatch.from_tokens([([1], [2], [259])]))


def test_an_unknown_engine(tiny_gpt2: GPT2LMHeadModel) -> None:
    with pytest.raises(InputError, match=r"'hooks'.*'func'"):
        measure(tiny_gpt2, ragged(), engine="magic")  # type: ignore[arg-type]


def test_a_parameter_on_the_meta_device(tiny_gpt2: GPT2LMHeadModel) -> None:
    tiny_gpt2.transformer.ln_f.to("meta")
    with pytest.raises(ModelError, match=r"transformer\.ln_f\.weight.*meta"):
        measure(tiny_gpt2, ragged())
